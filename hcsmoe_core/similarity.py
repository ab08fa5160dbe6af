"""How far apart the experts of a layer are: from statistics and weights to condensed pairwise distances.

A similarity is a function registered in :data:`hcsmoe_core.steps.similarity`, in this file or in a user's
own::

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

import contextlib
import math

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform

from hcsmoe_core import steps
from hcsmoe_core._util import check_choice, require
from hcsmoe_core.families import moe_layer
from hcsmoe_core.replace import suspended

POINTS = ("euclidean", "cosine")
EMBEDDED = (*POINTS, "cka")  # metrics whose distances, or the roots of them, are distances between points
WEIGHT_CHUNK = 1 << 22  # columns of the flattened weights that are compared at once
CKA_TOKENS = 2048  # of the sample, at most
CKA_BLOCK = 1 << 27  # float64 numbers of all experts' Gram matrices in memory at once


def parts_of(similarity: str) -> list:
    """The similarities in a weighted combination, ``[(name, weight), …]``; weights sum to one.

    Names are joined by ``+``, each with a positive weight before a ``*`` if it is not 1:
    ``"expert-output+weight"``, ``"0.7*functional+0.3*router-logits"``.
    """
    parts = {}
    for term in str(similarity).split("+"):
        weight, star, name = (text.strip() for text in term.rpartition("*"))
        check_choice("similarity", name, steps.similarity)
        require(name not in parts, f'The "similarity" argument names one similarity twice: {similarity!r}.')
        try:
            parts[name] = float(weight) if star else 1.0
        except ValueError:
            parts[name] = 0.0
        require(
            0 < parts[name] < math.inf,
            f'The "similarity" argument weights {name} by {weight!r}; give a positive number.',
        )
    total = sum(parts.values())
    return [(name, weight / total) for name, weight in parts.items()]


def described(similarity: str) -> str:
    """What distances by a similarity are between, for the axis of a figure."""
    features = (steps.similarity[name].properties.get("feature", name) for name, _ in parts_of(similarity))
    return "distance between experts' " + " and ".join(features)


def needs_of(similarity: str) -> tuple:
    """Names of :data:`hcsmoe_core.statistics.NEEDS` that a similarity looks at."""
    return tuple(need for name, _ in parts_of(similarity) for need in steps.similarity[name].needs_for({}))


def available(stats) -> list:
    """The similarities that statistics suffice for."""
    return [name for name in steps.similarity if {*needs_of(name)} <= {*stats.needs}]


def allowed_linkages(similarity: str, linkages) -> list:
    """The linkages that are defined for a similarity's distances: Ward's method for Euclidean ones only."""
    return [method for method in linkages if method != "ward" or metric_of(similarity) == "euclidean"]


def metric_of(similarity: str, metric: str = "") -> str:
    """The metric of a similarity's distances: ``metric``, or the similarity's default; InputError if it has
    no such.

    A combination is ``"euclidean"`` where all its parts are, else ``"mixed"``.
    """
    names = [name for name, _ in parts_of(similarity)]
    allowed = [steps.similarity[name].properties["metrics"] for name in names]
    if metric:
        known = (m for step in steps.similarity.values() for m in step.properties["metrics"])
        check_choice("metric", metric, (*dict.fromkeys(known), "mixed"))
    for name, metrics in zip(names, allowed, strict=True):
        if metric and metric not in metrics and len(metrics) > 1:
            check_choice("metric", metric, metrics)
        require(
            not metric or metric in metrics or len(names) > 1,
            f'The "metric" argument must be {metrics[0]!r} for similarity {name!r}; not {metric!r}.',
        )
    used = {part_metric(name, metric) for name in names}
    return used.pop() if len(names) == 1 or used == {"euclidean"} else "mixed"


def part_metric(name: str, metric: str = "") -> str:
    """Metric of one similarity in a combination: ``metric`` where it can be measured so, else its own."""
    metrics = steps.similarity[name].properties["metrics"]
    return metric if metric in metrics else metrics[0]


def distances(stats, layer, *, similarity: str = "expert-output", metric: str = "", model=None) -> np.ndarray:
    """Pairwise distances between one layer's experts.

    Parameters
    ----------
    stats : Statistics
    layer : int or str
        Number among the MoE layers, from 0, or name of the experts module.
    similarity : str
        What experts are compared by: see the functions below. Several joined by ``+`` are combined, each
        relative to its own mean over pairs: the root of the weighted sum of ``d² / mean(d²)`` where all are
        Euclidean (the distance between the joined, scaled features), else the weighted sum of ``d /
        mean(d)``.
    metric : {"", "euclidean", "cosine"}
        By default the similarity's own. Cosine is ``1 − cos`` of the features.
    model : transformers.PreTrainedModel, optional
        Needed for ``"weight"`` and ``"cka"``. Of a merged model the original experts are compared.

    Returns
    -------
    (E·(E−1)/2,) float64 array
        Condensed as SciPy's ``pdist``; 0 for experts that are the same.

    Raises
    ------
    InputError
        If a choice or the layer is unknown, the statistics lack what is needed, the model is missing, another
        one, or without its original experts, or a distance is not a number.
    """
    metric_of(similarity, metric)
    name, terms, euclidean = stats.layer_name(layer), [], True
    for part, weight in parts_of(similarity):
        step, own = steps.similarity[part], part_metric(part, metric)
        stats.check(step.needs_for({}), f"Similarity {part!r}")
        with _original_layer(step, model, name) as original:
            condensed = step(stats, name, own, original)
        require(
            np.isfinite(condensed).all(),
            f'{name}: some distances by "{part}" and "{own}" are not numbers (an expert whose features are '
            'all zero has no cosine, no router no logits); use metric "euclidean", or check the checkpoint '
            "for NaN.",
        )
        terms.append((condensed, weight))
        euclidean &= own == "euclidean"
    if len(terms) == 1:
        return condensed
    if euclidean:
        return np.sqrt(sum(weight * _relative(d**2) for d, weight in terms))
    return sum(weight * _relative(d) for d, weight in terms)


@contextlib.contextmanager
def _original_layer(step, model, name):
    """The layer of a similarity that looks at weights, with its original experts for the block; else None."""
    if not step.properties.get("weights"):
        yield None
        return
    message = 'Similarities "weight" and "cka" look at the experts themselves; give the "model" argument.'
    require(model is not None, message)
    layer = moe_layer(model, name)
    with suspended([layer]), torch.no_grad():
        yield layer


def _relative(distance):
    mean = distance.mean() if distance.size else 0
    return distance / mean if mean > 0 else distance


def scale_of(stats, layer, *, similarity: str = "expert-output", metric: str = "", model=None) -> float:
    """Size of a layer's features in the unit of its distances, by which distances of several layers compare.

    The root mean square norm of the features where they are Euclidean or routing-weighted, else 1; parameters
    as for :func:`distances`.
    """
    parts, name = parts_of(similarity), stats.layer_name(layer)
    step = steps.similarity[parts[0][0]]
    if len(parts) > 1 or metric_of(similarity, metric) in ("cosine", "cka") or "norms" not in step.properties:
        return 1.0
    with _original_layer(step, model, name) as original:
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


def _from_gram(gram, metric):
    """Distances between vectors of which only the inner products ``(E, E)`` are known."""
    square = np.diag(gram)
    if metric == "cosine":
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.maximum(1 - gram / np.sqrt(np.outer(square, square)), 0)
    else:
        distance = np.sqrt(np.maximum(square[:, None] + square[None, :] - 2 * gram, 0))
    np.fill_diagonal(distance, 0 * square)
    return squareform(distance, checks=False)


@steps.similarity(
    "expert-output",
    needs=("outputs",),
    metrics=POINTS,
    feature="mean outputs",
    norms=lambda stats, name, layer: stats.layers[name].mean_output.pow(2).sum(1),
)
def by_mean_output(stats, name, metric, layer):
    """Mean output over all tokens, ``(1/T) Σ_t f_e(x_t)`` in R^D (HC-SMoE, arXiv 2410.08589, section 3.2)."""
    return pdist(stats.layers[name].mean_output.numpy(), metric)


@steps.similarity(
    "router-logits",
    needs=("usage",),
    metrics=POINTS,
    feature="router logits",
    norms=lambda stats, name, layer: stats.layers[name].logit_gram.sum(0).diagonal(),
)
def by_logits(stats, name, metric, layer):
    """Router logits over the calibration tokens, in R^T (M-SMoE, arXiv 2310.01334)."""
    gram = stats.layers[name].logit_gram.sum(0).numpy()
    message = f'{name}: no router was found, so that similarity "router-logits" is unavailable.'
    require(not np.isnan(gram).any(), message)
    return _from_gram(gram, metric)


@steps.similarity(
    "weight",
    metrics=POINTS,
    weights=True,
    feature="weights",
    norms=lambda stats, name, layer: sum(
        tensor.double().flatten(1).pow(2).sum(1) for tensor in layer.tensors().values()
    ),
)
def by_weight(stats, name, metric, layer):
    """Gate, up and down projections (and biases), flattened and joined, in R^(3·D·I).

    From differences: a Gram matrix would cancel for close experts.
    """
    chunks = (
        chunk.double()
        for tensor in layer.tensors().values()
        for chunk in tensor.flatten(1).split(WEIGHT_CHUNK, dim=1)
    )
    if metric == "cosine":
        return _from_gram(sum(chunk @ chunk.T for chunk in chunks).cpu().numpy(), metric)
    experts = layer.num_experts
    square = torch.zeros(experts, experts, dtype=torch.float64, device=layer.device)
    for chunk in chunks:
        for e in range(experts - 1):
            square[e, e + 1 :] += (chunk[e + 1 :] - chunk[e]).square_().sum(1)
    return square.sqrt().cpu().numpy()[np.triu_indices(experts, 1)]


def _mean_gram(stats, name):
    return stats.layers[name].output_gram.sum(0) / stats.layers[name].tokens.sum()


def _output_norms(stats, name, layer):
    return _mean_gram(stats, name).diagonal()


@steps.similarity(
    "functional",
    needs=("grams",),
    metrics=POINTS,
    feature="outputs per token",
    norms=_output_norms,
)
def by_output(stats, name, metric, layer):
    """Outputs per token, ``sqrt((1/T) Σ_t ‖f_i(x_t) − f_j(x_t)‖²)``; cosine: of all tokens' joined."""
    return _from_gram(_mean_gram(stats, name).numpy(), metric)


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
    gram, square = sums.routed_gram.sum(0).numpy(), sums.routed_square.sum(0).numpy()
    mass = sums.routing_mass.sum(0).numpy()
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
    "cka",
    needs=("sample",),
    metrics=("cka",),
    weights=True,
    feature="centred kernel alignment of outputs",
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
        strip = []
        for e in range(experts):
            output = layer.expert_output(e, layer.expert_hidden(e, tokens)).double()
            output -= output.mean(0)
            strip.append(output[first : first + size] @ output[first:].T)
        strip = torch.stack(strip)
        strip[:, :, size:] *= math.sqrt(2)  # K is symmetric: these stand for those below the diagonal too
        inner += strip.flatten(1) @ strip.flatten(1).T
        first += size
    return _from_gram(inner.cpu().numpy(), "cosine")
