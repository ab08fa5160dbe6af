"""Experts whose weights are rounded to a few bits, and what experts take as they stand: bytes, and operations
a token.

Rounding to nearest is the least that quantisation does: no data, no fit. What merging saves has to be held
against it.
"""

import contextlib
from dataclasses import replace

import torch
from torch import nn

from hcsmoe_core._util import InputError, check_choice
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.replace import set_expert_tensors

BITS = (16, 8, 4, 3, 2)


GROUP = 32  # weights that share a scale, along what a matrix reads


SCALE_BITS = 16


SYMMETRIC = 8  # from so many bits on, levels lie evenly around zero


def rounded_weights(weight, bits):
    """A matrix rounded to nearest, in groups of 32 weights along its last axis; the last group of a row may
    be shorter.

    With 8 bits, as in llama.cpp's ``Q8_0``, symmetric: ``s = max |w| / 127`` and ``ŵ = s · round(w / s)``.
    With 4, 3 and 2 bits b, as in GPTQ and AWQ, asymmetric: ``s = (max(w, 0) − min(w, 0)) / (2^b − 1)``, ``z =
    round(−min(w, 0) / s)`` and ``ŵ = s · (clip(round(w / s) + z, 0, 2^b − 1) − z)``. Scales are rounded to
    float16 first. With 16 bits, bfloat16.

    Parameters
    ----------
    weight : (…, N) float tensor
    bits : {16, 8, 4, 3, 2}

    Returns
    -------
    (…, N) tensor
        In the weights' dtype.

    Raises
    ------
    ValueError
        If bits is another number, or a scale is too large for float16.
    """
    check_choice("bits", bits, BITS)
    if bits == 16:
        return weight.to(torch.bfloat16).to(weight.dtype)
    count = weight.shape[-1]
    # Zeros change neither the largest of a group nor, as levels reach zero anyway, its span.
    groups = nn.functional.pad(weight.float(), (0, -count % GROUP)).unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    if bits >= SYMMETRIC:
        most = 2 ** (bits - 1) - 1
        scale, zero, least = _scale(torch.maximum(-low, high) / most), 0, -most
    else:
        most, least = 2**bits - 1, 0
        scale = _scale((high - low) / most)
        zero = (-low / scale).round().clamp(0, most)
    level = ((groups / scale).round() + zero).clamp(least, most) - zero
    return (level * scale).flatten(-2)[..., :count].to(weight.dtype)


def _scale(scale):
    """As it is kept; 1 where all weights are zero."""
    kept = scale.half().float()
    if not torch.isfinite(kept).all():
        raise InputError(
            f"A weight of the experts is too large to be rounded: a scale of {float(scale.max()):.3g} is no "
            "float16."
        )
    return torch.where(kept > 0, kept, torch.ones_like(kept))


@contextlib.contextmanager
def rounded(model, bits):
    """While the block lasts, a model whose experts' projections are rounded; then the weights are those
    before, to the bit.

    Experts are rounded as they stand, merged ones too. Biases, routers, shared experts and all else stay as
    they are. The weights are held in the model's dtype, as what they are rounded to: only the size that is
    counted is smaller.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    bits : {16, 8, 4, 3, 2}
        See :func:`rounded_weights`.

    Yields
    ------
    transformers.PreTrainedModel
        The same model.

    Raises
    ------
    ValueError
        As :func:`rounded_weights`; the model is then as it was.
    """
    check_choice("bits", bits, BITS)
    before = []
    try:
        for layer in find_moe_layers(model):
            made = layer.stacked([_rounded_expert(layer, expert, bits) for expert in range(layer.num_stored)])
            before.append((layer, getattr(layer.experts, "_merged", None), _held(layer)))
            set_expert_tensors(layer, made)
        yield model
    finally:
        for layer, merged, held in before:
            if (
                getattr(layer.experts, "_merged", None) is merged
            ):  # restore() may have put the original experts back
                for owner, name, tensor in held:
                    owner[name] = tensor


@torch.no_grad()
def _rounded_expert(layer, expert, bits):
    neurons = layer.neurons(expert)
    return replace(neurons, up=rounded_weights(neurons.up, bits), down=rounded_weights(neurons.down, bits))


def _held(layer):
    """Where the model holds a layer's tensors, and the tensors: ``[(parameters or buffers, name, tensor),
    …]``.
    """
    found = []
    for path in layer.stored(layer.tensors()):
        owner, _, name = path.rpartition(".")
        module = layer.experts.get_submodule(owner)
        held = module._parameters if name in module._parameters else module._buffers
        found.append((held, name, held[name]))
    return found


def expert_bytes(model, bits=16):
    """Bytes that a model's routed experts take as they stand, if their projections are rounded.

    A weight takes ``bits``; below 16 bits each group of 32 has a scale in 16 bits and, below 8, a zero point
    in ``bits``. Biases take 16 bits.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Merged or not.
    bits : {16, 8, 4, 3, 2}

    Returns
    -------
    int
    """
    check_choice("bits", bits, BITS)
    shared = 0 if bits == 16 else SCALE_BITS + (bits if bits < SYMMETRIC else 0)
    total = 0
    for layer in find_moe_layers(model):
        matrices = (layer.up_matrix(0), layer.down_matrix(0))
        others = sum(t[0].numel() for t in layer.tensors().values()) - sum(m.numel() for m in matrices)
        each = sum(m.numel() * bits + len(m) * -(-m.shape[1] // GROUP) * shared for m in matrices)
        total += layer.num_stored * (each + 16 * others)
    return -(-total // 8)


def expert_flops(model, stats=None):
    """Multiplications and additions of a token in the projections of the routed experts that it goes through.

    In all layers together: two for each weight of each expert run. An expert that two of a token's choices
    were mapped to runs twice, as transformers runs it; an engine that adds up their weights first runs it
    once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Merged or not.
    stats : Statistics, optional
        With the sample: then each expert counts once a token, as often as the sampled tokens say.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If a layer does not tell how many experts a token goes to.
    """
    total = 0.0
    for layer in find_moe_layers(model):
        if layer.top_k is None:
            raise InputError(
                f"{layer.name} does not tell how many experts a token goes to, so that its work is not known."
            )
        runs = layer.top_k
        if stats is not None and layer.merged and layer.experts._merged.routed == layer.num_experts:
            runs = _different(layer.experts._merged.labels, stats.layers[layer.name].sample)
        total += 2 * runs * (layer.up_matrix(0).numel() + layer.down_matrix(0).numel())
    return total


def _different(labels, sample):
    """Merged experts that a token goes through, in the mean over the sample."""
    chosen = torch.zeros(len(sample.gates), max(labels) + 1)
    chosen.index_add_(1, torch.tensor(labels), (sample.gates != 0).float())
    return float((chosen > 0).sum(1).double().mean())
