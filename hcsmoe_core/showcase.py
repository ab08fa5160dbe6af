"""The study of ``hcsmoe demo`` and ``hcsmoe figures``: every notebook on the embedded models, over what the paper compares."""

import shutil

from hcsmoe_core import paper, sweep
from hcsmoe_core.demo import models
from hcsmoe_core.files import check_choice
from hcsmoe_core.study import place, root, shown

EXPERTS = {"demo-mixtral": 8, "demo-qwen": 32}
QUARTERS = (3, 2, 1)  # of the experts are kept
BASELINES = ("f-prune", "s-prune", "m-smoe")  # of the paper's main tables, those that search for nothing
LOOKS = ("01_similarity", "02_dendrograms", "03_linkage", "04_merge")
LINKAGES = ("average", "complete", "single", "ward")
SEEDS = (42, 43, 44)  # calibration samples, the first of which everything is measured on
# The README's pictures, by the figures that they are copies of.
GALLERY = {
    "heatmap": "demo-qwen/01_heatmap-layer00-expert-output-average",
    "cut": "demo-qwen/02_cut-layer00-expert-output-average-16",
    "tanglegram": "demo-qwen/03_tanglegram-layer00-expert-output-average-ward-16",
    "accuracy-qwen": "demo-qwen/06_accuracy",
    "accuracy-mixtral": "demo-mixtral/06_accuracy",
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
        Measure all that the paper's tables compare, and draw every figure again even if its notebook is done.
    """
    for name in names:
        check_choice("models", name, models.NAMES)
    out, shared = place(out), {"figures": str(figures)}
    path = sweep.notebook_path
    # The tour captures the statistics that all the others read.
    how = dict(workers=workers, again=full)
    done = sweep.run_cells([(path("00_tour"), {"model": m} | shared) for m in names], out, description="tour", **how)
    looks = [(path(n), {"model": m} | shared) for m in names for n in LOOKS]
    done += sweep.run_cells(looks, out, description="looks", **how)
    cells = out / (f"{limit}-items" if limit else "all-items")  # scores on other items are another study
    scored = [(path("05_accuracy"), p | shared) for name in names for p in settings(name, limit, full=full)]
    done += sweep.run_cells(scored, cells, workers=workers, description="accuracy")
    read = []
    for name in names:
        read += [(path(n), {"model": name, "sweep": str(cells)} | shared) for n in ("06_ablation", "07_paper")]
        read += [(path(n), {"model": name} | shared) for n in ("08_methods", "09_bytes", "10_theory")]
    done += sweep.run_cells(read, out, workers=workers, again=True, description="tables")
    report(names, out, cells, figures, len(done))


def settings(name, limit, *, full=False):
    """Parameters of the cells of ``05_accuracy`` that are scored for an embedded model.

    Experts kept × linkage on one calibration sample, average linkage on all, and the methods of the paper's main tables; of
    the ``full`` study, all that its tables compare.

    Returns
    -------
    list of dict
    """
    base, kept = {"model": name, "limit": limit}, [EXPERTS[name] * part // 4 for part in QUARTERS]
    found = [base | {"experts": 0}]
    found += sweep.grid(base, experts=kept, linkage=LINKAGES)
    found += sweep.grid(base, experts=kept, linkage=LINKAGES[:1], seed=SEEDS[1:])
    measured = {(cell["experts"], sweep.setting_name(cell)) for cell in found}
    for cell in paper.wanted(EXPERTS[name]):
        known = (cell["experts"], sweep.setting_name(cell)) in measured
        if not known and (full or cell["method"] in BASELINES):
            found.append(base | cell)
    return found


def gallery(figures, names):
    """Copy the README's pictures from the figures of the embedded models."""
    for name, source in GALLERY.items():
        if source.partition("/")[0] not in names:
            continue
        shutil.copyfile(place(figures) / f"{source}.png", root() / f"figures/gallery/{name}.png")


def report(names, out, cells, figures, executed):
    """Print the table of scores, and where everything lies."""
    frame = sweep.collect(cells)
    for name in names:
        rows = sweep.over_samples(frame[frame["model"] == name])
        size = frame.loc[frame["model"] == name, "num_experts"].iloc[0]
        rows["experts"] = rows["experts"].where(rows["experts"] > 0, size)
        rows = rows.sort_values(["experts", "setting"], ascending=[False, True])
        rows["accuracy"] = [
            f"{100 * a:.1f} ± {100 * e:.1f}" for a, e in zip(rows["mean_acc"], rows["mean_acc_stderr"], strict=True)
        ]
        rows["loss"] = rows["mean_loss"].round(4)
        rows["MB"] = (rows["bytes"] / 1e6).round(2)
        print(f"\n{name}")
        print(rows[["experts", "setting", "MB", "samples", "accuracy", "loss"]].to_string(index=False))
    print(f"\nnotebooks and results  {shown(out)}  ({executed} executed)")
    for name in names:
        print(f"figures                {shown(place(figures) / name)}")
