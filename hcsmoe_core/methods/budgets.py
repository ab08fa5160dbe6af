"""How many experts each layer keeps, of a total that is always the same.

A budget is a step ``(layers, total, fewest) → counts``: ``layers`` are
:class:`hcsmoe_core.methods.planner.Layer`, and ``fewest`` is what each must keep at least.
"""

from typing import Literal

import numpy as np
from scipy.spatial.distance import squareform

from hcsmoe_core._util import InputError
from hcsmoe_core.clustering import LINKAGES, cuts, linkage
from hcsmoe_core.methods import similarities
from hcsmoe_core.methods.grouping import check_ward
from hcsmoe_core.steps import budget


def check_one_similarity(recipe):
    """Heights and silhouettes of distances in one unit alone can be compared between layers."""
    if recipe.metric == "mixed":
        raise InputError(
            f'budget "{recipe.steps["budget"]}" needs one similarity; not {recipe.steps["similarity"]!r}.'
        )
    check_ward(recipe)


def check_scored(recipe):
    """A saliency that chooses sets of experts scores none of them by itself."""
    if recipe.steps["saliency"] == "o-prune":
        raise InputError('budget "saliency" goes with a saliency that scores each expert; not "o-prune".')


@budget("uniform")
def uniform(layers, total, fewest):
    """The same number in every layer."""
    return [total // len(layers)] * len(layers)


@budget("frequency")
def by_frequency(layers, total, fewest):
    """The experts used most of all layers together (M-SMoE, arXiv 2310.01334, section 3.2)."""
    return by_score([layer.sums.frequency.numpy() for layer in layers], total, fewest)


@budget("saliency", uses=("saliency",), only={"group": "prune"}, check=check_scored)
def by_saliency(layers, total, fewest):
    """The experts with the largest saliency of all layers together, each layer's summing to one."""
    return by_score([layer.saliency / (layer.saliency.sum() or 1) for layer in layers], total, fewest)


@budget("merge-cost", uses=("similarity",), check=check_one_similarity)
def merge_cost(layers, total, fewest, *, linkage: Literal[LINKAGES] = "average"):
    """The cheapest joins of all layers' trees."""
    scales = [similarities.scale_of(layer.stats, layer.name, **layer.compared) for layer in layers]
    return by_merge_cost([layer.tree(linkage) for layer in layers], scales, total, fewest)


@budget("grape", uses=("similarity",))
def by_redundancy(layers, total, fewest, *, gamma: float = 0.1):
    """GRAPE's greedy allocation (arXiv 2604.06542)."""
    if layers[0].metric in ("cosine", "cka"):
        alike = [np.clip(layer.similarities, 0, None) for layer in layers]
    else:
        largest = max(float(layer.distances.max(initial=0)) for layer in layers) or 1.0
        alike = [1 - squareform(layer.distances) / largest for layer in layers]
    return grape(alike, total, fewest, gamma=gamma)


@budget("silhouette", uses=("similarity",), check=check_one_similarity)
def silhouette(layers, total, fewest, *, linkage: Literal[LINKAGES] = "average"):
    """The counts with the largest sum of the layers' mean silhouettes."""
    trees, most = [layer.tree(linkage) for layer in layers], [layer.num_experts for layer in layers]
    return by_silhouette([layer.distances for layer in layers], trees, total, fewest, most)


def by_score(scores, total, fewest):
    """Keep the experts with the largest scores of all layers together.

    The rule of M-SMoE (arXiv 2310.01334, section 3.2) and of HC-SMoE's non-uniform clusters, made exact: each
    layer's best experts are kept first, as many as it must keep; of equals the one in the earlier layer, then
    of the smaller index, is taken.

    Parameters
    ----------
    scores : list of L (E,) arrays
        Comparable between layers, such as usage frequencies that sum to one in each.
    total : int
    fewest : sequence of L int

    Returns
    -------
    list of L int
    """
    order = [np.argsort(-np.asarray(s), kind="stable") for s in scores]
    counts = list(fewest)
    rest = [(-scores[layer][e], layer, int(e)) for layer, o in enumerate(order) for e in o[fewest[layer] :]]
    for _, layer, _ in sorted(rest)[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def by_merge_cost(trees, scales, total, fewest):
    """Make the cheapest joins of all layers' trees, until ``total`` groups are left.

    Parameters
    ----------
    trees : list of L (E−1, 4) arrays
        Linkage matrices; a join costs its height over the layer's scale.
    scales : list of L float
        See :func:`hcsmoe_core.methods.similarities.scale_of`.
    total : int
    fewest : sequence of L int

    Returns
    -------
    list of L int
    """
    counts = [len(tree) + 1 for tree in trees]
    # A join comes after those below it, even where a tree's heights are not monotone.
    heights = [np.maximum.accumulate(tree[:, 2]) / scale for tree, scale in zip(trees, scales, strict=True)]
    joins = sorted((h, layer, t) for layer, column in enumerate(heights) for t, h in enumerate(column))
    surplus = sum(counts) - total
    for _, layer, _ in joins:
        if surplus and counts[layer] > fewest[layer]:
            counts[layer] -= 1
            surplus -= 1
    return counts


def grape(similarities, total, fewest, *, gamma=0.1):
    """GRAPE's greedy allocation (arXiv 2604.06542): join where redundancy is largest, within an entropy.

    A layer's redundancy is the sum of its experts' similarities ``R_l = Σ_{i≠j} S_ij``. The layer with the
    largest, of those not frozen, joins its most similar pair of experts that are not joined yet, and loses
    that pair's share of R. Where the entropy of the kept experts' distribution over the layers would fall
    below ``(1 − γ)`` of what it was at the start, that layer is frozen instead; when all are frozen, all are
    freed, and the join is made that leaves the largest entropy.

    Parameters
    ----------
    similarities : list of L (E, E) arrays
        Larger is more alike.
    total : int
    fewest : sequence of L int
    gamma : float
        γ, from 0 to 1.

    Returns
    -------
    list of L int
    """
    counts = [len(s) for s in similarities]
    redundancy = [float(s.sum() - np.trace(s)) for s in similarities]
    joins = [_joins(s) for s in similarities]
    floor, frozen = (1 - gamma) * _entropy(counts), set()
    while sum(counts) > total:
        able = [i for i, c in enumerate(counts) if c > fewest[i]]
        free = [i for i in able if i not in frozen]
        after = {i: [c - (i == j) for j, c in enumerate(counts)] for i in able}
        if free:
            layer = max(free, key=lambda i: redundancy[i])
            if _entropy(after[layer]) < floor:
                frozen.add(layer)
                continue
        else:  # freed layers would be frozen again at once, for ever
            frozen = set()
            layer = max(able, key=lambda i: (round(_entropy(after[i]), 12), redundancy[i]))
        redundancy[layer] -= 2 * joins[layer][len(similarities[layer]) - counts[layer]]
        counts = after[layer]
    return counts


def _joins(similarity):
    """Similarities ``(E−1,)`` of the pairs that join: each the most similar ones in different groups."""
    values = similarity[np.triu_indices(len(similarity), 1)]
    order = np.argsort(-values, kind="stable")
    # single linkage of ranks, which have no ties
    return values[order[linkage(np.argsort(order).astype(float), "single")[:, 2].astype(int)]]


def _entropy(counts):
    share = np.asarray(counts) / sum(counts)
    return float(-(share * np.log(share)).sum())


def by_silhouette(distances, trees, total, fewest, most):
    """The counts with the largest sum of mean silhouettes (Rousseeuw, 1987), by dynamic programming.

    Parameters
    ----------
    distances : list of L (E·(E−1)/2,) arrays
    trees : list of L (E−1, 4) arrays
    total : int
    fewest, most : sequence of L int

    Returns
    -------
    list of L int
    """
    best = {0: (0.0, ())}
    for condensed, tree, low, high in zip(distances, trees, fewest, most, strict=True):
        values = silhouettes(condensed, tree)
        following = {}
        for used, (value, counts) in best.items():
            for count in range(low, high + 1):
                reached = used + count
                if reached <= total and value + values[count] > following.get(reached, (-np.inf,))[0]:
                    following[reached] = (value + values[count], (*counts, count))
        best = following
    return list(best[total][1])


def silhouettes(condensed, tree):
    """Mean silhouette of each cut of a tree, ``{groups: value}``; 0 where it is not defined (1 and E)."""
    from sklearn.metrics import silhouette_score

    square, experts = squareform(condensed), len(tree) + 1
    parts = enumerate(cuts(tree)[1:-1], 2)
    values = {count: silhouette_score(square, labels, metric="precomputed") for count, labels in parts}
    return {1: 0.0, experts: 0.0} | {count: float(value) for count, value in values.items()}
