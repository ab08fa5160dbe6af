"""Choosing half of the neurons of two experts, up to Mixtral's width (a pool of 28,672 neurons): time and
memory.

    python benchmarks/pools.py --out benchmarks/results/pools.json     # half a minute on two cores
    python benchmarks/pools.py --widths 14336                          # Mixtral's: 13 minutes on one core, 21
    GB

Experts of hidden size 4,096 with random weights, in bfloat16, the second a noisy copy of the first, so that
each choice leaves something to the next; tokens are random, and routed to either. "gram" is the normal
equations of the pool, "choice" the blocks of greedy selection, "solve" the refit of what the chosen neurons
write. At the smallest width the choice is also made neuron by neuron (--compare), and what both leave on
tokens that neither saw is compared. Memory is the peak of the process.
"""

import argparse
import resource

import torch
from gpu import layer_of
from measuring import machine, tell, timed

from hcsmoe_core import merging
from hcsmoe_core.methods import combine as combining
from hcsmoe_core.methods.residual import squared_error
from hcsmoe_core.statistics import LayerSample

HIDDEN, NOISE, RIDGE = 4096, 0.5, 0.01


def pair(width, device):
    """A layer of which the first two experts are alike."""
    torch.manual_seed(0)
    layer = layer_of(3, HIDDEN, width, 2, torch.bfloat16, device)  # the third is no member
    for tensor in layer.tensors().values():
        tensor.data[1] = ((tensor[0].float() + NOISE * tensor[1].float()) / (1 + NOISE**2) ** 0.5).to(
            tensor.dtype
        )
    return layer


def sample_of(tokens, seed):
    """Tokens that are routed to the first or the second expert, and to a third that is no member."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    index = torch.stack([torch.arange(tokens) % 2, torch.full((tokens,), 2)], 1)
    return LayerSample(inputs, torch.zeros(tokens, 3), index, torch.full((tokens, 2), 0.5))


@torch.no_grad()
def measure(width, arguments, compare):
    """Seconds of each step, and what is left."""
    layer = pair(width, arguments.device)
    group = merging.Group(layer, [0, 1], [0.5, 0.5], 0, sample_of(arguments.tokens, 1))
    rule = {"rule": "selection", "ridge": RIDGE, "pool": "members"}
    pool, seconds, normal, places = (
        combining._pooled(group),
        {},
        ("normal", "members"),
        ("chosen", "members", width),
    )
    group.outputs()
    found, seconds["gram"] = timed(arguments.device, combining.normal_equations, group, pool)
    chosen, seconds["choice"] = timed(arguments.device, combining.chosen_columns, *found, width)
    group._found |= {("neurons", "members"): pool, normal: found, places: chosen}
    print(f"{width}: {seconds}", flush=True)
    expert, seconds["solve"] = timed(arguments.device, merging.combine, group, rule)
    average = merging.combine(group, {"rule": "average"})
    held = merging.Group(layer, [0, 1], [0.5, 0.5], 0, sample_of(1024, 2))
    energy, left = float(held.outputs().double().pow(2).sum()), squared_error(held, expert, rule)
    row = {
        "width": width,
        "pool": len(pool.up),
        "block": max(1, width // combining.STEPS),
        "seconds": seconds,
    }
    row["relative squared error, new tokens"] = left / energy
    row["the same of averages"] = squared_error(held, average, {"rule": "average"}) / energy
    if compare:
        group._found[places], alone = timed(
            arguments.device, combining.chosen_columns, *found, width, block=1
        )
        row["left by blocks / neuron by neuron"] = left / squared_error(
            held, merging.combine(group, rule), rule
        )
        row["time of blocks / neuron by neuron"] = seconds["choice"] / alone
    row["peak of the process, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[896, 1792], help="in increasing order")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument(
        "--compare", action="store_true", help="at the smallest width, choose neuron by neuron, too"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="file to write")
    arguments = parser.parse_args()
    rows = []
    for place, width in enumerate(arguments.widths):
        rows.append(measure(width, arguments, arguments.compare and place == 0))
        print(rows[-1], flush=True)
    tell({"tokens": arguments.tokens, "pairs": rows, "machine": machine(arguments.device)}, arguments.out)


if __name__ == "__main__":
    main()
