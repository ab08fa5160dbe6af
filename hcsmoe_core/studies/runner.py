"""The one runner: cells that are measured once each, kept in files and resumed by their names, here or on an
engine.

A cell is a piece of work that writes one file: a function of its settings, run in this process, or a
notebook, run by papermill. It is done if its file is there. Locks keep two processes from measuring the same;
a cell that failed leaves its traceback in ``.failed.txt`` beside, and is tried again by the next run.
"""

import concurrent.futures
import contextlib
import os
import re
import socket
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, CancelledError
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hcsmoe_core._util import read_json, sha256_file, write_json
from hcsmoe_core.studies import engines
from hcsmoe_core.studies.cache import function_hash, is_locked, key, locked

STATES = ("done", "failed", "running", "interrupted", "missing")


class CellsError(RuntimeError):
    """Some cells could not be measured; all others were."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes
    ----------
    done : Path
        File that is there if and only if the cell was measured.
    work : callable
        Called with the path to write, which is then renamed to ``done``; it must be picklable to run on an
        engine.
    text : str
        What errors call it.
    """

    done: Path
    work: Callable
    text: str = ""


def complete(cell: Cell, *, again: bool = False, threads: int | None = None) -> Path:
    """Do a cell's work, unless it is done; if another process is at it, wait for that one.

    Parameters
    ----------
    cell : Cell
    again : bool
        Do it even if it is done.
    threads : int, optional
        CPU threads of the processes that the work starts.

    Raises
    ------
    Exception
        Whatever the work raises; the traceback is kept as ``….failed.txt``, what was written as ``….failed``
        with the suffix of the file.
    """
    done, part = cell.done, part_of(cell.done)
    failed = done.with_suffix(f".failed{done.suffix}")
    done.parent.mkdir(parents=True, exist_ok=True)
    with locked(done):
        if done.exists() and not again:
            return done
        for path in (part, failed, done.with_suffix(".failed.txt")):  # of a run that failed or was killed
            path.unlink(missing_ok=True)
        try:
            with _environment(threads):
                cell.work(part)
            part.replace(done)
        except Exception:
            write_failure(done, traceback.format_exc())
            if part.exists():
                part.replace(failed)
            raise
        finally:
            part.unlink(missing_ok=True)
    return done


@contextlib.contextmanager
def _environment(threads):
    """Environment for processes that are started in the block, and this one's restored after it."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) if threads else {}
    before = dict(os.environ)
    os.environ |= limits | {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ |= before


def part_of(done: Path) -> Path:
    """File that a cell writes while it runs; only the process that holds its lock does."""
    return done.with_name(f".{done.stem}.part{done.suffix}")


def write_failure(done: Path, text: str) -> None:
    """Keep why a cell failed."""
    done.with_suffix(".failed.txt").write_text(re.sub(r"\x1b\[[0-9;]*m", "", text), encoding="utf-8")


def state_of(done: Path) -> str:
    """One of :data:`STATES`; "interrupted" where the process that measured it is gone and left a part."""
    if done.exists():
        return "done"
    if is_locked(done):
        return "running"
    if done.with_suffix(".failed.txt").exists():
        return "failed"
    return "interrupted" if part_of(done).exists() else "missing"


def run(
    cells: Sequence[Cell],
    *,
    engine: engines.Engine | None = None,
    again: bool = False,
    retries: int = 0,
    after: dict | None = None,
    description: str = "cells",
) -> list[Path]:
    """Measure all cells that are not done, past those that fail; the files of all cells, in their order.

    Parameters
    ----------
    cells : sequence of Cell
    engine : Engine, optional
        By default this process, one cell after another.
    again : bool
        Measure cells even if they are done.
    retries : int
        How often a cell that fails is tried again. One whose worker dies is, up to
        :data:`hcsmoe_core.studies.engines.DEATHS` times.
    after : dict of int to int
        By index, the cell that one waits for.
    description : str
        Of the progress bar.

    Raises
    ------
    CellsError
        When all others are done, if some failed; it names them.
    """
    engine, tries, failed, running = engine or engines.here(), Counter(), {}, {}
    done = {i for i, cell in enumerate(cells) if cell.done.exists() and not again}
    blocked = {i: first for i, first in (after or {}).items() if not {i, first} & done}
    ready = [i for i in range(len(cells)) if i not in done and i not in blocked]
    with tqdm(total=len(cells), initial=len(done), desc=description, unit="cell") as bar:
        while ready or running:
            while ready and len(running) < (engine.window or len(cells)):
                i, options = ready.pop(0), dict(again=again, threads=engine.threads)
                running[engine.executor.submit(complete, cells[i], **options)] = i
            finished = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done
            for i, error in ((running.pop(future), _error_of(future)) for future in finished):
                tries[i] += 1
                if error and tries[i] <= (engines.DEATHS if isinstance(error, BrokenExecutor) else retries):
                    ready.insert(0, i)
                    continue
                if error:
                    failed[i] = error
                    _keep_failure(cells[i].done, error)
                ready += [waiting for waiting, first in blocked.items() if first == i]
                blocked = {waiting: first for waiting, first in blocked.items() if first != i}
                bar.set_postfix({"failed": len(failed)} if failed else {}, refresh=False)
                bar.update()
    if failed:
        _raise_failed(cells, failed)
    return [cell.done for cell in cells]


def _error_of(future):
    try:
        return future.exception()
    except CancelledError:
        raise RuntimeError(
            "The Dask scheduler is gone; the same command goes on where this one was."
        ) from None


def _keep_failure(done, error, seconds=10):
    """Keep why a cell failed whose worker died before it could tell."""
    until = time.monotonic() + seconds
    while (state := state_of(done)) == "running" and time.monotonic() < until:
        time.sleep(0.05)  # the lock of a process that was killed may outlive it for a moment
    if state in ("missing", "interrupted"):
        done.parent.mkdir(parents=True, exist_ok=True)
        write_failure(done, f"{type(error).__name__}: {error}")


def _raise_failed(cells, failed):
    reasons = []
    for i, error in sorted(failed.items()):
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        reasons.append(f"{cells[i].text}: {last}")
    folder = cells[min(failed)].done.parent
    raise CellsError(
        f"{len(failed)} of {len(cells)} cells failed; run again to retry them.\n  "
        + "\n  ".join(reasons)
        + f"\nTheir tracebacks are in {folder}, in files .failed.txt."
    ) from failed[min(failed)]


def measure(
    function: Callable[[dict], dict],
    cells: Sequence[dict],
    folder: str | Path,
    *,
    shared: dict,
    model: str | None = None,
    prefix: str = "",
    text: Callable[[dict], str] = str,
    description: str = "cells",
) -> list[dict]:
    """What a function gives for each of several settings, measured once each, in this process.

    Parameters
    ----------
    function : callable
        Of a cell's settings (``shared`` and its own) to what is kept of it, a JSON value. Its code is part of
        the key.
    cells : sequence of dict
    folder : str or path
        A cell is kept there as ``PREFIXKEY.json``.
    shared : dict
        Settings of all cells.
    model : str, optional
        As for :func:`hcsmoe_core.studies.cache.key`.
    text : callable
        What errors call a cell.
    description : str
        Of the progress bar.

    Raises
    ------
    CellsError
        As :func:`run`.
    """
    code, made = function_hash(function), []
    for cell in cells:
        done = Path(folder) / f"{prefix}{key(shared | cell, model=model, code=code)}.json"
        made.append(Cell(done, partial(_write_result, function, shared | cell), text(cell)))
    return [read_json(done) for done in run(made, description=description)]


def _write_result(function, settings, path):
    write_json(path, function(settings))


def notebook_id(notebook: str | Path, parameters: dict) -> str:
    """Key of a cell that is a notebook with some parameters."""
    return key(parameters, code=sha256_file(notebook))


def notebook_cell(notebook: str | Path, parameters: dict, folder: str | Path) -> Cell:
    """A notebook with parameters as a cell: executed it lies in the folder as ``NOTEBOOK-KEY.ipynb``, with
    its results.
    """
    name = notebook_id(notebook, parameters)
    work = partial(_execute, str(notebook), parameters, name)
    done = Path(folder) / f"{Path(notebook).stem}-{name}.ipynb"
    return Cell(done, work, f"{Path(notebook).name} {parameters}")


def _execute(notebook, parameters, expected, path):
    """Run a notebook into a file; its results go beside where that file will be."""
    import papermill
    from traitlets.config import Config

    if notebook_id(notebook, parameters) != expected:
        raise RuntimeError(
            f"{socket.gethostname()} has another version of hcsmoe, or other data, than where the sweep "
            "started."
        )
    results = path.with_name(f"{Path(notebook).stem}-{expected}.json")
    # Kernels that start at the same time race for TCP ports; sockets in a folder of their own cannot collide.
    with tempfile.TemporaryDirectory(prefix="hcsmoe-") as sockets:
        papermill.execute_notebook(
            notebook,
            str(path),
            parameters=parameters | {"results": str(results)},
            progress_bar=False,
            store_widget_state=False,
            config=Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets) / "kernel")}),
            extra_arguments=["--log-level=50"],  # a kernel that is shut down calls the interrupt an error
        )


def results_of(done: Path) -> Any:
    """Results that a notebook left beside its executed file."""
    return read_json(done.with_suffix(".json"))
