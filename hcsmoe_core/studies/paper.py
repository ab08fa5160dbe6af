"""The tables of the HC-SMoE paper (ICML 2025, arXiv 2410.08589), the published values beside what our own
runs give.

A table's rows are never dropped: what was not measured, or not published, is said in the column ``missing``.
Rows line up one to one on the paper's own models. On any other model they line up by the share of experts
kept, and the column to look at is the accuracy retained, relative to the unmerged model.
"""

import functools
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd

from hcsmoe_core._util import check_choice, require, sha256_json
from hcsmoe_core.studies.cache import slug
from hcsmoe_core.studies.sweep import SAMPLES, SOURCE, recipe_of, setting_name
from hcsmoe_core.text.calibration import calibration_settings

NAN = math.nan
PUBLISHED = Path(__file__).with_name("published.json")
LINKAGES, SIMILARITIES = ("single", "complete", "average"), ("expert-output", "weight", "router-logits")
# The paper's names as our method and its steps (none: the unmerged model), with what is not the same in both.
OURS = {
    "none": ({}, ""),
    "o-prune": (
        {"method": "o-prune"},
        "ours searches on from the sampled subsets where there are more than 16 experts",
    ),
    "f-prune": ({"method": "f-prune"}, ""),
    "s-prune": ({"method": "s-prune"}, ""),
    "m-smoe": ({"method": "m-smoe"}, "ours aligns neurons before it averages, as M-SMoE's paper does"),
    "hc-smoe-average": ({"method": "hc-smoe"}, ""),
    "hc-smoe-single": ({"method": "hc-smoe", "linkage": "single"}, ""),
    "hierarchical": ({"method": "hc-smoe"}, ""),
    "kmeans-random": ({"method": "k-means"}, ""),
    "kmeans-fixed": (None, "which experts the centres start at is not known"),
    "frequency": ({"method": "hc-smoe"}, ""),
    "average": ({"method": "hc-smoe", "merge": "average"}, ""),
    "fix-dom": ({"method": "fix-dom", "merge": "average"}, ""),
} | {
    f"{linkage}, {similarity}": (
        {"method": "hc-smoe", "linkage": linkage, "similarity": similarity},
        "the released code joins the farthest pair" if linkage == "complete" else "",
    )
    for linkage in LINKAGES
    for similarity in SIMILARITIES
}


@functools.cache
def published() -> dict:
    """The published values, as :data:`PUBLISHED` has them."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def table_of(name: str) -> dict:
    """One published table of accuracies."""
    return published()["tables"][check_choice("table", name, tuple(published()["tables"]))]


def is_model(model: str, name: str) -> bool:
    """Whether a folder or a name on the hub is a model of the paper: its last component is that name."""
    return slug(model) == name


def title(name: str, model: str) -> str:
    """A table's number and title, what to know of it, and whether ``model`` is the one it is about, in
    lines.
    """
    table = published()["efficiency"] if name == "efficiency" else table_of(name)
    number, models = table["number"], [table["model"]] if "model" in table else published()["models"]
    text = f"{number}: {table['title']}" if number.startswith("Table") else f"{table['title']} ({number})"
    others = " or ".join(other for other in models if not is_model(model, other))
    differ = (
        f"\nThe models differ: {slug(model)} is not {others}. Only the shape compares: rows by share "
        "of experts kept, relative to the unmerged model; where a task of the table was not scored, ours is "
        "over all that were."
    )
    return f"{text}\nRemark: {table['remark']}.{differ if others else ''}"


def of_source(cells: Any, calibration: str = "", sequences: int = 0, length: int = 0) -> Any:
    """Cells that were calibrated on one source, and the unmerged model's.

    Parameters
    ----------
    cells : pandas.DataFrame
        Of :func:`hcsmoe_core.studies.sweep.collect`, for one model.
    calibration, sequences, length
        As for :func:`hcsmoe_core.text.calibration.calibration_settings`.

    Returns
    -------
    pandas.DataFrame
    """
    wanted = calibration_settings(cells["model"].iloc[0], calibration, sequences, length)
    same = (cells[list(SOURCE)] == [wanted[name] for name in SOURCE]).all(axis=1)
    return cells[same | (cells["experts"] == 0)]


def line_up(cells: Any, name: str) -> Any:
    """One published table of mean accuracies beside our own runs of one model, a row for each of its rows.

    Several calibration seeds of a setting are averaged.

    Parameters
    ----------
    cells : pandas.DataFrame
        Of :func:`hcsmoe_core.studies.sweep.collect`, for one model.
    name : {"qwen", "mixtral", "linkage", "clustering", "merging", "extreme"}

    Returns
    -------
    pandas.DataFrame
        ``experts`` and ``method`` as published; ``our_experts`` and ``setting`` (the ``name`` of our cells);
        ``kept``, the share of experts; ``published`` and ``ours`` (mean accuracy, 0 to 1) with ``sd`` over
        ``seeds`` of ours; ``difference`` (ours less published, only on the table's own model and tasks);
        ``published_retained`` and ``retained`` with ``retained_sd`` (relative to the unmerged model);
        ``missing`` and ``remark``.

    Raises
    ------
    InputError
        If there is no such table, or the cells are of several models or studies.
    """
    table = table_of(name)
    model, size, runs = _runs(cells)
    same, before = is_model(model, table["model"]), _published_unmerged(table)
    columns, rows = _columns(cells, table, same), []
    ours_before = _score(runs.get(None), columns)[0]
    for line in table["rows"]:
        kept = Fraction(line["experts"], published()["models"][table["model"]]["experts"])
        (setting, remark), experts, average = (
            OURS[line["method"]],
            round(kept * size),
            _number(line["average"]),
        )
        found = _measured(runs, setting, experts)
        mean, sd, seeds = _score(found, columns)
        between = "published: {} to {} over the rules".format(*line["between"]) if "between" in line else ""
        row = {
            "experts": line["experts"],
            "method": line["method"],
            "our_experts": experts,
            "setting": "-" if setting is None else setting_name({"experts": bool(setting)} | setting),
            "kept": float(kept),
            "published": average,
            "ours": mean,
            "sd": sd,
            "seeds": seeds,
            "difference": mean - average if same and table["tasks"] else NAN,
            "published_retained": average / before,
            "retained": mean / ours_before,
            "retained_sd": sd / ours_before,
            "missing": _missing(line, mean, setting, found, ours_before),
            "remark": "; ".join(filter(None, (between, remark))),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def by_task(cells: Any, name: str) -> Any:
    """A main table task by task: three lines per row, the published values, ours, and their difference.

    On a model that the table is not about, ours and the difference are empty but for the average of ours,
    which is over the model's own tasks.

    Parameters
    ----------
    cells : pandas.DataFrame
        As for :func:`line_up`.
    name : {"qwen", "mixtral"}

    Returns
    -------
    pandas.DataFrame
        A column a task, and ``average``; indexed by ``experts``, ``method`` and ``value``.
    """
    table = table_of(name)
    model, _, runs = _runs(cells)
    same, rows = is_model(model, table["model"]), []
    for line, summary in zip(table["rows"], line_up(cells, name).to_dict("records"), strict=True):
        found = _measured(runs, OURS[line["method"]][0], summary["our_experts"]) if same else None
        theirs = line["scores"] | {"average": line["average"]}
        ours = {task: _score(found, [f"acc_{task}"])[0] for task in table["tasks"]}
        ours["average"] = summary["ours"]
        less = {task: ours[task] - theirs[task] if same else NAN for task in theirs}
        for value, scores in (("published", theirs), ("ours", ours), ("difference", less)):
            rows.append({"experts": line["experts"], "method": line["method"], "value": value} | scores)
    return pd.DataFrame(rows).set_index(["experts", "method", "value"]).astype(float)


def efficiency(cells: Any) -> Any:
    """What merging saves, published beside ours, which are HC-SMoE's own.

    Parameters
    ----------
    cells : pandas.DataFrame
        As for :func:`line_up`.

    Returns
    -------
    pandas.DataFrame
        A row for each published one: ``model``, ``experts``, ``kept`` and ``our_experts``; parameters (in
        10⁹), gigabytes (2³⁰ bytes) and share of the parameters kept, published and ours; published seconds
        and peak memory, and the seconds of ours where cells have them (``compress_seconds``).
    """
    model, size, runs = _runs(cells)
    whole, rows, full = _first(runs.get(None), "weights"), [], {}
    for line in published()["efficiency"]["rows"]:
        of, theirs, seconds = line["model"], line["params_b"], line["compress_seconds"]
        kept = Fraction(line["experts"], published()["models"][of]["experts"])
        found = _measured(runs, {} if kept == 1 else OURS["hc-smoe-average"][0], round(kept * size))
        weights, held = _first(found, "weights"), _first(found, "bytes")
        absent = "not measured" if math.isnan(weights) else "bytes not recorded" if math.isnan(held) else ""
        row = {
            "model": of,
            "experts": line["experts"],
            "kept": float(kept),
            "our_experts": round(kept * size),
            "published_params_b": theirs,
            "params_b": weights / 1e9,
            "published_gb": line["checkpoint_gb"],
            "gb": held / 2**30,
            "published_share": theirs / full.setdefault(of, theirs),
            "share": weights / whole,
            "published_seconds": f"{seconds[0]} to {seconds[-1]}" if seconds else "",
            "seconds": _first(found, "compress_seconds"),
            "published_peak_gb": _number(line["compress_peak_gb"]),
            "same_model": is_model(model, of),
            "missing": absent and f"ours: {absent}",
        }
        rows.append(row)
    return pd.DataFrame(rows)


def wanted(num_experts: int, tables: Sequence[str] | None = None) -> list[dict]:
    """Every cell of ``05_accuracy`` that the tables need, as its parameters.

    Parameters
    ----------
    num_experts : int
        E of the model.
    tables : sequence of str, optional
        Of which tables; by default of all.

    Returns
    -------
    list of dict
        ``experts`` (0: unmerged), ``method`` and steps that are not the method's own.
    """
    found = {(0, ""): {"experts": 0}}
    for table in map(table_of, tables or published()["tables"]):
        of = published()["models"][table["model"]]["experts"]
        for line in table["rows"]:
            setting, experts = OURS[line["method"]][0], round(Fraction(line["experts"], of) * num_experts)
            if setting:
                found.setdefault((experts, _plan_key(setting)), {"experts": experts} | setting)
    return list(found.values())


def unmeasured(cells: Any) -> Any:
    """The cells of :func:`wanted` that are not among these, one row each, as a pandas.DataFrame."""
    _, size, runs = _runs(cells)
    absent = [
        cell
        for cell in wanted(size)
        if _measured(runs, cell if cell["experts"] else {}, cell["experts"]) is None
    ]
    return pd.DataFrame(absent, columns=["experts", "method", "linkage", "similarity", "merge"]).fillna("")


_SCORED = ("dtype", "tasks", "limit")


def _runs(cells):
    """The model, its number of experts, and its cells by experts kept and steps (None: unmerged), one a
    sample.
    """
    models = cells["model"].unique()
    require(
        len(models) == 1, f'The "cells" argument holds cells of {", ".join(models)}; give those of one model.'
    )
    runs, rows = {}, cells.to_dict("records")
    for row in rows:
        row |= calibration_settings(models[0], *(row[name] for name in SOURCE))
        key = (row["experts"], _plan_key(row)) if row["experts"] else None
        # a setting spelt out and the same left to the method are one run
        runs.setdefault(key, {})[tuple(row.get(name, 0) for name in SAMPLES)] = row
    for name in (*_SCORED, *SOURCE):
        values = sorted({repr(row[name]) for row in rows if row["experts"] or name in _SCORED})
        several = f"The cells are of several studies: {name} is {', '.join(values)}; keep a folder for each."
        require(len(values) <= 1, several)
    return (
        models[0],
        int(cells["num_experts"].iloc[0]),
        {k: list(found.values()) for k, found in runs.items()},
    )


def _plan_key(setting):
    """What is equal for settings that make the same plan."""
    return sha256_json(recipe_of(setting).settings)


def _measured(runs, setting, experts):
    """Cells of a setting, one a seed; None if there are none."""
    return None if setting is None else runs.get((experts, _plan_key(setting)) if setting else None)


def _columns(cells, table, same):
    """Columns whose mean is ours: the table's tasks, or on another model whatever was scored where one of
    them was not.
    """
    columns = [f"acc_{task}" for task in table["tasks"] or ()]
    return columns if columns and (same or set(columns) <= set(cells)) else ["mean_acc"]


def _score(rows, columns):
    """Mean and standard deviation over the seeds of the mean over some columns, and the number of seeds."""
    scores = pd.DataFrame(rows or [], dtype=object).reindex(columns=columns).astype(float)
    scores = scores.mean(axis=1, skipna=False).dropna()
    return float(scores.mean()), float(scores.std()), len(scores)


def _published_unmerged(table):
    """Mean of the unmerged model over a table's tasks; NaN if they are not known."""
    lines = [(other, other["rows"][0]) for other in published()["tables"].values()]
    main, line = next((o, r) for o, r in lines if o["model"] == table["model"] and r["method"] == "none")
    if table["tasks"] == main["tasks"]:
        return line["average"]
    return (
        sum(line["scores"][task] for task in table["tasks"]) / len(table["tasks"]) if table["tasks"] else NAN
    )


def _missing(line, ours, setting, found, before):
    """Which value a row lacks, and why."""
    parts = []
    if line["average"] is None:
        parts.append("published: a range only" if "between" in line else "published: not recovered")
    if math.isnan(ours):
        reason = "other tasks" if found else "not measured"
        parts.append(f"ours: {'no equal setting' if setting is None else reason}")
    elif math.isnan(before):
        parts.append("ours: unmerged not measured")
    return "; ".join(parts)


def _number(value):
    return NAN if value is None else value


def _first(rows, column):
    """A column of the first cell, or NaN."""
    return _number(rows[0].get(column)) if rows else NAN
