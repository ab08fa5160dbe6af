"""What lies beside the weights in a merged model's folder: configuration, tokenizer, licence, checksums and a model card."""

import copy
import json
import shutil
import textwrap
from pathlib import Path

from hcsmoe_core import modeling_hcsmoe
from hcsmoe_core._util import EMBEDDED, InputError, folder_of, replacing, sha256_file, write_json
from hcsmoe_core.plan import odd_widths

MODELING = Path(modeling_hcsmoe.__file__)


CHECKSUMS = "SHA256SUMS"


CARD = "README.md"


# Files that go along unchanged from the original's folder, where it has them and they are not written anew.
ALONG = (
    "generation_config.json",
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "tokenizer.model",
    ),
    *("vocab.json", "vocab.txt", "merges.txt", "tiktoken.model", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)


# Names for layers that predict further tokens (MTP): transformers does not load them, so that they are not written either.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


# Of a configuration: weights are dequantised by now, and remote code is neither run nor copied.
GONE = ("quantization_config", "compression_config", "auto_map", "torch_dtype")


def source_of_files(model):
    """Folder that a model was loaded from, of a model on the hub with what goes along; None if there is none."""
    from huggingface_hub import snapshot_download

    name = str(model.name_or_path)
    source = Path(folder_of(name))
    if not name or source.is_dir():
        return source if name else None
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", *ALONG]))
    except (OSError, ValueError):  # neither a folder nor a name that the hub or its cache has
        return None


def copy_along(source, folder):
    """Copy :data:`ALONG` from the original's folder, but for what is there already."""
    for name in ALONG if source is not None else ():
        if (source / name).is_file() and not (folder / name).exists():
            shutil.copyfile(source / name, folder / name)


def write_config(model, folder, config, more, source=None):
    """Write ``config.json``: the original's own with what has to be otherwise, so that engines find their usual keys.

    Without the original's folder it is what transformers writes.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    folder : path
    config : transformers.PreTrainedConfig
        What the checkpoint's is to be.
    more : dict
        Keys beyond it.
    source : path, optional
        The original's folder.
    """
    after = json.loads(config.to_json_string(use_diff=False))
    made = json.loads(config.to_json_string())
    if source is not None and (source / "config.json").is_file():
        original = json.loads((source / "config.json").read_text(encoding="utf-8"))
        if original.get("model_type") == made.get("model_type"):
            before = json.loads(model.config.to_json_string(use_diff=False))
            made = _carried(original, before, after, config)
    made["architectures"] = [type(model).__name__]
    for part in (made, *(value for value in made.values() if isinstance(value, dict))):
        part.update({name: 0 for name in FURTHER_LAYERS if part.get(name)})
        for name in GONE:
            part.pop(name, None)
    made["dtype"] = str(model.dtype).removeprefix("torch.")
    write_json(folder / "config.json", made | more)


def _carried(original, before, after, config):
    """``original`` with every value that differs between ``before`` and ``after``, under the name that it has there."""
    made = copy.deepcopy(original)
    for key, value in after.items():
        if before.get(key) == value:
            continue
        if isinstance(value, dict) and isinstance(made.get(key), dict):
            made[key] = _carried(made[key], before[key], value, getattr(config, key))
            continue
        aliases = [alias for alias, name in type(config).attribute_map.items() if name == key]
        made |= dict.fromkeys([n for n in aliases if n in made] or [key], value)
        if key in made:
            made[key] = value
    return made


def write_checksums(folder):
    """Write ``SHA256SUMS`` of the weight files, which ``sha256sum --check`` reads too."""
    with replacing(folder / CHECKSUMS) as part:
        lines = [f"{sha256_file(file)}  {file.name}\n" for file in sorted(folder.glob("*.safetensors"))]
        part.write_text("".join(lines), encoding="utf-8")


def check_checksums(folder, verify=True):
    """Compare weight files with ``SHA256SUMS``; a folder that something else has saved anew has none.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If one is damaged or changed.
    """
    listed = folder / CHECKSUMS
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else ():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; copy it again, or merge again.")
        if verify and sha256_file(folder / name) != digest:
            raise InputError(
                f"{folder / name} was cut short or changed since it was written; copy it again, or merge again."
            )


LOADING = {
    "plain": """
        It is a plain checkpoint of the original family with other numbers in its configuration; no code of hcsmoe is needed:

            from transformers import {auto}
            model = {auto}.from_pretrained("path/to/this/folder")
        """,
    "mapped": """
        What each layer has stands in `config.json` under `expert_merge`; where the router keeps its rows for all original
        experts, with the map to the merged ones: exact, but not what engines for the original family expect. With hcsmoe:

            from hcsmoe_core import load_merged
            model = load_merged("path/to/this/folder")

        Without, by the small file `modeling_hcsmoe.py` in this folder, which needs torch and transformers alone:

            from transformers import {auto}
            model = {auto}.from_pretrained("path/to/this/folder", trust_remote_code=True)
        """,
    "factored": """
        Experts are written as factors, which only hcsmoe multiplies out:

            from hcsmoe_core import load_merged
            model = load_merged("path/to/this/folder")
        """,
}


ROUTERS = {
    "mapped": "kept as it was, with a map from what it chooses to the merged experts",
    "dropped": "the rows of dropped experts are gone",
    "averaged": "one row a group, the mean of its members'",
    "row-kept": "one row a group, that of its dominant expert",
    "folded": "one row a group, fitted to what the calibration tokens were routed to in the group",
}


def write_card(model, folder, plan, *, kind, opener, sizes, limits, fidelity=None, about=None):
    """Write a model card: what was merged, by which plan, the fidelity measured, how to load it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The original.
    folder : path
    plan : Plan
    kind : {"plain", "mapped", "factored"}
    opener : str
        The auto class of transformers that opens it.
    sizes : dict
        ``before`` and ``after``, in weights, and ``bytes``.
    limits : list of str
        Of :func:`limits`.
    fidelity : dict, optional
        Of :func:`hcsmoe_core.score.fidelity.fidelity`.
    about : dict, optional
        More lines of the summary by name, such as where the calibration tokens came from.
    """
    local = not model.name_or_path or Path(model.name_or_path).exists() or model.name_or_path in EMBEDDED
    shown = Path(model.name_or_path).name if local else model.name_or_path
    head = ["---", "library_name: transformers", "tags:", "- mixture-of-experts", "- merge", "- hcsmoe"]
    head += [] if local else [f"base_model: {shown}"]
    rows = _summary(model, plan, kind, sizes) | (about or {})
    blocks = [
        "\n".join([*head, "---"]),
        f"# {shown or type(model).__name__}, {kept_of(plan) if _fewer(plan) else 'trimmed'}",
        f"Made by hcsmoe of {shown or 'a model in memory'}, without retraining. The licence of the original applies.",
        "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]),
        "## Loading",
        textwrap.dedent(LOADING[kind]).strip().format(auto=opener),
        "## Limits for engines",
        "\n".join(f"- {line}" for line in limits),
        "## Fidelity",
        fidelity_text(fidelity) if fidelity else "Not measured.",
        "## Plan",
        "`plan.json` says which experts were joined or dropped in each layer. Its settings:",
        "\n".join(f"    {key}: {json.dumps(value)}" for key, value in plan.settings.items()),
    ]
    with replacing(folder / CARD) as part:
        part.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def _fewer(plan):
    """Whether any layer has fewer experts than before, or else the same of another width."""
    return any(layer.num_groups < len(layer.labels) for layer in plan.layers)


def kept_of(plan):
    """What a plan leaves of each layer, in words: so many experts, and their width where it is another."""
    widths = " or ".join(map(str, sorted({layer.width for layer in plan.layers if layer.width})))
    return f"{counts(plan)} experts{f' of {widths} neurons' if widths else ''} a layer"


def counts(plan):
    """How many experts a plan leaves in each layer, in words."""
    return " or ".join(map(str, sorted({layer.num_groups for layer in plan.layers})))


def _summary(model, plan, kind, sizes):
    rules = dict.fromkeys(ROUTERS[layer.router] for layer in plan.layers)
    before = " or ".join(map(str, sorted({len(layer.labels) for layer in plan.layers})))
    widths = {layer.width for layer in plan.layers if layer.width}
    rows = {
        "class": type(model).__name__,
        "method": plan.settings.get("method", "a plan written by hand"),
        "experts a layer": f"{counts(plan)} of {before}, in {len(plan.layers)} MoE layers",
        **({"width of each expert": " or ".join(map(str, sorted(widths)))} if widths else {}),
        "weights": f"{sizes['after']:,} of {sizes['before']:,}",
        "size": f"{sizes['bytes'] / 1e9:.4g} GB",
        "router": "; ".join(rules),
        "kind": kind,
    }
    if plan.statistics:
        rows["calibrated on"] = calibrated(plan)
    return rows


def calibrated(plan):
    """How many tokens a plan's statistics are of, and of which domains, if they were told apart."""
    tokens, domains = f"{plan.statistics['tokens']:,} tokens", plan.statistics["domains"]
    return tokens if domains == ["all"] else f"{tokens}; domains: {', '.join(domains)}"


def limits(plan, kind, top_k, dtype):
    """What engines ask of a checkpoint's number of experts, and what of it this one meets; lines of text."""
    if (odd := odd_widths(plan, dtype)) and kind == "plain":
        return [
            f"Experts of {odd[0]} neurons are not a multiple of 16 bytes wide, which PyTorch's grouped products want: load it "
            'with experts_implementation="eager", or trim to another width.'
        ]
    if kind != "plain":
        return [
            "vLLM, SGLang and llama.cpp do not open it: they know no map from a router's choice to fewer experts."
        ]
    (count,) = {layer.num_groups for layer in plan.layers}
    sizes = [n for n in range(1, count + 1) if count % n == 0]
    lines = [
        f"Expert parallelism: {count} experts divide evenly over {', '.join(map(str, sizes))} devices and no others."
    ]
    if count & (count - 1):
        lines.append(
            "llama.cpp's fastest routing on CUDA wants a power of two; with other numbers it takes a slower one."
        )
    if top_k is not None and count < top_k:
        lines.append(
            f"A token goes to all {count} experts, as there are no more, rather than to {top_k} as in the original."
        )
    return lines


def _number(value):
    return "–" if value is None else f"{value:.4g}"


def fidelity_text(fidelity):
    """What :func:`hcsmoe_core.score.fidelity.fidelity` measured, as Markdown."""
    lines = [
        f"On {fidelity['tokens']:,} tokens that were held out of the calibration:",
        "",
        "| | perplexity | KL divergence from the original (nats a token) | from the exact merge | same likeliest next token |",
        "|---|---|---|---|---|",
        f"| original | {_number(fidelity['original']['perplexity'])} | 0 | | |",
    ]
    for name, found in fidelity["models"].items():
        shares = [_number(found.get(key)) for key in ("perplexity", "kl", "kl_from_mapped")]
        lines.append(f"| {name} | {' | '.join(shares)} | {found['agreement']:.1%} |")
    models = list(fidelity["models"])
    lines += [
        "",
        "Relative error of each layer's output: of its MoE block alone on the original's inputs, and of the hidden ",
    ]
    lines[-1] += "states that leave the decoder layer, all layers before it merged too."
    lines += ["", "| layer | " + " | ".join(f"{m}: block | {m}: hidden states" for m in models) + " |"]
    lines.append("|---" * (1 + 2 * len(models)) + "|")
    for place, name in enumerate(fidelity["layers"]):
        numbers = [
            fidelity["models"][m][key][place] for m in models for key in ("block_error", "hidden_error")
        ]
        lines.append(f"| {name} | " + " | ".join(f"{n:.3g}" for n in numbers) + " |")
    if fidelity["warning"]:
        lines += ["", f"**{fidelity['warning']}**"]
    return "\n".join(lines)
