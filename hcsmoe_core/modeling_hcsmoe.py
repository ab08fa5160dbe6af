"""Merged mixture-of-experts models: a family's own class with r experts a layer, and the map from the router's E to them.

A copy of this file lies in every model folder whose router is "mapped", so that transformers opens it where hcsmoe is not
installed: ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)``. It therefore needs torch and
transformers alone. What has to be changed in which layer stands under ``expert_merge`` in ``config.json``.
"""

import copy
import inspect
import shutil
from pathlib import Path

import torch
from torch import nn

VERSION = 3


class ExpertMap:
    """Where the choices of a layer's router go; an experts module that was merged has one as ``_merged``.

    Attributes
    ----------
    labels : list of E int
        Merged expert of each that the router chooses from.
    extra : int
        Choices beyond them, of experts without weights.
    mapped : bool
        Whether the router still chooses among E, rather than among r.
    """

    def __init__(self, labels, extra=0, mapped=True):
        self.labels, self.extra, self.mapped = list(labels), extra, mapped
        # The map is not a buffer: transformers re-allocates non-persistent buffers when it loads a checkpoint.
        self._lookup = {}

    def lookup(self, device):
        """The map as a tensor; experts without weights stay behind those that have some."""
        if device not in self._lookup:
            stored = max(self.labels) + 1
            self._lookup[device] = torch.tensor(
                [*self.labels, *range(stored, stored + self.extra)], device=device
            )
        return self._lookup[device]


def remap(experts):
    """Send what the router chooses through the map of an experts module; returns a handle that undoes it."""
    kind = type(experts).__name__
    if kind == "JetMoeMoE":
        return _Undo(experts, experts.router.register_forward_hook(_Resort(experts)))
    if kind == "Llama4TextExperts":
        experts.forward = _Dense(experts)
        return _Undo(experts)
    return experts.register_forward_pre_hook(_remapped, with_kwargs=True, prepend=True)


def _remapped(experts, inputs, keywords):
    """Forward pre-hook: the router's choice among E experts becomes one among r."""
    names = list(inspect.signature(type(experts).forward).parameters)[1:4]
    tokens, index, weight = [*inputs, *(keywords[n] for n in names if n in keywords)]
    return (tokens, experts._merged.lookup(index.device)[index], weight), {}


class _Resort:
    """Forward hook on JetMoE's router, which gives tokens sorted by expert: they are sorted by merged expert."""

    def __init__(self, experts):
        self.experts = experts

    def __call__(self, router, inputs, output):
        order, batch, gates, sizes, logits = output
        mapped = self.experts._merged.lookup(order.device)[repeated(sizes, order.device)]
        again = mapped.argsort(stable=True)
        sizes = mapped.bincount(minlength=max(self.experts._merged.labels) + 1).tolist()
        return order[again], batch[again], gates[again], sizes, logits


def repeated(sizes, device):
    """Number of each expert as often as it has tokens."""
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


class _Dense:
    """Forward of Llama 4's experts, each of which gets every token: a merged one those of all its members."""

    def __init__(self, experts):
        self.experts = experts

    def __call__(self, hidden_states):
        experts = self.experts
        tokens = hidden_states.view(len(experts._merged.labels), -1, experts.hidden_size)
        outputs = []
        for expert, group in enumerate(experts._merged.labels):
            gate, up = (tokens[expert] @ experts.gate_up_proj[group]).chunk(2, dim=-1)
            outputs.append((up * experts.act_fn(gate)) @ experts.down_proj[group])
        return torch.cat(outputs)


class _Undo:
    """Handle of a hook, or of a forward that was replaced."""

    def __init__(self, experts, handle=None):
        self.experts, self.handle = experts, handle

    def remove(self):
        if self.handle is None:
            del self.experts.forward
        else:
            self.handle.remove()


def make_room(model, name, record):
    """Give a model tensors of the shapes that a merged layer has, to be filled by loading, and the map to its experts.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    name : str
        Of the experts module.
    record : dict
        ``tensors``, shapes by name; ``values``, attributes by module (under ``config`` those of the module's own copy of
        the configuration); ``labels`` and ``extra`` of :class:`ExpertMap`; ``mapped``, whether the router still has E rows.

    Raises
    ------
    ValueError
        If the record does not fit the model.
    """
    try:
        for path, shape in record["tensors"].items():
            owner, _, attribute = path.rpartition(".")
            module = model.get_submodule(owner)
            held = module._parameters if attribute in module._parameters else module._buffers
            held[attribute] = room(held[attribute], shape)
        for path, values in record["values"].items():
            module = model.get_submodule(path)
            for attribute, value in values.items():
                if attribute == "config":
                    changed, value = value, copy.copy(module.config)
                    vars(value).update(changed)
                setattr(module, attribute, value)
        experts = model.get_submodule(name)
        experts._merged = ExpertMap(record["labels"], record["extra"], record["mapped"])
        if record["mapped"]:
            remap(experts)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'config.json: "expert_merge" does not fit {name} ({error!r}); it was changed.'
        ) from None


def room(tensor, shape):
    """Room for a tensor of another shape, of the same kind (parameter or buffer) and on the same device."""
    made = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    return (
        nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    )


def merged_class(base):
    """``base``, a model class, with the layers that its configuration says, so that transformers' own loading fills them."""

    class Merged(base):
        def __init__(self, config, *inputs, **keywords):
            super().__init__(config, *inputs, **keywords)
            merge = getattr(config, "expert_merge", None) or {"version": VERSION, "layers": {}}
            if merge.get("version") != VERSION:
                raise ValueError("This model folder was written by another version of hcsmoe; merge again.")
            for name, record in merge["layers"].items():
                make_room(self, name, record)

        @classmethod
        def register_for_auto_class(cls, auto_class="AutoModel"):
            """Nothing: its code is the family's own, which is not to be copied; :meth:`save_pretrained` copies this file."""

        def save_pretrained(self, save_directory, *inputs, **keywords):
            super().save_pretrained(save_directory, *inputs, **keywords)
            if Path(save_directory).resolve() != Path(__file__).resolve().parent:
                shutil.copy(__file__, save_directory)

    return named_alike(Merged, base)


def named_alike(made, base):
    """``made``, a subclass of a model class, under the name of that class.

    transformers finds a family's weight conversion and experts implementations by these names.
    """
    made.__name__ = made.__qualname__ = base.__name__
    made.__module__ = base.__module__
    return made


def __getattr__(name):
    """``Merged`` and the name of a class of transformers, such as ``MergedMixtralForCausalLM``: that class, merged."""
    if name.startswith("Merged"):
        import transformers

        if hasattr(transformers, name.removeprefix("Merged")):
            return merged_class(getattr(transformers, name.removeprefix("Merged")))
    raise AttributeError(f"module {__name__} has no attribute {name}")
