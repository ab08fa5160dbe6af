"""From distances to groups: SciPy's merge tree cut at a number of groups, and the other ways of grouping experts."""

import math

import numpy as np
from scipy.cluster import hierarchy

from hcsmoe_core._util import InputError, check_choice, check_count

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
    metric : str
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
    check_linkage(method, metric)
    distance = np.asarray(distance, dtype=np.float64)
    experts = round((1 + math.sqrt(1 + 8 * distance.size)) / 2)
    if distance.ndim != 1 or experts * (experts - 1) // 2 != distance.size:
        raise InputError(
            f'The "distance" argument must be condensed, E·(E−1)/2 numbers; it has shape {distance.shape}.'
        )
    if not np.isfinite(distance).all() or (distance < 0).any():
        raise InputError('The "distance" argument must hold finite distances of at least 0.')
    if not distance.size:  # one expert has no tree; SciPy would refuse
        return np.empty((0, 4))
    return hierarchy.linkage(distance, method)


def check_linkage(method, metric):
    check_choice("linkage", method, LINKAGES)
    if method == "ward" and metric != "euclidean":
        raise InputError(
            f'linkage "ward" needs Euclidean distances, but these are {metric} distances.\n'
            '  Recompute with distances(stats, layer, metric="euclidean"), or use linkage "average".'
        )


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
    joins = np.asarray(tree)[: experts - groups, :2].astype(np.int64).tolist()
    top = list(range(experts + len(joins)))
    for t in reversed(
        range(len(joins))
    ):  # from the last join down: what is joined later has its group already
        first, second = joins[t]
        top[first] = top[second] = top[experts + t]
    return by_first_appearance(top[:experts])


def cuts(tree):
    """All the cuts of a tree: row r − 1 is ``cut(tree, r)``.

    Parameters
    ----------
    tree : (E−1, 4) array
        From :func:`linkage`.

    Returns
    -------
    (E, E) int64 array
    """
    experts = len(tree) + 1
    found = np.empty((experts, experts), dtype=np.int64)
    found[-1] = np.arange(experts)
    # A group goes by its first member; those members are in order, so that a group's number is how many come before.
    group, first, leads = np.arange(experts), list(range(experts)), np.ones(experts, dtype=bool)
    for t, (a, b) in enumerate(np.asarray(tree)[:, :2].astype(np.int64).tolist()):
        stays, goes = sorted((first[a], first[b]))
        first.append(stays)
        group[group == goes] = stays
        leads[goes] = False
        found[experts - 2 - t] = (np.cumsum(leads) - 1)[group]
    return found


def by_first_appearance(labels):
    """The same partition with groups numbered in the order of their first member, from 0."""
    seen = {}
    return np.array(
        [seen.setdefault(label, len(seen)) for label in np.asarray(labels).tolist()], dtype=np.int64
    )
