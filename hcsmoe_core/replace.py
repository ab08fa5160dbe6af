"""Put r experts and an index map in the place of a layer's E experts, and take them out again."""

import contextlib
import copy

import torch
from torch import nn

from hcsmoe_core import moe
from hcsmoe_core._util import require
from hcsmoe_core.modeling_hcsmoe import ExpertMap, remap
from hcsmoe_core.moe import MoELayer, whole_numbers


def replace_experts(layer: MoELayer, tensors, labels, *, rows=None, scales=None) -> None:
    """Replace a layer's E experts by r.

    Without ``rows`` the router keeps its E outputs and what it chooses goes through ``labels``. A token that
    picks two experts of one group goes through their expert twice, with both weights: the output is exactly
    that of E experts of which those of a group are equal. With ``rows`` the router itself has r outputs, and
    chooses, scores and normalises among them by the model's own rule; a token goes to no more than r.

    Parameters
    ----------
    tensors : dict of str to tensor
        For every name of :meth:`MoELayer.tensors`, a tensor with r rows.
    labels : sequence of E int
        Group of each expert, from 0 to r − 1; −1 for one that is dropped.
    rows : (r, E) float tensor, optional
        Each new row of the router's tensors as a sum of the old ones; a row with a single 1 copies one. Where
        experts are joined, a router of groups of experts then chooses among all at once. InputError if there
        is no router, or experts are dropped and its groups would come to be of different sizes.
    scales : (r, E) float tensor, optional
        Where ``rows`` were fitted so that the logits alone route as before: how what multiplies each expert's
        weight is averaged. What is added to the scores for the choice alone becomes zero.
    """
    experts, stored = layer.experts, max(labels) + 1
    merged = ExpertMap(list(labels), layer.extra, mapped=rows is None)
    counts = {len(labels) + extra: stored + extra for extra in (0, layer.extra)}
    width = tensors[moe.DOWN].shape[1 if layer.transposed else 2]
    rules = {moe.EXPERT_COUNT_NAMES: counts.get, moe.WIDTH_NAMES: {layer.width: width}.get}
    new = _stored(layer, tensors)  # value by module and name
    for module in [module for module in experts.modules() if module not in layer.routing]:
        new |= {(module, name): value for name, value in _resized(module, rules)}
    if rows is not None:
        new |= _router_changes(layer, labels, rows, rows if scales is None else scales, counts, merged)
    merged.before, merged.originals = layer.tensors(), _exchange(new)
    experts._merged = merged
    if rows is None and merged.labels != list(range(len(labels))):
        merged.handle = remap(experts)


def _router_changes(layer, labels, rows, scales, counts, merged):
    """New values by module and name, with which a router has r outputs and chooses no more than r."""
    stored, experts = rows.shape
    grouped, new = _stays_grouped(layer, labels, rows), {}
    for module, name, tensor in moe.routing_tensors(layer, experts):
        weights = rows
        # Not part of the projection that makes the logits: used after it.
        if (tensor.ndim != 2 or tensor.shape[0] == 1) and not (module is layer.router and name == "bias"):
            weights = scales if scales is rows or "scale" in name else torch.zeros_like(rows)
        if experts not in (tensor.numel(), tensor.shape[0]):
            weights = torch.block_diag(weights, torch.eye(layer.extra, dtype=rows.dtype, device=rows.device))
        mixed = mixed_rows(tensor.detach().reshape(weights.shape[1], -1), weights)
        new[module, name] = mixed.reshape((1, -1) if tensor.shape[0] == 1 else (-1, *tensor.shape[1:]))
    for module, name, table in _expert_tables(layer):
        new[module, name] = merged.lookup(table.device)[table].to(table.dtype)
    # Of the groups that a router chooses first, a token can go to these alone.
    limits = [n for module in layer.routing for n in whole_numbers(module, moe.GROUP_TOP_K_NAMES).values()]
    reached = stored // layer.router_groups * limits[0] if grouped and limits else stored
    rules = {moe.EXPERT_COUNT_NAMES: counts.get, moe.TOP_K_NAMES: lambda k: min(k, reached)}
    if not grouped:
        rules[moe.GROUP_COUNT_NAMES + moe.GROUP_TOP_K_NAMES] = lambda groups: 1
    # OpenAI's privacy filter calls the experts per token by a name for all experts, too.
    either = counts if layer.top_k is None else {layer.top_k: min(layer.top_k, reached)} | counts
    for module in dict.fromkeys((layer.experts, *layer.routing)):
        numbers = _resized(module, rules | {moe.EXPERT_COUNT_NAMES: either.get})
        new |= {(module, name): value for name, value in numbers}
        # A module that looks its counts up in a configuration gets one of its own.
        if module in layer.routing and module is not layer.block and hasattr(module, "config"):
            new[module, "config"] = config = copy.copy(module.config)
            for name, value in _resized(config, rules):
                setattr(config, name, value)
    return new


def _resized(holder, rules):
    """Names and new values of numbers of a module or configuration: what their rule gives, unless None."""
    numbers = [(rule, whole_numbers(holder, names)) for names, rule in rules.items()]
    new = [(name, rule(value)) for rule, values in numbers for name, value in values.items()]
    return [(name, value) for name, value in new if value is not None]


def _expert_tables(layer):
    """Buffers by which a router looks experts up token by token (DeepSeek-V4)."""
    buffers = [(m, name, b) for m in layer.routing for name, b in m._buffers.items() if b is not None]
    return [(m, name, b) for m, name, b in buffers if b.ndim == 2 and not b.is_floating_point()]


def mixed_rows(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows @ tensor`` ``[r, …]``; rows that take one row as it is copy it bit for bit."""
    mixed = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    for new, row in zip(mixed, rows, strict=True):
        members = row.nonzero()[:, 0].tolist()
        if row[members].tolist() == [1]:
            new.copy_(tensor[members[0]])
        else:
            weights = row[members].double().to(tensor.device)
            new.copy_((weights @ tensor[members].double().flatten(1)).view_as(new))
    return mixed


def _stays_grouped(layer, labels, rows):
    """Whether a router with other rows still chooses among groups of experts first, if it ever did."""
    method = "use a method that merges."
    require(
        layer.router is not None,
        f"{layer.name}: no router was found, so that no rows can be dropped; {method}",
    )
    require(
        len(rows) >= layer.min_experts,
        f"{layer.name}: its router's rule takes {layer.min_experts} experts at least, and {len(rows)} would "
        'be left; keep more, or let the router keep its rows (router "mapped").',
    )
    dropped, groups = min(labels) < 0, layer.router_groups
    tables = ", ".join(name for _, name, _ in _expert_tables(layer))
    require(
        not (dropped and tables),
        f"{layer.name}: its router looks experts up in a table ({tables}), token by token, so that "
        f"none of them can be dropped; {method}",
    )
    free = not any(whole_numbers(module, moe.GROUP_COUNT_NAMES) for module in layer.routing)
    if free or not dropped:
        return free
    kept = (rows.unflatten(1, (groups, -1)).sum(2) > 0).sum(0).tolist()
    # Such a router adds up the two best scores of each group.
    require(
        len(set(kept)) == 1 and kept[0] >= 2,
        f"{layer.name}: its router chooses among {groups} groups of experts first, which must stay of "
        f"one size and have two experts at least, but would keep {kept}; drop as many of each, or {method}",
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
    return {moe.place(layer.experts, path): tensor for path, tensor in layer.stored(tensors).items()}


def set_expert_tensors(layer: MoELayer, tensors) -> None:
    """Replace the tensors of a merged layer's experts by others of the same shapes."""
    _exchange(_stored(layer, tensors))


def restore_experts(layer: MoELayer) -> None:
    """Put the original experts and router of a merged layer back: the same tensors, to the bit.

    InputError if they are not in memory: a model that was loaded merged never had them.
    """
    suspend_merge(layer)


def suspend_merge(layer: MoELayer):
    """Put the original experts back for a while; :func:`resume_merge` undoes it, given what is returned."""
    merged = layer.experts._merged
    message = f"{layer.name} was loaded merged; the original experts are in the original checkpoint."
    require(merged.originals is not None, message)
    if merged.handle is not None:
        merged.handle.remove()
    values = _exchange(merged.originals)
    del layer.experts._merged
    return merged, values


def resume_merge(layer: MoELayer, lifted) -> None:
    """Put the merged experts back that :func:`suspend_merge` took out: the same tensors."""
    layer.experts._merged, values = lifted
    _exchange(values)
    if layer.experts._merged.handle is not None:
        layer.experts._merged.handle = remap(layer.experts)


@contextlib.contextmanager
def suspended(layers):
    """Put the original experts of merged layers back for the block, and the merged ones after it or an error.

    InputError if a merged layer's original experts are not in memory; then nothing was changed.
    """
    with contextlib.ExitStack() as undo:
        for layer in layers:
            if layer.merged:
                undo.callback(resume_merge, layer, suspend_merge(layer))
        yield
