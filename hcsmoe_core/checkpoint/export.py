"""What lies beside the weights of a merged model: configuration, tokenizer, checksums, model card."""

import contextlib
import html
import json
import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from hcsmoe_core import _util, modeling_hcsmoe
from hcsmoe_core._util import require
from hcsmoe_core.plan import odd_widths

MODELING = Path(modeling_hcsmoe.__file__)
CARD = Path(__file__).with_name("card.md")  # Jinja template
CHECKSUMS, CARD_NAME = "SHA256SUMS", "README.md"
# Files that are copied unchanged from the original's folder, if it has them and they are not written anew.
COPIED = """
generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
tokenizer.model vocab.json vocab.txt merges.txt tiktoken.model chat_template.jinja chat_template.json
preprocessor_config.json processor_config.json video_preprocessor_config.json
LICENSE LICENSE.txt LICENSE.md NOTICE
""".split()
# Numbers of layers that predict further tokens (MTP), which transformers neither loads nor writes.
FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
# Keys that no longer hold: weights are dequantised, and classes are those of transformers or ours.
REMOVED = ("quantization_config", "compression_config", "auto_map", "torch_dtype")


def check_inside(folder):
    """Raise InputError if a model folder has links, or names shards, that lead out of it; none of a hub name.

    What it links to would be read, and copied into what is made of it. The hub's cache keeps the files of a
    snapshot in ``blobs`` beside.
    """
    folder = Path(folder).resolve()
    index = _util.read_json(path) if (path := folder / "model.safetensors.index.json").is_file() else {}
    shards = index.get("weight_map") if isinstance(index, dict) else None
    names = {*map(str, shards.values() if isinstance(shards, dict) else ())}
    names |= {path.name for path in (folder.iterdir() if folder.is_dir() else ()) if path.is_symlink()}
    homes = [folder] + [folder.parents[1] / "blobs"] * (folder.parent.name == "snapshots")
    for name in sorted(names):
        target = (folder / name).resolve()
        require(
            any(target.is_relative_to(home) for home in homes),
            f"{folder} has {name!r}, which leads out of it, to {target}; only files inside a model's folder "
            "are read and copied: put the file itself there.",
        )


def copy_along(model, folder):
    """Copy :data:`COPIED` from where a model was loaded, except what is there already.

    Returns that folder, downloaded from the hub if need be, or None if there is none.
    """
    name = str(model.name_or_path)
    source = Path(_util.folder_of(name)) if name else None
    if name and not source.is_dir():
        source = None
        with contextlib.suppress(OSError, ValueError):  # neither a folder nor on the hub or in its cache
            source = Path(snapshot_download(name, allow_patterns=["config.json", *COPIED]))
    if source:
        check_inside(source)  # again: it may have changed since the model was loaded
    for file in COPIED if source else ():
        if (source / file).is_file() and not (folder / file).exists():
            shutil.copyfile(source / file, folder / file)
    return source


def write_config(model, folder, config, more, source=None):
    """Write ``config.json`` of a checkpoint with some configuration, and ``more`` keys, made of ``model``.

    It is the file in ``source``, the original's folder, with what changed, so that engines find their usual
    keys; without one, it is what transformers writes.
    """
    content, path = json.loads(config.to_json_string()), Path(source or folder) / "config.json"
    original = _util.read_json(path) if source and path.is_file() else {}
    if original.get("model_type") == content.get("model_type"):
        before, after = (json.loads(c.to_json_string(use_diff=False)) for c in (model.config, config))
        content = _with_changes(original, before, after, config)
    content["architectures"] = [type(model).__name__]
    for holder in (content, *(value for value in content.values() if isinstance(value, dict))):
        holder.update({name: 0 for name in FURTHER_LAYERS if holder.get(name)})
        for name in REMOVED:
            holder.pop(name, None)
    content["dtype"] = str(model.dtype).removeprefix("torch.")
    _util.write_json(folder / "config.json", content | more)


def _with_changes(original, before, after, config):
    """``original`` with the values in which ``after`` differs from ``before``, under the names it uses."""
    content = dict(original)
    for key in (key for key, value in after.items() if before.get(key) != value):
        names = [*(alias for alias, name in type(config).attribute_map.items() if name == key), key]
        value = after[key]
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            value = _with_changes(content[key], before[key], value, getattr(config, key))
        content |= dict.fromkeys([name for name in names if name in content] or [key], value)
    return content


def write_checksums(folder):
    """Write ``SHA256SUMS`` of all that decides what a folder computes, for ``sha256sum --check`` too."""
    prose = (CHECKSUMS, CARD_NAME, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and file.name not in prose]
    lines = [f"{_util.sha256_file(file)}  {file.name}\n" for file in files]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8")


def check_checksums(folder, weights=True):
    """Compare files with ``SHA256SUMS``; a folder that another program has saved anew has none.

    Raises FileNotFoundError if a file is missing, InputError if one is damaged or changed. Without
    ``weights``, weight files must be there, but are not read.
    """
    folder = Path(folder)
    path = folder / CHECKSUMS
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        digest, _, name = line.partition("  ")
        require(digest and name == Path(name).name != "", f"{path} was cut short or changed: {line[:80]!r}.")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}; copy it again, or merge again.")
        large = name.endswith(".safetensors")
        require(
            (large and not weights) or _util.sha256_file(folder / name) == digest,
            f"{folder / name} was {'cut short or ' * large}changed since it was written; copy it or merge "
            f"again. If you changed it yourself, remove its line from {CHECKSUMS}.",
        )


ROUTERS = {
    "mapped": "kept as it was, with a map from what it chooses to the merged experts",
    "dropped": "the rows of dropped experts are removed",
    "averaged": "one row per group, the mean of its members'",
    "row-kept": "one row per group, that of its dominant expert",
    "folded": "one row per group, fitted to what the calibration tokens were routed to in the group",
}


def write_card(model, folder, plan, written, *, loader, lines=None):
    """Write the model card: what was merged, by which plan, the fidelity measured, how to load it.

    ``written`` is what :func:`hcsmoe_core.checkpoint.save_merged` returns, ``loader`` the class that opens
    the folder, ``lines`` are more rows of the summary, by name.
    """
    name, kind = str(model.name_or_path), type(model).__name__
    local = not name or Path(name).exists() or name in _util.EMBEDDED
    tags = ["mixture-of-experts", "merge", "hcsmoe"]
    data = ModelCardData(library_name="transformers", tags=tags, base_model=None if local else name)
    after, before = zip(*((layer.num_groups, len(layer.labels)) for layer in plan.layers), strict=True)
    summary = {
        "class": kind,
        "method": plan.settings.get("method", "a plan written by hand"),
        "experts per layer": f"{_either(after)} of {_either(before)}, in {len(plan.layers)} MoE layers",
        "width of each expert": _either(layer.width for layer in plan.layers if layer.width),
        "weights": f"{written['parameters']:,} of {written['original']:,}",
        "size": f"{written['bytes'] / 1e9:.4g} GB",
        "router": "; ".join(dict.fromkeys(ROUTERS[layer.router] for layer in plan.layers)),
        "kind": written["router"],
        "calibrated on": calibrated(plan) if plan.statistics else "",
    }
    fidelity = fidelity_text(written["fidelity"]) if written["fidelity"] else "Not measured."
    texts = {
        "title": literal(Path(name).name if local else name),
        "left": "trimmed" if after == before else kept_of(plan),
        "summary": _table([("", ""), *filter(all, summary.items()), *(lines or {}).items()]),
        "settings": {" ".join(key.split()): json.dumps(value) for key, value in plan.settings.items()},
    }
    texts |= {"kind": kind, "loader": loader, "fidelity": fidelity}
    card = ModelCard.from_template(data, CARD, router=written["router"], limits=written["limits"], **texts)
    card.save(folder / CARD_NAME)


def literal(text):
    """Text on one line that Markdown shows as it is: no cells, tags, links or code of its own."""
    return re.sub(r"([\\|`*\[\]])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def _table(rows):
    """A Markdown table of rows of cells, the first of which is its head."""
    head, *lines = (f"| {' | '.join(map(literal, row))} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


def _either(numbers):
    return " or ".join(map(str, sorted(set(numbers))))


def kept_of(plan):
    """What a plan leaves of each layer, in words: the number of experts, and their width if it is another."""
    widths = _either(layer.width for layer in plan.layers if layer.width)
    trimmed = f" of {widths} neurons" if widths else ""
    return f"{_either(layer.num_groups for layer in plan.layers)} experts{trimmed} per layer"


def calibrated(plan):
    """How many tokens a plan's statistics are of, and of which domains if they were told apart."""
    tokens, domains = f"{plan.statistics['tokens']:,} tokens", plan.statistics["domains"]
    return tokens if domains == ["all"] else f"{tokens}; domains: {', '.join(domains)}"


def limits(plan, router, top_k, dtype):
    """What engines ask of a "plain" or "mapped" checkpoint, and what this one meets of it: lines of text."""
    if router != "plain":
        return [
            "Not for vLLM, SGLang or llama.cpp, which know no map from E experts to fewer; vLLM "
            "opens it all the same, and serves noise."
        ]
    if widths := odd_widths(plan, dtype):
        return [
            f"Experts of {widths[0]} neurons are not a multiple of 16 bytes wide, which PyTorch's grouped "
            'products need: load it with experts_implementation="eager", or trim to another width.'
        ]
    count = plan.layers[0].num_groups
    divisors = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
    uneven, fewer = count.bit_count() > 1, top_k is not None and count < top_k
    lines = {
        f"Expert parallelism: {count} experts divide evenly over {divisors} devices and no others.": True,
        "llama.cpp's fastest routing on CUDA needs a power of two; it takes a slower one here.": uneven,
        f"A token goes to all {count} experts rather than to {top_k} as in the original.": fewer,
    }
    return [line for line, applies in lines.items() if applies]


def _number(value):
    return "–" if value is None else f"{value:.4g}"


def fidelity_text(fidelity):
    """What :func:`hcsmoe_core.score.fidelity.fidelity` measured, as Markdown."""
    models, kl = fidelity["models"], "KL divergence from the original (nats per token)"
    rows = [
        ("", "perplexity", kl, "from the exact merge", "same likeliest next token"),
        ("original", _number(fidelity["original"]["perplexity"]), 0, "", ""),
    ]
    for name, scores in models.items():
        numbers = (_number(scores.get(key)) for key in ("perplexity", "kl", "kl_from_mapped"))
        rows.append((name, *numbers, f"{scores['agreement']:.1%}"))
    kinds = {"block": "block_error", "hidden states": "hidden_error"}
    errors = {f"{name}: {kind}": models[name][key] for name in models for kind, key in kinds.items()}
    columns = [fidelity["layers"], *([f"{error:.3g}" for error in column] for column in errors.values())]
    blocks = [
        f"On {fidelity['tokens']:,} tokens that were held out of the calibration:",
        _table(rows),
        "Relative error of each layer's output: of its MoE block alone on the original's inputs, and of the "
        "hidden states that leave the decoder layer, all layers before it merged too.",
        _table([("layer", *errors), *zip(*columns, strict=True)]),
        f"**{fidelity['warning']}**" if fidelity["warning"] else "",
    ]
    return "\n\n".join(filter(None, blocks))
