"""Layer by layer gives what the whole model gives, to the byte; interrupted it goes on, or says why not."""

import filecmp
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, OTHERS, ROOT, logits, tiny_model, tokens
from safetensors.torch import load_file, save_file

from hcsmoe_core import (
    capture,
    find_moe_layers,
    load_merged,
    load_model,
    load_statistics,
    make_plan,
    save_merged,
)
from hcsmoe_core.plan import with_router
from hcsmoe_core.scale import streaming
from hcsmoe_core.scale.streaming import open_model, stream_capture, stream_merged, stream_model
from hcsmoe_core.score.fidelity import fidelity, observer
from hcsmoe_core.studies.stability import capture_until_stable
from hcsmoe_core.ui import family_table
from tools import family_table as families

ALL = ("usage", "outputs", "norms", "grams", "sample")
OPTIONS = dict(needs=ALL, sample=50, batch_size=4, domains=["a", "b", "a", "c", "b", "a"])


@pytest.fixture
def stored(tmp_path):
    return store(tiny_model("mixtral"), tmp_path / "model")


def store(model, folder):
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def same_files(first, second):
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in second.iterdir())
    assert filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_streamed_statistics_and_checkpoints_are_those_of_the_whole_model(name, dtype, input_ids, tmp_path):
    folder, heldout = store(tiny_model(name, dtype), tmp_path / "model"), tokens(2, 24, seed=5)
    whole, _ = load_model(folder)
    streamed, _ = stream_model(folder)
    wanted = capture(whole, input_ids, **OPTIONS)
    found = stream_capture(streamed, input_ids, tmp_path / "work", **OPTIONS)
    wanted.save(tmp_path / "wanted")
    found.save(tmp_path / "found")
    assert (tmp_path / "wanted").read_bytes() == (tmp_path / "found").read_bytes()
    plans = {
        "mapped": make_plan(wanted, whole, experts=4, method="hc-least-squares"),
        "pruned": make_plan(wanted, whole, experts=4, method="reap"),
        "trimmed": make_plan(wanted, whole, experts=4, method="trimming"),
    }
    plans |= {kind: with_router(plans["mapped"], kind) for kind in ("row-kept", "folded")}
    for kind, plan in plans.items():
        measured = fidelity(whole, plan, heldout, stats=wanted)
        said = save_merged(whole, plan, tmp_path / kind, stats=wanted, fidelity=measured)
        options = dict(stats=wanted, observer=observer(heldout))
        out, work = tmp_path / f"{kind}-2", tmp_path / f"work-{kind}"
        assert stream_merged(streamed, plan, out, work, **options) == said
        assert said["fidelity"] == measured
        same_files(tmp_path / kind, tmp_path / f"{kind}-2")
        if name in FAMILIES:
            assert said["router"] == ("mapped" if kind == "mapped" else "plain")
    assert torch.equal(
        logits(load_model(tmp_path / "pruned-2")[0], input_ids),
        logits(load_model(tmp_path / "pruned")[0], input_ids),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [row["family"] for row in family_table.committed()[1] if not row["mapped"] and not row["whole"]]
)
def test_every_family_streamed_is_what_it_is_whole(family, tmp_path):
    families.tiny_model(family, torch.bfloat16).save_pretrained(tmp_path / "model")
    whole, streamed, ids = (
        load_model(tmp_path / "model")[0],
        stream_model(tmp_path / "model")[0],
        families.tiny_tokens(),
    )
    stats = capture(whole, ids, needs=ALL, sample=32)
    stats.save(tmp_path / "wanted")
    stream_capture(streamed, ids, tmp_path / "work", needs=ALL, sample=32).save(tmp_path / "found")
    assert (tmp_path / "wanted").read_bytes() == (tmp_path / "found").read_bytes()
    plan = make_plan(stats, whole, experts=families.KEPT)
    save_merged(whole, plan, tmp_path / "merged")
    stream_merged(streamed, plan, tmp_path / "merged-2", tmp_path / "work-2")
    same_files(tmp_path / "merged", tmp_path / "merged-2")


def test_methods_that_look_at_weights_and_budgets_over_all_layers(stored, input_ids, tmp_path):
    whole, streamed = load_model(stored)[0], stream_model(stored)[0]
    stats = capture(whole, input_ids, needs=ALL)
    for options in (
        dict(similarity="weight", budget="merge-cost"),
        dict(method="grape"),
        dict(method="o-prune"),
        dict(method="dek"),
    ):
        plan = make_plan(stats, whole, experts=4, **options)
        assert make_plan(stats, streamed, experts=4, **options) == plan
        save_merged(whole, plan, tmp_path / str(options), stats=stats)
        stream_merged(streamed, plan, tmp_path / f"{options}-2", tmp_path / f"work-{options}", stats=stats)
        same_files(tmp_path / str(options), tmp_path / f"{options}-2")


def test_large_checkpoints_have_a_shard_a_layer(stored, input_ids, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["hcsmoe_core.checkpoint"], "SINGLE", 0)
    whole, streamed = load_model(stored)[0], stream_model(stored)[0]
    plan = make_plan(capture(whole, input_ids), whole, experts=3)
    save_merged(whole, plan, tmp_path / "a")
    stream_merged(streamed, plan, tmp_path / "b", tmp_path / "work")
    same_files(tmp_path / "a", tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "a").glob("*.safetensors")) == [
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    ]
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    held = {n: f.name for f in (tmp_path / "a").glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == held
    size = sum(
        t.numel() * t.element_size()
        for f in (tmp_path / "a").glob("*.safetensors")
        for t in load_file(f).values()
    )
    assert index["metadata"]["total_size"] == size
    loaded = load_merged(tmp_path / "a", experts_implementation="eager")
    save_merged(tiny_model("mixtral"), plan, tmp_path / "c")
    assert torch.equal(
        logits(loaded, input_ids),
        logits(load_merged(tmp_path / "c", experts_implementation="eager"), input_ids),
    )


def test_tied_embeddings(input_ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("qwen3_moe")
    model.config.tie_word_embeddings = True
    folder = store(type(model)(model.config), tmp_path / "model")
    whole, streamed = load_model(folder)[0], stream_model(folder)[0]
    assert whole.lm_head.weight is whole.model.embed_tokens.weight
    stats = stream_capture(streamed, input_ids, tmp_path / "work", methods=["ean"])
    plan = make_plan(stats, whole, experts=4, method="ean")
    save_merged(whole, plan, tmp_path / "a")
    for out in "bc":  # twice, as what was let go is read again
        stream_merged(streamed, plan, tmp_path / out, tmp_path / f"work-{out}")
        same_files(tmp_path / "a", tmp_path / out)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), input_ids),
        logits(load_model(tmp_path / "a")[0], input_ids),
    )


def test_one_decoder_layer_is_in_memory_at_a_time(stored, input_ids, tmp_path):
    streamed, _ = stream_model(stored)
    seen = []

    def look(*_):
        held = [
            i
            for i, layer in enumerate(streamed.model.layers)
            if not all(p.is_meta for p in layer.parameters())
        ]
        seen.append((held, streamed.lm_head.weight.is_meta))

    for layer in find_moe_layers(streamed):
        layer.experts.register_forward_pre_hook(look)
    stream_capture(streamed, input_ids, tmp_path / "work", batch_size=3)
    assert seen == [([place], True) for place in (0, 0, 1, 1, 2, 2)]
    assert all(p.is_meta for p in streamed.model.layers.parameters())


def test_whole_if_it_fits_and_streamed_if_not(stored, monkeypatch):
    monkeypatch.setattr(streaming, "_resident_memory", lambda: 1_000_000)
    monkeypatch.setattr(streaming, "LATER", 0)
    size = sum(p.numel() * p.element_size() for p in tiny_model("mixtral").parameters())
    assert not next(open_model(stored)[0].model.layers.parameters()).is_meta
    assert next(open_model(stored, load="streamed")[0].model.layers.parameters()).is_meta
    assert next(
        open_model(stored, memory=f"{3.2 * size / 1e3 + 1000:.1f}KB")[0].model.layers.parameters()
    ).is_meta
    assert not next(
        open_model(stored, memory=f"{(3.4 * size + 1e6) / 1024:.1f} KiB")[0].model.layers.parameters()
    ).is_meta
    with pytest.raises(
        ValueError, match='"memory" argument is 1MB, but with the largest decoder layer .* give more'
    ):
        open_model(stored, memory="1MB")
    with pytest.raises(ValueError, match='"memory" argument is 3kb'):  # bytes, in lower case too
        open_model(stored, load="streamed", memory="3kb")
    for bad in ("3 apples", "-1GB", "GB"):
        with pytest.raises(ValueError, match=r'"memory" argument must be a size such as 3GB'):
            open_model(stored, memory=bad)
    with pytest.raises(ValueError, match='"load" argument must be one of "auto", "whole", "streamed"'):
        open_model(stored, load="half")
    with pytest.raises(ValueError, match="one device; to use several GPUs, start a rank for each"):
        open_model(stored, load="streamed", device="balanced")


def test_a_capture_goes_on_after_the_last_layer_that_is_done(stored, input_ids, tmp_path, monkeypatch):
    model, _ = stream_model(stored)
    wanted = stream_capture(model, input_ids, tmp_path / "a", **OPTIONS)
    looked, usual = [], streaming._capture_layer

    def fails(source, place, *rest):
        looked.append(place)
        if place == 2 and looked.count(2) == 1:
            source.read(place)
            raise KeyboardInterrupt
        usual(source, place, *rest)

    monkeypatch.setattr(streaming, "_capture_layer", fails)
    with pytest.raises(KeyboardInterrupt):
        stream_capture(stream_model(stored)[0], input_ids, tmp_path / "b", **OPTIONS)
    found = stream_capture(stream_model(stored)[0], input_ids, tmp_path / "b", **OPTIONS)
    assert looked == [0, 1, 2, 2]
    wanted.save(tmp_path / "wanted")
    found.save(tmp_path / "found")
    assert (tmp_path / "wanted").read_bytes() == (tmp_path / "found").read_bytes()
    with pytest.raises(ValueError, match="holds an unfinished run, but it has other batch_size"):
        stream_capture(model, input_ids, tmp_path / "b", **OPTIONS | {"batch_size": 3})


def test_a_full_disk_is_told_and_writing_goes_on(stored, input_ids, tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from transformers import modeling_utils

    model, _ = stream_model(stored)
    plan = make_plan(stream_capture(model, input_ids, tmp_path / "work"), model, experts=4)
    stream_merged(model, plan, tmp_path / "a", tmp_path / "work-a")
    written, usual = [], modeling_utils.safe_save_file

    def full(*arguments, **options):
        written.append(arguments[1])
        if len(written) == 3:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        usual(*arguments, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="cannot be written .*No space left on device.* is the disk full"):
        stream_merged(model, plan, tmp_path / "b", tmp_path / "work-b")
    assert not (tmp_path / "b").exists()
    assert not any(layer.merged for layer in find_moe_layers(model))
    stream_merged(stream_model(stored)[0], plan, tmp_path / "b", tmp_path / "work-b")
    assert len(written) == 5  # four parts, one of them twice
    same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileExistsError, match="exists; remove it"):
        stream_merged(model, plan, tmp_path / "b", tmp_path / "work-b")


def test_fidelity_goes_on_after_the_last_layer_that_was_measured(stored, input_ids, tmp_path, monkeypatch):
    model, _ = stream_model(stored)
    plan, heldout = (
        make_plan(capture(load_model(stored)[0], input_ids), model, experts=4),
        tokens(2, 24, seed=5),
    )
    options = dict(observer=observer(heldout))
    wanted = stream_merged(model, plan, tmp_path / "a", tmp_path / "work-a", **options)
    usual, pushed = streaming._Source.push, []

    def interrupted(source, index, *rest):
        pushed.append(index)
        if pushed == [0, 0, 1, 1]:
            raise KeyboardInterrupt
        usual(source, index, *rest)

    monkeypatch.setattr(streaming._Source, "push", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream_merged(model, plan, tmp_path / "b", tmp_path / "work-b", **options)
    assert not any(layer.merged for layer in find_moe_layers(model))
    again = stream_model(stored)[0]
    assert stream_merged(again, plan, tmp_path / "b", tmp_path / "work-b", **options) == wanted
    assert pushed == [0, 0, 1, 1, 1, 1, 2, 2]
    same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="unfinished run, but it has other observer"):
        stream_merged(again, plan, tmp_path / "c", tmp_path / "work-b", observer=observer(heldout + 1))


def rewrite(folder, name, change):
    """Change one tensor in the shard that holds it; None takes it away."""
    for file in folder.glob("*.safetensors"):
        held = {n: t.clone() for n, t in load_file(file).items()}
        if name in held:
            changed = change(held.pop(name))
            save_file(held | ({} if changed is None else {name: changed}), file, metadata={"format": "pt"})
            return file
    raise AssertionError(name)


EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


def test_broken_checkpoints_are_refused_with_the_reason(stored, tmp_path, input_ids):
    other = store(tiny_model("mixtral"), tmp_path / "kind")
    rewrite(other, EXPERT, lambda t: t.to(torch.int8))
    for load in (load_model, stream_model):
        with pytest.raises(ValueError, match=rf"{EXPERT} in .* is of type I8 where"):
            load(other)
    other = store(tiny_model("mixtral"), tmp_path / "lacking")
    rewrite(other, "model.layers.1.self_attn.q_proj.weight", lambda t: None)
    with pytest.raises(
        ValueError, match=r"lacks 1 of the model's tensors \(model.layers.1.self_attn.q_proj.weight"
    ):
        stream_model(other)
    other = store(tiny_model("mixtral"), tmp_path / "expert")
    rewrite(other, EXPERT, lambda t: None)
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.experts.gate_up_proj as its configuration says"
    ):
        stream_capture(stream_model(other)[0], input_ids, tmp_path / "work")
    with pytest.raises(ValueError, match=r"it does not hold model.layers.1.mlp.experts.gate_up_proj as"):
        load_model(other)
    rewrite(other, EXPERT.replace("3.w1", "2.w1"), lambda t: t[:, :-1].contiguous())
    with pytest.raises(ValueError, match=r"parts of it are missing or have other shapes"):
        stream_capture(stream_model(other)[0], input_ids, tmp_path / "work-2")
    cut = sorted(stored.glob("*.safetensors"))[2]
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    for load in (load_model, stream_model):
        with pytest.raises(ValueError, match=rf"{cut.name} is not readable"):
            load(stored)
    cut.unlink()
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        stream_model(stored)


def test_a_shard_that_changes_meanwhile_is_noticed(stored, input_ids, tmp_path):
    model, _ = stream_model(stored)
    stats = stream_capture(model, input_ids, tmp_path / "work")
    plan = make_plan(stats, model, experts=4)
    file = rewrite(stored, EXPERT, lambda t: t + 1)
    with pytest.raises(ValueError, match=rf"{file.name} was changed or removed since this run began"):
        stream_merged(model, plan, tmp_path / "m", tmp_path / "work-m")
    with pytest.raises(ValueError, match="an unfinished run, but the checkpoint was changed meanwhile"):
        stream_capture(stream_model(stored)[0], input_ids, tmp_path / "work")
    with pytest.raises(ValueError, match="The plan was made for another model"):
        stream_merged(stream_model(stored)[0], plan, tmp_path / "m", tmp_path / "work-n")
    file.write_bytes(file.read_bytes()[:-100])  # cut short while a model holds it open
    with pytest.raises(ValueError, match="changed or removed"):
        model._source.read(1)
    assert not (tmp_path / "m").exists()


def test_experts_on_some_tokens_streamed_and_whole(stored, input_ids, tmp_path):
    options = OPTIONS | {"every": 3}
    stream_capture(stream_model(stored)[0], input_ids, tmp_path / "work", **options).save(
        tmp_path / "streamed"
    )
    capture(load_model(stored)[0], input_ids, **options).save(tmp_path / "whole")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_what_cannot_be_streamed_says_why(stored, input_ids, tmp_path):
    model, _ = stream_model(stored)
    with pytest.raises(ValueError, match="every look would read the whole checkpoint again; load it whole"):
        capture_until_stable(model, input_ids)
    stats = stream_capture(model, input_ids, tmp_path / "work", needs=ALL)
    plan = make_plan(stats, experts=4, method="mc-smoe")
    with pytest.raises(
        ValueError, match="second step chooses what it keeps among the merged experts of all layers"
    ):
        stream_merged(model, plan, tmp_path / "m", tmp_path / "work-m", stats=stats)
    plan = make_plan(stats, experts=4, method="trimming")
    with pytest.raises(ValueError, match="give the statistics it was made from"):
        stream_merged(model, plan, tmp_path / "m", tmp_path / "work-m")
    stream_merged(model, make_plan(stats, experts=4), tmp_path / "m", tmp_path / "work-m")
    with pytest.raises(ValueError, match="is merged already; start from the original"):
        stream_model(tmp_path / "m")


def test_two_processes_do_not_work_on_the_same_output(stored, tmp_path):
    model, _ = stream_model(stored)
    again = pytest.raises(ValueError, match=r"Another process \(\d+\) is at work on")
    with streaming.work_folder(tmp_path / "m", model), again, streaming.work_folder(tmp_path / "m", model):
        pass
    assert not streaming.work_of(tmp_path / "m").exists()


def test_what_a_complete_output_left_behind_is_removed(tmp_path):
    out, work = tmp_path / "m", streaming.work_of(tmp_path / "m")
    (work / "model").mkdir(parents=True)
    (work / "run.json").write_text("{}")
    assert not streaming.tidied(out)
    (work / "model").rename(out)
    assert not streaming.tidied(out)  # an empty folder is nobody's checkpoint
    (out / "plan.json").write_text("{}")
    assert streaming.tidied(out)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_layers_hand_on_survives_the_disk(tmp_path):
    kept = {
        "output": (torch.randn(2, 3), None, [1, 2.5, "x", True]),
        "shared": {"kv": {3: (torch.ones(2).bfloat16(),)}},
    }
    outputs = streaming.Outputs(tmp_path)
    outputs.write(4, 0, kept)
    found = outputs.read(4, 0, "cpu")
    assert torch.equal(found["output"][0], kept["output"][0])
    assert found["output"][1:] == kept["output"][1:]
    assert torch.equal(found["shared"]["kv"][3][0], kept["shared"]["kv"][3][0])
    with pytest.raises(FileNotFoundError, match="not on a disk that all ranks share"):
        outputs.read(5, 0, "cpu")
    with pytest.raises(ValueError, match="gives a set, which cannot be kept on disk: load the model whole"):
        outputs.write(5, 0, {"output": {1}})


# --- quantised checkpoints --------------------------------------------------------------------------------


def quantised(folder, how, tensors):
    """Write tensors in place of those of a stored model, and say how they are quantised."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    return folder


def fp8(folder):
    """Experts and attention in float8 with one scale for each block of 8 × 8."""
    made = {}
    for name, tensor in stored_tensors(store(tiny_model("qwen3_moe", torch.bfloat16), folder)).items():
        if "proj" not in name:
            made[name] = tensor
            continue
        blocks = tensor.float().reshape(tensor.shape[0] // 8, 8, tensor.shape[1] // 8, 8)
        scale = blocks.abs().amax((1, 3)) / 448
        made[name] = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = scale
    how = {"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "dynamic", "fmt": "e4m3"}
    return quantised(folder, how, made)


def mxfp4(folder):
    """Experts of gpt-oss as pairs of 4-bit floats, with one power of two for 32 of them."""
    model = tiny_model("gpt_oss", torch.bfloat16)
    model.config.hidden_size = model.config.intermediate_size = 32
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, tensor in stored_tensors(store(type(model)(model.config).to(torch.bfloat16), folder)).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            made[name] = tensor
            continue
        experts, width = tensor.shape[0], tensor.shape[2]
        made[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, width, 1, 16), generator=generator, dtype=torch.uint8
        )
        made[f"{name}_scales"] = torch.randint(
            120, 126, (experts, width, 1), generator=generator, dtype=torch.uint8
        )
    return quantised(
        folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router"]}, made
    )


def stored_tensors(folder):
    return {n: t.clone() for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_quantised_checkpoints_are_dequantised(make, input_ids, tmp_path):
    folder = make(tmp_path / "model")
    whole, streamed = load_model(folder)[0], stream_model(folder)[0]
    assert all(
        t.dtype == torch.bfloat16 for layer in find_moe_layers(whole) for t in layer.tensors().values()
    )
    wanted = capture(whole, input_ids)
    found = stream_capture(streamed, input_ids, tmp_path / "work")
    assert all(torch.equal(found.layers[n].output_sum, sums.output_sum) for n, sums in wanted.layers.items())
    assert all(sums.output_sum.abs().sum() > 0 for sums in wanted.layers.values())
    for method, load in (("reap", load_model), ("hc-smoe", load_model)):
        plan = make_plan(
            capture(whole, input_ids, needs=("usage", "outputs", "norms")), whole, experts=4, method=method
        )
        save_merged(whole, plan, tmp_path / f"{method}-a")
        stream_merged(streamed, plan, tmp_path / f"{method}-b", tmp_path / f"work-{method}")
        same_files(tmp_path / f"{method}-a", tmp_path / f"{method}-b")
        assert "quantization_config" not in json.loads((tmp_path / f"{method}-b/config.json").read_text())
        assert torch.isfinite(logits(load(tmp_path / f"{method}-b")[0], input_ids)).all()


@pytest.mark.parametrize("how", ["gptq", "awq", "bitsandbytes"])
def test_other_quantisations_are_refused_with_the_reason(how, stored):
    config = json.loads((stored / "config.json").read_text())
    (stored / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": how, "bits": 4}})
    )
    for load in (load_model, stream_model, open_model):
        with pytest.raises(
            ValueError, match=rf"is quantised with {how}, which transformers does not turn back"
        ):
            load(stored)


# --- the command: killed, out of disk, on several ranks --------------------------------------------------

QUIET = {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments, launcher=(), **options):
    words = (
        [sys.executable, "-m", *launcher, "-m", "hcsmoe_core.ui.cli"]
        if launcher
        else [sys.executable, "-m", "hcsmoe_core.ui.cli"]
    )
    environment = os.environ | QUIET
    return subprocess.Popen(
        [*words, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A model of twelve layers and a file of token ids."""
    folder = tmp_path_factory.mktemp("deep")
    model = tiny_model("mixtral")
    model.config.num_hidden_layers = 12
    torch.manual_seed(0)
    type(model)(model.config).save_pretrained(folder / "model", max_shard_size="100KB")
    save_file({"input_ids": tokens(20, 40)}, folder / "ids.safetensors")
    return folder


def options_of(folder):
    return (
        "--calibration",
        folder / "ids.safetensors",
        "--sequences",
        16,
        "--length",
        40,
        "--load",
        "streamed",
    )


@pytest.mark.slow
def test_killed_at_ten_random_moments_and_resumed(deep, tmp_path):
    merge = (
        "merge",
        deep / "model",
        "--experts",
        4,
        "--method",
        "functional",
        "--fidelity",
        4,
        *options_of(deep),
    )
    whole = command(*merge, "--out", tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    rng, kills, finished = random.Random(0), [], 0
    while len(kills) < 10 or not finished:
        out = tmp_path / f"killed-{finished}"
        until = done(out) + rng.randint(0, 4) if len(kills) < 10 else None
        run = command(*merge, "--out", out)
        owner = streaming.work_of(out) / "pid"
        while run.poll() is None and not (owner.exists() and owner.read_text() == str(run.pid)):
            time.sleep(0.001)
        while run.poll() is None and (until is None or done(out) < until):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1) if until is not None else 0)
        if run.poll() is None:
            kills.append(done(out))
            run.send_signal(signal.SIGKILL)
            run.wait()
            if not out.exists():
                continue
        else:
            assert run.returncode == 0, run.stderr.read()
            assert not streaming.work_of(out).exists()
        same_files(tmp_path / "whole", out)  # renamed, so whole, even if it was killed then
        finished += not streaming.work_of(out).exists()
    assert len({k for k in kills if 0 < k < 25}) > 3  # of 12 layers captured and 13 parts written
    print(f"killed with {kills} of 25 steps done, finished {finished} times")


def done(out):
    """Layers captured and parts written in a run's work folder."""
    folder = streaming.work_of(out)
    return len(list(folder.glob("capture/layer-*"))) + len(list(folder.glob("model/model-*")))


@pytest.mark.slow
def test_out_of_disk_is_one_line_and_the_next_run_goes_on(deep, tmp_path):
    arguments = ("capture", deep / "model", *options_of(deep), "--for", "trimming")
    whole = command(*arguments, "--out", tmp_path / "a.safetensors")
    assert whole.wait() == 0, whole.stderr.read()
    largest = (tmp_path / "a.safetensors").stat().st_size
    # Files may not grow beyond less than the last one has, which the system tells as it tells a full disk.
    limited = command(
        *arguments,
        "--out",
        tmp_path / "b.safetensors",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2)),
    )
    _, said = limited.communicate()
    assert limited.returncode == 2
    assert "cannot be written" in said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    assert not (tmp_path / "b.safetensors").exists()
    again = command(*arguments, "--out", tmp_path / "b.safetensors")
    assert again.wait() == 0, again.stderr.read()
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(("load", "counts"), [("streamed", (2, 4)), ("whole", (2,))])
def test_two_and_four_ranks_against_one(deep, tmp_path, load, counts):
    arguments = (
        "capture",
        deep / "model",
        *options_of(deep)[:-1],
        load,
        "--for",
        "all",
        "--sample",
        200,
        "--batch-size",
        4,
    )
    files = {}
    for count in (1, *counts):
        files[count] = tmp_path / f"{count}.safetensors"
        launcher = (
            () if count == 1 else ("torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
        )
        run = command(*arguments, "--out", files[count], launcher=launcher)
        out, said = run.communicate()
        assert run.returncode == 0, said
        assert out.count("12 MoE layers") == 1  # one rank speaks
    one = load_statistics(files[1])
    for count in counts:
        several = load_statistics(files[count])
        assert several.sequences == one.sequences
        assert torch.equal(several.sampled, one.sampled)
        for name, sums in one.layers.items():
            for key, value in sums.collected().items():
                torch.testing.assert_close(
                    getattr(several.layers[name], key),
                    value,
                    rtol=1e-12,
                    atol=1e-12 * float(value.abs().max()),
                )
            for key in ("inputs", "logits", "index", "weight"):
                assert torch.equal(getattr(several.layers[name].sample, key), getattr(sums.sample, key)), key
        for method in ("hc-smoe", "reap", "f-prune", "grape", "m-smoe"):
            if method == "grape":
                model = load_model(deep / "model")[0]
                assert (
                    make_plan(several, model, experts=4, method=method).layers
                    == make_plan(one, model, experts=4, method=method).layers
                )
            else:
                assert (
                    make_plan(several, experts=4, method=method).layers
                    == make_plan(one, experts=4, method=method).layers
                )


@pytest.mark.slow
def test_more_ranks_than_batches_are_refused(deep, tmp_path):
    run = command(
        *(
            "capture",
            deep / "model",
            *options_of(deep),
            "--batch-size",
            16,
            "--out",
            tmp_path / "s.safetensors",
        ),
        launcher=("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    )
    _, said = run.communicate()
    assert run.returncode != 0
    assert "1 batches of calibration sequences cannot be shared by 2 ranks" in said
    assert not list(Path(tmp_path).iterdir())
