"""TODO."""

import time

import numpy as np
import torch

from hcsmoe_core.checkpoint import load_skeleton
from hcsmoe_core.collect import expected_bytes
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.statistics import DEFAULT_NEEDS
from hcsmoe_core.studies.cache import calibration_of
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import domains_of, own_sequences


def forecast(
    model, *, dtype="auto", calibration="", sequences=0, length=0, seed=42, needs=DEFAULT_NEEDS, samples=1
):
    """What a notebook will cost on a model, before the model is loaded: from its configuration alone.

    Parameters
    ----------
    model : str
        As for :func:`hcsmoe_core.load_model`.
    dtype, calibration, sequences, length, seed, needs
        As for :func:`statistics`; the seed costs nothing.
    samples : int
        Calibration samples.

    Returns
    -------
    str
        A line for each of model, calibration, the model's own text if it writes some, capture and statistics file. Times are
        lower bounds: operations at the speed of a matrix product that is timed here and now.
    """
    skeleton, source = (
        load_skeleton(model, dtype=dtype),
        calibration_of(model, calibration, sequences, length),
    )
    needs = tuple(dict.fromkeys((*DEFAULT_NEEDS, *needs)))
    size, tokens = model_size(skeleton), source["sequences"] * source["length"]
    weights, held = size["weights"], size["bytes"]
    active, captured = work_of_a_token(skeleton)
    work = samples * tokens * captured
    where, speed = _speed(skeleton.dtype)
    domains = len(set(domains_of(source["calibration"], source["sequences"]) or ["all"]))
    file = expected_bytes(skeleton, needs, domains=domains, tokens=tokens)
    shape = f"{source['sequences']} × {source['length']:,} = {tokens:,} tokens of {source['calibration']}"
    own = samples * source["length"] * own_sequences(source["calibration"], source["sequences"])
    rows = {
        "model": f"{amount(weights)} weights, {amount(held)}B in memory; {active / 2 / weights:.0%} of them active for a token",
        "calibration": shape if samples == 1 else f"{samples} samples of {shape}",
        "own text": f"{amount(own)} tokens, one after another: {duration(own * active / speed)} or more on this {where}",
        "capture": f"{amount(work)} operations: {duration(work / speed)} or more on this {where}",
        "statistics": f"{amount(samples * file)}B under runs/statistics, kept for the next time",
    }
    if not own:
        del rows["own text"]
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items())


def work_of_a_token(model):
    """Operations that the matrix products of one token take: in the model's forward pass, and in a capture.

    A capture also runs every expert on every token, and makes inner products of all pairs of their outputs, four ways.
    """
    size = model_size(model)
    active, pairs = size["weights"], 0
    for layer in find_moe_layers(model):
        count = layer.num_experts
        active -= sum(t.numel() for t in layer.tensors().values()) * (1 - (layer.top_k or count) / count)
        pairs += 4 * count**2 * layer.hidden_size
    return 2 * active, 2 * (active + size["expert_weights"] + pairs)


def amount(number):
    """A number with a prefix of a thousand, such as 46.7 G."""
    power = min(int(np.log10(max(number, 1)) / 3), 6)
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}".strip()


def _speed(dtype, size=1024, seconds=0.1):
    """Where matrix products are made, and operations a second of one that is timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix, count, started = torch.ones(size, size, dtype=dtype, device=device), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        (matrix @ matrix)[0, 0].item()
        count += 1
    return device.type.upper().replace("CUDA", "GPU"), 2 * size**3 * count / (time.perf_counter() - started)


def duration(seconds):
    """A time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
