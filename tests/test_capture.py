import sys

import naive
import numpy as np
import pytest
import torch
from conftest import FAMILIES, OTHERS, tiny_model, tokens
from safetensors.torch import load_file, save_file

from hcsmoe_core import Statistics, capture, load_statistics
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.statistics import DEFAULT_NEEDS


def router_name(layer_name, family):
    return layer_name.replace("experts", "router" if family == "gpt_oss" else "gate")


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_statistics_equal_a_naive_run(name, input_ids):
    # The naive run is float64 throughout; gpt-oss' attention is float32 inside.
    close = dict(rtol=1e-9, atol=1e-12) if name != "gpt_oss" else dict(rtol=1e-4, atol=1e-5)
    model = tiny_model(name, torch.float64)
    stats = capture(model, input_ids, batch_size=4)
    names = [layer.name for layer in find_moe_layers(model)]
    trace = naive.Trace(model, input_ids, names, [router_name(n, name) for n in names])
    for layer in names:
        sums, x = stats.layers[layer], trace.inputs[layer]
        count, mass = naive.usage(trace.index[layer], trace.weight[layer], 8)
        assert sums.usage_count.sum(0).tolist() == count.tolist()
        assert sums.tokens.tolist() == [input_ids.numel()]
        torch.testing.assert_close(
            sums.mean_output, naive.outputs(model.get_submodule(layer), x).mean(1), **close
        )
        np.testing.assert_allclose(sums.routing_mass.sum(0), mass, rtol=1e-6)
        logits = trace.logits[layer].double()
        torch.testing.assert_close(sums.logit_gram[0], logits.T @ logits, **close)


def test_one_pass_and_every_token_once(mixtral, input_ids):
    calls = {"model": 0, "embedding": 0, "experts": 0}

    def count(what):
        def hook(*_):
            calls[what] += 1

        return hook

    mixtral.register_forward_hook(count("model"))
    mixtral.get_input_embeddings().register_forward_hook(count("embedding"))
    mixtral.model.layers[0].mlp.experts.register_forward_hook(count("experts"))
    capture(mixtral, input_ids, batch_size=4)
    assert calls == {"model": 2, "embedding": 2, "experts": 2}  # 6 sequences, 4 at a time


def test_sums_of_parts_are_the_sums_of_all(mixtral):
    first, second = tokens(4, seed=2), tokens(3, seed=3)
    domains = ["a", "b", "a", "b"], ["c", "a", "c"]
    parts = capture(mixtral, first, domains=domains[0]) + capture(mixtral, second, domains=domains[1])
    whole = capture(mixtral, torch.cat([first, second]), domains=domains[0] + domains[1], batch_size=2)
    assert parts.domains == whole.domains == ["a", "b", "c"]
    assert parts.sequences == whole.sequences
    assert parts.num_tokens == whole.num_tokens == 140
    for name, sums in whole.layers.items():
        assert torch.equal(sums.usage_count, parts.layers[name].usage_count)
        for key in ("output_sum", "logit_gram", "routing_mass"):
            torch.testing.assert_close(
                getattr(parts.layers[name], key), getattr(sums, key), rtol=1e-6, atol=1e-5
            )


def test_domains_are_kept_apart(mixtral):
    ids = tokens(4)
    both = capture(mixtral, ids, domains=["x", "y", "y", "x"], batch_size=3)
    alone = capture(mixtral, ids[1:3])
    for name, sums in both.layers.items():
        assert torch.equal(sums.usage_count[1], alone.layers[name].usage_count[0])
        torch.testing.assert_close(sums.output_sum[1], alone.layers[name].output_sum[0], rtol=1e-5, atol=1e-5)


def test_tokens_counted_twice_are_told(mixtral, input_ids):
    stats = capture(mixtral, input_ids)
    with pytest.warns(UserWarning, match="6 calibration sequences are in both"):
        twice = stats + stats
    assert twice.num_tokens == 2 * stats.num_tokens


def test_statistics_of_two_models_do_not_add(mixtral, input_ids):
    with pytest.raises(ValueError, match="different models"):
        capture(mixtral, input_ids) + capture(tiny_model("mixtral", seed=5), input_ids)


def test_same_bytes_twice_and_read_back(mixtral, input_ids, tmp_path):
    for name in ("a", "b"):
        capture(mixtral, input_ids).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    stats, read = capture(mixtral, input_ids), load_statistics(tmp_path / "a")
    assert isinstance(read, Statistics)
    assert (read.domains, read.model, read.sequences) == (stats.domains, stats.model, stats.sequences)
    assert all(torch.equal(read.layers[n].output_sum, s.output_sum) for n, s in stats.layers.items())


def test_the_model_is_left_as_it_was(mixtral, input_ids):
    mixtral.train()
    capture(mixtral, input_ids)
    assert mixtral.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in mixtral.modules())


def test_damaged_files_are_refused(mixtral, input_ids, tmp_path):
    path = tmp_path / "s.safetensors"
    capture(mixtral, input_ids).save(path)
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="hcsmoe capture"):
        load_statistics(tmp_path / "none.safetensors")
    for cut in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="not a readable statistics file"):
            load_statistics(path)
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match="was changed since it was written"):
        load_statistics(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="no statistics file of this version"):
        load_statistics(path)
    path.write_bytes(whole)
    assert load_file(path)


def test_bad_weights_and_tokens_are_refused(mixtral, input_ids):
    for bad in (input_ids.float(), input_ids[0], input_ids[:0], [[1, 2]]):
        with pytest.raises(ValueError, match='"input_ids" argument must be a tensor of token ids'):
            capture(mixtral, bad)
    with pytest.raises(ValueError, match="vocabulary has ids from 0 to 95"):
        capture(mixtral, input_ids + 90)
    with pytest.raises(ValueError, match="each of the 6 sequences; got 2"):
        capture(mixtral, input_ids, domains=["a", "b"])
    with pytest.raises(ValueError, match='"batch_size" argument'):
        capture(mixtral, input_ids, batch_size=0)
    with torch.no_grad():
        mixtral.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts: down_proj holds NaN"):
        capture(mixtral, input_ids)


def test_nan_elsewhere_is_found_too(mixtral, input_ids):
    with torch.no_grad():
        mixtral.model.layers[1].self_attn.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        capture(mixtral, input_ids)


def test_offloaded_weights_are_refused(mixtral, input_ids):
    experts = mixtral.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to("meta"))
    with pytest.raises(ValueError, match="offloaded"):
        capture(mixtral, input_ids)


def test_chunks_do_not_change_the_sums(input_ids, monkeypatch):
    model = tiny_model("mixtral", torch.float64)
    whole = capture(model, input_ids)
    monkeypatch.setattr(sys.modules["hcsmoe_core.collect"], "CHUNK", {"cpu": 3})
    parts = capture(model, input_ids)
    for name, sums in whole.layers.items():
        torch.testing.assert_close(sums.output_sum, parts.layers[name].output_sum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_experts_joined_in_one_product_are_those_alone(name, input_ids):
    layer = find_moe_layers(tiny_model(name, torch.float64))[0]
    x = torch.randn(11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, joined = (
            layer.hidden_sums(x),
            torch.cat([layer._joined_sums(x, range(5)), layer._joined_sums(x, range(5, 8))]),
        )
    torch.testing.assert_close(joined, alone, rtol=1e-12, atol=1e-12)


def test_experts_on_some_tokens_estimate_sums_over_all():
    ids, every = tokens(5, 17), 4
    model = tiny_model("mixtral", torch.float64)
    whole = capture(model, ids, domains=list("abaab"), needs=DEFAULT_NEEDS)
    stats = capture(model, ids, domains=list("abaab"), needs=DEFAULT_NEEDS, every=every, batch_size=3)
    names = [layer.name for layer in find_moe_layers(model)]
    trace = naive.Trace(model, ids, names, [router_name(n, "mixtral") for n in names])
    chosen = [[(t + int(h, 16)) % every == 0 for t in range(17)] for h in stats.sequences]
    for name, sums in stats.layers.items():
        assert torch.equal(sums.usage_count, whole.layers[name].usage_count)
        torch.testing.assert_close(sums.routing_mass, whole.layers[name].routing_mass, rtol=1e-12, atol=0)
        outputs = naive.outputs(model.get_submodule(name), trace.inputs[name]).unflatten(
            1, (5, 17)
        )  # [E, N, S, D]
        for domain, sequences in enumerate(([0, 2, 3], [1, 4])):
            rows = torch.cat([outputs[:, n][:, torch.tensor(chosen[n])] for n in sequences], 1)
            share = 17 * len(sequences) / rows.shape[1]
            torch.testing.assert_close(sums.output_sum[domain], share * rows.sum(1), rtol=1e-9, atol=1e-12)
            gram = torch.einsum("itd,jtd->ij", rows, rows)
            torch.testing.assert_close(sums.output_gram[domain], share * gram, rtol=1e-9, atol=1e-12)
    assert stats.model["every"] == 4
    with pytest.raises(ValueError, match='"every" argument must be a whole number from 1 to 17'):
        capture(model, ids, every=18)
