"""How far apart the experts of a layer are: from statistics and weights to condensed pairwise distances."""

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform

from hcsmoe_core.files import check_choice
from hcsmoe_core.moe import find_moe_layers, original_tensors

FEATURES = {"expert-output": "mean outputs", "router-logits": "router logits", "weight": "weights"}
SIMILARITIES = tuple(FEATURES)
METRICS = ("euclidean", "cosine")
WEIGHT_CHUNK = 1 << 22  # columns of the flattened weights that are compared at once


def distances(stats, layer, *, similarity="expert-output", metric="euclidean", model=None):
    """Pairwise distances between one layer's experts.

    Parameters
    ----------
    stats : Statistics
    layer : int or str
        Place among the MoE layers, from 0, or name of the experts module.
    similarity : {"expert-output", "router-logits", "weight"}
        What an expert is compared by (HC-SMoE, arXiv 2410.08589, section 3.2):

        - ``"expert-output"``: mean output over all calibration tokens, ``(1/T) Σ_t f_e(x_t)``, in R^D;
        - ``"router-logits"``: its logits over the calibration tokens, in R^T;
        - ``"weight"``: its gate, up and down projections, flattened and joined, in R^(3·D·I).
    metric : {"euclidean", "cosine"}
    model : transformers.PreTrainedModel, optional
        Needed for ``"weight"`` only; merged or not, the original experts are compared.

    Returns
    -------
    (E·(E−1)/2,) float64 array
        Condensed as SciPy's ``pdist``; 0 for experts that are the same.

    Raises
    ------
    ValueError
        If a choice or the layer is unknown, ``model`` is missing or another one, or a distance is not a number.
    """
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("metric", metric, METRICS)
    name = stats.layer_name(layer)
    if similarity == "expert-output":
        condensed = pdist(stats.layers[name].mean_output.numpy(), metric)
    elif similarity == "router-logits":
        gram = stats.layers[name].logit_gram.sum(0).numpy()
        if np.isnan(gram).any():
            raise ValueError(f'{name}: no router was found, so that similarity "router-logits" is not to be had.')
        condensed = _from_gram(gram, metric)
    else:
        condensed = _weight_distances(name, model, metric)
    if not np.isfinite(condensed).all():
        raise ValueError(
            f'{name}: some distances by "{similarity}" and "{metric}" are not numbers (an expert whose features are all '
            'zero has no cosine); use metric "euclidean", or check the checkpoint for NaN.'
        )
    return condensed


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


def _weight_distances(name, model, metric):
    """Distances between the flattened weights, from differences (a Gram matrix would cancel for close experts)."""
    if model is None:
        raise ValueError('Similarity "weight" compares the weights themselves; give the "model" argument.')
    found = {layer.name: layer for layer in find_moe_layers(model)}
    if name not in found:
        raise ValueError(f'The "model" argument has no MoE layer {name}; it is not the model of these statistics.')
    flat = [t.detach().flatten(1) for t in original_tensors(found[name]).values()]
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
