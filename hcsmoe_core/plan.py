"""The decision as data: which experts of each layer join, and with what weights."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from hcsmoe_core.clustering import LINKAGES, by_first_appearance, cut, linkage
from hcsmoe_core.files import check_choice, check_count, sha256_json, write_json
from hcsmoe_core.moe import find_moe_layers, model_hash
from hcsmoe_core.similarity import SIMILARITIES, distances

FORMAT = "hcsmoe-plan"
VERSION = 1
METHODS = ("hc-smoe",)
MERGES = ("frequency", "average")


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes
    ----------
    name : str
        The experts module, such as ``model.layers.3.mlp.experts``.
    labels : list of E int
        Group of each expert, numbered by first appearance.
    weights : list of E float
        Weight of each expert in its group's average; they sum to one in each group.
    """

    name: str
    labels: list
    weights: list

    @property
    def num_groups(self):
        """r: experts left in this layer."""
        return max(self.labels) + 1

    def groups(self):
        """Members of each group, ``[[expert, …], …]``."""
        groups = [[] for _ in range(self.num_groups)]
        for expert, label in enumerate(self.labels):
            groups[label].append(expert)
        return groups


@dataclass(frozen=True)
class Plan:
    """A merge, decided but not done.

    Attributes
    ----------
    layers : list of LayerPlan
        In model order.
    settings : dict
        Method, similarity, linkage, merge, … that made it.
    model : dict
        ``name``, ``class`` and ``hash`` of the model it is for; may be empty in a plan written by hand.
    statistics : dict
        Which calibration tokens it was made from.
    """

    layers: list
    settings: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    statistics: dict = field(default_factory=dict)

    def save(self, path):
        """Write as JSON, in full or not at all, with a checksum that tells a damaged file."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_json(path, content | {"sha256": sha256_json(content)})


def load_plan(path):
    """Read a plan.

    A plan written by hand needs ``layers`` alone. One that was saved carries a checksum: after a deliberate edit, remove
    its ``sha256`` line.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a plan, is cut short, was changed, or its layers do not partition their experts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no plan {path}; make one with: hcsmoe plan STATISTICS --experts R --out {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a readable plan ({error}); it may be cut short. Make it again.") from None
    if not isinstance(content, dict) or not isinstance(content.get("layers"), list):
        raise ValueError(f'{path} is not a plan: it has no list "layers". Make one with: hcsmoe plan')
    digest = content.pop("sha256", None)
    if digest is not None and digest != sha256_json(content):
        raise ValueError(f'{path} was changed since it was written. Make it again, or remove its "sha256" to mean the change.')
    if content.get("format", FORMAT) != FORMAT or content.get("version", VERSION) != VERSION:
        raise ValueError(f"{path} is no plan of this version of hcsmoe ({FORMAT} {VERSION}); make it again.")
    try:
        layers = [_checked_layer(**layer) for layer in content["layers"]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a valid plan: {error}") from None
    about = {key: content.get(key) or {} for key in ("settings", "model", "statistics")}
    return Plan(layers, **about)


def _checked_layer(name, labels, weights):
    """LayerPlan of checked values."""
    whole = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
    if not labels or not whole or by_first_appearance(labels).tolist() != list(labels):
        raise ValueError(f"{name}: labels must be group numbers in order of first appearance (0, then 1, …); not {labels}.")
    if len(weights) != len(labels) or not all(isinstance(w, int | float) and w >= 0 for w in weights):
        raise ValueError(f"{name}: there must be one weight of at least 0 for each of the {len(labels)} experts.")
    sums = np.bincount(labels, weights)
    if not np.allclose(sums, 1, rtol=0, atol=1e-6):
        raise ValueError(f"{name}: the weights of each group must sum to one; they sum to {sums.round(6).tolist()}.")
    return LayerPlan(name, list(labels), [float(w) for w in weights])


def make_plan(
    stats,
    model=None,
    *,
    experts,
    method="hc-smoe",
    similarity="expert-output",
    metric="euclidean",
    linkage="average",
    merge="frequency",
):
    """Decide which experts join in every layer.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel, optional
        Needed by similarity ``"weight"``; where given, checked to be the model of the statistics.
    experts : int
        r: experts kept in each layer, from 1 to E.
    method : {"hc-smoe"}
        HC-SMoE (arXiv 2410.08589): hierarchical clustering of the experts, then a weighted average of each group.
    similarity : {"expert-output", "router-logits", "weight"}
    metric : {"euclidean", "cosine"}
    linkage : {"average", "complete", "single", "ward"}
    merge : {"frequency", "average"}
        Weights within a group: each expert's share of the routed tokens, or equal ones. A group that no token was
        routed to is averaged with equal weights.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If a choice is unknown, ``experts`` is out of range, or the statistics are another model's.
    """
    check_choice("method", method, METHODS)
    check_choice("similarity", similarity, SIMILARITIES)
    check_choice("linkage", linkage, LINKAGES)
    check_choice("merge", merge, MERGES)
    check_count("experts", experts, 1, min(layer.usage_count.shape[1] for layer in stats.layers.values()))
    if model is not None:
        check_statistics(stats, model)
    layers = []
    for name, sums in stats.layers.items():
        tree = merge_tree(stats, name, similarity=similarity, metric=metric, linkage=linkage, model=model)
        labels = cut(tree, experts)
        layers.append(LayerPlan(name, labels.tolist(), merge_weights(labels, sums, merge).tolist()))
    settings = dict(method=method, experts=experts, similarity=similarity, metric=metric, linkage=linkage, merge=merge)
    return Plan(layers, settings, dict(stats.model), stats.identity())


def merge_tree(stats, layer, *, similarity="expert-output", metric="euclidean", linkage="average", model=None):
    """Merge tree of one layer, from its statistics: :func:`distances`, then :func:`hcsmoe_core.clustering.linkage`."""
    condensed = distances(stats, layer, similarity=similarity, metric=metric, model=model)
    return _linkage(condensed, linkage, metric=metric)


_linkage = linkage  # the parameter of the same name hides the function in make_plan and merge_tree


def merge_weights(labels, sums, merge):
    """Weight of each expert in its group, ``(E,)`` float64; they sum to one in each group."""
    labels = np.asarray(labels)
    share = sums.usage_count.sum(0).numpy().astype(np.float64) if merge == "frequency" else np.ones(len(labels))
    total = np.bincount(labels, share)
    share = np.where(total[labels] > 0, share, 1.0)
    return share / np.bincount(labels, share)[labels]


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
        ``groups``; ``moved``, the share of the routing mass that goes to experts that are joined with others;
        ``output_error``, the distance of the experts' mean outputs from their group's frequency-weighted mean, weighted
        by usage and relative to the mean outputs themselves: 0 if all that join have the same mean output.
    """
    sums = stats.layer(layer)
    labels = np.asarray(labels)
    outputs, share = sums.mean_output.numpy(), sums.frequency.numpy()
    mass = sums.routing_mass.sum(0).numpy()
    weights = merge_weights(labels, sums, "frequency")
    centres = np.zeros((labels.max() + 1, outputs.shape[1]))
    np.add.at(centres, labels, weights[:, None] * outputs)
    lost = share @ ((outputs - centres[labels]) ** 2).sum(1)
    joined = np.bincount(labels)[labels] > 1
    return {
        "groups": int(labels.max() + 1),
        "moved": float(mass[joined].sum() / mass.sum()),
        "output_error": float(np.sqrt(lost / (share @ (outputs**2).sum(1)))),
    }


def check_statistics(stats, model):
    """Raise ValueError unless the statistics were captured on this model."""
    if stats.model["hash"] != model_hash(model):
        raise ValueError(
            f"These statistics were captured on another model ({stats.model['name']}, {stats.model['class']}) than the one "
            f"given ({model.name_or_path or 'unnamed'}, {type(model).__name__}); capture on this one."
        )


def check_fits(plan, model):
    """MoE layers of ``model`` in the order of the plan's.

    Raises
    ------
    ValueError
        If the plan is for other layers, other numbers of experts or other weights than the model has.
    """
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    planned = [layer.name for layer in plan.layers]
    if planned != list(layers):
        missing = [n for n in layers if n not in planned] or [n for n in planned if n not in layers] or ["another order"]
        raise ValueError(
            f"The plan does not fit the model: it has {len(planned)} MoE layers and the model {len(layers)}; they differ "
            f"in {missing[0]}. Make a plan from this model's statistics."
        )
    for layer_plan in plan.layers:
        experts = layers[layer_plan.name].num_experts
        if len(layer_plan.labels) != experts:
            raise ValueError(
                f"The plan does not fit the model: {layer_plan.name} has {experts} experts, but the plan labels "
                f"{len(layer_plan.labels)}. Make a plan from this model's statistics."
            )
    return [layers[name] for name in planned]


def check_weights(plan, model):
    """Raise ValueError if the plan names the model it was made for, and that is not this one."""
    if plan.model.get("hash") and plan.model["hash"] != model_hash(model):
        raise ValueError(
            f"The plan was made for another model ({plan.model.get('name')}, {plan.model.get('class')}): this one has the "
            "same shape but other weights. Make a plan from this model's statistics."
        )
