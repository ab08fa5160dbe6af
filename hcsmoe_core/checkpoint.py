"""Model folders: load a model by name, write a merged one that is really smaller, load it back."""

import copy
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from hcsmoe_core import moe
from hcsmoe_core.compression import from_saved, saved_tensors, savings
from hcsmoe_core.demo import models as demo
from hcsmoe_core.files import check_absent, check_choice, new_folder, replacing, sha256_file, write_json, writing
from hcsmoe_core.merging import apply_plan, check_unmerged, put_factors, restore
from hcsmoe_core.moe import find_moe_layers
from hcsmoe_core.plan import check_fits

ROUTERS = ("plain", "mapped")
# Names for layers that predict further tokens (MTP): transformers does not load them, so that they are not written either.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
VERSION = 2
FACTORED = "experts-factored.safetensors"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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


def folder_of(model):
    """Folder of an embedded model; the name or path of any other as it is given."""
    return demo.folder(model) if model in demo.NAMES else model


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
        loaded, report = model_class(config).from_pretrained(
            source, config=config, **loading(dtype, device if device in DEVICE_MAPS else None)
        )
        check_report(report, shown)
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
    import transformers

    known = []
    for auto in (
        transformers.AutoModelForCausalLM,
        transformers.AutoModelForImageTextToText,
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForTokenClassification,
    ):
        if type(config) in auto._model_mapping:
            known.append(auto._model_mapping[type(config)])
    if not known:
        raise ValueError(f"transformers has no language model for its configuration ({type(config).__name__}).")
    return next((c for c in known if c.__name__ in (config.architectures or ())), known[0])


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
            raise ValueError(
                f"{shown} is quantised with {method}, which transformers does not turn back into 16-bit weights "
                f"(it does for {', '.join(DEQUANTISED)}); start from the checkpoint that it was made from."
            )
        quantised["dequantize"] = True
    return config


def _quantisation(config):
    """What a configuration says of quantised weights, or None."""
    return getattr(config, "quantization_config", None) or getattr(config.get_text_config(), "quantization_config", None)


def loading(dtype, device_map=None):
    """Keywords for ``from_pretrained`` that all our loaders share."""
    shared = dict(dtype=_dtype(dtype), output_loading_info=True, use_safetensors=True)
    return shared if device_map is None else shared | {"device_map": device_map}


def hub_layout(model, config):
    """Let a model that was dequantised be saved in its family's usual names, rather than as packed blocks it no longer has."""
    if _quantisation(config) is not None and hasattr(model, "_weight_conversions"):
        del model._weight_conversions


class readable:  # noqa: N801 (a context manager, read as a word)
    """Turns the many ways in which a checkpoint fails to load into one clear error."""

    def __init__(self, shown):
        self.shown = shown

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        from safetensors import SafetensorError

        here = Path(self.shown).exists()
        if error is None or isinstance(error, KeyboardInterrupt | MemoryError):
            return False
        reason = str(error).strip().splitlines()[0] if str(error).strip() else kind.__name__
        if isinstance(error, OSError) and not here:
            raise FileNotFoundError(
                f"Cannot load {self.shown!r}: there is no such folder here, it is not {' or '.join(demo.NAMES)}, and the "
                f"Hugging Face hub did not give it ({reason}). Check the name and the network, or give a model folder."
            ) from None
        if isinstance(error, OSError | SafetensorError | ValueError | KeyError | RuntimeError | json.JSONDecodeError):
            raise ValueError(f"{self.shown} is not a readable checkpoint: {reason}") from None
        return False


def check_report(report, shown, expected=()):
    """Refuse a checkpoint of which some weights were missing, other than those expected, and would be random."""
    missing = sorted(set(report["missing_keys"]) - set(expected))
    mismatched = [m[0] if isinstance(m, tuple) else m for m in report.get("mismatched_keys", ())]
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:3])
        raise ValueError(f"{shown} lacks {len(missing) + len(mismatched)} of the model's tensors ({names}, …).")


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


# --- merged checkpoints -----------------------------------------------------------------------------------------------


def save_merged(model, plan, folder, *, stats=None, router="", tokenizer=None):
    """Write a merged or pruned model to a new folder: r experts a layer on disk, in the family's own tensor names.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Merged by this plan, or not merged; it is left as it was.
    plan : Plan
    folder : path
        Must not exist. Holds ``config.json``, ``.safetensors`` files, ``plan.json`` and, where given, the tokenizer.
    stats : Statistics, optional
        As for :func:`hcsmoe_core.merging.apply_plan`; not looked at if the plan is applied already.
    router : {"", "plain", "mapped"}
        ``"plain"`` is a checkpoint of the original family, with a smaller number of experts or a smaller expert width in
        its configuration: stock loaders open it. Pruned, trimmed and router-averaged models can be written so if all
        layers keep alike many. ``"mapped"`` records under ``expert_merge`` in ``config.json`` what each layer has, and keeps
        all E rows of a router that is not pruned, with the map from E to r: :func:`load_merged` reads it, stock loaders
        refuse it. Experts that MC-SMoE's second step has factored are written as factors, in a file of their own, and
        multiplied out in memory. By default plain where that is the same function, else mapped.
    tokenizer : transformers.PreTrainedTokenizerBase, optional

    Returns
    -------
    dict
        ``bytes`` of the weight files, ``parameters`` in them, and the ``router`` that was written.

    Raises
    ------
    FileExistsError
        If the folder exists.
    ValueError
        If the plan does not fit the model, another plan is applied to it, or it cannot be written as asked.
    """
    check_choice("router", router, ("", *ROUTERS))
    check_absent(folder)
    layers = check_fits(plan, model)
    applied = all(layer.merged for layer in layers)
    if applied:
        if [layer.experts._merged.plan for layer in layers] != plan.layers:
            raise ValueError("Another plan is applied to this model; restore(model) first.")
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
            written = finish(part, target, plan, tokenizer=tokenizer)
        if plan.compress:
            written["savings"] = factored_savings(model)
            dense = sum(tensor.numel() for layer in layers for tensor in layer.projections.values())
            written["parameters"] += written["savings"]["weights"]["compressed"] - dense
    finally:
        if not applied:
            restore(model)
    return written


@dataclass(frozen=True)
class Target:
    """What a merged checkpoint will be, before any of it is written.

    Attributes
    ----------
    config : transformers.PreTrainedConfig or None
        Of a plain checkpoint; None for a mapped one.
    records : dict of str to dict
        What a loader of a mapped checkpoint must know of each layer.
    parameters : int
    hub_layout : bool
        Whether tensors are written in the layout of the hub. A family whose files hold text and other experts in one list
        cannot have fewer of one kind there.
    """

    config: object
    records: dict
    parameters: int
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
    records = {layer.name: _record(layer, p) for layer, p in zip(find_moe_layers(model), plan.layers, strict=True)}
    with torch.device("meta"):
        merged = type(model)(copy.deepcopy(model.config))
    for layer in find_moe_layers(merged):
        _make_room(layer, records[layer.name])
    config, why = (None, "") if router == "mapped" else _plain_config(model, plan, merged)
    if router == "plain" and config is None:
        raise ValueError(f'The "router" argument cannot be "plain" for this plan: {why}. Use "mapped".')
    in_hub_layout = config is not None or not moe.other_experts(model)
    return Target(config, records, sum(p.numel() for p in merged.parameters()), in_hub_layout)


def _record(layer, layer_plan):
    """What a loader must know of a merged layer."""
    rows = len(layer_plan.labels) if layer_plan.router == "map" else layer_plan.num_groups
    return {"labels": layer_plan.labels, "router_rows": rows, "width": layer_plan.width or layer.width}


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
    with writing(part):
        model.save_pretrained(part, state_dict=tensors, max_shard_size=1 << 60, save_original_format=target.hub_layout)
    if place == 0:
        for file in part.iterdir():
            if file.name != WEIGHTS:
                os.replace(file, Path(folder) / file.name)
    os.replace(part / WEIGHTS, Path(folder) / shard(place, count))
    shutil.rmtree(part)


def finish(folder, target, plan, *, tokenizer=None):
    """Complete a folder of which all parts are written; may be called again where it was interrupted.

    Parameters
    ----------
    folder : path
    target : Target
    plan : Plan
    tokenizer : transformers.PreTrainedTokenizerBase, optional

    Returns
    -------
    dict
        As of :func:`save_merged`.
    """
    folder = Path(folder)
    _join(folder, target.parameters)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    plan.save(folder / "plan.json")
    files = sorted(folder.glob("*.safetensors"))
    if target.config is not None:
        _write_config(folder, json.loads(target.config.to_json_string()))
    else:
        written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _write_config(folder, written | {"expert_merge": _merge_of(folder, target.records, files)})
    size = sum(file.stat().st_size for file in files)
    return {"bytes": size, "parameters": target.parameters, "router": target.router}


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
    """What MC-SMoE's second step saves of a live merged model; see :func:`hcsmoe_core.compression.savings`."""
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
    if any(layer.router == "map" and layer.labels != list(range(len(layer.labels))) for layer in plan.layers):
        return None, "the router keeps rows of experts that are joined"
    if len(counts) > 1:
        return None, f"layers differ in their number of experts ({', '.join(map(str, sorted(counts)))})"
    config, experts = copy.deepcopy(model.config), len(plan.layers[0].labels)
    kept, width = counts.pop(), plan.layers[0].width
    for name, holder in counted(config, experts):
        setattr(holder, name, kept)
    for holder in _nested(config.get_text_config()):
        for name in moe.CHOICES:
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, min(getattr(holder, name), kept))
    shapes, why = {name: tuple(tensor.shape) for name, tensor in merged.state_dict().items()}, "its configuration has no width"
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
    named = [(name, holder) for holder in holders for name in moe.COUNTS if name not in type(holder).attribute_map]
    return [(name, holder) for name, holder in named if getattr(holder, name, None) == experts]


def _nested(config):
    """A configuration and those in it, such as DBRX's ``ffn_config``."""
    inner = [value for value in vars(config).values() if isinstance(value, type(config).__mro__[-2])]
    return [config, *(holder for part in inner for holder in _nested(part))]


def _write_config(folder, config):
    """Write ``config.json``, which says that no layer predicts further tokens."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update({name: 0 for name in FURTHER_LAYERS if part.get(name)})
    write_json(folder / "config.json", config)


def _merge_of(folder, records, files):
    """What ``config.json`` says of a merge."""
    return {
        "version": VERSION,
        "router": "mapped",
        "factored": (folder / FACTORED).exists(),
        "layers": records,
        "files": {file.name: sha256_file(file) for file in files},
    }


def merge_record(folder):
    """What ``config.json`` says of a merge, or None."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable ({error}); the checkpoint is damaged.") from None
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
    from transformers import AutoConfig

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    record = merge_record(folder)
    if record is None:
        raise ValueError(f'{folder} is not a merged checkpoint: its config.json has no "expert_merge". Use load_model.')
    _check_record(folder, record, verify)
    with readable(folder):
        config = AutoConfig.from_pretrained(folder)
        base = model_class(config)
        loaded, report = _merged_class(base).from_pretrained(folder, config=config, **loading(dtype))
        layers = find_moe_layers(loaded)
        factored = [name for layer in layers for name in layer.projections]
        check_report(report, folder, expected=factored if record["factored"] else ())
        if record["factored"]:
            with torch.no_grad():
                put_factors(layers, from_saved(load_file(folder / FACTORED)))
    loaded.__class__ = base
    set_experts(loaded, experts_implementation)
    return loaded.to(device_of(device)).eval()


def _check_record(folder, record, verify):
    if not isinstance(record, dict) or record.get("version") != VERSION or record.get("router") != "mapped":
        raise ValueError(f"{folder} was merged by another version of hcsmoe, or its config.json was changed; merge again.")
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; copy it again, or merge again.")
        if verify and sha256_file(folder / name) != digest:
            raise ValueError(f"{folder / name} was cut short or changed since it was written; copy it again, or merge again.")


def named_alike(made, base):
    """``made``, a subclass of a model class, under the name of that class.

    transformers finds a family's weight conversion and experts implementations by these names.
    """
    made.__name__ = made.__qualname__ = base.__name__
    made.__module__ = base.__module__
    return made


def _merged_class(base):
    """``base`` with r experts a layer from the start, so that transformers' own loading fills them."""

    class Merged(base):
        def __init__(self, config):
            super().__init__(config)
            for layer in find_moe_layers(self):
                _make_room(layer, config.expert_merge["layers"].get(layer.name))

    return named_alike(Merged, base)


def _make_room(layer, record):
    """Give a layer tensors of the recorded shapes, to be filled by loading."""
    if not isinstance(record, dict) or len(record.get("labels", ())) != layer.num_experts:
        raise ValueError(f"config.json maps other experts than {layer.name} has; it was changed.")
    labels, width = record["labels"], record["width"]
    shapes = layer.shapes(max(labels) + 1, width)
    tensors = {name: _room(tensor, shapes[name]) for name, tensor in layer.tensors().items()}
    rows = None
    if record["router_rows"] != len(labels):
        groups = torch.arange(record["router_rows"], device="cpu")  # loading is on no device at all
        rows = (torch.tensor(labels, device="cpu") == groups[:, None]).double()
    moe.put_experts(layer, tensors, labels, rows=rows, keep=False)


def _room(tensor, shape):
    """Room for a tensor of another shape, of the same kind (parameter or buffer) and on the same device."""
    room = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(room, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room
