"""Which experts to drop: what each is worth, and what dropping a set of them does to the layer's output.

A saliency is a step ``(layer) → (E,) array``, of a :class:`hcsmoe_core.methods.planner.Layer`; the experts
worth least are dropped. One registered with ``chooses=True`` names the experts to keep itself: ``(layer,
count) → kept``.
"""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from hcsmoe_core import moe, plan, steps
from hcsmoe_core._util import InputError, require

ENUMERATED = 16  # up to this number of experts, every subset is tried
SUBSETS = 100_000  # tried where there are more experts, as in the HC-SMoE paper
LOSS_TOKENS = 4096  # of the sample, that losses are measured on: Gram matrices of all experts for each token
TOKENS = 256  # of the sample, that random subsets are compared on where there are too many to try all
BATCH = 1 << 20  # numbers that are worked on at once


@steps.saliency("frequency")
def share_of_tokens(layer):
    """Share of the routed tokens (F-prune)."""
    return layer.sums.frequency.numpy()


@steps.saliency("score")
def mean_score(layer):
    """Mean of the router's scores before any choice (S-prune)."""
    require(
        not torch.isnan(layer.sums.score_mass).any(),
        f'{layer.name}: no router was found, so that saliency "score" is unavailable.',
    )
    return (layer.sums.score_mass.sum(0) / layer.sums.tokens.sum()).numpy()


@steps.saliency("reap", needs=("norms",))
def mean_gated_norm(layer):
    """Mean of ``g_e ‖f_e‖`` over the tokens routed to the expert, or 0 (REAP, arXiv 2510.13999)."""
    return (layer.sums.gated_norm_sum.sum(0) / layer.sums.usage_count.sum(0).double().clamp(min=1)).numpy()


@steps.saliency("ean", needs=("norms",))
def sum_of_norms(layer):
    """Sum of ``‖f_e‖`` over the tokens routed to the expert (the EAN baseline of REAP)."""
    return layer.sums.norm_sum.sum(0).numpy()


@steps.saliency("man", needs=("norms",))
def mean_norm(layer):
    """Mean of ``‖f_e‖`` over the tokens routed to the expert, or 0 (MAN, arXiv 2606.15716)."""
    return (layer.sums.norm_sum.sum(0) / layer.sums.usage_count.sum(0).double().clamp(min=1)).numpy()


@steps.saliency("random", random=True)
def chance(layer):
    """Seeded chance."""
    drawn = np.random.default_rng(layer.seeds).permutation(layer.num_experts)
    return drawn[canonical_rank(layer.sums)].astype(np.float64)


@steps.saliency("o-prune", needs=("sample",), chooses=True, random=True, weights=True)
def least_loss(
    layer, count, *, loss: Literal["squared", "frobenius"] = "squared", subsets: steps.Positive = SUBSETS
):
    """The experts that change the layer's output least by not being there (NAEE, arXiv 2402.14800).

    Up to 16 experts every subset is tried, else ``subsets`` of them and a search: :class:`DropLoss`,
    :func:`best_kept`.
    """
    sample, rule = layer.sums.sample, routing_rule(layer.sums.sample, layer.moe)
    many, sequences = layer.num_experts > ENUMERATED, layer.stats.sampled[:, 0]
    grams = output_grams(layer.moe, sample.inputs[:LOSS_TOKENS])

    def loss_on(tokens):
        return DropLoss(
            grams[:tokens],
            sample,
            rule,
            loss=loss,
            sequences=sequences[:tokens],
            dtype=torch.float32 if many else torch.float64,
        )

    return best_kept(
        loss_on(LOSS_TOKENS),
        layer.num_experts,
        count,
        rough=loss_on(TOKENS) if many else None,
        protected=layer.protected,
        subsets=subsets,
        seed=layer.seeds,
        progress=layer.progress,
    )


@steps.group("prune", uses=("saliency",), pair={"router": "dropped"}, whole=True, kind="prunes")
def prune(layers, counts):
    """The protected experts, and those worth most, stay as they are; the others and their router rows go."""
    return [_pruned(layer, count) for layer, count in zip(layers, counts, strict=True)]


def _pruned(layer, count):
    saliency, experts = layer.recipe.present["saliency"], np.arange(layer.num_experts)
    if saliency.properties.get("chooses"):
        kept = saliency(layer, count, **layer.recipe.by_kind["saliency"])
    else:
        worth = np.where(np.isin(experts, layer.protected), np.inf, layer.saliency)
        kept = _best_of_router_groups(worth, count, layer)
    labels = np.full(len(experts), plan.DROPPED)
    labels[kept] = experts[:count]
    return plan.LayerPlan(
        layer.name,
        labels.tolist(),
        (labels != plan.DROPPED).astype(float).tolist(),
        router="dropped",
        protected=layer.protected,
    )


def _best_of_router_groups(worth, count, layer):
    """The experts worth most, in order; as many from each of the groups that the router chooses among."""
    groups = layer.stats.model["layers"][layer.name]["router_groups"]
    require(
        count % groups == 0,
        f'The "experts" argument leaves {count} experts in {layer.name}, whose router chooses among '
        f"{groups} groups of experts that must stay of one size; keep a multiple of {groups}.",
    )
    members, each = worth.reshape(groups, -1), count // groups
    most = np.isinf(members).sum(1).max()
    require(
        most <= each,
        f'The "experts" argument leaves {each} experts in each group that the router of {layer.name} chooses '
        f"among, but {most} of one must be kept; keep more experts, or switch the guard off.",
    )
    first = np.arange(0, len(worth), members.shape[1])
    best = np.argsort(-members, axis=1, kind="stable")[:, :each]
    return np.sort(first[:, None] + best, axis=None)


def canonical_rank(sums):
    """Rank of each expert by routing mass, then count: it does not depend on how experts are numbered.

    What is drawn by chance is drawn in that order, so that renumbering a model's experts renumbers a plan and
    no more.
    """
    return np.argsort(np.lexsort([total.sum(0).numpy() for total in (sums.usage_count, sums.routing_mass)]))


def super_experts(stats):
    """Experts whose loss would ruin the model (arXiv 2507.23279): those with outlying activations, by layer.

    An expert is one if the largest absolute value among its outputs is above the 99.5th percentile of all
    experts' and above a tenth of the largest, and its layer is among the first three quarters.

    Parameters
    ----------
    stats : Statistics

    Returns
    -------
    dict of str to list of int

    Raises
    ------
    ValueError
        If the statistics do not hold the outputs' largest values.
    """
    stats.check(("norms",), "The super-expert guard")
    largest = {name: sums.output_max.amax(0).numpy() for name, sums in stats.layers.items()}
    everything = np.concatenate(list(largest.values()))
    threshold = max(np.quantile(everything, 0.995), everything.max() / 10)
    return {
        name: np.flatnonzero(values > threshold).tolist() if index < 0.75 * len(largest) else []
        for index, (name, values) in enumerate(largest.items())
    }


@dataclass(frozen=True)
class RoutingRule:
    """How a router makes weights of its logits, as far as it can be told from what it did.

    Attributes
    ----------
    scoring : {"softmax", "sigmoid"}
    normalised : bool
        Whether the chosen experts' scores are divided by their sum.
    scale : float
        What the weights are multiplied with at last.
    bias : (E,) float64 tensor
        Added to the scores for the choice alone.
    top_k : int
    """

    scoring: str
    normalised: bool
    scale: float
    bias: torch.Tensor
    top_k: int

    def gates(self, logits, kept):
        """Weights ``[B, R, E]`` that the router would apply if only some experts were there.

        Parameters
        ----------
        logits : (R, E) float64 tensor
        kept : (B, E) bool tensor

        Returns
        -------
        (B, R, E) float64 tensor
        """
        here = kept[:, None]
        masked = torch.where(here, logits, -torch.inf)  # of which the sigmoid is zero
        scores = masked.softmax(2) if self.scoring == "softmax" else masked.sigmoid()
        wanted = torch.where(here, scores + self.bias, -torch.inf)
        order = wanted.argsort(dim=2, descending=True, stable=True)
        best = here.expand_as(scores).gather(2, order) & (torch.arange(kept.shape[1]) < self.top_k)
        gates = torch.where(torch.zeros_like(best).scatter_(2, order, best), scores, 0.0)
        if self.normalised:  # sigmoids may all be zero to rounding, and so are the weights then
            gates = gates / gates.sum(2, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        return gates * self.scale

    def order(self, logits):
        """Experts of each token from best to worst, ``(R, E)``; None if it depends on which are dropped."""
        if self.scoring == "softmax":  # shared among fewer, scores weigh more against a bias
            return None if self.bias.any() else logits.argsort(dim=1, descending=True, stable=True)
        return (logits.sigmoid() + self.bias).argsort(dim=1, descending=True, stable=True)


def routing_rule(sample, layer=None):
    """The rule that gives what a router did on the sample.

    Tried in turn: softmax or sigmoid, normalised or not, with any constant scale, and with the correction
    bias of the router where it has one. In 16-bit models two experts whose scores round alike may swap: the
    choice must agree for all but 2 % of the tokens, and the weights to 2 %.

    Parameters
    ----------
    sample : LayerSample
    layer : MoELayer, optional
        Where a correction bias is looked for.

    Returns
    -------
    RoutingRule

    Raises
    ------
    ValueError
        If none does.
    """
    logits, gates = sample.logits.double(), sample.gates
    experts, tolerance = logits.shape[1], 0.02
    routed = moe.routing_tensors(layer, experts) if layer is not None and layer.router is not None else ()
    biases = [t.detach().double().cpu().flatten() for *_, t in routed if t.numel() == experts]
    for bias, scoring, normalised in itertools.product(
        [*biases, torch.zeros(experts).double()], ("softmax", "sigmoid"), (True, False)
    ):
        rule = RoutingRule(scoring, normalised, 1.0, bias, sample.index.shape[1])
        unscaled = rule.gates(logits, torch.ones(1, experts, dtype=torch.bool))[0]
        same = ((unscaled != 0) == (gates != 0)).all(1)
        if same.double().mean() >= 1 - tolerance:
            scale = float((unscaled * gates)[same].sum() / (unscaled**2)[same].sum())
            if float((scale * unscaled - gates)[same].abs().max()) <= tolerance * float(gates.abs().max()):
                return replace(rule, scale=scale)
    raise InputError(
        "How this model's router makes weights of its logits is not known (it limits its choice to groups of "
        'experts, or does more than softmax or sigmoid), so that "o-prune" cannot tell how it would route '
        'without some experts; use "reap" or another saliency.'
    )


@torch.no_grad()
def output_grams(layer, tokens):
    """``Γ(x) = ⟨f_i(x), f_j(x)⟩`` of each token: what any change of the gates does follows from it.

    Parameters
    ----------
    layer : MoELayer
    tokens : (R, D) tensor

    Returns
    -------
    (R, E, E) float64 tensor
    """

    def grams(part):
        outputs = [layer.expert_output(e, layer.expert_hidden(e, part)) for e in range(layer.num_experts)]
        stacked = torch.stack(outputs, 1).double()
        return (stacked @ stacked.transpose(1, 2)).cpu()

    return torch.cat([grams(part) for part in tokens.to(layer.device).split(256)])


class DropLoss:
    """What keeping only some of a layer's experts does to its output on the sample (NAEE, arXiv 2402.14800).

    With the gates g before and g' after, ``‖y − y'‖² = (g − g')ᵀ Γ (g − g')`` for each token: exact,
    re-routing included, without running an expert again.

    Parameters
    ----------
    grams : (R, E, E) float64 tensor
        From :func:`output_grams`.
    sample : LayerSample
        Of which these are the first R tokens.
    rule : RoutingRule
    loss : {"squared", "frobenius"}
        The sum of squared errors; or NAEE's own, the sum over batches of the root of a batch's sum, with each
        calibration sequence as a batch (it depends on how tokens are batched).
    sequences : (R,) int64 tensor
        Which sequence each token is of.
    dtype : torch.dtype
        float32 is several times faster, and enough to compare many sets.
    """

    def __init__(self, grams, sample, rule, *, loss="squared", sequences=None, dtype=torch.float64):
        self.rule, self.loss, self.dtype = rule, loss, dtype
        self.logits, self.gates = sample.logits[: len(grams)].double(), sample.gates[: len(grams)]
        self.sequences = torch.unique(sequences, return_inverse=True)[1] if loss == "frobenius" else None
        # Each token's experts go from best to worst here, so that the first that are kept are those chosen.
        self.order = rule.order(self.logits)
        if self.order is not None:
            logits = self.logits.gather(1, self.order)
            scores = (logits - logits[:, :1]).exp() if rule.scoring == "softmax" else logits.sigmoid()
            self.scores, self.gates = scores.to(dtype), self.gates.gather(1, self.order)
            rows = self.order[:, :, None].expand_as(grams)
            grams = grams.gather(1, rows).gather(2, rows.transpose(1, 2))
        self.gates, self.grams = self.gates.to(dtype), grams.to(dtype)

    def __call__(self, kept):
        """Loss of each set of kept experts; ``kept`` is ``[B, E]`` bool, the result ``[B]`` float64."""
        return torch.cat([self._losses(part) for part in kept.split(max(1, BATCH // self.gates.numel()))])

    def _losses(self, kept):
        change = (self._gates(kept) - self.gates).transpose(0, 1)
        # [R, B, E] @ [R, E, E]: one product per token for all sets at once
        square = ((change @ self.grams) * change).sum(2).clamp(min=0).double()  # [R, B]
        if self.loss == "frobenius":
            batches = torch.zeros(int(self.sequences.max()) + 1, square.shape[1], dtype=square.dtype)
            square = batches.index_add_(0, self.sequences, square).sqrt()
        return square.sum(0)

    def _gates(self, kept):
        """The rule's gates ``[B, R, E]``, each token's experts from best to worst where that is fixed."""
        if self.order is None:
            return self.rule.gates(self.logits, kept).to(self.dtype)
        here = kept[:, self.order]
        gates = (here & (here.cumsum(2, dtype=torch.int16) <= self.rule.top_k)) * self.scores
        if self.rule.normalised or self.rule.scoring == "softmax":
            total = (gates if self.rule.normalised else here * self.scores).sum(2, keepdim=True)
            if float(total.min()) < 1e-30:  # next to the best expert of all, those that are kept vanish
                exact = self.rule.gates(self.logits, kept)
                return exact.gather(2, self.order.expand_as(gates)).to(self.dtype)
            gates /= total
        return gates.mul_(self.rule.scale)


def best_kept(loss, experts, count, *, rough=None, protected=(), subsets=SUBSETS, seed=0, progress=True):
    """The experts whose keeping loses least: every subset tried up to 16 experts, else a search.

    The search takes the best of ``subsets`` random ones, then swaps one kept expert for one that is not, the
    best swap at a time, until none helps.

    Parameters
    ----------
    loss : callable
        ``(B, E) bool tensor → (B,)``, such as a :class:`DropLoss`.
    experts, count : int
        E and r.
    rough : callable, optional
        A cheaper loss, that the random subsets are compared by.
    protected : sequence of int
        Experts that are kept in any case.
    subsets : int
    seed : int
    progress : bool

    Returns
    -------
    (count,) int64 array
        In order.
    """
    kept = _sets(experts, count, sorted(protected), subsets, seed)
    first = loss if rough is None or experts <= ENUMERATED else rough
    shown = dict(desc="o-prune", unit_scale=1024, leave=False, disable=None if progress else True)
    best = kept[torch.cat([first(sets) for sets in tqdm(kept.split(1024), **shown)]).argmin()]
    value, swaps = float(loss(best[None])[0]), ()
    while experts > ENUMERATED and len(swaps := _swaps(best, protected)):
        values = loss(swaps)
        if float(values.min()) >= value * (1 - 1e-12):
            break
        best, value = swaps[values.argmin()], float(values.min())
    return best.nonzero()[:, 0].numpy()


def _sets(experts, count, protected, subsets, seed):
    """Sets of experts to try, ``(B, E)`` bool: all of them, or random ones where these are too many."""
    free = [e for e in range(experts) if e not in protected]
    choose = count - len(protected)
    if experts <= ENUMERATED or math.comb(len(free), choose) <= subsets:
        chosen = torch.tensor(list(itertools.combinations(free, choose)), dtype=torch.int64)
    else:
        drawn = np.random.default_rng(seed).random((subsets, len(free)))
        chosen = torch.from_numpy(np.asarray(free)[drawn.argpartition(choose - 1, axis=1)[:, :choose]])
    kept = torch.zeros(len(chosen), experts, dtype=torch.bool).scatter_(1, chosen, True)
    kept[:, protected] = True
    return kept


def _swaps(kept, protected):
    """All sets with one kept expert, not protected, in exchange for one that is not kept, ``(B, E)`` bool."""
    free, only = kept.clone(), torch.eye(len(kept), dtype=torch.bool)
    free[list(protected)] = False
    out, into = torch.cartesian_prod(free.nonzero()[:, 0], (~kept).nonzero()[:, 0]).T
    return kept ^ only[out] ^ only[into]
