"""Every rule by which experts become one, against loops and NumPy written from the formulas, in float64."""

import itertools
import zlib
from dataclasses import dataclass

import naive
import numpy as np
import pytest
import torch
from conftest import FAMILIES, MATCHING, OTHERS, TINY, logits, tiny_model, tokens
from scipy.optimize import linear_sum_assignment

from hcsmoe_core import apply_plan, capture, make_plan, restore
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods.combining import chosen_columns
from hcsmoe_core.plan import LayerPlan, Plan
from hcsmoe_core.steps import combine as COMBINE  # noqa: N812

NEEDS = ("usage", "outputs", "norms", "grams", "sample")
ROUTER = {"gpt_oss": "router"}  # beside the experts; "gate" elsewhere
LABELS = [0, 1, 0, 2, 1, 0, 3, 2]
RULES = [
    *MATCHING,
    {"rule": "least-squares", "align": "none", "ridge": 0.05},
    {"rule": "least-squares", "align": "weights", "ridge": 1e-6},
    {"rule": "joint-svd", "align": "none", "rank": 1.0},
    {"rule": "joint-svd", "align": "activations", "rank": 0.4},
    {"rule": "selection", "ridge": 0.02},
    {"rule": "ties", "density": 0.2},
    {"rule": "ties", "density": 0.7},
    {"rule": "ties", "density": 1.0},
]


# --- the naive side ---------------------------------------------------------------------------------------


@dataclass
class Expert:
    """gate, up [I, D], down [D, I]; their biases where the family has any."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    gate_bias: np.ndarray | None = None
    up_bias: np.ndarray | None = None
    offset: np.ndarray | None = None

    def hidden(self, x):
        gate, up = x @ self.gate.T, x @ self.up.T
        if self.offset is None:
            return gate / (1 + np.exp(-gate)) * up
        gate, up = np.minimum(gate + self.gate_bias, 7), np.clip(up + self.up_bias, -7, 7)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))

    def __call__(self, x):
        return self.hidden(x) @ self.down.T + (0 if self.offset is None else self.offset)

    def ordered(self, order):
        """The neurons in another order."""
        biases = (None, None) if self.offset is None else (self.gate_bias[order], self.up_bias[order])
        return Expert(self.gate[order], self.up[order], self.down[:, order], *biases, self.offset)

    def rows(self):
        """All that each neuron reads and writes, one row a neuron."""
        parts = [self.gate, self.up, self.down.T]
        if self.offset is not None:
            parts += [self.gate_bias[:, None], self.up_bias[:, None]]
        return np.concatenate(parts, 1)


def expert_of(tensors, e):
    """Expert ``e`` of stacked tensors, taken apart by the layout of its family."""
    t = {n: v[e].detach().double().numpy() for n, v in tensors.items()}
    if "gate_up_proj_bias" in t:  # GPT-OSS: transposed, gate and up in turn
        both, bias = t["gate_up_proj"].T, t["gate_up_proj_bias"]
        return Expert(both[::2], both[1::2], t["down_proj"].T, bias[::2], bias[1::2], t["down_proj_bias"])
    width = t["gate_up_proj"].shape[0] // 2
    return Expert(t["gate_up_proj"][:width], t["gate_up_proj"][width:], t["down_proj"])


def rebuilt(rows, hidden, experts, weights):
    """An expert from the rows of :meth:`Expert.rows`; its offset is the weighted mean of the members'."""
    parts = [rows[:, :hidden], rows[:, hidden : 2 * hidden], rows[:, 2 * hidden : 3 * hidden].T]
    if experts[0].offset is not None:
        parts += [rows[:, -2], rows[:, -1], sum(w * e.offset for w, e in zip(weights, experts, strict=True))]
    return Expert(*parts)


@dataclass
class Group:
    """Members of a group with all that the calibration tokens say of them."""

    experts: list
    weights: np.ndarray
    dominant: int
    x: np.ndarray  # [T, D]
    gates: np.ndarray  # [T, n]

    def mean(self, experts=None):
        experts = experts or self.experts
        rows = sum(w * e.rows() for w, e in zip(self.weights, experts, strict=True))
        return rebuilt(rows, self.x.shape[1], experts, self.weights)


def aligned(group, how):
    reference, made = group.experts[group.dominant], []
    for place, expert in enumerate(group.experts):
        if place == group.dominant or how == "none":
            made.append(expert)
            continue
        if how == "weights":  # closest rows: the same assignment as by inner products
            a, b = reference.rows(), expert.rows()
            cost = np.array([[((p - q) ** 2).sum() for q in b] for p in a])
        else:
            x = group.x[(group.gates[:, group.dominant] > 0) | (group.gates[:, place] > 0)]
            a, b = reference.hidden(x), expert.hidden(x)
            cost = np.array([[-np.corrcoef(p, q)[0, 1] for q in b.T] for p in a.T])
        made.append(expert.ordered(linear_sum_assignment(cost)[1]))
    return made


def correlation(group, features):
    """Of all members' neurons; a token that was routed to two members is there twice."""
    total = 0
    if "activations" in features.split("+"):
        x = np.concatenate([group.x[group.gates[:, m] > 0] for m in range(len(group.experts))])
        total = total + np.corrcoef(np.concatenate([e.hidden(x) for e in group.experts], 1).T)
    if "weights" in features.split("+"):
        total = total + np.corrcoef(np.concatenate([e.rows() for e in group.experts]))
    return total


def fix_dom(group, features):
    width = len(group.experts[0].gate)
    c = correlation(group, features)
    total, weight = group.weights[group.dominant] * group.experts[group.dominant].rows(), np.full(width, 0.0)
    weight += group.weights[group.dominant]
    for m, expert in enumerate(group.experts):
        if m == group.dominant:
            continue
        for q, row in enumerate(expert.rows()):
            p = max(range(width), key=lambda p, m=m, q=q: c[group.dominant * width + p, m * width + q])
            total[p] += group.weights[m] * row
            weight[p] += group.weights[m]
    return rebuilt(total / weight[:, None], group.x.shape[1], group.experts, group.weights)


def zipit(group, features):
    """As the authors do it: join the two that correlate most, forget one, go on."""
    width = len(group.experts[0].gate)
    rows = np.concatenate([e.rows() for e in group.experts])
    weight = np.repeat(group.weights, width)
    c = correlation(group, features)
    np.fill_diagonal(c, -1)
    while len(rows) > width:
        i, j = np.unravel_index(c.argmax(), c.shape)
        rows[i] = (weight[i] * rows[i] + weight[j] * rows[j]) / (weight[i] + weight[j])
        weight[i] += weight[j]
        c[i] = 0.1 * np.minimum(c[i], c[j])
        c[:, i] = c[i]
        c[i, i] = -1
        rows, weight = np.delete(rows, j, 0), np.delete(weight, j)
        c = np.delete(np.delete(c, j, 0), j, 1)
    return rebuilt(rows, group.x.shape[1], group.experts, group.weights)


def regression(group, offset):
    """Tokens routed to any member, summed gates, and summed gated outputs less the offset's part."""
    rows = (group.gates > 0).any(1)
    x, gates = group.x[rows], group.gates[rows]
    target = np.zeros_like(x)
    for m, expert in enumerate(group.experts):
        target += gates[:, m : m + 1] * (expert(x) - (0 if offset is None else offset))
    return x, gates.sum(1, keepdims=True), target


def ridge_solve(values, target, ridge, prior):
    """Least squares of ``[H; sqrt(λ) 1] W = [Y; sqrt(λ) W0]``."""
    penalty = np.sqrt(ridge * (values**2).sum(0).mean())
    top, bottom = np.concatenate([values, penalty * np.eye(values.shape[1])]), penalty * prior
    return np.linalg.lstsq(top, np.concatenate([target, bottom]), rcond=None)[0]


def least_squares(group, align, ridge):
    merged = group.mean(aligned(group, align))
    x, gate, target = regression(group, merged.offset)
    merged.down = ridge_solve(gate * merged.hidden(x), target, ridge, merged.down.T).T
    return merged


def joint_svd(group, align, rank):
    experts = aligned(group, align)
    made = group.mean(experts)
    for name in ("gate", "up", "down"):
        parts = [getattr(e, name) for e in experts]
        u, s, v = np.linalg.svd(np.concatenate(parts, 1), full_matrices=False)
        kept = round(rank * min(parts[0].shape[0], sum(p.shape[1] for p in parts)))
        mean = sum(w * p for w, p in zip(group.weights, np.split(v, len(parts), 1), strict=True))
        setattr(made, name, u[:, :kept] @ np.diag(s[:kept]) @ mean[:kept])
    return made


def selection(group, ridge, width=None):
    """Each step refits the target on every choice of one more neuron."""
    rows = np.concatenate([e.rows() for e in group.experts])
    offset = group.mean().offset
    pool = rebuilt(rows, group.x.shape[1], group.experts, group.weights)
    x, gate, target = regression(group, offset)
    values = gate * pool.hidden(x)
    chosen = []
    for _ in range(width or len(group.experts[0].gate)):
        left = {}
        for p in range(len(rows)):
            if p not in chosen:
                columns = values[:, [*chosen, p]]
                left[p] = ((target - columns @ np.linalg.lstsq(columns, target, rcond=None)[0]) ** 2).sum()
        chosen.append(min(left, key=left.get))
    chosen = sorted(chosen)
    made, prior = pool.ordered(chosen), pool.down[:, chosen].T
    guess = values[:, chosen] @ prior
    prior = prior * (guess * target).sum() / (guess * guess).sum()
    made.down = ridge_solve(values[:, chosen], target, ridge, prior).T
    return made


def flat(expert):
    """All weights of an expert in a row: what neurons read, what they write, biases."""
    parts = [np.stack([expert.gate, expert.up], 1), expert.down]
    if expert.offset is not None:
        parts += [np.stack([expert.gate_bias, expert.up_bias], 1), expert.offset]
    return np.concatenate([part.ravel() for part in parts])


def unflat(row, like):
    parts = np.split(row, np.cumsum([2 * like.gate.size, like.down.size, 2 * len(like.gate)]))
    gate, up = parts[0].reshape(len(like.gate), 2, -1).transpose(1, 0, 2)
    biases = () if like.offset is None else (*parts[2].reshape(-1, 2).T, parts[3])
    return Expert(gate, up, parts[1].reshape(like.down.shape), *biases)


def ties(group, density):
    """Trim, elect a sign and average what agrees, weight by weight."""
    rows = np.array([flat(e) for e in group.experts])
    mean, changes = rows.mean(0), rows - rows.mean(0)
    for change in changes:
        smallest = np.sort(np.abs(change))[::-1][max(1, round(density * len(change))) - 1]
        change[np.abs(change) < smallest] = 0
    made = mean.copy()
    for p, column in enumerate(changes.T):
        total = sum(w * c for w, c in zip(group.weights, column, strict=True))
        size = sum(w * abs(c) for w, c in zip(group.weights, column, strict=True))
        agree = [(w, c) for w, c in zip(group.weights, column, strict=True) if w * c * total > 0]
        if abs(total) > 1e-9 * size:
            made[p] += sum(w * c for w, c in agree) / sum(w for w, _ in agree)
    return unflat(made, group.experts[0])


def combined(group, rule, **options):
    if rule == "average":
        return group.mean(aligned(group, options.get("align", "none")))
    rules = {"fix-dom": fix_dom, "zipit": zipit, "least-squares": least_squares, "joint-svd": joint_svd}
    rules["ties"] = ties
    return (rules | {"selection": selection, "trimming": selection})[rule](group, **options)


# --- fixtures ---------------------------------------------------------------------------------------------


class Case:
    """A model in float64, its statistics, and tokens, gates and experts of each layer, found naively."""

    def __init__(self, family):
        self.family, self.model, ids = family, tiny_model(family, torch.float64), tokens()
        self.stats = capture(self.model, ids, needs=NEEDS)
        self.names = [layer.name for layer in find_moe_layers(self.model)]
        beside = ROUTER.get(family, "gate")
        trace = naive.Trace(self.model, ids, self.names, [n.replace("experts", beside) for n in self.names])
        self.x, self.gates, self.count, self.experts = {}, {}, {}, {}
        for name in self.names:
            module = self.model.get_submodule(name)
            self.x[name] = trace.inputs[name].reshape(-1, TINY["hidden_size"]).numpy()
            gates = np.zeros((len(self.x[name]), 8))
            for row, index, weight in zip(gates, trace.index[name], trace.weight[name], strict=True):
                row[index.numpy()] = weight.numpy()
            self.gates[name], self.count[name] = gates, (gates > 0).sum(0)
            self.experts[name] = [expert_of(dict(module.named_parameters()), e) for e in range(8)]
            full = naive.outputs(module, trace.inputs[name].reshape(gates.shape[0], -1))  # [E, T, D]
            for e, expert in enumerate(self.experts[name]):
                np.testing.assert_allclose(expert(self.x[name]), full[e], rtol=1e-9, atol=1e-12)

    def weights(self, name, labels):
        """By the number of routed tokens, as HC-SMoE's."""
        total = np.bincount(labels, self.count[name])
        return (self.count[name] / total[labels]).tolist()

    def plan(self, combine, labels=LABELS, dominant=None, **rest):
        dominant = dominant or self.dominant(labels)
        return Plan(
            [
                LayerPlan(n, labels, self.weights(n, labels), combine, dominant=dominant, **rest)
                for n in self.names
            ]
        )

    @staticmethod
    def dominant(labels):
        """The last of each group, so that nothing that takes the first by chance passes."""
        return [max(e for e in range(8) if labels[e] == g) for g in range(max(labels) + 1)]

    def group(self, name, members, dominant, labels=LABELS):
        weights = np.array(self.weights(name, labels))[members]
        experts = [self.experts[name][e] for e in members]
        return Group(experts, weights, members.index(dominant), self.x[name], self.gates[name][:, members])


_cases = {}


@pytest.fixture(params=("mixtral", "gpt_oss", "qwen2_moe"))
def case(request):
    if request.param not in _cases:
        _cases[request.param] = Case(request.param)
    yield _cases[request.param]
    restore(_cases[request.param].model)


def held(model, name):
    return dict(model.get_submodule(name).named_parameters())


def close(got, wanted, relative=1e-6):
    assert got.shape == wanted.shape
    assert np.linalg.norm(got - wanted) <= relative * np.linalg.norm(wanted)


def same_expert(got, wanted, relative=1e-6):
    close(got.rows(), wanted.rows(), relative)
    if wanted.offset is not None:
        close(got.offset, wanted.offset, relative)


# --- tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", RULES, ids=lambda c: "-".join(map(str, c.values())))
def test_rules_equal_naive_ones(case, combine):
    apply_plan(case.model, case.plan(combine), case.stats)
    names = case.names[:1] if combine["rule"] == "selection" else case.names
    for name in names:
        for g, dominant in enumerate(case.dominant(LABELS)):
            members = [e for e in range(8) if LABELS[e] == g]
            got, group = expert_of(held(case.model, name), g), case.group(name, members, dominant)
            if len(members) == 1:
                same_expert(got, group.experts[0], 0)
                continue
            wanted = combined(group, **combine)
            close(got(case.x[name]), wanted(case.x[name]))
            if combine["rule"] == "zipit":  # neurons in any order
                wanted = wanted.ordered(linear_sum_assignment(-got.rows() @ wanted.rows().T)[1])
            same_expert(got, wanted)


@pytest.mark.parametrize("merge", ["frequency", "average", "routing-mass"])
def test_averages_by_what_was_counted_naively(case, merge):
    apply_plan(case.model, make_plan(case.stats, case.model, experts=3, merge=merge))
    for layer in find_moe_layers(case.model):
        plan, name = layer.experts._merged.plan, layer.name
        worth = {
            "frequency": case.count[name],
            "average": np.ones(8),
            "routing-mass": case.gates[name].sum(0),
        }[merge]
        for g, members in enumerate(plan.groups()):
            share = worth[members] / worth[members].sum()
            group = Group(
                [case.experts[name][e] for e in members], share, 0, case.x[name], case.gates[name][:, members]
            )
            same_expert(expert_of(held(case.model, name), g), group.mean())


@pytest.mark.parametrize("how", ["weights", "activations"])
def test_alignment_is_the_best_of_all_permutations(how):
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(4)
    config = MixtralConfig(**TINY, intermediate_size=5, num_local_experts=4, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    stats = capture(model, tokens(), needs=NEEDS)
    originals = [[expert_of(layer.tensors(), e) for e in range(4)] for layer in find_moe_layers(model)]
    combine = {"rule": "average", "align": how}
    names = [layer.name for layer in find_moe_layers(model)]
    apply_plan(
        model,
        Plan([LayerPlan(n, [0, 1, 1, 0], [0.3, 0.6, 0.4, 0.7], combine, dominant=[3, 1]) for n in names]),
        stats,
    )
    moved = 0
    for layer, experts in zip(find_moe_layers(model), originals, strict=True):
        sample = stats.layers[layer.name].sample
        for g, (first, other, share) in enumerate([(3, 0, 0.7), (1, 2, 0.6)]):
            a, b = experts[first], experts[other]
            x = sample.inputs[((sample.index == first) | (sample.index == other)).any(1)].numpy()
            score = np.zeros((5, 5))
            for p, q in itertools.product(range(5), range(5)):
                if how == "weights":
                    score[p, q] = a.gate[p] @ b.gate[q] + a.up[p] @ b.up[q] + a.down[:, p] @ b.down[:, q]
                else:
                    score[p, q] = np.corrcoef(a.hidden(x)[:, p], b.hidden(x)[:, q])[0, 1]
            best = max(
                itertools.permutations(range(5)), key=lambda o, s=score: sum(s[p, q] for p, q in enumerate(o))
            )
            moved += list(best) != list(range(5))
            wanted = share * a.rows() + (1 - share) * b.ordered(list(best)).rows()
            close(expert_of(layer.tensors(), g).rows(), wanted)
    assert moved > 0


@pytest.mark.parametrize("width", [6, 13])
def test_trimming_equals_naive_selection_of_one(case, width):
    labels = list(range(8))
    layers = [
        LayerPlan(n, labels, [1.0] * 8, {"rule": "trimming", "ridge": 0.02}, width=width) for n in case.names
    ]
    apply_plan(case.model, Plan(layers), case.stats)
    many = [(name, e) for name in case.names for e in range(8) if case.count[name][e] >= 2 * 13]
    assert len(many) >= 8
    for name, e in many[:8]:  # fewer tokens than neurons are fitted exactly by many choices
        group = Group([case.experts[name][e]], np.ones(1), 0, case.x[name], case.gates[name][:, [e]])
        same_expert(expert_of(held(case.model, name), e), selection(group, 0.02, width))
    assert torch.isfinite(logits(case.model, tokens())).all()


def test_the_ridge_is_relative_and_pulls_to_the_average(case):
    """With a large ridge least squares are the average; with none the residual is the smallest there is."""
    name, labels = case.names[0], [0] * 8
    group = case.group(name, list(range(8)), 7, labels)
    x, gate, target = regression(group, group.mean().offset)
    found = {}
    for ridge in (1e12, 1e-3, 0.05):
        apply_plan(
            case.model,
            case.plan({"rule": "least-squares", "align": "none", "ridge": ridge}, labels),
            case.stats,
        )
        found[ridge] = expert_of(held(case.model, name), 0)
        restore(case.model)
    same_expert(found[1e12], group.mean())
    values = gate * group.mean().hidden(x)
    error = {r: ((values @ e.down.T - target) ** 2).sum() for r, e in found.items()}
    assert error[1e-3] < error[0.05] < error[1e12]


def test_joint_svd_at_full_rank_is_the_weighted_mean(case):
    apply_plan(case.model, case.plan({"rule": "joint-svd", "align": "none", "rank": 1.0}), case.stats)
    for name in case.names:
        for g in range(3):
            members = [e for e in range(8) if LABELS[e] == g]
            group = case.group(name, members, members[0])
            same_expert(expert_of(held(case.model, name), g), group.mean(), 1e-10)


def test_soft_groups_mix_every_expert(case):
    generator = np.random.default_rng(3)
    labels, weights = [0, 1, 0, 2, 1, 0, 2, 2], [0.2, 0.3, 0.5, 0.1, 0.7, 0.3, 0.5, 0.4]
    layers, mixtures = [], {}
    for name in case.names:
        mixture = generator.random((3, 8)) * (generator.random((3, 8)) > 0.2)
        mixtures[name] = mixture / mixture.sum(1, keepdims=True)
        layers.append(LayerPlan(name, labels, weights, mixture=mixtures[name].tolist()))
    apply_plan(case.model, Plan(layers), case.stats)
    for name, mixture in mixtures.items():
        for g in range(3):
            group = Group(case.experts[name], mixture[g], 0, case.x[name], case.gates[name])
            same_expert(expert_of(held(case.model, name), g), group.mean())


def test_fuzzy_plans_hold_memberships_times_weights(case):
    """``share_ge ∝ u_ge · count_e``: of two groups memberships follow from the plan, and mix the weights."""
    plan = make_plan(case.stats, case.model, experts=3, method="fuzzy")
    apply_plan(case.model, plan, case.stats)
    for layer in plan.layers:
        mixture = np.array(layer.mixture)
        np.testing.assert_allclose(mixture.sum(1), 1, rtol=1e-12)
        group = Group(case.experts[layer.name], mixture[1], 0, case.x[layer.name], case.gates[layer.name])
        same_expert(expert_of(held(case.model, layer.name), 1), group.mean())
        features = np.stack([naive_mean(e, case.x[layer.name]) for e in case.experts[layer.name]])
        membership = mixture / case.count[layer.name]
        # Bezdek's condition: u_ge is the share of ‖x_e − c_g‖^-2, c_g the u²-weighted mean; u is known up to
        # a scale per group.
        scale = np.linalg.lstsq(membership.T, np.ones(8), rcond=None)[0]
        membership = membership * scale[:, None]
        np.testing.assert_allclose(membership.sum(0), 1, rtol=1e-6)
        power = membership**2
        centres = power @ features / power.sum(1, keepdims=True)
        near = 1 / ((features[None] - centres[:, None]) ** 2).sum(2)
        np.testing.assert_allclose(membership, near / near.sum(0), rtol=1e-4)
        # Two centres may fall together; then either will do.
        assert all(membership[g, e] > membership[:, e].max() - 1e-4 for e, g in enumerate(layer.labels))


def naive_mean(expert, x):
    return expert(x).mean(0)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss"])
def test_averaged_routers_are_those_of_a_smaller_model(family):
    """DEK: the model computes what one with r experts does, whose rows and experts are the means."""
    from transformers import AutoModelForCausalLM

    model, ids = tiny_model(family, torch.float64), tokens()
    plan = make_plan(capture(model, ids, needs=NEEDS), model, experts=3, method="dek")
    assert all(layer.router == "averaged" and layer.num_groups == 3 for layer in plan.layers)
    config = type(model.config).from_dict(model.config.to_dict())
    for count in ("num_experts", "num_local_experts"):
        if hasattr(config, count):
            setattr(config, count, 3)
    config.num_experts_per_tok = min(config.num_experts_per_tok, 3)
    small = AutoModelForCausalLM.from_config(
        config, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    weights = model.state_dict()
    for layer in plan.layers:
        block = layer.name.rpartition(".")[0]
        share = [1 / len(layer.groups()[g]) for g in layer.labels]
        for key in weights:
            if key.startswith((f"{layer.name}.", f"{block}.{ROUTER.get(family, 'gate')}.")):
                weights[key] = naive.merged(weights[key], layer.labels, share)
    small.load_state_dict(weights)
    apply_plan(model, plan)
    close(logits(model, ids).numpy(), logits(small, ids).numpy())


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_neurons_and_back(family):
    model = tiny_model(family, torch.float64)
    x = torch.randn(11, TINY["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer in find_moe_layers(model):
        tensors = layer.tensors()
        neurons = [layer.neurons(e) for e in range(8)]
        again = layer.stacked(neurons)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[n], tensors[n]) for n in tensors)
        rows = layer.neuron_rows()
        interleaved = family == "gpt_oss"
        assert rows.tolist() == [[2 * i, 2 * i + 1] if interleaved else [i, 24 + i] for i in range(24)]
        order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
        shuffled = layer.stacked([n.take(order) for n in neurons])
        fewer = layer.stacked([n.take(order[:9]) for n in neurons])
        for e in range(8):
            own, wanted = expert_of(tensors, e), naive.expert(layer.experts, e, x).numpy()
            close(own(x.numpy()), wanted, 1e-12)
            output = layer.activate(neurons[e], x) @ neurons[e].down.T
            output = output if neurons[e].offset is None else output + neurons[e].offset
            close(output.numpy(), wanted, 1e-12)
            assert not torch.equal(shuffled["down_proj"], tensors["down_proj"])
            close(expert_of(shuffled, e)(x.numpy()), wanted, 1e-12)
            same_expert(expert_of(fewer, e), own.ordered(order[:9].numpy()), 0)
            close(
                layer.activate(neurons[e].take(order[:9]), x).numpy(),
                own.hidden(x.numpy())[:, order[:9]],
                1e-12,
            )


ALL_RULES = [
    {"rule": rule} | {name: value for name, value in step.options.items() if name != "width"}
    for rule, step in COMBINE.items()
    if rule != "trimming"
] + RULES[1:5]


@pytest.mark.parametrize("family", FAMILIES + OTHERS)
def test_lone_experts_are_copied_bit_for_bit_and_16_bits_are_close(family):
    """The same weights in bfloat16 and float32, by the same plan and statistics."""
    narrow, wide = tiny_model(family, torch.bfloat16), tiny_model(family)
    wide.load_state_dict({n: t.float() for n, t in narrow.state_dict().items()})
    stats, labels = capture(wide, tokens(), needs=NEEDS), [0, 1, 0, 2, 1, 0, 3, 4]
    for combine in ALL_RULES:
        layers = []
        for name, sums in stats.layers.items():
            weights = sums.usage_count.sum(0).double().clamp(min=1).numpy()
            weights = (weights / np.bincount(labels, weights)[labels]).tolist()
            layers.append(LayerPlan(name, labels, weights, combine, dominant=[5, 1, 3, 6, 7]))
        for model in (narrow, wide):
            original = {n: dict(held(model, n)) for n in stats.layers}
            apply_plan(model, Plan(layers), stats)
            for name in stats.layers:
                for key, tensor in held(model, name).items():
                    assert tensor.dtype == original[name][key].dtype
                    for g, e in ((2, 3), (3, 6), (4, 7)):
                        assert torch.equal(tensor[g], original[name][key][e]), (combine, name, key)
        assert torch.isfinite(logits(narrow, tokens())).all()
        for name in stats.layers:
            for key, tensor in held(narrow, name).items():
                exact = held(wide, name)[key].double()
                assert torch.isfinite(tensor).all()
                assert (tensor.double() - exact).norm() <= 2**-8 * exact.norm(), (combine, name, key)
        restore(narrow)
        restore(wide)


def test_an_unknown_rule_is_named(case):
    with pytest.raises(ValueError, match="\"combine\" argument must be one of .*; not 'x'"):
        apply_plan(case.model, case.plan({"rule": "x"}), case.stats)
    for combine in (
        {"rule": "fix-dom", "features": "x"},
        {"rule": "zipit", "features": "x"},
        {"rule": "average", "align": "x"},
    ):
        with pytest.raises(ValueError, match="argument must be one of .*; not 'x'"):
            apply_plan(case.model, case.plan(combine), case.stats)
    with pytest.raises(ValueError, match='"rank" argument must be above 0'):
        apply_plan(case.model, case.plan({"rule": "joint-svd", "rank": 0.0}), case.stats)
    assert not any(layer.merged for layer in find_moe_layers(case.model))


def test_dare_equals_the_naive_one(case):
    rule = {"rule": "dare", "density": 0.3, "seed": 5}
    apply_plan(case.model, case.plan(rule), case.stats)
    for name in case.names:
        for g, dominant in enumerate(case.dominant(LABELS)):
            members = [e for e in range(8) if LABELS[e] == g]
            if len(members) > 1:
                group = case.group(name, members, dominant)
                rows = np.array([flat(e) for e in group.experts])
                made = rows.mean(0)
                for weight, row, e in zip(group.weights, rows, members, strict=True):
                    state = np.random.SeedSequence([5, zlib.crc32(name.encode()), e]).generate_state(1)[0]
                    draws = torch.rand(
                        len(row), generator=torch.Generator().manual_seed(int(state)), dtype=torch.float64
                    )
                    for p, draw in enumerate(draws.tolist()):
                        if draw < 0.3:
                            made[p] += weight / 0.3 * (row[p] - rows[:, p].mean())
                got = expert_of(held(case.model, name), g)
                close(flat(got), made, 1e-12)
    restore(case.model)
    merged = []
    for combine in ({"rule": "dare", "density": 1.0, "seed": 1}, {"rule": "average"}):
        apply_plan(case.model, case.plan(combine), case.stats)
        merged.append(logits(case.model, tokens()))
        restore(case.model)
    torch.testing.assert_close(*merged)


def test_what_dare_draws_depends_on_the_plan_seed(case):
    plans = [make_plan(case.stats, experts=3, combine="dare", density=0.4, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1]
    assert plans[0].layers[0].combine == {"rule": "dare", "density": 0.4, "seed": 0}
    made = []
    for plan in plans:
        apply_plan(case.model, plan)
        made.append(logits(case.model, tokens()))
        restore(case.model)
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])
    with pytest.raises(ValueError, match='"density" argument must be above 0 and at most 1'):
        make_plan(case.stats, experts=3, combine="ties", density=0)


@pytest.mark.parametrize(("seed", "tokens", "block"), [(95, 17, 5), (305, 20, 3), (366, 18, 4), (371, 14, 5)])
def test_a_block_leaves_out_neurons_that_are_sums_of_others(seed, tokens, block):
    """With fewer tokens than neurons, what the others of a block leave of some is rounding."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(tokens, 48, generator=generator)
    pool += 10 ** -(seed % 6) * torch.randn(tokens, 48, generator=generator)
    pool[:, 24:] = pool[:, :24] + 10 ** -(3 + seed % 5) * torch.randn(tokens, 24, generator=generator)
    pool = pool.double()
    target = pool @ torch.randn(48, 5, dtype=torch.float64, generator=generator)
    chosen = chosen_columns(pool.T @ pool, pool.T @ target, 30, block=block)
    assert len(set(chosen)) == len(chosen) <= 30
    fit = torch.linalg.lstsq(pool[:, chosen], target, driver="gelsd").solution
    assert (pool[:, chosen] @ fit - target).norm() < 1e-3 * target.norm()
