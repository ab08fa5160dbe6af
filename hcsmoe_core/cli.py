"""The ``hcsmoe`` command: the library's verbs, one each."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="See which experts of a sparse mixture-of-experts model compute the same, merge them, and know what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

MODEL = Annotated[str, typer.Argument(help="Model folder, name on the Hugging Face hub, demo-mixtral or demo-qwen.")]
DTYPE = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
DEVICE = Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda, cuda:1, …")]
CALIBRATION = Annotated[
    str,
    typer.Option(help="c4, demo, a data set on the hub, or a .txt, .json, .jsonl or .safetensors file. By default what suits."),
]
SEQUENCES = Annotated[int, typer.Option(help="Calibration sequences; 0 for the default of the source.")]
LENGTH = Annotated[int, typer.Option(help="Tokens in each; 0 for the default of the source.")]
COLUMN = Annotated[str, typer.Option(help="Column or key of the text in a data set or JSON file.")]
SEED = Annotated[int, typer.Option(help="Of the order in which documents are taken.")]
BATCH = Annotated[int, typer.Option(help="Sequences a forward pass.")]
METHOD = Annotated[str, typer.Option(help="hc-smoe.")]
SIMILARITY = Annotated[str, typer.Option(help="expert-output, router-logits or weight.")]
METRIC = Annotated[str, typer.Option(help="euclidean or cosine.")]
LINKAGE = Annotated[str, typer.Option(help="average, complete, single or ward.")]
MERGE = Annotated[str, typer.Option(help="frequency or average.")]


def _captured(model, tokenizer, calibration, sequences, length, column, seed, batch_size):
    """Statistics of a loaded model by the command's options."""
    from hcsmoe_core import calibration_tokens, capture, domains_of
    from hcsmoe_core.study import calibration_of

    settings = calibration_of(model.name_or_path, calibration, sequences, length)
    source, sequences = settings["calibration"], settings["sequences"]
    input_ids = calibration_tokens(source, tokenizer, sequences=sequences, length=settings["length"], seed=seed, column=column)
    return capture(model, input_ids, batch_size=batch_size, domains=domains_of(source, sequences))


@app.command()
def capture(
    model: MODEL,
    out: Annotated[Path, typer.Option(help="Statistics file to write (.safetensors).")],
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    column: COLUMN = "text",
    seed: SEED = 42,
    batch_size: BATCH = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
):
    """One pass over calibration tokens: the statistics that plans are made from."""
    from hcsmoe_core import load_model

    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    stats = _captured(loaded, tokenizer, calibration, sequences, length, column, seed, batch_size)
    stats.save(out)
    print(f"{out}: {stats.num_tokens:,} tokens, {len(stats.layers)} MoE layers, {out.stat().st_size / 1e6:.1f} MB")


@app.command()
def plan(
    statistics: Annotated[Path, typer.Argument(help="Statistics file from hcsmoe capture.")],
    experts: Annotated[int, typer.Option(help="Experts kept in each layer.")],
    out: Annotated[Path, typer.Option(help="Plan to write (.json).")],
    method: METHOD = "hc-smoe",
    similarity: SIMILARITY = "expert-output",
    metric: METRIC = "euclidean",
    linkage: LINKAGE = "average",
    merge: MERGE = "frequency",
    model: Annotated[str, typer.Option(help="Model to read the weights of; needed by similarity weight only.")] = "",
):
    """Decide which experts of each layer join; the model is not run."""
    from hcsmoe_core import load_model, load_statistics, make_plan
    from hcsmoe_core.study import cut_table

    stats = load_statistics(statistics)
    loaded = load_model(model)[0] if model else None
    options = dict(method=method, similarity=similarity, metric=metric, linkage=linkage, merge=merge)
    made = make_plan(stats, loaded, experts=experts, **options)
    made.save(out)
    print(cut_table(stats, made).round(4).to_string(index=False))
    print(out)


@app.command()
def merge(
    model: MODEL,
    out: Annotated[Path, typer.Option(help="Model folder to write; must not exist.")],
    plan: Annotated[Path | None, typer.Option(help="Plan from hcsmoe plan; or give --experts.")] = None,
    experts: Annotated[int, typer.Option(help="Experts kept in each layer: capture, plan and merge in one go.")] = 0,
    router: Annotated[
        str, typer.Option(help="mapped: keep the router and a map from its experts to the merged ones.")
    ] = "mapped",
    method: METHOD = "hc-smoe",
    similarity: SIMILARITY = "expert-output",
    metric: METRIC = "euclidean",
    linkage: LINKAGE = "average",
    merge: MERGE = "frequency",
    calibration: CALIBRATION = "",
    sequences: SEQUENCES = 0,
    length: LENGTH = 0,
    column: COLUMN = "text",
    seed: SEED = 42,
    batch_size: BATCH = 8,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
):
    """Write a smaller checkpoint, by a plan or with a number of experts."""
    from hcsmoe_core import load_model, load_plan, make_plan, save_merged
    from hcsmoe_core.files import check_absent

    if (plan is None) == (experts == 0):
        raise ValueError("Give either --plan PLAN or --experts R (from 1 to the model's number of experts), and not both.")
    check_absent(out)
    made = load_plan(plan) if plan else None
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    if made is None:
        _check_experts(loaded, experts)
        stats = _captured(loaded, tokenizer, calibration, sequences, length, column, seed, batch_size)
        options = dict(method=method, similarity=similarity, metric=metric, linkage=linkage, merge=merge)
        made = make_plan(stats, loaded, experts=experts, **options)
    size = save_merged(loaded, made, out, router=router, tokenizer=tokenizer)
    before = sum(p.numel() for p in loaded.parameters())
    kept = sorted({layer.num_groups for layer in made.layers})
    print(
        f"{out}: {' or '.join(map(str, kept))} experts a layer, {size['parameters']:,} of {before:,} weights, "
        f"{size['bytes'] / 1e6:.1f} MB; load it with hcsmoe_core.load_merged or hcsmoe evaluate {out}"
    )


def _check_experts(model, experts):
    """Refuse a number of experts that no plan can have, before the capture takes its time."""
    from hcsmoe_core import find_moe_layers
    from hcsmoe_core.files import check_count

    check_count("experts", experts, 1, min(layer.num_experts for layer in find_moe_layers(model)))


@app.command()
def evaluate(
    model: MODEL,
    plan: Annotated[Path | None, typer.Option(help="Plan to apply to the model before it is scored.")] = None,
    tasks: Annotated[
        str, typer.Option(help="lm-evaluation-harness tasks, comma-separated; by default the embedded ones.")
    ] = "",
    limit: Annotated[int, typer.Option(help="Items of each task; 0 for all.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Requests a forward pass.")] = 64,
    text: Annotated[
        str, typer.Option(help="What perplexity is measured on: demo, a source as for --calibration, or none.")
    ] = "demo",
    sequences: Annotated[int, typer.Option(help="Sequences of that text.")] = 96,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 256,
    seed: Annotated[int, typer.Option(help="Of that text and of the harness.")] = 0,
    out: Annotated[Path | None, typer.Option(help="results.json to write.")] = None,
    dtype: DTYPE = "auto",
    device: DEVICE = "auto",
):
    """Accuracy on tasks, and perplexity."""
    import hcsmoe_core as core
    from hcsmoe_core.evaluation import score_table
    from hcsmoe_core.files import write_json
    from hcsmoe_core.study import model_size

    made = core.load_plan(plan) if plan else None
    loaded, tokenizer = core.load_model(model, dtype=dtype, device=device)
    if made is not None:
        core.apply_plan(loaded, made)
    scores = core.evaluate(
        loaded,
        tokenizer,
        [t.strip() for t in tasks.split(",") if t.strip()] or None,
        limit=limit or None,
        batch_size=batch_size,
        text=None if text == "none" else text,
        sequences=sequences,
        length=length,
        seed=seed,
    )
    print(score_table(scores))
    if out:
        write_json(out, {"model": model, "plan": made and made.settings, "size": model_size(loaded), "scores": scores})
        print(out)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the executed notebooks and results.")] = Path("runs/demo"),
    figures: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("figures"),
    models: Annotated[str, typer.Option(help="Models, comma-separated.")] = "demo-qwen,demo-mixtral",
    workers: Annotated[int, typer.Option(help="Notebooks run side by side; 0 for one a core, two at most.")] = 0,
    limit: Annotated[int, typer.Option(help="Items of each task; 0 for all 300.")] = 100,
):
    """Run the notebooks on the embedded models over a small grid: figures, tables and executed notebooks."""
    from hcsmoe_core.showcase import run

    run([m.strip() for m in models.split(",")], out, figures, workers or min(2, os.cpu_count() or 1), limit)


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
