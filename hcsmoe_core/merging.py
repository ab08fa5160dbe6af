"""A plan and the weights give the r experts of a layer, on the live model."""

import torch
from tqdm.auto import tqdm

from hcsmoe_core.combining import Group, combine
from hcsmoe_core.compression import compress, densified, from_saved, saved_tensors
from hcsmoe_core.folding import folded_rows
from hcsmoe_core.moe import all_finite, find_moe_layers, put_experts, set_rows, take_experts
from hcsmoe_core.plan import check_fits, check_weights

BLOCK = 1 << 16  # weights that are summed at once: wide sums of so many stay in a CPU's caches


def apply_plan(model, plan, stats=None):
    """Merge or prune the experts of a live model, in place.

    Where the plan keeps the router (``"map"``), what it chooses among E experts is sent through the plan's labels to r
    merged ones, so that the model computes exactly what E experts would of which those of a group are equal. Where it
    drops rows, the router chooses among those left by the model's own rule. Undone by :func:`restore`; the original
    weights stay in memory until then.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    plan : Plan
    stats : Statistics, optional
        Those that the plan was made from; needed where experts are combined by what they do on the sample of layer inputs
        (least squares, selection, trimming, activations, MC-SMoE).

    Returns
    -------
    transformers.PreTrainedModel
        The same model.

    Raises
    ------
    ValueError
        If the plan does not fit the model, needs statistics that are not given, the model is merged already, or a merged
        weight is not finite. The model is then as it was.
    """
    layers = check_appliable(model, plan, stats)
    try:
        bar = tqdm(plan.layers, desc="merge", unit="layer", leave=False, disable=None if plan.needs_sample else True)
        for layer, layer_plan in zip(layers, bar, strict=True):
            apply_layer(layer, layer_plan, stats)
        if plan.compress:
            _compress(layers, plan, stats)
    except BaseException:
        restore(model)
        raise
    return model


def check_appliable(model, plan, stats=None):
    """MoE layers of a model that a plan can be applied to, in the plan's order; ValueError as of :func:`apply_plan`."""
    layers = check_fits(plan, model)
    check_unmerged(layers)
    check_weights(plan, model)
    check_sample(plan, stats)
    return layers


def apply_layer(layer, layer_plan, stats=None):
    """Merge or prune the experts of one layer, in place."""
    sample = stats.layers[layer.name].sample if stats is not None else None
    put_layer(layer, layer_plan, merge_layer(layer, layer_plan, sample), sample)


def put_layer(layer, layer_plan, tensors, sample=None):
    """Give one layer its merged experts, as :func:`merge_layer` made them, and the router that the plan says."""
    means = layer_plan.router_rows()
    rows, scales = (None if means is None else torch.from_numpy(means)), None
    if layer_plan.router == "folded":
        rows, scales = torch.from_numpy(folded_rows(layer_plan, sample)), rows
    put_experts(layer, tensors, layer_plan.labels, rows=rows, scales=scales)
    layer.experts._merged.plan = layer_plan


@torch.no_grad()
def _compress(layers, plan, stats):
    """MC-SMoE's second step on merged layers: experts become what their factors, in the model's dtype, multiply out to."""
    parts = []
    for layer, layer_plan in zip(layers, plan.layers, strict=True):
        sample = stats.layers[layer.name].sample
        inputs, chosen = sample.inputs.to(layer.device), sample.chosen
        routed = [inputs[chosen[:, members].any(1)] for members in layer_plan.groups()]
        parts.append(([layer.neurons(g) for g in range(layer_plan.num_groups)], routed, layer.activate))
    names, dtype = [layer.name for layer in layers], layers[0].tensors()["down_proj"].dtype
    found = dict(zip(names, compress(parts, **plan.compress), strict=True))
    put_factors(layers, from_saved(saved_tensors(found, dtype)))


def put_factors(layers, factors):
    """Set the experts of merged layers to what their factors multiply out to; the factors stay with them.

    Parameters
    ----------
    layers : list of MoELayer
        Merged.
    factors : dict of str to list of dict
        By layer name; see :func:`hcsmoe_core.compression.compress`.
    """
    for layer in layers:
        experts = [densified(layer.neurons(g), parts) for g, parts in enumerate(factors[layer.name])]
        set_rows(layer, layer.stacked(experts))
        layer.experts._merged.factors = factors[layer.name]


def restore(model):
    """Put the original experts back, to the bit; a model that is not merged stays as it is.

    Raises
    ------
    ValueError
        If the model was loaded merged.
    """
    for layer in find_moe_layers(model):
        if layer.merged:
            take_experts(layer)
    return model


def check_unmerged(layers):
    """Raise ValueError if a layer is merged."""
    if any(layer.merged for layer in layers):
        raise ValueError("This model is merged already; restore(model) first, or load the original.")


def check_sample(plan, stats):
    """Raise ValueError unless ``stats`` hold the sample that the plan needs, and are those it was made from."""
    if not plan.needs_sample:
        return
    if stats is None:
        raise ValueError(
            "This plan looks at the sample of layer inputs, by which experts are combined or routers folded; give the "
            "statistics it was made from: "
            "apply_plan(model, plan, stats), or --statistics FILE on the command line."
        )
    stats.check(("sample",), "This plan")
    if plan.statistics and plan.statistics != stats.identity():
        raise ValueError(
            f"The plan was made from other statistics (hash {plan.statistics.get('hash')}) than those given "
            f"({stats.identity()['hash']}); give the ones it was made from, or make the plan again."
        )


def merge_layer(layer, layer_plan, sample=None):
    """The r experts that a plan leaves of a layer.

    Averages, ``W_g = Σ_{e in g} w_e W_e`` (HC-SMoE, arXiv 2410.08589, eq. 6), are summed in float32 (float64 for float32
    weights) and rounded once to the weights' dtype; for other rules see :func:`hcsmoe_core.combining.combine`. An expert
    that is alone in its group is copied, bit for bit, unless it is trimmed.

    Parameters
    ----------
    layer : MoELayer
    layer_plan : LayerPlan
    sample : LayerSample, optional
        Where the plan's rule looks at it.

    Returns
    -------
    dict of str to tensor
        For each of :meth:`MoELayer.tensors`, the same with r rows.

    Raises
    ------
    ValueError
        If a merged weight is not finite, or the rule needs a sample that is not given.
    """
    if sample is None and layer_plan.uses_sample:
        rules = sorted({layer_plan.rule_of(group)["rule"] for group in range(layer_plan.num_groups)})
        raise ValueError(f'{layer.name}: rule {" and ".join(map(repr, rules))} needs the "sample" argument.')
    merged = {name: _averages(tensor.detach(), layer_plan) for name, tensor in layer.tensors().items()}
    options = layer_plan.combine
    plain = options["rule"] == "average" and options.get("align", "none") == "none" and not options.get("refit")
    if layer_plan.rules or not plain:
        merged |= _combined(layer, layer_plan, sample)
    for name, tensor in merged.items():
        if not all_finite(tensor):
            members = next(m for row, m in zip(tensor, layer_plan.groups(), strict=True) if not all_finite(row))
            raise ValueError(f"{layer.name}: {name} of experts {members} merges to values that are not finite.")
    return merged


def _averages(tensor, layer_plan):
    """Weighted averages of one tensor's rows, by group or by the plan's mixture."""
    flat = tensor.reshape(len(tensor), -1)
    rows = flat.new_empty(layer_plan.num_groups, flat.shape[1])
    wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    total, part = torch.empty(2, min(BLOCK, flat.shape[1]), dtype=wide, device=tensor.device)
    for group, members in enumerate(layer_plan.groups()):
        weights = layer_plan.weights
        if layer_plan.mixture is not None:
            weights = layer_plan.mixture[group]
            members = [e for e, w in enumerate(weights) if w > 0]
        if len(members) == 1:
            rows[group] = flat[members[0]]
            continue
        blocks = zip(rows[group].split(BLOCK), *(flat[e].split(BLOCK) for e in members), strict=True)
        for made, *given in blocks:
            summed, one = total[: len(made)].zero_(), part[: len(made)]
            for expert, values in zip(members, given, strict=True):
                summed.add_(one.copy_(values), alpha=weights[expert])
            made.copy_(summed)
    return rows.view(-1, *tensor.shape[1:])


@torch.no_grad()
def _combined(layer, layer_plan, sample):
    """Projections and biases by the plan's rules."""
    made = []
    for place, members in enumerate(layer_plan.groups()):
        if len(members) == 1 and layer_plan.width in (None, layer.width):
            made.append(layer.neurons(members[0]))
        else:
            made.append(combine(*group_and_options(layer, layer_plan, place, sample)))
    return layer.stacked(made)


def group_and_options(layer, layer_plan, place, sample):
    """One group of a plan, and how it becomes one expert: what :func:`hcsmoe_core.combining.combine` takes."""
    members = layer_plan.groups()[place]
    dominant = members[0] if layer_plan.dominant is None else layer_plan.dominant[place]
    width = {} if layer_plan.width is None else {"width": layer_plan.width}
    return Group(layer, members, layer_plan.weights, dominant, sample), layer_plan.rule_of(place) | width
