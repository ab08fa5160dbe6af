"""Capture, plan, merge, export and evaluation beside the usual way, as ratios within one run.

    python benchmarks/pipeline.py                                # a CPU-sized Qwen2-MoE-like model, the
    published 65,536 tokens python benchmarks/pipeline.py --noise 1                      # groups that are not
    clear python benchmarks/pipeline.py --tokens 8192 --families 0     # fewer tokens, unrelated experts
    python benchmarks/pipeline.py --device cuda --hidden 2048 --width 1408 --tokens 65536 --dtype bfloat16

"Usual" renders the published approach plainly: one pass over the calibration tokens for the expert usage and
a second that keeps every layer's inputs, then every expert in full on all of them, one at a time; group
distances summed again from the expert distances at every join, in Python; weights merged one tensor at a time
and kept; the state dict pickled whole; each choice of a question scored by itself.

Ours is timed on the same tokens ("same"), with the experts applied to each --every-th token ("every"),
stopped when the groups of two halves agree ("stop") or cost as much ("excess"), and with both ("stop every",
"excess every"). How far the groups of these are those of "same" is told by adjusted Rand index, and by how
much more they spread. "study" is one capture of which many plans are made, where the published script starts
anew. Weights are random, experts noisy copies in families: only the work, and whether groups are clear,
matters. One JSON line is printed, and appended to --out.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measuring import interleaved, machine, tell
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

import hcsmoe_core as core
from hcsmoe_core.clustering import LINKAGES, by_first_appearance
from hcsmoe_core.methods import make_plans, resolve
from hcsmoe_core.score.evaluation import task_scores
from hcsmoe_core.studies.stability import agreement, capture_until_stable, extra_spread

TASK = "demo_facts"
WAYS = ("same", "every", "stop", "excess", "stop every", "excess every")


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
    if arguments.families:
        for layer in core.find_moe_layers(model):
            for tensor in layer.tensors().values():
                plant(tensor.detach(), arguments.families, arguments.noise)
    return model.to(arguments.device).eval()


def plant(tensor, size, noise):
    """Make experts of a stacked tensor noisy copies, of one for every ``size``; noise is relative to the
    weights.
    """
    first = tensor[torch.arange(len(tensor)) // size * size]
    tensor.copy_((first + noise * tensor.std() * torch.randn_like(tensor)) / (1 + noise**2) ** 0.5)


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
                total = sum(distance[a][b] for a in members[i] for b in members[j]) / (
                    len(members[i]) * len(members[j])
                )
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


def steps_of(model, ids, arguments):
    """The calls that are timed, by name; what they give is left in ``found``."""
    needs, batch, groups = resolve("hc-smoe").needs, arguments.batch, arguments.experts // 2
    how, found = dict(needs=needs, batch_size=batch, progress=False), {}
    half = dict(experts=[groups], **how)
    stop, excess = dict(agreement=arguments.agreement, **half), dict(excess=arguments.excess, **half)

    def keep(name, function):
        def call():
            found[name] = function()

        return call

    def restored(name):
        core.apply_plan(model, found[f"plan {name}"])
        core.restore(model)

    calls = {
        "usual capture": keep("usual", lambda: usual_capture(model, ids, batch)),
        "usual plan": keep("usual groups", lambda: [usual_groups(m, groups) for m in found["usual"][1]]),
        "usual merge": lambda: usual_merge(model, found["usual groups"], found["usual"][0]),
    }
    ways = {
        "same": lambda: core.capture(model, ids, **how),
        "every": lambda: core.capture(model, ids, every=arguments.every, **how),
        "stop": lambda: capture_until_stable(model, ids, **stop),
        "excess": lambda: capture_until_stable(model, ids, **excess),
        "stop every": lambda: capture_until_stable(model, ids, every=arguments.every, **stop),
        "excess every": lambda: capture_until_stable(model, ids, every=arguments.every, **excess),
    }
    for name, function in ways.items():
        calls[f"{name} capture"] = keep(name, function)
        calls[f"{name} plan"] = keep(
            f"plan {name}", lambda name=name: core.make_plan(found[name], experts=groups)
        )
        calls[f"{name} merge"] = lambda name=name: restored(name)
    every_r = range(arguments.experts // 8, arguments.experts, arguments.experts // 8)
    calls["study plans"] = keep(
        "study", lambda: len(list(make_plans(found["same"], experts=every_r, linkages=LINKAGES)))
    )
    return calls, found


def written(model, plan, repeats, device):
    """Seconds that writing a merged model takes: its whole state pickled, and ``save_merged``."""
    core.apply_plan(model, plan)
    with tempfile.TemporaryDirectory() as folder:
        number = iter(range(2 * repeats))
        calls = {
            "usual export": lambda: torch.save(model.state_dict(), Path(folder) / "model.pth"),
            "export": lambda: core.save_merged(model, plan, Path(folder) / f"merged-{next(number)}"),
        }
        best = interleaved(device, calls, repeats)
    core.restore(model)
    return best


def scored(items):
    """Seconds that scoring an embedded task takes: a request a forward pass, and as ``evaluate`` does; and
    both scores.
    """
    model, tokenizer = core.load_model("demo-qwen", dtype="float32")
    found = {}

    def score(name, size):
        found[name] = task_scores(model, tokenizer, [TASK], limit=items, batch_size=size)["tasks"][TASK][
            "acc"
        ]

    task_scores(model, tokenizer, [TASK], limit=1)  # what is imported and read the first time
    best = interleaved(
        "cpu", {"usual evaluation": lambda: score("usual", 1), "evaluation": lambda: score("ours", 64)}, 1
    )
    return best, found


def ratios_of(best, plans):
    """How many times as long the usual way takes, of each way and step; ``all`` is of capture, plan and
    merge together.
    """
    ratios = {step: best[f"usual {step}"] / best[step] for step in ("export", "evaluation")}
    usual = {step: best[f"usual {step}"] for step in ("capture", "plan", "merge")}
    for way in WAYS:
        ours = {step: best[f"{way} {step}"] for step in usual}
        ratios[way] = {step: usual[step] / ours[step] for step in usual}
        ratios[way]["all"] = sum(usual.values()) / sum(ours.values())
    # The usual way starts anew for each setting: its script captures, plans and merges once.
    study = best["same capture"] + best["study plans"] + plans * best["same merge"]
    ratios[f"study of {plans} settings"] = plans * sum(usual.values()) / study
    return ratios


def told(found, arguments):
    """What each way took of the tokens, and how its groups agree with the usual way's."""
    rows, same = {}, [p.labels for p in found["plan same"].layers]
    between = [
        core.distances(found["same"], layer, similarity="expert-output") for layer in found["same"].layers
    ]
    for way in WAYS:
        stats, labels = found[way], [p.labels for p in found[f"plan {way}"].layers]
        row = {"tokens": stats.num_tokens, "agreement with same": agreement(labels, same).round(3).tolist()}
        row["excess over same"] = [
            round(extra_spread(*three, "euclidean"), 3) for three in zip(labels, same, between, strict=True)
        ]
        if stats.stability is not None:
            layers = stats.stability["layers"].values()
            row |= {
                "stable": stats.stability["stable"],
                "tokens needed": [layer["needed"] for layer in layers],
            }
            row["agreement of halves at the end"] = [round(layer["agreement"][-1], 3) for layer in layers]
        rows[way] = row
    equal = sum(p == u for p, u in zip(same, found["usual groups"], strict=True))
    rows["same"]["layers with the usual way's groups"] = f"{equal} of {arguments.layers}"
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = dict(hidden=128, width=88, layers=4, experts=60, tokens=65536, length=512, batch=2, repeats=1)
    sizes |= dict(every=8, families=2, items=15)
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--agreement", type=float, default=0.95)
    parser.add_argument("--excess", type=float, default=0.05)
    parser.add_argument("--noise", type=float, default=0.1, help="of experts to the others of their family")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", help="file to append the line to")
    arguments = parser.parse_args()
    model = build(arguments)
    ids = torch.randint(0, 1024, (arguments.tokens // arguments.length, arguments.length))
    few = ids[: max(2, arguments.batch)]  # warm up
    capture_until_stable(model, few, needs=resolve("hc-smoe").needs, progress=False)
    calls, found = steps_of(model, ids, arguments)
    best = interleaved(arguments.device, calls, arguments.repeats)
    best |= written(model, found["plan same"], arguments.repeats, arguments.device)
    evaluation, scores = scored(arguments.items)
    best |= evaluation
    line = {
        "settings": vars(arguments),
        "usual / ours": rounded(ratios_of(best, found["study"])),
        "tokens and groups": told(found, arguments),
        "seconds of the processor (of the clock on a GPU), best of the repeats": rounded(best, 4),
        f"accuracy on {arguments.items} items": scores,
        "machine": machine(arguments.device),
    }
    tell(line, arguments.out, append=True)


def rounded(values, digits=2):
    return {k: rounded(v, digits) if isinstance(v, dict) else round(v, digits) for k, v in values.items()}


if __name__ == "__main__":
    main()
