"""Outputs are checked before any work, only our own is replaced or removed, and nothing damaged is used."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, tiny_model, tokens
from safetensors.torch import save_file
from test_streaming import command, same_files, store

from benchmarks import memory_bound
from hcsmoe_core import _util, capture, load_model, make_plan, save_merged
from hcsmoe_core._util import InputError, new_folder, output_path, replacing, write_json
from hcsmoe_core.scale import streaming
from hcsmoe_core.scale.streaming import stream_capture, stream_merged, stream_model
from hcsmoe_core.score.fidelity import observer
from hcsmoe_core.studies import pipeline
from hcsmoe_core.ui import cli


@pytest.fixture
def stored(tmp_path):
    return store(tiny_model("mixtral"), tmp_path / "model")


# --- names, links and devices (F3, F4, F19, F28) -----------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "/", "..", "a/..", "x" * 250, "é" * 121])
@pytest.mark.parametrize("folder", [False, True])
def test_what_names_no_output_is_refused_in_one_line(name, folder):
    with pytest.raises(InputError, match="is no name|bytes; give one of 240") as told:
        output_path(name, folder=folder)
    assert "\n" not in str(told.value)


def test_pipes_sockets_and_links_to_themselves_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    modes = {path.name: path.lstat().st_mode for path in tmp_path.iterdir()}
    for name in modes:
        with pytest.raises(OSError, match="is a device, pipe or socket, or a link to itself"):
            write_json(tmp_path / name, {})
    with pytest.raises(OSError, match="is a device"):
        write_json("/dev/null", {})
    assert {path.name: path.lstat().st_mode for path in tmp_path.iterdir()} == modes
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_links_are_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").symlink_to("there/a.json")  # there is none yet
    (tmp_path / "model").symlink_to("there/m")
    for value in (1, 2):
        write_json(tmp_path / "file", value)
        assert json.loads((tmp_path / "there/a.json").read_text()) == value
    with new_folder(tmp_path / "model") as part:
        (part / "x").touch()
    assert (tmp_path / "there/m/x").is_file()
    assert all((tmp_path / name).is_symlink() for name in ("file", "model"))
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["a.json", "m"]
    with pytest.raises(FileExistsError):
        output_path(tmp_path / "model", folder=True)


def test_folders_of_the_users_own_are_left_alone(stored, input_ids, tmp_path):
    model, _ = stream_model(stored)
    out = tmp_path / "m"
    work, victim = streaming.work_of(out), tmp_path / "victim"
    for folder, name in ((work, "notes.txt"), (work, "model"), (tmp_path / ".m.part", "thesis.txt")):
        folder.mkdir()
        (folder / name).write_text("mine")
        refused = pytest.raises(InputError, match="not of hcsmoe")
        with refused, streaming.work_folder(out, model), new_folder(out):
            pass
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
        folder.rmdir()
    victim.mkdir()
    (victim / "lock").write_text("mine")
    work.symlink_to(victim)
    with pytest.raises(InputError, match="is a link"), streaming.work_folder(out, model):
        pass
    with pytest.raises(InputError, match="is a link"):
        stream_capture(model, input_ids, work)
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]


def test_outputs_are_checked_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline.streaming, "open_model", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("hcsmoe_core.load_model", lambda *_, **__: pytest.fail("loaded"), raising=False)
    monkeypatch.setattr("hcsmoe_core.load_statistics", lambda *_: pytest.fail("loaded"), raising=False)
    (tmp_path / "file").touch()
    (tmp_path / "shut").mkdir()
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, how: "shut" not in str(path) and allowed(path, how))
    commands = {
        "capture": ["capture", "demo-qwen"],
        "merge": ["merge", "demo-qwen", "--experts", "4"],
        "plan": ["plan", "x.safetensors", "--experts", "4"],
        "evaluate": ["evaluate", "demo-qwen"],
        "compare": ["compare", "demo-qwen"],
    }
    for name, words in commands.items():
        bad = {str(tmp_path / "file" / "x"): "is a file", str(tmp_path / "shut" / "x"): "Permission denied"}
        if name != "compare":
            bad |= {str(tmp_path): "is a folder|exists", "/": "is no name"}
        for out, message in bad.items():
            monkeypatch.setattr(sys, "argv", ["hcsmoe", *words, "--out", out])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            said = capsys.readouterr().err
            assert ended.value.code == 2
            assert any(part in said for part in message.split("|")), (name, out, said)
            assert said.count("\n") == 1
    with pytest.raises(IsADirectoryError):
        pipeline.capture_to_file("demo-qwen", tmp_path)


def test_failures_to_write_name_the_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"a cannot be written .*No space.*disk full"),
        replacing(tmp_path / "a"),
    ):
        raise OSError(28, "No space left on device")
    denied = pytest.raises(OSError, match=r"a cannot be written .*denied.*another output")
    with denied, replacing(tmp_path / "a"):
        raise OSError(13, "Permission denied")
    assert list(tmp_path.iterdir()) == []


# --- modes, unfinished files, order of writing (F12, F18, F20) ---------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_everything_is_written_with_the_modes_of_the_umask(umask, stored, input_ids, tmp_path):
    before = os.umask(umask)
    try:
        model, streamed = load_model(stored)[0], stream_model(stored)[0]
        stats = capture(model, input_ids, progress=False)
        stats.save(tmp_path / "s.safetensors")
        plan = make_plan(stats, model, experts=4, progress=False)
        save_merged(model, plan, tmp_path / "a")
        stream_merged(streamed, plan, tmp_path / "b", tmp_path / "work")
    finally:
        os.umask(before)
    files = [tmp_path / "s.safetensors", *(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~umask


def test_what_a_killed_run_left_is_removed_and_that_of_a_living_one_never(tmp_path):
    path = tmp_path / "a.json"
    dead = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import os, signal, sys\nfrom hcsmoe_core._util import replacing\n"
            "with replacing(sys.argv[1]) as part:\n    part.write_text('x' * 100)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)",
            str(path),
        ],
        cwd=ROOT,
    )
    assert dead.returncode == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir()) == ["..a.json.part.lock", ".a.json.part"]
    assert _util.was_killed(path)
    with replacing(path) as part:
        part.write_text("1")
        assert not _util.was_killed(path)
        other = threading.Thread(target=write_json, args=(path, 2))
        other.start()
        other.join(0.3)
        assert part.read_text() == "1"  # the other waits
    other.join()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads(path.read_text()) == 2


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, sync, rename = [], os.fsync, os.replace
    name_of = lambda handle: Path(f"/proc/self/fd/{handle}").readlink().name  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append(name_of(handle)), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), rename(a, b)))
    write_json(tmp_path / "a.json", 1)
    with new_folder(tmp_path / "m") as part:
        (part / "x").touch()
    assert events == ["a.json", "rename", tmp_path.name, "m", "x", "rename", tmp_path.name]


# --- work folders (F8, F18) --------------------------------------------------------------------------------


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [halve, flip, empty])
def test_damaged_pieces_of_a_merge_are_made_again_and_named(damage, stored, tmp_path, monkeypatch, capsys):
    model, heldout = stream_model(stored)[0], tokens(2, 24, seed=5)
    plan = make_plan(capture(load_model(stored)[0], tokens(6, 20)), model, experts=4, progress=False)
    options = dict(observer=observer(heldout))
    wanted = stream_merged(model, plan, tmp_path / "a", tmp_path / "work-a", **options)
    usual, work = streaming._Source.push, tmp_path / "work"

    def interrupted(source, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        usual(source, index, *rest)

    pieces = ["model/model-00002-of-00004.safetensors", "observed/00001.json", "run.json", "shards.json"]
    pieces += [f"observed/mapped/{1:05d}-{0:08d}.safetensors"]
    for piece in pieces:
        monkeypatch.setattr(streaming._Source, "push", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream_merged(stream_model(stored)[0], plan, tmp_path / "b", work, **options)
        monkeypatch.setattr(streaming._Source, "push", usual)
        (work / "model" / "LICENSE").write_text("cut sho")  # as a kill leaves it while it is copied
        damage(work / piece)
        capsys.readouterr()
        assert stream_merged(stream_model(stored)[0], plan, tmp_path / "b", work, **options) == wanted
        assert piece == "shards.json" or (work / piece).name in capsys.readouterr().err
        same_files(tmp_path / "a", tmp_path / "b")
        for folder in (work, tmp_path / "b"):
            streaming._discard(folder)


@pytest.mark.parametrize("damage", [halve, flip, empty])
def test_damaged_pieces_of_a_capture_are_made_again_and_named(damage, stored, tmp_path, monkeypatch, capsys):
    ids, work = tokens(6, 20), tmp_path / "work"
    stream_capture(stream_model(stored)[0], ids, tmp_path / "a").save(tmp_path / "wanted")
    usual = streaming._capture_layer

    def interrupted(source, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        usual(source, index, *rest)

    for piece in ("layer-00000.safetensors", "layer-00001.safetensors", "run.json", "outputs"):
        monkeypatch.setattr(streaming, "_capture_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream_capture(stream_model(stored)[0], ids, work)
        monkeypatch.setattr(streaming, "_capture_layer", usual)
        damage(next((work / piece).iterdir()) if piece == "outputs" else work / piece)
        capsys.readouterr()
        stream_capture(stream_model(stored)[0], ids, work).save(tmp_path / "found")
        assert (work / piece).name.partition(".")[0] in capsys.readouterr().err
        assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()
        streaming._discard(work)


# --- signals (F11, F12, F30) -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_end_a_command_in_one_line_with_nothing_left(name, tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "model")
    save_file({"input_ids": tokens(400, 100)}, tmp_path / "ids.safetensors")
    words = ["--calibration", tmp_path / "ids.safetensors", "--sequences", 400, "--length", 100]
    words += ["--batch-size", 1, "--out", tmp_path / "s.safetensors"]
    run = command("capture", tmp_path / "model", *words)
    assert "collecting" in run.stdout.readline()
    run.send_signal(getattr(signal, name))
    _, said = run.communicate(timeout=60)
    assert run.returncode == 128 + getattr(signal, name)
    lines = [line for line in said.splitlines() if line.strip()]
    assert len(lines) == 1, said
    assert lines[0] in ("hcsmoe: interrupted.", f"hcsmoe: ended by {name}.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.safetensors", "model"]


def test_an_ignored_hangup_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup sets it
    try:
        cli.main(lambda: os.kill(os.getpid(), signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


DRIVER = """
import sys, time
from hcsmoe_core.studies import runner
if __name__ == "__main__":
    with runner.processes(2) as engine:
        import os
        print(engine.executor.submit(os.getpid).result(), flush=True)
        engine.executor.submit(time.sleep, 1000)
        engine.executor.submit(time.sleep, 1000)
        time.sleep(1)
        print("ready", flush=True)
        EXTRA
"""


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["time.sleep(1000)", "sys.exit(1)"])
def test_workers_end_with_their_driver(extra, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.replace("EXTRA", extra))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, tmp_path / "driver.py"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    worker = int(run.stdout.readline())
    assert run.stdout.readline() == "ready\n"
    if "1000" in extra:
        run.kill()
    run.stdout.read()  # until no process holds the pipe any more
    run.wait(timeout=60)
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")


# --- memory (F16) ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("load", ["whole", "streamed"])
def test_the_bound_of_memory_holds_or_is_refused_with_both_numbers(load, tmp_path):
    size, bound, peak = memory_bound.measured(1, load, tmp_path)
    assert size < bound
    assert peak <= 1.1 * bound
