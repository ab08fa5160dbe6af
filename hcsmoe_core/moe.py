"""The sparse MoE layers of a transformers model: find them, read them, replace their experts.

This is the only room that knows how transformers builds MoE blocks, and it goes by the experts module, not by the model
family: since version 5, a block's experts are stacked in one module whose forward takes the tokens, the experts that
the router chose for each and their weights. The few families that do otherwise have an entry. What a router does
(softmax, sigmoid, biases, groups of experts, scaling) happens before that and is never repeated here.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from hcsmoe_core._util import InputError
from hcsmoe_core.modeling_hcsmoe import remap

UP = ("gate_up_proj", "up_proj")


DOWN = "down_proj"


ROUTER_GROUPS = ("num_group", "n_group")


# Groups of experts that such a router chooses first.
GROUP_CHOICES = ("topk_group",)


# What a block, its router or its experts call the number of experts and the experts a token.
COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_routed_experts",
    "moe_num_experts",
    # Experts without weights among them, which some routers also choose from.
    "total_experts",
    "n_total_experts",
    "num_router_classes",
)


CHOICES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)


WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_hidden_size")


ROUTER_NAMES = ("gate", "router")


JOINED = 1 << 27  # numbers that the up projections of several experts make at once on a GPU


@dataclass(frozen=True)
class MoELayer:
    """One sparse MoE layer of a live model.

    Attributes
    ----------
    name : str
        Dotted name of the experts module, such as ``model.layers.3.mlp.experts``; plans and statistics go by it.
    experts : torch.nn.Module
        Holds the stacked weights; called as ``experts(tokens [T, D], index [T, k], weight [T, k])``.
    router : torch.nn.Module or None
        The module beside the experts that scores them; its output has logits ``[T, E]``. None if none was found.
    block : torch.nn.Module or None
        The MoE block that holds both.
    extra : int
        Rows that the router has beyond its experts': of experts without weights (which pass a token on as it is, or skip
        it), or of shared ones. They come last and are never merged.
    """

    name: str
    experts: nn.Module
    router: nn.Module | None
    block: nn.Module | None = None
    extra: int = 0

    @classmethod
    def at(cls, model, name, experts):
        """The layer of an experts module that has some name in a model, with the router that is found beside it."""
        block = cls.block_of(model, name)
        layer = cls(name, experts, None, block)
        count = experts._merged.routed if layer.merged else layer.num_stored
        router, extra = _find_router(block, experts, count)
        return replace(layer, router=router, extra=extra)

    @staticmethod
    def block_of(model, name):
        """The module that holds the experts and their router."""
        return model.get_submodule(name.rpartition(".")[0])

    def listen(self, take_router, take_experts):
        """Hooks that tell what the router gives and what the experts get, whenever the layer runs.

        Parameters
        ----------
        take_router : callable
            A forward hook, ``(module, inputs, output)``, of whose output :func:`router_logits` are found.
        take_experts : callable
            A forward pre-hook, ``(module, inputs, keywords)``, whose inputs are tokens, index and weight.

        Returns
        -------
        list of handles
        """
        called = []

        def take(module, inputs, output):
            if module is self.router:
                called.append(True)
            elif called:
                return
            take_router(module, inputs, output)

        # Some families read a router's weights without calling the module that has them; then what holds it is listened to.
        routers = [
            m
            for m in self.routing
            if m is not self.block and any(self.router is inner for inner in m.modules())
        ]
        handles = [router.register_forward_hook(take) for router in routers]
        return [*handles, self.experts.register_forward_pre_hook(take_experts, with_kwargs=True)]

    def remap(self):
        """Send what the router chooses through the map to the merged experts; returns a handle that undoes it."""
        return remap(self.experts)

    @property
    def merged(self):
        """Whether :func:`put_experts` has replaced this layer's experts."""
        return hasattr(self.experts, "_merged")

    @property
    def num_experts(self):
        """E: experts that the router chooses from, merged or not."""
        return len(self.experts._merged.labels) if self.merged else self.num_stored

    @property
    def num_stored(self):
        """Experts whose weights are held: E, or r once merged."""
        return getattr(self.experts, DOWN).shape[0]

    @property
    def device(self):
        """Where the weights are."""
        return self.tensors()[DOWN].device

    @cached_property
    def routing(self):
        """Modules that route: the router, those in it, and those that hold it, up to the block."""
        if self.router is None:
            return []
        below = list(self.router.modules())
        return below + [
            m
            for m in self.block.modules()
            if m not in below and any(self.router is inner for inner in m.modules())
        ]

    @property
    def top_k(self):
        """k: experts a token goes to, or None where neither the routing modules nor their configuration say."""
        holders = [*self.routing, self.experts, self.block]
        named = [(m, "top_k") for m in holders] + [
            (getattr(m, "config", None), c) for m in holders for c in CHOICES
        ]
        return next(
            (k for k in (getattr(owner, name, None) for owner, name in named) if isinstance(k, int)), None
        )

    @property
    def router_groups(self):
        """Groups of neighbouring experts that a group-limited router chooses among first (DeepSeek-V3); else 1."""
        found = (getattr(m, a, None) for m in self.routing for a in ROUTER_GROUPS)
        return next((n for n in found if isinstance(n, int)), 1)

    @property
    def fewest(self):
        """Experts that the router's rule needs: one that chooses among groups first adds up the two best scores of each."""
        return (
            2
            if any(isinstance(getattr(m, name, None), int) for m in self.routing for name in ROUTER_GROUPS)
            else 1
        )

    @property
    def affine(self):
        """Whether an expert's output is affine in its activations, so that the mean of one gives that of the other."""
        return not getattr(self.experts, "has_post_expert_norm", False)

    @property
    def unsolvable(self):
        """Why a projection of these experts cannot be solved for from what they put out; empty if it can."""
        return "" if self.affine else "each expert's output is normalised"

    @property
    def up_name(self):
        """Name of the up projection, joined with the gate's where there is one."""
        held = self.tensors()
        return next(name for name in UP if name in held)

    @property
    def transposed(self):
        """Whether the weights are kept as ``[E, D, 2I]`` and ``[E, I, D]`` rather than as ``[E, 2I, D]`` and ``[E, D, I]``."""
        return bool(getattr(self.experts, "is_transposed", False))

    def tensors(self):
        """Every tensor that has one row an expert: projections and, where there are any, their biases."""
        held = {**self.experts._parameters, **self.experts._buffers}
        count = self.num_stored
        return {n: t for n, t in held.items() if t is not None and t.ndim >= 1 and t.shape[0] == count}

    def stored(self, tensors):
        """What the model stores for :meth:`tensors`, by dotted name from the experts module."""
        return tensors

    @property
    def projections(self):
        """Where the model stores the projections, without biases, by name in its state."""
        held = {n: t for n, t in self.tensors().items() if not n.endswith("_bias")}
        return {f"{self.name}.{n}": t for n, t in self.stored(held).items()}

    def shapes(self, stored, width):
        """Shapes that :meth:`tensors` have with another number of experts and another width, by name."""
        held = self.tensors()
        each = held[self.up_name].shape[2 if self.transposed else 1] // self.width
        changed = {
            self.up_name: (2 if self.transposed else 1, each * width),
            f"{self.up_name}_bias": (1, each * width),
            DOWN: (1 if self.transposed else 2, width),
        }
        shapes = {}
        for name, tensor in held.items():
            shapes[name] = [stored, *tensor.shape[1:]]
            if name in changed:
                axis, size = changed[name]
                shapes[name][axis] = size
        return shapes

    @property
    def width(self):
        """I: neurons of each expert."""
        return self.tensors()[DOWN].shape[1 if self.transposed else 2]

    @property
    def hidden_size(self):
        """D."""
        return self.tensors()[DOWN].shape[2 if self.transposed else 1]

    def up_matrix(self, expert):
        """Up projection of one expert, joined with the gate's where there is one: ``[2I, D]`` or ``[I, D]``."""
        up = self.tensors()[self.up_name][expert]
        return up.T if self.transposed else up

    def down_matrix(self, expert):
        """Down projection of one expert, ``[D, I]``."""
        down = self.tensors()[DOWN][expert]
        return down.T if self.transposed else down

    def expert_hidden(self, expert, tokens):
        """Activations of one expert before its down projection.

        Parameters
        ----------
        expert : int
        tokens : (T, D) tensor

        Returns
        -------
        (T, I) tensor
        """
        hidden = nn.functional.linear(tokens, self.up_matrix(expert))
        bias = getattr(self.experts, f"{self.up_name}_bias", None)
        return self._activated(hidden if bias is None else hidden + bias[expert])

    def hidden_sums(self, tokens):
        """Activations of every expert before its down projection, each on all tokens, added up over these.

        On a CPU expert by expert, so that what one makes stays in the caches; on a GPU several experts in one product.
        Products are in the weights' dtype (16-bit ones with float32 accumulation), sums in float64, and nothing is copied to
        the host.

        Parameters
        ----------
        tokens : (T, D) tensor

        Returns
        -------
        (E, I) float64 tensor
        """
        count = self.num_stored
        if tokens.device.type == "cpu":
            return torch.stack(
                [self.expert_hidden(e, tokens).sum(0, dtype=torch.float64) for e in range(count)]
            )
        made, together = [], max(1, JOINED // (len(tokens) * len(self.up_matrix(0))))
        for first in range(0, count, together):
            made.append(self._joined_sums(tokens, first, min(first + together, count)))
        return torch.cat(made)

    def _joined_sums(self, tokens, first, last):
        """:meth:`hidden_sums` of the experts from ``first`` to before ``last``, by one product."""
        if self.transposed:
            up = torch.cat([self.up_matrix(e) for e in range(first, last)])
        else:
            up = self.tensors()[self.up_name][first:last].flatten(0, 1)
        hidden = nn.functional.linear(tokens, up)
        bias = getattr(self.experts, f"{self.up_name}_bias", None)
        if bias is not None:
            hidden += bias[first:last].flatten()
        hidden = self._activated(hidden.view(len(tokens) * (last - first), -1))
        return hidden.view(len(tokens), last - first, -1).sum(0, dtype=torch.float64)

    def _activated(self, hidden):
        """Activations ``[T, I]`` of what the up projection gave, ``[T, 2I]`` or, without a gate, ``[T, I]``."""
        if not getattr(self.experts, "has_gate", self.up_name == "gate_up_proj"):
            return self.experts.act_fn(hidden)
        if hasattr(self.experts, "_apply_gate"):  # clamps, interleaved halves and other scales live in there
            return self.experts._apply_gate(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.experts.act_fn(gate) * up

    def expert_output(self, expert, hidden):
        """Outputs ``[T, D]`` of one expert, from its activations ``[T, I]``."""
        output = nn.functional.linear(hidden, self.down_matrix(expert))
        bias = getattr(self.experts, f"{DOWN}_bias", None)
        output = output if bias is None else output + bias[expert]
        return output if self.affine else self.experts.post_expert_norm(output)

    def down_project(self, hidden):
        """Outputs ``[E, D]`` of one activation vector an expert ``[E, I]``, in float64.

        The down projection is affine, so that this gives an expert's mean output from its mean activation.
        """
        bias = getattr(self.experts, f"{DOWN}_bias", None)
        outputs = []
        for e in range(self.num_stored):
            output = self.down_matrix(e).to(torch.float64) @ hidden[e]
            outputs.append(output if bias is None else output + bias[e].to(torch.float64))
        return torch.stack(outputs)

    def neuron_rows(self, width=None):
        """Rows of the up projection that make each neuron, ``[I, p]``: its gate's and its own (p = 2), or its own (p = 1).

        Parameters
        ----------
        width : int, optional
            Of an expert with another number of neurons in the same layout.

        Raises
        ------
        ValueError
            If the neurons are laid out in neither of the known ways.
        """
        width = self.width if width is None else width
        if len(self.up_matrix(0)) == self.width:
            return torch.arange(width)[:, None]
        rows = torch.arange(2 * width)
        return rows.reshape(-1, 2) if self._interleaved else rows.reshape(2, -1).T

    @cached_property
    def _interleaved(self):
        """Whether a neuron's two rows follow each other, rather than lie in the two halves of the up projection.

        Found once, by shuffling neurons and seeing which layout shuffles the activations alike.
        """
        up, width = self.up_matrix(0), self.width
        count = len(up)
        generator = torch.Generator().manual_seed(0)
        probe, order = torch.randn(1, count, generator=generator), torch.randperm(width, generator=generator)
        rows = torch.arange(count)
        layouts = {False: rows.reshape(2, -1).T, True: rows.reshape(-1, 2)} if count == 2 * width else {}
        for interleaved, layout in layouts.items():
            shuffled = torch.empty_like(probe)
            shuffled[:, layout] = probe[:, layout[order]]
            both = self._activated(torch.cat([probe, shuffled]).to(up.device))
            if torch.allclose(both[1], both[0, order.to(up.device)]):
                return interleaved
        raise InputError(
            f"{self.name}: which rows of {self.up_name} ({count}) make which of the {width} neurons is not known, so that "
            'neurons cannot be matched or chosen; use combine "average".'
        )

    @property
    def neurons_known(self):
        """Whether it can be told which rows of the up projection make which neuron."""
        try:
            self.neuron_rows()
        except ValueError:
            return False
        return True

    def neurons(self, expert, dtype=None):
        """One expert neuron by neuron, whatever way the family stores it.

        Parameters
        ----------
        expert : int
        dtype : torch.dtype, optional
            By default the weights' own.

        Returns
        -------
        Neurons
        """
        held, rows = self.tensors(), self.neuron_rows()
        up, down = self.up_matrix(expert).detach(), self.down_matrix(expert).detach()
        bias, offset = held.get(f"{self.up_name}_bias"), held.get(f"{DOWN}_bias")
        parts = (
            up[rows],
            down,
            None if bias is None else bias[expert].detach()[rows],
            None if offset is None else offset[expert].detach(),
        )
        return Neurons(*(None if part is None else part.to(dtype or part.dtype) for part in parts))

    def activate(self, neurons, tokens):
        """Activations ``[T, I']`` of any neurons on tokens ``[T, D]``, in the neurons' dtype."""
        rows = self.neuron_rows(len(neurons.up))
        up = _by_row(neurons.up, rows)
        bias = None if neurons.bias is None else _by_row(neurons.bias, rows)
        return self._activated(nn.functional.linear(tokens.to(up.dtype), up, bias))

    def slopes(self, neurons, tokens):
        """How activations ``[T, I']`` change with what each neuron reads, ``[p, T, I']``: its gate's product and its own."""
        rows = self.neuron_rows(len(neurons.up))
        bias = None if neurons.bias is None else _by_row(neurons.bias, rows)
        with torch.enable_grad():
            read = (
                nn.functional.linear(tokens.to(neurons.up.dtype), _by_row(neurons.up, rows), bias)
                .detach()
                .requires_grad_()
            )
            slope = torch.autograd.grad(self._activated(read).sum(), read)[0]
        return torch.stack([slope[:, part] for part in rows.T])

    def stacked(self, experts):
        """Stacked tensors, in the family's own layout, dtype and names, of experts given neuron by neuron.

        Parameters
        ----------
        experts : list of r Neurons
            All of one width I'.

        Returns
        -------
        dict of str to tensor
            Up and down projections and their biases, with r rows each.
        """
        held = self.tensors()
        rows = self.neuron_rows(len(experts[0].up))
        ups, downs = [_by_row(e.up, rows) for e in experts], [e.down for e in experts]
        turn = (lambda t: t.T) if self.transposed else (lambda t: t)
        made = {self.up_name: [turn(t) for t in ups], DOWN: [turn(t) for t in downs]}
        if experts[0].bias is not None:
            made[f"{self.up_name}_bias"] = [_by_row(e.bias, rows) for e in experts]
        if experts[0].offset is not None:
            made[f"{DOWN}_bias"] = [e.offset for e in experts]
        return {n: torch.stack([t.to(held[n].dtype) for t in parts]) for n, parts in made.items()}


@dataclass(frozen=True)
class Neurons:
    """One expert, neuron by neuron: ``f(x) = down · act(up x + bias) + offset``.

    Attributes
    ----------
    up : (I, p, D) tensor
        What each neuron reads: its gate's row and its own (p = 2), or its own alone (p = 1).
    down : (D, I) tensor
        What each neuron writes.
    bias : (I, p) tensor or None
    offset : (D,) tensor or None
    """

    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    def take(self, order):
        """The neurons at the places ``order``, in that order."""
        return Neurons(
            self.up[order], self.down[:, order], None if self.bias is None else self.bias[order], self.offset
        )

    def map(self, function):
        """The same with a function applied to each tensor."""
        parts = (self.up, self.down, self.bias, self.offset)
        return Neurons(*(None if part is None else function(part) for part in parts))


def _by_row(parts, rows):
    """``[I, p, …]`` put back as rows ``[p·I, …]``."""
    made = parts.new_empty(rows.numel(), *parts.shape[2:])
    made[rows] = parts
    return made


def source_of(model):
    """Where a model that is streamed (:mod:`hcsmoe_core.scale.streaming`) reads its layers from; None if it is in memory."""
    return getattr(model, "_source", None)


def _find_router(block, experts, count):
    """The innermost module of the block's router that has one row for each of ``count`` experts, and its rows beyond them.

    It is looked for under its usual names first, then by its shape alone among the block's modules.
    """
    named = [m for m in (getattr(block, name, None) for name in ROUTER_NAMES) if isinstance(m, nn.Module)]
    inside, own = [m for router in named for m in router.modules()], set(experts.modules())
    for module in (*inside, *(m for m in block.modules() if m not in own)):
        if count in _matrix_rows(module):
            return module, 0
    longer = [(m, rows - count) for m in inside for rows in _matrix_rows(m) if rows > count]
    return longer[-1] if longer else (None, 0)


def _matrix_rows(module):
    return [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 2]


def router_logits(output, experts, extra=0):
    """Logits ``[T, E]`` among what a router returns, or ``[T, E + extra]`` where it has none of just the experts.

    Raises
    ------
    ValueError
        If nothing in it has one column an expert.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    for wanted in dict.fromkeys((experts, experts + extra)):
        for part in parts:
            if torch.is_tensor(part) and part.is_floating_point() and part.shape[-1] == wanted:
                return part.reshape(-1, wanted)
    shapes = [tuple(p.shape) for p in parts if torch.is_tensor(p)]
    raise InputError(
        f"A router of {experts} experts returned tensors of shapes {shapes}, none of which are its logits."
    )


def fingerprint(layer):
    """What :func:`model_hash` looks at of one layer, as bytes."""
    tensors = {f"{layer.name}.{n}": t for n, t in original_tensors(layer).items()}
    if layer.router is not None:
        tensors |= {f"{layer.name}:router.{n}": p for n, p in original_router(layer).items()}
    parts = []
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).cpu().contiguous().view(torch.int16)
        parts += [f"{name} {tuple(tensor.shape)}".encode(), sample.numpy().tobytes()]
    return b"".join(parts)


def all_finite(tensor):
    """Whether a tensor holds neither NaN nor infinite values.

    One that does has no finite sum; one whose sum is not finite is looked at value by value, as large values add up to one too.
    """
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or all(bool(torch.isfinite(row).all()) for row in tensor)


def check_loaded(layer):
    """Raise ValueError if a layer's weights are not in memory or not plain finite floating-point numbers."""
    named = dict(layer.tensors())
    if layer.router is not None:
        named |= {f"(router) {n}": p for n, p in layer.router.named_parameters(recurse=False)}
    for name, tensor in named.items():
        if tensor.is_meta:
            raise InputError(
                f"{layer.name}: {name} is offloaded; load the model without disk or CPU offload."
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise InputError(
                f"{layer.name}: {name} is quantised ({tensor.dtype}); load a 16- or 32-bit checkpoint."
            )
        if not all_finite(tensor.detach()):
            raise InputError(f"{layer.name}: {name} holds NaN or infinite values; the checkpoint is damaged.")


def routing_tensors(layer, count):
    """Tensors of a layer's routing that have one row for each of ``count`` experts: ``[(module, name, tensor), …]``.

    Everything of that kind in the router and below it (also ``[1, E]``), and the vectors ``[E]`` of the modules that hold
    the router: some families keep a correction bias in the block. Rows beyond the experts' count along.
    """
    found, below = [], set(layer.router.modules())
    for module in layer.routing:
        for name, tensor in {**module._parameters, **module._buffers}.items():
            shape = () if tensor is None else tuple(tensor.shape)
            for rows in dict.fromkeys((count, count + layer.extra)):
                if shape in ((rows,), (1, rows)) or (module in below and shape[:1] == (rows,)):
                    found.append((module, name, tensor))
    return found


def original_tensors(layer):
    """Per-expert tensors as they were before :func:`put_experts`, or those held if it was loaded merged."""
    return (layer.merged and layer.experts._merged.before) or layer.tensors()


def original_router(layer):
    """Parameters of a layer's router as they were before :func:`put_experts`."""
    held = {}
    for prefix, module in layer.router.named_modules():
        originals = layer.experts._merged.originals(module) if layer.merged else {}
        for name, parameter in module.named_parameters(recurse=False):
            held[f"{prefix}.{name}".lstrip(".")] = originals.get(name, parameter)
    return held


def set_tensor(module, name, tensor):
    if name in module._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
