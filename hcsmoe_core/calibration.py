"""Calibration tokens: packed blocks of token ids, without padding, from data sets, files or the embedded corpus."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hcsmoe_core.demo import corpus
from hcsmoe_core.files import check_choice, check_count

C4 = {"path": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz"}
DOCUMENTS_PER_BLOCK = 16  # of the paper's recipe: 512 documents for its 32 blocks
DOCUMENTS_PER_BATCH = 1000  # documents are joined within batches of so many; what is left of a batch is dropped
SPLITS = corpus.SPLITS


def calibration_tokens(source, tokenizer=None, *, sequences=32, length=2048, seed=42, column="text", split=None):
    """Blocks of token ids to calibrate on.

    Parameters
    ----------
    source : str or path
        - ``"c4"``: the paper's recipe (HC-SMoE, arXiv 2410.08589, section 4.1): documents of the first C4 training shard
          in the order of a permutation seeded with ``seed``, encoded one by one with the tokenizer's own special
          tokens, joined and cut into blocks;
        - ``"demo"``: the embedded corpus, one domain a sequence, all in turn; see :func:`domains_of`;
        - a ``.txt`` file (one document), ``.jsonl`` or ``.json`` file (one document an object, under ``column``), or a
          folder of such files;
        - a ``.safetensors`` file with the ids themselves under ``input_ids [N, S]``; no tokenizer is needed;
        - any other name: a data set on the Hugging Face hub, ``"name"`` or ``"name:configuration"``.
    tokenizer : transformers.PreTrainedTokenizerBase
    sequences, length : int
        N and S, blocks and tokens in each.
    seed : int
        Of the order in which documents are taken.
    column : str
        Column or key of the text.
    split : str, optional
        Of a data set, by default ``"train"``; of the embedded corpus ``"calibration"`` (default), ``"train"`` or
        ``"heldout"``.

    Returns
    -------
    (sequences, length) int64 tensor

    Raises
    ------
    FileNotFoundError
        If the source is no file here and no data set to be had.
    ValueError
        If it yields fewer tokens than asked for, or no tokenizer is given where one is needed.
    """
    check_count("sequences", sequences, 1)
    check_count("length", length, 1)
    path = Path(source)
    if path.suffix == ".safetensors":
        return _from_ids(path, sequences, length)
    if tokenizer is None:
        raise ValueError(
            f"Source {str(source)!r} is text, and the model has no tokenizer; give one, or a .safetensors file of input_ids."
        )
    if source == "demo":
        return _from_corpus(tokenizer, sequences, length, seed, split or "calibration")
    documents = _local_documents(path, column) if path.exists() else _dataset_documents(source, column, split or "train")
    order = np.random.default_rng(seed).permutation(len(documents))
    if source == "c4":
        order = order[: DOCUMENTS_PER_BLOCK * sequences]
    blocks = _pack((documents[int(i)] for i in order), tokenizer, sequences, length)
    if len(blocks) < sequences:
        raise ValueError(
            f"{source} gives {len(blocks)} blocks of {length} tokens from {len(order)} documents, but {sequences} were asked "
            "for; ask for fewer or shorter sequences, or give more text."
        )
    return torch.tensor(blocks, dtype=torch.int64)


def domains_of(source, sequences):
    """Domain of each of the blocks that :func:`calibration_tokens` makes, or None if the source has no domains."""
    if source != "demo":
        return None
    return [corpus.DOMAINS[i % len(corpus.DOMAINS)] for i in range(sequences)]


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


def _from_corpus(tokenizer, sequences, length, seed, split):
    check_choice("split", split, SPLITS)
    rows = []
    for i, domain in enumerate(domains_of("demo", sequences)):
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
        raise ValueError(f"{path} is not a readable .safetensors file ({error}).") from None
    ids = tensors.get("input_ids")
    if ids is None or ids.ndim != 2 or ids.is_floating_point():
        raise ValueError(f'{path} must hold whole numbers under the key "input_ids" with shape [N, S]; it has {list(tensors)}.')
    if len(ids) < sequences or ids.shape[1] < length:
        raise ValueError(
            f"{path} holds {ids.shape[0]} sequences of {ids.shape[1]} tokens, but {sequences} of {length} were asked for."
        )
    return ids[:sequences, :length].to(torch.int64).contiguous()


def _local_documents(path, column):
    files = sorted(p for p in path.iterdir() if p.suffix in (".txt", ".json", ".jsonl")) if path.is_dir() else [path]
    documents = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if file.suffix in (".json", ".jsonl"):
            documents.extend(_json_documents(file, text, column))
        else:
            documents.append(text)
    if not documents:
        raise ValueError(f"{path} holds no .txt, .json or .jsonl file.")
    return documents


def _json_documents(file, text, column):
    try:
        if file.suffix == ".jsonl" or not text.lstrip().startswith("["):
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON ({error}).") from None
    for row in rows:
        document = row if isinstance(row, str) else row.get(column) if isinstance(row, dict) else None
        if not isinstance(document, str):
            raise ValueError(f'{file} has an entry without text under "{column}"; give the key with the "column" argument.')
        yield document


def _dataset_documents(source, column, split):
    """Text column of a data set, as a sequence."""
    import datasets

    name, _, configuration = str(source).partition(":")
    try:
        if source == "c4":
            rows = datasets.load_dataset(**C4, split="train")
        else:
            rows = datasets.load_dataset(name, configuration or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"Cannot load calibration data {source!r}: no such file here, and the Hugging Face hub or its cache did not give "
            f'a data set of that name ({reason}). Give a .txt, .json, .jsonl or .safetensors file, "c4" or "demo".'
        ) from None
    if column not in rows.column_names:
        raise ValueError(f'{source} has no column "{column}" but {", ".join(rows.column_names)}; give the "column" argument.')
    return rows[column]
