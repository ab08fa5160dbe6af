"""What a capture that stops by itself, or applies experts to some tokens alone, leaves of the groups that all
tokens give.

    python benchmarks/stopping.py --out benchmarks/results/stopping.json        # the embedded models, three
    minutes

Of each embedded model, up to --sequences × 256 tokens of its calibration text: where it stops at each
agreement, or excess, asked for, the tokens that each layer needed, the adjusted Rand index of its groups with
those of all tokens, and the loss of the model merged to half its experts by them (HC-SMoE). Then the same for
experts on every k-th token of all sequences.
"""

import argparse

from measuring import machine, tell, timed

import hcsmoe_core as core
from hcsmoe_core._util import EMBEDDED
from hcsmoe_core.studies.stability import agreement, capture_until_stable, partitions
from hcsmoe_core.text.calibration import domains_of


def groups_of(stats, experts):
    return partitions(stats, None, similarity="expert-output", linkage="average", groups=experts)


def measure(name, arguments):
    model, tokenizer = core.load_model(name, dtype="float32")
    count = arguments.sequences
    ids = core.calibration_tokens("demo", tokenizer, sequences=count, length=256, seed=0)
    how = dict(needs=("usage", "outputs"), domains=domains_of("demo", count), progress=False)
    whole, seconds = timed("cpu", core.capture, model, ids, **how)
    experts = core.find_moe_layers(model)[0].num_experts // 2
    truth, rows = groups_of(whole, experts), []

    def told(kind, stats, taken, **more):
        index = agreement(groups_of(stats, experts), truth).round(3).tolist()
        row = {"model": name, "experts": experts, **kind, "tokens": stats.num_tokens, "of": whole.num_tokens}
        row |= {"time / all": round(taken / seconds, 2), "agreement with all tokens": index}
        core.apply_plan(model, core.make_plan(stats, experts=experts))
        merged = core.evaluate(model, tokenizer, tasks=[])["mean_loss"]
        core.restore(model)
        rows.append(row | {"loss merged": round(merged, 4)} | more)
        print(rows[-1], flush=True)

    told({}, whole, seconds)
    until = [{"agreement": wanted} for wanted in (0.8, 0.9, 0.95)] + [
        {"excess": wanted} for wanted in (0.1, 0.05, 0.02)
    ]
    for wanted in until:
        stats, taken = timed("cpu", capture_until_stable, model, ids, **wanted, experts=[experts], **how)
        layers = stats.stability["layers"].values()
        more = {"stable": stats.stability["stable"], "needed": [layer["needed"] for layer in layers]}
        looks = [[round(value, 3) for value in layer[next(iter(wanted))]] for layer in layers]
        told(wanted, stats, taken, **more, looks=looks)
    wanted = {"excess": 0.05, "every": 8}
    told(wanted, *timed("cpu", capture_until_stable, model, ids, **wanted, experts=[experts], **how))
    for every in (2, 4, 8, 16, 32):
        told({"every": every}, *timed("cpu", core.capture, model, ids, every=every, **how))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    rows = [row for name in EMBEDDED for row in measure(name, arguments)]
    tell({"rows": rows, "machine": machine()}, arguments.out)


if __name__ == "__main__":
    main()
