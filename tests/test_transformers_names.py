"""Private names of transformers: whether the installed version has them, and what breaks where it has not."""

import inspect
import os
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_model
from transformers import core_model_loading, modeling_utils

import hcsmoe_core
from hcsmoe_core import _transformers

# Attributes are looked for on a loaded model, its configuration, an experts module and an auto class.
PRIVATE_NAMES = {
    "PreTrainedModel._load_pretrained_model": "loading: checkpoints are not checked, none can be streamed",
    "LoadStateDictConfig.weight_mapping": "loading and streaming: what a file's tensors become is unknown",
    "LoadStateDictConfig.hf_quantizer": "loading: whether a checkpoint is quantised is unknown",
    "LoadStateDictConfig.device_map": "streaming: the device that decoder layers belong on is unknown",
    "LoadStateDictInfo.missing_keys": "loading: tensors that a checkpoint lacks stay random without a word",
    "LoadStateDictInfo.mismatched_keys": "loading: tensors of other shapes stay random without a word",
    "LoadStateDictInfo.conversion_errors": "loading: tensors that could not be converted stay random",
    "core_model_loading.WeightConverter": "loading and streaming: names of converted tensors are unknown",
    "core_model_loading.WeightRenaming": "loading and streaming: names of renamed tensors are unknown",
    "core_model_loading.rename_source_key": "loading and streaming: names on disk have no name in the model",
    "core_model_loading.convert_and_load_state_dict_in_model": "streaming: decoder layers cannot be read",
    "HF_DEACTIVATE_ASYNC_LOAD": "streaming: a whole decoder layer is read before any of it is converted",
    "model._weight_conversions": "saving: dequantised models are written as blocks they no longer have",
    "model.all_tied_weights_keys": "streaming: tied embeddings stay in memory, or are freed while in use",
    "config._experts_implementation": "fidelity: experts of odd widths meet kernels that refuse them",
    "PreTrainedModel.tie_weights(recompute_mapping)": "streaming: embeddings read again are not tied",
    "experts.has_gate": "activations: experts without a gate are taken for gated ones",
    "experts.is_transposed": "reading: experts stored as [E, D, I] are taken for [E, I, D]",
    "experts._apply_gate": "activations: clamped, scaled and interleaved gates are computed wrongly",
    "auto._model_mapping": "loading: the model class of a configuration is unknown",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral").save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def has(name, model):
    """Whether the installed transformers has one of ``PRIVATE_NAMES``."""
    owner, _, attribute = name.rpartition(".")
    if not owner:  # an environment variable
        return f'"{name}"' in inspect.getsource(core_model_loading)
    owners = {
        "core_model_loading": core_model_loading,
        "PreTrainedModel": modeling_utils.PreTrainedModel,
        "LoadStateDictConfig": modeling_utils.LoadStateDictConfig,
        "LoadStateDictInfo": modeling_utils.LoadStateDictInfo,
        "auto": transformers.AutoModelForCausalLM,
        "model": model,
        "config": model.config,
        "experts": model.model.layers[0].mlp.experts,
    }
    attribute, _, parameter = attribute.rstrip(")").partition("(")
    if parameter:
        return parameter in inspect.signature(getattr(owners[owner], attribute)).parameters
    fields = getattr(owners[owner], "__dataclass_fields__", {})
    return attribute in fields or getattr(owners[owner], attribute, None) is not None


@pytest.mark.parametrize("name", PRIVATE_NAMES)
def test_the_installed_version_has_the_name(name, loaded):
    breaks = PRIVATE_NAMES[name]
    assert has(name, loaded), f"transformers {transformers.__version__} has no {name}. {breaks}."


def test_a_version_that_lacks_a_name_is_told(loaded, monkeypatch):
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    monkeypatch.delattr(transformers.AutoModelForCausalLM, "_model_mapping")
    lacking = [name for name in PRIVATE_NAMES if not has(name, loaded)]
    assert lacking == ["core_model_loading.rename_source_key", "auto._model_mapping"]


def test_no_other_module_uses_private_names():
    # Names with an underscore, and modules that hold no documented ones.
    names = {re.split(r"[.(]", name)[-1] for name in PRIVATE_NAMES}
    private = {n for n in names if n.startswith("_") or n.isupper()} | {
        "core_model_loading",
        "convert_and_load_state_dict_in_model",
        "rename_source_key",
        "all_tied_weights_keys",
        "hf_quantizer",
        "weight_mapping",
    }
    root = Path(hcsmoe_core.__file__).parent
    uses = [
        f"{path.relative_to(root)}: {name}"
        for path in sorted(root.rglob("*.py"))
        if path.name != "_transformers.py"
        for name in sorted(private)
        if re.search(rf"\b{name}\b", path.read_text(encoding="utf-8"))
    ]
    assert not uses


def test_loading_goes_through_ours(tmp_path, loaded):
    loaded.save_pretrained(tmp_path)
    seen = []

    def load(model, files, load_config, usual):
        names = _transformers.names_in_model(model, load_config)
        seen.append((len(files), names("no.such.tensor"), names("lm_head.weight")))
        seen.append(sorted(names("model.layers.0.block_sparse_moe.experts.3.w1.weight")))
        assert not _transformers.is_quantised(load_config)
        assert str(_transformers.device_of_load(load_config)) == "cpu"
        return usual()

    kind = _transformers.class_with_loader(type(loaded), load)
    again = kind.from_pretrained(tmp_path)
    assert seen == [
        (1, [], ["lm_head.weight"]),
        ["model.layers.0.mlp.experts.gate_up_proj"],
    ]
    assert kind.__name__ == type(loaded).__name__
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parametrize("before", [None, "0"])
def test_tensors_are_read_one_by_one_and_the_environment_is_left_alone(before, loaded, monkeypatch):
    name, calls = "HF_DEACTIVATE_ASYNC_LOAD", []
    if before is None:
        monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv(name, before)

    def load(model, tensors, load_config, tp_plan="absent"):
        calls.append((os.environ[name], tp_plan))
        return "report", None

    monkeypatch.setattr(core_model_loading, "convert_and_load_state_dict_in_model", load)
    config = modeling_utils.LoadStateDictConfig()
    assert _transformers.load_tensors(loaded, {}, config) == "report"
    assert calls == [("1", None)]  # transformers 5.10 has a parameter without a default there
    assert os.environ.get(name) == before


def test_every_auto_class_of_a_configuration_comes_with_its_model(loaded):
    (auto, kind), *_ = _transformers.auto_classes(loaded.config)
    assert (auto, kind) == (transformers.AutoModelForCausalLM, type(loaded))
    assert _transformers.auto_classes(transformers.CLIPConfig()) == []
