"""Fitting what the neurons of a merged expert read, against dense float64 arithmetic."""

import numpy as np
import pytest
import torch
from conftest import EXPERTS, OTHERS, tiny_model, tokens

import hcsmoe_core as core
from hcsmoe_core.families import moe_layer
from hcsmoe_core.merging import Group
from hcsmoe_core.merging import combine_group as combine
from hcsmoe_core.methods import combining, residual
from hcsmoe_core.statistics import LayerSample

FAMILIES = ("mixtral", "qwen2_moe", *OTHERS)
NEEDS = ("usage", "outputs", "grams", "sample")
NARROW = {"rule": "trimming", "ridge": 0.01, "width": 12}
JOINED = {"rule": "least-squares", "align": "none", "ridge": 0.01}


def group_of(family, members, count=400, dtype=torch.float64):
    """Some experts of a tiny model's second layer, with tokens of which each goes to two experts."""
    model = tiny_model(family, dtype)
    layer = core.find_moe_layers(model)[1]
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, layer.hidden_size, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(count)])
    weight = torch.rand(count, 2, generator=generator, dtype=torch.float64) + 0.1
    sample = LayerSample(inputs, torch.zeros(count, EXPERTS, dtype=torch.float64), index, weight)
    shares = [1 / len(members)] * EXPERTS
    return Group(layer, members, shares, members[0], sample)


def left_by(group, expert):
    """Squared residual, member by member."""
    tokens, gates = group.tokens()
    wanted = sum(gates[:, [place]] * _output(group, one, tokens) for place, one in enumerate(group.experts))
    return float(((gates.sum(1, keepdim=True) * _output(group, expert, tokens) - wanted) ** 2).sum())


def _output(group, expert, tokens):
    output = group.layer.activate(expert, tokens) @ expert.down.T
    return output if expert.offset is None else output + expert.offset


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_finite_differences(family):
    group = group_of(family, [1, 4], count=40)
    layer, expert, inputs = group.layer, group.experts[0], group.tokens()[0]
    bias = torch.zeros(expert.up.shape[:2], dtype=torch.float64) if expert.bias is None else expert.bias
    slopes = combining.slopes_of(layer, expert, inputs)
    assert slopes.shape == (expert.up.shape[1], len(inputs), len(expert.up))
    for part, slope in enumerate(slopes):
        moved = []
        for step in (1e-6, -1e-6):
            shifted = bias.clone()
            shifted[:, part] += step
            moved.append(layer.activate(type(expert)(expert.up, expert.down, shifted, expert.offset), inputs))
        assert torch.allclose(slope, (moved[0] - moved[1]) / 2e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_a_step_solves_the_ridge_regression_on_slopes(family, monkeypatch):
    monkeypatch.setattr(combining, "ITERATIONS", 2000)
    group = group_of(family, [1, 4])
    expert = combine(group, JOINED).take(torch.arange(6))
    tokens, gates = group.tokens()
    left = combining._residual(group, expert)
    slopes, total = combining.slopes_of(group.layer, expert, tokens), gates.sum(1)
    # One column for each number that is read, of what the layer's output, token by token, gains from it.
    columns, penalties = [], []
    for neuron in range(6):
        for part in range(expert.up.shape[1]):
            scaled = (total * slopes[part][:, neuron])[:, None] * tokens
            moves = torch.einsum("td,o->tod", scaled, expert.down[:, neuron]).reshape(-1, tokens.shape[1])
            columns.append(moves)
            penalties += [combining.REFIT_RIDGE * float((moves**2).sum(0).mean())] * tokens.shape[1]
    design = torch.cat(columns, 1).numpy()
    wanted = np.linalg.solve(design.T @ design + np.diag(penalties), design.T @ left.reshape(-1).numpy())
    step = combining._reading_step(group, expert, left).reshape(-1).numpy()
    assert np.linalg.norm(step - wanted) < 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("members", "rule"), [([3], NARROW), ([1, 4], JOINED), ([0, 2, 5], {"rule": "average"})]
)
def test_rounds_leave_less_each(family, members, rule):
    group = group_of(family, members)
    left = [left_by(group, combine(group, rule | {"refit": rounds})) for rounds in (0, 1, 2, 3)]
    assert left[1] < 0.98 * left[0]
    assert left[0] > left[1] > left[2] >= left[3]
    assert combine(group, rule | {"refit": 2}).up.shape == combine(group, rule).up.shape


def test_what_is_exact_stays_and_nothing_seen_changes_nothing():
    group = group_of("mixtral", [1, 4])
    group.experts = [group.experts[0]] * 2
    average = combine(group, {"rule": "average"})
    refitted = combine(group, {"rule": "average", "refit": 2})
    assert torch.equal(refitted.up, average.up)
    assert torch.equal(refitted.down, average.down)
    unseen = group_of("mixtral", [1, 4])
    unseen.sample = LayerSample(
        *(
            t[:0]
            for t in (unseen.sample.inputs, unseen.sample.logits, unseen.sample.index, unseen.sample.weight)
        )
    )
    made = combine(unseen, NARROW | {"rule": "selection", "pool": "members", "refit": 2})
    assert torch.equal(made.up, combine(unseen, NARROW | {"rule": "selection", "pool": "members"}).up)


def test_in_16_bits_it_is_near_that_in_64():
    wide, narrow = group_of("mixtral", [1, 4]), group_of("mixtral", [1, 4], dtype=torch.bfloat16)
    rule = JOINED | {"refit": 2}
    left, plain = left_by(wide, combine(wide, rule)), left_by(wide, combine(wide, JOINED))
    assert narrow.dtype == torch.float32
    assert left_by(narrow, combine(narrow, rule)) == pytest.approx(left, rel=0.05)
    assert left < 0.95 * plain


# --- plans ------------------------------------------------------------------------------------------------


def captured(model, sequences=24):
    ids = torch.cat([tokens(seed=seed) for seed in range(-(-sequences // len(tokens())))])[:sequences]
    return core.capture(model, ids, needs=NEEDS, progress=False)


def test_a_group_is_refitted_where_that_leaves_less_on_held_out_tokens():
    model = tiny_model("mixtral", torch.float64)
    stats = captured(model)
    plain = core.make_plan(stats, model, experts=3, method="least-residual", refit=0)
    plan = core.make_plan(stats, model, experts=3, method="least-residual")
    assert (plan.settings["combine"], plan.settings["refit"]) == ("residual", 2)
    decides, seen = residual.held_out(stats.sampled, "sequences"), set()
    for before, after in zip(plain.layers, plan.layers, strict=True):
        assert (before.labels, before.width) == (after.labels, after.width)
        sums = stats.layers[before.name]
        fitted, held = (residual._rows(sums.sample, rows) for rows in (~decides, decides))
        for place, members in enumerate(after.groups()):
            if len(members) == 1 and after.width is None:
                continue
            dominant = members[0] if after.dominant is None else after.dominant[place]
            groups = [
                Group(moe_layer(model, after.name), members, after.weights, dominant, rows)
                for rows in (fitted, held)
            ]
            rule = before.rules[place] | ({} if after.width is None else {"width": after.width})
            without, refitted = (
                left_by(groups[1], combine(groups[0], rule | more)) for more in ({}, {"refit": 2})
            )
            assert after.rules[place] == before.rules[place] | ({"refit": 2} if refitted < without else {})
            seen.add(refitted < without)
    assert seen  # that some group was looked at


@pytest.mark.parametrize(
    ("method", "settings"), [("trimming", {}), ("hc-least-squares", {}), ("hc-smoe", {}), ("selection", {})]
)
def test_it_goes_with_other_methods_and_is_written(method, settings, tmp_path):
    model = tiny_model("mixtral")
    stats = captured(model)
    plain = core.make_plan(stats, model, experts=4, method=method, **settings)
    plan = core.make_plan(stats, model, experts=4, method=method, refit=1, **settings)
    assert plan.needs_sample
    plan.save(tmp_path / "plan.json")
    assert core.load_plan(tmp_path / "plan.json") == plan
    ids = tokens()
    core.save_merged(model, plan, tmp_path / "merged", stats=stats)
    core.apply_plan(model, plan, stats)
    live = model(input_ids=ids, use_cache=False).logits
    core.restore(model)
    core.apply_plan(model, plain, stats)
    assert not torch.equal(model(input_ids=ids, use_cache=False).logits, live)
    core.restore(model)
    mapped = "expert_merge" in (tmp_path / "merged" / "config.json").read_text()
    again = core.load_merged(tmp_path / "merged") if mapped else core.load_model(tmp_path / "merged")[0]
    again.set_experts_implementation(model.config._experts_implementation)
    assert torch.equal(again(input_ids=ids, use_cache=False).logits, live)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("least-residual", {"refit": -1}, '"refit" argument must be'),
        ("f-prune", {"refit": 1}, "goes with no pruning"),
        ("fuzzy", {"refit": 1}, "goes with no pruning, fuzzy groups"),
        ("mc-smoe", {"refit": 1}, "or compress"),
    ],
)
def test_what_it_does_not_go_with(method, settings, message):
    with pytest.raises(ValueError, match=message):
        core.methods.resolve(method, **settings)


def test_it_is_a_setting_on_the_command_line():
    assert core.methods.parse_settings(["refit=3"]) == {"refit": 3}
    with pytest.raises(ValueError, match="takes a number"):
        core.methods.parse_settings(["refit=twice"])
