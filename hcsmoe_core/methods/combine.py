"""How the experts of a group become one: averaged, matched neuron by neuron, refitted to what they did, or chosen from."""

from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from hcsmoe_core._util import InputError, check_choice
from hcsmoe_core.merging import mean_of
from hcsmoe_core.moe import Neurons
from hcsmoe_core.steps import combine, refine

ALIGNMENTS = ("none", "weights", "activations")


NEURON_FEATURES = ("activations", "weights", "activations+weights")


POOLS = ("members", "averages")


ALIKE = 1 - 1e-6  # cosine above which a neuron is taken for a copy of another


BATCH = 256  # neurons that are compared at once with those taken


REFIT_RIDGE = 0.1  # of refits of what neurons read, relative to the mean of each neuron's squared slopes


FLOOR = 1e-12  # of the squared outputs: what is left is rounding


ITERATIONS = 30  # of conjugate gradients a refit


STEPS = 256  # in which neurons are chosen, at most about: of wide experts several at once


def _for_features(options):
    """The sample, where activations are among what neurons are matched by."""
    return ("sample",) if "activations" in options["features"].split("+") else ()


@combine("average", needs=lambda options: ("sample",) if options["align"] == "activations" else ())
def averaged(group, *, align="none"):
    """See :func:`combine`."""
    return mean_of(aligned(group, align), group.weights)


def aligned(group, how):
    """The members with their neurons in the order of the dominant expert's."""
    check_choice("align", how, ALIGNMENTS)
    if how == "none":
        return group.experts
    reference = group.experts[group.dominant]
    made = []
    for place, expert in enumerate(group.experts):
        if place == group.dominant:
            made.append(expert)
            continue
        score = None
        if how == "activations":
            score = _correlation_between(group, group.dominant, place)
        if score is None:
            score = _weight_products(reference, expert)
        made.append(expert.take(torch.from_numpy(linear_sum_assignment(score, maximize=True)[1])))
    return made


def _weight_products(reference, expert):
    """Inner products of what neurons read and write, ``(I, I)``."""
    return (_described(reference) @ _described(expert).T).cpu().numpy()


def _described(expert):
    """One row a neuron: all that it reads and writes."""
    parts = [expert.up.flatten(1), expert.down.T]
    return torch.cat(parts if expert.bias is None else [*parts, expert.bias], 1)


def _correlation_between(group, first, second):
    """Correlation of two members' activations over the tokens routed to either, ``(I, I)``, or None with too few tokens."""
    tokens, _ = group.tokens([first, second])
    if len(tokens) < 2:
        return None
    a, b = (standardised(group.layer.activate(group.experts[m], tokens)) for m in (first, second))
    return (a.T @ b).cpu().numpy()


def standardised(values, counts=None):
    """Columns less their mean, of length one; a constant column stays zero."""
    counts = torch.ones(len(values), dtype=values.dtype, device=values.device) if counts is None else counts
    centred = (values - (counts @ values) / counts.sum()) * counts.sqrt()[:, None]
    length = centred.norm(dim=0)
    tiny = 1e-12 * values.abs().amax(0).clamp(min=torch.finfo(values.dtype).tiny) * len(values) ** 0.5
    return torch.where(length > tiny, centred / length.clamp(min=torch.finfo(values.dtype).tiny), 0)


def _neuron_correlation(group, features):
    """Correlation of all members' neurons with one another, ``(n·I, n·I)``."""
    check_choice("features", features, NEURON_FEATURES)
    total = 0
    if "activations" in features.split("+"):
        tokens, gates = group.tokens()
        # A token that was routed to two members counts twice.
        standard = standardised(
            torch.cat([group.layer.activate(e, tokens) for e in group.experts], 1),
            (gates != 0).sum(1).to(group.dtype),
        )
        total = total + standard.T @ standard
    if "weights" in features.split("+"):
        standard = standardised(torch.cat([_described(e) for e in group.experts]).T)
        total = total + standard.T @ standard
    return total


def _pooled(group, pool="members"):
    """All members' neurons as one wide expert, with those of their average if asked; its offset is the members' average."""
    average = group.average()
    experts = [*group.experts, average] if pool == "averages" and len(group.members) > 1 else group.experts
    bias = None if experts[0].bias is None else torch.cat([e.bias for e in experts])
    return Neurons(
        torch.cat([e.up for e in experts]), torch.cat([e.down for e in experts], 1), bias, average.offset
    )


def _clustered(group, place, width):
    """The weighted mean of the pooled neurons that go to each place."""
    pool = _pooled(group)
    weights = group.weights.to(group.device, group.dtype).repeat_interleave(
        len(pool.up) // len(group.members)
    )
    goes = torch.zeros(width, len(pool.up), dtype=group.dtype, device=group.device)
    goes[place, torch.arange(len(pool.up))] = 1
    weighted = goes * weights
    # Neurons of members that no token was routed to weigh nothing; among themselves they count alike.
    share = torch.where(weighted.sum(1, keepdim=True) > 0, weighted, goes)
    share = share / share.sum(1, keepdim=True)
    up = (share @ pool.up.flatten(1)).unflatten(1, pool.up.shape[1:])
    return Neurons(up, pool.down @ share.T, None if pool.bias is None else share @ pool.bias, pool.offset)


@combine("fix-dom", needs=_for_features, matched=True)
def fixed_dominant(group, *, features="activations"):
    """See :func:`combine`."""
    correlation = _neuron_correlation(group, features)
    width = len(group.experts[0].up)
    own = slice(group.dominant * width, (group.dominant + 1) * width)
    place = correlation[own].argmax(0)
    place[own] = torch.arange(width, device=place.device)
    return _clustered(group, place, width)


@combine("zipit", needs=_for_features)
def zipped(group, *, features="activations"):
    """See :func:`combine`."""
    correlation = _neuron_correlation(group, features).cpu().numpy()
    width = len(group.experts[0].up)
    return _clustered(group, torch.from_numpy(_zip_places(correlation, width)), width)


def _zip_places(correlation, width):
    """Which of ``width`` merged neurons each neuron goes to, joining the most correlated pair until so many are left.

    A joined neuron's correlation with another is a tenth of the smaller of its parts', as in the authors' code, so that
    joined ones wait.
    """
    c = np.array(correlation, dtype=np.float64)
    np.fill_diagonal(c, -1)
    owner = np.arange(len(c))
    best, partner = c.max(1), c.argmax(1)
    for _ in range(len(c) - width):
        i = int(best.argmax())
        j = int(partner[i])
        owner[owner == j] = i
        c[i] = 0.1 * np.minimum(c[i], c[j])
        c[:, i] = c[i]
        c[i, i] = -1
        c[j], c[:, j], best[j] = -np.inf, -np.inf, -np.inf
        stale = np.flatnonzero((partner == i) | (partner == j) | (c[:, i] >= best))
        stale = np.union1d(stale[np.isfinite(best[stale])], [i])
        best[stale], partner[stale] = c[stale].max(1), c[stale].argmax(1)
    return np.unique(owner, return_inverse=True)[1]


@combine("least-squares", needs=("sample",), solves=True)
def least_squares(group, *, align="none", ridge=0.05):
    """See :func:`combine`."""
    merged = group.once(("averaged", align), lambda: averaged(group, align=align))
    if not len(group.outputs()):
        return merged
    gram, moved = group.once(("normal", "averaged", align), lambda: normal_equations(group, merged))
    return replace(merged, down=_solved(gram, moved, ridge, merged.down.T).T)


def normal_equations(group, neurons):
    """Of the regression of what the group gave on what some neurons would give in its place, times its summed gates.

    Returns
    -------
    gram : (N, N) float64 tensor
    moved : (N, D) float64 tensor
    """
    values = group.activations(neurons).double()
    return values.T @ values, values.T @ group.outputs(neurons.offset).double()


def _solved(gram, moved, ridge, prior):
    """``argmin_W ‖V W − Y‖² + λ ‖W − prior‖²`` from VᵀV and VᵀY, λ relative to the mean squared column of V, ``(N, D)``."""
    wide = prior.double()
    penalty = max(float(gram.diagonal().mean()) * ridge, torch.finfo(torch.float64).tiny)
    ridged = gram.clone()
    ridged.diagonal().add_(penalty)
    # Solved for the change, so that a prior that fits already is returned as it is.
    change = _symmetric_solve(ridged, moved - gram @ wide)
    return (wide + change).to(prior.dtype)


def _symmetric_solve(gram, right):
    """Cholesky, or least squares where the matrix is singular to rounding."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return torch.linalg.lstsq(gram.cpu(), right.cpu(), driver="gelsd").solution.to(right.device)
    return torch.cholesky_solve(right, factor)


@refine("refit", needs=("sample",), solves=True)
def refitted(group, neurons, rounds, *, ridge=REFIT_RIDGE):
    """An expert fitted further to what a group gives on its sampled tokens, what its neurons read and what they write in turns.

    What they read, gates and all, is moved by one Gauss-Newton step that lowers the residual: the activations' slopes make it
    a linear regression, which conjugate gradients solve, at the cost of a few passes over the tokens each, with a ridge that
    pulls towards the rows as they are (Levenberg, 1944). What they write is then solved for as in ``"least-squares"``. No
    gradient of the model's loss is involved, nor any text but the sample.

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
    left = _residual(group, neurons) if rounds else None
    for _ in range(rounds):
        if float(left.pow(2).sum()) <= FLOOR * float(group.outputs().double().pow(2).sum()):
            break
        step = _reading_step(group, neurons, left)
        for scale in (1, 0.5, 0.25):
            moved = replace(neurons, up=neurons.up + scale * step)
            gram, outputs = normal_equations(group, moved)
            moved = replace(moved, down=_solved(gram, outputs, ridge, moved.down.T).T)
            now = _residual(group, moved)
            if now.pow(2).sum() < left.pow(2).sum():
                neurons, left = moved, now
                break
        else:
            break
    return neurons


def _residual(group, neurons):
    """What the group gives less what one expert gives in its place, ``(T, D)``."""
    return group.outputs(neurons.offset) - group.activations(neurons) @ neurons.down.T


def _reading_step(group, neurons, left):
    """Change of ``up``, ``(I', p, D)``, that takes most of a residual away, to first order and with a ridge.

    ``argmin_δ ‖R − Σ_jp (c s_jp (X δ_jp)) d_jᵀ‖² + Σ_jp λ_jp ‖δ_jp‖²`` for slopes s, gates c and what neurons write d, by
    conjugate gradients with the diagonal as preconditioner.
    """
    tokens, gates = (t.float() for t in group.tokens())
    slopes = (group.layer.slopes(neurons, group.tokens()[0]).float() * gates.sum(1, keepdim=True)).unbind()
    writes = neurons.down.float()

    def given(change):
        return sum((tokens @ rows.T) * slope for rows, slope in zip(change, slopes, strict=True)) @ writes.T

    def taken(residual):
        read = residual @ writes
        return torch.stack([(read * slope).T @ tokens for slope in slopes])

    squares = writes.pow(2).sum(0)[:, None]
    diagonal = torch.stack([squares * (slope.pow(2).T @ tokens.pow(2)) for slope in slopes])
    penalty = REFIT_RIDGE * diagonal.mean(2, keepdim=True) + torch.finfo(torch.float32).tiny
    scale = 1 / (diagonal + penalty)
    rest = taken(left.float())
    change, direction = torch.zeros_like(rest), scale * rest
    size = (rest * direction).sum()
    for _ in range(ITERATIONS):
        if not size > 0:
            break
        image = taken(given(direction)) + penalty * direction
        length = size / (direction * image).sum()
        change += length * direction
        rest -= length * image
        preconditioned = scale * rest
        before, size = size, (rest * preconditioned).sum()
        direction = preconditioned + size / before * direction
    return change.transpose(0, 1).to(neurons.up.dtype)


@combine("joint-svd", needs=lambda options: ("sample",) if options["align"] == "activations" else ())
def joint_svd(group, *, align="none", rank=0.5):
    """See :func:`combine`."""
    if not 0 < rank <= 1:
        raise InputError(f'The "rank" argument must be above 0 and at most 1; not {rank}.')
    experts = aligned(group, align)
    plain = mean_of(experts, group.weights)
    weights = group.weights.tolist()

    def shared(matrices):
        columns = matrices[0].shape[1]
        u, s, v = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
        kept = max(1, round(rank * len(s)))
        mean = sum(w * part for w, part in zip(weights, v.split(columns, dim=1), strict=True))
        return (u[:, :kept] * s[:kept]) @ mean[:kept]

    up = torch.stack([shared([e.up[:, p] for e in experts]) for p in range(plain.up.shape[1])], 1)
    return Neurons(up, shared([e.down for e in experts]), plain.bias, plain.offset)


@combine("trimming", needs=("sample",), solves=True)
def trimmed(group, *, width=None, ridge=0.02):
    """See :func:`selected`."""
    return selected(group, width=width, ridge=ridge)


@combine("selection", needs=("sample",), solves=True, matched=True)
def selected(group, *, width=None, ridge=0.02, pool="members"):
    """See :func:`combine`."""
    check_choice("pool", pool, POOLS)
    width = width or len(group.experts[0].up)
    neurons = group.once(("neurons", pool), lambda: _pooled(group, pool))
    if not len(group.outputs()):
        return neurons.take(_completed([], width, group, neurons))
    gram, moved = group.once(("normal", pool), lambda: normal_equations(group, neurons))
    chosen = group.once(("chosen", pool, width), lambda: chosen_columns(gram, moved, width))
    kept = _completed(chosen, width, group, neurons)
    gram, moved, made = gram[kept[:, None], kept], moved[kept], neurons.take(kept)
    # The prior is what the neurons write anyway, at the scale that fits best.
    prior = made.down.T.double()
    fits = float((prior * (gram @ prior)).sum())
    prior = prior * (float((prior * moved).sum()) / fits if fits > 0 else 1.0)
    return replace(made, down=_solved(gram, moved, ridge, prior).T.to(made.down.dtype))


def _completed(chosen, width, group, pool):
    """``width`` neurons of the pool, in order: those chosen, and where the sample tells no more, others.

    Those of the members' average come first where it is in the pool, else the dominant expert's, then those that read and
    write most; near-copies of neurons that are taken already come last, so that of equal experts each neuron is taken once.
    """
    if len(chosen) < width:
        vectors = _described(pool)
        length = vectors.norm(dim=1)
        size = length / length.max().clamp(min=torch.finfo(length.dtype).tiny)
        each = len(group.experts[0].up)
        first = len(group.members) if len(pool.up) > each * len(group.members) else group.dominant
        size[first * each : (first + 1) * each] += 2
        unit = vectors / length.clamp(min=torch.finfo(length.dtype).tiny)[:, None]
        order = torch.argsort(size, descending=True, stable=True).tolist()
        chosen = _unlike(unit, chosen, order, width)
        left = set(order) - set(chosen) if len(chosen) < width else ()
        chosen += [place for place in order if place in left][: width - len(chosen)]
    return torch.tensor(sorted(chosen), device=pool.up.device)


def _unlike(unit, taken, order, count):
    """The taken rows of unit vectors, and others in some order until there are ``count``, none near a copy of one before it."""
    taken, held = list(taken), set(taken)
    rest = [place for place in order if place not in held]
    for start in range(0, len(rest), BATCH):
        places = rest[start : start + BATCH]
        near = (unit[places] @ unit[taken].T).amax(1) if taken else unit.new_zeros(len(places))
        among = unit[places] @ unit[places].T
        for i, place in enumerate(places):
            if len(taken) == count:
                return taken
            if near[i] <= ALIKE:
                taken.append(place)
                near = torch.maximum(near, among[i])
    return taken


def forward_selection(pool, target, width, *, block=None):
    """Columns of a regression chosen one after another, each the one that lowers the residual most.

    Parameters
    ----------
    pool : (T, N) tensor
    target : (T, D) tensor
    width : int
        Columns to choose.
    block : int, optional
        As for :func:`chosen_columns`.

    Returns
    -------
    list of int
        In the order chosen; fewer than ``width`` where no other column lowers the residual.
    """
    pool = pool.double()
    return chosen_columns(pool.T @ pool, pool.T @ target.double(), width, block=block)


def chosen_columns(gram, moved, width, *, block=None):
    """:func:`forward_selection` from the normal equations (orthogonal least squares; Chen, Billings and Luo, 1989).

    Parameters
    ----------
    gram : (N, N) float64 tensor
    moved : (N, D) float64 tensor
    width : int
    block : int, optional
        Columns chosen at once, each for what the others of the block leave, among the four times as many that lower the
        residual most by themselves; then all others are projected off them in one matrix product. By default 1, the greedy
        choice itself, up to a width of 511, and for larger ones so many that there are about 256 blocks.

    Returns
    -------
    list of int
    """
    block = max(1, width // STEPS) if block is None else block
    first = gram.diagonal().clone()
    left = first.clone()  # squared length of each column once the chosen ones are projected out
    floor = 1e-9 * first + 1e-30 * max(float(first.max()), 1e-300)
    basis = torch.zeros(len(gram), width, dtype=gram.dtype, device=gram.device)
    moved, chosen = moved.clone(), []  # the largest by far: changed in place
    while len(chosen) < width:
        done, size = len(chosen), min(block, width - len(chosen))
        squares = torch.linalg.vector_norm(moved, dim=1).square()
        gain = torch.where(left > floor, squares / left.clamp(min=torch.finfo(gram.dtype).tiny), -1.0)
        found = [int(gain.argmax())]
        if float(gain[found[0]]) <= 0:
            break
        if size > 1:
            near = gain.topk(min(4 * size, int((gain > 0).sum()))).indices
            rest = gram[near][:, near] - basis[near, :done] @ basis[near, :done].T
            found = near[chosen_columns(rest, moved[near], size, block=1)].tolist()
        columns = gram[:, found] - basis[:, :done] @ basis[found, :done].T
        factor = torch.linalg.cholesky(columns[found])
        columns = torch.linalg.solve_triangular(factor, columns.T, upper=False).T
        moved.addmm_(columns, torch.linalg.solve_triangular(factor, moved[found], upper=False), alpha=-1)
        basis[:, done : done + len(found)] = columns
        left = left - (columns**2).sum(1)
        left[found] = 0
        chosen += found
    return chosen
