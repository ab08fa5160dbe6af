"""TODO."""

import contextlib
import copy

import torch

from hcsmoe_core._util import InputError
from hcsmoe_core.modeling_hcsmoe import ExpertMap
from hcsmoe_core.moe import (
    CHOICES,
    COUNTS,
    DOWN,
    GROUP_CHOICES,
    ROUTER_GROUPS,
    WIDTHS,
    routing_tensors,
    set_tensor,
)


class _Merged(ExpertMap):
    """What :func:`put_experts` leaves on an experts module: the map, and what :func:`take_experts` puts back."""

    def __init__(self, labels, routed, keep, extra):
        super().__init__(labels, extra)
        self.routed = routed  # experts that the router now chooses from
        self.keep = keep
        self.plan = self.factors = None  # what was applied, for whoever writes the model
        self.changed = []  # (module, name) of every tensor and attribute that was replaced
        self.undo = []  # (module, name, tensor or value)
        self.before = {}  # the layer's tensors, where they are kept
        self.handle = None

    def set(self, module, name, value):
        """Replace a tensor or an attribute, and remember what was there."""
        self.changed.append((module, name))
        if torch.is_tensor(value):
            held = module._parameters if name in module._parameters else module._buffers
            if self.keep:
                self.undo.append((module, name, held[name]))
            set_tensor(module, name, value)
        else:
            self.undo.append((module, name, getattr(module, name)))
            setattr(module, name, value)

    def originals(self, module):
        """Tensors of a module that were replaced, by name."""
        return {name: value for owner, name, value in self.undo if owner is module and torch.is_tensor(value)}


def put_experts(layer, tensors, labels, *, rows=None, scales=None, keep=True):
    """Replace a layer's E experts by r.

    Without ``rows`` the router keeps its E outputs and what it chooses goes through ``labels``. A token that picks two
    experts of one group goes through their expert twice, with both weights: the output is exactly that of E experts of
    which those of a group are equal. With ``rows`` the router itself has r outputs, and chooses, scores and normalises
    among them by the model's own rule; a token goes to no more than r.

    Parameters
    ----------
    layer : MoELayer
    tensors : dict of str to tensor
        For every name of :meth:`MoELayer.tensors`, a tensor with r rows.
    labels : sequence of E int
        Group of each expert, from 0 to r − 1; −1 for one that is dropped.
    rows : (r, E) float tensor, optional
        Each new row of the router's tensors as a sum of the old ones; a row with a single 1 takes one as it is. Where
        experts are joined, a router that chooses among groups of experts first chooses among all at once instead.
    scales : (r, E) float tensor, optional
        Where ``rows`` were fitted so that the logits alone route as before: how what multiplies each expert's weight is
        averaged. What is added to the scores for the choice alone becomes zero.
    keep : bool
        Keep the original tensors so that :func:`take_experts` can put them back.

    Raises
    ------
    ValueError
        If no router was found, or experts are dropped and its groups of experts would come to be of different sizes.
    """
    experts, stored = layer.experts, max(labels) + 1
    grouped = rows is None or _keeps_groups(layer, labels, rows)
    state = _Merged(labels, len(labels) if rows is None else stored, keep, layer.extra)
    state.before = layer.tensors() if keep else {}
    counts = {len(labels): stored, len(labels) + layer.extra: stored + layer.extra}
    width, old_width = tensors[DOWN].shape[1 if layer.transposed else 2], layer.width
    inside = [m for m in experts.modules() if m not in layer.routing]
    physical = layer.stored(tensors)
    for module in inside if rows is None else (*inside, *layer.routing):
        for name in COUNTS:
            if isinstance(value := getattr(module, name, None), int) and value in counts:
                state.set(module, name, counts[value])
    for module in inside:
        for name in WIDTHS:
            if getattr(module, name, None) == old_width:
                state.set(module, name, width)
    for name, tensor in physical.items():
        owner, _, attribute = name.rpartition(".")
        state.set(experts.get_submodule(owner), attribute, tensor)
    if rows is not None:
        _put_rows(layer, rows, rows if scales is None else scales, state, counts)
        _put_tables(layer, state)
    if not grouped:
        _ungroup(layer, state)
    experts._merged = state
    if rows is None and state.labels != list(range(len(labels))):
        state.handle = layer.remap()


def _put_rows(layer, rows, scales, state, counts):
    """Give the router r outputs, and let it choose no more than r."""
    kept, experts = rows.shape
    for module, name, tensor in routing_tensors(layer, experts):
        here = rows if _makes_logits(layer, module, name, tensor) else scales
        if here is scales and scales is not rows and "scale" not in name:
            here = torch.zeros_like(rows)
        if experts not in (tensor.numel(), tensor.shape[0]):
            here = torch.block_diag(here, torch.eye(layer.extra, dtype=rows.dtype, device=rows.device))
        made = mixed_rows(tensor.detach().reshape(here.shape[1], -1), here)
        state.set(
            module,
            name,
            made.reshape(1, len(here)) if tensor.shape[0] == 1 else made.reshape(-1, *tensor.shape[1:]),
        )
    chosen = layer.top_k
    for module in dict.fromkeys((layer.experts, *layer.routing)):
        for name in (*CHOICES, *COUNTS):
            value = getattr(module, name, None)
            # OpenAI's privacy filter calls the experts a token by a name for all experts, too.
            if isinstance(value, int) and (name in CHOICES or value == chosen not in counts):
                state.set(module, name, min(value, kept))
    for module in _configured(layer):
        state.set(module, "config", _smaller_config(module.config, counts, kept))


def _makes_logits(layer, module, name, tensor):
    """Whether a tensor of the routing is of the projection that makes the logits, rather than used after it."""
    return (tensor.ndim == 2 and tensor.shape[0] != 1) or (module is layer.router and name == "bias")


def _configured(layer):
    """Modules that look their counts up in a configuration, of which they then get one of their own."""
    return [module for module in layer.routing if hasattr(module, "config") and module is not layer.block]


def _put_tables(layer, state):
    """Where a router looks experts up token by token (DeepSeek-V4), let it find the merged ones."""
    for module, name, table in _tables(layer):
        state.set(module, name, state.lookup(table.device)[table].to(table.dtype))


def _tables(layer):
    held = [(module, name, table) for module in layer.routing for name, table in module._buffers.items()]
    return [(m, n, t) for m, n, t in held if t is not None and t.ndim == 2 and not t.is_floating_point()]


def _ungroup(layer, state):
    """Let a router that chooses among groups of experts first choose among all at once."""
    for module in layer.routing:
        for name in (*ROUTER_GROUPS, *GROUP_CHOICES):
            if isinstance(getattr(module, name, None), int):
                state.set(module, name, 1)
    for module in _configured(layer):
        config = copy.copy(module.config)
        for name in (*ROUTER_GROUPS, *GROUP_CHOICES):
            if isinstance(getattr(config, name, None), int):
                setattr(config, name, 1)
        state.set(module, "config", config)


def _smaller_config(config, counts, kept):
    """A copy of a configuration with another number of experts, and no more choices than those."""
    config = copy.copy(config)
    for name in COUNTS:
        if isinstance(value := getattr(config, name, None), int) and value in counts:
            setattr(config, name, counts[value])
    for name in CHOICES:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), kept))
    return config


def mixed_rows(tensor, rows):
    """``rows @ tensor`` ``[r, …]``; rows that take one row as it is copy it bit for bit."""
    made = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    for new, row in zip(made, rows, strict=True):
        members = row.nonzero()[:, 0].tolist()
        if len(members) == 1 and row[members[0]] == 1:
            new.copy_(tensor[members[0]])
        else:
            new.copy_(
                (row[members].double().to(tensor.device) @ tensor[members].double().flatten(1)).view_as(new)
            )
    return made


def _keeps_groups(layer, labels, rows):
    """Whether a router with other rows can still choose among groups of experts first; True where it never did."""
    if layer.router is None:
        raise InputError(
            f"{layer.name}: no router was found, so that its rows cannot be dropped; use a method that merges."
        )
    dropped = min(labels) < 0
    if len(rows) < layer.fewest:
        raise InputError(
            f"{layer.name}: its router's rule takes {layer.fewest} experts at least, and {len(rows)} would be left; keep more, "
            'or let the router keep its rows (router "mapped").'
        )
    if dropped and (tables := _tables(layer)):
        raise InputError(
            f"{layer.name}: its router looks experts up in a table ({tables[0][1]}), token by token, so that none of them can "
            "be dropped; use a method that merges."
        )
    if not any(isinstance(getattr(m, name, None), int) for m in layer.routing for name in ROUTER_GROUPS):
        return True
    if not dropped:
        return False
    groups = layer.router_groups
    size = rows.shape[1] // groups
    kept = [int((rows[:, g * size : (g + 1) * size].sum(1) > 0).sum()) for g in range(groups)]
    # Such a router adds up the two best scores of each group.
    if len(set(kept)) > 1 or min(kept) < 2:
        raise InputError(
            f"{layer.name}: its router chooses among {groups} groups of experts first, which must stay of one size and have "
            f"two experts at least, but {kept} of them would be kept; drop as many of each, or use a method that merges."
        )
    return True


def adopt(experts):
    """Make the map that a model was loaded with one that knows what was merged; the original experts are not to be had."""
    found = experts._merged
    routed = len(found.labels) if found.mapped else max(found.labels) + 1
    experts._merged = _Merged(found.labels, routed, False, found.extra)


def set_rows(layer, tensors):
    """Replace tensors of a merged layer by others of the same shapes."""
    for name, tensor in layer.stored(tensors).items():
        owner, _, attribute = name.rpartition(".")
        set_tensor(layer.experts.get_submodule(owner), attribute, tensor)


def take_experts(layer):
    """Put the original experts and router of a merged layer back: the same tensors, to the bit.

    Raises
    ------
    ValueError
        If they were not kept (a model that was loaded merged never had them).
    """
    state = layer.experts._merged
    if not state.keep:
        raise InputError(
            f"{layer.name} was loaded merged; the original experts are in the original checkpoint."
        )
    if state.handle is not None:
        state.handle.remove()
    for module, name, value in reversed(state.undo):
        if torch.is_tensor(value):
            set_tensor(module, name, value)
        else:
            setattr(module, name, value)
    del layer.experts._merged


def lift_experts(layer):
    """Put the original experts back for a while; what is returned puts the merged ones back, by :func:`lay_experts`."""
    state = layer.experts._merged
    values = [(module, name, getattr(module, name)) for module, name in dict.fromkeys(state.changed)]
    take_experts(layer)
    return state, values


def lay_experts(layer, lifted):
    """Put back what :func:`lift_experts` took off: the same tensors, without another merge."""
    state, values = lifted
    for module, name, value in values:
        if torch.is_tensor(value):
            set_tensor(module, name, value)
        else:
            setattr(module, name, value)
    layer.experts._merged = state
    if state.handle is not None:
        state.handle = layer.remap()


@contextlib.contextmanager
def suspended(layers):
    """Put the original experts of merged layers back during the block, and the merged ones after it, also on error."""
    with contextlib.ExitStack() as undo:
        for layer in layers:
            if layer.merged:
                undo.callback(lay_experts, layer, lift_experts(layer))
        yield
