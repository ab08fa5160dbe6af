"""Rules of the repository: one source of dependencies, rooms that import downwards, notebooks that stay clean."""

import ast
import json
import re
import subprocess
import sys
import tomllib

import papermill
import pytest
import yaml
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ROOMS = [  # top to bottom: a room imports none above it
    "cli",
    "showcase",
    "reproduce",
    "grids",
    "paper",
    "sweep",
    "engines",
    "theory",
    "tradeoff",
    "compare",
    "explore",
    "anatomy",
    "stability",
    "study",
    "figures",
    "evaluation",
    "harness",
    "families",
    "streaming",
    "checkpoint",
    "export",
    "fidelity",
    "methods",
    "residual",
    "rounding",
    "merging",
    "compression",
    "combining",
    "folding",
    "plan",
    "budget",
    "clustering",
    "pruning",
    "similarity",
    "capture",
    "statistics",
    "calibration",
    "owntext",
    "moe",
    "demo",
    "ranks",
    "modeling_hcsmoe",
    "files",
    "version",
]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_holds_only_what_pip_cannot_give():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert python == f"python{project()['requires-python']}"
    assert pip == "pip"
    assert packages == {"pip": ["-c constraints.txt", "-e .[test]"]}


def test_constraints_pin_every_direct_dependency():
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert pinned["torch"] == "2.13.0"
    wanted = [
        *project()["dependencies"],
        *project()["optional-dependencies"]["test"],
        *project()["optional-dependencies"]["eval"],
        *project()["optional-dependencies"]["cluster"],
    ]
    names = {re.match(r"[\w-]+", w)[0] for w in wanted} - {"hcsmoe"}
    assert names <= set(pinned), names - set(pinned)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hcsmoe_core"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name for a in node.names if a.name in ROOMS]


def test_rooms_import_downwards():
    package = ROOT / "hcsmoe_core"
    found = {p.stem for p in package.glob("*.py")} - {"__init__"} | {"demo"}
    assert found == set(ROOMS)
    for room in ROOMS:
        files = (package / "demo").glob("*.py") if room == "demo" else [package / f"{room}.py"]
        for file in files:
            above = [other for other in imported(file) if ROOMS.index(other) < ROOMS.index(room)]
            assert not above, f"{file.name} imports {above}"


def test_the_core_imports_without_what_only_notebooks_need():
    """A GPU machine may have torch, transformers, safetensors, scipy and tqdm alone."""
    script = (
        "import sys\n"
        "absent = 'datasets papermill lm_eval ipywidgets seaborn matplotlib pandas sklearn typer'\n"
        "for name in absent.split():\n"
        "    sys.modules[name] = None\n"
        "import hcsmoe_core\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_nothing_is_unpickled():
    for path in (ROOT / "hcsmoe_core").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"import pickle|torch\.load\(", text), path
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert "trust_remote_code" not in {keyword.arg for call in calls for keyword in call.keywords}, path


def test_names_of_notebooks_are_known():
    from hcsmoe_core.ui.notebook import NOTEBOOKS as KNOWN

    assert tuple(p.stem for p in NOTEBOOKS) == KNOWN


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_their_rules(path):
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert cells[0]["cell_type"] == "markdown"
    assert re.match(rf"# {path.stem[:2]} \w+\n", "".join(cells[0]["source"]))
    assert "*Cost:*" in "".join(cells[0]["source"])
    assert cells[1]["metadata"]["tags"] == ["parameters"]
    lines = "".join(cells[1]["source"]).splitlines()
    for line in lines:
        assert re.fullmatch(r"\w+: (str|int|float|bool) = \S.*  # \S.*", line), line
    assert list(papermill.inspect_notebook(str(path))) == [line.partition(":")[0] for line in lines]
    assert "record.close(" in "".join(code[-1]["source"])
    for cell in code:
        source = "".join(cell["source"])
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        assert "tags" in cell["metadata"] or source.count("\n") < 12, cell["id"]
        assert not re.search(r"^\s*(def|class) |lambda", source, re.M), cell["id"]
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", c["id"]) for c in cells)
    assert len({c["id"] for c in cells}) == len(cells)


def test_readme_names_the_two_commands_and_its_pictures_exist():
    text = (ROOT / "README.md").read_text()
    assert "./run\n" in text
    assert "./run test" in text
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert pictures
    assert all((ROOT / p).is_file() for p in pictures)
