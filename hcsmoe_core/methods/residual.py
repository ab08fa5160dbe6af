"""Ways of making a layer smaller, judged by the residual that each leaves on sampled tokens that it was not fitted to.

What is best to do with a group of experts depends on the group: near-copies can be averaged, others are better refitted, or
made of a choice of their neurons, or left apart with fewer neurons each. All of these take as many bytes, and the sample of
layer inputs tells which loses least.
"""

import functools
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from hcsmoe_core import similarity
from hcsmoe_core._util import InputError
from hcsmoe_core.merging import Group
from hcsmoe_core.merging import combine_group as combine
from hcsmoe_core.methods import grouping as clustering
from hcsmoe_core.methods.summary import function_error
from hcsmoe_core.plan import merge_weights
from hcsmoe_core.statistics import LayerSample
from hcsmoe_core.text import own_text as owntext

HOLDOUTS = ("auto", "sequences", "domains")


FEW = 3  # domains: what so few say need not hold on others


SHAPES = ("uniform", "by-layer", "whole")


SIMILARITIES = (
    "weight",
    "functional-routed",
)  # that groups are made by, those of a layer by the one that leaves less


HELD_OUT = 4  # one in so many sequences, or domains, is held out


RIDGES = (0.001, 0.01, 0.1)


TOKENS, EACH = (
    8192,
    4,
)  # that decide, at most: so many, or for each neuron of an expert so many that are routed to it


# Neurons that are chosen from at most; where averages would make it more, the members' own are enough.
POOLED = 1 << 15


AVERAGE = {"rule": "average", "align": "none"}


@dataclass(frozen=True)
class Way:
    """One way of making a layer smaller.

    Attributes
    ----------
    labels : (E,) int64 array
        Group of each expert, numbered by first appearance.
    weights : (E,) float64 array
        Of each expert in its group.
    width : int
        Neurons of each expert that is made.
    rules : list of dict, or None
        Of each group, how it becomes one expert: options of :func:`hcsmoe_core.merging.combine`; None for averages.
    residual : float
        Squared error of the layer's output on tokens that were held out, relative to the output itself, before what neurons
        read is fitted; errors of different groups are taken to be uncorrelated.
    """

    labels: np.ndarray
    weights: np.ndarray
    width: int
    rules: list
    residual: float


def shapes(experts, kept, width):
    """Numbers of experts and of neurons in each that take no more bytes than ``kept`` whole experts.

    Parameters
    ----------
    experts : int
        E.
    kept : int
        r: its doubles up to E, and E itself, are the numbers of experts.
    width : int
        I. Widths above 64 are rounded down to a multiple of 8, which kernels of grouped products ask for.

    Returns
    -------
    list of (int, int)
        The number of experts m and the width of each, at most ``r · I / m``.
    """
    counts = [kept]
    while counts[-1] * 2 < experts:
        counts.append(counts[-1] * 2)
    if counts[-1] < experts:
        counts.append(experts)
    found = [(m, width * kept // m) for m in counts]
    return [(m, w - w % 8 if 64 < w < width else w) for m, w in found if w >= 1]


def held_out(sampled, by, domains=()):
    """Which sampled tokens decide, and are not fitted to.

    Parameters
    ----------
    sampled : (R, 3) int64 tensor
        Of :class:`hcsmoe_core.statistics.Statistics`.
    by : {"auto", "sequences", "domains"}
        One in four of the sequences of each domain (of all together, where each domain has one alone), or all sequences of
        one in four domains: a choice that holds on text of another kind is more cautious, and falls back towards averages.
        ``"auto"`` takes domains where the text is of two or three, none of which the model wrote itself.
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
    found = domain.unique().tolist()
    if by == "auto":
        by = "domains" if 2 <= len(found) <= FEW and owntext.NAME not in domains else "sequences"
    if by == "domains":
        if len(found) < 2:
            raise InputError(
                'The "holdout" argument cannot be "domains": the calibration tokens are of one domain; use "sequences", or a '
                "calibration source with several."
            )
        return torch.isin(domain, torch.tensor(found[HELD_OUT - 1 :: HELD_OUT] or found[-1:]))
    of_domain = [sequence[domain == one].unique() for one in found]
    if all(len(sequences) == 1 for sequences in of_domain):
        of_domain = [sequence.unique()]
    several = [sequences for sequences in of_domain if len(sequences) > 1]
    if not several:
        raise InputError(
            "To hold some out, the sample needs tokens of two calibration sequences at least; calibrate on more."
        )
    return torch.isin(
        sequence, torch.cat([s[HELD_OUT - 1 :: HELD_OUT] if len(s) >= HELD_OUT else s[-1:] for s in several])
    )


class Judge:
    """Tries ways of making one layer smaller.

    Parameters
    ----------
    layer : MoELayer
        Not merged.
    sums : LayerStatistics
        With its sample.
    decides : (R,) bool tensor
        Which tokens of the sample are held out: :func:`held_out`.
    merge : str
        Weights of averages: :func:`hcsmoe_core.plan.merge_weights`.
    tokens : int
        Of the sample that are looked at, at most, as far as these tell the neurons of an expert apart.
    """

    def __init__(self, layer, sums, decides, merge, *, tokens=TOKENS):
        self.layer, self.sums, self.merge = layer, sums, merge
        self.usage = sums.usage_count.sum(0).numpy()
        tokens = max(tokens, EACH * layer.width * sums.num_experts // sums.sample.index.shape[1])
        rows = (
            torch.arange(len(decides)) < tokens
        )  # the sample is in the order of hashes: any part of it is one
        self.samples = [_rows(sums.sample, rows & ~decides), _rows(sums.sample, rows & decides)]
        self.fits = not layer.unsolvable and layer.neurons_known
        self._found = {}

    @functools.cached_property
    def energy(self):
        """Squared outputs of the layer on the tokens that decide; one expert at a time is looked at, and held in float."""
        held, total = self.samples[1], None
        chosen = held.chosen
        for expert in range(self.sums.num_experts):
            alone = Group(self.layer, [expert], {expert: 1.0}, expert, held)
            outputs, rows = alone.outputs(), chosen[:, expert].to(alone.device)
            if total is None:
                total = outputs.new_zeros(len(chosen), outputs.shape[1])
            total[rows] += outputs
        return float(total.double().pow(2).sum())

    def ways(self, stats, model, kept):
        """The best way of each shape that takes the bytes of ``kept`` experts, by shape.

        Experts whose neurons cannot be told apart, or solved for, are averaged: by the groups of which the statistics of
        their outputs predict the smallest error.
        """
        found = {}
        for count, width in shapes(self.sums.num_experts, kept, self.layer.width):
            if self.fits or count == kept:
                tried = [self.way(labels, width) for labels in self._groupings(stats, model, count)]
                found[count, width] = min(tried, key=lambda way: way.residual)
        return found

    def _groupings(self, stats, model, count):
        """Groups as even as can be, by each similarity; of ``count`` experts or more each is alone."""
        experts, found = self.sums.num_experts, []
        if count == experts:
            return [np.arange(experts)]
        for name in SIMILARITIES:
            metric = "cosine" if name == "weight" else ""
            condensed = similarity.distances(
                stats, self.layer.name, similarity=name, metric=metric, model=model
            )
            how = dict(method="average", metric=similarity.metric_of(name, metric))
            labels = clustering.restricted(condensed, count, -(-experts // count), **how)
            if not any((labels == other).all() for other in found):
                found.append(labels)
        return found

    def way(self, labels, width):
        """The best rule for each group of a partition, and what all of them leave together."""
        weights = merge_weights(labels, self.sums, self.merge)
        if not self.fits:
            return Way(labels, weights, width, None, function_error(self.sums, labels) ** 2)
        judged = [
            self._judged(np.flatnonzero(labels == g).tolist(), weights, width)
            for g in range(labels.max() + 1)
        ]
        left = sum(residual for residual, _ in judged)
        return Way(
            labels, weights, width, [rule for _, rule in judged], left / self.energy if self.energy else 0.0
        )

    def _judged(self, members, weights, width):
        """Residual and options of the best rule for one group."""
        if len(members) == 1 and width == self.layer.width:
            return 0.0, AVERAGE
        key = tuple(members), width
        if key not in self._found:
            self._found[key] = self._least(members, weights, width, self._rules(members, width))
        return self._found[key]

    def _least(self, members, weights, width, rules):
        """Residual and options of the rule that leaves least; the first of equals."""
        dominant = max(members, key=lambda e: self.usage[e])
        fitted, held = (Group(self.layer, members, weights, dominant, sample) for sample in self.samples)
        narrow = {"width": width} if width < self.layer.width else {}
        tried = [(_left(held, combine(fitted, rule | narrow), rule), rule) for rule in rules]
        return min(tried, key=lambda pair: pair[0])

    def refitted(self, way, rounds):
        """The same way, with what neurons read fitted too where that leaves less on the tokens that decide.

        Ways are compared without, as it takes longer than all else.
        """
        if not self.fits or not rounds:
            return way
        rules = []
        for group, rule in enumerate(way.rules):
            members = np.flatnonzero(way.labels == group).tolist()
            if len(members) > 1 or way.width < self.layer.width:
                rule = self._least(members, way.weights, way.width, [rule, rule | {"refit": rounds}])[1]
            rules.append(rule)
        return replace(way, rules=rules)

    def _rules(self, members, width):
        """What is tried for a group, the plainest first: it is taken where nothing leaves less."""
        if len(members) == 1:
            return [{"rule": "trimming", "ridge": ridge} for ridge in RIDGES]
        pool, rules = "averages" if (len(members) + 1) * self.layer.width <= POOLED else "members", []
        if width == self.layer.width:
            rules = [
                AVERAGE,
                *({"rule": "least-squares", "align": "none", "ridge": ridge} for ridge in RIDGES),
            ]
        return rules + [{"rule": "selection", "ridge": ridge, "pool": pool} for ridge in RIDGES]


def _rows(sample, chosen):
    return LayerSample(*(getattr(sample, f.name)[chosen] for f in fields(sample)))


@torch.no_grad()
def _left(group, expert, rule):
    """Squared error of one expert in a group's place, on the group's tokens."""
    if rule.get("refit"):
        hidden = group.activations(expert)
    else:  # what neurons read does not depend on the ridge
        hidden = group.once(("hidden", rule["rule"]), lambda: group.activations(expert))
    return float((hidden @ expert.down.T - group.outputs(expert.offset)).double().pow(2).sum())


def chosen_ways(found, shape):
    """One way for each layer: of one shape in all of them, that which leaves least in all, or of each layer's own.

    Parameters
    ----------
    found : list of dict of (int, int) to Way
        Of each layer: :meth:`Judge.ways`.
    shape : {"uniform", "by-layer", "whole"}
        Engines that read the original family's checkpoints ask for one number of experts and one width in all layers; some
        families have shared experts of the same width, and take no other (``"whole"``: the first shape, of whole experts).

    Returns
    -------
    list of Way
    """
    shared = [key for key in found[0] if all(key in ways for ways in found)]
    if shape == "whole":
        return [next(iter(ways.values())) for ways in found]
    if shape == "uniform" and shared:
        best = min(shared, key=lambda key: sum(ways[key].residual for ways in found))
        return [ways[best] for ways in found]
    return [min(ways.values(), key=lambda way: way.residual) for ways in found]
