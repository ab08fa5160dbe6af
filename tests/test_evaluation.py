import json
import math

import naive
import numpy as np
import pytest
import torch
from conftest import FAMILIES, OTHERS, logits, tiny_model, tokens

import hcsmoe_core as core
from hcsmoe_core._util import sha256_json
from hcsmoe_core.demo import tasks
from hcsmoe_core.score import evaluation
from hcsmoe_core.score import fidelity as measuring
from hcsmoe_core.score.evaluation import (
    TASKS,
    TaskSource,
    paired,
    paired_table,
    perplexity,
    score_table,
    task_scores,
)
from hcsmoe_core.score.fidelity import fidelity
from tools.tasks import load_items


@pytest.fixture(scope="module")
def embedded():
    return core.load_model("demo-mixtral", dtype="float32")


@pytest.mark.parametrize("name", ["demo_units", "demo_sorting"])
def test_the_harness_equals_a_naive_scorer(embedded, name):
    model, tokenizer = embedded
    scores = core.evaluate(model, tokenizer, [name], limit=40, text=None)["tasks"][name]
    acc, acc_norm = naive.multiple_choice(model, tokenizer, load_items(name)[:40])
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
    assert got["mean_loss"] == pytest.approx(
        (np.mean(loss["x"]) + np.mean(loss["y"])) / 2, rel=1e-5
    )  # code is left out


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_perplexity_holds_the_logits_of_some_positions_at_a_time(name, monkeypatch):
    """Those of a batch of 16 sequences of 2,047 tokens and a vocabulary of 152,000 took 20 GB."""
    model, ids, sizes = tiny_model(name), tokens(5, 12), []
    wanted = perplexity(model, ids, domains=list("aabbb"), batch_size=3)
    hook = model.lm_head.register_forward_hook(lambda *parts: sizes.append(parts[-1].numel()))
    monkeypatch.setattr(evaluation, "LOGITS", 3 * 4 * 96)
    bounded = perplexity(model, ids, domains=list("aabbb"), batch_size=3)
    hook.remove()
    assert max(sizes) <= 3 * 4 * 96 < 3 * 11 * 96
    assert sum(sizes) == 5 * 11 * 96
    for key in ("loss", "perplexity"):
        assert bounded[key] == pytest.approx(wanted[key], rel=1e-6)
    assert "forward" not in vars(model.base_model)


def test_a_model_is_as_before_when_perplexity_is_interrupted(monkeypatch):
    model, ids = tiny_model("qwen3_moe"), tokens(2, 12)
    before = logits(model, ids)
    monkeypatch.setattr(evaluation, "LOGITS", 96)
    usual, calls = model.lm_head.forward, []

    def interrupted(hidden):
        calls.append(hidden)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return usual(hidden)

    monkeypatch.setattr(model.lm_head, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        perplexity(model, ids)
    assert torch.equal(logits(model, ids), before)


class Failing:
    """Raises an error at its n-th call, and counts them."""

    def __init__(self, function, error, after):
        self.function, self.error, self.after, self.calls = function, error, after, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls == self.after:
            raise self.error
        return self.function(*arguments, **options)


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["forward", "block", "suspend_merge", "replace_experts", "resume_merge"])
def test_a_failed_fidelity_leaves_the_model_as_it_was(applied, error, where, input_ids, monkeypatch):
    model, ids = tiny_model("qwen2_moe"), tokens(2, 12)
    stats = core.capture(model, input_ids, needs=("usage", "outputs", "sample"), progress=False)
    plan = core.make_plan(stats, model, experts=4, router="folded")
    before, wanted = logits(model, input_ids), fidelity(model, plan, ids, stats=stats, progress=False)
    if applied:
        core.apply_plan(model, plan, stats)
        before = logits(model, input_ids)
    owner, name = measuring, where
    if where in ("forward", "block"):
        owner, name = model if where == "forward" else model.model.layers[1].mlp, "forward"
    failing = Failing(getattr(owner, name), error, after=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        fidelity(model, plan, ids, stats=stats, progress=False)
    assert failing.calls > 2
    for after in range(1, failing.calls + 1):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, Failing(getattr(owner, name), error, after))
            if where == "resume_merge" and after > failing.calls - 3:
                break  # these put the merged experts back
            with pytest.raises(type(error)):
                fidelity(model, plan, ids, stats=stats, progress=False)
        assert [layer.merged for layer in core.find_moe_layers(model)] == [applied] * 3
        assert torch.equal(logits(model, input_ids), before), after
    assert fidelity(model, plan, ids, stats=stats, progress=False) == wanted


def test_tasks_of_a_users_own(embedded, monkeypatch):
    model, tokenizer = embedded
    assert [name for name in TASKS if TASKS[name].default] == list(tasks.NAMES)
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS))

    def units(name):
        return tasks.configuration("demo_units") | {"task": name}

    TASKS["my_units"] = TaskSource(units, bos=True)
    scores = task_scores(model, tokenizer, ["my_units", "demo_units"], limit=20)["tasks"]
    assert scores["my_units"] == scores["demo_units"]


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


def made_up(items, *, groups=None, of="1"):
    """Scores as evaluate gives them, of made-up items."""
    scores = {
        "items": {task: {"of": of, "acc": list(values)} for task, values in items.items()},
        "groups": groups or {},
    }
    inside = {task for group in scores["groups"].values() for task in group["tasks"]}
    return scores | {"tasks": {task: {} for task in (*scores["groups"], *items) if task not in inside}}


def test_paired_differences_equal_naive_ones():
    rng = np.random.default_rng(0)
    sizes = {"a": 50, "b": 7, "g1": 30, "g2": 12, "h1": 5, "h2": 40}
    one, other = ({task: rng.integers(0, 2, n).tolist() for task, n in sizes.items()} for _ in range(2))
    one["a"] = [x if rng.random() < 0.9 else 1 - x for x in other["a"]]  # mostly the same items right
    groups = {"g": {"tasks": ["g1", "g2"], "by_size": True}, "h": {"tasks": ["h1", "h2"], "by_size": False}}
    table = paired(made_up(one, groups=groups), made_up(other, groups=groups)).set_index("task")
    change = {task: np.array(one[task]) - np.array(other[task]) for task in sizes}
    error = {task: np.std(c, ddof=1) / np.sqrt(len(c)) for task, c in change.items()}
    for task in "ab":
        assert table.loc[task, "difference"] == pytest.approx(np.mean(one[task]) - np.mean(other[task]))
        assert table.loc[task, "error"] == pytest.approx(error[task])
        assert [table.loc[task, k] for k in ("won", "lost")] == [
            (change[task] == 1).sum(),
            (change[task] == -1).sum(),
        ]
    unpaired = np.hypot(*(np.std(found["a"], ddof=1) / np.sqrt(50) for found in (one, other)))
    assert table.loc["a", "error"] < 0.6 * unpaired
    assert table.loc["g", "difference"] == pytest.approx(
        np.mean(np.concatenate([change["g1"], change["g2"]]))
    )
    within = sum(((change[t] - change[t].mean()) ** 2).sum() for t in ("g1", "g2")) / (42 - 2)
    assert table.loc["g", "error"] == pytest.approx(np.sqrt(within / 42))
    assert table.loc["h", "difference"] == pytest.approx((change["h1"].mean() + change["h2"].mean()) / 2)
    assert table.loc["h", "error"] == pytest.approx(np.hypot(error["h1"], error["h2"]) / 2)
    four = table.loc[["a", "b", "g", "h"]]
    assert table.loc["mean", "difference"] == pytest.approx(four["difference"].mean())
    assert table.loc["mean", "error"] == pytest.approx(np.sqrt((four["error"] ** 2).sum()) / 4)


def test_only_the_same_items_are_paired():
    scores = made_up({"a": [0, 1, 1], "b": [1, 0]})
    with pytest.raises(ValueError, match="a was scored on 3 items here and on 4, or on others, there"):
        paired(scores, made_up({"a": [0, 1, 1, 1]}, of="2"))
    with pytest.raises(ValueError, match="one has tasks a, b, the other c"):
        paired(scores, made_up({"c": [0, 1]}))


def test_a_model_is_asked_once_and_answers_are_kept_by_what_they_depend_on(embedded, tmp_path, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = embedded
    names, folder = ["demo_largest", "demo_units"], tmp_path / "answers"
    how = dict(limit=10, text=None, answers=folder)
    plain = core.evaluate(model, tokenizer, names, limit=10, text=None)
    first = core.evaluate(model, tokenizer, names, **how)
    assert (first["tasks"], first["items"]) == (plain["tasks"], plain["items"])
    files = sorted(folder.rglob("*.json"))
    assert [p.parent.name for p in files] == names
    kept = json.loads(files[0].read_text())
    answer, greedy = kept["answers"][0]  # of the first choice of the first item
    item, ids = load_items("demo_largest")[0], lambda text: tokenizer(text)["input_ids"]
    whole, start = ids(item["prompt"] + item["choices"][0]), len(ids(item["prompt"]))
    with torch.no_grad():
        logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    assert answer == pytest.approx(
        sum(logprobs[i - 1, whole[i]].item() for i in range(start, len(whole))), rel=1e-5
    )
    assert greedy == all(logprobs[i - 1].argmax() == whole[i] for i in range(start, len(whole)))
    assert len(kept["answers"]) == 40

    stats = core.capture(model, core.calibration_tokens("demo", tokenizer, sequences=12, length=64))
    plan = core.make_plan(stats, model, experts=4)
    core.save_merged(model, plan, tmp_path / "m", tokenizer=tokenizer)
    core.apply_plan(model, plan)
    merged = core.evaluate(model, tokenizer, names, **how)
    core.restore(model)
    assert len(list(folder.rglob("*.json"))) == 4
    assert "±" in paired_table(paired(merged, first))

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", lambda *_, **__: pytest.fail("asked again"))
    assert core.evaluate(model, tokenizer, names, **how)["items"] == first["items"]
    loaded, own = core.load_model(tmp_path / "m")  # the merged folder is the merged model, to the bit
    assert core.evaluate(loaded, own, names, **how)["tasks"] == merged["tasks"]
    for changed in (dict(limit=11), dict(batch_size=8), dict(seed=1)):
        with pytest.raises(pytest.fail.Exception):
            core.evaluate(model, tokenizer, names, **how | changed)
    with torch.no_grad():
        loaded.model.layers[1].self_attn.q_proj.weight[0, 0] += 1e-3  # one weight of another kind
    with pytest.raises(pytest.fail.Exception):
        core.evaluate(loaded, own, names, **how)


def test_answers_depend_on_the_generation_settings(embedded):
    from hcsmoe_core.score.harness import identity

    model, tokenizer = embedded
    before = identity(model, tokenizer)
    model.generation_config.repetition_penalty = 3.0
    try:
        assert identity(model, tokenizer) != before
    finally:
        model.generation_config.repetition_penalty = None
    assert identity(model, tokenizer) == before


@pytest.mark.parametrize("damage", ["cut", "edited", "no object", "fewer", "deep"])
def test_damaged_answers_are_named_and_asked_for_again(embedded, tmp_path, damage):
    model, tokenizer = embedded
    how = dict(limit=3, text=None, answers=tmp_path)
    first = core.evaluate(model, tokenizer, ["demo_largest"], **how)
    (file,) = tmp_path.rglob("*.json")
    content = json.loads(file.read_text())
    edited = content | {"answers": [[0.0, True], *content["answers"][1:]]}
    fewer = {key: value for key, value in content.items() if key != "sha256"} | {"answers": []}
    fewer["sha256"] = sha256_json(fewer)
    file.write_text(
        {
            "cut": file.read_text()[:-9],
            "edited": json.dumps(edited),
            "no object": "[]",
            "fewer": json.dumps(fewer),
            "deep": "[" * 100_000,
        }[damage]
    )
    with pytest.warns(UserWarning, match=rf"{file.name} was cut short or changed"):
        again = core.evaluate(model, tokenizer, ["demo_largest"], **how)
    assert again["items"] == first["items"]
    assert json.loads(file.read_text()) == content


def test_bad_input_is_refused(embedded):
    model, tokenizer = embedded
    with pytest.raises(ValueError, match="demo_spelling, which the harness does not know"):
        core.evaluate(model, tokenizer, ["demo_spelling"])
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        core.evaluate(model, None)
    for bad in (dict(batch_size=0), dict(limit=0)):
        with pytest.raises(ValueError, match=f'"{next(iter(bad))}" argument'):
            core.evaluate(model, tokenizer, **bad)
        with pytest.raises(ValueError, match=f'"{next(iter(bad))}" argument'):
            task_scores(model, tokenizer, ["demo_units"], **bad)
    everything = task_scores(model, tokenizer, ["demo_units"], limit=None)["tasks"]["demo_units"]
    assert everything["items"] == tasks.ITEMS
