import json
import shutil

import nbformat
import pytest
from conftest import ROOT

from hcsmoe_core import sweep

SMALL = {"calibration": "demo", "sequences": 12, "length": 64}


def test_grid_is_every_combination():
    cells = sweep.grid({"model": "m"}, experts=(4, 2), linkage=("average", "ward"))
    assert cells == [{"model": "m", "experts": r, "linkage": name} for r in (4, 2) for name in ("average", "ward")]


def test_ids_follow_notebook_parameters_and_core(tmp_path, monkeypatch):
    path = tmp_path / "n.ipynb"
    shutil.copy(ROOT / "notebooks/05_accuracy.ipynb", path)
    first = sweep.cell_id(path, {"a": 1, "b": 2})
    assert sweep.cell_id(path, {"b": 2, "a": 1}) == first
    assert sweep.cell_id(path, {"a": 1, "b": 3}) != first
    monkeypatch.setattr(sweep, "core_hash", lambda: "other")
    assert sweep.cell_id(path, {"a": 1, "b": 2}) != first
    monkeypatch.undo()
    path.write_text(path.read_text() + "\n")
    assert sweep.cell_id(path, {"a": 1, "b": 2}) != first


def test_a_misspelt_parameter_is_an_error_before_anything_runs(tmp_path):
    path = sweep.notebook_path("05_accuracy")
    with pytest.raises(ValueError, match=r"05_accuracy.ipynb has no parameter 'linkge'; its parameters are model, .*linkage"):
        sweep.run_cells([(path, {"model": "demo-mixtral"}), (path, {"linkge": "ward"})], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def notebook(tmp_path, source):
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    parameters = nbformat.v4.new_code_cell('model: str = "m"  # m\nexperts: int = 0  # r\nresults: str = ""  # file')
    parameters.metadata["tags"] = ["parameters"]
    made.cells = [parameters, nbformat.v4.new_code_cell(source)]
    nbformat.write(made, tmp_path / "05_accuracy.ipynb")
    return tmp_path / "05_accuracy.ipynb"


SCORE = """
import json, pathlib
pathlib.Path(results + ".runs").open("a").write("x")
assert experts != 3 or pathlib.Path(results).parent.joinpath("go").exists(), "three"
scores = dict(tasks={"t": {"acc": experts / 10}}, mean_acc=experts / 10, mean_acc_stderr=0.1, mean_loss=1.0, loss={"d": 1.0})
size = dict(num_experts=8, weights=experts, expert_weights=experts)
pathlib.Path(results).write_text(json.dumps(dict(parameters=dict(model=model, experts=experts), scores=scores, size=size)))
"""


@pytest.mark.slow
def test_done_cells_are_kept_and_failed_ones_run_again(tmp_path):
    path, out = notebook(tmp_path, SCORE), tmp_path / "out"
    cells = [(path, {"model": "m", "experts": r}) for r in (1, 2, 3)]
    with pytest.raises(RuntimeError, match=r"1 of 3 cells failed; run again to retry them.\n.*'experts': 3.*three"):
        sweep.run_cells(cells, out, workers=2)
    assert len(list(out.glob("*.failed.ipynb"))) == 1
    assert sorted(sweep.collect(out)["experts"]) == [1, 2]
    (out / "go").touch()
    done = sweep.run_cells(cells, out, workers=2)
    assert [p.exists() for p in done] == [True] * 3
    assert not list(out.glob(".*part*"))
    runs = [len(p.read_text()) for p in out.glob("*.runs")]
    assert sorted(runs) == [1, 1, 2]  # nothing measured twice but what failed
    frame = sweep.collect(out, model="m")
    assert sorted(frame["mean_acc"]) == [0.1, 0.2, 0.3]
    missing = sweep.missing_cells(frame[frame["experts"] != 2].assign(linkage=["a", "b"]), "experts", "linkage")
    assert missing.to_records(index=False).tolist() == [(1, "b"), (3, "a")]
    with pytest.raises(FileNotFoundError, match="no 05_accuracy cells of other in"):
        sweep.collect(out, model="other")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo-mixtral", "demo-qwen"])
def test_notebooks_run_with_default_and_with_changed_parameters(model, tmp_path):
    shared = {"model": model, "figures": str(tmp_path / "figures")}
    changed = {
        "00_tour": {"layer": 2, "experts": 3},
        "01_similarity": {"layer": 3, "similarity": "weight", "linkage": "ward", "groups": 5},
        "02_dendrograms": {"layer": 1, "similarity": "router-logits", "linkage": "complete", "experts": 3},
        "03_linkage": {"layer": 1, "similarity": "router-logits", "pair": "single,complete", "groups": 5, "samples": 2},
        "04_merge": {"layer": 2, "experts": 3, "align": "weights"},
    }
    cells = [(sweep.notebook_path(n), shared | SMALL | extra) for n in changed for extra in ({}, changed[n])]
    cells += [
        (sweep.notebook_path("05_accuracy"), shared | SMALL | {"limit": 10, "experts": r, "linkage": linkage})
        for r, linkage in ((0, "average"), (4, "average"), (2, "average"), (4, "single"))
    ]
    out = tmp_path / "runs"
    executed = sweep.run_cells(cells, out, workers=2)
    ablation = {"model": model, "sweep": str(out), "figures": str(tmp_path / "figures")}
    executed.append(sweep.run_cell(sweep.notebook_path("06_ablation"), ablation, out))
    for path in executed:
        content = nbformat.read(path, as_version=4)
        kinds = [key for c in content.cells if c.cell_type == "code" for o in c.outputs for key in o.get("data", {})]
        assert not [o for c in content.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
        assert "image/png" in kinds, path.name
    results = json.loads(next(out.glob("06_ablation-*.json")).read_text())
    assert results["missing"] == [{"experts": 2, "linkage": "single"}]
    pictures = list((tmp_path / "figures" / model).iterdir())
    assert len(pictures) >= 20
    before = {p.name: p.read_bytes() for p in pictures}
    for name in ("01_similarity", "03_linkage", "04_merge"):
        sweep.run_cell(sweep.notebook_path(name), shared | SMALL, out, again=True)
    assert {p.name: p.read_bytes() for p in pictures} == before
