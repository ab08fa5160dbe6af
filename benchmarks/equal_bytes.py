"""Loss against bytes, and against operations: merged, trimmed, pruned and rounded models on one scale.

``python benchmarks/equal_bytes.py`` writes ``benchmarks/results/equal-bytes-MODEL.csv`` and
``equal-bytes.json`` for the embedded models; cells that are done are kept under ``runs/bytes``, so that it
can be stopped and started again. Notebook 09 reads them.
"""

import argparse
import contextlib
import functools
import io
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the other benchmarks, also where this file is run

from benchmarks.rounding import BITS, expert_bytes, expert_flops, rounded
from hcsmoe_core._util import EMBEDDED, check_choice, check_count, replacing, versions, write_json
from hcsmoe_core.checkpoint import load_model
from hcsmoe_core.demo.tasks import NAMES
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import make_plan, resolve
from hcsmoe_core.score.evaluation import evaluate
from hcsmoe_core.studies import runner
from hcsmoe_core.studies.cache import cached_statistics, slug
from hcsmoe_core.studies.comparison import ORIGINAL, fractions_of, latest, read_table
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import calibration_settings

COMPARED = ("hc-smoe", "least-residual", "selection", "trimming", "reap", "f-prune")


ROUNDED = (16, 8, 4)  # bits that smaller models are rounded to


COLUMNS = [
    "method",
    "kind",
    "experts",
    "bits",
    "seed",
    "loss",
    "accuracy",
    "item_error",
    "expert_bytes",
    "flops",
    "flops_once",
]


COLUMNS += ["stored", "width"]


WHOLE = "rounds"  # kind of the original model


def measure(
    model,
    *,
    methods=COMPARED,
    experts=None,
    seeds=(0,),
    bits=ROUNDED,
    tasks=(),
    limit=None,
    text="demo",
    dtype="float32",
    device="auto",
    folder="runs/bytes",
    **source,
):
    """Score the original at every number of bits, and smaller models of it at some.

    A cell is one plan, made from the whole calibration sample, applied to the live model and scored at each
    number of bits that its experts are rounded to. Cells that are done are kept, so that it can be stopped
    and started again.

    Parameters
    ----------
    model, dtype, device
        As for :func:`hcsmoe_core.load_model`.
    methods : sequence of str
    experts : sequence of int, optional
        By default a half, a quarter and three quarters of them.
    seeds : sequence of int
        One calibration sample each.
    bits : sequence of int
        Of :data:`benchmarks.rounding.BITS`; the original is always measured at all of these.
    tasks, limit, text
        As for :func:`hcsmoe_core.evaluate`; by default no tasks are scored.
    folder : str or path
        Cells go to a folder of the model's name in it.
    **source
        As for :func:`hcsmoe_core.text.calibration.calibration_settings`.

    Returns
    -------
    pandas.DataFrame
        One row per plan and number of bits: ``method``, its ``kind``, ``experts`` (r: bytes in 16 bits are
        those of r experts), ``bits``, ``seed``, ``loss`` (nats per token), ``accuracy`` with ``item_error``,
        ``expert_bytes``, ``flops`` and ``flops_once`` of :func:`benchmarks.rounding.expert_flops`, and what a
        layer has: experts ``stored`` and their ``width``, means over the layers.

    Raises
    ------
    InputError
        Before anything is measured, if a method, a number of experts or of bits is unavailable.
    """
    recipes = {method: resolve(method) for method in methods}
    for value in bits:
        check_choice("bits", value, BITS)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    size, source = model_size(loaded)["num_experts"], calibration_settings(model, **source)
    experts = list(experts or fractions_of(size, (2, 1, 3), 4))
    for count in experts:
        check_count("experts", count, 1, size)
    needs = tuple({need for recipe in recipes.values() for need in (*recipe.needs, "sample")})
    whole = dict(needs=needs, sample=source["sequences"] * source["length"])
    capture = functools.partial(cached_statistics, loaded, tokenizer, **source, **whole)
    cells = [{"method": ORIGINAL, "experts": size, "seed": 0, "bits": list(BITS)}]
    for seed, count, method in itertools.product(seeds, experts, methods):
        cells.append({"method": method, "experts": count, "seed": seed, "bits": list(bits)})
    shared = (
        dict(model=str(model), tasks=list(tasks), limit=limit, text=text, dtype=str(loaded.dtype)) | source
    )
    results = runner.measure(
        functools.partial(_measured, model=loaded, tokenizer=tokenizer, statistics=latest(capture)),
        cells,
        Path(folder) / slug(model),
        shared=shared,
        model=model_hash(loaded),
        description=f"bytes {slug(model)}",
    )
    kinds = {method: recipe.kind for method, recipe in recipes.items()} | {ORIGINAL: WHOLE}
    rows = [
        content | {"kind": kinds[content["method"]]} | row for content in results for row in content["result"]
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def _measured(cell, *, model, tokenizer, statistics):
    """One row for each number of bits that the experts of a cell's model are rounded to."""
    stats = None if cell["method"] == ORIGINAL else statistics(seed=cell["seed"])
    try:
        if stats is not None:
            options = {name: cell[name] for name in ("experts", "method", "seed")}
            apply_plan(model, make_plan(stats, model, progress=False, **options), stats)
        return cell | {"result": [_scores(model, tokenizer, stats, cell, bits) for bits in cell["bits"]]}
    finally:
        restore(model)


def _scores(model, tokenizer, stats, cell, bits):
    layers = find_moe_layers(model)
    with rounded(model, bits), contextlib.redirect_stderr(io.StringIO()):  # the harness draws its own bars
        scores = evaluate(model, tokenizer, cell["tasks"], limit=cell["limit"], text=cell["text"])
    row = {"bits": bits, "loss": scores["mean_loss"], "expert_bytes": expert_bytes(model, bits)}
    row |= {"accuracy": scores.get("mean_acc"), "item_error": scores.get("mean_acc_stderr")}
    row |= {"flops": float(expert_flops(model)), "flops_once": float(expert_flops(model, stats))}
    row["stored"] = float(np.mean([layer.num_stored for layer in layers]))
    return row | {"width": float(np.mean([layer.width for layer in layers]))}


def table(path, model):
    """What this benchmark has kept; see :func:`hcsmoe_core.studies.comparison.read_table`."""
    return read_table(
        path, model, f"python benchmarks/equal_bytes.py --models {model}, or measure here"
    ).reindex(columns=COLUMNS)


def means(frame):
    """Means over the calibration samples, beside the original in 16 bits.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`measure`.

    Returns
    -------
    pandas.DataFrame
        One row for each method, number of experts and of bits: ``samples``, means, ``loss_sd`` over the
        samples; ``added``, what the loss gains over the original's; ``bytes_share``, ``flops_share`` and
        ``once_share`` of the original's.
    """
    key = ["method", "kind", "experts", "bits"]
    found = frame.groupby(key, sort=False).agg(
        {name: "mean" for name in COLUMNS if name not in (*key, "seed")} | {"seed": "nunique"}
    )
    found = (
        found.rename(columns={"seed": "samples"})
        .assign(loss_sd=frame.groupby(key, sort=False)["loss"].std())
        .reset_index()
    )
    whole = found[(found["method"] == ORIGINAL) & (found["bits"] == 16)].iloc[0]
    return found.assign(
        added=found["loss"] - whole["loss"],
        bytes_share=found["expert_bytes"] / whole["expert_bytes"],
        flops_share=found["flops"] / whole["flops"],
        once_share=found["flops_once"] / whole["flops"],
    )


def best_of_kinds(points):
    """Of :func:`means`, the method of each kind that loses least, at each number of experts and of bits."""
    return points.loc[points.groupby(["kind", "experts", "bits"])["loss"].idxmin()].sort_index()


def front(points, cost, value="loss"):
    """Whether each point is on the Pareto front: none costs as little and loses less, or loses as little and
    costs less.

    Parameters
    ----------
    points : pandas.DataFrame
    cost, value : str
        Columns; less is better.

    Returns
    -------
    (N,) bool array
    """
    x, y = points[cost].to_numpy(float), points[value].to_numpy(float)
    beaten = (x[:, None] >= x) & (y[:, None] >= y) & ((x[:, None] > x) | (y[:, None] > y))
    return ~beaten.any(1)


def at_equal_bytes(points, even=1e-3):
    """Rounding all experts, against the smaller models that take no more bytes.

    Parameters
    ----------
    points : pandas.DataFrame
        Of :func:`means`.
    even : float
        Differences in loss, nats a token, that count for nothing.

    Returns
    -------
    pandas.DataFrame
        For each number of bits below 16 that the original was rounded to: its ``bytes_share`` and what it
        ``added``; of the smaller models in as many bytes or fewer the best, as ``smaller``, and what it adds,
        ``smaller_added``; what HC-SMoE adds at best, ``paper_added`` (NaN if there is none so small); and
        which is ``better``: "round", "smaller" or "even".
    """
    rows, whole = [], points["method"] == ORIGINAL
    for _, line in points[whole & (points["bits"] < 16)].sort_values("bits", ascending=False).iterrows():
        row = {key: line[key] for key in ("bits", "bytes_share", "added")}
        fits = points[~whole & (points["expert_bytes"] <= line["expert_bytes"])].sort_values("loss")
        paper = fits[fits["method"] == "hc-smoe"]
        row |= {"smaller": "-", "smaller_added": math.nan, "paper_added": math.nan, "better": "round"}
        if len(fits):
            best, gain = fits.iloc[0], line["loss"] - fits.iloc[0]["loss"]
            row |= {"smaller": named(best), "smaller_added": best["added"]}
            row["better"] = "even" if abs(gain) <= even else "smaller" if gain > 0 else "round"
        if len(paper):
            row["paper_added"] = paper.iloc[0]["added"]
        rows.append(row)
    return pd.DataFrame(rows)


def named(point):
    """A point in words, such as "trimming to 4, 8 bits"."""
    if point["method"] == ORIGINAL:
        return f"all experts in {point['bits']} bits"
    return f"{point['method']} to {point['experts']}, {point['bits']} bits"


def advice(points):
    """When to merge and when not, in words, from the numbers.

    Parameters
    ----------
    points : pandas.DataFrame
        Of :func:`means`.

    Returns
    -------
    str
    """
    beside, lines = at_equal_bytes(points), []
    smaller = points[points["method"] != ORIGINAL]
    for row in beside.to_dict("records"):
        say = f"{row['bits']} bits, {row['bytes_share']:.0%} of the bytes: "
        say += f"rounding all experts adds {row['added']:.3f} nats"
        if row["smaller"] != "-":
            say += f", the best smaller model that fits {row['smaller_added']:.3f} ({row['smaller']})"
        lines.append(f"{say}: {_VERDICTS[row['better']]}.")
    least = beside["bytes_share"].min()
    below = smaller[smaller["bytes_share"] < least]
    if len(below):
        best = below.loc[below["loss"].idxmin()]
        lines.append(
            f"In fewer bytes than that, which rounding alone does not reach: {named(best)}, "
            f"{best['bytes_share']:.0%}, "
            f"adds {best['added']:.3f}."
        )
    fewer = smaller[(smaller["flops_share"] < 0.999) & (smaller["bits"] == 16)]
    for share, part in fewer.groupby(fewer["flops_share"].round(2), sort=True):
        best = part.loc[part["loss"].idxmin()]
        lines.append(
            f"For {share:.0%} of the experts' operations, which rounding does not save: {named(best)} adds "
            f"{best['added']:.3f}."
        )
    return "\n".join(lines)


_VERDICTS = {"round": "do not merge", "smaller": "make it smaller", "even": "even"}


def main():
    """Measure, and write and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(EMBEDDED))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=int, help="items per task; by default only the loss is measured")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    chosen = dict(seeds=options.seeds, limit=options.limit, tasks=() if options.limit is None else NAMES)
    for name in options.models:
        frame = measure(name, **chosen)
        with replacing(options.out / f"equal-bytes-{name}.csv") as part:
            frame.round(6).to_csv(part, index=False)
        print(frame.to_string(index=False))
    write_json(options.out / "equal-bytes.json", chosen | {"methods": COMPARED, "versions": versions()})


if __name__ == "__main__":
    main()
