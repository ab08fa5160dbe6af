"""The README: short, and every command in it does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_it_is_read_in_five_minutes():
    lines = README.splitlines()
    assert len(lines) <= 200
    prose = [line for line in lines if not line.startswith(("|", "<")) and "](" not in line]
    assert [line for line in prose if len(line) > 130] == []


def test_its_links_lead_somewhere():
    links = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', README)
    local = [a or b for a, b in links if not (a or b).startswith("http")]
    assert len(local) > 15
    assert [link for link in local if not (ROOT / link).exists()] == []


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    """In an empty folder, in order; what installs and what tests is run by continuous integration itself."""
    commands = [line.partition("  #")[0] for block in blocks("sh") for line in block.splitlines()]
    ran = [command.split() for command in commands if command.startswith("hcsmoe ")]
    assert [command for command in commands if not command.startswith(("hcsmoe ", "./run"))] == []
    assert len(ran) >= 6
    for command in ran:
        done = subprocess.run(
            [sys.executable, "-m", "hcsmoe_core.ui.cli", *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    assert (tmp_path / "half-best" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_python_runs(tmp_path):
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "merged" / "config.json").is_file()


@pytest.mark.slow
def test_the_notebook_command_runs(tmp_path):
    (line,) = re.findall(r"`papermill (notebooks/\S+ .*?)`", README)
    notebook, out, *parameters = line.split()
    command = [sys.executable, "-m", "papermill", str(ROOT / notebook), out, *parameters]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(tmp_path, out).is_file()
