"""Every method on equal footing: one table of what each costs, over numbers of experts and calibration samples."""

import contextlib
import ctypes
import io
import math
import time
from pathlib import Path

from tqdm.auto import tqdm

from hcsmoe_core._util import check_choice, check_count, kept, place, read_json
from hcsmoe_core.checkpoint import factored_savings, load_model
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods.planner import METHODS, make_plan, named, steps_of
from hcsmoe_core.score.evaluation import evaluate
from hcsmoe_core.studies.cache import core_hash, slug, statistics
from hcsmoe_core.studies.tables import model_size

ORIGINAL = "original"


BASELINE = "hc-smoe"


COLUMNS = ["method", "experts", "seed", "limit", "accuracy", "item_error", "loss"]


COLUMNS += ["weights", "expert_bytes", "plan_seconds", "merge_seconds", "peak_mb", "layers", "refused"]


def compare(
    model,
    *,
    methods=None,
    experts=None,
    seeds=(0, 1, 2),
    limit=100,
    calibration="",
    sequences=0,
    length=0,
    text="demo",
    settings=None,
    dtype="auto",
    device="auto",
    folder="runs/compare",
):
    """Score every method at every number of experts and on every calibration sample.

    A cell is one plan, applied to the live model and scored. Cells that are done are kept, so that it can be stopped and
    started again; a method that cannot do a cell (a budget that the model cannot have, say) is recorded with its reason.

    Parameters
    ----------
    model : str
        As for :func:`hcsmoe_core.load_model`.
    methods : list of str, optional
        Names of :data:`hcsmoe_core.methods.planner.METHODS`; all by default.
    experts : list of int, optional
        Experts kept; by default three quarters, a half and a quarter of them.
    seeds : sequence of int
        One calibration sample each; also the seed of methods that use chance.
    limit : int
        Items of each task; 0 for all.
    calibration, sequences, length
        As for :func:`hcsmoe_core.studies.cache.calibration_of`.
    text : str
        What the loss is measured on; see :func:`hcsmoe_core.evaluate`.
    settings : dict, optional
        Steps set otherwise for every method that is compared; see :class:`hcsmoe_core.methods.planner.Steps`.
    dtype, device : str
    folder : str or path
        Cells go to a folder of the model's name in it.

    Returns
    -------
    pandas.DataFrame
        One row a cell; see :func:`cells`.

    Raises
    ------
    ValueError
        Before anything is measured, if a method, a setting or a number of experts is not to be had.
    """
    methods = list(dict.fromkeys(named(m) for m in methods or METHODS))
    steps = {m: steps_of(check_choice("methods", m, tuple(METHODS)), **(settings or {})) for m in methods}
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    size = model_size(loaded)["num_experts"]
    experts = list(experts or dict.fromkeys(max(1, size * part // 4) for part in (3, 2, 1)))
    for count in experts:
        check_count("experts", count, 1, size)
    shared = {
        "model": str(model),
        "hash": model_hash(loaded),
        "core": core_hash(),
        "limit": limit,
        "text": text,
    }
    shared |= {
        "calibration": str(calibration),
        "sequences": sequences,
        "length": length,
        "dtype": str(loaded.dtype),
    }
    cells_folder = place(folder) / slug(model)
    needs = tuple(dict.fromkeys(need for s in steps.values() for need in s.needs()))
    wanted = [{"method": ORIGINAL, "experts": size, "seed": 0}]
    wanted += [
        {"method": m, "experts": r, "seed": s}
        for s in seeds
        for r in sorted(experts, reverse=True)
        for m in methods
    ]
    captured = {}

    def measured(cell):
        if cell["method"] != ORIGINAL and cell["seed"] not in captured:
            captured.clear()
            how = dict(
                calibration=calibration, sequences=sequences, length=length, seed=cell["seed"], needs=needs
            )
            captured[cell["seed"]] = statistics(loaded, tokenizer, **how)
        stats = None if cell["method"] == ORIGINAL else captured[cell["seed"]]
        return _measured(loaded, tokenizer, stats, cell, settings or {}, limit=limit, text=text)

    for cell in tqdm(wanted, desc=f"compare {slug(model)}", unit="cell"):
        about = shared | cell | {"settings": settings or {}}
        kept(cells_folder, about, lambda cell=cell: measured(cell))
    return cells(folder, model)


def _measured(model, tokenizer, stats, cell, settings, *, limit, text):
    """Scores, times and sizes of one cell, or why it cannot be had."""
    record = {}
    try:
        if stats is not None:
            with _peak_memory(model) as memory:
                started = time.perf_counter()
                options = dict(
                    experts=cell["experts"], method=cell["method"], seed=cell["seed"], progress=False
                )
                plan = make_plan(stats, model, **options, **settings)
                planned = time.perf_counter()
                apply_plan(model, plan, stats)
                record |= {"plan_seconds": planned - started, "merge_seconds": time.perf_counter() - planned}
            record |= {"peak_mb": memory.get("mb"), "layers": [layer.num_groups for layer in plan.layers]}
        with contextlib.redirect_stderr(io.StringIO()):  # the harness draws its own bars, three a cell
            record["scores"] = evaluate(model, tokenizer, limit=limit or None, text=text)
        record["weights"] = model_size(model)["weights"]
        tensors = [t for layer in find_moe_layers(model) for t in layer.tensors().values()]
        record["expert_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
        if cell["method"] != ORIGINAL and plan.compress:  # in memory the factors are multiplied out
            record["expert_bytes"] = factored_savings(model)["bytes"]["compressed"]
    except ValueError as error:
        record["refused"] = str(error)
    finally:
        restore(model)
    return record


@contextlib.contextmanager
def _peak_memory(model):
    """Peak of what is allocated while the block runs, above what there was, in MB; where that can be told.

    On a CPU it is what the process newly holds: allocations that reuse what it held already do not show, so that this is a
    lower bound.
    """
    found = {}
    if model.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        yield found
        found["mb"] = (torch.cuda.max_memory_allocated(model.device) - before) / 1e6
        return
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what is merely held for reuse would hide what is needed
        reset.write_text("5")  # Linux: the resident peak starts again from what is resident now
        before = _status("VmRSS")
    except (OSError, AttributeError):  # another system, or another C library
        yield found
        return
    yield found
    found["mb"] = max(0, _status("VmHWM") - before) / 1e3


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def cells(folder, model):
    """What :func:`compare` measured, one row a cell; cells of earlier code or settings are left out where newer ones exist.

    Parameters
    ----------
    folder : str or path
        What :func:`compare` wrote its cells to, or a table of them as ``hcsmoe compare`` writes one (``.csv``), with
        ``{model}`` for the model's name.
    model : str

    Returns
    -------
    pandas.DataFrame
        ``method``, ``experts``, ``seed``, ``accuracy`` and its ``item_error`` (standard error over the items), ``loss``,
        ``weights``, ``expert_bytes``, ``plan_seconds``, ``merge_seconds``, ``peak_mb``, ``layers`` and
        ``refused``.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    import pandas as pd

    if str(folder).endswith(".csv"):
        return read_table(folder, model, f"hcsmoe compare {model}, and give runs/compare").reindex(
            columns=COLUMNS
        )
    newest = newest_cells(folder, model)
    if not newest:
        raise FileNotFoundError(
            f"Nothing was compared for {model} in {place(folder)}; run: hcsmoe compare {model}"
        )
    rows = []
    for (method, experts, seed), content in newest.items():
        result, scores = content["result"], content["result"].get("scores", {})
        row = {"method": method, "experts": experts, "seed": seed, "limit": content["limit"]}
        row |= {
            "accuracy": scores.get("mean_acc"),
            "item_error": scores.get("mean_acc_stderr"),
            "loss": scores.get("mean_loss"),
        }
        rows.append(row | {key: result.get(key) for key in COLUMNS[7:]})
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(
        ["experts", "method", "seed"], ascending=[False, True, True], ignore_index=True
    )


def newest_cells(folder, model):
    """Contents of the cells that :func:`compare` wrote, the newest of each: by method, number of experts and seed."""
    newest = {}
    for path in sorted((place(folder) / slug(model)).glob("*.json"), key=lambda p: p.stat().st_mtime):
        content = read_json(path)
        if isinstance(content, dict) and "result" in content:
            newest[(content["method"], content["experts"], content["seed"])] = content
    return newest


def read_table(path, model, command):
    """A table that was kept, ``{model}`` in its path replaced by the model's name.

    Raises
    ------
    FileNotFoundError
        If there is none; it says to run ``command``.
    """
    import pandas as pd

    path = place(str(path).replace("{model}", slug(model)))
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}; run: {command}.")
    return pd.read_csv(path)


def summary(frame):
    """One row for each method and number of experts: means over the calibration samples, and what they differ by.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`cells`.

    Returns
    -------
    pandas.DataFrame
        ``accuracy`` and ``loss`` with ``_sd`` over the samples, ``item_error``, and against :data:`BASELINE` on the same
        samples ``gain`` (in loss; positive is better) with ``gain_error``, the half width of its 95 % interval (Student's
        t over the samples), and ``verdict``: "better", "worse" or "even" within it.
    """
    import pandas as pd
    from scipy.stats import t

    rows = []
    for (experts, method), part in frame.groupby(["experts", "method"], sort=False):
        good = part[part["loss"].notna()]
        row = {"experts": experts, "method": method, "samples": len(good)}
        if good.empty:
            rows.append(row | {"refused": part["refused"].iloc[0]})
            continue
        for key in ("accuracy", "loss"):
            row |= {key: good[key].mean(), f"{key}_sd": good[key].std(ddof=1) if len(good) > 1 else math.nan}
        row["item_error"] = good["item_error"].mean()
        for key in ("plan_seconds", "merge_seconds", "peak_mb", "expert_bytes"):
            row[key] = pd.to_numeric(good[key]).mean()
        base = frame[(frame["experts"] == experts) & (frame["method"] == BASELINE)].set_index("seed")["loss"]
        both = [seed for seed in good["seed"] if seed in base.index]
        if method not in (BASELINE, ORIGINAL) and len(both) > 1:
            gains = base.loc[both] - good.set_index("seed")["loss"].loc[both]
            half = float(t.ppf(0.975, len(both) - 1) * gains.std(ddof=1) / math.sqrt(len(both)))
            row |= {"gain": gains.mean(), "gain_error": half}
            row["verdict"] = (
                "even" if abs(gains.mean()) <= half else ("better" if gains.mean() > 0 else "worse")
            )
        rows.append(row)
    return pd.DataFrame(rows)


def table(frame):
    """The comparison as lines of text, the best loss first at each number of experts.

    Losses are in nats a token; ``ppl`` is the perplexity of their mean, ``MB`` the size of the experts and ``peak MB`` what
    making and applying the plan allocated at most.
    """
    columns = (
        ("acc %", "accuracy", 7, 1, 100),
        ("± sample", "accuracy_sd", 9, 1, 100),
        ("± items", "item_error", 8, 1, 100),
        ("loss", "loss", 8, 3, 1),
        ("± sample", "loss_sd", 9, 3, 1),
        ("ppl", "perplexity", 9, 2, 1),
        ("than hc-smoe", "verdict", 13, 0, 1),
        ("plan s", "plan_seconds", 7, 2, 1),
        ("merge s", "merge_seconds", 8, 2, 1),
        ("peak MB", "peak_mb", 8, 0, 1),
        ("MB", "expert_bytes", 7, 1, 1e-6),
    )
    lines = []
    for experts, part in summary(frame).groupby("experts", sort=False):
        lines += [
            f"\n{experts} experts a layer",
            f"{'method':<18}" + "".join(f"{c[0]:>{c[2]}}" for c in columns),
        ]
        for row in part.sort_values("loss", na_position="last").to_dict("records"):
            if row["samples"] == 0:
                lines.append(f"{row['method']:<18}  refused: {row['refused'].splitlines()[0]}")
                continue
            row["perplexity"] = math.exp(row["loss"])
            cells = (_shown(row.get(key), width, digits, factor) for _, key, width, digits, factor in columns)
            lines.append(f"{row['method']:<18}" + "".join(cells))
    return "\n".join(lines)


def _shown(value, width, digits, factor):
    if isinstance(value, str):
        return f"{value:>{width}}"
    return " " * width if value is None or math.isnan(value) else f"{factor * value:>{width}.{digits}f}"
