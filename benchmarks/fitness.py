"""Are the embedded models fit for their purpose? Accuracy, loss, expert load, and what merging costs from E
to E/4.

    python benchmarks/fitness.py --out benchmarks/results/fitness.json      # about five minutes on two cores

HC-SMoE (expert outputs, average linkage, frequency weights), calibrated on 96 × 256 tokens of the calibration
split; all 300 held-out items of each task, and held-out text of the ten procedural domains. The same digits
on every run.
"""

import argparse

import hcsmoe_core as core
from hcsmoe_core._util import EMBEDDED, write_json
from hcsmoe_core.clustering import LINKAGES
from hcsmoe_core.methods.similarities import available
from hcsmoe_core.studies import cache
from hcsmoe_core.studies import tables as study


def measure(name, limit):
    model, tokenizer = core.load_model(name, dtype="float32")
    stats = cache.statistics(model, tokenizer)
    experts = study.model_size(model)["num_experts"]
    curve = []
    for kept in range(experts, experts // 4 - 1, -max(1, experts // 8)):
        core.apply_plan(model, core.make_plan(stats, model, experts=kept))
        scores = core.evaluate(model, tokenizer, limit=limit)
        core.restore(model)
        tasks = {
            task.removeprefix("demo_"): round(100 * values["acc"], 1)
            for task, values in scores["tasks"].items()
        }
        accuracy, error = (round(100 * scores[key], 2) for key in ("mean_acc", "mean_acc_stderr"))
        curve.append(
            {
                "experts": kept,
                "accuracy": accuracy,
                "±": error,
                "loss": round(scores["mean_loss"], 4),
                "tasks": tasks,
            }
        )
        print(name, {k: v for k, v in curve[-1].items() if k != "tasks"}, flush=True)
    found = {
        "curve": curve,
        "usage": study.usage_table(stats).round(3).to_dict("records"),
        "versions": scores["versions"],
    }
    families = study.family_agreement(stats, model, linkages=LINKAGES, similarities=available(stats))
    if families is not None:
        found["adjusted Rand index to the true families"] = families.to_dict("records")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="results to write (.json)")
    parser.add_argument("--limit", type=int, help="items of each task; by default all")
    arguments = parser.parse_args()
    found = {name: measure(name, arguments.limit) for name in EMBEDDED}
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
