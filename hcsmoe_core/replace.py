"""Put r experts and an index map in the place of a layer's E experts, and take them out again."""

import contextlib
import copy

import torch
from torch import nn

from hcsmoe_core._util import InputError
from hcsmoe_core.modeling_hcsmoe import ExpertMap, remap
from hcsmoe_core.moe import (
    DOWN,
    EXPERT_COUNT_NAMES,
    GROUP_COUNT_NAMES,
    GROUP_TOP_K_NAMES,
    TOP_K_NAMES,
    WIDTH_NAMES,
    MoELayer,
    routing_tensors,
    whole_numbers,
)


def replace_experts(layer: MoELayer, tensors, labels, *, rows=None, scales=None) -> None:
    """Replace a layer's E experts by r.

    Without ``rows`` the router keeps its E outputs and what it chooses goes through ``labels``. A token that
    picks two experts of one group goes through their expert twice, with both weights: the output is exactly
    that of E experts of which those of a group are equal. With ``rows`` the router itself has r outputs, and
    chooses, scores and normalises among them by the model's own rule; a token goes to no more than r.

    Parameters
    ----------
    layer : MoELayer
    tensors : dict of str to tensor
        For every name of :meth:`MoELayer.tensors`, a tensor with r rows.
    labels : sequence of E int
        Group of each expert, from 0 to r − 1; −1 for one that is dropped.
    rows : (r, E) float tensor, optional
        Each new row of the router's tensors as a sum of the old ones; a row with a single 1 copies one. Where
        experts are joined, a router that chooses among groups of experts first chooses among all at once
        instead.
    scales : (r, E) float tensor, optional
        Where ``rows`` were fitted so that the logits alone route as before: how what multiplies each expert's
        weight is averaged. What is added to the scores for the choice alone becomes zero.

    Raises
    ------
    InputError
        If no router was found, or experts are dropped and its groups of experts would come to be of different
        sizes.
    """
    experts, stored = layer.experts, max(labels) + 1
    merged = ExpertMap(list(labels), layer.extra, mapped=rows is None)
    counts = {len(labels) + extra: stored + extra for extra in (0, layer.extra)}
    width = tensors[DOWN].shape[1 if layer.transposed else 2]
    new = _stored(layer, tensors)  # value by module and name
    for module in [module for module in experts.modules() if module not in layer.routing]:
        widths = {name for name, value in whole_numbers(module, WIDTH_NAMES).items() if value == layer.width}
        numbers = _resized(module, counts) | dict.fromkeys(widths, width)
        new |= {(module, name): value for name, value in numbers.items()}
    if rows is not None:
        new |= _router_changes(layer, labels, rows, rows if scales is None else scales, counts, merged)
    merged.before, merged.originals = layer.tensors(), _exchange(new)
    experts._merged = merged
    if rows is None and merged.labels != list(range(len(labels))):
        merged.handle = remap(experts)


def _router_changes(layer, labels, rows, scales, counts, merged):
    """New values by module and name, with which a router has r outputs and chooses no more than r."""
    experts = rows.shape[1]
    ungroup, new = not _keeps_groups(layer, labels, rows), {}
    kept = _selectable(layer, len(rows), ungroup)
    for module, name, tensor in routing_tensors(layer, experts):
        weights = rows
        # Not part of the projection that makes the logits: used after it.
        if (tensor.ndim != 2 or tensor.shape[0] == 1) and not (module is layer.router and name == "bias"):
            weights = scales if scales is rows or "scale" in name else torch.zeros_like(rows)
        if experts not in (tensor.numel(), tensor.shape[0]):
            weights = torch.block_diag(weights, torch.eye(layer.extra, dtype=rows.dtype, device=rows.device))
        mixed = mixed_rows(tensor.detach().reshape(weights.shape[1], -1), weights)
        new[module, name] = (
            mixed.reshape(1, -1) if tensor.shape[0] == 1 else mixed.reshape(-1, *tensor.shape[1:])
        )
    for module, name, table in _expert_tables(layer):
        new[module, name] = merged.lookup(table.device)[table].to(table.dtype)
    # OpenAI's privacy filter calls the experts per token by a name for all experts, too.
    either = counts if layer.top_k is None else {layer.top_k: min(layer.top_k, kept)} | counts
    for module in dict.fromkeys((layer.experts, *layer.routing)):
        numbers = _resized(module, either, kept, ungroup and module in layer.routing)
        new |= {(module, name): value for name, value in numbers.items()}
        # A module that looks its counts up in a configuration gets one of its own.
        if module in layer.routing and module is not layer.block and hasattr(module, "config"):
            new[module, "config"] = config = copy.copy(module.config)
            for name, value in _resized(config, counts, kept, ungroup).items():
                setattr(config, name, value)
    return new


def _selectable(layer, count, ungroup):
    """Experts that a token can go to, of ``count``: those of the groups that a router chooses first."""
    limits = [n for module in layer.routing for n in whole_numbers(module, GROUP_TOP_K_NAMES).values()]
    return count if ungroup or not limits else count // layer.router_groups * limits[0]


def _resized(holder, counts, top_k=None, ungroup=False):
    """New values, by name, of a module's or a configuration's numbers of experts and of choices."""
    new = {
        name: counts[value]
        for name, value in whole_numbers(holder, EXPERT_COUNT_NAMES).items()
        if value in counts
    }
    if top_k is not None:
        new |= {name: min(value, top_k) for name, value in whole_numbers(holder, TOP_K_NAMES).items()}
    return new | dict.fromkeys(
        whole_numbers(holder, GROUP_COUNT_NAMES + GROUP_TOP_K_NAMES) if ungroup else (), 1
    )


def _expert_tables(layer):
    """Buffers by which a router looks experts up token by token (DeepSeek-V4)."""
    buffers = [(m, name, b) for m in layer.routing for name, b in m._buffers.items() if b is not None]
    return [(m, name, b) for m, name, b in buffers if b.ndim == 2 and not b.is_floating_point()]


def mixed_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows @ tensor`` ``[r, …]``; rows that take one row as it is copy it bit for bit."""
    mixed = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    for new, row in zip(mixed, rows, strict=True):
        members = row.nonzero()[:, 0].tolist()
        if len(members) == 1 and row[members[0]] == 1:
            new.copy_(tensor[members[0]])
        else:
            weights = row[members].double().to(tensor.device)
            new.copy_((weights @ tensor[members].double().flatten(1)).view_as(new))
    return mixed


def _keeps_groups(layer, labels, rows):
    """Whether a router with other rows still chooses among groups of experts first, if it ever did."""
    if layer.router is None:
        raise InputError(
            f"{layer.name}: no router was found, so that no rows can be dropped; use a method that merges."
        )
    if len(rows) < layer.min_experts:
        raise InputError(
            f"{layer.name}: its router's rule takes {layer.min_experts} experts at least, and {len(rows)} "
            "would "
            'be left; keep more, or let the router keep its rows (router "mapped").'
        )
    dropped = min(labels) < 0
    if dropped and (tables := _expert_tables(layer)):
        raise InputError(
            f"{layer.name}: its router looks experts up in a table ({tables[0][1]}), token by token, so that "
            "none of them can be dropped; use a method that merges."
        )
    if not any(whole_numbers(module, GROUP_COUNT_NAMES) for module in layer.routing):
        return True
    if not dropped:
        return False
    groups = layer.router_groups
    kept = (rows.unflatten(1, (groups, -1)).sum(2) > 0).sum(0).tolist()
    # Such a router adds up the two best scores of each group.
    if len(set(kept)) > 1 or min(kept) < 2:
        raise InputError(
            f"{layer.name}: its router chooses among {groups} groups of experts first, which must stay of "
            f"one size and have two experts at least, but would keep {kept}; drop as many of each, or use a "
            "method that merges."
        )
    return True


def _exchange(new):
    """Set parameters, buffers and attributes, by module and name; returns the values that were there."""
    before = {(module, name): getattr(module, name) for module, name in new}
    for (module, name), value in new.items():
        if name in module._parameters and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, name, value)
    return before


def _stored(layer, tensors):
    """Tensors of a layer by the module that holds each and its name there."""
    parts = [(*path.rpartition(".")[::2], tensor) for path, tensor in layer.stored(tensors).items()]
    return {(layer.experts.get_submodule(owner), name): tensor for owner, name, tensor in parts}


def set_expert_tensors(layer: MoELayer, tensors) -> None:
    """Replace the tensors of a merged layer's experts by others of the same shapes."""
    _exchange(_stored(layer, tensors))


def restore_experts(layer: MoELayer) -> None:
    """Put the original experts and router of a merged layer back: the same tensors, to the bit.

    Raises
    ------
    InputError
        If they are not in memory: a model that was loaded merged never had them.
    """
    suspend_merge(layer)


def suspend_merge(layer: MoELayer):
    """Put the original experts back for a while; :func:`resume_merge` undoes it, given what is returned."""
    merged = layer.experts._merged
    if merged.originals is None:
        raise InputError(
            f"{layer.name} was loaded merged; the original experts are in the original checkpoint."
        )
    if merged.handle is not None:
        merged.handle.remove()
    values = _exchange(merged.originals)
    del layer.experts._merged
    return merged, values


def resume_merge(layer: MoELayer, lifted) -> None:
    """Put the merged experts back that :func:`suspend_merge` took out: the same tensors."""
    merged, values = lifted
    _exchange(values)
    layer.experts._merged = merged
    if merged.handle is not None:
        merged.handle = remap(layer.experts)


@contextlib.contextmanager
def suspended(layers):
    """Put the original experts of merged layers back for the block, and the merged ones after it or an error.

    Layers that are not merged are left alone.

    Raises
    ------
    InputError
        If a layer's original experts are not in memory; then nothing was changed.
    """
    with contextlib.ExitStack() as undo:
        for layer in layers:
            if layer.merged:
                undo.callback(resume_merge, layer, suspend_merge(layer))
        yield
