"""What one pass over the calibration tokens leaves: sums that add up, and a sample of layer inputs.

Statistics are sums over tokens: those of two disjoint sets of tokens add up to those of both. They are kept for each
domain of the calibration tokens, so that the mix can be chosen afterwards. The sample is the tokens with the smallest
hashes, so that it does not depend on batches or order and that of two parts is found from theirs.
"""

import dataclasses
import hashlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hcsmoe_core._util import InputError, check_count, replacing, sha256_json

FORMAT = "hcsmoe-statistics-2"


# What can be collected, by name, with the sums that each is made of; "sample" is no sum.
NEEDS = {
    "usage": ("tokens", "usage_count", "routing_mass", "score_mass", "logit_gram"),
    "outputs": ("output_sum",),
    "norms": ("norm_sum", "gated_norm_sum", "output_max"),
    "grams": ("output_gram", "routed_gram", "routed_square", "cosine_sum"),
    "sample": (),
}


DEFAULT_NEEDS = ("usage", "outputs", "norms", "grams")


OWN_TEXT = "self"  # domain of text that the model wrote itself
SAMPLE = 32768  # what is solved for has thousands of unknowns in each expert


@dataclass
class LayerSample:
    """What reached one layer for the tokens of the sample; R tokens, the same in every layer.

    Attributes
    ----------
    inputs : (R, D) tensor
        Hidden states as they enter the experts, in the model's dtype.
    logits : (R, E) float32 or float64 tensor
        The router's; NaN where no router was found.
    index : (R, k) int64 tensor
        Experts that the router chose.
    weight : (R, k) float32 or float64 tensor
        Weights that their outputs were multiplied with.
    """

    inputs: torch.Tensor
    logits: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor

    @cached_property
    def gates(self):
        """Applied routing weights ``(R, E)`` float64: zero where an expert was not chosen."""
        dense = torch.zeros(self.logits.shape, dtype=torch.float64)
        return dense.scatter_add_(1, self.index, self.weight.double())

    @property
    def chosen(self):
        """Whether each expert was chosen by each token, ``(R, E)`` bool."""
        return self.gates != 0


SAMPLED = tuple(f.name for f in dataclasses.fields(LayerSample))


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one layer, by domain; G domains, E experts, D hidden size.

    ``f_e(x)`` is the output of expert e and ``g_e(x)`` the weight that the router gave it: zero where it was not chosen.
    Sums that were not asked for are None.

    Attributes
    ----------
    tokens : (G,) int64
        Tokens that reached the layer.
    usage_count : (G, E) int64
        Tokens that the router sent to each expert (k a token), as it really did.
    routing_mass : (G, E) float64
        ``Σ g_e``.
    score_mass : (G, E) float64
        ``Σ p_e`` over all tokens, the router's scores before any choice: softmax of its logits, or their sigmoid where
        the weights show that it uses that. All NaN where a layer's router could not be found.
    logit_gram : (G, E, E) float64
        ``Σ l lᵀ`` of the router's logits; all NaN where a layer's router could not be found.
    output_sum : (G, E, D) float64
        ``Σ f_e`` over *all* tokens, routed to the expert or not, without routing weight.
    norm_sum, gated_norm_sum : (G, E) float64
        ``Σ ‖f_e‖`` and ``Σ g_e ‖f_e‖`` over the tokens routed to the expert.
    output_max : (G, E) float64
        Largest absolute value among the outputs for tokens routed to the expert.
    output_gram : (G, E, E) float64
        ``Σ ⟨f_i, f_j⟩`` over all tokens.
    routed_gram, routed_square : (G, E, E) float64
        ``Σ g_i ⟨f_i, f_j⟩`` and ``Σ g_i ‖f_j‖²`` over all tokens.
    cosine_sum : (G, E, E) float64
        ``Σ cos(f_i, f_j)`` over all tokens; the cosine with a zero output is 0.
    sample : LayerSample or None
    """

    tokens: torch.Tensor
    usage_count: torch.Tensor
    routing_mass: torch.Tensor
    score_mass: torch.Tensor
    logit_gram: torch.Tensor
    output_sum: torch.Tensor | None = None
    norm_sum: torch.Tensor | None = None
    gated_norm_sum: torch.Tensor | None = None
    output_max: torch.Tensor | None = None
    output_gram: torch.Tensor | None = None
    routed_gram: torch.Tensor | None = None
    routed_square: torch.Tensor | None = None
    cosine_sum: torch.Tensor | None = None
    sample: LayerSample | None = None

    @property
    def num_experts(self):
        """E."""
        return self.usage_count.shape[1]

    @property
    def mean_output(self):
        """``(E, D)`` float64: the expert-output feature of HC-SMoE (arXiv 2410.08589, section 3.2)."""
        return self.output_sum.sum(0) / self.tokens.sum()

    @property
    def frequency(self):
        """``(E,)`` float64: share of all routed (token, expert) pairs; sums to one."""
        count = self.usage_count.sum(0).double()
        return count / count.sum()

    def held(self):
        """The sums that are there, by name."""
        return {key: getattr(self, key) for key in SUMS if getattr(self, key) is not None}


SUMS = tuple(key for keys in NEEDS.values() for key in keys)


@dataclass
class Statistics:
    """What one pass over the calibration tokens tells about every MoE layer of a model.

    Attributes
    ----------
    layers : dict of str to LayerStatistics
        By the name of the experts module, in model order.
    domains : list of str
        Names along the first axis of every sum.
    model : dict
        ``name`` it was loaded by, ``class``, ``hash`` of its experts and routers, and ``layers``: what each layer's
        router and experts are like (``top_k``, ``router_groups``, ``width``); ``every``, where experts were not applied to
        all tokens.
    sequences : list of str
        Hash of each calibration sequence.
    sampled : (R, 3) int64 tensor or None
        Of each token of the sample: place of its sequence, position in it, and place of its domain.
    stability : dict or None
        Where the capture stopped by itself, when and why: :func:`hcsmoe_core.studies.stability.capture_until_stable`.
    """

    layers: dict
    domains: list
    model: dict
    sequences: list
    sampled: torch.Tensor | None = field(default=None)
    stability: dict | None = field(default=None)

    def layer(self, layer):
        """Statistics of one layer, by its place among the MoE layers (from 0) or by name.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        return self.layers[self.layer_name(layer)]

    def layer_name(self, layer):
        """Name of a layer given by place or by name."""
        names = list(self.layers)
        if isinstance(layer, str):
            if layer not in self.layers:
                raise InputError(f'The "layer" argument must be one of {", ".join(names)}; not {layer!r}.')
            return layer
        return names[check_count("layer", layer, 0, len(names) - 1)]

    @property
    def num_tokens(self):
        """Calibration tokens behind these statistics."""
        return int(max(layer.tokens.sum() for layer in self.layers.values()))

    @property
    def needs(self):
        """Names of :data:`NEEDS` that these statistics hold."""
        sums = next(iter(self.layers.values()))
        held = sums.held()
        return tuple(
            n
            for n, keys in NEEDS.items()
            if (all(k in held for k in keys) if keys else sums.sample is not None)
        )

    def check(self, needs, what):
        """Raise ValueError unless everything that ``what`` needs was collected."""
        missing = [n for n in needs if n not in self.needs]
        if missing:
            held = ", ".join(self.needs)
            raise InputError(
                f"{what} needs {' and '.join(map(repr, missing))}, but these statistics hold {held} only; capture again with "
                f"needs={(*self.needs, *missing)}, or on the command line: hcsmoe capture MODEL --for METHOD."
            )

    def identity(self):
        """What a plan keeps to name these statistics."""
        return {"tokens": self.num_tokens, "domains": self.domains, "hash": sha256_json(self.sequences)}

    def __add__(self, other):
        """Statistics of the tokens of both, as far as both hold them; the tokens must be disjoint.

        Raises
        ------
        ValueError
            If the two are not of the same model.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.model["hash"] != other.model["hash"]:
            raise InputError(
                f"These statistics are of different models: {self.model['name']} and {other.model['name']}. "
                "Capture both on the same checkpoint."
            )
        shared = sum((Counter(self.sequences) & Counter(other.sequences)).values())
        if shared:
            warnings.warn(
                f"{shared} calibration sequences are in both statistics and now count twice.", stacklevel=2
            )
        domains = list(dict.fromkeys(self.domains + other.domains))
        sequences = self.sequences + other.sequences
        sampled, order = _joined_sample(self, other, domains, sequences)
        layers = {}
        for name, mine in self.layers.items():
            theirs = other.layers[name]
            both = [key for key in mine.held() if key in theirs.held()]
            sums = {
                key: _joined(self, other, key, getattr(mine, key), getattr(theirs, key), domains)
                for key in both
            }
            if sampled is not None:
                pairs = {key: (getattr(mine.sample, key), getattr(theirs.sample, key)) for key in SAMPLED}
                sums["sample"] = LayerSample(**{key: torch.cat(pair)[order] for key, pair in pairs.items()})
            layers[name] = LayerStatistics(**sums)
        return Statistics(layers, domains, dict(self.model), sequences, sampled)

    def save(self, path):
        """Write to a ``.safetensors`` file, in full or not at all."""
        tensors = {
            f"{name}/{key}": value for name, sums in self.layers.items() for key, value in sums.held().items()
        }
        if self.sampled is not None:
            tensors["sampled"] = self.sampled
            tensors |= {
                f"{name}/sample/{k}": getattr(s.sample, k) for name, s in self.layers.items() for k in SAMPLED
            }
        about = {
            "model": self.model,
            "domains": self.domains,
            "sequences": self.sequences,
            "layers": list(self.layers),
        }
        if self.stability is not None:
            about["stability"] = self.stability
        header = json.dumps({"format": FORMAT, "about": about, "sha256": _digest(tensors, about)})
        with replacing(
            path
        ) as part:  # one key: safetensors writes several in an order that changes from run to run
            save_file({n: t.contiguous() for n, t in tensors.items()}, part, metadata={"hcsmoe": header})


def _joined(first, second, key, a, b, domains):
    total = torch.zeros(len(domains), *a.shape[1:], dtype=a.dtype)
    for statistics, sums in ((first, a), (second, b)):
        places = [domains.index(d) for d in statistics.domains]
        total[places] = torch.maximum(total[places], sums) if key == "output_max" else total[places] + sums
    return total


def _joined_sample(first, second, domains, sequences):
    """Which tokens of two samples are the sample of both, and their places among the tokens of both."""
    if first.sampled is None or second.sampled is None:
        return None, None
    parts = []
    for statistics, shift in ((first, 0), (second, len(first.sequences))):
        of_domain = torch.tensor([domains.index(d) for d in statistics.domains])
        part = statistics.sampled.clone()
        part[:, 0] += shift
        part[:, 2] = of_domain[part[:, 2]]
        parts.append(part)
    sampled = torch.cat(parts)
    # A sample smaller than its tokens is known only up to its largest hash.
    whole = [len(s.sampled) == s.num_tokens for s in (first, second)]
    size = min([len(p) for p, w in zip(parts, whole, strict=True) if not w], default=len(sampled))
    keys = sample_keys([sequences[i] for i in sampled[:, 0].tolist()], sampled[:, 1].numpy())
    order = torch.from_numpy(np.argsort(keys, kind="stable")[:size].copy())
    return sampled[order], order


def sequence_hashes(input_ids):
    """Hash of each calibration sequence ``[N, S]``, by which statistics know it."""
    return [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in input_ids]


def sample_keys(sequences, positions):
    """Hash of each token by its sequence's hash and its position, uint64: the smallest are the sample."""
    number, place = np.unique(np.asarray(sequences), return_inverse=True)
    seeds = np.array([int(n, 16) for n in number], dtype=np.uint64)[place]
    return _mixed(seeds ^ _mixed(np.asarray(positions).astype(np.uint64)))


def _mixed(x):
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every bit of the input changes half of the output's."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def sample_of(hashes, length, size):
    """Which tokens of sequences ``[N, S]`` are the sample: ``(min(size, N·S), 2)`` int64 of sequence and position."""
    places = np.stack(np.meshgrid(np.arange(len(hashes)), np.arange(length), indexing="ij"), -1).reshape(
        -1, 2
    )
    keys = sample_keys(np.asarray(hashes)[places[:, 0]], places[:, 1])
    return torch.from_numpy(places[np.argsort(keys, kind="stable")[:size]])


def _digest(tensors, about):
    digest = hashlib.sha256(sha256_json(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())  # bfloat16 has no NumPy dtype
    return digest.hexdigest()


def load_statistics(path):
    """Read statistics that :meth:`Statistics.save` wrote.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not one of ours, is cut short, or was changed since it was written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no statistics file {path}; make one with: hcsmoe capture MODEL --out {path}"
        )
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("hcsmoe", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise InputError(f"{path} is not a readable statistics file ({error}); capture again.") from None
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is no statistics file of this version of hcsmoe ({FORMAT}); capture again.")
    about = header["about"]
    if _digest(tensors, about) != header["sha256"]:
        raise InputError(f"{path} was changed since it was written; capture again.")
    layers = {}
    for name in about["layers"]:
        sums = {key: tensors[f"{name}/{key}"] for key in SUMS if f"{name}/{key}" in tensors}
        if "sampled" in tensors:
            sums["sample"] = LayerSample(**{key: tensors[f"{name}/sample/{key}"] for key in SAMPLED})
        layers[name] = LayerStatistics(**sums)
    return Statistics(
        layers,
        about["domains"],
        about["model"],
        about["sequences"],
        tensors.get("sampled"),
        about.get("stability"),
    )


def estimated_bytes(layers, needs, *, domains, tokens, sample=SAMPLE):
    """Bytes of a statistics file, before it is made.

    Parameters
    ----------
    layers : list of (E, D, k, element size)
        Experts, hidden size, experts a token and bytes of a hidden value of each MoE layer.
    needs : sequence of str
        Names of :data:`NEEDS`.
    domains, tokens, sample : int

    Returns
    -------
    int
    """
    rows, total = min(sample, tokens), 0
    for experts, hidden, choices, size in layers:
        numbers = {"usage": 1 + 3 * experts + experts**2, "outputs": experts * hidden, "norms": 3 * experts}
        numbers["grams"] = 4 * experts**2
        total += 8 * domains * sum(numbers[n] for n in needs if n in numbers)
        if "sample" in needs:
            total += rows * (hidden * size + 4 * experts + (8 + 4) * choices)
    return total + ("sample" in needs) * rows * 24
