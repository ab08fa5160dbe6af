"""How far apart the experts of a layer are: from statistics and weights to condensed pairwise distances.

A similarity is a function registered in :data:`hcsmoe_core.steps.similarity`: the paper's here, others in
:mod:`hcsmoe_core.methods.similarities`, which says how, or in a user's own file. Called with the statistics,
the name of the layer, one of its ``metrics`` and the MoELayer if it looks at ``weights``, else None, it
returns condensed distances.
"""

import contextlib
import math

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform
from torch import nn

from hcsmoe_core import steps
from hcsmoe_core._util import check_choice, choice_of, require
from hcsmoe_core.families import moe_layer
from hcsmoe_core.replace import suspended
from hcsmoe_core.statistics import Statistics

POINTS = ("euclidean", "cosine")
WEIGHT_CHUNK = 1 << 22  # columns of the flattened weights that are compared at once


def parts_of(similarity: str) -> list:
    """The similarities in a combination and their weights, ``[(name, weight), …]``, which sum to one.

    Such as ``"expert-output+weight"``, ``"0.7*functional+0.3*router-logits"``; a weight is 1 by default.
    """
    parts = {}
    for term in str(similarity).split("+"):
        weight, star, name = (text.strip() for text in term.rpartition("*"))
        name = choice_of("similarity", name, steps.similarity)
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


def needs_of(similarity: str) -> tuple:
    """Names of :data:`hcsmoe_core.statistics.NEEDS` that a similarity looks at."""
    return tuple(need for name, _ in parts_of(similarity) for need in steps.similarity[name].needs_for({}))


def metric_of(similarity: str, metric: str = "") -> str:
    """The metric of a similarity's distances: ``metric``, or its default; InputError if it has no such.

    A combination is ``"euclidean"`` where all its parts are, else ``"mixed"``.
    """
    names = [name for name, _ in parts_of(similarity)]
    known = (m for step in steps.similarity.values() for m in step.properties["metrics"])
    check_choice("metric", metric or "mixed", (*dict.fromkeys(known), "mixed"))
    used = {part_metric(name, metric) for name in names}
    for name in names:
        metrics = steps.similarity[name].properties["metrics"]
        require(
            metric in ("", *metrics) or (len(metrics) == 1 and len(names) > 1),
            f'The "metric" argument must be {" or ".join(map(repr, metrics))} for similarity {name!r}; '
            f"not {metric!r}.",
        )
    return used.pop() if len(names) == 1 or used == {"euclidean"} else "mixed"


def part_metric(name: str, metric: str = "") -> str:
    """Metric of one similarity in a combination: ``metric`` where it can be measured so, else its own."""
    metrics = steps.similarity[name].properties["metrics"]
    return metric if metric in metrics else metrics[0]


def distances(
    stats: Statistics,
    layer: int | str,
    *,
    similarity: str = "expert-output",
    metric: str = "",
    model: nn.Module | None = None,
) -> np.ndarray:
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
        Condensed as SciPy's ``pdist``; 0 for experts that are the same. InputError if one is not a number.
    """
    euclidean = metric_of(similarity, metric) == "euclidean"
    name, terms = stats.layer_name(layer), []
    for part, weight in parts_of(similarity):
        step, own = steps.similarity[part], part_metric(part, metric)
        stats.check(step.needs_for({}), f"Similarity {part!r}")
        with original_layer(step, model, name) as original:
            condensed = step(stats, name, own, original)
        require(
            np.isfinite(condensed).all(),
            f'{name}: some distances by "{part}" and "{own}" are not numbers (an expert whose features are '
            'all zero has no cosine, no router no logits); use metric "euclidean", or check the checkpoint '
            "for NaN.",
        )
        terms.append((condensed, weight))
    if len(terms) == 1:
        return condensed
    total = sum(weight * _relative(d**2 if euclidean else d) for d, weight in terms)
    return np.sqrt(total) if euclidean else total


@contextlib.contextmanager
def original_layer(step, model, name):
    """The layer of a similarity that looks at weights, with its original experts for the block; else None."""
    weights = step.properties.get("weights")
    message = 'Similarities "weight" and "cka" look at the experts themselves; give the "model" argument.'
    require(model is not None or not weights, message)
    layer = moe_layer(model, name) if weights else None
    with suspended([layer] if weights else []), torch.no_grad():
        yield layer


def _relative(distance):
    mean = distance.mean() if distance.size else 0
    return distance / mean if mean > 0 else distance


def from_gram(gram, metric):
    """Condensed distances between vectors of which only the inner products ``(E, E)`` are known."""
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
    require(
        not np.isnan(gram).any(),
        f'{name}: no router was found, so that similarity "router-logits" is unavailable.',
    )
    return from_gram(gram, metric)


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
        return from_gram(sum(chunk @ chunk.T for chunk in chunks).cpu().numpy(), metric)
    experts = layer.num_experts
    square = torch.zeros(experts, experts, dtype=torch.float64, device=layer.device)
    for chunk in chunks:
        for e in range(experts - 1):
            square[e, e + 1 :] += (chunk[e + 1 :] - chunk[e]).square_().sum(1)
    return square.sqrt().cpu().numpy()[np.triu_indices(experts, 1)]
