"""The documentation site: generated pages, executed notebooks, and a strict build.

``./run docs`` makes it under ``runs/docs`` and serves it to this machine alone; ``./run docs --build`` only
makes it. Either fails on a broken link or reference. Notebooks executed before are not executed again.
"""

import argparse
import functools
import http.server
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hcsmoe_core.methods import METHODS, resolve
from hcsmoe_core.steps import TABLES
from hcsmoe_core.studies import sweep
from hcsmoe_core.ui import family_table

FOLDER = Path("runs/docs")
SOURCE, SITE, CELLS = FOLDER / "source", FOLDER / "site", FOLDER / "cells"
LOOKS = ("00_tour", "01_similarity", "02_dendrograms", "03_linkage", "04_merge")
TABLES_OF = {"06_ablation": {"sweep": str(CELLS)}, "07_paper": {"sweep": str(CELLS)}, "08_methods": {}}
TABLES_OF |= {"09_bytes": {}, "10_theory": {}}
EXPERTS = (0, 24, 16, 8)  # cells of 05_accuracy that the tables are made of


def methods() -> str:
    """Page of the methods and of the steps that they are made of, from their tables and docstrings."""
    lines = [
        "# Methods",
        "",
        "A method is a row of steps, and each step is one function. `--set name=value` changes any step or",
    ]
    lines += ["option. `recommended` is `least-residual`; the default is `hc-smoe`.", "", "## Methods", ""]
    for name, method in METHODS.items():
        steps = (_link(kind, step) for kind, step in resolve(name).settings.items())
        lines += [f"### {name}", "", f"{method.title[:1].upper()}{method.title[1:]}. *{method.paper}*. ", ""]
        lines += [f"Cost beside the capture: {method.cost}.", "", " · ".join(steps), ""]
    lines += [
        "## Steps",
        "",
        "Formulas are in the letters L layers, E experts, r experts kept, T tokens, D hidden size, I width.",
    ]
    for kind, table in TABLES.items():
        for name, step in table.items():
            options = ", ".join(f"`{option}={value}`" for option, value in step.options.items())
            text = inspect.getdoc(step.function) or ""
            lines += ["", f"### {kind}: {name} {{ #{kind}-{name} }}", "", *_plain(text), ""]
            lines += [f"Options: {options}."] if options else []
    return "\n".join(lines) + "\n"


def _link(kind, step):
    known = kind in TABLES and step in TABLES[kind]
    return f"{kind} [`{step}`](#{kind}-{step})" if known else f"{kind} `{step}`"


def _plain(text):
    """A docstring's prose: the part before its sections, reStructuredText's marks as Markdown's."""
    prose = text.split("\n\nParameters\n")[0].split("\n\nReturns\n")[0].replace("``", "`")
    for role in (":func:", ":data:", ":class:", ":mod:", ":meth:"):
        prose = prose.replace(role, "")
    return prose.splitlines()


def families() -> str:
    """Page of the MoE families of transformers and which kinds of checkpoints work on each."""
    version, rows = family_table.committed()
    lines = [
        "# Families",
        "",
        f"MoE families of transformers {version}, tried on tiny random models. `mapped` keeps the router,",
    ]
    lines += ["`folded` and `pruned` open in stock engines ([routers](routers-and-engines.md)).", ""]
    lines += [
        "| family | " + " | ".join(family_table.KINDS.values()) + " | router |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        works = " | ".join(
            "yes" if not row[kind] else row[kind].replace("|", "\\|") for kind in family_table.KINDS
        )
        name = row["family"] + " (with its other modalities)" * row["whole"]
        lines.append(f"| `{name}` | {works} | {row['router'] or '–'} |")
    return "\n".join(lines) + "\n"


def gallery(model="demo-qwen") -> None:
    """Execute every notebook on an embedded model, with few items, into the gallery."""
    shared = {"model": model, "figures": str(FOLDER / "figures")}
    cells = [(sweep.notebook_path("05_accuracy"), {"limit": 20, "experts": r} | shared) for r in EXPERTS]
    looks = [(sweep.notebook_path(name), shared) for name in LOOKS]
    executed = sweep.run_cells(looks[:1], FOLDER / "notebooks", description="tour")
    executed += sweep.run_cells(looks[1:], FOLDER / "notebooks", workers=2, description="notebooks")
    executed += sweep.run_cells(cells, CELLS, workers=2, description="accuracy")[2:3]
    tables = [(sweep.notebook_path(name), shared | more) for name, more in TABLES_OF.items()]
    executed += sweep.run_cells(tables, FOLDER / "notebooks", workers=2, description="tables")
    (SOURCE / "gallery").mkdir(parents=True)
    lines = ["# Gallery", "", f"Every notebook, executed on `{model}` with few items per task.", ""]
    for path in executed:
        name = path.name.rpartition("-")[0]
        shutil.copyfile(path, SOURCE / "gallery" / f"{name}.ipynb")
        lines.append(f"- [{name}]({name}.ipynb)")
    (SOURCE / "gallery" / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build() -> None:
    """Make the site; SystemExit if a link or reference is broken."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree("docs", SOURCE)
    shutil.copytree("figures", SOURCE / "figures", ignore=shutil.ignore_patterns("demo-*", "*.md"))
    for page in SOURCE.rglob("*.md"):  # what lies beside docs/ in the repository lies inside of the site
        page.write_text(
            page.read_text(encoding="utf-8")
            .replace("](../figures/", "](figures/")
            .replace("](../../figures/", "](../figures/"),
            encoding="utf-8",
        )
    (SOURCE / "methods.md").write_text(methods(), encoding="utf-8")
    (SOURCE / "families.md").write_text(families(), encoding="utf-8")
    gallery()
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    if done.returncode:
        sys.exit("The documentation has broken links or references; they are above.")
    print(f"wrote {SITE / 'index.html'}")


def main():
    """Build the site and serve it on the loopback address."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", action="store_true", help="only make it")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    build()
    if not options.build:
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=SITE)
        print(f"http://127.0.0.1:{options.port}/  (Ctrl-C ends it)")
        http.server.ThreadingHTTPServer(("127.0.0.1", options.port), handler).serve_forever()


if __name__ == "__main__":
    main()
