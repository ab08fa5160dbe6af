"""Statistics, similarities, groups, budgets and prunings against slow versions in float64."""

import dataclasses
import functools
import itertools
import math
import sys
from types import SimpleNamespace

import naive
import numpy as np
import pytest
import torch
from conftest import logits, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster import hierarchy
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import silhouette_score
from test_capture import router_name

from hcsmoe_core import (
    Plan,
    apply_plan,
    capture,
    cut,
    distances,
    linkage,
    load_statistics,
    make_plan,
    restore,
)
from hcsmoe_core.clustering import LINKAGES, by_first_appearance
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods import budgets, resolve
from hcsmoe_core.methods.grouping import fuzzy_cmeans, kmeans, random_groups, restricted, single_shot
from hcsmoe_core.methods.planner import Layer
from hcsmoe_core.methods.pruning import (
    DropLoss,
    best_kept,
    output_grams,
    routing_rule,
    super_experts,
)
from hcsmoe_core.methods.similarities import coordinates, scale_of
from hcsmoe_core.plan import LayerPlan
from hcsmoe_core.similarity import metric_of, parts_of
from hcsmoe_core.statistics import DEFAULT_NEEDS, NEEDS, LayerStatistics, Statistics

E = 8
RUN = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")
DOMAINS = ["a", "b", "a", "c", "b", "a"]
ALL_NEEDS = tuple(NEEDS)
quick = settings(deadline=None, max_examples=40, derandomize=True)


def family_model(family):
    """A tiny model in float64; "deepseek_flat" is a DeepSeek-V3 whose router does not limit groups."""
    model = tiny_model(family.replace("flat", "v3"), torch.float64)
    for layer in find_moe_layers(model):
        if hasattr(layer.router, "e_score_correction_bias"):
            layer.router.e_score_correction_bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(7))
        if family == "deepseek_flat":
            layer.router.num_group = layer.router.topk_group = 1
    return model


def rule_of(family, router):
    """How the family routes, as :func:`naive.routed` takes it."""
    rule = {"family": family.replace("flat", "v3"), "top_k": router.top_k}
    if "deepseek" in family:
        bias = router.e_score_correction_bias.double().numpy()
        rule |= {"bias": bias, "groups": router.num_group, "chosen_groups": router.topk_group, "scale": 2.5}
    return rule


@functools.cache
def run(family):
    """A model, its statistics, and everything that a naive run of it sees; nothing in it may be changed."""
    model, ids = family_model(family), tokens()
    names = [layer.name for layer in find_moe_layers(model)]
    trace = naive.Trace(model, ids, names, [router_name(n, family) for n in names])
    # Attention of gpt-oss is float32 inside: the same batches give the same rounding.
    batch_size = len(ids) if family == "gpt_oss" else 4
    stats = capture(model, ids, needs=ALL_NEEDS, sample=50, batch_size=batch_size, domains=DOMAINS)
    seen = {}
    for layer in find_moe_layers(model):
        f = naive.outputs(layer.experts, trace.inputs[layer.name].double()).numpy()
        g, chosen = naive.gates(trace.index[layer.name], trace.weight[layer.name], E)
        l = trace.logits[layer.name].double().numpy()  # noqa: E741
        y = np.einsum("te,etd->td", g, f)
        seen[layer.name] = SimpleNamespace(
            f=f, g=g, chosen=chosen, l=l, y=y, rule=rule_of(family, layer.router)
        )
    return SimpleNamespace(
        model=model, ids=ids, names=names, trace=trace, stats=stats, seen=seen, batch_size=batch_size
    )


def close(got, wanted, rtol=1e-9, atol=0.0):
    np.testing.assert_allclose(
        np.asarray(got, dtype=np.float64), np.asarray(wanted, dtype=np.float64), rtol=rtol, atol=atol
    )


def random_distances(rng, experts, dimensions=3):
    return pdist(rng.normal(size=(experts, dimensions)))


def partition(labels):
    return sorted(
        sorted(np.flatnonzero(np.asarray(labels) == g).tolist()) for g in set(np.asarray(labels).tolist())
    )


# --- sums -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RUN)
def test_sums_equal_naive_ones_in_every_domain(family):
    r = run(family)
    assert r.stats.domains == ["a", "b", "c"]
    of_token = np.repeat([r.stats.domains.index(d) for d in DOMAINS], r.ids.shape[1])
    for name in r.names:
        sums, seen = r.stats.layers[name], r.seen[name]
        for domain in range(3):
            rows = of_token == domain
            p = naive.scores(seen.l[rows], sigmoid=family == "deepseek_v3")
            wanted = naive.sums(seen.f[:, rows], seen.g[rows], seen.chosen[rows], p)
            assert set(wanted) == {"score_mass", *NEEDS["norms"], *NEEDS["grams"]}
            for key, value in wanted.items():
                close(getattr(sums, key)[domain], value, rtol=1e-9, atol=1e-9 * np.abs(value).max())
            assert int(sums.tokens[domain]) == rows.sum()
            assert sums.usage_count[domain].tolist() == seen.chosen[rows].sum(0).tolist()
            close(sums.routing_mass[domain], seen.g[rows].sum(0))
            close(sums.output_sum[domain], seen.f[:, rows].sum(1), rtol=1e-8, atol=1e-9)
            close(sums.logit_gram[domain], seen.l[rows].T @ seen.l[rows], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("family", RUN)
def test_norms_of_routed_tokens_alone_are_the_same(family):
    r = run(family)
    alone = capture(r.model, r.ids, needs=("usage", "norms"), batch_size=r.batch_size, domains=DOMAINS)
    usual = capture(r.model, r.ids, needs=DEFAULT_NEEDS, batch_size=r.batch_size, domains=DOMAINS)
    assert alone.needs == ("usage", "norms")
    assert usual.needs == DEFAULT_NEEDS == ("usage", "outputs", "norms", "grams")
    for name in r.names:
        few, more = alone.layers[name], usual.layers[name]
        assert few.output_sum is None
        assert few.output_gram is None
        assert few.sample is None
        for key in (*NEEDS["usage"], *NEEDS["norms"]):
            close(getattr(few, key), getattr(more, key), rtol=1e-12, atol=1e-12)
            close(getattr(few, key), getattr(r.stats.layers[name], key), rtol=1e-12, atol=1e-12)


def test_chunks_do_not_change_grams_and_norms(monkeypatch):
    r = run("qwen2_moe")
    monkeypatch.setattr(sys.modules["hcsmoe_core.collect"], "DENSE", {"cpu": 7 * E * 32})
    parts = capture(r.model, r.ids, needs=ALL_NEEDS, sample=50, batch_size=4, domains=DOMAINS)
    for name in r.names:
        for key, value in r.stats.layers[name].collected().items():
            close(getattr(parts.layers[name], key), value, rtol=1e-11, atol=1e-10)


# --- the sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", RUN)
def test_the_sample_is_the_tokens_with_the_smallest_hashes(family):
    r = run(family)
    length = r.ids.shape[1]
    every = [
        (naive.token_key(r.stats.sequences[s], p), s, p) for s in range(len(r.ids)) for p in range(length)
    ]
    wanted = [(s, p, r.stats.domains.index(DOMAINS[s])) for _, s, p in sorted(every)[:50]]
    assert [tuple(row) for row in r.stats.sampled.tolist()] == wanted
    for name in r.names:
        sample, seen = r.stats.layers[name].sample, r.seen[name]
        rows = [s * length + p for s, p, _ in wanted]
        close(sample.inputs, r.trace.inputs[name][rows].double(), rtol=1e-9, atol=1e-12)
        close(sample.logits, seen.l[rows], rtol=1e-9, atol=1e-9)
        assert sample.index.tolist() == r.trace.index[name][rows].tolist()
        close(sample.weight, r.trace.weight[name][rows].double(), rtol=1e-6)
        close(sample.gates, seen.g[rows], rtol=1e-6)
        assert np.array_equal(sample.chosen.numpy(), seen.chosen[rows])


def test_the_sample_does_not_depend_on_batches():
    r = run("qwen2_moe")
    for batch_size in (1, 5, 6):
        other = capture(r.model, r.ids, needs=("sample",), sample=50, batch_size=batch_size, domains=DOMAINS)
        assert torch.equal(other.sampled, r.stats.sampled)
        for name in r.names:
            for key in ("inputs", "logits", "index", "weight"):
                close(
                    getattr(other.layers[name].sample, key),
                    getattr(r.stats.layers[name].sample, key),
                    1e-6,
                    1e-9,
                )


def test_a_sample_of_all_tokens_and_more():
    r = run("mixtral")
    stats = capture(r.model, r.ids, needs=("sample",), sample=1000)
    assert sorted(map(tuple, stats.sampled[:, :2].tolist())) == list(itertools.product(range(6), range(20)))
    assert len(stats.layer(0).sample.inputs) == 120


@pytest.mark.parametrize(("first", "second"), [(30, 30), (30, 45), (1000, 30), (1000, 1000)])
def test_samples_of_parts_are_the_sample_of_all(first, second, tmp_path):
    r = run("mixtral")
    size = min((n for n, tokens_ in ((first, 40), (second, 80)) if n < tokens_), default=120)
    whole = capture(r.model, r.ids, needs=("usage", "sample"), sample=size, domains=DOMAINS)
    parts = [capture(r.model, r.ids[:2], needs=("usage", "sample"), sample=first, domains=DOMAINS[:2])]
    parts.append(capture(r.model, r.ids[2:], needs=("usage", "sample"), sample=second, domains=DOMAINS[2:]))
    both = parts[0] + parts[1]
    assert both.domains == whole.domains
    assert torch.equal(both.sampled, whole.sampled)
    both.save(tmp_path / "s")
    for stats in (both, load_statistics(tmp_path / "s")):
        assert stats.needs == ("usage", "sample")
        for name in r.names:
            for key in ("inputs", "logits", "index", "weight"):
                got, wanted = (getattr(s.layers[name].sample, key) for s in (stats, whole))
                close(got, wanted, rtol=1e-6, atol=1e-9)


# --- similarities -----------------------------------------------------------------------------------------


def naive_features(r, name, similarity):
    """One row an expert, whose Euclidean distances are those of the similarity."""
    f = r.seen[name].f
    if similarity == "expert-output":
        return f.mean(1)
    if similarity == "router-logits":
        return r.seen[name].l.T
    if similarity == "functional":
        return f.reshape(E, -1) / np.sqrt(f.shape[1])
    tensors = [p for _, p in sorted(r.model.get_submodule(name).named_parameters())]
    return np.concatenate([p.detach().double().numpy().reshape(E, -1) for p in tensors], 1)


def naive_distances(r, name, similarity):
    f, g = r.seen[name].f, r.seen[name].g
    found = []
    for i, j in itertools.combinations(range(E), 2):
        if similarity == "functional-routed":
            weight = g[:, i] + g[:, j]
            square = ((f[i] - f[j]) ** 2).sum(1)
            found.append(np.sqrt((weight * square).sum() / weight.sum()))
        elif similarity == "pairwise-cosine":
            cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(f[i], f[j], strict=True)]
            found.append(1 - np.mean(cosines))
        else:
            raise AssertionError
    return np.array(found)


def naive_cka(f):
    f = f - f.mean(1, keepdims=True)
    found = []
    for i, j in itertools.combinations(range(len(f)), 2):
        norms = [np.linalg.norm(f[a].T @ f[a]) for a in (i, j)]
        found.append(1 - np.linalg.norm(f[i].T @ f[j]) ** 2 / (norms[0] * norms[1]))
    return np.array(found)


@pytest.mark.parametrize("family", RUN)
def test_functional_distances_equal_naive_ones(family):
    r = run(family)
    for name in r.names:
        features = naive_features(r, name, "functional")
        close(distances(r.stats, name, similarity="functional"), naive.pairwise(features), rtol=1e-7)
        close(
            distances(r.stats, name, similarity="functional", metric="cosine"),
            pdist(features, "cosine"),
            rtol=1e-7,
        )
        for similarity in ("functional-routed", "pairwise-cosine"):
            close(
                distances(r.stats, name, similarity=similarity),
                naive_distances(r, name, similarity),
                rtol=1e-7,
            )


@pytest.mark.parametrize("family", RUN)
@pytest.mark.parametrize("size", [20, 31, 32, 50])
def test_cka_equals_a_naive_one_with_few_tokens_and_with_many(family, size):
    r = run(family)
    stats = capture(r.model, r.ids, needs=("sample",), sample=size, batch_size=r.batch_size)
    rows = stats.sampled[:, 0] * r.ids.shape[1] + stats.sampled[:, 1]
    assert len(rows) == size
    for name in r.names:
        close(
            distances(stats, name, similarity="cka", model=r.model),
            naive_cka(r.seen[name].f[:, rows]),
            rtol=1e-7,
        )


def test_cka_looks_at_2048_tokens_at_most(monkeypatch):
    r = run("mixtral")
    monkeypatch.setattr("hcsmoe_core.methods.similarities.CKA_TOKENS", 40)
    rows = (r.stats.sampled[:, 0] * r.ids.shape[1] + r.stats.sampled[:, 1])[:40]
    got = distances(r.stats, 0, similarity="cka", model=r.model)
    close(got, naive_cka(r.seen[r.names[0]].f[:, rows]), rtol=1e-7)


def test_experts_that_no_token_is_routed_to_are_compared_unweighted():
    model, ids = family_model("gpt_oss"), tokens()
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.router.bias[[2, 6]] = -1e4
    stats = capture(model, ids, needs=DEFAULT_NEEDS)
    place = list(itertools.combinations(range(E), 2)).index((2, 6))
    for name in stats.layers:
        assert (stats.layers[name].usage_count[:, [2, 6]] == 0).all()
        routed, plain = (distances(stats, name, similarity=s) for s in ("functional-routed", "functional"))
        close(routed[place], plain[place])
        assert np.isfinite(routed).all()
        assert not np.allclose(np.delete(routed, place), np.delete(plain, place), rtol=1e-3)


@pytest.mark.parametrize(
    ("similarity", "weights"),
    [
        ("expert-output+weight", {"expert-output": 0.5, "weight": 0.5}),
        ("0.7*functional+0.3*router-logits", {"functional": 0.7, "router-logits": 0.3}),
        (
            "2 * expert-output + functional + 1*weight",
            {"expert-output": 0.5, "functional": 0.25, "weight": 0.25},
        ),
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_euclidean_combinations_are_distances_of_joined_features(family, similarity, weights):
    r = run(family)
    assert metric_of(similarity) == "euclidean"
    assert dict(parts_of(similarity)) == pytest.approx(weights, rel=1e-12)
    for name in r.names:
        joined = []
        for part, weight in weights.items():
            features = naive_features(r, name, part)
            joined.append(features * np.sqrt(weight / (naive.pairwise(features) ** 2).mean()))
        got = distances(r.stats, name, similarity=similarity, model=r.model)
        close(got, naive.pairwise(np.concatenate(joined, 1)), rtol=1e-7)


def test_mixed_combinations_are_weighted_sums_relative_to_the_mean():
    r = run("qwen2_moe")
    name = r.names[1]
    output, weight = (naive_features(r, name, s) for s in ("expert-output", "weight"))
    cosines = naive_distances(r, name, "pairwise-cosine")
    routed = naive_distances(r, name, "functional-routed")
    for similarity, metric, parts in (
        ("3*pairwise-cosine+expert-output", "", [(0.75, cosines), (0.25, naive.pairwise(output))]),
        ("functional-routed+pairwise-cosine", "", [(0.5, routed), (0.5, cosines)]),
        ("expert-output+weight", "cosine", [(0.5, pdist(output, "cosine")), (0.5, pdist(weight, "cosine"))]),
        ("expert-output+functional-routed", "euclidean", [(0.5, naive.pairwise(output)), (0.5, routed)]),
    ):
        assert metric_of(similarity, metric) == "mixed"
        wanted = sum(w * d / d.mean() for w, d in parts)
        close(
            distances(r.stats, name, similarity=similarity, metric=metric, model=r.model), wanted, rtol=1e-7
        )
        assert scale_of(r.stats, name, similarity=similarity, metric=metric, model=r.model) == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_scales_are_root_mean_square_norms(family):
    r = run(family)
    for name in r.names:
        for similarity in ("expert-output", "router-logits", "weight", "functional"):
            norms = np.linalg.norm(naive_features(r, name, similarity), axis=1)
            got = scale_of(r.stats, name, similarity=similarity, model=r.model)
            close(got, np.sqrt((norms**2).mean()), rtol=1e-8)
            if similarity == "functional":
                close(scale_of(r.stats, name, similarity="functional-routed"), got)
        for similarity, metric in (("expert-output", "cosine"), ("pairwise-cosine", ""), ("cka", "")):
            assert scale_of(r.stats, name, similarity=similarity, metric=metric) == 1


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_coordinates_are_at_the_distances(family):
    r = run(family)
    for similarity, metric in (
        ("expert-output", "euclidean"),
        ("functional", "euclidean"),
        ("expert-output+functional", "euclidean"),
        ("router-logits", "cosine"),
        ("functional", "cosine"),
        ("pairwise-cosine", "cosine"),
        ("cka", "cka"),
    ):
        own = metric if similarity != "cka" else ""
        condensed = distances(r.stats, 0, similarity=similarity, metric=own, model=r.model)
        points = coordinates(condensed, metric)
        assert points.shape[0] == E
        assert points.shape[1] < E
        wanted = condensed if metric == "euclidean" else np.sqrt(2 * condensed)
        close(pdist(points), wanted, rtol=1e-6)
        assert np.array_equal(points, coordinates(condensed.copy(), metric))
    assert coordinates(np.zeros(28), "euclidean").shape[1] == 0


def test_similarities_that_cannot_be_are_refused():
    for bad, message in (
        (
            {"similarity": "functional", "metric": "cosine", "linkage": "ward"},
            'linkage "ward" needs Euclidean distances',
        ),
        ({"similarity": "functional-routed", "linkage": "ward"}, "are routing-weighted"),
        ({"similarity": "functional+pairwise-cosine", "linkage": "ward"}, "are mixed"),
        ({"similarity": "cka", "linkage": "ward"}, "are cka"),
        ({"similarity": "functional-routed", "group": "k-means"}, 'group "k-means" needs points'),
        ({"similarity": "expert-output+cka", "group": "k-means"}, "are mixed"),
        ({"similarity": "functional-routed", "group": "fuzzy"}, 'group "fuzzy" needs points'),
        ({"similarity": "output"}, '"similarity" argument must be one of "expert-output"'),
        ({"similarity": "weight+weights"}, '"similarity" argument must be one of'),
        ({"similarity": "weight+weight"}, "names one similarity twice"),
        ({"similarity": "0*weight"}, "give a positive number"),
        ({"similarity": "-1*weight+cka"}, "give a positive number"),
        ({"similarity": "nan*weight"}, "give a positive number"),
        ({"similarity": "inf*weight"}, "give a positive number"),
        ({"similarity": "much*weight"}, "give a positive number"),
        ({"metric": "manhattan"}, '"metric" argument must be one of'),
        ({"similarity": "cka", "metric": "euclidean"}, "must be 'cka' for similarity 'cka'"),
        ({"similarity": "functional-routed", "metric": "cosine"}, "must be 'routing-weighted'"),
        ({"similarity": "functional+cka", "metric": "manhattan"}, '"metric" argument must be one of'),
    ):
        with pytest.raises(ValueError, match=message):
            resolve("hc-smoe", **bad)
    assert resolve("hc-smoe", similarity="functional+weight", linkage="ward").metric == "euclidean"
    with pytest.raises(ValueError, match="not distances between points"):
        coordinates(np.ones(28), "routing-weighted")
    for metric in ("cosine", "routing-weighted", "mixed"):
        with pytest.raises(ValueError, match='linkage "ward" needs Euclidean'):
            restricted(np.ones(28), 4, 4, "ward", metric=metric)


def test_an_unknown_metric_is_refused_whatever_it_is_for():
    with pytest.raises(ValueError, match='"metric" argument must be'):
        metric_of("pairwise-cosine+cka", "manhattan")


def test_what_is_missing_is_named():
    r = run("mixtral")
    stats = capture(r.model, r.ids[:1], needs=("usage",))
    for similarity, missing in (
        ("expert-output", "outputs"),
        ("functional", "grams"),
        ("functional-routed", "grams"),
        ("pairwise-cosine", "grams"),
        ("cka", "sample"),
        ("weight+functional", "grams"),
    ):
        with pytest.raises(
            ValueError, match=f"needs '{missing}'.*hold usage only; capture again with needs=.*'{missing}'"
        ):
            distances(stats, 0, similarity=similarity, model=r.model)
    for name in ("reap", "ean", "man"):
        with pytest.raises(ValueError, match="needs 'norms'"):
            make_plan(stats, r.model, experts=4, method="reap", saliency=name)
    for method, missing in (
        ("hc-smoe", "outputs"),
        ("reap", "norms"),
        ("o-prune", "sample"),
        ("dek", "sample"),
    ):
        with pytest.raises(ValueError, match=f"needs '{missing}'"):
            make_plan(stats, r.model, experts=4, method=method)
    for similarity in ("weight", "cka"):
        with pytest.raises(ValueError, match='give the "model" argument'):
            distances(r.stats, 0, similarity=similarity)
    with pytest.raises(ValueError, match='give the "model" argument'):
        make_plan(r.stats, experts=4, method="o-prune")


# --- groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "single", "complete"])
@pytest.mark.parametrize("seed", range(4))
def test_restricted_groups_equal_naive_ones(method, seed):
    rng = np.random.default_rng(seed)
    experts = 9 + seed
    condensed = random_distances(rng, experts)
    for groups, largest in itertools.product(range(1, experts + 1), range(1, experts + 1)):
        if groups * largest < experts or (groups + largest) % 2:  # half of them, for time
            continue
        got = restricted(condensed, groups, largest, method)
        assert partition(got) == naive.agglomerated(squareform(condensed), groups, largest, method), (
            groups,
            largest,
        )
        assert np.array_equal(got, by_first_appearance(got))


@pytest.mark.parametrize("method", LINKAGES)
def test_restricted_groups_without_a_limit_are_scipys(method):
    for seed, experts in enumerate((2, 3, 8, 30)):
        condensed = random_distances(np.random.default_rng(seed), experts)
        for groups in range(1, experts + 1):
            wanted = hierarchy.fcluster(hierarchy.linkage(condensed, method), groups, "maxclust")
            assert np.array_equal(restricted(condensed, groups, experts, method), by_first_appearance(wanted))


@given(st.data())
@quick
def test_restricted_groups_are_as_many_and_as_large_as_asked(data):
    experts = data.draw(st.integers(2, 24))
    groups = data.draw(st.integers(1, experts))
    largest = data.draw(st.integers(-(-experts // groups), experts))
    method = data.draw(st.sampled_from(LINKAGES))
    count = experts * (experts - 1) // 2
    condensed = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    sizes = np.bincount(restricted(np.array(condensed, dtype=float), groups, largest, method))
    assert len(sizes) == groups
    assert sizes.min() >= 1
    assert sizes.max() <= largest


def test_limits_that_cannot_be_kept_are_refused():
    for groups, largest in ((1, 7), (3, 2), (4, 1)):
        with pytest.raises(ValueError, match=f'"largest" argument is {largest}, but {groups} groups'):
            restricted(np.ones(28), groups, largest)
        with pytest.raises(ValueError, match=f'"group_limit" argument is {largest}, but {groups} groups'):
            single_shot(np.eye(8), np.arange(8), groups, group_limit=largest)
    r = run("mixtral")
    with pytest.raises(ValueError, match='"largest" argument is 2'):
        make_plan(r.stats, r.model, experts=3, largest=2)
    with pytest.raises(ValueError, match='"group_limit" argument is 2'):
        make_plan(r.stats, r.model, experts=3, method="m-smoe", budget="uniform", align="none", group_limit=2)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_from_given_centres_is_lloyds(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(20, 4)) + 2 * rng.normal(size=(4, 4))[rng.integers(0, 4, 20)]
    for groups in (2, 4, 7):
        centres = rng.choice(20, groups, replace=False).tolist()
        assert partition(kmeans(points, groups, centres=centres)) == partition(
            naive.lloyd(points, points[centres])[0]
        )
        assert partition(kmeans(points, groups, centres="first")) == partition(
            naive.lloyd(points, points[:groups])[0]
        )


def inertia(points, labels):
    return sum(((points[labels == g] - points[labels == g].mean(0)) ** 2).sum() for g in set(labels.tolist()))


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_is_not_worse_than_random_starts(seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(24, 4)) + 3 * rng.normal(size=(5, 4))[rng.integers(0, 5, 24)]
    for groups in (3, 5):
        got = kmeans(points, groups, seed=seed)
        assert got.max() + 1 == groups
        starts = [points[rng.choice(24, groups, replace=False)] for _ in range(5)]
        assert inertia(points, got) <= min(naive.lloyd(points, s)[1] for s in starts) * (1 + 1e-9)
        assert np.array_equal(got, kmeans(points, groups, seed=seed))


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_kmeans_gives_as_many_groups_as_asked():
    for points in (np.zeros((6, 0)), np.zeros((6, 2)), np.repeat(np.eye(3), 2, axis=0)):
        for groups in range(1, 7):
            for centres in ("k-means++", "first", list(range(6 - groups, 6))):
                assert len(set(kmeans(points, groups, centres=centres).tolist())) == groups
    with pytest.raises(ValueError, match='"centres" argument must name 3 experts'):
        kmeans(np.eye(6), 3, centres=[1, 2, 1])
    with pytest.raises(ValueError, match='"centres" argument must be a whole number from 0 to 5'):
        kmeans(np.eye(6), 2, centres=[1, 6])


@pytest.mark.parametrize("limit", [0, 2, 3, 4, 12])
def test_single_shot_groups_equal_the_published_procedure(limit):
    rng = np.random.default_rng(limit)
    for experts in (6, 12, 16):
        for groups in range(1, experts + 1):
            if limit and groups * limit < experts:
                continue
            features = rng.normal(size=(experts, 3))
            similarity = 1 - squareform(pdist(features, "cosine"))
            usage = rng.integers(0, 9, experts)
            wanted = naive.single_shot(similarity, usage, groups, limit)
            labels, dominant = single_shot(similarity, usage, groups, group_limit=limit)
            assert partition(labels) == sorted(wanted.values())
            assert set(dominant.tolist()) == set(wanted)
            assert labels[dominant].tolist() == list(range(groups))
            assert np.array_equal(labels, by_first_appearance(labels))


def test_m_smoe_groups_by_cosines_of_logits():
    r = run("qwen2_moe")
    for groups, limit in ((3, 0), (3, 3), (4, 2)):
        plan = make_plan(
            r.stats,
            r.model,
            experts=groups,
            method="m-smoe",
            budget="uniform",
            align="none",
            group_limit=limit,
        )
        for layer in plan.layers:
            rows = r.seen[layer.name].l.T
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            wanted = naive.single_shot(unit @ unit.T, r.seen[layer.name].chosen.sum(0), groups, limit)
            assert partition(layer.labels) == sorted(wanted.values())


def test_random_groups_are_partitions_by_the_seed():
    found = set()
    for seed in range(30):
        labels = random_groups(12, 5, seed=seed)
        assert sorted(set(labels.tolist())) == list(range(5))
        assert np.array_equal(labels, by_first_appearance(labels))
        assert np.array_equal(labels, random_groups(12, 5, seed=seed))
        found.add(tuple(labels))
    assert len(found) > 25
    pairs = np.array([random_groups(12, 5, seed=s)[[0, 11]] for s in range(300)])
    assert 0.06 < (pairs[:, 0] == pairs[:, 1]).mean() < 0.32  # experts are not grouped by their place
    assert random_groups(6, 6).tolist() == list(range(6))
    assert random_groups(6, 1).tolist() == [0] * 6


@pytest.mark.parametrize("fuzzifier", [1.3, 2.0, 3.0])
def test_fuzzy_memberships_are_a_fixed_point(fuzzifier):
    rng = np.random.default_rng(3)
    points = rng.normal(size=(20, 3)) + 6 * np.eye(3)[rng.integers(0, 3, 20)]
    labels, memberships = fuzzy_cmeans(points, 3, fuzzifier=fuzzifier)
    assert memberships.shape == (3, 20)
    close(memberships.sum(0), np.ones(20), rtol=1e-12)
    assert labels.tolist() == by_first_appearance(labels).tolist()
    assert sorted(set(labels.tolist())) == [0, 1, 2]
    assert np.array_equal(memberships.argmax(0), labels)
    centres = [sum(memberships[g, e] ** fuzzifier * points[e] for e in range(20)) for g in range(3)]
    centres = [c / (memberships[g] ** fuzzifier).sum() for g, c in enumerate(centres)]
    for e in range(20):
        far = np.array([np.linalg.norm(points[e] - c) for c in centres])
        for g in range(3):
            wanted = 1 / sum((far[g] / far[other]) ** (2 / (fuzzifier - 1)) for other in range(3))
            assert memberships[g, e] == pytest.approx(wanted, abs=1e-6)


def test_fuzzy_groups_towards_one_are_those_of_kmeans():
    rng = np.random.default_rng(4)
    points = rng.normal(size=(18, 3)) + 9 * np.eye(3)[np.arange(18) % 3]
    for fuzzifier in (1.2, 1.05, 1.01):
        labels, memberships = fuzzy_cmeans(points, 3, fuzzifier=fuzzifier)
        assert np.isfinite(memberships).all()
        close(memberships.sum(0), np.ones(18), rtol=1e-12)
        assert np.array_equal(labels, kmeans(points, 3))


def test_fuzzy_groups_of_equal_experts():
    for points in (np.zeros((6, 0)), np.ones((6, 2))):
        labels, memberships = fuzzy_cmeans(points, 3)
        assert sorted(set(labels.tolist())) == [0, 1, 2]
        close(memberships, np.full((3, 6), 1 / 3))
    for bad in (1.0, 0.5, float("nan")):
        with pytest.raises(ValueError, match='"fuzzifier" argument must be above 1'):
            fuzzy_cmeans(np.eye(4), 2, fuzzifier=bad)


# --- budgets ----------------------------------------------------------------------------------------------


@st.composite
def budget_cases(draw):
    layers, experts = draw(st.integers(1, 5)), draw(st.integers(2, 9))
    least = [draw(st.integers(1, experts)) for _ in range(layers)]
    total = draw(st.integers(sum(least), layers * experts))
    ties = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return rng, layers, experts, least, total, ties


def check_budget(counts, total, least, experts):
    assert sum(counts) == total
    assert all(low <= c <= experts for low, c in zip(least, counts, strict=True))


@given(budget_cases())
@quick
def test_scores_budget_is_the_naive_sort(case):
    rng, layers, experts, least, total, ties = case
    scores = [rng.integers(0, 4, experts) / 4 if ties else rng.random(experts) for _ in range(layers)]
    got = budgets.by_score(scores, total, least)
    check_budget(got, total, least, experts)
    must = {
        (a, e) for a in range(layers) for e in sorted(range(experts), key=lambda e: -scores[a][e])[: least[a]]
    }
    rest = [(a, e) for a in range(layers) for e in range(experts) if (a, e) not in must]
    rest.sort(key=lambda place: (-scores[place[0]][place[1]], place))
    kept = must | set(rest[: total - len(must)])
    assert got == [sum(a == layer for a, _ in kept) for layer in range(layers)]


@given(budget_cases())
@quick
def test_merge_cost_budget_is_the_naive_greedy(case):
    rng, layers, experts, least, total, ties = case
    trees, scales = [], [float(rng.uniform(0.5, 2)) for _ in range(layers)]
    for _ in range(layers):
        points = rng.integers(0, 3, (experts, 2)) if ties else rng.normal(size=(experts, 2))
        trees.append(linkage(pdist(points), "average"))
    got = budgets.by_merge_cost(trees, scales, total, least)
    check_budget(got, total, least, experts)
    counts = [experts] * layers
    while sum(counts) > total:
        costs = {a: trees[a][experts - c, 2] / scales[a] for a, c in enumerate(counts) if c > least[a]}
        counts[min(costs, key=lambda a: (costs[a], a))] -= 1
    assert got == counts


def cosines(rng, experts, ties=False):
    points = rng.integers(0, 2, (experts, 2)) if ties else rng.normal(size=(experts, 3))
    return np.exp(-squareform(pdist(points)))


@given(budget_cases(), st.floats(0, 1))
@quick
def test_grape_keeps_exactly_the_total(case, gamma):
    rng, layers, experts, least, total, ties = case
    similarities = [cosines(rng, experts, ties) for _ in range(layers)]
    check_budget(budgets.grape(similarities, total, least, gamma=gamma), total, least, experts)


@given(budget_cases())
@quick
def test_grape_without_its_guard_is_the_naive_greedy(case):
    rng, layers, experts, least, total, _ = case
    similarities = [rng.uniform(0.2, 2) * cosines(rng, experts) for _ in range(layers)]
    wanted, _ = naive.grape(similarities, total, least)
    assert budgets.grape(similarities, total, least, gamma=1) == wanted


def entropy(counts):
    return -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts)


def test_grape_where_the_guard_has_no_cause_is_the_naive_greedy():
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(40):
        similarities = [rng.uniform(0.9, 1.1) * cosines(rng, 8) for _ in range(3)]
        wanted, joined = naive.grape(similarities, 12, [1] * 3)
        counts, entropies = [8] * 3, []
        for layer in joined:
            counts[layer] -= 1
            entropies.append(entropy(counts))
        if min(entropies) > 0.9 * math.log(3) + 1e-9:
            assert budgets.grape(similarities, 12, [1] * 3, gamma=0.1) == wanted
            compared += 1
    assert compared > 10


def test_grapes_guard_keeps_the_entropy():
    """A layer that is much more redundant than others takes all joins without the guard, not with it."""
    rng = np.random.default_rng(1)
    similarities = [np.ones((8, 8))] + [0.1 * cosines(rng, 8) for _ in range(3)]
    assert budgets.grape(similarities, 25, [1] * 4, gamma=1) == [1, 8, 8, 8]
    floors = []
    for gamma in (0.02, 0.05, 0.1):
        counts = budgets.grape(similarities, 25, [1] * 4, gamma=gamma)
        assert entropy(counts) >= (1 - gamma) * math.log(4)
        floors.append(counts[0])
    assert floors == sorted(floors, reverse=True)
    assert floors[-1] < floors[0]


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_grape_without_any_slack_is_as_uniform_as_can_be(layers):
    rng = np.random.default_rng(2)
    similarities = [np.ones((6, 6))] + [0.1 * cosines(rng, 6) for _ in range(layers - 1)]
    for total in range(layers, 6 * layers + 1):
        counts = budgets.grape(similarities, total, [1] * layers, gamma=0)
        assert sum(counts) == total
        assert max(counts) - min(counts) <= 1, counts


@given(budget_cases())
@settings(deadline=None, max_examples=15, derandomize=True)
def test_silhouette_budget_keeps_exactly_the_total(case):
    rng, layers, experts, least, total, _ = case
    condensed = [random_distances(rng, experts) for _ in range(layers)]
    trees = [linkage(d) for d in condensed]
    check_budget(budgets.by_silhouette(condensed, trees, total, least), total, least, experts)


@pytest.mark.parametrize("seed", range(3))
def test_silhouette_budget_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    sizes = [5, 6, 4][: 2 + seed % 2]
    condensed = [random_distances(rng, n) for n in sizes]
    trees = [linkage(d) for d in condensed]
    value = []
    for d, tree, n in zip(condensed, trees, sizes, strict=True):
        of = {1: 0.0, n: 0.0}
        for count in range(2, n):
            labels = hierarchy.fcluster(hierarchy.linkage(d, "average"), count, "maxclust")
            assert partition(labels) == partition(cut(tree, count))
            of[count] = silhouette_score(squareform(d), labels, metric="precomputed")
        value.append(of)
    for least in ([1] * len(sizes), [2] * len(sizes)):
        for total in range(sum(least), sum(sizes) + 1):
            options = [range(low, n + 1) for low, n in zip(least, sizes, strict=True)]
            every = [c for c in itertools.product(*options) if sum(c) == total]
            best = max(sum(v[c] for v, c in zip(value, counts, strict=True)) for counts in every)
            got = budgets.by_silhouette(condensed, trees, total, least)
            check_budget(got, total, least, max(sizes))
            assert sum(v[c] for v, c in zip(value, got, strict=True)) == pytest.approx(best, abs=1e-12)


def test_layers_that_are_alike_keep_alike():
    rng = np.random.default_rng(5)
    scores, condensed = rng.random(8), random_distances(rng, 8)
    tree, similarity = linkage(condensed), np.exp(-squareform(condensed))
    for keep in range(1, 9):
        assert budgets.uniform([None] * 3, 3 * keep, [1] * 3) == [keep] * 3
        assert budgets.by_score([scores] * 3, 3 * keep, [1] * 3) == [keep] * 3
        assert budgets.by_merge_cost([tree] * 3, [1.0] * 3, 3 * keep, [1] * 3) == [keep] * 3
        for gamma in (0, 0.1, 1):
            assert budgets.grape([similarity] * 3, 3 * keep, [1] * 3, gamma=gamma) == [keep] * 3


@pytest.mark.parametrize("budget", ["uniform", "frequency", "merge-cost", "silhouette", "grape"])
def test_more_protected_experts_than_are_kept_are_refused(monkeypatch, budget):
    r = run("mixtral")
    monkeypatch.setattr(
        "hcsmoe_core.methods.pruning.super_experts", lambda stats: {n: [0, 1, 2] for n in stats.layers}
    )

    grape = budgets.grape
    monkeypatch.setattr(
        budgets, "grape", lambda s, total, least, **how: grape(s, total, Limited(least), **how)
    )
    with pytest.raises(ValueError, match='"experts" argument'):
        make_plan(r.stats, r.model, experts=2, budget=budget, guard=True)


class Limited(list):
    """A list that is looked at only so often, so that what goes round for ever ends."""

    looks = 10_000

    def __getitem__(self, place):
        self.looks -= 1
        assert self.looks
        return super().__getitem__(place)


@pytest.mark.parametrize("budget", ["uniform", "frequency", "merge-cost", "grape", "silhouette"])
def test_plans_keep_exactly_the_total(budget):
    r = run("qwen2_moe")
    for experts in (1, 3, 5, 8):
        plan = make_plan(r.stats, r.model, experts=experts, budget=budget, similarity="functional")
        assert sum(layer.num_groups for layer in plan.layers) == 3 * experts
        assert all(layer.num_groups >= 1 for layer in plan.layers)


# --- prunings ---------------------------------------------------------------------------------------------


def naive_saliency(seen, name, family):
    norm, count = np.linalg.norm(seen.f, axis=2).T, seen.chosen.sum(0)
    worth = np.zeros(E)
    for e in range(E):
        rows = seen.chosen[:, e]
        if name == "score":
            worth[e] = naive.scores(seen.l, sigmoid=family == "deepseek_v3")[:, e].mean()
        elif name == "frequency":
            worth[e] = count[e] / count.sum()
        elif rows.any():
            of = {
                "reap": (seen.g * norm)[rows, e].mean(),
                "ean": norm[rows, e].sum(),
                "man": norm[rows, e].mean(),
            }
            worth[e] = of[name]
    return worth


def saliency(stats, layer, name, *, seed=0):
    """What each expert of a layer is worth."""
    index = list(stats.layers).index(stats.layer_name(layer))
    return Layer(stats, index, resolve("reap", saliency=name), seed=seed).saliency


@pytest.mark.parametrize("family", RUN)
@pytest.mark.parametrize("name", ["frequency", "score", "reap", "ean", "man"])
def test_saliencies_and_what_they_keep_equal_naive_ones(family, name):
    r = run(family)
    wanted = {n: naive_saliency(r.seen[n], name, family) for n in r.names}
    for layer, worth in wanted.items():
        close(saliency(r.stats, layer, name), worth)
    method = {"frequency": "f-prune", "score": "s-prune"}.get(name, name)
    for experts in (2, 4, 6):
        plan = make_plan(r.stats, r.model, experts=experts, method=method, budget="uniform")
        for layer in plan.layers:
            worth = wanted[layer.name]
            groups = 2 if family == "deepseek_v3" else 1
            best = []
            for members in np.split(np.arange(E), groups):
                best += sorted(members.tolist(), key=lambda e: -worth[e])[: experts // groups]
            assert layer.kept == sorted(best)
            assert [layer.labels[e] for e in layer.kept] == list(range(experts))
            assert layer.router == "dropped"


@pytest.mark.parametrize("method", ["f-prune", "s-prune"])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_pruning_over_all_layers_keeps_the_best_of_all(method, family):
    r = run(family)
    name = {"f-prune": "frequency", "s-prune": "score"}[method]
    worth = [naive_saliency(r.seen[n], name, family) for n in r.names]
    for experts in (2, 4, 6):
        best = {(a, int(w.argmax())) for a, w in enumerate(worth)}
        others = sorted(itertools.product(range(3), range(E)), key=lambda at: (-worth[at[0]][at[1]], at))
        best |= set([at for at in others if at not in best][: 3 * experts - 3])
        plan = make_plan(r.stats, r.model, experts=experts, method=method)
        assert {(a, e) for a, layer in enumerate(plan.layers) for e in layer.kept} == best


def test_unused_experts_are_worth_nothing():
    model, ids = family_model("gpt_oss"), tokens()
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.router.bias[5] = -1e4
    stats = capture(model, ids, needs=("usage", "norms"))
    for name in ("frequency", "reap", "ean", "man"):
        worth = saliency(stats, 1, name)
        assert worth[5] == 0
        assert np.isfinite(worth).all()
        assert (np.delete(worth, 5) > 0).all()


def test_random_pruning_goes_by_the_seed():
    r = run("mixtral")
    kept = [
        [tuple(layer.kept) for layer in make_plan(r.stats, experts=4, method="random-prune", seed=s).layers]
        for s in range(9)
    ]
    assert kept[3] == [
        tuple(layer.kept) for layer in make_plan(r.stats, experts=4, method="random-prune", seed=3).layers
    ]
    assert len(set(map(tuple, kept))) > 6
    assert any(len(set(layers)) > 1 for layers in kept)  # layers are not pruned alike
    assert sorted(saliency(r.stats, 0, "random", seed=2)) == list(range(8))


def drop_cases(r, name, size):
    """The first tokens of a layer's sample: loss function, and what the naive run saw of these tokens."""
    layer = next(layer for layer in find_moe_layers(r.model) if layer.name == name)
    sample = r.stats.layers[name].sample
    part = type(sample)(**{f.name: getattr(sample, f.name)[:size] for f in dataclasses.fields(sample)})
    rows = (r.stats.sampled[:, 0] * r.ids.shape[1] + r.stats.sampled[:, 1])[:size].numpy()
    return layer, part, rows


def naive_losses(seen, rows, kept, sequences):
    """Summed squared differences of the layer's outputs, and the sum over sequences of the root of each."""
    g = naive.rerouted(seen.l[rows], kept, seen.rule)
    square = ((np.einsum("te,etd->td", g, seen.f[:, rows]) - seen.y[rows]) ** 2).sum(1)
    return square.sum(), sum(np.sqrt(square[sequences == s].sum()) for s in set(sequences.tolist()))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_flat"])
def test_drop_loss_is_what_really_happens(family):
    r = run(family)
    for name in r.names[:2]:
        layer, part, rows = drop_cases(r, name, 30)
        seen, sequences = r.seen[name], r.stats.sampled[:30, 0]
        rule = routing_rule(part, layer)
        assert rule.top_k == layer.router.top_k
        assert rule.normalised == (family != "qwen2_moe")
        assert rule.scale == pytest.approx(2.5 if family == "deepseek_flat" else 1, rel=1e-6)
        grams = output_grams(layer, part.inputs)
        close(grams, np.einsum("itd,jtd->tij", seen.f[:, rows], seen.f[:, rows]), rtol=1e-9, atol=1e-9)
        losses = [
            DropLoss(grams, part, rule, loss=loss, sequences=sequences) for loss in ("squared", "frobenius")
        ]
        for kept in (
            s for size in (1, 2, 3, 5, 7) for s in list(itertools.combinations(range(E), size))[::3]
        ):
            mask = torch.zeros(1, E, dtype=torch.bool)
            mask[0, list(kept)] = True
            close(
                rule.gates(part.logits.double(), mask)[0],
                naive.rerouted(seen.l[rows], kept, seen.rule),
                rtol=1e-6,
            )
            wanted = naive_losses(seen, rows, kept, sequences.numpy())
            for loss, value in zip(losses, wanted, strict=True):
                close(loss(mask)[0], value, rtol=1e-6)
        everyone = torch.ones(1, E, dtype=torch.bool)
        assert float(losses[0](everyone)[0]) < 1e-9 * wanted[0]


def test_drop_loss_in_float32_is_near():
    r = run("qwen2_moe")
    layer, part, _ = drop_cases(r, r.names[0], 30)
    kept = torch.rand(40, E, generator=torch.Generator().manual_seed(1)) < 0.5
    kept[:, 3] = True
    given_ = output_grams(layer, part.inputs), part, routing_rule(part, layer)
    single = DropLoss(*given_, dtype=torch.float32)(kept)
    assert single.dtype == torch.float64
    close(single, DropLoss(*given_)(kept), rtol=1e-4)


def test_experts_that_are_never_chosen_are_not_kept_alone():
    """A logit far below all others: who keeps its expert alone sends every token there, with weight one."""
    model, ids = family_model("gpt_oss"), tokens(2)
    with torch.no_grad():
        for layer in find_moe_layers(model):
            layer.router.bias[5] = -1e4
            layer.experts.down_proj[5] *= 50
    stats = capture(model, ids, needs=("usage", "sample"))
    layer, sums = find_moe_layers(model)[0], stats.layer(0)
    grams = output_grams(layer, sums.sample.inputs)
    loss = DropLoss(grams, sums.sample, routing_rule(sums.sample, layer))
    gates = torch.zeros(len(grams), E, dtype=torch.float64)
    gates[:, 5] = 1
    change = gates - sums.sample.gates
    alone = torch.zeros(1, E, dtype=torch.bool)
    alone[0, 5] = True
    close(loss(alone)[0], torch.einsum("te,tef,tf->", change, grams, change), rtol=1e-9)
    assert [
        layer.kept
        for layer in make_plan(stats, model, experts=1, method="o-prune").layers
        if layer.kept == [5]
    ] == []


def test_drop_loss_in_parts_is_the_same(monkeypatch):
    r = run("qwen2_moe")
    layer, part, _ = drop_cases(r, r.names[0], 30)
    loss = DropLoss(output_grams(layer, part.inputs), part, routing_rule(part, layer))
    kept = torch.rand(40, E, generator=torch.Generator().manual_seed(0)) < 0.6
    kept[:, 0] = True
    whole = loss(kept)
    monkeypatch.setattr("hcsmoe_core.methods.pruning.BATCH", 3 * 30 * E)
    close(loss(kept), whole, rtol=1e-12)


def test_routers_that_limit_groups_are_refused():
    r = run("deepseek_v3")
    with pytest.raises(ValueError, match="limits its choice to groups of experts"):
        make_plan(r.stats, r.model, experts=4, method="o-prune")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_flat"])
def test_o_prune_keeps_what_brute_force_keeps(family):
    r = run(family)
    layer, part, rows = drop_cases(r, r.names[0], 12)
    seen, sequences = r.seen[r.names[0]], r.stats.sampled[:12, 0]
    rule, grams = routing_rule(part, layer), output_grams(layer, part.inputs)
    for place, how in enumerate(("squared", "frobenius")):
        loss = DropLoss(grams, part, rule, loss=how, sequences=sequences)
        for count in range(1, E + 1):
            subsets = list(itertools.combinations(range(E), count))
            value = {kept: naive_losses(seen, rows, kept, sequences.numpy())[place] for kept in subsets}
            assert tuple(best_kept(loss, E, count, progress=False)) == min(value, key=value.get)
            if count > 2:
                wanted = min((kept for kept in subsets if {2, 6} <= set(kept)), key=value.get)
                assert tuple(best_kept(loss, E, count, protected=[6, 2], progress=False)) == wanted


@pytest.mark.parametrize("how", ["squared", "frobenius"])
def test_o_prune_plans_keep_what_brute_force_keeps(how):
    r = run("qwen2_moe")
    sequences = r.stats.sampled[:, 0].numpy()
    rows = sequences * r.ids.shape[1] + r.stats.sampled[:, 1].numpy()
    for layer in make_plan(r.stats, r.model, experts=5, method="o-prune", loss=how).layers:
        subsets = itertools.combinations(range(E), 5)
        value = {
            kept: naive_losses(r.seen[layer.name], rows, kept, sequences)[how == "frobenius"]
            for kept in subsets
        }
        assert tuple(layer.kept) == min(value, key=value.get)


def quadratic(experts, seed):
    """Loss of dropping a set D: what ``Σ_{i,j in D} Q_ij`` is, for a random positive semi-definite Q."""
    a = np.random.default_rng(seed).normal(size=(experts, experts))
    q = torch.from_numpy(a @ a.T)

    def loss(kept):
        dropped = (~kept).double()
        value = torch.einsum("bi,ij,bj->b", dropped, q, dropped)
        loss.tried.append((kept.clone(), value))
        return value

    loss.tried = []
    return loss


@pytest.mark.parametrize("protected", [(), (3, 11, 19)])
def test_the_search_among_many_experts_ends_where_no_swap_helps(protected):
    for seed, (experts, count) in enumerate([(20, 10), (24, 5), (24, 18)]):
        loss = quadratic(experts, seed)
        kept = best_kept(loss, experts, count, protected=protected, subsets=200, seed=seed, progress=False)
        assert kept.tolist() == sorted(set(kept.tolist()))
        assert len(kept) == count
        assert set(protected) <= set(kept.tolist())
        first, values = loss.tried[0]
        assert len(first) == 200
        assert (first.sum(1) == count).all()
        assert first[:, list(protected)].all()
        if math.comb(experts - len(protected), count - len(protected)) > 10_000:
            assert len(set(map(tuple, first.tolist()))) > 190
        mask = torch.zeros(experts, dtype=torch.bool)
        mask[kept] = True
        final = float(loss(mask[None])[0])
        assert final <= float(values.min())
        for out, into in itertools.product(
            set(kept.tolist()) - set(protected), set(range(experts)) - set(kept.tolist())
        ):
            swapped = mask.clone()
            swapped[out], swapped[into] = False, True
            assert float(loss(swapped[None])[0]) >= final * (1 - 1e-9)
        again = best_kept(loss, experts, count, protected=protected, subsets=200, seed=seed, progress=False)
        assert np.array_equal(kept, again)


def test_a_rough_loss_chooses_where_the_search_begins():
    exact, rough = quadratic(20, 1), quadratic(20, 2)
    kept = best_kept(exact, 20, 9, rough=rough, subsets=150, progress=False)
    assert sum(len(tried) for tried, _ in rough.tried) == 150
    tried, values = rough.tried[0]
    start = tried[values.argmin()]
    assert len(exact.tried[0][0]) == 1
    assert torch.equal(exact.tried[0][0][0], start)
    mask = torch.zeros(20, dtype=torch.bool)
    mask[kept] = True
    assert float(exact(mask[None])[0]) <= float(exact(start[None])[0])


def test_few_dropped_of_many_experts_are_tried_in_full():
    loss = quadratic(18, 4)
    kept = best_kept(loss, 18, 16, subsets=200, progress=False)
    values = {}
    for pair in itertools.combinations(range(18), 2):
        mask = torch.ones(1, 18, dtype=torch.bool)
        mask[0, list(pair)] = False
        values[pair] = float(loss(mask)[0])
    assert sorted(set(range(18)) - set(kept.tolist())) == list(min(values, key=values.get))


@pytest.mark.parametrize("experts", [8, 20])
def test_only_protected_experts_can_be_kept(experts):
    assert best_kept(quadratic(experts, 0), experts, 2, protected=[5, 1], progress=False).tolist() == [1, 5]


def test_a_search_over_more_than_16_experts_in_a_plan():
    """Twenty experts in a synthetic layer: as good as the best swap from anywhere, random outputs."""
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(40, 20, 6, generator=generator, dtype=torch.float64)
    logits_ = torch.randn(40, 20, generator=generator, dtype=torch.float64) * 2
    weight, index = logits_.softmax(1).topk(4, 1)
    sample = SimpleNamespace(logits=logits_, index=index, weight=weight)
    sample.gates = torch.zeros(40, 20, dtype=torch.float64).scatter(1, index, weight)
    rule = routing_rule(sample)
    assert (rule.scoring, rule.normalised, rule.top_k) == ("softmax", False, 4)
    loss = DropLoss(f @ f.transpose(1, 2), sample, rule)
    kept = best_kept(loss, 20, 12, subsets=100, progress=False)
    of = {"family": "qwen2_moe", "top_k": 4}

    def value(keep):
        change = naive.rerouted(logits_.numpy(), keep, of) - sample.gates.numpy()
        return (np.einsum("te,ted->td", change, f.numpy()) ** 2).sum()

    least = value(kept.tolist())
    rng = np.random.default_rng(0)
    assert all(value(rng.choice(20, 12, replace=False).tolist()) >= least for _ in range(50))
    for out, into in itertools.product(kept.tolist(), sorted(set(range(20)) - set(kept.tolist()))):
        assert value([e for e in kept.tolist() if e != out] + [into]) >= least * (1 - 1e-9)


def test_protected_experts_are_kept_by_every_pruning(monkeypatch):
    r = run("qwen2_moe")
    worst = {n: [int(saliency(r.stats, n, "reap").argmin()), 7] for n in r.names}
    monkeypatch.setattr("hcsmoe_core.methods.pruning.super_experts", lambda stats: worst)
    for method in ("reap", "ean", "man", "random-prune", "o-prune", "f-prune", "s-prune"):
        plan = make_plan(r.stats, r.model, experts=4, method=method, guard=True)
        for layer in plan.layers:
            assert set(worst[layer.name]) <= set(layer.kept)
        assert sum(layer.num_groups for layer in plan.layers) == 12
    for method in ("hc-smoe", "k-means", "random"):
        for layer in make_plan(r.stats, r.model, experts=4, method=method, guard=True).layers:
            assert all([e] in layer.groups() for e in worst[layer.name])
            assert layer.num_groups == 4


def test_protected_experts_of_one_router_group_are_kept(monkeypatch):
    r = run("deepseek_v3")
    monkeypatch.setattr(
        "hcsmoe_core.methods.pruning.super_experts", lambda stats: {n: [0, 1, 2] for n in stats.layers}
    )
    try:
        plan = make_plan(r.stats, r.model, experts=4, method="reap", guard=True)
    except ValueError:
        return  # two of each group cannot hold three of the first: saying so would do
    for layer in plan.layers:
        assert {0, 1, 2} <= set(layer.kept)


def test_group_limited_routers_keep_as_many_of_each_group():
    r = run("deepseek_v3")
    for method in ("reap", "f-prune", "random-prune"):
        for experts in (2, 4, 6):
            plan = make_plan(r.stats, r.model, experts=experts, method=method, budget="uniform")
            for layer in plan.layers:
                assert sum(e < 4 for e in layer.kept) == sum(e >= 4 for e in layer.kept) == experts // 2
        with pytest.raises(ValueError, match="keep a multiple of 2"):
            make_plan(r.stats, r.model, experts=3, method=method, budget="uniform")


# --- super experts ----------------------------------------------------------------------------------------


def with_largest(largest):
    """Statistics of which only the outputs' largest values mean anything; ``largest`` is ``[L, E]``."""
    layers, experts = largest.shape
    zeros = torch.zeros(2, experts, dtype=torch.float64)
    made = {}
    for a in range(layers):
        split = torch.from_numpy(np.stack([largest[a] / 3, largest[a]]))
        split[:, ::2] = split[:, ::2].flip(0)  # the largest of each expert is in one domain or the other
        gram = torch.zeros(2, experts, experts, dtype=torch.float64)
        held = dict(usage_count=zeros.long(), routing_mass=zeros, score_mass=zeros, logit_gram=gram)
        norms = dict(norm_sum=zeros, gated_norm_sum=zeros, output_max=split)
        made[f"layer.{a}"] = LayerStatistics(tokens=torch.ones(2, dtype=torch.int64), **held, **norms)
    return Statistics(made, ["a", "b"], {}, [])


def test_planted_super_experts_are_found():
    largest = np.random.default_rng(0).uniform(1, 5, (8, 64))
    plants = {(1, 10): 900.0, (2, 3): 400.0, (7, 5): 1000.0}
    for place, value in plants.items():
        largest[place] = value
    found = super_experts(with_largest(largest))
    assert list(found) == [f"layer.{a}" for a in range(8)]
    # 512 values: the 99.5th percentile lies below the three largest; the last quarter of layers counts not
    assert {name: experts for name, experts in found.items() if experts} == {"layer.1": [10], "layer.2": [3]}
    largest[2, 3] = 90.0  # less than a tenth of the largest
    assert {n: e for n, e in super_experts(with_largest(largest)).items() if e} == {"layer.1": [10]}
    largest[5, [0, 1]], largest[7, 5] = 500.0, 1.0  # the sixth of eight is the last that counts
    assert {n: e for n, e in super_experts(with_largest(largest)).items() if e} == {
        "layer.1": [10],
        "layer.5": [0, 1],
    }
    largest[6] = 600.0  # many outliers: the percentile is among them
    assert {n: e for n, e in super_experts(with_largest(largest)).items() if e} == {"layer.1": [10]}


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(2, 70))
@quick
def test_super_experts_equal_naive_ones(seed, layers, experts):
    rng = np.random.default_rng(seed)
    largest = np.exp(3 * rng.normal(size=(layers, experts)))
    ordered = np.sort(largest.ravel())
    place = 0.995 * (len(ordered) - 1)
    low = math.floor(place)
    percentile = ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
    for a, found in enumerate(super_experts(with_largest(largest)).values()):
        wanted = [
            e
            for e in range(experts)
            if largest[a, e] > percentile * (1 + 1e-12) and largest[a, e] > ordered[-1] / 10
        ]
        assert found == (wanted if a < 0.75 * layers else [])


def test_a_super_expert_planted_in_a_model_is_found_and_left_alone():
    model, ids = family_model("mixtral"), tokens()
    with torch.no_grad():
        find_moe_layers(model)[1].experts.down_proj[6] *= 100
    stats = capture(model, ids, needs=DEFAULT_NEEDS)
    name = list(stats.layers)[1]
    assert super_experts(stats) == {n: [6] if n == name else [] for n in stats.layers}
    plan = make_plan(stats, model, experts=3, guard=True)
    assert [6] in plan.layers[1].groups()
    assert plan.layers[1].protected == [6]
    with pytest.raises(ValueError, match="super-expert guard needs 'norms'"):
        super_experts(capture(model, ids[:1], needs=("usage",)))


# --- pruned models ----------------------------------------------------------------------------------------


def drop_plan(names, kept):
    layers = []
    for name, keep in zip(names, kept, strict=True):
        labels = [sorted(keep).index(e) if e in keep else -1 for e in range(E)]
        layers.append(LayerPlan(name, labels, [float(e in keep) for e in range(E)], router="dropped"))
    return Plan(layers)


def muted(layer, family, kept):
    """The router, as if it gave −inf to all but some experts; written anew from the family's rule."""
    rule, router = rule_of(family, layer.router), layer.router

    def forward(hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        raw = x @ router.weight.T + (router.bias if family == "gpt_oss" else 0)
        gates = torch.from_numpy(naive.rerouted(raw.detach().numpy(), kept, rule))
        k = min(rule["top_k"], len(kept))
        weight, index = gates.topk(k, 1)
        return raw, weight, index

    return forward


PRUNED = [(f, n) for f in ("mixtral", "qwen2_moe", "gpt_oss", "olmoe") for n in (1, 2, 4, 6)]
# Their routers score a group by its two best experts.
PRUNED += [("deepseek_flat", 2), ("deepseek_flat", 5), ("deepseek_v3", 4), ("deepseek_v3", 6)]


@pytest.mark.parametrize(("family", "count"), PRUNED)
def test_a_pruned_model_is_the_model_without_these_logits(family, count):
    model, ids = family_model(family), tokens(3)
    before = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    usual = logits(model, ids)
    rng = np.random.default_rng(count)
    layers = find_moe_layers(model)
    kept = []
    for _ in layers:
        if family == "deepseek_v3":
            parts = [rng.choice(4, count // 2, replace=False) + 4 * g for g in range(2)]
            kept.append(sorted(np.concatenate(parts).tolist()))
        else:
            kept.append(sorted(rng.choice(E, count, replace=False).tolist()))
    for layer, keep in zip(layers, kept, strict=True):
        layer.router.forward = muted(layer, family, keep)
    wanted = logits(model, ids)
    for layer in layers:
        del layer.router.forward
    assert torch.equal(logits(model, ids), usual)
    apply_plan(model, drop_plan([layer.name for layer in layers], kept))
    got = logits(model, ids)
    assert float((got - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())
    assert float((got - usual).abs().max()) > 1e-3 * float(usual.abs().max())
    for layer in find_moe_layers(model):
        assert layer.num_stored == count
        assert layer.router.weight.shape[0] == count
    restore(model)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert list(after) == list(before)
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert torch.equal(logits(model, ids), usual)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "olmoe"])
def test_layers_may_keep_different_numbers(family):
    model, ids = family_model(family), tokens(2)
    layers = find_moe_layers(model)
    kept = [[1, 5, 6], [0, 2, 3, 4, 5, 7], [3]]
    for layer, keep in zip(layers, kept, strict=True):
        layer.router.forward = muted(layer, family, keep)
    wanted = logits(model, ids)
    for layer in layers:
        del layer.router.forward
    apply_plan(model, drop_plan([layer.name for layer in layers], kept))
    got = logits(model, ids)
    assert float((got - wanted).abs().max()) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize(("family", "kept"), [("deepseek_v3", [1, 6]), ("deepseek_flat", [3])])
def test_router_groups_of_one_expert_run_or_are_refused(family, kept):
    """DeepSeek-V3's router scores a group by its two best experts, and cannot where there is one."""
    model = family_model(family)
    names = [layer.name for layer in find_moe_layers(model)]
    try:
        apply_plan(model, drop_plan(names, [kept] * len(names)))
    except ValueError:
        return
    logits(model, tokens(1))


def test_groups_of_different_sizes_are_refused():
    model = family_model("deepseek_v3")
    names = [layer.name for layer in find_moe_layers(model)]
    with pytest.raises(ValueError, match="chooses among 2 groups of experts first"):
        apply_plan(model, drop_plan(names, [[0, 1, 2, 5]] * len(names)))
    assert not any(layer.merged for layer in find_moe_layers(model))
