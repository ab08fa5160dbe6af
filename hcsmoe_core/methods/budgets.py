"""How many experts each layer keeps, of a total that is always the same.

A budget is a step ``(layers, total, fewest) → counts``: ``layers`` are
:class:`hcsmoe_core.methods.planner.Layer`, and ``fewest`` is what each must keep at least.
"""

from collections import Counter
from typing import Literal

import numpy as np
from scipy.spatial.distance import squareform

from hcsmoe_core._util import require
from hcsmoe_core.clustering import LINKAGES, cuts, linkage
from hcsmoe_core.methods import similarities
from hcsmoe_core.methods.grouping import check_ward
from hcsmoe_core.methods.summary import entropy
from hcsmoe_core.steps import NotNegative, budget


def check_one_similarity(recipe):
    """Heights and silhouettes of distances in one unit alone can be compared between layers."""
    require(
        recipe.metric != "mixed",
        f'budget "{recipe.steps["budget"]}" needs one similarity; not {recipe.steps["similarity"]!r}.',
    )
    check_ward(recipe)


def check_scored(recipe):
    """A saliency that chooses sets of experts scores none of them by itself."""
    require(
        recipe.steps["saliency"] != "o-prune",
        'budget "saliency" goes with a saliency that scores each expert; not "o-prune".',
    )


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
def by_redundancy(layers, total, fewest, *, gamma: NotNegative = 0.1):
    """GRAPE's greedy allocation (arXiv 2604.06542)."""
    if layers[0].recipe.metric in ("cosine", "cka"):
        alike = [np.clip(layer.similarities, 0, None) for layer in layers]
    else:
        largest = max(float(layer.distances.max(initial=0)) for layer in layers) or 1.0
        alike = [1 - squareform(layer.distances) / largest for layer in layers]
    return grape(alike, total, fewest, gamma=gamma)


@budget("silhouette", uses=("similarity",), check=check_one_similarity)
def silhouette(layers, total, fewest, *, linkage: Literal[LINKAGES] = "average"):
    """The counts with the largest sum of the layers' mean silhouettes."""
    trees = [layer.tree(linkage) for layer in layers]
    return by_silhouette([layer.distances for layer in layers], trees, total, fewest)


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
    rest = [np.sort(-np.asarray(s))[least:] for s, least in zip(scores, fewest, strict=True)]
    more = _smallest(rest, total - sum(fewest))
    return [least + more[layer] for layer, least in enumerate(fewest)]


def _smallest(columns, number):
    """How many of each layer's values are among the smallest of all; of equals those of the earlier layer."""
    values = sorted((value, layer) for layer, column in enumerate(columns) for value in column)
    return Counter(layer for _, layer in values[:number])


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
    experts = [len(tree) + 1 for tree in trees]
    # A join comes after those below it, even where a tree's heights are not monotone.
    heights = [np.maximum.accumulate(tree[:, 2]) / scale for tree, scale in zip(trees, scales, strict=True)]
    able = [h[: count - least] for h, count, least in zip(heights, experts, fewest, strict=True)]
    joins = _smallest(able, sum(experts) - total)
    return [count - joins[layer] for layer, count in enumerate(experts)]


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
    floor, frozen = (1 - gamma) * entropy(counts), set()
    while sum(counts) > total:
        able = [i for i, c in enumerate(counts) if c > fewest[i]]
        after = {i: [c - (i == j) for j, c in enumerate(counts)] for i in able}
        layer = max((i for i in able if i not in frozen), key=lambda i: redundancy[i], default=None)
        if layer is None:  # freed layers would be frozen again at once, for ever
            frozen = set()
            layer = max(able, key=lambda i: (round(entropy(after[i]), 12), redundancy[i]))
        elif entropy(after[layer]) < floor:
            frozen.add(layer)
            continue
        redundancy[layer] -= 2 * joins[layer][len(similarities[layer]) - counts[layer]]
        counts = after[layer]
    return counts


def _joins(similarity):
    """Similarities ``(E−1,)`` of the pairs that join: each the most similar ones in different groups."""
    values = similarity[np.triu_indices(len(similarity), 1)]
    order = np.argsort(-values, kind="stable")
    # single linkage of ranks, which have no ties
    return values[order[linkage(np.argsort(order).astype(float), "single")[:, 2].astype(int)]]


def by_silhouette(distances, trees, total, fewest):
    """The counts with the largest sum of mean silhouettes (Rousseeuw, 1987), by dynamic programming.

    Parameters
    ----------
    distances : list of L (E·(E−1)/2,) arrays
    trees : list of L (E−1, 4) arrays
    total : int
    fewest : sequence of L int

    Returns
    -------
    list of L int
    """
    best = {0: (0.0, ())}
    for condensed, tree, least in zip(distances, trees, fewest, strict=True):
        values, before, best = silhouettes(condensed, tree), best, {}
        for used, (value, counts) in before.items():
            for count in range(least, min(len(tree) + 1, total - used) + 1):
                if value + values[count] > best.get(used + count, (-np.inf,))[0]:
                    best[used + count] = (value + values[count], (*counts, count))
    return list(best[total][1])


def silhouettes(condensed, tree):
    """Mean silhouette of each cut of a tree, ``{groups: value}``; 0 where it is not defined (1 and E)."""
    from sklearn.metrics import silhouette_score

    square, experts = squareform(condensed), len(tree) + 1
    parts = enumerate(cuts(tree)[1:-1], 2)
    values = {n: float(silhouette_score(square, labels, metric="precomputed")) for n, labels in parts}
    return {1: 0.0, experts: 0.0} | values
