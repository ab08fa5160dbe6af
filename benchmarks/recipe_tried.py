"""What was tried for the recommended method and left out: what each would be worth, before what neurons read
is fitted.

    python benchmarks/recipe_tried.py --out benchmarks/results/recipe-tried.csv     # a quarter of an hour on
    one core

"added" is the loss added in nats a token on held-out text of the ten domains that are made by rule; "left"
the squared residual on held-out tokens of the sample, over that of the method.

pairs by matching: of all pairs of near experts (each expert's six nearest by weights and by outputs) those
that leave least
    together (minimum-weight perfect matching), beside the method's groups, taken where they leave less
budgets: layers keep different numbers of bytes, so that the sum of their relative residuals is least
other tokens: each expert is fitted to, and judged on, tokens that were not routed to it too, four for each of
its neurons shared expert: its down projection takes up by ridge regression what the merged experts leave
(demo-qwen) scales: each member's outputs are given by the merged expert times a number of its own, as routing
weights could carry co-activation: experts that are often chosen for the same token join (cosine of who gets
which token), where that leaves less router rows: the rows of the router that is kept move to take up what is
left, one Gauss-Newton step by LSQR, damped and scaled
    as leaves least on the held-out tokens themselves; experts and rows are fitted to the other tokens
low rank: an eighth of the neurons make way for a linear map of low rank for each member, as many numbers
"""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path
from unittest import mock

import networkx
import numpy as np
import pandas as pd
import torch
from scipy.sparse.linalg import LinearOperator, lsqr
from scipy.spatial.distance import pdist, squareform

import hcsmoe_core as core
from hcsmoe_core import merging as combining
from hcsmoe_core.clustering import by_first_appearance
from hcsmoe_core.families import moe_layer
from hcsmoe_core.merging import Group, group_and_options
from hcsmoe_core.merging import combine_group as combine
from hcsmoe_core.methods import grouping as clustering
from hcsmoe_core.methods import residual, resolve
from hcsmoe_core.methods.planner import Layer
from hcsmoe_core.similarity import distances
from hcsmoe_core.text.calibration import domains_of

MODELS = {"demo-qwen": (16, 8), "demo-mixtral": (4, 2)}
NEAR, OTHERS, RIDGE = 6, 4, 0.01
DAMPING, SCALES = (3.0, 30.0, 300.0), (1.0, 0.3, 0.1, 0.03)
HOW = dict(method="recommended", refit=0, progress=False)


class Case:
    """A model, its statistics, and what the method does to it."""

    def __init__(self, name, source, seed):
        self.name, (self.model, self.tokenizer) = name, core.load_model(name, dtype="float32")
        ids = core.calibration_tokens(source, self.tokenizer, sequences=96, length=256, seed=seed)
        how = dict(needs=resolve("recommended").needs, domains=domains_of(source, 96), progress=False)
        self.stats = core.capture(self.model, ids, **how)
        self.decides = residual.held_out(self.stats.sampled, "auto", self.stats.domains)
        self.layers = core.find_moe_layers(self.model)
        self.original = self.loss()

    def loss(self):
        return core.evaluate(self.model, self.tokenizer, tasks=[])["mean_loss"]

    def added(self, plan):
        """Loss that a plan adds."""
        core.apply_plan(self.model, plan, self.stats)
        added = self.loss() - self.original
        core.restore(self.model)
        return added

    def plan(self, experts):
        return core.make_plan(self.stats, self.model, experts=experts, **HOW)

    def judges(self):
        return [
            residual.Scorer(layer, self.stats.layers[layer.name], self.decides, "frequency")
            for layer in self.layers
        ]

    def plan_of(self, ways, experts):
        """The plan that takes some way for each layer."""
        recipe = resolve("recommended")
        seen = [Layer(self.stats, i, recipe, model=self.model) for i in range(len(self.layers))]
        layers = [residual._planned(layer, way) for layer, way in zip(seen, ways, strict=True)]
        return replace(self.plan(experts), layers=layers)


def pairs(case, experts):
    """Pairs of the narrower width, by a matching, where they leave less than the method's."""
    size, ways = case.layers[0].num_experts, []
    count = size // 2
    width = dict(residual.shapes(size, experts, case.layers[0].width))[count]
    for judge in case.judges():
        graph = networkx.Graph()
        for name in residual.SIMILARITIES:
            how = dict(similarity=name, metric="cosine" if name == "weight" else "", model=case.model)
            square = squareform(distances(case.stats, judge.layer.name, **how))
            np.fill_diagonal(square, np.inf)
            near = {
                (min(a, int(b)), max(a, int(b))) for a in range(size) for b in np.argsort(square[a])[:NEAR]
            }
            for a, b in near - set(graph.edges):
                shares = np.zeros(size)
                shares[[a, b]] = judge.usage[[a, b]] / judge.usage[[a, b]].sum()
                graph.add_edge(a, b, weight=-judge._scored([a, b], shares, width)[0])
        labels = np.zeros(size, dtype=np.int64)
        for group, pair in enumerate(networkx.max_weight_matching(graph, maxcardinality=True)):
            labels[list(pair)] = group
        tried = [by_first_appearance(labels), *judge._groupings(case.stats, case.model, count)]
        ways.append(min((judge.candidate(groups, width) for groups in tried), key=lambda way: way.residual))
    return case.added(case.plan_of(ways, experts))


def budgets(case, experts):
    """Every layer's best way for each number of eighths kept, and of all that take the same bytes those that
    leave least.
    """
    size = case.layers[0].num_experts
    kept = [size * eighths // 8 for eighths in range(1, 8)]
    tables = [
        {k: min(j.candidates(case.stats, case.model, k).values(), key=lambda w: w.residual) for k in kept}
        for j in case.judges()
    ]
    choices = (c for c in itertools.product(kept, repeat=len(tables)) if sum(c) == experts * len(tables))
    best = min(choices, key=lambda c: sum(table[k].residual for table, k in zip(tables, c, strict=True)))
    return case.added(case.plan_of([table[k] for table, k in zip(tables, best, strict=True)], experts))


def other_tokens(case, experts):
    """Tokens that were not routed to an expert count as if they had been, with its usual gate."""
    routed = Group.tokens

    def tokens(group, members=None):
        found, gates = routed(group, members)
        if members is not None:
            return found, gates

        def make():
            all_gates, weight = group.sample.gates[:, group.members], group.sample.weight
            usual, wanted = (
                float(weight[weight != 0].double().pow(2).mean().sqrt()),
                OTHERS * group.layer.width,
            )
            inputs, more = [found], [gates]
            for place in range(len(group.members)):
                rows = (all_gates[:, place] == 0).nonzero()[:, 0]
                rows = rows[torch.linspace(0, len(rows) - 1, min(wanted, len(rows))).long()]
                inputs.append(group.sample.inputs[rows].to(found.dtype))
                more.append(
                    usual
                    * torch.nn.functional.one_hot(torch.full((len(rows),), place), gates.shape[1]).to(
                        gates.dtype
                    )
                )
            return torch.cat(inputs), torch.cat(more)

        return group.once("other tokens", make)

    with mock.patch.object(combining.Group, "tokens", tokens):
        return case.added(case.plan(experts))


def _left_over(case, plan):
    """What the merged experts leave of each layer's routed output, on all tokens of the sample, ``(T, D)``
    each.
    """
    for layer, layer_plan in zip(case.layers, plan.layers, strict=True):
        sample, everyone = case.stats.layers[layer.name].sample, list(range(layer.num_experts))
        whole = Group(layer, everyone, [1 / len(everyone)] * len(everyone), 0, sample)
        left, inputs = whole.outputs().clone(), sample.inputs.double()
        made = combine_all(case, layer, layer_plan, sample)
        gates = torch.zeros(len(inputs), layer_plan.num_groups, dtype=torch.float64)
        gates.index_add_(1, torch.tensor(layer_plan.labels), sample.gates.double())
        for group, expert in enumerate(made):
            left -= gates[:, group, None] * (layer.activate(expert, inputs) @ expert.down.T)
        yield left


def combine_all(case, layer, layer_plan, sample):
    """The merged experts of one layer."""
    made = []
    for place, members in enumerate(layer_plan.groups()):
        if len(members) == 1 and layer_plan.width is None:
            made.append(layer.neurons(members[0], torch.float64))
        else:
            made.append(combine(*group_and_options(layer, layer_plan, place, sample)))
    return made


@torch.no_grad()
def shared(case, experts):
    """The shared expert's down projection takes up what is left; None where there is none."""
    blocks = [module for module in case.model.modules() if hasattr(module, "shared_expert")]
    if not blocks:
        return None
    plan, changes = case.plan(experts), []
    for block, layer, left in zip(blocks, case.layers, _left_over(case, plan), strict=True):
        inputs, expert = case.stats.layers[layer.name].sample.inputs.float(), block.shared_expert
        hidden = (
            expert.act_fn(expert.gate_proj(inputs))
            * expert.up_proj(inputs)
            * block.shared_expert_gate(inputs).sigmoid()
        )
        changes.append(_ridge(hidden.double(), left).T.float())

    def move(sign):
        for block, change in zip(blocks, changes, strict=True):
            block.shared_expert.down_proj.weight.data += sign * change

    move(1)
    added = case.added(plan)
    move(-1)
    return added


def _ridge(values, target):
    gram = values.T @ values
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + penalty, values.T @ target)


def remainders(case, experts, kind):
    """Squared residual on held-out tokens with scales or remainders of low rank, over that of the method."""
    plan, left = case.plan(experts), np.zeros(2)
    for layer_plan in plan.layers:
        layer, sample = moe_layer(case.model, layer_plan.name), case.stats.layers[layer_plan.name].sample
        for place, members in enumerate(layer_plan.groups()):
            if len(members) == 1 and layer_plan.width is None:
                continue
            fitted, rule = group_and_options(layer, layer_plan, place, residual._rows(sample, ~case.decides))
            held, _ = group_and_options(layer, layer_plan, place, residual._rows(sample, case.decides))
            left += (
                residual.squared_error(held, combine(fitted, rule), rule),
                kind(layer, layer_plan, rule, fitted, held),
            )
    return left[1] / left[0]


def scales(layer, layer_plan, rule, fitted, held):
    expert = combine(fitted, rule)

    def outputs(group):
        tokens, gates = group.tokens()
        return gates, layer.activate(expert, tokens) @ expert.down.T

    gates, given = outputs(fitted)
    design = torch.stack([(gate[:, None] * given).flatten() for gate in gates.T], 1)
    found = torch.linalg.lstsq(design, fitted.outputs().flatten()[:, None]).solution[:, 0]
    gates, given = outputs(held)
    return float(((gates @ found)[:, None] * given - held.outputs()).pow(2).sum())


def low_rank(layer, layer_plan, rule, fitted, held):
    width, count, size = layer_plan.width or layer.width, len(fitted.members), layer.hidden_size
    fewer = width // 8
    rank = 3 * fewer // (2 * count)  # as many numbers: 3 D each neuron, 2 D each rank of each member
    if rule["rule"] not in ("selection", "trimming"):
        rule = {"rule": "selection", "ridge": RIDGE, "pool": "averages"}
    expert = combine(fitted, rule | {"width": width - fewer})

    def split(group):
        tokens, gates = group.tokens()
        given = gates.sum(1, keepdim=True) * (layer.activate(expert, tokens) @ expert.down.T)
        return torch.cat([gate[:, None] * tokens for gate in gates.T], 1), group.outputs() - given

    read, left = split(fitted)
    maps, gram = _ridge(read, left), read.T @ read + 1e-9 * torch.eye(count * size, dtype=read.dtype)
    for start in range(0, count * size, size):
        own = slice(start, start + size)
        root = torch.linalg.cholesky(gram[own, own])
        u, s, v = torch.linalg.svd(root.T @ maps[own])
        maps[own] = torch.linalg.solve_triangular(root.T, (u[:, :rank] * s[:rank]) @ v[:rank], upper=True)
    read, left = split(held)
    return float((left - read @ maps).pow(2).sum())


def coactivation(case, experts):
    """Groups of experts that are chosen together, tried beside the method's."""
    usual = residual.Scorer._groupings

    def groupings(judge, stats, model, count):
        found = usual(judge, stats, model, count)
        if count < judge.sums.num_experts:
            chosen = judge.sums.sample.chosen.T.double().numpy()
            how = dict(method="average", metric="cosine")
            found.append(
                clustering.restricted(pdist(chosen, "cosine"), count, -(-len(chosen) // count), **how)
            )
        return found

    with mock.patch.object(residual.Scorer, "_groupings", groupings):
        return case.added(case.plan(experts))


class Routed:
    """What a layer with merged experts gives on some tokens as a function of a change of its router's
    rows.
    """

    def __init__(self, layer, sample, made, labels):
        self.inputs, self.logits, self.k = (
            sample.inputs.double(),
            sample.logits.double(),
            sample.index.shape[1],
        )
        everyone = list(range(layer.num_experts))
        self.wanted = Group(layer, everyone, [1 / len(everyone)] * len(everyone), 0, sample).outputs()
        self.given = torch.stack([layer.activate(e, self.inputs) @ e.down.T for e in made], 1)[
            :, labels
        ]  # [T, E, D]
        self.normalised = bool((sample.weight.double().sum(1) - 1).abs().max() < 1e-3)
        self.shape = layer.num_experts, self.inputs.shape[1]
        self.none = torch.zeros(self.shape, dtype=torch.float64)

    def gates(self, change):
        logits = self.logits + self.inputs @ change.T
        score = logits.softmax(1)
        chosen = torch.zeros_like(score).scatter_(1, logits.topk(self.k, 1).indices, 1)
        score = score * chosen
        return score / score.sum(1, keepdim=True) if self.normalised else score

    def left(self, change):
        return self.wanted - torch.einsum("te,ted->td", self.gates(change), self.given)

    def step(self, damp):
        """Change of the rows by LSQR on the linearised outputs."""
        gates = self.gates(self.none)
        # Of softmax weights, all or those chosen alone: d g_e = g_e (d l_e − Σ_j s_j d l_j).
        share = gates if self.normalised else self.logits.softmax(1)
        mean = torch.einsum("te,ted->td", gates, self.given)

        def forward(flat):
            logits = self.inputs @ torch.from_numpy(flat).reshape(self.shape).T
            given = torch.einsum("te,ted->td", gates * logits, self.given)
            return (given - (share * logits).sum(1, keepdim=True) * mean).flatten().numpy()

        def backward(flat):
            left = torch.from_numpy(flat).reshape(len(self.inputs), -1)
            logits = gates * torch.einsum("td,ted->te", left, self.given) - share * (left * mean).sum(
                1, keepdim=True
            )
            return (logits.T @ self.inputs).flatten().numpy()

        size = self.wanted.numel(), self.none.numel()
        operator = LinearOperator(size, matvec=forward, rmatvec=backward, dtype=np.float64)
        found = lsqr(operator, self.left(self.none).flatten().numpy(), damp=damp, iter_lim=40)[0]
        return torch.from_numpy(found).reshape(self.shape)


def router_rows(case, experts):
    """Squared residual on held-out tokens once the router's rows have moved, over that before."""
    plan, before, after = case.plan(experts), 0.0, 0.0
    for layer, layer_plan in zip(case.layers, plan.layers, strict=True):
        samples = [
            residual._rows(case.stats.layers[layer.name].sample, rows)
            for rows in (~case.decides, case.decides)
        ]
        made = combine_all(case, layer, layer_plan, samples[0])
        fitted, held = (Routed(layer, sample, made, layer_plan.labels) for sample in samples)
        steps = [scale * step for step in map(fitted.step, DAMPING) for scale in SCALES]
        left = [float(held.left(change).pow(2).sum()) for change in (held.none, *steps)]
        before, after = before + left[0], after + min(left)
    return after / before


TRIALS = {
    "the method, without refit": (lambda case, experts: case.added(case.plan(experts)), "added"),
    "pairs by matching": (pairs, "added"),
    "budgets": (budgets, "added"),
    "other tokens": (other_tokens, "added"),
    "shared expert": (shared, "added"),
    "co-activation": (coactivation, "added"),
    "router rows": (router_rows, "left"),
    "scales": (lambda case, experts: remainders(case, experts, scales), "left"),
    "low rank": (lambda case, experts: remainders(case, experts, low_rank), "left"),
}
ON_TWO = ("the method, without refit", "other tokens")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--trials", nargs="+", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    rows = []
    for name, source in itertools.product(arguments.models, ("demo", "demo:code,prose")):
        case = Case(name, source, arguments.seed)
        for trial in arguments.trials:
            measured, what = TRIALS[trial]
            if source != "demo" and trial not in ON_TWO:
                continue
            for experts in MODELS[name]:
                value = measured(case, experts)
                if value is not None:
                    rows.append(
                        {
                            "model": name,
                            "calibrated": source,
                            "experts": experts,
                            "trial": trial,
                            what: round(value, 5),
                        }
                    )
                    print(*rows[-1].values(), what, flush=True)
    if arguments.out:
        pd.DataFrame(rows).to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
