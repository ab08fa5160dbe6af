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
    """Share of items whose right choice has the largest log-likelihood, and the largest per byte; one choice
    at a time.
    """
    return tuple(np.mean(found) for found in hits(model, tokenizer, items))


def hits(model, tokenizer, items, delimiter=""):
    """Which items are right by the largest log-likelihood, and by the largest per letter; a prompt may
    differ by choice.
    """
    found, normed = [], []
    for item in items:
        scores, choices = [], item["choices"]
        prompts = item["prompt"] if isinstance(item["prompt"], list) else [item["prompt"]] * len(choices)
        for before, choice in zip(prompts, choices, strict=True):
            prompt, whole = (
                tokenizer(before)["input_ids"],
                tokenizer(before + delimiter + choice)["input_ids"],
            )
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(logprobs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
        found.append(int(np.argmax(scores) == item["answer"]))
        normed.append(int(np.argmax(np.array(scores) / [len(c) for c in choices]) == item["answer"]))
    return found, normed


def gates(index, weight, experts):
    """Applied routing weights [T, E], zero where an expert was not chosen, and whether it was."""
    dense, chosen = np.zeros((len(index), experts)), np.zeros((len(index), experts), dtype=bool)
    for t, (row_index, row_weight) in enumerate(zip(index.tolist(), weight.tolist(), strict=True)):
        for e, w in zip(row_index, row_weight, strict=True):
            dense[t, e] += w
            chosen[t, e] = True
    return dense, chosen


def scores(logits, sigmoid=False):
    """What a router makes of its logits [T, E] before any choice."""
    logits = np.asarray(logits, dtype=np.float64)
    if sigmoid:
        return 1 / (1 + np.exp(-logits))
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def sums(f, g, chosen, p):
    """Sums over tokens from all outputs f [E, T, D], gates g, choices and scores p [T, E], one pair of
    experts a time.
    """
    experts, tokens = f.shape[:2]
    found = {"score_mass": p.sum(0)}
    for key in ("norm_sum", "gated_norm_sum", "output_max"):
        found[key] = np.zeros(experts)
    for key in ("output_gram", "routed_gram", "routed_square", "cosine_sum"):
        found[key] = np.zeros((experts, experts))
    norm = np.array([[np.sqrt((row**2).sum()) for row in rows] for rows in f])
    for i in range(experts):
        for t in range(tokens):
            if chosen[t, i]:
                found["norm_sum"][i] += norm[i, t]
                found["gated_norm_sum"][i] += g[t, i] * norm[i, t]
                found["output_max"][i] = max(found["output_max"][i], np.abs(f[i, t]).max())
        for j in range(experts):
            inner = np.array([a @ b for a, b in zip(f[i], f[j], strict=True)])
            found["output_gram"][i, j] = inner.sum()
            found["routed_gram"][i, j] = (g[:, i] * inner).sum()
            found["routed_square"][i, j] = (g[:, i] * norm[j] ** 2).sum()
            found["cosine_sum"][i, j] = (inner / (norm[i] * norm[j])).sum()
    return found


def token_key(sequence, position):
    """Hash by which the tokens of a sample are chosen, in whole numbers: splitmix64 of the sequence's and
    the position's.
    """
    mask = 2**64 - 1

    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    return mix(int(sequence, 16) ^ mix(position))


def routed(logits, kept, rule):
    """``{expert: weight}`` for one token's logits if the others' were −inf, by the rule of the family.

    ``rule`` has the family, ``top_k``, and of DeepSeek-V3 ``bias``, ``groups``, ``chosen_groups`` and
    ``scale``.
    """
    kept = sorted(kept)
    k = min(rule["top_k"], len(kept))
    if rule["family"] == "deepseek_v3":
        score = {e: 1 / (1 + np.exp(-logits[e])) for e in kept}
        choice = {e: score[e] + rule["bias"][e] for e in kept}
        size = len(logits) // rule["groups"]
        best_two = {}
        for group in range(rule["groups"]):
            best_two[group] = sum(sorted((choice[e] for e in kept if e // size == group), reverse=True)[:2])
        open_groups = sorted(best_two, key=lambda group: -best_two[group])[: rule["chosen_groups"]]
        chosen = sorted((e for e in kept if e // size in open_groups), key=lambda e: -choice[e])[:k]
        total = sum(score[e] for e in chosen)
        return {e: rule["scale"] * score[e] / total for e in chosen}
    chosen = sorted(kept, key=lambda e: -logits[e])[:k]
    power = {e: np.exp(logits[e] - max(logits[c] for c in kept)) for e in kept}
    normalised = rule["family"] in (
        "mixtral",
        "gpt_oss",
    )  # softmax over the winners; else over all that are kept
    total = sum(power[e] for e in (chosen if normalised else kept))
    return {e: power[e] / total for e in chosen}


def rerouted(logits, kept, rule):
    """Weights [T, E] that :func:`routed` gives."""
    dense = np.zeros(logits.shape)
    for t, row in enumerate(np.asarray(logits, dtype=np.float64)):
        for e, w in routed(row, kept, rule).items():
            dense[t, e] = w
    return dense


def lloyd(points, centres):
    """k-means from given centres, until nothing changes: labels and inertia."""
    centres, labels = np.array(centres, dtype=np.float64), None
    while True:
        square = np.array([[((p - c) ** 2).sum() for c in centres] for p in points])
        new = square.argmin(1)
        if labels is not None and (new == labels).all():
            return labels, square.min(1).sum()
        labels = new
        for c in range(len(centres)):
            if (labels == c).any():
                centres[c] = points[labels == c].mean(0)


def packable(sizes, bins, largest):
    """Whether the sizes fit into so many bins: every way tried."""
    seen = set()

    def fits(left, room):
        if not left:
            return True
        if (len(left), room) in seen:
            return False
        seen.add((len(left), room))
        for place in range(len(room)):
            if room[place] >= left[0]:
                rest = list(room)
                rest[place] -= left[0]
                if fits(left[1:], tuple(sorted(rest))):
                    return True
        return False

    return fits(tuple(sorted(sizes, reverse=True)), (largest,) * bins)


def agglomerated(square, groups, largest, linkage):
    """The closest two groups that may be joined are, distances between groups taken anew from those of their
    members.
    """
    clusters = [[e] for e in range(len(square))]
    reduce = {"average": np.mean, "single": np.min, "complete": np.max}[linkage]
    while len(clusters) > groups:
        best = None
        for i in range(len(clusters)):
            for j in range(i + 1, len(clusters)):
                rest = [len(c) for at, c in enumerate(clusters) if at not in (i, j)] + [
                    len(clusters[i]) + len(clusters[j])
                ]
                distance = reduce([square[a, b] for a in clusters[i] for b in clusters[j]])
                if (
                    (best is None or distance < best[0])
                    and max(rest) <= largest
                    and packable(rest, groups, largest)
                ):
                    best = distance, i, j
        _, i, j = best
        clusters[i] += clusters.pop(j)
    return sorted(sorted(c) for c in clusters)


def single_shot(similarity, usage, groups, limit):
    """Groups around the most used, as HC-SMoE's published code makes them: in index order, the least similar
    evicted.
    """
    similarity = np.array(similarity, dtype=np.float64)
    cores = sorted(range(len(usage)), key=lambda e: -usage[e])[:groups]
    members = {core: [core] for core in cores}

    def nearest(e):
        return cores[int(np.argmax([similarity[e, core] for core in cores]))]

    for e in range(len(usage)):
        if e in cores:
            continue
        core = nearest(e)
        members[core].append(e)
        while limit and len(members[core]) > limit:
            out = min(members[core][1:], key=lambda m: similarity[core, m])
            members[core].remove(out)
            similarity[out, core] = similarity[core, out] = -100
            core = nearest(out)
            members[core].append(out)
    return {core: sorted(m) for core, m in members.items()}


def grape(similarities, total, least):
    """The greedy without its guard: the layer with most redundancy joins its most similar two, and loses
    their share.
    """
    labels = [list(range(len(s))) for s in similarities]
    redundancy = [sum(s[i, j] for i in range(len(s)) for j in range(len(s)) if i != j) for s in similarities]
    joined = []
    while sum(len(set(g)) for g in labels) > total:
        able = [a for a, g in enumerate(labels) if len(set(g)) > least[a]]
        layer = max(able, key=lambda a: redundancy[a])
        s, group = similarities[layer], labels[layer]
        pairs = [(i, j) for i in range(len(s)) for j in range(i + 1, len(s)) if group[i] != group[j]]
        i, j = max(pairs, key=lambda pair: s[pair])
        redundancy[layer] -= s[i, j] + s[j, i]
        labels[layer] = [group[i] if g == group[j] else g for g in group]
        joined.append(layer)
    return [len(set(g)) for g in labels], joined


def written(model, numbers, temperature, begin, ends, turn=()):
    """One row of a model's own text, the whole prefix read again for every token.

    ``begin(number)`` gives the tokens that a document begins with; ``turn`` is what follows the user's turn,
    whose first token ends it. There is one random number for each place, and small ones stand for small
    tokens.
    """
    ids, given, mine, asking = [], list(begin(numbers[0])), False, bool(turn)
    while len(ids) < len(numbers):
        number = numbers[len(ids)]
        if mine and asking and ids[-1] == turn[0]:
            given, asking = list(turn[1:]), False
        elif mine and ids[-1] in ends:
            new = list(begin(number))
            given, asking = new[1:] if new[:1] == ids[-1:] else new, bool(turn)
        mine = not given
        if given:
            ids.append(given.pop(0))
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().numpy()
        weights = np.exp((logits - logits.max()) / temperature)
        cumulated, token = weights[0], 0
        while cumulated <= number * weights.sum():
            token += 1
            cumulated += weights[token]
        ids.append(token)
    return ids
