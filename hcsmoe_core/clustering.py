"""From distances to groups: SciPy's merge tree, cut at a number of groups."""

import math

import numpy as np
from scipy.cluster import hierarchy

from hcsmoe_core._util import check_choice, check_count, require

LINKAGES = ("average", "complete", "single", "ward")


def linkage(distance, method: str = "average", *, metric: str = "euclidean") -> np.ndarray:
    """Merge tree of one layer's experts.

    Parameters
    ----------
    distance : (E·(E−1)/2,) float64
        Condensed pairwise distances from :func:`hcsmoe_core.distances` (0 = experts that compute the same).
    method : {"average", "complete", "single", "ward"}
        How the distance between groups follows from that between experts; HC-SMoE uses "average".
    metric : str
        What the distances are; Ward's method is defined for Euclidean ones only.

    Returns
    -------
    (E−1, 4) float64 array
        SciPy linkage matrix: row t joins groups Z[t, 0] and Z[t, 1] at height Z[t, 2].
    """
    check_linkage(method, metric)
    distance = np.asarray(distance, dtype=np.float64)
    experts = round((1 + math.sqrt(1 + 8 * distance.size)) / 2)
    require(
        distance.ndim == 1 and experts * (experts - 1) // 2 == distance.size,
        f'The "distance" argument must be condensed, E·(E−1)/2 numbers; it has shape {distance.shape}.',
    )
    require(
        np.isfinite(distance).all() and (distance >= 0).all(),
        'The "distance" argument must hold finite distances of at least 0.',
    )
    # One expert has no tree; SciPy would refuse.
    return hierarchy.linkage(distance, method) if distance.size else np.empty((0, 4))


def check_linkage(method: str, metric: str):
    """Raise InputError unless the linkage is known and defined for distances by the metric."""
    check_choice("linkage", method, LINKAGES)
    require(
        method != "ward" or metric == "euclidean",
        f'linkage "ward" needs Euclidean distances, but these are {metric} distances.\n'
        '  Recompute with distances(stats, layer, metric="euclidean"), or use linkage "average".',
    )


def cut(tree, groups: int) -> np.ndarray:
    """Labels of experts after the first E − ``groups`` joins of a tree, ``(E,)`` int64 by first appearance.

    Exactly ``groups``, from 1 to E, come out; SciPy's ``fcluster`` gives fewer on ties.
    """
    experts = len(tree) + 1
    check_count("groups", groups, 1, experts)
    joins = np.asarray(tree)[: experts - groups, :2].astype(np.int64).tolist()
    top = list(range(experts + len(joins)))
    for t, (first, second) in reversed(list(enumerate(joins))):  # what is joined later has its group already
        top[first] = top[second] = top[experts + t]
    return by_first_appearance(top[:experts])


def cuts(tree) -> np.ndarray:
    """All the cuts of a tree, ``(E, E)`` int64: row r − 1 is ``cut(tree, r)``."""
    experts = len(tree) + 1
    labels = np.empty((experts, experts), dtype=np.int64)
    labels[-1] = np.arange(experts)
    # A group goes by its first member; these are in order, so that a group's number is how many come before.
    group, first, leads = np.arange(experts), list(range(experts)), np.ones(experts, dtype=bool)
    for t, (a, b) in enumerate(np.asarray(tree)[:, :2].astype(np.int64).tolist()):
        stays, goes = sorted((first[a], first[b]))
        first.append(stays)
        group[group == goes] = stays
        leads[goes] = False
        labels[experts - 2 - t] = (np.cumsum(leads) - 1)[group]
    return labels


def by_first_appearance(labels) -> np.ndarray:
    """The same partition with groups numbered in the order of their first member, from 0; int64."""
    numbers = {}
    return np.array(
        [numbers.setdefault(label, len(numbers)) for label in np.asarray(labels).tolist()], np.int64
    )
