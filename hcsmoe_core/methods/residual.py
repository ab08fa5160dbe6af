"""Candidate compressions of a layer, scored by held-out output error.

What is best to do with a group of experts depends on the group: near-copies can be averaged, others are
better refitted, or made of a choice of their neurons, or left apart with fewer neurons each. All of these
take as many bytes, and the sample of layer inputs tells which loses least.
"""

import functools
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from hcsmoe_core import merging, plan, similarity, statistics, steps
from hcsmoe_core._util import require
from hcsmoe_core.methods import grouping, summary

SIMILARITIES = ("weight", "functional-routed")  # tried for the groups of a layer: the one that leaves less
RIDGES = (0.001, 0.01, 0.1)
TOKENS = 8192  # of the sample that are looked at, at least
EACH = 4  # tokens routed to an expert that are looked at for each of its neurons, at least
POOLED = 1 << 15  # neurons that are chosen from at most; above, the members' own without their averages
AVERAGE = {"rule": "average", "align": "none"}


@steps.group(
    "residual",
    needs=("grams", "sample"),
    uses=("merge", "combine"),
    pair={"combine": "residual"},
    only={"budget": "uniform", "guard": False, "compress": ""},
    because="it gives each layer as many bytes and chooses what to do with every expert",
    whole=True,
    widths=True,
    weights=True,
    refit=2,
    kind="refits",
)
def least_residual(
    layers,
    counts,
    *,
    shape: Literal["uniform", "by-layer", "whole"] = "uniform",
    holdout: Literal["auto", "sequences", "domains"] = "auto",
):
    """The numbers of experts, widths, groups and rules that leave the smallest error on held-out tokens.

    ``shape`` is one number of experts and one width in all layers, each layer's own, or whole experts; for
    ``holdout`` see :func:`held_out`. What neurons read is fitted too, in ``refit`` rounds, where that leaves
    less.
    """
    recipe, stats, model = layers[0].recipe, layers[0].stats, layers[0].model
    decides = held_out(stats.sampled, holdout, stats.domains)

    def scorer(layer):
        return Scorer(layer.moe, layer.sums, decides, recipe.steps["merge"])

    bar = functools.partial(tqdm, unit="layer", disable=None if layers[0].progress else True)
    candidates = [
        scorer(layer).candidates(stats, model, count)
        for layer, count in zip(bar(layers, desc="plan"), counts, strict=True)
    ]
    best, rounds = best_candidates(candidates, shape), recipe.by_kind["refine"]["refit"]
    return [
        _planned(layer, scorer(layer).refitted(candidate, rounds))
        for layer, candidate in zip(bar(layers, desc="refit"), best, strict=True)
    ]


def _planned(layer, candidate):
    joins = candidate.labels.max() + 1 < len(candidate.labels)
    return plan.LayerPlan(
        layer.name,
        candidate.labels.tolist(),
        candidate.weights.tolist(),
        router=layer.recipe.steps["router"] if joins else "mapped",
        width=candidate.width if candidate.width < layer.width else None,
        dominant=layer.dominant(candidate.labels) if joins else None,
        rules=candidate.rules,
    )


@dataclass(frozen=True)
class Candidate:
    """One compression of a layer.

    Attributes
    ----------
    labels : (E,) int64 array
        Group of each expert, numbered by first appearance.
    weights : (E,) float64 array
        Of each expert in its group.
    width : int
        Neurons of each new expert.
    rules : list of dict, or None
        Of each group, how it becomes one expert: options of :func:`hcsmoe_core.merging.combine_group`; None
        for averages.
    residual : float
        Squared error of the layer's output on tokens that were held out, relative to the output itself,
        before what neurons read is fitted; errors of different groups are taken to be uncorrelated.
    """

    labels: np.ndarray
    weights: np.ndarray
    width: int
    rules: list
    residual: float


def shapes(experts, count, width):
    """Numbers of experts, and of neurons in each, that take no more bytes than ``count`` whole experts.

    Parameters
    ----------
    experts : int
        E.
    count : int
        r: its doubles up to E, and E itself, are the numbers of experts.
    width : int
        I. Widths above 64 are rounded down to a multiple of 8, which kernels of grouped products ask for.

    Returns
    -------
    list of (int, int)
        The number of experts m and the width of each, at most ``r · I / m``.
    """
    doubles = [count << n for n in range(experts.bit_length()) if count << n < experts]
    pairs = [(m, width * count // m) for m in (*doubles, experts)]
    return [(m, w - w % 8 if 64 < w < width else w) for m, w in pairs if w >= 1]


def held_out(sampled, by, domains=()):
    """Which sampled tokens decide, and are not fitted to.

    Parameters
    ----------
    sampled : (R, 3) int64 tensor
        Of :class:`hcsmoe_core.statistics.Statistics`.
    by : {"auto", "sequences", "domains"}
        One in four of the sequences of each domain (of all together, where each domain has one alone), or all
        sequences of one in four domains: a choice that holds on text of another kind is more cautious, and
        falls back towards averages. ``"auto"`` takes domains where the text is of two or three, none of which
        the model wrote itself.
    domains : sequence of str
        Names of the domains.

    Returns
    -------
    (R,) bool tensor

    Raises
    ------
    ValueError
        If there are too few sequences or domains to hold one out.
    """
    sequence, domain = sampled[:, 0], sampled[:, 2]
    present = domain.unique().tolist()
    if by == "auto":  # what two or three domains say need not hold on others
        by = "domains" if len(present) in (2, 3) and statistics.OWN_TEXT not in domains else "sequences"
    if by == "domains":
        require(
            len(present) > 1,
            'The "holdout" argument cannot be "domains": the calibration tokens are of one domain; '
            'use "sequences", or a calibration source with several.',
        )
        return torch.isin(domain, torch.tensor(_one_in_four(present)))
    of_domain = [sequence[domain == one].unique() for one in present]
    several = [sequences for sequences in of_domain if len(sequences) > 1] or [sequence.unique()]
    require(
        len(several[0]) > 1,
        "To hold some out, the sample needs tokens of two calibration sequences; calibrate on more.",
    )
    return torch.isin(sequence, torch.cat([_one_in_four(sequences) for sequences in several]))


def _one_in_four(values):
    """Every fourth, or the last of fewer."""
    return values[min(len(values), 4) - 1 :: 4]


class Scorer:
    """Scores compressions of one layer.

    Parameters
    ----------
    layer : MoELayer
        Not merged.
    sums : LayerStatistics
        With its sample.
    decides : (R,) bool tensor
        Which tokens of the sample are held out: :func:`held_out`.
    merge : str
        Weights of averages: :func:`hcsmoe_core.methods.summary.merge_weights`.
    tokens : int
        Of the sample that are looked at, at most, as far as these tell the neurons of an expert apart.
    """

    def __init__(self, layer, sums, decides, merge, *, tokens=TOKENS):
        self.layer, self.sums, self.merge = layer, sums, merge
        self.usage = sums.usage_count.sum(0).numpy()
        tokens = max(tokens, EACH * layer.width * sums.num_experts // sums.sample.index.shape[1])
        looked_at = torch.arange(len(decides)) < tokens  # in the order of hashes, any part is a sample
        self.samples = [_rows(sums.sample, looked_at & rows) for rows in (~decides, decides)]
        self.fits = not layer.why_not_solvable and layer.neurons_known
        self._best = {}

    @functools.cached_property
    def energy(self):
        """Squared outputs of the layer on the tokens that decide; one expert at a time is looked at."""
        sample, total = self.samples[1], None
        for expert in range(self.sums.num_experts):
            alone = merging.Group(self.layer, [expert], {expert: 1.0}, expert, sample)
            outputs, rows = alone.outputs(), sample.chosen[:, expert].to(alone.device)
            total = outputs.new_zeros(len(rows), outputs.shape[1]) if total is None else total
            total[rows] += outputs
        return float(total.double().pow(2).sum())

    def candidates(self, stats, model, experts):
        """The best compression of each shape that takes the bytes of ``experts`` experts, by shape.

        Experts whose neurons cannot be told apart, or solved for, are averaged: by the groups of which the
        statistics of their outputs predict the smallest error.
        """
        return {
            (count, width): min(
                (self.candidate(labels, width) for labels in self._groupings(stats, model, count)),
                key=lambda candidate: candidate.residual,
            )
            for count, width in shapes(self.sums.num_experts, experts, self.layer.width)
            if self.fits or count == experts
        }

    def _groupings(self, stats, model, count):
        """Groups as even as can be, by each similarity; of E experts each is alone."""
        experts = self.sums.num_experts
        if count == experts:
            return [np.arange(experts)]
        compared = [(name, "cosine" if name == "weight" else "") for name in SIMILARITIES]
        return [
            grouping.restricted(
                similarity.distances(stats, self.layer.name, similarity=name, metric=metric, model=model),
                count,
                -(-experts // count),
                metric=similarity.metric_of(name, metric),
            )
            for name, metric in compared
        ]

    def candidate(self, labels, width):
        """The best rule for each group of a partition, and what all of them leave together."""
        weights = summary.merge_weights(labels, self.sums, self.merge)
        if not self.fits:
            return Candidate(labels, weights, width, None, summary.function_error(self.sums, labels) ** 2)
        scored = [self._scored(members, weights, width) for members in _groups(labels)]
        residual = sum(error for error, _ in scored) / self.energy if self.energy else 0.0
        return Candidate(labels, weights, width, [rule for _, rule in scored], residual)

    def _scored(self, members, weights, width):
        """Squared error and options of the best rule for one group."""
        key = tuple(members), width
        if key not in self._best:
            self._best[key] = self._least(members, weights, width, self._rules(members, width))
        return self._best[key]

    def _least(self, members, weights, width, rules):
        """Squared error and options of the rule that leaves least; the first of equals."""
        if len(members) == 1 and width == self.layer.width:
            return 0.0, AVERAGE
        dominant = max(members, key=lambda e: self.usage[e])
        fitted, scored = (
            merging.Group(self.layer, members, weights, dominant, sample) for sample in self.samples
        )
        narrow = {"width": width} if width < self.layer.width else {}
        tried = [
            (squared_error(scored, merging.combine_group(fitted, rule | narrow), rule), rule)
            for rule in rules
        ]
        return min(tried, key=lambda pair: pair[0])

    def refitted(self, candidate, rounds):
        """The same compression, with what neurons read fitted where that leaves less on held-out tokens.

        Candidates are compared without, as it takes longer than all else.
        """
        if not self.fits or not rounds:
            return candidate
        rules = [
            self._least(members, candidate.weights, candidate.width, [rule, rule | {"refit": rounds}])[1]
            for members, rule in zip(_groups(candidate.labels), candidate.rules, strict=True)
        ]
        return replace(candidate, rules=rules)

    def _rules(self, members, width):
        """What is tried for a group, the plainest first: it stays where nothing leaves less."""
        if len(members) == 1:
            return [{"rule": "trimming", "ridge": ridge} for ridge in RIDGES]
        pool = "averages" if (len(members) + 1) * self.layer.width <= POOLED else "members"
        chosen = [{"rule": "selection", "ridge": ridge, "pool": pool} for ridge in RIDGES]
        joined = [AVERAGE, *({"rule": "least-squares", "align": "none", "ridge": ridge} for ridge in RIDGES)]
        return joined + chosen if width == self.layer.width else chosen


def _groups(labels):
    """Members of each group."""
    return [np.flatnonzero(labels == group).tolist() for group in range(labels.max() + 1)]


def _rows(sample, chosen):
    return statistics.LayerSample(*(getattr(sample, f.name)[chosen] for f in fields(sample)))


@torch.no_grad()
def squared_error(group, expert, rule):
    """Squared error of one expert instead of a group, on the group's tokens."""
    hidden = (
        group.activations(expert)
        if rule.get("refit")  # else what neurons read does not depend on the ridge
        else group.once(("hidden", rule["rule"]), lambda: group.activations(expert))
    )
    return float((hidden @ expert.down.T - group.outputs(expert.offset)).double().pow(2).sum())


def best_candidates(candidates, shape):
    """One compression for each layer: of the one shape that leaves least in all, or each layer's own.

    Parameters
    ----------
    candidates : list of dict of (int, int) to Candidate
        Of each layer: :meth:`Scorer.candidates`.
    shape : {"uniform", "by-layer", "whole"}
        Engines that read the original family's checkpoints ask for one number of experts and one width in all
        layers; some families have shared experts of the same width, and take no other (``"whole"``: the first
        shape, of whole experts).

    Returns
    -------
    list of Candidate
    """
    if shape == "whole":
        return [next(iter(of_layer.values())) for of_layer in candidates]
    shared = [key for key in candidates[0] if all(key in of_layer for of_layer in candidates)]
    if shape == "uniform" and shared:
        best = min(shared, key=lambda key: sum(of_layer[key].residual for of_layer in candidates))
        return [of_layer[best] for of_layer in candidates]
    return [min(of_layer.values(), key=lambda candidate: candidate.residual) for of_layer in candidates]
