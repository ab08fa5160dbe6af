"""The sparse MoE layers of a transformers model: find them, read them, replace their experts.

This is the only room that knows how transformers builds MoE blocks, and it goes by the experts module, not by the model
family: since version 5, a block's experts are stacked in one module whose forward takes the tokens, the experts that
the router chose for each and their weights. What a router does (softmax, sigmoid, biases, groups of experts, scaling)
happens before that and is never repeated here.
"""

import hashlib
import inspect
from dataclasses import dataclass

import torch
from torch import nn

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


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
    """

    name: str
    experts: nn.Module
    router: nn.Module | None

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
    def top_k(self):
        """k: experts a token goes to, or None where neither the router nor its block says."""
        return next((m.top_k for m in (self.router, self.experts) if isinstance(getattr(m, "top_k", None), int)), None)

    @property
    def up_name(self):
        """Name of the up projection, joined with the gate's where there is one."""
        return next(name for name in UP if name in self.experts._parameters)

    @property
    def transposed(self):
        """Whether the weights are kept as ``[E, D, 2I]`` and ``[E, I, D]`` rather than as ``[E, 2I, D]`` and ``[E, D, I]``."""
        return bool(getattr(self.experts, "is_transposed", False))

    def tensors(self):
        """Every tensor that has one row an expert: projections and, where there are any, their biases."""
        held = {**self.experts._parameters, **self.experts._buffers}
        count = self.num_stored
        return {n: t for n, t in held.items() if t is not None and t.ndim >= 1 and t.shape[0] == count}

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
        up = getattr(self.experts, self.up_name)[expert]
        hidden = tokens @ up if self.transposed else nn.functional.linear(tokens, up)
        bias = getattr(self.experts, f"{self.up_name}_bias", None)
        if bias is not None:
            hidden = hidden + bias[expert]
        if not getattr(self.experts, "has_gate", self.up_name == "gate_up_proj"):
            return self.experts.act_fn(hidden)
        if hasattr(self.experts, "_apply_gate"):  # clamps, interleaved halves and other scales live in there
            return self.experts._apply_gate(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.experts.act_fn(gate) * up

    def down_project(self, hidden):
        """Outputs ``[E, D]`` of one activation vector an expert ``[E, I]``, in float64.

        The down projection is affine, so that this gives an expert's mean output from its mean activation.
        """
        down = getattr(self.experts, DOWN)
        bias = getattr(self.experts, f"{DOWN}_bias", None)
        outputs = []
        for e in range(down.shape[0]):
            weight = down[e].to(torch.float64)
            output = hidden[e] @ weight if self.transposed else weight @ hidden[e]
            outputs.append(output if bias is None else output + bias[e].to(torch.float64))
        return torch.stack(outputs)


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
    layers = []
    for name, module in model.named_modules():
        if _is_experts(module):
            parent = model.get_submodule(name.rpartition(".")[0])
            layers.append(MoELayer(name, module, _find_router(parent, module)))
    if not layers:
        what = getattr(model, "name_or_path", "") or type(model).__name__
        raise ValueError(
            f"No MoE layers found in {what} ({type(model).__name__}): it is dense, or its experts are not kept as the "
            "stacked tensors of transformers 5."
        )
    for layer in layers:
        if getattr(layer.experts, "has_post_expert_norm", False):
            raise ValueError(
                f"{layer.name} ({type(layer.experts).__name__}) normalises after each expert, so that the mean of its "
                "outputs does not follow from the mean of its activations; such models are not supported."
            )
    return layers


def _is_experts(module):
    held = module._parameters
    up = next((held[name] for name in UP if held.get(name) is not None), None)
    down = held.get(DOWN)
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or up.shape[0] != down.shape[0]:
        return False
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = [p for p in inspect.signature(type(module).forward).parameters.values() if p.kind in kinds]
    return len(parameters) == 4 or any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters)


def _find_router(parent, experts):
    """The module beside ``experts`` with one row an expert; a merged layer's router still has its E rows."""
    count = len(experts._merged.labels) if hasattr(experts, "_merged") else getattr(experts, DOWN).shape[0]
    inside = set(experts.modules())
    for module in parent.modules():
        if module not in inside and any(p.ndim == 2 and p.shape[0] == count for p in module.parameters(recurse=False)):
            return module
    return None


def router_logits(output, experts):
    """Logits ``[T, E]`` among what a router returns.

    Raises
    ------
    ValueError
        If nothing in it has one column an expert.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    for part in parts:
        if torch.is_tensor(part) and part.is_floating_point() and part.shape[-1] == experts:
            return part.reshape(-1, experts)
    shapes = [tuple(p.shape) for p in parts if torch.is_tensor(p)]
    raise ValueError(f"A router of {experts} experts returned tensors of shapes {shapes}, none of which are its logits.")


def model_hash(model):
    """Hash of a model's experts and routers that does not depend on the dtype they were loaded in.

    Covers names, shapes and up to 4,096 evenly spread values of each tensor, rounded to bfloat16, so that it takes no
    time on a large model. Merged layers count with the experts they had before.
    """
    digest = hashlib.sha256()
    for layer in find_moe_layers(model):
        tensors = {f"{layer.name}.{n}": t for n, t in original_tensors(layer).items()}
        if layer.router is not None:
            tensors |= {f"{layer.name}:router.{n}": p for n, p in layer.router.named_parameters()}
        for name in sorted(tensors):
            tensor = tensors[name].detach()
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)].to(torch.bfloat16).cpu().contiguous().view(torch.int16)
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


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
        if not all(torch.isfinite(row).all() for row in tensor.detach()):
            raise ValueError(f"{layer.name}: {name} holds NaN or infinite values; the checkpoint is damaged.")


# --- replacing the experts of a live model ----------------------------------------------------------------------------


class _Merged:
    """What :func:`put_experts` leaves on an experts module: the map, and what :func:`take_experts` puts back."""

    def __init__(self, labels, originals, attributes):
        self.labels = list(labels)
        self.originals = originals
        self.attributes = attributes
        self.handle = None
        # The map is not a buffer: transformers re-allocates non-persistent buffers when it loads a checkpoint.
        self._lookup = {}

    def lookup(self, device):
        if device not in self._lookup:
            self._lookup[device] = torch.tensor(self.labels, device=device)
        return self._lookup[device]


def _remap(module, inputs, keywords):
    """Forward pre-hook: the router's choice among E experts becomes one among r."""
    names = list(inspect.signature(type(module).forward).parameters)[1:4]
    values = [*inputs, *(keywords[n] for n in names if n in keywords)]
    tokens, index, weight = values
    return (tokens, module._merged.lookup(index.device)[index], weight), {}


def put_experts(layer, tensors, labels, *, keep=True):
    """Replace a layer's E experts by r, and send what the router chooses through ``labels``.

    The router keeps its E outputs. A token that picks two experts of one group goes through their expert twice, with
    both weights: the output is exactly that of E experts of which those of a group are equal.

    Parameters
    ----------
    layer : MoELayer
    tensors : dict of str to tensor
        For every name of :meth:`MoELayer.tensors`, a tensor with r rows.
    labels : sequence of E int
        Group of each expert, from 0 to r − 1.
    keep : bool
        Keep the original tensors so that :func:`take_experts` can put them back.
    """
    experts = layer.experts
    stored = max(labels) + 1
    originals = {n: held[n] for held in (experts._parameters, experts._buffers) for n in tensors if n in held}
    attributes = {n: getattr(experts, n) for n in ("num_experts",) if hasattr(experts, n)}
    state = _Merged(labels, originals if keep else None, attributes)
    for name, tensor in tensors.items():
        _set_tensor(experts, name, tensor)
    for name in attributes:
        setattr(experts, name, stored)
    experts._merged = state
    state.handle = experts.register_forward_pre_hook(_remap, with_kwargs=True, prepend=True)


def take_experts(layer):
    """Put the original experts of a merged layer back: the same tensors, to the bit.

    Raises
    ------
    ValueError
        If they were not kept (a model that was loaded merged never had them).
    """
    state = layer.experts._merged
    if state.originals is None:
        raise ValueError(f"{layer.name} was loaded merged; the original experts are in the original checkpoint.")
    state.handle.remove()
    for name, tensor in state.originals.items():
        _set_tensor(layer.experts, name, tensor)
    for name, value in state.attributes.items():
        setattr(layer.experts, name, value)
    del layer.experts._merged


def original_tensors(layer):
    """Per-expert tensors as they were before :func:`put_experts`, or those held if it was loaded merged."""
    if layer.merged and layer.experts._merged.originals is not None:
        return layer.experts._merged.originals
    return layer.tensors()


def _set_tensor(module, name, tensor):
    if name in module._parameters:
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor
