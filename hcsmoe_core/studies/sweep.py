"""Cells that are notebooks: the settings of one, and tables of what many of them measured."""

import ast
import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd

from hcsmoe_core._util import InputError, read_record, require, sha256_json, signed, write_json
from hcsmoe_core.methods import METHODS, format_settings, option_names, parse_settings, resolve
from hcsmoe_core.studies import cache, runner
from hcsmoe_core.text.calibration import calibration_settings

PACKAGE = Path(__file__).parents[1]
NAMED = ("similarity", "linkage", "merge")  # steps that are parameters of 05_accuracy; "steps" has the others
SOURCE = ("calibration", "sequences", "length")
SEED = "calibration_seed"
# What files must hold, for hcsmoe_core._util.check_kind: of a grid that was swept, and of a cell's results.
GRID = {"grid": str, "model": str, "notebook": str, "cells": [{"id": str, "parameters": dict}]}
RESULT = {
    "parameters": {"model": str, "experts?": int, "method?": (str,), "steps?": (str,)}
    | {"calibration?": (str,), "sequences?": (int,), "length?": (int,), "limit?": (int,)},
    "scores": {"tasks": {str: dict}, "loss?": {str: Real}},
    "size": dict,
}
SAMPLES = (SEED, "plan_seed")  # parameters that tell samples of one setting apart


def step_names() -> tuple[str, ...]:
    """The method, and every step and option that a cell may set."""
    return ("method", *dict.fromkeys((*NAMED, *option_names())))


def notebooks_folder() -> Path:
    """Folder of the project's notebooks: ``./notebooks`` if they are there, else that of the package."""
    places = (
        Path("notebooks"),
        PACKAGE / "notebooks",
        PACKAGE.parent / "notebooks",
    )  # of a wheel, a checkout
    return next((place for place in places if (place / "05_accuracy.ipynb").is_file()), places[0])


def notebook_path(name: str) -> Path:
    """Path of one of the project's notebooks in :func:`notebooks_folder`."""
    path = notebooks_folder() / f"{name}.ipynb"
    if not path.exists():
        raise FileNotFoundError(f"There is no notebook {path}; get them all by: hcsmoe notebooks notebooks")
    return path


def grid(base: dict, **axes: Sequence) -> list[dict]:
    """Every combination of the axes' values, each with the base parameters."""
    return [base | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def parameters_of(notebook: str | Path) -> dict:
    """Parameters of a notebook with their defaults."""
    return dict(cache.by_stat(_parameters_of, Path(notebook)))


def _parameters_of(path, *_):
    import papermill

    found = papermill.inspect_notebook(str(path))
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}


def check_parameters(notebook: str | Path, parameters: dict) -> None:
    """Raise InputError if a notebook has no parameter of some name; papermill would only warn."""
    known = parameters_of(notebook)
    unknown = ", ".join(repr(name) for name in parameters if name not in known)
    require(
        not unknown,
        f"{Path(notebook).name} has no parameter {unknown}; its parameters are {', '.join(known)}.",
    )


def chosen_steps(parameters: dict) -> dict:
    """Steps and options that a cell sets, whether they stand by name or in its parameter ``steps``."""
    given = {name: parameters.get(name) for name in (NAMED if "steps" in parameters else step_names()[1:])}
    named = {name: value for name, value in given.items() if value not in (None, "") and value == value}
    return parse_settings((parameters.get("steps") or "").split()) | named


def recipe_of(parameters: dict) -> Any:
    """What the method of a cell comes to: :func:`hcsmoe_core.methods.resolve`."""
    method = parameters.get("method")
    return resolve(method if isinstance(method, str) and method else "hc-smoe", **chosen_steps(parameters))


def canonical(parameters: dict, defaults: dict) -> dict:
    """Parameters of a cell of ``05_accuracy`` as they are run: equal for all that make and score the same
    plan.

    Whatever is the default is left out, and a method with steps of another is that other: ``{"method":
    "hc-smoe", "group": "k-means"}`` is ``{"method": "k-means"}``. Of the unmerged model nothing is left of
    method and calibration.

    Parameters
    ----------
    parameters : dict
        In which steps may stand by name.
    defaults : dict
        Of the notebook: :func:`parameters_of`.
    """
    full = defaults | parameters
    planned = (*step_names(), *SOURCE, *SAMPLES, "steps", "plugin")
    made = {name: value for name, value in full.items() if name not in planned}
    if full["experts"]:
        recipe = recipe_of(parameters)
        method, settings = _shortest(recipe)
        made |= {"method": method, SEED: full[SEED], "plugin": full.get("plugin", "")}
        made |= {name: settings.pop(name, "") for name in NAMED} | {"steps": format_settings(settings)}
        made |= _unusual(full) | ({"plan_seed": full["plan_seed"]} if recipe.random else {})
    return {name: value for name, value in made.items() if name == "model" or value != defaults.get(name, "")}


def _shortest(recipe):
    """The method, and the fewest other settings, that come to the same recipe."""
    own = {method: resolve(method).settings for method in METHODS}
    changes = {
        method: {name: value for name, value in recipe.settings.items() if usual.get(name) != value}
        for method, usual in own.items()
    }
    for method, changed in sorted(changes.items(), key=lambda item: len(item[1])):
        with contextlib.suppress(InputError):  # steps that do not go together
            if resolve(method, **changed).settings == recipe.settings:
                return method, changed
    return recipe.method, changes[recipe.method]


def _unusual(parameters):
    """Calibration settings of a cell, empty where they are what its model is calibrated on by default."""
    model, given = parameters["model"], {name: parameters[name] for name in SOURCE}
    settings = calibration_settings(model, **given)
    if settings["calibration"] == calibration_settings(model)["calibration"]:
        given["calibration"] = ""
    default = calibration_settings(model, given["calibration"])
    return given | {name: 0 for name in SOURCE[1:] if settings[name] == default[name]}


def run_cells(
    cells: Sequence[tuple],
    folder: str | Path,
    *,
    workers: int = 1,
    engine: runner.Engine | None = None,
    **options: Any,
) -> list[Path]:
    """Run notebooks side by side, each in a process of its own, and go on past those that fail.

    Parameters
    ----------
    cells : sequence of (path, dict)
        Notebooks and parameters.
    folder : path
    workers : int
        Processes of this machine, where no engine is given.
    engine : Engine, optional
    **options
        ``again``, ``retries``, ``after`` and ``description`` of :func:`hcsmoe_core.studies.runner.run`.

    Returns
    -------
    list of Path
        Executed notebooks, in the order of the cells.

    Raises
    ------
    InputError
        Before anything runs, if a notebook has no parameter of some name.
    CellsError
        When all others are done, if some failed; it names them.
    """
    for notebook, parameters in cells:
        check_parameters(notebook, parameters)
    made = [runner.notebook_cell(notebook, parameters, folder) for notebook, parameters in cells]
    with contextlib.nullcontext(engine) if engine else runner.processes(workers) as where:
        return runner.run(made, engine=where, **options)


def write_grid(folder: str | Path, name: str, model: str, *, title: str, notebook: str | Path, cells: list):
    """Keep which cells a grid has for a model, so that what is missing can be told from the folder alone.

    Parameters
    ----------
    folder : path
    name, model, title : str
    notebook : path
    cells : list of dict
        ``id`` and ``parameters``, the latter as the grid has them.
    """
    content = {"grid": name, "model": model, "title": title, "notebook": Path(notebook).stem, "cells": cells}
    write_json(Path(folder) / f"{name}-{cache.slug(model)}.grid.json", signed(content))


def grids_of(folder: str | Path, names: str = "", model: str | None = None) -> list[dict]:
    """Grids that were swept into a folder, as :func:`write_grid` keeps them.

    Parameters
    ----------
    folder : path
    names : str
        Comma-separated; empty for all.
    model : str, optional

    Raises
    ------
    FileNotFoundError
        If there is no such grid.
    """
    files = sorted(Path(folder).glob("*.grid.json"))
    read = functools.partial(read_record, kind=GRID, what="grid that was swept", remedy="Sweep again.")
    grids = [entry for entry in map(read, files) if model in (None, entry["model"])]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = list(dict.fromkeys(entry["grid"] for entry in grids))
    for name in wanted or ([] if grids else ["any grid"]):
        if name not in known:
            raise FileNotFoundError(
                f"{name}{_of(model)} was not swept into {folder}, which has {', '.join(known) or 'none'}; "
                "see hcsmoe sweep."
            )
    return [entry for name in wanted or known for entry in grids if entry["grid"] == name]


def _of(model):
    return f" of {model}" if model else ""


def _done_of(folder, entry):
    """Executed notebooks of a grid, by what the grid calls their cells."""
    return {Path(folder) / f"{entry['notebook']}-{c['id']}.ipynb": c["parameters"] for c in entry["cells"]}


def cells_of(folder: str | Path, names: str = "", model: str | None = None) -> dict[Path, dict]:
    """Cells of grids, as :func:`grids_of`: by the executed notebook, parameters as the first grid has
    them.
    """
    grids = reversed(grids_of(folder, names, model))
    return {done: given for entry in grids for done, given in _done_of(folder, entry).items()}


def status(folder: str | Path, names: str = "", model: str | None = None) -> Any:
    """How far each grid is: a row per grid and model, with its number of cells and of those in each state.

    States are those of :data:`hcsmoe_core.studies.runner.STATES`; a cell that grids share counts in each.

    Returns
    -------
    pandas.DataFrame
    """
    grids = grids_of(folder, names, model)
    states = [[runner.state_of(done) for done in _done_of(folder, entry)] for entry in grids]
    rows = [
        {"grid": entry["grid"], "model": entry["model"], "cells": len(found)}
        | {state: found.count(state) for state in runner.STATES}
        for entry, found in zip(grids, states, strict=True)
    ]
    return pd.DataFrame(rows)


def status_text(folder: str | Path, names: str = "", models: Sequence = (None,)) -> str:
    """:func:`status` and :func:`failures` of some models, in lines."""
    tables, lines = [], []
    for model in models:
        try:
            tables.append(status(folder, names, model))
            lines += failures(folder, names, model)
        except FileNotFoundError as error:
            lines.append(str(error))
    return "\n".join([*(pd.concat(tables).to_string(index=False) for _ in tables[:1]), *lines])


def failures(folder: str | Path, names: str = "", model: str | None = None) -> list[str]:
    """Cells of grids that failed: a line each, with the file of the traceback and its last line."""
    cells = cells_of(folder, names, model).items()
    failed = {done.with_suffix(".failed.txt"): g for done, g in cells if runner.state_of(done) == "failed"}
    texts = {path: path.read_text(encoding="utf-8").strip().splitlines() for path in failed}
    return [f"{path.name} {given}: {texts[path][-1]}" for path, given in failed.items()]


def table_of(folder: str | Path, names: str = "", models: Sequence = (None,)) -> Any:
    """Cells of each grid that are done, as :func:`collect` has them, with the column ``grid``.

    Returns
    -------
    pandas.DataFrame
    """
    entries = [entry for model in models for entry in grids_of(folder, names, model)]
    frames = [collect(folder, model=entry["model"], grid=entry["grid"]) for entry in entries]
    grids = pd.concat(frames, keys=[entry["grid"] for entry in entries], names=["grid", "row"])
    return grids.reset_index("grid").reset_index(drop=True)


def collect(
    folder: str | Path, notebook: str = "05_accuracy", *, model: str | None = None, grid: str = ""
) -> Any:
    """Scores of every cell of a sweep that is done, one row each; the newest of those with the same
    parameters.

    Parameters
    ----------
    folder : path
    notebook : str
    model : str, optional
    grid : str
        Grids, comma-separated, whose cells are wanted; by default all cells that are in the folder.

    Returns
    -------
    pandas.DataFrame
        Parameters; every step and option of the method that matters (missing for the unmerged model);
        ``setting`` (the method, its steps that are not its own, and what of the calibration differs among the
        rows), mean accuracy and loss, accuracy by task (``acc_TASK``) and loss by domain (``loss_DOMAIN``),
        and sizes: see :func:`hcsmoe_core.studies.tables.model_size`.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    if grid:
        declared = cells_of(folder, grid, model).items()
        measured = [(done.with_suffix(".json"), given) for done, given in declared if done.exists()]
    else:
        paths = sorted(Path(folder).glob(f"{notebook}-*.json"), key=lambda path: path.stat().st_mtime)
        newest = {sha256_json(result_of(path)["parameters"]): path for path in paths}
        measured = [(path, None) for path in newest.values()]
    rows = [row for path, given in measured if model in (None, (row := _row(path, given))["model"])]
    if not rows:
        raise FileNotFoundError(
            f"There are no {notebook} cells{_of(model)} in {folder}; run some first: ./run does on the "
            "embedded models."
        )
    merged = [row for row in rows if row.get("experts")]
    words = {"calibration": "{}", "sequences": "{} sequences", "length": "{} tokens each"}
    for name, word in words.items():
        if len({str(row[name]) for row in merged}) > 1:
            for row in merged:
                row["setting"] += ", " + word.format(row[name])
    return pd.DataFrame(rows)


def result_of(path: str | Path) -> dict:
    """What a cell left behind; InputError naming the file and the field if it is damaged."""
    remedy = "Run the same command again, which measures it anew, or remove it."
    return read_record(path, RESULT, what="result of a cell", remedy=remedy)


def _row(path, declared=None):
    """One row of :func:`collect`; the method is written as the grid has it."""
    content = result_of(path)
    scores, row = content["scores"], dict(content["parameters"])
    try:
        row = _described(row, declared)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    names = ("mean_acc", "mean_acc_stderr", "mean_acc_norm", "mean_loss")
    means = {"mean_loss": math.nan} | {name: scores[name] for name in names if name in scores}
    accuracies = {f"acc_{task}": found["acc"] for task, found in scores["tasks"].items() if "acc" in found}
    losses = {f"loss_{domain}": loss for domain, loss in scores.get("loss", {}).items()}
    return row | means | content["size"] | accuracies | losses


def _described(row, declared):
    """Parameters of a cell with its steps, options and calibration, and the name of its setting."""
    if row.get("experts"):
        steps = chosen_steps(row if declared is None else declared)
        if declared is not None:
            row |= {"method": declared.get("method", "hc-smoe")} | {n: steps.get(n, "") for n in NAMED}
        row["steps"] = format_settings({name: steps[name] for name in steps if name not in NAMED})
    row["setting"] = setting_name(row)
    if row.get("experts"):
        settings = recipe_of(row).settings.items()
        row |= {name: ",".join(map(str, v)) if isinstance(v, list) else v for name, v in settings}
        row |= calibration_settings(row["model"], *(row.get(name) for name in SOURCE))
    return row


def setting_name(parameters: dict) -> str:
    """Name of a cell's setting: its method, and the steps that are not the method's own; "original"
    unmerged.
    """
    if not parameters.get("experts"):
        return "original"
    method, chosen = parameters.get("method") or "hc-smoe", chosen_steps(parameters)
    own = resolve(method).settings
    changed = [name for name in step_names() if name in chosen and chosen[name] != own.get(name)]
    return ", ".join([method, *(format_settings({n: chosen[n]}).replace("=", " ") for n in changed)])


def over_samples(cells: Any) -> Any:
    """One row for each setting and number of experts: means over its samples, of calibration or of chance.

    Parameters
    ----------
    cells : pandas.DataFrame
        Of :func:`collect`, for one model.

    Returns
    -------
    pandas.DataFrame
        ``setting``, ``experts``, the steps and the calibration, ``samples``, ``bytes``, ``mean_acc``, its
        mean ``mean_acc_stderr`` over the items, and ``mean_loss``; ``retained``, the accuracy relative to the
        unmerged model (NaN without one); and standard deviations over the samples, ``_sd``, NaN for one
        sample.
    """
    scores = [name for name in ("mean_acc", "mean_loss") if name in cells]
    measured = [*scores, *(name for name in ("mean_acc_stderr", "bytes") if name in cells)]
    key = ["setting", "experts"]
    # a step spelt out that is the method's own makes no other setting
    once = cells.drop_duplicates([*key, *(name for name in SAMPLES if name in cells)], keep="last")
    grouped = once.groupby(key, sort=False)
    frame = grouped[[name for name in (*step_names(), *SOURCE) if name in once]].first()
    frame = frame.join(grouped[measured].mean()).join(grouped[scores].std(ddof=1).add_suffix("_sd"))
    whole = next(iter(cells.loc[cells["experts"] == 0, "mean_acc"]), math.nan)
    retained = dict(retained=frame["mean_acc"] / whole, retained_sd=frame["mean_acc_sd"] / whole)
    return frame.assign(samples=grouped.size(), **retained).reset_index()


def missing_cells(frame: Any, *axes: str) -> Any:
    """Combinations of the axes' values that no cell has, as a pandas.DataFrame."""
    wanted = itertools.product(*(sorted(frame[axis].unique()) for axis in axes))
    measured = set(frame[list(axes)].itertuples(index=False, name=None))
    return pd.DataFrame([values for values in wanted if values not in measured], columns=list(axes))


def missing_of(folder: str | Path, names: str, model: str | None = None) -> Any:
    """Cells of grids that are not done, as the grids have them, with their ``state``, as a
    pandas.DataFrame.
    """
    cells = cells_of(folder, names, model).items()
    rows = [{"state": runner.state_of(done)} | given for done, given in cells]
    frame = pd.DataFrame([row for row in rows if row["state"] != "done"])
    return frame.drop(columns="model", errors="ignore").fillna("")
