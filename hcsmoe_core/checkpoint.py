"""Model folders: load a model by name, write a merged one that is really smaller, load it back."""

import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hcsmoe_core import moe
from hcsmoe_core.compression import from_saved, saved_tensors, savings
from hcsmoe_core.demo import models as demo
from hcsmoe_core.files import check_absent, check_choice, new_folder, sha256_file
from hcsmoe_core.merging import apply_plan, check_unmerged, put_factors, restore
from hcsmoe_core.moe import find_moe_layers
from hcsmoe_core.plan import check_fits

ROUTERS = ("plain", "mapped")
# Names for layers that predict further tokens (MTP): transformers does not load them, so that they are not written either.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
DTYPES = ("auto", "float32", "bfloat16", "float16")
VERSION = 2
FACTORED = "experts-factored.safetensors"


def load_model(model, *, dtype="auto", device="auto", experts_implementation=None):
    """Load a model and its tokenizer.

    Parameters
    ----------
    model : str or path
        A model folder (merged ones too), a name on the Hugging Face hub, ``"demo-mixtral"`` or ``"demo-qwen"``.
    dtype : torch.dtype or {"auto", "float32", "bfloat16", "float16"}
        ``"auto"`` takes the checkpoint's own.
    device : str or torch.device
        ``"auto"`` takes a GPU where there is one.
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
        If the folder is not a readable checkpoint.
    """
    source = demo.folder(model) if model in demo.NAMES else model
    folder = Path(source)
    options = dict(dtype=dtype, device=device, experts_implementation=experts_implementation)
    if folder.is_dir() and _merge_record(folder) is not None:
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
    from transformers import AutoConfig

    source = demo.folder(model) if model in demo.NAMES else model
    with _readable(model):
        config = AutoConfig.from_pretrained(source)
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
    from transformers import AutoConfig

    with _readable(shown):
        loaded, report = model_class(AutoConfig.from_pretrained(source)).from_pretrained(
            source, dtype=_dtype(dtype), output_loading_info=True, use_safetensors=True
        )
        _check_report(report, shown)
    if experts_implementation is not None:  # given while loading, it is refused by models of which some part has no experts
        loaded.set_experts_implementation(experts_implementation)
    return loaded.to(_device(device)).eval()


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


class _readable:  # noqa: N801 (a context manager, read as a word)
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


def _check_report(report, shown, expected=()):
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


def _device(device):
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
        apply_plan(model, plan, stats)
    try:
        config, why = (None, "") if router == "mapped" else _plain_config(model, plan)
        if router == "plain" and config is None:
            raise ValueError(f'The "router" argument cannot be "plain" for this plan: {why}. Use "mapped".')
        with new_folder(folder) as part:
            # A family whose files hold text and other experts in one list cannot have fewer of one kind there.
            original = config is not None or not moe.other_experts(model)
            tensors = _without_factored(model, layers) if plan.compress else None
            model.save_pretrained(part, state_dict=tensors, save_original_format=original)
            if plan.compress:
                save_file(_factors(layers, model.dtype), part / FACTORED)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            plan.save(part / "plan.json")
            files = sorted(part.glob("*.safetensors"))
            if config is not None:
                (part / "config.json").write_text(config.to_json_string(), encoding="utf-8")
            _write_config(part, None if config is not None else _record(part, layers, files))
            size = sum(file.stat().st_size for file in files)
        written = {"bytes": size, "parameters": sum(p.numel() for p in model.parameters())}
        written["router"] = "mapped" if config is None else "plain"
        if plan.compress:
            written["savings"] = factored_savings(model)
            dense = sum(tensor.numel() for layer in layers for tensor in layer.projections.values())
            written["parameters"] += written["savings"]["weights"]["compressed"] - dense
    finally:
        if not applied:
            restore(model)
    return written


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


def _plain_config(model, plan):
    """Configuration with which the model's own class has just the tensors that the merged model has; or None, and why.

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
    shapes, why = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, "its configuration has no width"
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


def _write_config(folder, record):
    """Add the record of a merge to a written ``config.json``, and say there that no layer predicts further tokens."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.update({name: 0 for name in FURTHER_LAYERS if part.get(name)})
    if record is not None:
        config["expert_merge"] = record
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _record(folder, layers, files):
    return {
        "version": VERSION,
        "router": "mapped",
        "factored": (folder / FACTORED).exists(),
        "layers": {layer.name: _layer_record(layer) for layer in layers},
        "files": {file.name: sha256_file(file) for file in files},
    }


def _layer_record(layer):
    """What a loader must know of a merged layer."""
    return {"labels": layer.experts._merged.labels, "router_rows": layer.experts._merged.routed, "width": layer.width}


def _merge_record(folder):
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
    record = _merge_record(folder)
    if record is None:
        raise ValueError(f'{folder} is not a merged checkpoint: its config.json has no "expert_merge". Use load_model.')
    _check_record(folder, record, verify)
    with _readable(folder):
        config = AutoConfig.from_pretrained(folder)
        base = model_class(config)
        loaded, report = _merged_class(base).from_pretrained(
            folder, config=config, dtype=_dtype(dtype), output_loading_info=True, use_safetensors=True
        )
        layers = find_moe_layers(loaded)
        factored = [name for layer in layers for name in layer.projections]
        _check_report(report, folder, expected=factored if record["factored"] else ())
        if record["factored"]:
            with torch.no_grad():
                put_factors(layers, from_saved(load_file(folder / FACTORED)))
    loaded.__class__ = base
    if experts_implementation is not None:
        loaded.set_experts_implementation(experts_implementation)
    return loaded.to(_device(device)).eval()


def _check_record(folder, record, verify):
    if not isinstance(record, dict) or record.get("version") != VERSION or record.get("router") != "mapped":
        raise ValueError(f"{folder} was merged by another version of hcsmoe, or its config.json was changed; merge again.")
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; copy it again, or merge again.")
        if verify and sha256_file(folder / name) != digest:
            raise ValueError(f"{folder / name} was cut short or changed since it was written; copy it again, or merge again.")


def _merged_class(base):
    """``base`` with r experts a layer from the start, so that transformers' own loading fills them."""

    class Merged(base):
        def __init__(self, config):
            super().__init__(config)
            for layer in find_moe_layers(self):
                _make_room(layer, config.expert_merge["layers"].get(layer.name))

    # transformers finds a family's weight conversion and experts implementations by these names.
    Merged.__name__ = Merged.__qualname__ = base.__name__
    Merged.__module__ = base.__module__
    return Merged


def _make_room(layer, record):
    """Give a layer tensors of the recorded shapes, to be filled by loading."""
    if not isinstance(record, dict) or len(record.get("labels", ())) != layer.num_experts:
        raise ValueError(f"config.json maps other experts than {layer.name} has; it was changed.")
    labels, width = record["labels"], record["width"]
    shapes = layer.shapes(max(labels) + 1, width)
    tensors = {name: _room(tensor, shapes[name]) for name, tensor in layer.tensors().items()}
    rows = None
    if record["router_rows"] != len(labels):
        rows = torch.eye(record["router_rows"], len(labels), device="cpu")  # loading is on no device at all
    moe.put_experts(layer, tensors, labels, rows=rows, keep=False)


def _room(tensor, shape):
    """Room for a tensor of another shape, of the same kind (parameter or buffer) and on the same device."""
    room = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(room, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room
