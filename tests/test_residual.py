"""What leaves least is found, checked against naive float64 renderings and planted truths."""

import itertools

import numpy as np
import pytest
import torch
from conftest import EXPERTS, OTHERS, tiny_model, tokens

import hcsmoe_core as core
from hcsmoe_core.families import moe_layer
from hcsmoe_core.merging import merge_layer
from hcsmoe_core.methods import combining, residual
from hcsmoe_core.methods.combining import chosen_columns
from hcsmoe_core.moe import MoELayer
from hcsmoe_core.plan import LayerPlan

NEEDS = ("usage", "outputs", "grams", "sample")


def forward_selection(pool, target, width, *, block=None):
    """Columns of a regression chosen from the columns themselves, ``(T, N)`` and ``(T, D)``."""
    pool = pool.double()
    return chosen_columns(pool.T @ pool, pool.T @ target.double(), width, block=block)


def captured(model, sequences=12, domains=None):
    return core.capture(model, tokens(sequences=sequences), needs=NEEDS, domains=domains, progress=False)


def recommended(model, stats, experts, **settings):
    return core.make_plan(stats, model, experts=experts, method="recommended", progress=False, **settings)


# --- shapes, and what is held out -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "kept", "width"), itertools.product((8, 60, 128), (1, 3, 5, 7), (24, 1408, 14336))
)
def test_shapes_take_no_more_bytes(experts, kept, width):
    found = residual.shapes(experts, kept, width)
    assert found[0] == (kept, width)
    assert found[-1][0] == experts or kept * width < experts
    assert all(count * w <= kept * width for count, w in found)
    assert all(count * w >= 0.9 * kept * width for count, w in found if width > 1000)
    assert all(w % 8 == 0 for count, w in found[1:] if w > 64)
    assert len({count for count, _ in found}) == len(found)


def test_all_experts_have_one_shape():
    assert residual.shapes(8, 8, 24) == [(8, 24)]


@pytest.mark.parametrize("domains", [None, ["a", "b", "c"] * 4])
def test_held_out_sequences_are_a_quarter_of_each_domain(mixtral, domains):
    stats = captured(mixtral, domains=domains)
    chosen = residual.held_out(stats.sampled, "sequences")
    sequence, domain = stats.sampled[:, 0], stats.sampled[:, 2]
    for one in domain.unique():
        mine = sequence[(domain == one) & chosen].unique()
        assert len(mine) == max(1, len(sequence[domain == one].unique()) // 4)
    assert not set(sequence[chosen].tolist()) & set(sequence[~chosen].tolist())


def test_of_one_sequence_a_domain_a_quarter_of_all_is_held_out(mixtral):
    stats = captured(mixtral, domains=[str(i) for i in range(12)])
    chosen = residual.held_out(stats.sampled, "sequences")
    assert len(stats.sampled[chosen][:, 0].unique()) == 3


def test_held_out_domains_are_whole(mixtral):
    stats = captured(mixtral, domains=["a", "b", "c", "d"] * 3)
    chosen = residual.held_out(stats.sampled, "domains")
    assert stats.sampled[chosen][:, 2].unique().tolist() == [3]
    assert 3 not in stats.sampled[~chosen][:, 2].tolist()
    with pytest.raises(ValueError, match="of one domain"):
        residual.held_out(captured(mixtral).sampled, "domains")
    with pytest.raises(ValueError, match="two calibration sequences"):
        residual.held_out(captured(mixtral, sequences=1).sampled, "sequences")


@pytest.mark.parametrize(
    ("domains", "by"),
    [
        (["all"], "sequences"),
        (["a", "b"], "domains"),
        (["a", "self"], "sequences"),
        (list("abc"), "domains"),
        (list("abcd"), "sequences"),
    ],
)
def test_of_few_domains_some_are_held_out_unless_one_is_own_text(mixtral, domains, by):
    stats = captured(mixtral, domains=domains * (12 // len(domains)))
    assert torch.equal(
        residual.held_out(stats.sampled, "auto", stats.domains), residual.held_out(stats.sampled, by)
    )


# --- the residual itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", *OTHERS])
@pytest.mark.parametrize("experts", [8, 4, 2])
def test_the_residual_is_that_of_the_layer_made_so(family, experts):
    """Of groups that share no token it is exact; beside others errors add up, so each is looked at alone."""
    model = tiny_model(family, torch.float64)
    stats = captured(model)
    name = list(stats.layers)[1]
    sums, layer = stats.layers[name], moe_layer(model, name)
    decides = residual.held_out(stats.sampled, "sequences")
    ways = residual.Scorer(layer, sums, decides, "frequency").candidates(stats, model, experts)
    inputs, gates = sums.sample.inputs[decides], sums.sample.gates[decides]
    outputs = torch.stack(
        [layer.expert_output(e, layer.expert_hidden(e, inputs)) for e in range(EXPERTS)]
    ).detach()
    energy = float((torch.einsum("te,etd->td", gates, outputs) ** 2).sum())
    fitted = type(sums.sample)(
        *(getattr(sums.sample, k)[~decides] for k in ("inputs", "logits", "index", "weight"))
    )
    for (count, width), way in ways.items():
        assert way.labels.max() + 1 == count
        plan = LayerPlan(
            name,
            way.labels.tolist(),
            way.weights.tolist(),
            width=width if width < layer.width else None,
            dominant=[max(g, key=lambda e: sums.usage_count.sum(0)[e]) for g in _groups(way.labels)],
            rules=way.rules,
        )
        made = merge_layer(layer, plan, fitted)
        left = 0.0
        for group, members in enumerate(_groups(way.labels)):
            replaced = _applied(layer, made, group, inputs)
            wanted = torch.einsum("te,etd->td", gates[:, members], outputs[members])
            left += float(((gates[:, members].sum(1, keepdim=True) * replaced - wanted) ** 2).sum())
        assert way.residual == pytest.approx(left / energy, rel=1e-6, abs=1e-12)


def test_no_more_tokens_decide_than_tell_the_neurons_apart(mixtral):
    stats = captured(mixtral, sequences=40)
    sums = next(iter(stats.layers.values()))
    decides = residual.held_out(stats.sampled, "sequences")
    few = residual.Scorer(
        moe_layer(mixtral, next(iter(stats.layers))), sums, decides, "frequency", tokens=100
    )
    assert sum(len(sample.inputs) for sample in few.samples) == 24 * residual.EACH * EXPERTS // 2
    assert torch.equal(few.samples[0].inputs, sums.sample.inputs[:384][~decides[:384]])


def _groups(labels):
    return [np.flatnonzero(labels == g).tolist() for g in range(labels.max() + 1)]


def _applied(layer, tensors, group, inputs):
    """Outputs of one made expert, by the family's own arithmetic."""
    up, down = tensors[layer.up_name][group], tensors["down_proj"][group]
    hidden = inputs @ (up if layer.transposed else up.T)
    if f"{layer.up_name}_bias" in tensors:
        hidden = hidden + tensors[f"{layer.up_name}_bias"][group]
    output = layer.activated(hidden) @ (down if layer.transposed else down.T)
    return (output + tensors["down_proj_bias"][group] if "down_proj_bias" in tensors else output).detach()


def test_the_uniform_shape_leaves_least_in_all_and_layers_of_their_own_no_more(mixtral):
    stats = captured(mixtral)
    decides = residual.held_out(stats.sampled, "sequences")
    found = [
        residual.Scorer(moe_layer(mixtral, n), sums, decides, "frequency").candidates(stats, mixtral, 3)
        for n, sums in stats.layers.items()
    ]
    total = {key: sum(ways[key].residual for ways in found) for key in found[0]}
    uniform, own = residual.best_candidates(found, "uniform"), residual.best_candidates(found, "by-layer")
    assert sum(way.residual for way in uniform) == min(total.values())
    assert sum(way.residual for way in own) <= min(total.values())
    plan = recommended(mixtral, stats, 3)
    assert [layer.labels for layer in plan.layers] == [way.labels.tolist() for way in uniform]
    by_layer = recommended(mixtral, stats, 3, shape="by-layer")
    assert [layer.labels for layer in by_layer.layers] == [way.labels.tolist() for way in own]


# --- planted truths ---------------------------------------------------------------------------------------


def twins(family, permuted=False):
    """A model whose experts 2i and 2i + 1 are one function, perhaps with its neurons in another order."""
    model = tiny_model(family)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for layer in core.find_moe_layers(model):
            for e in range(0, EXPERTS, 2):
                neurons = layer.neurons(e)
                made = layer.stacked([neurons.take(order) if permuted else neurons])
                for name, tensor in made.items():
                    layer.tensors()[name][e + 1] = tensor[0]
    return model


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_twins_are_joined_and_nothing_is_lost(family):
    model = twins(family)
    stats, before = captured(model), model(input_ids=tokens(), use_cache=False).logits
    plan = recommended(model, stats, 4)
    pairs = [0, 0, 1, 1, 2, 2, 3, 3]
    for layer in plan.layers:
        assert layer.labels == pairs
        assert layer.width is None
        assert all(rule["rule"] == "average" for rule in layer.rules)
    core.apply_plan(model, plan, stats)
    assert torch.allclose(model(input_ids=tokens(), use_cache=False).logits, before, atol=1e-5)


def test_twins_in_another_order_are_found_by_what_they_do():
    """Weights do not tell them; outputs do, and one of each neuron is chosen."""
    model = twins("mixtral", permuted=True)
    stats, before = captured(model, sequences=40), model(input_ids=tokens(), use_cache=False).logits
    plan = recommended(model, stats, 4)
    assert [layer.labels for layer in plan.layers] == [[0, 0, 1, 1, 2, 2, 3, 3]] * 3
    assert {rule["rule"] for layer in plan.layers for rule in layer.rules} == {"selection"}
    core.apply_plan(model, plan, stats)
    after = model(input_ids=tokens(), use_cache=False).logits
    assert float(((after - before).norm() / before.norm()).detach()) < 1e-3


def test_experts_with_idle_neurons_are_trimmed():
    """Half of each expert's neurons write nothing: they go, and experts stay apart."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in core.find_moe_layers(model):
            for e in range(EXPERTS):
                layer.tensors()["down_proj"][
                    e, :, torch.randperm(24, generator=torch.Generator().manual_seed(e))[:12]
                ] = 0
    stats, before = captured(model, sequences=40), model(input_ids=tokens(), use_cache=False).logits
    plan = recommended(model, stats, 4)
    for layer in plan.layers:
        assert layer.labels == list(range(EXPERTS))
        assert layer.width == 12
    core.apply_plan(model, plan, stats)
    after = model(input_ids=tokens(), use_cache=False).logits
    assert float(((after - before).norm() / before.norm()).detach()) < 1e-3


# --- the greedy choice in blocks --------------------------------------------------------------------------


def _residual(pool, target, chosen):
    fit = np.linalg.lstsq(pool[:, chosen].numpy(), target.numpy(), rcond=None)[0]
    return float(((pool[:, chosen].numpy() @ fit - target.numpy()) ** 2).sum())


def test_blocks_leave_nearly_what_the_greedy_choice_does():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(600, 40, generator=generator, dtype=torch.float64)
    pool = torch.cat(
        [base, base + 0.05 * torch.randn(600, 40, generator=generator, dtype=torch.float64)], 1
    )  # near-copies
    target = base @ torch.randn(40, 12, generator=generator, dtype=torch.float64)
    greedy = forward_selection(pool, target, 24, block=1)
    for block in (2, 5, 8):
        chosen = forward_selection(pool, target, 24, block=block)
        assert len(set(chosen)) == 24
        assert _residual(pool, target, chosen) < 1.15 * _residual(pool, target, greedy)
        # One of each pair is enough: blocks do not take both.
        assert len({c % 40 for c in chosen}) >= 23
    wide = chosen_columns(pool.T @ pool, pool.T @ target, 600, block=16)
    assert len(wide) <= 80  # no more columns than there are


@pytest.mark.parametrize("count", [3, 9, 12, 16])
def test_where_the_sample_tells_no_more_copies_come_last(monkeypatch, count):
    monkeypatch.setattr(combining, "BATCH", 3)
    unit = torch.nn.functional.normalize(
        torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    unit = unit[[0, 1, 2, 3, 4, 5, 1, 7, 8, 1, 10, 11, 12, 1, 1, 15]]  # copies, some of another batch
    order, taken = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist(), [9, 4]
    wanted = list(taken)
    for place in order:
        if (
            len(wanted) < count
            and place not in wanted
            and all(float(unit[place] @ unit[one]) < 1 - 1e-6 for one in wanted)
        ):
            wanted.append(place)
    assert combining._unlike(unit, taken, order, count) == wanted
    assert len(wanted) == min(count, 12)


def test_greedy_steps_are_those_of_a_naive_search():
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    target = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    naive = []
    for _ in range(6):
        naive.append(
            min((i for i in range(10) if i not in naive), key=lambda i: _residual(pool, target, [*naive, i]))
        )
    assert forward_selection(pool, target, 6, block=1) == naive


# --- as a method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "olmoe", *OTHERS])
def test_written_and_loaded_alike(family, tmp_path):
    model = tiny_model(family)
    stats = captured(model)
    # DeepSeek's shared experts have the width of the others.
    for shape, router in (
        ("uniform", ""),
        ("by-layer", "mapped"),
        ("whole" if family == "deepseek_v3" else "uniform", "folded"),
    ):
        plan = recommended(model, stats, 6, shape=shape)
        plan.save(tmp_path / f"{shape}{router}.json")
        assert core.load_plan(tmp_path / f"{shape}{router}.json") == plan
        folder = tmp_path / f"{shape}{router}"
        core.save_merged(model, plan, folder, stats=stats, router=router)
        mapped = "expert_merge" in (folder / "config.json").read_text()
        again = core.load_merged(folder) if mapped else core.load_model(folder)[0]
        again.set_experts_implementation("eager")  # widths here are none that grouped products take
        written = plan if router != "folded" else core.plan.with_router(plan, "folded")
        core.apply_plan(model, written, stats)
        assert torch.equal(
            again(input_ids=tokens(), use_cache=False).logits,
            model(input_ids=tokens(), use_cache=False).logits,
        )
        core.restore(model)


def test_the_same_plan_each_time_and_its_settings(mixtral):
    stats = captured(mixtral)
    first, second = (
        recommended(mixtral, stats, 3),
        core.make_plan(stats, mixtral, experts=3, method="least-residual"),
    )
    assert first == second
    assert first.settings["method"] == "least-residual"
    assert first.settings["shape"] == "uniform"
    assert core.methods.resolve("recommended").needs == ("usage", "grams", "sample")


def test_what_cannot_be_solved_for_is_averaged(monkeypatch):
    model = tiny_model("mixtral")
    stats = captured(model)
    monkeypatch.setattr(MoELayer, "why_not_solvable", "planted")
    plan = recommended(model, stats, 3)
    assert all(layer.rules is None and layer.num_groups == 3 and layer.width is None for layer in plan.layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "frequency"}, 'goes with budget "uniform" only'),
        ({"guard": True}, "guard off"),
        ({"combine": "average"}, 'group "residual" goes with combine "residual" only'),
        ({"shape": "square"}, '"shape" argument must be one of "uniform", "by-layer"'),
        ({"holdout": "tokens"}, '"holdout" argument must be one of "auto", "sequences", "domains"'),
    ],
)
def test_steps_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        core.methods.resolve("recommended", **settings)


def test_it_wants_the_model_and_the_sample(mixtral):
    stats = captured(mixtral)
    with pytest.raises(ValueError, match='give the "model" argument'):
        core.make_plan(stats, experts=4, method="recommended")
    bare = core.capture(mixtral, tokens(), needs=NEEDS[:-1], progress=False)
    with pytest.raises(ValueError, match="needs 'sample'"):
        recommended(mixtral, bare, 4)
    with pytest.raises(ValueError, match="may be a list only"):
        recommended(mixtral, stats, [3, 4, 5])
