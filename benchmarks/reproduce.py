"""The HC-SMoE paper's main tables on its own models: their cost told beforehand, then measured, beside the
published.

``python benchmarks/reproduce.py qwen1.5-moe`` (the paper's Table 2) or ``mixtral-8x7b`` (Table 3);
``--dry-run`` lists every step with its cost and needs neither network nor weights.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hcsmoe_core._util import InputError, check_choice, read_json, sha256_json, versions
from hcsmoe_core.checkpoint import device_of, load_model, load_skeleton, skeleton_of
from hcsmoe_core.demo import tasks as demo_tasks
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import make_plan, resolve
from hcsmoe_core.methods.pruning import ENUMERATED, TOKENS
from hcsmoe_core.moe import source_of
from hcsmoe_core.scale.streaming import LAYER, WHOLE, free_memory, open_model, stream_merged, work_folder
from hcsmoe_core.score.evaluation import evaluate, paired
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE
from hcsmoe_core.studies import paper, runner, sweep
from hcsmoe_core.studies.cache import cached_statistics, slug
from hcsmoe_core.studies.comparison import latest
from hcsmoe_core.studies.cost import amount, capture_cost, duration, work_per_token
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import calibration_settings

STUDIES = {
    "qwen1.5-moe": "qwen",
    "mixtral-8x7b": "mixtral",
}  # by the study's name, the published table it makes
# Items of each task's split that is scored, choices of each, and tokens of a prompt with one choice. Items
# are the data sets' own numbers (some of ARC have three or five choices); the tokens are round guesses that
# vary with the tokenizer.
TASKS = {
    "arc_challenge": (1172, 4, 40),
    "arc_easy": (2376, 4, 35),
    "boolq": (3270, 2, 140),
    "hellaswag": (10042, 4, 95),
    "mmlu": (14042, 4, 130),
    "openbookqa": (500, 4, 20),
    "rte": (277, 2, 85),
    "winogrande": (1267, 2, 30),
} | dict.fromkeys(demo_tasks.NAMES, (demo_tasks.ITEMS, demo_tasks.CHOICES, 15))
ONE_TOKEN = ("boolq", "mmlu", "rte")  # their choices are single tokens, which the harness reads off one pass
LONGEST = 1024  # tokens that the longest prompts of the tasks have, for what the logits of a batch take
# What runs on one CPU thread, as measured: matching two experts' neurons is an assignment, 10 s for 5,632
# unrelated ones and about five times as long for twice as many; comparing subsets makes 10¹⁰ operations per
# second.
MATCHED, MATCHING, GROWTH = 5632, 10.0, 2.3
COMPARING = 1e10
WIDTHS = {"items": 8, "requests": 10, "tokens": 9, "operations": 12, "bytes": 8}  # of the table's columns


def estimate(
    name: str,
    *,
    model: str = "",
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    teraflops: float = 100.0,
    bandwidth: float = 2.0,
    **source: Any,
) -> dict:
    """Every step of a study with its costs, from the model's configuration alone.

    Parameters
    ----------
    name : {"qwen1.5-moe", "mixtral-8x7b"}
    model : str, optional
        Whose configuration is read; by default that of the paper's model, which is part of the package.
    tasks : list of str, optional
        By default those of the table.
    limit : int, optional
        Items per task (of mmlu, per subject); None for all.
    batch_size, dtype
    teraflops, bandwidth : float
        10¹² operations per second that the device sustains, and gigabytes per second at which weights are
        read.
    **source
        As for :func:`hcsmoe_core.text.calibration.calibration_settings`.

    Returns
    -------
    dict
        ``steps``, a list of dict in their order: ``step``, ``what``, ``items`` and ``requests`` of the tasks,
        ``tokens`` and ``operations`` (matrix products on the device), ``bytes`` (read or written),
        ``processor`` (seconds on one CPU thread) and ``seconds``; and in all ``seconds``; ``disk`` and
        ``memory`` in bytes, of a model in memory and streamed, and of ``unmerged`` scores; ``weights``,
        ``active`` (weights per token) and ``settings``.
    """
    table = _table(name)
    settings = dict(teraflops=teraflops, bandwidth=bandwidth, limit=limit, batch_size=batch_size)
    for option in ("teraflops", "bandwidth"):
        if not 0 < settings[option] < math.inf:
            raise InputError(f'The "{option}" argument must be a positive number; not {settings[option]!r}.')
    tasks = list(tasks or table["tasks"])
    skeleton = _skeleton(table, model, dtype)
    source = calibration_settings(model or _hub(table), **source)
    cells = paper.wanted(model_size(skeleton)["num_experts"], [STUDIES[name]])
    steps = _steps(
        skeleton, cells, source, slug(model or _hub(table)), [t for t in tasks if t in TASKS], limit
    )
    for step in steps:
        at_work = step.get("operations", 0) / (1e12 * teraflops) + step.get("bytes", 0) / (1e9 * bandwidth)
        step["seconds"] = at_work + step.get("processor", 0)
    settings |= source | {"tasks": tasks, "uncounted": [task for task in tasks if task not in TASKS]}
    found = {"steps": steps, "seconds": sum(step["seconds"] for step in steps), "settings": settings}
    found |= {"weights": model_size(skeleton)["weights"], "active": work_per_token(skeleton)[0] / 2}
    return found | _memory_and_disk(skeleton, cells, steps[1], batch_size)


def _steps(model, cells, source, name, tasks, limit):
    """Steps of a study in their order, without times."""
    size, needs = model_size(model), _needs(cells)
    text = (
        f"{source['sequences']} × {source['length']:,} tokens of {source['calibration']}: {', '.join(needs)}"
    )
    steps = [dict(step="read", what=f"{amount(size['weights'])} weights, {name}", bytes=size["bytes"])]
    steps.append(dict(step="capture", what=text) | capture_cost(model, source, needs))
    scoring = _scoring(tasks, limit, work_per_token(model)[0])
    for cell in cells:
        what = _what(cell, size["num_experts"])
        if cell["experts"]:
            steps.append(dict(step="plan", what=what) | _planning(cell, model))
            steps.append(dict(step="merge", what=what) | _merging(cell, model))
        steps.append(dict(step="evaluate", what=what) | scoring)
    return steps


def _memory_and_disk(skeleton, cells, capture, batch_size):
    size, layers = model_size(skeleton)["bytes"], find_moe_layers(skeleton)
    element = next(skeleton.parameters()).element_size()
    experts = [layer.num_experts for layer in layers]
    layer_bytes = [sum(t.numel() * t.element_size() for t in layer.tensors().values()) for layer in layers]
    kept = max(cell["experts"] for cell in cells) / min(experts)
    merged = size - sum(layer_bytes) * (1 - kept)
    logits = batch_size * LONGEST * skeleton.get_input_embeddings().num_embeddings * (4 + element)
    passed_on = 2 * capture["tokens"] * layers[0].hidden_size * element  # from layer to layer
    disk = size + capture["bytes"]
    return {
        "disk": {"whole": disk, "streamed": int(disk + merged + passed_on)},
        "memory": {
            "whole": int(WHOLE * size + logits),
            "streamed": int(max(merged + logits, LAYER * max(layer_bytes))),
            "unmerged": int(size + logits),
        },
    }


def _table(name):
    return paper.table_of(STUDIES[check_choice("name", name, tuple(STUDIES))])


def _hub(table):
    return paper.published()["models"][table["model"]]["hub"]


def _skeleton(table, model, dtype):
    if model:
        return load_skeleton(model, dtype=dtype)
    from transformers import AutoConfig

    known = dict(paper.published()["models"][table["model"]]["configuration"])
    return skeleton_of(AutoConfig.for_model(known.pop("model_type"), **known), dtype=dtype)


def _needs(cells):
    """What the cells need of the statistics, in all."""
    needs = [need for cell in cells if cell["experts"] for need in sweep.recipe_of(cell).needs]
    return tuple(dict.fromkeys((*DEFAULT_NEEDS, *needs)))


def _what(cell, size):
    return f"{sweep.setting_name(cell)}, {cell['experts'] or size} of {size} experts"


def _scoring(tasks, limit, forward):
    """Items, requests, tokens and operations of one evaluation."""
    items = requests = tokens = 0
    for task in tasks:
        count, choices, length = TASKS[task]
        if limit:
            count = min(count, limit * (57 if task == "mmlu" else 1))
        items, requests = items + count, requests + count * choices
        tokens += count * length * (1 if task in ONE_TOKEN else choices)
    return {"items": items, "requests": requests, "tokens": tokens, "operations": int(tokens * forward)}


def _planning(cell, model):
    """What a plan takes: pairs of experts are compared, and O-prune tries subsets on the sample."""
    operations = compared = 0
    for layer in find_moe_layers(model):
        count, kept = layer.num_experts, cell["experts"]
        operations += 2 * count**2 * layer.hidden_size
        if cell["method"] == "o-prune":
            operations += 2 * SAMPLE * sum(t.numel() for t in layer.tensors().values())
            if count <= ENUMERATED:
                tried = math.comb(count, kept) * SAMPLE
            else:  # and at least one round of swaps
                subsets = resolve("o-prune").settings["subsets"]
                tried = subsets * TOKENS + kept * (count - kept) * SAMPLE
            compared += tried * 2 * count * (count + 1)
    return {"operations": operations, "processor": compared / COMPARING}


def _merging(cell, model):
    """What a merge takes: the experts are read, and those kept written; where neurons are matched, that is
    most.
    """
    aligned, size, matching = sweep.recipe_of(cell).settings.get("align", "none") != "none", 0, 0.0
    for layer in find_moe_layers(model):
        kept = cell["experts"] / layer.num_experts
        size += sum(t.numel() * t.element_size() for t in layer.tensors().values()) * (1 + kept)
        if aligned:
            matching += (layer.num_experts - cell["experts"]) * MATCHING * (layer.width / MATCHED) ** GROWTH
    return {"bytes": int(size), "processor": matching}


def step_table(found: dict) -> str:
    """What :func:`estimate` found as lines of text."""
    header = "".join(f"{name:>{width}}" for name, width in WIDTHS.items())
    lines = [f"\n{'step':<10}{'':<64}{header}{'time':>9}"]
    for step in found["steps"]:
        cells = [f"{amount(step[n]) if step.get(n) else '':>{width}}" for n, width in WIDTHS.items()]
        lines.append(f"{step['step']:<10}{step['what']:<64}{''.join(cells)}{duration(step['seconds']):>9}")
    settings, memory, disk = found["settings"], found["memory"], found["disk"]
    if settings["uncounted"]:
        uncounted = ", ".join(settings["uncounted"])
        lines.append(f"\nnot counted: {uncounted}, of which the number of items is not known here")
    totals = [
        f"time    {duration(found['seconds'])} at {settings['teraflops']:g} · 10¹² operations a second and "
        f"{settings['bandwidth']:g} GB/s on one device, and one CPU thread; how long prompts are is a guess",
        f"disk    {amount(disk['whole'])}B, or {amount(disk['streamed'])}B where the model is streamed; the "
        "checkpoint is counted, the tasks' data are not",
        f"memory  {amount(memory['whole'])}B, or {amount(memory['streamed'])}B where the model is streamed "
        f"({amount(memory['unmerged'])}B for the unmerged model's scores), with batches of "
        f"{settings['batch_size']}",
    ]
    return "\n".join([*totals, *lines])


def run(
    name: str,
    *,
    model: str = "",
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    calibration_seed: int = 42,
    dtype: str = "auto",
    device: str = "auto",
    load: str = "auto",
    memory: str = "",
    folder: str | Path = "runs/reproduce",
    **source: Any,
) -> Path:
    """Measure every cell of a study that is not measured yet; a cell that fails does not stop the others.

    A cell is one plan, applied to the model and scored, and its file is a ``results.json`` as ``05_accuracy``
    writes one. A model that does not fit into memory with its merged experts beside it is captured and merged
    layer by layer, and its merged checkpoints are scored one at a time, as the unmerged one is, if they fit.

    Parameters
    ----------
    name, model, tasks, limit, batch_size, dtype, **source
        As for :func:`estimate`; the model's weights are read.
    calibration_seed : int
    device, load, memory : str
        As for :func:`hcsmoe_core.open_model`.
    folder : str or path
        Cells go to a folder of the model and of the settings in it.

    Returns
    -------
    Path
        Folder of the cells, for :func:`hcsmoe_core.studies.sweep.collect`.
    """
    table = _table(name)
    loaded, tokenizer = open_model(model or _hub(table), dtype=dtype, device=device, load=load, memory=memory)
    size, source = model_size(loaded)["num_experts"], calibration_settings(loaded.name_or_path, **source)
    cells = paper.wanted(size, [STUDIES[name]])
    shared = dict(model=loaded.name_or_path, dtype=str(loaded.dtype).removeprefix("torch.")) | source
    shared |= dict(tasks=",".join(tasks or table["tasks"]), limit=limit, text="none", batch_size=batch_size)
    shared |= {sweep.SEED: calibration_seed}
    out = Path(folder) / slug(loaded.name_or_path) / sha256_json(shared)[:8]
    capture = partial(cached_statistics, loaded, tokenizer, needs=_needs(cells), **source)
    options = dict(statistics=latest(capture), num_experts=size, out=out, device=device)
    runner.measure(
        partial(_result, model=loaded, tokenizer=tokenizer, **options),
        cells,
        out,
        shared=shared,
        model=model_hash(loaded),
        prefix="05_accuracy-",
        text=lambda cell: _what(cell, size),
        description=f"reproduce {name}",
    )
    return out


def _result(settings, *, model, tokenizer, statistics, num_experts, out, device):
    """The results.json of one cell."""
    options = {key: settings[key] for key in ("limit", "batch_size")} | {"answers": out / "answers"}
    score = partial(evaluate, tasks=settings["tasks"].split(","), text=None, **options)
    place = dict(device=device, dtype=model.dtype)
    if settings["experts"]:
        stats = statistics(seed=settings[sweep.SEED])
        scored = _merged(model, tokenizer, stats, settings, out / "merged", place, score)
    elif source_of(model) is not None:
        scored = _scored_folder(model.name_or_path, model_size(model)["bytes"], place, score)
    else:
        scored = {"scores": score(model, tokenizer), "size": model_size(model)}
    scored["size"]["num_experts"] = num_experts
    return {"parameters": {"method": "hc-smoe"} | settings, "versions": versions()} | scored


def _merged(model, tokenizer, stats, cell, folder, place, score):
    """Scores and sizes of a merged model, in memory or, of a streamed one, by way of a folder."""
    started = time.perf_counter()
    plan = make_plan(stats, model, experts=cell["experts"], method=cell["method"], **sweep.chosen_steps(cell))
    if source_of(model) is not None:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it scored
        try:
            with work_folder(folder, model) as work:
                written = stream_merged(model, plan, folder, work, stats=stats, tokenizer=tokenizer)
            seconds = time.perf_counter() - started
            return _scored_folder(folder, written["bytes"], place, score) | {"compress_seconds": seconds}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        apply_plan(model, plan, stats)
        seconds = time.perf_counter() - started
        scores = score(model, tokenizer)
        return {"scores": scores, "size": model_size(model), "compress_seconds": seconds}
    finally:
        restore(model)


def _scored_folder(folder, size, place, score):
    """Scores and sizes of a model that is loaded for this alone, if it fits."""
    free = free_memory(device_of(place["device"]))
    if size > free:
        raise InputError(
            f"its {amount(size)}B do not fit into the {amount(free)}B of memory that are free, to be scored"
        )
    loaded, tokenizer = load_model(folder, **place)
    return {"scores": score(loaded, tokenizer), "size": model_size(loaded)}


def report(name: str, out: str | Path, model: str = "") -> str:
    """A study's table, ours beside the published values, and what merging changed item by item."""
    table = _table(name)
    model = model or _hub(table)
    cells = sweep.collect(out, model=model)
    lines, rows = [paper.title(STUDIES[name], model), ""], paper.line_up(cells, STUDIES[name])
    if paper.is_model(model, table["model"]):
        lines.append((100 * paper.by_task(cells, STUDIES[name])).round(2).to_string(na_rep=""))
    else:
        columns = ["experts", "method", "our_experts", "published", "ours", "published_retained", "retained"]
        lines.append(rows[columns].round(4).to_string(index=False, na_rep=""))
    for row in rows[rows["missing"] != ""].to_dict("records"):
        lines.append(f"{row['method']}, {row['our_experts']} experts: {row['missing']}")
    return "\n".join([*lines, "", *_changes(Path(out))])


def _changes(out):
    """Each cell's mean accuracy less the unmerged model's on the same items, the newest cell of each
    setting.
    """
    files = sorted(out.glob("05_accuracy-*.json"), key=lambda path: path.stat().st_mtime)
    found = {_named(cell["parameters"]): cell["scores"] for cell in map(read_json, files)}
    whole = found.pop("original", None)
    if whole is None:
        return []
    lines = [
        "mean accuracy, less that of the unmerged model on the same items, in percent, ± paired standard "
        "error"
    ]
    for name, scores in sorted(found.items()):
        row = paired(scores, whole, metrics=("acc",)).iloc[-1]
        lines.append(f"{name:<44}{100 * row['difference']:>+8.2f} ± {100 * row['error']:.2f}")
    return lines


def _named(cell):
    return f"{sweep.setting_name(cell)}, {cell['experts']} experts" if cell["experts"] else "original"


def main(
    name: Annotated[str, typer.Argument(help="qwen1.5-moe (the paper's Table 2) or mixtral-8x7b (Table 3).")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List every step with its cost only.")] = False,
    model: Annotated[str, typer.Option(help="Folder of the model, or another; by default the paper's.")] = "",
    tasks: Annotated[str, typer.Option(help="Tasks, separated by commas; by default the table's.")] = "",
    limit: Annotated[int | None, typer.Option(help="Items per task; all by default.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests per forward pass.")] = 16,
    teraflops: Annotated[float, typer.Option(help="10^12 operations per second of the device.")] = 100.0,
    bandwidth: Annotated[float, typer.Option(help="GB per second at which weights are read.")] = 2.0,
    calibration: Annotated[str, typer.Option(help="Source of the calibration text.")] = "",
    sequences: Annotated[int, typer.Option(help="Calibration sequences.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 0,
    calibration_seed: Annotated[int, typer.Option(help="Seed of the calibration sample.")] = 42,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "auto",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "auto",
    load: Annotated[str, typer.Option(help="auto, whole or streamed.")] = "auto",
    memory: Annotated[str, typer.Option(help="Memory that may be used, such as 40GB.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the cells; those done are kept.")] = Path(
        "runs/reproduce"
    ),
):
    """Reproduce a table of the HC-SMoE paper, all methods at both sizes, beside the published values."""
    tasks = [task.strip() for task in tasks.split(",") if task.strip()] or None
    options = dict(model=model, tasks=tasks, limit=limit, batch_size=batch_size, dtype=dtype)
    options |= dict(calibration=calibration, sequences=sequences, length=length)
    print(step_table(estimate(name, teraflops=teraflops, bandwidth=bandwidth, **options)), flush=True)
    if not dry_run:
        where = dict(device=device, load=load, memory=memory, folder=out)
        cells = run(name, calibration_seed=calibration_seed, **where, **options)
        print(f"\n{report(name, cells, model)}\n\n{cells}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(str(error))
