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


@pytest.mark.parametrize("name", _transformers.PRIVATE_NAMES)
def test_the_installed_version_has_the_name(name, loaded):
    breaks = _transformers.PRIVATE_NAMES[name]
    assert has(name, loaded), f"transformers {transformers.__version__} has no {name}. {breaks}."


def test_a_version_that_lacks_a_name_is_told(loaded, monkeypatch):
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    monkeypatch.delattr(transformers.AutoModelForCausalLM, "_model_mapping")
    lacking = [name for name in _transformers.PRIVATE_NAMES if not has(name, loaded)]
    assert lacking == ["core_model_loading.rename_source_key", "auto._model_mapping"]


def test_no_other_module_uses_private_names():
    # Names with an underscore, and modules that hold no documented ones.
    names = {re.split(r"[.(]", name)[-1] for name in _transformers.PRIVATE_NAMES}
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
