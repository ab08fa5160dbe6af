"""One sparse MoE layer of a transformers model: its router, its stacked experts, and how to run one of them.

Since version 5 of transformers, a block's experts are stacked in one module whose forward takes the tokens,
the experts that the router chose for each, and their weights. This view goes by that module, not by the model
family; the few that differ stand in :mod:`hcsmoe_core.families`. What a router does (softmax, sigmoid,
biases, groups of experts, scaling) happens before that and is never repeated here.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils.weak import WeakTensorKeyDictionary

from hcsmoe_core._transformers import gate_function
from hcsmoe_core._util import require

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"

# Attribute names that transformers uses, of modules and of configurations.
EXPERT_COUNT_NAMES = (
    *("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"),
    *("total_experts", "n_total_experts", "num_router_classes"),  # with experts that have no weights
)
TOP_K_NAMES = (
    *("top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts"),
    *("moe_top_k", "moe_topk", "moe_k"),
)
WIDTH_NAMES = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_hidden_size")
GROUP_COUNT_NAMES = ("num_group", "n_group")  # groups of experts that a router chooses among first
GROUP_TOP_K_NAMES = ("topk_group",)  # how many of them it chooses

CHUNK = 1 << 22  # numbers of a tensor that are hashed at once
_digests = WeakTensorKeyDictionary()  # of large tensors: what they looked like, and their digests
PRODUCT_SIZE = 1 << 27  # numbers that the up projections of several experts give at once on a GPU

# Rows of the up projection per neuron, ``[I, p]``, by the number of neurons: without a gate; with all gates
# first; with each neuron's gate beside it.
LAYOUTS = (
    lambda width: torch.arange(width)[:, None],
    lambda width: torch.arange(2 * width).reshape(2, -1).T,
    lambda width: torch.arange(2 * width).reshape(-1, 2),
)


def whole_numbers(holder, names) -> dict[str, int]:
    """Attributes of a module or a configuration that are whole numbers, by name, in the order given."""
    values = {name: getattr(holder, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, int)}


class MoELayer:
    """One sparse MoE layer of a live model, by the name of its experts module.

    Attributes
    ----------
    name : str
        Such as ``model.layers.3.mlp.experts``; plans and statistics go by it.
    experts : torch.nn.Module
        Holds the stacked weights; called as ``experts(tokens [T, D], index [T, k], weight [T, k])``.
    block : torch.nn.Module
        Holds the experts and their router.
    router : torch.nn.Module or None
        Scores the experts; its output has logits ``[T, E]``. None if there is none.
    extra : int
        Rows of the router beyond its experts', which come last: of experts without weights (which pass a
        token on as it is, or skip it), or of shared ones. They are never merged.
    transposed : bool
        Whether weights are ``[E, D, 2I]``, ``[E, I, D]`` rather than ``[E, 2I, D]``, ``[E, D, I]``.
    affine : bool
        Whether an expert's output is affine in its activations, so that their mean gives its mean.
    """

    activation = "act_fn"  # attribute of the experts module
    paths = {}  # noqa: RUF012 (of tensors that the experts module has under other names, by their usual ones)
    is_block = False  # whether the experts module is the block itself
    transposed = False

    def __init__(self, model, name: str):
        self.name, self.experts = name, model.get_submodule(name)
        self.block = self.experts if self.is_block else model.get_submodule(name.rpartition(".")[0])
        routed = self.experts._merged.routed if self.merged else self.num_stored
        self.router, self.extra = _find_router(self.block, self.experts, routed)
        self.transposed |= bool(getattr(self.experts, "is_transposed", False))
        self.affine = not getattr(self.experts, "has_post_expert_norm", False)

    def add_hooks(self, take_router, restore_experts) -> list:
        """Add hooks that get what the router gives and what the experts get; returns handles.

        They are a forward hook that gets what has :func:`router_logits`, and a forward pre-hook ``(module,
        inputs, keywords)`` that gets tokens, index and weight.
        """
        called = set()

        def take(module, inputs, output):
            called.add(module)
            if module is self.router or self.router not in called:
                take_router(module, inputs, output)

        # Some families read a router's weights without calling it; then the module that holds it is called.
        holders = [m for m in self.routing if m is not self.block and self.router in m.modules()]
        handles = [module.register_forward_hook(take) for module in holders]
        return [*handles, self.experts.register_forward_pre_hook(restore_experts, with_kwargs=True)]

    @cached_property
    def routing(self) -> list[nn.Module]:
        """Modules that route: the router, those in it, and those that hold it, up to the block."""
        inside = [] if self.router is None else [*self.router.modules()]
        return inside + [m for m in self.block.modules() if m not in inside and self.router in m.modules()]

    @property
    def merged(self) -> bool:
        """Whether this layer's experts were replaced by merged ones."""
        return hasattr(self.experts, "_merged")

    @property
    def num_experts(self) -> int:
        """E: experts that the router chooses from, merged or not."""
        return len(self.experts._merged.labels) if self.merged else self.num_stored

    @property
    def num_stored(self) -> int:
        """Experts that have weights of their own: E, or r once merged."""
        return len(attrgetter(self.paths.get(DOWN, DOWN))(self.experts))

    @property
    def width(self) -> int:
        """I: neurons of each expert."""
        return self.tensors()[DOWN].shape[1 if self.transposed else 2]

    @property
    def hidden_size(self) -> int:
        """D: size of what an expert reads and writes."""
        return self.tensors()[DOWN].shape[2 if self.transposed else 1]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tensors()[DOWN].device

    @property
    def top_k(self) -> int | None:
        """k: experts per token, or None where neither the routing modules nor their configuration say."""
        modules = [*self.routing, self.experts, self.block]
        holders = [(m, ("top_k",)) for m in modules]
        holders += [(getattr(m, "config", None), TOP_K_NAMES) for m in modules]
        return next((k for holder in holders for k in whole_numbers(*holder).values()), None)

    @property
    def router_groups(self) -> int:
        """Groups of neighbouring experts that a router chooses among first (DeepSeek-V3); else 1."""
        return next((n for m in self.routing for n in whole_numbers(m, GROUP_COUNT_NAMES).values()), 1)

    @property
    def min_experts(self) -> int:
        """Experts that the router's rule needs: choosing groups adds up the two best scores of each."""
        return 2 if any(whole_numbers(m, GROUP_COUNT_NAMES) for m in self.routing) else 1

    @property
    def why_not_solvable(self) -> str:
        """Why a projection of these experts cannot be solved for from what they put out; empty if it can."""
        return "" if self.affine else "each expert's output is normalised"

    @property
    def up_name(self) -> str:
        """Name of the up projection, joined with the gate's where there is one."""
        return next(name for name in UP if name in self.tensors())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor that has one row per expert: projections and, where there are any, their biases."""
        own = {name: attrgetter(path)(self.experts) for name, path in self.paths.items()}
        own, count = own or {**self.experts._parameters, **self.experts._buffers}, self.num_stored
        return {n: t for n, t in own.items() if t is not None and t.ndim >= 1 and t.shape[0] == count}

    def stored(self, tensors) -> dict[str, torch.Tensor]:
        """What the model stores for :meth:`tensors`, by dotted name from the experts module."""
        return {self.paths.get(name, name): tensor for name, tensor in tensors.items()}

    def shapes(self, stored: int, width: int) -> dict[str, list[int]]:
        """Shapes that :meth:`tensors` have with another number of experts and another width, by name."""
        up, down = (2, 1) if self.transposed else (1, 2)
        axes = {self.up_name: up, f"{self.up_name}_bias": 1, DOWN: down}
        shapes = {name: [stored, *tensor.shape[1:]] for name, tensor in self.tensors().items()}
        for name in axes.keys() & shapes.keys():
            shapes[name][axes[name]] = shapes[name][axes[name]] // self.width * width
        return shapes

    def up_matrix(self, expert: int) -> torch.Tensor:
        """Up projection of one expert, ``[2I, D]`` with the gate's, ``[I, D]`` where there is no gate."""
        up = self.tensors()[self.up_name][expert]
        return up.T if self.transposed else up

    def down_matrix(self, expert: int) -> torch.Tensor:
        """Down projection of one expert, ``[D, I]``."""
        down = self.tensors()[DOWN][expert]
        return down.T if self.transposed else down

    def _with_bias(self, output, name, expert):
        bias = getattr(self.experts, f"{name}_bias", None)
        return output if bias is None else output + bias[expert].flatten()

    def activated(self, read):
        """Activations ``[T, I]`` of what the up projection gave, ``[T, 2I]`` or without a gate ``[T, I]``."""
        gated = getattr(self.experts, "has_gate", self.up_name != "up_proj")
        if gated and (family_function := gate_function(self.experts)):
            return family_function(read)
        gate, *up = read.chunk(2 if gated else 1, dim=-1)
        activated = attrgetter(self.activation)(self.experts)(gate)
        return activated * up[0] if gated else activated

    def expert_hidden(self, expert: int, tokens: torch.Tensor) -> torch.Tensor:
        """Activations ``[T, I]`` of one expert before its down projection, of tokens ``[T, D]``."""
        return self.activated(self._with_bias(linear(tokens, self.up_matrix(expert)), self.up_name, expert))

    def expert_output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs ``[T, D]`` of one expert, from its activations ``[T, I]``."""
        output = self._with_bias(linear(hidden, self.down_matrix(expert)), DOWN, expert)
        return output if self.affine else self.experts.post_expert_norm(output)

    def down_project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs ``[E, D]`` of one activation vector per expert ``[E, I]``, in float64: of means, means."""
        downs = [self.down_matrix(e).double() for e in range(self.num_stored)]
        return torch.stack([self._with_bias(down @ hidden[e], DOWN, e) for e, down in enumerate(downs)])

    def hidden_sums(self, tokens: torch.Tensor) -> torch.Tensor:
        """Activations of every expert, summed over tokens ``[T, D]``: ``[E, I]`` in float64.

        On a CPU one by one, so that what each gives stays in the caches; on a GPU several in one product.
        """
        experts = range(self.num_stored)
        if tokens.device.type == "cpu":
            return torch.stack([self.expert_hidden(e, tokens).sum(0, dtype=torch.float64) for e in experts])
        step = max(1, PRODUCT_SIZE // (len(tokens) * len(self.up_matrix(0))))
        return torch.cat([self._joined_sums(tokens, experts[e : e + step]) for e in experts[::step]])

    def _joined_sums(self, tokens, experts):
        """:meth:`hidden_sums` of a range of experts, by one product."""
        rows = slice(experts.start, experts.stop)
        apart, stacked = self.transposed, self.tensors()[self.up_name]
        up = torch.cat([self.up_matrix(e) for e in experts]) if apart else stacked[rows].flatten(0, 1)
        read = self._with_bias(linear(tokens, up), self.up_name, rows)
        hidden = self.activated(read.view(len(tokens) * len(experts), -1))
        return hidden.view(len(tokens), len(experts), -1).sum(0, dtype=torch.float64)

    def neuron_rows(self, width: int | None = None) -> torch.Tensor:
        """Rows of the up projection per neuron, ``[I, p]``: its gate's and its own (p = 2), or its own.

        ``width`` is another number of neurons in the same layout. InputError if that is unknown.
        """
        require(
            self.neurons_known,
            f"{self.name}: which rows of {self.up_name} make which of the {self.width} neurons is not "
            'known, so that neurons cannot be matched or chosen; use combine "average".',
        )
        return self._layout(self.width if width is None else width)

    @property
    def neurons_known(self) -> bool:
        """Whether it is known which rows of the up projection make which neuron."""
        return self._layout is not None

    @cached_property
    def _layout(self):
        """The one of :data:`LAYOUTS` by which shuffling neurons' rows shuffles their activations alike."""
        rows_read, generator = len(self.up_matrix(0)), torch.Generator().manual_seed(0)
        probe = torch.randn(1, rows_read, generator=generator)
        order = torch.randperm(self.width, generator=generator)
        for layout in LAYOUTS:
            rows, shuffled = layout(self.width), probe.clone()
            if rows.numel() == rows_read:
                shuffled[:, rows] = probe[:, rows[order]]
                hidden = self.activated(torch.cat([probe, shuffled]).to(self.device))
                if torch.allclose(hidden[1], hidden[0, order.to(self.device)]):
                    return layout
        return None

    def neurons(self, expert: int, dtype: torch.dtype | None = None) -> "Neurons":
        """One expert neuron by neuron, however the family stores it; by default in the weights' dtype."""
        tensors, rows = self.tensors(), self.neuron_rows()
        bias, offset = (tensors.get(f"{name}_bias") for name in (self.up_name, DOWN))
        neurons = Neurons(
            self.up_matrix(expert)[rows],
            self.down_matrix(expert),
            None if bias is None else bias[expert][rows],
            None if offset is None else offset[expert],
        )
        return neurons.map(lambda tensor: tensor.detach().to(dtype or tensor.dtype))

    def read(self, neurons: "Neurons", tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What neurons read of tokens, ``[T, p·I']`` in the family's order, and :meth:`neuron_rows`."""
        rows = self.neuron_rows(len(neurons.up))
        up, bias = _by_row(neurons.up, rows), _by_row(neurons.bias, rows)
        return linear(tokens.to(up.dtype), up, bias), rows

    def activate(self, neurons: "Neurons", tokens: torch.Tensor) -> torch.Tensor:
        """Activations ``[T, I']`` of any neurons on tokens ``[T, D]``, in the neurons' dtype."""
        return self.activated(self.read(neurons, tokens)[0])

    def stacked(self, experts: list["Neurons"]) -> dict[str, torch.Tensor]:
        """Stacked tensors of r experts of one width, in the family's own layout, dtype and names."""
        rows, own = self.neuron_rows(len(experts[0].up)), self.tensors()
        as_stored = torch.t if self.transposed else (lambda matrix: matrix)
        parts = {
            self.up_name: [as_stored(_by_row(e.up, rows)) for e in experts],
            DOWN: [as_stored(e.down) for e in experts],
            f"{self.up_name}_bias": [_by_row(e.bias, rows) for e in experts],
            f"{DOWN}_bias": [e.offset for e in experts],
        }
        return {
            name: torch.stack([tensor.to(own[name].dtype) for tensor in part])
            for name, part in parts.items()
            if part[0] is not None
        }


@dataclass(frozen=True)
class Neurons:
    """One expert, neuron by neuron: ``f(x) = down · act(up x + bias) + offset``."""

    up: torch.Tensor  # [I, p, D], what each reads: its gate's row and its own (p = 2), or its own (p = 1)
    down: torch.Tensor  # [D, I], what each writes
    bias: torch.Tensor | None = None  # [I, p]
    offset: torch.Tensor | None = None  # [D]

    def take(self, order) -> "Neurons":
        """The neurons at some indices, in that order."""
        bias = None if self.bias is None else self.bias[order]
        return Neurons(self.up[order], self.down[:, order], bias, self.offset)

    def map(self, function) -> "Neurons":
        """The same with a function applied to each tensor."""
        return Neurons(*(None if part is None else function(part) for part in vars(self).values()))


def _by_row(parts, rows):
    """Parts of neurons ``[I, p, …]`` in the order of the up projection's rows, ``[p·I, …]``; None of None."""
    return None if parts is None else parts.flatten(0, 1)[rows.flatten().argsort().to(parts.device)]


def source_of(model):
    """What reads the layers of a streamed model (:mod:`hcsmoe_core.scale`); None if it is in memory."""
    return getattr(model, "_source", None)


def _find_router(block, experts, count):
    """The innermost module of a block with a row for each of ``count`` experts, and how many others it has.

    It is looked for under a router's usual names first, then by its shape alone.
    """
    usual = [m for name in ("gate", "router") if isinstance(m := getattr(block, name, None), nn.Module)]
    inside, own = [m for router in usual for m in router.modules()], set(experts.modules())
    others = [m for m in block.modules() if m not in own]
    fitting = [(m, 0) for m in (*inside, *others) if count in _matrix_rows(m)]
    longer = [(m, rows - count) for m in inside for rows in _matrix_rows(m) if rows > count]
    return [*fitting[:1], *longer[-1:], (None, 0)][0]


def _matrix_rows(module):
    return [p.shape[0] for p in module.parameters(recurse=False) if p.ndim == 2]


def router_logits(output, experts: int, extra: int = 0) -> torch.Tensor:
    """Logits ``[T, E]`` among what a router returns, or ``[T, E + extra]``; InputError if there are none."""
    tensors = [t for t in (output if isinstance(output, tuple | list) else (output,)) if torch.is_tensor(t)]
    fitting = [
        tensor.reshape(-1, columns)
        for columns in (experts, experts + extra)
        for tensor in tensors
        if tensor.is_floating_point() and tensor.shape[-1] == columns
    ]
    returned = f"A router of {experts} experts returned tensors of shapes {[tuple(t.shape) for t in tensors]}"
    require(fitting, f"{returned}, none of which are its logits.")
    return fitting[0]


def routing_tensors(layer: MoELayer, count: int) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Tensors of a layer's routing with a row for each of ``count`` experts: ``[(module, name, tensor), …]``.

    In the router and below it all of them (also ``[1, E]``); of the modules that hold the router, which may
    have a correction bias, the vectors ``[E]``. Rows beyond the experts' count along.
    """
    rows, inside = {count, count + layer.extra}, set(layer.router.modules())
    own = [(m, name, t) for m in layer.routing for name, t in {**m._parameters, **m._buffers}.items()]
    return [
        (module, name, tensor)
        for module, name, tensor in own
        if tensor is not None and tensor.ndim
        if (tensor.shape[0] in rows and (tensor.ndim == 1 or module in inside))
        or (tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] in rows)
    ]


def place(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a tensor of some dotted name from ``module``, and its name there."""
    owner, _, name = path.rpartition(".")
    return module.get_submodule(owner), name


def digests(tensors: dict) -> dict[str, list[str]]:
    """SHA-256 of tensors by name: of the values rounded to bfloat16, and of the values themselves.

    The two are alike where rounding changes nothing, so that a tensor has the same ones in any dtype that
    holds it.
    """
    unique = {id(tensor): tensor for tensor in tensors.values()}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        known = dict(zip(unique, pool.map(_digest, unique.values()), strict=True))
    return {name: known[id(tensor)] for name, tensor in tensors.items()}


def _digest(tensor):
    """Digests of one tensor; those of a large one are remembered while it seems untouched."""
    require(not tensor.is_meta, "A weight is offloaded; load the model without disk or CPU offload.")
    values = tensor.detach().reshape(-1)
    if tensor.numel() <= CHUNK or tensor.is_inference():
        return _hashes(values, tensor.shape)
    seen = (tensor._version, tensor.data_ptr(), _bytes(values[:: 1 + len(values) // 4096]).tobytes())
    if _digests.get(tensor, [None])[0] != seen:
        _digests[tensor] = seen, _hashes(values, tensor.shape)
    return _digests[tensor][1]


def _hashes(values, shape):
    rounded, exact, same = (*(hashlib.sha256(str(tuple(shape)).encode()) for _ in range(2)), True)
    for chunk in values.split(CHUNK):
        near = chunk.to(torch.bfloat16) if chunk.is_floating_point() else chunk
        rounded.update(_bytes(near))
        if near.dtype != chunk.dtype:
            same = same and torch.equal(near.to(chunk.dtype), chunk)
            exact.update(_bytes(chunk.float()))
    return [rounded.hexdigest(), (rounded if same else exact).hexdigest()]


def _bytes(values):
    return values.cpu().contiguous().view(torch.uint8).numpy()


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite values; rows are looked at where it has no finite sum."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or all(bool(torch.isfinite(row).all()) for row in tensor)


def check_loaded(layer: MoELayer) -> None:
    """Raise InputError unless a layer's weights are in memory and plain finite floating-point numbers."""
    router = {} if layer.router is None else dict(layer.router.named_parameters(recurse=False))
    tensors = layer.tensors() | {f"(router) {name}": tensor for name, tensor in router.items()}
    for name, tensor in tensors.items():
        fault = (
            "is offloaded; load the model without disk or CPU offload"
            if tensor.is_meta
            else f"is quantised ({tensor.dtype}); load a 16- or 32-bit checkpoint"
            if not tensor.is_floating_point() or tensor.element_size() < 2
            else "holds NaN or infinite values; the checkpoint is damaged"
            if not all_finite(tensor.detach())
            else ""
        )
        require(not fault, f"{layer.name}: {name} {fault}.")
