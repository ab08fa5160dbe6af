"""The paper's tasks through the harness' own code, offline, on rows of ours in the data sets' schemas."""

import json
import math
import re

import naive
import numpy as np
import pytest
import task_rows
import torch
from test_cli import hcsmoe

import hcsmoe_core as core
from hcsmoe_core.score.evaluation import PAPER_TASKS, paired

SUBJECTS = 57


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A datasets cache that holds the eight tasks, wikitext and gsm8k, and nothing else."""
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("hub")
    configured = TaskManager().task_index["mmlu_anatomy"].yaml_path.parent.glob("mmlu_*.yaml")
    subjects = sorted(path.stem.removeprefix("mmlu_") for path in configured)
    assert len(subjects) == SUBJECTS
    task_rows.fill(folder / "datasets", folder / "sources", task_rows.SETS | task_rows.mmlu(subjects))
    return folder


@pytest.fixture(scope="module")
def results(cache):
    """What the command says and writes of an embedded model and of its merged folder."""
    model, tokenizer = core.load_model("demo-mixtral", dtype="float32")
    stats = core.capture(model, core.calibration_tokens("demo", tokenizer, sequences=12, length=64))
    core.save_merged(model, core.make_plan(stats, model, experts=4), cache / "merged", tokenizer=tokenizer)
    options = (
        "--tasks",
        "paper,wikitext,gsm8k",
        "--text",
        "none",
        "--batch-size",
        8,
        "--answers",
        cache / "answers",
    )
    options += ("--dtype", "float32", "--device", "cpu")
    offline = dict(HF_HOME=str(cache), HF_HUB_OFFLINE="1")
    hcsmoe("evaluate", "demo-mixtral", *options, "--out", cache / "original.json", **offline)
    against = ("--against", cache / "original.json", "--out", cache / "merged.json")
    said = hcsmoe("evaluate", cache / "merged", *options, *against, **offline)
    read = [json.loads((cache / f"{name}.json").read_text())["scores"] for name in ("original", "merged")]
    return *read, said


def asked():
    """The questions as the tasks put them, written out here: prompt, choices and the right one, by task."""
    letters = list("ABCD")
    arc = [
        (f"Question: {r['question']}\nAnswer:", r["choices"]["text"], r["answerKey"]) for r in task_rows.ARC
    ]
    arc = [(p, c, {"A": 0, "2": 1, "C": 2, "D": 3}[key]) for p, c, key in arc]
    found = {"arc_easy": arc, "arc_challenge": arc}
    found["boolq"] = [
        (f"The number {n} is halved.\nQuestion: is {n} even?\nAnswer:", ["no", "yes"], 1 - n % 2)
        for n in range(4)
    ]
    endings = ["boils.", "sings a song.", "reads book.", "is a mountain in winter."]
    found["hellaswag"] = [(f"Cooking: Pot {i}. is on the stove. The water", endings, i % 4) for i in range(5)]
    needs = ["light", "gold", "noise", "a new car"]
    found["openbookqa"] = [(f"Plant {i} needs", needs, answer) for i, answer in enumerate((0, 1, 3, 2))]
    found["rte"] = [
        (f"A cat sleeps.\nQuestion: {who} sleeps. True or False?\nAnswer:", ["True", "False"], i)
        for i, who in enumerate(("An animal", "A dog"))
    ]
    found["winogrande"] = [
        (
            [f"Cup {i} did not fit in the box because the {what}" for what in ("cup", "box")],
            [f"was too {'big' if answer == 0 else 'small'}."] * 2,
            answer,
        )
        for i, answer in enumerate((0, 1, 1, 0, 1))
    ]
    for subject, splits in task_rows.mmlu(["abstract_algebra", "anatomy"])["cais/mmlu"].items():
        topic = subject.replace("_", " ")
        found[f"mmlu_{subject}"] = [
            (
                f"The following are multiple choice questions (with answers) about {topic}.\n\n"
                + f"{row['question'].strip()}\n"
                + "\n".join(
                    f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"], strict=True)
                )
                + "\nAnswer:",
                letters,
                row["answer"],
            )
            for row in splits["test"]
        ]
    return {
        t: [dict(zip(("prompt", "choices", "answer"), row, strict=True)) for row in rows]
        for t, rows in found.items()
    }


@pytest.mark.slow
def test_every_item_is_scored_as_a_naive_scorer_does(results, cache):
    for which, scores in zip(("demo-mixtral", cache / "merged"), results, strict=False):
        model, tokenizer = core.load_model(which, dtype="float32", device="cpu")
        total = 0
        for task, items in asked().items():
            hits, normed = naive.hits(model, tokenizer, items, delimiter=" ")
            assert scores["items"][task]["acc"] == hits, task
            total += sum(hits)
            if task in scores["tasks"]:
                assert scores["tasks"][task]["acc"] == pytest.approx(np.mean(hits))
                assert scores["tasks"][task]["acc_stderr"] == pytest.approx(
                    np.std(hits, ddof=1) / math.sqrt(len(hits))
                )
                assert scores["tasks"][task]["items"] == len(items)
                assert scores["tasks"][task]["shots"] == 0
            if "acc_norm" in scores["items"][task]:
                assert scores["items"][task]["acc_norm"] == normed, task
                assert scores["tasks"][task]["acc_norm"] == pytest.approx(np.mean(normed))
        assert 5 < total < 25  # some right, some wrong
    assert {t for t in PAPER_TASKS if "acc_norm" in results[0]["tasks"][t]} == {
        "arc_challenge", "arc_easy", "hellaswag", "openbookqa"
    }  # fmt: skip


@pytest.mark.slow
def test_a_group_counts_every_item_alike_and_pools_its_errors(results):
    original, merged, said = results
    subjects = [task for task in original["items"] if task.startswith("mmlu_")]
    assert len(subjects) == SUBJECTS
    items = [np.array(original["items"][task]["acc"]) for task in subjects]
    assert len({len(i) for i in items}) == 2  # otherwise a plain mean over the subjects would do
    found, count = original["tasks"]["mmlu"], sum(map(len, items))
    assert found["acc"] == pytest.approx(np.concatenate(items).mean())
    assert found["items"] == count
    within = sum(((i - i.mean()) ** 2).sum() for i in items) / (count - SUBJECTS)
    assert found["acc_stderr"] == pytest.approx(math.sqrt(within / count))
    table = paired(merged, original).set_index(["metric", "task"])
    changes = [
        np.array(merged["items"][task]["acc"]) - np.array(original["items"][task]["acc"]) for task in subjects
    ]
    row = table.loc["acc", "mmlu"]
    assert row["difference"] == pytest.approx(np.concatenate(changes).mean())
    assert row["difference"] == pytest.approx(merged["tasks"]["mmlu"]["acc"] - found["acc"])
    within = sum(((c - c.mean()) ** 2).sum() for c in changes) / (count - SUBJECTS)
    assert row["error"] == pytest.approx(math.sqrt(within / count))
    assert row["won"] + row["lost"] == np.abs(np.concatenate(changes)).sum() > 0
    assert re.search(rf"mmlu +{100 * found['acc']:.2f} +{100 * merged['tasks']['mmlu']['acc']:.2f}", said)


@pytest.mark.slow
def test_word_perplexity_is_that_of_the_pages(results):
    model, tokenizer = core.load_model("demo-mixtral", dtype="float32", device="cpu")
    loss, words, letters = 0, 0, 0
    for i in range(3):
        text = f" = Page {i} =\nA page of {i} words, and of-signs.\n"  # the raw page, less spaces and signs
        ids = [
            tokenizer.bos_token_id,
            *tokenizer(text)["input_ids"],
        ]  # the harness puts one before the tokenizer's own
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        loss -= sum(logprobs[j, ids[j + 1]].item() for j in range(len(ids) - 1))
        words += 17  # between the white space of the raw page, and two empty ones at its ends
        letters += len(task_rows.WIKITEXT[i]["page"])
    found = results[0]["tasks"]["wikitext"]
    assert found["word_perplexity"] == pytest.approx(math.exp(loss / words), rel=1e-4)
    assert found["byte_perplexity"] == pytest.approx(math.exp(loss / letters), rel=1e-4)


@pytest.mark.slow
def test_a_task_that_writes_is_reported_as_the_harness_does(results, cache):
    found = results[0]["tasks"]["gsm8k"]
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= set(found)
    assert (found["items"], found["shots"]) == (6, 5)
    kept = [json.loads(p.read_text()) for p in (cache / "answers/gsm8k").glob("*.json")]
    assert len(kept) == 2  # one for each model
    assert kept[0]["about"]["model"] != kept[1]["about"]["model"]
    assert all(isinstance(text, str) for file in kept for text in file["answers"])


@pytest.mark.slow
def test_data_that_are_not_here_are_named(tmp_path):
    tasks = ("--tasks", "arc_easy,demo_units,mmlu", "--text", "none", "--answers", tmp_path / "answers")
    error = hcsmoe(
        "evaluate", "demo-mixtral", *tasks, fails=True, HF_HOME=str(tmp_path / "empty"), HF_HUB_OFFLINE="1"
    )
    assert (
        f"The data of arc_easy, mmlu are neither in the datasets cache ({tmp_path / 'empty' / 'datasets'})"
        in error
    )
    assert "arc_easy: " in error
    assert "allenai/ai2_arc" in error
    assert "cais/mmlu" in error
    assert "hcsmoe evaluate demo-qwen --tasks arc_easy,mmlu --limit 2" in error
    assert not (tmp_path / "answers").exists()
