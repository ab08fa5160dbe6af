"""How long a drag of the cut takes to show: 24 layers of 64 experts, on a random model.

``python benchmarks/redraw.py --out benchmarks/results/redraw.json``
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from hcsmoe_core import capture
from hcsmoe_core._util import versions, write_json
from hcsmoe_core.ui.widgets import CutExplorer

LAYERS, EXPERTS = 24, 64


def timed(action):
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    stats = capture(model, torch.randint(0, 128, (8, 64)))
    cutting = CutExplorer(stats, model, experts=EXPERTS // 2, path="plan.json")  # which fills what is cached
    cut = cutting._controls["experts"]

    def drag(to):
        return timed(lambda: setattr(cut, "value", to))

    new = [drag(count) for count in range(2, 2 + options.repeats)]
    again = [drag(count) for count in range(2, 2 + options.repeats)]
    linkage = timed(lambda: setattr(cutting._controls["linkage"], "value", "ward"))
    result = {
        "layers": LAYERS,
        "experts": EXPERTS,
        "new cut, s": statistics.median(new),
        "cut drawn before, s": statistics.median(again),
        "another linkage, s": linkage,
        "new cut over cut drawn before": statistics.median(new) / statistics.median(again),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if options.out:
        write_json(options.out, result)


if __name__ == "__main__":
    main()
