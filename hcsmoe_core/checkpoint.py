"""Model folders: load a model by name, write a merged one that is really smaller, load it back."""

import json
from pathlib import Path

import torch
from torch import nn

from hcsmoe_core import moe
from hcsmoe_core.demo import models as demo
from hcsmoe_core.files import check_absent, check_choice, new_folder, sha256_file
from hcsmoe_core.merging import apply_plan, check_unmerged, restore
from hcsmoe_core.moe import find_moe_layers
from hcsmoe_core.plan import check_fits

ROUTERS = ("mapped",)
DTYPES = ("auto", "float32", "bfloat16", "float16")
VERSION = 1


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


def load_tokenizer(source):
    """Tokenizer of a folder or hub name, or None if it has none."""
    from transformers import AutoTokenizer

    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        return None
    return AutoTokenizer.from_pretrained(str(source))


def _load_plain(source, shown, *, dtype, device, experts_implementation):
    from transformers import AutoConfig, AutoModelForCausalLM

    extra = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    with _readable(shown):
        AutoConfig.from_pretrained(source)
        loaded, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=_dtype(dtype), output_loading_info=True, use_safetensors=True, **extra
        )
        _check_report(report, shown)
    return loaded.to(_device(device)).eval()


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


def _check_report(report, shown):
    """Refuse a checkpoint of which some weights were missing and would be random."""
    missing = sorted(report["missing_keys"])
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


def save_merged(model, plan, folder, *, router="mapped", tokenizer=None):
    """Write a merged model to a new folder: r experts a layer on disk, in the family's own tensor names.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Merged by this plan, or not merged; it is left as it was.
    plan : Plan
    folder : path
        Must not exist. Holds ``config.json``, ``.safetensors`` files, ``plan.json`` and, where given, the tokenizer.
    router : {"mapped"}
        ``"mapped"`` keeps all E rows of the router and the map from E to r, under ``expert_merge`` in ``config.json``:
        the same function as the live merged model. :func:`load_merged` reads it; stock loaders refuse it.
    tokenizer : transformers.PreTrainedTokenizerBase, optional

    Returns
    -------
    dict
        ``bytes`` of the weight files and ``parameters`` in them.

    Raises
    ------
    FileExistsError
        If the folder exists.
    ValueError
        If the plan does not fit the model, or another plan is applied to it.
    """
    check_choice("router", router, ROUTERS)
    check_absent(folder)
    layers = check_fits(plan, model)
    applied = all(layer.merged for layer in layers)
    if applied:
        if [layer.experts._merged.labels for layer in layers] != [p.labels for p in plan.layers]:
            raise ValueError("Another plan is applied to this model; restore(model) first.")
    else:
        check_unmerged(layers)
        apply_plan(model, plan)
    try:
        with new_folder(folder) as part:
            model.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            plan.save(part / "plan.json")
            files = sorted(part.glob("*.safetensors"))
            _write_record(part, router, plan, files)
            size = sum(file.stat().st_size for file in files)
    finally:
        if not applied:
            restore(model)
    return {"bytes": size, "parameters": _parameters(model, plan)}


def _parameters(model, plan):
    """Parameters of the merged model, tied ones once."""
    merged = {layer.name: layer for layer in plan.layers}
    count = sum(p.numel() for p in model.parameters())
    for layer in find_moe_layers(model):
        if not layer.merged:
            left_out = layer.num_stored - merged[layer.name].num_groups
            count -= sum(t[0].numel() for t in layer.tensors().values()) * left_out
    return count


def _write_record(folder, router, plan, files):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["expert_merge"] = {
        "version": VERSION,
        "router": router,
        "layers": {layer.name: layer.labels for layer in plan.layers},
        "files": {file.name: sha256_file(file) for file in files},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
        Computes what the live merged model computed, to the bit at the same dtype.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or a weight file is missing.
    ValueError
        If it is not a merged checkpoint, or is damaged or changed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    record = _merge_record(folder)
    if record is None:
        raise ValueError(f'{folder} is not a merged checkpoint: its config.json has no "expert_merge". Use load_model.')
    _check_record(folder, record, verify)
    extra = {} if experts_implementation is None else {"experts_implementation": experts_implementation}
    with _readable(folder):
        config = AutoConfig.from_pretrained(folder)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"transformers has no causal language model for its configuration ({type(config).__name__}).")
        base = AutoModelForCausalLM._model_mapping[type(config)]
        loaded, report = _merged_class(base).from_pretrained(
            folder, config=config, dtype=_dtype(dtype), output_loading_info=True, use_safetensors=True, **extra
        )
        _check_report(report, folder)
    loaded.__class__ = base
    return loaded.to(_device(device)).eval()


def _check_record(folder, record, verify):
    if not isinstance(record, dict) or record.get("version") != VERSION or record.get("router") not in ROUTERS:
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
                labels = config.expert_merge["layers"].get(layer.name)
                if labels is None or len(labels) != layer.num_experts:
                    raise ValueError(f"config.json maps other experts than {layer.name} has; it was changed.")
                stored = max(labels) + 1
                tensors = {n: _first_rows(t, stored) for n, t in layer.tensors().items()}
                moe.put_experts(layer, tensors, labels, keep=False)

    # transformers finds a family's weight conversion and experts implementations by these names.
    Merged.__name__ = Merged.__qualname__ = base.__name__
    Merged.__module__ = base.__module__
    return Merged


def _first_rows(tensor, rows):
    """Room for ``rows`` experts, of the same kind (parameter or buffer) and on the same device."""
    room = torch.empty(rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(room, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room
