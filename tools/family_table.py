"""The MoE families of the installed transformers: which there are, a tiny model of each, what works on it.

``python -m tools.family_table [--out FILE] [NAME…]`` tries families out (minutes for all) and prints the
table; with ``--out hcsmoe_core/ui/families.json`` it makes the committed one, which ``hcsmoe families``
prints.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import re
import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers

from hcsmoe_core._transformers import class_for
from hcsmoe_core._util import InputError, check_choice, write_json
from hcsmoe_core.checkpoint import counted, load_merged, save_merged
from hcsmoe_core.collect import capture
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import make_plan
from hcsmoe_core.methods.pruning import routing_rule
from hcsmoe_core.ui.family_table import table

# A family's modelling file defines experts or a MoE block under one of these names.
CLASSES = re.compile(r"^class (\w*(?:Expert|MoE|Moe)\w*)\(", re.MULTILINE)


VOCABULARY, EXPERTS, KEPT, CHOSEN = 97, 10, 6, 4


# Sizes of a tiny model, under every name that some family gives them. E differs from all others, so that no
# other tensor seems to have one row per expert.
TINY = dict(
    vocab_size=VOCABULARY,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    ffn_hidden_size=40,
    moe_intermediate_size=24,
    expert_ffn_hidden_size=24,
    shared_expert_intermediate_size=16,
    moe_shared_expert_intermediate_size=16,
    shared_intermediate_size=16,
    num_hidden_layers=3,
    num_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    global_head_dim=8,
    kv_channels=8,
    hidden_size_per_layer_input=8,
    max_position_embeddings=256,
    sliding_window=8,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    n_routed_experts=EXPERTS,
    moe_num_experts=EXPERTS,
    num_experts_per_tok=CHOSEN,
    num_experts_per_token=CHOSEN,
    top_k_experts=CHOSEN,
    moe_topk=CHOSEN,
    moe_k=CHOSEN,
    n_group=2,
    topk_group=1,
    n_shared_experts=1,
    num_shared_experts=1,
    moe_num_shared_experts=1,
    zero_expert_num=3,
    first_k_dense_replace=1,
    num_dense_layers=1,
    moe_layer_start_index=1,
    expert_layer_period=1,
    expert_layer_offset=0,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    attn_layer_offset=0,
    attn_layer_period=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    index_topk=4,
    index_head_dim=16,
    index_n_heads=2,
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    mamba_d_state=8,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_expand=2,
    mamba_dt_rank=4,
    mamba_n_groups=1,
    mamba_chunk_size=8,
    mamba_num_heads=8,
    mamba_head_dim=8,
    use_mamba_kernels=False,
    ssm_state_size=8,
    chunk_size=8,
    n_groups=1,
    initializer_range=0.3,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


# The same for the parts of a model that do not read text.
TINY_OTHER = dict(
    depth=1,
    num_hidden_layers=1,
    encoder_layers=1,
    hidden_size=32,
    out_hidden_size=32,
    output_dim=32,
    d_model=32,
    intermediate_size=40,
    encoder_ffn_dim=40,
    num_heads=4,
    num_attention_heads=4,
    encoder_attention_heads=4,
    head_dim=8,
    patch_size=14,
    image_size=28,
    num_position_embeddings=16,
    fullatt_block_indexes=[0],
    deepstack_visual_indexes=[0],
)
MLA = dict(num_key_value_heads=4)  # latent attention has as many key heads as others
SPARSE = dict(mlp_layer_types=["dense", "sparse", "sparse"])
LINEAR = dict(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2)
SPARSE_4 = dict(mlp_layer_types=["dense", "sparse", "sparse", "sparse"])
ENCODER_DECODER = dict(
    d_model=32, d_ff=40, d_kv=8, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=40, decoder_ffn_dim=40
)
ROPE = dict(rope_type="default", rope_theta=1e4)


# What else a family's configuration needs, for the part that reads text.
OVERRIDES = {
    "axk1": MLA,
    "axk2": MLA,
    "bailing_hybrid": MLA | LINEAR,
    "beam": SPARSE,
    "dbrx": dict(
        d_model=32,
        n_heads=4,
        n_layers=3,
        max_seq_len=256,
        attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=24, moe_num_experts=EXPERTS, moe_top_k=CHOSEN),
    ),
    "deepseek_ocr2": SPARSE,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "doge": dict(is_moe=True),
    "dots3_note": SPARSE
    | dict(
        num_key_value_heads=4,
        head_dim=16,
        per_layer_config={},
        layer_types=["indexed_attention"] * 3,
        shared_experts_intermediate_size=16,
    ),
    "ernie4_5_vl_moe": dict(
        moe_intermediate_size=[24, 24], rope_parameters=ROPE | dict(mrope_section=[1, 1, 2])
    ),
    "gemma4": dict(enable_moe_block=True),
    "glm4_moe_lite": MLA,
    "glm4v_moe": dict(rope_parameters=ROPE | dict(mrope_section=[1, 1, 0], partial_rotary_factor=0.5)),
    "glm5_next": MLA
    | SPARSE_4
    | dict(
        num_hidden_layers=4,
        qk_rope_head_dim=0,
        index_kpool=2,
        index_topk=4,
        linear_head_dim=8,
        linear_num_heads=4,
    ),
    "glm_moe_dsa": MLA,
    "granitemoehybrid": dict(layer_types=["mamba", "attention", "mamba"]),
    "kimi_linear": MLA | LINEAR | SPARSE_4 | dict(linear_head_dim=8, linear_num_heads=4),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"]),
    "llama4": dict(intermediate_size_mlp=40),
    "longcat_flash": MLA | dict(num_layers=2, num_hidden_layers=4),
    "mistral4": MLA,
    "mistral_large4": MLA,
    "muse_spark": SPARSE | dict(moe_hidden_size=56),
    "nemotron_h": dict(num_hidden_layers=4, layer_types=["linear_attention", "moe", "full_attention", "moe"]),
    "nllb_moe": ENCODER_DECODER,
    "qwen3_5_moe": dict(num_hidden_layers=4),
    "qwen3_next": dict(num_hidden_layers=4),
    "qwen4_exp": dict(
        num_hidden_layers=4,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=8,
        indexer_budget=4,
        indexer_compress_ratio=2,
        hc_lowrank=8,
        rope_parameters=ROPE | dict(partial_rotary_factor=0.5, mrope_section=[1, 1, 0]),
    ),
    "step3p7": SPARSE,
    "switch_transformers": ENCODER_DECODER,
    "zaya": dict(num_experts_per_tok=1),
}


# What else its other parts need, and (under "") the configuration that holds all.
SMALL_AUDIO = dict(patch_sizes=[16], hidden_sizes=[32], depths=[1])


OTHER = {
    "aria": {"vision_config": TINY_OTHER | dict(model_type="idefics3_vision")},
    "diffusion_gemma": {
        "": dict(tie_word_embeddings=True),
        "vision_config": TINY_OTHER | dict(model_type="gemma4_vision", position_embedding_size=16),
    },
    "dots3_note": {
        "vision_config": dict(
            per_layer_config={}, adapter_in_dim=32, adapter_out_dim=32, mlp_layer_types=["sparse"]
        ),
        "audio_config": dict(adapter_input_size=32, adapter_out_dim=32),
    },
    "inkling2": {"vision_config": dict(text_hidden_size=32)},
    "glm5_next": {"vision_config": dict(projector_hidden_size=40)},
    "mistral_large4": {"vision_config": TINY_OTHER | dict(model_type="pixtral")},
    "qwen3_omni_moe": {"": dict(vision_start_token_id=1)},
    "muse_spark": {"": dict(out_hidden_size=32, projector_hidden_size=32), "audio_config": SMALL_AUDIO},
}


@cache
def installed_families():
    """Names of the MoE families of the installed transformers, found in the source of its models.

    Returns
    -------
    list of str
        In alphabetical order.
    """
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    files = {
        p.parent.name: p for p in models.glob("*/modeling_*.py") if p.stem == f"modeling_{p.parent.name}"
    }
    return sorted(name for name, path in files.items() if CLASSES.search(path.read_text(encoding="utf-8")))


@cache
def model_of(family, whole=False):
    """Configuration and model class that stand for a family, and the auto class that opens its checkpoints.

    A causal language model where the family has one, of its text part where that is a model of its own; else
    one that reads images too, and so on.

    Parameters
    ----------
    family : str
        One of :func:`installed_families`.
    whole : bool
        The class that reads images too, where there is another one for the text part.

    Returns
    -------
    config : type
    model : type
    auto : type

    Raises
    ------
    ValueError
        If it has no such class.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name

    types = [t for t in CONFIG_MAPPING_NAMES if model_type_to_module_name(t) == family]
    configs = [
        transformers.CONFIG_MAPPING[t] for t in sorted(types, key=lambda t: (not t.endswith("_text"), t))
    ]
    names = ("CausalLM", "ImageTextToText", "MultimodalLM", "Seq2SeqLM", "TokenClassification")
    for auto in (getattr(transformers, f"AutoModelFor{name}") for name in (names[1:2] if whole else names)):
        for config in configs:
            kind = class_for(auto, config)
            if kind is not None and not (whole and kind is model_of(family)[1]):
                return config, kind, auto
    raise InputError(
        f"{family} has no class that reads {'images besides one for its text part' if whole else 'text'}."
    )


def installed_models():
    """Families, each with False for its text part and, where there is more, with True for the whole model.

    Returns
    -------
    list of (str, bool)
    """
    models = []
    for family in installed_families():
        models.append((family, False))
        with contextlib.suppress(ValueError):
            model_of(family, whole=True)
            models.append((family, True))
    return models


def _filled(kind, family, part="text"):
    """A configuration of some class, with tiny sizes for all that it and configurations in it name."""
    sizes = TINY if part == "text" else TINY | TINY_OTHER
    values = {f.name: sizes[f.name] for f in dataclasses.fields(kind) if f.name in sizes}
    nested = kind.sub_configs
    if "text_config" in nested:
        part = ""
    values |= OVERRIDES.get(family, {}) if part == "text" else OTHER.get(family, {}).get(part, {})
    for name, sub in nested.items():
        if not dataclasses.is_dataclass(sub):  # any model's may stand there
            values[name] = OTHER[family][name]
        elif not isinstance(values.get(name), dict):
            values[name] = _filled(sub, family, "text" if name == "text_config" else name)
    return kind(**values)


def tiny_model(family, dtype=torch.float32, *, whole=False, seed=0):
    """A tiny random model of a family, in evaluation mode.

    Parameters
    ----------
    family : str
        One of :func:`installed_families`.
    dtype : torch.dtype
    whole : bool
        As for :func:`model_of`.
    seed : int

    Returns
    -------
    transformers.PreTrainedModel
    """
    check_choice("family", family, installed_families())
    config, kind, _ = model_of(family, whole)
    torch.manual_seed(seed)
    model = kind(_filled(config, family))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not tensor.any():  # biases and the like begin as zeros
                tensor.normal_(0, 0.1)
            if name.endswith("tid2eid"):
                tensor.random_(0, EXPERTS)
    if dtype in (torch.float32, torch.float64):
        for parameter in model.parameters():  # buffers keep their dtype, as in a model that was loaded
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model.eval()
    with tempfile.TemporaryDirectory() as folder:  # some families keep parts in float32, which loading knows
        model.save_pretrained(folder)
        return aligned(kind.from_pretrained(folder, dtype=dtype).eval())


def tiny_tokens(sequences=4, length=16, seed=1):
    """Token ids ``[sequences, length]`` that a tiny model reads, none of them special."""
    return torch.randint(3, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(seed))


def aligned(model):
    """A loaded model with its tensors copied to where memory is allocated.

    Matrix products on a CPU may differ in the last bit with where the file's tensors happen to lie.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


@torch.no_grad()
def outputs(model, input_ids):
    """What a model says about tokens: its logits."""
    return model(input_ids=input_ids, use_cache=False).logits


def probe(family, dtype=torch.float32, *, whole=False):
    """What works on a tiny random model of a family.

    It is captured, merged and saved with the map, loaded and compared; pruned, and merged with one router row
    per group, saved as a plain checkpoint, loaded by transformers' own auto class and compared, each time to
    the bit.

    Parameters
    ----------
    family : str
        One of :func:`installed_families`.
    dtype : torch.dtype
    whole : bool
        As for :func:`model_of`.

    Returns
    -------
    dict
        ``family`` and ``whole``; ``model``, the class that was built; ``layers``, where its experts are;
        ``experts``, the configuration's name for their number; ``router``, how it scores; ``mapped``,
        ``joined`` (plain, merged) and ``plain`` (pruned): empty if that kind of checkpoint works, else why
        not.
    """
    row = dict(
        family=family, whole=whole, model="", layers="", experts="", router="", mapped="", joined="", plain=""
    )
    try:
        _, kind, auto = model_of(family, whole)
        row["model"] = kind.__name__
        model, input_ids = tiny_model(family, dtype, whole=whole), tiny_tokens()
        layers = find_moe_layers(model)
        row["layers"] = re.sub(r"\d+", "*", layers[0].name)
        row["experts"] = ", ".join(name for name, _ in counted(model.config, EXPERTS))
        stats = capture(
            model, input_ids, needs=("usage", "outputs", "norms", "sample"), sample=64, progress=False
        )
        row["router"] = " / ".join(
            dict.fromkeys(_router_kind(layer, stats.layers[layer.name].sample) for layer in layers)
        )
        row["mapped"] = _mapped_fails(model, stats, input_ids)
    except Exception as error:  # whatever it is, it is why the family is not supported
        row["mapped"] = row["joined"] = row["plain"] = _one_line(error)
        return row
    row["joined"] = _plain_fails(model, stats, input_ids, auto, router="folded")
    row["plain"] = _plain_fails(model, stats, input_ids, auto, method="reap")
    return row


def _one_line(error):
    """An error as one line, with its class unless it is ours."""
    text = re.sub(r"\d+(?=\.)", "*", " ".join(str(error).split()))
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _mapped_fails(model, stats, input_ids):
    plan = make_plan(stats, model, experts=KEPT)
    with tempfile.TemporaryDirectory() as folder:
        save_merged(model, plan, Path(folder) / "merged", router="mapped")
        apply_plan(model, plan)
        live = outputs(model, input_ids)
        restore(model)
        same = torch.equal(outputs(aligned(load_merged(Path(folder) / "merged")), input_ids), live)
    return "" if same else "what is loaded computes something else than what was saved"


def _plain_fails(model, stats, input_ids, auto, **settings):
    try:
        plan = make_plan(stats, model, experts=KEPT, **settings)
        with tempfile.TemporaryDirectory() as folder:
            save_merged(model, plan, Path(folder) / "plain", stats=stats, router="plain")
            apply_plan(model, plan, stats)
            live = outputs(model, input_ids)
            loaded = aligned(auto.from_pretrained(Path(folder) / "plain").eval())
            same = torch.equal(outputs(loaded, input_ids), live)
    except Exception as error:  # as above
        return _one_line(error)
    finally:
        restore(model)
    return "" if same else "what is loaded computes something else than what was saved"


def _router_kind(layer, sample):
    """How a router makes weights of its logits, as far as the sampled tokens tell."""
    if layer.router is None:
        return "not found"
    parts = [f"{layer.router_groups} groups"] if layer.router_groups > 1 else []
    try:
        rule = routing_rule(sample, layer)
        parts = [rule.scoring, *["normalised"] * rule.normalised, *["bias"] * bool(rule.bias.any()), *parts]
    except ValueError:
        parts = ["own rule", *parts]
    return ", ".join(parts + [f"{layer.extra} rows more"] * bool(layer.extra))


def main(arguments=None):
    """Command line."""
    parser = argparse.ArgumentParser(description="Try out what works on the MoE families of transformers.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="families, as transformers names them (default: all)"
    )
    parser.add_argument("--out", type=Path, help="file to write the table to (.json)")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in installed_families():
            parser.error(f"{name} is none of the families: {', '.join(installed_families())}")
    models = [
        (name, whole) for name, whole in installed_models() if name in (options.names or installed_families())
    ]
    rows = [probe(name, whole=whole) for name, whole in models]
    print(table(rows))
    if options.out:
        write_json(options.out, {"transformers": transformers.__version__, "families": rows})
        print(options.out)


if __name__ == "__main__":
    main()
