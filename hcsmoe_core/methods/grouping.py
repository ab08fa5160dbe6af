"""How the experts of a layer are grouped.

A group is a step ``(layer, count) → labels``: ``layer`` is a :class:`hcsmoe_core.methods.planner.Layer`, and
the labels are of ``layer.free``, the experts that may be joined; soft groups return their memberships,
``(count, free)``, too. One registered with ``whole=True`` decides about everything: ``(layers, counts) →
[LayerPlan, …]``.
"""

from typing import Annotated, Literal

import numpy as np
from scipy.spatial.distance import squareform

from hcsmoe_core._util import check_choice, check_count, require
from hcsmoe_core.clustering import LINKAGES, by_first_appearance, check_linkage
from hcsmoe_core.methods import similarities
from hcsmoe_core.plan import LayerPlan
from hcsmoe_core.steps import AboveOne, group

CENTRES = ("k-means++", "first")  # where k-means starts, beside experts


def check_ward(recipe):
    """Ward's method is defined for Euclidean distances alone."""
    require(
        recipe.options.get("linkage") != "ward" or recipe.metric == "euclidean",
        f'linkage "ward" needs Euclidean distances, but those by {recipe.steps["similarity"]!r} are '
        f'{recipe.metric}; use metric "euclidean" with "expert-output", "functional", "weight" or '
        '"router-logits", or linkage "average".',
    )


def check_points(recipe):
    """k-means and fuzzy c-means need points at the distances given."""
    require(
        recipe.metric in similarities.EMBEDDED,
        f'group "{recipe.steps["group"]}" needs points, but distances by {recipe.steps["similarity"]!r} are '
        f'{recipe.metric}; use another similarity, or group "hierarchical".',
    )


@group("hierarchical", uses=("similarity", "merge", "combine"), limit="largest", check=check_ward)
def hierarchical(layer, count, *, linkage: Literal[LINKAGES] = "average", largest: int = 0):
    """The first E − r joins of a merge tree (HC-SMoE); ``largest`` limits the size of groups, 0 does not."""
    return (
        restricted(layer.free_distances, count, largest, linkage, metric=layer.recipe.metric)
        if largest
        else layer.cut(linkage, count)
    )


Centres = Annotated[
    str, (f"one of {', '.join(CENTRES)}, or experts", lambda v: not isinstance(v, str) or v in CENTRES)
]


@group(
    "k-means",
    uses=("similarity", "merge", "combine"),
    check=check_points,
    random=lambda options: options["centres"] == "k-means++",
)
def k_means(layer, count, *, centres: Centres = "k-means++"):
    """k-means of points at the distances given; for ``centres`` see :func:`kmeans`."""
    points = similarities.coordinates(layer.free_distances, layer.recipe.metric)
    order = layer.order if centres == "k-means++" else np.arange(len(points))
    return kmeans(points[order], count, centres=centres, seed=layer.random_state)[np.argsort(order)]


@group("single-shot", uses=("similarity", "merge", "combine"), limit="group_limit")
def around_dominant(layer, count, *, group_limit: int = 0):
    """Groups around the most used experts (M-SMoE); ``group_limit`` limits their size, 0 does not."""
    free = layer.free
    return single_shot(
        layer.similarities[np.ix_(free, free)], layer.usage[free], count, group_limit=group_limit
    )[0]


@group("random", random=True)
def by_chance(layer, count):
    """A random partition."""
    return random_groups(len(layer.free), count, seed=layer.random_state)[np.argsort(layer.order)]


@group(
    "fuzzy",
    uses=("similarity", "merge", "combine"),
    only={"combine": "average", "align": "none"},
    because="it mixes all experts",
    check=check_points,
    random=True,
)
def fuzzy(layer, count, *, fuzzifier: AboveOne = 2.0):
    """Fuzzy c-means of points at the distances given."""
    points = similarities.coordinates(layer.free_distances, layer.recipe.metric)[layer.order]
    labels, memberships = fuzzy_cmeans(points, count, fuzzifier=fuzzifier, seed=layer.random_state)
    rank = np.argsort(layer.order)
    return labels[rank], memberships[:, rank]


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
    return [_trimmed(layer, count) for layer, count in zip(layers, counts, strict=True)]


def _trimmed(layer, count):
    experts, combination = layer.num_experts, layer.recipe.combination()
    width = layer.width * count // experts
    require(
        width >= 1,
        f'The "experts" argument is {count}: {layer.name} would be trimmed to no neuron; keep more.',
    )
    return LayerPlan(layer.name, [*range(experts)], [1.0] * experts, combine=combination, width=width)


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
    current = squareform(np.asarray(distance, dtype=np.float64))
    check_count("groups", groups, 1, len(current))
    check_feasible("largest", largest, groups, len(current))
    if method == "ward":
        current **= 2
    np.fill_diagonal(current, np.inf)
    members = [[e] for e in range(len(current))]
    while len(members) > groups:
        first, second = _closest_allowed(current, [len(m) for m in members], groups, largest)
        current = _joined_distances(current, members, first, second, method)
        members[first] += members.pop(second)
    return _labels(members)


def _labels(members):
    """Labels of experts by first appearance, from the members of each group."""
    group_of = {expert: label for label, together in enumerate(members) for expert in together}
    return by_first_appearance([group_of[expert] for expert in range(len(group_of))])


def _closest_allowed(current, sizes, groups, largest):
    """Closest pair of groups whose join leaves groups that can be packed."""
    rows, columns = np.triu_indices(len(sizes), 1)
    for nearest in np.argsort(current[rows, columns], kind="stable"):
        pair = int(rows[nearest]), int(columns[nearest])
        joined = sum(sizes[i] for i in pair)
        left = [size for i, size in enumerate(sizes) if i not in pair]
        if joined <= largest and len(_packed([*left, joined], largest)) <= groups:
            return pair
    # First-fit may miss a packing that the last state had: join two that it packed together there.
    return next((b[0], b[1]) for b in _packed(sizes, largest) if len(b) > 1)


def _packed(sizes, largest):
    """Bins of at most ``largest`` by first-fit decreasing: places of the sizes in each."""
    bins, room = [[] for _ in sizes], [largest] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        number = next(i for i, left in enumerate(room) if sizes[place] <= left)
        bins[number].append(place)
        room[number] -= sizes[place]
    return [sorted(b) for b in bins if b]


def _joined_distances(current, members, first, second, method):
    """Distances after a join, by the Lance-Williams formula of each linkage (Ward's in squares)."""
    a, b, c = len(members[first]), len(members[second]), np.array([len(m) for m in members])
    to_first, to_second = current[first], current[second]
    if method == "average":
        new = (a * to_first + b * to_second) / (a + b)
    elif method == "ward":
        new = ((a + c) * to_first + (b + c) * to_second - c * current[first, second]) / (a + b + c)
    else:
        new = (np.maximum if method == "complete" else np.minimum)(to_first, to_second)
    new[first] = np.inf
    current[first] = current[:, first] = new
    return np.delete(np.delete(current, second, 0), second, 1)


def check_feasible(name, largest, groups, experts):
    """Raise InputError unless ``groups`` groups of at most ``largest`` hold all experts."""
    check_count(name, largest, 1)
    require(
        groups * largest >= experts,
        f'The "{name}" argument is {largest}, but {groups} groups of at most {largest} hold only '
        f"{groups * largest} of {experts} experts; give at least {-(-experts // groups)}, or keep more "
        "experts.",
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
    named = isinstance(centres, str) and check_choice("centres", centres, CENTRES)
    last = len(points) - 1
    chosen = [*range(groups)] if named else [check_count("centres", int(c), 0, last) for c in centres]
    require(
        len(set(chosen)) == groups,
        f'The "centres" argument must name {groups} experts to start from; it names {len(set(chosen))}.',
    )
    if points.shape[1] == 0 or groups == len(points):  # all alike, or each alone
        return by_first_appearance(np.minimum(np.arange(len(points)), groups - 1))
    init, starts = ("k-means++", 10) if named == "k-means++" else (points[chosen], 1)
    fitted = KMeans(groups, init=init, n_init=starts, max_iter=300, tol=0, random_state=seed).fit(points)
    distance = ((points - fitted.cluster_centers_[fitted.labels_]) ** 2).sum(1)
    return by_first_appearance(_filled(fitted.labels_, groups, distance))


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
    limit = group_limit or experts
    check_feasible("group_limit", limit, groups, experts)
    dominant = np.argsort(-np.asarray(usage), kind="stable")[:groups]
    waiting = [e for e in range(experts) if e not in dominant]
    choices = {e: np.argsort(-similarity[e, dominant], kind="stable").tolist() for e in waiting}
    others = [[] for _ in dominant]
    while waiting:
        expert = waiting.pop(0)
        group = choices[expert].pop(0)
        others[group].append(expert)
        if len(others[group]) >= limit:
            worst = min(others[group], key=lambda e: similarity[dominant[group], e])
            others[group].remove(worst)
            waiting.append(worst)
    labels = _labels([[first, *rest] for first, rest in zip(dominant.tolist(), others, strict=True)])
    return labels, dominant[np.argsort(labels[dominant])]


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


def fuzzy_cmeans(points, groups, *, fuzzifier=2.0, seed=0):
    """Fuzzy c-means (Bezdek, 1981): how far each expert belongs to each group.

    Memberships ``u_eg ∝ ‖x_e − c_g‖^(−2/(m−1))`` and centres ``c_g = Σ_e u_eg^m x_e / Σ_e u_eg^m`` in turns,
    from k-means++ centres.

    Parameters
    ----------
    points : (E, m) float64 array
    groups : int
    fuzzifier : float
        m, above 1; towards 1 the groups become those of k-means.
    seed : int

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
    require(fuzzifier > 1, f'The "fuzzifier" argument must be above 1; not {fuzzifier}.')
    points = points if points.shape[1] else np.zeros((len(points), 1))
    centres, _ = kmeans_plusplus(points, groups, random_state=seed)
    memberships = np.zeros((groups, len(points)))
    for _ in range(300):
        square = ((points[None] - centres[:, None]) ** 2).sum(2)
        square = np.maximum(square, max(square.max(), 1e-200) * 1e-24)
        near = (square / square.min(0)) ** (-1 / (fuzzifier - 1))  # at most 1, however sharp
        before, memberships = memberships, near / near.sum(0)
        power = memberships**fuzzifier
        centres = power @ points / power.sum(1, keepdims=True)
        if np.abs(memberships - before).max() < 1e-9:
            break
    labels = _filled(memberships.argmax(0), groups, 1 - memberships.max(0))
    _, first = np.unique(labels, return_index=True)
    return by_first_appearance(labels), memberships[np.argsort(first)]
