"""The dense expert pass at the paper's layer shapes: share of the measured matmul ceiling, and peak memory
beside the weights.

    python benchmarks/gpu.py                                          # on a GPU: two minutes
    python benchmarks/gpu.py --device cpu --shapes 6x64x48x2 --tokens 512 --dtype float32   # that it runs

Random weights, 65,536 tokens. Shapes are experts x hidden x width x top-k: Qwen1.5-MoE-A2.7B and
Mixtral-8x7B. The ceiling is the rate of one plain product of [chunk, D] and [D, N], the best of several N.
"mean outputs" is what HC-SMoE's capture does; the operations that count are those of the up projections
alone, as the down projection comes once an expert. "capture" is all default needs. Numbers of an H100 are in
results/gpu.json.
"""

import argparse
from types import SimpleNamespace

import torch
from measuring import interleaved, machine, tell
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from hcsmoe_core.collect import CHUNK, ONE_PROCESS, _Collector
from hcsmoe_core.moe import MoELayer

TARGET = 0.6


def layer_of(experts, hidden, width, top_k, dtype, device):
    """One layer's experts with random weights; as Mixtral's where there are eight, else as Qwen's."""
    if experts == 8:
        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=width, num_local_experts=8, num_experts_per_tok=top_k
        )
        kind = MixtralExperts
    else:
        config = Qwen2MoeConfig(
            hidden_size=hidden, moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=top_k
        )
        kind = Qwen2MoeExperts
    with torch.device("meta"):
        module = kind(config).to(dtype)
    module = module.to_empty(device=device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    return MoELayer(torch.nn.ModuleDict({"experts": module}), "experts")


def ceiling(hidden, size, dtype, device, repeats):
    """Operations a second of the fastest plain product."""
    best = 0.0
    for columns in (hidden, 4 * hidden, 8 * hidden):
        a, b = (
            torch.randn(size, hidden, dtype=dtype, device=device),
            torch.randn(columns, hidden, dtype=dtype, device=device),
        )
        torch.nn.functional.linear(a, b)
        seconds = interleaved(
            device, {"product": lambda a=a, b=b: torch.nn.functional.linear(a, b)}, 10 * repeats
        )["product"]
        best = max(best, 2 * size * hidden * columns / seconds)
    return best


@torch.no_grad()
def measure(shape, arguments):
    experts, hidden, width, top_k = shape
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    layer = layer_of(*shape, dtype, device)
    tokens = torch.randn(arguments.tokens, hidden, dtype=dtype, device=device)
    index = (
        torch.stack([torch.randperm(experts)[:top_k] for _ in range(256)])
        .to(device)
        .repeat(-(-len(tokens) // 256), 1)
    )
    index, weight = (
        index[: len(tokens)],
        torch.full((len(tokens), top_k), 1 / top_k, dtype=dtype, device=device),
    )
    weights = sum(t.numel() * t.element_size() for t in layer.tensors().values())

    def collect(needs):
        one = dict(domains=["all"], of_sequence=[0], applied=None, ranks=ONE_PROCESS)
        collector = _Collector(layer, SimpleNamespace(needs=needs, **one))
        collector.take_experts(None, (tokens, index, weight), {})
        return collector.finish()

    found = {"shape": shape, "weights, GB": weights / 1e9}
    size = CHUNK["cpu" if device == "cpu" else "cuda"]
    top = ceiling(hidden, min(size, len(tokens)), dtype, device, arguments.repeats)
    found["ceiling, 10^12 operations a second"] = top / 1e12
    for name, needs in (
        ("mean outputs", ("usage", "outputs")),
        ("capture", ("usage", "outputs", "norms", "grams")),
    ):
        collect(needs)
        if device.startswith("cuda"):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        seconds = interleaved(device, {name: lambda needs=needs: collect(needs)}, arguments.repeats)[name]
        flops = (4 if name == "mean outputs" else 6) * len(tokens) * experts * hidden * width
        found[name] = {"seconds": seconds, "share of the ceiling": flops / seconds / top}
        if device.startswith("cuda"):
            peak = torch.cuda.max_memory_allocated() - before
            found[name] |= {
                "peak beside weights and tokens, GB": peak / 1e9,
                "relative to the weights": peak / weights,
            }
    found["target met"] = found["mean outputs"]["share of the ceiling"] >= TARGET
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="60x2048x1408x4,8x4096x14336x2")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu with small --shapes and --tokens tries the script")
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    rows = [measure(shape, arguments) for shape in shapes]
    tell({"settings": vars(arguments), "layers": rows, "machine": machine(arguments.device)}, arguments.out)


if __name__ == "__main__":
    main()
