"""TODO."""

import hashlib
import inspect

import torch
from torch import nn

from hcsmoe_core._util import InputError
from hcsmoe_core.modeling_hcsmoe import repeated
from hcsmoe_core.moe import DOWN, UP, MoELayer, fingerprint, source_of

# Parts of a model that text never reaches: their experts are left as they are.
OTHER_PARTS = ("vision", "visual", "audio", "talker")


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
            raise InputError(
                f"{name} ({type(module).__name__}) is not supported: {UNSUPPORTED[type(module).__name__]}."
            )
        kind = _kind(module)
        if kind is None or _reads_no_text(name):
            continue
        layer = kind.at(model, name, module)
        shared = owners.setdefault(id(next(module.parameters())), name)
        if shared != name:
            raise InputError(
                f"{shared} and {name} share their weights; merging them as one is not supported."
            )
        layers.append(layer)
    if not layers:
        what = getattr(model, "name_or_path", "") or type(model).__name__
        raise InputError(
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
    return [
        name for name, module in model.named_modules() if _kind(module) is not None and _reads_no_text(name)
    ]


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
        raise InputError(
            f'The "model" argument has no MoE layer {name}; it is not the model of these statistics.'
        )
    if source_of(model) is not None:
        source_of(model).read_layer(name)
    return found[name]


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
        return {
            n: getattr(self.experts.mlp, held).unflatten(0, (self.num_stored, -1))
            for n, held in self.held.items()
        }

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
        return {
            "gate_up_proj": self.experts.input_linear.weight,
            "down_proj": self.experts.output_linear.weight,
        }

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
            take_experts(
                module, (tokens, index.reshape(len(tokens), -1), weight.reshape(len(tokens), -1)), {}
            )

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
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    parameters = [p for p in inspect.signature(type(module).forward).parameters.values() if p.kind in kinds]
    return len(parameters) == 4 or any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters)


def _kind(module):
    """The class of MoE layer that an experts module makes, or None if it is none."""
    return ENTRIES.get(type(module).__name__) or (MoELayer if _is_experts(module) else None)


def model_hash(model):
    """Hash of a model's experts and routers that does not depend on the dtype they were loaded in.

    Covers names, shapes and up to 4,096 evenly spread values of each tensor, rounded to bfloat16, so that it takes no
    time on a large model. Merged layers count with the experts they had before.
    """
    digest, source = hashlib.sha256(), source_of(model)
    for layer in find_moe_layers(model):
        digest.update(fingerprint(layer) if source is None else source.fingerprint(layer.name))
    return digest.hexdigest()
