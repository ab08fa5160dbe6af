"""The second step of MC-SMoE: each projection of the merged experts as a low-rank product and a few rows.

Li et al., ICLR 2024 (arXiv 2310.01334, section 3.3) write ``W = A B + S`` with S row-sparse and find both by
training with distillation. Here nothing is trained: second moments of what enters each projection stand in
for the gradients. The result is dense: each projection becomes what its factors multiply out to.
"""

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Annotated

import numpy as np
import torch

from hcsmoe_core import moe, steps
from hcsmoe_core._util import check_count, require
from hcsmoe_core.replace import set_expert_tensors


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
    def numbers(self):
        """Numbers stored, ``q (d1 + d2) + n d2``: A, B and S, without the row numbers."""
        return self.A.numel() + self.B.numel() + self.S.numel()

    def to(self, dtype):
        """The same with A, B and S in another dtype."""
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype), S=self.S.to(dtype))

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


def low_rank(w, root, rank):
    """A matrix W as a product of rank q, without training (whitened SVD), and what each row of it lacks.

    For a second moment of the inputs ``M = L Lᵀ``, with ``W L = U Σ Vᵀ``, ``A = U_q Σ_q^½`` and ``B = Σ_q^½
    V_qᵀ L⁻¹`` are the product with the smallest ``‖(W − A B) L‖_F``: the smallest mean squared error of the
    outputs. Of each column of A, the entry with the largest absolute value is positive.

    Parameters
    ----------
    w, root : (d1, d2), (d2, d2) float64 tensors
        W and L.
    rank : int
        q, from 0 to the smaller of d1 and d2.

    Returns
    -------
    A, B : (d1, q), (q, d2) float64 tensors
    importance : (d1,) float64 tensor
        ``R_i M R_iᵀ`` of each row of ``R = W − A B``: its share of the mean squared error.
    """
    u, sigma, v = torch.linalg.svd(w @ root, full_matrices=False)
    u, sigma, v = u[:, :rank], sigma[:rank].sqrt(), v[:rank]
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True))[0] < 0, -1.0, 1.0).to(u)
    a = (u * sign * sigma).contiguous()
    b = torch.linalg.solve_triangular(
        root, sigma[:, None] * (v * sign[:, None]), upper=False, left=False
    ).contiguous()
    return a, b, ((w - a @ b) @ root).square().sum(1)


def compress(layers, *, share, rank=None, ridge=1e-3, rank_share=0.5):
    """Factor every projection of every expert within one budget (MC-SMoE, section 3.3), untrained.

    Gate, up and down projections are matrices, named ``"up.0"``, ``"up.1"`` (where there is a
    gate: the gate and the up projection) and ``"down"``. Each first becomes a product of rank q. The rest of
    the budget goes to rows of the residuals, chosen over all matrices of all layers together, by importance
    for each number that is stored: ``R_i M R_iᵀ / d2``, largest first; ties go to the earlier layer, expert,
    matrix and row. A row that no longer fits is passed over and smaller ones are tried, so that less is left
    over than the smallest row left out takes.

    As in the paper, importances of different layers are compared as they are: means over each expert's
    tokens, however few.

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
    every = [
        (e, x, activate) for experts, tokens, activate in layers for e, x in zip(experts, tokens, strict=True)
    ]
    shapes = [tuple(w.shape) for expert, _, _ in every for w in _matrices(expert).values()]
    ranks, budget = _ranks(shapes, share, rank, rank_share)
    whitened = (weight_and_root for given in every for weight_and_root in _whitened(*given, ridge))
    products = [low_rank(w, root, q) for (w, root), q in zip(whitened, ranks, strict=True)]
    rows = _best_rows([importance.cpu().numpy() for *_, importance in products], shapes, budget)
    # The residuals of all matrices would take more memory than the weights: they are computed again.
    left = iter([(a, b, n) for (a, b, _), n in zip(products, rows, strict=True)])
    return [
        [{name: _factors(w, *next(left)) for name, w in _matrices(expert).items()} for expert in experts]
        for experts, _, _ in layers
    ]


def _factors(w, a, b, rows):
    return Factors(a, b, rows.to(a.device), (w.double() - a @ b)[rows])


def _best_rows(importances, shapes, budget):
    """Rows of each matrix that are stored: the most important ones for their length, while they fit."""
    scores = np.concatenate([i / d2 for i, (_, d2) in zip(importances, shapes, strict=True)])
    costs = np.concatenate([np.full(d1, d2) for d1, d2 in shapes])
    selected = np.zeros(len(scores), dtype=bool)
    for row in np.argsort(-scores, kind="stable").tolist():
        if costs[row] <= budget:
            selected[row] = True
            budget -= costs[row]
    ends = np.cumsum([d1 for d1, _ in shapes])[:-1]
    return [torch.from_numpy(rows.nonzero()[0]) for rows in np.split(selected, ends)]


def _whitened(expert, tokens, activate, ridge):
    """Weight and Cholesky factor of the second moment of the inputs, of each matrix of an expert."""
    expert = expert.map(lambda t: t.detach().double())
    x = tokens.double().to(expert.up.device)
    root, inner = (torch.linalg.cholesky(second_moment(i, ridge)) for i in (x, activate(expert, x)))
    for name, w in _matrices(expert).items():
        yield w, inner if name == "down" else root


def _ranks(shapes, share, rank, rank_share):
    """Rank of each matrix's product, and the numbers that are left for rows."""
    if rank is None:
        ranks = [max(1, round(rank_share * share * d1 * d2 / (d1 + d2))) for d1, d2 in shapes]
    else:
        ranks = [check_count("rank", rank, 0, min(shape)) for shape in shapes]
    total = sum(d1 * d2 for d1, d2 in shapes)
    products = sum(q * (d1 + d2) for q, (d1, d2) in zip(ranks, shapes, strict=True))
    budget = int(round(share * total, 6))  # a product such as 0.29 · 100 falls short of 29 by rounding alone
    require(
        products <= budget,
        f'The "rank" and "share" arguments do not fit: products of rank {min(ranks)} to {max(ranks)} take '
        f"{products} numbers, and share {share} of {total} weights is {budget}; "
        "give a smaller rank or a larger share.",
    )
    return ranks, budget - products


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
        By name of the matrix, in the order of :func:`compress`.

    Returns
    -------
    Neurons
        In the dtype and on the device of ``neurons``; sums are float64, rounded once.
    """
    *up, down = (factor.dense().to(neurons.up) for factor in factors.values())
    return replace(neurons, up=torch.stack(up, dim=1), down=down)


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
    return sum(
        factor.numbers * dtype.itemsize + len(factor.rows) * torch.int64.itemsize
        for matrices in factors
        for factor in matrices.values()
    )


def _is_rank(value):
    return value is None or (isinstance(value, Integral) and not isinstance(value, bool) and value >= 1)


Rank = Annotated[int | None, ("a whole number of at least 1", _is_rank)]


@steps.compress("low-rank", needs=("sample",))
@torch.no_grad()
def compress_layers(layers, plan, stats, *, share: steps.Fraction = 0.5, rank: Rank = None):
    """MC-SMoE's second step: merged experts become what their factors, in their dtype, multiply out to.

    ``share`` is that of the merged experts' weights which their factors take, and ``rank`` that of the
    products, by default the rank that takes half of it. What the factors of a layer would take stays with it
    as ``compressed_bytes``.
    """

    def merged(layer, layer_plan):
        sample = stats.layers[layer.name].sample
        tokens, chosen = sample.inputs.to(layer.device), sample.chosen
        routed = [tokens[chosen[:, members].any(1)] for members in layer_plan.groups()]
        return [layer.neurons(g) for g in range(layer_plan.num_groups)], routed, layer.activate

    dtype = layers[0].tensors()["down_proj"].dtype
    compressed = compress([*map(merged, layers, plan.layers)], share=share, rank=rank)
    for layer, experts in zip(layers, compressed, strict=True):
        rounded = [{name: f.to(dtype) for name, f in matrices.items()} for matrices in experts]
        dense = layer.stacked([densified(layer.neurons(g), f) for g, f in enumerate(rounded)])
        require(
            all(moe.all_finite(tensor) for tensor in dense.values()),
            f"{layer.name}: factors are not finite in {dtype}; load it with another dtype.",
        )
        set_expert_tensors(layer, dense)
        layer.experts._merged.compressed_bytes = stored_bytes(rounded, dtype)
