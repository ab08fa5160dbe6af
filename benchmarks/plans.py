"""How long plans take from one statistics file, the model never run: methods × linkages × experts kept.

    python benchmarks/plans.py --model demo-qwen --out benchmarks/results/plans.json

Forward calls of the model and of its experts are counted, and must be none. Plans that look at the experts'
weights are made with the model in memory; those by CKA and O-prune, which apply the experts to the sample,
are timed one each and listed apart.

    python benchmarks/plans.py --large --out benchmarks/results/plans-large.json

Statistics of 60 layers of 512 experts, made up: distances, all linkages, all numbers of experts.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from measuring import machine, tell, timed

from hcsmoe_core import (
    METHODS,
    Statistics,
    calibration_tokens,
    capture,
    distances,
    find_moe_layers,
    linkage,
    load_model,
    load_statistics,
    make_plan,
)
from hcsmoe_core._util import versions
from hcsmoe_core.clustering import LINKAGES, cuts
from hcsmoe_core.methods import make_plans, resolve
from hcsmoe_core.statistics import NEEDS, LayerStatistics
from hcsmoe_core.text.calibration import calibration_settings, domains_of


def large(experts=512, layers=60, hidden=1024):
    """Seconds of the steps that lead to every cut of every layer by every linkage, and of whole plans of
    some.
    """
    generator = torch.Generator().manual_seed(0)

    def layer():
        usage = torch.randint(0, 100, (1, experts), generator=generator)
        nothing, square = (
            torch.zeros(1, experts, dtype=torch.float64),
            torch.zeros(1, experts, experts, dtype=torch.float64),
        )
        outputs = torch.randn(1, experts, hidden, dtype=torch.float64, generator=generator)
        parts = dict(routing_mass=nothing, score_mass=nothing, logit_gram=square, output_sum=outputs)
        return LayerStatistics(tokens=torch.tensor([1000]), usage_count=usage, **parts)

    names = [f"layers.{place}" for place in range(layers)]
    stats = Statistics({name: layer() for name in names}, ["all"], {"hash": "", "layers": {}}, ["0" * 16])
    condensed, seconds = timed("cpu", lambda: [distances(stats, name) for name in names])
    trees, tree_seconds = timed("cpu", lambda: [linkage(d, link) for link in LINKAGES for d in condensed])
    labels, cut_seconds = timed("cpu", lambda: [cuts(tree) for tree in trees])
    counts = range(1, experts + 1, 16)
    plans, plan_seconds = timed(
        "cpu", lambda: sum(1 for _ in make_plans(stats, experts=counts, linkages=LINKAGES))
    )
    found = {"experts": experts, "layers": layers, "hidden": hidden, "linkages": list(LINKAGES)}
    steps = {"distances": seconds, "trees": tree_seconds, f"{len(labels)} × {experts} cuts": cut_seconds}
    found["seconds of the processor"] = {name: round(value, 2) for name, value in steps.items()}
    found["all"] = round(seconds + tree_seconds + cut_seconds, 2)
    found[f"{plans} whole plans, distances included"] = round(plan_seconds, 2)
    return found


def main():
    """Make the plans and print how long they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-qwen")
    parser.add_argument("--plans", type=int, default=500)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.large:
        tell(large() | {"machine": machine()}, arguments.out)
        return
    model, tokenizer = load_model(arguments.model, dtype="float32")
    source = calibration_settings(arguments.model)
    sequences = source["sequences"]
    size = dict(sequences=sequences, length=source["length"])
    input_ids = calibration_tokens(source["calibration"], tokenizer, model=model, seed=0, **size)
    stats = capture(
        model, input_ids, needs=tuple(NEEDS), domains=domains_of(source["calibration"], sequences)
    )
    with tempfile.TemporaryDirectory() as folder:
        stats.save(Path(folder) / "s.safetensors")
        stats = load_statistics(Path(folder) / "s.safetensors")
    calls = []
    for module in (model, *(layer.experts for layer in find_moe_layers(model))):
        module.register_forward_pre_hook(lambda *_: calls.append(1))

    slow = [name for name in METHODS if "sample" in resolve(name).needs and resolve(name).needs_model]
    slow = [name for name in slow if name != "mergemoe"]  # whose sample is for merging
    quick = [(name, {}) for name in METHODS if name not in slow]
    similarities = ("expert-output", "router-logits", "weight", "functional")
    quick += [("hc-smoe", dict(similarity=s, linkage=link)) for s in similarities for link in LINKAGES]
    most = min(layer.num_experts for layer in find_moe_layers(model))
    wanted = [(name, settings, experts) for experts in range(most, 0, -1) for name, settings in quick][
        : arguments.plans
    ]
    seconds = {}
    started = time.perf_counter()
    for name, settings, experts in wanted:
        before = time.perf_counter()
        make_plan(stats, model, experts=experts, method=name, progress=False, **settings)
        seconds.setdefault(name, []).append(time.perf_counter() - before)
    total = time.perf_counter() - started
    single = {}
    for name in slow:
        before = time.perf_counter()
        make_plan(stats, model, experts=most // 2, method=name, progress=False)
        single[name] = round(time.perf_counter() - before, 2)
    assert not calls, "the model was run"
    result = {
        "model": arguments.model,
        "plans": len(wanted),
        "experts": [wanted[0][2], wanted[-1][2]],
        "seconds": round(total, 2),
    }
    result |= {"milliseconds_a_plan": {n: round(1e3 * sum(v) / len(v), 1) for n, v in seconds.items()}}
    result |= {"seconds_by_the_sample": single, "versions": versions()}
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
