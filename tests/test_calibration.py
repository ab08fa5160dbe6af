import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model  # noqa: F401 (shared fixtures)
from safetensors.torch import save_file

from hcsmoe_core import calibration_tokens
from hcsmoe_core._util import InputError, folder_of
from hcsmoe_core.demo import corpus
from hcsmoe_core.text.calibration import SOURCES, calibration_settings, domains_of, local_files, scoring_of


@pytest.fixture(scope="module")
def tokenizer():
    from hcsmoe_core.checkpoint import load_tokenizer

    return load_tokenizer(folder_of("demo-mixtral"))


def written(tmp_path, texts):
    (tmp_path / "docs.jsonl").write_text(
        "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(texts))
    )
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
    assert asked == {
        "path": "allenai/c4",
        "data_files": "en/c4-train.00000-of-01024.json.gz",
        "split": "train",
    }
    order = np.random.default_rng(42).permutation(3000)[:32]
    joined = [t for i in order for t in tokenizer(texts[i])["input_ids"]]
    assert got.flatten().tolist() == joined[:256]
    monkeypatch.setattr("hcsmoe_core.text.calibration.DOCUMENTS_PER_BATCH", 1)
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


def test_some_domains_of_the_embedded_corpus(tokenizer):
    how = dict(length=32, seed=3)
    whole = calibration_tokens("demo", tokenizer, sequences=12, **how)
    assert domains_of("demo:units,code", 3) == ["units", "code", "units"]
    some = calibration_tokens("demo:code,prose", tokenizer, sequences=4, **how)
    assert torch.equal(some[:2], whole[:2])  # the first two of all domains
    mixed = domains_of("0.5*demo:units+0.5*demo:code,dates", 6)
    assert mixed == ["units"] * 3 + ["code", "dates", "code"]
    with pytest.raises(ValueError, match='"source" argument must be one of "code", "prose", .*\'cod\''):
        calibration_tokens("demo:cod", tokenizer, sequences=1, **how)


def test_the_papers_recipe_step_by_step(tokenizer, monkeypatch):
    """Against datasets' own batched map: 16 documents a block, batches of 1,000, of each the whole blocks."""
    import datasets

    shard = datasets.Dataset.from_dict(
        {"text": [f"{i} is a number. " * (1 + i % 7) for i in range(2500)], "url": ["u"] * 2500}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: shard)
    blocks, length = 70, 96  # 1,120 documents, of which the last 120 are a batch of their own
    chosen = shard.select(np.random.default_rng(42).permutation(2500)[: 16 * blocks])
    encoded = chosen.map(lambda row: {"ids": tokenizer(row["text"])["input_ids"]})

    def cut(batch):
        joined = list(itertools.chain.from_iterable(batch["ids"]))
        return {"block": [joined[i : i + length] for i in range(0, len(joined) // length * length, length)]}

    wanted = encoded.map(cut, batched=True, batch_size=1000, remove_columns=encoded.column_names)["block"]
    got = calibration_tokens("c4", tokenizer, sequences=blocks, length=length)
    assert len(wanted) > blocks
    assert got.tolist() == wanted[:blocks]


ROWS = {
    "EleutherAI/wikitext_document_level": {"page": ["An article."]},
    "allenai/tulu-3-sft-personas-math": {
        "prompt": ["Two and two?"],
        "messages": [
            [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
        ],
    },
    "theblackcat102/evol-codealpaca-v1": {"instruction": ["Add."], "output": ["a + b"]},
    "some/data": {"question": ["Why?"], "answer": ["So."], "year": [1999]},
}


@pytest.mark.parametrize(
    ("source", "options", "document"),
    [
        ("wikitext", {"name": "wikitext-2-raw-v1", "split": "train"}, "An article."),
        ("math", {"split": "train"}, "Two and two?\nFour."),
        ("code", {"split": "train"}, "Add.\na + b"),
        ("some/data:::answer", {"name": None, "split": "train"}, "So."),
        ("some/data:main:test:question,answer", {"name": "main", "split": "test"}, "Why?\nSo."),
    ],
)
def test_named_sets_and_columns(tokenizer, monkeypatch, source, options, document):
    import datasets

    asked = {}

    def load(path, **given):
        asked.update(given, path=path)
        return datasets.Dataset.from_dict({name: values * 50 for name, values in ROWS[path].items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    got = calibration_tokens(source, tokenizer, sequences=1, length=40)
    assert got[0].tolist() == (tokenizer(document)["input_ids"] * 50)[:40]
    assert {k: v for k, v in asked.items() if k != "path"} == options
    for column, message in (
        ("text", 'no column "text" but question, answer, year'),
        ("year", "neither text nor messages, but int"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration_tokens("some/data", tokenizer, sequences=1, length=40, column=column)


def test_a_mixture_takes_each_parts_share_and_keeps_its_statistics_apart(tokenizer, tmp_path):
    import hcsmoe_core as core

    numbers, words = tmp_path / "numbers.txt", tmp_path / "words.txt"
    numbers.write_text("1 2 3 4 5 6 7 8 9 " * 400)
    words.write_text("the table of the house is the place of the people " * 400)
    source = f"0.7*{numbers}+0.3*{words}"
    got = calibration_tokens(source, tokenizer, sequences=10, length=32)
    apart = [
        calibration_tokens(path, tokenizer, sequences=n, length=32) for path, n in ((numbers, 7), (words, 3))
    ]
    assert torch.equal(got, torch.cat(apart))
    assert domains_of(source, 10) == ["numbers"] * 7 + ["words"] * 3
    assert local_files(source) == [numbers, words]
    model, _ = core.load_model("demo-mixtral")
    stats = core.capture(model, got, domains=domains_of(source, 10))
    assert stats.domains == ["numbers", "words"]
    for i, part in enumerate(apart):
        alone = core.capture(model, part)
        for name, sums in alone.layers.items():
            assert torch.equal(stats.layers[name].usage_count[i], sums.usage_count[0])
    assert domains_of("demo+wikitext", 14) == [*corpus.DOMAINS][:7] + ["wikitext"] * 7
    for weights, sequences, counts in (
        ((1, 1, 1), 4, (2, 1, 1)),
        ((98, 1, 1), 10, (8, 1, 1)),
        ((2, 1), 6, (4, 2)),
    ):
        parts = "+".join(f"{w}*{name}" for w, name in zip(weights, ("c4", "math", "code"), strict=False))
        assert [
            domains_of(parts, sequences).count(name) for name in ("c4", "math", "code")[: len(weights)]
        ] == list(counts)


@pytest.mark.parametrize(
    ("source", "sequences", "message"),
    [
        ("half*c4+math", 8, "'half\\*c4' is no part: write weight\\*name"),
        ("0*c4+math", 8, "'0\\*c4' is no part"),
        ("c4+", 8, "'' is no part"),
        ("c4+math+c4", 8, "two domains are called 'c4'"),
        ("demo+code", 24, "two domains are called 'code'"),
        ("c4+math+code", 2, "2 sequences are too few for the 3 parts"),
    ],
)
def test_what_is_no_mixture_is_refused(tokenizer, source, sequences, message):
    with pytest.raises(ValueError, match=message):
        calibration_tokens(source, tokenizer, sequences=sequences, length=8)


def test_bad_input_is_refused(tokenizer, tmp_path, monkeypatch):
    path = written(tmp_path, TEXTS[:2])
    with pytest.raises(
        ValueError, match=r"gives \d+ blocks of 64 tokens from 2 documents, but 32 were asked for"
    ):
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
    for name, shown in (
        ("nobody/no-such-data", "nobody/no-such-data"),
        ("math", "allenai/tulu-3-sft-personas-math"),
    ):
        with pytest.raises(
            FileNotFoundError, match=f"Cannot load calibration data '{name}'.* did not give {shown}"
        ):
            calibration_tokens(name, tokenizer, sequences=1, length=8)


def test_a_path_must_look_like_one(tokenizer, tmp_path, monkeypatch):
    """``code`` is a data set, and a folder of that name is written ``./code``: neither is read by mistake."""
    import datasets

    asked = []

    def load(path, **_):
        asked.append(path)
        return datasets.Dataset.from_dict({"text": ["from the hub"] * 99})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    size = dict(sequences=1, length=8)
    local, hub = (tokenizer(text)["input_ids"] for text in ("from here", "from the hub"))
    for name in ("c4", "code", "math", "wikitext", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("from here" * 9)
        for source in (name, f"demo:units+{name}"):
            with pytest.raises(InputError, match=f'write "./{name}" for the one here, or "{name}:" for the'):
                calibration_tokens(source, tokenizer, sequences=24, length=8)
            with pytest.raises(InputError, match="is a file or folder here and may be a data set"):
                local_files(source)
        for source in (f"./{name}", f"~/{name}", tmp_path / name, Path(name), f"{tmp_path}/{name}"):
            assert calibration_tokens(source, tokenizer, **size)[0].tolist()[:3] == local[:3]
            assert [file.resolve() for file in local_files(source)] == [tmp_path / name / "a.txt"]
    (tmp_path / "c5").write_text("from here" * 9)
    with pytest.raises(InputError, match="is a file or folder here"):
        calibration_tokens("c5", tokenizer, **size)
    assert asked == []
    assert calibration_tokens("c4:", tokenizer, **size)[0].tolist() == (hub * 9)[:8]
    calibration_tokens("notes:", tokenizer, **size)
    calibration_tokens("owner/name", tokenizer, **size)
    assert asked == ["allenai/c4", "notes", "owner/name"]
    assert local_files("owner/name") == local_files("0.5*c4:+0.5*owner/name") == []
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name").write_text("from here" * 9)
    assert calibration_tokens("owner/name", tokenizer, **size)[0].tolist()[:3] == local[:3]
    assert local_files("0.5*c4:+0.5*owner/name") == [Path("owner/name")]
    for missing in ("./none", "none.txt", "none.safetensors", "~/none", "/none/none"):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            calibration_tokens(missing, tokenizer, **size)
    assert asked[3:] == []


def test_what_needs_no_file_is_not_taken_for_one(tokenizer, tmp_path, monkeypatch):
    """The defaults work beside a folder of their name, which is not read."""
    monkeypatch.chdir(tmp_path)
    wanted = calibration_tokens("demo", tokenizer, sequences=2, length=8)
    for name in ("demo", "self"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("from here" * 9)
        assert local_files(name) == []
    assert torch.equal(calibration_tokens("demo", tokenizer, sequences=2, length=8), wanted)
    assert domains_of("demo", 2) == ["code", "prose"]


def test_sources_say_how_they_are_used():
    assert {"c4", "wikitext", "math", "code", "self", "demo"} <= set(SOURCES)
    assert scoring_of("demo") == scoring_of("demo:code,units") == ("heldout", ("code", "prose"))
    for other in ("c4", "self", "notes.txt", "owner/name", "demo+wikitext"):
        assert scoring_of(other) == (None, ())
    shape = {"sequences": 96, "length": 256}
    assert calibration_settings("x", "demo:code") == {"calibration": "demo:code"} | shape
    assert calibration_settings("demo-mixtral") == {"calibration": "demo"} | shape
    paper = {"sequences": 32, "length": 2048}
    for source in ("c4", "demo+c4", "./demo", "owner/name"):
        assert calibration_settings("demo-mixtral", source) == {"calibration": source} | paper
    assert calibration_settings("x", sequences=4, length=8) == {
        "calibration": "c4",
        "sequences": 4,
        "length": 8,
    }
