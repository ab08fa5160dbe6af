"""Every method on equal footing: one table of what each costs, over numbers of experts and calibration
samples.
"""

import contextlib
import ctypes
import functools
import io
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import t

from hcsmoe_core._util import InputError, check_count, read_record
from hcsmoe_core.checkpoint import load_model
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import METHODS, load_plugin, make_plan, resolve
from hcsmoe_core.score.evaluation import evaluate
from hcsmoe_core.studies import runner
from hcsmoe_core.studies.cache import cached_statistics, slug
from hcsmoe_core.studies.tables import model_size

# What the file of a cell must hold, for hcsmoe_core._util.check_kind.
CELL = {"method": str, "experts": int, "seed": int, "result?": {"refused?": str, "scores?": dict}}
ORIGINAL, BASELINE = "original", "hc-smoe"
SPREAD = ["accuracy", "loss"]  # columns whose spread over the samples matters
MEANS = ["item_error", "plan_seconds", "merge_seconds", "peak_mb", "expert_bytes"]
COLUMNS = ["method", "experts", "seed", "limit", "accuracy", "item_error", "loss", "weights", "expert_bytes"]
COLUMNS += ["plan_seconds", "merge_seconds", "peak_mb", "layers", "refused"]


def compare(
    model: str,
    *,
    methods: Sequence[str] | None = None,
    experts: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    limit: int | None = 100,
    calibration: str = "",
    sequences: int = 0,
    length: int = 0,
    text: str = "demo",
    settings: dict | None = None,
    plugin: str | Path | Sequence = (),
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    folder: str | Path = "runs/compare",
) -> Any:
    """Score every method at every number of experts and on every calibration sample; finished cells are kept.

    Parameters
    ----------
    model, text, dtype, device, trust_remote_code
        As for :func:`hcsmoe_core.load_model` and :func:`hcsmoe_core.evaluate`.
    methods, experts : list, optional
        By default all methods, and three quarters, a half and a quarter of the experts.
    seeds : sequence of int
        One calibration sample each; also the seed of methods that use chance.
    limit : int, optional
        Items per task; None for all.
    calibration, sequences, length
        As for :func:`hcsmoe_core.text.calibration.calibration_settings`.
    settings : dict, optional
        Steps and options set otherwise. A method that refuses them, or a cell, is recorded with the reason.
    plugin : path or list of path, optional
        Python files with methods of your own, which are run; cells go by their content.
    folder : str or path
        Cells go to a folder of the model's name in it.

    Returns the table of :func:`cells`, one row per cell.
    """
    plugins = [str(path) for path in ([plugin] if isinstance(plugin, str | Path) else plugin) if path]
    list(map(load_plugin, plugins))
    source = dict(calibration=str(calibration), sequences=sequences, length=length)
    needs = _needs(methods, settings or {})
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    shared = dict(model=str(model), limit=limit, text=text, dtype=str(loaded.dtype), settings=settings or {})
    needed = sum(needs.values(), ())
    capture = latest(functools.partial(cached_statistics, loaded, tokenizer, needs=needed, **source))
    runner.measure(
        functools.partial(_measured, model=loaded, tokenizer=tokenizer, statistics=capture),
        _wanted(loaded, tuple(needs), experts, seeds),
        Path(folder) / slug(model),
        shared=shared | source | ({"plugin": plugins} if plugins else {}),
        model=model_hash(loaded),
        description=f"compare {slug(model)}",
    )
    return cells(folder, model)


def _needs(methods, settings):
    """What each method needs of the statistics; nothing of those that refuse the settings, unless all do."""
    needs, refusals = {}, []
    for method in methods or METHODS:
        name = resolve(method).method
        try:
            needs[name] = resolve(method, **settings).needs
        except InputError as error:
            needs[name] = ()
            refusals.append(error)
    if len(refusals) == len(needs):
        raise refusals[0]
    return needs


def _wanted(model, methods, experts, seeds):
    size = model_size(model)["num_experts"]
    counts = experts or fractions_of(size, (3, 2, 1), 4)
    for count in counts:
        check_count("experts", count, 1, size)
    cells = itertools.product(seeds, sorted(counts, reverse=True), methods)
    merged = [{"method": method, "experts": count, "seed": seed} for seed, count, method in cells]
    return [{"method": ORIGINAL, "experts": size, "seed": 0}, *merged]


def fractions_of(size: int, parts: Sequence[int], of: int) -> list[int]:
    """Some parts of a number of experts, at least one expert each."""
    return list(dict.fromkeys(max(1, size * part // of) for part in parts))


def latest(capture: Callable) -> Callable:
    """``capture(seed=…)`` that remembers the statistics of the seed it was asked for last."""
    return functools.lru_cache(maxsize=1)(capture)


def _measured(cell, *, model, tokenizer, statistics):
    """Scores, times and sizes of one cell, or why it cannot be had."""
    merged, record = cell["method"] != ORIGINAL, {}
    stats = statistics(seed=cell["seed"]) if merged else None
    try:
        if merged:
            with _peak_memory(model) as memory:
                options = {name: cell[name] for name in ("method", "experts", "seed")} | cell["settings"]
                started = time.perf_counter()
                plan = make_plan(stats, model, progress=False, **options)
                planned = time.perf_counter()
                apply_plan(model, plan, stats)
                record |= {"plan_seconds": planned - started, "merge_seconds": time.perf_counter() - planned}
            record |= {"peak_mb": memory.get("mb"), "layers": [layer.num_groups for layer in plan.layers]}
        with contextlib.redirect_stderr(io.StringIO()):  # the harness draws its own bars, three per cell
            record["scores"] = evaluate(model, tokenizer, limit=cell["limit"], text=cell["text"])
        record |= {"weights": model_size(model)["weights"], "expert_bytes": _expert_bytes(model)}
    except InputError as error:  # any other is a bug, which is not kept
        record["refused"] = str(error)
    finally:
        restore(model)
    return cell | {"result": record}


def _expert_bytes(model):
    """Bytes of the experts; of those that were factored, the bytes that the factors take."""

    def size(layer):
        factored = getattr(getattr(layer.experts, "_merged", None), "compressed_bytes", None)
        return sum(t.nbytes for t in layer.tensors().values()) if factored is None else factored

    return sum(map(size, find_moe_layers(model)))


@contextlib.contextmanager
def _peak_memory(model: Any) -> Iterator[dict]:
    """Peak of what is allocated while the block runs, above what there was, in MB; where that can be told.

    On a CPU it is what the process newly takes: allocations that reuse what it had already do not show, so
    that this is a lower bound.
    """
    peak, before = {}, None
    if model.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(model.device)
        before, highest = torch.cuda.memory_allocated(model.device), torch.cuda.max_memory_allocated
    else:
        with contextlib.suppress(OSError, AttributeError):  # another system, or another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory kept for reuse would hide what is needed
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the resident peak starts again from now
            before, highest = _status("VmRSS"), lambda _: _status("VmHWM")
    yield peak
    if before is not None:
        peak["mb"] = max(0, highest(model.device) - before) / 1e6


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1000 * int(next(line for line in lines if line.startswith(name)).split()[1])


def cells(folder: str | Path, model: str) -> Any:
    """What :func:`compare` measured, one row per cell; cells of earlier code or settings are left out for
    newer ones.

    Parameters
    ----------
    folder : str or path
        What :func:`compare` wrote its cells to, or a table of them as ``hcsmoe compare`` writes one
        (``.csv``), with ``{model}`` for the model's name.
    model : str

    Returns
    -------
    pandas.DataFrame
        ``method``, ``experts``, ``seed``, ``accuracy`` and its ``item_error`` (standard error over the
        items), ``loss``, ``weights``, ``expert_bytes``, ``plan_seconds``, ``merge_seconds``, ``peak_mb``,
        ``layers`` and ``refused``.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    if str(folder).endswith(".csv"):
        table = read_table(folder, model, f"hcsmoe compare {model}, and give runs/compare")
        return table.reindex(columns=COLUMNS)
    newest = newest_cells(folder, model)
    if not newest:
        raise FileNotFoundError(f"Nothing was compared for {model} in {folder}; run: hcsmoe compare {model}")
    names = {"mean_acc": "accuracy", "mean_acc_stderr": "item_error", "mean_loss": "loss"}
    rows = [
        cell | cell["result"] | {new: cell["result"].get("scores", {}).get(old) for old, new in names.items()}
        for cell in newest.values()
    ]
    order = dict(by=["experts", "method", "seed"], ascending=[False, True, True], ignore_index=True)
    return pd.DataFrame(rows).reindex(columns=COLUMNS).sort_values(**order)


def newest_cells(folder: str | Path, model: str) -> dict[tuple, dict]:
    """Contents of the cells of :func:`compare`, the newest of each: by method, number of experts and seed."""
    paths = sorted((Path(folder) / slug(model)).glob("*.json"), key=lambda path: path.stat().st_mtime)
    remedy = "Compare again, which measures it anew, or remove it."
    cells = [read_record(path, CELL, what="cell of a comparison", remedy=remedy) for path in paths]
    return {(cell["method"], cell["experts"], cell["seed"]): cell for cell in cells if "result" in cell}


def read_table(path: str | Path, model: str, command: str) -> Any:
    """A table that was kept, ``{model}`` in its path replaced by the model's name, as a pandas.DataFrame.

    Raises
    ------
    FileNotFoundError
        If there is none; it says to run ``command``.
    """
    path = Path(str(path).replace("{model}", slug(model)))
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path.absolute()}; run: {command}.")
    return pd.read_csv(path)


def summary(frame: Any) -> Any:
    """One row per method and number of experts: means over the calibration samples, and their differences.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`cells`.

    Returns
    -------
    pandas.DataFrame
        ``accuracy`` and ``loss`` with ``_sd`` over the samples, ``item_error``, and against :data:`BASELINE`
        on the same samples ``gain`` (in loss; positive is better) with ``gain_error``, the half width of its
        95 % interval (Student's t over the samples), and ``verdict``: "better", "worse" or "even" within it.
    """
    rows = []
    for (experts, method), part in frame.groupby(["experts", "method"], sort=False):
        good = part[part["loss"].notna()].set_index("seed")
        row = {"experts": experts, "method": method, "samples": len(good)}
        if good.empty:
            rows.append(row | {"refused": part["refused"].iloc[0]})
            continue
        means = good[[*SPREAD, *MEANS]].apply(pd.to_numeric).mean()
        base = frame[(frame["experts"] == experts) & (frame["method"] == BASELINE)].set_index("seed")
        gains = (base["loss"] - good["loss"]).dropna()
        verdict = _verdict(gains) if method not in (BASELINE, ORIGINAL) and len(gains) > 1 else {}
        rows.append({**row, **means, **good[SPREAD].std(ddof=1).add_suffix("_sd"), **verdict})
    return pd.DataFrame(rows)


def _verdict(gains):
    half = float(t.ppf(0.975, len(gains) - 1) * gains.sem(ddof=1))
    verdict = "even" if abs(gains.mean()) <= half else "better" if gains.mean() > 0 else "worse"
    return {"gain": gains.mean(), "gain_error": half, "verdict": verdict}


def table(frame: Any) -> str:
    """The comparison as lines of text, the best loss first at each number of experts.

    Losses are in nats per token, and ``MB`` is the size of the experts. Perplexity, and what making and
    applying a plan allocated at most, are in the table that the command writes.
    """
    columns = (
        ("acc %", "accuracy", 6, 1, 100),
        ("±sample", "accuracy_sd", 8, 1, 100),
        ("±items", "item_error", 7, 1, 100),
        ("loss", "loss", 7, 3, 1),
        ("±sample", "loss_sd", 8, 3, 1),
        ("vs hc", "verdict", 7, 0, 1),
        ("plan s", "plan_seconds", 7, 1, 1),
        ("merge", "merge_seconds", 6, 1, 1),
        ("MB", "expert_bytes", 7, 1, 1e-6),
    )
    lines = []
    for experts, part in summary(frame).groupby("experts", sort=False):
        header = "".join(f"{title:>{width}}" for title, _, width, *_ in columns)
        lines += [f"\n{experts} experts per layer", f"{'method':<17}{header}"]
        for row in part.sort_values("loss", na_position="last").to_dict("records"):
            if row["samples"] == 0:
                lines.append(f"{row['method']:<18}  refused: {row['refused'].splitlines()[0]}")
                continue
            cells = (_text(row.get(key), width, digits, factor) for _, key, width, digits, factor in columns)
            lines.append(f"{row['method']:<17}" + "".join(cells))
    return "\n".join(lines)


def _text(value, width, digits, factor):
    if isinstance(value, str):
        return f"{value:>{width}}"
    return " " * width if value is None or math.isnan(value) else f"{factor * value:>{width}.{digits}f}"
