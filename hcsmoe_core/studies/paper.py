"""The tables of the HC-SMoE paper (ICML 2025, arXiv 2410.08589), the published values beside what our own runs give.

A table's rows are never dropped: what was not measured, or not published, is said in the column ``missing``. Rows line up one
to one on the paper's own models. On any other model they line up by the share of experts kept, and the column to look at is
the accuracy retained, relative to the unmerged model.
"""

import functools
import json
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

from hcsmoe_core._util import InputError, check_choice
from hcsmoe_core.methods.planner import Steps, steps_of
from hcsmoe_core.studies.cache import calibration_of, slug
from hcsmoe_core.studies.sweep import setting_name

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


STEPS = {f.name for f in fields(Steps)}


@functools.cache
def published():
    """The published values, as :data:`PUBLISHED` has them."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def table_of(name):
    """One published table of accuracies.

    Raises
    ------
    ValueError
        If there is no such table.
    """
    return published()["tables"][check_choice("table", name, tuple(published()["tables"]))]


def is_model(model, name):
    """Whether a folder or a name on the hub is a model of the paper: its last component is that name, to the letter."""
    return slug(model) == name


def title(name, model):
    """A table's number and title, what is to be known of it, and whether ``model`` is the one it is about.

    Returns
    -------
    str
        A few lines.
    """
    table = published()["efficiency"] if name == "efficiency" else table_of(name)
    number, about = table["number"], table["title"]
    lines = [
        f"{number}: {about}" if number.startswith("Table") else f"{about} ({number})",
        f"Remark: {table['remark']}.",
    ]
    others = [
        m for m in ([table["model"]] if "model" in table else published()["models"]) if not is_model(model, m)
    ]
    if others:
        lines.append(
            f"The models differ: {slug(model)} is not {' or '.join(others)}. Only the shape compares: rows by share of experts "
            "kept, relative to the unmerged model; where a task of the table was not scored, ours is over all that were."
        )
    return "\n".join(lines)


def of_source(cells, calibration="", sequences=0, length=0):
    """Cells that were calibrated on one source, and the unmerged model's.

    Parameters
    ----------
    cells : pandas.DataFrame
        Of :func:`hcsmoe_core.studies.sweep.collect`, for one model.
    calibration, sequences, length
        As for :func:`hcsmoe_core.studies.cache.calibration_of`.

    Returns
    -------
    pandas.DataFrame
    """
    wanted = calibration_of(cells["model"].iloc[0], calibration, sequences, length)
    same = [
        not row["experts"] or all(row[name] == wanted[name] for name in _CALIBRATED)
        for row in cells.to_dict("records")
    ]
    return cells[same]


def line_up(cells, name):
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
        ``experts`` and ``method`` as published; ``our_experts`` and ``setting`` (the ``name`` of our cells); ``kept``, the
        share of experts; ``published`` and ``ours`` (mean accuracy, 0 to 1) with ``sd`` over ``seeds`` of ours;
        ``difference`` (ours less published, only on the table's own model and tasks); ``published_retained`` and
        ``retained`` with ``retained_sd`` (relative to the unmerged model); ``missing`` and ``remark``.

    Raises
    ------
    ValueError
        If there is no such table, or the cells are of several models or studies.
    """
    import pandas as pd

    table = table_of(name)
    model, size, runs = _runs(cells)
    same = is_model(model, table["model"])
    columns = _columns(cells, table, same)
    before = _published_unmerged(table)
    ours_before = _score(runs.get(None), columns)[0]
    rows = []
    for line in table["rows"]:
        kept = Fraction(line["experts"], published()["models"][table["model"]]["experts"])
        setting, remark = OURS[line["method"]]
        experts = round(kept * size)
        mean, sd, seeds = _score(_measured(runs, setting, experts), columns)
        between = "published: {} to {} over the rules".format(*line["between"]) if "between" in line else ""
        row = {"experts": line["experts"], "method": line["method"], "our_experts": experts}
        row["setting"] = "-" if setting is None else setting_name({"experts": bool(setting)} | setting)
        row |= {"kept": float(kept), "published": line["average"], "ours": mean, "sd": sd, "seeds": seeds}
        row["difference"] = (
            mean - line["average"] if same and table["tasks"] and _there(mean, line["average"]) else None
        )
        row["published_retained"] = _ratio(line["average"], before)
        row |= {"retained": _ratio(mean, ours_before), "retained_sd": _ratio(sd, ours_before)}
        row["missing"] = _missing(line, mean, setting, _measured(runs, setting, experts), ours_before)
        rows.append(row | {"remark": "; ".join(part for part in (between, remark) if part)})
    numbers = ("published", "ours", "sd", "difference", "published_retained", "retained", "retained_sd")
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))


def by_task(cells, name):
    """A main table task by task: three lines for each of its rows, the published values, ours, and their difference.

    On a model that the table is not about, ours and the difference are empty but for the average of ours, which is over the
    model's own tasks.

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
    import pandas as pd

    table = table_of(name)
    model, _, runs = _runs(cells)
    same, rows = is_model(model, table["model"]), []
    for line, summary in zip(table["rows"], line_up(cells, name).to_dict("records"), strict=True):
        found = _measured(runs, OURS[line["method"]][0], summary["our_experts"])
        ours = {t: _score(found, [f"acc_{t}"])[0] if same else None for t in table["tasks"]}
        ours["average"] = summary["ours"]
        theirs = line["scores"] | {"average": line["average"]}
        less = {t: ours[t] - theirs[t] if same and _there(ours[t]) else None for t in theirs}
        of = {"experts": line["experts"], "method": line["method"]}
        rows += [
            of | {"value": v} | s for v, s in (("published", theirs), ("ours", ours), ("difference", less))
        ]
    return pd.DataFrame(rows).set_index(["experts", "method", "value"]).astype(float)


def efficiency(cells):
    """What merging saves, published beside ours, which are HC-SMoE's own.

    Parameters
    ----------
    cells : pandas.DataFrame
        As for :func:`line_up`.

    Returns
    -------
    pandas.DataFrame
        A row for each published one: ``model``, ``experts``, ``kept`` and ``our_experts``; parameters (in 10⁹),
        gigabytes (2³⁰ bytes) and share of the parameters kept, published and ours; published seconds and peak memory, and
        the seconds of ours where cells have them (``compress_seconds``).
    """
    import pandas as pd

    model, size, runs = _runs(cells)
    whole, rows = _first(runs.get(None), "weights"), []
    full = {
        line["model"]: line["params_b"] for line in reversed(published()["efficiency"]["rows"])
    }  # its first row's
    for line in published()["efficiency"]["rows"]:
        of = published()["models"][line["model"]]["experts"]
        kept = Fraction(line["experts"], of)
        found = _measured(runs, {} if kept == 1 else OURS["hc-smoe-average"][0], round(kept * size))
        weights, held = _first(found, "weights"), _first(found, "bytes")
        seconds = _first(found, "compress_seconds")
        row = {
            "model": line["model"],
            "experts": line["experts"],
            "kept": float(kept),
            "our_experts": round(kept * size),
        }
        row |= {"published_params_b": line["params_b"], "params_b": weights / 1e9 if weights else None}
        row |= {"published_gb": line["checkpoint_gb"], "gb": held / 2**30 if held else None}
        row |= {"published_share": line["params_b"] / full[line["model"]], "share": _ratio(weights, whole)}
        row |= {"published_seconds": _span(line["compress_seconds"]), "seconds": seconds}
        row |= {"published_peak_gb": line["compress_peak_gb"], "same_model": is_model(model, line["model"])}
        rows.append(
            row
            | {"missing": ("" if held else "ours: bytes not recorded") if weights else "ours: not measured"}
        )
    return pd.DataFrame(rows).astype(
        dict.fromkeys(("params_b", "gb", "share", "seconds", "published_peak_gb"), float)
    )


def wanted(num_experts, tables=None):
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
                found.setdefault((experts, _steps(setting)), {"experts": experts} | setting)
    return list(found.values())


def unmeasured(cells):
    """The cells of :func:`wanted` that are not among these, one row each.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    _, size, runs = _runs(cells)
    absent = [
        cell
        for cell in wanted(size)
        if _measured(runs, cell if cell["experts"] else {}, cell["experts"]) is None
    ]
    return pd.DataFrame(absent, columns=["experts", "method", "linkage", "similarity", "merge"]).fillna("")


_SCORED, _CALIBRATED = ("dtype", "tasks", "limit"), ("calibration", "sequences", "length")


def _runs(cells):
    """The model, its number of experts, and its cells by experts kept and steps (None: unmerged), one a sample."""
    models = cells["model"].unique()
    if len(models) != 1:
        raise InputError(f'The "cells" argument holds cells of {", ".join(models)}; give those of one model.')
    runs, rows = {}, cells.to_dict("records")
    for row in rows:
        row |= calibration_of(models[0], *(row[name] for name in _CALIBRATED))
        key = (row["experts"], _steps(row)) if row["experts"] else None
        sample = row["seed"], row.get("plan_seed", 0)
        runs.setdefault(key, {})[sample] = (
            row  # a setting spelt out and the same left to the method are one run
        )
    for name in (*_SCORED, *_CALIBRATED):
        values = {repr(row[name]) for row in rows if row["experts"] or name in _SCORED}
        if len(values) > 1:
            raise InputError(
                f"The cells are of several studies: {name} is {', '.join(sorted(values))}; keep a folder for each."
            )
    return (
        models[0],
        int(cells["num_experts"].iloc[0]),
        {key: list(found.values()) for key, found in runs.items()},
    )


def _steps(setting):
    """Steps of a cell or a setting; what is empty or missing is the method's own."""
    given = {k: v for k, v in setting.items() if k in STEPS and v == v and v not in ("", None)}
    method = setting.get("method")
    return steps_of(method if isinstance(method, str) else "hc-smoe", **given)


def _measured(runs, setting, experts):
    """Cells of a setting, one a seed; None if there are none."""
    if setting is None:
        return None
    return runs.get((experts, _steps(setting)) if setting else None)


def _columns(cells, table, same):
    """Columns whose mean is ours: the table's tasks, or on another model whatever was scored where one of them was not."""
    columns = [f"acc_{task}" for task in table["tasks"] or ()]
    return columns if columns and (same or set(columns) <= set(cells)) else ["mean_acc"]


def _score(rows, columns):
    """Mean and standard deviation over the seeds of the mean over some columns, and the number of seeds."""
    import pandas as pd

    if not rows or any(column not in row for row in rows for column in columns):
        return None, None, 0
    scores = pd.DataFrame(rows)[columns].mean(axis=1, skipna=False).dropna()
    if scores.empty:
        return None, None, 0
    return float(scores.mean()), float(scores.std()) if len(scores) > 1 else None, len(scores)


def _published_unmerged(table):
    """Mean of the unmerged model over a table's tasks; None if they are not known."""
    if not table["tasks"]:
        return None
    main = next(
        t
        for t in published()["tables"].values()
        if t["model"] == table["model"] and t["rows"][0]["method"] == "none"
    )
    if table["tasks"] == main["tasks"]:
        return main["rows"][0]["average"]
    return sum(main["rows"][0]["scores"][t] for t in table["tasks"]) / len(table["tasks"])


def _missing(line, ours, setting, found, before):
    """Which value a row lacks, and why."""
    parts = []
    if line["average"] is None:
        parts.append("published: a range only" if "between" in line else "published: not recovered")
    if ours is None:
        parts.append(
            "ours: no equal setting"
            if setting is None
            else f"ours: {'other tasks' if found else 'not measured'}"
        )
    elif before is None:
        parts.append("ours: unmerged not measured")
    return "; ".join(parts)


def _ratio(value, whole):
    """Their quotient, or None where one is missing."""
    return value / whole if _there(value, whole) else None


def _there(*values):
    """Whether no value is missing."""
    return all(value is not None and value == value for value in values)


def _first(rows, column):
    """A column of the first cell, or None."""
    value = rows[0].get(column) if rows else None
    return value if _there(value) else None


def _span(values):
    return "" if not values else f"{values[0]} to {values[-1]}"
