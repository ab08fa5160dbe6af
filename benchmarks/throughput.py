"""The merged model beside the original: prefill and decoding throughput, and memory, mapped and plain, at
equal batch.

    python benchmarks/throughput.py                              # a random CPU-sized model, a minute
    python benchmarks/throughput.py --device cuda --hidden 2048 --width 1408 --layers 24 --batch 16 --dtype
    bfloat16

"mapped" keeps the router and sends what it chooses through the map; "plain" has one router row a group
("folded"), as stock engines load it. Both compute as many experts a token as the original, so that what is
saved is memory, and the traffic of it. Each is measured as it is loaded from disk by a process of its own, so
that the peak is its own too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import machine, tell
from pipeline import build
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hcsmoe_core as core


def run(folder, arguments):
    """Tokens a second of one model, and its memory; printed by the process that a model has to itself."""
    logging.disable_progress_bar()
    model = (
        core.load_merged(folder) if folder.name == "mapped" else AutoModelForCausalLM.from_pretrained(folder)
    )
    model = model.to(arguments.device).eval()
    prompt = torch.randint(
        1, 1024, (arguments.batch, arguments.length), generator=torch.Generator().manual_seed(0)
    )
    prompt = prompt.to(arguments.device)
    cuda = arguments.device.startswith("cuda")
    best = {"prefill": 0.0, "decoding": 0.0}
    for _ in range(arguments.repeats):
        for name, count in (("prefill", arguments.length), ("decoding", arguments.new)):
            with torch.no_grad():
                cache = (
                    None
                    if name == "prefill"
                    else model(input_ids=prompt[:, :32], use_cache=True).past_key_values
                )
                if cuda:
                    torch.cuda.synchronize()
                clock = time.perf_counter if cuda else time.process_time
                started = clock()
                if name == "prefill":
                    model(input_ids=prompt, use_cache=False, logits_to_keep=1)
                row = prompt[:, 32:33]
                for _ in range(arguments.new if name == "decoding" else 0):
                    step = model(input_ids=row, past_key_values=cache, use_cache=True)
                    row, cache = step.logits[:, -1:].argmax(-1), step.past_key_values
                if cuda:
                    torch.cuda.synchronize()
                best[name] = max(best[name], arguments.batch * count / (clock() - started))
    found = {f"{name}, tokens a second": round(value, 1) for name, value in best.items()}
    found["weights, MB"] = round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 1)
    if cuda:
        found["peak, MB"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    else:
        peak = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
        )
        found["peak of the process, MB"] = round(int(peak.split()[1]) * 1024 / 1e6, 1)
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(
        hidden=512,
        width=352,
        layers=4,
        experts=60,
        families=2,
        batch=8,
        length=256,
        new=16,
        repeats=3,
        rounds=2,
    )
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--run", type=Path, help="(what a process of its own measures)")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if arguments.run:
        run(arguments.run, arguments)
        return
    given = {k: v for k, v in vars(arguments).items() if k not in ("run", "out")}
    words = [sys.executable, __file__, *(word for k, v in given.items() for word in (f"--{k}", str(v)))]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = build(arguments)
        model.save_pretrained(folder / "original")
        stats = core.capture(
            model, torch.randint(0, 1024, (8, 256)), needs=("usage", "outputs", "sample"), progress=False
        )
        plan = core.make_plan(stats, experts=arguments.experts // 2)
        core.save_merged(model, plan, folder / "mapped", stats=stats)
        core.save_merged(model, plan, folder / "plain", stats=stats, router="folded")
        rows = {}
        for _ in range(arguments.rounds):  # in turns, so that what else runs meets all of them alike
            for name in ("original", "mapped", "plain"):
                done = subprocess.run(
                    [*words, "--run", str(folder / name)],
                    capture_output=True,
                    text=True,
                    env=os.environ,
                    check=False,
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-3000:])
                new, old = json.loads(done.stdout.splitlines()[-1]), rows.get(name, {})
                keep = {key: min if "MB" in key else max for key in new}
                rows[name] = {key: keep[key](value, old.get(key, value)) for key, value in new.items()}
    for name in ("mapped", "plain"):
        rows[name] |= {
            f"{k} / original": round(v / rows["original"][k], 2) for k, v in list(rows[name].items())
        }
    settings = {key: value for key, value in vars(arguments).items() if key != "run"}
    tell({"settings": settings, **rows, "machine": machine(arguments.device)}, arguments.out)


if __name__ == "__main__":
    main()
