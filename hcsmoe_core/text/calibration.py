"""Calibration tokens: packed blocks of token ids, from data sets, files or a model's own text."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import EMBEDDED, InputError, Table, check_count, require
from hcsmoe_core.text.own_text import NAME, is_own, own_text, writing_of

SOURCES = Table("source")  # name -> Source; a floor above may add its own
PAPER_SHAPE = (32, 2048)  # sequences and their length in HC-SMoE
DOCUMENTS_PER_BLOCK = 16  # the paper's recipe takes 512 documents for its 32 blocks
PIECE, SEAM = 1 << 16, 1024  # characters read of a document at first; tokens that the rest may change
DOCUMENTS_PER_BATCH = 1000  # documents are joined within batches; what is left over of a batch is dropped
_WEIGHTED = re.compile(r"\s*(?:(\d+\.?\d*(?:e-?\d+)?|\.\d+(?:e-?\d+)?)\*)?\s*([^*]*[^*\s])\s*")  # weight*name
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON may have one that is no character
TEXT_SUFFIXES = (".txt", ".json", ".jsonl")
IDS_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Source:
    """A calibration source that is known by name.

    Attributes
    ----------
    read : callable ``(name, *, sequences, length, **arguments)``
        Gives the token ids, a ``(sequences, length)`` int64 tensor. ``name`` is the source as it was written,
        with what follows a colon; the other arguments of :func:`calibration_tokens` are passed by keyword.
    domains : callable ``(name)``, optional
        Gives the domains that the blocks take in turn; a source without it is one domain.
    shape : (int, int)
        Default number and length of sequences.
    heldout : str, optional
        Split that scores are measured on, where the source has one.
    uncounted : tuple of str
        Domains that are left out of the mean loss.
    """

    read: Callable
    domains: Callable | None = None
    shape: tuple[int, int] = PAPER_SHAPE
    heldout: str | None = None
    uncounted: tuple[str, ...] = ()


def calibration_tokens(
    source: str | Path,
    tokenizer: Any = None,
    *,
    model: Any = None,
    sequences: int = PAPER_SHAPE[0],
    length: int = PAPER_SHAPE[1],
    seed: int = 42,
    column: str = "text",
    split: str | None = None,
    folder: str | Path | None = "runs/own-text",
) -> torch.Tensor:
    """Blocks of token ids to calibrate on.

    Parameters
    ----------
    source : str or path
        - ``"c4"``: the paper's recipe (HC-SMoE, arXiv 2410.08589, section 4.1): documents of the first C4
          shard in random order, encoded with the tokenizer's own special tokens, joined and cut into blocks;
        - ``"wikitext"`` (articles of WikiText-2), ``"math"`` and ``"code"`` (as in REAP, arXiv 2510.13999);
        - ``"demo"``: the embedded corpus, its domains in turn, or some of them: ``"demo:code,prose"``;
        - ``"self"``: text that ``model`` writes; see :func:`own_text`: ``"self:temperature=1:start=chat"``;
        - a ``.txt``, ``.jsonl`` or ``.json`` file (text under ``column``), a folder of such files, or a
          ``.safetensors`` file of ``input_ids [N, S]``; a bare name of a folder is written ``"./name"``;
        - a data set on the Hugging Face hub: ``"name:configuration:split:column,column"``, where all but the
          name may be left out. A column holds text or a list of messages;
        - a mixture such as ``"0.5*c4+0.25*math+0.25*code"``: sequences are shared out by largest remainder,
          at least one each; each part is a domain.
    sequences, length : int
        N and S: number of blocks, and tokens per block.
    seed : int
        Seed of the order of documents, and of what a model writes.
    split : str, optional
        Split of a data set (``"train"``) or of the embedded corpus (``"calibration"``), if not the default.
    folder : str or path, optional
        Cache of the model's own text; None writes none.

    Raises
    ------
    FileNotFoundError
        If the source is neither a file nor an available data set.
    InputError
        If it has too few tokens, is ambiguous or malformed, or lacks the tokenizer or model that it needs.
    """
    check_count("sequences", sequences, 1)
    check_count("length", length, 1)
    parts = _parts(source, sequences)
    _check_parts([name for name, _ in parts], tokenizer, model)
    arguments = dict(
        length=length, seed=seed, column=column, split=split, folder=folder, tokenizer=tokenizer, model=model
    )
    return torch.cat([_entry(name).read(name, sequences=count, **arguments) for name, count in parts])


def calibration_settings(model, calibration: str = "", sequences: int = 0, length: int = 0) -> dict:
    """Calibration settings, with the defaults of the model for those that are empty or 0.

    Embedded models are calibrated on the embedded corpus, others as in the paper on 32 × 2,048 tokens of C4.
    Where an embedded model writes text itself there are 288 × 256 tokens, as it was trained on 256 at a time.

    Returns
    -------
    dict
        ``calibration``, ``sequences`` and ``length``.
    """
    embedded = str(model) in EMBEDDED
    calibration = str(calibration or ("demo" if embedded else "c4"))
    trained = embedded and own_sequences(calibration, 288)
    shape = (288, 256) if trained else _common_entry(calibration).shape
    return {"calibration": calibration, "sequences": sequences or shape[0], "length": length or shape[1]}


def domains_of(source: str | Path, sequences: int) -> list[str] | None:
    """Domain of each block of :func:`calibration_tokens`, or None if the source has no domains.

    The parts of a mixture are domains: ``"c4"``, or the last component of the name of a file or data set.
    """
    parts = _parts(source, sequences)
    of_parts = [labels[i % len(labels)] for name, n in parts for labels in [_labels(name)] for i in range(n)]
    return of_parts if len(parts) > 1 or _entry(parts[0][0]).domains else None


def scoring_of(source: str | Path) -> tuple[str | None, tuple[str, ...]]:
    """Split of a source that scores are measured on, and its domains that are left out of the mean loss."""
    entry = _common_entry(source)
    return entry.heldout, entry.uncounted


def local_files(source: str | Path) -> list[Path]:
    """Local files that a source reads: those of all parts of a mixture, and those in folders."""
    return [file for name, _ in _weights(source) if _entry(name) is _FILE for file in _files(name)]


def is_path(name: str) -> bool:
    """Whether a source is a path: it looks like one; ``owner/name`` is a data set unless it exists here."""
    path = Path(name).expanduser()
    explicit = name.startswith((".", "~")) or path.is_absolute()
    return explicit or path.suffix in (*TEXT_SUFFIXES, IDS_SUFFIX) or (len(path.parts) > 1 and path.exists())


def own_sequences(source: str | Path, sequences: int) -> int:
    """Number of sequences that the model writes itself; it writes whole batches."""
    own = [(name, count) for name, count in _parts(source, sequences) if is_own(name)]
    return sum(count + -count % writing_of(name).batch for name, count in own)


def _weights(source):
    """Parts of a source and their weights; a source that is no mixture is one part."""
    source = f"./{source}" if isinstance(source, Path) and not source.is_absolute() else str(source)
    if Path(source).exists() or not set("+*") & set(source):
        return [(source, 1.0)]
    parts = []
    for part in source.split("+"):
        match = _WEIGHTED.fullmatch(part)
        require(
            match and float(match[1] or 1),
            f'The "source" argument is the mixture {source!r}, of which {part.strip()!r} is no part: write '
            "weight*name with a positive weight, as in 0.5*c4+0.5*math.",
        )
        parts.append((match[2], float(match[1] or 1)))
    labels = [label for name, _ in parts for label in _labels(name)]
    require(
        len(labels) == len(set(labels)),
        f'The "source" argument is the mixture {source!r}, of which two domains are called '
        f"{max(labels, key=labels.count)!r}.",
    )
    return parts


def _parts(source, sequences):
    """Parts of a source and the number of sequences of each."""
    parts = _weights(source)
    require(
        len(parts) <= sequences,
        f"{sequences} sequences are too few for the {len(parts)} parts of {source}; ask for more.",
    )
    total = sum(weight for _, weight in parts)
    exact = [sequences * weight / total for _, weight in parts]
    counts = [max(1, int(share)) for share in exact]
    while sum(counts) != sequences:  # the part furthest from its share gets one, or gives one of several
        step = 1 if sum(counts) < sequences else -1
        able = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(able, key=lambda i: step * (exact[i] - counts[i]))] += step
    return [(name, count) for (name, _), count in zip(parts, counts, strict=True)]


def _entry(name):
    """Entry of a part: of :data:`SOURCES`, or that of all files, or that of all other data sets.

    A bare name of a data set must not be that of a file or folder here.
    """
    entry = dict(SOURCES).get(name.partition(":")[0], _DATASET)
    entry = _FILE if entry is _DATASET and is_path(name) else entry
    require(
        entry is not _DATASET or not Path(name).exists(),
        f'The "source" argument names {name!r}, which is a file or folder here and may be a data set: write '
        f'"./{name}" for the one here, or "{name}:" for the data set.',
    )
    return entry


def _common_entry(source):
    """Entry of all parts of a source, or that of data sets if the parts differ."""
    entries = {_entry(name) for name, _ in _weights(source)}
    return entries.pop() if len(entries) == 1 else _DATASET


def _labels(name):
    """Domains of a part."""
    entry = _entry(name)
    label = Path(name).stem if entry is _FILE else name.partition(":")[0].rpartition("/")[2]
    return entry.domains(name) if entry.domains else (label,)


def _check_parts(names, tokenizer, model):
    """Raise InputError if parts are malformed or lack what they need, before the first is read."""
    own = [writing_of(name) for name in names if is_own(name)]
    require(
        not own or model is not None,
        f'Source "{NAME}" is text that the model writes itself; give it as the "model" argument.',
    )
    text = next((name for name in names if not (is_own(name) or name.endswith(IDS_SUFFIX))), None)
    require(
        text is None or tokenizer is not None,
        f"Source {text!r} is text, and the model has no tokenizer; give one, or a .safetensors file of "
        f"input_ids, or let the model write token ids itself (--calibration {NAME}).",
    )


def _packed(name, documents, text_of=str, *, tokenizer, sequences, length, seed, limit=None, **_):
    """Encode documents in random order, join those of each batch and cut them into blocks."""
    order = np.random.default_rng(seed).permutation(len(documents))[:limit].tolist()
    encoded = (_token_ids(text_of(documents[index]), tokenizer) for index in order)
    streams = (
        itertools.chain.from_iterable(itertools.islice(encoded, DOCUMENTS_PER_BATCH))
        for _ in range(0, len(order), DOCUMENTS_PER_BATCH)
    )
    whole = (block for stream in streams for block in zip(*[stream] * length, strict=False))
    bar = dict(desc="calibration tokens", total=sequences, unit="block", disable=None, leave=False)
    blocks = list(tqdm(itertools.islice(whole, sequences), **bar))
    require(
        len(blocks) == sequences,
        f"{name} gives {len(blocks)} blocks of {length} tokens from {len(order)} documents, but {sequences} "
        "were asked for; ask for fewer or shorter sequences, or give more text.",
    )
    return torch.tensor(blocks, dtype=torch.int64)


def _token_ids(text, tokenizer):
    """Token ids of a document, one by one; of a long one no more is read than is asked for.

    Its beginning is encoded, then one four times as long, up to a space or line break. The last tokens of a
    beginning are left out, because what follows may change them.
    """
    size, given = PIECE, 0
    while size < len(text):
        cut = max(text.rfind(space, 0, size) for space in " \n")
        ids = tokenizer(text[: cut if cut > 0 else size], verbose=False)["input_ids"][:-SEAM]
        yield from ids[given:]
        size, given = 4 * size, max(given, len(ids))
    yield from tokenizer(text, verbose=False)["input_ids"][given:]


def _files(name):
    """Files of a path: the text files in a folder, or the file itself; none if it does not exist."""
    path = Path(name).expanduser()
    files = path.iterdir() if path.is_dir() else ()
    texts = sorted(file for file in files if file.suffix in TEXT_SUFFIXES and file.is_file())
    return texts or [path] * path.is_file()


def _from_path(name, *, column, **arguments):
    files = _files(name)
    if not files:
        raise FileNotFoundError(
            f"There is no file {name}, nor a folder of that name with {', '.join(TEXT_SUFFIXES)}."
        )
    if files[0].suffix == IDS_SUFFIX:
        return _from_ids(files[0], **arguments)
    return _packed(name, [text for file in files for text in _documents(file, column)], **arguments)


def _from_ids(path, *, sequences, length, **_):
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise InputError(f"{path} is not a readable .safetensors file ({error}).") from None
    ids = tensors.get("input_ids")
    require(
        ids is not None and ids.ndim == 2 and not ids.is_floating_point(),
        f'{path} must hold whole numbers under the key "input_ids" with shape [N, S]; it has '
        f"{list(tensors)}.",
    )
    require(
        len(ids) >= sequences and ids.shape[1] >= length,
        f"{path} holds {ids.shape[0]} sequences of {ids.shape[1]} tokens, but {sequences} of {length} were "
        "asked for.",
    )
    return ids[:sequences, :length].to(torch.int64).contiguous()


def _documents(file, column):
    """Documents of a text file, or of a JSON file of strings or of objects with text under ``column``."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix not in (".json", ".jsonl"):
            return [text]
        whole = file.suffix == ".json" and text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        kind = "UTF-8 text" if isinstance(error, UnicodeDecodeError) else "JSON"
        raise InputError(f"{file} is not readable {kind} ({error}).") from None
    documents = [row.get(column) if isinstance(row, dict) else row for row in rows]
    require(
        all(isinstance(document, str) for document in documents),
        f'{file} has an entry without text under "{column}"; give the key with the "column" argument.',
    )
    broken = next((i for i, document in enumerate(documents, 1) if _SURROGATE.search(document)), None)
    require(broken is None, f"Entry {broken} of {file} has half a character (a lone surrogate); remove it.")
    return documents


# Data sets by name: arguments of datasets.load_dataset, and the columns that make a document.
_DATASETS = {
    "c4": ({"path": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz"}, ("text",)),
    "wikitext": ({"path": "EleutherAI/wikitext_document_level", "name": "wikitext-2-raw-v1"}, ("page",)),
    "math": ({"path": "allenai/tulu-3-sft-personas-math"}, ("messages",)),
    "code": ({"path": "theblackcat102/evol-codealpaca-v1"}, ("instruction", "output")),
}


def _from_dataset(name, *, column, split, sequences, **arguments):
    import datasets

    known = name.rstrip(":")
    path, configuration, own_split, listed = (name.split(":", 3) + [""] * 3)[:4]
    other = {"path": path, "name": configuration or None}, (listed or column).split(",")
    options, columns = _DATASETS.get(known, other)
    formats = datasets.packaged_modules._PACKAGED_DATASETS_MODULES  # these read any file in this folder
    require(path not in formats, f'The "source" argument is {name!r}, a format; give a file or a data set.')
    try:
        rows = datasets.load_dataset(**options, split=own_split or split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(
            f"Cannot load calibration data {name!r}: no such file here, and the Hugging Face hub or the "
            f"datasets cache ({datasets.config.HF_DATASETS_CACHE}) did not give {options['path']} "
            f"({str(error).strip().splitlines()[0]}). Give a .txt, .json, .jsonl or .safetensors file, or "
            f"one of {', '.join(SOURCES)}: the model can write the text itself, which needs no data "
            f"(--calibration {NAME})."
        ) from None
    absent = next((column for column in columns if column not in rows.column_names), None)
    require(
        absent is None,
        f'{name} has no column "{absent}" but {", ".join(rows.column_names)}; give the "column" argument, '
        "or name:configuration:split:column.",
    )
    arguments |= {"sequences": sequences, "limit": DOCUMENTS_PER_BLOCK * sequences if known == "c4" else None}
    return _packed(name, rows.select_columns(list(columns)), partial(_text, name), **arguments)


def _text(name, row):
    """Text of a row, whose columns hold text or messages."""
    texts = []
    for column, value in row.items():
        messages = value if isinstance(value, list) else [{"content": value}]
        texts += [message.get("content") if isinstance(message, dict) else None for message in messages]
        require(
            all(isinstance(text, str) for text in texts),
            f'Column "{column}" of {name} holds neither text nor messages, but {type(value).__name__}.',
        )
    return "\n".join(texts)


def _from_model(name, *, model, tokenizer, column, split, **arguments):
    return own_text(model, tokenizer, **arguments, **asdict(writing_of(name)))


_FILE, _DATASET = Source(_from_path), Source(_from_dataset)
for _name in _DATASETS:
    SOURCES[_name] = _DATASET
SOURCES[NAME] = Source(_from_model)
