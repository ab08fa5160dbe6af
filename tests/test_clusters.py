"""Sweeps on Dask workers and in SLURM jobs of which some are killed: all cells done, none twice, and what they say is right."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT

import hcsmoe_core as core
from hcsmoe_core import engines, grids, study, sweep

pytestmark = pytest.mark.slow
MODEL = "demo-mixtral"
SMALL = {"tasks": "demo_sorting,demo_units", "limit": 20, "text": "none", "sequences": 12, "length": 32}
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
    content = {"title": "Some", "notebook": "marked.ipynb", "base": SMALL, "axes": axes, "exclude": list(exclude)}
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
            [str(c) for c in command], stdout=said, stderr=subprocess.STDOUT, start_new_session=True, env=environment, cwd=ROOT
        )


def hcsmoe(folder, *options):
    figures = f"figures={folder / 'figures'}"
    command = [sys.executable, "-m", "hcsmoe_core.cli", "sweep", folder / "some.yml", "--model", MODEL]
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
    stats = study.statistics(moe, tokenizer, seed=42, **source)
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
    columns = [*(f"acc_{task}" for task in SMALL["tasks"].split(",")), "mean_acc", "mean_acc_stderr", "weights"]
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
    processes = [started(tmp_path, *run, "distributed.cli.dask_scheduler", *here, "--port", address.rpartition(":")[2])]

    def worker():
        scratch = ["--nthreads", "1", "--nworkers", "1", "--local-directory", tmp_path / "scratch", "--death-timeout", "60"]
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
