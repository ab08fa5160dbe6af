"""Similarities beyond those of the paper, and what groupings, budgets and figures make of distances.

A similarity is a function registered in :data:`hcsmoe_core.steps.similarity`, in
:mod:`hcsmoe_core.similarity` (the paper's, and the distances themselves), here, or in a user's own file::

    @steps.similarity("usage", needs=("usage",), metrics=("euclidean",), feature="usage per domain")
    def by_usage(stats, name, metric, layer):
        return pdist(stats.layers[name].usage_count.T.double().numpy(), metric)

It is called with the statistics, the name of the layer, one of its ``metrics`` and None, and returns
condensed distances. With ``weights=True`` the last argument is the MoELayer with its original experts, merged
or not. ``metrics``: the default first; ``"euclidean"`` for distances between points, as Ward's method needs,
``"cosine"`` and ``"cka"`` for half their squares; other names say that they are neither. ``feature``: what
figures say that is compared. ``norms``: a function of the same arguments without the metric, the squared
norms of Euclidean features ``(E,)``, by which budgets weigh layers against each other; by default layers
count alike.
"""

import math

import numpy as np
import torch
from scipy.spatial.distance import squareform

from hcsmoe_core import steps
from hcsmoe_core._util import require
from hcsmoe_core.similarity import POINTS, from_gram, metric_of, needs_of, original_layer, parts_of

EMBEDDED = (*POINTS, "cka")  # metrics whose distances, or the roots of them, are distances between points
CKA_TOKENS = 2048  # of the sample, at most
CKA_BLOCK = 1 << 27  # float64 numbers of all experts' Gram matrices in memory at once


def described(similarity: str) -> str:
    """What distances by a similarity are between, for the axis of a figure."""
    features = (steps.similarity[name].properties.get("feature", name) for name, _ in parts_of(similarity))
    return "distance between experts' " + " and ".join(features)


def available(stats) -> list:
    """The similarities that statistics suffice for."""
    return [name for name in steps.similarity if {*needs_of(name)} <= {*stats.needs}]


def allowed_linkages(similarity: str, linkages) -> list:
    """The linkages that are defined for a similarity's distances: Ward's method for Euclidean ones only."""
    return [method for method in linkages if method != "ward" or metric_of(similarity) == "euclidean"]


def scale_of(stats, layer, *, similarity: str = "expert-output", metric: str = "", model=None) -> float:
    """Size of a layer's features in the unit of its distances, by which distances of several layers compare.

    The root mean square norm of the features where they are Euclidean or routing-weighted, else 1; parameters
    as for :func:`distances`.
    """
    parts, name = parts_of(similarity), stats.layer_name(layer)
    step = steps.similarity[parts[0][0]]
    if len(parts) > 1 or metric_of(similarity, metric) in ("cosine", "cka") or "norms" not in step.properties:
        return 1.0
    with original_layer(step, model, name) as original:
        return math.sqrt(step.properties["norms"](stats, name, original).mean()) or 1.0


def coordinates(condensed, metric: str) -> np.ndarray:
    """Points ``(E, m)``, m < E, whose Euclidean distances are those given: classical scaling.

    Cosine and CKA distances ``1 − s`` are half the squared distance of points on a sphere. InputError for
    metrics whose distances are not between points.
    """
    require(
        metric in EMBEDDED,
        f'These distances ("{metric}") are not distances between points, which k-means needs; use a '
        'similarity with metric "euclidean" or "cosine", or group "hierarchical".',
    )
    square = squareform(condensed**2 if metric == "euclidean" else 2 * condensed)
    centred = square - square.mean(0) - square.mean(1)[:, None] + square.mean()
    value, vector = np.linalg.eigh(-centred / 2)
    positive = value > max(value.max(), 0) * 1e-12
    # The sign of an eigenvector is arbitrary: fixed, so that the same distances give the same points.
    sign = np.sign(vector[np.abs(vector).argmax(0), np.arange(len(vector))])
    return ((vector * sign) * np.sqrt(np.clip(value, 0, None)))[:, positive]


def _mean_gram(stats, name):
    return stats.layers[name].output_gram.sum(0) / stats.layers[name].tokens.sum()


def _output_norms(stats, name, layer):
    return _mean_gram(stats, name).diagonal()


@steps.similarity(
    "functional", needs=("grams",), metrics=POINTS, feature="outputs per token", norms=_output_norms
)
def by_output(stats, name, metric, layer):
    """Outputs per token, ``sqrt((1/T) Σ_t ‖f_i(x_t) − f_j(x_t)‖²)``; cosine: of all tokens' joined."""
    return from_gram(_mean_gram(stats, name).numpy(), metric)


@steps.similarity(
    "functional-routed",
    needs=("grams",),
    metrics=("routing-weighted",),
    feature="outputs per token, weighted by the routing",
    norms=_output_norms,
)
def by_routed_output(stats, name, metric, layer):
    """Outputs per token, weighted by the routing: ``sqrt(Σ_t (g_i + g_j) ‖f_i − f_j‖² / Σ_t (g_i + g_j))``.

    With the weights g that the router applied; unweighted for two experts that no token is routed to.
    """
    sums = stats.layers[name]
    totals = (sums.routed_gram, sums.routed_square, sums.routing_mass)
    gram, square, mass = (total.sum(0).numpy() for total in totals)
    one_sided = np.diag(square)[:, None] + square - 2 * gram  # Σ g_i ‖f_i − f_j‖², for every ordered pair
    total = mass[:, None] + mass
    plain = squareform(by_output(stats, name, "euclidean", None)) ** 2
    weighted = np.where(total > 0, (one_sided + one_sided.T) / np.where(total > 0, total, 1), plain)
    np.fill_diagonal(weighted, 0)
    return squareform(np.sqrt(np.maximum(weighted, 0)), checks=False)


@steps.similarity("pairwise-cosine", needs=("grams",), metrics=("cosine",), feature="mean cosine of outputs")
def by_cosine(stats, name, metric, layer):
    """``1 − (1/T) Σ_t cos(f_i(x_t), f_j(x_t))`` (Sub-MoE, arXiv 2506.23266)."""
    cosine = (stats.layers[name].cosine_sum.sum(0) / stats.layers[name].tokens.sum()).numpy()
    return np.maximum(1 - cosine[np.triu_indices(len(cosine), 1)], 0)


@steps.similarity(
    "cka", needs=("sample",), metrics=("cka",), weights=True, feature="centred kernel alignment of outputs"
)
def by_cka(stats, name, metric, layer):
    """``1 − CKA`` of the outputs on 2,048 tokens of the sample at most, linear and centred.

    ``CKA = ‖F_iᵀF_j‖²_F / (‖F_iᵀF_i‖_F ‖F_jᵀF_j‖_F)`` (DEK, arXiv 2407.09590; Kornblith et al., 2019), where
    ``‖F_iᵀF_j‖²_F = ⟨K_i, K_j⟩`` for ``K = F Fᵀ`` (T, T). Strips of all experts' K are in memory one at a
    time.
    """
    tokens, experts = stats.layers[name].sample.inputs[:CKA_TOKENS].to(layer.device), layer.num_experts
    inner, first = torch.zeros(experts, experts, dtype=torch.float64, device=layer.device), 0
    while first < len(tokens):
        size = max(1, CKA_BLOCK // (experts * (len(tokens) - first)))
        outputs = (layer.expert_output(e, layer.expert_hidden(e, tokens)).double() for e in range(experts))
        centred = (output - output.mean(0) for output in outputs)
        strip = torch.stack([output[first : first + size] @ output[first:].T for output in centred])
        strip[:, :, size:] *= math.sqrt(2)  # K is symmetric: these stand for those below the diagonal too
        inner += strip.flatten(1) @ strip.flatten(1).T
        first += size
    return from_gram(inner.cpu().numpy(), "cosine")
