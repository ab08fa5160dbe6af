"""MoE layers of models that are not of transformers, as nanoGPT-style modules with a list of experts.

Everything goes by one protocol, which a module of your own may follow, too. An experts module

- holds the stacked weights of E experts, ``gate_up_proj [E, 2I, D]`` (without a gate ``up_proj [E, I, D]``)
  and ``down_proj [E, D, I]`` (biases: ``up_proj_bias [E, I]``, ``down_proj_bias [E, D]``);
- has their activation, ``act_fn``;
- is called as ``experts(tokens [T, D], index [T, k], weight [T, k])``;
- lies in a module that also has a router, whose output is or holds the logits ``[T, E]``.

:func:`stack` makes such modules of lists of experts. The model is called with token ids ``[B, S]`` alone.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import linear

from hcsmoe_core._util import InputError, check_count, require

PROBES = 64  # tokens on which a stacked block must compute what the block did


class StackedExperts(nn.Module):
    """E experts ``down · act(up x)`` as stacked tensors; with a gate, ``down · (act(gate x) · up x)``."""

    def __init__(self, ups: list, downs: list, act_fn: Callable, gates: list):
        super().__init__()
        self.act_fn, self.has_gate = act_fn, bool(gates)
        name = "gate_up_proj" if gates else "up_proj"
        for key, layers in ((name, (gates, ups) if gates else (ups,)), ("down_proj", (downs,))):
            for part, suffix in (("weight", ""), ("bias", "_bias")):
                joined = [
                    [getattr(linear, part) for linear in expert] for expert in zip(*layers, strict=True)
                ]
                if joined[0][0] is not None:
                    stacked = torch.stack([torch.cat(rows) for rows in joined]).detach()
                    self.register_parameter(key + suffix, nn.Parameter(stacked))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """Sum of the chosen experts' weighted outputs, ``[T, D]``."""
        output, up = torch.zeros_like(hidden_states), "gate_up_proj" if self.has_gate else "up_proj"
        for expert, down in enumerate(self.down_proj):
            rows, choice = (top_k_index == expert).nonzero(as_tuple=True)
            read = self._read(up, getattr(self, up)[expert], hidden_states[rows], expert)
            gate, *rest = read.chunk(2 if self.has_gate else 1, dim=-1)
            hidden = self.act_fn(gate) * rest[0] if rest else self.act_fn(gate)
            written = self._read("down_proj", down, hidden, expert)
            output.index_add_(0, rows, written * top_k_weights[rows, choice, None])
        return output

    def _read(self, name, matrix, tokens, expert):
        bias = getattr(self, f"{name}_bias", None)
        return linear(tokens, matrix, None if bias is None else bias[expert])


class StackedMoE(nn.Module):
    """A router and stacked experts, called with ``[…, D]``."""

    def __init__(self, router: nn.Module, experts: StackedExperts, top_k: int, route: Callable):
        super().__init__()
        self.router, self.experts, self.top_k, self.route = router, experts, top_k, route

    def forward(self, hidden_states):
        """Outputs of the chosen experts, ``[…, D]``."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        weight, index = self.route(self.router(tokens), self.top_k)
        return self.experts(tokens, index, weight.to(tokens.dtype)).view_as(hidden_states)


def softmax_all(logits, top_k):
    """The k largest weights of a softmax over all experts."""
    return logits.softmax(-1).topk(top_k, dim=-1)


def softmax_chosen(logits, top_k):
    """The same, scaled so that they sum to one: a softmax over the k largest logits."""
    chosen, index = logits.topk(top_k, dim=-1)
    return chosen.softmax(-1), index


def stack(
    model: nn.Module,
    *,
    top_k: int,
    experts: str = "experts",
    router: str = "router",
    up: str = "c_fc",
    down: str = "c_proj",
    gate: str = "",
    activation: str | Callable = "gelu",
    route: Callable | None = None,
) -> nn.Module:
    """Replace, in place, every block that has a list of experts by one whose experts are stacked.

    Each expert must compute ``down(activation(up(x)))``, with a gate ``down(activation(gate(x)) · up(x))``,
    and the block the weighted sum of the chosen ones; that is tried on random tokens, in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module
        Of any kind; called with token ids ``[B, S]``.
    top_k : int
        k: experts per token.
    experts, router : str
        Attributes of a block: the ``ModuleList`` of its experts, and what gives their logits.
    up, down, gate : str
        Names of the linear layers in an expert, such as ``"w1"`` or, in a ``Sequential``, ``"0"``.
    activation : str or callable
        Name of a module in an expert, or a function such as ``torch.nn.functional.silu``.
    route : callable, optional
        ``(logits [T, E], k) → (weight [T, k], index [T, k])``; by default :func:`softmax_all` or
        :func:`softmax_chosen`, by whichever the block computes what it did.

    Returns
    -------
    torch.nn.Module
        The model. InputError, with the model as it was, if it has no such block or a block computes
        something else.
    """
    blocks = {
        name: m for name, m in model.named_modules() if isinstance(getattr(m, experts, None), nn.ModuleList)
    }
    message = (
        f'The "experts" argument must name a ModuleList of a block; no module has one named {experts!r}.'
    )
    require(blocks, message)
    parts = {"router": router, "up": up, "down": down, "gate": gate}
    made = [
        _stacked(name, block, getattr(block, experts), top_k, parts, activation, route)
        for name, block in blocks.items()
    ]
    for name, block in zip(blocks, made, strict=True):
        model.set_submodule(name, block)
    return model


@torch.no_grad()
def _stacked(name, block, experts, top_k, parts, activation, route):
    """The stacked form of one block, checked to compute the same."""
    router, ups, downs, gates = (
        [
            _named(name, owner, argument, path)
            for owner in ([block] if argument == "router" else experts)
            if path
        ]
        for argument, path in parts.items()
    )
    act_fn = activation if callable(activation) else _named(name, experts[0], "activation", activation)
    check_count("top_k", top_k, 1, len(experts))
    stacked, weight = StackedExperts(ups, downs, act_fn, gates), downs[0].weight
    tokens = torch.randn(1, PROBES, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    was, wanted = block.training, block.eval()(tokens)
    block.train(was)
    for rule in (route,) if route else (softmax_all, softmax_chosen):
        new = StackedMoE(router[0], stacked, top_k, rule).train(was)
        if torch.is_tensor(wanted) and torch.allclose(new(tokens), wanted, rtol=1e-3, atol=1e-5):
            return new
    raise InputError(
        f"{name}: the block computes something else than k = {top_k} experts' outputs by the usual routing, "
        'weighted and summed. Give the "route" argument, or a module that follows the protocol of '
        "hcsmoe_core.adapters.",
    )


def _named(name, module, argument, path):
    """A module in another by its dotted name; InputError naming the argument if there is none."""
    known = ", ".join(child for child, _ in module.named_modules() if child)
    message = f'The "{argument}" argument must name a module in {name}, of {known}; not {path!r}.'
    require(path in dict(module.named_modules()), message)
    return module.get_submodule(path)
