"""What ``./run`` does: the product on an embedded model, in about three minutes on two cores.

Capture, similarities and the merge tree; a merge to half by the paper's method and by the recommended one;
loss and accuracy of all, and a small accuracy curve. Leaves a picture, a table and one HTML file; finished
steps are kept.
"""

import argparse
import time
from pathlib import Path

from hcsmoe_core.studies import sweep

MODEL = "demo-qwen"
ITEMS = 25  # per task: 200 in all
METHODS = [("recommended", 16), ("hc-smoe", 24), ("hc-smoe", 16), ("hc-smoe", 8)]  # the slowest first
TABLE = ["setting", "experts", "MB", "accuracy", "loss"]


def look(folder: Path) -> tuple[Path, str]:
    """Capture what every notebook reads; a heatmap, the view of all layers as HTML, and its verdict."""
    from hcsmoe_core import distances, linkage, load_model
    from hcsmoe_core.studies.cache import cached_statistics
    from hcsmoe_core.ui import figures, report

    model, tokenizer = load_model(MODEL, dtype="float32")
    stats = cached_statistics(model, tokenizer, needs=["sample"])
    condensed = distances(stats, layer=0)
    title = f"{MODEL}, MoE layer 0: which experts compute the same thing"
    figure = figures.similarity_heatmap(condensed, linkage(condensed), groups=16, title=title)
    folder.mkdir(parents=True, exist_ok=True)
    picture = figures.save(figure, folder / "heatmap")[0]
    print(f"first picture: {picture}", flush=True)
    result = report.write_report(stats, html := folder / f"{MODEL}.html", model=model)
    return html, report.ANSWERS[result["answer"]]


def cells(folder: Path, figures: Path) -> list[tuple[Path, dict]]:
    """Cells of ``05_accuracy``: the original, the curve, and the recommended method."""
    shared = dict(model=MODEL, limit=ITEMS, figures=str(figures), dtype="float32")
    merged = [dict(method=method, experts=experts) for method, experts in METHODS]
    return [(sweep.notebook_path("05_accuracy"), shared | cell) for cell in (*merged, {"experts": 0})]


def table(folder: Path) -> str:
    """Loss and accuracy of every cell."""
    frame = sweep.over_samples(sweep.collect(folder, model=MODEL))
    frame["experts"] = frame["experts"].where(frame["experts"] > 0, 32)
    accuracy = zip(100 * frame["mean_acc"], 100 * frame["mean_acc_stderr"], strict=True)
    frame["accuracy"] = [f"{mean:.1f} ± {error:.1f} %" for mean, error in accuracy]
    frame["MB"], frame["loss"] = (frame["bytes"] / 1e6).round(1), frame["mean_loss"].round(3)
    return frame.sort_values(["experts", "loss"], ascending=[False, True])[TABLE].to_string(index=False)


def main():
    """Run it, saying what is being done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/first"))
    out, started = parser.parse_args().out, time.perf_counter()

    def say(text):
        print(f"[{time.perf_counter() - started:4.0f} s] {text}", flush=True)

    say(f"capturing {MODEL} on 24,576 tokens, and a first picture (15 s)")
    html, verdict = look(out)
    say(f"interactive view of all layers: {html}")
    say("similarities and merge trees: notebooks 01 and 02 (30 s)")
    looks = [
        (sweep.notebook_path(name), dict(model=MODEL, figures=str(out), dtype="float32"))
        for name in ("01_similarity", "02_dendrograms")
    ]
    sweep.run_cells(looks, out / "notebooks", workers=2, description="notebooks")
    say(f"merging to 24, 16 and 8 of 32 experts and scoring {8 * ITEMS} items each (70 s)")
    sweep.run_cells(cells(out / "cells", out), out / "cells", workers=2, description="accuracy")
    say("accuracy curve: notebook 06 (10 s)")
    curve = dict(model=MODEL, sweep=str(out / "cells"), figures=str(out))
    sweep.run_cells([(sweep.notebook_path("06_ablation"), curve)], out / "notebooks", again=True)
    say("done")
    print(f"""
{table(out / "cells")}

loss: nats per token on held-out text; accuracy: {8 * ITEMS} items of eight tasks, ± one standard error

verdict      {verdict}
open next    {html}   (all layers: drag the cut, see what it costs, save the plan)
notebooks    {out / "notebooks"}   (executed)
your model   ./run hcsmoe merge MODEL --experts R --out DIR
explore      ./run lab
everything   ./run figures   (both models, every notebook and grid)""")


if __name__ == "__main__":
    main()
