"""Loss against bytes, and against operations: merged, trimmed, pruned and rounded models on one scale."""

import contextlib
import io
import math

import numpy as np
from tqdm.auto import tqdm

from hcsmoe_core.calibration import calibration_tokens, domains_of
from hcsmoe_core.capture import capture
from hcsmoe_core.checkpoint import load_model
from hcsmoe_core.compare import ORIGINAL
from hcsmoe_core.evaluation import evaluate
from hcsmoe_core.files import check_choice, check_count, kept
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import METHODS, kind_of, make_plan, steps_of
from hcsmoe_core.moe import find_moe_layers, model_hash
from hcsmoe_core.rounding import BITS, expert_bytes, expert_flops, rounded
from hcsmoe_core.study import calibration_of, core_hash, model_size, place, slug

COMPARED = ("hc-smoe", "least-residual", "selection", "trimming", "reap", "f-prune")
ROUNDED = (16, 8, 4)  # bits that smaller models are rounded to
COLUMNS = ["method", "kind", "experts", "bits", "seed", "loss", "accuracy", "item_error", "expert_bytes", "flops", "flops_once"]
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
        Names of :data:`hcsmoe_core.methods.METHODS`.
    experts : sequence of int, optional
        By default a half, a quarter and three quarters of them.
    seeds : sequence of int
        One calibration sample each.
    bits : sequence of int
        Of :data:`hcsmoe_core.rounding.BITS`; the original is always measured at all of these.
    limit : int, optional
        Items of each task, 0 for all; by default tasks are not scored.
    calibration, sequences, length
        As for :func:`hcsmoe_core.study.calibration_of`.
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
        and ``flops_once`` of :func:`hcsmoe_core.rounding.expert_flops`, and what a layer holds: experts ``stored`` and
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
    shared = {"model": str(model), "hash": model_hash(loaded), "core": core_hash(), "limit": limit, "text": text}
    shared |= source | {"dtype": str(loaded.dtype)}
    needs = tuple(dict.fromkeys(need for s in steps for need in s.needs()))
    wanted = [{"method": ORIGINAL, "experts": size, "seed": 0, "bits": list(BITS)}]
    wanted += [{"method": m, "experts": r, "seed": s, "bits": list(bits)} for s in seeds for r in experts for m in methods]
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
    tokens = calibration_tokens(source["calibration"], tokenizer, sequences=source["sequences"], length=source["length"], seed=seed)
    domains = domains_of(source["calibration"], len(tokens))
    needs = tuple(dict.fromkeys((*needs, "sample")))
    return capture(model, tokens, needs=needs, sample=tokens.numel(), domains=domains, progress=False)


def _scores(model, tokenizer, stats, bits, limit, text):
    """One row for each number of bits that a model's experts are rounded to."""
    layers = find_moe_layers(model)
    shape = {"stored": np.mean([layer.num_stored for layer in layers]), "width": np.mean([layer.width for layer in layers])}
    shape |= {"flops": expert_flops(model), "flops_once": expert_flops(model, stats)}
    rows, tasks = [], [] if limit is None else None
    for value in bits:
        with rounded(model, value), contextlib.redirect_stderr(io.StringIO()):  # the harness draws its own bars
            scores = evaluate(model, tokenizer, tasks, limit=limit or None, text=text)
        row = {"bits": value, "loss": scores["mean_loss"], "expert_bytes": expert_bytes(model, value)}
        row |= {"accuracy": scores.get("mean_acc", math.nan), "item_error": scores.get("mean_acc_stderr", math.nan)}
        rows.append(row | {name: float(number) for name, number in shape.items()})
    return rows
