"""The second step of MC-SMoE: each projection of the experts left after merging as a low-rank product and a few rows.

Li et al., ICLR 2024 (arXiv 2310.01334, section 3.3) write ``W = A B + S`` with S row-sparse and find both by training
with distillation. Here nothing is trained: second moments of what enters each projection stand in for the gradients.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch

from hcsmoe_core._util import InputError, check_count
from hcsmoe_core.moe import Neurons
from hcsmoe_core.replace import set_rows
from hcsmoe_core.steps import compress as compress_step

RANK_SHARE = 0.5


PARTS = ("A", "B", "S", "rows")


SAVED = re.compile(
    r"(?P<layer>.+)\.(?P<expert>0|[1-9]\d*)\.(?P<matrix>up\.(?:0|[1-9]\d*)|down)\.(?P<part>A|B|S|rows)"
)


@dataclass(frozen=True)
class Factors:
    """A matrix ``W`` ``[d1, d2]`` as ``A B + S``, of which S has n rows that are not zero.

    Attributes
    ----------
    A : (d1, q) tensor
    B : (q, d2) tensor
    rows : (n,) int64 tensor
        Places of the rows of S, ascending.
    S : (n, d2) tensor
    """

    A: torch.Tensor
    B: torch.Tensor
    rows: torch.Tensor
    S: torch.Tensor

    @property
    def shape(self):
        """``(d1, d2)``."""
        return len(self.A), self.B.shape[1]

    @property
    def numbers(self):
        """Numbers kept, ``q (d1 + d2) + n d2``: A, B and S, without the places of the rows.

        Multiplying a vector by the matrix takes as many multiplications.
        """
        return self.A.numel() + self.B.numel() + self.S.numel()

    def dense(self):
        """``A B + S`` ``[d1, d2]``, in float64."""
        made = self.A.double() @ self.B.double()
        made[self.rows] += self.S.double()
        return made


def second_moment(inputs, ridge=1e-3):
    """Second moment of what enters a matrix, with a ridge: ``M = (1/T) Σ x xᵀ + ridge · m · I``, m the mean diagonal.

    Parameters
    ----------
    inputs : (T, d2) float tensor
    ridge : float
        Relative to the mean of the diagonal; keeps M positive definite where there are fewer tokens than inputs.

    Returns
    -------
    (d2, d2) float64 tensor
        The identity where there are no tokens, or only zeros.

    Raises
    ------
    ValueError
        If the inputs are not such a tensor, or are not finite, or ridge is negative.
    """
    _check_ridge(ridge)
    x = _matrix("inputs", inputs)
    unit = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    moment = x.T @ x / max(1, len(x))
    if not moment.any():
        return unit
    return moment + ridge * moment.diagonal().mean() * unit


def factor(weight, moment, rank, rows=0):
    """A matrix as a low-rank product and its most important residual rows, without training (whitened SVD).

    With ``M = L Lᵀ`` and ``W L = U Σ Vᵀ``, ``A = U_q Σ_q^½`` and ``B = Σ_q^½ V_qᵀ L⁻¹`` are the product of rank q with
    the smallest ``‖(W − A B) L‖_F``: the smallest mean squared error of the outputs where M is the second moment of the
    inputs. S holds the rows of ``R = W − A B`` with the largest ``R_i M R_iᵀ`` as they are (ties: the first), so that
    ``A B + S`` has those rows of W. Of each column of A, the entry with the largest absolute value is positive.

    Parameters
    ----------
    weight : (d1, d2) float tensor
    moment : (d2, d2) float tensor
        M, symmetric and positive definite; see :func:`second_moment`.
    rank : int
        q, from 0 to the smaller of d1 and d2.
    rows : int
        n, from 0 to d1.

    Returns
    -------
    Factors
        In float64.

    Raises
    ------
    ValueError
        If an argument is not as above.
    """
    w = _matrix("weight", weight)
    check_count("rank", rank, 0, min(w.shape))
    check_count("rows", rows, 0, len(w))
    m = _matrix("moment", moment)
    if m.shape != (w.shape[1], w.shape[1]):
        raise InputError(f'The "moment" argument must be [{w.shape[1]}, {w.shape[1]}]; not {list(m.shape)}.')
    root = _root("moment", m)
    a, b = _low_rank(w, root, rank)
    best = torch.argsort(_importance(w - a @ b, root), descending=True, stable=True)[:rows]
    return _with_rows(w, a, b, best)


def _low_rank(w, root, rank):
    u, sigma, v = torch.linalg.svd(w @ root, full_matrices=False)
    u, sigma, v = u[:, :rank], sigma[:rank].sqrt(), v[:rank]
    if rank:
        sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0).to(u)
        u, v = u * sign, v * sign[:, None]
    b = torch.linalg.solve_triangular(root, sigma[:, None] * v, upper=False, left=False)
    return (u * sigma).contiguous(), b.contiguous()


def _importance(residual, root):
    """``R_i M R_iᵀ`` of each row: its share of the mean squared error."""
    return (residual @ root).square().sum(1)


def _with_rows(w, a, b, rows):
    rows = rows.sort().values
    return Factors(a, b, rows, (w - a @ b)[rows])


def _root(name, moment):
    root, info = torch.linalg.cholesky_ex(moment)
    if info.any():
        raise InputError(f'{name}: the second moment is not positive definite; give a larger "ridge".')
    return root


def compress(layers, *, share, rank=None, ridge=1e-3, rank_share=RANK_SHARE):
    """Factor every projection of every expert within one budget (MC-SMoE, arXiv 2310.01334, section 3.3), untrained.

    Gate, up and down projections are matrices of their own, named ``"up.0"``, ``"up.1"`` (where there is a gate: the
    gate and the up projection) and ``"down"``. Each first becomes a product of rank q. What is left of the budget goes
    to rows of the residuals, chosen over all matrices of all layers together, by importance for each number that is
    kept: ``R_i M R_iᵀ / d2``, largest first; ties go to the earlier layer, expert, matrix and row. A row that no longer
    fits is passed over and smaller ones are tried, so that less is left over than the smallest row left out takes.

    As in the paper, importances of different layers are compared as they are: a layer with larger outputs gets more
    rows. They are means over the tokens of each expert, however few, and not weighted by how often the router chose it.

    Parameters
    ----------
    layers : list of (list of r Neurons, list of r (T_g, D) tensors, callable)
        Of each layer: its experts; the tokens that were routed to each, maybe none; and what gives activations
        ``(T_g, I)`` from an expert and tokens, as :meth:`MoELayer.activate` does. An expert without tokens, or whose
        inputs or activations are all zero, is factored as if each were an independent number with variance 1.
    share : float
        Of the weights given, above 0 and up to 1: ``floor(share · Σ d1 d2)`` numbers are kept at most. Biases are kept
        as they are and not counted, nor are the places of rows.
    rank : int, optional
        q of every matrix, from 0 (rows alone); by default ``max(1, round(rank_share · share · d1 d2 / (d1 + d2)))``.
    ridge : float
        See :func:`second_moment`.
    rank_share : float
        Share of the budget that goes to the products where ``rank`` is not given, from 0 to 1.

    Returns
    -------
    list of list of dict of str to Factors
        By layer, expert and name of the matrix; float64, on the experts' device.

    Raises
    ------
    ValueError
        If an argument is not as above, a weight or token is not finite, or the products alone take more than the budget.
    """
    layers = list(layers)
    _check_share("share", share)
    _check_share("rank_share", rank_share, zero=True)
    _check_ridge(ridge)
    _check_layers(layers)
    shapes = [tuple(w.shape) for experts, _, _ in layers for e in experts for w in _matrices(e).values()]
    ranks = [_rank(shape, share, rank, rank_share) for shape in shapes]
    total, products = (
        sum(a * b for a, b in shapes),
        sum(q * (a + b) for q, (a, b) in zip(ranks, shapes, strict=True)),
    )
    # A product such as 0.29 · 100 falls short of 29 by rounding alone.
    budget = math.floor(round(share * total, 6))
    if products > budget:
        raise InputError(
            f'The "rank" and "share" arguments do not fit: products of rank {min(ranks)} to {max(ranks)} take {products} '
            f"numbers, and share {share} of {total} weights is {budget}; give a smaller rank or a larger share."
        )
    found, importances, left = [], [], iter(ranks)
    for place, (experts, tokens, activate) in enumerate(layers):
        for g, (expert, x) in enumerate(zip(experts, tokens, strict=True)):
            for name, w, root in _whitened(f"layers[{place}], expert {g}", expert, x, activate, ridge):
                a, b = _low_rank(w, root, next(left))
                found.append((place, g, name, a, b))
                importances.append(_importance(w - a @ b, root).cpu().numpy())
    scores = np.concatenate([i / d2 for i, (_, d2) in zip(importances, shapes, strict=True)])
    costs = np.concatenate([np.full(d1, d2) for d1, d2 in shapes])
    taken = np.zeros(len(scores), dtype=bool)
    taken[_within(scores, costs, budget - products)] = True
    made, start = [[{} for _ in experts] for experts, _, _ in layers], 0
    for (place, g, name, a, b), (d1, _) in zip(found, shapes, strict=True):
        rows = torch.from_numpy(taken[start : start + d1].nonzero()[0]).to(a.device)
        # The residuals of all matrices would take more memory than the weights, so that they are worked out again.
        made[place][g][name] = _with_rows(_matrices(layers[place][0][g])[name].double(), a, b, rows)
        start += d1
    return made


def _whitened(where, expert, tokens, activate, ridge):
    """Name, weight and Cholesky factor of the second moment of the inputs, of each matrix of an expert."""
    expert = expert.map(lambda t: t.detach().double())
    x = _matrix(f"{where}: tokens", tokens).to(expert.up.device)
    named = {name: _matrix(f"{where}: {name}", w) for name, w in _matrices(expert).items()}
    hidden = _matrix(f"{where}: activations", activate(expert, x))
    if hidden.shape != (len(x), expert.down.shape[1]):
        wanted = [len(x), expert.down.shape[1]]
        raise InputError(f"{where}: the activations must be {wanted}; not {list(hidden.shape)}.")
    root = _root(f"{where}: tokens", second_moment(x, ridge))
    for name, w in named.items():
        yield (
            name,
            w,
            root if name != "down" else _root(f"{where}: activations", second_moment(hidden, ridge)),
        )


def _within(scores, costs, budget):
    """Places of what is taken: the largest score first, ties by order, each that still fits."""
    taken, smallest = [], costs.min()
    order = np.argsort(-scores, kind="stable")
    for place, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        if budget < smallest:
            break
        if cost <= budget:
            taken.append(place)
            budget -= cost
    return taken


def _rank(shape, share, rank, rank_share):
    d1, d2 = shape
    if rank is None:
        return max(1, round(rank_share * share * d1 * d2 / (d1 + d2)))
    return check_count("rank", rank, 0, min(shape))


def _matrices(expert):
    """Projections of an expert by name, each ``[d1, d2]``."""
    return {f"up.{q}": expert.up[:, q] for q in range(expert.up.shape[1])} | {"down": expert.down}


def densified(neurons, factors):
    """An expert with ``A B + S`` in the place of each projection, as vast as before, for models that know no factors.

    Parameters
    ----------
    neurons : Neurons
        The expert that was factored; its biases are kept.
    factors : dict of str to Factors

    Returns
    -------
    Neurons
        In the dtype and on the device of ``neurons``; sums are float64, rounded once.

    Raises
    ------
    ValueError
        If a matrix is missing, unknown or of another shape.
    """
    wanted = {name: tuple(w.shape) for name, w in _matrices(neurons).items()}
    given = {name: f.shape for name, f in factors.items()}
    if wanted != given:
        raise InputError(f'The "factors" argument must hold the matrices {wanted}; not {given}.')
    made = {name: f.dense().to(neurons.up) for name, f in factors.items()}
    up = torch.stack([made[f"up.{q}"] for q in range(neurons.up.shape[1])], dim=1)
    return Neurons(up, made["down"], neurons.bias, neurons.offset)


def saved_tensors(factors, dtype=torch.bfloat16):
    """Factors as named tensors for a safetensors file; :func:`from_saved` gives them back.

    Parameters
    ----------
    factors : dict of str to list of dict of str to Factors
        By layer name, expert and matrix.
    dtype : torch.dtype
        Floating-point type of A, B and S; rows stay int64.

    Returns
    -------
    dict of str to tensor
        Named ``{layer}.{expert}.{matrix}.{A|B|S|rows}``, on the CPU.

    Raises
    ------
    ValueError
        If dtype is not floating-point, or a value is not finite in it.
    """
    _check_dtype(dtype)
    made = {}
    for layer, experts in factors.items():
        for g, matrices in enumerate(experts):
            for matrix, parts in matrices.items():
                for part in PARTS:
                    name, tensor = f"{layer}.{g}.{matrix}.{part}", getattr(parts, part).detach().cpu()
                    tensor = tensor.to(torch.int64 if part == "rows" else dtype).contiguous()
                    if not torch.isfinite(tensor).all():
                        raise InputError(
                            f"{name} holds values that are not finite in {dtype}; give another dtype."
                        )
                    made[name] = tensor
    return made


def from_saved(tensors):
    """What :func:`saved_tensors` was given, at the dtype it was given.

    Parameters
    ----------
    tensors : dict of str to tensor

    Returns
    -------
    dict of str to list of dict of str to Factors
        Layers in the order of their first tensors.

    Raises
    ------
    ValueError
        If a name is not such a one, or a tensor is missing, of the wrong shape or type, or not finite, or a row is out
        of range or not above the row before it; the message names the tensor.
    """
    found = {}
    for name, tensor in tensors.items():
        match = SAVED.fullmatch(name)
        if match is None:
            raise InputError(
                f"{name} is no part of a factored expert; such names end in .(expert).(matrix).(A|B|S|rows)."
            )
        layer, expert, matrix, part = match.group("layer", "expert", "matrix", "part")
        found.setdefault(layer, {}).setdefault(int(expert), {}).setdefault(matrix, {})[part] = tensor
    return {
        layer: [_expert(f"{layer}.{g}", experts, g) for g in range(max(experts) + 1)]
        for layer, experts in found.items()
    }


def _expert(name, experts, g):
    ups = (
        len({m for parts in experts.values() for m in parts} - {"down"}) or 1
    )  # if one is left out, another is missing
    made = {
        m: _factors(f"{name}.{m}", experts.get(g, {}).get(m, {}))
        for m in (*(f"up.{q}" for q in range(ups)), "down")
    }
    up, first = made["up.0"].shape, made["up.0"].A.dtype
    for matrix, factors in made.items():
        wanted = up[::-1] if matrix == "down" else up
        if factors.shape != wanted:
            raise InputError(
                f"{name}.{matrix}.A and B make {factors.shape}, which does not fit {name}.up.0 of {up}."
            )
        if factors.A.dtype != first:
            raise InputError(f"{name}.{matrix}.A is {factors.A.dtype}, but {name}.up.0.A is {first}.")
    return made


def _factors(name, parts):
    for part in PARTS:
        if part not in parts:
            raise InputError(f"{name}.{part} is missing.")
    a, b, s, rows = (parts[p] for p in PARTS)
    for part, tensor in (("A", a), ("B", b), ("S", s)):
        if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.dtype != a.dtype:
            wanted = a.dtype if a.is_floating_point() else "floating-point"
            raise InputError(
                f"{name}.{part} must be a matrix and {wanted}; not {tensor.dtype} {list(tensor.shape)}."
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name}.{part} holds NaN or infinite values; the file is damaged.")
    if rows.ndim != 1 or rows.dtype != torch.int64:
        raise InputError(f"{name}.rows must be a list of int64; not {rows.dtype} {list(rows.shape)}.")
    if b.shape[0] != a.shape[1]:
        raise InputError(f"{name}.B must have {a.shape[1]} rows, as A has columns; not {b.shape[0]}.")
    if s.shape != (len(rows), b.shape[1]):
        raise InputError(f"{name}.S must be {[len(rows), b.shape[1]]}, from rows and B; not {list(s.shape)}.")
    if len(rows) and (rows.min() < 0 or rows.max() >= len(a) or (rows.diff() <= 0).any()):
        raise InputError(f"{name}.rows must be ascending places from 0 to {len(a) - 1}; not {rows.tolist()}.")
    return Factors(a, b, rows, s)


def savings(factors, *, experts, top_k, usage=None, widths=None, dtype=torch.bfloat16):
    """Memory and arithmetic of the experts of all layers, as MC-SMoE reports them (arXiv 2310.01334, table 2).

    Counts the projections of the routed experts alone: no biases, routers, shared experts or attention. A token goes
    through k experts before and after merging; one that picks two experts of one group goes through theirs twice.

    Parameters
    ----------
    factors : list of list of dict of str to Factors
        As :func:`compress` gives them.
    experts : list of int
        E of each layer, before merging.
    top_k : list of int
        k of each layer.
    usage : list of (r,) sequences of float, optional
        Of each layer: how often tokens go to each merged expert, in any unit. By default all equally often; matters as
        experts may have kept different numbers of rows.
    widths : list of int, optional
        I of the original experts of each layer, where merging has changed it.
    dtype : torch.dtype
        What the weights are stored in.

    Returns
    -------
    dict
        ``"weights"``, ``"bytes"`` and ``"multiply_accumulates"`` (a token, all layers; mean over experts by usage), each
        a dict with ``"original"``, ``"merged"`` and ``"compressed"``; and ``"saved"``, for each of these three the
        shares of the original that ``"merged"`` and ``"compressed"`` save. Compressed bytes include 8 for each row's
        place.

    Raises
    ------
    ValueError
        If an argument does not fit the factors.
    """
    _check_dtype(dtype)
    usage = [[1.0] * len(layer) for layer in factors] if usage is None else usage
    widths = [None] * len(factors) if widths is None else widths
    for argument, value in {"experts": experts, "top_k": top_k, "usage": usage, "widths": widths}.items():
        if len(value) != len(factors):
            raise InputError(
                f'The "{argument}" argument must hold {len(factors)} items, one a layer; not {len(value)}.'
            )
    weights, work = (dict.fromkeys(("original", "merged", "compressed"), 0) for _ in range(2))
    places = 0
    for layer, count, k, often, width in zip(factors, experts, top_k, usage, widths, strict=True):
        check_count("experts", count, len(layer))
        check_count("top_k", k, 1, count)
        often = np.asarray(often, dtype=np.float64)
        if (
            often.shape != (len(layer),)
            or not np.isfinite(often).all()
            or (often < 0).any()
            or often.sum() == 0
        ):
            raise InputError(
                f'The "usage" argument must hold {len(layer)} counts, not all zero; not {often.tolist()}.'
            )
        before, hidden = layer[0]["down"].shape
        original = len(layer[0]) * before * (hidden if width is None else check_count("widths", width, 1))
        merged = [sum(math.prod(f.shape) for f in e.values()) for e in layer]
        kept = [sum(f.numbers for f in e.values()) for e in layer]
        places += sum(len(f.rows) for e in layer for f in e.values())
        for name, number, mean in (
            ("original", count * original, original),
            ("merged", sum(merged), np.dot(often, merged) / often.sum()),
            ("compressed", sum(kept), np.dot(often, kept) / often.sum()),
        ):
            weights[name] += number
            work[name] += float(k * mean)
    size = {name: number * dtype.itemsize for name, number in weights.items()}
    size["compressed"] += places * torch.int64.itemsize
    report = {"weights": weights, "bytes": size, "multiply_accumulates": work}
    saved = {
        what: {name: 1 - number[name] / number["original"] for name in ("merged", "compressed")}
        for what, number in report.items()
    }
    return report | {"saved": saved}


def _matrix(name, tensor):
    """A tensor in float64, if it is a finite matrix of floating-point numbers."""
    if not torch.is_tensor(tensor) or tensor.ndim != 2 or not tensor.is_floating_point():
        given = f"{tensor.dtype} {list(tensor.shape)}" if torch.is_tensor(tensor) else type(tensor).__name__
        raise InputError(f"{name} must be a floating-point matrix; not {given}.")
    if not torch.isfinite(tensor).all():
        raise InputError(f"{name} holds NaN or infinite values.")
    return tensor.detach().double()


def _check_share(argument, value, zero=False):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1 or (value == 0 and not zero):
        allowed = "from 0 to 1" if zero else "above 0 and up to 1"
        raise InputError(f'The "{argument}" argument must be a number {allowed}; not {value!r}.')


def _check_ridge(ridge):
    number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
    if not number or not 0 <= ridge < math.inf:
        raise InputError(f'The "ridge" argument must be a finite number of at least 0; not {ridge!r}.')


def _check_dtype(dtype):
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(
            f'The "dtype" argument must be a floating-point type of at least 16 bits; not {dtype!r}.'
        )


def _check_layers(layers):
    if not layers:
        raise InputError('The "layers" argument must hold at least one layer; it is empty.')
    for place, (experts, tokens, _) in enumerate(layers):
        if not experts or len(experts) != len(tokens):
            raise InputError(
                f"layers[{place}] must have tokens for each expert; not {len(tokens)} for {len(experts)}."
            )
        for g, (expert, x) in enumerate(zip(experts, tokens, strict=True)):
            width, _, hidden = expert.up.shape
            if tuple(expert.down.shape) != (hidden, width):
                raise InputError(
                    f"layers[{place}], expert {g}: down must be {[hidden, width]}; not {list(expert.down.shape)}."
                )
            if x.ndim != 2 or x.shape[1] != hidden:
                raise InputError(
                    f"layers[{place}], expert {g}: tokens must be [T, {hidden}]; not {list(x.shape)}."
                )


@compress_step("low-rank", needs=("sample",))
@torch.no_grad()
def compress_layers(layers, plan, stats, *, share, rank=None):
    """MC-SMoE's second step on merged layers: experts become what their factors, in the model's dtype, multiply out to."""
    parts = []
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        sample = stats.layers[layer.name].sample
        inputs, chosen = sample.inputs.to(layer.device), sample.chosen
        routed = [inputs[chosen[:, members].any(1)] for members in layer_plan.groups()]
        parts.append(([layer.neurons(g) for g in range(layer_plan.num_groups)], routed, layer.activate))
    names, dtype = [layer.name for layer in layers], layers[0].tensors()["down_proj"].dtype
    found = dict(zip(names, compress(parts, share=share, rank=rank), strict=True))
    put_factors(layers, from_saved(saved_tensors(found, dtype)))


def put_factors(layers, factors):
    """Set the experts of merged layers to what their factors multiply out to; the factors stay with them.

    Parameters
    ----------
    layers : list of MoELayer
        Merged.
    factors : dict of str to list of dict
        By layer name; see :func:`hcsmoe_core.methods.factors.compress`.
    """
    for layer in layers:
        experts = [densified(layer.neurons(g), parts) for g, parts in enumerate(factors[layer.name])]
        set_rows(layer, layer.stacked(experts))
        layer.experts._merged.factors = factors[layer.name]
