"""The study of the embedded models: every notebook on them, over grids. ``./run figures`` is it."""

import itertools
import shutil
from pathlib import Path
from typing import Annotated

import typer

from hcsmoe_core._util import EMBEDDED, check_choice
from hcsmoe_core.studies import grids, sweep
from hcsmoe_core.ui.cli import draw, main, side_by_side

BRIEF = ("methods", "samples", "sizes")  # grids of the brief study
# Notebooks that look at one model each, and those that read what was measured; the tour comes before all.
LOOKS = ("01_similarity", "02_dendrograms", "03_linkage", "04_merge")
TABLES = ("08_methods", "09_bytes", "10_theory")
# The README's pictures, by the figures that they are copies of.
GALLERY = {
    "heatmap": "demo-qwen/01_heatmap-layer00-expert-output-average",
    "cut": "demo-qwen/02_cut-layer00-expert-output-average-16",
    "tanglegram": "demo-qwen/03_tanglegram-layer00-expert-output-average-ward-16",
    "accuracy-qwen": "demo-qwen/06_accuracy",
    "accuracy-mixtral": "demo-mixtral/06_accuracy",
    "reduction-qwen": "demo-qwen/06_reduction-loss",
    "reduction-mixtral": "demo-mixtral/06_reduction-loss",
}

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
OUT = Annotated[Path, typer.Option(help="Folder of the executed notebooks and results.")]
FIGURES = Annotated[Path, typer.Option(help="Folder of the figures.")]
MODELS = Annotated[str, typer.Option(help="Embedded models, comma-separated.")]
WORKERS = Annotated[int, typer.Option(help="Notebooks run side by side; 0 for one per core, at most two.")]
LIMIT = Annotated[int | None, typer.Option(help="Items per task.")]


@app.command()
def study(
    full: Annotated[bool, typer.Option("--full", help="Every grid, and every figure again.")] = False,
    out: OUT = Path("runs/demo"),
    figures: FIGURES = Path("figures"),
    models: MODELS = "demo-qwen,demo-mixtral",
    workers: WORKERS = 0,
    limit: LIMIT = 100,
):
    """Run every notebook on the embedded models, over grids of settings; scores that exist are kept."""
    run(_items(models), out, figures, side_by_side(workers), limit, full=full)
    if full:
        gallery(figures, _items(models))


def _items(models):
    return [model.strip() for model in models.split(",") if model.strip()]


def run(models, out, figures, workers, limit=None, *, full=False):
    """Run the study; finished cells are kept, so that it can be stopped and started again.

    Parameters
    ----------
    models : list of str
        Embedded models.
    out, figures : str or path
        Folders of executed notebooks with their results, and of figures.
    workers : int
        Notebooks side by side.
    limit : int, optional
        Items of each task; by default all.
    full : bool
        Measure and draw every grid of :mod:`hcsmoe_core.studies.grids`, and draw every figure again even if
        its notebook is finished.
    """
    for model in models:
        check_choice("models", model, EMBEDDED)

    shared = {"figures": str(figures)}
    numbers = {"dtype": "float32"}  # of the published numbers; the weights are stored in 16 bits

    def notebooks(*names, **parameters):
        parameters |= shared
        return [(sweep.notebook_path(name), {"model": m} | parameters) for m in models for name in names]

    # The tour captures the statistics that all the others read.
    options = dict(workers=workers, again=full)
    done = sweep.run_cells(notebooks("00_tour", **numbers), out, description="tour", **options)
    done += sweep.run_cells(notebooks(*LOOKS, **numbers), out, description="looks", **options)
    # Scores on other items are another study.
    cells = Path(out) / (f"{limit}-items" if limit else "all-items")
    chosen = grids.names() if full else list(BRIEF)
    planned = grids.plans(chosen, models, ({"limit": limit} if limit else {}) | numbers | shared)
    done += grids.run(planned, cells, workers=workers)
    if full:
        done += draw(cells, figures, chosen, models, workers)
    tables = notebooks("06_ablation", sweep=str(cells), grid=",".join(BRIEF))
    tables += notebooks("07_paper", sweep=str(cells), **numbers) + notebooks(*TABLES)
    done += sweep.run_cells(tables, out, workers=workers, again=True, description="tables")
    report(models, out, cells, figures, len(done))


def gallery(figures, models):
    """Copy the README's pictures, and the table of each grid, from the figures of the embedded models."""
    copies = {f"gallery/{name}.png": f"{source}.png" for name, source in GALLERY.items()}
    for grid, model, suffix in itertools.product(grids.names(), models, ("csv", "tex")):
        copies[f"studies/{model}-{grid}.{suffix}"] = f"{model}/06_{grid}-table.{suffix}"
    for target, source in copies.items():
        if source.partition("/")[0] in models:
            path = Path("figures") / target
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(figures) / source, path)


def report(models, out, cells, figures, executed):
    """Print the table of scores, and where everything is."""
    for model in models:
        frame = sweep.collect(cells, model=model, grid=",".join(BRIEF))
        rows = sweep.over_samples(frame)
        rows["experts"] = rows["experts"].where(rows["experts"] > 0, frame["num_experts"].iloc[0])
        rows = rows.sort_values(["experts", "setting"], ascending=[False, True])
        scores = zip(100 * rows["mean_acc"], 100 * rows["mean_acc_stderr"], strict=True)
        rows["accuracy"] = [f"{accuracy:.1f} ± {error:.1f}" for accuracy, error in scores]
        rows["loss"], rows["MB"] = rows["mean_loss"].round(4), (rows["bytes"] / 1e6).round(2)
        print(f"\n{model}")
        print(rows[["experts", "setting", "MB", "samples", "accuracy", "loss"]].to_string(index=False))
    print(f"\nnotebooks and results  {out}  ({executed} executed)")
    print(*(f"figures                {Path(figures) / model}" for model in models), sep="\n")


if __name__ == "__main__":
    main(app)
