"""Predicted errors of layers: against every expert run by hand, and against losses made by the formula
itself.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model, tokens
from naive import expert

from benchmarks import figures, theory
from hcsmoe_core import apply_plan, capture, find_moe_layers, make_plan, restore
from hcsmoe_core.studies.pipeline import layer_outputs, split_sample


@pytest.fixture(scope="module")
def captured():
    model = tiny_model("qwen2_moe")
    return model, capture(
        model, tokens(8), needs=("usage", "outputs", "norms", "grams", "sample"), sample=999, progress=False
    )


def test_what_experts_give_is_their_gated_sum_before_and_after_merging(captured):
    model, stats = captured
    plan = make_plan(stats, model, experts=3)
    layer = find_moe_layers(model)[1]
    sample = stats.layers[layer.name].sample
    inputs, gates = sample.inputs.double(), sample.gates
    whole = sum(gates[:, [e]] * expert(layer.experts, e, inputs) for e in range(8))
    torch.testing.assert_close(layer_outputs(layer, stats), whole, rtol=1e-4, atol=1e-5)
    apply_plan(model, plan)
    labels = plan.layers[1].labels
    merged = sum(gates[:, [e]] * expert(layer.experts, labels[e], inputs) for e in range(8))
    torch.testing.assert_close(layer_outputs(layer, stats), merged, rtol=1e-4, atol=1e-5)
    restore(model)
    apply_plan(model, make_plan(stats, model, experts=3, method="f-prune", budget="uniform"))
    assert layer_outputs(layer, stats) is None  # the router chooses anew
    restore(model)


def test_samples_are_split_by_sequences(captured):
    _, stats = captured
    fit, judge = split_sample(stats)
    assert len(fit.sampled) + len(judge.sampled) == len(stats.sampled)
    assert not set(fit.sampled[:, 0].tolist()) & set(judge.sampled[:, 0].tolist())
    name = next(iter(stats.layers))
    rows = torch.isin(stats.sampled[:, 0], judge.sampled[:, 0])
    assert torch.equal(judge.layers[name].sample.inputs, stats.layers[name].sample.inputs[rows])
    assert fit.identity() | {"sample": 0} == stats.identity() | {"sample": 0}


COSTS = (4.0, 0.5, 2.0)


def made_up(*, lost=lambda cost: cost):
    """Plans whose layers cost exactly c ε² each, and together what ``lost`` says of the sum."""
    generator, rows = np.random.default_rng(0), []
    for method in ("hc-smoe", "trimming", "reap"):
        for experts in (6, 4, 2):
            errors = generator.uniform(0.05, 0.5, 3)
            alone = COSTS * errors**2
            for layer in range(3):
                row = dict(
                    method=method,
                    kind="one",
                    experts=experts,
                    layer=layer,
                    block=errors[layer],
                    alone=alone[layer],
                )
                row |= dict(
                    residual=np.nan if method == "reap" else errors[layer],
                    added=lost(alone.sum()),
                    kl=2 * alone.sum(),
                )
                rows.append(
                    row
                    | dict(output_error=errors[layer] / 3, function_error=0.9 * errors[layer], fitted=np.nan)
                )
    return pd.DataFrame(rows)


def test_losses_made_by_the_formula_are_found_to_follow_it():
    frame = made_up()
    layers = theory.sensitivities(frame)
    for quantile in ("low", "median", "high"):
        assert layers[quantile].tolist() == pytest.approx(COSTS)
    judged = theory.predicted(frame)
    assert len(judged) == 9
    assert judged["ratio"].tolist() == pytest.approx([1] * 9)
    assert judged["compounds"].tolist() == pytest.approx([1] * 9)
    table = theory.agreement(frame, target="kl").set_index(["error", "over"])
    assert table.loc[("residual", "sum"), "plans"] == 6
    assert ("fitted", "sum") not in table.index
    assert table.loc[("block", "sum"), "spearman"] == pytest.approx(
        table.loc[("function_error", "sum"), "spearman"]
    )
    line = theory.fitted_line(3 * np.array([0.1, 0.2, 0.5, 0.9]), [0.02, 0.08, 0.5, 1.62])
    assert line == pytest.approx({"slope": 2, "factor": 2 / 9, "spread": 1})
    assert np.isnan(theory.fitted_line([1, 1, 1], [1, 2, 3])["slope"])


def test_saturation_and_what_is_furthest_off_show():
    judged = theory.predicted(made_up(lost=lambda cost: cost / (1 + cost)))
    assert (judged["compounds"] < 1).all()
    off = np.log(judged["ratio"]).abs().to_numpy()
    assert (np.diff(off) <= 0).all()
    assert judged.iloc[0]["predicted"] == judged["predicted"].max()
    with pytest.raises(ValueError, match='"target" argument must be one of "added", "kl"'):
        theory.agreement(made_up(), target="loss")


def test_dots_are_drawn_for_every_plan_with_the_line():
    plans = theory.by_plan(made_up())
    panels = {"a": plans.assign(x=plans["sum"]), "b": plans.assign(x=plans["alone"])}
    figure = figures.predictions(panels, value="added", hue="method", lines={"a": (1.0, 2.0)})
    assert sum(len(line.get_xdata()) for line in figure.axes[1].lines) == 9
    drawn = figure.axes[0].lines[-1]
    assert list(drawn.get_ydata()) == pytest.approx(list(2 * np.asarray(drawn.get_xdata())))
