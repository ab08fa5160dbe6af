"""Every method as what it is made of, and the one way from statistics to a plan.

A method names its steps: what experts are compared by, how they are grouped, how a group becomes one expert, what the
router does, and how many experts each layer keeps. Two methods never have two pipelines.
"""

from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from scipy.spatial.distance import squareform
from tqdm.auto import tqdm

from hcsmoe_core import clustering, similarity
from hcsmoe_core._util import InputError, check_choice, check_count
from hcsmoe_core.families import moe_layer
from hcsmoe_core.merging import check_statistics
from hcsmoe_core.methods import budget as budgets
from hcsmoe_core.methods import grouping, residual
from hcsmoe_core.methods import saliency as pruning
from hcsmoe_core.methods.combine import ALIGNMENTS, NEURON_FEATURES, POOLS
from hcsmoe_core.plan import DROPPED, MERGES, ROUTERS, LayerPlan, Plan, merge_weights, uses_sample
from hcsmoe_core.steps import METHODS as METHOD_TABLE
from hcsmoe_core.steps import combine

GROUPINGS = ("hierarchical", "k-means", "single-shot", "random", "fuzzy", "prune", "none", "residual")


@dataclass(frozen=True)
class Steps:
    """What a method does; each can be set in :func:`make_plan`.

    Attributes
    ----------
    similarity, metric : str
        What experts are compared by: :func:`hcsmoe_core.similarity.distances`.
    group : {"hierarchical", "k-means", "single-shot", "random", "fuzzy", "prune", "none", "residual"}
        ``"prune"`` drops experts, by ``saliency``; ``"none"`` keeps all of them, to be trimmed; ``"residual"`` takes the
        number of experts and their width, the groups, and how each of them becomes one, that leave the smallest residual on
        tokens held out, ``combine`` included: :mod:`hcsmoe_core.methods.residual`.
    linkage : {"average", "complete", "single", "ward"}
        Of hierarchical grouping.
    largest : int
        Largest group of hierarchical grouping; 0 for no limit.
    centres : {"k-means++", "first"} or list of int
        Where k-means starts.
    group_limit : int
        Largest group of single-shot grouping; 0 for no limit.
    fuzzifier : float
        Of fuzzy c-means.
    saliency : str
        What pruning keeps: :func:`hcsmoe_core.methods.saliency.saliency`, or ``"o-prune"``.
    loss : {"squared", "frobenius"}
        Of O-prune; see :class:`hcsmoe_core.methods.saliency.DropLoss`.
    subsets : int
        That O-prune tries where there are more than 16 experts.
    merge : {"frequency", "average", "routing-mass"}
        Weights of a group's members.
    combine : str
        How a group becomes one expert, with ``align``, ``features``, ``ridge``, ``rank``, ``pool`` and ``refit``:
        :func:`hcsmoe_core.merging.combine`. Options that a rule does not have are not looked at.
    router : {"mapped", "dropped", "average", "row-kept", "folded"}
        See :class:`hcsmoe_core.plan.LayerPlan`.
    shape : {"uniform", "by-layer", "whole"}
        Of grouping by residual: one number of experts and one width in all layers, which plain checkpoints need; each
        layer's own; or r experts of the width they had.
    holdout : {"auto", "sequences", "domains"}
        Of grouping by residual: what decides; see :func:`hcsmoe_core.methods.residual.held_out`.
    budget : {"uniform", "frequency", "saliency", "merge-cost", "grape", "silhouette"}
        How many experts each layer keeps: the same number in each; those used most of all layers together; those with the
        largest saliency of all layers together, each layer's summing to one; by the cost of joins in the layers' trees; by
        GRAPE's greedy; or by silhouette. See :mod:`hcsmoe_core.methods.budget`.
    gamma : float
        Of GRAPE's entropy guard.
    guard : bool
        Leave super experts alone: :func:`hcsmoe_core.methods.saliency.super_experts`.
    share, compress_rank : float, int
        Share of the merged experts' weights that MC-SMoE's second step keeps (0: no such step), and the rank of its
        low-rank part (0: its usual one).
    """

    similarity: str = "expert-output"
    metric: str = ""
    group: str = "hierarchical"
    linkage: str = "average"
    largest: int = 0
    centres: object = "k-means++"
    group_limit: int = 0
    fuzzifier: float = 2.0
    saliency: str = "reap"
    loss: str = "squared"
    subsets: int = pruning.SUBSETS
    merge: str = "frequency"
    combine: str = "average"
    align: str = "none"
    features: str = "activations"
    ridge: float | None = None
    rank: float = 0.5
    pool: str = "members"
    refit: int | None = None
    router: str = "mapped"
    shape: str = "uniform"
    holdout: str = "auto"
    budget: str = "uniform"
    gamma: float = 0.1
    guard: bool = False
    share: float = 0.0
    compress_rank: int = 0

    def check(self):
        """Raise ValueError if a step is unknown or does not go with another."""
        choices = {
            "group": GROUPINGS,
            "linkage": clustering.LINKAGES,
            "merge": MERGES,
            "combine": (*combine, "residual"),
            "align": ALIGNMENTS,
            "features": NEURON_FEATURES,
            "pool": POOLS,
            "router": ROUTERS,
            "shape": residual.SHAPES,
            "holdout": residual.HOLDOUTS,
            "budget": budgets.BUDGETS,
            "saliency": pruning.SALIENCIES,
            "loss": pruning.LOSSES,
        }
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        similarity.metric_of(self.similarity, self.metric)
        if self.group == "hierarchical" and self.linkage == "ward" and self.used_metric != "euclidean":
            raise InputError(
                f'linkage "ward" needs Euclidean distances, but those by {self.similarity!r} are {self.used_metric}; use '
                'metric "euclidean" with "expert-output", "functional", "weight" or "router-logits", or linkage "average".'
            )
        if self.group in ("k-means", "fuzzy") and self.used_metric not in similarity.EMBEDDED:
            raise InputError(
                f'group "{self.group}" needs points, but distances by {self.similarity!r} are {self.used_metric}; use '
                'another similarity, or group "hierarchical".'
            )
        if (self.group == "none") != (self.combine == "trimming"):
            raise InputError(
                'combine "trimming" goes with group "none" and with no other, and it with no other rule.'
            )
        if self.group == "none" and (self.guard or self.budget != "uniform" or self.router != "mapped"):
            raise InputError(
                'combine "trimming" keeps the router and every expert at one width: router must be "mapped", budget "uniform" '
                "and guard off."
            )
        if (self.group == "residual") != (self.combine == "residual"):
            raise InputError(
                'combine "residual" goes with group "residual" and with no other, and it with no other rule.'
            )
        if self.group == "residual" and (self.guard or self.budget != "uniform" or self.share):
            raise InputError(
                'group "residual" gives each layer as many bytes and chooses what to do with every expert: budget must be '
                '"uniform", guard off and share 0.'
            )
        if (self.group == "prune") != (self.router == "dropped"):
            raise InputError(
                'router "dropped" goes with group "prune" and with no other, and it with no other router.'
            )
        if self.budget == "saliency" and (self.group != "prune" or self.saliency == "o-prune"):
            raise InputError(
                'budget "saliency" goes with group "prune" and a saliency that scores each expert.'
            )
        if self.budget in ("merge-cost", "silhouette") and self.used_metric == "mixed":
            raise InputError(f'budget "{self.budget}" needs one similarity; not {self.similarity!r}.')
        if self.group == "fuzzy" and (self.combine != "average" or self.align != "none"):
            raise InputError('group "fuzzy" mixes all experts: combine must be "average" and align "none".')
        if self.refit is not None:
            check_count("refit", self.refit, 0)
        if self.refit and (self.group in ("prune", "fuzzy") or self.share):
            raise InputError(
                '"refit" fits experts that are joined or trimmed: it goes with no pruning, fuzzy groups or share.'
            )
        if self.share and not 0 < self.share < 1:
            raise InputError(
                f'The "share" argument must be above 0 and below 1, or 0 for no second step; not {self.share}.'
            )
        if self.share and self.group == "none":
            raise InputError('MC-SMoE\'s second step ("share") does not go with combine "trimming".')

    @property
    def used_metric(self):
        """The metric that distances come in."""
        return similarity.metric_of(self.similarity, self.metric)

    @property
    def compares(self):
        """Whether distances between experts are looked at."""
        return self.group in ("hierarchical", "k-means", "single-shot", "fuzzy") or self.budget in (
            "merge-cost",
            "grape",
            "silhouette",
        )

    def combination(self):
        """``combine`` of the plan's layers: the rule with its options."""
        made = {"rule": self.combine}
        for option, usual in options_of(self.combine).items():
            value = getattr(self, option)
            made[option] = usual if value is None else value
        if self.refit or self.combine == "residual":
            made["refit"] = REFIT if self.refit is None else self.refit
        return made

    def needs(self):
        """What it needs of the statistics, in the order of :data:`hcsmoe_core.statistics.NEEDS`."""
        needed = {"usage"}
        if self.compares:
            for name, _ in similarity.parts_of(self.similarity):
                needed |= set(similarity.NEEDED[name])
        if self.group == "prune":
            needed |= set(pruning.NEEDED[self.saliency])
        if self.guard:
            needed.add("norms")
        if self.group == "residual":
            needed |= {"grams", "sample"}
        if (
            (self.combine != "residual" and uses_sample(self.combination()))
            or self.share
            or self.router == "folded"
        ):
            needed.add("sample")
        return tuple(n for n in ("usage", "outputs", "norms", "grams", "sample") if n in needed)

    @property
    def uses_chance(self):
        """Whether the plan depends on its seed."""
        if self.group == "prune":
            return self.saliency in ("random", "o-prune")
        return self.group in ("random", "fuzzy") or (self.group == "k-means" and self.centres == "k-means++")

    def plain(self):
        """The same steps, with those that make no difference as they are by default: equal ones make the same plan."""
        used = _settings_of(self) | self.combination()
        used |= {"share": self.share, "compress_rank": self.compress_rank} if self.share else {}
        usual = {f.name: f.default for f in fields(Steps)}
        used["combine"] = self.combine
        if self.budget in ("merge-cost", "grape", "silhouette"):
            used["linkage"] = self.linkage
        used["centres"] = _text_of(self.centres) if "centres" in used else usual["centres"]
        return Steps(**{name: used.get(name, default) for name, default in usual.items()})

    def needs_model(self):
        """Whether the experts' weights are looked at to make a plan (merging always does)."""
        compared = [name for name, _ in similarity.parts_of(self.similarity)] if self.compares else []
        return (
            self.group == "residual"
            or any(name in similarity.FROM_MODEL for name in compared)
            or (self.group == "prune" and self.saliency == "o-prune")
        )


@dataclass(frozen=True)
class Method:
    """A method of the literature, or one of ours, in its steps.

    Attributes
    ----------
    title : str
        What it does, in a line.
    paper : str
    steps : Steps
    cost : str
        What making a plan and merging cost, beside the capture.
    """

    title: str
    paper: str
    steps: Steps = field(default_factory=Steps)
    cost: str = "milliseconds"

    @property
    def needs(self):
        """What it needs of the statistics."""
        return self.steps.needs()


def _prune(saliency, **steps):
    return Steps(group="prune", router="dropped", saliency=saliency, **steps)


def options_of(rule):
    """Usual options of a combination."""
    return (
        {name: usual for name, usual in combine[rule].options.items() if name != "width"}
        if rule in combine
        else {}
    )


HC_SMOE = "HC-SMoE, ICML 2025, arXiv 2410.08589"


M_SMOE = Steps(
    similarity="router-logits", metric="cosine", group="single-shot", align="weights", budget="frequency"
)


SOLVE = "one solve of I×I a group, on the sample"


METHODS = {
    "hc-smoe": Method("hierarchical clustering of mean outputs, weighted average", HC_SMOE),
    "k-means": Method("k-means of mean outputs (the paper's ablation)", HC_SMOE, Steps(group="k-means")),
    "fuzzy": Method(
        "fuzzy c-means of mean outputs, every expert mixed by membership", HC_SMOE, Steps(group="fuzzy")
    ),
    "random": Method("random groups (the paper's control)", HC_SMOE, Steps(group="random")),
    "fix-dom": Method(
        "HC-SMoE's groups, neurons sent to the dominant expert's",
        HC_SMOE,
        Steps(combine="fix-dom"),
        "I² a pair, on the sample",
    ),
    "zipit": Method(
        "HC-SMoE's groups, the most correlated neurons joined",
        HC_SMOE,
        Steps(combine="zipit"),
        "(n·I)² a group, on the sample",
    ),
    "m-smoe": Method(
        "groups around dominant experts by router logits, aligned average",
        "M-SMoE, ICLR 2024, arXiv 2310.01334",
        M_SMOE,
        "one assignment of I×I an expert",
    ),
    "mc-smoe": Method(
        "M-SMoE, then each matrix as low rank plus rows",
        "MC-SMoE, ICLR 2024, arXiv 2310.01334 (without its training)",
        replace(M_SMOE, share=0.5),
        "one SVD a matrix, on the sample",
    ),
    "dek": Method(
        "hierarchical clustering by CKA of outputs, experts and router rows averaged",
        "DEK, ACL Findings 2025, arXiv 2407.09590",
        Steps(similarity="cka", merge="average", router="averaged"),
        "E² products of D×D a layer, on the sample",
    ),
    "sub-moe": Method(
        "k-means by mean cosine of outputs, joint SVD",
        "Sub-MoE, AAAI 2026, arXiv 2506.23266",
        Steps(similarity="pairwise-cosine", group="k-means", combine="joint-svd"),
        "one SVD a group and matrix",
    ),
    "grape": Method(
        "non-uniform budgets by redundancy with an entropy guard, most similar pairs joined",
        "GRAPE, 2026, arXiv 2604.06542",
        Steps(similarity="cka", linkage="single", budget="grape"),
        "E² products of D×D a layer, on the sample",
    ),
    "mergemoe": Method(
        "clusters by weights, down projection by least squares",
        "MergeMoE, 2025, arXiv 2510.14436",
        Steps(similarity="weight", metric="cosine", combine="least-squares"),
        SOLVE,
    ),
    "hc-least-squares": Method(
        "HC-SMoE's groups, down projection by least squares",
        "this project",
        Steps(combine="least-squares"),
        SOLVE,
    ),
    "functional": Method(
        "hierarchical clustering by outputs token by token, least squares",
        "this project",
        Steps(similarity="functional-routed", combine="least-squares"),
        SOLVE,
    ),
    "selection": Method(
        "HC-SMoE's groups, the best I of their neurons chosen",
        "this project",
        Steps(combine="selection"),
        "greedy choice among n·I neurons a group, on the sample",
    ),
    "trimming": Method(
        "no groups: every expert keeps the best share of its own neurons",
        "this project",
        Steps(group="none", combine="trimming"),
        "greedy choice among I neurons an expert, on the sample",
    ),
    "least-residual": Method(
        "for each layer and group what leaves the smallest residual on held-out tokens",
        "this project",
        Steps(group="residual", combine="residual"),
        "some solves of I×I and a greedy choice among (n+1)·I neurons for each group that is tried, on the sample",
    ),
    "f-prune": Method(
        "the experts used least are dropped, over all layers",
        HC_SMOE + " (baseline)",
        _prune("frequency", budget="frequency"),
    ),
    "s-prune": Method(
        "the experts with the lowest router scores are dropped, over all layers",
        HC_SMOE + " (baseline)",
        _prune("score", budget="saliency"),
    ),
    "o-prune": Method(
        "the experts are dropped whose loss changes the layer's output least",
        "NAEE, ACL 2024, arXiv 2402.14800",
        _prune("o-prune"),
        "every subset up to 16 experts, else 100,000 and a search, on the sample",
    ),
    "reap": Method(
        "experts with the lowest mean gated output are dropped",
        "REAP, ICLR 2026, arXiv 2510.13999",
        _prune("reap"),
    ),
    "ean": Method(
        "experts with the lowest sum of output norms are dropped", "in REAP, arXiv 2510.13999", _prune("ean")
    ),
    "man": Method(
        "experts with the lowest mean output norm are dropped", "MAN, 2026, arXiv 2606.15716", _prune("man")
    ),
    "random-prune": Method("random experts are dropped (a control)", "-", _prune("random")),
}


for _name, _method in METHODS.items():
    METHOD_TABLE.add(_name, _method)


REFIT = 2  # rounds in which what neurons read is fitted, of grouping by residual


RECOMMENDED = "recommended"


POINTS_TO = "least-residual"


def named(method):
    """A method's own name: ``"recommended"`` points to one."""
    return POINTS_TO if method == RECOMMENDED else method


def kind_of(method):
    """What a method does to experts: "prunes", "trims", "averages" them, or "refits" what it joins to what they did."""
    steps = METHODS[named(method)].steps
    if steps.group == "prune":
        return "prunes"
    if steps.group == "none":
        return "trims"
    return "refits" if steps.combine in ("least-squares", "selection", "residual") else "averages"


def steps_of(method, **settings):
    """Steps of a method, with some of them set otherwise.

    Parameters
    ----------
    method : str
        Of :data:`METHODS`, or :data:`RECOMMENDED`.
    **settings
        Fields of :class:`Steps`.

    Returns
    -------
    Steps

    Raises
    ------
    ValueError
        If the method or a setting is unknown, or steps do not go together.
    """
    check_choice("method", method, (*METHODS, RECOMMENDED))
    known = {f.name for f in fields(Steps)}
    for name in settings:
        check_choice("setting", name, tuple(sorted(known)))
    steps = replace(METHODS[named(method)].steps, **settings)
    steps.check()
    return steps


def settings_from(items, *, option="steps"):
    """Steps written as ``name=value``, such as ``["budget=merge-cost", "guard=on", "centres=0,3"]``.

    Parameters
    ----------
    items : sequence of str
    option : str
        What errors call them.

    Returns
    -------
    dict
        For :func:`steps_of` and :func:`make_plan`.

    Raises
    ------
    ValueError
        If there is no such step, or the value is not of its kind.
    """
    usual, found = {f.name: f.default for f in fields(Steps)}, {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or name not in usual:
            raise InputError(f"{option} takes name=value with a name of {', '.join(usual)}; not {item!r}.")
        found[name] = _value_of(option, name, value, usual[name])
    return found


def _value_of(option, name, text, usual):
    """A step's value of the kind that it has."""
    if name == "centres" and text[:1].isdigit():
        return [int(c) for c in text.split(",")]
    if isinstance(usual, bool):
        if text not in ("on", "off", "true", "false"):
            raise InputError(f"{option} {name} takes on or off; not {text!r}.")
        return text in ("on", "true")
    kind = {"ridge": float, "refit": int}.get(name, type(usual))
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{option} {name} takes a number; not {text!r}.") from None


def settings_text(settings):
    """Steps as :func:`settings_from` reads them, separated by spaces."""
    return " ".join(f"{name}={_text_of(value)}" for name, value in sorted(settings.items()))


def _text_of(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def needs_of(method, **settings):
    """What a method needs of the statistics: names of :data:`hcsmoe_core.statistics.NEEDS`."""
    return steps_of(method, **settings).needs()


def method_table():
    """Every method in lines of text: its steps, what it needs of the statistics, its cost and its paper."""
    lines = []
    for name, method in METHODS.items():
        steps = method.steps
        made = [steps.group if steps.group != "none" else "no groups"]
        if steps.group == "hierarchical":
            made[0] += f" ({steps.linkage})"
        if steps.compares:
            made.insert(0, f"{steps.similarity} ({steps.used_metric})")
        if steps.group == "prune":
            made = [f"prune by {steps.saliency}"]
        elif steps.group == "residual":
            made = [f"{steps.shape} shape, groups and rules by residual"]
        else:
            aligned = f", aligned by {steps.align}" if steps.align != "none" else ""
            weighted = f" by {steps.merge}" if steps.combine not in ("trimming", "selection") else ""
            made.append(steps.combine + weighted + aligned)
        made += [f"router {steps.router}", f"budget {steps.budget}"]
        made += [f"low rank plus rows, {steps.share:.0%} kept"] if steps.share else []
        lines += [f"{name}: {method.title}", *(["    also   " + RECOMMENDED] if name == POINTS_TO else [])]
        lines += [f"    steps  {' > '.join(made)}", f"    needs  {', '.join(steps.needs())}"]
        lines += [f"    cost   {method.cost}", f"    paper  {method.paper}"]
    return "\n".join(lines)


def make_plan(stats, model=None, *, experts, method="hc-smoe", seed=0, progress=True, **settings):
    """Decide which experts join or go in every layer; the model is not run.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel, optional
        Needed where weights are looked at (similarities ``"weight"`` and ``"cka"``, ``"o-prune"``); where given, checked
        to be the model of the statistics.
    experts : int or list of L int
        r: experts kept in each layer, from 1 to E; with a budget that is not uniform, their mean over the layers. A
        trimmed model keeps all experts, each at r / E of its width. A list gives each layer's number itself, and takes the
        place of a budget.
    method : str
        Of :data:`METHODS`, or ``"recommended"``: the one that was found to lose least.
    seed : int
        Of k-means, fuzzy c-means, random groups and searches.
    progress : bool
        Show a bar where it takes long.
    **settings
        Fields of :class:`Steps` that are to differ from the method's own, such as ``linkage="ward"``.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If a choice is unknown, steps do not go together, ``experts`` is out of range, the statistics lack what is needed
        or are another model's.
    """
    steps = steps_of(method, **settings)
    _check_needs(stats, model, steps, method)
    return _planned(_Maker(stats, model, steps, seed, progress), method, experts)


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
    ValueError
        As :func:`make_plan`.
    """
    steps = steps_of(method, **settings)
    _check_needs(stats, model, steps, method)
    maker = _Maker(stats, model, steps, seed, progress)
    maker.cuts = {}
    for link in linkages or [steps.linkage]:
        maker.steps = steps_of(method, **settings | {"linkage": link})
        for count in experts:
            yield _planned(maker, method, count)


def _check_needs(stats, model, steps, method):
    """Raise ValueError unless the statistics hold what the steps look at, and the model is there if they do at it."""
    stats.check([n for n in steps.needs() if n != "sample" or steps.needs_model()], f"Method {method!r}")
    if model is not None:
        check_statistics(stats, model)
    elif steps.needs_model():
        raise InputError(
            f'Method {method!r} looks at the experts\' weights with these settings; give the "model" argument.'
        )


def _planned(maker, method, experts):
    """The plan that a maker's steps give for some number of experts."""
    stats, steps = maker.stats, maker.steps
    sizes = [sums.num_experts for sums in stats.layers.values()]
    if isinstance(experts, list):
        _check_counts_given(experts, sizes, steps)
    else:
        check_count("experts", experts, 1, min(sizes))
    protected = pruning.super_experts(stats) if steps.guard else {name: [] for name in stats.layers}
    if steps.group == "none":
        layers = [_trimmed(name, sums, stats, steps, experts) for name, sums in stats.layers.items()]
    elif steps.group == "residual":
        layers = maker.judged(experts)
    else:
        counts = experts if isinstance(experts, list) else maker.counts(experts, protected)
        layers = [maker.layer(n, c, protected[n]) for n, c in zip(stats.layers, counts, strict=True)]
    used = _settings_of(steps)
    compress = {"share": steps.share, "rank": steps.compress_rank or None} if steps.share else None
    about = {"method": named(method), "experts": experts, "seed": maker.seed} | used
    return Plan(layers, about, dict(stats.model), stats.identity(), compress)


def _check_counts_given(counts, sizes, steps):
    """Raise ValueError unless each layer can keep the experts that it is given."""
    if len(counts) != len(sizes):
        raise InputError(
            f'The "experts" argument lists {len(counts)} numbers for {len(sizes)} MoE layers; give one for each.'
        )
    for count, size in zip(counts, sizes, strict=True):
        check_count("experts", count, 1, size)
    if steps.budget != "uniform" or steps.group in ("none", "residual"):
        raise InputError(
            'The "experts" argument may be a list only where budget is "uniform", and not for trimming (group "none") or '
            'group "residual", which change widths.'
        )


def _settings_of(steps):
    """The steps that matter, for the plan's settings."""
    skipped = {"share", "compress_rank", "combine", "align", "features", "ridge", "rank", "pool", "refit"}
    if not steps.compares:
        skipped |= {"similarity", "metric"}
    for other, names in _ONLY.items():
        if steps.group != other:
            skipped |= set(names)
    if steps.budget != "grape":
        skipped.add("gamma")
    if steps.group != "residual":
        skipped |= {"shape", "holdout"}
    if steps.group in ("prune", "none"):
        skipped.add("merge")
    if steps.saliency != "o-prune":
        skipped |= {"loss", "subsets"}
    used = {f.name: getattr(steps, f.name) for f in fields(Steps) if f.name not in skipped}
    if steps.compares:
        used["metric"] = steps.used_metric
    return used | {"combine": steps.combination()}


_ONLY = {
    "hierarchical": ("linkage", "largest"),
    "k-means": ("centres",),
    "single-shot": ("group_limit",),
    "fuzzy": ("fuzzifier",),
    "prune": ("saliency", "loss", "subsets"),
}


def _dominant(labels, sums):
    """The expert of each group that is used most; the first of equals."""
    usage = sums.usage_count.sum(0).numpy()
    return [int(max(np.flatnonzero(labels == g), key=lambda e: usage[e])) for g in range(labels.max() + 1)]


def _trimmed(name, sums, stats, steps, experts):
    """Every expert alone, at r / E of its width."""
    width = stats.model["layers"][name]["width"] * experts // sums.num_experts
    if width < 1:
        raise InputError(
            f'The "experts" argument is {experts}: {name} would be trimmed to no neuron at all; keep more.'
        )
    labels = list(range(sums.num_experts))
    return LayerPlan(name, labels, [1.0] * len(labels), combine=steps.combination(), width=width)


class _Maker:
    """Makes each layer's plan; what several layers or steps look at is worked out once."""

    def __init__(self, stats, model, steps, seed, progress):
        self.stats, self.model, self.steps = stats, model, steps
        self.seed, self.progress = seed, progress
        self.found, self.cuts = {}, None
        self.places = {name: place for place, name in enumerate(stats.layers)}

    def distances(self, name):
        """Condensed distances between a layer's experts."""
        if name not in self.found:
            how = dict(similarity=self.steps.similarity, metric=self.steps.metric, model=self.model)
            self.found[name] = similarity.distances(self.stats, name, **how)
        return self.found[name]

    def tree(self, name):
        """Merge tree of a layer's experts."""
        return clustering.linkage(self.distances(name), self.steps.linkage, metric=self.steps.used_metric)

    def _among(self, name, free):
        """Condensed distances between some of a layer's experts."""
        return squareform(squareform(self.distances(name))[np.ix_(free, free)], checks=False)

    def _cut(self, name, free, count):
        """Labels of the experts that may be joined, by their merge tree; all cuts at once where several are to come."""
        key = name, self.steps.linkage, free.tobytes()
        if self.cuts is not None and key in self.cuts:
            return self.cuts[key][count - 1]
        tree = clustering.linkage(self._among(name, free), self.steps.linkage, metric=self.steps.used_metric)
        if self.cuts is None:
            return clustering.cut(tree, count)
        self.cuts[key] = clustering.cuts(tree)
        return self.cuts[key][count - 1]

    def likeness(self, name):
        """Square matrix, larger for experts that are more alike: cosines where these are what is measured."""
        distance = squareform(self.distances(name))
        return 1 - distance if self.steps.used_metric in ("cosine", "cka") else -distance

    def counts(self, experts, protected):
        """Experts kept in each layer; the same in all for every budget."""
        steps, stats, names = self.steps, self.stats, list(self.stats.layers)
        most = [stats.layers[n].num_experts for n in names]
        least = [self._fewest(size, protected[n]) for n, size in zip(names, most, strict=True)]
        total = experts * len(names)
        if total < sum(least):
            raise InputError(
                f'The "experts" argument is {experts}, {total} in all, but at least {sum(least)} must be kept: in each '
                "layer its super experts, if the guard is on, and one more, or as many more as the largest group allows."
            )
        if steps.budget == "uniform":
            counts = budgets.uniform(experts, least, most)
        elif steps.budget in ("frequency", "saliency"):
            scores = [stats.layers[n].frequency.numpy() for n in names]
            if steps.budget == "saliency":
                scores = [pruning.saliency(stats, n, steps.saliency, seed=self.seed) for n in names]
                scores = [s / (s.sum() or 1) for s in scores]
            counts = budgets.by_score(scores, total, least)
        elif steps.budget == "merge-cost":
            how = dict(similarity=steps.similarity, metric=steps.metric, model=self.model)
            scales = [similarity.scale_of(stats, n, **how) for n in names]
            counts = budgets.by_merge_cost([self.tree(n) for n in names], scales, total, least)
        elif steps.budget == "grape":
            counts = budgets.grape([self._redundancy(n) for n in names], total, least, gamma=steps.gamma)
        else:
            condensed = [self.distances(n) for n in names]
            counts = budgets.by_silhouette(condensed, [self.tree(n) for n in names], total, least, most)
        return budgets.check_counts(counts, total, least, most)

    def _fewest(self, size, protected):
        """Experts that a layer must keep: the protected ones, and groups enough for the others."""
        limit = {"hierarchical": self.steps.largest, "single-shot": self.steps.group_limit}.get(
            self.steps.group
        )
        if (
            self.steps.budget == "uniform"
        ):  # what is not feasible is refused where it is grouped, with what would be
            limit = 0
        return min(len(protected) + (-(-(size - len(protected)) // limit) if limit else 1), size)

    def _redundancy(self, name):
        """Similarities from 0 to 1, as GRAPE sums them up."""
        if self.steps.used_metric in ("cosine", "cka"):
            return np.clip(self.likeness(name), 0, None)
        distance = squareform(self.distances(name))
        largest = max(float(self.distances(n).max(initial=0)) for n in self.stats.layers)
        return 1 - distance / largest if largest > 0 else np.ones_like(distance)

    def judged(self, experts):
        """Plans of all layers by what each way of making them smaller leaves on held-out tokens."""
        decides, names = (
            residual.held_out(self.stats.sampled, self.steps.holdout, self.stats.domains),
            list(self.stats.layers),
        )

        def judge_of(name):
            return residual.Judge(
                moe_layer(self.model, name), self.stats.layers[name], decides, self.steps.merge
            )

        hidden, rounds = None if self.progress else True, self.steps.combination()["refit"]
        bar = tqdm(names, desc="plan", unit="layer", disable=hidden)
        ways = residual.chosen_ways(
            [judge_of(name).ways(self.stats, self.model, experts) for name in bar], self.steps.shape
        )
        bar = tqdm(names, desc="refit", unit="layer", disable=hidden)
        refitted = [judge_of(name).refitted(way, rounds) for name, way in zip(bar, ways, strict=True)]
        return [self._of_way(name, way) for name, way in zip(names, refitted, strict=True)]

    def _of_way(self, name, way):
        joined = way.labels.max() + 1 < len(way.labels)
        return LayerPlan(
            name,
            way.labels.tolist(),
            way.weights.tolist(),
            router=self.steps.router if joined else "mapped",
            width=way.width if way.width < self.stats.model["layers"][name]["width"] else None,
            dominant=_dominant(way.labels, self.stats.layers[name]) if joined else None,
            rules=way.rules,
        )

    def layer(self, name, count, protected):
        """Plan of one layer that keeps ``count`` experts, the protected among them as they are."""
        if self.steps.group == "prune":
            return self._pruned(name, count, protected)
        sums = self.stats.layers[name]
        free = np.array([e for e in range(sums.num_experts) if e not in protected], dtype=np.int64)
        grouped, memberships = self._grouped(name, free, count - len(protected))
        labels = np.empty(sums.num_experts, dtype=np.int64)
        labels[free] = grouped
        labels[list(protected)] = count - len(protected) + np.arange(len(protected))
        labels = clustering.by_first_appearance(labels)
        weights = merge_weights(labels, sums, self.steps.merge)
        mixture = None
        if memberships is not None:
            share = np.zeros((count, sums.num_experts))
            share[labels[list(protected)], list(protected)] = 1
            _, first = np.unique(grouped, return_index=True)
            share[np.ix_(labels[free[first]], free)] = memberships
            share *= merge_weights(np.zeros_like(labels), sums, self.steps.merge)
            mixture = (share / share.sum(1, keepdims=True)).tolist()
        options, dominant = self.steps.combination(), None
        matched = options.get("align", "none") != "none" or options["rule"] in ("fix-dom", "selection")
        if matched or self.steps.router == "row-kept":
            dominant = _dominant(labels, sums)
        return LayerPlan(
            name,
            labels.tolist(),
            weights.tolist(),
            combine=options,
            router=self.steps.router,
            mixture=mixture,
            dominant=dominant,
            protected=list(protected),
        )

    def _grouped(self, name, free, count):
        """Labels of the experts that may be joined, and their memberships where groups are soft."""
        steps, sums = self.steps, self.stats.layers[name]
        check_count("experts", count, 1 if len(free) else 0, len(free))
        if not len(free):
            return free, None
        if steps.group == "hierarchical" and not steps.largest:
            return self._cut(name, free, count), None
        seed = np.random.SeedSequence([self.seed, self.places[name]]).generate_state(1)[0]
        # Whatever is drawn by chance is drawn in an order that does not depend on how experts are numbered.
        rank = np.argsort(np.argsort(pruning.canonical_rank(sums)[free]))
        order = np.argsort(rank)
        if steps.group == "random":
            return grouping.random_groups(len(free), count, seed=seed)[rank], None
        condensed = self._among(name, free)
        if steps.group == "hierarchical":
            how = dict(method=steps.linkage, metric=steps.used_metric)
            return grouping.restricted(condensed, count, steps.largest, **how), None
        if steps.group == "single-shot":
            usage = sums.usage_count.sum(0).numpy()[free]
            likeness = self.likeness(name)[np.ix_(free, free)]
            return grouping.single_shot(likeness, usage, count, group_limit=steps.group_limit)[0], None
        points = similarity.coordinates(condensed, steps.used_metric)
        if steps.group == "fuzzy":
            labels, memberships = grouping.fuzzy_cmeans(
                points[order], count, fuzzifier=steps.fuzzifier, seed=seed
            )
            labels, memberships = labels[rank], memberships[:, rank]
            _, first = np.unique(labels, return_index=True)
            return clustering.by_first_appearance(labels), memberships[np.argsort(first)]
        if isinstance(steps.centres, str) and steps.centres == "k-means++":
            return grouping.kmeans(points[order], count, seed=seed)[rank], None
        return grouping.kmeans(points, count, centres=steps.centres), None

    def _pruned(self, name, count, protected):
        """The ``count`` experts that are worth most, the protected among them."""
        sums, groups = self.stats.layers[name], self.stats.model["layers"][name]["router_groups"]
        if self.steps.saliency == "o-prune":
            kept = self._least_loss(name, count, protected)
        else:
            worth = pruning.saliency(self.stats, name, self.steps.saliency, seed=self.seed).copy()
            worth[list(protected)] = np.inf
            kept = _best_of_groups(worth, count, groups, name)
        labels = np.full(sums.num_experts, DROPPED)
        labels[kept] = np.arange(count)
        weights = (labels != DROPPED).astype(float)
        return LayerPlan(name, labels.tolist(), weights.tolist(), router="dropped", protected=list(protected))

    def _least_loss(self, name, count, protected):
        sums, steps = self.stats.layers[name], self.steps
        layer = moe_layer(self.model, name)
        sample, experts = sums.sample, sums.num_experts
        rule = pruning.routing_rule(sample, layer)
        tokens = min(len(sample.inputs), pruning.LOSS_TOKENS)
        grams, sequences = pruning.output_grams(layer, sample.inputs[:tokens]), self.stats.sampled[:, 0]
        many = experts > pruning.ENUMERATED

        def loss_on(tokens):
            part = type(sample)(*(getattr(sample, f.name)[:tokens] for f in fields(sample)))
            how = dict(
                loss=steps.loss, sequences=sequences[:tokens], dtype=torch.float32 if many else torch.float64
            )
            return pruning.DropLoss(grams[:tokens], part, rule, **how)

        how = dict(
            protected=protected,
            subsets=steps.subsets,
            seed=[self.seed, self.places[name]],
            progress=self.progress,
        )
        rough = loss_on(pruning.TOKENS) if many else None
        return pruning.best_kept(loss_on(tokens), experts, count, rough=rough, **how)


def _best_of_groups(worth, count, groups, name):
    """The most worthy experts, in order; as many from each of the groups that the router chooses among."""
    if count % groups:
        raise InputError(
            f'The "experts" argument leaves {count} experts in {name}, whose router chooses among {groups} groups of experts '
            f"that must stay of one size; keep a multiple of {groups}."
        )
    size, kept = len(worth) // groups, []
    for group in range(groups):
        part = worth[group * size : (group + 1) * size]
        if np.isinf(part).sum() > count // groups:
            raise InputError(
                f'The "experts" argument leaves {count // groups} experts in each group that the router of {name} chooses '
                f"among, but {np.isinf(part).sum()} of one must be kept; keep more experts, or switch the guard off."
            )
        kept += (group * size + np.argsort(-part, kind="stable")[: count // groups]).tolist()
    return sorted(kept)


def merge_tree(stats, layer, *, similarity="expert-output", metric="", linkage="average", model=None):
    """Merge tree of one layer, from its statistics: :func:`hcsmoe_core.similarity.distances`, then
    :func:`hcsmoe_core.clustering.linkage`.
    """
    condensed = _distances(stats, layer, similarity=similarity, metric=metric, model=model)
    return clustering.linkage(condensed, linkage, metric=_metric_of(similarity, metric))


_distances, _metric_of = similarity.distances, similarity.metric_of  # merge_tree's parameter hides the module
