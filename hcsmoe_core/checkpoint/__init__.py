"""Model folders: load a model by name, write a merged one with fewer experts, load it back."""

import contextlib
import copy
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from hcsmoe_core import _transformers, _util, merging, moe, replace
from hcsmoe_core._util import (
    InputError,
    check_absent,
    check_choice,
    choice_of,
    folder_of,
    read_json,
    require,
    sha256_json,
)
from hcsmoe_core.checkpoint import export
from hcsmoe_core.families import decoder_layers, find_moe_layers, non_text_experts
from hcsmoe_core.modeling_hcsmoe import VERSION, merged_class, room
from hcsmoe_core.plan import JOINED, Plan, load_plan, with_router

ROUTERS = ("plain", "mapped", "row-kept", "folded")
DTYPES = ("auto", "float32", "bfloat16", "float16")
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them
WEIGHTS, SHARD = "model.safetensors", "model-{:05d}-of-{:05d}.safetensors"
SINGLE = 1 << 28  # bytes up to which a checkpoint is one file rather than one per decoder layer
DEVICE_MAPS = ("balanced", "balanced_low_0", "sequential")
DEQUANTISED = ("fp8", "mxfp4", "compressed-tensors")  # what transformers can undo while it loads
REPEATED, MOST = (
    ("hidden_layers", "head_dim"),
    10_000,
)  # endings of sizes, and more than any model has of them
EXPERT_WIDTHS = ("moe_intermediate_size", "intermediate_size", "expert_dim")


def load_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model in evaluation mode, and its tokenizer or None.

    Parameters
    ----------
    model : str or path
        A model folder (merged ones too), a name on the Hugging Face hub, or that of an embedded model.
    dtype : torch.dtype or {"auto", "float32", "bfloat16", "float16"}
        ``"auto"`` is the checkpoint's own.
    device : str or torch.device
        ``"auto"`` is a GPU if there is one; one of :data:`DEVICE_MAPS` spreads the layers over all GPUs.
    experts_implementation : str, optional
        How transformers runs experts, such as ``"eager"`` or ``"grouped_mm"``; by default its own choice.
    trust_remote_code : bool
        Run Python files that lie in the model's folder, where its classes are in them (``auto_map``).

    Raises FileNotFoundError if it is neither here nor on the hub; InputError if it is not readable, wants
    code of its own or files outside its folder, or is quantised in a way that transformers cannot undo.
    """
    source = folder_of(model)
    load = _load if merge_record(source) is None else load_merged
    options = dict(experts_implementation=experts_implementation, trust_remote_code=trust_remote_code)
    loaded = load(source, dtype=dtype, device=device, **options)
    loaded.name_or_path = str(model)
    return loaded, load_tokenizer(source, trust_remote_code)


def _load(source, *, device, **options):
    device_map = device if device in DEVICE_MAPS else None
    loaded = load_with(_load_checked, source, device_map=device_map, **options)
    return loaded if device_map else loaded.to(device_of(device))


def load_with(
    load,
    source,
    *,
    dtype,
    device_map,
    experts_implementation,
    trust_remote_code=False,
    merged=False,
    verify=True,
):
    """Load a model by a function of :func:`hcsmoe_core._transformers.class_with_loader`, in evaluation mode.

    ``device_map`` is that of transformers; a ``merged`` model has layers as ``config.json`` records them.
    With ``verify``, weight files of a folder that we wrote are compared with their checksums first.
    """
    config = readable_config(source, trust_remote_code)
    export.check_checksums(source, verify)
    family = model_class(config)
    with readable(source):
        base = _transformers.class_with_loader(merged_class(family) if merged else family, load)
        options = dict(config=config, output_loading_info=True, use_safetensors=True, dtype=_dtype(dtype))
        options["trust_remote_code"] = trust_remote_code  # without which custom_generate/ is not run either
        loaded, report = base.from_pretrained(source, device_map=device_map, **options)
        missing = sorted(report["missing_keys"])  # they would stay random
        names = f"{len(missing)} of the model's tensors ({', '.join(missing[:3])}, …)"
        require(not missing, f"it lacks {names}; copy it again")
    loaded.__class__ = family
    if _quantisation(config):
        _transformers.forget_conversions(loaded)
    if experts_implementation is not None:  # multimodal models refuse it as a keyword of from_pretrained
        loaded.set_experts_implementation(experts_implementation)
    return loaded.eval()


def _load_checked(model, files, config, usual):
    """Load as transformers does, but refuse what it would take for floats or leave random."""
    list(on_disk(model, files, config))
    report, offloaded = usual()
    check_conversion(report, "it")
    return report, offloaded


def load_skeleton(model, *, dtype="auto", trust_remote_code=False):
    """Build a model on the meta device from its configuration; of a merged folder, the original."""
    config = readable_config(model, trust_remote_code)
    with readable(model):
        return skeleton_of(config, dtype=dtype)


def skeleton_of(config, *, dtype="auto"):
    """Build the model of a transformers configuration on the meta device."""
    dtype = _dtype(config.get_text_config().dtype or "float32" if dtype == "auto" else dtype)
    with torch.device("meta"):
        return model_class(config)(config).to(dtype)


def load_tokenizer(source, trust_remote_code=False):
    """Load the tokenizer of a folder or hub name; None if the folder has none."""
    folder = Path(source)
    absent = folder.is_dir() and not [*folder.glob("tokenizer*"), *folder.glob("*.model")]
    with readable(source):
        if absent:
            return None
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)


def tokenizer_hash(tokenizer) -> str:
    """Hash of all that a tokenizer's output follows from; of None, too."""
    if (fast := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return sha256_json(tokenizer and tokenizer.get_vocab())
    content = json.loads(fast.to_str()) | {"truncation": None, "padding": None}  # the last call's
    return sha256_json([content, tokenizer.chat_template])


def model_class(config):
    """Model class of a configuration: the one it names if an auto class knows that, else the first."""
    classes = _transformers.remote_classes(config) or [
        family for _, family in _transformers.auto_classes(config)
    ]
    kind = type(config).__name__
    require(classes, f"transformers has no language model for {kind}; give another model.")
    return next((c for c in classes if c.__name__ in (config.architectures or ())), classes[0])


def readable_config(model, trust_remote_code=False):
    """Load a configuration, set to turn quantised weights into floats; InputError if transformers cannot.

    What decides the output of a folder that we wrote, weights aside, is compared with its checksums first.
    """
    export.check_inside(folder_of(model))
    export.check_checksums(folder_of(model), weights=False)
    with readable(model):
        config = AutoConfig.from_pretrained(folder_of(model), trust_remote_code=trust_remote_code)
        text = config.get_text_config()
        fields = {
            "architectures": isinstance(config.architectures, list | None),
            "dtype": isinstance(text.dtype, torch.dtype | str | None),
            "quantization_config": isinstance(_quantisation(config), dict | None),
        }
        sizes = {n: v for n, v in vars(text).items() if n.endswith(REPEATED) and isinstance(v, int)}
        odd = [name for name, fits in (fields | {n: v < MOST for n, v in sizes.items()}).items() if not fits]
        require(not odd, f'"{", ".join(odd)}" of config.json cannot be meant; copy the file again')
    if quantisation := _quantisation(config):
        method = str(quantisation.get("quant_method", "an unnamed method"))
        require(
            method in DEQUANTISED,
            f"{model} is quantised with {method}, which transformers does not turn back into 16-bit weights "
            f"(it does for {', '.join(DEQUANTISED)}); start from the checkpoint it was made from.",
        )
        quantisation["dequantize"] = True
    return config


def _quantisation(config):
    settings = (getattr(c, "quantization_config", None) for c in (config, config.get_text_config()))
    return next(filter(None, settings), None)


@contextlib.contextmanager
def without_bars():
    """Hide transformers' progress bars, of which every shard would draw one."""
    with contextlib.ExitStack() as undo:
        if logging.is_progress_bar_enabled():
            undo.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
        yield


@contextlib.contextmanager
def readable(shown):
    """Turn the many ways in which a checkpoint fails to load into one error that names it."""
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError, but no fault of the checkpoint
        raise
    except Exception as error:  # transformers says in any way what it does not like
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if "trust_remote_code" in str(error):  # in words that differ with what transformers was to load
            reason = (
                "it needs Python code that comes with it (auto_map), which is not run unasked. Read that "
                "code; if you trust it, give trust_remote_code=True (--trust-remote-code)."
            )
        if isinstance(error, OSError) and not Path(shown).exists():
            raise FileNotFoundError(
                f"Cannot load {shown!r}: there is no such folder here, it is not "
                f"{' or '.join(_util.EMBEDDED)}, and the Hugging Face hub did not provide it ({reason}). "
                "Check the name and the network, or give a model folder."
            ) from None
        known = isinstance(error, OSError | SafetensorError | InputError)
        file = (
            "" if known or not Path(shown).is_dir() else f" ({type(error).__name__}, as of its config.json)"
        )
        raise InputError(f"{shown} is not a readable checkpoint{file}: {reason}") from error


def check_conversion(report, shown, unread=()):
    """Raise InputError if tensors failed to convert, have other shapes, or were not loaded (``unread``)."""
    wrong = [*(entry[0] for entry in report.mismatched_keys), *report.conversion_errors, *unread]
    require(
        not wrong,
        f"{shown} does not hold {next(iter(wrong), '')} as its configuration says ({len(set(wrong))} tensors "
        "in all): parts of it are missing or have other shapes; copy the checkpoint again.",
    )


def on_disk(model, files, config):
    """What each tensor of a checkpoint becomes in a model, one by one: ``(file, key, names in the model)``.

    ``config`` is transformers' ``LoadStateDictConfig``. Raises InputError if a file cannot be read, or has
    integers or 8-bit floats for floats although the configuration says nothing of quantisation.
    """
    tensors, names_of = model.state_dict(), _transformers.names_in_model(model, config)
    quantised = _transformers.is_quantised(config)
    for file in files:
        with opened(file) as stored:
            for key in stored.keys():  # noqa: SIM118 (not a dict)
                if names := names_of(key):
                    dtype = stored.get_slice(key).get_dtype()
                    require(
                        quantised or dtype in FLOATS or not tensors[names[0]].is_floating_point(),
                        f"{key} in {file} is of type {dtype} where 16- or 32-bit floating-point numbers "
                        "belong, and config.json does not say how it is quantised; use a 16-bit checkpoint",
                    )
                    yield file, key, names


def opened(file):
    """Open a shard without a memory map: a mapped file that is cut short meanwhile would end the process."""
    try:
        return safe_open(file, "pt", backend="pread")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not readable ({error}); copy it again.") from None


def _dtype(dtype):
    dtype = dtype if isinstance(dtype, torch.dtype) else choice_of("dtype", dtype, DTYPES)
    return dtype if dtype == "auto" or isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def device_of(device):
    """The device that an option names; ``"auto"`` is a GPU if there is one. InputError if it is not here."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f'The "device" argument is {device}, which PyTorch cannot use here ({reason}); use auto or cpu.'
        ) from None
    return device


def save_merged(
    model: torch.nn.Module, plan: Plan, folder: str | Path, *, stats: Any = None, router: str = "",
    tokenizer: Any = None, fidelity: dict | None = None, card: dict | None = None
) -> dict:  # fmt: skip
    """Write a merged or pruned model to a new folder: r experts per layer, in the family's own names.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Merged by this plan, or not merged; it is left as it was, also if writing fails.
    plan : Plan
    folder : path
        Gets the weights and their checksums, ``config.json``, ``plan.json``, a model card, and from the
        original its tokenizer, licence and other small files.
    stats : Statistics, optional
        As for :func:`hcsmoe_core.merging.apply_plan`, unless the plan is applied already.
    router : {"", "plain", "mapped", "row-kept", "folded"}
        ``"plain"``: a checkpoint of the original family with fewer or narrower experts, which any loader
        opens; possible if all layers are alike and no router sends two rows to one expert. ``"row-kept"``,
        ``"folded"``: give joined experts one row (:func:`hcsmoe_core.plan.with_router`), and write it plain.
        ``"mapped"``: exact; the router keeps its E rows and ``config.json`` maps them to r experts, which
        :func:`load_merged` reads, and transformers with ``trust_remote_code=True``. By default plain if that
        computes the same, else mapped.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
    fidelity, card : dict, optional
        For the model card: what :func:`hcsmoe_core.score.fidelity.fidelity` measured, and more lines by name.

    Returns
    -------
    dict
        ``bytes`` of the weight files, numbers of ``parameters`` and ``original`` ones, ``router`` ("plain" or
        "mapped"), ``limits`` of engines (lines of text), and ``fidelity`` as given.

    Raises FileExistsError if the folder exists, InputError if the plan does not fit the model or cannot be
    written as asked.
    """
    plan, router = exported(plan, router)
    check_absent(folder)
    layers = merging.check_fits(plan, model)
    merges = [layer.experts._merged for layer in layers if layer.merged]
    applied = len(merges) == len(layers)
    compressed = any(merge.compressed_bytes for merge in merges)
    same = [merge.plan for merge in merges] == plan.layers and compressed == bool(plan.compress)
    require(same or not applied, "Another plan is applied to this model; restore(model) first.")
    target = target_of(model, plan, router)
    with contextlib.ExitStack() as undo:
        if not applied:
            merging.apply_plan(model, plan, stats)
            undo.callback(merging.restore, model)
        partial = undo.enter_context(_util.new_folder(folder))
        tensors, parts = model.state_dict(), parts_of(model)
        for part, names in enumerate(parts):
            write_part(model, {n: tensors[n] for n in names}, partial, part, len(parts), target)
        return finish(model, partial, target, plan, tokenizer=tokenizer, fidelity=fidelity, card=card)


def exported(plan, router):
    """Plan and kind of checkpoint ("", "plain", "mapped") that ``router`` of :func:`save_merged` means."""
    check_choice("router", router, ("", *ROUTERS))
    if router in JOINED:
        return with_router(plan, router), "plain"
    joined = router == "mapped" and any(layer.router in JOINED for layer in plan.layers)
    return with_router(plan, "mapped") if joined else plan, router


@dataclass(frozen=True)
class Target:
    """What a merged checkpoint will be, before any of it is written."""

    config: PreTrainedConfig  # of a plain checkpoint; of a mapped one that of the original
    more: dict  # further keys of config.json, which tell the loader of a mapped checkpoint of each layer
    loader: str  # class that opens it
    result: dict  # of save_merged, but for the bytes and the fidelity


def target_of(model, plan, router=""):
    """What a plan makes of a model, merged or not, of which only the configuration is read.

    Raises InputError if it cannot be written with the ``router`` asked for ("", "plain" or "mapped").
    """
    with torch.device("meta"):
        merged = type(model)(copy.deepcopy(model.config))
    original, names = merged.num_parameters(), {module: name for name, module in merged.named_modules()}
    layers = find_moe_layers(merged)
    top_k, trimmed = layers[0].top_k, any(layer.width and layer.joins for layer in plan.layers)
    pairs = zip(layers, plan.layers, strict=True)
    records = {layer.name: _record(layer, layer_plan, names) for layer, layer_plan in pairs}
    config, reason = (None, "") if router == "mapped" else _plain_config(model, plan, merged)
    remedy = '"mapped", or make the plan with shape "whole"' if trimmed else '"mapped"'
    require(
        router != "plain" or config is not None,
        f'The "router" argument cannot be "plain" for this plan: {reason}. Use {remedy}.',
    )
    router, more, kind = "plain" if config else "mapped", {}, type(model)
    autos = [auto.__name__ for auto, family in _transformers.auto_classes(model.config) if family is kind]
    if config is None:  # "factored" is there for earlier versions, which look for it
        record = {"version": VERSION, "router": "mapped", "factored": False, "layers": records}
        code = dict.fromkeys(autos, f"{export.MODELING.stem}.Merged{kind.__name__}")
        more = {"expert_merge": record, "auto_map": code}
    limits = export.limits(plan, router, top_k, model.dtype)
    result = dict(original=original, parameters=merged.num_parameters(), router=router, limits=limits)
    return Target(config or model.config, more, [*autos, kind.__name__][0], result)


def _record(layer, layer_plan, names):
    """Merge a layer on the meta device; what :mod:`modeling_hcsmoe` must know to do the same."""
    shapes = layer.shapes(layer_plan.num_groups, layer_plan.width or layer.width)
    experts = {name: room(tensor, shapes[name]) for name, tensor in layer.tensors().items()}
    rows = layer_plan.router_rows()
    rows = None if rows is None else torch.from_numpy(rows)
    replace.replace_experts(layer, experts, layer_plan.labels, rows=rows)
    state, tensors, values = layer.experts._merged, {}, {}
    for (module, name), before in state.originals.items():
        value = getattr(module, name)
        if torch.is_tensor(value):
            tensors[f"{names[module]}.{name}"] = list(value.shape)
            continue
        if name == "config":
            value = {k: new for k, new in vars(value).items() if (k, new) not in vars(before).items()}
        values.setdefault(names[module], {})[name] = value
    record = {"labels": state.labels, "extra": state.extra, "mapped": state.handle is not None}
    return record | {"tensors": tensors, "values": values}


def _plain_config(model, plan, merged):
    """Configuration with which the model's own class has the tensors of ``merged``, or None; and why not.

    Found by trial: the class is built on the meta device, and shapes are compared.
    """
    counts = sorted({p.num_groups for p in plan.layers})
    if any(p.router == "mapped" and p.labels != list(range(len(p.labels))) for p in plan.layers):
        return None, 'the router keeps rows of experts that are joined, which "row-kept" and "folded" do not'
    if len(counts) > 1:
        return None, f"layers differ in their number of experts ({', '.join(map(str, counts))})"
    config, count, width = copy.deepcopy(model.config), counts[0], plan.layers[0].width
    text = config.get_text_config()
    for name, holder in counted(config, len(plan.layers[0].labels)):
        setattr(holder, name, count)
    # Fewer where groups of experts are chosen first; more where the block keeps the original's configuration.
    caps = dict.fromkeys(moe.TOP_K_NAMES, min(count, find_moe_layers(merged)[0].top_k or count))
    if any(p.router in JOINED for p in plan.layers):
        caps |= dict.fromkeys((*moe.GROUP_COUNT_NAMES, *moe.GROUP_TOP_K_NAMES), 1)
    for holder in _nested(text):
        holder.update({n: min(value, caps[n]) for n, value in moe.whole_numbers(holder, caps).items()})
    shapes = {n: t.shape for n, t in merged.state_dict().items()}
    widths = [{name: width} for name in moe.whole_numbers(text, EXPERT_WIDTHS)]
    reason = "its configuration has no width"
    for changes in widths if width else [{}]:
        trial = copy.deepcopy(config)
        trial.get_text_config().update(changes)
        try:
            with torch.device("meta"):
                built = {n: t.shape for n, t in type(model)(trial).state_dict().items()}
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:  # its own class refuses it
            reason = f"{type(config).__name__} does not take {count} experts ({str(error).splitlines()[0]})"
            continue
        if built == shapes:
            return trial, ""
        other = next(n for n in shapes | built if built.get(n) != shapes.get(n))
        reason = f"its configuration counts other tensors along with these experts ({other})"
    return None, reason


def counted(config, experts):
    """Where a configuration's text part gives the number of experts: ``[(name, configuration), …]``."""
    return [
        (name, holder)
        for holder in _nested(config.get_text_config())
        for name, value in moe.whole_numbers(holder, moe.EXPERT_COUNT_NAMES).items()
        if value == experts and name not in type(holder).attribute_map
    ]


def _nested(config):
    """A configuration and those in it, such as DBRX's ``ffn_config``."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(holder for part in inner for holder in _nested(part))]


def parts_of(model):
    """Tensor names by the shard that they go to: those outside the decoder layers, then layer by layer."""
    prefix = decoder_layers(model)
    inside = re.compile(rf"{re.escape(prefix)}\.(\d+)\." if prefix else "(?!)")
    parts = [[] for _ in range(1 + (len(model.get_submodule(prefix)) if prefix else 0))]
    for name in model.state_dict():
        match = inside.match(name)
        parts[1 + int(match[1]) if match else 0].append(name)
    return parts


def write_part(model, tensors, folder, part, count, target):
    """Write one of ``count`` shards, of ``tensors`` by name, and the small files that transformers adds.

    The model may be on the meta device; ``part`` counts from 0.
    """
    shard = folder / SHARD.format(part + 1, count)
    # Files on the hub may list text and other experts together, all alike many.
    hub_layout = not (target.more and non_text_experts(model))
    with _util.writing(shard), without_bars():
        options = dict(max_shard_size=1 << 60, save_original_format=hub_layout, variant="part")
        model.save_pretrained(folder, state_dict=tensors, **options)
    (folder / "model.part.safetensors").chmod(folder.stat().st_mode & 0o666)  # by the umask
    (folder / "model.part.safetensors").replace(shard)


def finish(model, folder, target, plan, *, tokenizer=None, fidelity=None, card=None):
    """Complete a folder of which all shards are written; may be called again if it was interrupted.

    The model may be on the meta device; the rest is as for :func:`save_merged`, and so is what is returned.
    """
    _join_shards(folder, target.result["parameters"])
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    source = export.copy_along(model, folder)
    plan.save(folder / "plan.json")
    if target.more:
        shutil.copyfile(export.MODELING, folder / export.MODELING.name)
    export.write_config(model, folder, target.config, target.more, source)
    export.write_checksums(folder)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    written = {"bytes": size, **target.result, "fidelity": fidelity}
    export.write_card(model, folder, plan, written, loader=target.loader, lines=card)
    return written


def _join_shards(folder, parameters):
    """Make one weight file of the shards if they are small, else an index of them."""
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    if sum(file.stat().st_size for file in files) > SINGLE:
        stored = {name: (file.name, t.nbytes) for file in files for name, t in load_file(file).items()}
        metadata = {"total_parameters": parameters, "total_size": sum(size for _, size in stored.values())}
        index = {"metadata": metadata, "weight_map": {name: stored[name][0] for name in sorted(stored)}}
        _util.write_json(folder / f"{WEIGHTS}.index.json", index)
        return
    if not (folder / WEIGHTS).exists():
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        with _util.replacing(folder / WEIGHTS) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})
    for file in files:
        file.unlink()


def merge_record(folder):
    """What ``config.json`` of a folder says of a merge; None if it says nothing or there is none."""
    path = Path(folder) / "config.json"
    config = read_json(path) if path.is_file() else {}
    damaged = f"{path} is not readable; it was cut short or damaged. Copy the checkpoint again."
    require(isinstance(config, dict), damaged)
    return config.get("expert_merge")


def load_merged(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    experts_implementation: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
) -> Any:
    """Load a mapped checkpoint that :func:`save_merged` wrote; the other arguments are :func:`load_model`'s.

    It computes what the live merged model computed, to the bit at the same dtype (on a CPU, where a file's
    tensors lie in memory can change the last bit of a matrix product). With ``verify``, weight files are
    compared with their checksums first; other files are in any case.

    Raises FileNotFoundError if the folder or a weight file is missing, InputError if it is not a mapped
    checkpoint, or damaged or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; give one that save_merged wrote.")
    record = merge_record(folder)
    unmerged = f'{folder} is not a merged checkpoint: config.json has no "expert_merge". Use load_model.'
    require(record, unmerged)
    require(
        not (isinstance(record, dict) and record.get("factored")),
        f"{folder} keeps its experts as factors, as only earlier versions of hcsmoe do. Write it anew: "
        f"hcsmoe merge MODEL --plan {folder / 'plan.json'} --statistics STATISTICS --out OTHER",
    )
    options = dict(dtype=dtype, device=device, experts_implementation=experts_implementation)
    loaded = _load(folder, merged=True, verify=verify, trust_remote_code=trust_remote_code, **options)
    found, wanted = (
        {layer.name: layer.num_experts for layer in find_moe_layers(model)}
        for model in (loaded, load_skeleton(folder, trust_remote_code=trust_remote_code))
    )
    require(found == wanted, f"{folder}: config.json maps other experts than the model has; merge again.")
    labels = {name: layer["labels"] for name, layer in record["layers"].items()}
    path = folder / "plan.json"
    planned = {layer.name: layer.labels for layer in load_plan(path).layers} if path.is_file() else labels
    odd = [name for name in labels if labels[name] != planned.get(name)]
    require(not odd, f"{folder / 'config.json'}: labels of {', '.join(odd)} are not those of plan.json.")
    return loaded
