"""What a researcher's own notebook asks of the Python interface."""

import inspect
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import EXPERTS, ROOT, tiny_model, tokens
from matplotlib.figure import Figure
from scipy.spatial.distance import squareform

import hcsmoe_core as hc
from hcsmoe_core._util import InputError
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.statistics import DEFAULT_NEEDS


@pytest.fixture(scope="module")
def mixtral():
    return tiny_model("mixtral")


@pytest.fixture(scope="module")
def stats(mixtral):
    return hc.capture(mixtral, tokens(), domains=["a", "b"] * 3, needs=DEFAULT_NEEDS)


def test_signatures_complete_and_the_import_is_cheap():
    options = inspect.signature(hc.make_plan).parameters
    for name in ("linkage", "similarity", "metric", "group", "budget", "merge", "combine", "router", "align"):
        assert options[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert options[name].default is None
    stub = (ROOT / "hcsmoe_core" / "__init__.pyi").read_text()
    named = {n: m for m, n in re.findall(r"^from (hcsmoe_core\S*) import (\w+) as \2$", stub, re.M)}
    verbs = {name: f"hcsmoe_core.{module}" for name, module in hc._VERBS.items()}
    assert {name: named[name] for name in verbs} == verbs
    assert set(named) - set(verbs) == {"__version__", *hc._MODULES}
    assert {*hc._VERBS, *hc._MODULES} <= set(dir(hc))
    for name in hc._VERBS:
        if inspect.isfunction(verb := getattr(hc, name)):
            signature = inspect.signature(verb)
            kinds = [parameter.annotation for parameter in signature.parameters.values()]
            assert inspect.Parameter.empty not in [*kinds, signature.return_annotation], name
    assert (ROOT / "hcsmoe_core" / "py.typed").is_file()
    script = "import sys, hcsmoe_core\nassert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_options_that_are_none_are_the_methods_own(stats):
    plain = hc.make_plan(stats, experts=4)
    assert hc.make_plan(stats, experts=4, linkage=None, budget=None, guard=None) == plain
    assert hc.make_plan(stats, experts=4, linkage="single").settings["linkage"] == "single"
    with pytest.raises(InputError, match='"setting" argument must be one of'):
        hc.make_plan(stats, experts=4, linkege="single")


def test_experts_are_numpy_integers_or_shares(stats):
    plan = hc.make_plan(stats, experts=4)
    assert hc.make_plan(stats, experts=np.int64(4)) == hc.make_plan(stats, experts=0.5) == plan
    assert hc.make_plan(stats, experts=np.float32(0.3)).settings["experts"] == 2
    assert type(hc.make_plan(stats, experts=np.int64(4)).settings["experts"]) is int
    assert hc.make_plan(stats, experts=[0.5, 3, np.int64(2)]).settings["experts"] == [4, 3, 2]
    for bad in (0.01, 1.5, 1.0, "half", True):
        with pytest.raises(InputError, match=f'"experts" argument must be .*; not {bad!r}'):
            hc.make_plan(stats, experts=bad)


def test_statistics_and_plans_are_short_and_a_table_in_a_notebook(stats):
    plan = hc.make_plan(stats, experts=4)
    for thing in (stats, plan, stats.layers[0]):
        assert len(repr(thing)) < 300
        assert "\n" not in repr(thing)
    assert "3 MoE layers of 8 experts, 120 tokens of a, b" in repr(stats)
    assert "24 experts to 12; hc-smoe, similarity expert-output, linkage average" in repr(plan)
    for thing in (stats, plan):
        table = pd.read_html(__import__("io").StringIO(thing._repr_html_()))[0]
        assert table.shape[0] == 4
        assert table.iloc[1:, 1].tolist() == list(stats.layers)
    named = hc.Statistics.from_outputs({"<b>x": np.eye(3)}, name="<script>")
    assert "<b>" not in named._repr_html_()
    assert "<script>" not in named._repr_html_()
    assert "&lt;script&gt;" in named._repr_html_()


def test_layers_go_by_name_and_by_number(stats):
    names = list(stats.layers)
    assert stats.layers[0] is stats.layer(0) is stats.layers[names[0]]
    assert stats.layers[-1] is stats.layer(-1) is stats.layers[np.int64(2)] is stats.layers[names[2]]
    assert 0 not in stats.layers
    assert np.array_equal(hc.distances(stats, -1), hc.distances(stats, names[2]))
    for bad in (3, -4, "x", 0.5):
        with pytest.raises(InputError, match='"layer" argument'):
            stats.layers[bad]


def test_plots_take_statistics(stats):
    from matplotlib import pyplot

    for draw in (hc.plot.heatmap, hc.plot.dendrogram):
        assert isinstance(draw(stats, layer=0), Figure)
        assert isinstance(draw(stats, -1, groups=4, linkage="ward", title="ward"), Figure)
        figure, axes = pyplot.subplots()
        assert draw(stats, layer=1, groups=4, ax=axes) is axes
        assert {text.get_text() for text in axes.texts} == set(map(str, range(EXPERTS)))
        figure.canvas.draw()
        pyplot.close(figure)
    figure, axes = pyplot.subplots()
    hc.plot.heatmap(stats, layer=1, ax=axes, cmap="viridis", vmax=1.5)
    assert axes.images[0].get_cmap().name == "viridis"
    assert axes.images[0].norm.vmax == 1.5
    condensed = hc.distances(stats, 1)
    order = list(dict.fromkeys(int(text.get_text()) for text in axes.texts))
    np.testing.assert_allclose(axes.images[0].get_array(), squareform(condensed)[np.ix_(order, order)])
    pyplot.close(figure)
    for figure in (
        hc.plot.layers(stats, groups=4),
        hc.plot.usage(stats),
        hc.plot.usage(stats, layer=0),
        hc.plot.cuts(stats),
        hc.plot.cuts(stats, 3, linkage="complete"),
    ):
        assert isinstance(figure, Figure)
        assert len(figure._repr_png_()) > 5000


def test_cuts_are_drawn_without_grams(mixtral):
    assert isinstance(hc.plot.cuts(hc.capture(mixtral, tokens(2)), 4), Figure)


def test_distances_become_a_labelled_frame(stats):
    condensed = hc.distances(stats, 0)
    frame = hc.plot.frame(condensed)
    assert frame.shape == (EXPERTS, EXPERTS)
    assert frame.index.name == frame.columns.name == "expert"
    assert frame.loc[2, 5] == frame.loc[5, 2] == squareform(condensed)[2, 5]
    assert hc.plot.frame(condensed, names=list("abcdefgh")).loc["c", "f"] == frame.loc[2, 5]
    with pytest.raises(InputError, match='"distances" argument must be condensed'):
        hc.plot.frame(frame)


RAGGED = [list(range(3, 3 + n)) for n in (7, 3, 9, 5)]


def padded(side="right", width=9):
    ids, mask = torch.full((4, width), 1), torch.zeros(4, width, dtype=torch.long)
    for row, values in enumerate(RAGGED):
        where = slice(0, len(values)) if side == "right" else slice(width - len(values), width)
        ids[row, where], mask[row, where] = torch.tensor(values), 1
    return {"input_ids": ids, "attention_mask": mask}


def same_statistics(first, second):
    assert first.sequences == second.sequences
    assert torch.equal(first.sampled, second.sampled)
    for name, sums in first.collected_layers if hasattr(first, "collected_layers") else first.layers.items():
        other = second.layers[name]
        for key, value in sums.collected().items():
            torch.testing.assert_close(value, getattr(other, key), rtol=1e-6, atol=1e-8, equal_nan=True)
        torch.testing.assert_close(sums.sample.inputs, other.sample.inputs, rtol=1e-6, atol=1e-9)
        assert torch.equal(sums.sample.index, other.sample.index)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("every", [1, 2])
def test_padding_counts_nowhere(family, every):
    model = tiny_model(family, torch.float64)
    options = dict(needs=(*DEFAULT_NEEDS, "sample"), every=every)
    alone = [
        hc.capture(model, torch.tensor([row]), domains=[domain], **options)
        for row, domain in zip(RAGGED, "xyxx", strict=True)
    ]
    whole = alone[0] + alone[1] + alone[2] + alone[3]
    if family == "gpt_oss":  # its attention is float32 inside
        torch.set_default_dtype(torch.float32)
        got = hc.capture(model, padded(), domains="xyxx", **options)
        assert got.num_tokens == sum(map(len, RAGGED))
        assert torch.equal(got.layers[0].usage_count, whole.layers[0].usage_count)
        return
    for batch_size in (1, 3, 8):
        for side in ("left", "right"):
            got = hc.capture(model, padded(side), domains="xyxx", batch_size=batch_size, **options)
            assert got.num_tokens == sum(map(len, RAGGED))
            if every == 1:
                same_statistics(got, whole)
            else:  # what is scaled to all tokens is by domain and capture
                assert torch.equal(got.layers[0].usage_count, whole.layers[0].usage_count)
                assert torch.equal(got.sampled, whole.sampled)


def test_capture_takes_what_people_hold(mixtral):
    datasets = pytest.importorskip("datasets")
    from transformers import BatchEncoding

    rows = padded()
    wanted = hc.capture(mixtral, rows, needs=("usage", "sample"))
    assert wanted.num_tokens == sum(map(len, RAGGED))
    items = [{key: value[i] for key, value in rows.items()} for i in range(4)]
    plain = datasets.Dataset.from_dict({"input_ids": [*RAGGED, []], "text": list("abcde")})
    masked = datasets.Dataset.from_dict({key: value.tolist() for key, value in rows.items()})
    for given in (
        BatchEncoding(rows),
        {key: value.numpy() for key, value in rows.items()},
        {"input_ids": RAGGED},
        [torch.tensor(row) for row in RAGGED],
        (torch.tensor([row]) for row in RAGGED),
        torch.utils.data.DataLoader(items, batch_size=3),
        plain,
        plain.to_iterable_dataset(),
        masked,
        masked.with_format("torch"),
        torch.utils.data.DataLoader(masked.with_format("torch"), batch_size=2),
    ):
        got = hc.capture(mixtral, given, needs=("usage", "sample"))
        assert got.identity() == wanted.identity()
        for layer in range(3):
            assert torch.equal(got.layers[layer].usage_count, wanted.layers[layer].usage_count)
    ids = tokens()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4)
    assert hc.capture(mixtral, loader).identity() == hc.capture(mixtral, ids).identity()
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids, ids), batch_size=4)
    texts = datasets.Dataset.from_dict({"text": ["a", "b"]})
    for bad, said in (
        ("some text", "not 'some text'. Encode text first"),
        (["some", "text"], "not 'some'. Encode text first"),
        ({"input_ids": "abc"}, "not 'abc' as ids"),
        (texts, "not a mapping of text"),
        (pairs, "not batches of several tensors; name them in a dict"),
        ([], "something without any"),
        (7, "not 7"),
    ):
        with pytest.raises(InputError, match='"input_ids" argument must be') as error:
            hc.capture(mixtral, bad)
        assert said in str(error.value)
    with pytest.raises(InputError, match='"attention_mask" must have the shape'):
        hc.capture(mixtral, {"input_ids": ids, "attention_mask": ids[:, 1:]})


def test_statistics_of_ones_own_outputs(mixtral, stats, tmp_path):
    outputs = {name: sums.mean_output.numpy() for name, sums in stats.layers.items()}
    usage = {name: sums.usage_count.sum(0) for name, sums in stats.layers.items()}
    own = hc.Statistics.from_outputs(outputs, usage=usage, name="mine")
    for layer in range(3):
        np.testing.assert_allclose(hc.distances(own, layer), hc.distances(stats, layer))
    plan, wanted = (hc.make_plan(each, experts=4) for each in (own, stats))
    for ours, theirs in zip(plan.layers, wanted.layers, strict=True):
        assert ours.labels == theirs.labels
        assert ours.weights == pytest.approx(theirs.weights)
    hc.restore(hc.apply_plan(mixtral, plan))
    assert [layer.labels for layer in hc.make_plan(own, mixtral, experts=4, similarity="weight").layers]
    own.save(tmp_path / "own.safetensors")
    assert hc.load_statistics(tmp_path / "own.safetensors").identity() == own.identity()
    shares = hc.Statistics.from_outputs({"x": np.eye(2)}, usage={"x": [0.25, 0.75]})
    assert shares.layers["x"].frequency.tolist() == [0.25, 0.75]
    assert hc.Statistics.from_outputs({"x": np.eye(2)}).layers["x"].frequency.tolist() == [0.5, 0.5]
    with pytest.raises(InputError, match="needs 'norms'"):
        hc.make_plan(own, experts=4, method="reap")
    for bad, used in (({}, {}), ({"x": np.ones(3)}, {}), ({"x": np.full((2, 2), np.nan)}, {})):
        with pytest.raises(InputError, match='"outputs"'):
            hc.Statistics.from_outputs(bad, usage=used)
    for used in ({"x": [1]}, {"x": [0, 0]}, {"x": [-1, 2]}):
        with pytest.raises(InputError, match='"usage" of x must be 2 numbers'):
            hc.Statistics.from_outputs({"x": np.eye(2)}, usage=used)
    with pytest.raises(InputError, match="those of \"usage\" too: {'y'}"):
        hc.Statistics.from_outputs({"x": np.eye(2)}, usage={"y": [1, 1]})


def test_a_plan_is_applied_from_its_file(mixtral, stats, tmp_path):
    plan = hc.make_plan(stats, experts=4)
    plan.save(tmp_path / "plan.json")
    for given in (tmp_path / "plan.json", str(tmp_path / "plan.json")):
        hc.apply_plan(mixtral, given)
        assert {layer.num_stored for layer in find_moe_layers(mixtral)} == {4}
        hc.restore(mixtral)
    with pytest.raises(FileNotFoundError, match="There is no plan absent.json; make one with"):
        hc.apply_plan(mixtral, "absent.json")
    with pytest.raises(InputError, match='"plan" argument must be a Plan or the file of one'):
        hc.apply_plan(mixtral, {"layers": []})
