"""From distances to groups: SciPy's merge tree, cut at a number of groups."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.cluster import hierarchy
from scipy.spatial.distance import is_valid_y

from hcsmoe_core._util import check_choice, check_count, require

LINKAGES = ("average", "complete", "single", "ward")


def linkage(distance: ArrayLike, method: str = "average", *, metric: str = "euclidean") -> np.ndarray:
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
    require(
        is_valid_y(distance),
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


def cut(tree: ArrayLike, groups: int) -> np.ndarray:
    """Labels of experts after the first E − ``groups`` joins of a tree, ``(E,)`` int64 by first appearance.

    Exactly ``groups``, from 1 to E, come out; SciPy's ``fcluster`` gives fewer on ties.
    """
    return cuts(tree)[check_count("groups", groups, 1, len(tree) + 1) - 1]


def cuts(tree) -> np.ndarray:
    """All the cuts of a tree, ``(E, E)`` int64: row r − 1 has r groups, numbered by first appearance."""
    experts = len(tree) + 1
    labels = np.tile(np.arange(experts), (experts, 1))
    member = list(range(experts))  # an expert of each node of the tree
    for left, (first, second) in enumerate(np.asarray(tree)[:, :2].astype(int).tolist()):
        before = labels[experts - 1 - left]
        stays, goes = sorted(before[[member[first], member[second]]])
        labels[experts - 2 - left] = np.where(before == goes, stays, before - (before > goes))
        member.append(member[first])
    return labels


def by_first_appearance(labels) -> np.ndarray:
    """The same partition with groups numbered in the order of their first member, from 0; int64."""
    labels, numbers = np.asarray(labels).tolist(), {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)
