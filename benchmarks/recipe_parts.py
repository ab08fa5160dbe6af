"""What each part of the recommended method is worth: the loss added without it, calibrated in distribution.

    python benchmarks/recipe_parts.py --out benchmarks/results/recipe-parts.csv     # a quarter of an hour on
    one core

Parts are taken away one at a time from the method without its last, which takes longest: fitting what neurons
read. Beside them what was tried and left out: layers fitted one after another, each on what the merged ones
before it hand on ("sequential").
"""

import argparse
import contextlib
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch

import hcsmoe_core as core
from hcsmoe_core.merging import apply_layer
from hcsmoe_core.methods import residual, resolve
from hcsmoe_core.statistics import LayerSample
from hcsmoe_core.text.calibration import domains_of

MODELS = {"demo-qwen": (16, 8), "demo-mixtral": (4, 2)}
FEW = 4096
# By name: constants of the room that are set otherwise, and steps that are.
PARTS = {
    "the method": ({}, {"refit": 2}),
    "one round of fitting what neurons read": ({}, {"refit": 1}),
    "without fitting what neurons read": ({}, {}),
    "whole experts only": ({}, {"shape": "whole"}),
    "each layer its own shape": ({}, {"shape": "by-layer"}),
    "no averages to choose from": ({"POOLED": 0}, {}),
    "one ridge for all": ({"RIDGES": (0.01,)}, {}),
    "groups by weights alone": ({"SIMILARITIES": ("weight",)}, {}),
    "groups by outputs alone": ({"SIMILARITIES": ("functional-routed",)}, {}),
    "decided on held-out domains": ({}, {"holdout": "domains"}),
    "a sample of 4,096 tokens": ({}, {}),
    "sequential": ({}, {}),
}


def shortened(stats, size):
    """The same statistics with the first tokens of the sample, which are a sample too."""
    layers = {}
    for name, sums in stats.layers.items():
        sample = LayerSample(*(getattr(sums.sample, f.name)[:size] for f in fields(LayerSample)))
        layers[name] = replace(sums, sample=sample)
    return replace(stats, layers=layers, sampled=stats.sampled[:size])


@torch.no_grad()
def sequential(model, plan, stats, input_ids):
    """Apply a plan layer by layer, each solved for on what reaches it then."""
    for layer, layer_plan in zip(core.find_moe_layers(model), plan.layers, strict=True):
        taken = []

        def take(module, inputs, keywords, taken=taken):
            tokens, index, weight = [*inputs, *keywords.values()][:3]
            taken.append((tokens.flatten(0, -2), index.flatten(0, -2), weight.flatten(0, -2)))

        handle = layer.experts.register_forward_pre_hook(take, with_kwargs=True)
        for rows in input_ids.split(8):
            model(input_ids=rows, use_cache=False)
        handle.remove()
        tokens, index, weight = (torch.cat(parts) for parts in zip(*taken, strict=True))
        sample = LayerSample(tokens, torch.zeros(len(tokens), layer.num_experts), index, weight)
        sums = replace(stats.layers[layer.name], sample=sample)
        apply_layer(layer, layer_plan, replace(stats, layers={layer.name: sums}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        model, tokenizer = core.load_model(name, dtype="float32")
        input_ids = core.calibration_tokens("demo", tokenizer, sequences=96, length=256, seed=arguments.seed)
        needs = resolve("recommended").needs
        stats = core.capture(model, input_ids, needs=needs, domains=domains_of("demo", 96), progress=False)
        original = core.evaluate(model, tokenizer, tasks=[])["mean_loss"]
        for part in arguments.parts:
            constants, steps = PARTS[part]
            for experts in MODELS[name]:
                used = shortened(stats, FEW) if part == "a sample of 4,096 tokens" else stats
                with contextlib.ExitStack() as stack:
                    for constant, value in constants.items():
                        stack.enter_context(mock.patch.object(residual, constant, value))
                    how = dict(experts=experts, method="recommended", progress=False)
                    plan = core.make_plan(used, model, **how, **{"refit": 0} | steps)
                if part == "sequential":
                    sequential(model, plan, used, input_ids)
                else:
                    core.apply_plan(model, plan, used)
                added = core.evaluate(model, tokenizer, tasks=[])["mean_loss"] - original
                core.restore(model)
                shapes = sorted({(layer.num_groups, layer.width or 0) for layer in plan.layers})
                rows.append(
                    {
                        "model": name,
                        "part": part,
                        "experts": experts,
                        "added": round(added, 5),
                        "shapes": shapes,
                    }
                )
                print(*rows[-1].values(), sep="  ", flush=True)
    if arguments.out:
        pd.DataFrame(rows).to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
