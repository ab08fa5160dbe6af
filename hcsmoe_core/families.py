"""The sparse MoE layers of a transformers model, and the few families whose layers differ."""

import inspect
import json
from operator import attrgetter

import torch
from torch import nn

from hcsmoe_core import moe
from hcsmoe_core._util import require, sha256_json
from hcsmoe_core.modeling_hcsmoe import repeated
from hcsmoe_core.moe import DOWN, UP, MoELayer, source_of

# Parts of a model that text never reaches: their experts are left as they are.
OTHER_PARTS = ("vision", "visual", "audio", "talker")
IDENTITY = "2"  # how model_hash is made; another number where that changes
# Of a configuration, beside private names: how and by what it was loaded, and what a merged folder adds.
NO_MATTER = """
dtype torch_dtype transformers_version architectures use_cache return_dict output_attentions
output_hidden_states output_router_logits quantization_config auto_map expert_merge
""".split()


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """Sparse MoE layers of a model, in the order of its modules.

    InputError if there is none (it is dense), or one stores its experts in a way that is not supported.
    """
    layers, owners = [], {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        require(kind not in UNSUPPORTED, f"{name} ({kind}) is not supported: {UNSUPPORTED.get(kind)}.")
        layer_class = _layer_class(module)
        if layer_class is None or _reads_no_text(name):
            continue
        owner = owners.setdefault(id(next(module.parameters())), name)
        shared = f"{owner} and {name} share their weights; merging them as one is not supported."
        require(owner == name, shared)
        layers.append(layer_class(model, name))
    kind = type(model).__name__
    require(
        layers,
        f"No MoE layers found in {getattr(model, 'name_or_path', '') or kind} ({kind}): it is dense, or "
        "its experts are not kept as the stacked tensors of transformers 5.",
    )
    return layers


def moe_layer(model, name: str) -> MoELayer:
    """The MoE layer of a model with some name, or InputError; a streamed model reads its weights."""
    layers, source = {layer.name: layer for layer in find_moe_layers(model)}, source_of(model)
    message = f'The "model" argument has no MoE layer {name}; it is not the model of these statistics.'
    require(name in layers, message)
    if source is not None:
        source.read_layer(name)
    return layers[name]


def decoder_layers(model) -> str:
    """Name of the outermost list of decoder layers that holds the first MoE layer; "" if none does."""
    path = find_moe_layers(model)[0].name.split(".")
    names = [".".join(path[:i]) for i in range(1, len(path))]
    return next((name for name in names if isinstance(model.get_submodule(name), nn.ModuleList)), "")


def non_text_experts(model) -> list[str]:
    """Names of the experts modules that text never reaches, which are left as they are."""
    return [name for name, module in model.named_modules() if _layer_class(module) and _reads_no_text(name)]


def model_hash(model, *, merged: bool = False) -> str:
    """What a model is known by: a hash of every weight and of the configuration.

    Two models that differ in one number have other hashes. It depends neither on the dtype that the weights
    were loaded in (:func:`same_model`) nor on how they lie in files, and is the same for a streamed model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    merged : bool
        Whether layers that were merged in memory count as they are now, rather than as they were before.
    """
    source, state, maps = source_of(model), model.state_dict(keep_vars=True), {}
    names = {module: name for name, module in model.named_modules()}
    for layer in (layer for layer in find_moe_layers(model) if layer.merged):
        before = layer.experts._merged.originals
        if merged or before is None:
            maps[layer.name] = layer.experts._merged.labels
            continue
        originals = {f"{names[module]}.{name}": value for (module, name), value in before.items()}
        state |= {name: originals[name] for name in state.keys() & originals.keys()}
    digests = sorted((moe.digests(state) if source is None else source.digests()).items())
    config = getattr(model, "config", None)  # a plain module may have any or none
    known = _settings(json.loads(config.to_json_string())) if hasattr(config, "to_json_string") else {}
    what = [known, maps]
    rounded, exact = (sha256_json([what, [(name, pair[i]) for name, pair in digests]]) for i in (0, 1))
    return f"{IDENTITY}:{rounded}" + (f":{exact}" if exact != rounded else "")


def same_model(first: str, second: str) -> bool:
    """Whether hashes are of one model, of which one may be rounded to bfloat16."""
    a, b = first.split(":"), second.split(":")
    return first == second or (a[:2] == b[:2] and 2 in (len(a), len(b)))


def _settings(value):
    """A configuration without what does not change the model's output."""
    if isinstance(value, dict):
        public = {key: item for key, item in value.items() if not key.startswith("_")}
        return {key: _settings(item) for key, item in public.items() if key not in NO_MATTER}
    return [_settings(item) for item in value] if isinstance(value, list) else value


def _reads_no_text(name):
    return any(part in segment for segment in name.split(".") for part in OTHER_PARTS)


def _layer_class(module):
    """The class of MoE layer that an experts module makes, or None if it is none."""
    return ENTRIES.get(type(module).__name__) or (MoELayer if _is_experts(module) else None)


def _is_experts(module):
    """Whether a module has stacked projections and is called with tokens, index and weight."""
    counts = {name: len(p) for name, p in module._parameters.items() if p is not None and p.ndim == 3}
    if counts.get(DOWN, 0) not in [counts.get(name) for name in UP]:
        return False
    kinds = [p.kind for p in inspect.signature(type(module).forward).parameters.values()]
    named = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return kinds.count(named) == 4 or inspect.Parameter.VAR_POSITIONAL in kinds


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
    paths = {"gate_proj": "mlp.w1", "up_proj": "mlp.v1", "down_proj": "mlp.w2"}  # noqa: RUF012

    @property
    def num_stored(self):
        return self.experts.num_experts

    def tensors(self):
        apart = (self.num_stored, -1)
        return {n: attrgetter(path)(self.experts).unflatten(0, apart) for n, path in self.paths.items()}

    def stored(self, tensors):
        return super().stored({name: tensor.flatten(0, 1) for name, tensor in tensors.items()})

    def shapes(self, stored, width):
        return {name: [stored, width, self.hidden_size] for name in self.paths}

    def up_matrix(self, expert):
        return torch.cat([self.tensors()[name][expert] for name in ("gate_proj", "up_proj")])

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
    is_block = True
    paths = {"gate_up_proj": "input_linear.weight", "down_proj": "output_linear.weight"}  # noqa: RUF012

    def add_hooks(self, take_router, restore_experts):
        def take(module, inputs, output):
            order, _, gates, sizes, logits = output
            chosen = (repeated(sizes, order.device), gates)
            index, weight = (t[order.argsort()].reshape(len(inputs[0]), -1) for t in chosen)
            take_router(module, inputs, logits)
            restore_experts(module, (inputs[0], index, weight), {})

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
