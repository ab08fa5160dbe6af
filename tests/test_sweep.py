import json
import math
import shutil

import matplotlib.image
import nbformat
import pandas as pd
import pytest
import torch
from conftest import ROOT
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hcsmoe_core._util import folder_of
from hcsmoe_core.checkpoint import load_tokenizer
from hcsmoe_core.studies import cache, runner, sweep

SMALL = {"calibration": "demo", "sequences": 12, "length": 64}


def test_grid_is_every_combination():
    cells = sweep.grid({"model": "m"}, experts=(4, 2), linkage=("average", "ward"))
    assert cells == [
        {"model": "m", "experts": r, "linkage": name} for r in (4, 2) for name in ("average", "ward")
    ]


def test_ids_follow_notebook_parameters_and_core(tmp_path, monkeypatch):
    path = tmp_path / "n.ipynb"
    shutil.copy(ROOT / "notebooks/05_accuracy.ipynb", path)
    first = runner.notebook_id(path, {"a": 1, "b": 2})
    assert runner.notebook_id(path, {"b": 2, "a": 1}) == first
    assert runner.notebook_id(path, {"a": 1, "b": 3}) != first
    monkeypatch.setattr(cache, "code_hash", lambda: "other")
    assert runner.notebook_id(path, {"a": 1, "b": 2}) != first
    monkeypatch.undo()
    path.write_text(path.read_text() + "\n")
    assert runner.notebook_id(path, {"a": 1, "b": 2}) != first


def test_a_misspelt_parameter_is_an_error_before_anything_runs(tmp_path):
    path = sweep.notebook_path("05_accuracy")
    with pytest.raises(
        ValueError, match=r"05_accuracy.ipynb has no parameter 'linkge'; its parameters are model, .*linkage"
    ):
        sweep.run_cells([(path, {"model": "demo-mixtral"}), (path, {"linkge": "ward"})], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def notebook(tmp_path, source):
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    parameters = nbformat.v4.new_code_cell(
        'model: str = "m"  # m\nexperts: int = 0  # r\nresults: str = ""  # file'
    )
    parameters.metadata["tags"] = ["parameters"]
    made.cells = [parameters, nbformat.v4.new_code_cell(source)]
    nbformat.write(made, tmp_path / "05_accuracy.ipynb")
    return tmp_path / "05_accuracy.ipynb"


SCORE = """
import json, pathlib
pathlib.Path(results + ".runs").open("a").write("x")
assert experts != 3 or pathlib.Path(results).parent.joinpath("go").exists(), "three"
scores = dict(tasks={"t": {"acc": experts / 10}}, mean_acc=experts / 10, mean_acc_stderr=0.1)
scores |= dict(mean_loss=1.0, loss={"d": 1.0})
size = dict(num_experts=8, weights=experts, expert_weights=experts)
parameters = dict(model=model, experts=experts)
pathlib.Path(results).write_text(json.dumps(dict(parameters=parameters, scores=scores, size=size)))
"""


@pytest.mark.slow
def test_done_cells_are_kept_and_failed_ones_run_again(tmp_path):
    path, out = notebook(tmp_path, SCORE), tmp_path / "out"
    cells = [(path, {"model": "m", "experts": r}) for r in (1, 2, 3)]
    with pytest.raises(
        RuntimeError, match=r"1 of 3 cells failed; run again to retry them.\n.*'experts': 3.*three"
    ):
        sweep.run_cells(cells, out, workers=2, retries=1)
    assert len(list(out.glob("*.failed.ipynb"))) == 1
    assert "AssertionError: three" in next(out.glob("*.failed.txt")).read_text()
    assert sorted(sweep.collect(out)["experts"]) == [1, 2]
    (out / "go").touch()
    done = sweep.run_cells(cells, out, workers=2)
    assert [p.exists() for p in done] == [True] * 3
    assert not list(out.glob(".*part*"))
    assert not list(out.glob("*.failed.*"))
    runs = [len(p.read_text()) for p in out.glob("*.runs")]
    assert sorted(runs) == [1, 1, 3]  # nothing measured twice but what failed
    frame = sweep.collect(out, model="m")
    assert sorted(frame["mean_acc"]) == [0.1, 0.2, 0.3]
    missing = sweep.missing_cells(
        frame[frame["experts"] != 2].assign(linkage=["a", "b"]), "experts", "linkage"
    )
    assert missing.to_records(index=False).tolist() == [(1, "b"), (3, "a")]
    with pytest.raises(FileNotFoundError, match="no 05_accuracy cells of other in"):
        sweep.collect(out, model="other")


DIE = """
import os, pathlib, signal
runs = len(pathlib.Path(results + ".runs").read_text())
if experts == 2 and runs <= pathlib.Path(results).parent.name.count("x"):
    os.kill(os.getppid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, runner.DEATHS + 1])
def test_a_process_that_is_killed_is_replaced(deaths, tmp_path):
    path, out = notebook(tmp_path, SCORE + DIE), tmp_path / ("x" * deaths)
    cells = [(path, {"model": "m", "experts": r}) for r in (1, 2)]
    if deaths > runner.DEATHS:
        with pytest.raises(
            RuntimeError, match=r"1 of 2 cells failed.*\n.*'experts': 2.*: .*terminated abruptly"
        ):
            sweep.run_cells(cells, out)
        assert "BrokenProcessPool" in next(out.glob("*.failed.txt")).read_text()
        assert (
            runner.state_of(next(out.glob("*.failed.txt")).with_suffix("").with_suffix(".ipynb")) == "failed"
        )
        return
    assert all(path.exists() for path in sweep.run_cells(cells, out))
    assert sorted(len(p.read_text()) for p in out.glob("*.runs")) == [1, 2]
    assert not list(out.glob(".*"))


def cells_of(model, figures, looks, scored):
    """Notebooks that look at a model, with their parameters, and cells that score it."""
    shared = {"model": model, "figures": str(figures)} | SMALL
    cells = [(sweep.notebook_path(name), shared | extra) for name, extra in looks]
    return cells + [(sweep.notebook_path("05_accuracy"), shared | {"limit": 10} | extra) for extra in scored]


def readers(model, figures, cells, where="", seed=42, **changed):
    """The notebooks that read what others measured."""
    shared = {"model": model, "figures": str(figures)}
    return [
        (sweep.notebook_path("06_ablation"), shared | {"sweep": str(cells), "where": where} | changed),
        (sweep.notebook_path("07_paper"), shared | SMALL | {"sweep": str(cells), "calibration_seed": seed}),
        *((sweep.notebook_path(name), shared) for name in ("08_methods", "09_bytes", "10_theory")),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "again"), [("demo-mixtral", True), ("demo-qwen", False)]
)  # both are drawn by the same code
def test_notebooks_run_with_default_and_with_changed_parameters_and_draw_the_same_again(
    model, again, tmp_path
):
    changed = {
        "00_tour": {"layer": 2, "experts": 3},
        "01_similarity": {"layer": 3, "expert": 5, "similarity": "weight", "linkage": "ward", "groups": 5},
        "02_dendrograms": {"layer": 1, "similarity": "router-logits", "linkage": "complete", "experts": 3},
        "03_linkage": {
            "layer": 1,
            "similarity": "router-logits",
            "pair": "single,complete",
            "groups": 5,
            "samples": 2,
        },
        "04_merge": {"layer": 2, "experts": 3, "align": "weights"},
    }
    scored = [
        {"experts": r, "linkage": linkage} for r, linkage in ((4, "average"), (2, "average"), (4, "single"))
    ]
    scored += [
        {"experts": 4, "method": "reap"},
        {"experts": 4, "linkage": "average", "calibration_seed": 43},
        {},
    ]
    out, first, second, other = (tmp_path / name for name in ("runs", "first", "second", "other"))
    reading = {
        "where": 'linkage == "average"',
        "seed": 7,
        "metric": "loss_units",
        "hue": "merge",
        "at": 2,
        "grid": "some",
    }
    default = [(name, {}) for name in changed]
    executed = sweep.run_cells(cells_of(model, first, [*default, *changed.items()], scored), out, workers=2)
    made = [(path, given) for path, given in cells_of(model, first, [], scored)]
    named = [{"id": runner.notebook_id(path, given), "parameters": given} for path, given in made]
    absent = {"id": "0" * 12, "parameters": {"model": model, "experts": 3, "method": "reap"}}
    sweep.write_grid(out, "some", model, title="Some", notebook=made[0][0], cells=[*named, absent])
    executed += sweep.run_cells(
        readers(model, first, out) + readers(model, other, out, **reading)[:2], out, workers=2
    )
    here = {"model": model, "figures": str(other), "methods": "hc-smoe,trimming,reap", "experts": "4"} | SMALL
    executed += sweep.run_cells(
        [(sweep.notebook_path(n), here) for n in ("09_bytes", "10_theory")], out, workers=2
    )
    for path in executed:
        content = nbformat.read(path, as_version=4)
        code = [c for c in content.cells if c.cell_type == "code"]
        kinds = [key for c in code for o in c.outputs for key in o.get("data", {})]
        assert not [o for c in code for o in c.outputs if o.output_type == "error"]
        assert "image/png" in kinds, path.name
    means = {r["setting"]: r for r in results_of(out, "06_ablation", where="")["means"] if r["experts"] == 4}
    assert means["hc-smoe"]["samples"] == 2
    missing = results_of(out, "06_ablation", where="")["missing"]
    assert missing == [
        {"experts": 2, "setting": "hc-smoe, linkage single"},
        {"experts": 2, "setting": "reap"},
    ]
    grid = results_of(out, "06_ablation", grid="some")
    assert [(row["state"], row["experts"], row["method"]) for row in grid["missing"]] == [
        ("missing", 3, "reap")
    ]
    assert len(grid["cells"]) == len(scored)
    assert {p.name for p in (other / model).glob("06_*table*")} == {"06_some-table.csv", "06_some-table.tex"}
    drawn = {path.name: path for path in (first / model).iterdir()}
    assert len({name[:2] for name in drawn}) == 11
    if again:
        sweep.run_cells(
            cells_of(model, second, default, [scored[0], scored[-1]]), tmp_path / "again", workers=2
        )
        sweep.run_cells(readers(model, second, out), tmp_path / "again", workers=2)
        redrawn = list((second / model).iterdir())
        assert {path.name[:2] for path in redrawn} == {name[:2] for name in drawn}
        for path in redrawn:
            assert path.read_bytes() == drawn[path.name].read_bytes(), path.name
    for path in (first / model).glob("*.png"):
        assert path.with_suffix(".pdf").stat().st_size > 1000
        assert matplotlib.image.imread(path)[..., :3].std() > 0.05, path.name


@pytest.mark.slow
def test_notebooks_run_on_any_model_folder(tmp_path):
    """Another family with a dense first layer, calibrated on a text file; and a sweep without the unmerged
    model.
    """
    config = Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )
    torch.manual_seed(0)
    folder, text = tmp_path / "some-moe", tmp_path / "text.txt"
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    load_tokenizer(folder_of("demo-qwen")).save_pretrained(folder)
    text.write_text("\n".join(f"Line {i} of a text that says {i * 7 % 13} things." for i in range(3000)))
    shared = {"model": str(folder), "figures": str(tmp_path / "figures")}
    source = {"calibration": str(text), "sequences": 8, "length": 64}
    names = ("00_tour", "01_similarity", "02_dendrograms", "03_linkage", "04_merge")
    cells = [(sweep.notebook_path(name), shared | source) for name in names]
    cells.append(
        (sweep.notebook_path("05_accuracy"), shared | source | {"experts": 4, "limit": 5, "text": str(text)})
    )
    sweep.run_cells(cells, tmp_path / "runs", workers=2)
    read = shared | {"sweep": str(tmp_path / "runs")}
    sweep.run_cells([(sweep.notebook_path("06_ablation"), read)], tmp_path / "runs")
    sweep.run_cells([(sweep.notebook_path("07_paper"), read | source)], tmp_path / "runs")
    drawn = {path.name[:2] for path in (tmp_path / "figures/some-moe").iterdir()}
    assert drawn == {"00", "01", "02", "03", "04", "05", "06", "07"}


def results_of(folder, notebook, **parameters):
    """What the cell of a notebook with these parameters left."""
    found = [json.loads(path.read_text()) for path in folder.glob(f"{notebook}-*.json")]
    return next(f for f in found if all(f["parameters"][k] == v for k, v in parameters.items()))


def test_settings_are_named_by_what_they_change():
    names = [
        sweep.setting_name(p)
        for p in (
            {"experts": 0},
            {"experts": 4},
            {"experts": 4, "method": "hc-smoe", "linkage": "average", "merge": ""},
            {"experts": 4, "method": "hc-smoe", "linkage": "single", "similarity": "weight"},
            {"experts": 4, "method": "reap"},
        )
    ]
    assert names == ["original", "hc-smoe", "hc-smoe", "hc-smoe, similarity weight, linkage single", "reap"]


def test_means_and_spreads_are_over_the_calibration_samples():
    rows = [
        ("original", 0, 42, 0.8, 1.0),
        ("hc-smoe", 4, 42, 0.6, 1.5),
        ("hc-smoe", 4, 43, 0.7, 1.7),
        ("reap", 4, 42, 0.4, 2.0),
    ]
    cells = pd.DataFrame(rows, columns=["setting", "experts", "calibration_seed", "mean_acc", "mean_loss"])
    cells = cells.assign(method="m", mean_acc_stderr=0.05, bytes=100)
    cells.loc[len(cells)] = cells.loc[1]  # measured twice
    frame = sweep.over_samples(cells).set_index("setting")
    assert frame.loc["hc-smoe", "samples"] == 2
    assert frame.loc["hc-smoe", "mean_acc"] == pytest.approx(0.65)
    assert frame.loc["hc-smoe", "mean_acc_sd"] == pytest.approx(0.1 / 2**0.5)
    assert frame.loc["hc-smoe", "mean_loss_sd"] == pytest.approx(0.2 / 2**0.5)
    assert frame.loc["hc-smoe", "retained"] == pytest.approx(0.65 / 0.8)
    assert frame.loc["hc-smoe", "retained_sd"] == pytest.approx(0.1 / 2**0.5 / 0.8)
    assert frame.loc["reap", "samples"] == 1
    assert math.isnan(frame.loc["reap", "mean_acc_sd"])
    assert sweep.over_samples(cells[1:])["retained"].isna().all()
