"""Capture, plan and merge beside the usual way, as ratios within one run.

    python benchmarks/pipeline.py                                # a CPU-sized Qwen2-MoE-like model, seconds
    python benchmarks/pipeline.py --device cuda --hidden 2048 --width 1408 --tokens 65536 --dtype bfloat16

"Usual" renders the published approach plainly: one pass over the calibration tokens for the expert usage and a second that
keeps every layer's inputs, then every expert in full on all of them, one at a time; group distances summed again from the
expert distances at every join, in Python; weights merged one tensor at a time. Weights are random: only the work matters.
Both ways must give the same groups, which is checked. One JSON line is printed, and appended to --out.
"""

import argparse
import json
import platform
import time

import torch
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import hcsmoe_core as core
from hcsmoe_core.clustering import by_first_appearance


def build(arguments):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=1024,
        hidden_size=arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        moe_intermediate_size=arguments.width,
        shared_expert_intermediate_size=4 * arguments.width,
        intermediate_size=arguments.width,
        num_experts=arguments.experts,
        num_experts_per_tok=4,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype))
    return model.to(arguments.device).eval()


def usual_capture(model, ids, batch):
    """Two passes, and all experts in full on all tokens."""
    layers = core.find_moe_layers(model)
    counts = [torch.zeros(layer.num_experts) for layer in layers]
    kept = [[] for _ in layers]

    def count(place):
        def hook(module, inputs):
            counts[place] += torch.bincount(inputs[1].flatten().cpu(), minlength=len(counts[place]))

        return hook

    def keep(place):
        def hook(module, inputs):
            kept[place].append(inputs[0])

        return hook

    for make in (count, keep):
        handles = [layer.experts.register_forward_pre_hook(make(i)) for i, layer in enumerate(layers)]
        with torch.no_grad():
            for rows in ids.split(batch):
                model(input_ids=rows.to(model.device), use_cache=False)
        for handle in handles:
            handle.remove()
    means = []
    with torch.no_grad():
        for layer, inputs in zip(layers, kept, strict=True):
            x = torch.cat(inputs)
            outputs = []
            for gate_up, down in zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True):
                gate, up = linear(x, gate_up).chunk(2, -1)
                outputs.append(linear(silu(gate) * up, down).mean(0))
            means.append(torch.stack(outputs).float().cpu())
    return counts, means


def usual_groups(features, groups):
    """Average linkage with the group distances summed again at every join."""
    distance = torch.cdist(features.double(), features.double()).tolist()
    members = [[e] for e in range(len(features))]
    while len(members) > groups:
        best = None
        for i in range(len(members)):
            for j in range(i + 1, len(members)):
                total = sum(distance[a][b] for a in members[i] for b in members[j]) / (len(members[i]) * len(members[j]))
                if best is None or total < best[0]:
                    best = total, i, j
        members[best[1]] += members.pop(best[2])
    labels = [0] * len(features)
    for group, experts in enumerate(members):
        for e in experts:
            labels[e] = group
    return by_first_appearance(labels).tolist()


def usual_merge(model, labels, counts):
    """One weighted sum a tensor and group."""
    merged = []
    for layer, groups, count in zip(core.find_moe_layers(model), labels, counts, strict=True):
        for tensor in layer.tensors().values():
            for group in range(max(groups) + 1):
                experts = [e for e, g in enumerate(groups) if g == group]
                total = sum(count[e] for e in experts) + 1e-7
                weights = [(count[e] / total).to(tensor.device, tensor.dtype) for e in experts]
                merged.append(sum(tensor[e].detach() * w for e, w in zip(experts, weights, strict=True)))
    return merged


def timed(device, function, *arguments, **keywords):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = function(*arguments, **keywords)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in dict(hidden=256, width=176, layers=4, experts=60, tokens=8192, length=512, batch=2, repeats=3).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="file to append the line to")
    arguments = parser.parse_args()
    model = build(arguments)
    ids = torch.randint(0, 1024, (arguments.tokens // arguments.length, arguments.length))
    groups, device = arguments.experts // 2, arguments.device
    needs = core.needs_of("hc-smoe")
    core.capture(model, ids[: arguments.batch], needs=needs, progress=False)  # warm up
    best = {}
    for _ in range(arguments.repeats):
        seconds = {}
        (counts, means), seconds["usual capture"] = timed(device, usual_capture, model, ids, arguments.batch)
        usual, seconds["usual plan"] = timed(device, lambda means=means: [usual_groups(m, groups) for m in means])
        _, seconds["usual merge"] = timed(device, usual_merge, model, usual, counts)
        stats, seconds["capture"] = timed(
            device, core.capture, model, ids, needs=needs, batch_size=arguments.batch, progress=False
        )
        plan, seconds["plan"] = timed(device, core.make_plan, stats, experts=groups)
        _, seconds["merge"] = timed(device, core.apply_plan, model, plan)
        core.restore(model)
        best = {k: min(v, best.get(k, v)) for k, v in seconds.items()}
    same = sum(p.labels == u for p, u in zip(plan.layers, usual, strict=True))
    steps = ("capture", "plan", "merge")
    ratios = {s: best[f"usual {s}"] / best[s] for s in steps}
    ratios["all"] = sum(best[f"usual {s}"] for s in steps) / sum(best[s] for s in steps)
    line = {
        "settings": vars(arguments) | {"threads": torch.get_num_threads()},
        "seconds (best of the repeats)": {k: round(v, 4) for k, v in best.items()},
        "usual / ours": {k: round(v, 2) for k, v in ratios.items()},
        "layers with the same groups": f"{same} of {arguments.layers}",
        "machine": {"processor": platform.processor() or platform.machine(), "torch": torch.__version__},
    }
    if device.startswith("cuda"):
        line["machine"]["gpu"] = torch.cuda.get_device_name()
    print(json.dumps(line))
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
