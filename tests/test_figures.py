import ast
import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, tiny_model, tokens
from matplotlib.figure import Figure
from scipy.cluster import hierarchy

from hcsmoe_core import capture, cut, distances, find_moe_layers, linkage, load_plan, make_plan
from hcsmoe_core.clustering import by_first_appearance
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.statistics import DEFAULT_NEEDS, LayerStatistics, Statistics
from hcsmoe_core.studies import sweep
from hcsmoe_core.studies import tables as study
from hcsmoe_core.ui import figures
from hcsmoe_core.ui import widgets as explore
from hcsmoe_core.ui.notebook import NOTEBOOKS, Record
from tools import showcase


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("qwen2_moe")
    return model, capture(model, tokens(6), needs=DEFAULT_NEEDS, domains=list("ababab"))


def drawn(stats):
    condensed = [distances(stats, name) for name in stats.layers]
    trees = [linkage(c) for c in condensed]
    frame = pd.DataFrame(
        {"r": [2, 4, 2, 4], "acc": [0.5, 0.6, 0.4, 0.7], "se": [0.1] * 4, "linkage": ["a", "a", "b", "b"]}
    )
    tokens_taken = pd.DataFrame({"token": ["$a", " b"], "count": [9, 6], "share": [0.5, 0.1]})
    scores = {
        "tasks": {
            "demo_units": {"acc": 0.5, "acc_stderr": 0.02},
            "demo_largest": {"acc": 0.7, "acc_stderr": 0.02},
        }
    }
    return {
        "heatmap": figures.similarity_heatmap(condensed[0], trees[0], groups=4, title="t"),
        "dendrogram": figures.dendrogram(trees[0], groups=3, usage=stats.layer(0).frequency.numpy()),
        "bare": figures.dendrogram(trees[0]),
        "grid": figures.layer_grid(condensed, trees, groups=4),
        "shared": figures.layer_grid(condensed, trees, order=figures.leaf_order(trees[1])),
        "labelled": figures.similarity_heatmap(
            condensed[0], trees[0], usage=stats.layer(0).frequency.numpy(), mix=study.domain_mix(stats, 0)
        ),
        "cut": figures.cut_view(
            condensed[0], trees[0], [np.linspace(1, 0, 8)] * 3, [4, 5, 3], layer=0, uniform=4
        ),
        "expert": figures.expert_profile({"a": 0.2, "b": 0.4}, tokens_taken, expected=0.25),
        "usage": figures.usage_by_domain(stats, 0),
        "curve": figures.curve(
            frame, x="r", y="acc", hue="linkage", error="se", reference=[(0.8, "original"), (0.25, "chance")]
        ),
        "tasks": figures.task_bars(scores, before=scores),
    }


def test_figures_are_not_blank_and_the_same_bytes_each_time(measured, tmp_path):
    _, stats = measured
    for folder in ("first", "second"):
        for name, figure in drawn(stats).items():
            assert isinstance(figure, Figure)
            written = figures.save(figure, tmp_path / folder / name)
            assert [p.name for p in written] == [f"{name}.png", f"{name}.pdf"]
            assert matplotlib.image.imread(written[0])[..., :3].std() > 0.05
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name
        if path.suffix == ".pdf":
            assert b"/Type3" not in path.read_bytes()


def test_strips_below_a_heatmap_are_in_its_order(measured):
    _, stats = measured
    condensed = distances(stats, 1)
    tree, usage, mix = linkage(condensed), stats.layer(1).frequency.numpy(), study.domain_mix(stats, 1)
    assert np.nansum(list(mix.values()), 0) == pytest.approx(np.ones(8))
    figure = figures.similarity_heatmap(condensed, tree, usage=usage, mix=mix, groups=3)
    order = figures.leaf_order(tree)
    bars, strip = figure.axes[4], figure.axes[5]
    heights = [path.vertices[:, 1].max() for path in bars.collections[0].get_paths()]
    assert heights == pytest.approx(100 * usage[order])
    np.testing.assert_allclose(strip.images[0].get_array()[0], 100 * mix["a"][order])
    assert [text.get_text() for text in strip.texts] == [str(e) for e in order]


def test_groups_are_coloured_alike_in_tree_and_heatmap():
    points = np.array([0, 0.1, 5, 5.1, 5.2, 9.0])[:, None]
    tree = linkage(np.abs(points - points.T)[np.triu_indices(6, 1)])
    labels = cut(tree, 3)
    order = figures.leaf_order(tree)
    colours = figures.group_colours(labels, order)
    assert colours[2] == figures.UNMERGED
    assert len(set(colours.values())) == 3
    figure = figures.dendrogram(tree, groups=3, usage=np.full(6, 1 / 6))
    bars = [matplotlib.colors.to_hex(c) for c in figure.axes[1].collections[0].get_facecolors()]
    assert bars == [matplotlib.colors.to_hex(colours[int(labels[e])]) for e in order]
    line = figure.axes[0].lines[-1].get_ydata()[0]
    assert tree[2, 2] < line < tree[3, 2]


def test_usage_is_shown_in_per_cent_of_a_domain():
    count = torch.tensor([[1, 3], [5, 5]])
    mass = count.double()
    layer = LayerStatistics(
        torch.tensor([4, 10]), count, mass, mass, torch.ones(2, 2, 2), output_sum=torch.ones(2, 2, 3)
    )
    stats = Statistics({"m": layer}, ["x", "y"], {}, [])
    image = figures.usage_by_domain(stats, 0).axes[0].images[0].get_array()
    np.testing.assert_allclose(image, [[25, 75], [50, 50]])


def test_explorers_follow_their_controls(measured):
    model, stats = measured
    for other in (explore.usage_explorer(stats), explore.similarity_explorer(stats, model)):
        before = other.picture
        other._controls["layer"].value = 2
        assert other.picture != before
        assert not any(getattr(c, "continuous_update", False) for c in other._controls.values())
    similar = explore.similarity_explorer(stats, model)
    before = similar.picture
    similar._controls["similarity"].value = "weight"
    assert similar.picture != before


def test_picture_and_note_are_outputs_of_the_cell_that_are_replaced(measured):
    """Not widgets: a notebook that is opened without its kernel shows them all the same."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    _, stats = measured
    InteractiveShell.instance()
    usage = explore.usage_explorer(stats)
    with capture_output() as shown:
        usage._ipython_display_()
        usage._controls["layer"].value = 1
    controls, first, note, second, new_note = (output._repr_mimebundle_()[0] for output in shown.outputs)
    assert "application/vnd.jupyter.widget-view+json" in controls
    assert controls["text/plain"] == "layer: 0"
    assert not {"application/vnd.jupyter.widget-view+json"} & (first.keys() | note.keys())
    assert first["image/png"] != second["image/png"] == usage.picture
    assert ".0." in note["text/html"]
    assert ".1." in new_note["text/html"]
    ids = [output.transient.get("display_id") for output in shown.outputs]
    assert ids[1:3] == ids[3:]
    assert [output.update for output in shown.outputs] == [False, False, False, True, True]


def test_a_combination_that_does_not_exist_is_reported_and_the_picture_stays(measured):
    model, stats = measured
    similar = explore.similarity_explorer(stats, model, similarity="pairwise-cosine")
    before = similar.picture
    similar._controls["linkage"].value = "ward"
    assert "needs Euclidean distances, but these are cosine" in similar.note
    assert similar.picture == before
    assert "cka" not in similar._controls["similarity"].options  # which needs the sample
    with pytest.raises(ValueError, match="needs Euclidean distances"):
        explore.similarity_explorer(stats, model, similarity="pairwise-cosine", linkage="ward")


def test_cuts_are_drawn_by_hand_and_saved_as_a_plan(measured, tmp_path, monkeypatch):
    model, stats = measured
    cutting = explore.CutExplorer(stats, model, experts=4, path=tmp_path / "p.json")
    first, controls = cutting.picture, cutting._controls
    assert matplotlib.image.imread(io.BytesIO(first))[..., :3].std() > 0.05
    assert "50 % of its expert weights saved" in cutting.note
    assert cutting.counts == [4, 4, 4]
    controls["experts"].value = 2
    assert cutting.counts == [2, 4, 4]
    assert cutting.picture != first
    assert "75 % of its expert weights saved" in cutting.note
    assert "All layers: 10 experts" in cutting.note
    controls["layer"].value = 1
    assert controls["experts"].value == 4  # each layer has its own
    tree = merge_tree(stats, 1)
    for groups in range(8, 0, -1):  # dragging the cut from the bottom of the tree to its top
        controls["height"].value = (tree[8 - groups, 2] if groups > 1 else tree[-1, 2] * 1.04) / (
            tree[-1, 2] * 1.05
        ) - 2e-3
        wanted = cut(tree, cutting.counts[1]).tolist()
        height = controls["height"].value * tree[-1, 2] * 1.05
        assert wanted == by_first_appearance(hierarchy.fcluster(tree, height, "distance")).tolist()
        assert controls["experts"].value == cutting.counts[1]
    controls["height"].value = 0.5
    before = cutting.counts[1]
    while cutting.counts[1] == before:  # by keyboard, a small step at a time
        controls["height"].value += controls["height"].step
        assert controls["height"].value < 1
    assert cutting.counts[1] < before
    controls["experts"].value = 5
    cutting._buttons["save plan"].click()
    assert "hcsmoe merge MODEL --plan" in cutting._message.value
    saved = load_plan(tmp_path / "p.json")
    assert [layer.num_groups for layer in saved.layers] == cutting.counts == [2, 5, 4]
    assert saved.layers == make_plan(stats, experts=[2, 5, 4]).layers
    monkeypatch.setattr(
        explore,
        "evaluate",
        lambda model, *_, **__: {"mean_loss": float(find_moe_layers(model)[0].num_stored)},
    )
    cutting._buttons["apply and score"].click()
    assert "Loss 8.0000 before, 2.0000 with this plan (11 experts in all)" in cutting._message.value
    assert not find_moe_layers(model)[0].merged
    cutting._buttons["same in every layer"].click()
    assert cutting.counts == [5, 5, 5]
    cutting._path.value = str(tmp_path)
    cutting._buttons["save plan"].click()
    assert "is a folder" in cutting._message.value
    assert all(c.description for c in (*controls.values(), *cutting._buttons.values(), cutting._path))


def test_values_out_of_range_are_errors_where_a_slider_would_clamp(measured):
    model, stats = measured
    with pytest.raises(ValueError, match='"layer" argument must be a whole number from 0 to 2; not 3'):
        explore.usage_explorer(stats, layer=3)
    with pytest.raises(ValueError, match='"experts kept" argument must be a whole number from 1 to 8; not 9'):
        explore.CutExplorer(stats, model, experts=9, path="p.json")
    with pytest.raises(ValueError, match='"linkage" argument must be one of'):
        explore.similarity_explorer(stats, model, linkage="centroid")


def chance_lines(figure):
    """By task: where the line of guessing is drawn."""
    axes = figure.axes[0]
    (line,) = [line for line in axes.lines if line.get_label() == "chance"] or [None]
    if line is None:
        return {}
    names = [text.get_text() for text in axes.get_yticklabels()]
    points = zip(line.get_xdata(), line.get_ydata(), strict=True)
    return {names[round(y + 0.5)]: x for x, y in list(points)[::3]}


def test_chance_is_that_of_each_task():
    names = ("boolq", "rte", "winogrande", "arc_easy", "demo_units", "of_my_own")
    scores = {"tasks": {name: {"acc": 0.6, "acc_stderr": 0.01} for name in names}}
    expected = {"boolq": 50, "rte": 50, "winogrande": 50, "arc_easy": 25, "units": 25}
    assert chance_lines(figures.task_bars(scores)) == expected
    assert figures.chance_level("boolq", "arc_easy", "demo_units") == pytest.approx(1 / 3)
    assert figures.chance_level("boolq", "of_my_own") is None
    assert figures.chance_level() is None
    assert chance_lines(figures.task_bars({"tasks": {"of_my_own": {"acc": 0.6, "acc_stderr": 0.1}}})) == {}


def test_bars_of_tasks_without_accuracy_and_of_one_item():
    generated = {"exact_match,strict-match": 0.3, "exact_match_stderr,strict-match": 0.1, "items": 20}
    one_item = {"acc": 1.0, "acc_norm": 1.0, "items": 1}
    tasks = {"gsm8k": generated, "boolq": one_item, "wikitext": {"word_perplexity": 20.0, "items": 5}}
    figure = figures.task_bars({"tasks": tasks}, before={"tasks": {"boolq": one_item}})
    figures.png(figure)
    bars = [bar.get_width() for bar in figure.axes[0].patches]
    assert bars[2:] == [30, 100]
    assert np.isnan(bars[0])  # the other model was not scored on it
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["gsm8k (exact match)", "boolq"]
    figures.png(figures.task_bars({"tasks": {"wikitext": tasks["wikitext"]}}))


def test_a_curve_leaves_out_settings_that_are_missing():
    frame = pd.DataFrame({"x": [2.0, 4.0, np.nan], "y": [0.5, 0.6, 0.7]})
    axes = figures.curve(frame, x="x", y="y").axes[0]
    assert axes.get_xticks().tolist() == [2, 4]
    figures.png(figures.curve(frame.iloc[2:], x="x", y="y"))


def test_numbers_are_legible_on_the_colour_of_their_cell():
    rows = [
        {"combination": w, "domain": d, "tokens": 1, "error": e}
        for w, d, e in (("a", "all", 0.6), ("a", "x", 1.2), ("b", "all", 4.0), ("b", "x", 0.0))
    ]
    axes = figures.domain_errors(pd.DataFrame(rows)).axes[0]
    colours = {text.get_text(): matplotlib.colors.to_hex(text.get_color()) for text in axes.texts}
    assert colours["0.00"] == colours["0.60"] == colours["1.20"] == "#ffffff"
    assert colours["4.00"] != "#ffffff"


@pytest.mark.parametrize("started_in", ["", "notebooks"])
def test_a_record_writes_into_the_project_wherever_the_notebook_is_started(started_in, tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/00_tour.ipynb").write_text("{}")
    monkeypatch.chdir(tmp_path / started_in)
    for _ in range(2):  # its cell may be run again
        record = Record("00_tour", {"model": "a/model"}, figures="figures")
    record.data(pd.DataFrame({"a": [1]}))
    assert (tmp_path / "runs/00_tour/model/results.csv").read_text() == "a\n1\n"
    record.write(scores={"acc": 1})
    content = json.loads((tmp_path / "runs/00_tour/model/results.json").read_text())
    assert content["scores"] == {"acc": 1}  # before anything is drawn
    record.figure(figures.dendrogram(linkage(np.array([1.0, 2.0, 3.0]))), "tree")
    record.close(scores={"acc": 1})
    content = json.loads((tmp_path / "runs/00_tour/model/results.json").read_text())
    assert content["figures"] == ["figures/model/00_tree.png", "figures/model/00_tree.pdf"]
    assert (tmp_path / content["figures"][1]).is_file()


def test_scores_are_written_before_they_are_drawn():
    cells = json.loads((ROOT / "notebooks/05_accuracy.ipynb").read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    assert 0 < source.index("evaluate(") < source.index("record.write(scores=") < source.index("task_bars(")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_change_to_the_project_before_anything_is_read(path):
    """A record does; of our own modules only imports come before it, and no number is worked out."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    body = ast.parse("".join(cells[1]["source"])).body
    first = next(i for i, node in enumerate(body) if "Record(" in ast.unparse(node))
    allowed = {"dict", "Record"}
    calls = {
        ast.unparse(n.func) for node in body[: first + 1] for n in ast.walk(node) if isinstance(n, ast.Call)
    }
    assert calls <= allowed


@pytest.mark.parametrize(("limit", "folder"), [(None, "all-items"), (5, "5-items")])
def test_the_showcase_runs_every_notebook_with_parameters_that_it_has(limit, folder, tmp_path, monkeypatch):
    cells = []

    def run_cells(given, _, **__):
        for notebook, parameters in given:
            sweep.check_parameters(notebook, parameters)
        cells.extend(given)
        return [notebook for notebook, _ in given]

    monkeypatch.setattr(sweep, "run_cells", run_cells)
    monkeypatch.setattr(showcase, "report", lambda *_: None)
    showcase.run(["demo-mixtral"], tmp_path, "figures", 1, limit)
    assert {Path(notebook).stem for notebook, _ in cells} == set(NOTEBOOKS)
    scored = [parameters for notebook, parameters in cells if Path(notebook).stem == "05_accuracy"]
    assert {parameters.get("limit") for parameters in scored} == {limit}
    read = [parameters["sweep"] for _, parameters in cells if "sweep" in parameters]
    assert read == [str(tmp_path / folder)] * 2
