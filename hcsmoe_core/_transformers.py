"""Everything used of transformers that is not part of its public interface; no other module uses such names.

Seen in transformers 5.10 to 5.23. ``tests/test_transformers_names.py`` looks for each in the installed
version, and says what stops working in one that lacks it.
"""

import inspect
from functools import partial

from hcsmoe_core.modeling_hcsmoe import named_alike


def auto_classes(config):
    """Auto classes that know a configuration, each with the model class that it makes of it.

    Language models come first, then models that also read images, then those that label tokens.
    """
    import transformers

    names = ("CausalLM", "ImageTextToText", "MultimodalLM", "TokenClassification")
    autos = [getattr(transformers, f"AutoModelFor{name}") for name in names]
    return [(auto, kind) for auto in autos if (kind := class_for(auto, type(config)))]


def remote_classes(config):
    """Model classes in the code of a model's own folder, none unless its configuration is of such code.

    That is so only where ``trust_remote_code=True`` was given.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    named = (
        getattr(config, "auto_map", {}) if type(config).__module__.startswith("transformers_modules") else {}
    )
    references = [named[auto] for auto in sorted(named) if auto.startswith("AutoModelFor")]
    return [get_class_from_dynamic_module(reference, config.name_or_path) for reference in references]


def class_for(auto, config_class):
    """The model class that an auto class makes of a configuration of some class, or None."""
    return auto._model_mapping.get(config_class, None)


def experts_implementation(model):
    """How a model runs its experts, such as "eager" or "grouped_mm"; None where there is no choice."""
    return getattr(model.config, "_experts_implementation", None)


def gate_function(experts):
    """The family's own function from up projection ``[T, 2I]`` to activations ``[T, I]``, or None.

    Clamps, interleaved halves and other scales live in there.
    """
    return getattr(experts, "_apply_gate", None)


def forget_conversions(model):
    """Let a dequantised model be saved under its family's usual names, rather than as packed blocks."""
    model.__dict__.pop("_weight_conversions", None)


def class_with_loader(base, load):
    """A model class whose ``from_pretrained`` fills the model by a function of ours.

    ``load(model, files, load_config, usual)`` returns a report on the tensors that were loaded and an index
    of offloaded ones (or None), as ``usual()``, transformers' own loading, does.
    """

    class Loading(base):
        @staticmethod
        def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *rest, **options):
            arguments = (model, state_dict, checkpoint_files, load_config, *rest)
            usual = partial(base._load_pretrained_model, *arguments, **options)
            return load(model, checkpoint_files, load_config, usual)

    return named_alike(Loading, base)


def is_quantised(load_config):
    """Whether a checkpoint says that it is quantised."""
    return load_config.hf_quantizer is not None


def device_of_load(load_config):
    """The device that a model which is loaded to a single device goes to."""
    return next(iter((load_config.device_map or {"": "cpu"}).values()))


def names_in_model(model, load_config):
    """Function from a tensor's name in a checkpoint to its names in the model, none if it has no such."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    shapes = model.state_dict()
    renamings = [rule for rule in load_config.weight_mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in load_config.weight_mapping if isinstance(rule, WeightConverter)]
    targets = {pattern: rule.target_patterns for rule in converters for pattern in rule.source_patterns}

    def names(key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, shapes)
        if name not in shapes:
            return [key] if key in shapes else []
        first, *others = targets.get(pattern, [name])
        return [name, *(name.replace(first, other) for other in others)]

    return names


def load_tensors(model, tensors, load_config):
    """Convert tensors of a checkpoint, by their names there, into a model; returns transformers' report.

    They are read one by one as they are converted, rather than all before.
    """
    from accelerate.utils import patch_environment
    from transformers.core_model_loading import convert_and_load_state_dict_in_model as load

    options = {"tp_plan": None} if "tp_plan" in inspect.signature(load).parameters else {}  # 5.10 wants one
    with patch_environment(HF_DEACTIVATE_ASYNC_LOAD=1):
        report, *_ = load(model, tensors, load_config, **options)
    if is_quantised(load_config):
        forget_conversions(model)
    return report


def tied_names(model):
    """Names of the tensors that are others under a second name, such as a head that is the embedding too."""
    return set(model.all_tied_weights_keys)


def tie_again(model, missing):
    """Tie what is tied, after tensors of a model were replaced; ``missing`` are names that no file holds."""
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
