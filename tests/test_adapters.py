"""A mixture of experts that is no model of transformers: captured, planned and merged in place."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import hcsmoe_core as hc
from hcsmoe_core._util import InputError
from hcsmoe_core.adapters import stack
from hcsmoe_core.families import find_moe_layers

VOCABULARY, WIDTH, EXPERTS, CHOSEN = 50, 16, 6, 2


class Expert(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_fc, self.gelu = nn.Linear(WIDTH, 4 * WIDTH, bias=bias), nn.GELU()
        self.c_proj, self.dropout = nn.Linear(4 * WIDTH, WIDTH, bias=bias), nn.Dropout(0.1)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Gated(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.w1, self.w3 = nn.Linear(WIDTH, 24, bias=bias), nn.Linear(WIDTH, 24, bias=bias)
        self.w2 = nn.Linear(24, WIDTH, bias=bias)

    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class MoE(nn.Module):
    """As nanoGPT-style repositories write it: a loop over a list."""

    def __init__(self, expert, bias, normalised):
        super().__init__()
        self.router, self.normalised = nn.Linear(WIDTH, EXPERTS, bias=False), normalised
        self.experts = nn.ModuleList([expert(bias) for _ in range(EXPERTS)])

    def forward(self, x):
        tokens = x.view(-1, WIDTH)
        weight, index = self.router(tokens).softmax(-1).topk(CHOSEN, dim=-1)
        weight = weight / weight.sum(-1, keepdim=True) if self.normalised else weight
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, choice = (index == number).nonzero(as_tuple=True)
            output[rows] += weight[rows, choice, None] * expert(tokens[rows])
        return output.view_as(x)


class Block(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(WIDTH), MoE(**options)

    def forward(self, x):
        return x + self.moe(self.norm(x))


class GPT(nn.Module):
    def __init__(self, expert=Expert, bias=True, normalised=True):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        blocks = [Block(expert=expert, bias=bias, normalised=normalised) for _ in range(2)]
        self.h = nn.ModuleList(blocks)

    def forward(self, idx, targets=None):
        x = self.wte(idx)
        for block in self.h:
            x = block(x)
        return self.head(x), None


GATED = dict(gate="w1", up="w3", down="w2", activation=functional.silu)
IDS = torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
KINDS = [(Expert, {}, True), (Expert, {}, False), (Gated, GATED, True)]


def logits(model):
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("expert", "names", "normalised"), KINDS)
def test_a_stacked_model_computes_the_same(expert, names, normalised, bias):
    model = GPT(expert, bias, normalised).eval()
    before = logits(model)
    assert stack(model, top_k=CHOSEN, **names) is model
    torch.testing.assert_close(logits(model), before)
    assert [layer.name for layer in find_moe_layers(model)] == ["h.0.moe.experts", "h.1.moe.experts"]
    assert find_moe_layers(model)[0].top_k == CHOSEN
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in GPT(expert, bias, normalised).parameters()
    )


@pytest.mark.parametrize(("expert", "names", "normalised"), KINDS)
def test_its_statistics_equal_naive_ones_and_its_merge_one_by_hand(expert, names, normalised):
    original = GPT(expert, True, normalised).double().eval()
    seen, hooks = [], []
    for block in original.h:
        take = lambda module, inputs: seen.append(inputs[0].view(-1, WIDTH))  # noqa: E731
        hooks.append(block.moe.register_forward_pre_hook(take))
    logits(original)
    for hook in hooks:
        hook.remove()
    model = stack(copy.deepcopy(original), top_k=CHOSEN, **names)
    stats = hc.capture(model, IDS, methods=("hc-smoe", "reap", "mergemoe"), batch_size=2)
    assert stats.num_tokens == IDS.numel()
    with torch.no_grad():
        for i, block in enumerate(original.h):
            sums, tokens = stats.layers[i], seen[i]
            means = torch.stack([e(tokens).mean(0) for e in block.moe.experts])
            torch.testing.assert_close(sums.mean_output, means)
            chosen = block.moe.router(tokens).softmax(-1).topk(CHOSEN, dim=-1).indices
            assert sums.usage_count[0].tolist() == chosen.flatten().bincount(minlength=EXPERTS).tolist()
    plan = hc.make_plan(stats, model, experts=3)
    hc.apply_plan(model, plan)
    assert {layer.num_stored for layer in find_moe_layers(model)} == {3}
    by_hand = copy.deepcopy(original)
    with torch.no_grad():
        for block, layer in zip(by_hand.h, plan.layers, strict=True):
            for members in layer.groups():
                experts = [block.moe.experts[e] for e in members]
                for parameters in zip(*(e.parameters() for e in experts), strict=True):
                    weights = [layer.weights[e] for e in members]
                    mean = sum(w * p for w, p in zip(weights, parameters, strict=True))
                    for parameter in parameters:
                        parameter.data = mean.clone()
    torch.testing.assert_close(logits(model), logits(by_hand))
    assert not torch.allclose(logits(model), logits(original))
    hc.restore(model)
    torch.testing.assert_close(logits(model), logits(original))


@pytest.mark.parametrize("method", ["reap", "mergemoe", "trimming", "hc-smoe"])
def test_other_methods_and_routers_go_with_it(method):
    model = stack(GPT().eval(), top_k=CHOSEN)
    before = logits(model)
    stats = hc.capture(model, IDS, methods=(method,), needs=("usage", "outputs", "norms", "sample"))
    router = {"router": "row-kept"} if method == "hc-smoe" else {}
    hc.apply_plan(model, hc.make_plan(stats, model, experts=3, method=method, **router), stats)
    assert logits(model).isfinite().all()
    assert not torch.equal(logits(model), before)
    hc.restore(model)
    assert torch.equal(logits(model), before)


def test_routing_of_ones_own():
    class Sigmoid(MoE):
        def forward(self, x):
            weight, index = self.router(x).sigmoid().topk(1, dim=-1)
            every = torch.stack([expert(x) for expert in self.experts], -2)
            return weight * every.gather(-2, index[..., None].expand(*index.shape, WIDTH))[..., 0, :]

    model = GPT().eval()
    for block in model.h:
        block.moe.__class__ = Sigmoid
    before = logits(model)
    with pytest.raises(InputError, match='h.0.moe: the block computes something else .* "route" argument'):
        stack(model, top_k=1)
    assert isinstance(model.h[0].moe.experts, nn.ModuleList)
    stack(model, top_k=1, route=lambda scores, k: scores.sigmoid().topk(k, dim=-1))
    torch.testing.assert_close(logits(model), before)


def test_what_does_not_fit_is_refused():
    model = GPT().eval()
    with pytest.raises(InputError, match="\"experts\" argument must name a ModuleList .* named 'expert'"):
        stack(model, top_k=2, experts="expert")
    for name in ("router", "up", "down", "gate", "activation"):
        with pytest.raises(InputError, match=f"\"{name}\" argument must name a module in h.0.moe, of .*'w9'"):
            stack(model, top_k=2, **{name: "w9"})
    with pytest.raises(InputError, match='"top_k" argument must be a whole number from 1 to 6'):
        stack(model, top_k=7)
    with pytest.raises(InputError, match="No MoE layers found in GPT"):
        hc.capture(model, IDS)
    stack(model, top_k=2)
    with pytest.raises(InputError, match="sequences differ in length"):
        hc.capture(model, {"input_ids": [[1, 2], [3]]})
    other = stack(GPT(normalised=False), top_k=2)
    other.h[0].moe.experts.up_proj.data += 1
    stats = hc.capture(model, IDS)
    with pytest.raises(InputError, match="captured on another model"):
        hc.make_plan(stats, other, experts=3)
