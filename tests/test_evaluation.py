import math

import naive
import numpy as np
import pytest
import torch
from conftest import tiny_model, tokens

import hcsmoe_core as core
from hcsmoe_core.demo import tasks
from hcsmoe_core.evaluation import perplexity, score_table


@pytest.fixture(scope="module")
def embedded():
    return core.load_model("demo-mixtral", dtype="float32")


@pytest.mark.parametrize("name", ["demo_units", "demo_sorting"])
def test_the_harness_equals_a_naive_scorer(embedded, name):
    model, tokenizer = embedded
    scores = core.evaluate(model, tokenizer, [name], limit=40, text=None)["tasks"][name]
    acc, acc_norm = naive.multiple_choice(model, tokenizer, tasks.load_items(name)[:40])
    assert scores["acc"] == pytest.approx(acc)
    assert scores["acc_norm"] == pytest.approx(acc_norm)
    assert scores["acc_stderr"] == pytest.approx(np.sqrt(acc * (1 - acc) / 39))
    assert scores["items"] == 40


def test_perplexity_equals_a_naive_one():
    model = tiny_model("qwen2_moe")
    ids = tokens(5, 12)
    got = perplexity(model, ids, domains=["code", "x", "x", "y", "code"], batch_size=2)
    loss = {}
    with torch.no_grad():
        for row, domain in zip(ids, ["code", "x", "x", "y", "code"], strict=True):
            logprobs = model(row[None]).logits[0].double().log_softmax(-1)
            loss.setdefault(domain, []).append(-np.mean([logprobs[i, row[i + 1]].item() for i in range(11)]))
    for domain, values in loss.items():
        assert got["loss"][domain] == pytest.approx(np.mean(values), rel=1e-5)
        assert got["perplexity"][domain] == pytest.approx(math.exp(np.mean(values)), rel=1e-5)
    assert got["mean_loss"] == pytest.approx((np.mean(loss["x"]) + np.mean(loss["y"])) / 2, rel=1e-5)  # code is left out


def test_merged_models_are_scored_alike_live_and_loaded(embedded, tmp_path):
    model, tokenizer = embedded
    stats = core.capture(model, core.calibration_tokens("demo", tokenizer, sequences=12, length=64))
    plan = core.make_plan(stats, model, experts=4)
    core.save_merged(model, plan, tmp_path / "m", tokenizer=tokenizer)
    options = dict(limit=20, sequences=12, length=64)
    original = core.evaluate(model, tokenizer, ["demo_largest", "demo_units"], **options)
    core.apply_plan(model, plan)
    live = core.evaluate(model, tokenizer, ["demo_largest", "demo_units"], **options)
    core.restore(model)
    loaded, own_tokenizer = core.load_model(tmp_path / "m")
    again = core.evaluate(loaded, own_tokenizer, ["demo_largest", "demo_units"], **options)
    assert again["tasks"] == live["tasks"]
    assert again["loss"] == live["loss"]
    assert live["mean_loss"] > original["mean_loss"]
    assert live["settings"]["dtype"] == "float32"
    assert {"torch", "transformers", "lm_eval", "python", "hcsmoe"} <= set(live["versions"])
    assert set(live["seconds"]) == {"tasks", "perplexity"}
    assert "demo_largest" in score_table(live)


def test_bad_input_is_refused(embedded):
    model, tokenizer = embedded
    with pytest.raises(ValueError, match="demo_spelling, which the harness does not know"):
        core.evaluate(model, tokenizer, ["demo_spelling"])
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        core.evaluate(model, None)
    with pytest.raises(ValueError, match='"batch_size" argument'):
        core.evaluate(model, tokenizer, batch_size=0)
