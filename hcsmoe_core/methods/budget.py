"""How many experts each layer keeps, of a total that is always the same."""

import numpy as np
from scipy.spatial.distance import squareform

from hcsmoe_core._util import check_count
from hcsmoe_core.clustering import cut

BUDGETS = ("uniform", "frequency", "saliency", "merge-cost", "grape", "silhouette")


def check_counts(counts, total, least, most):
    """The counts as int, checked: exactly ``total`` in all, and in each layer from ``least`` to ``most``."""
    counts = [int(c) for c in counts]
    assert sum(counts) == total, f"a budget of {total} experts came out as {counts}"
    assert all(a <= c <= b for a, c, b in zip(least, counts, most, strict=True)), (counts, least, most)
    return counts


def uniform(experts, least, most):
    """The same number in every layer.

    Parameters
    ----------
    experts : int
        r.
    least, most : sequence of L int
        Fewest and most that each layer can keep.

    Returns
    -------
    list of L int

    Raises
    ------
    ValueError
        If a layer cannot keep so many or so few.
    """
    for low, high in zip(least, most, strict=True):
        check_count("experts", experts, low, high)
    return [experts] * len(most)


def by_score(scores, total, least):
    """Keep the experts with the largest scores of all layers together.

    The rule of M-SMoE (arXiv 2310.01334, section 3.2) and of HC-SMoE's non-uniform clusters, made exact: each layer's
    best experts are kept first, as many as it must keep; of equals the one in the earlier layer, then of the smaller
    index, is taken.

    Parameters
    ----------
    scores : list of L (E,) arrays
        Comparable between layers, such as usage frequencies that sum to one in each.
    total : int
    least : sequence of L int

    Returns
    -------
    list of L int
    """
    order = [np.argsort(-np.asarray(s), kind="stable") for s in scores]
    counts = list(least)
    rest = [(-scores[layer][e], layer, int(e)) for layer, o in enumerate(order) for e in o[least[layer] :]]
    for _, layer, _ in sorted(rest)[: total - sum(counts)]:
        counts[layer] += 1
    return counts


def by_merge_cost(trees, scales, total, least):
    """Make the cheapest joins of all layers' trees, until ``total`` groups are left.

    Parameters
    ----------
    trees : list of L (E−1, 4) arrays
        Linkage matrices; a join costs its height over the layer's scale.
    scales : list of L float
        See :func:`hcsmoe_core.similarity.scale_of`.
    total : int
    least : sequence of L int

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
        if surplus and counts[layer] > least[layer]:
            counts[layer] -= 1
            surplus -= 1
    return counts


def grape(similarities, total, least, *, gamma=0.1):
    """GRAPE's greedy allocation (arXiv 2604.06542): join where a layer is most redundant, guarded by an entropy.

    A layer's redundancy is the sum of its experts' similarities ``R_l = Σ_{i≠j} S_ij``. The layer with the largest, of those
    not frozen, joins its most similar pair of experts that are not joined yet, and loses that pair's share of R. Where
    the entropy of the kept experts' distribution over the layers would fall below ``(1 − γ)`` of what it was at the start,
    that layer is frozen instead; when all are frozen, all are freed, and the join is made that leaves the largest entropy.

    Parameters
    ----------
    similarities : list of L (E, E) arrays
        Larger is more alike.
    total : int
    least : sequence of L int
    gamma : float
        γ, from 0 to 1.

    Returns
    -------
    list of L int
    """
    counts = [len(s) for s in similarities]
    redundancy = [float(s.sum() - np.trace(s)) for s in similarities]
    pairs = [_by_similarity(s) for s in similarities]
    groups = [list(range(len(s))) for s in similarities]
    floor, frozen = (1 - gamma) * _entropy(counts), set()
    while sum(counts) > total:
        able = [i for i, c in enumerate(counts) if c > least[i]]
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
        first, second = _next_pair(pairs[layer], groups[layer])
        redundancy[layer] -= 2 * similarities[layer][first, second]
        counts = after[layer]
    return counts


def _by_similarity(similarity):
    rows, columns = np.triu_indices(len(similarity), 1)
    order = np.argsort(-similarity[rows, columns], kind="stable")
    return list(zip(rows[order].tolist(), columns[order].tolist(), strict=True))


def _next_pair(pairs, groups):
    """Take the most similar pair of experts in different groups, and join their groups."""
    while True:
        first, second = pairs.pop(0)
        if groups[first] != groups[second]:
            gone = groups[second]
            groups[:] = [groups[first] if g == gone else g for g in groups]
            return first, second


def _entropy(counts):
    share = np.asarray(counts) / sum(counts)
    return float(-(share * np.log(share)).sum())


def by_silhouette(distances, trees, total, least, most):
    """The counts with the largest sum of the layers' mean silhouettes (Rousseeuw, 1987), by dynamic programming.

    Parameters
    ----------
    distances : list of L (E·(E−1)/2,) arrays
    trees : list of L (E−1, 4) arrays
    total : int
    least, most : sequence of L int

    Returns
    -------
    list of L int
    """
    best = {0: (0.0, ())}
    for condensed, tree, low, high in zip(distances, trees, least, most, strict=True):
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
    """Mean silhouette of a tree's cut at every number of groups, ``{groups: value}``; 0 where it is not defined (1 and E)."""
    from sklearn.metrics import silhouette_score

    square, experts = squareform(condensed), len(tree) + 1
    values = {
        count: silhouette_score(square, cut(tree, count), metric="precomputed") for count in range(2, experts)
    }
    return {1: 0.0, experts: 0.0} | {count: float(value) for count, value in values.items()}
