"""What it costs to give each group of merged experts one router row: loss with each rule, on the embedded
models.

python benchmarks/routers.py --out benchmarks/results/routers.json
"""

import argparse
from pathlib import Path

from hcsmoe_core import apply_plan, calibration_tokens, capture, load_model, make_plan, restore
from hcsmoe_core._util import versions, write_json
from hcsmoe_core.methods import resolve
from hcsmoe_core.plan import with_router
from hcsmoe_core.score.evaluation import perplexity
from hcsmoe_core.text.calibration import domains_of

CASES = [
    ("demo-qwen", "hc-smoe", 16),
    ("demo-qwen", "hc-least-squares", 8),
    ("demo-mixtral", "hc-least-squares", 4),
]
ROUTERS = ("mapped", "row-kept", "average", "folded")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/routers.json"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for name, method, experts in CASES:
        model, tokenizer = load_model(name)
        text = calibration_tokens("demo", tokenizer, sequences=96, length=256, seed=0, split="heldout")

        def loss(model=model, text=text):
            return perplexity(model, text, domains=domains_of("demo", len(text)), batch_size=16)["mean_loss"]

        whole = loss()
        for seed in range(options.seeds):
            tokens = calibration_tokens("demo", tokenizer, sequences=96, length=256, seed=seed)
            stats = capture(model, tokens, needs=resolve(method, router="folded").needs, progress=False)
            plan = make_plan(stats, model, experts=experts, method=method)
            for router in ROUTERS:
                apply_plan(model, with_router(plan, router), stats)
                row = dict(
                    model=name,
                    method=method,
                    experts=experts,
                    seed=seed,
                    router=router,
                    original=whole,
                    loss=loss(),
                )
                restore(model)
                rows.append(row)
                print(
                    {
                        key: round(value, 4) if isinstance(value, float) else value
                        for key, value in row.items()
                    },
                    flush=True,
                )
    write_json(options.out, {"rows": rows, "versions": versions()})


if __name__ == "__main__":
    main()
