"""Quality and stability of merge trees against their definitions, computed pair by pair."""

import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_model, tokens
from safetensors.torch import save_file
from scipy.spatial.distance import pdist, squareform

from hcsmoe_core import calibration_tokens, capture, cut, distances, find_moe_layers, load_statistics
from hcsmoe_core.clustering import LINKAGES
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.statistics import DEFAULT_NEEDS
from hcsmoe_core.studies import stability
from hcsmoe_core.ui import figures


@pytest.fixture(scope="module")
def measured():
    model = tiny_model("mixtral")
    return model, capture(model, tokens(), needs=DEFAULT_NEEDS)


def naive_cophenetic(tree, condensed):
    """Correlation of distances with the height at which two experts first are in one group."""
    experts = len(tree) + 1
    heights = []
    for a, b in itertools.combinations(range(experts), 2):
        together = [
            t for t in range(experts - 1) if cut(tree, experts - 1 - t)[a] == cut(tree, experts - 1 - t)[b]
        ]
        heights.append(tree[together[0], 2])
    return np.corrcoef(heights, condensed)[0, 1]


def naive_silhouette(square, labels):
    scores = []
    for e, label in enumerate(labels):
        own = [square[e, f] for f in range(len(labels)) if labels[f] == label and f != e]
        if not own:
            scores.append(0.0)
            continue
        other = min(np.mean(square[e, labels == g]) for g in set(labels.tolist()) - {label})
        scores.append((other - np.mean(own)) / max(other, np.mean(own)))
    return np.mean(scores)


def naive_davies_bouldin(points, labels):
    groups = sorted(set(labels.tolist()))
    centres = [points[labels == g].mean(0) for g in groups]
    spread = [np.mean([np.linalg.norm(p - centres[g]) for p in points[labels == g]]) for g in groups]
    worst = [
        max((spread[g] + spread[h]) / np.linalg.norm(centres[g] - centres[h]) for h in groups if h != g)
        for g in groups
    ]
    return np.mean(worst)


def test_quality_follows_the_definitions(measured):
    model, stats = measured
    table = stability.quality_table(stats, model, similarity="expert-output", linkages=LINKAGES, groups=3)
    assert len(table) == 3 * 4
    for row in table.to_dict("records"):
        points = stats.layer(row["layer"]).mean_output.numpy()
        tree = merge_tree(stats, row["layer"], linkage=row["linkage"])
        labels = cut(tree, 3)
        assert row["cophenetic correlation"] == pytest.approx(naive_cophenetic(tree, pdist(points)), rel=1e-9)
        assert row["silhouette"] == pytest.approx(
            naive_silhouette(squareform(pdist(points)), labels), rel=1e-9
        )
        assert row["Davies-Bouldin"] == pytest.approx(naive_davies_bouldin(points, labels), rel=1e-6)
        assert row["largest"] == max(np.bincount(labels))
        assert row["alone"] == sum(np.bincount(labels) == 1)


def test_what_is_not_defined_is_left_out(measured):
    model, stats = measured
    table = stability.quality_table(stats, model, similarity="functional-routed", linkages=LINKAGES, groups=3)
    assert set(table["linkage"]) == {"average", "complete", "single"}
    assert table["Davies-Bouldin"].isna().all()
    assert table["silhouette"].notna().all()
    table = stability.quality_table(stats, model, similarity="weight", linkages=["average"], groups=8)
    assert table["silhouette"].isna().all()


def test_groups_of_samples_agree_with_themselves_and_differ_from_others(measured):
    model, stats = measured
    how = dict(similarity="expert-output", linkages=["average", "ward"], groups=4)
    same = stability.agreement_over_samples([stats, stats, stats], model, **how)
    assert len(same) == 3 * 2 * 3
    assert (same["agreement"] == 1).all()
    other = capture(model, tokens(1, 6, seed=9))
    assert stability.agreement_over_samples([stats, other], model, **how)["agreement"].min() < 1
    weights = stability.agreement_over_samples([stats, other], model, **how | {"similarity": "weight"})
    assert (weights["agreement"] == 1).all()  # which the text has no part in


def test_growing_parts_add_up_to_the_sample(measured, tmp_path):
    model, _ = measured
    save_file({"input_ids": tokens(10, 12)}, tmp_path / "ids.safetensors")
    source = dict(calibration=str(tmp_path / "ids.safetensors"), sequences=10, length=12, seed=0)
    parts = stability.growing(model, None, **source, steps=3)
    assert [p.num_tokens for p in parts] == [24, 60, 120]
    whole = capture(model, calibration_tokens(tmp_path / "ids.safetensors", sequences=10, length=12))
    for name, sums in whole.layers.items():
        assert torch.equal(parts[-1].layers[name].usage_count, sums.usage_count)
        torch.testing.assert_close(parts[-1].layers[name].output_sum, sums.output_sum, rtol=1e-4, atol=1e-4)
    table = stability.agreement_over_size(
        parts, model, similarity="expert-output", linkages=["average"], groups=4
    )
    assert sorted(set(table["tokens"])) == [24, 60]
    assert len(table) == 2 * 3
    for row in table.to_dict("records"):
        part = parts[0] if row["tokens"] == 24 else parts[1]
        between = distances(parts[-1], row["layer"], similarity="expert-output")
        mine, theirs = (
            naive_spread(cut(merge_tree(s, row["layer"]), 4).tolist(), between) for s in (part, parts[-1])
        )
        assert row["excess"] == pytest.approx(mine / theirs - 1)


def test_turning_branches_keeps_the_tree(measured):
    _model, stats = measured
    rng = np.random.default_rng(0)
    for layer, linkage in itertools.product(range(3), LINKAGES):
        tree, order = merge_tree(stats, layer, linkage=linkage), rng.permutation(8).tolist()
        turned = figures.untangled(tree, order)
        for groups in range(1, 9):
            assert cut(turned, groups).tolist() == cut(tree, groups).tolist()
        assert np.array_equal(turned[:, 2:], tree[:, 2:])
        again = figures.untangled(turned, figures.leaf_order(tree))
        assert figures.leaf_order(again) == figures.leaf_order(
            tree
        )  # the order asked for, where the tree allows it
    a, b = [3, 1, 0, 2], [0, 1, 2, 3]
    brute = sum(
        (a.index(i) < a.index(j)) != (b.index(i) < b.index(j)) for i, j in itertools.combinations(range(4), 2)
    )
    assert figures.crossings(a, b) == brute
    assert figures.crossings(a, a) == 0


def test_a_tanglegram_draws_each_expert_once_and_says_what_crosses(measured):
    _model, stats = measured
    trees = [merge_tree(stats, 0, linkage=m) for m in ("average", "single")]
    figure = figures.tanglegram(*trees, groups=4, titles=("average", "single"))
    middle = figure.axes[1]
    assert len(middle.lines) == 8
    assert middle.get_title().endswith("crossings")
    assert figures.tanglegram(trees[0], trees[0]).axes[1].get_title() == "0 crossings"


# --- stopping once the groups no longer move
# ----------------------------------------------------------------------------


def families_model():
    """Experts 0–3 and 4–7 of each layer are copies of two with a little noise."""
    model = tiny_model("mixtral")
    with torch.no_grad():
        for layer in find_moe_layers(model):
            for tensor in layer.tensors().values():
                tensor.copy_(tensor[[0, 0, 0, 0, 4, 4, 4, 4]] + 0.02 * torch.randn(tensor.shape))
    return model


def naive_agreement(first, second):
    """Adjusted Rand index from its definition, pair by pair (Hubert and Arabie, 1985)."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    a, b = [[x[i] == x[j] for i, j in pairs] for x in (first, second)]
    both, expected = sum(map(lambda p, q: p and q, a, b)), sum(a) * sum(b) / len(pairs)
    most = (sum(a) + sum(b)) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def test_planted_families_need_few_tokens():
    model, ids = families_model(), tokens(40, 12)
    stats = stability.capture_until_stable(model, ids, experts=[2], agreement=1.0, batch_size=4)
    assert stats.stability["stable"]
    assert stats.num_tokens < ids.numel() / 2
    for name, found in stats.stability["layers"].items():
        assert cut(merge_tree(stats, name), 2).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
        assert 0 < found["needed"] <= stats.num_tokens
    table = stability.stability_table(stats)
    assert table["tokens needed"].tolist() == [v["needed"] for v in stats.stability["layers"].values()]


def test_looks_are_those_of_a_naive_run(tmp_path):
    model, ids, domains = tiny_model("mixtral"), tokens(13, 12, seed=4), list("aabaabaabaaba")
    needs = ("usage", "outputs", "sample")
    options = dict(agreement=1.0, experts=[5, 3], needs=needs, sample=60)
    stats = stability.capture_until_stable(model, ids, domains=domains, **options)
    # a: 0 1 3 4 6 7 9 10 12, b: 2 5 8 11; dealt in turn, b starting with the other half
    order = [[0, 5, 3, 11, 6, 9, 12], [2, 1, 8, 4, 7, 10]]
    both, looks = [*order[0], *order[1]], []
    for end in (1, 2, 4, 13):
        parts = [capture(model, ids[half[:end]], needs=needs) for half in order]
        looks.append(
            [
                min(naive_agreement(*[cut(merge_tree(p, layer), r).tolist() for p in parts]) for r in (5, 3))
                for layer in range(3)
            ]
        )
    found = list(stats.stability["layers"].values())
    assert stats.stability["tokens"] == [24, 48, 96, 156]
    assert [layer["agreement"] for layer in found] == [
        pytest.approx(list(row)) for row in zip(*looks, strict=True)
    ]
    assert min(min(row) for row in looks) < 1
    whole = capture(model, ids[both], domains=[domains[i] for i in both], needs=needs, sample=60)
    assert stats.sequences == whole.sequences
    assert torch.equal(stats.sampled, whole.sampled)
    for name, sums in whole.layers.items():
        assert torch.equal(stats.layers[name].usage_count, sums.usage_count)
        torch.testing.assert_close(stats.layers[name].output_sum, sums.output_sum, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.layers[name].sample.inputs, sums.sample.inputs, rtol=1e-5, atol=1e-5)
    stats.save(tmp_path / "s.safetensors")
    assert load_statistics(tmp_path / "s.safetensors").stability == stats.stability


def naive_spread(labels, condensed):
    """Within-group sum of squares, pair by pair."""
    experts, total = len(labels), 0.0
    for group in set(labels):
        members = [e for e in range(experts) if labels[e] == group]
        for i, j in itertools.combinations(members, 2):
            total += condensed[experts * i + j - (i + 2) * (i + 1) // 2] ** 2 / len(members)
    return total


def test_spread_is_the_within_group_sum_of_squares():
    points = np.random.default_rng(0).normal(size=(9, 4))
    labels = np.array([0, 1, 1, 0, 2, 2, 2, 0, 3])
    within = sum(((points[labels == g] - points[labels == g].mean(0)) ** 2).sum() for g in range(4))
    assert stability.spread(labels, pdist(points), "euclidean") == pytest.approx(within)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    within = sum(((unit[labels == g] - unit[labels == g].mean(0)) ** 2).sum() for g in range(4))
    assert stability.spread(labels, pdist(points, "cosine"), "cosine") == pytest.approx(within / 2)


def test_stopping_by_what_groups_cost():
    model, ids, wanted = tiny_model("mixtral"), tokens(26, 12, seed=4), 0.2
    stats = stability.capture_until_stable(model, ids, experts=[5, 3], excess=wanted, batch_size=4)
    halves, looks = (range(0, 26, 2), range(1, 26, 2)), []
    for end in (1, 2, 4, 8, 13):
        parts = [capture(model, ids[list(half)[:end]]) for half in halves]
        row = []
        for layer in range(3):
            between = [distances(p, layer, similarity="expert-output") for p in parts]
            values = []
            for groups in (5, 3):
                first, second = (cut(merge_tree(p, layer), groups).tolist() for p in parts)
                crossed = naive_spread(first, between[1]) + naive_spread(second, between[0])
                values.append(
                    crossed / (naive_spread(first, between[0]) + naive_spread(second, between[1])) - 1
                )
            row.append(max(values))
        looks.append(row)
        if max(row) <= wanted:
            break
    found = list(stats.stability["layers"].values())
    assert len(looks) > 1  # or nothing was decided
    assert [layer["excess"] for layer in found] == [
        pytest.approx(list(row), rel=1e-4) for row in zip(*looks, strict=True)
    ]
    assert stats.num_tokens == 24 * end
    assert stats.stability["stable"] == (max(looks[-1]) <= wanted)
    assert stats.stability["excess"] == wanted
    assert "agreement" not in stats.stability
    assert set(stability.stability_table(stats)) >= {"agreement", "excess", "tokens needed"}


def test_groups_without_spread_exceed_nothing_or_everything():
    same, apart = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    copies = pdist(np.array([[0.0], [0.0], [1.0], [1.0]]))
    assert stability.excess_spread((same, same), (copies, copies), "euclidean") == 0
    turned = pdist(np.array([[0.0], [1.0], [0.0], [1.0]]))
    assert stability.excess_spread((same, apart), (copies, turned), "euclidean") == np.inf


def test_stopping_refuses_what_it_cannot_do(measured):
    model, ids = measured[0], tokens(4, 12)
    for options, said in (
        (dict(agreement=0.0), '"agreement" argument must be above 0'),
        (dict(excess=0.0), '"excess" argument must be above 0'),
        (dict(experts=[9]), '"experts" argument must be a whole number from 1 to 8'),
        (dict(needs=("usage",)), "Trees by 'expert-output' need outputs"),
    ):
        with pytest.raises(ValueError, match=said):
            stability.capture_until_stable(model, ids, **options)
    with pytest.raises(ValueError, match='"input_ids" argument'):
        stability.capture_until_stable(model, ids[:1])
