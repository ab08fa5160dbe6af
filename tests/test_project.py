"""Rules of the repository: one source of dependencies, floors that import downwards, notebooks that stay
clean.
"""

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

from hcsmoe_core import _MODULES, _VERBS

VERBS = _VERBS | _MODULES  # names that the package imports late, and where from
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PACKAGE = ROOT / "hcsmoe_core"
FLOORS = [
    "core",
    "checkpoint",
    "scale",
    "methods",
    "text",
    "score",
    "demo",
    "studies",
    "ui",
]  # from the ground up


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
        *(name for extra in project()["optional-dependencies"].values() for name in extra),
    ]
    names = {re.match(r"[\w-]+", w)[0] for w in wanted} - {"hcsmoe"}
    assert names <= set(pinned), names - set(pinned)


def floor_of(module):
    """Floor of a module of the package, such as "hcsmoe_core.ui.cli"; the package itself stands above all."""
    first = module.split(".")[1:2]
    return FLOORS[-1] if not first else first[0] if first[0] in FLOORS else "core"


def imported(source, module):
    """Modules of the package that some source code imports, in whichever way, as dotted names.

    That is ``import``, ``from … import`` (absolute and relative), and any string that is the dotted name of a
    module of ours, as :func:`importlib.import_module` takes it. Verbs of the package count as the modules
    that they come from.
    """
    tree = ast.parse(source)
    texts = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}  # docstrings
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hcsmoe_core"))
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            if origin == "hcsmoe_core":
                yield from (f"hcsmoe_core.{VERBS.get(alias.name, alias.name)}" for alias in node.names)
            elif origin.startswith("hcsmoe_core."):
                yield origin
        elif isinstance(node, ast.Constant) and id(node) not in texts:
            yield from re.findall(r"^hcsmoe_core(?:\.\w+)+$", str(node.value))


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(part for part in parts if part != "__init__")


def test_floors_import_downwards_only():
    """``hcsmoe_core/__init__.py`` is the roof: it names the verbs of all floors, and who fills the tables."""
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert folders == set(FLOORS) - {"core"}
    for path, module in modules():
        if module == "hcsmoe_core":
            continue
        height = FLOORS.index(floor_of(module))
        above = [
            other for other in imported(path.read_text(), module) if FLOORS.index(floor_of(other)) > height
        ]
        assert not above, f"{path.relative_to(ROOT)} imports {above}"


@pytest.mark.parametrize(
    "line",
    [
        "import hcsmoe_core.ui.cli",
        "from hcsmoe_core.ui import cli",
        "from hcsmoe_core import ui",
        "from hcsmoe_core import make_plan",
        "from .ui import cli",
        "from . import ui",
        "from hcsmoe_core import plot",
        "def f():\n    import importlib\n    importlib.import_module('hcsmoe_core.ui.cli')",
    ],
)
def test_every_form_of_import_is_seen(line):
    (other,) = imported(line, "hcsmoe_core.merging")
    assert floor_of(other) in ("ui", "methods")


def test_the_package_stays_thin():
    statements, core_lines = 0, 0
    for path, module in modules():
        text = path.read_text()
        core_lines += len(text.splitlines()) if path.parent == PACKAGE else 0
        assert max(map(len, text.splitlines()), default=0) <= 110, path
        tree = ast.parse(text)
        for node in ast.walk(tree):
            statements += isinstance(node, ast.stmt)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                statements -= ast.get_docstring(node, clean=False) is not None
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
        assert "/" not in module
    # To come down to 3,200 lines and 6,600 statements; never up.
    assert core_lines <= 3740
    assert statements <= 8200


def test_verbs_are_few_and_no_module_has_the_name_of_one():
    import hcsmoe_core

    assert len(hcsmoe_core.__all__) <= 20
    assert not {path.stem for path, _ in modules()} & set(hcsmoe_core.__all__)
    for name in hcsmoe_core.__all__:
        assert getattr(hcsmoe_core, name)


def test_the_core_imports_without_what_only_notebooks_need():
    """A GPU machine may have torch, transformers, safetensors, scipy and tqdm alone."""
    script = (
        "import sys\n"
        "absent = 'datasets papermill lm_eval ipywidgets seaborn matplotlib pandas sklearn typer'\n"
        "for name in absent.split():\n"
        "    sys.modules[name] = None\n"
        "import hcsmoe_core\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "from hcsmoe_core import capture, make_plan, apply_plan, restore, load_statistics, load_plan, "
        "linkage\n"
        "import hcsmoe_core.checkpoint, hcsmoe_core.scale.streaming, hcsmoe_core.score.fidelity\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_command_tells_its_options_without_torch():
    script = (
        "import sys\n"
        "from hcsmoe_core.ui.cli import main\n"
        "sys.argv = ['hcsmoe', '--help']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as done:\n"
        "    assert not done.code\n"
        "assert not {'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_nothing_is_unpickled():
    for path in (ROOT / "hcsmoe_core").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"import pickle|torch\.load\(", text), path
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        # Code of a model is run if the caller says so: what is passed is what was given, False by default.
        passed = [k.value for call in calls for k in call.keywords if k.arg == "trust_remote_code"]
        assert {ast.unparse(value) for value in passed} <= {"trust_remote_code", "False"}, path
        assert set(re.findall(r"trust_remote_code: \w+ = (\w+)", text)) <= {"False"}, path
        assert "trust_remote_code=True" not in {ast.unparse(k) for call in calls for k in call.keywords}, path


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
