"""From distances to groups: SciPy's merge tree, cut at a number of groups."""

import math

import numpy as np
from scipy.cluster import hierarchy

from hcsmoe_core.files import check_choice, check_count

LINKAGES = ("average", "complete", "single", "ward")


def linkage(distance, method="average", *, metric="euclidean"):
    """Merge tree of one layer's experts.

    Parameters
    ----------
    distance : (E·(E−1)/2,) float64
        Condensed pairwise distances from :func:`hcsmoe_core.similarity.distances` (0 = experts that compute the same).
    method : {"average", "complete", "single", "ward"}
        How the distance between groups follows from that between experts, by SciPy's definitions. HC-SMoE uses
        "average".
    metric : {"euclidean", "cosine"}
        What the distances are; Ward's method is defined for Euclidean ones only.

    Returns
    -------
    (E−1, 4) float64 array
        SciPy linkage matrix: row t joins groups Z[t, 0] and Z[t, 1] at height Z[t, 2].

    Raises
    ------
    ValueError
        If the method is unknown, does not go with the metric, or the distances are not condensed and finite.
    """
    check_choice("linkage", method, LINKAGES)
    if method == "ward" and metric != "euclidean":
        raise ValueError(
            f'linkage "ward" needs Euclidean distances, but these are {metric} distances.\n'
            '  Recompute with distances(stats, layer, metric="euclidean"), or use linkage "average".'
        )
    distance = np.asarray(distance, dtype=np.float64)
    experts = round((1 + math.sqrt(1 + 8 * distance.size)) / 2)
    if distance.ndim != 1 or experts * (experts - 1) // 2 != distance.size:
        raise ValueError(f'The "distance" argument must be condensed, E·(E−1)/2 numbers; it has shape {distance.shape}.')
    if not np.isfinite(distance).all() or (distance < 0).any():
        raise ValueError('The "distance" argument must hold finite distances of at least 0.')
    if not distance.size:  # one expert has no tree; SciPy would refuse
        return np.empty((0, 4))
    return hierarchy.linkage(distance, method)


def cut(tree, groups):
    """Groups of experts left after the first E − ``groups`` joins of a tree.

    Parameters
    ----------
    tree : (E−1, 4) array
        From :func:`linkage`.
    groups : int
        From 1 to E; exactly that many come out, ties or not.

    Returns
    -------
    (E,) int64 array
        Group of each expert, numbered by first appearance.
    """
    experts = len(tree) + 1
    check_count("groups", groups, 1, experts)
    members = {e: [e] for e in range(experts)}
    for t in range(experts - groups):
        members[experts + t] = members.pop(int(tree[t, 0])) + members.pop(int(tree[t, 1]))
    labels = np.empty(experts, dtype=np.int64)
    for label, group in enumerate(members.values()):
        labels[group] = label
    return by_first_appearance(labels)


def by_first_appearance(labels):
    """The same partition with groups numbered in the order of their first member, from 0."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return order[inverse].astype(np.int64)
