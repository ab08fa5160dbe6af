"""What joining experts does to a layer, predicted from its statistics."""

import numpy as np

from hcsmoe_core.plan import DROPPED

MERGES = ("frequency", "average", "routing-mass")  # weights of a group's members: see merge_weights()


def summarise(stats, layer, labels):
    """What joining experts does to a layer, from its statistics alone.

    Parameters
    ----------
    stats : Statistics
    layer : int or str
    labels : (E,) sequence of int
        Group of each expert.

    Returns
    -------
    dict
        ``groups``; ``saved``, the share of the layer's expert weights that is saved; ``moved``, the share of
        the routing mass that goes to experts that are joined with others or dropped; ``entropy`` and
        ``entropy_after``, of the routing mass over experts and over groups, in nats; ``function_error``, the
        distance of the experts' outputs, token by token, from their group's frequency-weighted mean output,
        weighted by usage and relative to the outputs themselves: a prediction, as averaged weights do not
        give the mean output (NaN where the statistics hold no Grams); ``output_error``, the distance of the
        experts' mean outputs from their group's frequency-weighted mean, weighted by usage and relative to
        the mean outputs themselves: 0 if all that join have the same mean output; NaN where the statistics
        hold no mean outputs.
    """
    sums = stats.layer(layer)
    labels, mass = np.asarray(labels), sums.routing_mass.sum(0).numpy()
    kept, groups = labels != DROPPED, int(labels.max() + 1)
    joined = ~kept | (np.bincount(labels[kept])[labels] > 1)
    return {
        "groups": groups,
        "saved": 1 - groups / len(labels),
        "moved": float(mass[joined].sum() / mass.sum()),
        "entropy": entropy(mass),
        "entropy_after": entropy(np.bincount(labels[kept], mass[kept])),
        "function_error": float("nan") if sums.output_gram is None else function_error(sums, labels),
        "output_error": float("nan") if sums.output_sum is None else _output_error(sums, labels),
    }


def entropy(mass):
    """Entropy of a distribution given by masses, in nats."""
    share = np.divide(mass, np.sum(mass))
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def function_error(sums, labels):
    """``function_error`` of :func:`summarise`.

    From the Gram matrix G of the outputs: ``‖f_e − Σ_k w_k f_k‖² = G_ee − 2 Σ_k w_k G_ek + Σ_kl w_k w_l
    G_kl``.
    """
    gram, share = sums.output_gram.sum(0).numpy(), sums.frequency.numpy()
    together = (labels[:, None] == labels) & (labels != DROPPED)
    mixed = np.where(together, merge_weights(labels, sums, "frequency"), 0.0)  # row e: of e's group
    lost = np.diag(gram) - 2 * (mixed * gram).sum(1) + ((mixed @ gram) * mixed).sum(1)
    return float(np.sqrt(np.maximum(share @ lost, 0) / (share @ np.diag(gram))))


def _output_error(sums, labels):
    outputs, share = sums.mean_output.numpy(), sums.frequency.numpy()
    weighted = merge_weights(labels, sums, "frequency")[:, None] * outputs
    centres = np.stack([weighted[labels == group].sum(0) for group in range(labels.max() + 1)])
    moved = outputs - np.where(labels[:, None] != DROPPED, centres[labels], 0)
    return float(np.sqrt((share @ (moved**2).sum(1)) / (share @ (outputs**2).sum(1))))


def merge_weights(labels, layer_stats, merge: str) -> np.ndarray:
    """Weight of each expert in its group, ``(E,)`` float64; they sum to one in each group, 0 where dropped.

    By one of :data:`MERGES`: the number of tokens routed to each, alike, or the sum of the router's weights.
    A group that no token was routed to is averaged with equal weights.
    """
    labels = np.asarray(labels)
    share = {
        "average": lambda: np.ones(len(labels)),
        "frequency": lambda: layer_stats.usage_count.sum(0).double().numpy(),
        "routing-mass": lambda: layer_stats.routing_mass.sum(0).numpy().clip(min=0),
    }[merge]()
    kept = labels != DROPPED
    total = np.bincount(labels[kept], share[kept])
    share = np.where(total[labels] > 0, share, 1.0)
    return np.where(kept, share / np.bincount(labels[kept], share[kept])[labels], 0.0)
