"""What a model is known by, and that nothing damaged or of another model is taken for it."""

import json
import warnings

import pytest
import torch
from conftest import logits, tiny_model, tokens

from hcsmoe_core import (
    apply_plan,
    capture,
    families,
    load_merged,
    load_model,
    make_plan,
    restore,
    save_merged,
)
from hcsmoe_core._util import InputError
from hcsmoe_core.checkpoint import load_skeleton
from hcsmoe_core.plan import load_plan
from hcsmoe_core.scale.streaming import stream_capture, stream_merged, stream_model
from hcsmoe_core.statistics import load_statistics
from hcsmoe_core.text.own_text import own_text

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def folder(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def tuned(tmp_path):
    """A fine-tune of the attention alone."""
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name:
                parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "b")
    return tmp_path / "b"


def test_statistics_plans_and_own_text_are_not_those_of_a_fine_tune(folder, tuned, input_ids, tmp_path):
    first, other = load_model(folder)[0], load_model(tuned)[0]
    stats = capture(first, input_ids, progress=False)
    plan = make_plan(stats, first, experts=6)
    with pytest.raises(InputError, match=r"captured on another model .*Capture on this one"):
        make_plan(stats, other, experts=6)
    with pytest.raises(InputError, match=r"made for another model .*Make a plan from this model"):
        apply_plan(other, plan)
    streamed = stream_model(tuned)[0]
    with pytest.raises(InputError, match="made for another model"):
        stream_merged(streamed, plan, tmp_path / "m", tmp_path / "work")
    texts = [
        own_text(model, None, sequences=2, length=12, seed=0, folder=cache)
        for model, cache in ((first, tmp_path / "own"), (other, tmp_path / "own"), (other, None))
    ]
    assert not torch.equal(texts[0], texts[1])
    assert torch.equal(texts[1], texts[2])
    other.config.rms_norm_eps = first.config.rms_norm_eps * 2
    with pytest.raises(InputError, match="another configuration"):
        make_plan(capture(load_model(tuned)[0], input_ids, progress=False), other, experts=6)


def test_one_identity_however_a_model_is_held(folder, input_ids, tmp_path):
    live, whole, streamed = tiny_model("qwen3_moe"), load_model(folder)[0], stream_model(folder)[0]
    known = families.model_hash(live)
    assert known == families.model_hash(whole) == families.model_hash(streamed)
    rounded = load_model(folder, dtype="bfloat16")[0]
    stats = capture(rounded, input_ids, progress=False)
    plan = make_plan(stats, whole, experts=6)
    found = stream_capture(streamed, input_ids, tmp_path / "work", progress=False)
    assert found.model["hash"] == known
    apply_plan(whole, plan)
    assert families.model_hash(whole) == known != families.model_hash(whole, merged=True)
    assert families.model_hash(restore(whole), merged=True) == known


def test_statistics_and_plans_of_earlier_versions_are_named(mixtral, input_ids):
    stats = capture(mixtral, input_ids, progress=False)
    plan = make_plan(stats, mixtral, experts=4)
    for record in (stats.model, plan.model):
        record["hash"] = "0" * 64
    with pytest.raises(InputError, match=r"captured on .* by an earlier version of hcsmoe.*again"):
        make_plan(stats, mixtral, experts=4)
    with pytest.raises(InputError, match=r"plan was made for .* by an earlier version of hcsmoe.*again"):
        apply_plan(mixtral, plan)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A mapped and a plain folder, and what the live mapped model computes."""
    path, model = tmp_path_factory.mktemp("merged"), tiny_model("mixtral")
    stats = capture(model, tokens(), progress=False)
    plan = make_plan(stats, model, experts=4)
    save_merged(model, plan, path / "mapped", stats=stats)
    save_merged(model, make_plan(stats, model, experts=4, method="f-prune"), path / "plain", stats=stats)
    return path, logits(apply_plan(model, plan), tokens())


@pytest.fixture
def restored(merged):
    """The folders, whose small files are put back after the test."""
    before = {file: file.read_bytes() for file in merged[0].rglob("*") if file.is_file()}
    yield merged[0]
    for file, content in before.items():
        file.write_bytes(content)


@pytest.mark.parametrize("kind", ["mapped", "plain"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json", "plan.json"])
def test_any_change_of_a_merged_folder_is_refused_however_it_is_opened(restored, kind, file):
    path = restored / kind / file
    content = bytearray(path.read_bytes())
    if path.suffix == ".json":
        content += b" "
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    loads = [lambda f: load_model(f), *([load_merged] if kind == "mapped" else [stream_model])]
    for load in loads + [load_skeleton] * (path.suffix == ".json"):
        with pytest.raises(InputError, match=f"{kind}/{file} was (cut short or )?changed.*merge again"):
            load(restored / kind)
    lines = (restored / kind / "SHA256SUMS").read_text().splitlines(keepends=True)
    (restored / kind / "SHA256SUMS").write_text("".join(line for line in lines if file not in line))
    if file != "model.safetensors":
        load_model(restored / kind)  # the change was meant


def changed(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["expert_merge"]["layers"][EXPERTS])
    (folder / "config.json").write_text(json.dumps(config))


CHANGES = {
    "beyond": (lambda record: record["labels"].__setitem__(0, 9), '"labels"'),
    "negative": (lambda record: record["labels"].__setitem__(0, -1), '"labels" must be'),
    "fewer groups": (lambda r: r.update(labels=[min(label, 2) for label in r["labels"]]), '"labels"'),
    "fewer labels": (lambda record: record["labels"].pop(), '"labels"'),
    "no number": (lambda record: record["labels"].__setitem__(0, 0.0), '"labels" must be'),
    "nothing": (lambda record: record.update(labels=None), '"labels" must be'),
    "mapped": (lambda record: record.update(mapped=1), '"mapped" must be true or false'),
    "extra": (lambda record: record.update(extra=-1), '"extra" a count'),
    "shape": (lambda record: record["tensors"].update({f"{EXPERTS}.down_proj": "x"}), "x stored"),
    "width": (lambda record: record["tensors"].update({f"{EXPERTS}.down_proj": [4, -1, 2]}), "does not fit"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_labels_that_are_none_are_refused_with_and_without_checksums(restored, case):
    from transformers import AutoModelForCausalLM

    change, message = CHANGES[case]
    changed(restored / "mapped", change)
    with pytest.raises(InputError, match="config.json was changed"):
        load_merged(restored / "mapped")
    (restored / "mapped" / "SHA256SUMS").unlink()
    with pytest.raises(InputError, match=f"config.json was changed.*{message}"):
        load_merged(restored / "mapped")
    with pytest.raises(ValueError, match=f"config.json was changed.*{message}"):
        AutoModelForCausalLM.from_pretrained(restored / "mapped", trust_remote_code=True)


def test_labels_are_those_of_the_plan(restored):
    def swap(record):
        record["labels"] = [{0: 1, 1: 0}.get(label, label) for label in record["labels"]]

    changed(restored / "mapped", swap)
    changed(restored / "mapped", lambda record: record.update(mapped=True))
    (restored / "mapped" / "SHA256SUMS").write_text("")
    with pytest.raises(InputError, match=rf"config.json: labels of {EXPERTS} are not those of plan.json"):
        load_merged(restored / "mapped")


def test_folders_with_older_checksums_or_none_still_load(restored, merged):
    sums = restored / "mapped" / "SHA256SUMS"
    sums.write_text("".join(x for x in sums.read_text().splitlines(True) if ".safetensors" in x))
    assert torch.equal(logits(load_merged(restored / "mapped"), tokens()), merged[1])
    sums.write_text("")
    assert torch.equal(logits(load_merged(restored / "mapped"), tokens()), merged[1])
    sums.write_text("not a list of checksums\n")
    with pytest.raises(InputError, match="SHA256SUMS was cut short or changed"):
        load_merged(restored / "mapped")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "32"),
        ("hidden_size", None),
        ("hidden_size", -1),
        ("dtype", "float23"),
        ("dtype", 5),
        ("num_hidden_layers", 2**63),
        ("head_dim", 2**31),
        ("vocab_size", 10**400),
        ("num_attention_heads", []),
        ("architectures", 1.5),
        ("rope_parameters", 3),
        ("quantization_config", [1]),
        ("model_type", None),
        ("expert_merge", 5),
        ("", None),
        ("", [1]),
        ("", "[" * 100_000),
    ],
)
def test_an_odd_configuration_is_one_line_that_names_the_file(folder, field, value):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {field: value} if field else value
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    for load in (load_model, stream_model, *([] if field == "expert_merge" else [load_skeleton])):
        with pytest.raises(InputError) as caught:
            load(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "other"])
def test_damaged_own_text_is_named_and_written_again(mixtral, tmp_path, damage):
    options = dict(sequences=2, length=12, batch=2, folder=tmp_path)
    first = own_text(mixtral, None, **options)
    (file,) = tmp_path.rglob("*.safetensors")
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    other = content[:-8] + (5).to_bytes(8, "little")
    file.write_bytes({"cut": content[:-9], "bit": flipped, "empty": b"", "other": other}[damage])
    with pytest.warns(UserWarning, match=rf"{file.name} was cut short or changed"):
        assert torch.equal(own_text(mixtral, None, **options), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(own_text(mixtral, None, **options), first)


def test_what_is_read_back_has_the_identity_it_was_written_with(mixtral, input_ids, tmp_path):
    stats = capture(mixtral, input_ids, progress=False)
    stats.save(tmp_path / "s.safetensors")
    make_plan(stats, mixtral, experts=4).save(tmp_path / "p.json")
    known = families.model_hash(mixtral)
    assert load_statistics(tmp_path / "s.safetensors").model["hash"] == known
    assert load_plan(tmp_path / "p.json").model["hash"] == known
