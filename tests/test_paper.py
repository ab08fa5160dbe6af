import json

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from hcsmoe_core.demo import tasks as demo_tasks
from hcsmoe_core.statistics import LayerStatistics, Statistics
from hcsmoe_core.studies import paper, runner, sweep
from hcsmoe_core.ui import figures

QWEN, MIXTRAL = "Qwen/Qwen1.5-MoE-A2.7B-Chat", "mistralai/Mixtral-8x7B-v0.1"
SIZE = {"demo-qwen": 32, "demo-mixtral": 8, QWEN: 60, MIXTRAL: 8}


def cell(model, experts, score, *, calibration_seed=42, tasks=None, **steps):
    """A results.json of 05_accuracy as it would be; ``tasks`` are all scored the same."""
    tasks = tasks or (demo_tasks.NAMES if model.startswith("demo") else paper.table_of("qwen")["tasks"])
    parameters = dict(
        model=model,
        dtype="float32",
        calibration="",
        sequences=0,
        length=0,
        calibration_seed=calibration_seed,
        experts=experts,
    )
    parameters |= (
        dict(method="hc-smoe", similarity="", linkage="", merge="", tasks="", limit=0, text="demo") | steps
    )
    size = dict(
        num_experts=SIZE[model], weights=1000 + 100 * (experts or SIZE[model]), expert_weights=1, bytes=2**30
    )
    scores = dict(
        tasks={t: {"acc": score, "acc_stderr": 0.01} for t in tasks}, mean_acc=score, mean_acc_stderr=0.01
    )
    return {"parameters": parameters, "scores": scores | {"mean_loss": 1.5}, "size": size}


def collected(folder, cells):
    folder.mkdir(exist_ok=True)
    for i, content in enumerate(cells):
        (folder / f"05_accuracy-{i}.json").write_text(json.dumps(content))
    return sweep.collect(folder, model=cells[0]["parameters"]["model"])


def row(frame, method, experts):
    found = frame[(frame["method"] == method) & (frame["experts"] == experts)]
    assert len(found) == 1
    return found.iloc[0]


def test_published_values_are_those_of_the_paper():
    value = {
        (n, r["method"], r["experts"]): r for n in ("qwen", "mixtral") for r in paper.table_of(n)["rows"]
    }
    assert (
        value["qwen", "hc-smoe-average", 45]["average"] == 0.5716
    )  # 2.14 % above the best baseline, says the abstract
    assert value["qwen", "f-prune", 45]["average"] == 0.5502
    assert value["qwen", "hc-smoe-average", 30]["average"] - value["qwen", "f-prune", 30][
        "average"
    ] == pytest.approx(0.0695)
    assert value["mixtral", "hc-smoe-average", 6]["scores"]["boolq"] == 0.8554
    assert value["mixtral", "hc-smoe-single", 4]["average"] == 0.5877
    linkage = {r["method"]: r["average"] for r in paper.table_of("linkage")["rows"]}
    assert linkage["average, expert-output"] == 0.5459
    assert linkage["average, router-logits"] == 0.3153
    assert [paper.table_of(n)["number"] for n in ("qwen", "mixtral", "merging")] == [
        "Table 2",
        "Table 3",
        "Table 7",
    ]
    for name in ("qwen", "mixtral"):
        for line in paper.table_of(name)["rows"]:
            assert len(line["scores"]) == 8
            assert line["average"] == pytest.approx(np.mean(list(line["scores"].values())), abs=1.01e-4), line


def test_a_table_over_four_tasks_agrees_with_the_main_table():
    main = next(
        r for r in paper.table_of("qwen")["rows"] if r["experts"] == 45 and r["method"] == "hc-smoe-average"
    )
    four = np.mean([main["scores"][t] for t in paper.table_of("linkage")["tasks"]])
    assert four == pytest.approx(0.5459, abs=5e-5)


@pytest.mark.parametrize(
    ("model", "same"),
    [
        (QWEN, True),
        ("/data/models/Qwen1.5-MoE-A2.7B-Chat/", True),
        ("Qwen/Qwen1.5-MoE-A2.7B", False),  # the base model is another one
        ("me/Qwen1.5-MoE-A2.7B-Chat-merged", False),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", False),
        ("demo-qwen", False),
    ],
)
def test_models_are_matched_by_their_last_component_to_the_letter(model, same):
    assert paper.is_model(model, "Qwen1.5-MoE-A2.7B-Chat") == same
    assert ("The models differ" in paper.title("qwen", model)) != same
    assert "The models differ" in paper.title("mixtral", model)


def test_rows_line_up_one_to_one_on_the_papers_model(tmp_path):
    scored = [
        cell(QWEN, 0, 0.6),
        cell(QWEN, 45, 0.5, method="f-prune"),
        cell(QWEN, 30, 0.4, linkage="single"),
    ]
    # Three samples, one of them twice: once with a step spelt out that is the method's own.
    scored += [cell(QWEN, 45, s, calibration_seed=i) for i, s in enumerate((0.55, 0.57, 0.59))]
    scored += [cell(QWEN, 45, 0.59, calibration_seed=2, linkage="average", merge="frequency")]
    scored += [cell(QWEN, 45, 0.1, linkage="ward")]
    scored[1]["scores"]["tasks"]["rte"]["acc"] = 0.9
    frame = paper.line_up(collected(tmp_path, scored), "qwen")
    assert len(frame) == 13
    pruned = row(frame, "f-prune", 45)
    assert pruned["ours"] == pytest.approx(0.55)  # seven at .5 and one at .9, whatever mean_acc says
    assert pruned["difference"] == pytest.approx(0.55 - 0.5502)
    merged = row(frame, "hc-smoe-average", 45)
    assert (merged["ours"], merged["sd"], merged["seeds"]) == (pytest.approx(0.57), pytest.approx(0.02), 3)
    assert merged["retained"] == pytest.approx(0.57 / 0.6)
    assert merged["retained_sd"] == pytest.approx(0.02 / 0.6)
    assert merged["published_retained"] == pytest.approx(0.5716 / 0.6008)
    assert row(frame, "hc-smoe-single", 30)["ours"] == pytest.approx(0.4)
    assert set(frame.loc[frame["ours"].isna(), "missing"]) == {"ours: not measured"}
    assert frame["ours"].isna().sum() == 13 - 4
    tasks = paper.by_task(sweep.collect(tmp_path, model=QWEN), "qwen")
    assert len(tasks) == 3 * 13
    assert tasks.loc[45, "f-prune", "difference"]["rte"] == pytest.approx(0.9 - 0.769)
    assert tasks.loc[45, "f-prune", "ours"]["boolq"] == 0.5
    assert tasks.loc[30, "m-smoe", "ours"].isna().all()


def test_scores_on_other_tasks_are_no_score_of_the_papers_model(tmp_path):
    cells = collected(tmp_path, [cell(MIXTRAL, 0, 0.7), cell(MIXTRAL, 4, 0.5, tasks=["boolq", "rte"])])
    found = row(paper.line_up(cells, "mixtral"), "hc-smoe-average", 4)
    assert found["missing"] == "ours: other tasks"
    assert np.isnan(found["ours"])
    shape = row(paper.line_up(cells, "qwen"), "none", 60)
    assert np.isnan(shape["difference"])


@pytest.mark.parametrize(("model", "kept"), [("demo-qwen", (24, 16, 8)), ("demo-mixtral", (6, 4, 2))])
def test_embedded_models_line_up_by_share(model, kept, tmp_path):
    cells = collected(tmp_path, [cell(model, 0, 0.8), cell(model, kept[0], 0.72), cell(model, kept[2], 0.4)])
    for name, counts in (("qwen", (45, 30)), ("mixtral", (6, 4))):
        frame = paper.line_up(cells, name)
        shown = row(frame, "hc-smoe-average", counts[0])
        assert shown["our_experts"] == kept[0]
        assert shown["retained"] == pytest.approx(0.9)
        assert frame["difference"].isna().all()
        assert row(frame, "m-smoe", counts[1])["our_experts"] == kept[1]
    assert paper.line_up(cells, "extreme").iloc[0][["our_experts", "ours"]].tolist() == [kept[2], 0.4]
    assert f"{model} is not Qwen1.5-MoE-A2.7B-Chat" in paper.title("linkage", model)
    savings = paper.efficiency(cells)
    assert savings["missing"].tolist() == ["", "ours: not measured"] * 2
    assert savings["gb"].dropna().tolist() == [1, 1]
    assert savings["published_share"].tolist() == pytest.approx([1, 8.1 / 14.3, 1, 24.2 / 46.7])


def test_every_row_of_every_table_has_its_place(tmp_path):
    frames = {
        n: paper.line_up(collected(tmp_path, [cell("demo-qwen", 0, 0.8)]), n)
        for n in paper.published()["tables"]
    }
    assert {n: len(f) for n, f in frames.items()} == {
        "qwen": 13, "mixtral": 13, "linkage": 9, "clustering": 6, "merging": 6, "extreme": 1
    }  # fmt: skip
    assert frames["linkage"]["missing"].iloc[0] == "published: not recovered; ours: not measured"
    assert "0.5712 to 0.5716" in frames["merging"]["remark"].iloc[0]
    assert row(frames["clustering"], "kmeans-fixed", 45)["missing"] == "ours: no equal setting"


@pytest.mark.parametrize("model", ["demo-qwen", "demo-mixtral", QWEN])
def test_the_cells_that_are_wanted_fill_every_row(model, tmp_path):
    wanted = paper.wanted(SIZE[model])
    cells = collected(tmp_path, [cell(model, w.pop("experts"), 0.5, **w) for w in wanted])
    assert len(cells) == len(wanted)
    assert paper.unmeasured(cells).empty
    for name in paper.published()["tables"]:
        frame = paper.line_up(cells, name)
        assert set(frame.loc[frame["ours"].isna(), "method"]) <= {"kmeans-fixed"}
    fewer = paper.unmeasured(cells[cells["method"] != "fix-dom"])
    assert set(fewer["method"]) == {"fix-dom"}
    assert set(fewer["merge"]) == {"average"}


def test_cells_of_several_studies_are_not_mixed(tmp_path):
    mixed = [cell("demo-qwen", 0, 0.8), cell("demo-qwen", 24, 0.7)]
    mixed[1]["parameters"]["limit"] = 10
    with pytest.raises(ValueError, match=r"several studies: limit is 0, 10; keep a folder for each"):
        paper.line_up(collected(tmp_path / "a", mixed), "qwen")
    mixed[1]["parameters"] |= {"limit": 0, "sequences": 96, "calibration": "demo"}  # the default, spelt out
    assert len(paper.line_up(collected(tmp_path / "b", [*mixed, cell("demo-qwen", 16, 0.6)]), "qwen")) == 13
    mixed[1]["parameters"]["sequences"] = 12
    with pytest.raises(ValueError, match=r"sequences is 12, 96"):
        paper.line_up(collected(tmp_path / "b", [*mixed, cell("demo-qwen", 16, 0.6)]), "qwen")
    both = pd.concat([collected(tmp_path / "c", [cell(m, 0, 0.8)]) for m in ("demo-qwen", "demo-mixtral")])
    with pytest.raises(ValueError, match="cells of demo-qwen, demo-mixtral"):
        paper.line_up(both, "qwen")
    with pytest.raises(ValueError, match='"table" argument must be one of "qwen"'):
        paper.line_up(both, "table 2")


def statistics(layers, experts, domains):
    rng = np.random.default_rng(0)
    sums = {}
    for i in range(layers):
        count = torch.from_numpy(rng.integers(1, 100, (len(domains), experts)))
        mass = count.double()
        sums[f"l{i}"] = LayerStatistics(
            count.sum(1), count, mass, mass, torch.ones(len(domains), experts, experts)
        )
    return Statistics(sums, list(domains), {}, [])


def test_bars_stand_for_shares_of_routed_tokens():
    stats = statistics(5, 6, "abc")
    axes = figures.expert_frequencies(stats).axes
    assert len(axes) == 5
    for drawn, layer in zip(axes, stats.layers.values(), strict=True):
        count = layer.usage_count.numpy()
        heights = np.array([bar.get_height() for bar in drawn.patches]).reshape(3, 6)
        np.testing.assert_allclose(heights, 100 * count / count.sum())
        tops = [bar.get_y() + bar.get_height() for bar in drawn.patches[-6:]]
        np.testing.assert_allclose(tops, 100 * count.sum(0) / count.sum())
    many = figures.expert_frequencies(statistics(1, 4, "abcdefghijkl")).axes[0].patches
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in many}
    assert len(looks) == 12  # every domain can be told from the others


def test_published_is_drawn_beside_ours(tmp_path):
    cells = [
        cell("demo-qwen", 0, 0.8),
        cell("demo-qwen", 24, 0.7, calibration_seed=1),
        cell("demo-qwen", 24, 0.74, calibration_seed=2),
    ]
    frame = paper.line_up(collected(tmp_path, cells), "qwen")
    for width, panels in ((figures.PAGE, 2), (figures.COLUMN, 2)):
        figure = figures.published_beside_ours(frame, width=width)
        assert len(figure.axes) == panels
        theirs = next(line for line in figure.axes[0].lines if line.get_label() == "published")
        np.testing.assert_allclose(theirs.get_xdata()[4], 100 * 0.5716 / 0.6008)
        bars = figure.axes[0].containers[0]
        np.testing.assert_allclose(bars.lines[0].get_xdata()[4], 90)
        np.testing.assert_allclose(
            np.diff(bars.lines[2][0].get_segments()[4][:, 0]), 2 * 100 * np.std([0.7, 0.74], ddof=1) / 0.8
        )
        absent = next(line for line in figure.axes[0].lines if line.get_label() == "ours not measured")
        assert absent.get_ydata().tolist() == [0, 1, 2, 3, 5]


@pytest.mark.slow
def test_figures_are_not_blank_and_the_same_bytes_each_time(tmp_path):
    frame = paper.line_up(
        collected(tmp_path / "cells", [cell("demo-qwen", 0, 0.8), cell("demo-qwen", 16, 0.6)]), "qwen"
    )
    for folder in ("first", "second"):
        for width in (figures.COLUMN, figures.PAGE):
            drawn = {
                "bars": figures.expert_frequencies(statistics(4, 16, "ab"), title="t", width=width),
                "many": figures.expert_frequencies(statistics(9, 60, "a"), width=width),
                "dots": figures.published_beside_ours(frame, title="a title " * 10, width=width),
            }
            for name, figure in drawn.items():
                picture = matplotlib.image.imread(
                    figures.save(figure, tmp_path / folder / f"{name}-{width}")[0]
                )
                assert picture[..., :3].std() > 0.05
                assert picture.shape[1] <= 220 * (
                    width + 0.1
                )  # nothing sticks out of the width that was asked for
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo-qwen", "demo-mixtral"])
def test_the_notebook_shows_every_table_of_a_sweep_that_has_some_rows(model, tmp_path):
    half, source = SIZE[model] // 2, {"calibration": "demo", "sequences": 12, "length": 64}
    cells = [
        cell(model, 0, 0.8),
        cell(model, half, 0.6, **source),
        cell(model, half, 0.5, method="m-smoe", **source),
    ]
    cells.append(
        cell(model, half, 0.1, method="m-smoe")
    )  # calibrated on another source, which is not looked at
    collected(tmp_path / "cells", cells)
    parameters = {
        "model": model,
        "sweep": str(tmp_path / "cells"),
        "figures": str(tmp_path / "figures"),
    } | source
    made = runner.notebook_cell(sweep.notebook_path("07_paper"), parameters, tmp_path / "runs")
    path = runner.complete(made)
    outputs = {c.id: c.outputs for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"}
    assert not [o for found in outputs.values() for o in found if o.output_type == "error"]
    for name in (*paper.published()["tables"], "efficiency"):
        text = "".join(o.text for o in outputs[name] if o.output_type == "stream")
        assert f"The models differ: {model} is not" in text, name
    pictures = [
        name for name, found in outputs.items() if any("image/png" in o.get("data", {}) for o in found)
    ]
    assert pictures == ["qwen-figure", "mixtral-figure", "frequencies"]
    files = {p.name for p in (tmp_path / "figures" / model).iterdir()}
    assert files == {
        f"07_{name}.{kind}" for name in ("qwen", "mixtral", "frequencies") for kind in ("png", "pdf")
    }
    results = json.loads(path.with_suffix(".json").read_text())
    assert len(results["tables"]) == 48
    measured = [r for r in results["tables"] if r["table"] == "qwen" and r["ours"] is not None]
    assert [(r["method"], round(r["retained"], 6)) for r in measured] == [
        ("none", 1), ("m-smoe", 0.625), ("hc-smoe-average", 0.75)
    ]  # fmt: skip
    assert len(results["unmeasured"]) == len(paper.wanted(SIZE[model])) - 3
    assert len(results["usage"]) == 4
