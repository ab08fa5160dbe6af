"""Methods from statistics to checkpoints: what they need, what is written, what is refused."""

import json

import naive
import numpy as np
import pytest
import torch
from conftest import FAMILIES, OTHERS, TINY, logits, tiny_model, tokens
from scipy.stats import entropy

from hcsmoe_core import (
    METHODS,
    apply_plan,
    capture,
    load_merged,
    load_model,
    load_plan,
    make_plan,
    restore,
    save_merged,
)
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods import (
    format_settings,
    make_plans,
    merge_tree,
    option_names,
    parse_settings,
    resolve,
    table,
)
from hcsmoe_core.methods.summary import summarise
from hcsmoe_core.moe import routing_tensors
from hcsmoe_core.statistics import NEEDS
from hcsmoe_core.studies.cost import expected_bytes

ALL = tuple(NEEDS)
PLAIN = [
    name
    for name in METHODS
    if resolve(name).present["group"].properties.get("kind") or resolve(name).steps["router"] != "mapped"
]
OPTIONS = {"o-prune": {"subsets": 50}}


def uniform(method):
    """Settings under which every layer keeps alike many."""
    return {"budget": "uniform"} if METHODS[method].settings.get("budget", "uniform") != "uniform" else {}


@pytest.fixture(scope="module")
def measured():
    found = {}

    def measure(family, dtype=torch.float32):
        if (family, dtype) not in found:
            model = tiny_model(family, dtype)
            found[family, dtype] = model, capture(model, tokens(), needs=ALL)
        return found[family, dtype]

    return measure


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lists_what_it_needs_and_needs_no_more(method, measured):
    model, full = measured("qwen2_moe")
    needs = METHODS[method].needs
    stats = capture(model, tokens(), needs=needs)
    assert stats.needs == needs
    plan = make_plan(stats, model, experts=4, method=method, **OPTIONS.get(method, {}))
    assert plan.layers == make_plan(full, model, experts=4, method=method, **OPTIONS.get(method, {})).layers
    apply_plan(model, plan, stats)
    assert torch.isfinite(logits(model, tokens())).all()
    restore(model)
    for need in needs:
        if need in ("usage", "sample"):
            continue
        less = capture(model, tokens(), needs=[n for n in needs if n != need])
        with pytest.raises(ValueError, match=f"needs '{need}', but these statistics hold"):
            make_plan(less, model, experts=4, method=method)


@pytest.mark.parametrize("method", [m for m in METHODS if "sample" in METHODS[m].needs])
def test_without_the_sample_it_is_asked_for(method, measured):
    model, full = measured("mixtral")
    without = capture(model, tokens(), needs=[n for n in ALL if n != "sample"])
    before = logits(model, tokens())
    with pytest.raises(ValueError, match="'sample'"):
        apply_plan(model, make_plan(without, model, experts=4, method=method), without)
    plan = make_plan(full, model, experts=4, method=method)
    if plan.needs_sample:
        with pytest.raises(ValueError, match="give the statistics it was made from"):
            apply_plan(model, plan)
        other = capture(model, tokens(seed=5), needs=ALL)
        with pytest.raises(ValueError, match="made from other statistics"):
            apply_plan(model, plan, other)
    assert torch.equal(logits(model, tokens()), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_written_models_compute_what_the_live_one_did(method, family, measured, tmp_path):
    model, stats = measured(family)
    if family == "deepseek_v3" and method == "o-prune":  # whose router chooses among groups of experts first
        with pytest.raises(ValueError, match="groups of experts"):
            apply_plan(model, make_plan(stats, model, experts=4, method=method), stats)
        return
    plan = make_plan(stats, model, experts=4, method=method, **OPTIONS.get(method, {}), **uniform(method))
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan
    apply_plan(model, plan, stats)
    live = logits(model, tokens(seed=2))
    written = save_merged(model, plan, tmp_path / "m")
    restore(model)
    again, _ = load_model(tmp_path / "m", experts_implementation="eager")
    assert torch.equal(logits(again, tokens(seed=2)), live)
    assert sum(f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors")) == written["bytes"]
    apart = not any(layer.joins for layer in plan.layers)  # as least-residual may decide
    narrow = any(layer.width for layer in plan.layers)
    if (method in PLAIN or apart) and not (
        narrow and family == "deepseek_v3"
    ):  # whose shared experts share the width
        from transformers import AutoModelForCausalLM

        assert written["router"] == "plain"
        stock = AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", experts_implementation="eager", dtype="float32"
        )
        assert torch.equal(logits(stock.eval(), tokens(seed=2)), live)
        assert "expert_merge" not in json.loads((tmp_path / "m" / "config.json").read_text())
    else:
        assert written["router"] == "mapped"
        assert written["parameters"] == sum(p.numel() for p in again.parameters()) or plan.compress


@pytest.mark.parametrize(
    "method", [m for m in METHODS if m not in ("fuzzy", "mc-smoe")]
)  # which change every expert
def test_keeping_every_expert_changes_no_bit(method, measured):
    model, stats = measured("qwen2_moe")
    before = logits(model, tokens())
    apply_plan(model, make_plan(stats, model, experts=8, method=method, **OPTIONS.get(method, {})), stats)
    after = logits(model, tokens())
    restore(model)
    assert torch.equal(after, before)


@pytest.mark.parametrize("method", ["reap", "trimming"])
def test_mapped_on_request(method, measured, tmp_path):
    model, stats = measured("mixtral")
    plan = make_plan(stats, model, experts=4, method=method)
    assert save_merged(model, plan, tmp_path / "m", stats=stats, router="mapped")["router"] == "mapped"
    apply_plan(model, plan, stats)
    live = logits(model, tokens(seed=2))
    restore(model)
    assert torch.equal(
        logits(load_merged(tmp_path / "m", experts_implementation="eager"), tokens(seed=2)), live
    )


def test_non_uniform_pruning_is_written_mapped(measured, tmp_path):
    model, stats = measured("qwen3_moe")
    plan = make_plan(stats, model, experts=5, method="reap", budget="saliency")
    counts = [layer.num_groups for layer in plan.layers]
    assert sum(counts) == 15
    assert len(set(counts)) > 1
    apply_plan(model, plan)
    live = logits(model, tokens(seed=2))
    with pytest.raises(ValueError, match='cannot be "plain" for this plan'):
        save_merged(model, plan, tmp_path / "p", router="plain")
    save_merged(model, plan, tmp_path / "m")
    restore(model)
    assert torch.equal(
        logits(load_merged(tmp_path / "m", experts_implementation="eager"), tokens(seed=2)), live
    )


def test_factors_take_fewer_bytes_and_are_written_dense(measured, tmp_path):
    model, stats = measured("mixtral", torch.bfloat16)
    plan = make_plan(stats, model, experts=4, method="mc-smoe", budget="uniform", share=0.5)
    assert plan.compress == {"share": 0.5, "rank": None}
    apply_plan(model, plan, stats)
    live = logits(model, tokens(seed=2))
    for layer in find_moe_layers(model):
        dense = sum(t.numel() for t in layer.tensors().values()) * 2
        assert dense * 0.4 < layer.experts._merged.compressed_bytes
    numbers = (
        3 * 4 * 3 * 32 * 24 // 2
    )  # half of the weights at 2 bytes each, and 8 bytes for each row that is stored
    stored = sum(layer.experts._merged.compressed_bytes for layer in find_moe_layers(model))
    assert 2 * (numbers - 32) < stored < 2 * numbers + 8 * 3 * 4 * (24 + 24 + 32)
    save_merged(model, plan, tmp_path / "m", stats=stats)
    restore(model)
    assert torch.equal(
        logits(load_merged(tmp_path / "m", experts_implementation="eager"), tokens(seed=2)), live
    )


def test_two_plans_of_the_same_groups_are_told_apart(measured, tmp_path):
    model, stats = measured("mixtral")
    first, second = (make_plan(stats, model, experts=4, combine=c) for c in ("average", "least-squares"))
    apply_plan(model, first)
    with pytest.raises(ValueError, match="Another plan is applied"):
        save_merged(model, second, tmp_path / "m", stats=stats)
    restore(model)


def test_the_size_of_a_statistics_file_is_known_beforehand(measured, tmp_path):
    model, _stats = measured("qwen2_moe")
    for needs in (("usage", "outputs"), ("usage", "norms", "grams"), ALL):
        part = capture(model, tokens(), needs=needs, sample=50)
        part.save(tmp_path / "s.safetensors")
        header = int.from_bytes((tmp_path / "s.safetensors").read_bytes()[:8], "little") + 8
        size = expected_bytes(model, part.needs, domains=1, tokens=tokens().numel(), sample=50)
        assert (tmp_path / "s.safetensors").stat().st_size - header == size


def test_steps_that_do_not_go_together_are_refused():
    refused = {
        'linkage "ward" needs Euclidean': dict(method="hc-smoe", linkage="ward", metric="cosine"),
        'group "k-means" needs points': dict(method="k-means", similarity="functional-routed"),
        'combine "trimming" goes with group "none"': dict(method="hc-smoe", combine="trimming"),
        'router "dropped" goes with group "prune"': dict(method="hc-smoe", router="dropped"),
        'budget "saliency" goes with': dict(method="o-prune", budget="saliency"),
        "keeps the router and every expert at one width": dict(method="trimming", guard=True),
        '"method" argument must be one of "hc-smoe"': dict(method="hcsmo"),
        '"setting" argument must be one of "linkage"': dict(method="hc-smoe", linkages="ward"),
        '"share" argument must be above 0 and at most 1': dict(method="mc-smoe", share=1.5),
        "names one similarity twice": dict(method="hc-smoe", similarity="weight+weight"),
        "weights weight by 'x'": dict(method="hc-smoe", similarity="x*weight"),
    }
    for message, settings in refused.items():
        with pytest.raises(ValueError, match=message):
            resolve(**settings)


def test_more_experts_than_a_group_limit_holds_are_refused_first(measured):
    stats = measured("mixtral")[1]
    with pytest.raises(
        ValueError, match='"group_limit" argument is 2, but 3 groups of at most 2 hold only 6 of 8 experts'
    ):
        make_plan(stats, experts=3, method="m-smoe", budget="uniform", group_limit=2)
    plan = make_plan(stats, experts=4, method="m-smoe", budget="uniform", group_limit=2)
    assert all(len(members) == 2 for layer in plan.layers for members in layer.groups())
    for settings in (dict(method="m-smoe", group_limit=4), dict(budget="merge-cost", largest=3)):
        plan = make_plan(stats, experts=3, **settings)
        assert sum(layer.num_groups for layer in plan.layers) == 9
        largest = settings.get("largest", 4)
        assert max(len(members) for layer in plan.layers for members in layer.groups()) <= largest
    with pytest.raises(ValueError, match="3 in all, but at least 6 must be kept"):
        make_plan(stats, experts=1, method="m-smoe", group_limit=4)


def test_the_guard_is_stated_and_kept(measured):
    model, stats = measured("mixtral")
    sums = stats.layer(0)
    sums.output_max[0, 5] *= 1e3
    try:
        mixed = make_plan(stats, model, experts=3, method="fuzzy", guard=True).layers[0]
        row = mixed.mixture[mixed.labels[5]]
        assert [e for e, w in enumerate(row) if w] == [5]
        assert all(r[5] == 0 for g, r in enumerate(mixed.mixture) if g != mixed.labels[5])
        for method in ("hc-smoe", "k-means", "m-smoe", "reap", "random", "dek", "fuzzy"):
            plan = make_plan(stats, model, experts=3, method=method, guard=True)
            assert plan.settings["guard"] is True
            layer = plan.layers[0]
            assert layer.protected == [5]
            assert [5] in layer.groups()
            assert sum(p.num_groups for p in plan.layers) == 9
        assert make_plan(stats, model, experts=3).settings["guard"] is False
    finally:
        sums.output_max[0, 5] /= 1e3


@pytest.mark.parametrize("applied", ["hc-smoe", "trimming", "reap"])
def test_a_merged_model_is_planned_for_as_it_was_before(applied, measured):
    model, stats = measured("mixtral")
    settings = [dict(method=m) for m in METHODS if resolve(m).needs_model]
    settings += [dict(similarity="weight+functional"), dict(method="reap", budget="grape", similarity="cka")]
    assert len(settings) >= 7
    wanted = [make_plan(stats, model, experts=4, **s, **OPTIONS.get(s.get("method"), {})) for s in settings]
    tree = merge_tree(stats, 0, similarity="weight", model=model)
    apply_plan(model, make_plan(stats, model, experts=3, method=applied), stats)
    live = logits(model, tokens(seed=2))
    for wish, plan in zip(settings, wanted, strict=True):
        assert make_plan(stats, model, experts=4, **wish, **OPTIONS.get(wish.get("method"), {})) == plan, wish
        assert all(layer.merged for layer in find_moe_layers(model))
    assert (merge_tree(stats, 0, similarity="weight", model=model) == tree).all()
    with pytest.raises(ValueError, match="only where budget"):
        make_plan(stats, model, experts=[4, 4, 4], method="least-residual")
    assert torch.equal(logits(model, tokens(seed=2)), live)
    restore(model)


def test_numbers_of_experts_may_be_of_any_kind(measured):
    stats = measured("mixtral")[1]
    plan, lists = make_plan(stats, experts=4), make_plan(stats, experts=[2, 8, 5])
    assert make_plan(stats, experts=np.int64(4)) == plan
    assert make_plan(stats, experts=torch.tensor(4)) == plan
    for experts in ((2, 8, 5), np.array([2, 8, 5]), [np.int64(2), 8, np.int32(5)], torch.tensor([2, 8, 5])):
        made = make_plan(stats, experts=experts)
        assert made == lists
        assert json.loads(json.dumps(made.settings)) == made.settings
    for experts in (True, 4.0, "4", [2, 8, 5.0], [2, True, 5], None):
        with pytest.raises(ValueError, match='"experts" argument'):
            make_plan(stats, experts=experts)


def test_fewer_experts_than_the_guard_protects_are_refused_by_name(measured, monkeypatch):
    stats = measured("mixtral")[1]
    monkeypatch.setattr(
        "hcsmoe_core.methods.pruning.super_experts", lambda stats: {n: [0, 1, 2] for n in stats.layers}
    )
    for experts in ([4, 2, 8], [4, 3, 8]):
        with pytest.raises(
            ValueError, match=f"leaves {experts[1]} experts in .*layers.1.* from 4 to 8 must be"
        ):
            make_plan(stats, experts=experts, guard=True)
    assert [p.num_groups for p in make_plan(stats, experts=[4, 8, 5], guard=True).layers] == [4, 8, 5]


def test_an_option_that_no_step_takes_is_refused_with_those_that_do():
    for method, settings, takers in (
        ("reap", {"linkage": "ward"}, 'group "hierarchical" and budget "merge-cost" and budget "silhouette"'),
        ("hc-smoe", {"ridge": 0.1}, 'combine "least-squares" and combine "trimming" and combine "selection"'),
        ("hc-smoe", {"share": 0.5}, 'compress "low-rank"'),
        ("hc-smoe", {"saliency": "ean"}, 'budget "saliency" and group "prune"'),
        ("random", {"metric": "cosine"}, 'group "hierarchical"'),
        ("random", {"similarity": "weight"}, 'group "hierarchical"'),
        ("reap", {"merge": "average"}, 'group "hierarchical"'),
    ):
        with pytest.raises(ValueError, match="setting is taken by") as caught:
            resolve(method, **settings)
        for taker in takers.split(" and "):
            assert taker in str(caught.value)
    # what a row sets for a step that is then set otherwise is no fault of the user's
    assert resolve("grape", group="k-means").steps["group"] == "k-means"


def test_equal_plans_have_equal_settings():
    for one, other in (
        (dict(method="k-means"), dict(method="hc-smoe", group="k-means")),
        (dict(method="hc-smoe"), dict(method="hc-smoe", linkage="average", metric="euclidean", guard=False)),
        (dict(method="recommended"), dict(method="least-residual", refit=2)),
        (dict(similarity="2*weight"), dict(similarity="weight")),
        (dict(similarity="functional + weight"), dict(similarity="0.5*functional+0.5*weight")),
        (dict(method="k-means", centres=(0, np.int64(3))), dict(method="k-means", centres=[0, 3])),
        (dict(method="sub-moe", rank=1), dict(method="sub-moe", rank=1.0)),
        (dict(method="uncurl"), dict(similarity="router-logits", metric="cosine", align="weights")),
        (dict(method="simsmoe"), dict(similarity="cka")),
        (dict(method="mc-smoe"), dict(method="m-smoe", compress="low-rank", share=0.5)),
    ):
        first, second = resolve(**one).settings, resolve(**other).settings
        assert first == second
        assert json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    every = [json.dumps(resolve(m).settings, sort_keys=True) for m in METHODS]
    assert len(set(every)) == len(every)
    assert (
        resolve(similarity="functional+pairwise-cosine").settings
        != resolve(similarity="functional+pairwise-cosine", metric="cosine").settings
    )


def test_settings_are_written_and_read():
    text = "align=weights centres=0,3 guard=on linkage=ward ridge=0.1 similarity=0.7*functional+0.3*weight"
    settings = parse_settings(text.split())
    assert settings["centres"] == [0, 3]
    assert settings["guard"] is True
    assert settings["ridge"] == 0.1
    assert format_settings(settings) == text
    assert set(settings) <= set(option_names())
    for item in ("guard=maybe", "linkge=ward", "ridge=little", "ward"):
        with pytest.raises(ValueError, match="steps"):
            parse_settings([item], option="steps")


def test_the_table_names_every_method():
    text = table()
    for name, method in METHODS.items():
        assert f"\n{name}: {method.title}" in "\n" + text
        assert method.paper in text
    assert text.count("needs") >= len(METHODS)


def test_each_layer_may_be_given_its_own_number(measured):
    model, stats = measured("mixtral")
    plan = make_plan(stats, model, experts=[2, 8, 5], method="reap")
    assert [layer.num_groups for layer in plan.layers] == [2, 8, 5]
    even = [make_plan(stats, model, experts=r).layers[i] for i, r in enumerate((2, 8, 5))]
    assert make_plan(stats, model, experts=[2, 8, 5]).layers == even
    for experts, settings, message in (
        ([2, 8], {}, "lists 2 numbers for 3 MoE layers"),
        ([2, 9, 5], {}, "from 1 to 8; not 9"),
        ([2, 8, 5], {"budget": "merge-cost"}, 'only where budget is "uniform"'),
        ([2, 8, 5], {"method": "trimming"}, "not for trimming"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(stats, model, experts=experts, **settings)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_predicted_errors_are_those_of_the_mean_output(family):
    model = tiny_model(family, torch.float64)
    stats = capture(model, tokens(), needs=ALL, sample=tokens().numel())
    layer, sums = find_moe_layers(model)[1], stats.layer(1)
    outputs = naive.outputs(layer.experts, sums.sample.inputs)
    share = (sums.usage_count.sum(0).double() / sums.usage_count.sum()).tolist()
    labels = [0, 1, 0, 2, 1, 0, -1, 2]
    lost = whole = 0.0
    for e in range(8):
        members = [k for k in range(8) if labels[k] == labels[e] and labels[e] >= 0]
        weight = sum(share[k] for k in members)
        mean = sum(share[k] / weight * outputs[k] for k in members) if members else 0 * outputs[e]
        lost += share[e] * float(((outputs[e] - mean) ** 2).sum())
        whole += share[e] * float((outputs[e] ** 2).sum())
    found = summarise(stats, 1, labels)
    assert found["function_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    mass = sums.routing_mass.sum(0).numpy()
    assert found["entropy"] == pytest.approx(entropy(mass))
    groups = [sum(m for m, g in zip(mass, labels, strict=True) if g == group) for group in range(3)]
    assert found["entropy_after"] == pytest.approx(entropy(groups))
    assert found["saved"] == pytest.approx(5 / 8)


@pytest.mark.parametrize("family", ["Ernie4_5_Moe", "MiniMaxM2", "Lfm2Moe"])
def test_correction_biases_are_dropped_wherever_a_family_keeps_them(family, tmp_path):
    """In a module of their own, or in the block; a bias that keeps an expert from being chosen drops it."""
    import transformers as t

    sizes = dict(num_experts_per_tok=2, moe_intermediate_size=24, intermediate_size=24, head_dim=8)
    extra = {
        "Ernie4_5_Moe": dict(moe_num_experts=8, moe_k=2, moe_layer_start_index=0, moe_num_shared_experts=1),
        "MiniMaxM2": dict(num_local_experts=8, rotary_dim=8),
        "Lfm2Moe": dict(
            num_experts=8, num_dense_layers=1, layer_types=["full_attention"] * 3, use_expert_bias=True
        ),
    }[family]
    torch.manual_seed(0)
    config = getattr(t, f"{family}Config")(**TINY | sizes | extra)
    model = t.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    layers = find_moe_layers(model)
    biases = [tensor for layer in layers for _, name, tensor in routing_tensors(layer, 8) if "bias" in name]
    assert len(biases) == len(layers)
    with torch.no_grad():
        for bias in biases:
            bias.normal_(0, 0.05)
    stats = capture(model, tokens(), needs=ALL)
    for method in ("reap", "o-prune"):
        plan = make_plan(stats, model, experts=4, method=method)
        with torch.no_grad():
            kept = [bias.clone() for bias in biases]
            for bias, layer_plan in zip(biases, plan.layers, strict=True):
                bias.view(-1)[[e for e in range(8) if e not in layer_plan.kept]] = -1e9
            wanted = logits(model, tokens(seed=2))
            for bias, before in zip(biases, kept, strict=True):
                bias.copy_(before)
        apply_plan(model, plan)
        live = logits(model, tokens(seed=2))
        assert save_merged(model, plan, tmp_path / method)["router"] == "plain"
        restore(model)
        if family != "Ernie4_5_Moe":  # whose softmax, before the bias is added, is over fewer
            torch.testing.assert_close(live, wanted, rtol=1e-4, atol=1e-4)
        again = t.AutoModelForCausalLM.from_pretrained(
            tmp_path / method, experts_implementation="eager", dtype="float32"
        )
        assert torch.equal(logits(again.eval(), tokens(seed=2)), live)


@pytest.mark.parametrize(
    "settings", [{}, {"guard": True}, {"largest": 3}, {"method": "k-means"}, {"budget": "merge-cost"}]
)
def test_many_plans_are_those_made_one_by_one(settings, measured):
    model, stats = measured("mixtral")
    linkages = None if settings.get("method") == "k-means" else ["average", "ward"]
    counts = [3, 5] if "budget" in settings else [3, 5, [6, 4, 8]]
    made = list(make_plans(stats, model, experts=counts, linkages=linkages, **settings))
    varied = [{}] if linkages is None else [{"linkage": link} for link in linkages]
    alone = [make_plan(stats, model, experts=n, **link, **settings) for link in varied for n in counts]
    assert made == alone
    assert len(made) == len(varied) * len(counts)
