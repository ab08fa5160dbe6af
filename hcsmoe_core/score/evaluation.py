"""What a model can do and how well it predicts text: tasks of lm-evaluation-harness, perplexity by domain."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import (
    MissingPackageError,
    Table,
    check_count,
    check_kind,
    read_record,
    require,
    sha256_json,
    versions,
)
from hcsmoe_core.collect import check_tokens, forward_options
from hcsmoe_core.scale.streaming import replaced_forwards
from hcsmoe_core.text.calibration import SOURCES, calibration_tokens, domains_of, scoring_of

PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")
TASKS = Table("task")  # name -> TaskSource, beside those of the harness; a floor above may add its own
LOGITS = 1 << 28  # of a batch, that are in memory at once while perplexity is measured


@dataclass(frozen=True)
class TaskSource:
    """A task that is not one of lm-evaluation-harness' own.

    Attributes
    ----------
    configuration : callable ``(name)``
        Gives the task as the harness describes one, a dict.
    default : bool
        Whether :func:`evaluate` scores it where no tasks are named.
    bos : bool
        Whether a model must see its token for the beginning of a text before each item.
    """

    configuration: Callable[[str], dict]
    default: bool = False
    bos: bool = False


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Any = None,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    text: Any = "demo",
    sequences: int = 96,
    length: int = 256,
    seed: int = 0,
    answers: Any = None,
    lm_eval_out: Any = None,
) -> dict:
    """Score a model, merged or not.

    Parameters
    ----------
    tasks : list of str, optional
        Tasks of :data:`TASKS` or of lm-evaluation-harness; by default the embedded ones (``demo_arithmetic``,
        …). An empty list scores none.
    limit : int, optional
        Items of each task and subtask, from its beginning; by default all.
    text : str or path or None
        Source of :func:`hcsmoe_core.calibration_tokens` for perplexity; its held-out split, if it has one.
    sequences, length : int
        Of that text.
    batch_size, seed : int
    answers : str or path, optional
        Folder that keeps a model's answers, so that no question is asked twice; by default none.
    lm_eval_out : str or path, optional
        Folder for results and samples in the harness' own format; by default they are not written.

    Returns
    -------
    dict
        ``tasks``, ``items`` and ``groups`` of :func:`task_scores`; ``mean_acc`` and ``mean_acc_norm`` with
        standard errors; what :func:`perplexity` gives; ``settings``, ``versions`` and ``seconds``.

    Errors are those of :func:`task_scores`; InputError also without a tokenizer.
    """
    tasks = [name for name, task in TASKS.items() if task.default] if tasks is None else list(tasks)
    require(tokenizer is not None, "Scoring needs the model's tokenizer, and its folder has none; give one.")
    options = {"limit": limit, "batch_size": batch_size, "seed": seed}
    started = time.perf_counter()
    scores = task_scores(model, tokenizer, tasks, answers=answers, lm_eval_out=lm_eval_out, **options)
    scores |= _mean_score(scores["tasks"], "acc") | _mean_score(scores["tasks"], "acc_norm")
    seconds = {"tasks": round(time.perf_counter() - started, 2)}
    size = {"sequences": sequences, "length": length}
    if text is not None:
        started, (split, uncounted) = time.perf_counter(), scoring_of(text)
        rows = calibration_tokens(text, tokenizer, model=model, seed=seed, split=split, **size)
        how = dict(domains=domains_of(text, sequences), batch_size=max(1, batch_size // 4))
        scores |= perplexity(model, rows, uncounted=uncounted, **how)
        seconds["perplexity"] = round(time.perf_counter() - started, 2)
    settings = {"tasks": tasks, "text": text and str(text), **options, **size} | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
    }
    return scores | {"settings": settings, "versions": versions(), "seconds": seconds}


def task_scores(
    model,
    tokenizer,
    tasks: list[str],
    *,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    answers=None,
    lm_eval_out=None,
) -> dict:
    """Scores on tasks of lm-evaluation-harness; arguments as for :func:`evaluate`.

    Returns
    -------
    dict
        ``tasks`` by name: ``acc``, ``acc_norm`` or what else the harness reports, their ``_stderr``,
        ``items``, ``shots`` and ``version``; ``items`` by task, or subtask of a group: each item's value of
        each metric, and a hash ``of`` the items, for :func:`paired`; ``groups``: their subtasks, and whether
        these count ``by_size``.

    Raises
    ------
    InputError, FileNotFoundError, ImportError
        If a task is unknown, its data are neither local nor available, or lm-evaluation-harness is not
        installed.
    """
    check_count("batch_size", batch_size, 1)
    check_count("limit", 1 if limit is None else limit, 1)
    if not tasks:
        return {"tasks": {}}
    check_tasks(tasks)
    import lm_eval

    from hcsmoe_core.score.harness import Answering, load_tasks, quiet, save_output

    loaded = load_tasks(tasks)
    bos = any(name in TASKS and TASKS[name].bos for name in tasks) or None
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    with quiet():
        output = lm_eval.simple_evaluate(
            model=Answering(model, tokenizer, answers, seed, batch_size=batch_size, add_bos_token=bos),
            tasks=list(loaded.values()),
            task_manager=lm_eval.tasks.TaskManager(include_defaults=False),  # the tasks are loaded
            limit=limit,
            log_samples=True,
            **dict.fromkeys(seeds, seed),
        )
    if lm_eval_out is not None:
        save_output(output, str(model.name_or_path), lm_eval_out)
    groups = {name: loaded[name] for name in output["group_subtasks"] if name in loaded}
    subtasks = {name: [task.task_name for task in group.get_all_tasks()] for name, group in groups.items()}
    by_size = {
        k: all(rule.weight_by_size for rule in g.aggregate_metric_list or ()) for k, g in groups.items()
    }
    return {
        "tasks": {name: _scores(name, subtasks.get(name, [name]), output) for name in loaded},
        "items": {task: _items(rows) for task, rows in output["samples"].items()},
        "groups": {name: {"tasks": subtasks[name], "by_size": by_size[name]} for name in groups},
    }


def check_tasks(tasks: list[str]):
    """Raise InputError if the harness knows no task of some name, or is not installed."""
    try:
        from hcsmoe_core.score.harness import check_tasks as check
    except ImportError:
        raise MissingPackageError('Scoring needs lm-evaluation-harness: pip install "hcsmoe[eval]"') from None
    check(tasks)


def _scores(name, subtasks, output):
    """What the harness reports of a task, metrics such as ``"acc,none"`` as ``"acc"``."""
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in output["results"][name].items()
        if "," in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return metrics | {
        "items": sum(output["n-samples"][task]["effective"] for task in subtasks),
        "shots": max(output["n-shot"][task] for task in subtasks),
        "version": str(output["versions"][name]),
    }


def _items(rows):
    """Each item's value of each metric that is a number, by metric, and a hash of the items themselves."""
    items = {"of": sha256_json([[row["doc_hash"], row["target_hash"], row["filter"]] for row in rows])[:16]}
    for row in rows:
        for metric in row["metrics"]:
            value, name = row[metric], metric if row["filter"] == "none" else f"{metric},{row['filter']}"
            if isinstance(value, int | float):
                items.setdefault(name, []).append(int(value) if value == int(value) else float(value))
    return items


def _mean_score(tasks, metric):
    """Plain mean over tasks, and its standard error if the tasks' are independent."""
    values = [task[metric] for task in tasks.values() if metric in task]
    errors = [task.get(f"{metric}_stderr", math.nan) for task in tasks.values() if metric in task]
    mean = {f"mean_{metric}": sum(values) / max(len(values), 1)}
    return mean | {f"mean_{metric}_stderr": math.hypot(*errors) / len(values)} if values else {}


def load_scores(path) -> dict:
    """Scores in a ``results.json`` of ``hcsmoe evaluate --out``, for :func:`paired`.

    InputError naming the file and the field if it has not the values of each item.
    """
    remedy = f"Make one with: hcsmoe evaluate MODEL --out {path}"
    kind = {"scores": {"tasks": dict, "items": {str: {"of": str}}}}
    scores = read_record(path, kind, what="results.json with the scores of each item", remedy=remedy)[
        "scores"
    ]
    for task, items in scores["items"].items():
        for metric in items.keys() - {"of"}:
            check_kind(items[metric], [float], f'{path}, scores of {task}, "{metric}":')
    return scores


def paired(scores: dict, against: dict, *, metrics=("acc", "acc_norm")):
    """Differences of two models' scores on the same items, task by task.

    Because the items are the same, the error is that of the items' differences, which is smaller than the two
    standard errors together: both models find the same items easy. Over the subtasks of a group it is pooled
    as the harness pools standard errors; for the mean over tasks, tasks count as independent.

    Parameters
    ----------
    scores, against : dict
        Of :func:`evaluate`, on the same tasks with the same limit; tasks that only one of them has are left
        out.
    metrics : sequence of str

    Returns
    -------
    pandas.DataFrame
        A row for each ``metric`` and ``task``, and for the tasks' ``mean``: ``score``, ``against``,
        ``difference`` (score − against), its standard ``error``, ``won`` and ``lost`` (items that count more,
        or less, than against) and ``items``.

    Raises
    ------
    InputError
        If they have no task in common, or were not scored on the same items.
    """
    import pandas as pd

    rows, shared = [], [task for task in scores["tasks"] if task in against["tasks"]]
    for metric in metrics:
        tasks = [row for task in shared if (row := _paired_task(task, metric, scores, against))]
        rows += tasks
        if len(tasks) > 1:
            totals = {key: sum(row[key] for row in tasks) for key in tasks[0].keys() - {"metric", "task"}}
            totals["error"] = math.hypot(*(row["error"] for row in tasks))
            means = {key: totals[key] / len(tasks) for key in ("score", "against", "difference", "error")}
            rows.append({"metric": metric, "task": "mean"} | totals | means)
    require(
        rows,
        f'The two results have no items of "{" or ".join(metrics)}" in common: one has tasks '
        f"{', '.join(scores['tasks'])}, the other {', '.join(against['tasks'])}; score both on the same "
        "tasks, with this version.",
    )
    return pd.DataFrame(rows)


def _paired_task(task, metric, scores, against):
    """One row of :func:`paired`, or None if the task has no such metric."""
    group = scores.get("groups", {}).get(task, {"tasks": [task], "by_size": True})
    pairs = []  # of each subtask, the items' values [2, n]
    for name in group["tasks"]:
        one, other = (side.get("items", {}).get(name, {}) for side in (scores, against))
        if metric not in one or metric not in other:
            return None
        require(
            one["of"] == other["of"] and len(one[metric]) == len(other[metric]),
            f"{name} was scored on {len(one[metric])} items here and on {len(other[metric])}, or on others, "
            'there; score both on the same items: the same "limit", and the same data.',
        )
        pairs.append(np.array([one[metric], other[metric]], float))
    changes = [pair[0] - pair[1] for pair in pairs]
    weights = [len(change) for change in changes] if group["by_size"] else None
    score, reference = np.average([pair.mean(1) for pair in pairs], axis=0, weights=weights).tolist()
    change = np.concatenate(changes)
    return {
        "metric": metric,
        "task": task,
        "score": score,
        "against": reference,
        "difference": score - reference,
        "error": _error(changes, group["by_size"]),
        "won": int((change > 0).sum()),
        "lost": int((change < 0).sum()),
        "items": len(change),
    }


def _error(changes, by_size):
    """Standard error of a mean change: pooled over subtasks as the harness does, or of their plain mean."""
    sizes = np.array([len(change) for change in changes])
    variances = np.array([change.var() for change in changes])
    with np.errstate(invalid="ignore"):  # 0/0, so nan, where a single item tells no spread
        return float(
            np.sqrt(variances @ sizes / (sizes.sum() - len(sizes)) / sizes.sum())
            if by_size
            else np.sqrt((variances / (sizes - 1)).sum()) / len(sizes)
        )


def paired_table(frame) -> str:
    """Lines of text, in percent, of what :func:`paired` gives."""
    line = "{task:<24}{against:>9.2f}{score:>9.2f}{difference:>+12.2f}{error:>10.2f}{won:>7}{lost:>7}"
    percent, lines = frame.copy(), []
    percent[["score", "against", "difference", "error"]] *= 100
    for metric, rows in percent.groupby("metric", sort=False):
        head = f"{metric + ', %':<24}  against    score  difference  ± paired    won   lost"
        lines += [head, *(line.format(**row) for row in rows.to_dict("records"))]
    return "\n".join(lines)


@torch.no_grad()
def perplexity(model, input_ids, *, domains=None, batch_size: int = 16, uncounted=None) -> dict:
    """How well a model predicts text: mean loss per token (nats) and its exponential, by domain.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    input_ids : (N, S) int64 tensor
        Each token but the first of a row is predicted from those before it in the row.
    domains : sequence of N str, optional
    batch_size : int
    uncounted : sequence of str, optional
        Domains that are left out of the mean where there are others; by default those that any source of
        :data:`hcsmoe_core.text.calibration.SOURCES` leaves out, such as code and prose of the embedded
        corpus, which differ between versions of Python.

    Returns
    -------
    dict
        ``loss`` and ``perplexity`` by domain, and ``mean_loss``, the plain mean over the domains that count.
    """
    batches, by_domain = check_tokens(input_ids, model).split(batch_size), {}
    bar = tqdm(batches, desc="perplexity", unit="batch", disable=None, leave=False)
    of_rows = torch.cat([_losses(model, batch.to(model.device)).double().mean(1) for batch in bar]).tolist()
    for domain, value in zip(domains or ["all"] * len(of_rows), of_rows, strict=True):
        by_domain.setdefault(domain, []).append(value)
    loss = {domain: sum(values) / len(values) for domain, values in by_domain.items()}
    if uncounted is None:
        uncounted = {domain for source in SOURCES.values() for domain in source.uncounted}
    counted = [value for domain, value in loss.items() if domain not in uncounted] or list(loss.values())
    return {
        "loss": loss,
        "perplexity": {domain: math.exp(value) for domain, value in loss.items()},
        "mean_loss": sum(counted) / len(counted),
    }


def _losses(model, rows):
    """Loss ``[B, S - 1]`` of each token of a batch but the first, from at most ``LOGITS`` logits at once."""
    input_ids, targets = rows[:, :-1], rows[:, 1:]
    size = max(1, LOGITS // (len(rows) * model.config.get_text_config().vocab_size))
    blocks = zip(_logits(model, input_ids, size), targets.split(size, 1), strict=True)
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(logits.float().mT, wanted, reduction="none")
            for logits, wanted in blocks
        ],
        1,
    )


def _logits(model, input_ids, size):
    """Logits of a batch ``[B, S]`` in blocks of positions.

    The hidden states are computed once; the model's own class makes logits of some of them at a time.
    """
    if size >= input_ids.shape[1] or not forward_options(model):  # the class makes those of all positions
        yield from model(input_ids=input_ids, use_cache=False).logits.split(size, 1)
        return
    hidden = model.base_model(input_ids=input_ids, use_cache=False)
    with replaced_forwards([model.base_model], [lambda *_, **__: hidden]):
        for positions in torch.arange(input_ids.shape[1], device=input_ids.device).split(size):
            yield model(input_ids=input_ids, use_cache=False, logits_to_keep=positions).logits


def score_table(scores: dict) -> str:
    """Lines of text of what :func:`evaluate` gives."""
    means = {key.removeprefix("mean_"): value for key, value in scores.items() if key.startswith("mean_acc")}
    tasks = scores["tasks"] | ({"mean": means} if "acc" in means else {})
    lines = [f"{'task':<24}     acc       ±  acc_norm       ±   items"]
    lines += [f"{name:<24}{_cells(task)}".rstrip() for name, task in tasks.items()]
    if "loss" in scores:
        _, uncounted = scoring_of(scores["settings"]["text"])
        lines.append(f"\n{'text':<24}    loss  perplexity")
        for name, loss in scores["loss"].items():
            note = "  (depends on the Python version; not in the mean)" if name in uncounted else ""
            lines.append(f"{name:<24}{loss:>8.4f}{scores['perplexity'][name]:>12.4f}{note}")
        lines.append(f"{'mean':<24}{scores['mean_loss']:>8.4f}")
    return "\n".join(lines)


def _cells(task):
    """Accuracies of a task with their standard errors, which a single item lacks, or what else it has."""
    if "acc" not in task:
        return "  ".join(f"{key} {value:.4f}" for key, value in task.items() if isinstance(value, float))
    pairs = [(task[key], task.get(f"{key}_stderr", math.nan)) for key in ("acc", "acc_norm") if key in task]
    cells = "  ".join(f"{value:>8.4f}{error:>8.4f}" for value, error in pairs)
    return f"{cells:<34}{task.get('items', ''):>8}"
