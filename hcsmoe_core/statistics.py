"""What one pass over the calibration tokens gives: sums that add up, and a sample of layer inputs.

The statistics of two disjoint sets of tokens add up to those of both. They are separate for each domain, so
that the mix can be chosen later. The sample is the tokens with the smallest hashes: it does not depend on
batches or order, and that of two sets follows from theirs.
"""

import hashlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hcsmoe_core._util import InputError, check_count, check_kind, html_table, replacing, require, sha256_json
from hcsmoe_core.families import same_model

FORMAT = "hcsmoe-statistics-2"
# What can be collected, with the sums that each is made of.
NEEDS = {
    "usage": ("tokens", "usage_count", "routing_mass", "score_mass", "logit_gram"),
    "outputs": ("output_sum",),
    "norms": ("norm_sum", "gated_norm_sum", "output_max"),
    "grams": ("output_gram", "routed_gram", "routed_square", "cosine_sum"),
    "sample": (),
}
_LAYER = {"top_k": (int,), "router_groups": int, "width": int}
HEADER = {  # of a file of statistics, for hcsmoe_core._util.check_kind
    "about": {
        "model": {"name": str, "class": str, "hash": str, "layers": {str: _LAYER}, "every?": int}
        | {"digests?": dict},  # of a decoder layer, while a streamed model is captured
        "domains": [str],
        "sequences": [str],
        "layers": [str],
        "stability?": (dict,),
    },
    "sha256": str,
}
SUMS = tuple(key for keys in NEEDS.values() for key in keys)
DEFAULT_NEEDS = ("usage", "outputs", "norms", "grams")  # every similarity but CKA, for caches and notebooks
OWN_TEXT = "self"  # domain of text that the model wrote itself
SAMPLE = 32768  # tokens; the systems to be solved have thousands of unknowns per expert


@dataclass(repr=False)
class LayerSample:
    """What reached one layer for the R tokens of the sample, the same in every layer."""

    inputs: torch.Tensor  # (R, D) in the model's dtype: hidden states as they enter the experts
    logits: torch.Tensor  # (R, E) float32 or float64: the router's; NaN where no router was found
    index: torch.Tensor  # (R, k) int64: experts that the router chose
    weight: torch.Tensor  # (R, k) float32 or float64: what their outputs were multiplied with

    @cached_property
    def gates(self) -> torch.Tensor:
        """Applied routing weights ``(R, E)`` float64: zero where an expert was not chosen."""
        return torch.zeros_like(self.logits).double().scatter_add_(1, self.index, self.weight.double())

    @property
    def chosen(self) -> torch.Tensor:
        """Whether each token was routed to each expert, ``(R, E)`` bool."""
        return self.gates != 0


SAMPLED = tuple(column.name for column in fields(LayerSample))


@dataclass(repr=False)
class LayerStatistics:
    """Sums over the calibration tokens of one layer, float64; G domains, E experts, D hidden size.

    ``f_e`` is the output of expert e and ``g_e`` the weight that the router gave it, zero where it was not
    chosen; sums are over all tokens, routed to the expert or not. What was not collected is None.
    """

    tokens: torch.Tensor  # (G,) int64: that reached the layer
    usage_count: torch.Tensor  # (G, E) int64: tokens that the router sent to each expert, k per token
    routing_mass: torch.Tensor  # (G, E): Σ g_e
    # (G, E): Σ of the router's scores before any choice, softmax or sigmoid of its logits l; NaN without one
    score_mass: torch.Tensor
    logit_gram: torch.Tensor  # (G, E, E): Σ l lᵀ; NaN where no router was found
    output_sum: torch.Tensor | None = None  # (G, E, D): Σ f_e, without routing weight
    norm_sum: torch.Tensor | None = None  # (G, E): Σ ‖f_e‖ over the tokens routed to the expert
    gated_norm_sum: torch.Tensor | None = None  # (G, E): Σ g_e ‖f_e‖
    output_max: torch.Tensor | None = None  # (G, E): largest |f_e| over the tokens routed to the expert
    output_gram: torch.Tensor | None = None  # (G, E, E): Σ ⟨f_i, f_j⟩
    routed_gram: torch.Tensor | None = None  # (G, E, E): Σ g_i ⟨f_i, f_j⟩
    routed_square: torch.Tensor | None = None  # (G, E, E): Σ g_i ‖f_j‖²
    cosine_sum: torch.Tensor | None = None  # (G, E, E): Σ cos(f_i, f_j), 0 with a zero output
    sample: LayerSample | None = None

    def __repr__(self):
        return f"<LayerStatistics: {self.num_experts} experts, {int(self.tokens.sum()):,} tokens>"

    @property
    def num_experts(self) -> int:
        """E."""
        return self.usage_count.shape[1]

    @property
    def mean_output(self) -> torch.Tensor:
        """``(E, D)`` float64: the expert-output feature of HC-SMoE (arXiv 2410.08589, section 3.2)."""
        return self.output_sum.sum(0) / self.tokens.sum()

    @property
    def frequency(self) -> torch.Tensor:
        """``(E,)`` float64: share of all routed (token, expert) pairs; sums to one."""
        return self.usage_count.sum(0).double() / self.usage_count.sum()

    def collected(self) -> dict:
        """The collected sums by name."""
        return {key: getattr(self, key) for key in SUMS if getattr(self, key) is not None}


class Layers(dict):
    """LayerStatistics by layer name, in model order; a whole number, also negative, is a layer's place."""

    def __missing__(self, place):
        return self[_layer_name(list(self), place)]


def _layer_name(names, layer):
    """Name of a layer given by name, or by its number from 0 (from −1 backwards); InputError if none."""
    if not isinstance(layer, str):
        return names[check_count("layer", layer, -len(names), len(names) - 1)]
    require(layer in names, f'The "layer" argument must be one of {", ".join(names)}; not {layer!r}.')
    return layer


@dataclass(repr=False)
class Statistics:
    """Statistics of every MoE layer of a model."""

    layers: dict  # LayerStatistics by the name of the experts module, in model order, or by number
    domains: list  # names along the first axis of every sum
    # "name" it was loaded by, "class", "hash" of all its weights, "layers" with each one's "top_k",
    # "router_groups" and "width"; "every" n, where experts were applied to every n-th token only
    model: dict
    sequences: list  # hash of each calibration sequence
    sampled: torch.Tensor | None = None  # (R, 3) int64: sequence, position and domain of each sampled token
    stability: dict | None = None  # when and why capture_until_stable stopped

    def __post_init__(self):
        self.layers = Layers(self.layers)

    @classmethod
    def from_outputs(cls, outputs: dict, *, usage: dict | None = None, name: str = "") -> "Statistics":
        """Statistics of mean expert outputs that you computed yourself.

        Distances, trees and plans by them need no model; what looks at more than outputs and usage refuses.

        Parameters
        ----------
        outputs : dict of str to (E, D) array
            By the name of each layer's experts module, in model order: mean output of every expert.
        usage : dict of str to (E,) array, optional
            By layer, tokens routed to each expert, or shares of them; by default all are used alike.
        name : str
            Of the model, for the record.
        """
        layers, usage = {}, usage or {}
        for layer, given in outputs.items():
            means = torch.as_tensor(given, dtype=torch.float64)
            valid = means.ndim == 2 and bool(means.isfinite().all())
            shape = f"they have shape {tuple(means.shape)}, or NaN or infinite values"
            require(valid, f'"outputs" of {layer} must be finite numbers [experts, hidden size]; {shape}.')
            share = torch.as_tensor(usage.get(layer, np.ones(len(means))), dtype=torch.float64)
            require(
                share.shape == means.shape[:1] and 0 < share.sum() < np.inf and share.min() >= 0,
                f'The "usage" of {layer} must be {len(means)} numbers of at least 0, not all 0: the tokens '
                f"routed to each expert; not {share.tolist()}.",
            )
            # Counts are whole numbers; shares become those of a million tokens.
            count = (share if share.equal(share.round()) else share / share.sum() * 1e6).round()[None]
            tokens, unknown = count.sum(1), count.new_full((1, *[len(means)] * 2), torch.nan)
            sums = (tokens.long(), count.long(), count, count * torch.nan, unknown, tokens * means[None])
            layers[layer] = LayerStatistics(*sums)
        odd = usage.keys() - layers.keys()
        require(layers and not odd, f'The "outputs" argument must name layers, those of "usage" too: {odd}.')
        records = {layer: {"top_k": None, "router_groups": 1, "width": 0} for layer in layers}
        return cls(layers, ["all"], {"name": name, "class": "", "hash": "", "layers": records}, [])

    def __repr__(self):
        name = self.model.get("name") or "a model"
        counts = {layer.num_experts for layer in self.layers.values()}
        return (
            f"<Statistics of {name}: {len(self.layers)} MoE layers of "
            f"{' or '.join(map(str, sorted(counts)))} experts, {self.num_tokens:,} tokens of "
            f"{', '.join(self.domains)}; {', '.join(self.needs)}>"
        )

    def _repr_html_(self):
        rows = [
            {"": i, "layer": name, "experts": layer.num_experts, "tokens": f"{int(layer.tokens.sum()):,}"}
            | {"top k": self.model["layers"][name]["top_k"], "unused": int((layer.frequency == 0).sum())}
            | {"most used": f"{layer.frequency.max():.1%}"}
            for i, (name, layer) in enumerate(self.layers.items())
        ]
        return html_table(repr(self)[1:-1], rows)

    def layer(self, layer) -> LayerStatistics:
        """Statistics of one layer, by its number among the MoE layers (from 0; −1 is the last) or by name."""
        return self.layers[self.layer_name(layer)]

    def layer_name(self, layer) -> str:
        """Name of a layer given by number or by name; InputError if there is none."""
        return _layer_name(list(self.layers), layer)

    @property
    def num_tokens(self) -> int:
        """Calibration tokens behind these statistics."""
        return int(max(layer.tokens.sum() for layer in self.layers.values()))

    @property
    def needs(self) -> tuple:
        """Names of :data:`NEEDS` that were collected."""
        first = next(iter(self.layers.values()))
        absent = {key for key, value in vars(first).items() if value is None}
        return tuple(need for need, keys in NEEDS.items() if absent.isdisjoint(keys or [need]))

    def check(self, needs, purpose: str):
        """Raise InputError unless everything that ``purpose`` needs was collected."""
        missing = [need for need in needs if need not in self.needs]
        require(
            not missing,
            f"{purpose} needs {' and '.join(map(repr, missing))}, but these statistics hold "
            f"{', '.join(self.needs)} only; capture again with needs={(*self.needs, *missing)}, or by: "
            f"hcsmoe capture {self.model.get('name') or 'MODEL'} --needs {','.join((*self.needs, *missing))} "
            "--out FILE.safetensors",
        )

    def identity(self) -> dict:
        """Tokens, in whatever order, and sample of these statistics, for the plans made from them."""
        record = {
            "tokens": self.num_tokens,
            "domains": sorted(self.domains),
            "sequences": sha256_json(sorted(self.sequences)),
            "every": self.model.get("every", 1),
        }
        if self.sampled is not None:
            inputs = next(iter(self.layers.values())).sample.inputs
            record |= {"sample": len(self.sampled), "dtype": str(inputs.dtype).removeprefix("torch.")}
        return record

    def matches(self, identity: dict) -> bool:
        """Whether a plan's record is of these statistics; plans of earlier versions recorded less."""
        own = self.identity() | {"hash": sha256_json(self.sequences)}
        recorded = identity | {"domains": sorted(identity.get("domains", self.domains))}
        return all(own[key] == recorded[key] for key in own.keys() & recorded.keys())

    def __add__(self, other):
        """Statistics of the tokens of both, which must be disjoint: of one model, and what both collected."""
        require(
            same_model(self.model["hash"], other.model["hash"]),
            f"These statistics are of different models: {self.model['name']} and {other.model['name']}. "
            "Capture both on the same checkpoint.",
        )
        if shared := (Counter(self.sequences) & Counter(other.sequences)).total():
            message = f"{shared} calibration sequences are in both statistics and now count twice."
            warnings.warn(message, stacklevel=2)
        domains = list(dict.fromkeys(self.domains + other.domains))
        rows = [torch.tensor([domains.index(d) for d in stats.domains]) for stats in (self, other)]
        sequences = self.sequences + other.sequences
        sampled, order = _joined_sample(self, other, rows[1], sequences)
        layers = {}
        for name, first in self.layers.items():
            second = other.layers[name]
            sums = first.collected(), second.collected()
            joined = {key: _joined(key, sums, rows, len(domains)) for key in sums[0] if key in sums[1]}
            if sampled is not None:
                pairs = ((getattr(first.sample, key), getattr(second.sample, key)) for key in SAMPLED)
                joined["sample"] = LayerSample(*(torch.cat(pair)[order] for pair in pairs))
            layers[name] = LayerStatistics(**joined)
        every = max(stats.model.get("every", 1) for stats in (self, other))
        return Statistics(
            layers, domains, self.model | ({"every": every} if every > 1 else {}), sequences, sampled
        )

    def save(self, path):
        """Write to a ``.safetensors`` file, in full or not at all."""
        tensors = {} if self.sampled is None else {"sampled": self.sampled}
        for name, layer in self.layers.items():
            tensors |= {f"{name}/{key}": value for key, value in layer.collected().items()}
            if self.sampled is not None:
                tensors |= {f"{name}/sample/{key}": getattr(layer.sample, key) for key in SAMPLED}
        record = {key: getattr(self, key) for key in ("model", "domains", "sequences")}
        record |= {"layers": list(self.layers)}
        record |= {} if self.stability is None else {"stability": self.stability}
        header = json.dumps({"format": FORMAT, "about": record, "sha256": _digest(tensors, record)})
        with replacing(path) as part:
            # One key: safetensors writes several in an order that changes from run to run.
            save_file({n: t.contiguous() for n, t in tensors.items()}, part, metadata={"hcsmoe": header})


def _joined(key, sums, rows, count):
    """One sum over the tokens of both statistics, by domain; ``rows``: where the domains of each are."""
    parts = [
        torch.zeros(count, *own[key].shape[1:], dtype=own[key].dtype).index_copy_(0, places, own[key])
        for own, places in zip(sums, rows, strict=True)
    ]
    return torch.maximum(*parts) if key == "output_max" else sum(parts)


def _joined_sample(first, second, domains, sequences):
    """The sample of the tokens of both, and where its tokens are in the two samples joined."""
    if first.sampled is None or second.sampled is None:
        return None, None
    sequence, position, domain = second.sampled.T
    moved = torch.stack([sequence + len(first.sequences), position, domains[domain]], 1)
    sampled = torch.cat([first.sampled, moved])
    # A sample of fewer tokens than there are is known only up to its largest hash.
    size = min([len(s.sampled) for s in (first, second) if len(s.sampled) < s.num_tokens], default=None)
    keys = sample_keys([sequences[i] for i in sampled[:, 0].tolist()], sampled[:, 1].numpy())
    order = torch.from_numpy(np.argsort(keys, kind="stable")[:size].copy())
    return sampled[order], order


def sequence_hashes(input_ids) -> list:
    """Hash of each calibration sequence ``[N, S]``."""
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in input_ids]


def sample_keys(sequences, positions) -> np.ndarray:
    """Hash of each token by its sequence's hash and its position, uint64: the smallest are the sample."""
    unique, inverse = np.unique(np.asarray(sequences), return_inverse=True)
    seeds = np.array([int(name, 16) for name in unique], dtype=np.uint64)[inverse]
    return _mixed(seeds ^ _mixed(np.asarray(positions).astype(np.uint64)))


def _mixed(x):
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample_of(hashes, length: int, size: int, real=None) -> torch.Tensor:
    """Sequence and position of the sampled tokens of N sequences, ``(min(size, N·S), 2)`` int64.

    ``real``, ``(N, S)`` bool, are those to sample from where some are padding.
    """
    tokens = np.indices((len(hashes), length)).reshape(2, -1).T
    tokens = tokens if real is None else tokens[real.flatten().numpy()]
    keys = sample_keys(np.asarray(hashes)[tokens[:, 0]], tokens[:, 1])
    return torch.from_numpy(tokens[np.argsort(keys, kind="stable")[:size]])


def _digest(tensors, record):
    digest = hashlib.sha256(sha256_json(record).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # As bytes, since bfloat16 has no NumPy dtype.
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_statistics(path: str | Path) -> Statistics:
    """Read statistics that :meth:`Statistics.save` wrote; InputError if the file is none, or is damaged."""
    absent = f"There is no statistics file {path}; make one with: hcsmoe capture MODEL --out {path}"
    require(Path(path).is_file(), absent, FileNotFoundError)
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("hcsmoe", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable statistics file ({error}); capture again.") from None
    require(
        isinstance(header, dict) and header.get("format") == FORMAT,
        f"{path} is no statistics file of this version of hcsmoe ({FORMAT}); capture again.",
    )
    record = check_kind(header, HEADER, f"{path} is not a statistics file:")["about"]
    require(
        _digest(tensors, record) == header["sha256"],
        f"{path} was changed since it was written; capture again.",
    )
    names, layers, sampled = record["layers"], {}, tensors.get("sampled")
    needed = (*NEEDS["usage"], *([] if sampled is None else [f"sample/{key}" for key in SAMPLED]))
    absent = [f"{name}/{key}" for name in names for key in needed if f"{name}/{key}" not in tensors]
    whole = names or "digests" in record["model"]  # a decoder layer may have no experts
    require(whole and not absent, f"{path} lacks {', '.join(absent) or 'layers'}; capture again.")
    for name in names:
        values = {key: tensors[f"{name}/{key}"] for key in SUMS if f"{name}/{key}" in tensors}
        if sampled is not None:
            values["sample"] = LayerSample(*(tensors[f"{name}/sample/{key}"] for key in SAMPLED))
        layers[name] = LayerStatistics(**values)
    about = {key: record[key] for key in ("domains", "model", "sequences")}
    return Statistics(layers, sampled=sampled, stability=record.get("stability"), **about)
