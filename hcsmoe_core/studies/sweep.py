"""Many settings of one notebook: each cell of a grid is one papermill run, done once and resumed by its name."""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import socket
import tempfile
import time
import traceback
from concurrent.futures import BrokenExecutor, CancelledError
from dataclasses import fields
from pathlib import Path

from tqdm.auto import tqdm

from hcsmoe_core._util import InputError, held, is_held, root, sha256_json, shown, write_json
from hcsmoe_core.methods.planner import METHODS, Steps, settings_from, settings_text, steps_of
from hcsmoe_core.studies import engines
from hcsmoe_core.studies.cache import calibration_of, core_hash, data_hash, slug

STEPS = ("method", *(f.name for f in fields(Steps)))


NAMED = (
    "similarity",
    "linkage",
    "merge",
)  # steps that are parameters of 05_accuracy; its parameter "steps" has the others


SOURCE = ("calibration", "sequences", "length")


STATES = ("done", "failed", "running", "interrupted", "missing")


def grid(base, **axes):
    """Every combination of the axes' values, each with the base parameters.

    Returns
    -------
    list of dict
    """
    return [base | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cell_id(notebook, parameters):
    """Name of a cell: a hash of the notebook, its parameters, the data that it reads, and the core."""
    content = hashlib.sha256(Path(notebook).read_bytes()).hexdigest()
    return sha256_json([content, parameters, data_hash(parameters), core_hash()])[:12]


def check_parameters(notebook, parameters):
    """Raise ValueError if a notebook has no parameter of some name; papermill would only warn, and measure the default."""
    known = parameters_of(notebook)
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise InputError(
            f"{Path(notebook).name} has no parameter {', '.join(map(repr, unknown))}; its parameters are {', '.join(known)}."
        )


def parameters_of(notebook):
    """Parameters of a notebook with their defaults.

    Returns
    -------
    dict
    """
    path = Path(notebook)
    return dict(_parameters_of(path, path.stat().st_mtime_ns))


@functools.lru_cache(maxsize=64)
def _parameters_of(path, written):
    import ast

    import papermill

    return {
        name: ast.literal_eval(about["default"])
        for name, about in papermill.inspect_notebook(str(path)).items()
    }


def chosen_steps(parameters):
    """Steps that a cell's parameters set, by name, whichever way they are written."""
    given = {name: parameters[name] for name in STEPS[1:] if parameters.get(name) not in (None, "")}
    return settings_from((parameters.get("steps") or "").split()) | given


def canonical(parameters, defaults):
    """Parameters of a cell of ``05_accuracy`` as they are run: equal for all that make the same plan and score it alike.

    Steps that make no difference, and whatever is the default, are left out, and a method with steps of another is that
    other: ``{"method": "hc-smoe", "group": "k-means"}`` is ``{"method": "k-means"}``. Of the unmerged model nothing is
    left of method and calibration.

    Parameters
    ----------
    parameters : dict
        In which steps may stand by name.
    defaults : dict
        Of the notebook: :func:`parameters_of`.

    Returns
    -------
    dict
    """
    full = defaults | parameters
    made = {
        name: value
        for name, value in full.items()
        if name not in (*STEPS, *SOURCE, "steps", "seed", "plan_seed")
    }
    if full["experts"]:
        steps = steps_of(full["method"], **chosen_steps(parameters))
        method, settings = _shortest(steps)
        made |= {"method": method, "seed": full["seed"]} | {name: settings.pop(name, "") for name in NAMED}
        made["steps"] = settings_text(settings)
        made["plan_seed"] = full["plan_seed"] if steps.uses_chance else defaults["plan_seed"]
        made |= _unusual(full)
    return {name: value for name, value in made.items() if name == "model" or value != defaults[name]}


def _shortest(steps):
    """The method, and its fewest other steps, that make the same plan."""
    best = None
    for method, known in METHODS.items():
        settings = {f.name: getattr(steps, f.name) for f in fields(Steps)}
        settings = {name: value for name, value in settings.items() if value != getattr(known.steps, name)}
        for name in list(settings):
            fewer = {other: value for other, value in settings.items() if other != name}
            with contextlib.suppress(ValueError):  # steps that do not go together
                if steps_of(method, **fewer).plain() == steps.plain():
                    settings = fewer
        if best is None or len(settings) < len(best[1]):
            best = method, settings
    return best


def _unusual(parameters):
    """Calibration settings of a cell that are not those that its model is calibrated by if nothing is said."""
    given = {name: parameters[name] for name in SOURCE}
    found = calibration_of(parameters["model"], **given)
    usual = calibration_of(parameters["model"])
    if found["calibration"] == usual["calibration"]:
        given["calibration"] = ""
    default = calibration_of(parameters["model"], given["calibration"])
    return given | {name: 0 for name in SOURCE[1:] if found[name] == default[name]}


def run_cell(notebook, parameters, folder, *, again=False, threads=None, expected=""):
    """Run one cell, unless it is done; if another process is at it, wait for that one.

    Parameters
    ----------
    notebook : path
    parameters : dict
        ``results`` is filled in: the cell's results lie beside its executed notebook.
    folder : path
        The executed notebook is there as ``NOTEBOOK-ID.ipynb`` if and only if it ran to its end.
    again : bool
        Run it even if it is done.
    threads : int, optional
        CPU threads of the kernel.
    expected : str
        The cell's id where it was asked for, which must be the id here.

    Returns
    -------
    Path
        Of the executed notebook.

    Raises
    ------
    ValueError
        If the notebook has no such parameter.
    RuntimeError
        If hcsmoe, the notebook or the data are others here than where the cell was asked for.
    papermill.PapermillExecutionError
        If a cell fails; what ran is kept as ``NOTEBOOK-ID.failed.ipynb``, the traceback as ``NOTEBOOK-ID.failed.txt``.
    """
    notebook, folder = Path(notebook), Path(folder)
    check_parameters(notebook, parameters)
    name = cell_id(notebook, parameters)
    if expected not in ("", name):
        raise RuntimeError(
            f"{socket.gethostname()} has another version of hcsmoe, or other data, than where the sweep started."
        )
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / f"{notebook.stem}-{name}.ipynb"
    with held(done):
        if done.exists() and not again:
            return done
        _forget(done)
        if threads:
            os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            _execute(notebook, parameters | {"results": str(done.with_suffix(".json"))}, _part_of(done))
            _part_of(done).replace(done)
        except Exception:
            write_failure(done, traceback.format_exc())
            if _part_of(done).exists():
                _part_of(done).replace(done.with_suffix(".failed.ipynb"))
            raise
        finally:
            _part_of(done).unlink(missing_ok=True)
    return done


def _execute(notebook, parameters, out):
    """Run a notebook into a file."""
    import papermill
    from traitlets.config import Config

    # Kernels that start at the same time race for TCP ports; sockets in a folder of their own cannot collide.
    with tempfile.TemporaryDirectory(prefix="hcsmoe-") as sockets:
        papermill.execute_notebook(
            str(notebook),
            str(out),
            parameters=parameters,
            progress_bar=False,
            store_widget_state=False,
            config=Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets) / "kernel")}),
            extra_arguments=["--log-level=50"],  # a kernel that is shut down calls the interrupt an error
        )


def _part_of(done):
    """Where a cell is written while it runs; only the process that holds its lock does."""
    return done.with_name(f".{done.stem}.part.ipynb")


def _forget(done):
    """Remove what a run that failed, or was killed, has left of a cell."""
    for path in (_part_of(done), done.with_suffix(".failed.ipynb"), done.with_suffix(".failed.txt")):
        path.unlink(missing_ok=True)


def write_failure(done, text):
    """Keep why a cell failed."""
    done.with_suffix(".failed.txt").write_text(re.sub(r"\x1b\[[0-9;]*m", "", text), encoding="utf-8")


def state_of(done):
    """One of :data:`STATES`; "interrupted" where the process that ran it is gone, which is missing but for a trace.

    Parameters
    ----------
    done : Path
        Of the executed notebook.
    """
    if done.exists():
        return "done"
    if is_held(done):
        return "running"
    if done.with_suffix(".failed.txt").exists():
        return "failed"
    return "interrupted" if _part_of(done).exists() else "missing"


def run_cells(
    cells, folder, *, workers=1, engine=None, again=False, retries=0, after=None, description="cells"
):
    """Run cells side by side, each in a process of its own, and go on past those that fail.

    Parameters
    ----------
    cells : list of (path, dict)
        Notebooks and parameters.
    folder : path
    workers : int
        Processes of this machine, where no engine is given.
    engine : hcsmoe_core.engines.Engine, optional
    again : bool
        Run cells even if they are done.
    retries : int
        How often a cell that fails is tried again. One whose worker dies is, up to :data:`hcsmoe_core.studies.engines.DEATHS` times.
    after : dict of int to int
        By its place, the cell that one waits for.
    description : str
        Of the progress bar.

    Returns
    -------
    list of Path
        Executed notebooks, in the order of the cells.

    Raises
    ------
    ValueError
        Before anything runs, if a notebook has no parameter of some name.
    RuntimeError
        When all others are done, if some failed; it names them.
    """
    for notebook, parameters in cells:
        check_parameters(notebook, parameters)
    folder = Path(folder)
    places = [
        folder / f"{Path(notebook).stem}-{cell_id(notebook, parameters)}.ipynb"
        for notebook, parameters in cells
    ]
    with contextlib.ExitStack() as stack:
        engine = engine or stack.enter_context(engines.processes(workers))
        failed = _Run(cells, places, engine, again, retries).go(after or {}, description)
    if failed:
        reasons = [
            f"{Path(cells[i][0]).name} {cells[i][1]}: {reason}" for i, reason in sorted(failed.items())
        ]
        raise RuntimeError(
            f"{len(failed)} of {len(cells)} cells failed; run again to retry them.\n  "
            + "\n  ".join(reasons)
            + f"\nTheir tracebacks are in {shown(folder)}, in files .failed.txt."
        )
    return places


class _Run:
    """Cells on their way through an executor."""

    def __init__(self, cells, places, engine, again, retries):
        self.cells, self.places, self.engine, self.again, self.retries = cells, places, engine, again, retries
        self.tries, self.failed = dict.fromkeys(range(len(cells)), 0), {}

    def go(self, after, description):
        """Run them all; why some failed, by place."""
        kept = {i for i, done in enumerate(self.places) if done.exists() and not self.again}
        blocked = {i: first for i, first in after.items() if not {i, first} & kept}
        ready, running = [i for i in self.tries if i not in kept and i not in blocked], {}
        with tqdm(total=len(self.cells), initial=len(kept), desc=description, unit="cell") as bar:
            while ready or running:
                while ready and len(running) < (self.engine.window or len(self.cells)):
                    place = ready.pop(0)
                    running[self._submit(place)] = place
                for future in concurrent.futures.wait(
                    running, return_when=concurrent.futures.FIRST_COMPLETED
                ).done:
                    place = running.pop(future)
                    if self._wants_again(place, future):
                        ready.insert(0, place)
                        continue
                    ready += [i for i, first in blocked.items() if first == place]
                    blocked = {i: first for i, first in blocked.items() if first != place}
                    bar.set_postfix({"failed": len(self.failed)} if self.failed else {}, refresh=False)
                    bar.update()
        return self.failed

    def _submit(self, place):
        (notebook, parameters), done = self.cells[place], self.places[place]
        how = dict(again=self.again, threads=self.engine.threads, expected=done.stem.rpartition("-")[2])
        return self.engine.executor.submit(run_cell, str(notebook), parameters, str(done.parent), **how)

    def _wants_again(self, place, future):
        """Whether a cell that is over is to be tried again; what failed for good is kept."""
        try:
            error = future.exception()
        except CancelledError:
            raise RuntimeError(
                "The Dask scheduler is gone; the same command goes on where this one was."
            ) from None
        if error is None:
            return False
        self.tries[place] += 1
        if self.tries[place] <= (engines.DEATHS if isinstance(error, BrokenExecutor) else self.retries):
            return True
        text = str(error).strip() or type(error).__name__
        self.failed[place] = text.splitlines()[-1]
        if _settled(self.places[place]) in ("missing", "interrupted"):  # it could not tell itself
            self.places[place].parent.mkdir(parents=True, exist_ok=True)
            write_failure(self.places[place], f"{type(error).__name__}: {text}")
        return False


def _settled(done, seconds=10):
    """State of a cell that is over: the lock of a process that was killed may outlive it for a moment."""
    until = time.monotonic() + seconds
    while (state := state_of(done)) == "running" and time.monotonic() < until:
        time.sleep(0.05)
    return state


def write_grid(folder, name, model, *, title, notebook, cells):
    """Keep which cells a grid has for a model, so that what is missing can be told from the folder alone.

    Parameters
    ----------
    folder : path
    name, model, title : str
    notebook : path
    cells : list of dict
        ``id`` and ``parameters``, the latter as the grid has them.
    """
    about = {"grid": name, "model": model, "title": title, "notebook": Path(notebook).stem, "cells": cells}
    write_json(Path(folder) / f"{name}-{slug(model)}.grid.json", about)


def grids_of(folder, names="", model=None):
    """Grids that were swept into a folder, as :func:`write_grid` has kept them.

    Parameters
    ----------
    folder : path
    names : str
        Comma-separated; empty for all.
    model : str, optional

    Returns
    -------
    list of dict

    Raises
    ------
    FileNotFoundError
        If there is no such grid.
    """
    found = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.grid.json"))
    ]
    found = [about for about in found if model is None or about["model"] == model]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = [about["grid"] for about in found]
    for name in wanted or ([] if found else ["any grid"]):
        if name not in known:
            what = f"{name} of {model}" if model else name
            raise FileNotFoundError(
                f"{what} was not swept into {folder}, which has {', '.join(dict.fromkeys(known)) or 'none'}; see hcsmoe sweep."
            )
    return [about for name in wanted or dict.fromkeys(known) for about in found if about["grid"] == name]


def cells_of(folder, names="", model=None):
    """Cells of grids, one each: a cell that several have is the first one's.

    Returns
    -------
    dict of Path to dict
        By the executed notebook, ``parameters`` as the grid has them.
    """
    found = {}
    for about in grids_of(folder, names, model):
        for cell in about["cells"]:
            found.setdefault(Path(folder) / f"{about['notebook']}-{cell['id']}.ipynb", cell["parameters"])
    return found


def status(folder, names="", model=None):
    """How far each grid is: a row for each grid and model, with the number of cells in each of :data:`STATES`.

    Cells that grids share count in each of them.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    rows = []
    for about in grids_of(folder, names, model):
        states = [
            state_of(Path(folder) / f"{about['notebook']}-{cell['id']}.ipynb") for cell in about["cells"]
        ]
        row = {"grid": about["grid"], "model": about["model"], "cells": len(states)}
        rows.append(row | {state: states.count(state) for state in STATES})
    return pd.DataFrame(rows)


def status_text(folder, names="", models=(None,)):
    """:func:`status` and :func:`failures` of some models, in lines."""
    import pandas as pd

    tables, lines = [], []
    for model in models:
        try:
            tables.append(status(folder, names, model))
            lines += failures(folder, names, model)
        except FileNotFoundError as error:
            lines.append(str(error))
    return "\n".join([*(pd.concat(tables).to_string(index=False) for _ in tables[:1]), *lines])


def table_of(folder, names="", models=(None,)):
    """Cells of each grid that are done, as :func:`collect` has them, with a column ``grid``: those that grids share, in each.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    found = [(about["grid"], about["model"]) for model in models for about in grids_of(folder, names, model)]
    frames = [collect(folder, model=model, grid=grid).assign(grid=grid) for grid, model in found]
    frame = pd.concat(frames, ignore_index=True)
    return frame[["grid", *(name for name in frame if name != "grid")]]


def failures(folder, names="", model=None):
    """Cells of grids that failed: a line each, with the file of the traceback and its last line."""
    lines = []
    for done, parameters in cells_of(folder, names, model).items():
        if state_of(done) == "failed":
            text = done.with_suffix(".failed.txt").read_text(encoding="utf-8").strip()
            lines.append(f"{done.stem}.failed.txt {parameters}: {text.splitlines()[-1]}")
    return lines


def collect(folder, notebook="05_accuracy", *, model=None, grid=""):
    """Scores of every cell of a sweep that is done, one row each; the newest of those with the same parameters.

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
        Parameters; every step of the method (missing for the unmerged model); ``setting`` (the method, its steps that are
        not its own, and what of the calibration differs among the rows), mean accuracy and loss, accuracy by task
        (``acc_TASK``) and loss by domain (``loss_DOMAIN``), and sizes: see :func:`hcsmoe_core.studies.tables.model_size`.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    import pandas as pd

    if grid:
        declared = cells_of(folder, grid, model)
        contents = [(_results(done), given) for done, given in declared.items() if done.exists()]
    else:
        newest = {}
        for path in sorted(Path(folder).glob(f"{notebook}-*.json"), key=lambda p: p.stat().st_mtime):
            content = _results(path)
            newest[sha256_json(content["parameters"])] = content
        contents = [(content, None) for content in newest.values()]
    contents = [
        (content, given) for content, given in contents if model in (None, content["parameters"]["model"])
    ]
    if not contents:
        what = f"{notebook} cells of {model}" if model else f"{notebook} cells"
        raise FileNotFoundError(
            f"There are no {what} in {folder}; run some first: ./run does on the embedded models."
        )
    return pd.DataFrame(_told_apart([_row(content, given) for content, given in contents]))


def _results(done):
    return json.loads(done.with_suffix(".json").read_text(encoding="utf-8"))


def _row(content, declared=None):
    """One row of :func:`collect`; the method is written as the grid has it."""
    scores, row = content["scores"], dict(content["parameters"])
    if declared is not None and row["experts"]:
        given = {name: declared[name] for name in ("method", *NAMED) if name in declared}
        others = {n: v for n, v in chosen_steps(declared).items() if n not in NAMED}
        row |= {"method": "hc-smoe"} | dict.fromkeys(NAMED, "") | given | {"steps": settings_text(others)}
    row["setting"] = setting_name(row)
    if row.get("experts"):
        steps = steps_of(row.get("method", "hc-smoe"), **chosen_steps(row))
        row |= {f.name: getattr(steps, f.name) for f in fields(Steps)} | {
            "centres": settings_text({"": steps.centres})[1:]
        }
        row |= calibration_of(row["model"], *(row.get(name) for name in SOURCE))
    row["mean_loss"] = float("nan")  # where no text was scored
    row |= {
        k: scores[k] for k in ("mean_acc", "mean_acc_stderr", "mean_acc_norm", "mean_loss") if k in scores
    }
    row |= content["size"]
    row |= {f"acc_{t}": v["acc"] for t, v in scores["tasks"].items() if "acc" in v}
    return row | {f"loss_{d}": v for d, v in scores.get("loss", {}).items()}


def _told_apart(rows):
    """Rows whose calibration differs have it in their ``setting``."""
    merged = [row for row in rows if row.get("experts")]
    words = {"calibration": "{}", "sequences": "{} sequences", "length": "{} tokens each"}
    for name, word in words.items():
        if len({str(row[name]) for row in merged}) > 1:
            for row in merged:
                row["setting"] += ", " + word.format(row[name])
    return rows


def setting_name(parameters):
    """Name of a cell's setting: its method, and those of its steps that are not the method's own; "original" unmerged."""
    if not parameters.get("experts"):
        return "original"
    method = parameters.get("method") or "hc-smoe"
    own, chosen = steps_of(method), chosen_steps(parameters)
    changed = [s for s in STEPS[1:] if s in chosen and chosen[s] != getattr(own, s)]
    return ", ".join([method, *(settings_text({s: chosen[s]}).replace("=", " ") for s in changed)])


def over_samples(cells):
    """One row for each setting and number of experts: means over its samples, of calibration or of chance.

    Parameters
    ----------
    cells : pandas.DataFrame
        Of :func:`collect`, for one model.

    Returns
    -------
    pandas.DataFrame
        ``setting``, ``experts``, the steps and the calibration, ``samples``, ``bytes``, ``mean_acc``, its mean
        ``mean_acc_stderr`` over the items, and ``mean_loss``; ``retained``, the accuracy relative to the unmerged model (NaN
        without one); and standard deviations over the samples, ``_sd``, NaN for one sample.
    """
    measured = [key for key in ("mean_acc", "mean_acc_stderr", "mean_loss", "bytes") if key in cells]
    sample = [name for name in ("seed", "plan_seed") if name in cells]
    once = cells.drop_duplicates(
        ["setting", "experts", *sample], keep="last"
    )  # a step spelt out that is the method's own
    grouped = once.groupby(["setting", "experts"], sort=False)
    frame = grouped[[c for c in (*STEPS, *SOURCE) if c in once]].first().join(grouped[measured].mean())
    scores = [key for key in ("mean_acc", "mean_loss") if key in cells]
    frame = frame.join(grouped[scores].std(ddof=1).add_suffix("_sd")).assign(samples=grouped.size())
    original = cells.loc[cells["experts"] == 0, "mean_acc"]
    whole = original.iloc[0] if len(original) else float("nan")
    return frame.assign(
        retained=frame["mean_acc"] / whole, retained_sd=frame["mean_acc_sd"] / whole
    ).reset_index()


def missing_cells(frame, *axes):
    """Combinations of the axes' values that no cell has.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    wanted = itertools.product(*(sorted(frame[a].unique()) for a in axes))
    measured = set(frame[list(axes)].itertuples(index=False, name=None))
    return pd.DataFrame([w for w in wanted if w not in measured], columns=list(axes))


def missing_of(folder, names, model=None):
    """Cells that grids have and that are not done, as the grids have them, with their ``state``.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    rows = [{"state": state_of(done)} | given for done, given in cells_of(folder, names, model).items()]
    return (
        pd.DataFrame([row for row in rows if row["state"] != "done"])
        .drop(columns="model", errors="ignore")
        .fillna("")
    )


def notebook_path(name):
    """Path of one of the project's notebooks."""
    path = root() / "notebooks" / f"{name}.ipynb"
    if not path.exists():
        raise FileNotFoundError(
            f"There is no notebook {path}; the notebooks come with the repository, not with the package."
        )
    return path
