"""Merged mixture-of-experts models: a family's own class with r experts per layer, and a map to them from E.

A copy of this file lies in every model folder whose router is "mapped", so that transformers opens it where
hcsmoe is not installed: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. It
therefore needs torch and transformers alone. What changes in which layer stands in ``config.json``,
``expert_merge``.
"""

import copy
import inspect
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

VERSION = 3


@dataclass(eq=False)
class ExpertMap:
    """Where the choices of a layer's router go: ``_merged`` of the experts module of a merged layer."""

    labels: list  # E int: merged expert of each that the router chose from before; -1 if it was dropped
    extra: int = 0  # choices beyond them, of experts without weights
    mapped: bool = True  # whether the router still chooses among E, rather than among r
    # By device. No buffer: transformers re-allocates those that are not persistent as it loads a checkpoint.
    _lookup: dict = field(default_factory=dict)

    # What hcsmoe keeps of a merge that it made in memory: the layer's tensors, every value that was replaced
    # by module and name, the handle of the hook, what was decided, and the size of what would be compressed.
    before = originals = handle = plan = compressed_bytes = None

    @property
    def stored(self):
        """Experts with weights."""
        return max(self.labels) + 1

    @property
    def routed(self):
        """Experts that the router now chooses from."""
        return len(self.labels) if self.mapped else self.stored

    def lookup(self, device):
        """The map as a tensor on a device; experts without weights stay behind those that have some."""
        if device not in self._lookup:
            places = [*self.labels, *range(self.stored, self.stored + self.extra)]
            self._lookup[device] = torch.tensor(places, device=device)
        return self._lookup[device]


def remap(experts):
    """Send what the router chooses through the map of an experts module; returns a handle to undo it."""
    kind = type(experts).__name__
    # partial and _DenseForward rather than closures: in a copy of the model they know the copied experts.
    if kind == "JetMoeMoE":
        return experts.router.register_forward_hook(partial(_sort_by_merged_expert, experts))
    if kind == "Llama4TextExperts":
        experts.forward = _DenseForward(experts)
        return experts.forward
    return experts.register_forward_pre_hook(_map_index, with_kwargs=True, prepend=True)


def _map_index(experts, inputs, keywords):
    """Forward pre-hook: the router's choice among E experts becomes one among r."""
    names = list(inspect.signature(type(experts).forward).parameters)[1:4]
    tokens, index, weight = [*inputs, *(keywords[n] for n in names if n in keywords)]
    return (tokens, experts._merged.lookup(index.device)[index], weight), {}


def _sort_by_merged_expert(experts, router, inputs, output):
    """Forward hook on JetMoE's router: tokens that it sorted by expert are sorted by merged expert."""
    order, batch, gates, sizes, logits = output
    merged = experts._merged.lookup(order.device)[repeated(sizes, order.device)]
    again = merged.argsort(stable=True)
    sizes = merged.bincount(minlength=experts._merged.stored).tolist()
    return order[again], batch[again], gates[again], sizes, logits


def repeated(sizes, device):
    """Number of each expert as often as it has tokens."""
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


@dataclass(eq=False)
class _DenseForward:
    """Forward of Llama 4's experts, each of which gets every token: a merged one those of all its members."""

    experts: nn.Module

    def __call__(self, hidden_states):
        experts = self.experts
        tokens = hidden_states.view(len(experts._merged.labels), -1, experts.hidden_size)
        outputs = []
        for expert, group in enumerate(experts._merged.labels):
            gate, up = (tokens[expert] @ experts.gate_up_proj[group]).chunk(2, dim=-1)
            outputs.append((up * experts.act_fn(gate)) @ experts.down_proj[group])
        return torch.cat(outputs)

    def remove(self):
        """Put the experts' own forward back."""
        del self.experts.forward


def _resize(model, name, record):
    """Give a model empty tensors of the shapes that a merged layer has, and the map to its experts.

    ``name`` is that of the experts module. ``record`` has ``tensors``, shapes by name; ``values``, attributes
    by module (under ``config`` those of the module's own copy of the configuration); and ``labels``,
    ``extra``, ``mapped`` of :class:`ExpertMap`. Raises ValueError if it does not fit the model.
    """
    try:
        _check(model, name, record)
        for path, shape in record["tensors"].items():
            owner, _, attribute = path.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, attribute, room(getattr(module, attribute), shape))
        for path, values in record["values"].items():
            module = model.get_submodule(path)
            for attribute, value in values.items():
                if attribute == "config":
                    changes, value = value, copy.copy(module.config)
                    vars(value).update(changes)
                setattr(module, attribute, value)
        experts = model.get_submodule(name)
        experts._merged = ExpertMap(record["labels"], record["extra"], record["mapped"])
        if record["mapped"]:
            remap(experts)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        message = f'config.json was changed: "expert_merge" does not fit {name} ({error!r}).'
        raise ValueError(message) from None


def _check(model, name, record):
    """Raise ValueError unless a layer's labels are complete, in range, all used, and fit its tensors."""
    labels, extra, mapped = (record[key] for key in ("labels", "extra", "mapped"))
    field = f'config.json was changed: "expert_merge", {name}'
    if not isinstance(mapped, bool) or type(extra) is not int or extra < 0:
        raise ValueError(f'{field}: "mapped" must be true or false, "extra" a count; not {mapped}, {extra}.')
    whole = isinstance(labels, list) and all(type(label) is int for label in labels)
    groups = max(labels, default=-1) + 1 if whole else 0
    if not groups or set(labels) - (set() if mapped else {-1}) != set(range(groups)):
        raise ValueError(f'{field}: "labels" must be group numbers from 0, each used; not {labels}.')
    for path, shape in record["tensors"].items():
        owner, _, attribute = path.rpartition(".")
        before = getattr(model.get_submodule(owner), attribute)
        # Others are a router's, or flattened.
        if before.ndim == 3 and path.startswith(f"{name}."):
            fitting = shape[0] in (groups, groups + extra), len(before) in (len(labels), len(labels) + extra)
            if not all(fitting):
                counts = f"{len(labels)} labels of {groups} groups"
                raise ValueError(f'{field}: "labels": {counts} for {len(before)} experts, {shape[0]} stored.')


def room(tensor, shape):
    """An empty tensor of another shape, of the same kind (parameter or buffer), dtype and device."""
    empty = tensor.new_empty(shape)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def merged_class(base):
    """A model class with the layers that its configuration says, which transformers' own loading fills."""

    class Merged(base):
        def __init__(self, config, *inputs, **keywords):
            super().__init__(config, *inputs, **keywords)
            merge = getattr(config, "expert_merge", None) or {"version": VERSION, "layers": {}}
            if not isinstance(merge, dict) or merge.get("version") != VERSION:
                raise ValueError("This model folder was written by another version of hcsmoe; merge again.")
            if not isinstance(merge.get("layers"), dict):
                raise ValueError('config.json was changed: "expert_merge" has no object "layers".')
            for name, record in merge["layers"].items():
                _resize(self, name, record)

        @classmethod
        def register_for_auto_class(cls, auto_class="AutoModel"):
            """Nothing: its code is the family's own; :meth:`save_pretrained` copies this file instead."""

        def save_pretrained(self, save_directory, *inputs, **keywords):
            super().save_pretrained(save_directory, *inputs, **keywords)
            if Path(save_directory).resolve() != Path(__file__).resolve().parent:
                shutil.copy(__file__, save_directory)

    return named_alike(Merged, base)


def named_alike(subclass, base):
    """A subclass under its base's name, by which transformers finds conversions and implementations."""
    subclass.__name__ = subclass.__qualname__ = base.__name__
    subclass.__module__ = base.__module__
    return subclass


def __getattr__(name):
    """``MergedMixtralForCausalLM`` and the like: a class of transformers with merged layers."""
    import transformers

    base = name.startswith("Merged") and getattr(transformers, name.removeprefix("Merged"), None)
    if base:
        return merged_class(base)
    raise AttributeError(f"module {__name__} has no attribute {name}")
