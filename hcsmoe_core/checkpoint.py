"""Model folders: load a model by name, write a merged one that is really smaller, load it back."""

import contextlib
import copy
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from hcsmoe_core import families, moe, replace
from hcsmoe_core._util import (
    EMBEDDED,
    InputError,
    check_absent,
    check_choice,
    folder_of,
    new_folder,
    replacing,
    write_json,
    writing,
)
from hcsmoe_core.export import (
    MODELING,
    check_checksums,
    copy_along,
    limits,
    source_of_files,
    write_card,
    write_checksums,
    write_config,
)
from hcsmoe_core.families import decoder_layers, find_moe_layers
from hcsmoe_core.merging import apply_plan, check_fits, check_unmerged, restore
from hcsmoe_core.methods.factors import from_saved, put_factors, saved_tensors, savings
from hcsmoe_core.modeling_hcsmoe import VERSION, merged_class, named_alike, room
from hcsmoe_core.plan import JOINED, with_router
from hcsmoe_core.score.fidelity import fidelity

ROUTERS = ("plain", "mapped", "row-kept", "folded")


DTYPES = ("auto", "float32", "bfloat16", "float16")


FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


FACTORED = "experts-factored.safetensors"


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


# Under which stock loaders do not find what lies beside factors: they would fill the experts with random numbers.
VARIANT = "factored"


HIDDEN = {WEIGHTS: f"model.{VARIANT}.safetensors", INDEX: f"model.safetensors.index.{VARIANT}.json"}


SINGLE = 1 << 28  # bytes up to which a checkpoint is one file rather than one a decoder layer


DEVICE_MAPS = ("balanced", "balanced_low_0", "sequential")


# Quantisations that transformers can undo while it loads.
DEQUANTISED = ("fp8", "mxfp4", "compressed-tensors")


def load_model(model, *, dtype="auto", device="auto", experts_implementation=None):
    """Load a model and its tokenizer.

    Parameters
    ----------
    model : str or path
        A model folder (merged ones too), a name on the Hugging Face hub, ``"demo-mixtral"`` or ``"demo-qwen"``.
    dtype : torch.dtype or {"auto", "float32", "bfloat16", "float16"}
        ``"auto"`` takes the checkpoint's own.
    device : str or torch.device
        ``"auto"`` takes a GPU where there is one; ``"balanced"``, ``"balanced_low_0"`` and ``"sequential"`` spread the decoder
        layers over all GPUs.
    experts_implementation : str, optional
        transformers' experts implementation, such as ``"eager"`` or ``"grouped_mm"``; by default its own choice.

    Returns
    -------
    model : transformers.PreTrainedModel
        In evaluation mode.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        None if the folder has none.

    Raises
    ------
    FileNotFoundError
        If the model is neither a folder here nor to be had from the hub.
    ValueError
        If the folder is not a readable checkpoint, or is quantised in a way that transformers cannot undo.
    """
    source = folder_of(model)
    folder = Path(source)
    options = dict(dtype=dtype, device=device, experts_implementation=experts_implementation)
    if folder.is_dir() and merge_record(folder) is not None:
        loaded = load_merged(folder, **options)
    else:
        loaded = _load_plain(str(source), model, **options)
    loaded.name_or_path = str(model)
    return loaded, load_tokenizer(source)


def load_skeleton(model, *, dtype="auto"):
    """A model's modules without its weights, from its configuration alone.

    Parameters
    ----------
    model, dtype
        As for :func:`load_model`.

    Returns
    -------
    transformers.PreTrainedModel
        On the meta device. A merged folder's layers have the number of experts that they had before.
    """
    config = readable_config(folder_of(model), model)
    with readable(model):
        return skeleton_of(config, dtype=dtype)


def skeleton_of(config, *, dtype="auto"):
    """:func:`load_skeleton` of a configuration of transformers."""
    kind = _dtype(config.get_text_config().dtype or "float32" if dtype == "auto" else dtype)
    with torch.device("meta"):
        return model_class(config)(config).to(kind)


def load_tokenizer(source):
    """Tokenizer of a folder or hub name, or None if it has none."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        return None
    return AutoTokenizer.from_pretrained(str(source))


def _load_plain(source, shown, *, dtype, device, experts_implementation):
    config = readable_config(source, shown)
    with readable(shown):
        base = model_class(config)
        options = loading(dtype, device if device in DEVICE_MAPS else None)
        loaded, report = _checked_class(base).from_pretrained(source, config=config, **options)
        check_report(report, shown)
    loaded.__class__ = base
    hub_layout(loaded, config)
    set_experts(loaded, experts_implementation)
    return (loaded if device in DEVICE_MAPS else loaded.to(device_of(device))).eval()


def set_experts(model, implementation):
    """Choose transformers' experts implementation; given while loading, models of which a part has no experts refuse it."""
    if implementation is not None:
        model.set_experts_implementation(implementation)


def model_class(config):
    """Class of transformers that a checkpoint's configuration is for: the one it names, if an auto class knows that.

    A causal language model where there is one; else one that reads images too, or labels tokens.

    Raises
    ------
    ValueError
        If there is none.
    """
    known = [made for _, made in _auto_classes(config)]
    if not known:
        raise InputError(
            f"transformers has no language model for its configuration ({type(config).__name__})."
        )
    return next((c for c in known if c.__name__ in (config.architectures or ())), known[0])


def _auto_classes(config):
    """Auto classes that know a configuration, with the class that each makes of it."""
    import transformers

    names = ("CausalLM", "ImageTextToText", "MultimodalLM", "TokenClassification")
    autos = [getattr(transformers, f"AutoModelFor{name}") for name in names]
    return [
        (auto, auto._model_mapping[type(config)]) for auto in autos if type(config) in auto._model_mapping
    ]


def auto_classes(model):
    """Names of the auto classes that make a model's class of its configuration."""
    return [auto.__name__ for auto, made in _auto_classes(model.config) if made is type(model)]


def readable_config(source, shown):
    """Configuration of a model folder or hub name, by which quantised weights are turned back into floating-point ones.

    Raises
    ------
    ValueError
        If the checkpoint is quantised in a way that transformers cannot undo.
    """
    from transformers import AutoConfig

    with readable(shown):
        config = AutoConfig.from_pretrained(source)
    quantised = _quantisation(config)
    if quantised is not None:
        method = str(quantised.get("quant_method", "an unnamed method"))
        if method not in DEQUANTISED:
            raise InputError(
                f"{shown} is quantised with {method}, which transformers does not turn back into 16-bit weights "
                f"(it does for {', '.join(DEQUANTISED)}); start from the checkpoint that it was made from."
            )
        quantised["dequantize"] = True
    return config


def _quantisation(config):
    """What a configuration says of quantised weights, or None."""
    return getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )


def loading(dtype, device_map=None):
    """Keywords for ``from_pretrained`` that all our loaders share."""
    shared = dict(dtype=_dtype(dtype), output_loading_info=True, use_safetensors=True)
    return shared if device_map is None else shared | {"device_map": device_map}


def hub_layout(model, config):
    """Let a model that was dequantised be saved in its family's usual names, rather than as packed blocks it no longer has."""
    if _quantisation(config) is not None and hasattr(model, "_weight_conversions"):
        del model._weight_conversions


@contextlib.contextmanager
def without_bars():
    """Without transformers' bars, of which each part of a model would draw one."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class readable:  # noqa: N801 (a context manager, read as a word)
    """Turns the many ways in which a checkpoint fails to load into one clear error."""

    def __init__(self, shown):
        self.shown = shown

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        here = Path(self.shown).exists()
        if error is None or isinstance(error, KeyboardInterrupt | MemoryError):
            return False
        reason = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
        if isinstance(error, OSError) and not here:
            raise FileNotFoundError(
                f"Cannot load {self.shown!r}: there is no such folder here, it is not {' or '.join(EMBEDDED)}, and the "
                f"Hugging Face hub did not give it ({reason}). Check the name and the network, or give a model folder."
            ) from None
        if isinstance(
            error, OSError | SafetensorError | ValueError | KeyError | RuntimeError | json.JSONDecodeError
        ):
            raise InputError(f"{self.shown} is not a readable checkpoint: {reason}") from None
        return False


def check_report(report, shown, expected=()):
    """Refuse a checkpoint of which some weights were missing, other than those expected, and would be random."""
    missing = sorted(set(report["missing_keys"]) - set(expected))
    mismatched = [m[0] if isinstance(m, tuple) else m for m in report.get("mismatched_keys", ())]
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:3])
        raise InputError(
            f"{shown} lacks {len(missing) + len(mismatched)} of the model's tensors ({names}, …)."
        )


def _checked_class(base):
    """``base`` whose loading refuses tensors of a wrong kind, and says which it could not make of the files."""

    class Checked(base):
        @staticmethod
        def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
            for _ in on_disk(model, checkpoint_files, load_config):
                pass
            report, offloaded = base._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, expected_keys
            )
            check_conversion(report, "it")
            return report, offloaded

    return named_alike(Checked, base)


def on_disk(model, files, config):
    """What each tensor of a checkpoint becomes in a model: ``(file, its name there, names in the model)``, one by one.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its weights are not looked at.
    files : list of path
    config : transformers.modeling_utils.LoadStateDictConfig

    Raises
    ------
    ValueError
        If a file cannot be read, or holds whole numbers or 8-bit floats where a configuration that says nothing of
        quantisation has 16- or 32-bit ones: transformers would take them for values.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    held = model.state_dict()
    renamings = [m for m in config.weight_mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in config.weight_mapping if isinstance(m, WeightConverter)]
    of_pattern = {pattern: m for m in converters for pattern in m.source_patterns}
    for file in files:
        with opened(file) as shards:
            for key in shards.keys():  # noqa: SIM118 (not a dict)
                name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, held)
                if name not in held and key in held:
                    name, pattern = key, None
                if name not in held:
                    continue
                kind = shards.get_slice(key).get_dtype()
                if config.hf_quantizer is None and held[name].is_floating_point() and kind not in FLOATS:
                    raise InputError(
                        f"{key} in {file} is of type {kind} where 16- or 32-bit floating-point numbers belong, and config.json "
                        "does not say how it is quantised"
                    )
                targets = [name] if pattern is None else of_pattern[pattern].target_patterns
                yield file, key, [name.replace(targets[0], target) for target in targets]


def opened(file):
    """A shard, not through a memory map: where it is cut short meanwhile, that would end the process."""
    try:
        return safe_open(file, "pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not readable ({error}); copy it again.") from None


def check_conversion(report, shown, unread=()):
    """Refuse a checkpoint of which tensors could not be made as transformers reports, or were not read at all."""
    wrong = list(dict.fromkeys([*(m[0] for m in report.mismatched_keys), *report.conversion_errors, *unread]))
    if wrong:
        raise InputError(
            f"{shown} does not hold {wrong[0]} as its configuration says ({len(wrong)} tensors in all): parts of it are "
            "missing or have other shapes; copy the checkpoint again."
        )


def _dtype(dtype):
    if isinstance(dtype, torch.dtype):
        return dtype
    check_choice("dtype", dtype, DTYPES)
    return dtype if dtype == "auto" else getattr(torch, dtype)


def device_of(device):
    """The device that an option names; ``"auto"`` is a GPU where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def save_merged(model, plan, folder, *, stats=None, router="", tokenizer=None, heldout=None, about=None):
    """Write a merged or pruned model to a new folder: r experts a layer on disk, in the family's own tensor names.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Merged by this plan, or not merged; it is left as it was.
    plan : Plan
    folder : path
        Must not exist. Holds ``config.json``, ``.safetensors`` files with their checksums, ``plan.json``, a model card and,
        where given, the tokenizer; what else goes along is copied from where the model was loaded.
    stats : Statistics, optional
        As for :func:`hcsmoe_core.merging.apply_plan`; not looked at if the plan is applied already.
    router : {"", "plain", "mapped", "row-kept", "folded"}
        ``"plain"`` is a checkpoint of the original family, with a smaller number of experts or a smaller expert width in
        its configuration: stock loaders open it. Pruned and trimmed models can be written so, and those whose groups of
        experts share a router row, if all layers keep alike many. ``"row-kept"`` and ``"folded"`` give a plan that keeps the
        router such rows instead (:func:`hcsmoe_core.plan.with_router`), and write it so. ``"mapped"`` records under
        ``expert_merge`` in ``config.json`` what each layer has, and keeps all E rows of a router that is not pruned, with
        the map from E to r: :func:`load_merged` reads it, and transformers with ``trust_remote_code=True`` by a small file
        in the folder; without, it is refused. Experts that MC-SMoE's second step has factored are written as factors, in a
        file of their own, which :func:`load_merged` alone multiplies out. By default plain where that is the same
        function, else mapped.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    heldout : (N, S) int64 tensor, optional
        Tokens on which :func:`hcsmoe_core.score.fidelity.fidelity` is measured.
    about : dict of str to str, optional
        More lines for the model card, such as where the calibration tokens came from.

    Returns
    -------
    dict
        ``bytes`` of the weight files, ``parameters`` in them and ``original``, those before, the ``router`` that was written
        ("plain" or "mapped"), ``limits`` (what to know about engines, lines of text) and ``fidelity``, or None.

    Raises
    ------
    FileExistsError
        If the folder exists.
    ValueError
        If the plan does not fit the model, another plan is applied to it, or it cannot be written as asked.
    """
    plan, router = exported(plan, router)
    check_absent(folder)
    layers = check_fits(plan, model)
    applied = all(layer.merged for layer in layers)
    if applied:
        if [layer.experts._merged.plan for layer in layers] != plan.layers:
            raise InputError("Another plan is applied to this model; restore(model) first.")
    else:
        check_unmerged(layers)
    target = target_of(model, plan, router)
    if not applied:
        apply_plan(model, plan, stats)
    try:
        with new_folder(folder) as part:
            tensors = _without_factored(model, layers) if plan.compress else model.state_dict()
            parts = parts_of(model, tensors)
            for place, names in enumerate(parts):
                write_part(model, {name: tensors[name] for name in names}, part, place, len(parts), target)
            if plan.compress:
                save_file(_factors(layers, model.dtype), part / FACTORED)
            measured = None if heldout is None else fidelity(model, plan, heldout)
            written = finish(model, part, target, plan, tokenizer=tokenizer, measured=measured, about=about)
        if plan.compress:
            written["savings"] = factored_savings(model)
            dense = sum(tensor.numel() for layer in layers for tensor in layer.projections.values())
            written["parameters"] += written["savings"]["weights"]["compressed"] - dense
    finally:
        if not applied:
            restore(model)
    return written


def exported(plan, router):
    """Plan and kind of checkpoint ("", "plain" or "mapped") that the ``router`` argument of :func:`save_merged` means."""
    check_choice("router", router, ("", *ROUTERS))
    if router in JOINED:
        return with_router(plan, router), "plain"
    if router == "mapped" and any(layer.router in JOINED for layer in plan.layers):
        return with_router(plan, "mapped"), router
    return plan, router


@dataclass(frozen=True)
class Target:
    """What a merged checkpoint will be, before any of it is written.

    Attributes
    ----------
    config : transformers.PreTrainedConfig or None
        Of a plain checkpoint; None for a mapped one.
    records : dict of str to dict
        What a loader of a mapped checkpoint must know of each layer.
    original, parameters : int
        Weights before and after.
    top_k : int or None
        Experts that a token went to before.
    hub_layout : bool
        Whether tensors are written in the layout of the hub. A family whose files hold text and other experts in one list
        cannot have fewer of one kind there.
    """

    config: object
    records: dict
    original: int
    parameters: int
    top_k: int | None
    hub_layout: bool

    @property
    def router(self):
        """ "plain" or "mapped"."""
        return "mapped" if self.config is None else "plain"


def target_of(model, plan, router=""):
    """What a plan makes of a model; its weights are not looked at.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Merged by this plan or not merged.
    plan : Plan
    router : {"", "plain", "mapped"}
        As for :func:`save_merged`.

    Returns
    -------
    Target

    Raises
    ------
    ValueError
        If it cannot be written as asked.
    """
    with torch.device("meta"):
        merged = type(model)(copy.deepcopy(model.config))
    original = sum(p.numel() for p in merged.parameters())
    names = {module: name for name, module in merged.named_modules()}
    records, top_k = {}, find_moe_layers(merged)[0].top_k
    for layer, layer_plan in zip(find_moe_layers(merged), plan.layers, strict=True):
        records[layer.name] = _record(layer, layer_plan, names)
    config, why = (None, "") if router == "mapped" else _plain_config(model, plan, merged)
    if router == "plain" and config is None:
        other = (
            ', or make the plan with shape "whole"'
            if any(layer.width and layer.joins for layer in plan.layers)
            else ""
        )
        raise InputError(
            f'The "router" argument cannot be "plain" for this plan: {why}. Use "mapped"{other}.'
        )
    in_hub_layout = config is not None or not families.other_experts(model)
    return Target(
        config, records, original, sum(p.numel() for p in merged.parameters()), top_k, in_hub_layout
    )


def _record(layer, layer_plan, names):
    """What :func:`hcsmoe_core.modeling_hcsmoe.make_room` must know of a layer, which is given tensors of the shapes."""
    rows, before = layer_plan.router_rows(), {m: m.config for m in layer.routing if hasattr(m, "config")}
    shapes = layer.shapes(layer_plan.num_groups, layer_plan.width or layer.width)
    tensors = {name: room(tensor, shapes[name]) for name, tensor in layer.tensors().items()}
    rows = None if rows is None else torch.from_numpy(rows)
    replace.put_experts(layer, tensors, layer_plan.labels, rows=rows, keep=False)
    state, shapes, values = layer.experts._merged, {}, {}
    for module, name in state.changed:
        value = getattr(module, name)
        if torch.is_tensor(value):
            shapes[f"{names[module]}.{name}"] = list(value.shape)
            continue
        if name == "config":
            old = vars(before[module])
            value = {key: new for key, new in vars(value).items() if key not in old or old[key] is not new}
        values.setdefault(names[module], {})[name] = value
    mapped = state.handle is not None
    return {
        "labels": state.labels,
        "extra": state.extra,
        "mapped": mapped,
        "tensors": shapes,
        "values": values,
    }


def parts_of(model, names):
    """Names of tensors by the file that they go to: first those outside the decoder layers, then layer by layer.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    names : iterable of str

    Returns
    -------
    list of list of str
    """
    prefix = decoder_layers(model)
    inside = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    parts = [[] for _ in range(1 + (len(model.get_submodule(prefix)) if prefix else 0))]
    for name in names:
        found = inside.match(name) if prefix else None
        parts[1 + int(found[1]) if found else 0].append(name)
    return parts


def shard(place, count):
    """File name of one part of a checkpoint."""
    return f"model-{place + 1:05d}-of-{count:05d}.safetensors"


def write_part(model, tensors, folder, place, count, target):
    """Write one part of a model into a folder, in the family's own names and layout; the first with all but the weights.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its weights are not looked at.
    tensors : dict of str to tensor
        As :func:`parts_of` parts them.
    folder : path
    place, count : int
        Number of this part, from 0, and of all.
    target : Target
    """
    part = Path(folder) / f"{place}.part"
    shutil.rmtree(part, ignore_errors=True)
    with writing(part), without_bars():
        model.save_pretrained(
            part, state_dict=tensors, max_shard_size=1 << 60, save_original_format=target.hub_layout
        )
    if place == 0:
        for file in part.iterdir():
            if file.name != WEIGHTS:
                os.replace(file, Path(folder) / file.name)
    os.replace(part / WEIGHTS, Path(folder) / shard(place, count))
    shutil.rmtree(part)


def finish(model, folder, target, plan, *, tokenizer=None, measured=None, about=None):
    """Complete a folder of which all parts are written; may be called again where it was interrupted.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Its weights are not looked at.
    folder : path
    target : Target
    plan : Plan
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    measured : dict, optional
        Of :func:`hcsmoe_core.score.fidelity.fidelity`.
    about : dict, optional
        As for :func:`save_merged`.

    Returns
    -------
    dict
        As of :func:`save_merged`.
    """
    folder = Path(folder)
    _join(folder, target.parameters)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    source = source_of_files(model)
    copy_along(source, folder)
    plan.save(folder / "plan.json")
    factored, autos = (folder / FACTORED).exists(), auto_classes(model)
    for usual, hidden in HIDDEN.items() if factored else ():
        if (folder / usual).exists():
            os.replace(folder / usual, folder / hidden)
    write_checksums(folder)
    more = {}
    if target.config is None:
        more["expert_merge"] = {
            "version": VERSION,
            "router": "mapped",
            "factored": factored,
            "layers": target.records,
        }
        if not factored:
            more["auto_map"] = dict.fromkeys(autos, f"{MODELING.stem}.Merged{type(model).__name__}")
            shutil.copyfile(MODELING, folder / MODELING.name)
    write_config(model, folder, target.config or model.config, more, source)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    sizes = {"before": target.original, "after": target.parameters, "bytes": size}
    kind = "factored" if factored else target.router
    opener, known = (autos or [type(model).__name__])[0], limits(plan, kind, target.top_k, model.dtype)
    card = dict(kind=kind, opener=opener, sizes=sizes, limits=known, fidelity=measured, about=about)
    write_card(model, folder, plan, **card)
    written = {
        "bytes": size,
        "original": target.original,
        "parameters": target.parameters,
        "router": target.router,
    }
    return written | {"limits": known, "fidelity": measured}


def _join(folder, parameters):
    """One weight file of the parts if it is small, else an index of them."""
    parts = sorted(folder.glob("model-*-of-*.safetensors"))
    if sum(file.stat().st_size for file in parts) <= SINGLE:
        if not (folder / WEIGHTS).exists():
            tensors = {name: tensor for file in parts for name, tensor in load_file(file).items()}
            with replacing(folder / WEIGHTS) as part:
                save_file(tensors, part, metadata={"format": "pt"})
        for file in parts:
            file.unlink()
        return
    of_tensor, size = {}, 0
    for file in parts:
        with safe_open(file, "pt") as held:
            names = list(held.keys())
        of_tensor |= dict.fromkeys(names, file.name)
        size += file.stat().st_size - 8 - int.from_bytes(file.open("rb").read(8), "little")
    about = {"total_parameters": parameters, "total_size": size}
    write_json(folder / INDEX, {"metadata": about, "weight_map": dict(sorted(of_tensor.items()))})


def factored_savings(model):
    """What MC-SMoE's second step saves of a live merged model; see :func:`hcsmoe_core.methods.factors.savings`."""
    layers = find_moe_layers(model)
    factors = [layer.experts._merged.factors for layer in layers]
    counts = dict(experts=[layer.num_experts for layer in layers], top_k=[layer.top_k for layer in layers])
    return savings(factors, **counts, dtype=model.dtype)


def _factors(layers, dtype):
    return saved_tensors({layer.name: layer.experts._merged.factors for layer in layers}, dtype)


def _without_factored(model, layers):
    """The model's tensors but for the projections that are written as factors."""
    left_out = {name for layer in layers for name in layer.projections}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}


def _plain_config(model, plan, merged):
    """Configuration with which the model's own class has just the tensors that the merged one has; or None, and why.

    Whether a changed configuration says it is tried out, by building the class without memory and comparing shapes.
    """
    counts = {layer.num_groups for layer in plan.layers}
    if plan.compress:
        return None, "experts are written as factors"
    if any(
        layer.router == "mapped" and layer.labels != list(range(len(layer.labels))) for layer in plan.layers
    ):
        return None, 'the router keeps rows of experts that are joined, which "row-kept" and "folded" do not'
    if len(counts) > 1:
        return None, f"layers differ in their number of experts ({', '.join(map(str, sorted(counts)))})"
    config, experts = copy.deepcopy(model.config), len(plan.layers[0].labels)
    kept, width = counts.pop(), plan.layers[0].width
    for name, holder in counted(config, experts):
        setattr(holder, name, kept)
    ungrouped = any(layer.router in JOINED for layer in plan.layers)
    for holder in _nested(config.get_text_config()):
        for name in moe.CHOICES:
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, min(getattr(holder, name), kept))
        for name in (*moe.ROUTER_GROUPS, *moe.GROUP_CHOICES) if ungrouped else ():
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, 1)
    shapes, why = (
        {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()},
        "its configuration has no width",
    )
    for name in ("moe_intermediate_size", "intermediate_size", "expert_dim") if width else ("",):
        tried = copy.deepcopy(config)
        if name:
            if not isinstance(getattr(tried.get_text_config(), name, None), int):
                continue
            setattr(tried.get_text_config(), name, width)
        try:
            with torch.device("meta"):
                built = type(model)(tried)
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:  # its own class refuses it
            why = f"{type(config).__name__} does not take {kept} experts ({str(error).splitlines()[0]})"
            continue
        made = {n: tuple(t.shape) for n, t in built.state_dict().items()}
        if made == shapes:
            return tried, ""
        other = next(n for n in {**shapes, **made} if made.get(n) != shapes.get(n))
        why = f"its configuration counts other tensors along with these experts ({other})"
    return None, why


def counted(config, experts):
    """Where a configuration's text part, or one in it, gives the number of experts: ``[(name, configuration), …]``."""
    holders = _nested(config.get_text_config())
    named = [
        (name, holder) for holder in holders for name in moe.COUNTS if name not in type(holder).attribute_map
    ]
    return [(name, holder) for name, holder in named if getattr(holder, name, None) == experts]


def _nested(config):
    """A configuration and those in it, such as DBRX's ``ffn_config``."""
    inner = [value for value in vars(config).values() if isinstance(value, type(config).__mro__[-2])]
    return [config, *(holder for part in inner for holder in _nested(part))]


def merge_record(folder):
    """What ``config.json`` says of a merge, or None."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not readable ({error}); the checkpoint is damaged.") from None
    return config.get("expert_merge")


def load_merged(folder, *, dtype="auto", device="auto", experts_implementation=None, verify=True):
    """Load a checkpoint that :func:`save_merged` wrote.

    Parameters
    ----------
    folder : path
    dtype, device, experts_implementation
        As for :func:`load_model`.
    verify : bool
        Compare the weight files with their checksums first.

    Returns
    -------
    transformers.PreTrainedModel
        Computes what the live merged model computed, to the bit at the same dtype (on a CPU, where a file's tensors lie in
        memory can change the last bit of a matrix product).

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or a weight file is missing.
    ValueError
        If it is not a merged checkpoint, or is damaged or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    record = merge_record(folder)
    if record is None:
        raise InputError(
            f'{folder} is not a merged checkpoint: its config.json has no "expert_merge". Use load_model.'
        )
    if not isinstance(record, dict) or record.get("version") != VERSION or record.get("router") != "mapped":
        raise InputError(
            f"{folder} was merged by another version of hcsmoe, or its config.json was changed; merge again."
        )
    check_checksums(folder, verify)
    config = readable_config(folder, folder)
    base = model_class(config)
    _check_layers(folder, base, config, record)
    with readable(folder):
        options = loading(dtype) | ({"variant": VARIANT} if record["factored"] else {})
        loaded, report = merged_class(base).from_pretrained(folder, config=config, **options)
        for name in record["layers"]:
            replace.adopt(loaded.get_submodule(name))
        layers = find_moe_layers(loaded)
        factored = [name for layer in layers for name in layer.projections]
        check_report(report, folder, expected=factored if record["factored"] else ())
        if record["factored"]:
            with torch.no_grad():
                put_factors(layers, from_saved(load_file(folder / FACTORED)))
    loaded.__class__ = base
    set_experts(loaded, experts_implementation)
    return loaded.to(device_of(device)).eval()


def _check_layers(folder, base, config, record):
    """Refuse a record of other layers or other experts than the model has."""
    with readable(folder), torch.device("meta"):
        layers = {layer.name: layer.num_experts for layer in find_moe_layers(base(copy.deepcopy(config)))}
    held = record["layers"] if isinstance(record.get("layers"), dict) else {}
    for name in dict.fromkeys((*layers, *held)):
        labels = held[name].get("labels") if isinstance(held.get(name), dict) else None
        if not isinstance(labels, list) or len(labels) != layers.get(name):
            raise InputError(f"{folder}: config.json maps other experts than {name} has; it was changed.")
