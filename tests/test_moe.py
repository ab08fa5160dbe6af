import json

import pytest
import torch
from conftest import FAMILIES, OTHERS, logits, tiny_model, tokens

from hcsmoe_core import apply_plan, capture, families, find_moe_layers, make_plan, moe, replace, save_merged
from hcsmoe_core._util import InputError
from tools import family_table


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_layers_are_found_with_their_routers(name):
    model = tiny_model(name)
    layers = families.find_moe_layers(model)
    first = 1 if name == "deepseek_v3" else 0  # its first layer is dense
    block = model.model.layers[-1].mlp
    assert [layer.name for layer in layers] == [f"model.layers.{i}.mlp.experts" for i in range(first, 3)]
    assert layers[-1].router is (block.router if name == "gpt_oss" else block.gate)
    assert {layer.num_experts for layer in layers} == {8}
    if name in FAMILIES:
        assert layers[0].top_k == model.config.num_experts_per_tok


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="No MoE layers found in LlamaForCausalLM"):
        families.find_moe_layers(LlamaForCausalLM(LlamaConfig(**small)))


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_identity_map_changes_no_bit(name, implementation):
    model, ids = tiny_model(name, implementation=implementation), tokens()
    before = logits(model, ids)
    for layer in families.find_moe_layers(model):
        replace.replace_experts(
            layer, {n: t.detach().clone() for n, t in layer.tensors().items()}, list(range(8))
        )
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_twins_share_one_expert_and_nothing_changes(name):
    model, ids = tiny_model(name, torch.float64), tokens()
    layers = families.find_moe_layers(model)
    with torch.no_grad():
        for layer in layers:
            for tensor in layer.tensors().values():
                tensor[3], tensor[6] = tensor[1], tensor[0]
    before = logits(model, ids)
    originals = [dict(layer.tensors()) for layer in layers]
    labels, kept = [0, 1, 2, 1, 3, 4, 0, 5], [0, 1, 2, 4, 5, 7]
    for layer in layers:
        replace.replace_experts(layer, {n: t.detach()[kept] for n, t in layer.tensors().items()}, labels)
        assert (layer.num_stored, layer.num_experts) == (6, 8)
    # gpt-oss computes parts of its attention in float32.
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-12 if name != "gpt_oss" else 1e-5)
    for layer, original in zip(layers, originals, strict=True):
        replace.restore_experts(layer)
        assert all(t is original[n] for n, t in layer.tensors().items())
    assert torch.equal(logits(model, ids), before)


def test_generate_with_a_cache_goes_through_the_map(family):
    model, ids = tiny_model(family, torch.float64), tokens(2, 6)
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), eos_token_id=None)
    for layer in families.find_moe_layers(model):
        new = {n: t.detach()[[0, 1, 2, 3]] for n, t in layer.tensors().items()}
        replace.replace_experts(layer, new, [0, 1, 2, 3, 0, 1, 2, 3])
    written = model.generate(ids, **options)
    step_by_step = ids
    for _ in range(8):
        following = logits(model, step_by_step)[:, -1].argmax(-1, keepdim=True)
        step_by_step = torch.cat([step_by_step, following], 1)
    assert torch.equal(written, step_by_step)


def test_the_hash_tells_weights_apart_and_not_dtypes(mixtral):
    first, rounded = families.model_hash(mixtral), families.model_hash(tiny_model("mixtral", torch.bfloat16))
    assert families.same_model(first, rounded)
    assert families.same_model(rounded, first)
    again = tiny_model("mixtral", torch.bfloat16).to(torch.float32)
    assert families.model_hash(again) == rounded
    assert not families.same_model(first, families.model_hash(tiny_model("mixtral", seed=1)))
    with torch.no_grad():
        mixtral.model.layers[2].mlp.gate.weight[3, 5] += 0.5
    assert not families.same_model(families.model_hash(mixtral), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_weight_and_any_setting_makes_another_model(dtype):
    model = tiny_model("deepseek_v3", dtype)
    first = families.model_hash(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            value, here = tensor.view(-1)[-1:], tensor.view(-1)[-1:].clone()
            value.add_(0.3 if dtype == torch.bfloat16 else 1e-3 + 1e-3 * here.abs())
            assert not families.same_model(families.model_hash(model), first), name
            value.copy_(here)
    assert families.model_hash(model) == first
    for name, value in (("rms_norm_eps", 1e-3), ("routed_scaling_factor", 1.5), ("n_group", 1)):
        before = getattr(model.config, name)
        setattr(model.config, name, value)
        assert not families.same_model(families.model_hash(model), first), name
        setattr(model.config, name, before)
    model.config.use_cache = False
    assert families.model_hash(model) == first


def test_what_float32_alone_tells_apart_is_told_apart(mixtral):
    first, weight = families.model_hash(mixtral), mixtral.lm_head.weight
    with torch.no_grad():
        weight[3, 5] *= 1 + 1e-6
    assert not families.same_model(families.model_hash(mixtral), first)


def test_large_tensors_are_hashed_again_once_they_changed(mixtral, monkeypatch):
    monkeypatch.setattr(moe, "CHUNK", 256)
    first, hashed, weight = families.model_hash(mixtral), [], mixtral.model.embed_tokens.weight
    hashes = moe._hashes
    monkeypatch.setattr(moe, "_hashes", lambda *a: hashed.append(a[1]) or hashes(*a))
    assert families.model_hash(mixtral) == first
    assert weight.shape not in hashed
    with torch.no_grad():
        weight[95, 31] += 1
    assert families.model_hash(mixtral) != first
    assert weight.shape in hashed
    weight.data = weight.data - 0
    hashed.clear()
    families.model_hash(mixtral)
    assert weight.shape in hashed


def test_router_logits_are_found_by_their_width():
    wanted = torch.randn(4, 8)
    index = torch.zeros(4, 2, dtype=torch.long)
    assert moe.router_logits((wanted, torch.rand(4, 2), index), 8) is not None
    assert torch.equal(moe.router_logits((torch.rand(4, 2), wanted, index), 8), wanted)
    with pytest.raises(ValueError, match="none of which are its logits"):
        moe.router_logits((torch.rand(4, 2), index), 8)


def parts(model):
    """Every tensor, every number of experts and every map of a model, by where it is."""
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        numbers = moe.whole_numbers(
            module, (*moe.EXPERT_COUNT_NAMES, *moe.TOP_K_NAMES, *moe.WIDTH_NAMES, *moe.GROUP_COUNT_NAMES)
        )
        found |= {f"{name}.{key}": torch.tensor(value) for key, value in numbers.items()}
        if hasattr(module, "_merged"):
            found[f"{name} labels"] = torch.tensor(module._merged.labels)
    return found


def same(parts, others):
    return parts.keys() == others.keys() and all(
        torch.equal(value, others[key]) for key, value in parts.items()
    )


def merge_some(model):
    """Merge one layer with its router as it is, and one with r router rows; leave the others alone."""
    layers, kept = families.find_moe_layers(model), [0, 1, 2, 3]
    for layer, rows in zip(layers[-2:], (None, torch.eye(8)[kept]), strict=True):
        new = {name: tensor.detach()[kept] * 2 for name, tensor in layer.tensors().items()}
        replace.replace_experts(layer, new, [0, 1, 2, 3, 3, 2, 1, 0], rows=rows)
    return layers


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_suspended_layers_have_their_originals_and_then_what_was_merged(name):
    model, ids = tiny_model(name), tokens()
    original, before = parts(model), logits(model, ids)
    layers = merge_some(model)
    merged, after = parts(model), logits(model, ids)
    assert not torch.equal(after, before)
    with replace.suspended(families.find_moe_layers(model)):
        assert not any(layer.merged for layer in layers)
        assert same(parts(model), original)
        assert torch.equal(logits(model, ids), before)
    assert [layer.merged for layer in layers[-3:]] == [False, True, True][-len(layers) :]
    assert same(parts(model), merged)
    assert torch.equal(logits(model, ids), after)
    for layer in layers[-2:]:
        replace.restore_experts(layer)
    assert same(parts(model), original)
    assert torch.equal(logits(model, ids), before)


def test_suspended_layers_are_merged_again_after_an_error(mixtral):
    ids = tokens()
    layers = merge_some(mixtral)
    merged, after, maps = (
        parts(mixtral),
        logits(mixtral, ids),
        [layer.experts._merged for layer in layers[-2:]],
    )
    with pytest.raises(ZeroDivisionError), replace.suspended(layers):
        raise ZeroDivisionError
    assert same(parts(mixtral), merged)
    assert torch.equal(logits(mixtral, ids), after)
    assert all(layer.experts._merged is before for layer, before in zip(layers[-2:], maps, strict=True))


def test_changes_of_merged_tensors_outlive_a_suspension(mixtral):
    layer = merge_some(mixtral)[-2]
    replace.set_expert_tensors(layer, {name: tensor.detach() + 1 for name, tensor in layer.tensors().items()})
    merged = parts(mixtral)
    with replace.suspended([layer]):
        pass
    assert same(parts(mixtral), merged)


def test_layers_without_their_originals_are_not_suspended(mixtral):
    layers = merge_some(mixtral)
    layers[-1].experts._merged.originals = None  # as of a model that was loaded merged
    merged = parts(mixtral)
    with (
        pytest.raises(
            InputError, match="was loaded merged; the original experts are in the original checkpoint"
        ),
        replace.suspended(layers),
    ):
        raise AssertionError
    assert same(parts(mixtral), merged)


def test_a_pruned_router_of_groups_chooses_no_more_experts_than_it_can_reach(tmp_path):
    """Ten experts in two groups, one of which a token chooses: of six left, three can be reached, and k was
    4.
    """
    model, ids = family_table.tiny_model("deepseek_v3"), family_table.tiny_tokens()
    stats = capture(model, ids, methods=["reap"], progress=False)
    plan = make_plan(stats, model, experts=6, method="reap")
    save_merged(model, plan, tmp_path / "pruned", router="plain")
    assert json.loads((tmp_path / "pruned/config.json").read_text())["num_experts_per_tok"] == 3
    apply_plan(model, plan)
    seen = []
    for layer in find_moe_layers(model):
        layer.experts.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    model(input_ids=ids, use_cache=False)
    assert all(index.shape[-1] == 3 for index in seen)
    assert all(((index // 3) == (index // 3)[..., :1]).all() for index in seen)  # all of one group
