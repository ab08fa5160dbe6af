"""Sweeps on Dask workers and in SLURM jobs of which some are killed: all cells done, none twice, and what
they say is right.
"""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT

import hcsmoe_core as core
from hcsmoe_core.studies import cache, grids, sweep
from hcsmoe_core.studies import tables as study

pytestmark = pytest.mark.slow
MODEL = "demo-mixtral"
SMALL = {
    "dtype": "float32",
    "tasks": "demo_sorting,demo_units",
    "limit": 20,
    "text": "none",
    "sequences": 12,
    "length": 32,
}
# What a cell leaves of itself, beside all bookkeeping: a line when it starts and one when it is through.
MARK = """
import json, os, pathlib
with pathlib.Path(results).with_name("log").open("a") as file:
    file.write(json.dumps(["{event}", pathlib.Path(results).stem, os.getppid()]) + "\\n")
"""


def study_of(folder, axes, exclude=()):
    """A grid whose notebook is 05_accuracy with :data:`MARK` at both ends."""
    import yaml

    notebook = nbformat.read(ROOT / "notebooks/05_accuracy.ipynb", as_version=4)
    first, last = (nbformat.v4.new_code_cell(MARK.replace("{event}", event)) for event in ("start", "end"))
    notebook.cells = [*notebook.cells[:2], first, *notebook.cells[2:], last]
    nbformat.write(notebook, folder / "marked.ipynb")
    content = {
        "title": "Some",
        "notebook": "marked.ipynb",
        "base": SMALL,
        "axes": axes,
        "exclude": list(exclude),
    }
    (folder / "some.yml").write_text(yaml.safe_dump(content))
    return folder / "some.yml"


def log(folder, event):
    path = folder / "out/log"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(name, pid) for kind, name, pid in lines if kind == event]


def until(true, what, seconds=900):
    """What ``true`` gives when it is something."""
    for _ in range(20 * seconds):
        found = true()
        if found:
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{what} did not happen")


def next_started(folder, ends):
    """Process of the worker of a cell that has just started, after so many ended."""
    until(lambda: len(log(folder, "end")) >= ends, f"{ends} cells ended")
    before = len(log(folder, "start"))
    return until(lambda: log(folder, "start")[before:], "another cell started")[0][1]


def started(folder, *command):
    """A process of its own session, with what it says in a file."""
    count = len(list(folder.glob("*.said")))
    with (folder / f"{count}.said").open("w") as said:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        return subprocess.Popen(
            [str(c) for c in command],
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=ROOT,
        )


def hcsmoe(folder, *options):
    figures = f"figures={folder / 'figures'}"
    command = [sys.executable, "-m", "hcsmoe_core.ui.cli", "sweep", folder / "some.yml", "--model", MODEL]
    return started(folder, *command, "--out", folder / "out", "-p", figures, *options)


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def said(folder):
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.said")))


def check_each_ran_once(folder, count):
    """Every cell is done, and went through to its end once."""
    ended = [name for name, _ in log(folder, "end")]
    assert len(ended) == len(set(ended)) == count, said(folder)
    table = sweep.status(folder / "out")
    assert table[["cells", "done"]].values.tolist() == [[count, count]]
    assert {path.stem for path in (folder / "out").glob("marked-*.ipynb")} == set(ended)
    assert not list((folder / "out").glob(".*"))


def measured_here(cells):
    """The table of some cells, made in this process without notebooks."""
    import torch

    torch.set_num_threads(1)
    moe, tokenizer = core.load_model(MODEL, dtype="float32")
    source = {name: SMALL[name] for name in ("sequences", "length")}
    stats = cache.cached_statistics(moe, tokenizer, seed=42, **source)
    found = {}
    for cell in cells:
        if cell.given["experts"]:
            steps = {name: cell.given[name] for name in ("linkage", "merge") if name in cell.given}
            core.apply_plan(moe, core.make_plan(stats, moe, experts=cell.given["experts"], **steps), stats)
        scores = core.evaluate(moe, tokenizer, SMALL["tasks"].split(","), limit=SMALL["limit"], text=None)
        found[cell.id] = [scores["tasks"][task]["acc"] for task in SMALL["tasks"].split(",")]
        found[cell.id] += [scores["mean_acc"], scores["mean_acc_stderr"], study.model_size(moe)["weights"]]
        if cell.given["experts"]:
            core.restore(moe)
    return found


def measured_there(folder):
    """The same table of the cells of a sweep."""
    columns = [
        *(f"acc_{task}" for task in SMALL["tasks"].split(",")),
        "mean_acc",
        "mean_acc_stderr",
        "weights",
    ]
    frame = sweep.collect(folder / "out", grid="some", model=MODEL)
    names = [done.stem.rpartition("-")[2] for done in sweep.cells_of(folder / "out", "some", MODEL)]
    return dict(zip(names, frame[columns].values.tolist(), strict=True))


@pytest.fixture
def dask(tmp_path):
    """A scheduler, a way to start workers, and the end of all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    run = [sys.executable, "-m"]
    here = ["--host", "127.0.0.1", "--no-dashboard"]
    processes = [
        started(tmp_path, *run, "distributed.cli.dask_scheduler", *here, "--port", address.rpartition(":")[2])
    ]

    def worker():
        scratch = [
            "--nthreads",
            "1",
            "--nworkers",
            "1",
            "--local-directory",
            tmp_path / "scratch",
            "--death-timeout",
            "60",
        ]
        processes.append(started(tmp_path, *run, "distributed.cli.dask_worker", address, *here, *scratch))

    try:
        worker()
        worker()
        yield address, worker
    finally:
        for process in processes[::-1]:
            process.terminate()
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def test_workers_nannies_and_drivers_may_be_killed(tmp_path, dask):
    address, worker = dask
    axes = {
        "experts": ["3/4", "1/2", "1/4"],
        "linkage": ["average", "complete", "single", "ward"],
        "merge": ["frequency", "average"],
    }
    path = study_of(tmp_path, axes, [{"experts": "1/4", "linkage": "ward", "merge": "average"}])
    cells = grids.cells_of(grids.load(path), MODEL, {"figures": str(tmp_path / "figures")})
    assert len({cell.id for cell in cells}) == 24
    driver = hcsmoe(tmp_path, "--scheduler", address)
    try:
        os.kill(next_started(tmp_path, 3), signal.SIGKILL)  # its nanny starts another
        victim = next_started(tmp_path, 7)
        os.kill(parent_of(victim), signal.SIGKILL)  # the nanny, which takes its worker with it
        next_started(tmp_path, 10)
        states = sweep.status(tmp_path / "out").iloc[0]
        assert states["running"] >= 1
        assert states["done"] < 24
    finally:
        driver.kill()
    driver.wait()
    worker()
    again = hcsmoe(tmp_path, "--scheduler", address)
    assert again.wait(900) == 0, said(tmp_path)
    check_each_ran_once(tmp_path, 24)
    cut_off = len(log(tmp_path, "start")) - 24
    assert 1 <= cut_off <= 3  # those of the worker, perhaps of the nanny's, and none for the driver
    undisturbed, found = measured_here(cells), measured_there(tmp_path)
    assert found == undisturbed
    assert np.ptp([row[2] for row in found.values()]) > 0.1
    shown = hcsmoe(tmp_path, "--status")
    assert shown.wait(120) == 0
    assert "some demo-mixtral     24    24       0" in said(tmp_path)


SLURM = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def command_line(name):
    """A program of SLURM or munge; their daemons are where a user's path may not lead."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@pytest.fixture
def slurm(monkeypatch):
    """SLURM on this one node, by Debian's slurm-wlm and munge; its folder."""
    absent = [
        name
        for name in ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "squeue")
        if not command_line(name)
    ]
    if absent:
        say = pytest.fail if os.environ.get("HCSMOE_REQUIRE_SLURM") == "1" else pytest.skip
        say(
            f"SLURM NOT TESTED: there is no {', '.join(absent)} on this machine (apt-get install slurm-wlm "
            "munge)"
        )
    folder, free = Path(tempfile.mkdtemp(prefix="hcsmoe-")), [socket.socket() for _ in range(2)]
    for port in free:
        port.bind(("127.0.0.1", 0))
    known = dict(
        host=socket.gethostname().partition(".")[0],
        user=getpass.getuser(),
        cpus=os.cpu_count(),
        folder=folder,
    )
    (folder / "slurm.conf").write_text(SLURM.format(ports=[port.getsockname()[1] for port in free], **known))
    for port in free:
        port.close()
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = {"socket": "sock", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder / 'munge'}.{kind}" for option, kind in munge.items()]
    daemons = [started(folder, command_line("munged"), "--foreground", "--force", *options)]
    try:
        until((folder / "munge.sock").exists, "munged", 30)
        daemons += [started(folder, command_line(name), "-D") for name in ("slurmctld", "slurmd")]
        until(lambda: "idle" in asked("sinfo", "-h", "-o", "%T"), f"SLURM to be up; {said(folder)}", 60)
        yield folder
    finally:
        for job in asked("squeue", "-h", "-o", "%A").split():
            asked("scancel", job)
        for daemon in daemons[::-1]:
            daemon.terminate()
            daemon.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def asked(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def job_of(pid):
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(v for v in variables if v.startswith(b"SLURM_JOB_ID=")).partition(b"=")[2].decode()


def test_slurm_jobs_may_be_cancelled(tmp_path, slurm):
    path = study_of(tmp_path, {"experts": ["1/2", "1/4"], "linkage": ["average", "single"]})
    cells = grids.cells_of(grids.load(path), MODEL, {"figures": str(tmp_path / "figures")})
    given = (
        "queue=debug",
        "memory=1GB",
        "walltime=00:30:00",
        "interface=lo",
        f"directory={tmp_path / 'scratch'}",
    )
    driver = hcsmoe(
        tmp_path, "--slurm", "--jobs", "2", *(o for option in given for o in ("--slurm-options", option))
    )
    try:
        worker = next_started(tmp_path, 1)
        command = Path(f"/proc/{parent_of(worker)}/cmdline").read_bytes().decode().split("\0")
        address = next(word for word in command if word.startswith("tls://127.0.0.1:"))
        refused = f"import distributed; distributed.Client({address!r}, timeout=2)"
        assert subprocess.run([sys.executable, "-c", refused], capture_output=True).returncode
        job = job_of(worker)
        assert job in asked("squeue", "-h", "-o", "%A").split()
        asked("scancel", job)
        assert driver.wait(900) == 0, said(tmp_path)
    finally:
        driver.kill()
    check_each_ran_once(tmp_path, 5)
    assert len(log(tmp_path, "start")) == 6
    assert measured_there(tmp_path) == measured_here(cells)
    until(lambda: not asked("squeue", "-h"), "all jobs gone", 60)
    assert len(list((tmp_path / "out/logs").glob("*.out"))) >= 3  # the cancelled job was replaced
