"""The HC-SMoE paper's main tables on its own models: their cost told beforehand, then cell by cell, beside the published."""

import math
import shutil
import time

from tqdm.auto import tqdm

from hcsmoe_core._util import InputError, check_choice, place, read_json, sha256_json, versions, write_json
from hcsmoe_core.checkpoint import device_of, load_model, load_skeleton, skeleton_of
from hcsmoe_core.collect import expected_bytes
from hcsmoe_core.demo import tasks as demo_tasks
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods.planner import make_plan, needs_of, steps_of
from hcsmoe_core.methods.saliency import ENUMERATED, TOKENS
from hcsmoe_core.moe import source_of
from hcsmoe_core.scale.streaming import LAYER, WHOLE, free_memory, open_model, stream_merged, work_folder
from hcsmoe_core.score.evaluation import evaluate, paired
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE
from hcsmoe_core.studies import paper, sweep
from hcsmoe_core.studies.cache import calibration_of, core_hash, slug, statistics
from hcsmoe_core.studies.cost import amount, duration, work_of_a_token
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import domains_of

STUDIES = {
    "qwen1.5-moe": "qwen",
    "mixtral-8x7b": "mixtral",
}  # by the name of a study, the published table that it makes


# Items of each task's split that is scored, choices of each, and tokens of a prompt with one choice. Items are the data
# sets' own numbers (some of ARC have three or five choices); the tokens are round guesses that vary with the tokenizer.
TASKS = {
    "arc_challenge": (1172, 4, 40),
    "arc_easy": (2376, 4, 35),
    "boolq": (3270, 2, 140),
    "hellaswag": (10042, 4, 95),
    "mmlu": (14042, 4, 130),
    "openbookqa": (500, 4, 20),
    "rte": (277, 2, 85),
    "winogrande": (1267, 2, 30),
}


TASKS |= dict.fromkeys(demo_tasks.NAMES, (demo_tasks.ITEMS, demo_tasks.CHOICES, 15))


ONE_TOKEN = ("boolq", "mmlu", "rte")  # their choices are single tokens, which the harness reads off one pass


LONGEST = 1024  # tokens that the longest prompts of the tasks have, for what the logits of a batch take


# What runs on one CPU thread, as measured on one: matching two experts' neurons is an assignment, 10 s for 5,632 unrelated
# ones and about five times as long for twice as many; comparing subsets makes 10¹⁰ operations a second.
MATCHED, MATCHING, GROWTH = 5632, 10.0, 2.3


COMPARING = 1e10


WIDTHS = {"items": 8, "requests": 10, "tokens": 9, "operations": 12, "bytes": 8}  # of the table's columns


def estimate(
    name,
    *,
    model="",
    tasks=None,
    limit=0,
    batch_size=16,
    dtype="auto",
    teraflops=100.0,
    bandwidth=2.0,
    **source,
):
    """Every step of a study with what it costs, from the model's configuration alone.

    Parameters
    ----------
    name : {"qwen1.5-moe", "mixtral-8x7b"}
    model : str, optional
        Whose configuration is read; by default that of the paper's model, which is part of the package.
    tasks : list of str, optional
        By default those of the table.
    limit : int
        Items of each task (of mmlu, of each of its 57 subjects); 0 for all.
    batch_size : int
        Requests a forward pass.
    dtype : str
    teraflops : float
        10¹² operations a second that the device sustains, which is a fraction of what its data sheet says.
    bandwidth : float
        Gigabytes a second at which weights are read, and merged.
    **source
        ``calibration``, ``sequences`` and ``length`` as for :func:`hcsmoe_core.studies.cache.calibration_of`.

    Returns
    -------
    dict
        ``steps``, a list of dict in their order: ``step``, ``what``, ``items`` and ``requests`` of the tasks, ``tokens`` and
        ``operations`` (matrix products on the device), ``bytes`` (read or written), ``processor`` (seconds on one CPU
        thread) and ``seconds``, all from below but for the guessed length of prompts; and of it all ``seconds``; ``disk``
        and ``memory`` in bytes, of a model in memory and streamed, and of ``unmerged`` scores; ``weights``, ``active``
        (weights that a token goes through) and ``settings``.

    Raises
    ------
    ValueError
        If there is no such study, or a speed is not positive.
    """
    table = _table(name)
    for option, value in (("teraflops", teraflops), ("bandwidth", bandwidth)):
        if not 0 < value < math.inf:
            raise InputError(f'The "{option}" argument must be a positive number; not {value!r}.')
    tasks, known = list(tasks or table["tasks"]), model or _hub(table)
    skeleton, source = _skeleton(table, model, dtype), calibration_of(known, **source)
    size, forward = model_size(skeleton), work_of_a_token(skeleton)[0]
    cells = paper.wanted(size["num_experts"], [STUDIES[name]])
    steps = [dict(step="read", what=f"{amount(size['weights'])} weights, {slug(known)}", bytes=size["bytes"])]
    steps.append(_capturing(skeleton, source, _needs(cells)))
    scoring = _scoring([task for task in tasks if task in TASKS], limit, forward)
    for cell in cells:
        what = _what(cell, size)
        if cell["experts"]:
            steps.append(dict(step="plan", what=what) | _planning(cell, skeleton))
            steps.append(dict(step="merge", what=what) | _merging(cell, skeleton))
        steps.append(dict(step="evaluate", what=what) | scoring)
    for step in steps:
        at_work = step.get("operations", 0) / (1e12 * teraflops) + step.get("bytes", 0) / (1e9 * bandwidth)
        step["seconds"] = at_work + step.get("processor", 0)
    settings = (
        dict(teraflops=teraflops, bandwidth=bandwidth, limit=limit, batch_size=batch_size, tasks=tasks)
        | source
    )
    settings["uncounted"] = [task for task in tasks if task not in TASKS]
    found = {"steps": steps, "seconds": sum(step["seconds"] for step in steps), "settings": settings}
    found |= {"weights": size["weights"], "active": forward / 2}
    return found | _room(skeleton, cells, steps, batch_size)


def _room(skeleton, cells, steps, batch_size):
    """Bytes on disk and in memory."""
    size, capture = model_size(skeleton), steps[1]
    merged = size["bytes"] - min(
        _expert_bytes(skeleton) * (1 - _share(cell, size)) for cell in cells if cell["experts"]
    )
    element = next(skeleton.parameters()).element_size()
    logits = batch_size * LONGEST * skeleton.get_input_embeddings().num_embeddings * (4 + element)
    layer = max(
        sum(t.numel() * t.element_size() for t in m.tensors().values()) for m in find_moe_layers(skeleton)
    )
    passed_on = (
        2 * capture["tokens"] * find_moe_layers(skeleton)[0].hidden_size * element
    )  # from layer to layer
    return {
        "disk": {
            "whole": size["bytes"] + capture["bytes"],
            "streamed": int(size["bytes"] + capture["bytes"] + merged + passed_on),
        },
        "memory": {
            "whole": int(WHOLE * size["bytes"] + logits),
            "streamed": int(max(merged + logits, LAYER * layer)),
            "unmerged": int(size["bytes"] + logits),
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
    needs = [needs_of(cell.get("method", "hc-smoe"), **_steps(cell)) for cell in cells if cell["experts"]]
    return tuple(dict.fromkeys((*DEFAULT_NEEDS, *(n for of in needs for n in of))))


def _steps(cell):
    return {key: value for key, value in cell.items() if key not in ("experts", "method")}


def _what(cell, size):
    return f"{sweep.setting_name(cell)}, {cell['experts'] or size['num_experts']} of {size['num_experts']} experts"


def _share(cell, size):
    """Share of the experts' bytes that a cell keeps."""
    return (cell["experts"] or size["num_experts"]) / size["num_experts"]


def _expert_bytes(model):
    return sum(
        t.numel() * t.element_size() for layer in find_moe_layers(model) for t in layer.tensors().values()
    )


def _capturing(model, source, needs):
    """The pass over the calibration tokens."""
    tokens = source["sequences"] * source["length"]
    domains = len(set(domains_of(source["calibration"], source["sequences"]) or ["all"]))
    what = (
        f"{source['sequences']} × {source['length']:,} tokens of {source['calibration']}: {', '.join(needs)}"
    )
    found = dict(step="capture", what=what, tokens=tokens, operations=int(tokens * work_of_a_token(model)[1]))
    return found | {"bytes": expected_bytes(model, needs, domains=domains, tokens=tokens)}


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
                tried = steps_of("o-prune").subsets * TOKENS + kept * (count - kept) * SAMPLE
            compared += tried * 2 * count * (count + 1)
    return {"operations": operations, "processor": compared / COMPARING}


def _merging(cell, model):
    """What a merge takes: the experts are read, and those that are kept written; where neurons are matched, that is most."""
    matching, aligned = 0.0, steps_of(cell["method"], **_steps(cell)).align != "none"
    for layer in find_moe_layers(model) if aligned else ():
        matching += (layer.num_experts - cell["experts"]) * MATCHING * (layer.width / MATCHED) ** GROWTH
    return {"bytes": int(_expert_bytes(model) * (1 + _share(cell, model_size(model)))), "processor": matching}


def step_table(found):
    """What :func:`estimate` found as lines of text."""
    lines = [
        f"{'step':<10}{'':<64}"
        + "".join(f"{name:>{width}}" for name, width in WIDTHS.items())
        + f"{'time':>9}"
    ]
    for step in found["steps"]:
        numbers = "".join(
            f"{amount(step[name]) if step.get(name) else '':>{width}}" for name, width in WIDTHS.items()
        )
        lines.append(f"{step['step']:<10}{step['what']:<64}{numbers}{duration(step['seconds']):>9}")
    settings, memory, disk = found["settings"], found["memory"], found["disk"]
    if settings["uncounted"]:
        lines.append(
            f"\nnot counted: {', '.join(settings['uncounted'])}, of which the number of items is not known here"
        )
    lines += [
        f"\ntime    {duration(found['seconds'])} at {settings['teraflops']:g} · 10¹² operations a second and "
        f"{settings['bandwidth']:g} GB/s on one device, and one CPU thread; how long prompts are is a guess",
        f"disk    {amount(disk['whole'])}B, or {amount(disk['streamed'])}B where the model is streamed; the checkpoint is "
        "counted, the tasks' data are not",
        f"memory  {amount(memory['whole'])}B, or {amount(memory['streamed'])}B where the model is streamed "
        f"({amount(memory['unmerged'])}B for the unmerged model's scores), with batches of {settings['batch_size']}",
    ]
    return "\n".join(lines)


def run(
    name,
    *,
    model="",
    tasks=None,
    limit=0,
    batch_size=16,
    seed=42,
    dtype="auto",
    device="auto",
    load="auto",
    memory="",
    folder="runs/reproduce",
    **source,
):
    """Measure every cell of a study that is not measured yet; a cell that fails does not stop the others.

    A cell is one plan, applied to the model and scored, and its file is a ``results.json`` as ``05_accuracy`` writes one. A
    model that does not fit into memory with its merged experts beside it is captured and merged decoder layer by decoder
    layer, and its merged checkpoints are scored one at a time, as the unmerged one is, if they fit.

    Parameters
    ----------
    name, model, tasks, limit, batch_size, dtype
        As for :func:`estimate`; the model's weights are read.
    seed : int
        Of the calibration text.
    device, load, memory : str
        As for :func:`hcsmoe_core.scale.streaming.open_model`.
    folder : str or path
        Cells go to a folder of the model and of the settings in it.
    **source
        As for :func:`estimate`.

    Returns
    -------
    Path
        Folder of the cells, for :func:`hcsmoe_core.studies.sweep.collect`.

    Raises
    ------
    RuntimeError
        When all others are done, if some cells could not be measured; it names them.
    """
    table = _table(name)
    loaded, tokenizer = open_model(model or _hub(table), dtype=dtype, device=device, load=load, memory=memory)
    size = model_size(loaded)
    source = calibration_of(loaded.name_or_path, **source)
    shared = (
        dict(model=loaded.name_or_path, dtype=str(loaded.dtype).removeprefix("torch."), seed=seed) | source
    )
    shared |= dict(tasks=",".join(tasks or table["tasks"]), limit=limit, text="none", batch_size=batch_size)
    cells = paper.wanted(size["num_experts"], [STUDIES[name]])
    out = place(folder) / slug(loaded.name_or_path) / sha256_json(shared)[:8]
    identity = {"model": model_hash(loaded), "core": core_hash()}
    stats, failed = None, []
    for cell in tqdm(cells, desc=f"reproduce {name}", unit="cell"):
        path = out / f"05_accuracy-{sha256_json(identity | shared | cell)[:12]}.json"
        if path.exists():
            continue
        try:
            if cell["experts"] and stats is None:
                stats = statistics(loaded, tokenizer, seed=seed, needs=_needs(cells), **source)
            scored = _scored(loaded, tokenizer, stats, cell, out, device=device, options=_options(shared))
        except (ValueError, OSError) as error:
            failed.append(f"{_what(cell, size)}: {error}")
            continue
        scored["size"]["num_experts"] = size["num_experts"]
        write_json(
            path, {"parameters": shared | {"method": "hc-smoe"} | cell, "versions": versions()} | scored
        )
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(cells)} cells could not be measured; the same command tries them again.\n  "
            + "\n  ".join(failed)
        )
    return out


def _options(shared):
    return dict(
        tasks=shared["tasks"].split(","),
        limit=shared["limit"] or None,
        batch_size=shared["batch_size"],
        text=None,
    )


def _scored(model, tokenizer, stats, cell, out, *, device, options):
    """Scores and sizes of one cell."""
    options, streamed = options | {"answers": out / "answers"}, source_of(model) is not None
    how = dict(device=device, dtype=model.dtype)
    if not cell["experts"]:
        if streamed:
            return _scored_folder(model.name_or_path, model_size(model)["bytes"], how, options)
        return {"scores": evaluate(model, tokenizer, **options), "size": model_size(model)}
    started = time.perf_counter()
    plan = make_plan(stats, model, experts=cell["experts"], method=cell["method"], **_steps(cell))
    if streamed:
        folder = out / "merged"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it scored
        with work_folder(folder, model) as work:
            held = stream_merged(model, plan, folder, work, stats=stats, tokenizer=tokenizer)["bytes"]
        seconds = time.perf_counter() - started
        try:
            return _scored_folder(folder, held, how, options) | {"compress_seconds": seconds}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    try:
        apply_plan(model, plan, stats)
        seconds = time.perf_counter() - started
        return {
            "scores": evaluate(model, tokenizer, **options),
            "size": model_size(model),
            "compress_seconds": seconds,
        }
    finally:
        restore(model)


def _scored_folder(folder, held, how, options):
    """Scores and sizes of a model that is loaded for this alone, if it fits."""
    free = free_memory(device_of(how["device"]))
    if held > free:
        raise InputError(
            f"its {amount(held)}B do not fit into the {amount(free)}B of memory that are free, to be scored"
        )
    loaded, tokenizer = load_model(folder, **how)
    return {"scores": evaluate(loaded, tokenizer, **options), "size": model_size(loaded)}


def report(name, out, model=""):
    """A study's table, ours beside the published values, and what merging changed item by item.

    Returns
    -------
    str
    """
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
    return "\n".join([*lines, "", *_changes(out)])


def _changes(out):
    """How each cell's mean accuracy differs from the unmerged model's on the same items, the newest of each setting."""
    files = sorted(out.glob("05_accuracy-*.json"), key=lambda path: path.stat().st_mtime)
    found = {_named(cell["parameters"]): cell["scores"] for cell in map(read_json, files)}
    whole = found.pop("original", None)
    if whole is None:
        return []
    lines = [
        "mean accuracy, less that of the unmerged model on the same items, in percent, with its paired standard error"
    ]
    for name, scores in sorted(found.items()):
        row = paired(scores, whole, metrics=("acc",)).iloc[-1]
        lines.append(f"{name:<44}{100 * row['difference']:>+8.2f} ± {100 * row['error']:.2f}")
    return lines


def _named(cell):
    return f"{sweep.setting_name(cell)}, {cell['experts']} experts" if cell["experts"] else "original"
