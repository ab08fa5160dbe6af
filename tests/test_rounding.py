"""Rounded experts: against weights rounded one by one, undone to the bit, and what they take."""

import math

import numpy as np
import pytest
import torch
from conftest import FAMILIES, OTHERS, logits, tiny_model, tokens

from benchmarks.rounding import expert_bytes, expert_flops, rounded, rounded_weights
from hcsmoe_core import apply_plan, capture, find_moe_layers, make_plan, restore


def naive(row, bits):
    """One row, weight by weight, in float64."""
    made = []
    for start in range(0, len(row), 32):
        group = [float(w) for w in row[start : start + 32]]
        if bits == 8:
            scale = float(np.float16(max(abs(w) for w in group) / 127)) or 1.0
            made += [scale * min(max(round(w / scale), -127), 127) for w in group]
            continue
        most, low, high = 2**bits - 1, min(0.0, *group), max(0.0, *group)
        scale = float(np.float16((high - low) / most)) or 1.0
        zero = min(max(round(-low / scale), 0), most)
        made += [scale * (min(max(round(w / scale) + zero, 0), most) - zero) for w in group]
    return made


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("width", [96, 75, 5])
def test_weights_are_rounded_as_one_by_one(bits, width):
    generator = torch.Generator().manual_seed(width)
    weight = 0.05 * torch.randn(6, width, generator=generator)
    weight[1] = weight[1].abs() + 0.1  # all on one side of zero
    weight[2] = 0
    weight[3] = -weight[1]
    made = rounded_weights(weight, bits)
    wanted = torch.tensor([naive(row.tolist(), bits) for row in weight])
    torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-9)
    assert len(made[0, :32].unique()) <= 2**bits
    assert made[2].abs().sum() == 0
    span = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0)) / (2**bits - 1)
    assert ((made - weight).abs().amax(1) <= 1.01 * span + 1e-9).all()
    assert rounded_weights(weight.bfloat16(), bits).dtype == torch.bfloat16
    assert torch.equal(rounded_weights(weight, 16), weight.bfloat16().float())


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_each_matrix_is_rounded_along_what_it_reads_and_comes_back_to_the_bit(family):
    model, ids = tiny_model(family), tokens()
    layers = find_moe_layers(model)
    held = [dict(layer.tensors()) for layer in layers]
    copies = [{n: t.clone() for n, t in tensors.items()} for tensors in held]
    before = logits(model, ids)
    with rounded(model, 4):
        for layer, was in zip(layers, copies, strict=True):
            up, down = was[layer.up_name][1], was["down_proj"][1]
            up, down = (up.T, down.T) if layer.transposed else (up, down)
            for matrix, original in ((layer.up_matrix(1), up), (layer.down_matrix(1), down)):
                wanted = torch.tensor([naive(row.tolist(), 4) for row in original])
                torch.testing.assert_close(matrix, wanted, rtol=1e-6, atol=1e-9)
            for name in (n for n in was if n.endswith("_bias")):
                assert torch.equal(layer.tensors()[name], was[name])
        assert not torch.equal(logits(model, ids), before)
    for layer, tensors in zip(layers, held, strict=True):
        assert all(layer.tensors()[name] is tensor for name, tensor in tensors.items())
    assert torch.equal(logits(model, ids), before)


def test_merged_experts_are_rounded_and_restored(mixtral, input_ids):
    stats = capture(mixtral, input_ids, progress=False)
    before = logits(mixtral, input_ids)
    apply_plan(mixtral, make_plan(stats, mixtral, experts=3))
    merged = logits(mixtral, input_ids)
    with rounded(mixtral, 8):
        assert find_moe_layers(mixtral)[0].num_stored == 3
        assert 0 < (logits(mixtral, input_ids) - merged).norm() < 0.1 * merged.norm()
    assert torch.equal(logits(mixtral, input_ids), merged)
    with rounded(mixtral, 2):
        restore(mixtral)
    assert torch.equal(logits(mixtral, input_ids), before)


def test_a_model_stays_as_it_was_where_rounding_fails(mixtral, input_ids):
    before = logits(mixtral, input_ids)
    down = find_moe_layers(mixtral)[-1].tensors()["down_proj"].data
    kept = down[0, 0, 0].clone()
    down[0, 0, 0] = 1e30
    with pytest.raises(ValueError, match="too large to be rounded"), rounded(mixtral, 8):
        pass
    down[0, 0, 0] = kept
    assert torch.equal(logits(mixtral, input_ids), before)
    with (
        pytest.raises(ValueError, match='"bits" argument must be one of "16", "8", "4", "3", "2"; not 5'),
        rounded(mixtral, 5),
    ):
        pass
    with pytest.raises(ValueError, match='"bits" argument'):
        expert_bytes(mixtral, 7)


def test_bytes_count_weights_scales_and_zero_points():
    model = tiny_model("mixtral")  # 3 layers of 8 experts: up 48 × 32, down 32 × 24
    matrices = 3 * 8 * (48 * 32 + 32 * 24)
    groups = 3 * 8 * (48 + 32)
    assert expert_bytes(model) == 2 * matrices
    assert expert_bytes(model, 8) == matrices + 2 * groups
    assert expert_bytes(model, 4) == matrices / 2 + groups * 20 / 8
    assert expert_bytes(model, 3) == math.ceil((3 * matrices + 19 * groups) / 8)
    biased = tiny_model("gpt_oss")
    assert expert_bytes(biased) == 2 * sum(
        t.numel() for layer in find_moe_layers(biased) for t in layer.tensors().values()
    )


def test_operations_follow_what_a_token_goes_through(input_ids):
    model = tiny_model("qwen2_moe")  # 4 of 8 experts
    stats = capture(
        model, input_ids, needs=("usage", "outputs", "norms", "grams", "sample"), sample=999, progress=False
    )
    whole = 3 * 4 * 2 * (48 * 32 + 32 * 24)
    assert expert_flops(model) == expert_flops(model, stats) == whole
    plan = make_plan(stats, model, experts=3)
    apply_plan(model, plan)
    assert expert_flops(model) == whole
    runs = 0
    for layer in plan.layers:
        chosen = stats.layers[layer.name].sample.gates != 0
        runs += np.mean([len({layer.labels[e] for e in row.nonzero()[:, 0].tolist()}) for row in chosen])
    assert expert_flops(model, stats) == pytest.approx(whole * runs / 12)
    assert expert_flops(model, stats) < whole
    restore(model)
    apply_plan(model, make_plan(stats, model, experts=3, method="f-prune", budget="uniform"))
    assert (
        expert_flops(model, stats) == expert_flops(model) == whole * 3 / 4
    )  # three experts are left to choose from
    restore(model)
    apply_plan(model, make_plan(stats, model, experts=4, method="trimming"), stats)
    assert expert_flops(model, stats) == whole / 2
    assert expert_bytes(model) == 3 * 8 * (48 * 32 + 32 * 24)  # half of two bytes a weight
