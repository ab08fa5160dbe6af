"""What a model can do and how well it predicts text: lm-evaluation-harness tasks, and perplexity by domain."""

import math
import platform
import time

import torch
from tqdm.auto import tqdm

from hcsmoe_core.calibration import calibration_tokens, domains_of
from hcsmoe_core.capture import check_tokens
from hcsmoe_core.demo import corpus
from hcsmoe_core.demo import tasks as demo_tasks
from hcsmoe_core.files import check_count
from hcsmoe_core.version import __version__


def evaluate(model, tokenizer, tasks=None, *, limit=None, batch_size=64, text="demo", sequences=96, length=256, seed=0):
    """Score a model, merged or not.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    tasks : list of str, optional
        lm-evaluation-harness tasks, zero-shot; by default the eight embedded ones (``demo_arithmetic``, …), whose items
        lie in the package. Others are fetched by the harness. An empty list scores none.
    limit : int, optional
        Items of each task, from its beginning; by default all.
    batch_size : int
    text : str or path or None
        What perplexity is measured on: a source as for :func:`calibration_tokens` (of ``"demo"``, held-out text of every
        domain), or None for none.
    sequences, length : int
        Of that text.
    seed : int
        Of that text, and of the harness.

    Returns
    -------
    dict
        ``tasks`` (by name: ``acc``, ``acc_norm``, their ``_stderr``, ``items``), ``mean_acc`` and ``mean_acc_norm`` with
        standard errors, ``loss`` (by domain, nats a token) and ``perplexity``, ``mean_loss`` (over the domains that do
        not depend on the Python version), ``settings``, ``versions`` and ``seconds``.

    Raises
    ------
    ValueError
        If a task is unknown, or there is no tokenizer.
    ImportError
        If lm-evaluation-harness is not installed.
    """
    tasks = list(demo_tasks.NAMES) if tasks is None else list(tasks)
    if tokenizer is None:
        raise ValueError("Scoring needs the model's tokenizer, and its folder has none; give one.")
    check_count("batch_size", batch_size, 1)
    started = time.perf_counter()
    scores = {"tasks": task_scores(model, tokenizer, tasks, limit=limit, batch_size=batch_size, seed=seed) if tasks else {}}
    for metric in ("acc", "acc_norm"):
        scores |= _mean_score(scores["tasks"], metric)
    seconds = {"tasks": round(time.perf_counter() - started, 2)}
    if text is not None:
        started = time.perf_counter()
        split = "heldout" if text == "demo" else None
        rows = calibration_tokens(text, tokenizer, sequences=sequences, length=length, seed=seed, split=split)
        scores |= perplexity(model, rows, domains=domains_of(text, sequences), batch_size=max(1, batch_size // 4))
        seconds["perplexity"] = round(time.perf_counter() - started, 2)
    scores["settings"] = dict(
        tasks=tasks, limit=limit, batch_size=batch_size, text=text and str(text), sequences=sequences, length=length, seed=seed
    )
    scores["settings"] |= {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    return scores | {"versions": versions(), "seconds": seconds}


def task_scores(model, tokenizer, tasks, *, limit=None, batch_size=64, seed=0):
    """Accuracy on tasks of lm-evaluation-harness, by task; see :func:`evaluate`."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError('Scoring needs lm-evaluation-harness: pip install "hcsmoe[eval]"') from None
    own = [t for t in tasks if t in demo_tasks.NAMES]
    others = [t for t in tasks if t not in own]
    manager = TaskManager(include_defaults=bool(others))  # indexing the harness' own tasks takes seconds
    unknown = [t for t in others if t not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f'The "tasks" argument names {", ".join(unknown)}, which the harness does not know; the embedded tasks are '
            f"{', '.join(demo_tasks.NAMES)}, and lm-eval ls tasks lists the others."
        )
    # The embedded models were trained with one <|endoftext|> before every text.
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=True if own else None)
    found = lm_eval.simple_evaluate(
        model=harness,
        tasks=[demo_tasks.configuration(t) if t in own else t for t in tasks],
        limit=limit,
        task_manager=manager,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    scores = {}
    for task in tasks:
        values = found["results"][task]
        numbers = {k.split(",")[0]: v for k, v in values.items() if k.endswith(",none") and isinstance(v, int | float)}
        scores[task] = numbers | {"items": found["n-samples"][task]["effective"]} if task in found["n-samples"] else numbers
    return scores


def _mean_score(tasks, metric):
    """Plain mean over tasks, and its standard error if the tasks' are independent."""
    values = [(t[metric], t[f"{metric}_stderr"]) for t in tasks.values() if metric in t]
    if not values:
        return {}
    error = math.sqrt(sum(e**2 for _, e in values)) / len(values)
    return {f"mean_{metric}": sum(v for v, _ in values) / len(values), f"mean_{metric}_stderr": error}


def perplexity(model, input_ids, *, domains=None, batch_size=16):
    """How well a model predicts text: mean loss a token (nats) and its exponential, by domain.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    input_ids : (N, S) int64 tensor
        Each token but the first of a row is predicted from those before it in the row.
    domains : sequence of N str, optional
    batch_size : int

    Returns
    -------
    dict
        ``loss`` and ``perplexity`` by domain, and ``mean_loss``, the plain mean over the domains. Text of the Python
        library differs between Python versions: where there are domains, ``code`` and ``prose`` are left out of the
        mean.
    """
    input_ids = check_tokens(input_ids, model)
    domains = list(domains or ["all"] * len(input_ids))
    losses = {}
    with torch.no_grad():
        for start in tqdm(range(0, len(input_ids), batch_size), desc="perplexity", unit="batch", disable=None, leave=False):
            rows = input_ids[start : start + batch_size].to(model.device)
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
            for domain, value in zip(domains[start:], loss.double().mean(1).tolist(), strict=False):
                losses.setdefault(domain, []).append(value)
    loss = {d: sum(v) / len(v) for d, v in losses.items()}
    counted = [v for d, v in loss.items() if d not in corpus.STDLIB] or list(loss.values())
    return {
        "loss": loss,
        "perplexity": {d: math.exp(v) for d, v in loss.items()},
        "mean_loss": sum(counted) / len(counted),
    }


def versions():
    """Versions of everything that a score may depend on."""
    import importlib.metadata

    found = {"hcsmoe": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "lm_eval", "datasets", "scipy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def score_table(scores):
    """Scores of :func:`evaluate` as lines of text."""
    lines = [f"{'task':<24}{'acc':>8}{'±':>8}{'acc_norm':>10}{'±':>8}{'items':>8}"]
    for name, task in scores["tasks"].items():
        if "acc" not in task:
            lines.append(f"{name:<24}" + "  ".join(f"{k} {v:.4f}" for k, v in task.items() if k != "items"))
            continue
        norm = f"{task['acc_norm']:>10.4f}{task['acc_norm_stderr']:>8.4f}" if "acc_norm" in task else " " * 18
        lines.append(f"{name:<24}{task['acc']:>8.4f}{task['acc_stderr']:>8.4f}{norm}{task.get('items', ''):>8}")
    if "mean_acc" in scores:
        norm = f"{scores['mean_acc_norm']:>10.4f}{scores['mean_acc_norm_stderr']:>8.4f}" if "mean_acc_norm" in scores else ""
        lines.append(f"{'mean':<24}{scores['mean_acc']:>8.4f}{scores['mean_acc_stderr']:>8.4f}{norm}")
    if "loss" in scores:
        lines.append(f"\n{'text':<24}{'loss':>8}{'perplexity':>12}")
        for name, loss in scores["loss"].items():
            note = "  (depends on the Python version; not in the mean)" if name in corpus.STDLIB else ""
            lines.append(f"{name:<24}{loss:>8.4f}{scores['perplexity'][name]:>12.4f}{note}")
        lines.append(f"{'mean':<24}{scores['mean_loss']:>8.4f}")
    return "\n".join(lines)
