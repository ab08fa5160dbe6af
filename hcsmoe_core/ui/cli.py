"""The ``hcsmoe`` command: the library's verbs, one each."""

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hcsmoe_core._util import InputError

app = typer.Typer(
    help="See which experts of a sparse mixture-of-experts model compute the same, merge them, and know what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


MODEL = Annotated[
    str, typer.Argument(help="Model folder, name on the Hugging Face hub, demo-mixtral or demo-qwen.")
]


DTYPE = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]


DEVICE = Annotated[
    str,
    typer.Option(
        help="auto (a GPU where there is one), cpu, cuda, cuda:1, …; balanced or sequential for all GPUs."
    ),
]


LOAD = Annotated[
    str,
    typer.Option(
        help="whole, streamed (decoder layer by decoder layer), or auto: streamed if it does not fit into memory."
    ),
]


MEMORY = Annotated[
    str, typer.Option(help="Memory that the process may hold, such as 3GB; by default what is free.")
]


CALIBRATION = Annotated[
    str,
    typer.Option(
        help="c4, wikitext, math, code, demo, a data set on the hub (name:configuration:split:column), a .txt, .json, .jsonl "
        "or .safetensors file; self, text that the model writes itself (self:temperature=1:start=chat); or a mixture such as "
        "0.5*c4+0.5*self. By default what suits: demo for the embedded models, else c4, or self where that is not to be had."
    ),
]


SEQUENCES = Annotated[int, typer.Option(help="Calibration sequences; 0 for the default of the source.")]


LENGTH = Annotated[int, typer.Option(help="Tokens in each; 0 for the default of the source.")]


COLUMN = Annotated[str, typer.Option(help="Column or key of the text in a data set or JSON file.")]


SEED = Annotated[int, typer.Option(help="Of the order in which documents are taken.")]


BATCH = Annotated[int, typer.Option(help="Sequences a forward pass.")]


METHOD = Annotated[str, typer.Option(help="What hcsmoe methods lists.")]


SIMILARITY = Annotated[
    str, typer.Option(help="What experts are compared by, if not by the method's own; + joins several.")
]


METRIC = Annotated[str, typer.Option(help="euclidean or cosine, if not the similarity's own.")]


LINKAGE = Annotated[str, typer.Option(help="average, complete, single or ward, if not the method's own.")]


MERGE = Annotated[str, typer.Option(help="frequency, average or routing-mass, if not the method's own.")]


SET = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other step, as name=value: grouping, budget, combine, align, guard, …"),
]


SAMPLE_TOKENS = Annotated[
    int, typer.Option("--sample", help="Tokens of the sample of layer inputs, where it is collected.")
]


EVERY = Annotated[
    int,
    typer.Option(
        help="Apply every expert to each so-many-th token alone: outputs are estimates, usage stays exact."
    ),
]


UNTIL_STABLE = Annotated[
    float,
    typer.Option(
        help="Stop once the groups that two halves of the tokens give agree so far in every layer (adjusted Rand index, as "
        "0.95); --sequences is then the most that is taken. 0: take all."
    ),
]


UNTIL_EXCESS = Annotated[
    float,
    typer.Option(
        help="The same by what groups cost: stop once those of one half, measured on the other, spread at most so much more "
        "(as 0.05) than the other's own in every layer, though they may be others. Give one of the two."
    ),
]


HELD_OUT = 512  # tokens of each held-out sequence, at most


FOR = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        help="Methods to collect for, comma-separated or repeated, or all; by default those that need no sample.",
    ),
]


def _settings(similarity="", metric="", linkage="", merge="", others=None):
    """Steps that the options set otherwise than the method does."""
    from hcsmoe_core.methods.planner import settings_from

    given = dict(similarity=similarity, metric=metric, linkage=linkage, merge=merge)
    return {name: value for name, value in given.items() if value} | settings_from(
        others or (), option="--set"
    )


def _listed(text):
    """Items of a comma-separated list."""
    return [item.strip() for item in text.split(",") if item.strip()]


def _needs(methods, settings=None):
    """What methods need of the statistics, in all; of no method, the default."""
    from hcsmoe_core.methods.planner import METHODS, needs_of
    from hcsmoe_core.statistics import DEFAULT_NEEDS

    names = list(METHODS) if methods == "all" else _listed(methods)
    return tuple(dict.fromkeys(n for m in names for n in needs_of(m, **(settings or {})))) or DEFAULT_NEEDS


def _calibration(model, tokenizer, calibration, sequences, length, column, seed, heldout=0):
    """Calibration tokens by the command's options, their domains, a description, and more tokens of the same source."""
    from hcsmoe_core import calibration_tokens, domains_of
    from hcsmoe_core.moe import source_of
    from hcsmoe_core.scale import ranks
    from hcsmoe_core.studies.cache import calibration_of
    from hcsmoe_core.text.calibration import own_sequences
    from hcsmoe_core.text.own_text import GRAM, NAME, repetition

    settings = calibration_of(model.name_or_path, calibration, sequences, length)
    source, count, size = settings["calibration"], settings["sequences"], settings["length"]
    options = dict(model=model, length=size, seed=seed, column=column)
    try:
        rows = more = calibration_tokens(source, tokenizer, sequences=count, **options)
    except FileNotFoundError as error:
        if calibration or source_of(model) is not None:  # what was asked for is never replaced
            raise
        print(
            f"hcsmoe: {error}\nNo --calibration was given: going on with text that the model writes itself.",
            file=sys.stderr,
        )
        return _calibration(model, tokenizer, NAME, sequences, length, column, seed, heldout)
    if heldout:
        with contextlib.suppress(ValueError):  # there is not text enough for both
            more = calibration_tokens(source, tokenizer, sequences=count + heldout, **options)
    about = (
        f"{count} × {size} tokens of {Path(source).name if Path(source).exists() else source}, seed {seed}"
    )
    if own_sequences(source, count):
        about += f", {repetition(rows):.1%} of {GRAM}-grams repeated"
        if ranks.rank() == 0:
            print(f"calibrating on {about}")
    return rows, domains_of(source, count), about, more


def _captured(model, input_ids, domains, work, batch_size, needs, sample, every, until, how):
    """Statistics of a loaded model; of a streamed one, by way of a work folder.

    ``until`` (if anything) and ``how`` are when to stop and the trees that tell, as options of
    :func:`hcsmoe_core.studies.stability.capture_until_stable`.
    """
    from hcsmoe_core import capture
    from hcsmoe_core.collect import expected_bytes
    from hcsmoe_core.scale import ranks
    from hcsmoe_core.scale.streaming import stream_capture
    from hcsmoe_core.studies.stability import capture_until_stable, stability_table

    size = dict(domains=len(set(domains)) if domains else 1, tokens=input_ids.numel(), sample=sample)
    if ranks.rank() == 0:
        way = "" if work is None else ", decoder layer by decoder layer"
        print(f"collecting {', '.join(needs)}{way}: {expected_bytes(model, needs, **size) / 1e6:.1f} MB")
    options = dict(needs=needs, sample=sample, every=every, batch_size=batch_size, domains=domains)
    if until:
        stats = capture_until_stable(model, input_ids, **until, **how, **options)
        if ranks.rank() == 0:
            print(stability_table(stats).round(3).to_string(index=False))
            state = "stable" if stats.stability["stable"] else "not stable yet"
            print(f"{state} after {stats.num_tokens:,} of {input_ids.numel():,} tokens")
        return stats
    if work is None:
        return capture(model, input_ids, **options)
    return stream_capture(model, input_ids, work / "capture", **options)


def _until(stable, excess):
    """When a capture stops, as options of :func:`hcsmoe_core.studies.stability.capture_until_stable`; none if it takes all."""
    if stable and excess:
        raise InputError(
            "Give one of --until-stable (groups agree) and --until-excess (groups cost as much), not both."
        )
    return {"agreement": stable} if stable else {"excess": excess} if excess else {}


def _trees(method, settings, experts):
    """The trees that a method cuts, for :func:`_captured`: one by its distances even where it does not group by a tree."""
    from hcsmoe_core.methods.planner import steps_of

    steps = steps_of(method, **settings)
    how = (
        dict(similarity=steps.similarity, metric=steps.metric, linkage=steps.linkage)
        if steps.compares
        else {}
    )
    if steps.group == "residual":
        how = {
            "similarity": "functional-routed"
        }  # of the distances that its groups are made by, the one that tokens change
    return how | {"experts": [experts]}


@app.command()
def capture(
    model: MODEL,
    out: Annotated[Path, typer.Option(help="Statistics file to write (.safetensors).")],
    methods: FOR = None,
    sample: SAMPLE_TOKENS = 32768,
    every: EVERY = 1,
    until_stable: UNTIL_STABLE = 0.0,
    until_excess: UNTIL_EXCESS = 0.0,
    stable_at: Annotated[
        str,
        typer.Option(
            help="With --until-…: numbers of groups, comma-separated; by default 3/4, 1/2 and 1/4 of E."
        ),
    ] = "",
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    column: COLUMN = "text",
    seed: SEED = 42,
    batch_size: BATCH = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = "",
):
    """One pass over calibration tokens: the statistics that plans are made from. Under torchrun, ranks share the batches."""
    from hcsmoe_core.scale import ranks
    from hcsmoe_core.scale.streaming import open_model, work_folder

    needs, until = _needs(",".join(methods or ())), _until(until_stable, until_excess)
    loaded, tokenizer = open_model(model, dtype=dtype, device=ranks.started(device), load=load, memory=memory)
    with work_folder(out, loaded) as work:
        input_ids, domains, *_ = _calibration(loaded, tokenizer, calibration, sequences, length, column, seed)
        at = [_number("--stable-at", n) for n in _listed(stable_at)] or None
        how = (every, until, {"experts": at})
        stats = _captured(loaded, input_ids, domains, work, batch_size, needs, sample, *how)
        if ranks.left():
            return
        stats.save(out)
    print(
        f"{out}: {stats.num_tokens:,} tokens, {len(stats.layers)} MoE layers, {out.stat().st_size / 1e6:.1f} MB"
    )


@app.command()
def plan(
    statistics: Annotated[Path, typer.Argument(help="Statistics file from hcsmoe capture.")],
    experts: Annotated[int, typer.Option(help="Experts kept in each layer.")],
    out: Annotated[Path, typer.Option(help="Plan to write (.json).")],
    method: METHOD = "hc-smoe",
    similarity: SIMILARITY = "",
    metric: METRIC = "",
    linkage: LINKAGE = "",
    merge: MERGE = "",
    others: SET = None,
    plan_seed: Annotated[int, typer.Option("--seed", help="Of methods that use chance.")] = 0,
    model: Annotated[
        str, typer.Option(help="Model to read the weights of, where the method looks at them.")
    ] = "",
):
    """Decide which experts of each layer join or go; the model is not run."""
    from hcsmoe_core import load_statistics, make_plan
    from hcsmoe_core.scale.streaming import open_model
    from hcsmoe_core.studies.tables import cut_table

    settings = _settings(similarity, metric, linkage, merge, others)
    stats = load_statistics(statistics)
    loaded = open_model(model)[0] if model else None
    made = make_plan(stats, loaded, experts=experts, method=method, seed=plan_seed, **settings)
    made.save(out)
    print(cut_table(stats, made).round(4).to_string(index=False))
    print(out)


@app.command()
def merge(
    model: MODEL,
    out: Annotated[Path, typer.Option(help="Model folder to write; must not exist.")],
    plan: Annotated[Path | None, typer.Option(help="Plan from hcsmoe plan; or give --experts.")] = None,
    experts: Annotated[
        int, typer.Option(help="Experts kept in each layer: capture, plan and merge in one go.")
    ] = 0,
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Statistics that --plan was made from, where it needs them; or to make a plan from with --experts."
        ),
    ] = None,
    router: Annotated[
        str,
        typer.Option(
            help="mapped: exact, with the router as it was; row-kept or folded: one router row a group, a checkpoint that "
            "stock engines open; plain: such a one, if the method makes it. By default plain if that is exact, else mapped."
        ),
    ] = "",
    fidelity: Annotated[
        int,
        typer.Option(
            help="Held-out sequences on which the written model is compared with the original; 0 for none."
        ),
    ] = 10,
    method: Annotated[
        str,
        typer.Option(
            help='What hcsmoe methods lists. By default "recommended"; "hc-smoe", the paper\'s, where --similarity, --metric '
            "or --linkage are given."
        ),
    ] = "",
    similarity: SIMILARITY = "",
    metric: METRIC = "",
    linkage: LINKAGE = "",
    merge: MERGE = "",
    others: SET = None,
    sample: SAMPLE_TOKENS = 32768,
    every: EVERY = 1,
    until_stable: UNTIL_STABLE = 0.0,
    until_excess: UNTIL_EXCESS = 0.0,
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    column: COLUMN = "text",
    seed: SEED = 42,
    batch_size: BATCH = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = "",
):
    """Write a smaller checkpoint, by a plan or with a number of experts. Interrupted, it goes on when called again."""
    from hcsmoe_core import load_plan, load_statistics, save_merged
    from hcsmoe_core._util import check_absent, check_choice
    from hcsmoe_core.checkpoint import ROUTERS
    from hcsmoe_core.demo import models as demo_models
    from hcsmoe_core.methods.planner import RECOMMENDED, steps_of
    from hcsmoe_core.plan import JOINED
    from hcsmoe_core.scale import ranks
    from hcsmoe_core.scale.streaming import open_model, stream_merged, tidied, work_folder
    from hcsmoe_core.score.fidelity import unseen
    from hcsmoe_core.statistics import sequence_hashes

    check_choice("router", router, ("", *ROUTERS))
    if (plan is None) == (experts == 0):
        raise InputError(
            "Give either --plan PLAN or --experts R (from 1 to the model's number of experts), and not both."
        )
    device = ranks.started(device)
    if tidied(out):
        print(f"{out}: complete; what an interrupted run had left beside it is removed")
        return
    check_absent(out)
    made = load_plan(plan) if plan else None
    stats = load_statistics(statistics) if statistics else None
    settings = _settings(similarity, metric, linkage, merge, others)
    if router in JOINED and made is None:
        settings["router"] = router
    method = method or ("hc-smoe" if similarity or metric or linkage else RECOMMENDED)
    if (
        made is None
        and (similarity or metric or linkage)
        and steps_of(method, **settings).group == "residual"
    ):
        raise InputError(
            f'--similarity, --metric and --linkage have no part in method "{method}", which finds groups by what they leave; '
            "leave them out, or say --method hc-smoe."
        )
    needs, until = _needs(method, settings), _until(until_stable, until_excess)
    loaded, tokenizer = open_model(model, dtype=dtype, device=device, load=load, memory=memory)
    with work_folder(out, loaded) as work:
        heldout, about = None, {}
        if made is None:
            _check_experts(loaded, experts)
        if (made is None and stats is None) or (fidelity and (calibration or model in demo_models.NAMES)):
            how = (calibration, sequences, length, column, seed, fidelity)
            input_ids, domains, text, more = _calibration(loaded, tokenizer, *how)
            seen = sequence_hashes(input_ids) + (stats.sequences if stats else [])
            heldout = unseen(more, seen, length=HELD_OUT)
        if made is None and stats is None:
            about["calibration"] = text
            how = (every, until, _trees(method, settings, experts))
            stats = _captured(loaded, input_ids, domains, work, batch_size, needs, sample, *how)
        if ranks.left():
            return
        if made is None:
            made = _planned(work, stats, loaded, experts=experts, method=method, **settings)
        options = dict(stats=stats, router=router, tokenizer=tokenizer, heldout=heldout, about=about)
        written = (
            stream_merged(loaded, made, out, work, **options)
            if work
            else save_merged(loaded, made, out, **options)
        )
    _print_written(out, made, written)


def _planned(work, stats, model, **how):
    """The plan of a merge; of a streamed one it is kept in the work folder, as making it may take long."""
    from hcsmoe_core import load_plan, make_plan
    from hcsmoe_core._util import sha256_json
    from hcsmoe_core.methods.planner import POINTS_TO, RECOMMENDED

    path = work and work / f"plan-{sha256_json([stats.identity(), how])[:12]}.json"
    if path and path.exists():
        return load_plan(path)
    if how["method"] == RECOMMENDED:
        print(f'method: "{POINTS_TO}", which is recommended; the paper\'s is --method hc-smoe')
    made = make_plan(stats, model, **how)
    if path:
        made.save(path)
    return made


LOADING = {
    "plain": "load it with any loader of the original family",
    "mapped": "load it with hcsmoe_core.load_merged, or transformers with trust_remote_code=True",
}


def _print_written(out, plan, written):
    """What was written, what it was calibrated on, what engines ask, and how far it is from the original."""
    from hcsmoe_core.export import calibrated, fidelity_text, kept_of

    print(
        f"{out}: {kept_of(plan)}, {written['parameters']:,} of {written['original']:,} weights, "
        f"{written['bytes'] / 1e6:.1f} MB, {written['router']}; {LOADING[written['router']]} or hcsmoe evaluate {out}"
    )
    if plan.statistics:
        print(f"calibrated on {calibrated(plan)}; text of other kinds may lose more")
    if "savings" in written:
        _print_savings(written["savings"])
    for line in written["limits"]:
        print(f"- {line}")
    measured = written["fidelity"]
    if measured is None:
        print("Fidelity was not measured, as no tokens were held out: see --fidelity and --calibration.")
        return
    print(fidelity_text(measured | {"warning": ""}))
    if measured["warning"]:
        print(f"\nWARNING: {measured['warning']}", file=sys.stderr)


def _print_savings(savings):
    """What MC-SMoE's second step saves, as its paper tells it."""
    for what, numbers in (
        ("memory of the experts", savings["bytes"]),
        ("multiply-accumulates a token", savings["multiply_accumulates"]),
    ):
        parts = ", ".join(f"{numbers[stage]:,.0f} {stage}" for stage in ("original", "merged", "compressed"))
        print(f"{what}: {parts} ({1 - numbers['compressed'] / numbers['original']:.0%} saved)")


def _check_experts(model, experts):
    """Refuse a number of experts that no plan can have, before the capture takes its time."""
    from hcsmoe_core._util import check_count
    from hcsmoe_core.studies.tables import model_size

    check_count("experts", experts, 1, model_size(model)["num_experts"])


@app.command()
def evaluate(
    model: MODEL,
    plan: Annotated[Path | None, typer.Option(help="Plan to apply to the model before it is scored.")] = None,
    statistics: Annotated[
        Path | None, typer.Option(help="Statistics that the plan was made from, where it needs them.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="lm-evaluation-harness tasks, comma-separated; paper for the eight of the paper; by default the embedded ones."
        ),
    ] = "",
    limit: Annotated[int, typer.Option(help="Items of each task; 0 for all.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Requests a forward pass.")] = 64,
    text: Annotated[
        str,
        typer.Option(help="What perplexity is measured on: demo, a source as for --calibration, or none."),
    ] = "demo",
    sequences: Annotated[int, typer.Option(help="Sequences of that text.")] = 96,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    seed: Annotated[int, typer.Option(help="Of that text and of the harness.")] = 0,
    against: Annotated[
        Path | None,
        typer.Option(
            help="results.json of another model on the same tasks, to tell the difference item by item."
        ),
    ] = None,
    answers: Annotated[
        str, typer.Option(help="Folder where the model's answers are kept, or none.")
    ] = "runs/answers",
    out: Annotated[Path | None, typer.Option(help="results.json to write.")] = None,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
):
    """Accuracy on tasks, and perplexity."""
    import hcsmoe_core as core
    from hcsmoe_core._util import place, write_json
    from hcsmoe_core.score.evaluation import PAPER_TASKS, paired_table, score_table
    from hcsmoe_core.studies.tables import model_size

    other = _scores_of(against) if against else None
    made = core.load_plan(plan) if plan else None
    loaded, tokenizer = core.load_model(model, dtype=dtype, device=device)
    if made is not None:
        core.apply_plan(loaded, made, core.load_statistics(statistics) if statistics else None)
    scores = core.evaluate(
        loaded,
        tokenizer,
        [task for name in _listed(tasks) for task in (PAPER_TASKS if name == "paper" else [name])] or None,
        limit=limit or None,
        batch_size=batch_size,
        text=None if text == "none" else text,
        sequences=sequences,
        length=length,
        seed=seed,
        answers=None if answers == "none" else place(answers),
    )
    print(score_table(scores))
    if other:
        print(f"\nagainst {against}\n{paired_table(core.paired(scores, other))}")
    if out:
        write_json(
            out,
            {"model": model, "plan": made and made.settings, "size": model_size(loaded), "scores": scores},
        )
        print(out)


def _scores_of(path):
    """Scores in a results.json."""
    from hcsmoe_core._util import read_json

    content = read_json(path)
    if not isinstance(content, dict) or "items" not in content.get("scores", {}):
        raise InputError(
            f"{path} is no results.json with the scores of each item; make it again with hcsmoe evaluate --out."
        )
    return content["scores"]


@app.command()
def methods():
    """List every method: what it is made of, what it needs of the statistics, what it costs, its paper."""
    from hcsmoe_core.methods.planner import method_table

    print(method_table())


@app.command()
def families(
    names: Annotated[
        list[str] | None, typer.Argument(help="Families, as transformers names them; by default all.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(help="Try it out on tiny models (minutes for all), rather than tell what was found."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File to write the table to (.json).")] = None,
):
    """List the MoE families of transformers: what works on each, and why what does not."""
    import transformers

    from hcsmoe_core._util import check_choice, write_json
    from hcsmoe_core.ui import family_table
    from tools import family_table as known

    installed = known.installed_families()
    for name in names or ():
        check_choice("names", name, installed)
    wanted = names or installed
    if check:
        models = [(name, whole) for name, whole in known.installed_models() if name in wanted]
        version, rows = transformers.__version__, [known.probe(name, whole=whole) for name, whole in models]
    else:
        version, rows = family_table.committed()
        rows = [row for row in rows if row["family"] in wanted]
    print(family_table.table(rows))
    absent = [name for name in wanted if name not in {row["family"] for row in rows}]
    if version != transformers.__version__ or absent:
        print(
            f"found with transformers {version}; {transformers.__version__} is installed"
            + (f", which also has {', '.join(absent)}" if absent else "")
            + ": --check tries it out"
        )
    if out:
        write_json(out, {"transformers": version, "families": rows})
        print(out)


@app.command()
def compare(
    model: MODEL,
    methods: Annotated[str, typer.Option(help="Methods, comma-separated; by default all.")] = "",
    experts: Annotated[
        str, typer.Option(help="Numbers of experts, comma-separated; by default 3/4, 1/2 and 1/4 of them.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Calibration samples, by seed, comma-separated.")] = "0,1,2",
    limit: Annotated[int, typer.Option(help="Items of each task; 0 for all.")] = 100,
    others: SET = None,
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    text: Annotated[
        str, typer.Option(help="What the loss is measured on: demo, or a source as for --calibration.")
    ] = "demo",
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    out: Annotated[Path, typer.Option(help="Folder of the cells and the tables.")] = Path("runs/compare"),
):
    """One table of all methods on equal footing: accuracy and loss with their errors, time and memory."""
    from hcsmoe_core._util import place, shown
    from hcsmoe_core.studies import comparison
    from hcsmoe_core.studies.cache import slug

    numbers = [
        [_number("--experts", n) for n in _listed(experts)],
        [_number("--seeds", n) for n in _listed(seeds)],
    ]
    frame = comparison.compare(
        model,
        methods=_listed(methods) or None,
        experts=numbers[0] or None,
        seeds=numbers[1],
        limit=limit,
        calibration=calibration,
        sequences=sequences,
        length=length,
        text=text,
        settings=_settings(others=others),
        dtype=dtype,
        device=device,
        folder=out,
    )
    print(comparison.table(frame))
    tables = place(out) / f"{slug(model)}.csv"
    frame.to_csv(tables, index=False)
    print(f"\n{shown(tables)}")


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="qwen1.5-moe (the paper's Table 2) or mixtral-8x7b (Table 3).")],
    dry_run: Annotated[
        bool, typer.Option(help="Only list every step with its costs; needs neither network nor weights.")
    ] = False,
    model: Annotated[
        str, typer.Option(help="Folder of the model, or another one; by default the paper's, from the hub.")
    ] = "",
    tasks: Annotated[str, typer.Option(help="Tasks, comma-separated; by default the paper's eight.")] = "",
    limit: Annotated[int, typer.Option(help="Items of each task; 0 for all.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Requests a forward pass.")] = 16,
    teraflops: Annotated[
        float, typer.Option(help="10^12 operations a second that the device sustains.")
    ] = 100.0,
    bandwidth: Annotated[float, typer.Option(help="GB a second at which weights are read.")] = 2.0,
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    seed: SEED = 42,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
    load: LOAD = "auto",
    memory: MEMORY = "",
    out: Annotated[Path, typer.Option(help="Folder of the cells; those that are done are kept.")] = Path(
        "runs/reproduce"
    ),
):
    """Make a table of the HC-SMoE paper, all methods at both sizes, and print it beside the published values."""
    from hcsmoe_core.studies import reproduce as study

    how = dict(model=model, tasks=_listed(tasks) or None, limit=limit, batch_size=batch_size, dtype=dtype)
    how |= dict(calibration=calibration, sequences=sequences, length=length)
    print(study.step_table(study.estimate(name, teraflops=teraflops, bandwidth=bandwidth, **how)), flush=True)
    if dry_run:
        return
    cells = study.run(name, seed=seed, device=device, load=load, memory=memory, folder=out, **how)
    print(f"\n{study.report(name, cells, model)}\n\n{cells}")


def _number(option, text):
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{option} takes whole numbers separated by commas; not {text!r}.") from None


CELLS = Annotated[Path, typer.Option(help="Folder of the executed notebooks and results.")]


FIGURES = Annotated[Path, typer.Option(help="Folder of the figures.")]


MODELS = Annotated[str, typer.Option(help="Models, comma-separated.")]


WORKERS = Annotated[int, typer.Option(help="Notebooks run side by side; 0 for one a core, two at most.")]


LIMIT = Annotated[int, typer.Option(help="Items of each task; 0 for all 300.")]


EMBEDDED = "demo-qwen,demo-mixtral"


@app.command()
def sweep(
    grid: Annotated[
        list[str] | None,
        typer.Argument(help="Grids by name, .yml files, or all; without any they are listed."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Model; may be repeated.")] = None,
    limit: Annotated[int, typer.Option(help="Items of each task; 0 for all.")] = 0,
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            "--parameter", "-p", help="Another parameter of all cells, as name=value; may be repeated."
        ),
    ] = None,
    workers: WORKERS = 0,
    scheduler: Annotated[
        str, typer.Option(help="Address of a Dask scheduler whose workers run the cells: tcp://…")
    ] = "",
    slurm: Annotated[bool, typer.Option("--slurm", help="Run the cells in SLURM jobs.")] = False,
    jobs: Annotated[
        int, typer.Option(help="SLURM jobs side by side, each of which runs a cell at a time.")
    ] = 2,
    slurm_options: Annotated[
        list[str] | None,
        typer.Option(
            help="Of a SLURM job, as name=value; may be repeated: queue, account, walltime, memory, cores, gpus, directives, "
            "prologue, directory, interface, python."
        ),
    ] = None,
    retries: Annotated[int, typer.Option(help="How often a cell that fails is tried again.")] = 0,
    status: Annotated[
        bool, typer.Option("--status", help="Run nothing; say how far grids are, and which cells failed.")
    ] = False,
    table: Annotated[
        list[Path] | None,
        typer.Option(help="File to write all cells that are done to, .csv or .tex; may be repeated."),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder to draw each grid into, by 06_ablation; by default nothing is drawn."),
    ] = None,
    out: CELLS = Path("runs/sweep"),
):
    """Measure every cell of a study, on this machine or a cluster; what is done is kept, and the same command goes on."""
    from hcsmoe_core._util import place, shown
    from hcsmoe_core.studies import grids
    from hcsmoe_core.studies import sweep as cells
    from hcsmoe_core.studies.tables import write_table
    from hcsmoe_core.ui.showcase import draw

    if not grid and not status:
        print(grids.table(grids.names()))
        return
    folder, names = (
        place(out),
        [name for given in grid or () for name in (grids.names() if given == "all" else [given])],
    )
    read, models = ",".join(Path(name).stem for name in names), model or [None]
    if status:
        print(cells.status_text(folder, read, models))
    else:
        if not model:
            raise InputError("Give the models with --model; --status needs none.")
        overrides = ({"limit": limit} if limit else {}) | grids.overrides_from(parameter or ())
        planned = grids.plans(
            names, model, overrides
        )  # what is wrong is told before a cluster is asked for anything
        with _engine(workers, scheduler, slurm, jobs, slurm_options or (), folder) as engine:
            if engine.dashboard:
                print(f"dashboard {engine.dashboard}", flush=True)
            try:
                grids.run(planned, folder, engine=engine, retries=retries)
            finally:
                print(cells.status_text(folder, read, models))
    for path in table or ():
        print(shown(write_table(cells.table_of(folder, read, models), path)))
    if figures:
        swept = [about for of in models for about in cells.grids_of(folder, read, of)]
        chosen = names or dict.fromkeys(about["grid"] for about in swept)
        draw(
            list(chosen),
            list(dict.fromkeys(about["model"] for about in swept)),
            folder,
            figures,
            _side_by_side(workers),
        )
        print(f"figures {shown(place(figures))}")


def _side_by_side(workers):
    return workers or min(2, os.cpu_count() or 1)


def _engine(workers, scheduler, slurm, jobs, options, folder):
    """Where cells run, by the options of the command."""
    from hcsmoe_core.studies import engines

    if sum((bool(workers), bool(scheduler), slurm)) > 1:
        raise InputError("Give one of --workers, --scheduler and --slurm.")
    if options and not slurm:
        raise InputError("--slurm-options goes with --slurm.")
    if scheduler:
        return engines.scheduler(scheduler)
    return (
        engines.slurm(jobs, options, logs=folder / "logs")
        if slurm
        else engines.processes(_side_by_side(workers))
    )


@app.command()
def demo(
    out: CELLS = Path("runs/demo"),
    figures: FIGURES = Path("figures"),
    models: MODELS = EMBEDDED,
    workers: WORKERS = 0,
    limit: LIMIT = 100,
):
    """Run the notebooks on the embedded models over a small grid: figures, tables and executed notebooks."""
    from hcsmoe_core.ui.showcase import run

    run(_listed(models), out, figures, _side_by_side(workers), limit)


@app.command()
def figures(
    out: CELLS = Path("runs/demo"),
    figures: FIGURES = Path("figures"),
    models: MODELS = EMBEDDED,
    workers: WORKERS = 0,
    limit: LIMIT = 100,
):
    """Measure every grid, write its table and draw every figure again; scores that are there are kept."""
    from hcsmoe_core.ui.showcase import gallery, run

    names = _listed(models)
    run(names, out, figures, _side_by_side(workers), limit, full=True)
    gallery(figures, names)


def main():
    """Run the command; what a user can put right is one line on stderr and exit code 2."""
    # Standard library modules (OSError covers files, disks and the hub) and ValueError are what the core raises for bad input.
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("HCSMOE_DEBUG"):
            raise
        print(f"hcsmoe: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
