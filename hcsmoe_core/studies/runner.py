"""The one runner: cells that are measured once each, kept in files and resumed by their names.

A cell is a piece of work that writes one file: a function of its settings, run in this process, or a
notebook, run by papermill. It is done if its file is there. Locks keep two processes from measuring the same;
a cell that failed leaves its traceback in ``.failed.txt`` beside, and is tried again by the next run.

An engine says where cells run: in this process, in processes of this machine, or on a Dask cluster's workers,
behind ``Executor.submit``.
"""

import contextlib
import importlib
import multiprocessing
import os
import re
import signal
import socket
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from hcsmoe_core._util import (
    InputError,
    MissingPackageError,
    check_count,
    is_locked,
    locked,
    read_record,
    require,
    sha256_file,
    signed,
    write_json,
)
from hcsmoe_core.studies.cache import function_hash, key

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
STATES = ("done", "failed", "running", "interrupted", "missing")
DEATHS = 3  # workers that a cell may lose (killed, out of memory, machine gone) before it counts as failed
WORKER_TTL = "5 minutes"  # after which a silent worker is taken for dead, and its cells run elsewhere
WORKER = ["--death-timeout", "300", "--dashboard-address", "127.0.0.1:0"]
GRACE = 120  # seconds before its job ends at which a worker takes no more cells
# Options of a SLURM job: what they are by default, and what they mean.
SLURM = {
    "queue": ("", "partition"),
    "account": ("", "account that is charged"),
    "walltime": ("04:00:00", "of a job; a cell that is not done by then runs again in another job"),
    "memory": ("16GB", "of a job"),
    "cores": ("1", "CPU cores of a job, all for the one cell that it runs at a time"),
    "gpus": ("0", "GPUs of a job: one, or none"),
    "directives": ("", "other #SBATCH lines, separated by ;"),
    "prologue": ("", "shell commands before the worker starts, separated by ;"),
    "directory": ("", "of the workers' scratch files"),
    "interface": ("", "network interface that workers and scheduler talk by"),
    "python": ("", "Python of the workers, if not this one"),
}


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
        if is_done(done) and not again:
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
    limits = dict.fromkeys(THREADS, str(threads)) if threads else {}
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
    done.parent.mkdir(parents=True, exist_ok=True)
    done.with_suffix(".failed.txt").write_text(re.sub(r"\x1b\[[0-9;]*m", "", text), encoding="utf-8")


def is_done(done: Path) -> bool:
    """Whether a cell was measured: its file is there, and its results, if it has any, are not damaged."""
    results = done.with_suffix(".json")
    try:
        return done.exists() and (not results.exists() or bool(read_record(results)))
    except InputError:
        return False


def state_of(done: Path) -> str:
    """One of :data:`STATES`; "interrupted" where the process that measured it is gone and left a part."""
    signs = {
        "done": is_done(done),
        "running": is_locked(done),
        "failed": done.with_suffix(".failed.txt").exists(),
        "interrupted": part_of(done).exists(),
        "missing": True,
    }
    return next(state for state, seen in signs.items() if seen)


@dataclass
class Engine:
    """Where cells run.

    Attributes
    ----------
    executor : concurrent.futures.Executor
    threads : int or None
        CPU threads per cell; None where the worker's environment says it.
    window : int or None
        Cells submitted at a time; None for all.
    dashboard : str
        Address of Dask's dashboard, or empty.
    """

    executor: futures.Executor
    threads: int | None = None
    window: int | None = None
    dashboard: str = ""


class _Here(futures.Executor):
    """Calls in this process, one after another."""

    def submit(self, fn, /, *args, **kwargs):
        """Call a function; its future is done."""
        future = futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _end_with_driver():
    """Let a worker end as soon as the process that started it does, however that ends."""
    driver = multiprocessing.parent_process()
    threading.Thread(target=lambda: (driver.join(), os._exit(1)), daemon=True).start()


class _Processes(futures.Executor):
    """Processes of this machine; those that die are replaced, which ``ProcessPoolExecutor`` does not do."""

    def __init__(self, workers):
        options = dict(mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_driver)
        self._new = partial(futures.ProcessPoolExecutor, workers, **options)
        self._pool = self._new()

    def submit(self, fn, /, *args, **kwargs):
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except futures.BrokenExecutor:
            self._pool.shutdown(wait=False)
            self._pool = self._new()
            return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait=True, *, cancel_futures=True):
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Engine]:
    """Processes of this machine that share its cores."""
    check_count("workers", workers, 1)
    # No more cells are submitted than run: a process that dies takes all that were submitted with it.
    with _Processes(workers) as executor:
        try:
            yield Engine(executor, threads=max(1, (os.cpu_count() or 1) // workers), window=workers)
        except SystemExit:  # by a signal to this process alone, which a terminal's Ctrl-C is not
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGINT)
            raise


def run(
    cells: Sequence[Cell],
    *,
    engine: Engine | None = None,
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
        How often a cell that fails is tried again; one whose worker dies is :data:`DEATHS` times.
    after : dict of int to int
        By index, the cell that one waits for.
    description : str
        Of the progress bar.

    Raises
    ------
    CellsError
        When all others are done, if some failed; it names them.
    """
    engine, after = engine or Engine(_Here(), window=1), after or {}
    todo = [i for i, cell in enumerate(cells) if again or not is_done(cell.done)]
    ready = [i for i in todo if after.get(i) not in todo]
    tries, failed, running = Counter(), {}, {}
    with tqdm(total=len(cells), initial=len(cells) - len(todo), desc=description, unit="cell") as bar:
        while ready or running:
            while ready and len(running) < (engine.window or len(cells)):
                i, options = ready.pop(0), dict(again=again, threads=engine.threads)
                running[engine.executor.submit(complete, cells[i], **options)] = i
            finished = futures.wait(running, return_when=futures.FIRST_COMPLETED).done
            for i, error in ((running.pop(future), _error_of(future)) for future in finished):
                tries[i] += 1
                died = isinstance(error, futures.BrokenExecutor)
                if error and tries[i] <= (DEATHS if died else retries):
                    ready.insert(0, i)
                    continue
                if error:
                    failed[i] = error
                    if state_of(cells[i].done) not in ("done", "failed"):  # it died before it could tell
                        write_failure(cells[i].done, f"{type(error).__name__}: {error}")
                ready += [waiting for waiting in todo if after.get(waiting) == i]
                bar.set_postfix({"failed": len(failed)} if failed else {}, refresh=False)
                bar.update()
    if failed:
        reasons = [f"{cells[i].text}: {_last_line(error)}" for i, error in sorted(failed.items())]
        raise CellsError(
            "\n  ".join([f"{len(failed)} of {len(cells)} cells failed; run again to retry them.", *reasons])
            + f"\nTheir tracebacks are in {cells[min(failed)].done.parent}, in files .failed.txt."
        ) from failed[min(failed)]
    return [cell.done for cell in cells]


def _last_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _error_of(future):
    try:
        return future.exception()
    except futures.CancelledError:
        raise RuntimeError(
            "The Dask scheduler is gone; the same command goes on where this one was."
        ) from None


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
    code, every = function_hash(function), [shared | cell for cell in cells]
    done = [Path(folder) / f"{prefix}{key(each, model=model, code=code)}.json" for each in every]
    work = [partial(_write_result, function, each) for each in every]
    made = [*map(Cell, done, work, map(text, cells))]
    return [read_record(path) for path in run(made, description=description)]


def _write_result(function, settings, path):
    write_json(path, signed(function(settings)))


def notebook_id(notebook: str | Path, parameters: dict) -> str:
    """Key of a cell that is a notebook with some parameters."""
    return key(parameters, code=sha256_file(notebook))


def notebook_cell(notebook: str | Path, parameters: dict, folder: str | Path) -> Cell:
    """A notebook with parameters as a cell.

    Executed, it is in the folder as ``NOTEBOOK-KEY.ipynb`` if and only if it ran to its end, with its results
    beside it (the parameter ``results`` is filled in).
    """
    name, path = notebook_id(notebook, parameters), Path(notebook)
    work = partial(_execute, str(notebook), parameters, name)
    return Cell(Path(folder) / f"{path.stem}-{name}.ipynb", work, f"{path.name} {parameters}")


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


@contextlib.contextmanager
def scheduler(address: str, *, timeout: float = 30) -> Iterator[Engine]:
    """The workers of a Dask scheduler that runs already.

    Workers must see this folder, and run this version; one thread each, because a cell takes a whole process.
    How long a silent worker is waited for, and how many may die under a cell, is up to the scheduler (Dask's
    own: 5 minutes, 3). Where workers have a resource ``GPU``, every cell asks for one:
    ``CUDA_VISIBLE_DEVICES=0 dask worker tcp://… --nthreads 1 --resources GPU=1``.

    Parameters
    ----------
    address : str
        Such as ``"tcp://10.0.0.1:8786"``.
    timeout : float
        Seconds to wait for it.

    Raises
    ------
    ImportError
        If dask.distributed is not installed.
    OSError
        If nothing answers there.
    """
    distributed = _import("distributed")
    try:
        client = distributed.Client(address, timeout=timeout, name="hcsmoe-sweep")
    except (OSError, ValueError) as error:
        raise OSError(
            f"No Dask scheduler answers at {address} ({error}); start one with: dask scheduler"
        ) from None
    with client:
        if not client.scheduler_info(n_workers=-1)["workers"]:
            print(f"{address} has no workers yet; start some: dask worker {address} --nthreads 1", flush=True)
        yield _engine(client)


@contextlib.contextmanager
def slurm(jobs: int, options: Sequence[str] = (), *, logs: str | Path) -> Iterator[Engine]:
    """A Dask cluster of SLURM jobs, each with one worker; a job that ends or is cancelled is replaced.

    Scheduler and workers talk by TLS, with a credential that is made for this run and lies in ``logs`` for
    its workers, readable by its owner alone. The dashboard listens on this machine's loopback.

    Parameters
    ----------
    jobs : int
        Jobs side by side.
    options : sequence of str
        ``name=value`` of :data:`SLURM`.
    logs : path
        Folder of the jobs' output.

    Raises
    ------
    ImportError
        If dask-jobqueue or cryptography is not installed.
    InputError
        If an option is unknown.
    """
    check_count("jobs", jobs, 1)
    job = job_options(options)
    dask_jobqueue, distributed, dask = _import("dask_jobqueue"), _import("distributed"), _import("dask")
    _import("cryptography")
    Path(logs).mkdir(parents=True, exist_ok=True)
    job |= dict(log_directory=str(logs), shared_temp_directory=str(Path(logs).resolve()))
    job |= dict(protocol="tls://", security=distributed.Security.temporary())
    job |= dict(scheduler_options={"dashboard_address": "127.0.0.1:0"})
    settings = {
        "distributed.scheduler.allowed-failures": DEATHS,
        "distributed.scheduler.worker-ttl": WORKER_TTL,
        "distributed.dashboard.link": "http://127.0.0.1:{port}/status",
    }
    with dask.config.set(settings), dask_jobqueue.SLURMCluster(**job) as cluster:
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
        with distributed.Client(cluster, name="hcsmoe-sweep") as client:
            yield _engine(client, gpu="GPU=1" in job["worker_extra_args"])


def job_options(options: Sequence[str] = ()) -> dict:
    """Arguments of ``dask_jobqueue.SLURMCluster`` for ``name=value`` options of :data:`SLURM`."""
    job = {name: default for name, (default, _) in SLURM.items()}
    for option in options:
        name, equals, value = option.partition("=")
        require(
            equals and name in SLURM,
            f"--slurm-options takes name=value with a name of {', '.join(SLURM)}; not {option!r}.",
        )
        job[name] = value
    for name in ("gpus", "cores"):
        require(job[name].isdigit(), f"--slurm-options {name} takes a whole number; not {job[name]!r}.")
    gpus, cores = int(job["gpus"]), int(job["cores"])
    require(
        gpus <= 1 and cores >= 1,
        f"--slurm-options takes cores of at least 1 and gpus of 0 or 1; not cores={cores} and gpus={gpus}.",
    )
    left = max(_seconds(job["walltime"]) - GRACE, 1)
    lifetime = ["--lifetime", f"{left}s", "--lifetime-stagger", f"{min(GRACE // 2, left // 4)}s"]
    named = {name: job[name] for name in ("queue", "account", "interface", "python")}
    named["local_directory"] = job["directory"]
    return {name: value for name, value in named.items() if value} | dict(
        cores=1,
        processes=1,
        job_cpu=cores,
        memory=job["memory"],
        walltime=job["walltime"],
        nanny=True,
        job_script_prologue=[f"export {name}={cores}" for name in THREADS] + _lines(job["prologue"]),
        job_extra_directives=_lines(job["directives"]) + ["--gpus=1"] * gpus,
        worker_extra_args=[*lifetime, *WORKER, *["--resources", "GPU=1"] * gpus],
    )


def _lines(text):
    return [line.strip() for line in text.split(";") if line.strip()]


def _seconds(walltime):
    """Seconds of a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours:…"""
    require(
        re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", walltime),
        f"--slurm-options walltime takes a time such as 04:00:00 or 1-00:00:00; not {walltime!r}.",
    )
    days, dash, clock = walltime.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def _engine(client, gpu=False):
    """The engine of a Dask client; cells ask for a GPU where any worker offers one."""
    info = client.scheduler_info(n_workers=-1)
    gpu = gpu or any("GPU" in worker["resources"] for worker in info["workers"].values())
    executor = client.get_executor(pure=False, **({"resources": {"GPU": 1}} if gpu else {}))
    return Engine(executor, dashboard=client.dashboard_link if "dashboard" in info["services"] else "")


def _import(name: str) -> Any:
    """A package of the extra "cluster"."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise MissingPackageError('Clusters need Dask: pip install "hcsmoe[cluster]"') from None
