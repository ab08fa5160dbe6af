"""What the interactive view shows, as one JSON value: trees, distances, usage, and what every cut costs."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import pdist, squareform

from hcsmoe_core._util import check_count, require
from hcsmoe_core.clustering import linkage as tree_of
from hcsmoe_core.families import moe_layer
from hcsmoe_core.methods import make_plan
from hcsmoe_core.methods.similarities import described
from hcsmoe_core.plan import FORMAT, VERSION
from hcsmoe_core.similarity import distances, metric_of
from hcsmoe_core.ui.figures import leaf_order

SCRIPT, STYLE = (Path(__file__).with_name(name) for name in ("view.js", "view.css"))


def view_data(
    stats: Any,
    model: Any = None,
    *,
    similarity: str = "expert-output",
    linkage: str = "average",
    metric: str = "",
    experts: int | None = None,
    title: str = "",
) -> dict:
    """Everything that the interactive view needs, as a JSON value; the model is not run.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel, optional
        Needed where the similarity looks at weights; where given, sizes are those of its tensors.
    similarity, linkage, metric : str
        As for :func:`hcsmoe_core.make_plan`.
    experts : int, optional
        Experts kept per layer at first; half of them by default.
    title : str
        By default the model's name.

    Returns
    -------
    dict
        ``plan``, the plan shown at first; ``layers``, for each its tree, distances (0 to ``max``, as the
        square root in 16 bits), usage, and by number of groups the costs of the tree's cut.
    """
    require(
        {"usage", "outputs"} & {*stats.needs},
        'The "stats" argument holds neither usage nor outputs, of which the view is made; capture again.',
    )
    sizes = [layer.num_experts for layer in stats.layers.values()]
    half = max(1, min(sizes) // 2)
    experts = half if experts is None else check_count("experts", experts, 1, min(sizes))
    compared = dict(similarity=similarity, metric=metric)
    start = make_plan(stats, model, experts=[experts] * len(sizes), linkage=linkage, **compared)
    layers = []
    for name in stats.layers:
        condensed = distances(stats, name, model=model, **compared)
        tree = tree_of(condensed, linkage, metric=metric_of(similarity, metric))
        layers.append({"name": name, **_tree(condensed, tree), **_costs(stats, name, tree, model)})
    exact = all(layer.output_gram is not None for layer in stats.layers.values())
    record = {"format": FORMAT, "version": VERSION, "settings": start.settings}
    return {
        "title": title or stats.model.get("name", ""),
        "plan": record | {"model": start.model, "statistics": start.statistics},
        "combine": start.layers[0].combine,
        "start": [layer.num_groups for layer in start.layers],
        "label": described(similarity),
        "error": "predicted error of outputs" if exact else "predicted error of mean outputs",
        "domains": list(stats.domains),
        "tokens": stats.num_tokens,
        "layers": layers,
    }


def _tree(condensed, tree):
    """Distances and merge tree of one layer."""
    joins = dict(joins=tree[:, :2].astype(int).tolist(), heights=_short(tree[:, 2]), order=leaf_order(tree))
    return joins | {"distances": _packed(condensed)}


def _costs(stats, name, tree, model):
    """Usage of one layer's experts, and what every cut of its tree costs."""
    sums = stats.layers[name]
    square, size = output_distances(sums)
    share, mass = sums.frequency.numpy(), sums.routing_mass.sum(0).numpy()
    values = cut_values(tree, square, share, mass)
    return {
        "usage": sums.usage_count.tolist(),  # (G, E)
        "mass": _short(mass / mass.sum()),
        "pairs": _packed(np.sqrt(squareform(square, checks=False))),
        "size": float(share @ size),
        "bytes": _expert_bytes(stats, name, model),
    } | {key: _short(column) for key, column in values.items()}


def _expert_bytes(stats, name, model):
    """Bytes of one expert: of the model's tensors, else of three projections at two bytes per weight."""
    if model is not None:
        layer = moe_layer(model, name)
        return sum(t.numel() * t.element_size() for t in layer.tensors().values()) // layer.num_stored
    width = stats.model.get("layers", {}).get(name, {}).get("width", 0)
    outputs = stats.layers[name].output_sum
    return 0 if outputs is None else 6 * width * outputs.shape[2]


def output_distances(sums: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared distances ``(E, E)`` between experts' outputs, and the outputs' own mean squares ``(E,)``.

    Token by token where the statistics hold Grams, else between mean outputs; NaN where they hold neither.
    By these the error of any grouping is known: a group g loses ``Σ_{k<l∈g} p_k p_l d²_kl / Σ_g p`` if each
    of its experts, with usage p, is replaced by the group's usage-weighted mean.
    """
    if sums.output_gram is not None:
        gram = (sums.output_gram.sum(0) / sums.tokens.sum()).numpy()
        size = np.diag(gram)
        return np.maximum(size[:, None] + size - 2 * gram, 0), size
    if sums.output_sum is None:
        return np.full((sums.num_experts,) * 2, np.nan), np.full(sums.num_experts, np.nan)
    outputs = sums.mean_output.numpy()
    return squareform(pdist(outputs, "sqeuclidean")), (outputs**2).sum(1)


def cut_values(tree: np.ndarray, square: np.ndarray, share: np.ndarray, mass: np.ndarray) -> dict:
    """What :func:`hcsmoe_core.methods.summary.summarise` says of all the cuts of a tree, in one go.

    Parameters
    ----------
    tree : (E−1, 4) array
    square : (E, E) array
        Squared distances: :func:`output_distances`.
    share, mass : (E,) arrays
        Usage, and routing mass, of each expert.

    Returns
    -------
    dict of str to (E,) array
        By number of groups from 1: ``lost``, the mean squared error; ``moved``, the share of the routing mass
        of experts that are joined; ``entropy`` of the routing mass over groups, in nats.
    """
    experts = len(tree) + 1
    row, between = list(range(experts)), share[:, None] * share * square
    within, weight, size = np.zeros(experts), np.array(share, float), np.ones(experts)
    mass = mass / mass.sum()
    values = {key: np.zeros(experts) for key in ("lost", "moved", "entropy")}
    for groups in range(experts, 0, -1):
        if groups < experts:
            a, b = (row[int(node)] for node in tree[experts - groups - 1, :2])
            within[a] += within[b] + between[a, b]
            between[a] += between[b]
            between[:, a] = between[a]
            weight[a], size[a], mass[a] = weight[a] + weight[b], size[a] + size[b], mass[a] + mass[b]
            within[b] = weight[b] = size[b] = mass[b] = 0
            row.append(a)
        present = mass > 0
        values["lost"][groups - 1] = (within[weight > 0] / weight[weight > 0]).sum()
        values["moved"][groups - 1] = mass[size > 1].sum()
        values["entropy"][groups - 1] = -(mass[present] * np.log(mass[present])).sum()
    return values


def _packed(values):
    """Values of at least 0 as 16 bits each: ``max · (q / 65535)²``, to 1 in 1,000 down to max / 1,000."""
    top = float(values.max(initial=0))
    levels = np.rint(65535 * np.sqrt(values / (top or 1)))
    encoded = base64.b64encode(np.nan_to_num(levels).astype("<u2").tobytes()).decode()
    return {"max": top if np.isfinite(top) else None, "values": encoded}


def _short(values):
    """Numbers with seven digits; null where there is none."""
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values.tolist()]
