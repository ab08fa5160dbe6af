"""What holds for any numbers: partitions, exact budgets, twins, relabelling, sums, ways back."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from conftest import MATCHING, TINY, logits, tiny_model, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcsmoe_core import METHODS, apply_plan, capture, load_plan, load_statistics, make_plan, restore
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.merging import Group
from hcsmoe_core.merging import combine_group as combine
from hcsmoe_core.methods import resolve
from hcsmoe_core.methods.pruning import super_experts
from hcsmoe_core.moe import Neurons
from hcsmoe_core.plan import DROPPED, LayerPlan, Plan
from hcsmoe_core.statistics import SAMPLED, LayerStatistics, Statistics
from hcsmoe_core.steps import budget as BUDGETS  # noqa: N812
from hcsmoe_core.steps import combine as COMBINE  # noqa: N812

NEEDS = ("usage", "outputs", "norms", "grams", "sample")
IDS = {
    "mixtral": tokens(10, 24, seed=4),
    "qwen2_moe": tokens(10, 24, seed=4),
    "gpt_oss": tokens(10, 24, seed=2),
}
ALIGNING = [
    *MATCHING,
    {"rule": "least-squares", "align": "weights"},
    {"rule": "least-squares", "align": "activations"},
    {"rule": "joint-svd", "align": "weights", "rank": 1.0},
    {"rule": "joint-svd", "align": "activations", "rank": 1.0},
]
EVERY_RULE = [
    *ALIGNING,
    {"rule": "average"},
    {"rule": "least-squares", "align": "none", "ridge": 0.05},
    {"rule": "joint-svd", "align": "none", "rank": 1.0},
    {"rule": "selection"},
    {"rule": "ties"},
    {"rule": "dare"},
]


def few(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
        ],
    )


_measured = {}


def measured(family):
    """A model in float64 and its statistics, with everything there is to collect.

    No two experts of a layer are used as often, so that numbers decide nothing."""
    if family not in _measured:
        model = tiny_model(family, torch.float64)
        _measured[family] = model, capture(model, IDS[family], needs=NEEDS)
        for sums in _measured[family][1].layers.values():
            assert len(sums.usage_count[0].unique()) == 8
    return _measured[family]


def check_layer(layer, experts, method):
    """Each expert in exactly one group, or dropped where the method drops; weights sum to one in each."""
    assert len(layer.labels) == len(layer.weights) == experts
    kept = [label for label in layer.labels if label != DROPPED]
    assert list(dict.fromkeys(kept)) == list(range(layer.num_groups))
    assert len(kept) == experts or resolve(method).steps["group"] == "prune"
    if resolve(method).steps["group"] == "prune":
        assert layer.router == "dropped"
        assert len(kept) == layer.num_groups  # nothing is joined
    members = [e for group in layer.groups() for e in group]
    assert sorted(members) == layer.kept
    assert min(layer.weights) >= 0
    for group in layer.groups():
        assert sum(layer.weights[e] for e in group) == pytest.approx(1, abs=1e-12)
    if layer.dominant is not None:
        assert [layer.labels[e] for e in layer.dominant] == list(range(layer.num_groups))
    if layer.mixture is not None:
        np.testing.assert_allclose(np.sum(layer.mixture, axis=1), 1, rtol=1e-12)


def allowed(method, budget):
    """Whether a method takes a budget."""
    try:
        resolve(method, budget=budget)
    except ValueError:
        return False
    return True


PAIRS = [(method, budget) for method in METHODS for budget in BUDGETS if allowed(method, budget)]


def test_which_budgets_go_with_which_methods():
    of_method = {m: {b for n, b in PAIRS if n == m} for m in METHODS}
    for method, budgets in of_method.items():
        wanted = set(BUDGETS)
        if method in ("trimming", "least-residual"):
            wanted = {"uniform"}
        elif resolve(method).steps["group"] != "prune" or method == "o-prune":
            wanted -= {"saliency"}
        assert budgets == wanted, method


@pytest.mark.parametrize("method", METHODS)
def test_every_plan_is_a_partition_with_the_exact_total(method):
    model, stats = measured("mixtral")
    few = {"subsets": 50} if method == "o-prune" else {}
    for budget in (b for m, b in PAIRS if m == method):
        for experts in range(1, 9):
            plan = make_plan(
                stats, model, experts=experts, method=method, budget=budget, progress=False, **few
            )
            for layer in plan.layers:
                check_layer(layer, 8, method)
            if method == "trimming":
                assert all(
                    layer.width == 24 * experts // 8 and layer.num_groups == 8 for layer in plan.layers
                )
                continue
            counts = [layer.num_groups for layer in plan.layers]
            if method == "least-residual":  # fewer experts, or more and narrower ones
                assert len(set(counts)) == 1
                assert all(
                    count * (layer.width or 24) <= 24 * experts
                    for count, layer in zip(counts, plan.layers, strict=True)
                )
                continue
            assert sum(counts) == 3 * experts
            assert budget != "uniform" or counts == [experts] * 3


WEIGHTLESS = [
    m for m in METHODS if "sample" not in resolve(m).needs or resolve(m).steps["group"] == "hierarchical"
]
WEIGHTLESS = [m for m in WEIGHTLESS if not resolve(m).needs_model and m != "trimming"]


@st.composite
def synthetic(draw):
    """Statistics of made-up layers: few tokens, many ties, experts that are the same or never used."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    layers, hidden = {}, draw(st.integers(1, 4))
    for place in range(draw(st.integers(1, 4))):
        experts, count = draw(st.integers(1, 9)), int(generator.integers(3, 12))
        kinds = generator.integers(
            0, draw(st.integers(1, 9)), experts
        )  # experts of one kind compute the same
        outputs = generator.integers(-2, 3, (9, count, hidden))[kinds].astype(float)
        outputs[:, 0, 0] = 3.0 + kinds  # none is zero everywhere
        gates = generator.integers(0, 3, (count, experts)) / 4
        gates[0, 0] = 0.5
        scores = generator.integers(-2, 3, (count, experts)).astype(float)
        scores[0] = 1
        norms = np.linalg.norm(outputs, axis=2)
        safe = np.where(norms > 0, norms, 1)[..., None]
        sums = dict(
            tokens=count,
            usage_count=(gates > 0).sum(0),
            routing_mass=gates.sum(0),
            score_mass=np.exp(scores).sum(0),
            logit_gram=scores.T @ scores,
            output_sum=outputs.sum(1),
            norm_sum=np.einsum("te,et->e", gates > 0, norms),
            gated_norm_sum=np.einsum("te,et->e", gates, norms),
            output_max=np.abs(outputs).max((1, 2)),
            output_gram=np.einsum("itd,jtd->ij", outputs, outputs),
            routed_gram=np.einsum("ti,itd,jtd->ij", gates, outputs, outputs),
            routed_square=np.einsum("ti,jt->ij", gates, norms**2),
            cosine_sum=np.einsum("itd,jtd->ij", outputs / safe, outputs / safe),
        )
        layers[f"layers.{place}.experts"] = LayerStatistics(
            **{k: torch.as_tensor(v)[None] for k, v in sums.items()}
        )
    about = {n: {"top_k": 2, "router_groups": 1, "width": 8} for n in layers}
    return Statistics(
        layers, ["all"], {"name": "made up", "class": "X", "hash": "0", "layers": about}, ["00" * 8]
    )


@few(150)
@given(stats=synthetic(), data=st.data())
def test_made_up_statistics_give_partitions_with_the_exact_total(stats, data):
    sizes = [sums.num_experts for sums in stats.layers.values()]
    method = data.draw(st.sampled_from(WEIGHTLESS))
    budget = data.draw(st.sampled_from([b for m, b in PAIRS if m == method]))
    experts = data.draw(st.integers(1, min(sizes)))
    how = dict(experts=experts, method=method, budget=budget, seed=data.draw(st.integers(0, 9)))
    protected = (
        super_experts(stats) if resolve(method).steps["group"] != "fuzzy" and data.draw(st.booleans()) else {}
    )
    fewest = [min(len(p) + 1, size) for p, size in zip(protected.values(), sizes, strict=bool(protected))]
    if sum(fewest) > experts * len(sizes) or (budget == "uniform" and max(fewest, default=0) > experts):
        with pytest.raises(ValueError, match='"experts" argument'):
            make_plan(stats, guard=True, **how)
        return
    plan = make_plan(stats, guard=bool(protected), **how)
    assert sum(layer.num_groups for layer in plan.layers) == experts * len(sizes)
    for layer, size in zip(plan.layers, sizes, strict=True):
        check_layer(layer, size, method)
        assert layer.protected == protected.get(layer.name, [])
        for e in layer.protected:
            assert layer.labels.count(layer.labels[e]) == 1
            assert layer.labels[e] != DROPPED


# --- twins ------------------------------------------------------------------------------------------------


def copy_expert(layer, source, target, order):
    """Expert ``target`` becomes ``source`` with its neurons in another order."""
    made = layer.stacked([layer.neurons(source).take(order)])
    with torch.no_grad():
        for name, tensor in layer.tensors().items():
            tensor[target] = made[name][0]


def output(layer, expert, x):
    with torch.no_grad():
        return layer.expert_output(expert, layer.expert_hidden(expert, x))


@few(12)
@given(
    family=st.sampled_from(["mixtral", "gpt_oss", "qwen2_moe"]),
    order=st.permutations(range(24)),
    weight=st.floats(0.1, 0.9),
    seed=st.integers(0, 5),
    last=st.booleans(),
)
def test_an_expert_and_its_shuffled_twin_merge_without_error(family, order, weight, seed, last):
    model = tiny_model(family, torch.float64, seed=seed)
    for layer in find_moe_layers(model):
        copy_expert(layer, 2, 5, torch.tensor(order))
    x = torch.randn(
        30, TINY["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    stats = capture(model, tokens(seed=seed), needs=("usage", "sample"))
    originals = {layer.name: output(layer, 2, x) for layer in find_moe_layers(model)}
    labels, weights = [0, 1, 2, 3, 4, 2, 5, 6], [1, 1, weight, 1, 1, 1 - weight, 1, 1]
    for rule in ALIGNING:
        dominant = [0, 1, 5 if last else 2, 3, 4, 6, 7]
        layers = [LayerPlan(name, labels, weights, rule, dominant=dominant) for name in stats.layers]
        apply_plan(model, Plan(layers), stats)
        for layer in find_moe_layers(model):
            wanted = originals[layer.name]
            assert (output(layer, 2, x) - wanted).norm() <= 1e-9 * wanted.norm(), rule
        restore(model)


@few(6)
@given(
    family=st.sampled_from(["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3"]),
    labels=st.sampled_from(
        [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 0, 1, 2, 2, 3, 0],
            [0, 1, 2, 0, 1, 2, 0, 1],
            [0, 0, 1, 2, 3, 4, 5, 6],
        ]
    ),
    seed=st.integers(0, 5),
)
def test_merging_identical_experts_changes_no_logit(family, labels, seed):
    """Zipit for pairs alone.

    By its definition two neurons that are joined hardly correlate with a third that is the same, so that
    three equal experts do not come out as one.
    """
    model, ids = tiny_model(family, torch.float64, seed=seed), tokens(seed=seed)
    for layer in find_moe_layers(model):
        for e in range(8):
            copy_expert(layer, labels.index(labels[e]), e, torch.arange(24))
    stats = capture(model, ids, needs=("usage", "sample"))
    before, others = logits(model, ids), tokens(seed=seed + 100)
    elsewhere = logits(model, others)
    share = np.random.default_rng(seed).random(8) + 0.1
    share = (share / np.bincount(labels, share)[labels]).tolist()
    dominant = [max(e for e in range(8) if labels[e] == g) for g in range(max(labels) + 1)]
    for rule in EVERY_RULE:
        if rule["rule"] == "zipit" and max(np.bincount(labels)) > 2:
            continue
        layers = [LayerPlan(name, labels, share, rule, dominant=dominant) for name in stats.layers]
        apply_plan(model, Plan(layers), stats)
        torch.testing.assert_close(
            logits(model, ids), before, rtol=1e-8, atol=1e-8, msg=lambda m, r=rule: f"{r}: {m}"
        )
        torch.testing.assert_close(
            logits(model, others), elsewhere, rtol=1e-8, atol=1e-8, msg=lambda m, r=rule: f"{r}: {m}"
        )
        restore(model)
    trimmed = [LayerPlan(n, list(range(8)), [1.0] * 8, {"rule": "trimming"}, width=24) for n in stats.layers]
    apply_plan(model, Plan(trimmed), stats)
    torch.testing.assert_close(logits(model, others), elsewhere, rtol=1e-8, atol=1e-8)


def test_selection_of_few_tokens_keeps_a_whole_expert():
    """Of twins, with fewer tokens than neurons, selection gives one of them and not some neurons twice."""
    model = tiny_model("mixtral", torch.float64)
    layer = find_moe_layers(model)[0]
    copy_expert(layer, 2, 5, torch.arange(24))
    sample = capture(model, tokens(), needs=("usage", "sample")).layers[layer.name].sample
    x = torch.randn(30, TINY["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = output(layer, 2, x)
    part = type(sample)(*(getattr(sample, name)[:12] for name in SAMPLED))
    for dominant in (2, 5):
        group = Group(layer, [2, 5], dict.fromkeys([2, 5], 0.5), dominant, part)
        for rule in (rule for rule in EVERY_RULE if rule["rule"] != "joint-svd"):
            made = combine(group, rule)
            assert isinstance(made, Neurons)
            got = layer.activate(made, x) @ made.down.T
            assert (got - wanted).norm() <= 1e-8 * wanted.norm(), (rule, dominant)


# --- relabelling ------------------------------------------------------------------------------------------


def relabelled(family, order):
    """The model of :func:`measured` with its experts and their router rows in another order."""
    model = tiny_model(family, torch.float64)
    with torch.no_grad():
        for layer in find_moe_layers(model):
            router = [p for p in layer.router.parameters() if p.shape[0] == 8]
            for tensor in [*layer.tensors().values(), *router]:
                tensor.copy_(tensor[order].clone())
    return model, capture(model, IDS[family], needs=NEEDS)


def described(layer, names):
    """A layer's plan by what experts are called, whatever their numbers are."""
    groups = [frozenset(names[e] for e in group) for group in layer.groups()]
    dominant = (
        None if layer.dominant is None else {g: names[e] for g, e in zip(groups, layer.dominant, strict=True)}
    )
    dropped = {names[e] for e, label in enumerate(layer.labels) if label == DROPPED}
    mixture = None
    if layer.mixture is not None:
        rows = [[row[list(names).index(e)] for e in range(len(names))] for row in layer.mixture]
        mixture = np.array(sorted(rows))
    weights = np.array([layer.weights[list(names).index(e)] for e in range(len(names))])
    return (
        set(groups),
        dominant,
        dropped,
        {names[e] for e in layer.protected},
        layer.width,
        layer.router,
        weights,
        mixture,
    )


SETTINGS = {  # beside each method's own
    "hc-smoe": [
        dict(guard=True),
        dict(linkage="ward", budget="merge-cost"),
        dict(largest=4),
        dict(budget="silhouette"),
    ],
    "k-means": [dict(similarity="functional"), dict(budget="grape")],
    "m-smoe": [dict(group_limit=4, budget="uniform")],
    "o-prune": [dict(loss="frobenius")],
    "reap": [dict(budget="saliency", guard=True)],
    "random": [dict(merge="routing-mass"), dict(budget="frequency")],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_relabelling_experts_relabels_the_plan_and_nothing_else(family, method):
    model, stats = measured(family)
    for order in ([3, 0, 7, 5, 1, 2, 6, 4], [7, 6, 5, 4, 3, 2, 1, 0]):
        if (family, *order) not in _measured:
            _measured[family, *order] = relabelled(family, order)
        other, again = _measured[family, *order]
        for more in ({}, *SETTINGS.get(method, [])):
            for experts in (2, 4, 5):
                few = {"subsets": 50} if method == "o-prune" else {}
                how = dict(experts=experts, method=method, seed=experts, progress=False, **few, **more)
                before, after = make_plan(stats, model, **how), make_plan(again, other, **how)
                for a, b in zip(before.layers, after.layers, strict=True):
                    *first, weights, mixture = described(a, range(8))
                    *second, moved, remixed = described(b, order)
                    if mixture is not None and _undecided(mixture, a, b):
                        first[0] = second[0] = None
                    assert first == second, (more, experts, a.name)
                    if first[0] is not None:  # routers score in float32
                        np.testing.assert_allclose(moved, weights, rtol=1e-6)
                    if mixture is not None:
                        np.testing.assert_allclose(remixed, mixture, rtol=1e-4, atol=1e-6)


def _undecided(mixture, *layers):
    """Whether two centres of fuzzy c-means fall together: then memberships and weights are the same."""
    gaps = np.abs(mixture[:, None] - mixture).max(2) + np.eye(len(mixture))
    return gaps.min() < 1e-4


# --- parts that add up, and files -------------------------------------------------------------------------


def make(method, stats, model, experts=4):
    few = {"subsets": 50} if method == "o-prune" else {}
    return make_plan(stats, model, experts=experts, method=method, progress=False, **few)


def same_plans(first, second):
    """Equal but for rounding in the weights."""
    assert first.settings == second.settings
    assert first.statistics == second.statistics
    for a, b in zip(first.layers, second.layers, strict=True):
        for key in (f.name for f in dataclasses.fields(LayerPlan)):
            if key in ("weights", "mixture") and getattr(a, key) is not None:
                np.testing.assert_allclose(getattr(a, key), getattr(b, key), rtol=1e-6)
            else:
                assert getattr(a, key) == getattr(b, key), key


@few(6)
@given(
    family=st.sampled_from(["mixtral", "qwen2_moe", "gpt_oss"]),
    cut=st.integers(1, 5),
    second=st.integers(0, 2),
    size=st.integers(1, 20),
    batch=st.integers(1, 6),
    domains=st.booleans(),
)
def test_parts_add_up_to_the_whole(family, cut, second, size, batch, domains):
    model, _ = measured(family)
    ids, names = tokens(), ["b", "a", "b", "b", "c", "a"] if domains else None
    cuts = sorted({0, cut, min(6, cut + second), 6})
    whole = capture(model, ids, needs=NEEDS, sample=size, domains=names)
    total = None
    for start, end in itertools.pairwise(cuts):
        how = dict(needs=NEEDS, sample=size, batch_size=batch, domains=names and names[start:end])
        part = capture(model, ids[start:end], **how)
        total = part if total is None else total + part
    assert total.domains == whole.domains
    assert total.sequences == whole.sequences
    assert total.needs == whole.needs
    assert torch.equal(total.sampled[:size], whole.sampled)
    assert len(total.sampled) == size or all(
        len(range(a, b)) * 20 <= size for a, b in itertools.pairwise(cuts)
    )
    for name, sums in whole.layers.items():
        parts = total.layers[name]
        assert parts.collected().keys() == sums.collected().keys()
        for key, wanted in sums.collected().items():
            scale = float(wanted.abs().max())
            torch.testing.assert_close(getattr(parts, key), wanted, rtol=1e-12, atol=1e-12 * scale)
        for key in SAMPLED:
            torch.testing.assert_close(
                getattr(parts.sample, key)[:size], getattr(sums.sample, key), rtol=1e-12, atol=1e-12
            )


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_parts_give_the_plans_of_the_whole(family, tmp_path):
    """And so does the file that the whole was written to."""
    model, whole = measured(family)
    parts = capture(model, IDS[family][:3], needs=NEEDS) + capture(
        model, IDS[family][3:], needs=NEEDS, batch_size=2
    )
    whole.save(tmp_path / "s.safetensors")
    again = load_statistics(tmp_path / "s.safetensors")
    assert again.identity() == whole.identity()
    assert torch.equal(again.sampled, whole.sampled)
    assert (again.model, again.domains, again.needs) == (whole.model, whole.domains, whole.needs)
    for name, sums in whole.layers.items():
        for key, value in sums.collected().items():
            assert torch.equal(getattr(again.layers[name], key), value)
        assert all(
            torch.equal(getattr(again.layers[name].sample, k), getattr(sums.sample, k)) for k in SAMPLED
        )
    for method in METHODS:
        plan = make(method, whole, model)
        assert make(method, again, model) == plan, method
        path = tmp_path / f"{method}.json"
        plan.save(path)
        assert load_plan(path) == plan
        if method != "fuzzy" or family == "qwen2_moe":
            same_plans(make(method, parts, model), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_restoring_brings_every_bit_back_after_any_plan(family, dtype):
    model, ids = tiny_model(family, dtype), tokens()
    stats, before = capture(model, ids, needs=NEEDS), logits(model, ids)
    modules = {
        name: {k: v for k, v in vars(m).items() if isinstance(v, int)} for name, m in model.named_modules()
    }
    held = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    for method in METHODS:
        plan = make(method, stats, model, experts=3)
        apply_plan(model, plan, stats)
        changed = logits(model, ids)
        assert torch.isfinite(changed).all()
        assert not torch.equal(changed, before), method
        restore(model)
        now = dict([*model.named_parameters(), *model.named_buffers()])
        assert now.keys() == held.keys()
        assert all(torch.equal(now[n], t) and now[n].dtype == t.dtype for n, t in held.items()), method
        assert modules == {
            n: {k: v for k, v in vars(m).items() if isinstance(v, int)} for n, m in model.named_modules()
        }
        assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        assert torch.equal(logits(model, ids), before)


def test_every_rule_is_among_those_tried():
    assert {rule["rule"] for rule in EVERY_RULE} | {"trimming"} == set(COMBINE)
