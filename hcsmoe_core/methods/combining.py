"""How the experts of a group become one: averaged, matched by neurons, refitted, or chosen from.

A combination is a step ``(group) → Neurons``, of a :class:`hcsmoe_core.merging.Group`.
"""

import zlib
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from hcsmoe_core import merging, steps
from hcsmoe_core._util import require

ALIGNMENTS = ("none", "weights", "activations")
NEURON_FEATURES = ("activations", "weights", "activations+weights")
BATCH = 256  # neurons that are compared at once with those chosen
REFIT_RIDGE = 0.1  # of refits of what neurons read, relative to the mean of each neuron's squared slopes
ITERATIONS = 30  # of conjugate gradients per refit


def _needs(options):
    """The sample, where neurons are aligned or matched by activations."""
    return ("sample",) if "activations" in options.get("align", options.get("features")) else ()


@steps.combine("average", needs=_needs)
def averaged(group, *, align: Literal[ALIGNMENTS] = "none"):
    """Weighted average, of neurons in the order of the dominant expert's where they are aligned to it."""
    return merging.mean_of(aligned(group, align), group.weights)


def aligned(group, align):
    """The members with their neurons in the order of the dominant expert's."""
    if align == "none":
        return group.experts
    return [
        expert if index == group.dominant else expert.take(_matching(group, index, align))
        for index, expert in enumerate(group.experts)
    ]


def _matching(group, index, align):
    """The neuron of a member that goes with each of the dominant expert's; of too few tokens by weights."""
    pair = group.experts[group.dominant], group.experts[index]
    if align == "activations" and len(tokens := group.tokens([group.dominant, index])[0]) > 1:
        first, second = (standardised(group.layer.activate(expert, tokens)).T for expert in pair)
    else:
        first, second = map(_described, pair)
    alike = (first @ second.T).cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(alike, maximize=True)[1])


@steps.combine("ties")
def ties(group, *, density: steps.Fraction = 0.2):
    """TIES (arXiv 2306.01708; MergeME, arXiv 2502.00997): trim, elect a sign, average what agrees.

    Of each member's difference from the members' plain mean, the share ``density`` that is largest in
    absolute value stays, biases included. For each weight of the expert the sign is elected that has the
    larger weighted sum, and the differences of that sign are averaged by the members' weights; where the sums
    balance, the mean stays.
    """
    mean, changes = _changes(group)
    trimmed_away = changes.shape[1] - max(1, round(density * changes.shape[1]))
    least = changes.abs().kthvalue(trimmed_away + 1, keepdim=True).values
    changes = torch.where(changes.abs() >= least, changes, 0)
    weights = group.weights.to(changes)[:, None]
    total, size = (weights * changes).sum(0), (weights * changes.abs()).sum(0)
    sign = torch.where(total.abs() > 1e-9 * size, total.sign(), 0)  # below, it is rounding
    weights = weights * ((changes.sign() == sign) & (changes != 0))
    share = weights.sum(0).clamp(min=torch.finfo(changes.dtype).tiny)
    return _unflattened(mean + (weights * changes).sum(0) / share, group.experts[0])


@steps.combine("dare", random=True)
def dare(group, *, density: steps.Fraction = 0.5, seed: int = 0):
    """DARE (arXiv 2311.03099; MergeME, arXiv 2502.00997): drop at random, rescale, average.

    Of each member's difference from the members' plain mean, each number stays with probability ``density``
    and is divided by it; the weighted average of what stays is added to the mean. What is drawn depends on
    the seed, the layer's name and the expert's number alone.
    """
    mean, changes = _changes(group)
    total = torch.zeros_like(mean)
    for weight, expert, change in zip(group.weights.tolist(), group.members, changes, strict=True):
        seeds = np.random.SeedSequence([seed, zlib.crc32(group.layer.name.encode()), expert])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1)[0]))
        drawn = torch.rand(len(change), generator=generator, dtype=torch.float64).to(change.device)
        total += weight / density * torch.where(drawn < density, change, 0)
    return _unflattened(mean + total, group.experts[0])


def _changes(group):
    """The members' plain mean as one row, ``(P,)``, and each member's difference from it, ``(n, P)``."""
    rows = torch.stack([torch.cat([t.double().flatten() for t in _tensors(e)]) for e in group.experts])
    mean = sum(rows) / len(rows)
    return mean, rows - mean


def _tensors(expert):
    return [tensor for tensor in vars(expert).values() if tensor is not None]


def _unflattened(row, like):
    """An expert of the weights in a row, in the shapes of another."""
    parts = iter(row.split([tensor.numel() for tensor in _tensors(like)]))
    return like.map(lambda tensor: next(parts).view(tensor.shape).to(tensor.dtype))


def _described(expert):
    """One row per neuron: all that it reads and writes."""
    parts = (expert.up.flatten(1), expert.down.T, expert.bias)
    return torch.cat([part for part in parts if part is not None], 1)


def standardised(values, counts=None):
    """Columns less their mean, of length one; a constant column stays zero."""
    counts = values.new_ones(len(values)) if counts is None else counts
    centred = (values - (counts @ values) / counts.sum()) * counts.sqrt()[:, None]
    length, tiny = centred.norm(dim=0), torch.finfo(values.dtype).tiny
    rounding = 1e-12 * values.abs().amax(0).clamp(min=tiny) * len(values) ** 0.5
    return torch.where(length > rounding, centred / length.clamp(min=tiny), 0)


def _neuron_correlation(group, features):
    """Correlation of all members' neurons with one another, ``(n·I, n·I)``."""
    columns = []
    if "activations" in features:
        tokens, gates = group.tokens()
        activations = torch.cat([group.layer.activate(e, tokens) for e in group.experts], 1)
        # A token that was routed to two members counts twice.
        columns.append(standardised(activations, (gates != 0).sum(1).to(group.dtype)))
    if "weights" in features:
        columns.append(standardised(torch.cat([_described(e) for e in group.experts]).T))
    return sum(part.T @ part for part in columns)


def _pooled(group, pool="members"):
    """All members' neurons, and those of their average if asked, as one wide expert."""
    average = group.average()
    experts = [*group.experts, average] if pool == "averages" and len(group.members) > 1 else group.experts
    return replace(
        average,
        up=torch.cat([e.up for e in experts]),
        down=torch.cat([e.down for e in experts], 1),
        bias=None if average.bias is None else torch.cat([e.bias for e in experts]),
    )


def _clustered(group, target, width):
    """The weighted mean of the pooled neurons that become each of the new ones, by ``target`` ``(n·I,)``."""
    pool, new = _pooled(group), torch.arange(width, device=target.device)
    weights = group.weights.to(group.device, group.dtype).repeat_interleave(width)
    member = (target == new[:, None]).to(weights)
    # Neurons of members that no token was routed to weigh nothing; among themselves they count alike.
    share = torch.where((member * weights).sum(1, keepdim=True) > 0, member * weights, member)
    share /= share.sum(1, keepdim=True)
    return replace(
        pool,
        up=(share @ pool.up.flatten(1)).unflatten(1, pool.up.shape[1:]),
        down=pool.down @ share.T,
        bias=None if pool.bias is None else share @ pool.bias,
    )


@steps.combine("fix-dom", needs=_needs, matched=True)
def fixed_dominant(group, *, features: Literal[NEURON_FEATURES] = "activations"):
    """Each neuron is averaged with the dominant expert's that it correlates with most (HC-SMoE's Fix-Dom)."""
    width = len(group.experts[0].up)
    own = slice(group.dominant * width, (group.dominant + 1) * width)
    target = _neuron_correlation(group, features)[own].argmax(0)
    target[own] = torch.arange(width, device=target.device)
    return _clustered(group, target, width)


@steps.combine("zipit", needs=_needs)
def zipped(group, *, features: Literal[NEURON_FEATURES] = "activations"):
    """The most correlated neurons of all members are joined, until one expert's number is left (ZipIt).

    A joined neuron's correlation with another is a tenth of the smaller of its parts', as in the authors'
    code, so that joined ones wait.
    """
    c, width = _neuron_correlation(group, features).double().cpu().numpy(), len(group.experts[0].up)
    np.fill_diagonal(c, -1)
    owner, best, partner = np.arange(len(c)), c.max(1), c.argmax(1)
    for _ in range(len(c) - width):
        i = int(best.argmax())
        j = int(partner[i])
        owner[owner == j] = i
        c[i] = c[:, i] = 0.1 * np.minimum(c[i], c[j])
        c[i, i] = -1
        c[j] = c[:, j] = best[j] = -np.inf
        stale = np.flatnonzero((partner == i) | (partner == j) | (c[:, i] >= best))
        stale = np.union1d(stale[np.isfinite(best[stale])], [i])
        best[stale], partner[stale] = c[stale].max(1), c[stale].argmax(1)
    return _clustered(group, torch.from_numpy(np.unique(owner, return_inverse=True)[1]), width)


@steps.combine("least-squares", needs=("sample",), solves=True)
def least_squares(group, *, align: Literal[ALIGNMENTS] = "none", ridge: steps.NotNegative = 0.05):
    """Average what neurons read, and solve what they write (MergeMoE, arXiv 2510.14436)."""
    merged = group.once(("averaged", align), lambda: averaged(group, align=align))
    gram, xty = group.once(("normal", "averaged", align), lambda: normal_equations(group, merged))
    return replace(merged, down=_solved(gram, xty, ridge, merged.down.T).T)


def normal_equations(group, neurons):
    """Of the regression of what the group gave on what neurons would give instead, times the summed gates.

    Returns
    -------
    gram : (N, N) float64 tensor
    xty : (N, D) float64 tensor
    """
    values = group.activations(neurons).double()
    return values.T @ values, values.T @ group.outputs(neurons.offset).double()


def _solved(gram, xty, ridge, prior):
    """``argmin_W ‖V W − Y‖² + λ ‖W − prior‖²``, ``(N, D)``, λ relative to the mean squared column of V."""
    wide, diagonal = prior.double(), gram.diagonal()
    ridged = gram.diagonal_scatter(
        diagonal + max(float(diagonal.mean()) * ridge, torch.finfo(torch.float64).tiny)
    )
    # Solved for the change, so that a prior that fits already is returned as it is.
    right = xty - gram @ wide
    factor, singular = torch.linalg.cholesky_ex(ridged)
    if int(singular):  # to rounding
        change = torch.linalg.lstsq(ridged.cpu(), right.cpu(), driver="gelsd").solution.to(right.device)
    else:
        change = torch.cholesky_solve(right, factor)
    return (wide + change).to(prior.dtype)


def _check_refit(recipe):
    require(
        recipe.steps["group"] != "fuzzy" and not recipe.steps["compress"],
        '"refit" fits experts that are joined or trimmed: it goes with no pruning, fuzzy groups or compress.',
    )


@steps.refine("refit", needs=("sample",), check=_check_refit)
def refitted(group, neurons, rounds, *, ridge: steps.NotNegative = REFIT_RIDGE):
    """What an expert's neurons read and what they write, fitted in turns to a group's sampled outputs.

    What they read, gates and all, is moved by one Gauss-Newton step that lowers the residual: the
    activations' slopes make it a linear regression, which conjugate gradients solve, at the cost of a few
    passes over the tokens each, with a ridge that pulls towards the rows as they are (Levenberg, 1944). What
    they write is then solved for as in ``"least-squares"``. No gradient of the model's loss is involved, nor
    any text but the sample.

    Parameters
    ----------
    group : Group
    neurons : Neurons
        I' of them.
    rounds : int
    ridge : float
        For what they write.

    Returns
    -------
    Neurons
        That leave no more than those given; the same if these leave nothing.
    """
    residual = _residual(group, neurons)
    for _ in range(rounds):
        if float(residual.pow(2).sum()) <= 1e-12 * float(group.outputs().double().pow(2).sum()):
            break  # what is left is rounding
        step = _reading_step(group, neurons, residual)
        for scale in (1, 0.5, 0.25):
            trial = replace(neurons, up=neurons.up + scale * step)
            trial = replace(trial, down=_solved(*normal_equations(group, trial), ridge, neurons.down.T).T)
            trial_residual = _residual(group, trial)
            if trial_residual.pow(2).sum() < residual.pow(2).sum():
                neurons, residual = trial, trial_residual
                break
        else:
            break
    return neurons


def _residual(group, neurons):
    """What the group gives less what one expert gives instead, ``(T, D)``."""
    return group.outputs(neurons.offset) - group.activations(neurons) @ neurons.down.T


def _reading_step(group, neurons, residual):
    """Change of ``up``, ``(I', p, D)``, that takes most of a residual away, to first order and with a ridge.

    ``argmin_δ ‖R − Σ_jp (c s_jp (X δ_jp)) d_jᵀ‖² + Σ_jp λ_jp ‖δ_jp‖²`` for slopes s, gates c and what neurons
    write d, by conjugate gradients with the diagonal as preconditioner: solution x, residual r, direction p,
    step alpha.
    """
    tokens, gates = (t.float() for t in group.tokens())
    slopes = (
        slopes_of(group.layer, neurons, group.tokens()[0]).float() * gates.sum(1, keepdim=True)
    ).unbind()
    writes = neurons.down.float()

    def forward(change):
        return sum((tokens @ rows.T) * slope for rows, slope in zip(change, slopes, strict=True)) @ writes.T

    def adjoint(outputs):
        read = outputs @ writes
        return torch.stack([(read * slope).T @ tokens for slope in slopes])

    diagonal = torch.stack(
        [writes.pow(2).sum(0)[:, None] * (slope.pow(2).T @ tokens.pow(2)) for slope in slopes]
    )
    penalty = REFIT_RIDGE * diagonal.mean(2, keepdim=True) + torch.finfo(torch.float32).tiny
    inverse = 1 / (diagonal + penalty)
    r = adjoint(residual.float())
    x, p = torch.zeros_like(r), inverse * r
    rz = (r * p).sum()
    for _ in range(ITERATIONS):
        if not rz > 0:
            break
        image = adjoint(forward(p)) + penalty * p
        alpha = rz / (p * image).sum()
        x += alpha * p
        r -= alpha * image
        z = inverse * r
        before, rz = rz, (r * z).sum()
        p = z + rz / before * p
    return x.transpose(0, 1).to(neurons.up.dtype)


@steps.combine("joint-svd", needs=_needs)
def joint_svd(group, *, align: Literal[ALIGNMENTS] = "none", rank: steps.Fraction = 0.5):
    """One singular value decomposition of all members, right vectors averaged (Sub-MoE, arXiv 2506.23266).

    ``rank`` is the share of the singular values that stays, above 0 and at most 1.
    """
    experts = aligned(group, align)
    plain = merging.mean_of(experts, group.weights)

    def shared(matrices):
        u, s, v = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
        q, blocks = max(1, round(rank * len(s))), v.chunk(len(matrices), dim=1)
        mean = sum(w * block for w, block in zip(group.weights.tolist(), blocks, strict=True))
        return (u[:, :q] * s[:q]) @ mean[:q]

    up = [shared([e.up[:, p] for e in experts]) for p in range(plain.up.shape[1])]
    return replace(plain, up=torch.stack(up, 1), down=shared([e.down for e in experts]))


@steps.combine("trimming", needs=("sample",), solves=True)
def trimmed(group, *, width=None, ridge: steps.NotNegative = 0.02):
    """The best neurons of an expert itself; see :func:`selected`."""
    return selected(group, width=width, ridge=ridge)


@steps.combine("selection", needs=("sample",), solves=True, matched=True)
def selected(
    group, *, width=None, ridge: steps.NotNegative = 0.02, pool: Literal["members", "averages"] = "members"
):
    """The neurons of all members that best give what the group gave; what they write is solved for.

    ``pool="averages"`` lets the neurons of the members' average be chosen too.
    """
    width = width or len(group.experts[0].up)
    neurons = group.once(("neurons", pool), lambda: _pooled(group, pool))
    gram, xty = group.once(("normal", pool), lambda: normal_equations(group, neurons))
    chosen = group.once(("chosen", pool, width), lambda: chosen_columns(gram, xty, width))
    order = _completed(chosen, width, group, neurons)
    gram, xty, neurons = gram[order[:, None], order], xty[order], neurons.take(order)
    # The prior is what the neurons write anyway, at the scale that fits best.
    prior = neurons.down.T.double()
    fits = float((prior * (gram @ prior)).sum())
    prior = prior * (float((prior * xty).sum()) / fits if fits > 0 else 1.0)
    return replace(neurons, down=_solved(gram, xty, ridge, prior).T.to(neurons.down.dtype))


def _completed(chosen, width, group, pool):
    """Numbers of ``width`` neurons of the pool: those chosen, and others where the sample tells too little.

    Those of the members' average come first where it is in the pool, else the dominant expert's, then those
    that read and write most; near-copies of neurons that are chosen already come last, so that of equal
    experts each neuron is taken once.
    """
    if len(chosen) < width:
        vectors = _described(pool)
        length, tiny = vectors.norm(dim=1), torch.finfo(vectors.dtype).tiny
        size = length / length.max().clamp(min=tiny)
        each = len(group.experts[0].up)
        first = len(group.members) if len(pool.up) > each * len(group.members) else group.dominant
        size[first * each : (first + 1) * each] += 2
        order = torch.argsort(size, descending=True, stable=True).tolist()
        unlike = _unlike(vectors / length.clamp(min=tiny)[:, None], chosen, order, width)
        chosen = [*dict.fromkeys([*unlike, *order])][:width]
    return torch.tensor(sorted(chosen), device=pool.up.device)


def _unlike(unit, chosen, order, count):
    """The chosen rows, and others in some order up to ``count``, none near a copy of one before it."""
    unlike, rest = [*chosen], [*dict.fromkeys([*chosen, *order])][len(chosen) :]
    for start in range(0, len(rest), BATCH):
        rows = rest[start : start + BATCH]
        near = (unit[rows] @ unit[unlike].T).amax(1) if unlike else unit.new_zeros(len(rows))
        among = unit[rows] @ unit[rows].T
        for i, row in enumerate(rows):
            if len(unlike) == count:
                return unlike
            if near[i] <= 1 - 1e-6:  # above this cosine, it is taken for a copy
                unlike.append(row)
                near = torch.maximum(near, among[i])
    return unlike


def chosen_columns(gram, xty, width, *, block=None):
    """Columns of a regression chosen one after another, each the one that lowers the residual most.

    From the normal equations, by orthogonal least squares (Chen, Billings and Luo, 1989).

    Parameters
    ----------
    gram : (N, N) float64 tensor
    xty : (N, D) float64 tensor
    width : int
    block : int, optional
        Columns chosen at once, each for what the others of the block leave, among the four times as many that
        lower the residual most by themselves; then all others are projected off them in one matrix product.
        By default 1, the greedy choice itself, up to a width of 511, and about 256 blocks for larger ones.

    Returns
    -------
    list of int
        In the order chosen; fewer than ``width`` where no other column lowers the residual.
    """
    block = block or max(1, width // 256)
    left = gram.diagonal().clone()  # squared length of each column once the chosen ones are projected out
    floor = 1e-9 * left + 1e-30 * max(float(left.max()), 1e-300)
    basis = torch.zeros(len(gram), width, dtype=gram.dtype, device=gram.device)
    xty, chosen = xty.clone(), []  # the largest by far: changed in place
    while len(chosen) < width:
        done, size = len(chosen), min(block, width - len(chosen))
        lowers = torch.linalg.vector_norm(xty, dim=1).square() / left.clamp(min=torch.finfo(gram.dtype).tiny)
        gain = torch.where(left > floor, lowers, -1.0)
        best = [int(gain.argmax())]
        if float(gain[best]) <= 0:
            break
        if size > 1:
            near = gain.topk(min(4 * size, int((gain > 0).sum()))).indices
            rest = gram[near][:, near] - basis[near, :done] @ basis[near, :done].T
            best = near[chosen_columns(rest, xty[near], size, block=1)].tolist()
        columns = gram[:, best] - basis[:, :done] @ basis[best, :done].T
        while dependent := int((cholesky := torch.linalg.cholesky_ex(columns[best])).info):
            # What the others of the block leave of one is rounding: it is not chosen, now or later.
            columns = torch.cat([columns[:, : dependent - 1], columns[:, dependent:]], 1)
            left[best.pop(dependent - 1)] = 0
        columns = torch.linalg.solve_triangular(cholesky.L, columns.T, upper=False).T
        xty.addmm_(columns, torch.linalg.solve_triangular(cholesky.L, xty[best], upper=False), alpha=-1)
        basis[:, done : done + len(best)] = columns
        left = left - (columns**2).sum(1)
        left[best] = 0
        chosen += best
    return chosen


def slopes_of(layer, neurons, tokens):
    """Derivatives ``[p, T, I']`` of activations by what neurons read: gates' products and their own."""
    read, rows = layer.read(neurons, tokens)
    with torch.enable_grad():
        read = read.detach().requires_grad_()
        slopes = torch.autograd.grad(layer.activated(read).sum(), read)[0]
    return torch.stack([slopes[:, part] for part in rows.T])
