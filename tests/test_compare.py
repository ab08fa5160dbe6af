"""Methods side by side: cells that resume, verdicts that follow from the samples, a table that says what was
refused.
"""

import json
import math

import pandas as pd
import pytest
from test_cli import hcsmoe

from hcsmoe_core._util import InputError
from hcsmoe_core.studies import comparison, runner, sweep
from hcsmoe_core.studies.runner import CellsError
from hcsmoe_core.ui import figures

SMALL = dict(limit=2, sequences=12, length=64, dtype="float32")


def frame(losses):
    """Cells of made-up losses: {(method, seed): loss}."""
    rows = []
    for (method, seed), loss in losses.items():
        row = dict(
            method=method,
            experts=8 if method == "original" else 4,
            seed=seed,
            limit=10,
            accuracy=0.5,
            item_error=0.1,
        )
        row |= dict(loss=loss, plan_seconds=1.0, merge_seconds=1.0, peak_mb=1.0, expert_bytes=1e6)
        rows.append(row | {"refused": "no such budget" if loss is None else None})
    return pd.DataFrame(rows)


def test_verdicts_are_paired_over_the_samples():
    losses = {("original", 0): 1.0}
    for seed, base in enumerate((2.0, 3.0, 4.0)):
        losses[("hc-smoe", seed)] = base
        losses[("trimming", seed)] = base - 0.5 - 0.01 * seed  # always better, though its spread is as wide
        losses[("random", seed)] = base + (-1) ** seed  # now better, now worse
        losses[("reap", seed)] = base + 1 + 0.1 * seed
    losses[("dek", 0)] = None
    table = comparison.summary(frame(losses)).set_index("method")
    assert table["verdict"].dropna().to_dict() == {"trimming": "better", "random": "even", "reap": "worse"}
    assert table.loc["trimming", "gain"] == pytest.approx(0.51)
    # Student's t with two degrees of freedom: 4.3027
    assert table.loc["trimming", "gain_error"] == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert table.loc["hc-smoe", "loss_sd"] == pytest.approx(1.0)
    assert table.loc["dek", "samples"] == 0
    said = comparison.table(frame(losses))
    assert "refused: no such budget" in said
    lines = [line.split()[0] for line in said.splitlines() if line and "experts per layer" not in line]
    assert lines.index("trimming") < lines.index("hc-smoe") < lines.index("reap")


def test_a_kept_table_is_read_as_the_cells_are(tmp_path):
    cells = frame({("original", 0): 1.0, ("hc-smoe", 0): 2.0, ("reap", 0): 2.5}).reindex(
        columns=comparison.COLUMNS
    )
    cells.to_csv(tmp_path / "compare-some.csv", index=False)
    read = comparison.cells(f"{tmp_path}/compare-{{model}}.csv", "folder/some")
    assert comparison.table(read) == comparison.table(cells)
    with pytest.raises(FileNotFoundError, match="no table .*compare-other.csv; run: hcsmoe compare other"):
        comparison.cells(f"{tmp_path}/compare-{{model}}.csv", "other")


def test_dots_are_drawn_for_every_method():
    losses = {
        (m, s): 2.0 + i + 0.1 * s for i, m in enumerate(("hc-smoe", "reap", "trimming")) for s in (0, 1)
    }
    table = comparison.summary(frame(losses)).assign(kind="one")
    figure = figures.method_dots(
        table, value="loss", error="loss_sd", kind="kind", reference=(1.0, "original"), log=True
    )
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["hc-smoe", "reap", "trimming"]
    assert list(axes.lines[0].get_xdata()) == pytest.approx([2.05, 3.05, 4.05])


def test_bad_settings_are_refused_before_anything_is_measured(tmp_path):
    for settings, message in (
        (dict(methods=["hcsmo"]), '"method" argument must be one of'),
        (dict(experts=[9]), '"experts" argument must be a whole number from 1 to 8'),
        (dict(settings={"linkage": "centroid"}), '"linkage" argument must be one of'),
    ):
        with pytest.raises(ValueError, match=message):
            comparison.compare("demo-mixtral", **settings, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="run: hcsmoe compare demo-mixtral"):
        comparison.cells(tmp_path, "demo-mixtral")


@pytest.mark.slow
def test_cells_are_measured_once_and_shown_in_the_notebook(tmp_path, monkeypatch):
    how = dict(methods=["hc-smoe", "trimming"], experts=[4], seeds=(0, 1), folder=tmp_path / "c")
    first = comparison.compare("demo-mixtral", **how, **SMALL)
    assert len(first) == 5
    assert first["loss"].notna().all()
    original, trimmed = (first[first["method"] == m].iloc[0] for m in ("original", "trimming"))
    assert trimmed["loss"] > original["loss"]
    assert trimmed["expert_bytes"] * 2 == original["expert_bytes"]
    monkeypatch.setattr(comparison, "evaluate", lambda *_, **__: pytest.fail("measured twice"))
    again = comparison.compare("demo-mixtral", **how, **SMALL)
    assert json.loads(again.to_json()) == json.loads(first.to_json())
    parameters = {
        "model": "demo-mixtral",
        "compared": str(tmp_path / "c"),
        "figures": str(tmp_path / "figures"),
    }
    runner.complete(runner.notebook_cell(sweep.notebook_path("08_methods"), parameters, tmp_path / "out"))
    drawn = sorted(p.name for p in (tmp_path / "figures" / "demo-mixtral").iterdir())
    assert drawn == [f"08_{name}.{kind}" for name in ("accuracy", "loss") for kind in ("pdf", "png")]


@pytest.mark.slow
def test_the_command_compares_lists_and_captures_for_methods(tmp_path):
    said = hcsmoe("methods")
    assert "m-smoe: groups around dominant experts" in said
    size = ("--sequences", 12, "--length", 64, "--dtype", "float32")
    said = hcsmoe(
        "capture",
        "demo-mixtral",
        *size,
        "--for",
        "reap,trimming",
        "--for",
        "hc-smoe",
        "--out",
        tmp_path / "s.safetensors",
    )
    assert said.startswith("collecting usage, norms, sample, outputs: ")
    plan = ("plan", tmp_path / "s.safetensors", "--experts", 4)
    hcsmoe(*plan, "--method", "trimming", "--set", "ridge=0.1", "--out", tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["layers"][0]["combine"] == {
        "rule": "trimming",
        "ridge": 0.1,
    }
    merge = ("merge", "demo-mixtral", "--dtype", "float32", "--plan", tmp_path / "p.json")
    error = hcsmoe(*merge, "--out", tmp_path / "m", fails=True)
    assert "give the statistics it was made from" in error
    said = hcsmoe(*merge, "--statistics", tmp_path / "s.safetensors", "--out", tmp_path / "m")
    assert "plain; load it with any loader" in said
    assert "needs 'grams'" in hcsmoe(*plan, "--method", "sub-moe", "--out", tmp_path / "q.json", fails=True)
    assert "takes name=value with a name of" in hcsmoe(
        *plan, "--set", "linkages=x", "--out", tmp_path / "q.json", fails=True
    )
    said = hcsmoe(
        "merge", "demo-mixtral", *size, "--experts", 4, "--method", "mc-smoe", "--out", tmp_path / "mc"
    )
    assert "3 or 5 experts" in said
    few = (
        "--methods",
        "reap",
        "--experts",
        "4",
        "--seeds",
        "0",
        "--limit",
        2,
        "--sequences",
        12,
        "--length",
        64,
    )
    said = hcsmoe("compare", "demo-mixtral", *few, "--dtype", "float32", "--out", tmp_path / "c")
    assert "4 experts per layer" in said
    assert (tmp_path / "c" / "demo-mixtral.csv").exists()


def test_only_bad_input_is_a_refusal_and_a_bug_is_not_kept(tmp_path, monkeypatch):
    options = dict(methods=["hc-smoe"], experts=[4], seeds=(0,), folder=tmp_path, **SMALL)
    real = comparison.make_plan

    def raises(error):
        def make_plan(*args, **options):
            raise error

        return make_plan

    scores = {"mean_acc": 0.5, "mean_acc_stderr": 0.1, "mean_loss": 1.0}
    monkeypatch.setattr(comparison, "evaluate", lambda *_, **__: scores)
    monkeypatch.setattr(comparison, "make_plan", raises(ValueError("a bug")))
    with pytest.raises(CellsError, match=r"1 of 2 cells failed.*\n.*hc-smoe.*a bug"):
        comparison.compare("demo-mixtral", **options)
    assert len(comparison.cells(tmp_path, "demo-mixtral")) == 1
    monkeypatch.setattr(comparison, "make_plan", real)
    frame = comparison.compare("demo-mixtral", **options)
    assert frame["loss"].tolist() == [1.0, 1.0]
    monkeypatch.setattr(comparison, "make_plan", raises(InputError("no such budget")))
    frame = comparison.compare("demo-mixtral", **options | {"experts": [3]})
    assert frame["refused"].dropna().tolist() == ["no such budget"]
