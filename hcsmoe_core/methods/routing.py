"""Fewer router rows that route tokens to groups as the old rows did to their members."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

from hcsmoe_core import collect, steps
from hcsmoe_core._util import require

# Of ‖A − A₀‖² beside the mean loss per token: the best of 0.0001 to 1 on the embedded models.
PENALTY = 0.01


@steps.router("folded", needs=("sample",))
def folded_rows(layer_plan, sample):
    """Each new router row as a sum of the old ones, fitted to the routing of the sample's tokens.

    The new logits are ``A l`` of the old ones l, so that nothing need be known of what the router reads and
    how it makes them. A minimises the mean over tokens of the cross-entropy between the routing to groups and
    what the new logits give (by softmax, or one sigmoid a group, as the router does), plus ``0.01 ‖A −
    A₀‖²``: a convex problem, started at the mean rows A₀. The routing to a group is the sum of the weights
    that were applied to its members. Where these are not normalised it is the sum of all its members' scores,
    as what is left of the sum belongs to the experts not chosen.

    Parameters
    ----------
    layer_plan : LayerPlan
    sample : LayerSample

    Returns
    -------
    (r, E) float64 array

    Raises
    ------
    ValueError
        If no router was found, so that the sample has no logits.
    """
    logits = sample.logits.double().numpy()
    require(
        np.isfinite(logits).all(),
        f'{layer_plan.name}: no router was found, so that it cannot be "folded"; use "mapped".',
    )
    start = layer_plan.router_rows()
    scoring = collect.scoring_of(sample.logits.double(), sample.index, sample.weight.double())
    member = np.array(layer_plan.labels) == np.arange(layer_plan.num_groups)[:, None]
    target = _routing(sample, scoring) @ member.T
    if scoring == "softmax":
        loss, target = _softmax_loss, target / np.maximum(target.sum(1, keepdims=True), np.finfo(float).tiny)
    else:  # two of a group may have more than a sigmoid can give
        loss, target = _sigmoid_loss, target / np.maximum(target.max(1, keepdims=True), 1)

    def penalised(flat):
        rows = flat.reshape(start.shape)
        value, slope = loss(logits @ rows.T, target)
        away = rows - start
        return value + PENALTY * (away**2).sum(), ((slope.T @ logits) + 2 * PENALTY * away).ravel()

    return minimize(
        penalised, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    ).x.reshape(start.shape)


def _routing(sample, scoring):
    """How much each token went to each expert, ``(R, E)``."""
    logits, gates, chosen = sample.logits.double(), sample.gates.numpy(), sample.chosen.numpy()
    if scoring == "sigmoid":
        return np.where(chosen, logits.sigmoid().numpy(), 0)
    scores = logits.softmax(1).numpy()
    # Weights that are the scores times one number, to 2 %, leave the rest of these to experts not chosen.
    scale = gates[chosen] / np.maximum(scores[chosen], np.finfo(float).tiny)
    return gates if scale.std() > 0.02 * abs(scale.mean()) else scores


def _softmax_loss(logits, target):
    """Mean cross-entropy per token, and its derivative by the logits."""
    logs, count = log_softmax(logits, axis=1), len(logits)
    # Tokens of which no choice is an expert with weights have no target, and pull at nothing.
    return -(target * logs).sum() / count, (np.exp(logs) * target.sum(1, keepdims=True) - target) / count


def _sigmoid_loss(logits, target):
    """Mean over tokens of the sum of binary cross-entropies, and its derivative by the logits."""
    losses, count = np.logaddexp(0, logits) - target * logits, len(logits)
    return losses.sum() / count, (expit(logits) - target) / count
