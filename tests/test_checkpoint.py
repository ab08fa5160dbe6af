import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, OTHERS, ROOT, logits, tiny_model
from safetensors.torch import load_file, save_file

from hcsmoe_core import (
    apply_plan,
    capture,
    checkpoint,
    load_merged,
    load_model,
    make_plan,
    restore,
    save_merged,
)
from hcsmoe_core.checkpoint import export
from hcsmoe_core.families import find_moe_layers


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact_and_really_smaller(name, dtype, input_ids, tmp_path):
    model = tiny_model(name, dtype)
    plan = make_plan(capture(model, input_ids), model, experts=4)
    before = {n: p.shape for n, p in model.named_parameters()}
    size = save_merged(model, plan, tmp_path / "merged")
    assert {n: p.shape for n, p in model.named_parameters()} == before
    loaded = load_merged(tmp_path / "merged", experts_implementation="eager")  # as the live one
    apply_plan(model, plan)
    assert loaded.dtype == dtype
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))
    parameters = sum(p.numel() for p in model.parameters())
    assert size["parameters"] == parameters == sum(p.numel() for p in loaded.parameters())
    on_disk = sum(
        t.numel() * t.element_size()
        for f in (tmp_path / "merged").glob("*.safetensors")
        for t in load_file(f).values()
    )
    assert on_disk == sum(t.numel() * t.element_size() for t in model.state_dict().values())
    names = sorted(p.name for p in (tmp_path / "merged").iterdir() if "generation" not in p.name)
    assert names == [
        "README.md",
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "modeling_hcsmoe.py",
        "plan.json",
    ]


def test_layers_may_keep_different_numbers(mixtral, input_ids, tmp_path):
    stats = capture(mixtral, input_ids)
    plans = [make_plan(stats, mixtral, experts=r) for r in (2, 8, 5)]
    mixed = plans[0].__class__([plan.layers[i] for i, plan in enumerate(plans)], {}, plans[0].model)
    save_merged(mixtral, mixed, tmp_path / "m")
    loaded = load_merged(tmp_path / "m")
    assert [layer.num_stored for layer in find_moe_layers(loaded)] == [2, 8, 5]
    assert torch.equal(logits(loaded, input_ids), logits(apply_plan(mixtral, mixed), input_ids))


def test_saved_from_an_applied_plan(mixtral, input_ids, tmp_path):
    stats = capture(mixtral, input_ids)
    plan, other = make_plan(stats, mixtral, experts=4), make_plan(stats, mixtral, experts=3)
    apply_plan(mixtral, plan)
    live = logits(mixtral, input_ids)
    with pytest.raises(ValueError, match="Another plan is applied"):
        save_merged(mixtral, other, tmp_path / "m")
    with pytest.raises(ValueError, match="Another plan is applied"):
        save_merged(mixtral, dataclasses.replace(plan, compress={"share": 0.5}), tmp_path / "m")
    save_merged(mixtral, plan, tmp_path / "m")
    assert torch.equal(logits(mixtral, input_ids), live)
    loaded, tokenizer = load_model(tmp_path / "m")
    assert tokenizer is None
    assert torch.equal(logits(loaded, input_ids), live)
    with pytest.raises(ValueError, match="loaded merged"):
        restore(loaded)
    with pytest.raises(ValueError, match="This model is merged"):
        capture(loaded, input_ids)


def test_generation_from_a_loaded_model(family, input_ids, tmp_path):
    model = tiny_model(family)
    plan = make_plan(capture(model, input_ids), model, experts=3)
    save_merged(model, plan, tmp_path / "m")
    apply_plan(model, plan)
    options = dict(attention_mask=torch.ones(2, 6), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(
        load_merged(tmp_path / "m").generate(input_ids[:2, :6], **options),
        model.generate(input_ids[:2, :6], **options),
    )


def test_plain_transformers_refuses_a_mapped_checkpoint(mixtral, input_ids, tmp_path):
    from transformers import AutoModelForCausalLM

    save_merged(mixtral, make_plan(capture(mixtral, input_ids), mixtral, experts=4), tmp_path / "m")
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_nothing_is_overwritten_or_left_half_written(mixtral, input_ids, tmp_path, monkeypatch):
    plan = make_plan(capture(mixtral, input_ids), mixtral, experts=4)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists; remove it or give another one"):
        save_merged(mixtral, plan, tmp_path / "there")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(mixtral), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_merged(mixtral, plan, tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert not any(layer.merged for layer in find_moe_layers(mixtral))
    with pytest.raises(ValueError, match='"router" argument must be one of "", "plain", "mapped"'):
        save_merged(mixtral, plan, tmp_path / "m", router="guessed")


@pytest.mark.parametrize("applied", [False, True])
def test_a_failure_at_the_end_leaves_no_folder_and_the_model_as_it_was(
    applied, mixtral, input_ids, tmp_path, monkeypatch
):
    plan = make_plan(capture(mixtral, input_ids), mixtral, experts=4)
    if applied:
        apply_plan(mixtral, plan)
    live = logits(mixtral, input_ids)

    def broken(*_, **__):
        raise RuntimeError("no card")

    monkeypatch.setattr(export, "write_card", broken)
    with pytest.raises(RuntimeError, match="no card"):
        save_merged(mixtral, plan, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert {layer.merged for layer in find_moe_layers(mixtral)} == {applied}
    assert torch.equal(logits(mixtral, input_ids), live)


def test_merged_folders_are_spread_over_devices_as_others_are(mixtral, input_ids, tmp_path, monkeypatch):
    """The device map that is asked for is what transformers gets, and what it loads computes the same."""
    plan = make_plan(capture(mixtral, input_ids), mixtral, experts=4)
    save_merged(mixtral, plan, tmp_path / "m")
    live = logits(apply_plan(mixtral, plan), input_ids)
    asked, usual = [], checkpoint.load_with

    def load_with(*arguments, device_map, **options):
        asked.append(device_map)
        return usual(*arguments, device_map=device_map, **options)

    monkeypatch.setattr(checkpoint, "load_with", load_with)
    for device in checkpoint.DEVICE_MAPS:
        options = dict(device=device, experts_implementation="eager")
        for loaded in (load_merged(tmp_path / "m", **options), load_model(tmp_path / "m", **options)[0]):
            torch.testing.assert_close(logits(loaded, input_ids), live)
            assert [layer.num_stored for layer in find_moe_layers(loaded)] == [4] * 3
    assert asked == [device for device in checkpoint.DEVICE_MAPS for _ in range(2)]


def test_merged_layers_run_where_a_device_map_puts_them(mixtral, input_ids, tmp_path, monkeypatch):
    """One decoder layer is elsewhere, here on disk: accelerate's hooks run around the map of experts."""
    plan = make_plan(capture(mixtral, input_ids), mixtral, experts=4)
    save_merged(mixtral, plan, tmp_path / "m")
    live = logits(apply_plan(mixtral, plan), input_ids)
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    device_map = dict.fromkeys((*names, "model.layers.1", "model.layers.2"), "cpu")
    device_map["model.layers.0"] = "disk"
    usual = type(mixtral).from_pretrained.__func__

    def from_pretrained(cls, *arguments, **options):
        options |= {"device_map": device_map, "offload_folder": tmp_path / "offload"}
        return usual(cls, *arguments, **options)

    monkeypatch.setattr(type(mixtral), "from_pretrained", classmethod(from_pretrained))
    loaded = load_merged(tmp_path / "m", device="balanced", experts_implementation="eager")
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    torch.testing.assert_close(logits(loaded, input_ids), live)


def test_memory_that_runs_out_is_no_fault_of_the_checkpoint(mixtral, tmp_path, monkeypatch):
    mixtral.save_pretrained(tmp_path / "plain")

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(mixtral), "_load_pretrained_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(tmp_path / "plain")


def test_no_pickle_is_read_or_written(mixtral, input_ids, tmp_path):
    """A process in which unpickling fails can save and load."""
    save_merged(mixtral, make_plan(capture(mixtral, input_ids), mixtral, experts=4), tmp_path / "m")
    script = (
        "import transformers, torch, pickle, sys\n"
        "from hcsmoe_core import load_merged\n"
        "def no(*a, **k): raise AssertionError('unpickled')\n"
        "pickle.load = pickle.loads = torch.load = no\n"
        "print(sum(p.numel() for p in load_merged(sys.argv[1]).parameters()))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "m"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(out.stdout.split()[-1]) > 0
    assert not [p for p in (tmp_path / "m").iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_damaged_merged_checkpoints_are_refused(mixtral, input_ids, tmp_path):
    folder = tmp_path / "m"
    save_merged(mixtral, make_plan(capture(mixtral, input_ids), mixtral, experts=4), folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = weights.read_bytes(), config.read_text()
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="cut short or changed"):
            load_merged(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
        load_merged(folder)
    weights.write_bytes(whole)
    config.write_text(settings[:-40])
    with pytest.raises(ValueError, match="not readable"):
        load_merged(folder)
    edited = json.loads(settings)
    edited["expert_merge"]["layers"]["model.layers.0.mlp.experts"] = [0, 1, 2, 3]
    config.write_text(json.dumps(edited))
    with pytest.raises(ValueError, match="config.json was changed|maps other experts"):
        load_merged(folder)
    config.write_text(settings)
    assert load_merged(folder) is not None
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        load_merged(tmp_path / "none")


def test_damaged_and_foreign_checkpoints_are_refused(mixtral, tmp_path):
    mixtral.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="not a merged checkpoint"):
        load_merged(tmp_path / "plain")
    assert torch.equal(load_model(tmp_path / "plain")[0].lm_head.weight, mixtral.lm_head.weight)
    weights = tmp_path / "plain" / "model.safetensors"
    tensors = {n: t.clone() for n, t in load_file(weights).items()}  # the file is written over below
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_model(tmp_path / "plain")
    save_file(
        {n: t for n, t in tensors.items() if "layers.1.self_attn.q_proj" not in n},
        weights,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match=r"lacks 1 of the model's tensors \(model.layers.1.self_attn.q_proj.weight"
    ):
        load_model(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_model(tmp_path / "empty")
    with pytest.raises(ValueError, match='"dtype" argument must be one of'):
        load_model(tmp_path / "plain", dtype="int3")


def test_a_name_that_is_nowhere(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no such folder here, it is not demo-mixtral or demo-qwen"):
        load_model("nobody/nothing-moe")
