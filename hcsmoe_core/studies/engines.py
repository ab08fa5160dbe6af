"""Where cells run: processes of this machine, or the workers of a Dask cluster; all behind ``Executor.submit``."""

import contextlib
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from hcsmoe_core._util import InputError, check_count

DEATHS = 3  # a cell may lose this many workers (killed, out of memory, gone with their machine) before it counts as failed


WORKER_TTL = "5 minutes"  # a worker that has not been heard of for so long is taken for dead, and its cells run elsewhere


GRACE = 120  # seconds before its job ends at which a worker takes no more cells


# Options of a SLURM job, by name: what they are by default, and what they mean.
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
        CPU threads of a cell; None where the worker's environment says it.
    window : int or None
        Cells handed over at a time; None for all.
    dashboard : str
        Address of Dask's dashboard, or empty.
    """

    executor: Executor
    threads: int | None = None
    window: int | None = None
    dashboard: str = ""


class Processes(Executor):
    """Processes of this machine; those that die are replaced, which ``ProcessPoolExecutor`` does not do."""

    def __init__(self, workers):
        self._workers = workers
        self._pool = self._new()

    def _new(self):
        return ProcessPoolExecutor(self._workers, mp_context=get_context("spawn"))

    def submit(self, fn, /, *args, **kwargs):
        """Run ``fn(*args, **kwargs)`` in one of the processes."""
        try:
            return self._pool.submit(fn, *args, **kwargs)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._new()
            return self._pool.submit(fn, *args, **kwargs)

    def shutdown(self, wait=True, *, cancel_futures=True):
        """End the processes when what they are at is done."""
        self._pool.shutdown(wait=wait, cancel_futures=cancel_futures)


@contextlib.contextmanager
def processes(workers):
    """Processes of this machine that share its cores.

    Yields
    ------
    Engine
    """
    check_count("workers", workers, 1)
    # No more cells are handed over than run: a process that dies takes all that were handed over with it.
    with Processes(workers) as executor:
        yield Engine(executor, threads=max(1, (os.cpu_count() or 1) // workers), window=workers)


@contextlib.contextmanager
def scheduler(address, *, timeout=30):
    """The workers of a Dask scheduler that runs already.

    Workers must see this folder, and run this version; one thread each, because a cell takes a whole process. How long a
    silent worker is waited for, and how many may die under a cell, is up to the scheduler (Dask's own: 5 minutes, and 3).
    Where workers have a resource ``GPU``, every cell asks for one:
    ``CUDA_VISIBLE_DEVICES=0 dask worker tcp://… --nthreads 1 --resources GPU=1``.

    Parameters
    ----------
    address : str
        Such as ``"tcp://10.0.0.1:8786"``.
    timeout : float
        Seconds to wait for it.

    Yields
    ------
    Engine

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
            print(
                f"{address} has no workers yet; start some with: dask worker {address} --nthreads 1",
                flush=True,
            )
        yield _of_client(client)


@contextlib.contextmanager
def slurm(jobs, options=(), *, logs):
    """A Dask cluster of SLURM jobs, each with one worker; a job that ends or is cancelled is replaced.

    Parameters
    ----------
    jobs : int
        Jobs side by side.
    options : sequence of str
        ``name=value`` of :data:`SLURM`.
    logs : path
        Folder of the jobs' output.

    Yields
    ------
    Engine

    Raises
    ------
    ImportError
        If dask-jobqueue is not installed.
    ValueError
        If an option is unknown.
    """
    check_count("jobs", jobs, 1)
    job = job_options(options)
    dask_jobqueue, distributed, dask = _import("dask_jobqueue"), _import("distributed"), _import("dask")
    Path(logs).mkdir(parents=True, exist_ok=True)
    with dask.config.set(
        {"distributed.scheduler.allowed-failures": DEATHS, "distributed.scheduler.worker-ttl": WORKER_TTL}
    ), dask_jobqueue.SLURMCluster(log_directory=str(logs), **job) as cluster:  # fmt: skip
        cluster.adapt(minimum_jobs=jobs, maximum_jobs=jobs)
        with distributed.Client(cluster, name="hcsmoe-sweep") as client:
            yield _of_client(client, gpu="GPU=1" in job["worker_extra_args"])


def job_options(options=()):
    """What ``dask_jobqueue.SLURMCluster`` is given for ``name=value`` options of :data:`SLURM`.

    Returns
    -------
    dict
    """
    given = {name: usual for name, (usual, _) in SLURM.items()}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in SLURM:
            raise InputError(
                f"--slurm-options takes name=value with a name of {', '.join(SLURM)}; not {option!r}."
            )
        given[name] = value
    gpus, cores = (_whole(name, given[name]) for name in ("gpus", "cores"))
    if gpus > 1 or cores < 1:
        raise InputError(
            f"--slurm-options takes cores of at least 1 and gpus of 0 or 1; not cores={cores} and gpus={gpus}."
        )
    left = max(_seconds(given["walltime"]) - GRACE, 1)
    arguments = [
        "--lifetime",
        f"{left}s",
        "--lifetime-stagger",
        f"{min(GRACE // 2, left // 4)}s",
        "--death-timeout",
        "300",
    ]
    directives = [line.strip() for line in given["directives"].split(";") if line.strip()]
    threads = [f"export {name}={cores}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")]
    found = dict(
        cores=1, processes=1, job_cpu=cores, memory=given["memory"], walltime=given["walltime"], nanny=True
    )
    found["job_script_prologue"] = threads + [
        line.strip() for line in given["prologue"].split(";") if line.strip()
    ]
    found["job_extra_directives"] = directives + (["--gpus=1"] if gpus else [])
    found["worker_extra_args"] = arguments + (["--resources", "GPU=1"] if gpus else [])
    given["local_directory"] = given["directory"]
    names = ("queue", "account", "interface", "python", "local_directory")
    return found | {name: given[name] for name in names if given[name]}


def _whole(name, text):
    if not text.isdigit():
        raise InputError(f"--slurm-options {name} takes a whole number; not {text!r}.")
    return int(text)


def _seconds(walltime):
    """Seconds of a time as SLURM writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours:minutes:seconds."""
    days, dash, clock = walltime.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise InputError(
            f"--slurm-options walltime takes a time such as 04:00:00 or 1-00:00:00; not {walltime!r}."
        )
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(int(part) * unit for part, unit in zip(parts, units, strict=False))


def _of_client(client, gpu=False):
    """The engine of a Dask client."""
    about = client.scheduler_info(n_workers=-1)
    gpu = gpu or any("GPU" in worker["resources"] for worker in about["workers"].values())
    executor = client.get_executor(pure=False, **({"resources": {"GPU": 1}} if gpu else {}))
    return Engine(executor, dashboard=client.dashboard_link if "dashboard" in about["services"] else "")


def _import(name):
    """A package of the ``cluster`` extra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError('Clusters need Dask: pip install "hcsmoe[cluster]"') from None
