"""HC-SMoE (ICML 2025, arXiv 2410.08589) from start to end, for models with stacked experts (transformers 5).

Without checks, files or the families that differ, so that it can be verified by reading. ``hcsmoe_core``
computes the same: tests/test_first_file.py compares labels and logits on both embedded models.

E experts, r kept, T tokens, D hidden size, I expert width, k experts per token.
"""

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import pdist


def expert_modules(model):
    """Modules with stacked experts: ``gate_up_proj [E, 2I, D]`` and ``down_proj [E, D, I]``."""
    return [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]


@torch.no_grad()
def mean_outputs_and_usage(model, input_ids, batch_size=8):
    """Per layer: each expert's mean output over ALL tokens [E, D], and the tokens routed to it [E]."""
    layers = expert_modules(model)
    hidden_sum = [torch.zeros(m.down_proj.shape[0], m.down_proj.shape[2]).double() for m in layers]  # [E, I]
    usage = [torch.zeros(len(m.down_proj), dtype=torch.int64) for m in layers]  # [E]

    def watch(layer):
        def hook(experts, inputs):
            tokens, index, _ = inputs  # [T, D], [T, k], [T, k]
            for e, weight in enumerate(experts.gate_up_proj):
                gate, up = (tokens @ weight.T).chunk(2, dim=-1)
                hidden_sum[layer][e] += (experts.act_fn(gate) * up).sum(0, dtype=torch.float64)
            usage[layer] += torch.bincount(index.flatten(), minlength=len(usage[layer]))

        return hook

    hooks = [m.register_forward_pre_hook(watch(layer)) for layer, m in enumerate(layers)]
    for rows in input_ids.split(batch_size):
        model(input_ids=rows, use_cache=False)
    for hook in hooks:
        hook.remove()
    # The down projection is linear, so that the mean output is that of the mean activation.
    means = [h / input_ids.numel() for h in hidden_sum]
    return [
        torch.einsum("edi,ei->ed", m.down_proj.double(), h) for m, h in zip(layers, means, strict=True)
    ], usage


def labels_of(outputs, r):
    """Join the two closest groups (average linkage, Euclidean) until r are left: the group of each expert
    [E].
    """
    experts = len(outputs)
    groups = {e: [e] for e in range(experts)}
    for t, (a, b, _, _) in enumerate(linkage(pdist(outputs), "average")[: experts - r]):
        groups[experts + t] = groups.pop(int(a)) + groups.pop(int(b))
    labels = np.empty(experts, dtype=int)
    for g, members in enumerate(sorted(groups.values(), key=min)):
        labels[members] = g
    return labels


@torch.no_grad()
def merge(module, labels, usage):
    """Give the module r experts, averages weighted by usage; what the router chooses goes through the
    labels.
    """
    for name in ("gate_up_proj", "down_proj"):
        weight, rows = getattr(module, name), []
        for g in range(labels.max() + 1):
            members = np.flatnonzero(labels == g)
            share = usage[members].double() if usage[members].sum() else torch.ones(len(members)).double()
            rows.append(torch.tensordot(share / share.sum(), weight[members].double(), dims=1))
        setattr(module, name, torch.nn.Parameter(torch.stack(rows).to(weight.dtype)))
    module.num_experts = len(rows)
    group_of = torch.from_numpy(labels)
    module.register_forward_pre_hook(lambda _, inputs: (inputs[0], group_of[inputs[1]], inputs[2]))


def hc_smoe(model, input_ids, r):
    """Merge every layer of a model to r experts, in place; returns the labels [L, E]."""
    outputs, usage = mean_outputs_and_usage(model, input_ids)
    labels = [labels_of(means.numpy(), r) for means in outputs]
    for layer, module in enumerate(expert_modules(model)):
        merge(module, labels[layer], usage[layer])
    return np.array(labels)
