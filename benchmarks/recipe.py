"""The recommended method beside the others at the same bytes, calibrated in distribution, on two domains, and on own text.

    python benchmarks/recipe.py --out benchmarks/results/recipe.csv            # some hours on one core, resumable
    python benchmarks/recipe.py --models demo-qwen --calibrated self --seeds 3
    python benchmarks/recipe.py --models demo-qwen --calibrated "in distribution" --experts 28 24 20 12 4    # other sizes
    python benchmarks/recipe.py --calibrated "in distribution" --sequences 32    # a third of the tokens

Loss is nats a token on held-out text of the ten domains that are made by rule. "two" is calibrated on the other two, code and
prose; "two and self" on those and on three times as much that the model writes itself.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pandas as pd

import hcsmoe_core as core
from hcsmoe_core.compare import compare

MODELS = {"demo-qwen": (16, 8), "demo-mixtral": (4, 2)}
METHODS = ("hc-smoe", "mergemoe", "trimming", "least-residual")  # the paper's, and the best two of the table of all methods
LENGTH = 256
SHIFTED = ("hc-smoe", "least-residual")  # that are calibrated otherwise, too
CALIBRATED = {
    "in distribution": ("demo", 96),
    "self": ("self", 288),
    "two": ("demo:code,prose", 96),
    "two and self": ("demo:code,prose+3*self", 384),
}


def measured(arguments):
    """Every cell, as one table; those that are done are read."""
    frames = []
    for model in arguments.models:
        for name in arguments.calibrated:
            source, sequences = CALIBRATED[name]
            sequences = arguments.sequences or sequences
            methods = METHODS if name == "in distribution" else SHIFTED
            for seed in range(arguments.seeds):
                how = dict(calibration=source, sequences=sequences, length=LENGTH, limit=arguments.limit)
                frame = compare(
                    model,
                    methods=[method for method in methods if method in arguments.methods],
                    experts=arguments.experts or MODELS[model],
                    seeds=(seed,),
                    dtype="float32",
                    **how,
                    folder=f"{arguments.folder}/{name.replace(' ', '-')}-{sequences}/{seed}",
                )
                frames.append(frame.assign(model=model, calibrated=name))
    return pd.concat(frames, ignore_index=True)


def ratios(frame):
    """Loss that a method adds over that which HC-SMoE adds on the same sample, with a 95 % interval over samples."""
    from scipy.stats import t

    original = frame[frame["method"] == "original"].groupby("model")[["loss", "accuracy"]].first()
    merged = frame[(frame["method"] != "original") & frame["loss"].notna()].copy()
    merged["added"] = merged["loss"] - merged["model"].map(original["loss"])
    merged["retained"] = merged["accuracy"] / merged["model"].map(original["accuracy"])
    keys = ["model", "calibrated", "experts", "seed"]
    paper = merged[merged["method"] == "hc-smoe"].set_index(keys)["added"]
    merged["ratio"] = merged["added"] / merged.set_index(keys).index.map(paper)
    rows = []
    for key, part in merged.groupby(["model", "experts", "calibrated", "method"], sort=False):
        count = len(part)
        wide = t.ppf(0.975, count - 1) / count**0.5 if count > 1 else np.nan
        row = dict(zip(("model", "experts", "calibrated", "method"), key, strict=True), samples=count)
        for name in ("added", "ratio", "retained"):
            row |= {name: part[name].mean(), f"{name}_interval": wide * part[name].std(ddof=1) if count > 1 else np.nan}
        rows.append(row)
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--calibrated", nargs="+", default=list(CALIBRATED), choices=list(CALIBRATED))
    parser.add_argument("--seeds", type=int, default=5, help="calibration samples")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="hc-smoe, and others")
    parser.add_argument("--experts", nargs="+", type=int, help="kept in each layer; by default a half and a quarter")
    parser.add_argument("--sequences", type=int, help="of 256 tokens; by default 96, or 288 of own text")
    parser.add_argument("--limit", type=int, default=50, help="items of each task")
    parser.add_argument("--folder", default="runs/recipe", help="where cells are kept")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    table = ratios(measured(arguments))
    print(table.round(4).to_string(index=False))
    if arguments.out:
        table.round(5).to_csv(arguments.out, index=False)
        about = {"versions": core.evaluation.versions(), "seeds": arguments.seeds, "limit": arguments.limit}
        arguments.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
