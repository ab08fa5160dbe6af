"""The recommended method beside the others at the same bytes, calibrated in distribution, on two domains, and
on own text.

    python benchmarks/recipe.py --out benchmarks/results/recipe.csv            # an hour and a half on one
    core, resumable python benchmarks/recipe.py --models demo-qwen --calibrated self --seeds 3
    python benchmarks/recipe.py --models demo-qwen --calibrated "in distribution" --experts 28 24 20 12 4    #
    other sizes python benchmarks/recipe.py --calibrated "in distribution" --sequences 32    # a third of the
    tokens

Loss is nats a token on held-out text of the ten domains that are made by rule. "two" is calibrated on the
other two, code and prose; "two and self" on those and on three times as much that the model writes itself.
Accuracies are also compared item by item: "gain" is the recommended method's accuracy less another's on the
same samples, each item's mean over them, with its standard error over the items.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd

from hcsmoe_core._util import versions
from hcsmoe_core.score.evaluation import paired
from hcsmoe_core.studies.comparison import compare, newest_cells

MODELS = {"demo-qwen": (16, 8), "demo-mixtral": (4, 2)}
METHODS = (
    "hc-smoe",
    "mergemoe",
    "trimming",
    "least-residual",
)  # the paper's, and the best two of the table of all methods
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
    for model, name, seed in cases(arguments):
        methods = METHODS if name == "in distribution" else SHIFTED
        source, sequences = CALIBRATED[name]
        frame = compare(
            model,
            methods=[method for method in methods if method in arguments.methods],
            experts=arguments.experts or MODELS[model],
            seeds=(seed,),
            dtype="float32",
            calibration=source,
            sequences=arguments.sequences or sequences,
            length=LENGTH,
            limit=arguments.limit,
            folder=folder_of(arguments, name, seed),
        )
        frames.append(frame.assign(model=model, calibrated=name))
    return pd.concat(frames, ignore_index=True)


def cases(arguments):
    return itertools.product(arguments.models, arguments.calibrated, range(arguments.seeds))


def folder_of(arguments, name, seed):
    return f"{arguments.folder}/{name.replace(' ', '-')}-{arguments.sequences or CALIBRATED[name][1]}/{seed}"


def gains(arguments):
    """Accuracy of the recommended method less that of each other, item by item: by model, experts,
    calibration and method.
    """
    answers = {}
    for model, name, seed in cases(arguments):
        for (method, experts, _), cell in newest_cells(folder_of(arguments, name, seed), model).items():
            if "scores" in cell["result"]:
                answers.setdefault((model, experts, name, method), []).append(cell["result"]["scores"])
    found = {}
    for (*case, method), scores in answers.items():
        ours = answers.get((*case, METHODS[-1]), ())
        if method != METHODS[-1] and len(ours) == len(scores):
            row = paired(averaged(ours), averaged(scores), metrics=("acc",)).iloc[-1]
            found[*case, method] = {"gain": row["difference"], "gain_error": row["error"]}
    return found


def averaged(scores):
    """Scores of several calibration samples as one: each item's mean."""
    items = {}
    for task, first in scores[0]["items"].items():
        items[task] = {
            "of": first["of"],
            "acc": np.mean([s["items"][task]["acc"] for s in scores], axis=0).tolist(),
        }
    return scores[0] | {"items": items}


def ratios(frame, gained):
    """Loss that a method adds over that which HC-SMoE adds on the same sample, with a 95 % interval over
    samples; and gains.
    """
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
        row["items"] = 8 * (part["limit"].iloc[0] or 300)
        for name in ("added", "ratio", "retained"):
            row |= {
                name: part[name].mean(),
                f"{name}_interval": wide * part[name].std(ddof=1) if count > 1 else np.nan,
            }
        rows.append(row | gained.get(key, {}))
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--calibrated", nargs="+", default=list(CALIBRATED), choices=list(CALIBRATED))
    parser.add_argument("--seeds", type=int, default=5, help="calibration samples")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS, help="hc-smoe, and others"
    )
    parser.add_argument(
        "--experts", nargs="+", type=int, help="kept in each layer; by default a half and a quarter"
    )
    parser.add_argument("--sequences", type=int, help="of 256 tokens; by default 96, or 288 of own text")
    parser.add_argument("--limit", type=int, default=0, help="items of each task; 0 for all 300")
    parser.add_argument("--folder", default="runs/recipe", help="where cells are kept")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    table = ratios(measured(arguments), gains(arguments))
    print(table.round(4).to_string(index=False))
    if arguments.out:
        table.round(5).to_csv(arguments.out, index=False)
        about = {"versions": versions(), "seeds": arguments.seeds, "limit": arguments.limit}
        arguments.out.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
