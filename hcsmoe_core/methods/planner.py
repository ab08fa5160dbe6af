"""The one way from statistics to a plan: a loop over layers, through the steps of the method.

>>> for layer in layers:
>>>     labels = group_step(layer, count)
>>>     weights = merge_weights(labels, layer.sums, merge)
>>>     LayerPlan(layer.name, labels, weights, combine=rule, router=router)
"""

import functools
import itertools
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy.linalg import block_diag
from scipy.spatial.distance import squareform
from torch import nn

from hcsmoe_core import clustering
from hcsmoe_core import similarity as similarities
from hcsmoe_core._util import check_count, require
from hcsmoe_core.families import find_moe_layers, moe_layer
from hcsmoe_core.merging import check_statistics
from hcsmoe_core.methods import pruning
from hcsmoe_core.methods.recipes import Recipe, resolve
from hcsmoe_core.methods.summary import merge_weights
from hcsmoe_core.plan import LayerPlan, Plan
from hcsmoe_core.replace import suspended
from hcsmoe_core.statistics import Statistics


class Layer:
    """One layer as the steps of a method see it; what several of them look at is worked out once.

    Attributes
    ----------
    name : str
        Of the experts module.
    stats, sums : Statistics, LayerStatistics
        Of all layers, and of this one.
    num_experts, width : int
        E and I.
    usage : (E,) array
        Tokens that each expert is used by.
    protected : list of int
        Super experts, which stay as they are.
    free : (F,) int64 array
        The other experts, in order.
    order : (F,) int64 array
        Free experts in an order that does not depend on how experts are numbered: whatever is drawn by chance
        is drawn in that order.
    seeds, random_state : list of int, int
        The plan's seed and the layer's number, for NumPy's generators; and one number made of them.
    recipe : Recipe
    progress : bool
    """

    def __init__(self, stats, index, recipe, *, model=None, seed=0, protected=(), progress=False):
        self.stats, self.recipe, self.model, self.progress = stats, recipe, model, progress
        self.name = list(stats.layers)[index]
        self.sums = stats.layers[self.name]
        self.num_experts, self.width = self.sums.num_experts, stats.model["layers"][self.name]["width"]
        self.usage = self.sums.usage_count.sum(0).numpy()
        self.protected, self.seeds = list(protected), [seed, index]
        self.free = np.setdiff1d(np.arange(self.num_experts), self.protected)
        # each linkage once
        self.tree, self._cuts = functools.cache(self.tree), functools.cache(self._cuts)

    @property
    def moe(self):
        """The live layer, :class:`hcsmoe_core.moe.MoELayer`."""
        return moe_layer(self.model, self.name)

    @property
    def random_state(self):
        """One number made of the plan's seed and the layer's number."""
        return np.random.SeedSequence(self.seeds).generate_state(1)[0]

    @functools.cached_property
    def order(self):
        """Free experts in an order that does not depend on how experts are numbered, ``(F,)``; for chance."""
        return np.argsort(pruning.canonical_rank(self.sums)[self.free])

    @property
    def compared(self):
        """What :func:`hcsmoe_core.similarity.distances` is asked for."""
        return {name: self.recipe.steps[name] for name in ("similarity", "metric")} | {"model": self.model}

    @functools.cached_property
    def distances(self):
        """Condensed distances between all experts, ``(E·(E−1)/2,)``."""
        return similarities.distances(self.stats, self.name, **self.compared)

    @functools.cached_property
    def free_distances(self):
        """Condensed distances between the experts that may be joined."""
        return squareform(squareform(self.distances)[np.ix_(self.free, self.free)], checks=False)

    @functools.cached_property
    def similarities(self):
        """Square matrix ``(E, E)``, larger for experts more alike: cosines, or negative distances."""
        square = squareform(self.distances)
        return 1 - square if self.recipe.metric in ("cosine", "cka") else -square

    def tree(self, linkage):
        """Merge tree of all experts, ``(E−1, 4)``."""
        return clustering.linkage(self.distances, linkage, metric=self.recipe.metric)

    def cut(self, linkage, count):
        """Labels of the experts that may be joined, by their merge tree; all its cuts are made at once."""
        return self._cuts(linkage)[check_count("experts", count, 1, len(self.free)) - 1]

    def _cuts(self, linkage):
        return clustering.cuts(clustering.linkage(self.free_distances, linkage, metric=self.recipe.metric))

    @functools.cached_property
    def saliency(self):
        """What each expert is worth, ``(E,)``."""
        return self.recipe.present["saliency"](self)

    def dominant(self, labels):
        """The expert of each group that is used most; the first of equals."""
        groups = (np.flatnonzero(labels == group) for group in range(labels.max() + 1))
        return [int(max(members, key=lambda e: self.usage[e])) for members in groups]


def make_plan(
    stats: Statistics,
    model: nn.Module | None = None,
    *,
    experts: int | float | Sequence[int | float],
    method: str = "hc-smoe",
    seed: int = 0,
    progress: bool = True,
    similarity: str | None = None, metric: str | None = None, linkage: str | None = None,
    group: str | None = None, budget: str | None = None, saliency: str | None = None,
    merge: str | None = None, combine: str | None = None, align: str | None = None,
    refit: int | None = None, router: str | None = None, compress: str | None = None,
    guard: bool | None = None,
    **settings: Any,
) -> Plan:  # fmt: skip
    """Decide which experts join or go in every layer; the model is not run.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel, optional
        Needed where weights are looked at (similarities ``"weight"`` and ``"cka"``, ``"o-prune"``,
        ``"least-residual"``); where given, checked to be the model of the statistics. A merged one is planned
        for as it was before.
    experts : int or float, or sequence of L of them
        r: experts kept in each layer, from 1 to E, or a share of E below 1, rounded; with a budget that is
        not uniform, their mean over the layers. A trimmed model keeps all experts, each at r / E of its
        width. A sequence gives each layer's own number, and takes the place of a budget.
    method : str
        Of :data:`METHODS`, or ``"recommended"``: the one that was found to lose least.
    seed : int
        Of k-means, fuzzy c-means, random groups and searches.
    progress : bool
        Show a bar where it takes long.
    similarity, metric, linkage, group, budget, saliency, merge, combine, align, router, compress : str
        Steps and options that are to differ from the method's own, which None stands for, such as
        ``linkage="ward"``: :func:`resolve`.
    refit, guard : int, bool
        Rounds in which what neurons read is fitted; whether super experts stay as they are.
    **settings
        Further options of steps, such as ``ridge=0.1``.

    Raises
    ------
    InputError
        If a choice is unknown, steps do not go together, ``experts`` is out of range, the statistics lack
        what is needed or are another model's, or the model was loaded merged.
    """
    compared = dict(similarity=similarity, metric=metric, linkage=linkage, group=group)
    counted = dict(budget=budget, saliency=saliency, guard=guard)
    made = dict(merge=merge, combine=combine, align=align, refit=refit, router=router, compress=compress)
    named = compared | counted | made
    settings |= {name: value for name, value in named.items() if value is not None}
    return next(
        make_plans(stats, model, experts=[experts], method=method, seed=seed, progress=progress, **settings)
    )


def make_plans(
    stats, model=None, *, experts, linkages=None, method="hc-smoe", seed=0, progress=True, **settings
):
    """Plans for several numbers of experts and linkages; distances and trees are worked out once.

    Parameters
    ----------
    stats, model, method, seed, progress, **settings
        As for :func:`make_plan`.
    experts : sequence
        Values that :func:`make_plan` takes for it.
    linkages : sequence of str, optional
        By default the method's own.

    Yields
    ------
    Plan
        Those of :func:`make_plan`: for each linkage, one for each of ``experts``.

    Raises
    ------
    InputError
        As :func:`make_plan`.
    """
    recipes = [resolve(method, **settings | ({"linkage": name} if name else {})) for name in linkages or [""]]
    _check_inputs(stats, model, recipes[0])
    protected = pruning.super_experts(stats) if recipes[0].steps["guard"] else {}
    layers = [
        Layer(
            stats, i, recipes[0], model=model, seed=seed, protected=protected.get(name, ()), progress=progress
        )
        for i, name in enumerate(stats.layers)
    ]
    for recipe, count in itertools.product(recipes, experts):
        with suspended(find_moe_layers(model) if recipe.needs_model else ()):
            plan = _plan(stats, layers, recipe, count, seed)
        yield plan


def _check_inputs(stats, model, recipe):
    """Raise InputError unless the statistics and the model hold what the steps look at."""
    needs = [need for need in recipe.needs if need != "sample" or recipe.needs_model]
    stats.check(needs, f"Method {recipe.method!r}")
    require(
        model is not None or not recipe.needs_model,
        f"Method {recipe.method!r} looks at the experts' weights with these settings; "
        'give the "model" argument.',
    )
    if model is not None:
        check_statistics(stats, model)


def _plan(stats, layers, recipe: Recipe, experts, seed):
    """The plan that a recipe's steps give for some number of experts."""
    for layer in layers:
        layer.recipe = recipe
    if not np.ndim(experts):
        experts = kept_experts(experts, min(layer.num_experts for layer in layers))
    counts, group = _counts(layers, recipe, experts), recipe.present["group"]
    planned = (
        group(layers, counts, **recipe.by_kind["group"])
        if group.properties.get("whole")
        else [_joined(layer, group, count, seed) for layer, count in zip(layers, counts, strict=True)]
    )
    settings = {
        "method": recipe.method,
        "experts": counts if np.ndim(experts) else experts,
        "seed": seed,
        **recipe.settings,
    }
    return Plan(planned, settings, dict(stats.model), stats.identity(), recipe.by_kind.get("compress"))


def kept_experts(experts, size: int) -> int:
    """Experts kept of ``size``: a whole number from 1, or a share below 1, rounded as in grids."""
    share = isinstance(experts, Real) and not isinstance(experts, Integral) and 0 < experts < 1
    kept = round(Fraction(str(experts)) * size) if share else experts
    return check_count("experts", kept or experts, 1, size)


def _counts(layers, recipe, experts):
    """Experts that each layer keeps, checked."""
    sizes, budget = [layer.num_experts for layer in layers], recipe.steps["budget"]
    if np.ndim(experts):
        require(
            budget == "uniform" and not recipe.present["group"].properties.get("widths"),
            'The "experts" argument may be a list only where budget is "uniform", and not for trimming '
            '(group "none") or group "residual", which change widths.',
        )
        require(
            len(experts) == len(layers),
            f'The "experts" argument lists {len(experts)} numbers for {len(layers)} MoE layers; '
            "give one for each.",
        )
        counts = [kept_experts(n, size) for n, size in zip(experts, sizes, strict=True)]
    else:
        fewest = [_fewest(layer, recipe) for layer in layers]
        total = experts * len(layers)
        require(
            total >= sum(fewest),
            f'The "experts" argument is {experts}, {total} in all, but at least {sum(fewest)} must be '
            "kept: in each layer its super experts, if the guard is on, and one more, or as many more as "
            "the largest group allows.",
        )
        counts = recipe.present["budget"](layers, total, fewest, **recipe.by_kind["budget"])
        assert sum(counts) == total, f"a budget of {total} experts came out as {counts}"
    for count, layer in zip(counts, layers, strict=True):
        low = min(len(layer.protected) + 1, layer.num_experts)
        require(
            low <= count <= layer.num_experts,
            f'The "experts" argument leaves {count} experts in {layer.name}, but from {low} to '
            f"{layer.num_experts} must be kept there: its {len(layer.protected)} super experts, which "
            "the guard protects, and one more at least; keep more, or switch the guard off.",
        )
    return [int(count) for count in counts]


def _fewest(layer, recipe):
    """Experts that a layer must keep: the protected ones, and groups enough for the others."""
    limit = recipe.by_kind["group"].get(recipe.present["group"].properties.get("limit"))
    # of a uniform budget, groups that are too few are refused by the group step, which knows more
    groups = -(-len(layer.free) // limit) if limit and recipe.steps["budget"] != "uniform" else 1
    return min(len(layer.protected) + groups, layer.num_experts)


def _joined(layer, group, count, seed):
    """Plan of one layer of which experts are joined; the protected ones each stay alone."""
    recipe, free, protected = layer.recipe, layer.free, layer.protected
    grouped, memberships, groups = np.empty(0, dtype=np.int64), None, count - len(protected)
    if len(free):
        grouped = group(layer, groups, **recipe.by_kind["group"])
        grouped, memberships = grouped if isinstance(grouped, tuple) else (grouped, None)
        require(
            np.shape(grouped) == free.shape and np.unique(grouped).tolist() == [*range(groups)],
            f'group "{group.name}" must number {groups} groups of the {len(free)} free experts of '
            f"{layer.name} from 0; it gave {np.asarray(grouped).tolist()}.",
        )
    numbers = np.empty(layer.num_experts, dtype=np.int64)
    numbers[free], numbers[protected] = grouped, np.arange(groups, count)
    labels = clustering.by_first_appearance(numbers)
    options, router = recipe.combination(seed), recipe.steps["router"]
    matched = options.get("align", "none") != "none" or recipe.present["combine"].properties.get("matched")
    return LayerPlan(
        layer.name,
        labels.tolist(),
        merge_weights(labels, layer.sums, recipe.steps["merge"]).tolist(),
        combine=options,
        router=router,
        mixture=None if memberships is None else _mixture(layer, numbers, memberships),
        dominant=layer.dominant(labels) if matched or router == "row-kept" else None,
        protected=protected,
    )


def _mixture(layer, numbers, memberships):
    """Weight of every expert in every merged one, from the free experts' memberships of their groups."""
    apart = block_diag(memberships, np.eye(len(layer.protected)))
    share = np.take(apart, np.argsort([*layer.free, *layer.protected]), axis=1)
    share *= merge_weights(np.zeros_like(numbers), layer.sums, layer.recipe.steps["merge"])
    in_order = list(dict.fromkeys(numbers.tolist()))  # of first appearance
    return (share / share.sum(1, keepdims=True))[in_order].tolist()


def merge_tree(stats, layer, *, similarity="expert-output", metric="", linkage="average", model=None):
    """Merge tree of one layer, from its statistics: :func:`hcsmoe_core.similarity.distances`, then
    :func:`hcsmoe_core.clustering.linkage`.
    """
    return clustering.linkage(
        similarities.distances(stats, layer, similarity=similarity, metric=metric, model=model),
        linkage,
        metric=similarities.metric_of(similarity, metric),
    )
