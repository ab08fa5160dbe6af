"""Calibration tokens: packed blocks of token ids, without padding, from data sets, files, the embedded corpus or the model."""

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import InputError, check_choice, check_count
from hcsmoe_core.demo import corpus
from hcsmoe_core.text.own_text import NAME, is_own, own_text, writing_of

# Data sets by name: what datasets.load_dataset is given, and the columns that make a document, joined by newlines.
NAMED = {
    "c4": ({"path": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz"}, ("text",)),
    "wikitext": ({"path": "EleutherAI/wikitext_document_level", "name": "wikitext-2-raw-v1"}, ("page",)),
    "math": ({"path": "allenai/tulu-3-sft-personas-math"}, ("messages",)),
    "code": ({"path": "theblackcat102/evol-codealpaca-v1"}, ("instruction", "output")),
}


DOCUMENTS_PER_BLOCK = 16  # of the paper's recipe: 512 documents for its 32 blocks


DOCUMENTS_PER_BATCH = (
    1000  # documents are joined within batches of so many; what is left of a batch is dropped
)


SPLITS = corpus.SPLITS


def calibration_tokens(
    source,
    tokenizer=None,
    *,
    model=None,
    sequences=32,
    length=2048,
    seed=42,
    column="text",
    split=None,
    folder="runs/own-text",
):
    """Blocks of token ids to calibrate on.

    Parameters
    ----------
    source : str or path
        - ``"c4"``: the paper's recipe (HC-SMoE, arXiv 2410.08589, section 4.1): documents of the first C4 training shard
          in the order of a permutation seeded with ``seed``, encoded one by one with the tokenizer's own special
          tokens, joined and cut into blocks;
        - ``"wikitext"``: the articles of WikiText-2 that the harness' ``wikitext`` task is made of
          (``EleutherAI/wikitext_document_level``); ``"math"``: problems with solutions
          (``allenai/tulu-3-sft-personas-math``); ``"code"``: instructions with programs
          (``theblackcat102/evol-codealpaca-v1``), the last two as REAP (arXiv 2510.13999) calibrates on them;
        - ``"demo"``: the embedded corpus, one domain a sequence, all in turn; see :func:`domains_of`; or of some of its
          domains only, ``"demo:code,prose"``;
        - ``"self"``: text that ``model`` writes itself; no data and no tokenizer are needed. Settings of
          :func:`hcsmoe_core.text.own_text.own_text` follow after colons, as in ``"self:temperature=1:start=chat"``;
        - a ``.txt`` file (one document), ``.jsonl`` or ``.json`` file (one document an object, under ``column``), or a
          folder of such files;
        - a ``.safetensors`` file with the ids themselves under ``input_ids [N, S]``; no tokenizer is needed;
        - any other name: a data set on the Hugging Face hub, ``"name"``, ``"name:configuration"``,
          ``"name:configuration:split"`` or ``"name:configuration:split:column,column"``, of which all but the name may be
          empty. A column may hold text, or a conversation as a list of messages;
        - a mixture of those, such as ``"0.5*c4+0.25*math+0.25*code"`` or ``"c4+notes.txt"`` (alike): each part gives its
          share of the sequences, by largest remainder and at least one, in the order of the parts, and is a domain.
    tokenizer : transformers.PreTrainedTokenizerBase
    model : transformers.PreTrainedModel, optional
        That writes its own text, where the source asks for it.
    sequences, length : int
        N and S, blocks and tokens in each.
    seed : int
        Of the order in which documents are taken, and of what a model writes.
    column : str
        Column or key of the text, where the source does not say it.
    split : str, optional
        Of a data set that does not say it, by default ``"train"``; of the embedded corpus ``"calibration"`` (default),
        ``"train"`` or ``"heldout"``.
    folder : str or path, optional
        Where a model's own text is kept, for the next who asks; None keeps none.

    Returns
    -------
    (sequences, length) int64 tensor

    Raises
    ------
    FileNotFoundError
        If the source is no file here and no data set to be had.
    ValueError
        If it yields fewer tokens than asked for, a mixture is not one, or no tokenizer or model is given where one is needed.
    """
    check_count("sequences", sequences, 1)
    check_count("length", length, 1)
    how = dict(length=length, seed=seed, column=column, split=split)
    parts = _parts(source, sequences)
    own = {
        name: _writing(name, model) for name, _ in parts if is_own(name)
    }  # what is wrong is said before the work begins
    written = dict(tokenizer=tokenizer, length=length, seed=seed, folder=folder)
    blocks = [
        own_text(model, sequences=count, **written, **own[name])
        if name in own
        else _blocks(name, tokenizer, sequences=count, **how)
        for name, count in parts
    ]
    return torch.cat(blocks)


def _writing(source, model):
    """Settings of a source that is the model's own text."""
    settings = asdict(writing_of(source))
    if model is None:
        raise InputError(
            f'Source {source!r} is text that the model writes itself; give it as the "model" argument.'
        )
    return settings


def domains_of(source, sequences):
    """Domain of each of the blocks that :func:`calibration_tokens` makes, or None if the source has no domains.

    The embedded corpus has the domains of its sequences, and a mixture those of its parts: ``"c4"``, or the last component
    of a file's or a data set's name.
    """
    parts = _parts(source, sequences)
    if len(parts) == 1 and not is_demo(parts[0][0]):
        return None
    return [domain for name, count in parts for domain in _domains_of_part(name, count)]


def local_files(source):
    """Files here that a source reads, those of all parts of a mixture and in folders."""
    found = []
    for name, _ in _weights(source):
        path = Path(name)
        found += [path] if path.is_file() else _text_files(path) if path.is_dir() else []
    return found


def own_sequences(source, sequences):
    """How many of the sequences the model writes itself; it does so in whole batches."""
    own = [(count, writing_of(name).batch) for name, count in _parts(source, sequences) if is_own(name)]
    return sum(-(-count // batch) * batch for count, batch in own)


def _domains_of_part(name, count):
    if is_demo(name):
        chosen = _corpus_domains(name)
        return [chosen[i % len(chosen)] for i in range(count)]
    return [_label(name)] * count


def is_demo(source):
    """Whether a source is the embedded corpus, or some of its domains."""
    return str(source).partition(":")[0] == "demo"


def _corpus_domains(source):
    """Domains of the embedded corpus that a source asks for."""
    names = [name.strip() for name in source.partition(":")[2].split(",") if name.strip()]
    for name in names:
        check_choice("source", name, corpus.DOMAINS)
    return tuple(names) or corpus.DOMAINS


def _label(name):
    return Path(name).stem if Path(name).exists() else name.partition(":")[0].rpartition("/")[2]


def _weights(source):
    """Parts of a source and their weights; what is no mixture is one part."""
    source = str(source)
    if Path(source).exists() or not set("+*") & set(source):
        return [(source, 1.0)]
    found = []
    for part in source.split("+"):
        weight, star, name = part.strip().rpartition("*")
        try:
            value = float(weight) if star else 1.0
        except ValueError:
            value = 0.0
        if not (0 < value < math.inf and name.strip()):
            raise InputError(
                f'The "source" argument is the mixture {source!r}, of which {part!r} is no part: write weight*name with a '
                "positive weight, as in 0.5*c4+0.5*math."
            )
        found.append((name.strip(), value))
    labels = [
        label for name, _ in found for label in (_corpus_domains(name) if is_demo(name) else [_label(name)])
    ]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise InputError(
            f'The "source" argument is the mixture {source!r}, of which two domains are called {twice[0]!r}.'
        )
    return found


def _parts(source, sequences):
    """Parts of a source and the number of sequences of each."""
    found = _weights(source)
    if len(found) > sequences:
        raise InputError(
            f"{sequences} sequences are too few for the {len(found)} parts of {source}; ask for more."
        )
    total = sum(weight for _, weight in found)
    exact = [sequences * weight / total for _, weight in found]
    counts = [max(1, int(share)) for share in exact]
    while (
        sum(counts) != sequences
    ):  # the part that is furthest from its share gets one, or gives one of several
        step = 1 if sum(counts) < sequences else -1
        free = [i for i, count in enumerate(counts) if count + step >= 1]
        counts[max(free, key=lambda i: step * (exact[i] - counts[i]))] += step
    return [(name, count) for (name, _), count in zip(found, counts, strict=True)]


def _blocks(source, tokenizer, *, sequences, length, seed, column, split):
    """Blocks of one part."""
    path = Path(source)
    if path.suffix == ".safetensors":
        return _from_ids(path, sequences, length)
    if tokenizer is None:
        raise InputError(
            f"Source {str(source)!r} is text, and the model has no tokenizer; give one, a .safetensors file of input_ids, or "
            f"let the model write ids itself (--calibration {NAME})."
        )
    if is_demo(source):
        return _from_corpus(source, tokenizer, sequences, length, seed, split or "calibration")
    documents = (
        _local_documents(path, column)
        if path.exists()
        else _dataset_documents(source, column, split or "train")
    )
    order = np.random.default_rng(seed).permutation(len(documents))
    if source == "c4":
        order = order[: DOCUMENTS_PER_BLOCK * sequences]
    blocks = _pack((documents[int(i)] for i in order), tokenizer, sequences, length)
    if len(blocks) < sequences:
        raise InputError(
            f"{source} gives {len(blocks)} blocks of {length} tokens from {len(order)} documents, but {sequences} were asked "
            "for; ask for fewer or shorter sequences, or give more text."
        )
    return torch.tensor(blocks, dtype=torch.int64)


def _pack(documents, tokenizer, sequences, length):
    """Join the encoded documents of each batch and cut it into blocks, until there are enough."""
    blocks, joined = [], []
    bar = tqdm(total=sequences, desc="calibration tokens", unit="block", disable=None, leave=False)
    for i, document in enumerate(documents, 1):
        joined.extend(tokenizer(document, verbose=False)["input_ids"])
        while len(joined) >= length:
            blocks.append(joined[:length])
            joined = joined[length:]
            bar.update()
            if len(blocks) == sequences:
                bar.close()
                return blocks
        if i % DOCUMENTS_PER_BATCH == 0:
            joined = []
    bar.close()
    return blocks


def _from_corpus(source, tokenizer, sequences, length, seed, split):
    check_choice("split", split, SPLITS)
    rows = []
    for i, domain in enumerate(_domains_of_part(source, sequences)):
        rng = random.Random(f"{split} {seed} {i}")
        characters, ids = 4 * length, []
        while len(ids) < length:
            ids = tokenizer(corpus.text_of(domain, rng, split, characters))["input_ids"]
            characters *= 2
        rows.append(ids[:length])
    return torch.tensor(rows, dtype=torch.int64)


def _from_ids(path, sequences, length):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable .safetensors file ({error}).") from None
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.is_floating_point():
        raise InputError(
            f'{path} must hold whole numbers under the key "input_ids" with shape [N, S]; it has {list(tensors)}.'
        )
    if len(ids) < sequences or ids.shape[1] < length:
        raise InputError(
            f"{path} holds {ids.shape[0]} sequences of {ids.shape[1]} tokens, but {sequences} of {length} were asked for."
        )
    return ids[:sequences, :length].to(torch.int64).contiguous()


def _local_documents(path, column):
    documents = []
    for file in _text_files(path) if path.is_dir() else [path]:
        text = file.read_text(encoding="utf-8")
        if file.suffix in (".json", ".jsonl"):
            documents.extend(_json_documents(file, text, column))
        else:
            documents.append(text)
    if not documents:
        raise InputError(f"{path} holds no .txt, .json or .jsonl file.")
    return documents


def _text_files(folder):
    return sorted(p for p in folder.iterdir() if p.suffix in (".txt", ".json", ".jsonl"))


def _json_documents(file, text, column):
    try:
        if file.suffix == ".jsonl" or not text.lstrip().startswith("["):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file} is not readable JSON ({error}).") from None
    for row in rows:
        document = row if isinstance(row, str) else row.get(column) if isinstance(row, dict) else None
        if not isinstance(document, str):
            raise InputError(
                f'{file} has an entry without text under "{column}"; give the key with the "column" argument.'
            )
        yield document


def _dataset_documents(source, column, split):
    """Documents of a data set, as a sequence."""
    import datasets

    options, columns = NAMED.get(source) or _of_name(source, column)
    try:
        rows = datasets.load_dataset(**{"split": split} | options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"Cannot load calibration data {source!r}: no such file here, and the Hugging Face hub or the datasets cache "
            f"({datasets.config.HF_DATASETS_CACHE}) did not give {options['path']} ({reason}). Give a .txt, .json, .jsonl or "
            f".safetensors file, {', '.join(NAMED)} or demo; or let the model write the text itself, which needs no data "
            f"(--calibration {NAME})."
        ) from None
    absent = [name for name in columns if name not in rows.column_names]
    if absent:
        raise InputError(
            f'{source} has no column "{absent[0]}" but {", ".join(rows.column_names)}; give the "column" argument, or '
            "name:configuration:split:column."
        )
    return _Documents(rows.select_columns(list(columns)), source)


def _of_name(source, column):
    """What a data set's name says, beside the default column."""
    name, configuration, split, columns = (str(source).split(":", 3) + [""] * 3)[:4]
    options = {"path": name, "name": configuration or None} | ({"split": split} if split else {})
    return options, tuple((columns or column).split(","))


class _Documents:
    """Rows of a data set as texts, read when they are asked for."""

    def __init__(self, rows, source):
        self.rows, self.source = rows, source

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return "\n".join(self._text(name, value) for name, value in self.rows[place].items())

    def _text(self, name, value):
        if isinstance(value, list) and all(
            isinstance(v, dict) and isinstance(v.get("content"), str) for v in value
        ):
            return "\n".join(message["content"] for message in value)
        if not isinstance(value, str):
            raise InputError(
                f'Column "{name}" of {self.source} holds neither text nor messages, but {type(value).__name__}.'
            )
        return value
