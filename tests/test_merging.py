import json

import naive
import pytest
import torch
from conftest import FAMILIES, OTHERS, logits, tiny_model

from hcsmoe_core import apply_plan, capture, load_plan, make_plan, merging, restore, save_merged
from hcsmoe_core._util import InputError
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.merging import Group
from hcsmoe_core.methods.summary import summarise
from hcsmoe_core.plan import LayerPlan, Plan


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
@pytest.mark.parametrize("merge", ["frequency", "average"])
def test_merged_weights_equal_naive_ones(name, merge, input_ids):
    model = tiny_model(name)
    stats = capture(model, input_ids)
    plan = make_plan(stats, model, experts=3, merge=merge)
    originals = [dict(layer.tensors()) for layer in find_moe_layers(model)]
    apply_plan(model, plan)
    for layer, layer_plan, original in zip(find_moe_layers(model), plan.layers, originals, strict=True):
        count = stats.layers[layer.name].usage_count.sum(0).double()
        share = count if merge == "frequency" else torch.ones(8)
        for group in layer_plan.groups():
            total = share[group].sum()
            wanted = share[group] / total if total > 0 else torch.full((len(group),), 1 / len(group))
            got = torch.tensor([layer_plan.weights[e] for e in group])
            torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=1e-7)
        for key, tensor in layer.tensors().items():
            wanted = naive.merged(original[key].detach(), layer_plan.labels, layer_plan.weights)
            half_a_unit = wanted.abs() * 2**-24 * (1 + 1e-6) + 1e-40  # float64 sums, rounded once to float32
            assert ((tensor.double() - wanted).abs() <= half_a_unit).all()


def test_the_merged_model_is_the_model_with_equal_experts(family, input_ids):
    """E experts of which those of a group are equal compute the same as r experts behind the map."""
    model, other = tiny_model(family, torch.float64), tiny_model(family, torch.float64)
    plan = make_plan(capture(model, input_ids), model, experts=3)
    apply_plan(model, plan)
    with torch.no_grad():
        for layer, layer_plan in zip(find_moe_layers(other), plan.layers, strict=True):
            for tensor in layer.tensors().values():
                tensor.copy_(naive.merged(tensor, layer_plan.labels, layer_plan.weights)[layer_plan.labels])
    torch.testing.assert_close(logits(model, input_ids), logits(other, input_ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_restored_to_the_bit_and_lone_experts_untouched(family, dtype, input_ids):
    model = tiny_model(family, dtype)
    before, weights = logits(model, input_ids), {n: p.detach().clone() for n, p in model.named_parameters()}
    plan = make_plan(capture(model, input_ids), model, experts=5)
    apply_plan(model, plan)
    assert not torch.equal(logits(model, input_ids), before)
    for layer, layer_plan in zip(find_moe_layers(model), plan.layers, strict=True):
        for group, members in enumerate(layer_plan.groups()):
            if len(members) == 1:
                for key, tensor in layer.tensors().items():
                    assert torch.equal(tensor[group], weights[f"{layer.name}.{key}"][members[0]])
    restore(model)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in weights.items()}
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model, input_ids), before)
    restore(model)  # nothing to do is no error


def test_bfloat16_is_rounded_once():
    model = tiny_model("mixtral", torch.bfloat16)
    original = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    labels, weights = [0, 0, 0, 1, 2, 3, 4, 5], [0.2, 0.3, 0.5, 1, 1, 1, 1, 1]
    layers = [LayerPlan(layer.name, labels, weights) for layer in find_moe_layers(model)]
    apply_plan(model, Plan(layers))
    exact = sum(w * original[e].double() for e, w in enumerate([0.2, 0.3, 0.5]))
    got = model.model.layers[0].mlp.experts.down_proj[0].detach()
    # Sums are float32: values close to the middle of two bfloat16 numbers may differ in the last bit.
    assert (got == exact.to(torch.bfloat16)).float().mean() > 0.99
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-8).all()


def test_all_experts_kept_changes_nothing(family, input_ids):
    model = tiny_model(family)
    before = logits(model, input_ids)
    apply_plan(model, make_plan(capture(model, input_ids), model, experts=8))
    assert torch.equal(logits(model, input_ids), before)


def test_a_group_nobody_routed_to_is_averaged(mixtral, input_ids):
    with torch.no_grad():  # no token prefers experts 6 and 7: their logits are far below all others
        for layer in find_moe_layers(mixtral):
            layer.router.weight[6:] = 0
            layer.experts.down_proj[6:] = 0
            layer.experts.down_proj[7, 0, 0] = 1e-4
            layer.router.register_forward_hook(_mute)
    stats = capture(mixtral, input_ids)
    assert (stats.layer(0).usage_count[:, 6:] == 0).all()
    plan = make_plan(stats, mixtral, experts=7)
    assert plan.layers[0].labels == [0, 1, 2, 3, 4, 5, 6, 6]
    assert plan.layers[0].weights[6:] == [0.5, 0.5]
    apply_plan(mixtral, plan)
    assert torch.isfinite(logits(mixtral, input_ids)).all()


def _mute(router, inputs, output):
    scores, weight, index = output
    scores = scores.clone()
    scores[:, 6:] = -1e4
    weight, index = scores.softmax(-1).topk(2, -1)
    return scores, weight / weight.sum(-1, keepdim=True), index


def test_plans_that_do_not_fit_leave_the_model_alone(mixtral, input_ids):
    plan = make_plan(capture(mixtral, input_ids), mixtral, experts=4)
    for other, message in (
        (tiny_model("mixtral", seed=3), "made for another model"),
        (tiny_model("deepseek_v3"), "does not fit the model: it has 3 MoE layers and the model 2"),
    ):
        with pytest.raises(ValueError, match=message):
            apply_plan(other, plan)
        assert not any(layer.merged for layer in find_moe_layers(other))
    short = Plan([LayerPlan(p.name, p.labels[:7], p.weights[:7]) for p in plan.layers])
    with pytest.raises(ValueError, match="has 8 experts, but the plan labels 7"):
        apply_plan(mixtral, short)
    apply_plan(mixtral, plan)
    with pytest.raises(ValueError, match="merged already"):
        apply_plan(mixtral, plan)
    with pytest.raises(ValueError, match="capture on the original"):
        capture(mixtral, input_ids)


def test_overflow_is_refused_and_undone(input_ids):
    model = tiny_model("mixtral", torch.float16)
    plan = make_plan(capture(model, input_ids), model, experts=4)
    with torch.no_grad():
        model.model.layers[2].mlp.experts.down_proj[:] = 6e4
        model.model.layers[2].mlp.experts.down_proj[:, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        apply_plan(model, Plan(plan.layers))
    assert not any(layer.merged for layer in find_moe_layers(model))


def test_plans_read_back(mixtral, input_ids, tmp_path):
    stats = capture(mixtral, input_ids)
    plan = make_plan(stats, mixtral, experts=4, similarity="weight", linkage="ward", merge="average")
    plan.save(tmp_path / "p.json")
    assert load_plan(tmp_path / "p.json") == plan
    content = json.loads((tmp_path / "p.json").read_text())
    assert list(content["layers"][0]) == ["name", "labels", "weights", "combine"]
    assert [layer["name"] for layer in content["layers"]] == [
        f"model.layers.{i}.mlp.experts" for i in range(3)
    ]
    assert content["settings"]["linkage"] == "ward"
    by_hand = tmp_path / "hand.json"
    by_hand.write_text(json.dumps({"layers": content["layers"]}))
    assert load_plan(by_hand).layers == plan.layers


def test_damaged_plans_are_refused(mixtral, input_ids, tmp_path):
    path = tmp_path / "p.json"
    make_plan(capture(mixtral, input_ids), mixtral, experts=4).save(path)
    text = path.read_text()
    with pytest.raises(FileNotFoundError, match="hcsmoe plan"):
        load_plan(tmp_path / "none.json")
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:cut])
        with pytest.raises(ValueError, match="not a readable plan"):
            load_plan(path)
    content = json.loads(text)
    content["layers"][1]["labels"] = list(range(8))
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was changed since it was written"):
        load_plan(path)
    del content["sha256"]
    content["layers"][1]["weights"] = [0.4] * 8
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="must sum to one"):
        load_plan(path)
    layer = content["layers"][0]
    for labels in (
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 2, 1, 0, 0, 0, 0, 0],
        [0.0] * 8,
        [],
        ["0"] * 8,
        [-1] * 8,
        [1, -1] * 4,
    ):
        path.write_text(json.dumps({"layers": [layer | {"labels": labels}]}))
        with pytest.raises(ValueError, match="order of first appearance"):
            load_plan(path)
    for bad in ("[]", "{}", '{"layers": 3}', '{"layers": [{"name": "x"}]}', '{"layers": [], "version": 9}'):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"not a (valid )?plan|no plan of this version"):
            load_plan(path)


ALONE = list(range(8))
PAIRS = [0, 0, 1, 1, 2, 2, 3, 3]
SELECTION = {"rule": "selection"}
BAD = {  # what is wrong with one layer's plan: the layer, and what the error says
    "a width of averages": (dict(labels=PAIRS, width=8), "a width goes with rules that choose neurons"),
    "a width of one group's averages": (
        dict(labels=PAIRS, width=8, rules=[SELECTION] * 3 + [{"rule": "average"}]),
        "a width goes with rules that choose neurons",
    ),
    "a width within the rule": (
        dict(labels=PAIRS, combine=SELECTION | {"width": 8}),
        "is the layer's, not that of a rule",
    ),
    "no neurons": (dict(labels=ALONE, combine={"rule": "trimming"}, width=0), "whole number of at least 1"),
    "half a neuron": (
        dict(labels=ALONE, combine={"rule": "trimming"}, width=8.5),
        "whole number of at least 1",
    ),
    "a negative weight": (dict(labels=PAIRS, weights=[1.5, -0.5] * 4), "finite weight of at least 0"),
    "no number": (dict(labels=PAIRS, weights=[float("nan")] * 8), "finite weight of at least 0"),
    "an infinite weight": (dict(labels=PAIRS, weights=[float("inf")] * 8), "finite weight of at least 0"),
    "a negative mixture": (
        dict(labels=PAIRS, mixture=[[1.5, -0.5, 0, 0, 0, 0, 0, 0]] * 4),
        "weights of at least 0 that sum to one",
    ),
    "an infinite mixture": (
        dict(labels=PAIRS, mixture=[[float("inf"), -float("inf"), 1, 0, 0, 0, 0, 0]] * 4),
        "weights of at least 0 that sum to one",
    ),
    "a short mixture": (dict(labels=PAIRS, mixture=[[1.0] * 8] * 3), "weights of at least 0 that sum to one"),
    "an unknown router": (dict(labels=PAIRS, router="x"), "router.* must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans_are_refused_when_read_applied_and_written(case, mixtral, input_ids, tmp_path):
    changed, message = BAD[case]
    stats = capture(mixtral, input_ids, methods=("selection",))
    weights = [0.5] * 8 if changed["labels"] == PAIRS else [1.0] * 8
    layers = [{"name": n, "weights": weights} | changed for n in stats.layers]
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"layers": layers}))
    plan = Plan([LayerPlan(**layer) for layer in layers])
    for attempt in (
        lambda: load_plan(path),
        lambda: apply_plan(mixtral, plan, stats),
        lambda: save_merged(mixtral, plan, tmp_path / "m", stats=stats),
    ):
        with pytest.raises(InputError, match=message):
            attempt()
    assert not any(layer.merged for layer in find_moe_layers(mixtral))
    assert not (tmp_path / "m").exists()


def test_experts_cannot_be_wider_than_before(mixtral, input_ids, tmp_path):
    stats = capture(mixtral, input_ids, methods=("trimming",))
    rule = {"rule": "trimming"}
    for width, fits in ((1, True), (24, True), (25, False), (9999, False)):
        layers = [LayerPlan(name, ALONE, [1.0] * 8, rule, width=width) for name in stats.layers]
        Plan(layers).save(tmp_path / "p.json")
        plan = load_plan(tmp_path / "p.json")
        if fits:
            apply_plan(mixtral, plan, stats)
            assert {layer.width for layer in find_moe_layers(mixtral)} == {width}
            restore(mixtral)
        else:
            with pytest.raises(InputError, match=f"experts of width 24, but the plan one of {width}"):
                apply_plan(mixtral, plan, stats)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_plans_of_every_version_are_read(mixtral, input_ids, tmp_path, version):
    plan = make_plan(capture(mixtral, input_ids), mixtral, experts=4, router="averaged")
    plan.save(tmp_path / "p.json")
    content = json.loads((tmp_path / "p.json").read_text())
    assert content["version"] == 4
    del content["sha256"]
    if version < 4:
        content["layers"] = [layer | {"router": "average"} for layer in content["layers"]]
    (tmp_path / "p.json").write_text(json.dumps(content | {"version": version}))
    assert load_plan(tmp_path / "p.json").layers == plan.layers


@pytest.mark.parametrize("method", ["selection", "hc-least-squares", "trimming", "fix-dom"])
def test_only_what_the_rule_needs_is_computed(mixtral, input_ids, method, monkeypatch):
    stats = capture(mixtral, input_ids, methods=(method,), sample=100)
    plan, gathered, averaged = make_plan(stats, mixtral, experts=4, method=method), [], []
    average, sample = merging._averages, stats.layer(0).sample

    class Inputs:
        def __getitem__(self, rows):
            gathered.append(1)
            return sample.inputs[rows]

    monkeypatch.setattr(merging, "_averages", lambda *a: averaged.append(1) or average(*a))
    group = Group(
        find_moe_layers(mixtral)[0],
        [1, 4, 6],
        [1 / 3] * 8,
        4,
        type(sample)(Inputs(), *list(vars(sample).values())[1:4]),
    )
    for _ in range(3):
        rows, gates = group.tokens()
        assert len(rows) == len(gates) == int((sample.gates[:, [1, 4, 6]] != 0).any(1).sum())
        group.outputs()
    assert len(gathered) == 1
    pair = group.tokens([0, 2])[0]
    assert len(pair) == int((sample.gates[:, [1, 6]] != 0).any(1).sum())
    group.tokens([0, 2])
    assert len(gathered) == 2
    apply_plan(mixtral, plan, stats)
    assert averaged == []


def test_bad_settings_are_named(mixtral, input_ids):
    stats = capture(mixtral, input_ids)
    for experts in (0, 9, -1, 2.0):
        with pytest.raises(ValueError, match='"experts" argument must be a whole number from 1 to 8'):
            make_plan(stats, mixtral, experts=experts)
    for key, value in dict(method="x", similarity="x", linkage="x", merge="x", metric="x").items():
        with pytest.raises(ValueError, match=f"\"{key}\" argument must be one of .*; not 'x'"):
            make_plan(stats, mixtral, experts=4, **{key: value})
    with pytest.raises(ValueError, match="captured on another model"):
        make_plan(stats, tiny_model("mixtral", seed=9), experts=4)
    with pytest.raises(ValueError, match="needs Euclidean distances"):
        make_plan(stats, mixtral, experts=4, linkage="ward", metric="cosine")


def test_relabelling_experts_relabels_the_plan(mixtral, input_ids):
    plan = make_plan(capture(mixtral, input_ids), mixtral, experts=4)
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    with torch.no_grad():
        for layer in find_moe_layers(mixtral):
            for tensor in [*layer.tensors().values(), layer.router.weight]:
                tensor.copy_(tensor[order].clone())
    again = make_plan(capture(mixtral, input_ids), mixtral, experts=4)
    for before, after in zip(plan.layers, again.layers, strict=True):
        partition = {frozenset(order[group].tolist()) for group in after.groups()}
        assert partition == {frozenset(group) for group in before.groups()}


def test_summary_of_a_cut(mixtral, input_ids):
    stats = capture(mixtral, input_ids)
    alone = summarise(stats, 0, list(range(8)))
    assert (alone["moved"], alone["output_error"], alone["groups"]) == (0, 0, 8)
    pair = summarise(stats, 0, [0, 0, 1, 2, 3, 4, 5, 6])
    sums = stats.layer(0)
    mean, share, mass = sums.mean_output.numpy(), sums.frequency.numpy(), sums.routing_mass[0].numpy()
    centre = (share[0] * mean[0] + share[1] * mean[1]) / (share[0] + share[1])
    lost = sum(share[e] * ((mean[e] - centre) ** 2).sum() for e in (0, 1))
    whole = sum(share[e] * (mean[e] ** 2).sum() for e in range(8))
    assert pair["moved"] == pytest.approx(mass[:2].sum() / mass.sum())
    assert pair["output_error"] == pytest.approx((lost / whole) ** 0.5)
