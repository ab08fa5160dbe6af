"""Loss against bytes, and against operations: merged, trimmed, pruned and rounded models on one scale."""

import contextlib
import io
import math

import numpy as np
from tqdm.auto import tqdm

from hcsmoe_core._util import check_choice, check_count, kept, place
from hcsmoe_core.checkpoint import load_model
from hcsmoe_core.collect import capture
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods.planner import METHODS, kind_of, make_plan, steps_of
from hcsmoe_core.score.evaluation import evaluate
from hcsmoe_core.studies.cache import calibration_of, core_hash, slug
from hcsmoe_core.studies.comparison import ORIGINAL, read_table
from hcsmoe_core.studies.rounding import BITS, expert_bytes, expert_flops, rounded
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import calibration_tokens, domains_of

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
    limit=None,
    calibration="",
    sequences=0,
    length=0,
    text="demo",
    dtype="float32",
    device="auto",
    folder="runs/bytes",
):
    """Score the original at every number of bits, and smaller models of it at some.

    A cell is one plan, made from the whole calibration sample, applied to the live model and scored at each number of bits
    that its experts are rounded to. Cells that are done are kept, so that it can be stopped and started again.

    Parameters
    ----------
    model : str
        As for :func:`hcsmoe_core.load_model`.
    methods : sequence of str
        Names of :data:`hcsmoe_core.methods.planner.METHODS`.
    experts : sequence of int, optional
        By default a half, a quarter and three quarters of them.
    seeds : sequence of int
        One calibration sample each.
    bits : sequence of int
        Of :data:`hcsmoe_core.studies.rounding.BITS`; the original is always measured at all of these.
    limit : int, optional
        Items of each task, 0 for all; by default tasks are not scored.
    calibration, sequences, length
        As for :func:`hcsmoe_core.studies.cache.calibration_of`.
    text : str
        What the loss is measured on; see :func:`hcsmoe_core.evaluate`.
    dtype, device : str
    folder : str or path
        Cells go to a folder of the model's name in it.

    Returns
    -------
    pandas.DataFrame
        One row for each plan and number of bits: ``method``, its ``kind``, ``experts`` (r: bytes in 16 bits are those of r
        experts), ``bits``, ``seed``, ``loss`` (nats a token), ``accuracy`` with ``item_error``, ``expert_bytes``, ``flops``
        and ``flops_once`` of :func:`hcsmoe_core.studies.rounding.expert_flops`, and what a layer holds: experts ``stored`` and
        their ``width``, means over the layers.

    Raises
    ------
    ValueError
        Before anything is measured, if a method, a number of experts or of bits is not to be had.
    """
    steps = [steps_of(check_choice("methods", method, tuple(METHODS))) for method in methods]
    for value in bits:
        check_choice("bits", value, BITS)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    size, source = model_size(loaded)["num_experts"], calibration_of(model, calibration, sequences, length)
    experts = list(experts or dict.fromkeys(max(1, size * part // 4) for part in (2, 1, 3)))
    for count in experts:
        check_count("experts", count, 1, size)
    shared = {
        "model": str(model),
        "hash": model_hash(loaded),
        "core": core_hash(),
        "limit": limit,
        "text": text,
    }
    shared |= source | {"dtype": str(loaded.dtype)}
    needs = tuple(dict.fromkeys(need for s in steps for need in s.needs()))
    wanted = [{"method": ORIGINAL, "experts": size, "seed": 0, "bits": list(BITS)}]
    wanted += [
        {"method": m, "experts": r, "seed": s, "bits": list(bits)}
        for s in seeds
        for r in experts
        for m in methods
    ]
    captured, rows = {}, []

    def measured(cell):
        if cell["method"] == ORIGINAL:
            return _scores(loaded, tokenizer, None, cell["bits"], limit, text)
        if cell["seed"] not in captured:
            captured.clear()
            captured[cell["seed"]] = _whole_sample(loaded, tokenizer, source, cell["seed"], needs)
        stats = captured[cell["seed"]]
        options = dict(experts=cell["experts"], method=cell["method"], seed=cell["seed"], progress=False)
        apply_plan(loaded, make_plan(stats, loaded, **options), stats)
        try:
            return _scores(loaded, tokenizer, stats, cell["bits"], limit, text)
        finally:
            restore(loaded)

    for cell in tqdm(wanted, desc=f"bytes {slug(model)}", unit="plan"):
        found = kept(place(folder) / slug(model), shared | cell, lambda cell=cell: measured(cell))
        kind = WHOLE if cell["method"] == ORIGINAL else kind_of(cell["method"])
        rows += [cell | {"kind": kind} | row for row in found["result"]]
    return _frame(rows)


def _frame(rows):
    import pandas as pd

    return pd.DataFrame(rows, columns=COLUMNS)


def _whole_sample(model, tokenizer, source, seed, needs):
    """Statistics whose sample is all calibration tokens."""
    size = {"sequences": source["sequences"], "length": source["length"]}
    tokens = calibration_tokens(source["calibration"], tokenizer, model=model, seed=seed, **size)
    domains = domains_of(source["calibration"], len(tokens))
    needs = tuple(dict.fromkeys((*needs, "sample")))
    return capture(model, tokens, needs=needs, sample=tokens.numel(), domains=domains, progress=False)


def _scores(model, tokenizer, stats, bits, limit, text):
    """One row for each number of bits that a model's experts are rounded to."""
    layers = find_moe_layers(model)
    shape = {
        "stored": np.mean([layer.num_stored for layer in layers]),
        "width": np.mean([layer.width for layer in layers]),
    }
    shape |= {"flops": expert_flops(model), "flops_once": expert_flops(model, stats)}
    rows, tasks = [], [] if limit is None else None
    for value in bits:
        with (
            rounded(model, value),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # the harness draws its own bars
            scores = evaluate(model, tokenizer, tasks, limit=limit or None, text=text)
        row = {"bits": value, "loss": scores["mean_loss"], "expert_bytes": expert_bytes(model, value)}
        row |= {
            "accuracy": scores.get("mean_acc", math.nan),
            "item_error": scores.get("mean_acc_stderr", math.nan),
        }
        rows.append(row | {name: float(number) for name, number in shape.items()})
    return rows


def table(path, model):
    """What ``benchmarks/equal_bytes.py`` has kept; see :func:`hcsmoe_core.studies.comparison.read_table`."""
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
        One row for each method, number of experts and of bits: ``samples``, means, ``loss_sd`` over the samples; ``added``,
        what the loss gains over the original's; ``bytes_share``, ``flops_share`` and ``once_share`` of the original's.
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
    """Whether each point is on the Pareto front: none costs as little and loses less, or loses as little and costs less.

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
        For each number of bits below 16 that the original was rounded to: its ``bytes_share`` and what it ``added``; of the
        smaller models in as many bytes or fewer the best, as ``smaller``, and what it adds, ``smaller_added``; what HC-SMoE
        adds at best, ``paper_added`` (NaN if there is none so small); and which is ``better``: "round", "smaller" or "even".
    """
    import pandas as pd

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
        say = f"{row['bits']} bits, {row['bytes_share']:.0%} of the bytes: rounding all experts adds {row['added']:.3f} nats"
        if row["smaller"] != "-":
            say += f", the best smaller model that fits {row['smaller_added']:.3f} ({row['smaller']})"
        lines.append(f"{say}: {_VERDICTS[row['better']]}.")
    least = beside["bytes_share"].min()
    below = smaller[smaller["bytes_share"] < least]
    if len(below):
        best = below.loc[below["loss"].idxmin()]
        lines.append(
            f"In fewer bytes than that, which rounding alone does not reach: {named(best)}, {best['bytes_share']:.0%}, "
            f"adds {best['added']:.3f}."
        )
    fewer = smaller[(smaller["flops_share"] < 0.999) & (smaller["bits"] == 16)]
    for share, part in fewer.groupby(fewer["flops_share"].round(2), sort=True):
        best = part.loc[part["loss"].idxmin()]
        lines.append(
            f"For {share:.0%} of the experts' operations, which rounding does not save: {named(best)} adds {best['added']:.3f}."
        )
    return "\n".join(lines)


_VERDICTS = {"round": "do not merge", "smaller": "make it smaller", "even": "even"}
