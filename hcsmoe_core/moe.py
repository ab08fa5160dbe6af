"""The sparse MoE layers of a transformers model: find them, read them, replace their experts.

This is the only room that knows how transformers builds MoE blocks, and it goes by the experts module, not by the model
family: since version 5, a block's experts are stacked in one module whose forward takes the tokens, the experts that
the router chose for each and their weights. The few families that do otherwise have an entry. What a router does
(softmax, sigmoid, biases, groups of experts, scaling) happens before that and is never repeated here.
"""

import copy
import hashlib
import inspect
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from hcsmoe_core.modeling_hcsmoe import ExpertMap, remap, repeated

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
CHOICES = ("top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k", "moe_topk", "moe_k")
WIDTHS = ("intermediate_dim", "intermediate_size", "expert_dim", "ffn_hidden_size")
ROUTER_NAMES = ("gate", "router")
JOINED = 1 << 27  # numbers that the up projections of several experts make at once on a GPU
# Parts of a model that text never reaches: their experts are left as they are.
OTHER_PARTS = ("vision", "visual", "audio", "talker")


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
        routers = [m for m in self.routing if m is not self.block and any(self.router is inner for inner in m.modules())]
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
            m for m in self.block.modules() if m not in below and any(self.router is inner for inner in m.modules())
        ]

    @property
    def top_k(self):
        """k: experts a token goes to, or None where neither the routing modules nor their configuration say."""
        holders = [*self.routing, self.experts, self.block]
        named = [(m, "top_k") for m in holders] + [(getattr(m, "config", None), c) for m in holders for c in CHOICES]
        return next((k for k in (getattr(owner, name, None) for owner, name in named) if isinstance(k, int)), None)

    @property
    def router_groups(self):
        """Groups of neighbouring experts that a group-limited router chooses among first (DeepSeek-V3); else 1."""
        found = (getattr(m, a, None) for m in self.routing for a in ROUTER_GROUPS)
        return next((n for n in found if isinstance(n, int)), 1)

    @property
    def fewest(self):
        """Experts that the router's rule needs: one that chooses among groups first adds up the two best scores of each."""
        return 2 if any(isinstance(getattr(m, name, None), int) for m in self.routing for name in ROUTER_GROUPS) else 1

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
            return torch.stack([self.expert_hidden(e, tokens).sum(0, dtype=torch.float64) for e in range(count)])
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
        raise ValueError(
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
            read = nn.functional.linear(tokens.to(neurons.up.dtype), _by_row(neurons.up, rows), bias).detach().requires_grad_()
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
        return Neurons(self.up[order], self.down[:, order], None if self.bias is None else self.bias[order], self.offset)

    def map(self, function):
        """The same with a function applied to each tensor."""
        parts = (self.up, self.down, self.bias, self.offset)
        return Neurons(*(None if part is None else function(part) for part in parts))


def _by_row(parts, rows):
    """``[I, p, …]`` put back as rows ``[p·I, …]``."""
    made = parts.new_empty(rows.numel(), *parts.shape[2:])
    made[rows] = parts
    return made


def find_moe_layers(model):
    """Sparse MoE layers of a model, in the order of its modules.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Returns
    -------
    list of MoELayer

    Raises
    ------
    ValueError
        If there is none: the model is dense, or keeps its experts in a way that is not supported.
    """
    layers, owners = [], {}
    for name, module in model.named_modules():
        if type(module).__name__ in UNSUPPORTED:
            raise ValueError(f"{name} ({type(module).__name__}) is not supported: {UNSUPPORTED[type(module).__name__]}.")
        kind = _kind(module)
        if kind is None or _reads_no_text(name):
            continue
        layer = kind.at(model, name, module)
        shared = owners.setdefault(id(next(module.parameters())), name)
        if shared != name:
            raise ValueError(f"{shared} and {name} share their weights; merging them as one is not supported.")
        layers.append(layer)
    if not layers:
        what = getattr(model, "name_or_path", "") or type(model).__name__
        raise ValueError(
            f"No MoE layers found in {what} ({type(model).__name__}): it is dense, or its experts are not kept as the "
            "stacked tensors of transformers 5."
        )
    return layers


def decoder_layers(model):
    """Name of the list of decoder layers, the outermost that the first MoE layer lies in; "" if it lies in none.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Returns
    -------
    str
    """
    path = find_moe_layers(model)[0].name.split(".")
    names = [".".join(path[:i]) for i in range(1, len(path))]
    return next((name for name in names if isinstance(model.get_submodule(name), nn.ModuleList)), "")


def other_experts(model):
    """Names of the experts modules that text never reaches, which are left as they are."""
    return [name for name, module in model.named_modules() if _kind(module) is not None and _reads_no_text(name)]


def _reads_no_text(name):
    return any(part in segment for segment in name.split(".") for part in OTHER_PARTS)


def moe_layer(model, name):
    """The MoE layer of a model that has some name; a streamed model reads its weights.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    found = {layer.name: layer for layer in find_moe_layers(model)}
    if name not in found:
        raise ValueError(f'The "model" argument has no MoE layer {name}; it is not the model of these statistics.')
    if source_of(model) is not None:
        source_of(model).read_layer(name)
    return found[name]


def source_of(model):
    """Where a model that is streamed (:mod:`hcsmoe_core.streaming`) reads its layers from; None if it is in memory."""
    return getattr(model, "_source", None)


# --- families whose experts module does not tell enough ---------------------------------------------------------------


class _LongcatFlash(MoELayer):
    """LongCat: the up projection has rows for the identity experts too, which are never read."""

    fewest = 2  # its experts' forward trips over a single choice

    def tensors(self):
        up, down = self.experts.gate_up_proj, self.experts.down_proj
        return {"gate_up_proj": up[: len(down)], "down_proj": down}

    def stored(self, tensors):
        unread = self.experts.gate_up_proj[self.num_stored :]
        up = tensors["gate_up_proj"]
        return tensors | {"gate_up_proj": torch.cat([up, unread.new_zeros(len(unread), *up.shape[1:])])}


class _Dbrx(MoELayer):
    """DBRX: gate, up and down projections of all experts flattened into ``[E·I, D]`` each, in a module below."""

    up_name = "gate_proj"
    transposed = True
    held = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}  # noqa: RUF012

    @property
    def num_stored(self):
        return self.experts.num_experts

    @property
    def width(self):
        return len(self.experts.mlp.w1) // self.num_stored

    @property
    def hidden_size(self):
        return self.experts.mlp.w1.shape[1]

    def tensors(self):
        return {n: getattr(self.experts.mlp, held).unflatten(0, (self.num_stored, -1)) for n, held in self.held.items()}

    def stored(self, tensors):
        return {f"mlp.{self.held[n]}": t.flatten(0, 1) for n, t in tensors.items()}

    def shapes(self, stored, width):
        return {name: [stored, width, self.hidden_size] for name in self.held}

    def up_matrix(self, expert):
        held = self.tensors()
        return torch.cat([held["gate_proj"][expert], held["up_proj"][expert]])

    def _activated(self, hidden):
        gate, up = hidden.chunk(2, dim=-1)
        return self.experts.mlp.activation_fn(gate) * up

    def stacked(self, experts):
        held = self.tensors()
        parts = {
            "gate_proj": [e.up[:, 0] for e in experts],
            "up_proj": [e.up[:, 1] for e in experts],
            "down_proj": [e.down.T for e in experts],
        }
        return {n: torch.stack(t).to(held[n].dtype) for n, t in parts.items()}


class _JetMoe(MoELayer):
    """JetMoE: the block itself runs its two projections on tokens that its router has sorted by expert.

    Its attention is a mixture of experts too, which is left as it is.
    """

    @staticmethod
    def block_of(model, name):
        return model.get_submodule(name)

    @property
    def num_stored(self):
        return len(self.experts.input_linear.weight)

    def tensors(self):
        return {"gate_up_proj": self.experts.input_linear.weight, "down_proj": self.experts.output_linear.weight}

    def stored(self, tensors):
        return {"input_linear.weight": tensors["gate_up_proj"], "output_linear.weight": tensors["down_proj"]}

    def _activated(self, hidden):
        gate, up = hidden.chunk(2, dim=-1)
        return self.experts.activation(gate) * up

    def listen(self, take_router, take_experts):
        def take(module, inputs, output):
            order, _, gates, sizes, logits = output
            tokens, sorted_experts = inputs[0], repeated(sizes, order.device)
            index, weight = torch.empty_like(order), torch.empty_like(gates)
            index[order], weight[order] = sorted_experts, gates
            take_router(module, inputs, logits)
            take_experts(module, (tokens, index.reshape(len(tokens), -1), weight.reshape(len(tokens), -1)), {})

        return [self.experts.router.register_forward_hook(take)]


class _Llama4(MoELayer):
    """Llama 4: every expert gets every token, multiplied with the router's score (zero where it was not chosen)."""

    unsolvable = "the router's score multiplies what experts read, not what they write"
    transposed = True

    def listen(self, take_router, take_experts):
        def take(module, inputs, output):
            scores, logits = output
            index = logits.topk(module.top_k, dim=1).indices
            take_router(module, inputs, logits)
            take_experts(module, (inputs[0], index, scores.gather(1, index)), {})

        return [self.router.register_forward_hook(take)]


class _Phimoe(MoELayer):
    """PhiMoE: the router takes the best expert, then the best of the others, whatever its configuration says."""

    fewest = 2


UNSUPPORTED = {
    "DogeCDMoE": "its experts are single neurons, looked up by product keys",
    "NllbMoeExperts": "transformers one-hot encodes a mask there, so that only experts 0 and 1 are ever run",
    "SwitchTransformersExperts": "its experts are modules of their own in an encoder and a decoder, and drop tokens that come "
    "after others in a sequence, so that what an expert does for a token cannot be told from the token",
}
ENTRIES = {
    "LongcatFlashExperts": _LongcatFlash,
    "DbrxExperts": _Dbrx,
    "JetMoeMoE": _JetMoe,
    "Llama4TextExperts": _Llama4,
    "PhimoeExperts": _Phimoe,
}


def _is_experts(module):
    held = module._parameters
    up = next((held[name] for name in UP if held.get(name) is not None), None)
    down = held.get(DOWN)
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or up.shape[0] != down.shape[0]:
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [p for p in inspect.signature(type(module).forward).parameters.values() if p.kind in kinds]
    return len(parameters) == 4 or any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters)


def _kind(module):
    """The class of MoE layer that an experts module makes, or None if it is none."""
    return ENTRIES.get(type(module).__name__) or (MoELayer if _is_experts(module) else None)


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
    raise ValueError(f"A router of {experts} experts returned tensors of shapes {shapes}, none of which are its logits.")


def model_hash(model):
    """Hash of a model's experts and routers that does not depend on the dtype they were loaded in.

    Covers names, shapes and up to 4,096 evenly spread values of each tensor, rounded to bfloat16, so that it takes no
    time on a large model. Merged layers count with the experts they had before.
    """
    digest, source = hashlib.sha256(), source_of(model)
    for layer in find_moe_layers(model):
        digest.update(fingerprint(layer) if source is None else source.fingerprint(layer.name))
    return digest.hexdigest()


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
            raise ValueError(f"{layer.name}: {name} is offloaded; load the model without disk or CPU offload.")
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{layer.name}: {name} is quantised ({tensor.dtype}); load a 16- or 32-bit checkpoint.")
        if not all_finite(tensor.detach()):
            raise ValueError(f"{layer.name}: {name} holds NaN or infinite values; the checkpoint is damaged.")


# --- replacing the experts of a live model ----------------------------------------------------------------------------


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
            _set_tensor(module, name, value)
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
        state.set(module, name, made.reshape(1, len(here)) if tensor.shape[0] == 1 else made.reshape(-1, *tensor.shape[1:]))
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


def mixed_rows(tensor, rows):
    """``rows @ tensor`` ``[r, …]``; rows that take one row as it is copy it bit for bit."""
    made = torch.empty(len(rows), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    for new, row in zip(made, rows, strict=True):
        members = row.nonzero()[:, 0].tolist()
        if len(members) == 1 and row[members[0]] == 1:
            new.copy_(tensor[members[0]])
        else:
            new.copy_((row[members].double().to(tensor.device) @ tensor[members].double().flatten(1)).view_as(new))
    return made


def _keeps_groups(layer, labels, rows):
    """Whether a router with other rows can still choose among groups of experts first; True where it never did."""
    if layer.router is None:
        raise ValueError(f"{layer.name}: no router was found, so that its rows cannot be dropped; use a method that merges.")
    dropped = min(labels) < 0
    if len(rows) < layer.fewest:
        raise ValueError(
            f"{layer.name}: its router's rule takes {layer.fewest} experts at least, and {len(rows)} would be left; keep more, "
            'or let the router keep its rows (router "map").'
        )
    if dropped and (tables := _tables(layer)):
        raise ValueError(
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
        raise ValueError(
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
        _set_tensor(layer.experts.get_submodule(owner), attribute, tensor)


def take_experts(layer):
    """Put the original experts and router of a merged layer back: the same tensors, to the bit.

    Raises
    ------
    ValueError
        If they were not kept (a model that was loaded merged never had them).
    """
    state = layer.experts._merged
    if not state.keep:
        raise ValueError(f"{layer.name} was loaded merged; the original experts are in the original checkpoint.")
    if state.handle is not None:
        state.handle.remove()
    for module, name, value in reversed(state.undo):
        if torch.is_tensor(value):
            _set_tensor(module, name, value)
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
            _set_tensor(module, name, value)
        else:
            setattr(module, name, value)
    layer.experts._merged = state
    if state.handle is not None:
        state.handle = layer.remap()


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


def _set_tensor(module, name, tensor):
    if name in module._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
