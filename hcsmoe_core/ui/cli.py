"""The ``hcsmoe`` command: parses options, calls one function of the library, prints what it returns."""

import contextlib
import importlib
import itertools
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import hcsmoe_core as core
from hcsmoe_core._util import InputError, check_absent, output_path, require, write_json

app = typer.Typer(
    help="See which experts of a sparse mixture-of-experts model compute the same thing, merge them, and "
    "know what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"hcsmoe {core.__version__}")
        raise typer.Exit


def _option(help: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


@app.callback()
def options_of_all(
    version: Annotated[
        bool, _option("Print the version and exit.", "--version", callback=_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        bool, _option("Show the traceback of bad input too. May stand anywhere on the line.", "--verbose")
    ] = False,
):
    """Options of every command; :func:`main` reads ``--verbose``."""


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


def _given(options: dict) -> dict:
    """Options that were given or have a default."""
    return {name: value for name, value in options.items() if value is not None}


def _say(*lines: Any) -> None:
    """Print lines of at most 80 columns."""
    from hcsmoe_core.ui.describe import wrapped

    print(*(wrapped(str(line)) for line in lines), sep="\n", flush=True)


def _check_new(path: Path, force: bool) -> None:
    """Raise InputError if a file exists that would be overwritten."""
    free = force or not output_path(path).exists()
    require(free, f"{path} exists; give another --out, or --force to replace it.")


# Panels of the help texts.
METHOD_OPTIONS, TEXT_OPTIONS = "How experts are chosen", "Calibration text"
CAPTURE_OPTIONS, MACHINE_OPTIONS = "What is collected", "Model and machine"
SOURCE_DEFAULT = "that of the source"

MODEL = Annotated[
    str, typer.Argument(help="Model folder, name on the Hugging Face hub, demo-mixtral or demo-qwen.")
]
FORCE = Annotated[bool, _option("Replace the output if it exists.", "--force")]
DTYPE = Annotated[
    str,
    _option("The dtype: auto (the checkpoint's own), float32, bfloat16 or float16.", panel=MACHINE_OPTIONS),
]
DEVICE = Annotated[
    str,
    _option(
        "The device: auto (a GPU if there is one), cpu, cuda, cuda:1, …; balanced or sequential spread the "
        "layers over all GPUs.",
        panel=MACHINE_OPTIONS,
    ),
]
LOAD = Annotated[
    str,
    _option(
        "How the model is loaded: whole, streamed (one decoder layer at a time), or auto: streamed if it "
        "does not fit into memory.",
        panel=MACHINE_OPTIONS,
    ),
]
REQUESTS = Annotated[int, _option("Requests per forward pass.", min=1)]
AGAINST = Annotated[
    Path | None, _option("results.json of another model on the same tasks, to compare item by item.")
]
TRUST = Annotated[
    bool,
    _option(
        "Run Python code that comes with the model; read it first.",
        "--trust-remote-code",
        panel=MACHINE_OPTIONS,
    ),
]
MEMORY = Annotated[
    str | None,
    _option(
        "Memory that the process may use, such as 3GB.", panel=MACHINE_OPTIONS, show_default="what is free"
    ),
]
CALIBRATION = Annotated[
    str | None,
    _option(
        "Text to calibrate on: c4, wikitext, math, code or demo; a data set on the hub "
        "(name:configuration:split:column); a path to a .txt, .json, .jsonl or .safetensors file "
        "(./notes.txt); self, text that the model writes itself (self:temperature=1:start=chat); or a "
        "mixture such as 0.5*c4+0.5*self.",
        panel=TEXT_OPTIONS,
        show_default="demo for the embedded models, else c4, or self where that is unavailable",
    ),
]
SEQUENCES = Annotated[
    int | None,
    _option("Number of calibration sequences.", panel=TEXT_OPTIONS, min=1, show_default=SOURCE_DEFAULT),
]
LENGTH = Annotated[
    int | None,
    _option("Tokens per calibration sequence.", panel=TEXT_OPTIONS, min=1, show_default=SOURCE_DEFAULT),
]
COLUMN = Annotated[str, _option("Column or key of the text in a data set or JSON file.", panel=TEXT_OPTIONS)]
CALIBRATION_SEED = Annotated[
    int, _option("Seed of the order in which calibration documents are taken.", panel=TEXT_OPTIONS)
]
PLAN_SEED = Annotated[int, _option("Seed of methods that use chance.", panel=METHOD_OPTIONS)]
BATCH_SIZE = Annotated[int, _option("Sequences per forward pass.", panel=MACHINE_OPTIONS, min=1)]
METHOD = Annotated[str, _option('The method, as listed by "hcsmoe methods".', panel=METHOD_OPTIONS)]
OWN = dict(panel=METHOD_OPTIONS, show_default="the method's own")
SIMILARITY = Annotated[
    str | None,
    _option("What experts are compared by, such as expert-output; + joins several.", **OWN),
]
METRIC = Annotated[str | None, _option("The distance between experts: euclidean or cosine.", **OWN)]
LINKAGE = Annotated[str | None, _option("The linkage: average, complete, single or ward.", **OWN)]
MERGE = Annotated[
    str | None, _option("Weights of joined experts: frequency, average or routing-mass.", **OWN)
]
SET = Annotated[
    list[str] | None,
    _option(
        "Set any other step or option, as name=value: group, budget, combine, guard, … "
        '("hcsmoe methods NAME" lists them). May be repeated.',
        "--set",
        panel=METHOD_OPTIONS,
    ),
]
PLUGIN = Annotated[
    list[Path] | None,
    _option(
        "Python file with methods of your own (it is run). May be repeated.",
        "--plugin",
        callback=_load_plugins,
        panel=METHOD_OPTIONS,
    ),
]
SAMPLE = Annotated[
    int, _option("Tokens in the sample of layer inputs, if one is collected.", panel=CAPTURE_OPTIONS, min=1)
]
EVERY = Annotated[
    int,
    _option(
        "Run the experts on every n-th token only: outputs are then estimates; usage stays exact.",
        panel=CAPTURE_OPTIONS,
        min=1,
    ),
]
UNTIL_STABLE = Annotated[
    float | None,
    _option(
        "Stop once the groups from two halves of the tokens agree this well in every layer (adjusted Rand "
        "index, such as 0.95). --sequences is then the maximum.",
        panel=CAPTURE_OPTIONS,
        min=0,
        max=1,
        show_default="use all tokens",
    ),
]
UNTIL_EXCESS = Annotated[
    float | None,
    _option(
        "Stop once the groups from half of the tokens are at most this much worse (such as 0.05 for 5 %) on "
        "the other half than that half's own groups, in every layer. Use either this or --until-stable.",
        panel=CAPTURE_OPTIONS,
        min=0,
        show_default="use all tokens",
    ),
]
PLAN_FILE = Annotated[Path | None, _option("Plan from hcsmoe plan.")]
STATISTICS = Annotated[Path | None, _option("Statistics file from hcsmoe capture.")]
TASKS = Annotated[
    str | None,
    _option(
        "Tasks of lm-evaluation-harness, separated by commas; paper stands for the eight of the paper.",
        show_default="the embedded tasks",
    ),
]
LIMIT = Annotated[int | None, _option("Items per task.", min=1, show_default="all")]
TEXT = Annotated[
    str, _option("Text that perplexity is measured on: demo, a source as for --calibration, or none.")
]


def _settings(options: dict) -> dict:
    """Take those steps and options that differ from the method's own out of a command's options."""
    from hcsmoe_core.methods import parse_settings

    steps = {name: options.pop(name, None) for name in ("similarity", "metric", "linkage", "merge")}
    others = parse_settings(options.pop("others", None) or (), option="--set")
    return {name: value for name, value in steps.items() if value} | others


@app.command()
def capture(
    model: MODEL,
    out: Annotated[Path, _option("Statistics file to write (.safetensors).")],
    force: FORCE = False,
    methods: Annotated[
        list[str] | None,
        _option(
            "Methods to collect for, separated by commas or repeated, or all.",
            "--for",
            panel=CAPTURE_OPTIONS,
            show_default="hc-smoe",
        ),
    ] = None,
    needs: Annotated[
        str | None,
        _option(
            "What to collect, in place of --for: usage, outputs, norms, grams, sample, separated by commas.",
            panel=CAPTURE_OPTIONS,
        ),
    ] = None,
    sample: SAMPLE = 32768,
    every: EVERY = 1,
    until_stable: UNTIL_STABLE = None,
    until_excess: UNTIL_EXCESS = None,
    stable_at: Annotated[
        str | None,
        _option(
            "Numbers of groups that --until-stable or --until-excess look at, separated by commas.",
            panel=CAPTURE_OPTIONS,
            show_default="3/4, 1/2 and 1/4 of the experts",
        ),
    ] = None,
    calibration: CALIBRATION = None,
    sequences: SEQUENCES = None,
    length: LENGTH = None,
    column: COLUMN = "text",
    calibration_seed: CALIBRATION_SEED = 42,
    batch_size: BATCH_SIZE = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = None,
    trust_remote_code: TRUST = False,
    plugin: PLUGIN = None,
):
    """Run the model once over calibration tokens and save the statistics.

    Under torchrun, ranks share the batches.
    """
    options = _given(dict(locals()) | {"plugin": None, "force": None})
    _check_new(out, force)
    from hcsmoe_core.studies.pipeline import capture_to_file

    options |= dict(methods=_items(",".join(methods or ())), needs=_items(needs or ""))
    options |= dict(stable_at=_numbers("--stable-at", stable_at or ""))
    if summary := capture_to_file(**options):  # None on ranks other than the first
        _say(summary)


@app.command()
def plan(
    statistics: Annotated[Path, typer.Argument(help="Statistics file from hcsmoe capture.")],
    experts: Annotated[int, _option("Experts kept per layer.")],
    out: Annotated[Path, _option("Plan to write (.json).")],
    force: FORCE = False,
    method: METHOD = "hc-smoe",
    similarity: SIMILARITY = None,
    metric: METRIC = None,
    linkage: LINKAGE = None,
    merge: MERGE = None,
    others: SET = None,
    plan_seed: PLAN_SEED = 0,
    model: Annotated[
        str | None,
        _option("Model whose weights are read, if the method looks at them.", panel=METHOD_OPTIONS),
    ] = None,
    trust_remote_code: TRUST = False,
    plugin: PLUGIN = None,
):
    """Decide which experts of each layer are joined or dropped; the model is not run."""
    settings = _settings(dict(locals()))
    _check_new(out, force)
    from hcsmoe_core.methods import resolve
    from hcsmoe_core.scale.streaming import open_model
    from hcsmoe_core.ui.describe import plan_table

    stats = core.load_statistics(statistics)
    stats.check(resolve(method, **settings).needs, f"Method {method!r}")
    loaded = open_model(model, trust_remote_code=trust_remote_code)[0] if model else None
    decision = core.make_plan(stats, loaded, experts=experts, method=method, seed=plan_seed, **settings)
    decision.save(out)
    _say(plan_table(stats, decision), f"wrote {out}")


@app.command()
def merge(
    model: MODEL,
    out: Annotated[Path, _option("Model folder to write; must not exist.")],
    plan: PLAN_FILE = None,
    experts: Annotated[
        int | None, _option("Experts kept per layer: capture, plan and merge in one go.")
    ] = None,
    statistics: STATISTICS = None,
    dry_run: Annotated[
        bool,
        _option("Print size, tokens, time and memory; capture and write nothing.", "--dry-run"),
    ] = False,
    router: Annotated[
        str | None,
        _option(
            "What becomes of the router. mapped: exact, as it was; row-kept or folded: one row per group, a "
            "checkpoint that stock engines open; plain: such a one, if the method makes it.",
            show_default="plain if exact, else mapped",
        ),
    ] = None,
    fidelity: Annotated[
        int,
        _option("Held-out sequences on which the result is compared with the original; 0 skips it.", min=0),
    ] = 10,
    method: METHOD = "hc-smoe",
    similarity: SIMILARITY = None,
    metric: METRIC = None,
    linkage: LINKAGE = None,
    merge: MERGE = None,
    others: SET = None,
    plan_seed: PLAN_SEED = 0,
    sample: SAMPLE = 32768,
    every: EVERY = 1,
    until_stable: UNTIL_STABLE = None,
    until_excess: UNTIL_EXCESS = None,
    calibration: CALIBRATION = None,
    sequences: SEQUENCES = None,
    length: LENGTH = None,
    column: COLUMN = "text",
    calibration_seed: CALIBRATION_SEED = 42,
    batch_size: BATCH_SIZE = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = None,
    trust_remote_code: TRUST = False,
    plugin: PLUGIN = None,
):
    """Write a smaller checkpoint, from a plan or with a number of experts.

    If interrupted, run it again to continue.
    """
    options = _given(dict(locals()) | {"plugin": None})
    return _forecast(options) if options.pop("dry_run") else _shrink(options)


def _shrink(options: dict) -> None:
    from hcsmoe_core.studies.pipeline import shrink, written_text

    if written := shrink(**_settings(options), **options):  # None on ranks other than the first
        _say(written_text(written))
        if warning := (written.get("fidelity") or {}).get("warning"):
            print(f"\nWARNING: {warning}", file=sys.stderr)


def _forecast(options: dict) -> None:
    """Print what a merge would cost, after the checks that it would begin with."""
    from hcsmoe_core.studies.cost import merge_forecast

    check_absent(options["out"])
    require(("plan" in options) != ("experts" in options), "Give either --plan FILE or --experts R.")
    names = ("experts", "method", "dtype", "calibration", "sequences", "length")
    chosen = {name: options[name] for name in names if name in options} | _settings(options)
    decision = core.load_plan(options["plan"]) if "plan" in options else None
    captures = not {"plan", "statistics"} & set(options)
    _say(merge_forecast(options["model"], plan=decision, captures=captures, **chosen), "nothing was written")


@app.command()
def evaluate(
    model: MODEL,
    plan: PLAN_FILE = None,
    statistics: STATISTICS = None,
    tasks: TASKS = None,
    limit: LIMIT = None,
    batch_size: REQUESTS = 64,
    text: TEXT = "demo",
    sequences: Annotated[int, _option("Number of sequences of that text.", min=1)] = 96,
    length: Annotated[int, _option("Tokens per sequence.", min=1)] = 256,
    seed: Annotated[int, _option("Seed of that text and of the harness.")] = 0,
    against: AGAINST = None,
    answers: Annotated[str, _option("Folder that keeps the model's answers, or none.")] = "runs/answers",
    out: Annotated[Path | None, _option("results.json to write.")] = None,
    lm_eval_out: Annotated[
        Path | None, _option("Folder for results and samples in lm-evaluation-harness' own format.")
    ] = None,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    plugin: PLUGIN = None,
):
    """Measure accuracy on tasks, and perplexity."""
    from hcsmoe_core.score import evaluation

    names = [
        task
        for name in _items(tasks or "")
        for task in (evaluation.PAPER_TASKS if name == "paper" else [name])
    ]
    evaluation.check_tasks(names)
    if out:
        output_path(out)
    other = evaluation.load_scores(against) if against else None
    decision = core.load_plan(plan) if plan else None
    stats = core.load_statistics(statistics) if statistics else None
    where = dict(dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    loaded, tokenizer = core.load_model(model, **where)
    if decision is not None:
        core.apply_plan(loaded, decision, stats)
    scores = core.evaluate(
        loaded,
        tokenizer,
        names or None,
        limit=limit,
        batch_size=batch_size,
        text=None if text == "none" else text,
        sequences=sequences,
        length=length,
        seed=seed,
        answers=None if answers == "none" else Path(answers),
        lm_eval_out=lm_eval_out,
    )
    print(evaluation.score_table(scores))
    if other:
        print(f"\nagainst {against}\n{evaluation.paired_table(evaluation.paired(scores, other))}")
    if out:
        _write_scores(out, model, decision, loaded, scores)
    print(*(f"wrote {path}" for path in (out, lm_eval_out) if path), sep="\n")


def _write_scores(path: Path, name: str, decision: Any, model: Any, scores: dict) -> None:
    from hcsmoe_core.studies.tables import model_size

    size = model_size(model) | {"experts_kept": [layer.num_stored for layer in core.find_moe_layers(model)]}
    settings = decision and decision.settings
    write_json(path, {"model": name, "plan": settings, "size": size, "scores": scores})


@app.command()
def plot(
    statistics: Annotated[Path, typer.Argument(help="Statistics file from hcsmoe capture.")],
    out: Annotated[Path, _option("Figure to write: .png, .pdf or .svg.")],
    kind: Annotated[
        str, _option("heatmap (distances and tree of a layer), dendrogram (its tree), or layers (all).")
    ] = "heatmap",
    layer: Annotated[int, _option("Number of the MoE layer, from 0.", min=0)] = 0,
    experts: Annotated[int | None, _option("Colour the groups that so many experts would leave.")] = None,
    similarity: Annotated[
        str, _option("What experts are compared by, such as expert-output or router-logits.")
    ] = "expert-output",
    metric: Annotated[
        str, _option("The distance: euclidean or cosine.", show_default="that of the similarity")
    ] = "",
    linkage: Annotated[str, _option("The linkage: average, complete, single or ward.")] = "average",
    model: Annotated[str | None, _option("Model whose weights are read by the similarity weight.")] = None,
    force: FORCE = False,
):
    """Draw which experts compute the same thing."""
    _check_new(out, force)
    from hcsmoe_core.ui import describe, figures

    stats, loaded = core.load_statistics(statistics), core.load_model(model)[0] if model else None
    how = dict(similarity=similarity, metric=metric, linkage=linkage)
    figure = describe.draw(stats, kind, layer=layer, experts=experts, model=loaded, **how)
    print(f"wrote {figures.write(figure, out)}")


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Model or merged folder, model name, statistics or plan.")],
):
    """Tell what is in a model, a merged folder, a statistics file or a plan."""
    from hcsmoe_core.ui.describe import describe

    _say(describe(path))


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="Plan from hcsmoe plan.")],
    second: Annotated[Path, typer.Argument(help="The plan to compare it with.")],
):
    """Tell in which settings, layers and groups two plans differ."""
    from hcsmoe_core.ui.describe import difference

    _say(difference(core.load_plan(first), core.load_plan(second)))


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="Method to explain with its steps and options.", show_default="all")
    ] = None,
    plugin: PLUGIN = None,
):
    """List every method, or explain one: its steps, what it needs of the statistics, its cost, its paper."""
    from hcsmoe_core.methods import table
    from hcsmoe_core.ui.describe import explain, wrapped

    print(wrapped(explain(name)) if name else wrapped(table(), hang=7))


@app.command()
def families(
    names: Annotated[
        list[str] | None, typer.Argument(help="Families, as transformers names them.", show_default="all")
    ] = None,
):
    """List the MoE families of transformers: what works on each, and why what does not."""
    from hcsmoe_core.ui import describe, family_table

    print(describe.wrapped(family_table.text(names), hang=25))


@app.command()
def notebooks(
    folder: Annotated[Path, typer.Argument(help="Folder to make; must not exist.")],
):
    """Copy the notebooks and their grids into a folder, to run and to change."""
    from hcsmoe_core.studies.sweep import notebooks_folder

    check_absent(folder)
    shutil.copytree(notebooks_folder(), folder, ignore=shutil.ignore_patterns(".*"))
    print(f"wrote {folder}\nopen them: jupyter lab {folder}")


@app.command()
def compare(
    model: MODEL,
    methods: Annotated[
        str | None, _option("Methods to compare, separated by commas.", show_default="all")
    ] = None,
    experts: Annotated[
        str | None,
        _option("Numbers of experts, separated by commas.", show_default="3/4, 1/2 and 1/4 of the experts"),
    ] = None,
    seeds: Annotated[str, _option("Seeds of the calibration samples, separated by commas.")] = "0,1,2",
    limit: LIMIT = 100,
    others: SET = None,
    calibration: CALIBRATION = None,
    sequences: SEQUENCES = None,
    length: LENGTH = None,
    text: TEXT = "demo",
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    trust_remote_code: TRUST = False,
    out: Annotated[Path, _option("Folder of the cells and the tables.")] = Path("runs/compare"),
    plugin: PLUGIN = None,
):
    """Compare all methods on equal footing: accuracy and loss with their errors, time and memory."""
    options = _given(dict(locals()))
    from hcsmoe_core.studies import cache, comparison, tables

    output_path(table := out / f"{cache.slug(model)}.csv")
    names = ("calibration", "sequences", "length", "text", "dtype", "device")
    frame = comparison.compare(
        model,
        methods=_items(methods or "") or None,
        experts=_numbers("--experts", experts or "") or None,
        seeds=_numbers("--seeds", seeds),
        settings=_settings(options),
        limit=limit,
        trust_remote_code=trust_remote_code,
        folder=out,
        plugin=plugin or (),
        **{name: options[name] for name in names if name in options},
    )
    print(f"{comparison.table(frame)}\n\nwrote {tables.write_table(frame, table)}")


CLUSTER_OPTIONS = "On a cluster"
WORKERS = Annotated[
    int | None,
    _option("Number of notebooks run side by side.", min=1, show_default="one per core, at most two"),
]
SCHEDULER = Annotated[
    str | None,
    _option("Address of a Dask scheduler whose workers run the cells: tcp://…", panel=CLUSTER_OPTIONS),
]
JOBS = Annotated[
    int,
    _option("SLURM jobs side by side, each of which runs one cell at a time.", panel=CLUSTER_OPTIONS, min=1),
]
TABLE = Annotated[list[Path] | None, _option("File for all finished cells, .csv or .tex. May be repeated.")]
PARAMETER = Annotated[
    list[str] | None,
    _option("Set another parameter of all cells, as name=value. May be repeated.", "--parameter", "-p"),
]
SLURM_OPTIONS = Annotated[
    list[str] | None,
    _option(
        "Option of the SLURM jobs, as name=value, of queue, account, walltime, memory, cores, "
        "gpus, directives, prologue, directory, interface and python. May be repeated.",
        panel=CLUSTER_OPTIONS,
    ),
]


@app.command()
def sweep(
    grid: Annotated[
        list[str] | None,
        typer.Argument(help="Grids by name, .yml files, or all; without any, they are listed."),
    ] = None,
    model: Annotated[list[str] | None, _option("Model to measure. May be repeated.")] = None,
    limit: LIMIT = None,
    parameter: PARAMETER = None,
    workers: WORKERS = None,
    scheduler: SCHEDULER = None,
    slurm: Annotated[bool, _option("Run the cells in SLURM jobs.", "--slurm", panel=CLUSTER_OPTIONS)] = False,
    jobs: JOBS = 2,
    slurm_options: SLURM_OPTIONS = None,
    retries: Annotated[int, _option("How often a failed cell is tried again.", min=0)] = 0,
    status: Annotated[bool, _option("Run nothing; show finished and failed cells.", "--status")] = False,
    table: TABLE = None,
    figures: Annotated[
        Path | None, _option("Folder to draw each grid into, by 06_ablation.", show_default="none is drawn")
    ] = None,
    out: Annotated[Path, _option("Folder of the executed notebooks and results.")] = Path("runs/sweep"),
    plugin: PLUGIN = None,
):
    """Measure every cell of a grid, here or on a cluster; run it again to continue."""
    from hcsmoe_core.studies import grids, sweep, tables

    if not grid and not status:
        _say(grids.table(grids.names()))
        return
    for path in (*(table or ()), out / "table", *([figures / "table"] if figures else [])):
        output_path(path)
    names = [name for entry in grid or () for name in (grids.names() if entry == "all" else [entry])]
    read, models = ",".join(Path(name).stem for name in names), model or [None]
    if status:
        for name in names:
            if not [*out.glob(f"{Path(name).stem}-*.grid.json")]:
                grids.load(name)  # an unknown grid is an error
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
        print(f"wrote {tables.write_table(sweep.table_of(out, read, models), path)}")
    if figures:
        draw(out, figures, names, models, workers)
        print(f"wrote {figures}")


def draw(cells: Path, figures: Path, names: list, models: list, workers: int | None) -> list[Path]:
    """Table and figures of grids that were measured, by ``06_ablation``; returns the executed notebooks.

    Parameters
    ----------
    cells, figures : path
        Folders of the cells, into which the executed notebooks are written, too, and of the figures.
    names : list of str
        Grids; by default all that are in the folder of the cells.
    models : list of str
        ``[None]`` for all that were measured.
    workers : int, optional
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


def side_by_side(workers: int | None) -> int:
    """Notebooks run at a time: ``workers``, or without it one per core, at most two."""
    return workers or min(2, os.cpu_count() or 1)


def _engine(workers, scheduler, slurm: bool, jobs: int, options: list[str], folder: Path) -> Any:
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


@app.command()
def report(
    source: Annotated[str, typer.Argument(help="Statistics file from hcsmoe capture, or a model.")],
    out: Annotated[Path, _option("HTML file to write.")] = Path("report.html"),
    against: Annotated[str | None, _option("Another capture of the model, to compare with.")] = None,
    similarity: Annotated[str, _option("What experts are compared by.")] = "expert-output",
    linkage: Annotated[str, _option("average, complete, single or ward.")] = "average",
    calibration: CALIBRATION = None,
    sequences: SEQUENCES = None,
    length: LENGTH = None,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    plugin: PLUGIN = None,
):
    """Write the interactive view of all layers as one HTML file, with a verdict: is it worth merging?"""
    options = _given(dict(locals()))
    from hcsmoe_core.ui import report

    names = ("against", "calibration", "sequences", "length", "dtype", "device")
    drawn = dict(similarity=similarity, linkage=linkage)
    _say(report.report(source, out, options=drawn, **{n: options[n] for n in names if n in options}))


EXTRAS = dict.fromkeys(("matplotlib", "seaborn", "papermill", "ipykernel", "ipywidgets", "nbformat"), "lab")
# What errors of the library call arguments of which the option has another name.
ARGUMENTS = {
    "agreement": "until_stable",
    "excess": "until_excess",
    "source": "calibration",
    "seed": "plan_seed",
}
# What errors of the library say for users of Python, and what is meant on the command line.
PHRASES = {
    r"restore\(model\)(?: first)?, or load": "load",
    r"apply_plan\(model, plan, stats\), or (--statistics FILE)": r"\1",
    r"with needs=\(.*?\), or by": "by",
    r" \(--plan FILE\) or the number": " (--plan FILE) or the number",
}


def _spoken(message: str, command: Callable) -> str:
    """An error of the library in the words of the command line: options in place of arguments."""
    commands = typer.main.get_command(app).commands if command is app else {}
    used = commands.get(next((word for word in sys.argv[1:] if word in commands), None))
    options = {p.name: max(p.opts, key=len) for p in used.params} if used else {}

    def option(match):
        name = match[1] if match[1] in options else ARGUMENTS.get(match[1], match[1])
        names = importlib.import_module("hcsmoe_core.methods").option_names() if "others" in options else ()
        return options.get(name, f"--set {name}" if name in names else match[0])

    message = re.sub(r'(?:[Tt]he )?"(\w+)" (?:argument|setting)', option, message)
    for phrase, meant in PHRASES.items():
        message = re.sub(phrase, meant, message)
    return message


@contextlib.contextmanager
def _ended_by_signals():
    """SIGTERM and SIGHUP end what runs in the block as an error does, so that it is tidied up."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [n for n in map(signal.Signals.__getitem__, names) if signal.getsignal(n) == signal.SIG_DFL]

    def end(number, _):
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)  # once is enough
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"hcsmoe: ended by {signal.Signals(number).name}.", file=sys.stderr)
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def main(command: Callable = app) -> None:
    """Run a command. Bad input is one line and exit code 2; a bug of ours shows its traceback."""
    verbose, sys.argv = "--verbose" in sys.argv, [word for word in sys.argv if word != "--verbose"]
    try:
        with _ended_by_signals():
            command()
    except SystemExit as done:
        if done.code == 130:  # typer's, of Ctrl-C
            print("hcsmoe: interrupted.", file=sys.stderr)
        raise
    except Exception as error:
        kind = type(error).__name__  # by name: importing torch or the runner for their classes takes seconds
        message = str(error)
        if kind in ("MemoryError", "OutOfMemoryError"):  # the latter is torch's, of a full GPU
            reason = message.partition("\n")[0] or "no more can be allocated"
            message = (
                f"out of memory ({reason}). Lower --batch-size or --length, collect less (--sample), or read "
                "one decoder layer at a time (--load streamed)."
            )
        elif kind == "ModuleNotFoundError" and error.name in EXTRAS:
            message = f'This needs the package {error.name}: pip install "hcsmoe[{EXTRAS[error.name]}]"'
        elif not isinstance(error, InputError | OSError) and kind != "CellsError":
            raise
        if verbose:
            traceback.print_exc()
        print(f"hcsmoe: {_spoken(message, command)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
