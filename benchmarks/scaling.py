"""How time and memory of a capture grow with tokens, experts, layers and ranks: log axes, slopes written
beside.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json     # two minutes on an idle core
    python benchmarks/scaling.py --draw benchmarks/results/scaling.json    # the figure again

Random Qwen2-MoE-shaped models on random tokens, HC-SMoE's needs. Each point is a process of its own: seconds
of the processor that the capture takes (of the slowest rank, where there are several), and memory: the
model's weights, and how far the peak is above what was held after a capture of a few tokens. The slope is
that of a straight line through the logarithms: 1 is linear, 0 does not grow, -1 halves with twice as many.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from measuring import machine, tell, timed
from pipeline import build

import hcsmoe_core as core
from hcsmoe_core._util import read_json, replacing
from hcsmoe_core.methods import resolve
from hcsmoe_core.scale import ranks
from hcsmoe_core.ui import figures

USUAL = {"tokens": 4096, "experts": 32, "layers": 4, "ranks": 1}
AXES = {
    "tokens": (2048, 4096, 8192, 16384),
    "experts": (8, 16, 32, 64),
    "layers": (2, 4, 8),
    "ranks": (1, 2, 4),
}
PICTURE = Path(__file__).parent.parent / "figures" / "benchmarks" / "scaling.png"


def run(tokens, experts, layers):
    """One point, in this process, which may be one of several ranks; rank 0 prints what the largest of them
    took.
    """
    ranks.started("cpu")
    how = dict(hidden=128, width=88, families=0, noise=0.0, dtype="float32", device="cpu")
    model = build(argparse.Namespace(experts=experts, layers=layers, **how))
    ids = torch.randint(0, 1024, (tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    options = dict(needs=resolve("hc-smoe").needs, batch_size=2, ranks=ranks, progress=False)
    core.capture(model, ids[: 2 * ranks.size()], **options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    seconds = timed("cpu", core.capture, model, ids, **options)[1]
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    held = model_bytes + memory("VmHWM") - before
    found = ranks.total(
        torch.tensor([seconds, held, model_bytes], dtype=torch.float64), largest=True
    ).tolist()
    if ranks.left() == 0:
        print(json.dumps(dict(zip(("seconds", "memory", "model"), found, strict=True))))


def memory(kind):
    """Bytes that this process holds (VmRSS) or held at most (VmHWM), as Linux tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) * 1024


def point(axis, value):
    sizes = USUAL | {axis: value}
    words = [__file__, "--point", *(str(sizes[name]) for name in ("tokens", "experts", "layers"))]
    if sizes["ranks"] > 1:
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(sizes["ranks"]),
            *words,
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = {axis: value} | json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("{"))
    )
    print(found, flush=True)
    return found


def slope(rows, axis, what):
    """Slope of the logarithms, or None where something is zero."""
    x, y = np.array([[row[axis], row[what]] for row in rows], dtype=float).T
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if (y > 0).all() else None


@figures.styled
def draw(rows):
    """Time above, memory below, a column for each axis."""
    figure = figures.Figure(figsize=(figures.PAGE, 3.2), layout="constrained")
    panels = figure.subplots(2, len(rows), sharey="row")
    what = (("seconds", 1, "processor time, s"), ("memory", 1e6, "memory, MB"))
    for column, (axis, points) in enumerate(rows.items()):
        x = [point[axis] for point in points]
        for panel, (key, unit, label) in zip(panels[:, column], what, strict=True):
            panel.loglog(x, [point[key] / unit for point in points], marker="o", markersize=3)
            found = slope(points, axis, key)
            panel.set_title("does not grow" if found is None else f"slope {found:+.2f}", fontsize=7)
            panel.xaxis.set_minor_locator(NullLocator())
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_locator(NullLocator())
            panel.set_xticks(x, [f"{value:,}" for value in x], fontsize=5)
            if column == 0:
                panel.set_ylabel(label)
        panels[1, column].set_xlabel(axis)
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--point", type=int, nargs=3, help="(one point: tokens, experts, layers)")
    parser.add_argument("--draw", type=Path, help="results to draw")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if arguments.point:
        run(*arguments.point)
        return
    if arguments.draw:
        rows = read_json(arguments.draw)["points"]
    else:
        rows = {axis: [point(axis, value) for value in values] for axis, values in AXES.items()}
        slopes = {
            axis: {w: slope(found, axis, w) for w in ("seconds", "memory")} for axis, found in rows.items()
        }
        tell({"slopes": slopes, "points": rows, "usual": USUAL, "machine": machine()}, arguments.out)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    with replacing(PICTURE) as part:
        part.write_bytes(figures.png(draw(rows), dpi=150))
    print(PICTURE)


if __name__ == "__main__":
    main()
