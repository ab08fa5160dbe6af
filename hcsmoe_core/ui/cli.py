"""The ``hcsmoe`` command: parses options, calls one function of the library, prints what it returns."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import hcsmoe_core as core
from hcsmoe_core._util import InputError, require, write_json

app = typer.Typer(
    help="See which experts of a sparse mixture-of-experts model compute the same thing, merge them, and "
    "know what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _load_plugins(files: list[Path] | None) -> list[Path] | None:
    """Run users' files of methods as soon as the option is read."""
    from hcsmoe_core.methods import load_plugin

    for file in files or ():
        load_plugin(file)
    return files


def _items(text: str) -> list[str]:
    """Items of a comma-separated list."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _numbers(option: str, text: str) -> list[int]:
    """Whole numbers of a comma-separated list."""
    try:
        return [int(item) for item in _items(text)]
    except ValueError:
        raise InputError(f"{option} takes whole numbers separated by commas; not {text!r}.") from None


def _option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, **more)


MODEL = Annotated[
    str, typer.Argument(help="Model folder, name on the Hugging Face hub, demo-mixtral or demo-qwen.")
]
DTYPE = Annotated[str, _option("auto (the checkpoint's own), float32, bfloat16 or float16.")]
DEVICE = Annotated[
    str,
    _option("auto (a GPU where there is one), cpu, cuda, cuda:1, …; balanced or sequential for all GPUs."),
]
LOAD = Annotated[
    str,
    _option(
        "whole, streamed (one decoder layer at a time), or auto: streamed if it does not fit into memory."
    ),
]
MEMORY = Annotated[str, _option("Memory that the process may use, such as 3GB; by default what is free.")]
CALIBRATION = Annotated[
    str,
    _option(
        "c4, wikitext, math, code, demo, a data set on the hub (name:configuration:split:column), a path to "
        "a .txt, .json, .jsonl or .safetensors file (./notes.txt); self, text that the model writes itself "
        "(self:temperature=1:start=chat); or a mixture such as 0.5*c4+0.5*self. By default demo for the "
        "embedded models, else c4, or self where that is unavailable."
    ),
]
SEQUENCES = Annotated[int, _option("Calibration sequences; 0 for the default of the source.")]
LENGTH = Annotated[int, _option("Tokens per calibration sequence; 0 for the default of the source.")]
COLUMN = Annotated[str, _option("Column or key of the text in a data set or JSON file.")]
CALIBRATION_SEED = Annotated[int, _option("Seed of the order in which calibration documents are taken.")]
PLAN_SEED = Annotated[int, _option("Seed of methods that use chance.")]
BATCH_SIZE = Annotated[int, _option("Sequences per forward pass.")]
METHOD = Annotated[str, _option('Method, as listed by "hcsmoe methods".')]
SIMILARITY = Annotated[
    str, _option("What experts are compared by, if not by the method's own; + joins several.")
]
METRIC = Annotated[str, _option("euclidean or cosine, if not the similarity's own.")]
LINKAGE = Annotated[str, _option("average, complete, single or ward, if not the method's own.")]
MERGE = Annotated[str, _option("frequency, average or routing-mass, if not the method's own.")]
SET = Annotated[
    list[str] | None,
    _option("Any other step or option, as name=value: group, budget, combine, guard, …", "--set"),
]
PLUGIN = Annotated[
    list[Path] | None,
    _option(
        "Python file with methods of your own (it is run); may be repeated.",
        "--plugin",
        callback=_load_plugins,
    ),
]
SAMPLE = Annotated[int, _option("Tokens in the sample of layer inputs, where one is collected.")]
EVERY = Annotated[
    int, _option("Run the experts on every n-th token only: outputs are estimates, usage is exact.")
]
UNTIL_STABLE = Annotated[
    float,
    _option(
        "Stop once the groups from two halves of the tokens agree this well in every layer (adjusted Rand "
        "index, such as 0.95); --sequences is then the maximum. 0: use all."
    ),
]
UNTIL_EXCESS = Annotated[
    float,
    _option(
        "Stop once the groups from one half of the tokens, measured on the other half, spread at most this "
        "much more (such as 0.05) than the other half's own groups, in every layer. Use either this or "
        "--until-stable."
    ),
]
PLAN_FILE = Annotated[Path | None, _option("Plan from hcsmoe plan.")]
STATISTICS = Annotated[Path | None, _option("Statistics file from hcsmoe capture.")]
TASKS = Annotated[
    str, _option("lm-evaluation-harness tasks, comma-separated; paper for the eight of the paper.")
]
LIMIT = Annotated[int | None, _option("Items per task; all by default.")]
TEXT = Annotated[
    str, _option("Text that perplexity is measured on: demo, a source as for --calibration, or none.")
]


def _settings(options: dict) -> dict:
    """Take those steps and options that differ from the method's own out of a command's options."""
    from hcsmoe_core.methods import parse_settings

    steps = {name: options.pop(name) for name in ("similarity", "metric", "linkage", "merge")}
    return {name: value for name, value in steps.items() if value} | parse_settings(
        options.pop("others") or ()
    )


@app.command()
def capture(
    model: MODEL,
    out: Annotated[Path, _option("Statistics file to write (.safetensors).")],
    methods: Annotated[
        list[str] | None, _option("Methods to collect for, comma-separated or repeated, or all.", "--for")
    ] = None,
    sample: SAMPLE = 32768,
    every: EVERY = 1,
    until_stable: UNTIL_STABLE = 0.0,
    until_excess: UNTIL_EXCESS = 0.0,
    stable_at: Annotated[
        str, _option("With --until-…: numbers of groups, comma-separated; by default 3/4, 1/2 and 1/4 of E.")
    ] = "",
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    column: COLUMN = "text",
    calibration_seed: CALIBRATION_SEED = 42,
    batch_size: BATCH_SIZE = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = "",
    plugin: PLUGIN = None,
):
    """Run the model once over calibration tokens and save the statistics. Under torchrun, ranks share the
    batches.
    """
    options = dict(locals())
    from hcsmoe_core.studies.pipeline import capture_to_file

    del options["plugin"]
    options |= dict(methods=_items(",".join(methods or ())), stable_at=_numbers("--stable-at", stable_at))
    if summary := capture_to_file(**options):  # None on ranks other than the first
        print(summary)


@app.command()
def plan(
    statistics: Annotated[Path, typer.Argument(help="Statistics file from hcsmoe capture.")],
    experts: Annotated[int, _option("Experts kept per layer.")],
    out: Annotated[Path, _option("Plan to write (.json).")],
    method: METHOD = "hc-smoe",
    similarity: SIMILARITY = "",
    metric: METRIC = "",
    linkage: LINKAGE = "",
    merge: MERGE = "",
    others: SET = None,
    plan_seed: PLAN_SEED = 0,
    model: Annotated[str, _option("Model whose weights are read, where the method looks at them.")] = "",
    plugin: PLUGIN = None,
):
    """Decide which experts of each layer are joined or dropped; the model is not run."""
    settings = _settings(dict(locals()))
    from hcsmoe_core.scale.streaming import open_model
    from hcsmoe_core.studies.tables import cut_table

    stats = core.load_statistics(statistics)
    loaded = open_model(model)[0] if model else None
    decision = core.make_plan(stats, loaded, experts=experts, method=method, seed=plan_seed, **settings)
    decision.save(out)
    print(f"{cut_table(stats, decision).round(4).to_string(index=False)}\n{out}")


@app.command()
def merge(
    model: MODEL,
    out: Annotated[Path, _option("Model folder to write; must not exist.")],
    plan: PLAN_FILE = None,
    experts: Annotated[int, _option("Experts kept per layer: capture, plan and merge in one go.")] = 0,
    statistics: STATISTICS = None,
    router: Annotated[
        str,
        _option(
            "mapped: exact, with the router as it was; row-kept or folded: one router row per group, a "
            "checkpoint that stock engines open; plain: such a one, if the method makes it. By default plain "
            "if exact, else mapped."
        ),
    ] = "",
    fidelity: Annotated[
        int, _option("Held-out sequences on which the result is compared with the original; 0 for none.")
    ] = 10,
    method: METHOD = "hc-smoe",
    similarity: SIMILARITY = "",
    metric: METRIC = "",
    linkage: LINKAGE = "",
    merge: MERGE = "",
    others: SET = None,
    plan_seed: PLAN_SEED = 0,
    sample: SAMPLE = 32768,
    every: EVERY = 1,
    until_stable: UNTIL_STABLE = 0.0,
    until_excess: UNTIL_EXCESS = 0.0,
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    column: COLUMN = "text",
    calibration_seed: CALIBRATION_SEED = 42,
    batch_size: BATCH_SIZE = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = "",
    plugin: PLUGIN = None,
):
    """Write a smaller checkpoint, from a plan or with a number of experts. If interrupted, run it again to
    continue.
    """
    options = dict(locals())
    from hcsmoe_core.studies.pipeline import shrink, written_text

    del options["plugin"]
    if written := shrink(**_settings(options), **options):  # None on ranks other than the first
        print(written_text(written))
        if warning := (written.get("fidelity") or {}).get("warning"):
            print(f"\nWARNING: {warning}", file=sys.stderr)


@app.command()
def evaluate(
    model: MODEL,
    plan: PLAN_FILE = None,
    statistics: STATISTICS = None,
    tasks: TASKS = "",
    limit: LIMIT = None,
    batch_size: Annotated[int, _option("Requests per forward pass.")] = 64,
    text: TEXT = "demo",
    sequences: Annotated[int, _option("Sequences of that text.")] = 96,
    length: Annotated[int, _option("Tokens per sequence.")] = 256,
    seed: Annotated[int, _option("Seed of that text and of the harness.")] = 0,
    against: Annotated[
        Path | None, _option("results.json of another model on the same tasks, to compare item by item.")
    ] = None,
    answers: Annotated[
        str, _option("Folder in which the model's answers are kept, or none.")
    ] = "runs/answers",
    out: Annotated[Path | None, _option("results.json to write.")] = None,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    plugin: PLUGIN = None,
):
    """Measure accuracy on tasks, and perplexity."""
    from hcsmoe_core.score.evaluation import PAPER_TASKS, load_scores, paired, paired_table, score_table
    from hcsmoe_core.studies.tables import model_size

    other = load_scores(against) if against else None
    decision = core.load_plan(plan) if plan else None
    loaded, tokenizer = core.load_model(model, dtype=dtype, device=device)
    if decision is not None:
        core.apply_plan(loaded, decision, core.load_statistics(statistics) if statistics else None)
    scores = core.evaluate(
        loaded,
        tokenizer,
        [task for name in _items(tasks) for task in (PAPER_TASKS if name == "paper" else [name])] or None,
        limit=limit,
        batch_size=batch_size,
        text=None if text == "none" else text,
        sequences=sequences,
        length=length,
        seed=seed,
        answers=None if answers == "none" else Path(answers),
    )
    print(score_table(scores))
    if other:
        print(f"\nagainst {against}\n{paired_table(paired(scores, other))}")
    if out:
        write_json(
            out,
            {
                "model": model,
                "plan": decision and decision.settings,
                "size": model_size(loaded),
                "scores": scores,
            },
        )
        print(out)


@app.command()
def methods(plugin: PLUGIN = None):
    """List every method: its steps, what it needs of the statistics, what it costs, its paper."""
    from hcsmoe_core.methods import table

    print(table())


@app.command()
def families(
    names: Annotated[
        list[str] | None, typer.Argument(help="Families, as transformers names them; default: all.")
    ] = None,
):
    """List the MoE families of transformers: what works on each, and why what does not."""
    from hcsmoe_core.ui.family_table import text

    print(text(names))


@app.command()
def compare(
    model: MODEL,
    methods: Annotated[str, _option("Methods, comma-separated; by default all.")] = "",
    experts: Annotated[
        str, _option("Numbers of experts, comma-separated; by default 3/4, 1/2 and 1/4 of E.")
    ] = "",
    seeds: Annotated[str, _option("Seeds of the calibration samples, comma-separated.")] = "0,1,2",
    limit: LIMIT = 100,
    others: SET = None,
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    text: TEXT = "demo",
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    out: Annotated[Path, _option("Folder of the cells and the tables.")] = Path("runs/compare"),
    plugin: PLUGIN = None,
):
    """Compare all methods on equal footing in one table: accuracy and loss with their errors, time and
    memory.
    """
    from hcsmoe_core.methods import parse_settings
    from hcsmoe_core.studies import cache, comparison

    frame = comparison.compare(
        model,
        methods=_items(methods) or None,
        experts=_numbers("--experts", experts) or None,
        seeds=_numbers("--seeds", seeds),
        settings=parse_settings(others or ()),
        limit=limit,
        calibration=calibration,
        sequences=sequences,
        length=length,
        text=text,
        dtype=dtype,
        device=device,
        folder=out,
        plugin=plugin or (),
    )
    frame.to_csv(table := out / f"{cache.slug(model)}.csv", index=False)
    print(f"{comparison.table(frame)}\n\n{table}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="qwen1.5-moe (the paper's Table 2) or mixtral-8x7b (Table 3).")],
    dry_run: Annotated[
        bool, _option("List every step with its cost; needs neither network nor weights.")
    ] = False,
    model: Annotated[
        str, _option("Folder of the model, or another one; by default the paper's, from the hub.")
    ] = "",
    tasks: TASKS = "",
    limit: LIMIT = None,
    batch_size: Annotated[int, _option("Requests per forward pass.")] = 16,
    teraflops: Annotated[float, _option("10^12 operations per second that the device sustains.")] = 100.0,
    bandwidth: Annotated[float, _option("GB per second at which weights are read.")] = 2.0,
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    calibration_seed: CALIBRATION_SEED = 42,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = "",
    out: Annotated[Path, _option("Folder of the cells; those that are done are kept.")] = Path(
        "runs/reproduce"
    ),
):
    """Reproduce a table of the HC-SMoE paper, all methods at both sizes, beside the published values."""
    from hcsmoe_core.studies import reproduce as study

    options = dict(
        model=model,
        tasks=_items(tasks) or None,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        calibration=calibration,
        sequences=sequences,
        length=length,
    )
    print(
        study.step_table(study.estimate(name, teraflops=teraflops, bandwidth=bandwidth, **options)),
        flush=True,
    )
    if not dry_run:
        cells = study.run(
            name,
            calibration_seed=calibration_seed,
            device=device,
            load=load,
            memory=memory,
            folder=out,
            **options,
        )
        print(f"\n{study.report(name, cells, model)}\n\n{cells}")


PARAMETER = Annotated[
    list[str] | None,
    _option("Another parameter of all cells, as name=value; may be repeated.", "--parameter", "-p"),
]
SLURM_OPTIONS = Annotated[
    list[str] | None,
    _option(
        "Option of a SLURM job, as name=value; may be repeated: queue, account, walltime, memory, cores, "
        "gpus, directives, prologue, directory, interface, python."
    ),
]


@app.command()
def sweep(
    grid: Annotated[
        list[str] | None, typer.Argument(help="Grids by name, .yml files, or all; listed by default.")
    ] = None,
    model: Annotated[list[str] | None, _option("Model; may be repeated.")] = None,
    limit: LIMIT = None,
    parameter: PARAMETER = None,
    workers: Annotated[int, _option("Notebooks run side by side; 0 for one per core, at most two.")] = 0,
    scheduler: Annotated[
        str, _option("Address of a Dask scheduler whose workers run the cells: tcp://…")
    ] = "",
    slurm: Annotated[bool, _option("Run the cells in SLURM jobs.", "--slurm")] = False,
    jobs: Annotated[int, _option("SLURM jobs side by side, each of which runs one cell at a time.")] = 2,
    slurm_options: SLURM_OPTIONS = None,
    retries: Annotated[int, _option("How often a failed cell is tried again.")] = 0,
    status: Annotated[bool, _option("Run nothing; show finished and failed cells.", "--status")] = False,
    table: Annotated[
        list[Path] | None, _option("File for all finished cells, .csv or .tex; may be repeated.")
    ] = None,
    figures: Annotated[
        Path | None, _option("Folder to draw each grid into, by 06_ablation; by default none.")
    ] = None,
    out: Annotated[Path, _option("Folder of the executed notebooks and results.")] = Path("runs/sweep"),
    plugin: PLUGIN = None,
):
    """Measure every cell of a grid, here or on a cluster; finished cells are kept: run it again to
    continue.
    """
    from hcsmoe_core.studies import grids, sweep, tables

    if not grid and not status:
        print(grids.table(grids.names()))
        return
    names = [name for entry in grid or () for name in (grids.names() if entry == "all" else [entry])]
    read, models = ",".join(Path(name).stem for name in names), model or [None]
    if status:
        print(sweep.status_text(out, read, models))
    else:
        require(model, "Give the models with --model MODEL; --status alone needs none.")
        overrides = (
            ({"limit": limit} if limit else {})
            | grids.overrides_from(parameter or ())
            | ({"plugin": str(plugin[0].resolve())} if plugin else {})
        )
        # What is wrong with a grid is told before a cluster is asked for anything.
        planned = grids.plans(names, model, overrides)
        with _engine(workers, scheduler, slurm, jobs, slurm_options or (), out) as engine:
            if engine.dashboard:
                print(f"dashboard {engine.dashboard}")
            try:
                grids.run(planned, out, engine=engine, retries=retries)
            finally:
                print(sweep.status_text(out, read, models))
    for path in table or ():
        print(tables.write_table(sweep.table_of(out, read, models), path))
    if figures:
        draw(out, figures, names, models, workers)
        print(f"figures {figures}")


def draw(cells: Path, figures: Path, names: list, models: list, workers: int) -> list[Path]:
    """Table and figures of grids that were measured, by ``06_ablation``; returns the executed notebooks.

    Parameters
    ----------
    cells, figures : path
        Folders of the cells, into which the executed notebooks are written, too, and of the figures.
    names : list of str
        Grids; by default all that are in the folder of the cells.
    models : list of str
        ``[None]`` for all that were measured.
    workers : int
    """
    from hcsmoe_core.studies import grids, sweep

    read = ",".join(Path(name).stem for name in names)
    measured = [entry for model in models for entry in sweep.grids_of(cells, read, model)]
    chosen = map(grids.load, names or dict.fromkeys(entry["grid"] for entry in measured))
    shared = {"sweep": str(cells), "figures": str(figures)}
    notebooks = [
        (sweep.notebook_path("06_ablation"), {"model": model, "grid": study.name} | shared | study.read)
        for study, model in itertools.product(chosen, dict.fromkeys(entry["model"] for entry in measured))
    ]
    return sweep.run_cells(notebooks, cells, workers=side_by_side(workers), again=True, description="studies")


def side_by_side(workers: int) -> int:
    """Notebooks run at a time: ``workers``, or where it is 0 one per core, at most two."""
    return workers or min(2, os.cpu_count() or 1)


def _engine(workers: int, scheduler: str, slurm: bool, jobs: int, options: list[str], folder: Path) -> Any:
    """Where cells run."""
    from hcsmoe_core.studies import runner

    require(
        sum(map(bool, (workers, scheduler, slurm))) <= 1,
        "Give only one of --workers, --scheduler and --slurm.",
    )
    require(slurm or not options, "--slurm-options needs --slurm.")
    if scheduler:
        return runner.scheduler(scheduler)
    return (
        runner.slurm(jobs, options, logs=folder / "logs")
        if slurm
        else runner.processes(side_by_side(workers))
    )


def main(command: Callable = app) -> None:
    """Run a command. Bad input is one line and exit code 2; a bug of ours shows its traceback."""
    try:
        command()
    except Exception as error:
        kind = type(error).__name__  # by name: importing torch or the runner for their classes takes seconds
        message = str(error)
        if kind in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, of a full GPU
            reason = message.partition("\n")[0] or "no more can be allocated"
            message = (
                f"out of memory ({reason}). Lower --batch-size or --length, collect less (--sample), or read "
                "one decoder layer at a time (--load streamed)."
            )
        elif not isinstance(error, InputError | OSError) and kind != "CellsError":
            raise
        print(f"hcsmoe: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
