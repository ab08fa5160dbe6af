"""Cells that are notebooks: the settings of one, and tables of what many of them measured."""

import ast
import contextlib
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from hcsmoe_core._util import InputError, sha256_json, write_json
from hcsmoe_core.methods import METHODS, format_settings, option_names, parse_settings, resolve
from hcsmoe_core.studies import engines, runner
from hcsmoe_core.studies.cache import slug
from hcsmoe_core.studies.runner import STATES, notebook_id, results_of, state_of, write_failure
from hcsmoe_core.text.calibration import calibration_settings

__all__ = ["STATES", "state_of", "write_failure"]

PACKAGE = Path(__file__).parents[1]
NAMED = ("similarity", "linkage", "merge")  # steps that are parameters of 05_accuracy; "steps" has the others
SOURCE = ("calibration", "sequences", "length")
SEED = "calibration_seed"
SAMPLES = (SEED, "plan_seed")  # parameters that tell samples of one setting apart
cell_id = notebook_id


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
    path = Path(notebook)
    return dict(_parameters_of(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _parameters_of(path, written):
    import papermill

    found = papermill.inspect_notebook(str(path))
    return {name: ast.literal_eval(parameter["default"]) for name, parameter in found.items()}


def check_parameters(notebook: str | Path, parameters: dict) -> None:
    """Raise InputError if a notebook has no parameter of some name; papermill would only warn."""
    known = parameters_of(notebook)
    unknown = ", ".join(repr(name) for name in parameters if name not in known)
    if unknown:
        raise InputError(
            f"{Path(notebook).name} has no parameter {unknown}; its parameters are {', '.join(known)}."
        )


def chosen_steps(parameters: dict) -> dict:
    """Steps and options that a cell sets, whether they stand by name or in its parameter ``steps``."""
    names = NAMED if "steps" in parameters else step_names()[1:]
    given = {name: parameters.get(name) for name in names}
    given = {name: value for name, value in given.items() if value not in (None, "") and value == value}
    return parse_settings((parameters.get("steps") or "").split()) | given


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
    best = None
    for method in METHODS:
        own = resolve(method).settings
        changed = {name: value for name, value in recipe.settings.items() if own.get(name) != value}
        with contextlib.suppress(InputError):  # steps that do not go together
            if best is None or len(changed) < len(best[1]):
                same = resolve(method, **changed).settings == recipe.settings
                best = (method, changed) if same else best
    return best


def _unusual(parameters):
    """Calibration settings of a cell, empty where they are what its model is calibrated on by default."""
    model, given = parameters["model"], {name: parameters[name] for name in SOURCE}
    settings = calibration_settings(model, **given)
    if settings["calibration"] == calibration_settings(model)["calibration"]:
        given["calibration"] = ""
    default = calibration_settings(model, given["calibration"])
    return given | {name: 0 for name in SOURCE[1:] if settings[name] == default[name]}


def run_cell(notebook: str | Path, parameters: dict, folder: str | Path, *, again: bool = False) -> Path:
    """Run one notebook, unless it is done; see :func:`hcsmoe_core.studies.runner.complete`.

    The executed notebook is in the folder as ``NOTEBOOK-ID.ipynb`` if and only if it ran to its end, with its
    results beside it (the parameter ``results`` is filled in).
    """
    check_parameters(notebook, parameters)
    return runner.complete(runner.notebook_cell(notebook, parameters, folder), again=again)


def run_cells(
    cells: Sequence[tuple],
    folder: str | Path,
    *,
    workers: int = 1,
    engine: engines.Engine | None = None,
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
    with contextlib.ExitStack() as stack:
        engine = engine or stack.enter_context(engines.processes(workers))
        return runner.run(made, engine=engine, **options)


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
    write_json(Path(folder) / f"{name}-{slug(model)}.grid.json", content)


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
    grids = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.grid.json"))
    ]
    grids = [entry for entry in grids if model is None or entry["model"] == model]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = list(dict.fromkeys(entry["grid"] for entry in grids))
    for name in wanted or ([] if grids else ["any grid"]):
        if name not in known:
            what = f"{name} of {model}" if model else name
            raise FileNotFoundError(
                f"{what} was not swept into {folder}, which has {', '.join(known) or 'none'}; see hcsmoe "
                "sweep."
            )
    return [entry for name in wanted or known for entry in grids if entry["grid"] == name]


def _done_of(folder, entry):
    """Executed notebooks of a grid, by what the grid calls their cells."""
    return {Path(folder) / f"{entry['notebook']}-{c['id']}.ipynb": c["parameters"] for c in entry["cells"]}


def cells_of(folder: str | Path, names: str = "", model: str | None = None) -> dict[Path, dict]:
    """Cells of grids, as :func:`grids_of`: by the executed notebook, parameters as the first grid has
    them.
    """
    found = {}
    for entry in grids_of(folder, names, model):
        found = _done_of(folder, entry) | found
    return found


def status(folder: str | Path, names: str = "", model: str | None = None) -> Any:
    """How far each grid is: a row per grid and model, with the number of cells in each of :data:`STATES`.

    Cells that grids share count in each of them.

    Returns
    -------
    pandas.DataFrame
    """
    rows = []
    for entry in grids_of(folder, names, model):
        states = [state_of(done) for done in _done_of(folder, entry)]
        row = {"grid": entry["grid"], "model": entry["model"], "cells": len(states)}
        rows.append(row | {state: states.count(state) for state in STATES})
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
    lines = []
    for done, parameters in cells_of(folder, names, model).items():
        if state_of(done) == "failed":
            text = done.with_suffix(".failed.txt").read_text(encoding="utf-8").strip()
            lines.append(f"{done.stem}.failed.txt {parameters}: {text.splitlines()[-1]}")
    return lines


def table_of(folder: str | Path, names: str = "", models: Sequence = (None,)) -> Any:
    """Cells of each grid that are done, as :func:`collect` has them, with the column ``grid``.

    Returns
    -------
    pandas.DataFrame
    """
    entries = [entry for model in models for entry in grids_of(folder, names, model)]
    frames = []
    for entry in entries:
        frame = collect(folder, model=entry["model"], grid=entry["grid"])
        frame.insert(0, "grid", entry["grid"])
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


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
        contents = [(results_of(done), given) for done, given in declared if done.exists()]
    else:
        paths = sorted(Path(folder).glob(f"{notebook}-*.json"), key=lambda path: path.stat().st_mtime)
        newest = {sha256_json(c["parameters"]): c for c in map(results_of, paths)}
        contents = [(content, None) for content in newest.values()]
    rows = [
        _row(content, given) for content, given in contents if model in (None, content["parameters"]["model"])
    ]
    if not rows:
        what = f"{notebook} cells of {model}" if model else f"{notebook} cells"
        raise FileNotFoundError(
            f"There are no {what} in {folder}; run some first: ./run does on the embedded models."
        )
    merged = [row for row in rows if row.get("experts")]
    words = {"calibration": "{}", "sequences": "{} sequences", "length": "{} tokens each"}
    for name, word in words.items():
        if len({str(row[name]) for row in merged}) > 1:
            for row in merged:
                row["setting"] += ", " + word.format(row[name])
    return pd.DataFrame(rows)


def _row(content, declared=None):
    """One row of :func:`collect`; the method is written as the grid has it."""
    scores, row = content["scores"], dict(content["parameters"])
    if declared is not None and row["experts"]:
        steps = chosen_steps(declared)
        row |= {"method": declared.get("method", "hc-smoe")} | {name: steps.pop(name, "") for name in NAMED}
        row["steps"] = format_settings(steps)
    row["setting"] = setting_name(row)
    if row.get("experts"):
        settings, steps = recipe_of(row).settings, chosen_steps(row)
        row["steps"] = format_settings({name: steps[name] for name in steps if name not in NAMED})
        row |= {n: ",".join(map(str, v)) if isinstance(v, list) else v for n, v in settings.items()}
        row |= calibration_settings(row["model"], *(row.get(name) for name in SOURCE))
    row["mean_loss"] = float("nan")  # where no text was scored
    names = ("mean_acc", "mean_acc_stderr", "mean_acc_norm", "mean_loss")
    row |= {name: scores[name] for name in names if name in scores} | content["size"]
    row |= {f"acc_{task}": found["acc"] for task, found in scores["tasks"].items() if "acc" in found}
    return row | {f"loss_{domain}": loss for domain, loss in scores.get("loss", {}).items()}


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
    original = cells.loc[cells["experts"] == 0, "mean_acc"]
    whole = original.iloc[0] if len(original) else float("nan")
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
    rows = [{"state": state_of(done)} | given for done, given in cells_of(folder, names, model).items()]
    frame = pd.DataFrame([row for row in rows if row["state"] != "done"])
    return frame.drop(columns="model", errors="ignore").fillna("")
