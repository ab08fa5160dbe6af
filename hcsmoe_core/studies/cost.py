"""Costs told before anything is loaded: operations, bytes and times from a model's configuration alone."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hcsmoe_core._util import check_count
from hcsmoe_core.checkpoint import load_skeleton
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.merging import check_fits
from hcsmoe_core.methods import resolve
from hcsmoe_core.scale.streaming import LAYER, WHOLE, free_memory
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import calibration_settings, domains_of, own_sequences


def forecast(
    model: str,
    *,
    dtype: str = "auto",
    calibration: str = "",
    sequences: int = 0,
    length: int = 0,
    seed: int = 42,
    needs: Sequence[str] = DEFAULT_NEEDS,
    samples: int = 1,
) -> str:
    """What a notebook will cost on a model.

    Parameters
    ----------
    model : str
        As for :func:`hcsmoe_core.load_model`.
    dtype, calibration, sequences, length, seed, needs
        As for :func:`hcsmoe_core.studies.cache.cached_statistics`; the seed costs nothing.
    samples : int
        Calibration samples.

    Returns
    -------
    str
        A line for each of model, calibration, the model's own text if it writes some, capture and statistics
        file. Times are lower bounds: operations at the speed of a matrix product that is timed here and now.
    """
    source = calibration_settings(model, calibration, sequences, length)
    return _lines(_rows(load_skeleton(model, dtype=dtype), source, needs, samples))


def merge_forecast(
    model: str,
    *,
    experts: int = 0,
    method: str = "hc-smoe",
    plan: Any = None,
    captures: bool = True,
    dtype: str = "auto",
    calibration: str = "",
    sequences: int = 0,
    length: int = 0,
    **settings: Any,
) -> str:
    """What a merge will cost and leave, from the model's configuration alone.

    Parameters
    ----------
    model, dtype, calibration, sequences, length
        As for :func:`forecast`.
    experts, method, **settings
        As for :func:`hcsmoe_core.make_plan`.
    plan : Plan, optional
        In place of these.
    captures : bool
        Whether statistics are to be captured.

    Returns
    -------
    str
        The lines of :func:`forecast`, and one for each of the merged checkpoint and the memory.
    """
    skeleton, recipe = load_skeleton(model, dtype=dtype), resolve(method, **settings)
    size, layers = model_size(skeleton), find_moe_layers(skeleton)
    if plan is None:
        kept = check_count("experts", experts, 1, size["num_experts"])
        shares = [kept / layer.num_experts for layer in layers]
    else:
        pairs = zip(check_fits(plan, skeleton), plan.layers, strict=True)
        shares = [p.num_groups * (p.width or la.width) / la.width / la.num_experts for la, p in pairs]
    weights = [sum(t.numel() for t in layer.tensors().values()) for layer in layers]
    left = size["weights"] - sum(w * (1 - share) for w, share in zip(weights, shares, strict=True))
    each = size["bytes"] / size["weights"]
    whole, streamed = WHOLE * size["bytes"], LAYER * max(weights) * each
    rows = _rows(skeleton, calibration_settings(model, calibration, sequences, length), recipe.needs, 1)
    for name in () if captures else ("calibration", "own text", "capture", "statistics"):
        rows.pop(name, None)
    if captures:
        rows["statistics"] = rows["statistics"].partition(" under ")[0] + " in memory"
    rows["merged"] = f"{amount(left)} weights, {amount(left * each)}B on disk"
    rows["memory"] = (
        f"about {amount(whole)}B, or {amount(streamed)}B streamed; {amount(free_memory('cpu'))}B are free"
    )
    return _lines(rows)


def _lines(rows):
    return "\n".join(f"{name:<13}{line}" for name, line in rows.items())


def _rows(skeleton, source, needs, samples):
    """Lines of a forecast by name."""
    text, sequences, length = (source[name] for name in ("calibration", "sequences", "length"))
    size, capture, active = (
        model_size(skeleton),
        capture_cost(skeleton, source, needs),
        work_per_token(skeleton)[0],
    )
    weights, work, (where, speed) = size["weights"], samples * capture["operations"], _speed(skeleton.dtype)
    shape = f"{sequences} × {length:,} = {capture['tokens']:,} tokens of {text}"
    own = samples * length * own_sequences(text, sequences)
    rows = {
        "model": f"{amount(weights)} weights, {amount(size['bytes'])}B in memory; "
        f"{active / 2 / weights:.0%} of them active per token",
        "calibration": shape if samples == 1 else f"{samples} samples of {shape}",
    }
    if own:
        least = duration(own * active / speed)
        rows["own text"] = f"{amount(own)} tokens, one after another: {least} or more on this {where}"
    rows["capture"] = f"{amount(work)} operations: {duration(work / speed)} or more on this {where}"
    rows["statistics"] = (
        f"{amount(samples * capture['bytes'])}B under runs/statistics, kept for the next time"
    )
    return rows


def capture_cost(model: Any, source: dict, needs: Sequence[str]) -> dict:
    """Operations of a pass over calibration tokens, and bytes of the statistics file.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With or without weights.
    source : dict
        Of :func:`hcsmoe_core.text.calibration.calibration_settings`.
    needs : sequence of str
        What is collected beside :data:`hcsmoe_core.statistics.DEFAULT_NEEDS`.
    """
    tokens = source["sequences"] * source["length"]
    domains = len(set(domains_of(source["calibration"], source["sequences"]) or ["all"]))
    needs = tuple(dict.fromkeys((*DEFAULT_NEEDS, *needs)))
    size = expected_bytes(model, needs, domains=domains, tokens=tokens)
    return {"tokens": tokens, "operations": int(tokens * work_per_token(model)[1]), "bytes": size}


def work_per_token(model: Any) -> tuple[float, float]:
    """Operations of the matrix products per token: in the model's forward pass, and in a capture.

    A capture also runs every expert on every token, and makes inner products of all pairs of their outputs,
    four ways.
    """
    size = model_size(model)
    active, pairs = size["weights"], 0
    for layer in find_moe_layers(model):
        count = layer.num_experts
        active -= sum(t.numel() for t in layer.tensors().values()) * (1 - (layer.top_k or count) / count)
        pairs += 4 * count**2 * layer.hidden_size
    return 2 * active, 2 * (active + size["expert_weights"] + pairs)


def amount(number: float) -> str:
    """A number with a prefix of a thousand, such as 46.7 G."""
    power = min(int(np.log10(max(number, 1)) / 3), 6)
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}".strip()


def _speed(dtype, size=1024, seconds=0.1):
    """Where matrix products are made, and operations per second of one that is timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix, count, started = torch.ones(size, size, dtype=dtype, device=device), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        (matrix @ matrix)[0, 0].item()
        count += 1
    return device.type.upper().replace("CUDA", "GPU"), 2 * size**3 * count / (time.perf_counter() - started)


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours."""
    minutes = f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    return f"{seconds:.0f} s" if seconds < 90 else minutes


def expected_bytes(
    model: Any, needs: Sequence[str], *, domains: int, tokens: int, sample: int = SAMPLE
) -> int:
    """Bytes of the statistics file that a capture on a model would give."""
    rows = min(sample, tokens) if "sample" in needs else 0
    total = rows * 24
    for layer in find_moe_layers(model):
        experts, hidden, k = layer.num_experts, layer.hidden_size, layer.top_k or layer.num_experts
        numbers = {"usage": 1 + 3 * experts + experts**2, "norms": 3 * experts, "grams": 4 * experts**2}
        numbers |= {"outputs": experts * hidden, "sample": 0}
        total += 8 * domains * sum(numbers[need] for need in needs)
        total += rows * (hidden * layer.tensors()["down_proj"].element_size() + 4 * experts + 12 * k)
    return total
