"""A plan and the weights give the r experts of a layer, on the live model."""

import torch

from hcsmoe_core.moe import find_moe_layers, put_experts, take_experts
from hcsmoe_core.plan import check_fits, check_weights


def apply_plan(model, plan):
    """Merge the experts of a live model, in place.

    The router is kept: what it chooses among E experts is sent through the plan's labels to r merged ones, so that the
    model computes exactly what E experts would of which those of a group are equal. Undone by :func:`restore`; the
    original weights stay in memory until then.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    plan : Plan

    Returns
    -------
    transformers.PreTrainedModel
        The same model.

    Raises
    ------
    ValueError
        If the plan does not fit the model, the model is merged already, or a merged weight is not finite. The model is
        then as it was.
    """
    layers = check_fits(plan, model)
    check_unmerged(layers)
    check_weights(plan, model)
    try:
        for layer, layer_plan in zip(layers, plan.layers, strict=True):
            put_experts(layer, merge_layer(layer, layer_plan), layer_plan.labels)
    except BaseException:
        restore(model)
        raise
    return model


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


def merge_layer(layer, layer_plan):
    """Weighted averages of each group's experts, ``W_g = Σ_{e in g} w_e W_e`` (HC-SMoE, arXiv 2410.08589, eq. 6).

    Sums are float32 (float64 for float32 weights), rounded once to the weights' dtype. An expert that is alone in its
    group is copied, bit for bit.

    Parameters
    ----------
    layer : MoELayer
    layer_plan : LayerPlan

    Returns
    -------
    dict of str to tensor
        For each of :meth:`MoELayer.tensors`, the same with r rows.

    Raises
    ------
    ValueError
        If a merged weight is not finite.
    """
    merged = {}
    for name, tensor in layer.tensors().items():
        tensor = tensor.detach()
        rows = torch.empty(layer_plan.num_groups, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
        for row, members in zip(rows, layer_plan.groups(), strict=True):
            row.copy_(_average(tensor, members, layer_plan.weights))
            if not torch.isfinite(row).all():
                raise ValueError(f"{layer.name}: {name} of experts {members} merges to values that are not finite.")
        merged[name] = rows
    return merged


def _average(tensor, members, weights):
    if len(members) == 1:
        return tensor[members[0]]
    wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    total = torch.zeros(tensor.shape[1:], dtype=wide, device=tensor.device)
    for expert in members:
        total.add_(tensor[expert].to(wide), alpha=weights[expert])
    return total
