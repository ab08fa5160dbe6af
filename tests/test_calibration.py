import json

import numpy as np
import pytest
import torch
from conftest import tiny_model  # noqa: F401 (shared fixtures)
from safetensors.torch import save_file

from hcsmoe_core import calibration_tokens, domains_of
from hcsmoe_core.demo import corpus, models


@pytest.fixture(scope="module")
def tokenizer():
    from hcsmoe_core.checkpoint import load_tokenizer

    return load_tokenizer(models.folder("demo-mixtral"))


def written(tmp_path, texts):
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return tmp_path / "docs.jsonl"


TEXTS = [f"Document {i} says that {i} plus {i} is {i + i}. " * 3 for i in range(40)]


def test_blocks_are_the_documents_joined_in_the_seeds_order(tokenizer, tmp_path):
    got = calibration_tokens(written(tmp_path, TEXTS), tokenizer, sequences=5, length=64, seed=7)
    joined = [t for i in np.random.default_rng(7).permutation(40) for t in tokenizer(TEXTS[i])["input_ids"]]
    assert got.dtype == torch.int64
    assert got.tolist() == [joined[64 * i : 64 * (i + 1)] for i in range(5)]


def test_the_papers_recipe(tokenizer, monkeypatch):
    """32 documents for 2 blocks, one shard, its order, what is left of a batch of documents dropped."""
    import datasets

    asked = {}
    texts = [f"page {i:04d} " * 30 for i in range(3000)]

    def shard(**options):
        asked.update(options)
        return datasets.Dataset.from_dict({"text": texts})

    monkeypatch.setattr(datasets, "load_dataset", shard)
    got = calibration_tokens("c4", tokenizer, sequences=2, length=128, seed=42)
    assert asked == {"path": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz", "split": "train"}
    order = np.random.default_rng(42).permutation(3000)[:32]
    joined = [t for i in order for t in tokenizer(texts[i])["input_ids"]]
    assert got.flatten().tolist() == joined[:256]
    monkeypatch.setattr("hcsmoe_core.calibration.DOCUMENTS_PER_BATCH", 1)
    first = tokenizer(texts[order[0]])["input_ids"]
    again = calibration_tokens("c4", tokenizer, sequences=2, length=len(first) - 5, seed=42)
    assert again.tolist()[0] == first[:-5]
    assert again.tolist()[1] == tokenizer(texts[order[1]])["input_ids"][: len(first) - 5]


@pytest.mark.parametrize("kind", ["txt", "json", "folder", "key"])
def test_local_text(tokenizer, tmp_path, kind):
    path, column = tmp_path / f"d.{kind}", "text"
    if kind == "txt":
        path.write_text(" ".join(TEXTS))
    elif kind == "json":
        path.write_text(json.dumps(TEXTS))
    elif kind == "key":
        path, column = path.with_suffix(".jsonl"), "body"
        path.write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXTS))
    else:
        path.mkdir()
        written(path, TEXTS)
    assert calibration_tokens(path, tokenizer, sequences=3, length=50, column=column).shape == (3, 50)


def test_ids_from_a_file(tmp_path):
    ids = torch.arange(60, dtype=torch.int32).view(4, 15)
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    got = calibration_tokens(tmp_path / "ids.safetensors", sequences=3, length=10)
    assert got.tolist() == ids[:3, :10].tolist()
    assert got.dtype == torch.int64
    with pytest.raises(ValueError, match="holds 4 sequences of 15 tokens, but 5 of 10 were asked for"):
        calibration_tokens(tmp_path / "ids.safetensors", sequences=5, length=10)
    save_file({"ids": ids}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match='under the key "input_ids"'):
        calibration_tokens(tmp_path / "other.safetensors", sequences=1, length=1)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ids.safetensors").read_bytes()[:40])
    with pytest.raises(ValueError, match="not a readable .safetensors file"):
        calibration_tokens(tmp_path / "cut.safetensors", sequences=1, length=1)


def test_the_embedded_corpus_takes_domains_in_turn(tokenizer):
    got = calibration_tokens("demo", tokenizer, sequences=24, length=48, seed=3)
    assert torch.equal(got, calibration_tokens("demo", tokenizer, sequences=24, length=48, seed=3))
    assert not torch.equal(got, calibration_tokens("demo", tokenizer, sequences=24, length=48, seed=4))
    assert domains_of("demo", 24) == list(corpus.DOMAINS) * 2
    assert domains_of("c4", 24) is None
    sorting = corpus.DOMAINS.index("sorting")
    lines = tokenizer.decode(got[sorting], skip_special_tokens=True).splitlines()[:-1]
    for line in lines:
        question, answer = line.split(" :")
        assert sorted(map(int, question.split()[1:])) == list(map(int, answer.split()))
        assert corpus.split_of(f"sorting {question.removeprefix('sort ')}") == "calibration"


def test_bad_input_is_refused(tokenizer, tmp_path, monkeypatch):
    path = written(tmp_path, TEXTS[:2])
    with pytest.raises(ValueError, match=r"gives \d+ blocks of 64 tokens from 2 documents, but 32 were asked for"):
        calibration_tokens(path, tokenizer, length=64)
    with pytest.raises(ValueError, match="no tokenizer"):
        calibration_tokens(path)
    with pytest.raises(ValueError, match='without text under "body"'):
        calibration_tokens(path, tokenizer, column="body", sequences=1, length=8)
    path.write_text('{"text": "cut')
    with pytest.raises(ValueError, match="not readable JSON"):
        calibration_tokens(path, tokenizer, sequences=1, length=8)
    for bad in (dict(sequences=0), dict(length=0), dict(sequences=2.5)):
        with pytest.raises(ValueError, match="must be a whole number"):
            calibration_tokens("demo", tokenizer, **bad)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="Cannot load calibration data 'nobody/no-such-data'"):
        calibration_tokens("nobody/no-such-data", tokenizer, sequences=1, length=8)
