"""How the experts of a layer are grouped.

A group is a step ``(layer, count) → labels``: ``layer`` is a :class:`hcsmoe_core.methods.planner.Layer`, and
the labels are of ``layer.free``, the experts that may be joined; soft groups return their memberships,
``(count, free)``, too. One registered with ``whole=True`` decides about everything: ``(layers, counts) →
[LayerPlan, …]``.
"""

from typing import Literal

import numpy as np
from scipy.spatial.distance import squareform

from hcsmoe_core._util import InputError, check_choice, check_count
from hcsmoe_core.clustering import LINKAGES, by_first_appearance, check_linkage
from hcsmoe_core.methods import similarities
from hcsmoe_core.plan import LayerPlan
from hcsmoe_core.steps import group

STARTS = 10  # of k-means


def check_ward(recipe):
    """Ward's method is defined for Euclidean distances alone."""
    if recipe.options.get("linkage") == "ward" and recipe.metric != "euclidean":
        raise InputError(
            f'linkage "ward" needs Euclidean distances, but those by {recipe.steps["similarity"]!r} are '
            f'{recipe.metric}; use metric "euclidean" with "expert-output", "functional", "weight" or '
            '"router-logits", or linkage "average".'
        )


def check_points(recipe):
    """k-means and fuzzy c-means need points at the distances given."""
    if recipe.metric not in similarities.EMBEDDED:
        raise InputError(
            f'group "{recipe.steps["group"]}" needs points, but distances by '
            f"{recipe.steps['similarity']!r} are {recipe.metric}; use another similarity, or group "
            '"hierarchical".'
        )


@group("hierarchical", uses=("similarity", "merge", "combine"), limit="largest", check=check_ward)
def hierarchical(layer, count, *, linkage: Literal[LINKAGES] = "average", largest: int = 0):
    """The first E − r joins of a merge tree (HC-SMoE); ``largest`` limits the size of groups, 0 does not."""
    if not largest:
        return layer.cut(linkage, count)
    return restricted(layer.free_distances, count, largest, linkage, metric=layer.metric)


@group(
    "k-means",
    uses=("similarity", "merge", "combine"),
    check=check_points,
    random=lambda options: options["centres"] == "k-means++",
)
def k_means(layer, count, *, centres="k-means++"):
    """k-means of points at the distances given; for ``centres`` see :func:`kmeans`."""
    points = similarities.coordinates(layer.free_distances, layer.metric)
    if isinstance(centres, str) and centres == "k-means++":
        return kmeans(points[layer.order], count, seed=layer.random_state)[layer.rank]
    return kmeans(points, count, centres=centres)


@group("single-shot", uses=("similarity", "merge", "combine"), limit="group_limit")
def around_dominant(layer, count, *, group_limit: int = 0):
    """Groups around the most used experts (M-SMoE); ``group_limit`` limits their size, 0 does not."""
    alike = layer.similarities[np.ix_(layer.free, layer.free)]
    return single_shot(alike, layer.usage[layer.free], count, group_limit=group_limit)[0]


@group("random", random=True)
def by_chance(layer, count):
    """A random partition."""
    return random_groups(len(layer.free), count, seed=layer.random_state)[layer.rank]


@group(
    "fuzzy",
    uses=("similarity", "merge", "combine"),
    only={"combine": "average", "align": "none"},
    because="it mixes all experts",
    check=check_points,
    random=True,
)
def fuzzy(layer, count, *, fuzzifier: float = 2.0):
    """Fuzzy c-means of points at the distances given."""
    points = similarities.coordinates(layer.free_distances, layer.metric)[layer.order]
    labels, memberships = fuzzy_cmeans(points, count, fuzzifier=fuzzifier, seed=layer.random_state)
    labels, memberships = labels[layer.rank], memberships[:, layer.rank]
    _, first = np.unique(labels, return_index=True)
    return by_first_appearance(labels), memberships[np.argsort(first)]


@group(
    "none",
    uses=("combine",),
    pair={"combine": "trimming"},
    only={"router": "mapped", "budget": "uniform", "guard": False, "compress": ""},
    because="trimming keeps the router and every expert at one width",
    whole=True,
    widths=True,
    kind="trims",
)
def trim_all(layers, counts):
    """Every expert alone, at r / E of its width."""
    planned = []
    for layer, count in zip(layers, counts, strict=True):
        width = layer.width * count // layer.num_experts
        if width < 1:
            raise InputError(
                f'The "experts" argument is {count}: {layer.name} would be trimmed to no neuron; keep more.'
            )
        labels = list(range(layer.num_experts))
        combination = layer.recipe.combination()
        planned.append(LayerPlan(layer.name, labels, [1.0] * len(labels), combine=combination, width=width))
    return planned


def restricted(distance, groups, largest, method="average", *, metric="euclidean"):
    """Groups of at most ``largest`` experts, by joining the closest pair of groups that may still be joined.

    A join is made only if the groups that it leaves can still be packed into ``groups`` of that size, so that
    exactly so many come out.

    Parameters
    ----------
    distance : (E·(E−1)/2,) float64 array
    groups : int
    largest : int
        At least E / groups, rounded up.
    method, metric : str
        As for :func:`linkage`.

    Returns
    -------
    (E,) int64 array
        Group of each expert, numbered by first appearance.

    Raises
    ------
    ValueError
        If the size is too small for that many groups.
    """
    check_linkage(method, metric)
    square = squareform(np.asarray(distance, dtype=np.float64))
    experts = len(square)
    check_count("groups", groups, 1, experts)
    check_feasible("largest", largest, groups, experts)
    current = square**2 if method == "ward" else square.copy()
    np.fill_diagonal(current, np.inf)
    members = [[e] for e in range(experts)]
    while len(members) > groups:
        first, second = _closest_allowed(current, [len(m) for m in members], groups, largest)
        current = _joined_distances(current, members, first, second, method)
        members[first] += members.pop(second)
    labels = np.empty(experts, dtype=np.int64)
    for label, together in enumerate(members):
        labels[together] = label
    return by_first_appearance(labels)


def _closest_allowed(current, sizes, groups, largest):
    """Closest pair of groups whose join leaves groups that can be packed."""
    rows, columns = np.triu_indices(len(sizes), 1)
    for place in np.argsort(current[rows, columns], kind="stable"):
        first, second = int(rows[place]), int(columns[place])
        left = [s for i, s in enumerate(sizes) if i not in (first, second)] + [sizes[first] + sizes[second]]
        if sizes[first] + sizes[second] <= largest and len(_packed(left, largest)) <= groups:
            return first, second
    # First-fit may miss a packing that the last state had: join two that it packed together there.
    return next((b[0], b[1]) for b in _packed(sizes, largest) if len(b) > 1)


def _packed(sizes, largest):
    """Bins of at most ``largest`` by first-fit decreasing: places of the sizes in each."""
    bins, room = [], []
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for number, left in enumerate(room):
            if sizes[place] <= left:
                bins[number].append(place)
                room[number] -= sizes[place]
                break
        else:
            bins.append([place])
            room.append(largest - sizes[place])
    return [sorted(b) for b in bins]


def _joined_distances(current, members, first, second, method):
    """Distances after a join, by the Lance-Williams formula of each linkage (Ward's in squares)."""
    a, b = len(members[first]), len(members[second])
    to_first, to_second = current[first], current[second]
    if method == "average":
        new = (a * to_first + b * to_second) / (a + b)
    elif method == "ward":
        c = np.array([len(m) for m in members])
        between = current[first, second]
        new = ((a + c) * to_first + (b + c) * to_second - c * between) / (a + b + c)
    else:
        new = (np.maximum if method == "complete" else np.minimum)(to_first, to_second)
    new[first] = np.inf
    current[first], current[:, first] = new, new
    kept = np.arange(len(members)) != second
    return current[kept][:, kept]


def check_feasible(name, largest, groups, experts):
    """Raise ValueError unless ``groups`` groups of at most ``largest`` hold all experts."""
    check_count(name, largest, 1)
    if groups * largest < experts:
        raise InputError(
            f'The "{name}" argument is {largest}, but {groups} groups of at most {largest} hold only '
            f"{groups * largest} of {experts} experts; give at least {-(-experts // groups)}, or keep more "
            "experts."
        )


def kmeans(points, groups, *, centres="k-means++", seed=0):
    """k-means (Lloyd's algorithm, scikit-learn).

    Parameters
    ----------
    points : (E, m) float64 array
        Features, or points at the same distances: :func:`hcsmoe_core.methods.similarities.coordinates`.
    groups : int
    centres : {"k-means++", "first"} or sequence of int
        Where it starts: the best of ten k-means++ starts; the first experts, as in the paper's ablation with
        fixed centres; or the experts given.
    seed : int
        Of k-means++.

    Returns
    -------
    (E,) int64 array
        Group of each expert, numbered by first appearance; exactly ``groups`` of them.
    """
    from sklearn.cluster import KMeans

    points = np.asarray(points, dtype=np.float64)
    check_count("groups", groups, 1, len(points))
    if isinstance(centres, str):
        check_choice("centres", centres, ("k-means++", "first"))
        chosen = list(range(groups))
    else:
        chosen = [check_count("centres", int(c), 0, len(points) - 1) for c in centres]
        if len(set(chosen)) != groups:
            raise InputError(
                f'The "centres" argument must name {groups} experts to start from; '
                f"it names {len(set(chosen))}."
            )
    if points.shape[1] == 0 or groups == len(points):  # all alike, or each alone
        return by_first_appearance(np.minimum(np.arange(len(points)), groups - 1))
    random = centres == "k-means++" if isinstance(centres, str) else False
    start = "k-means++" if random else points[chosen]
    found = KMeans(
        groups, init=start, n_init=STARTS if random else 1, max_iter=300, tol=0, random_state=seed
    ).fit(points)
    distance = ((points - found.cluster_centers_[found.labels_]) ** 2).sum(1)
    return by_first_appearance(_filled(found.labels_, groups, distance))


def _filled(labels, groups, distance):
    """Labels with every group used: an empty one takes the farthest expert of a group that has several."""
    labels = np.array(labels)
    for empty in sorted(set(range(groups)) - set(labels.tolist())):
        crowded = np.bincount(labels, minlength=groups)[labels] > 1
        labels[np.where(crowded, distance, -np.inf).argmax()] = empty
    return labels


def single_shot(similarity, usage, groups, *, group_limit=0):
    """Groups around dominant experts in one step (M-SMoE, arXiv 2310.01334, section 3.2).

    The most used experts are dominant, one a group. Each other one joins the dominant expert that is most
    similar to it; a group that is full keeps the most similar, and the one turned away goes to its next
    choice, until all are placed.

    Parameters
    ----------
    similarity : (E, E) float64 array
        Larger is more alike.
    usage : (E,) array
        Tokens that each expert is used by; the first of equals is taken.
    groups : int
    group_limit : int
        Largest group, its dominant expert included; 0 for no limit.

    Returns
    -------
    labels : (E,) int64 array
        Group of each expert, numbered by first appearance.
    dominant : (groups,) int64 array
        Dominant expert of each group.

    Raises
    ------
    ValueError
        If the groups cannot hold all experts.
    """
    similarity, experts = np.asarray(similarity, dtype=np.float64), len(usage)
    check_count("groups", groups, 1, experts)
    if group_limit:
        check_feasible("group_limit", group_limit, groups, experts)
    dominant = np.argsort(-np.asarray(usage), kind="stable")[:groups]
    choices = {
        e: list(np.argsort(-similarity[e, dominant], kind="stable"))
        for e in range(experts)
        if e not in dominant
    }
    groups_of, waiting = [[] for _ in dominant], list(choices)
    while waiting:
        expert = waiting.pop(0)
        group = int(choices[expert].pop(0))
        groups_of[group].append(expert)
        if group_limit and len(groups_of[group]) > group_limit - 1:
            worst = min(groups_of[group], key=lambda e: similarity[dominant[group], e])
            groups_of[group].remove(worst)
            waiting.append(worst)
    labels = np.empty(experts, dtype=np.int64)
    for group, members in enumerate(groups_of):
        labels[[dominant[group], *members]] = group
    numbered = by_first_appearance(labels)
    order = np.argsort(numbered[dominant])
    return numbered, dominant[order]


def random_groups(experts, groups, *, seed=0):
    """A random partition: one expert for each group, the rest wherever chance puts them.

    Parameters
    ----------
    experts, groups, seed : int

    Returns
    -------
    (E,) int64 array
        Group of each expert, numbered by first appearance.
    """
    check_count("groups", groups, 1, experts)
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(groups), generator.integers(0, groups, experts - groups)])
    return by_first_appearance(generator.permutation(labels))


def fuzzy_cmeans(points, groups, *, fuzzifier=2.0, seed=0, steps=300, tolerance=1e-9):
    """Fuzzy c-means (Bezdek, 1981): how far each expert belongs to each group.

    Memberships ``u_eg ∝ ‖x_e − c_g‖^(−2/(m−1))`` and centres ``c_g = Σ_e u_eg^m x_e / Σ_e u_eg^m`` in turns,
    from k-means++ centres.

    Parameters
    ----------
    points : (E, m) float64 array
    groups : int
    fuzzifier : float
        m, above 1; towards 1 the groups become those of k-means.
    seed, steps : int
    tolerance : float
        Largest change of a membership at which it stops.

    Returns
    -------
    labels : (E,) int64 array
        Group that each expert belongs to most, numbered by first appearance; every group has one.
    memberships : (groups, E) float64 array
        Each column sums to one.
    """
    from sklearn.cluster import kmeans_plusplus

    points = np.asarray(points, dtype=np.float64)
    check_count("groups", groups, 1, len(points))
    if not fuzzifier > 1:
        raise InputError(f'The "fuzzifier" argument must be above 1; not {fuzzifier}.')
    if points.shape[1] == 0:
        points = np.zeros((len(points), 1))
    centres, _ = kmeans_plusplus(points, groups, random_state=seed)
    memberships = np.zeros((groups, len(points)))
    for _ in range(steps):
        square = ((points[None] - centres[:, None]) ** 2).sum(2)
        square = np.maximum(square, max(square.max(), 1e-200) * 1e-24)
        near = (square / square.min(0)) ** (-1 / (fuzzifier - 1))  # at most 1, however sharp
        before, memberships = memberships, near / near.sum(0)
        power = memberships**fuzzifier
        centres = power @ points / power.sum(1, keepdims=True)
        if np.abs(memberships - before).max() < tolerance:
            break
    labels = _filled(memberships.argmax(0), groups, 1 - memberships.max(0))
    _, first = np.unique(labels, return_index=True)
    return by_first_appearance(labels), memberships[np.argsort(first)]
