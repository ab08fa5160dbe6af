"""The sparse MoE layers of a transformers model, and the few families whose layers differ."""

import hashlib
import inspect

import torch
from torch import nn

from hcsmoe_core._util import InputError
from hcsmoe_core.modeling_hcsmoe import repeated
from hcsmoe_core.moe import DOWN, UP, MoELayer, fingerprint, source_of

# Parts of a model that text never reaches: their experts are left as they are.
OTHER_PARTS = ("vision", "visual", "audio", "talker")


def find_moe_layers(model) -> list[MoELayer]:
    """Sparse MoE layers of a model, in the order of its modules.

    Raises
    ------
    InputError
        If there is none: the model is dense, or stores its experts in a way that is not supported.
    """
    layers, owners = [], {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in UNSUPPORTED:
            raise InputError(f"{name} ({kind}) is not supported: {UNSUPPORTED[kind]}.")
        layer_class = _layer_class(module)
        if layer_class is None or _reads_no_text(name):
            continue
        owner = owners.setdefault(id(next(module.parameters())), name)
        if owner != name:
            raise InputError(f"{owner} and {name} share their weights; merging them as one is not supported.")
        layers.append(layer_class.at(model, name, module))
    if not layers:
        kind = type(model).__name__
        raise InputError(
            f"No MoE layers found in {getattr(model, 'name_or_path', '') or kind} ({kind}): it is dense, or "
            "its experts are not kept as the stacked tensors of transformers 5."
        )
    return layers


def moe_layer(model, name: str) -> MoELayer:
    """The MoE layer of a model with some name; a streamed model reads its weights.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    if name not in layers:
        raise InputError(
            f'The "model" argument has no MoE layer {name}; it is not the model of these statistics.'
        )
    if source_of(model) is not None:
        source_of(model).read_layer(name)
    return layers[name]


def decoder_layers(model) -> str:
    """Name of the outermost list of decoder layers that holds the first MoE layer; "" if none does."""
    path = find_moe_layers(model)[0].name.split(".")
    names = [".".join(path[:i]) for i in range(1, len(path))]
    return next((name for name in names if isinstance(model.get_submodule(name), nn.ModuleList)), "")


def non_text_experts(model) -> list[str]:
    """Names of the experts modules that text never reaches, which are left as they are."""
    return [name for name, module in model.named_modules() if _layer_class(module) and _reads_no_text(name)]


def model_hash(model) -> str:
    """Hash of a model's experts and routers that does not depend on the dtype they were loaded in.

    Covers names, shapes and up to 4,096 evenly spread values of each tensor, rounded to bfloat16, so that it
    takes no time on a large model. Merged layers count with the experts they had before.
    """
    digest, source = hashlib.sha256(), source_of(model)
    for layer in find_moe_layers(model):
        digest.update(fingerprint(layer) if source is None else source.fingerprint(layer.name))
    return digest.hexdigest()


def _reads_no_text(name):
    return any(part in segment for segment in name.split(".") for part in OTHER_PARTS)


def _layer_class(module):
    """The class of MoE layer that an experts module makes, or None if it is none."""
    return ENTRIES.get(type(module).__name__) or (MoELayer if _is_experts(module) else None)


def _is_experts(module):
    """Whether a module has stacked projections and is called with tokens, index and weight."""
    up = next((p for name in UP if (p := module._parameters.get(name)) is not None), None)
    down = module._parameters.get(DOWN)
    if up is None or down is None or up.ndim != 3 or down.ndim != 3 or len(up) != len(down):
        return False
    parameter = inspect.Parameter
    kinds = [p.kind for p in inspect.signature(type(module).forward).parameters.values()]
    positional = [k for k in kinds if k not in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)]
    return len(positional) == 4 or parameter.VAR_POSITIONAL in positional


class _LongcatFlash(MoELayer):
    """LongCat: the up projection has rows for the identity experts too, which are never read."""

    min_experts = 2  # its experts' forward trips over a single choice

    def tensors(self):
        up, down = self.experts.gate_up_proj, self.experts.down_proj
        return {"gate_up_proj": up[: len(down)], "down_proj": down}

    def stored(self, tensors):
        up, unread = tensors["gate_up_proj"], self.experts.gate_up_proj[self.num_stored :]
        return tensors | {"gate_up_proj": torch.cat([up, unread.new_zeros(len(unread), *up.shape[1:])])}


class _Dbrx(MoELayer):
    """DBRX: each projection of all experts flattened into ``[E·I, D]``, in a module below."""

    up_name = "gate_proj"
    activation = "mlp.activation_fn"
    transposed = True
    names = {"gate_proj": "w1", "up_proj": "v1", "down_proj": "w2"}  # noqa: RUF012

    @property
    def num_stored(self):
        return self.experts.num_experts

    def tensors(self):
        own = {name: getattr(self.experts.mlp, short) for name, short in self.names.items()}
        return {name: tensor.unflatten(0, (self.num_stored, -1)) for name, tensor in own.items()}

    def stored(self, tensors):
        return {f"mlp.{self.names[name]}": tensor.flatten(0, 1) for name, tensor in tensors.items()}

    def shapes(self, stored, width):
        return {name: [stored, width, self.hidden_size] for name in self.names}

    def up_matrix(self, expert):
        tensors = self.tensors()
        return torch.cat([tensors["gate_proj"][expert], tensors["up_proj"][expert]])

    def stacked(self, experts):
        parts = {
            "gate_proj": [e.up[:, 0] for e in experts],
            "up_proj": [e.up[:, 1] for e in experts],
            "down_proj": [e.down.T for e in experts],
        }
        return {name: torch.stack(part).to(self.experts.mlp.w1.dtype) for name, part in parts.items()}


class _JetMoe(MoELayer):
    """JetMoE: the block itself runs its two projections on tokens that its router has sorted by expert.

    Its attention is a mixture of experts too, which is left as it is.
    """

    activation = "activation"

    @staticmethod
    def block_of(model, name):
        return model.get_submodule(name)

    @property
    def num_stored(self):
        return len(self.experts.input_linear.weight)

    def tensors(self):
        up, down = self.experts.input_linear.weight, self.experts.output_linear.weight
        return {"gate_up_proj": up, "down_proj": down}

    def stored(self, tensors):
        return {"input_linear.weight": tensors["gate_up_proj"], "output_linear.weight": tensors["down_proj"]}

    def add_hooks(self, take_router, restore_experts):
        def take(module, inputs, output):
            order, _, gates, sizes, logits = output
            index, weight = torch.empty_like(order), torch.empty_like(gates)
            index[order], weight[order] = repeated(sizes, order.device), gates
            tokens = inputs[0]
            take_router(module, inputs, logits)
            restore_experts(module, (tokens, *(t.reshape(len(tokens), -1) for t in (index, weight))), {})

        return [self.experts.router.register_forward_hook(take)]


class _Llama4(MoELayer):
    """Llama 4: every expert gets every token times the router's score, zero where it was not chosen."""

    why_not_solvable = "the router's score multiplies what experts read, not what they write"
    transposed = True

    def add_hooks(self, take_router, restore_experts):
        def take(module, inputs, output):
            scores, logits = output
            index = logits.topk(module.top_k, dim=1).indices
            take_router(module, inputs, logits)
            restore_experts(module, (inputs[0], index, scores.gather(1, index)), {})

        return [self.router.register_forward_hook(take)]


class _Phimoe(MoELayer):
    """PhiMoE: the router takes the best expert, then the best of the others, whatever is configured."""

    min_experts = 2


ENTRIES = {
    "LongcatFlashExperts": _LongcatFlash,
    "DbrxExperts": _Dbrx,
    "JetMoeMoE": _JetMoe,
    "Llama4TextExperts": _Llama4,
    "PhimoeExperts": _Phimoe,
}
UNSUPPORTED = {
    "DogeCDMoE": "its experts are single neurons, looked up by product keys",
    "NllbMoeExperts": "transformers one-hot encodes a mask there, so that only experts 0 and 1 are ever run",
    "SwitchTransformersExperts": "its experts are modules of their own in an encoder and a decoder, and "
    "drop tokens that come after others in a sequence, so that what an expert does for a token cannot be "
    "told from the token",
}
