"""Obviously right and slow: every expert on every token in full, [E, T, D] at once, in float64."""

import numpy as np
import torch


def expert(experts, e, x):
    """Output [T, D] of expert e of a stacked module, by the formula of the family it is of."""
    w = {n: p.detach().double() for n, p in experts.named_parameters()}
    if type(experts).__name__ == "GptOssExperts":
        gate_up = x @ w["gate_up_proj"][e] + w["gate_up_proj_bias"][e]
        gate, up = gate_up[:, ::2].clamp(max=7.0), gate_up[:, 1::2].clamp(-7.0, 7.0)
        return ((up + 1) * gate * torch.sigmoid(1.702 * gate)) @ w["down_proj"][e] + w["down_proj_bias"][e]
    gate, up = (x @ w["gate_up_proj"][e].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ w["down_proj"][e].T


class Trace:
    """What reached each experts module, and what its router said, in one run of the model in float64."""

    def __init__(self, model, ids, names, routers):
        self.inputs, self.index, self.weight, self.logits = {}, {}, {}, {}
        handles = []
        for name, router in zip(names, routers, strict=True):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(self._experts(name)))
            handles.append(model.get_submodule(router).register_forward_hook(self._router(name)))
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()

    def _experts(self, name):
        def hook(module, inputs):
            self.inputs[name], self.index[name], self.weight[name] = inputs

        return hook

    def _router(self, name):
        def hook(module, inputs, output):
            self.logits[name] = output[0] if isinstance(output, tuple) else output

        return hook


def outputs(experts, x):
    """[E, T, D]."""
    return torch.stack([expert(experts, e, x) for e in range(experts.down_proj.shape[0])])


def usage(index, weight, experts):
    count, mass = np.zeros(experts, dtype=int), np.zeros(experts)
    for row_index, row_weight in zip(index.tolist(), weight.tolist(), strict=True):
        for e, w in zip(row_index, row_weight, strict=True):
            count[e] += 1
            mass[e] += w
    return count, mass


def pairwise(features):
    """Euclidean distances, one pair at a time, condensed."""
    rows = [np.asarray(f, dtype=np.float64).ravel() for f in features]
    return np.array([np.sqrt(((a - b) ** 2).sum()) for i, a in enumerate(rows) for b in rows[i + 1 :]])


def merged(tensor, labels, weights):
    """Σ w_e W_e of each group, in float64."""
    groups = max(labels) + 1
    out = torch.zeros(groups, *tensor.shape[1:], dtype=torch.float64)
    for e, (g, w) in enumerate(zip(labels, weights, strict=True)):
        out[g] += w * tensor[e].double()
    return out


def multiple_choice(model, tokenizer, items):
    """Share of items whose right choice has the largest log-likelihood, and the largest per byte; one choice at a time."""
    hits, normed = [], []
    for item in items:
        scores = []
        for choice in item["choices"]:
            prompt, whole = tokenizer(item["prompt"])["input_ids"], tokenizer(item["prompt"] + choice)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(logprobs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
        hits.append(int(np.argmax(scores)) == item["answer"])
        lengths = [len(c) for c in item["choices"]]
        normed.append(int(np.argmax(np.array(scores) / lengths)) == item["answer"])
    return np.mean(hits), np.mean(normed)
