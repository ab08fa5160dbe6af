"""The one runner: what a key covers, what is measured again and what is not, and what a failure leaves."""

import os
import shutil
from pathlib import Path

import pytest

import hcsmoe_core
from hcsmoe_core import load_model
from hcsmoe_core._util import InputError
from hcsmoe_core.studies import cache, runner

PACKAGE = Path(hcsmoe_core.__file__).parent


@pytest.fixture
def package(tmp_path):
    """A copy of the package's code, to edit."""
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / "hcsmoe_core" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path / "hcsmoe_core"


def edited(path, text):
    path.write_text(path.read_text() + text)


def test_keys_go_by_the_code_that_computes_and_by_nothing_else(package):
    before = cache.code_hash(package)
    assert before == cache.code_hash()
    for name in ("ui/figures.py", "studies/tables.py", "studies/paper.py"):
        edited(package / name, "\nEDITED = 1\n")
    for name in ("collect.py", "similarity.py"):
        edited(package / name, "\n# a comment\n\n\n")
    source = (package / "merging.py").read_text()
    (package / "merging.py").write_text(source.replace('"""', '"""Said otherwise. ', 1))
    assert cache.code_hash(package) == before
    seen = {before}
    for name in ("collect.py", "methods/planner.py", "scale/streaming.py", "text/calibration.py"):
        edited(package / name, "\nEDITED = 1\n")
        seen.add(cache.code_hash(package))
    assert len(seen) == 5


def test_statistics_are_captured_again_when_capture_is_edited_and_kept_when_figures_are(
    package, tmp_path, monkeypatch
):
    model, tokenizer = load_model("demo-mixtral", dtype="float32")
    calls, real, whole = [], cache.capture, cache.code_hash
    monkeypatch.setattr(cache, "capture", lambda *args, **options: calls.append(1) or real(*args, **options))
    monkeypatch.setattr(cache, "code_hash", lambda: whole(package))
    options = dict(calibration="demo", sequences=12, length=32, folder=tmp_path / "s")
    cache.cached_statistics(model, tokenizer, **options)
    edited(package / "ui/figures.py", "\nEDITED = 1\n")
    cache.cached_statistics(model, tokenizer, **options)
    assert len(calls) == 1
    edited(package / "collect.py", "\nEDITED = 1\n")
    cache.cached_statistics(model, tokenizer, **options)
    assert len(calls) == 2
    cache.cached_statistics(model, tokenizer, **options, sample=64)
    assert len(calls) == 3


def test_keys_go_by_the_content_of_plugins(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("A = 1\n")
    first = cache.key({"plugin": str(plugin)})
    plugin.write_text("A = 22\n")
    assert cache.key({"plugin": str(plugin)}) != first
    assert cache.key({"a": 1}) != cache.key({"a": 2}) != cache.key({"a": 2}, model="x")


def doubled(settings):
    return settings | {"result": 2 * settings["a"]}


def tripled(settings):
    return settings | {"result": 3 * settings["a"]}


def test_a_function_of_settings_is_measured_once_and_again_when_it_is_another(tmp_path, monkeypatch):
    found = runner.measure(doubled, [{"a": 1}, {"a": 2}], tmp_path, shared={"b": 0})
    assert [content["result"] for content in found] == [2, 4]
    monkeypatch.setattr(runner, "_write_result", lambda *_: pytest.fail("measured twice"))
    assert runner.measure(doubled, [{"a": 2}], tmp_path, shared={"b": 0}) == found[1:]
    monkeypatch.undo()
    assert runner.measure(tripled, [{"a": 2}], tmp_path, shared={"b": 0})[0]["result"] == 6
    assert len(list(tmp_path.iterdir())) == 3


def sometimes(settings):
    if settings["a"] == 2 and not Path(settings["flag"]).exists():
        raise ValueError("an internal error")
    return settings


def test_a_failure_stops_no_other_cell_keeps_its_traceback_and_is_tried_again(tmp_path):
    flag, out = tmp_path / "flag", tmp_path / "out"
    cells, options = [{"a": a} for a in (1, 2, 3)], dict(shared={"flag": str(flag)})
    with pytest.raises(
        runner.CellsError, match=r"1 of 3 cells failed.*\n.*'a': 2.*an internal error"
    ) as error:
        runner.measure(sometimes, cells, out, **options)
    assert isinstance(error.value.__cause__, ValueError)
    assert "in sometimes" in next(out.glob("*.failed.txt")).read_text()
    assert len(list(out.glob("*.json"))) == 2
    flag.touch()
    assert len(runner.measure(sometimes, cells, out, **options)) == 3
    assert not list(out.glob("*.failed.txt"))


def test_the_environment_of_the_caller_is_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before, inside = dict(os.environ), {}

    def work(path):
        inside.update(os.environ)
        path.touch()

    runner.complete(runner.Cell(tmp_path / "a.txt", work), threads=2)
    assert (inside["OMP_NUM_THREADS"], inside["MKL_NUM_THREADS"], inside["TQDM_DISABLE"]) == ("2", "2", "1")
    assert dict(os.environ) == before

    def fails(path):
        raise InputError("no")

    with pytest.raises(InputError):
        runner.complete(runner.Cell(tmp_path / "b.txt", fails), threads=2)
    assert dict(os.environ) == before
