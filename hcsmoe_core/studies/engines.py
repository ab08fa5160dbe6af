"""Where cells run: this process, processes of this machine, or workers of a Dask cluster, behind
``Executor.submit``.
"""

import contextlib
import importlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hcsmoe_core._util import InputError, MissingPackageError, check_count

DEATHS = 3  # workers that a cell may lose (killed, out of memory, machine gone) before it counts as failed
WORKER_TTL = (
    "5 minutes"  # after which a worker that was not heard of is taken for dead, and its cells run elsewhere
)
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

    executor: Executor
    threads: int | None = None
    window: int | None = None
    dashboard: str = ""


class _Here(Executor):
    """Calls in this process, one after another."""

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def here() -> Engine:
    """This process."""
    return Engine(_Here(), window=1)


def _end_with_driver():
    """Let a worker end as soon as the process that started it does, however that ends."""
    driver = multiprocessing.parent_process()
    threading.Thread(target=lambda: (driver.join(), os._exit(1)), daemon=True).start()


class _Processes(Executor):
    """Processes of this machine; those that die are replaced, which ``ProcessPoolExecutor`` does not do."""

    def __init__(self, workers):
        self._workers, self._pool = workers, None
        self._start()

    def _start(self):
        context = get_context("spawn")
        self._pool = ProcessPoolExecutor(self._workers, mp_context=context, initializer=_end_with_driver)

    def submit(self, fn, /, *args, **kwargs):
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._start()
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
            start = f"dask worker {address} --nthreads 1"
            print(f"{address} has no workers yet; start some with: {start}", flush=True)
        yield _engine(client)


@contextlib.contextmanager
def slurm(jobs: int, options: Sequence[str] = (), *, logs: str | Path) -> Iterator[Engine]:
    """A Dask cluster of SLURM jobs, each with one worker; a job that ends or is cancelled is replaced.

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
        If dask-jobqueue is not installed.
    InputError
        If an option is unknown.
    """
    check_count("jobs", jobs, 1)
    job = job_options(options)
    dask_jobqueue, distributed, dask = _import("dask_jobqueue"), _import("distributed"), _import("dask")
    Path(logs).mkdir(parents=True, exist_ok=True)
    settings = {
        "distributed.scheduler.allowed-failures": DEATHS,
        "distributed.scheduler.worker-ttl": WORKER_TTL,
    }
    with dask.config.set(settings), dask_jobqueue.SLURMCluster(log_directory=str(logs), **job) as cluster:
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
        with distributed.Client(cluster, name="hcsmoe-sweep") as client:
            yield _engine(client, gpu="GPU=1" in job["worker_extra_args"])


def job_options(options: Sequence[str] = ()) -> dict:
    """Arguments of ``dask_jobqueue.SLURMCluster`` for ``name=value`` options of :data:`SLURM`."""
    job = {name: default for name, (default, _) in SLURM.items()}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in SLURM:
            raise InputError(
                f"--slurm-options takes name=value with a name of {', '.join(SLURM)}; not {option!r}."
            )
        job[name] = value
    for name in ("gpus", "cores"):
        if not job[name].isdigit():
            raise InputError(f"--slurm-options {name} takes a whole number; not {job[name]!r}.")
    gpus, cores = int(job["gpus"]), int(job["cores"])
    if gpus > 1 or cores < 1:
        raise InputError(
            f"--slurm-options takes cores of at least 1 and gpus of 0 or 1; not cores={cores} and "
            f"gpus={gpus}."
        )
    left = max(_seconds(job["walltime"]) - GRACE, 1)
    lifetime = ["--lifetime", f"{left}s", "--lifetime-stagger", f"{min(GRACE // 2, left // 4)}s"]
    threads = [f"export {name}={cores}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    resources = ["--resources", "GPU=1"] if gpus else []
    made = dict(
        cores=1, processes=1, job_cpu=cores, memory=job["memory"], walltime=job["walltime"], nanny=True
    )
    made |= dict(
        job_script_prologue=threads + _lines(job["prologue"]),
        job_extra_directives=_lines(job["directives"]) + (["--gpus=1"] if gpus else []),
        worker_extra_args=[*lifetime, "--death-timeout", "300", *resources],
    )
    job["local_directory"] = job["directory"]
    names = ("queue", "account", "interface", "python", "local_directory")
    return made | {name: job[name] for name in names if job[name]}


def _lines(text):
    return [line.strip() for line in text.split(";") if line.strip()]


def _seconds(walltime):
    """Seconds of a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours:…"""
    days, dash, clock = walltime.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise InputError(
            f"--slurm-options walltime takes a time such as 04:00:00 or 1-00:00:00; not {walltime!r}."
        )
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


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
