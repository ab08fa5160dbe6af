"""What notebooks and command share: costs told beforehand, statistics captured once."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import tiny_model

from hcsmoe_core import load_model
from hcsmoe_core._util import EMBEDDED
from hcsmoe_core.checkpoint import load_skeleton
from hcsmoe_core.studies import cache, cost


def amounts(line):
    """Numbers of a line with their prefixes of a thousand."""
    found = re.findall(r"([\d.]+) ([kMGTP])", line)
    return [float(number) * 1000 ** (" kMGTP".index(prefix)) for number, prefix in found]


@pytest.mark.parametrize("name", EMBEDDED)
def test_costs_are_told_without_loading_the_weights(name, tmp_path):
    source = dict(calibration="demo", sequences=12, length=64, seed=3)
    assert all(p.is_meta for p in load_skeleton(name).parameters())
    model, calibration, capture, statistics = cost.forecast(
        name, dtype="float32", needs=["sample"], **source
    ).splitlines()
    assert "12 × 64 = 768 tokens of demo" in calibration
    loaded, tokenizer = load_model(name, dtype="float32")
    weights = sum(p.numel() for p in loaded.parameters())
    assert amounts(model) == pytest.approx([weights, 4 * weights], rel=5e-3)
    stats = cache.cached_statistics(loaded, tokenizer, needs=["sample"], folder=tmp_path, **source)
    (file,) = tmp_path.iterdir()
    assert amounts(statistics) == pytest.approx([file.stat().st_size], rel=0.02)  # but for the header
    assert "or more on this" in capture
    assert stats.num_tokens == 768


def test_a_pass_needs_the_operations_of_its_matrix_products(tmp_path):
    """Counted by PyTorch itself on the model's own forward pass and on a dense pass of all experts."""
    from torch.utils.flop_counter import FlopCounterMode

    from hcsmoe_core.families import find_moe_layers

    model, length = tiny_model("mixtral"), 64
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    layers, ids = find_moe_layers(model), torch.arange(length)[None] % 7
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(input_ids=ids)
    with torch.no_grad(), FlopCounterMode(display=False) as dense:
        for layer in layers:
            for expert in range(layer.num_experts):
                layer.expert_output(
                    expert, layer.expert_hidden(expert, torch.zeros(length, layer.hidden_size))
                )
    pairs = sum(4 * 2 * length * layer.num_experts**2 * layer.hidden_size for layer in layers)
    wanted = forward.get_total_flops() + dense.get_total_flops() + pairs
    told = cost.forecast(
        str(tmp_path), calibration="ids.safetensors", sequences=1, length=length
    ).splitlines()[2]
    assert amounts(told) == pytest.approx(
        [wanted], rel=0.15
    )  # attention grows with the length, and is left out


def test_statistics_with_the_sample_serve_those_who_need_none(tmp_path, monkeypatch):
    model, tokenizer = load_model("demo-mixtral")
    how = dict(calibration="demo", sequences=12, length=32, folder=tmp_path)
    whole = cache.cached_statistics(model, tokenizer, needs=["sample"], **how)
    monkeypatch.setattr(cache, "capture", None)
    again = cache.cached_statistics(model, tokenizer, **how)
    assert again.sequences == whole.sequences
    with pytest.raises(TypeError):  # another seed is another pass
        cache.cached_statistics(model, tokenizer, seed=1, **how)


def test_of_several_that_ask_at_once_one_captures(tmp_path, monkeypatch):
    calls, real = [], cache.capture

    def slow(*arguments, **options):
        calls.append(options["needs"])
        time.sleep(0.5)
        return real(*arguments, **options)

    monkeypatch.setattr(cache, "capture", slow)
    loaded, tokenizer = load_model("demo-mixtral", dtype="float32")
    how = dict(calibration="demo", sequences=12, length=32, folder=tmp_path)
    with ThreadPoolExecutor(3) as executor:
        found = [
            f.result()
            for f in [executor.submit(cache.cached_statistics, loaded, tokenizer, **how) for _ in range(3)]
        ]
    assert len(calls) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]  # and no lock
    for layer in found[0].layers:
        assert all(
            torch.equal(found[0].layer(layer).mean_output, other.layer(layer).mean_output)
            for other in found[1:]
        )


def test_data_are_told_apart_by_content(tmp_path):
    text, model = tmp_path / "notes.txt", tmp_path / "model"
    text.write_text("one")
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    cells = [
        {"model": "demo-qwen", "calibration": f"0.5*demo+0.5*{text}"},
        {"model": str(model)},
        {"text": str(text)},
    ]
    before = [cache.data_hash(cell) for cell in cells]
    assert len(set(before)) == 3
    text.write_text("two")
    assert [cache.data_hash(cell) == known for cell, known in zip(cells, before, strict=True)] == [
        False,
        True,
        False,
    ]
    (model / "model.safetensors").write_bytes(b"others!")
    assert cache.data_hash(cells[1]) != before[1]
    assert cache.data_hash({"model": "demo-qwen"}) != cache.data_hash(
        {"model": "demo-qwen", "tasks": "arc_easy"}
    )
