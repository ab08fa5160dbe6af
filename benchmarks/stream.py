"""Merging a checkpoint that is larger than the memory given, beside merging one that fits whole and streamed.

    python benchmarks/stream.py --out benchmarks/results/stream.json                 # 8.5 GB and 1.3 GB on
    disk, an hour or so

Random Qwen2-MoE-shaped bfloat16 checkpoints are written shard by shard, without ever being held, then merged
to half their experts by ``hcsmoe merge`` in a process of its own, on random token ids: weights and text mean
nothing, only the work does. The large one is streamed under a cap; the small one is merged both ways, and the
two checkpoints must be the same, byte for byte. Peak memory is what Linux tells of the process when it ends
(VmHWM, in bytes, files mapped into memory included).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from hcsmoe_core._util import sha256_file, write_json

ROOT = Path(__file__).resolve().parents[1]
EXPERTS = 60
# In its own process, so that the peak is that of one merge.
RUN = """
import sys
from hcsmoe_core.ui.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def generate(folder, layers, seed=0):
    """A random checkpoint, a shard for each decoder layer and one for the rest; its size in bytes."""
    config = Qwen2MoeConfig(
        vocab_size=32000,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        intermediate_size=5632,
        num_experts=EXPERTS,
        num_experts_per_tok=4,
        dtype="bfloat16",
        architectures=["Qwen2MoeForCausalLM"],
    )
    folder.mkdir()
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    parts, index = {}, {}
    for name, tensor in model.state_dict().items():
        inside = name.startswith("model.layers.")
        parts.setdefault(int(name.split(".")[2]) + 1 if inside else 0, {})[name] = tensor.shape
    for place, shapes in sorted(parts.items()):
        file = f"model-{place + 1:05d}-of-{len(parts):05d}.safetensors"
        tensors = {n: t for name, shape in shapes.items() for n, t in on_disk(name, shape, generator)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def on_disk(name, shape, generator):
    """Random tensors under the names that the hub has for them: those of the experts one by one."""
    if name.endswith("experts.gate_up_proj"):
        for expert in range(shape[0]):
            for part in ("gate_proj", "up_proj"):
                yield (
                    f"{name.removesuffix('gate_up_proj')}{expert}.{part}.weight",
                    random(shape[1] // 2, shape[2], generator),
                )
    elif name.endswith("experts.down_proj"):
        for expert in range(shape[0]):
            yield (
                f"{name.removesuffix('down_proj')}{expert}.down_proj.weight",
                random(shape[1], shape[2], generator),
            )
    elif "norm" in name:
        yield name, torch.ones(shape, dtype=torch.bfloat16)
    else:
        yield name, random(*shape, generator)


def random(*arguments):
    *shape, generator = arguments
    return torch.randn(shape, generator=generator).mul_(0.03).bfloat16()


def merge(folder, ids, out, *options):
    """Merge to half the experts in another process: seconds and peak memory."""
    calibration = ["--calibration", str(ids), "--sequences", "8", "--length", "256", "--batch-size", "2"]
    words = [
        "merge",
        str(folder),
        "--experts",
        str(EXPERTS // 2),
        "--method",
        "hc-smoe",
        "--out",
        str(out),
        *calibration,
        *options,
    ]
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        "seconds": round(time.perf_counter() - began, 1),
        "peak_memory": peak,
        "written": size,
        "options": list(options),
    }


def hashes(folder):
    return {file.name: sha256_file(file) for file in sorted(folder.iterdir())}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=16, help="of the large checkpoint")
    parser.add_argument("--small", type=int, default=2, help="layers of the one that is merged both ways")
    parser.add_argument("--memory", default="3GB", help="what the large one may use")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are written (removed afterwards)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    results = {"machine": {"python": platform.python_version(), "torch": torch.__version__, "threads": 1}}
    try:
        ids = work / "ids.safetensors"
        save_file(
            {"input_ids": torch.randint(0, 32000, (18, 256), generator=torch.Generator().manual_seed(1))}, ids
        )
        for name, layers in (("small", arguments.small), ("large", arguments.layers)):
            size = generate(work / name, layers)
            results[name] = {"layers": layers, "bytes": size}
            print(f"{name}: {size / 1e9:.2f} GB written", flush=True)
            ways = {"streamed": ("--load", "streamed", "--memory", arguments.memory)}
            if name == "small":
                ways["whole"] = ("--load", "whole")
            for way, options in ways.items():
                results[name][way] = merge(work / name, ids, work / f"{name}-{way}", *options)
                print(name, way, json.dumps(results[name][way]), flush=True)
            if name == "small":
                results[name]["same_bytes"] = hashes(work / "small-whole") == hashes(work / "small-streamed")
            for way in ways:
                shutil.rmtree(work / f"{name}-{way}")
            shutil.rmtree(work / name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(results, indent=1))
    if arguments.out:
        write_json(arguments.out, results)


if __name__ == "__main__":
    main()
