"""The second step of MC-SMoE: each projection of the merged experts as a low-rank product and a few rows.

Li et al., ICLR 2024 (arXiv 2310.01334, section 3.3) write ``W = A B + S`` with S row-sparse and find both by
training with distillation. Here nothing is trained: second moments of what enters each projection stand in
for the gradients. The result is dense: each projection becomes what its factors multiply out to.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from hcsmoe_core._util import InputError, check_count
from hcsmoe_core.moe import Neurons, all_finite
from hcsmoe_core.replace import set_rows
from hcsmoe_core.steps import compress as step

RANK_SHARE = 0.5


@dataclass(frozen=True)
class Factors:
    """A matrix ``W`` ``[d1, d2]`` as ``A B + S``, of which S has n rows that are not zero.

    Attributes
    ----------
    A : (d1, q) tensor
    B : (q, d2) tensor
    rows : (n,) int64 tensor
        Numbers of the rows of S, ascending.
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
        """Numbers stored, ``q (d1 + d2) + n d2``: A, B and S, without the row numbers."""
        return self.A.numel() + self.B.numel() + self.S.numel()

    def to(self, dtype):
        """The same with A, B and S in another dtype."""
        return Factors(self.A.to(dtype), self.B.to(dtype), self.rows, self.S.to(dtype))

    def dense(self):
        """``A B + S`` ``[d1, d2]``, in float64."""
        product = self.A.double() @ self.B.double()
        product[self.rows] += self.S.double()
        return product


def second_moment(inputs, ridge=1e-3):
    """Second moment of inputs, with a ridge: ``M = (1/T) Σ x xᵀ + ridge · m · I``, m the mean diagonal.

    Parameters
    ----------
    inputs : (T, d2) float tensor
    ridge : float
        Relative to the mean of the diagonal; keeps M positive definite where there are fewer tokens than
        inputs.

    Returns
    -------
    (d2, d2) float64 tensor
        The identity where there are no tokens, or only zeros.
    """
    x = inputs.detach().double()
    unit = torch.eye(x.shape[1], dtype=torch.float64, device=x.device)
    moment = x.T @ x / max(1, len(x))
    return moment + ridge * moment.diagonal().mean() * unit if moment.any() else unit


def factor(weight, moment, rank, rows=0):
    """A matrix as a low-rank product and its most important residual rows, without training (whitened SVD).

    With ``M = L Lᵀ`` and ``W L = U Σ Vᵀ``, ``A = U_q Σ_q^½`` and ``B = Σ_q^½ V_qᵀ L⁻¹`` are the product of
    rank q with the smallest ``‖(W − A B) L‖_F``: the smallest mean squared error of the outputs where M is
    the second moment of the inputs. S holds the rows of ``R = W − A B`` with the largest ``R_i M R_iᵀ`` as
    they are (ties: the first), so that ``A B + S`` has those rows of W. Of each column of A, the entry with
    the largest absolute value is positive.

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
    """
    w, root = weight.detach().double(), torch.linalg.cholesky(moment.detach().double())
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


def compress(layers, *, share, rank=None, ridge=1e-3, rank_share=RANK_SHARE):
    """Factor every projection of every expert within one budget (MC-SMoE, section 3.3), untrained.

    Gate, up and down projections are matrices of their own, named ``"up.0"``, ``"up.1"`` (where there is a
    gate: the gate and the up projection) and ``"down"``. Each first becomes a product of rank q. The rest of
    the budget goes to rows of the residuals, chosen over all matrices of all layers together, by importance
    for each number that is stored: ``R_i M R_iᵀ / d2``, largest first; ties go to the earlier layer, expert,
    matrix and row. A row that no longer fits is passed over and smaller ones are tried, so that less is left
    over than the smallest row left out takes.

    As in the paper, importances of different layers are compared as they are: a layer with larger outputs
    gets more rows. They are means over the tokens of each expert, however few, and not weighted by how often
    the router chose it.

    Parameters
    ----------
    layers : list of (list of r Neurons, list of r (T_g, D) tensors, callable)
        Of each layer: its experts; the tokens that were routed to each, maybe none; and what gives
        activations ``(T_g, I)`` from an expert and tokens, as :meth:`MoELayer.activate` does. An expert
        without tokens, or whose inputs or activations are all zero, is factored as if each were an
        independent number with variance 1.
    share : float
        Of the weights, above 0 and up to 1: at most ``floor(share · Σ d1 d2)`` numbers are stored. Biases
        stay as they are and are not counted, nor are row numbers.
    rank : int, optional
        q of every matrix, from 0 (rows alone); by default ``max(1, round(rank_share · share · d1 d2 / (d1 +
        d2)))``.
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
    InputError
        If the products alone take more than the budget, or a matrix has no such rank.
    """
    shapes = [tuple(w.shape) for experts, _, _ in layers for e in experts for w in _matrices(e).values()]
    ranks = [_rank(shape, share, rank, rank_share) for shape in shapes]
    total = sum(d1 * d2 for d1, d2 in shapes)
    products = sum(q * (d1 + d2) for q, (d1, d2) in zip(ranks, shapes, strict=True))
    # A product such as 0.29 · 100 falls short of 29 by rounding alone.
    budget = math.floor(round(share * total, 6))
    if products > budget:
        raise InputError(
            f'The "rank" and "share" arguments do not fit: products of rank {min(ranks)} to {max(ranks)} '
            f"take {products} numbers, and share {share} of {total} weights is {budget}; "
            "give a smaller rank or a larger share."
        )
    low_rank, importances, left = [], [], iter(ranks)
    for index, (experts, tokens, activate) in enumerate(layers):
        for g, (expert, x) in enumerate(zip(experts, tokens, strict=True)):
            for name, w, root in _whitened(expert, x, activate, ridge):
                a, b = _low_rank(w, root, next(left))
                low_rank.append((index, g, name, a, b))
                importances.append(_importance(w - a @ b, root).cpu().numpy())
    scores = np.concatenate([i / d2 for i, (_, d2) in zip(importances, shapes, strict=True)])
    costs = np.concatenate([np.full(d1, d2) for d1, d2 in shapes])
    selected = np.zeros(len(scores), dtype=bool)
    selected[_within(scores, costs, budget - products)] = True
    factors, start = [[{} for _ in experts] for experts, _, _ in layers], 0
    for (index, g, name, a, b), (d1, _) in zip(low_rank, shapes, strict=True):
        rows = torch.from_numpy(selected[start : start + d1].nonzero()[0]).to(a.device)
        # The residuals of all matrices would take more memory than the weights: they are computed again.
        factors[index][g][name] = _with_rows(_matrices(layers[index][0][g])[name].double(), a, b, rows)
        start += d1
    return factors


def _whitened(expert, tokens, activate, ridge):
    """Name, weight and Cholesky factor of the second moment of the inputs, of each matrix of an expert."""
    expert = expert.map(lambda t: t.detach().double())
    x = tokens.double().to(expert.up.device)
    root = torch.linalg.cholesky(second_moment(x, ridge))
    inner = torch.linalg.cholesky(second_moment(activate(expert, x), ridge))
    for name, w in _matrices(expert).items():
        yield name, w, inner if name == "down" else root


def _within(scores, costs, budget):
    """Numbers of the rows that fit: the largest score first, ties by order."""
    chosen, smallest = [], costs.min()
    order = np.argsort(-scores, kind="stable")
    for row, cost in zip(order.tolist(), costs[order].tolist(), strict=True):
        if budget < smallest:
            break
        if cost <= budget:
            chosen.append(row)
            budget -= cost
    return chosen


def _rank(shape, share, rank, rank_share):
    d1, d2 = shape
    if rank is None:
        return max(1, round(rank_share * share * d1 * d2 / (d1 + d2)))
    return check_count("rank", rank, 0, min(shape))


def _matrices(expert):
    """Projections of an expert by name, each ``[d1, d2]``."""
    return {f"up.{q}": expert.up[:, q] for q in range(expert.up.shape[1])} | {"down": expert.down}


def densified(neurons, factors):
    """An expert with ``A B + S`` for each projection.

    Parameters
    ----------
    neurons : Neurons
        The expert that was factored; its biases stay.
    factors : dict of str to Factors

    Returns
    -------
    Neurons
        In the dtype and on the device of ``neurons``; sums are float64, rounded once.
    """
    dense = {name: f.dense().to(neurons.up) for name, f in factors.items()}
    up = torch.stack([dense[f"up.{q}"] for q in range(neurons.up.shape[1])], dim=1)
    return Neurons(up, dense["down"], neurons.bias, neurons.offset)


def stored_bytes(factors, dtype):
    """Bytes that factors take: their numbers in a dtype, and 8 for the number of each row.

    Parameters
    ----------
    factors : list of dict of str to Factors
        Of each expert, by matrix.
    dtype : torch.dtype

    Returns
    -------
    int
    """
    every = [f for matrices in factors for f in matrices.values()]
    return sum(f.numbers * dtype.itemsize + len(f.rows) * torch.int64.itemsize for f in every)


def _check_options(recipe):
    share, rank = (recipe.by_kind["compress"][name] for name in ("share", "rank"))
    if not 0 < share < 1:
        raise InputError(f'The "share" argument must be above 0 and below 1; not {share}.')
    if rank is not None:
        check_count("rank", rank, 0)


@step("low-rank", needs=("sample",), check=_check_options)
@torch.no_grad()
def compress_layers(layers, plan, stats, *, share: float = 0.5, rank: int | None = None):
    """MC-SMoE's second step: merged experts become what their factors, in their dtype, multiply out to.

    ``share`` is that of the merged experts' weights which their factors take, and ``rank`` that of the
    products, by default the rank that takes half of it. What the factors of a layer would take stays with it
    as ``compressed_bytes``.
    """
    inputs = []
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        sample = stats.layers[layer.name].sample
        tokens, chosen = sample.inputs.to(layer.device), sample.chosen
        routed = [tokens[chosen[:, members].any(1)] for members in layer_plan.groups()]
        inputs.append(([layer.neurons(g) for g in range(layer_plan.num_groups)], routed, layer.activate))
    dtype = layers[0].tensors()["down_proj"].dtype
    for layer, experts in zip(layers, compress(inputs, share=share, rank=rank), strict=True):
        rounded = [{name: f.to(dtype) for name, f in matrices.items()} for matrices in experts]
        dense = layer.stacked([densified(layer.neurons(g), f) for g, f in enumerate(rounded)])
        if not all(all_finite(tensor) for tensor in dense.values()):
            raise InputError(f"{layer.name}: factors are not finite in {dtype}; load it with another dtype.")
        set_rows(layer, dense)
        layer.experts._merged.compressed_bytes = stored_bytes(rounded, dtype)
