import pytest
import torch
from conftest import FAMILIES, OTHERS, logits, tiny_model, tokens

from hcsmoe_core import families, moe, replace


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
        replace.put_experts(
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
        replace.put_experts(layer, {n: t.detach()[kept] for n, t in layer.tensors().items()}, labels)
        assert (layer.num_stored, layer.num_experts) == (6, 8)
    # gpt-oss computes parts of its attention in float32.
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-12 if name != "gpt_oss" else 1e-5)
    for layer, original in zip(layers, originals, strict=True):
        replace.take_experts(layer)
        assert all(t is original[n] for n, t in layer.tensors().items())
    assert torch.equal(logits(model, ids), before)


def test_generate_with_a_cache_goes_through_the_map(family):
    model, ids = tiny_model(family, torch.float64), tokens(2, 6)
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids), eos_token_id=None)
    for layer in families.find_moe_layers(model):
        new = {n: t.detach()[[0, 1, 2, 3]] for n, t in layer.tensors().items()}
        replace.put_experts(layer, new, [0, 1, 2, 3, 0, 1, 2, 3])
    written = model.generate(ids, **options)
    step_by_step = ids
    for _ in range(8):
        following = logits(model, step_by_step)[:, -1].argmax(-1, keepdim=True)
        step_by_step = torch.cat([step_by_step, following], 1)
    assert torch.equal(written, step_by_step)


def test_the_hash_tells_weights_apart_and_not_dtypes(mixtral):
    first = families.model_hash(mixtral)
    assert families.model_hash(tiny_model("mixtral", torch.bfloat16)) == first
    assert families.model_hash(tiny_model("mixtral", seed=1)) != first
    with torch.no_grad():
        mixtral.model.layers[2].mlp.gate.weight[3, 5] += 0.5
    assert families.model_hash(mixtral) != first


def test_router_logits_are_found_by_their_width():
    wanted = torch.randn(4, 8)
    index = torch.zeros(4, 2, dtype=torch.long)
    assert moe.router_logits((wanted, torch.rand(4, 2), index), 8) is not None
    assert torch.equal(moe.router_logits((torch.rand(4, 2), wanted, index), 8), wanted)
    with pytest.raises(ValueError, match="none of which are its logits"):
        moe.router_logits((torch.rand(4, 2), index), 8)
