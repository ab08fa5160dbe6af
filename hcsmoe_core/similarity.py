"""How far apart the experts of a layer are: from statistics and weights to condensed pairwise distances."""

import itertools

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform

from hcsmoe_core._util import InputError, check_choice
from hcsmoe_core.families import moe_layer
from hcsmoe_core.moe import original_tensors

FEATURES = {
    "expert-output": "mean outputs",
    "router-logits": "router logits",
    "weight": "weights",
    "functional": "outputs token by token",
    "functional-routed": "outputs token by token, weighted by the routing",
    "pairwise-cosine": "mean cosine of outputs",
    "cka": "centred kernel alignment of outputs",
}


SIMILARITIES = tuple(FEATURES)


METRICS = ("euclidean", "cosine")


# What each similarity can be measured with, its usual one first. Ward's method and k-means need distances between
# points: of the metrics, those of EMBEDDED (as they are, or as the square root of twice the distance).
ALLOWED = {
    "expert-output": ("euclidean", "cosine"),
    "router-logits": ("euclidean", "cosine"),
    "weight": ("euclidean", "cosine"),
    "functional": ("euclidean", "cosine"),
    "functional-routed": ("routing-weighted",),
    "pairwise-cosine": ("cosine",),
    "cka": ("cka",),
}


NEEDED = {
    "expert-output": ("outputs",),
    "router-logits": ("usage",),
    "weight": (),
    "functional": ("grams",),
    "functional-routed": ("grams",),
    "pairwise-cosine": ("grams",),
    "cka": ("sample",),
}


FROM_MODEL = ("weight", "cka")  # similarities that look at the experts' weights


WEIGHT_CHUNK = 1 << 22  # columns of the flattened weights that are compared at once


CKA_TOKENS = 2048


def parts_of(similarity):
    """The similarities that a weighted combination is made of, ``[(name, weight), …]``; weights sum to one.

    Parameters
    ----------
    similarity : str
        One name, or several joined by ``+``, each with a weight before a ``*`` if it is not 1: ``"expert-output+weight"``,
        ``"0.7*functional+0.3*router-logits"``.

    Raises
    ------
    ValueError
        If a name is unknown or given twice, or a weight is no positive number.
    """
    parts = []
    for part in str(similarity).split("+"):
        weight, star, name = part.rpartition("*")
        check_choice("similarity", name.strip(), SIMILARITIES)
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise InputError(
                f'The "similarity" argument weights {name.strip()} by {weight!r}; give a positive number.'
            )
        parts.append((name.strip(), value))
    if len({name for name, _ in parts}) < len(parts):
        raise InputError(f'The "similarity" argument names one similarity twice: {similarity!r}.')
    total = sum(value for _, value in parts)
    return [(name, value / total) for name, value in parts]


def described(similarity):
    """What distances by a similarity are between, for the axis of a figure."""
    return "distance between experts' " + " and ".join(FEATURES[name] for name, _ in parts_of(similarity))


def available(stats):
    """The similarities that statistics hold enough for."""
    return [name for name in SIMILARITIES if set(NEEDED[name]) <= set(stats.needs)]


def allowed_linkages(similarity, linkages):
    """The linkages that are defined for a similarity's distances: Ward's method for Euclidean ones only."""
    return [method for method in linkages if method != "ward" or metric_of(similarity) == "euclidean"]


def metric_of(similarity, metric=""):
    """The metric that a similarity is measured with; its usual one where none is given.

    Several similarities together are ``"euclidean"`` where all are, else ``"mixed"``.

    Raises
    ------
    ValueError
        If the similarity cannot be measured so.
    """
    if metric:
        check_choice("metric", metric, (*METRICS, "routing-weighted", "cka", "mixed"))
    own = []
    for name, _ in parts_of(similarity):
        allowed = ALLOWED[name]
        if metric and metric not in allowed and len(allowed) > 1:
            check_choice("metric", metric, allowed)
        if metric and metric not in allowed and "+" not in str(similarity):
            raise InputError(
                f'The "metric" argument must be {allowed[0]!r} for similarity {name!r}; not {metric!r}.'
            )
        own.append(metric if metric in allowed else allowed[0])
    return own[0] if len(set(own)) == 1 and (len(own) == 1 or own[0] == "euclidean") else "mixed"


def distances(stats, layer, *, similarity="expert-output", metric="", model=None):
    """Pairwise distances between one layer's experts.

    Parameters
    ----------
    stats : Statistics
    layer : int or str
        Place among the MoE layers, from 0, or name of the experts module.
    similarity : str
        What experts are compared by:

        - ``"expert-output"``: mean output over all calibration tokens, ``(1/T) Σ_t f_e(x_t)``, in R^D (HC-SMoE, arXiv
          2410.08589, section 3.2);
        - ``"router-logits"``: its logits over the calibration tokens, in R^T (M-SMoE, arXiv 2310.01334);
        - ``"weight"``: its gate, up and down projections (and biases), flattened and joined, in R^(3·D·I);
        - ``"functional"``: its outputs token by token, ``sqrt((1/T) Σ_t ‖f_i(x_t) − f_j(x_t)‖²)``;
        - ``"functional-routed"``: the same weighted by the routing,
          ``sqrt(Σ_t (g_i + g_j) ‖f_i − f_j‖² / Σ_t (g_i + g_j))`` with the weights g that the router applied; for two
          experts that no token is routed to it is the unweighted distance;
        - ``"pairwise-cosine"``: ``1 − (1/T) Σ_t cos(f_i(x_t), f_j(x_t))`` (Sub-MoE, arXiv 2506.23266);
        - ``"cka"``: ``1 − CKA`` of the outputs on the sample, linear and centred,
          ``CKA = ‖F_iᵀF_j‖²_F / (‖F_iᵀF_i‖_F ‖F_jᵀF_j‖_F)`` (DEK, arXiv 2407.09590; Kornblith et al., 2019), over
          2,048 tokens of the sample at most.

        Several joined by ``+`` are combined, each relative to its own mean over pairs: the root of the weighted sum of
        ``d² / mean(d²)`` where all are Euclidean (the distance between the joined, scaled features), else the weighted sum
        of ``d / mean(d)``. Weights go before a ``*``: ``"0.7*functional+0.3*weight"``.
    metric : {"", "euclidean", "cosine"}
        By default the similarity's usual one. Cosine is ``1 − cos`` of the features; of ``"functional"``, of the outputs of
        all tokens joined.
    model : transformers.PreTrainedModel, optional
        Needed for ``"weight"`` and ``"cka"``; merged or not, the original experts are compared.

    Returns
    -------
    (E·(E−1)/2,) float64 array
        Condensed as SciPy's ``pdist``; 0 for experts that are the same.

    Raises
    ------
    ValueError
        If a choice or the layer is unknown, the statistics lack what is needed, ``model`` is missing or another one, or a
        distance is not a number.
    """
    metric_of(similarity, metric)
    name = stats.layer_name(layer)
    found = []
    for part, weight in parts_of(similarity):
        stats.check(NEEDED[part], f"Similarity {part!r}")
        own = metric if metric in ALLOWED[part] else ALLOWED[part][0]
        condensed = _MEASURES[part](stats.layers[name], name, own, model)
        if not np.isfinite(condensed).all():
            raise InputError(
                f'{name}: some distances by "{part}" and "{own}" are not numbers (an expert whose features are all zero '
                'has no cosine, and no router no logits); use metric "euclidean", or check the checkpoint for NaN.'
            )
        found.append((condensed, weight, own))
    if len(found) == 1:
        return found[0][0]
    if all(own == "euclidean" for _, _, own in found):
        return np.sqrt(sum(w * _relative(d**2) for d, w, _ in found))
    return sum(w * _relative(d) for d, w, _ in found)


def _relative(distance):
    mean = distance.mean() if distance.size else 0
    return distance / mean if mean > 0 else distance


def scale_of(stats, layer, *, similarity="expert-output", metric="", model=None):
    """Size of a layer's features in the unit of its distances, so that those of several layers can be compared.

    The root mean square norm of the features where the metric is Euclidean or routing-weighted, else 1.

    Parameters
    ----------
    stats, layer, similarity, metric, model
        As for :func:`distances`.

    Returns
    -------
    float
    """
    parts = parts_of(similarity)
    if len(parts) > 1 or metric_of(similarity, metric) not in ("euclidean", "routing-weighted"):
        return 1.0
    sums, part = stats.layer(layer), parts[0][0]
    if part == "expert-output":
        square = (sums.mean_output**2).sum(1)
    elif part == "router-logits":
        square = sums.logit_gram.sum(0).diagonal()
    elif part == "weight":
        tensors = original_tensors(_layer_of(model, stats.layer_name(layer))).values()
        square = sum(t.detach().double().flatten(1).pow(2).sum(1) for t in tensors)
    else:
        square = sums.output_gram.sum(0).diagonal() / sums.tokens.sum()
    return float(square.mean().sqrt()) or 1.0


def coordinates(condensed, metric):
    """Points whose Euclidean distances are those given: classical scaling, for what needs points.

    Cosine and CKA distances ``1 − s`` are half the squared distance of points on a sphere.

    Parameters
    ----------
    condensed : (E·(E−1)/2,) float64 array
    metric : str

    Returns
    -------
    (E, m) float64 array, m < E

    Raises
    ------
    ValueError
        If the distances are not between points.
    """
    if metric not in EMBEDDED:
        raise InputError(
            f'These distances ("{metric}") are not distances between points, which k-means needs; use a similarity with '
            'metric "euclidean" or "cosine", or group "hierarchical".'
        )
    square = squareform(condensed**2 if metric == "euclidean" else 2 * condensed)
    centred = square - square.mean(0) - square.mean(1)[:, None] + square.mean()
    value, vector = np.linalg.eigh(-centred / 2)
    kept = value > max(value.max(), 0) * 1e-12
    # The sign of an eigenvector is arbitrary: fixed so that the same distances give the same points.
    sign = np.sign(vector[np.abs(vector).argmax(0), np.arange(len(vector))])
    return ((vector * sign) * np.sqrt(np.clip(value, 0, None)))[:, kept]


EMBEDDED = ("euclidean", "cosine", "cka")


def _by_output(sums, name, metric, model):
    return pdist(sums.mean_output.numpy(), metric)


def _by_logits(sums, name, metric, model):
    gram = sums.logit_gram.sum(0).numpy()
    if np.isnan(gram).any():
        raise InputError(f'{name}: no router was found, so that similarity "router-logits" is not to be had.')
    return _from_gram(gram, metric)


def _by_function(sums, name, metric, model):
    return _from_gram((sums.output_gram.sum(0) / sums.tokens.sum()).numpy(), metric)


def _by_routed_function(sums, name, metric, model):
    gram, square = sums.routed_gram.sum(0).numpy(), sums.routed_square.sum(0).numpy()
    mass = sums.routing_mass.sum(0).numpy()
    # Σ g_i ‖f_i − f_j‖², for every ordered pair
    one_sided = np.diag(square)[:, None] + square - 2 * gram
    total = mass[:, None] + mass
    plain = squareform(_by_function(sums, name, "euclidean", model)) ** 2
    weighted = np.where(total > 0, (one_sided + one_sided.T) / np.where(total > 0, total, 1), plain)
    np.fill_diagonal(weighted, 0)
    return squareform(np.sqrt(np.maximum(weighted, 0)), checks=False)


def _by_cosine(sums, name, metric, model):
    cosine = (sums.cosine_sum.sum(0) / sums.tokens.sum()).numpy()
    return np.maximum(1 - cosine[np.triu_indices(len(cosine), 1)], 0)


def _by_cka(sums, name, metric, model):
    """From token-by-token Gram matrices where there are fewer tokens than hidden dimensions, else from D × D products."""
    layer = _layer_of(model, name)
    tokens = sums.sample.inputs[:CKA_TOKENS].to(next(iter(layer.tensors().values())).device)
    centred = []
    with torch.no_grad():
        for expert in range(layer.num_experts):
            output = layer.expert_output(expert, layer.expert_hidden(expert, tokens)).double()
            centred.append(output - output.mean(0))
    if len(tokens) < centred[0].shape[1]:
        flat = torch.stack([(f @ f.T).flatten() for f in centred])
        return _from_gram((flat @ flat.T).cpu().numpy(), "cosine")
    gram = torch.zeros(len(centred), len(centred), dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(centred)), 2):
        gram[i, j] = gram[j, i] = (centred[i].T @ centred[j]).pow(2).sum()
    return _from_gram(gram.numpy(), "cosine")


def _layer_of(model, name):
    if model is None:
        raise InputError(
            'Similarities "weight" and "cka" look at the experts themselves; give the "model" argument.'
        )
    return moe_layer(model, name)


def _from_gram(gram, metric):
    """Distances between vectors of which only the inner products are known."""
    diagonal = np.diag(gram)
    if metric == "cosine":
        with np.errstate(divide="ignore", invalid="ignore"):
            square = 1 - gram / np.sqrt(np.outer(diagonal, diagonal))
    else:
        square = np.sqrt(np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * gram, 0))
    np.fill_diagonal(square, 0 * diagonal)
    return squareform(square, checks=False)


def _by_weight(sums, name, metric, model):
    """From differences: a Gram matrix would cancel for close experts."""
    layer = _layer_of(model, name)
    flat = [t.detach().flatten(1) for t in original_tensors(layer).values()]
    experts = len(flat[0])
    squares = torch.zeros(experts, experts, dtype=torch.float64, device=flat[0].device)
    inner = torch.zeros_like(squares)
    for tensor in flat:
        for part in tensor.split(WEIGHT_CHUNK, dim=1):
            part = part.to(torch.float64)
            if metric == "cosine":
                inner += part @ part.T
                continue
            for e in range(experts - 1):
                squares[e, e + 1 :] += (part[e + 1 :] - part[e]).square_().sum(1)
    if metric == "cosine":
        return _from_gram(inner.cpu().numpy(), metric)
    upper = squares.sqrt().cpu().numpy()
    return upper[np.triu_indices(experts, 1)]


_MEASURES = {
    "expert-output": _by_output,
    "router-logits": _by_logits,
    "weight": _by_weight,
    "functional": _by_function,
    "functional-routed": _by_routed_function,
    "pairwise-cosine": _by_cosine,
    "cka": _by_cka,
}
