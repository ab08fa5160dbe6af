"""The study that ``hcsmoe demo`` runs: every notebook on the embedded models, over experts kept and linkage."""

from hcsmoe_core import sweep
from hcsmoe_core.demo import models
from hcsmoe_core.files import check_choice
from hcsmoe_core.study import place, shown

EXPERTS = {"demo-mixtral": (6, 4, 2), "demo-qwen": (24, 16, 8)}  # 3/4, 1/2 and 1/4 of each
LOOKS = ("00_tour", "01_similarity", "02_dendrograms", "03_linkage", "04_merge")
LINKAGES = ("average", "complete", "single", "ward")


def run(names, out, figures, workers, limit):
    """Run the study; cells that are done are kept, so that it can be stopped and started again."""
    for name in names:
        check_choice("models", name, models.NAMES)
    out, shared = place(out), {"figures": str(figures)}
    path = sweep.notebook_path
    looks = [(path(n), {"model": m} | shared) for m in names for n in LOOKS]
    tours = [cell for cell in looks if cell[0].stem == "00_tour"]
    # The tour captures the statistics that all the others read.
    done = sweep.run_cells(tours, out, workers=workers, description="tour")
    scored = []
    for name in names:
        base = {"model": name, "limit": limit} | shared
        scored += [(path("05_accuracy"), base | {"experts": 0})]
        scored += [(path("05_accuracy"), c) for c in sweep.grid(base, experts=EXPERTS[name], linkage=LINKAGES)]
    done += sweep.run_cells([cell for cell in looks if cell not in tours], out, workers=workers, description="looks")
    cells = out / (f"{limit}-items" if limit else "all-items")  # scores on other items are another study
    done += sweep.run_cells(scored, cells, workers=workers, description="accuracy")
    for name in names:
        parameters = {"model": name, "sweep": str(cells)} | shared
        done.append(sweep.run_cell(path("06_ablation"), parameters, out, again=True))
    report(names, out, cells, figures, len(done))


def report(names, out, cells, figures, executed):
    """Print the table of scores, and where everything lies."""
    frame = sweep.collect(cells)
    for name in names:
        rows = frame[frame["model"] == name].copy()
        rows["linkage"] = rows["linkage"].where(rows["experts"] > 0, "(original)")
        rows = rows.sort_values(["experts", "linkage"], ascending=[False, True], key=_original_first)
        rows["accuracy"] = [
            f"{100 * a:.1f} ± {100 * e:.1f}" for a, e in zip(rows["mean_acc"], rows["mean_acc_stderr"], strict=True)
        ]
        rows["experts"] = rows["experts"].where(rows["experts"] > 0, rows["num_experts"])
        rows["loss"] = rows["mean_loss"].round(4)
        rows["weights"] = [f"{w:,}" for w in rows["weights"]]
        print(f"\n{name}")
        print(rows[["experts", "linkage", "weights", "accuracy", "loss"]].to_string(index=False))
    print(f"\nnotebooks and results  {shown(out)}  ({executed} executed)")
    for name in names:
        print(f"figures                {shown(place(figures) / name)}")


def _original_first(column):
    """Sort key: 0 experts stands for the original, which has the most."""
    return column.where(column > 0, column.max() + 1) if column.name == "experts" else column
