"""What a model can do and how well it predicts text: lm-evaluation-harness tasks, and perplexity by domain."""

import math
import time

import numpy as np
import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import InputError, check_count, sha256_json, versions
from hcsmoe_core.collect import check_tokens
from hcsmoe_core.demo import corpus
from hcsmoe_core.demo import tasks as demo_tasks
from hcsmoe_core.text.calibration import calibration_tokens, domains_of, is_demo

PAPER_TASKS = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "mmlu", "openbookqa", "rte", "winogrande")


def evaluate(
    model,
    tokenizer,
    tasks=None,
    *,
    limit=None,
    batch_size=64,
    text="demo",
    sequences=96,
    length=256,
    seed=0,
    answers=None,
):
    """Score a model, merged or not.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    tasks : list of str, optional
        lm-evaluation-harness tasks, with as many shots as each says (those of :data:`PAPER_TASKS`: none); by default the
        eight embedded ones (``demo_arithmetic``, …), whose items lie in the package. The data of others come from the
        datasets cache or the hub. An empty list scores none.
    limit : int, optional
        Items of each task, from its beginning, and of each subtask of a group; by default all.
    batch_size : int
    text : str or path or None
        What perplexity is measured on: a source as for :func:`calibration_tokens` (of ``"demo"``, held-out text of every
        domain), or None for none.
    sequences, length : int
        Of that text.
    seed : int
        Of that text, and of the harness.
    answers : str or path, optional
        Folder in which what the model answered is kept, a file a task, and read from where the same model (all its weights
        are hashed) was asked the same; see :class:`hcsmoe_core.score.harness.Answering`. By default nothing is kept.

    Returns
    -------
    dict
        ``tasks`` (by name: ``acc``, ``acc_norm``, or what else the harness reports of the task, their ``_stderr``,
        ``items``), ``mean_acc`` and ``mean_acc_norm`` with standard errors; ``items`` (by task, the subtasks of a group one
        by one: each item's value of each metric, and a hash ``of`` the items, for :func:`paired`) and ``groups`` (which
        subtasks, and whether they are weighted by size); ``loss`` (by domain, nats a token) and ``perplexity``,
        ``mean_loss`` (over the domains that do not depend on the Python version), ``settings``, ``versions`` and ``seconds``.

    Raises
    ------
    ValueError
        If a task is unknown, or there is no tokenizer.
    FileNotFoundError
        If the data of a task are neither here nor to be had.
    ImportError
        If lm-evaluation-harness is not installed.
    """
    tasks = list(demo_tasks.NAMES) if tasks is None else list(tasks)
    if tokenizer is None:
        raise InputError("Scoring needs the model's tokenizer, and its folder has none; give one.")
    check_count("batch_size", batch_size, 1)
    if limit is not None:
        check_count("limit", limit, 1)
    started = time.perf_counter()
    options = dict(limit=limit, batch_size=batch_size, seed=seed, answers=answers)
    scores = task_scores(model, tokenizer, tasks, **options) if tasks else {"tasks": {}}
    for metric in ("acc", "acc_norm"):
        scores |= _mean_score(scores["tasks"], metric)
    seconds = {"tasks": round(time.perf_counter() - started, 2)}
    if text is not None:
        started = time.perf_counter()
        split = "heldout" if is_demo(text) else None
        size = dict(sequences=sequences, length=length)
        rows = calibration_tokens(text, tokenizer, model=model, seed=seed, split=split, **size)
        how = dict(domains=domains_of(text, sequences), uncounted=corpus.STDLIB if is_demo(text) else ())
        scores |= perplexity(model, rows, batch_size=max(1, batch_size // 4), **how)
        seconds["perplexity"] = round(time.perf_counter() - started, 2)
    scores["settings"] = dict(
        tasks=tasks,
        limit=limit,
        batch_size=batch_size,
        text=text and str(text),
        sequences=sequences,
        length=length,
        seed=seed,
    )
    scores["settings"] |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    return scores | {"versions": versions(), "seconds": seconds}


def task_scores(model, tokenizer, tasks, *, limit=None, batch_size=64, seed=0, answers=None):
    """Scores on tasks of lm-evaluation-harness: ``tasks``, ``items`` and ``groups`` of :func:`evaluate`."""
    try:
        import lm_eval
    except ImportError:
        raise ImportError('Scoring needs lm-evaluation-harness: pip install "hcsmoe[eval]"') from None
    from lm_eval.tasks import TaskManager

    from hcsmoe_core.score.harness import Answering, identity, load_tasks

    loaded = load_tasks(tasks)
    # The embedded models were trained with one <|endoftext|> before every text.
    options = dict(batch_size=batch_size, add_bos_token=True if set(tasks) & set(demo_tasks.NAMES) else None)
    about = None
    if answers is not None:
        about = options | {
            "model": identity(model, tokenizer),
            "dtype": str(model.dtype),
            "device": model.device.type,
        }
        about |= {"seed": seed, "versions": versions()}
    found = lm_eval.simple_evaluate(
        model=Answering(model, tokenizer, folder=answers, about=about, **options),
        tasks=list(loaded.values()),
        task_manager=TaskManager(include_defaults=False),  # the tasks are loaded
        limit=limit,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    items = {task: _items(rows) for task, rows in found["samples"].items()}
    groups, scores = {}, {}
    for name, task in loaded.items():
        if name in found["group_subtasks"]:
            rules = task.aggregate_metric_list or ()
            by_size = all(rule.weight_by_size for rule in rules)
            groups[name] = {"tasks": [t.task_name for t in task.get_all_tasks()], "by_size": by_size}
        numbers = {
            k.removesuffix(",none"): float(v) for k, v in found["results"][name].items() if _is_score(k, v)
        }
        parts = groups[name]["tasks"] if name in groups else [name]
        scores[name] = numbers | {"items": sum(found["n-samples"][part]["effective"] for part in parts)}
        scores[name] |= {
            "shots": max(found["n-shot"][part] for part in parts),
            "version": str(found["versions"][name]),
        }
    return {"tasks": scores, "items": items, "groups": groups}


def _is_score(key, value):
    return "," in key and isinstance(value, int | float) and not isinstance(value, bool)


def _items(rows):
    """Each item's value of each metric that is a number, by metric, and a hash of the items themselves."""
    found, seen = {}, []
    for row in rows:
        seen.append([row["doc_hash"], row["target_hash"], row["filter"]])
        for metric in row["metrics"]:
            value = row[metric]
            if isinstance(value, int | float):
                name = metric if row["filter"] == "none" else f"{metric},{row['filter']}"
                found.setdefault(name, []).append(int(value) if value == int(value) else float(value))
    return {"of": sha256_json(seen)[:16]} | found


def paired(scores, against, *, metrics=("acc", "acc_norm")):
    """How one model's scores differ from another's on the same items, task by task.

    The items are the same, so that the error is that of the items' differences, which is smaller than what the two standard
    errors add up to: both models find the same items easy. Of a group it is pooled over its subtasks as the harness pools
    standard errors, and of the mean over tasks the tasks count as independent.

    Parameters
    ----------
    scores, against : dict
        Of :func:`evaluate`, on the same tasks with the same limit; tasks that only one of them has are left out.
    metrics : sequence of str

    Returns
    -------
    pandas.DataFrame
        A row for each ``metric`` and ``task``, and for their ``mean``: ``score``, ``against``, ``difference`` (score less
        against), its standard ``error``, ``won`` and ``lost`` (items that count more, or less, than against) and ``items``.

    Raises
    ------
    ValueError
        If they have no task in common, or were not scored on the same items.
    """
    import pandas as pd

    rows = []
    for metric in metrics:
        mine = [_paired_task(t, metric, scores, against) for t in scores["tasks"] if t in against["tasks"]]
        mine = [row for row in mine if row is not None]
        if len(mine) > 1:
            mean = {
                key: sum(row[key] for row in mine) / len(mine) for key in ("score", "against", "difference")
            }
            mean["error"] = math.sqrt(sum(row["error"] ** 2 for row in mine)) / len(mine)
            mine.append(
                {"task": "mean"}
                | mean
                | {key: sum(row[key] for row in mine) for key in ("won", "lost", "items")}
            )
        rows += [{"metric": metric} | row for row in mine]
    if not rows:
        raise InputError(
            f"The two results have no items of {' or '.join(metrics)} in common: one has tasks {', '.join(scores['tasks'])}, "
            f"the other {', '.join(against['tasks'])}; score both on the same tasks, with this version."
        )
    return pd.DataFrame(rows)


def _paired_task(task, metric, scores, against):
    """One row of :func:`paired`, or None if the task has no such metric."""
    group = scores.get("groups", {}).get(task, {"tasks": [task], "by_size": True})
    parts = []
    for name in group["tasks"]:
        one, other = (found.get("items", {}).get(name, {}) for found in (scores, against))
        if metric not in one or metric not in other:
            return None
        if one["of"] != other["of"]:
            raise InputError(
                f"{name} was scored on {len(one[metric])} items here and on {len(other[metric])}, or on others, there; "
                "score both on the same items: the same limit, and the same data."
            )
        parts.append((np.array(one[metric], float), np.array(other[metric], float)))
    sizes = [len(one) for one, _ in parts]
    weights = sizes if group["by_size"] else None
    means = [float(np.average([pair[i].mean() for pair in parts], weights=weights)) for i in (0, 1)]
    changes = [one - other for one, other in parts]
    row = {"task": task, "score": means[0], "against": means[1], "difference": means[0] - means[1]}
    won, lost = (int(sum((sign * change > 0).sum() for change in changes)) for sign in (1, -1))
    return row | {"error": _error(changes, group["by_size"]), "won": won, "lost": lost, "items": sum(sizes)}


def _error(changes, by_size):
    """Standard error of a mean change: within subtasks, pooled as the harness pools it, or of the plain mean of their means."""
    squares, sizes = [((c - c.mean()) ** 2).sum() for c in changes], [len(c) for c in changes]
    if by_size:
        free = sum(sizes) - len(sizes)
        return math.sqrt(sum(squares) / free / sum(sizes)) if free else math.nan
    if min(sizes) == 1:
        return math.nan
    return math.sqrt(sum(square / (n - 1) / n for square, n in zip(squares, sizes, strict=True))) / len(sizes)


def paired_table(frame):
    """What :func:`paired` found as lines of text, in percent."""
    lines = []
    for metric, part in frame.groupby("metric", sort=False):
        lines.append(
            f"{metric + ', %':<24}{'against':>9}{'score':>9}{'difference':>12}{'± paired':>10}{'won':>7}{'lost':>7}"
        )
        for row in part.to_dict("records"):
            numbers = (
                f"{100 * row['against']:>9.2f}{100 * row['score']:>9.2f}{100 * row['difference']:>+12.2f}"
            )
            lines.append(
                f"{row['task']:<24}{numbers}{100 * row['error']:>10.2f}{row['won']:>7}{row['lost']:>7}"
            )
    return "\n".join(lines)


def _mean_score(tasks, metric):
    """Plain mean over tasks, and its standard error if the tasks' are independent."""
    values = [(t[metric], t.get(f"{metric}_stderr", math.nan)) for t in tasks.values() if metric in t]
    if not values:
        return {}
    error = math.sqrt(sum(e**2 for _, e in values)) / len(values)
    return {f"mean_{metric}": sum(v for v, _ in values) / len(values), f"mean_{metric}_stderr": error}


def perplexity(model, input_ids, *, domains=None, batch_size=16, uncounted=corpus.STDLIB):
    """How well a model predicts text: mean loss a token (nats) and its exponential, by domain.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    input_ids : (N, S) int64 tensor
        Each token but the first of a row is predicted from those before it in the row.
    domains : sequence of N str, optional
    batch_size : int
    uncounted : sequence of str
        Domains that are left out of the mean where there are others. Text of the Python library differs between Python
        versions: of the embedded corpus they are ``code`` and ``prose``.

    Returns
    -------
    dict
        ``loss`` and ``perplexity`` by domain, and ``mean_loss``, the plain mean over the domains that count.
    """
    input_ids = check_tokens(input_ids, model)
    domains = list(domains or ["all"] * len(input_ids))
    losses = {}
    with torch.no_grad():
        for start in tqdm(
            range(0, len(input_ids), batch_size), desc="perplexity", unit="batch", disable=None, leave=False
        ):
            rows = input_ids[start : start + batch_size].to(model.device)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            for domain, value in zip(domains[start:], loss.double().mean(1).tolist(), strict=False):
                losses.setdefault(domain, []).append(value)
    loss = {d: sum(v) / len(v) for d, v in losses.items()}
    counted = [v for d, v in loss.items() if d not in uncounted] or list(loss.values())
    return {
        "loss": loss,
        "perplexity": {d: math.exp(v) for d, v in loss.items()},
        "mean_loss": sum(counted) / len(counted),
    }


def score_table(scores):
    """Scores of :func:`evaluate` as lines of text."""
    lines = [f"{'task':<24}{'acc':>8}{'±':>8}{'acc_norm':>10}{'±':>8}{'items':>8}"]
    for name, task in scores["tasks"].items():
        if "acc" not in task:
            lines.append(
                f"{name:<24}" + "  ".join(f"{k} {v:.4f}" for k, v in task.items() if isinstance(v, float))
            )
            continue
        error, norm_error = (
            task.get(f"{metric}_stderr", math.nan) for metric in ("acc", "acc_norm")
        )  # none of one item
        norm = f"{task['acc_norm']:>10.4f}{norm_error:>8.4f}" if "acc_norm" in task else " " * 18
        lines.append(f"{name:<24}{task['acc']:>8.4f}{error:>8.4f}{norm}{task.get('items', ''):>8}")
    if "mean_acc" in scores:
        norm = (
            f"{scores['mean_acc_norm']:>10.4f}{scores['mean_acc_norm_stderr']:>8.4f}"
            if "mean_acc_norm" in scores
            else ""
        )
        lines.append(f"{'mean':<24}{scores['mean_acc']:>8.4f}{scores['mean_acc_stderr']:>8.4f}{norm}")
    if "loss" in scores:
        lines.append(f"\n{'text':<24}{'loss':>8}{'perplexity':>12}")
        for name, loss in scores["loss"].items():
            apart = name in corpus.STDLIB and is_demo(scores["settings"]["text"])
            note = "  (depends on the Python version; not in the mean)" if apart else ""
            lines.append(f"{name:<24}{loss:>8.4f}{scores['perplexity'][name]:>12.4f}{note}")
        lines.append(f"{'mean':<24}{scores['mean_loss']:>8.4f}")
    return "\n".join(lines)
