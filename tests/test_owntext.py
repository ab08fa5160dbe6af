"""Text that a model writes itself, against a naive sampler that rereads the whole prefix for every token."""

import threading

import numpy as np
import pytest
import torch
from conftest import FAMILIES, OTHERS, tiny_model
from naive import written
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from hcsmoe_core import apply_plan, calibration_tokens, capture, evaluate, make_plan
from hcsmoe_core.scale.streaming import stream_model
from hcsmoe_core.score.evaluation import perplexity
from hcsmoe_core.studies import cache, cost
from hcsmoe_core.text import own_text as owntext
from hcsmoe_core.text.calibration import calibration_settings, domains_of
from hcsmoe_core.text.own_text import LOOP, PERIOD, own_text, repetition, writing_of

WORDS = [f"w{i}" for i in range(84)]
SPECIAL = ["<s>", "</s>", "<|start|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|start|> {{ m.role }} {{ m.content }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|start|> assistant{% endif %}"
)


def writer(family="mixtral", ends=(1, 3, 17, 40), **how):
    """A tiny float64 model of short documents, whose generation settings would spoil the text."""
    model = tiny_model(family, torch.float64, **how)
    model.config.bos_token_id, model.config.eos_token_id = 0, None
    model.generation_config.update(
        eos_token_id=list(ends), top_k=1, repetition_penalty=3.0, do_sample=True, max_length=7
    )
    return model


@pytest.fixture(scope="module")
def tokenizer():
    """Words of the tiny models' vocabulary, with special and added tokens; a text begins with ``<s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, "user", "assistant", *WORDS]
    plain = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="</s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    made.add_tokens(["added"])  # 90, of which the vocabulary of the model has more
    return made


def numbers(seed, row, length):
    return np.random.default_rng([seed, row]).random(length)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_it_is_what_a_naive_sampler_writes(family):
    """Caches of every kind, documents that end, and none of the checkpoint's own generation settings."""
    ends = (1, 3, 17, 40)
    model = writer(family, ends)
    known = [i for i in range(96) if i not in (0, model.config.pad_token_id)]
    how = dict(sequences=3, length=40, seed=5, temperature=1.5, batch=3, folder=None)
    got = own_text(model, start="token", **how)
    for row, ids in enumerate(got.tolist()):
        assert ids == written(
            model, numbers(5, row, 40), 1.5, lambda u: [0, known[int(u * len(known))]], ends
        )
    assert own_text(model, **how)[2].tolist() == written(model, numbers(5, 2, 40), 1.5, lambda _: [0], ends)
    assert got.dtype == torch.int64
    assert model.generation_config.top_k == 1  # set aside, not away
    assert any(end in got[:, 2:-1].flatten().tolist() for end in ends)  # or nothing was shown of documents


def test_a_chat_model_writes_both_turns(tokenizer):
    """Template, the user's turn, the rest of the template, the answer; every second sequence."""
    model = writer(ends=(3, 30, 31))
    chat = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    chat.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    chat.chat_template = TEMPLATE
    ends, turn = (1, 3, 30, 31), [3, 2, 5]
    how = dict(sequences=4, length=60, seed=2, temperature=2.0, batch=4, folder=None)
    rows = {start: own_text(model, chat, start=start, **how).tolist() for start in ("", "bos", "chat")}
    for row in range(4):
        u = numbers(2, row, 60)
        assert rows["chat"][row] == written(model, u, 2.0, lambda _: [2, 4], ends, turn)
        assert rows["bos"][row] == own_text(model, tokenizer, **how)[row].tolist()  # without a template
        assert rows[""][row] == rows["chat" if row % 2 else "bos"][row]
    assert any(ids[i : i + 3] == turn for ids in rows["chat"] for i in range(2, 50))


def test_end_of_text_begins_a_text_where_nothing_else_does():
    model = writer(ends=(7, 5))
    how = dict(sequences=3, length=9, batch=3, folder=None)
    model.config.bos_token_id = None
    assert set(own_text(model, **how)[:, 0].tolist()) == {5}
    model.generation_config.eos_token_id = 123456  # not of this vocabulary
    assert torch.equal(own_text(model, **how), own_text(model, start="token", **how))


def test_documents_begin_with_tokens_of_the_vocabulary_drawn_evenly(tokenizer):
    model = writer()
    got = own_text(model, tokenizer, sequences=1720, length=2, batch=1720, start="token", folder=None)
    assert set(got[:, 0].tolist()) == {0}
    counts = torch.bincount(got[:, 1], minlength=96)
    assert (
        counts[:4].sum() + counts[90:].sum() == 0
    )  # neither special nor added ones, nor rows without a token
    assert chisquare(counts[4:90]).pvalue > 1e-3


def test_tokens_have_the_models_probabilities_at_every_temperature(tokenizer):
    model = writer()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[0]])).logits[0, -1]
    drawn = {}
    for temperature in (0.5, 1.0, 2.0):
        how = dict(sequences=2000, length=2, batch=2000, temperature=temperature, start="bos", folder=None)
        drawn[temperature] = torch.bincount(own_text(model, tokenizer, **how)[:, 1], minlength=96).double()
        expected = 2000 * (logits / temperature).softmax(0)
        often = expected > 5
        counts, wanted = ([*some[often], some[~often].sum()] for some in (drawn[temperature], expected))
        assert chisquare(counts, wanted).pvalue > 1e-3
    assert (drawn[0.5] > 0).sum() < (drawn[1.0] > 0).sum() < (drawn[2.0] > 0).sum()


def test_without_temperature_it_is_greedy():
    model = writer(ends=())
    got = own_text(model, sequences=4, length=30, temperature=1e-6, start="bos", batch=4, folder=None)
    model.generation_config = type(model.generation_config)()
    greedy = model.generate(
        torch.zeros(1, 1, dtype=torch.int64), do_sample=False, max_new_tokens=29, eos_token_id=None
    )
    assert got.tolist() == greedy.tolist() * 4


def test_a_document_that_runs_in_a_circle_is_ended():
    model = writer(ends=(95,))
    for (
        layer
    ) in model.model.layers:  # without attention a token follows from the one before: greedy text is a circle
        layer.self_attn.o_proj.weight.data.zero_()
    with pytest.warns(UserWarning, match=r"% of the 8-grams that .* wrote are repetitions"):
        ids = own_text(model, sequences=4, length=128, temperature=1e-6, batch=4, folder=None)
    looked_at = range(LOOP + PERIOD, 128, PERIOD)
    for row in ids.tolist():
        circles = [
            t
            for t in looked_at
            if any(row[t - LOOP : t] == row[t - LOOP - p : t - p] for p in range(1, PERIOD + 1))
        ]
        assert circles
        assert all(row[t : t + 2] == [95, 0] for t in circles)


def test_asking_for_more_only_adds_and_the_batch_changes_nothing():
    model = writer()
    how = dict(length=24, seed=3, folder=None)
    some = own_text(model, sequences=3, batch=4, **how)
    more = own_text(model, sequences=9, batch=4, **how)
    assert torch.equal(more[:3], some)
    assert torch.equal(own_text(model, sequences=9, batch=2, **how), more)
    assert len(more.unique(dim=0)) == 9
    torch.manual_seed(7)
    assert torch.equal(own_text(model, sequences=3, batch=4, **how), some)
    assert not torch.equal(own_text(model, sequences=3, batch=4, **how | {"seed": 4}), some)
    assert torch.equal(own_text(model, sequences=3, batch=4, **how | {"length": 1}), some[:, :1])


def test_what_is_written_is_kept_and_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    model = writer()
    model.name_or_path = "some/tiny"
    how = dict(sequences=10, length=16, batch=4)
    wanted = own_text(model, folder=None, **how)
    usual, calls = model.generate, []

    def generate(*inputs, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(*inputs, **options)

    monkeypatch.setattr(model, "generate", generate)
    with pytest.raises(KeyboardInterrupt):
        own_text(model, folder=tmp_path, **how)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("tiny-")
    assert [path.name for path in folder.iterdir()] == ["000000.safetensors"]
    assert torch.equal(own_text(model, folder=tmp_path, **how), wanted)
    assert len(calls) == 4
    assert torch.equal(own_text(model, folder=tmp_path, **how), wanted)
    assert len(calls) == 4
    damaged = folder / "000004.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert torch.equal(own_text(model, folder=tmp_path, **how), wanted)
    assert len(calls) == 5
    assert torch.equal(
        torch.cat([load_file(path)["input_ids"] for path in sorted(folder.iterdir())])[:10], wanted
    )
    for other in (dict(seed=1), dict(temperature=0.9), dict(length=15), dict(start="token")):
        own_text(model, folder=tmp_path, **how | other)
    assert len(list(tmp_path.iterdir())) == 5


def test_ranks_share_the_batches_and_all_have_the_text(tmp_path, monkeypatch):
    here, barrier, found = threading.local(), threading.Barrier(2, timeout=60), {}
    monkeypatch.setattr(owntext.ranks, "rank", lambda: here.rank)
    monkeypatch.setattr(owntext.ranks, "size", lambda: 2)
    monkeypatch.setattr(owntext.ranks, "barrier", barrier.wait)
    how = dict(sequences=11, length=12, batch=4)

    def run(rank, model, folder):
        here.rank = rank
        usual, calls = model.generate, []
        model.generate = lambda *inputs, **options: (calls.append(1), usual(*inputs, **options))[1]
        try:
            found[rank] = own_text(model, folder=folder, **how), len(calls)
        except FileNotFoundError as error:
            found[rank] = error

    def both(folders):
        models = [writer() for _ in folders]
        threads = [
            threading.Thread(target=run, args=each) for each in zip((0, 1), models, folders, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    both([tmp_path / "shared"] * 2)
    here.rank = 0
    alone = own_text(writer(), folder=None, **how)
    assert [calls for _, calls in (found[0], found[1])] == [2, 1]
    assert all(torch.equal(found[rank][0], alone) for rank in (0, 1))
    both([tmp_path / "a", tmp_path / "b"])
    assert all("not on a disk that all ranks share" in str(found[rank]) for rank in (0, 1))


def test_a_streamed_model_has_what_it_wrote_when_it_was_whole(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "m")
    streamed, _ = stream_model(tmp_path / "m")
    how = dict(sequences=2, length=8, batch=2, folder=tmp_path / "kept")
    with pytest.raises(
        ValueError, match="is streamed, and cannot write .* bring runs/own-text here, or give a data set"
    ):
        own_text(streamed, **how)
    model.name_or_path = str(tmp_path / "m")
    assert torch.equal(own_text(model, **how), own_text(streamed, **how))


def test_it_is_a_source_by_name_and_a_part_of_mixtures(tmp_path):
    model = writer()
    save_file({"input_ids": torch.arange(40).view(5, 8)}, tmp_path / "ids.safetensors")
    how = dict(model=model, length=8, seed=1, folder=tmp_path / "kept")
    alone = calibration_tokens("self:temperature=2:batch=4", sequences=6, **how)
    direct = dict(sequences=6, length=8, seed=1, temperature=2.0, batch=4)
    assert torch.equal(alone, own_text(model, folder=None, **direct))
    mixture = f"0.75*self:temperature=2:batch=4+0.25*{tmp_path / 'ids.safetensors'}"
    mixed = calibration_tokens(mixture, sequences=8, **how)
    assert torch.equal(mixed[:6], alone)
    assert mixed[6:].tolist() == torch.arange(16).view(2, 8).tolist()
    assert domains_of(mixture, 8) == ["self"] * 6 + ["ids"] * 2
    assert domains_of("self", 8) is None


def test_notebooks_take_it(tmp_path, monkeypatch):
    """Statistics captured on it are those of its tokens, and its cost is told beforehand."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model("qwen2_moe")
    model.save_pretrained(tmp_path / "m")
    model.name_or_path = str(tmp_path / "m")
    source = dict(calibration="self:batch=4", sequences=6, length=20)
    stats = cache.cached_statistics(model, None, folder=tmp_path / "s", seed=9, **source)
    wanted = capture(
        model, own_text(model, sequences=6, length=20, seed=9, batch=4, folder=None), progress=False
    )
    assert stats.sequences == wanted.sequences
    told = cost.forecast(str(tmp_path / "m"), **source).splitlines()
    assert told[2].startswith("own text     160 tokens, one after another: ")  # whole batches
    assert calibration_settings("demo-qwen", "self") == {
        "calibration": "self",
        "sequences": 288,
        "length": 256,
    }
    assert calibration_settings("demo-qwen", "self+notes.txt")["length"] == 256
    assert calibration_settings("demo-qwen") == {"calibration": "demo", "sequences": 96, "length": 256}
    assert calibration_settings("x", "self") == {"calibration": "self", "sequences": 32, "length": 2048}


def no_data(monkeypatch):
    import datasets

    def load(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)


def test_without_data_it_is_offered_and_taken_only_where_none_were_named(
    tmp_path, monkeypatch, capsys, tokenizer
):
    from hcsmoe_core import load_statistics
    from hcsmoe_core.ui import cli

    no_data(monkeypatch)
    monkeypatch.chdir(tmp_path)
    tiny_model("mixtral").save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    how = dict(out=tmp_path / "s.safetensors", sequences=3, length=12)
    with pytest.raises(
        FileNotFoundError, match=r"write the text itself, which needs no data \(--calibration self\)"
    ):
        cli.capture(str(tmp_path / "m"), calibration="c4", **how)
    cli.capture(str(tmp_path / "m"), **how)
    said = capsys.readouterr()
    assert "No calibration was given: the model writes its own text." in said.err
    assert "calibrating on 3 × 12 tokens of self, seed 42" in said.out
    assert load_statistics(how["out"]).num_tokens == 36


def test_merge_holds_out_other_sequences_and_says_what_they_are(tmp_path, monkeypatch):
    from hcsmoe_core.score import fidelity
    from hcsmoe_core.ui import cli

    monkeypatch.chdir(tmp_path)
    tiny_model("mixtral").save_pretrained(tmp_path / "m")
    asked, usual = [], fidelity.unseen

    def unseen(more, seen, **how):
        asked.append(usual(more, seen, **how))
        return asked[-1]

    monkeypatch.setattr(fidelity, "unseen", unseen)
    how = dict(experts=4, calibration="self:batch=4", sequences=6, length=12, fidelity=5)
    cli.merge(str(tmp_path / "m"), tmp_path / "out", **how)
    model = tiny_model("mixtral")
    wanted = own_text(model, sequences=11, length=12, batch=4, folder=None)[6:]
    assert sorted(asked[0].tolist()) == sorted(wanted.tolist())
    assert "6 × 12 tokens of self:batch=4, seed 42" in (tmp_path / "out/README.md").read_text()


def test_repetition_is_the_share_of_grams_that_stood_there_before():
    ids = torch.randint(0, 3, (5, 40), generator=torch.Generator().manual_seed(0))
    for n in (2, 3, 8):
        grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in ids.tolist()]
        seen = sum(gram in row[:i] for row in grams for i, gram in enumerate(row))
        assert repetition(ids, n) == pytest.approx(seen / sum(map(len, grams)))
    assert repetition(ids, 41) == 0.0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("self:temprature=1", "'temprature=1' is no setting: write self, or self with temperature=NUMBER"),
        ("self:temperature=warm", "'temperature=warm' is no setting"),
        ("self:0.8", "'0.8' is no setting"),
        ("self:temperature=0", '"temperature" argument must be a positive number; not 0'),
        ("self:temperature=nan", '"temperature" argument must be a positive number; not nan'),
        ("self:start=middle", '"start" argument must be one of'),
        ("self:batch=0", '"batch" argument must be a whole number of at least 1'),
        ("self+self:temperature=2", "two domains are called 'self'"),
        ("self:start=chat", "has no chat template"),
    ],
)
def test_what_is_no_way_of_writing_is_refused(source, message, mixtral):
    with pytest.raises(ValueError, match=message):
        calibration_tokens(source, model=mixtral, sequences=4, length=8, folder=None)


def test_who_cannot_write_is_refused(mixtral, tmp_path):
    assert writing_of("self:temperature=0.8:start=bos:batch=2").temperature == 0.8
    with pytest.raises(
        ValueError, match='text that the model writes itself; give it as the "model" argument'
    ):
        calibration_tokens("self", sequences=4, length=8)
    mixtral.config.bos_token_id = mixtral.config.eos_token_id = mixtral.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="has no token that begins a text"):
        own_text(mixtral, sequences=1, length=4, start="bos", folder=None)
    ids = torch.randint(0, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    apply_plan(mixtral, make_plan(capture(mixtral, ids, progress=False), experts=4))
    with pytest.raises(ValueError, match="This model is merged; let the original write"):
        own_text(mixtral, sequences=1, length=4, folder=None)
    damaged = tiny_model("mixtral")
    damaged.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="The model gives NaN"):
        own_text(damaged, sequences=1, length=4, folder=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_merged_model_is_scored_on_what_the_original_wrote(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("mixtral")
    how = dict(tasks=[], text="self:batch=4", sequences=4, length=12)
    before = evaluate(model, tokenizer, **how)
    ids = own_text(model, tokenizer, sequences=4, length=12, seed=0, batch=4, folder=None)
    apply_plan(model, make_plan(capture(model, ids, progress=False), experts=2))
    after = evaluate(model, tokenizer, **how)
    assert before["mean_loss"] != after["mean_loss"] == perplexity(model, ids)["mean_loss"]
