"""The dense expert pass beside transformers' own experts implementations, on the same products, as ratios
within one run.

    python benchmarks/experts.py                                 # CPU shapes, half a minute
    python benchmarks/experts.py --device cuda --dtype bfloat16 --shapes 60x2048x1408,8x4096x14336 --tokens
    4096

Every expert is applied to every token. transformers' experts modules are told so: k = E experts a token, each
with weight 1/E; so they also project down and weight each output, which a capture needs not. Two of ours:
``hidden_sums``, which is what a capture for HC-SMoE calls (the down projection comes once an expert,
afterwards), and ``outputs``, the very same products, every output projected down. Operations count what each
has to do: by linearity, two thirds.
"""

import argparse

import torch
from measuring import interleaved, machine, tell
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from hcsmoe_core.collect import CHUNK
from hcsmoe_core.moe import MoELayer

# batched_mm gathers a copy of the weights for each token and expert.
FEW = 16


def layer_of(experts, hidden, width, implementation, dtype, device):
    config = Qwen2MoeConfig(
        hidden_size=hidden, moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=experts
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    module = Qwen2MoeExperts(config).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.03)
    return module.to(device)


def dense(layer, tokens, size):
    """What a capture makes of one layer: mean outputs of all experts."""
    total = sum(layer.hidden_sums(part) for part in tokens.split(size))
    return layer.down_project(total / len(tokens))


def outputs(layer, tokens, size):
    """The same by way of all outputs."""
    total = torch.zeros(layer.num_experts, tokens.shape[1], dtype=torch.float64, device=tokens.device)
    for part in tokens.split(size):
        for expert in range(layer.num_experts):
            total[expert] += layer.expert_output(expert, layer.expert_hidden(expert, part)).sum(
                0, dtype=torch.float64
            )
    return total / len(tokens)


@torch.no_grad()
def measure(shape, arguments, dtype):
    experts, hidden, width = shape
    size = CHUNK["cpu" if arguments.device == "cpu" else "cuda"]
    tokens = torch.randn(arguments.tokens, hidden, dtype=dtype, device=arguments.device)
    index = torch.arange(experts, device=arguments.device).expand(arguments.tokens, -1).contiguous()
    weight = torch.full(index.shape, 1 / experts, dtype=dtype, device=arguments.device)
    modules = {n: layer_of(*shape, n, dtype, arguments.device) for n in ("eager", "grouped_mm", "batched_mm")}
    layer = MoELayer(torch.nn.ModuleDict({"experts": modules["eager"]}), "experts")
    calls = {n: lambda m=m: m(tokens, index, weight) for n, m in modules.items() if n != "batched_mm"}
    calls["batched_mm, a few tokens"] = lambda: modules["batched_mm"](tokens[:FEW], index[:FEW], weight[:FEW])
    calls |= {
        "ours": lambda: dense(layer, tokens, size),
        "ours, all outputs": lambda: outputs(layer, tokens, size),
    }
    close = (outputs(layer, tokens, size) - dense(layer, tokens, size)).norm() / outputs(
        layer, tokens, size
    ).norm()
    best = interleaved(arguments.device, calls, arguments.repeats)
    best["batched_mm"] = best.pop("batched_mm, a few tokens") * arguments.tokens / FEW
    fastest = min(best[name] for name in modules)
    flops = 6 * arguments.tokens * experts * hidden * width
    return {
        "experts, hidden, width": shape,
        "fastest of transformers / ours": round(fastest / best["ours"], 2),
        "fastest of transformers / ours, all outputs": round(fastest / best["ours, all outputs"], 2),
        "seconds": {name: round(seconds, 4) for name, seconds in best.items()},
        "10^9 operations a second": {
            n: round(flops * (2 / 3 if n == "ours" else 1) / s / 1e9, 1) for n, s in best.items()
        },
        "relative difference of ours by linearity and in full": float(close),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", default="60x256x176,60x512x352,8x1024x3584,32x128x64", help="experts x hidden x width"
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    found = {}
    for dtype in arguments.dtype.split(","):
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
        found[dtype] = [measure(shape, arguments, getattr(torch, dtype)) for shape in shapes]
    tell({"tokens": arguments.tokens, **found, "machine": machine(arguments.device)}, arguments.out)


if __name__ == "__main__":
    main()
