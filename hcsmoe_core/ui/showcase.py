"""The study of ``hcsmoe demo`` and ``hcsmoe figures``: every notebook on the embedded models, over what the paper compares."""

import itertools
import shutil

from hcsmoe_core._util import check_choice, place, root, shown
from hcsmoe_core.demo import models
from hcsmoe_core.studies import grids, sweep

BRIEF = ("methods", "samples", "sizes")  # grids that the brief study is made of


LOOKS = ("01_similarity", "02_dendrograms", "03_linkage", "04_merge")


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


def run(names, out, figures, workers, limit, *, full=False):
    """Run the study; cells that are done are kept, so that it can be stopped and started again.

    Parameters
    ----------
    names : list of str
        Embedded models.
    out, figures : str or path
        Folders of executed notebooks with their results, and of figures.
    workers : int
        Notebooks side by side.
    limit : int
        Items of each task; 0 for all.
    full : bool
        Measure every grid of :mod:`hcsmoe_core.studies.grids` and draw each, and draw every figure again even if its notebook is done.
    """
    for name in names:
        check_choice("models", name, models.NAMES)
    out, shared = place(out), {"figures": str(figures)}
    path = sweep.notebook_path
    # The tour captures the statistics that all the others read.
    how = dict(workers=workers, again=full)
    done = sweep.run_cells(
        [(path("00_tour"), {"model": m} | shared) for m in names], out, description="tour", **how
    )
    looks = [(path(n), {"model": m} | shared) for m in names for n in LOOKS]
    done += sweep.run_cells(looks, out, description="looks", **how)
    cells = out / (f"{limit}-items" if limit else "all-items")  # scores on other items are another study
    chosen = grids.names() if full else list(BRIEF)
    done += grids.run(grids.plans(chosen, names, {"limit": limit} | shared), cells, workers=workers)
    if full:
        done += draw(chosen, names, cells, figures, workers)
    read = []
    for name in names:
        about = {"model": name, "sweep": str(cells)} | shared
        read += [(path("06_ablation"), about | {"grid": ",".join(BRIEF)}), (path("07_paper"), about)]
        read += [(path(n), {"model": name} | shared) for n in ("08_methods", "09_bytes", "10_theory")]
    done += sweep.run_cells(read, out, workers=workers, again=True, description="tables")
    report(names, out, cells, figures, len(done))


def draw(chosen, names, cells, figures, workers):
    """Table and figures of each study and model by ``06_ablation``, from cells that are measured.

    Parameters
    ----------
    chosen, names : list of str
        Grids and models.
    cells : path
        Folder of the cells; the executed notebooks go there, too.
    figures : str or path
    workers : int
        Notebooks side by side.

    Returns
    -------
    list of Path
        Executed notebooks.
    """
    read = []
    for study in map(grids.load, chosen):
        for name in names:
            about = {"model": name, "sweep": str(cells), "grid": study.name, "figures": str(figures)}
            read.append((sweep.notebook_path("06_ablation"), about | study.read))
    return sweep.run_cells(read, cells, workers=workers, again=True, description="studies")


def gallery(figures, names):
    """Copy the README's pictures, and the table of each study, from the figures of the embedded models."""
    for name, source in GALLERY.items():
        if source.partition("/")[0] not in names:
            continue
        shutil.copyfile(place(figures) / f"{source}.png", root() / f"figures/gallery/{name}.png")
    (root() / "figures/studies").mkdir(exist_ok=True)
    for study, name, kind in itertools.product(grids.names(), names, ("csv", "tex")):
        shutil.copyfile(
            place(figures) / f"{name}/06_{study}-table.{kind}",
            root() / f"figures/studies/{name}-{study}.{kind}",
        )


def report(names, out, cells, figures, executed):
    """Print the table of scores, and where everything lies."""
    for name in names:
        frame = sweep.collect(cells, model=name, grid=",".join(BRIEF))
        rows, size = sweep.over_samples(frame), frame["num_experts"].iloc[0]
        rows["experts"] = rows["experts"].where(rows["experts"] > 0, size)
        rows = rows.sort_values(["experts", "setting"], ascending=[False, True])
        rows["accuracy"] = [
            f"{100 * a:.1f} ± {100 * e:.1f}"
            for a, e in zip(rows["mean_acc"], rows["mean_acc_stderr"], strict=True)
        ]
        rows["loss"] = rows["mean_loss"].round(4)
        rows["MB"] = (rows["bytes"] / 1e6).round(2)
        print(f"\n{name}")
        print(rows[["experts", "setting", "MB", "samples", "accuracy", "loss"]].to_string(index=False))
    print(f"\nnotebooks and results  {shown(out)}  ({executed} executed)")
    for name in names:
        print(f"figures                {shown(place(figures) / name)}")
