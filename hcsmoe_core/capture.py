"""One pass over the calibration tokens gives the statistics that every similarity and every plan is made from.

Statistics are sums over tokens: those of two disjoint sets of tokens add up to those of both. They are kept for each
domain of the calibration tokens, so that the mix can be chosen afterwards.
"""

import dataclasses
import hashlib
import inspect
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from hcsmoe_core.files import check_count, replacing, sha256_json
from hcsmoe_core.moe import check_loaded, find_moe_layers, model_hash, router_logits

FORMAT = "hcsmoe-statistics-1"
# Tokens that an expert is applied to at once: what stays in a CPU's caches, and what fills a GPU.
CHUNK = {"cpu": 1024, "cuda": 8192}


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens of one layer, by domain; G domains, E experts.

    Attributes
    ----------
    tokens : (G,) int64
        Tokens that reached the layer.
    usage_count : (G, E) int64
        Tokens that the router sent to each expert (k a token), as it really did.
    routing_mass : (G, E) float64
        Sum of the weights that the router gave each expert's output.
    output_sum : (G, E, D) float64
        Sum of each expert's output over *all* tokens, routed to it or not, without routing weight.
    logit_gram : (G, E, E) float64
        ``Σ_t l_t l_tᵀ`` of the router's logits; absent (all NaN) where a layer's router could not be found.
    """

    tokens: torch.Tensor
    usage_count: torch.Tensor
    routing_mass: torch.Tensor
    output_sum: torch.Tensor
    logit_gram: torch.Tensor

    @property
    def mean_output(self):
        """``(E, D)`` float64: the expert-output feature of HC-SMoE (arXiv 2410.08589, section 3.2)."""
        return self.output_sum.sum(0) / self.tokens.sum()

    @property
    def frequency(self):
        """``(E,)`` float64: share of all routed (token, expert) pairs; sums to one."""
        count = self.usage_count.sum(0).double()
        return count / count.sum()


SUMS = tuple(f.name for f in dataclasses.fields(LayerStatistics))


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
        ``name`` it was loaded by, ``class``, and ``hash`` of its experts and routers.
    sequences : list of str
        Hash of each calibration sequence.
    """

    layers: dict
    domains: list
    model: dict
    sequences: list

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
                raise ValueError(f'The "layer" argument must be one of {", ".join(names)}; not {layer!r}.')
            return layer
        return names[check_count("layer", layer, 0, len(names) - 1)]

    @property
    def num_tokens(self):
        """Calibration tokens behind these statistics."""
        return int(max(layer.tokens.sum() for layer in self.layers.values()))

    def identity(self):
        """What a plan keeps to name these statistics."""
        return {"tokens": self.num_tokens, "domains": self.domains, "hash": sha256_json(self.sequences)}

    def __add__(self, other):
        """Statistics of the tokens of both; the tokens must be disjoint.

        Raises
        ------
        ValueError
            If the two are not of the same model.
        """
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.model["hash"] != other.model["hash"]:
            raise ValueError(
                f"These statistics are of different models: {self.model['name']} and {other.model['name']}. "
                "Capture both on the same checkpoint."
            )
        shared = sum((Counter(self.sequences) & Counter(other.sequences)).values())
        if shared:
            warnings.warn(f"{shared} calibration sequences are in both statistics and now count twice.", stacklevel=2)
        domains = list(dict.fromkeys(self.domains + other.domains))
        layers = {}
        for name, mine in self.layers.items():
            sums = {key: _joined(self, other, getattr(mine, key), getattr(other.layers[name], key), domains) for key in SUMS}
            layers[name] = LayerStatistics(**sums)
        return Statistics(layers, domains, dict(self.model), self.sequences + other.sequences)

    def save(self, path):
        """Write to a ``.safetensors`` file, in full or not at all."""
        tensors = {f"{name}/{key}": getattr(sums, key) for name, sums in self.layers.items() for key in SUMS}
        about = {"model": self.model, "domains": self.domains, "sequences": self.sequences, "layers": list(self.layers)}
        header = json.dumps({"format": FORMAT, "about": about, "sha256": _digest(tensors, about)})
        with replacing(path) as part:  # one key: safetensors writes several in an order that changes from run to run
            save_file({n: t.contiguous() for n, t in tensors.items()}, part, metadata={"hcsmoe": header})


def _joined(first, second, a, b, domains):
    total = torch.zeros(len(domains), *a.shape[1:], dtype=a.dtype)
    for statistics, sums in ((first, a), (second, b)):
        total[[domains.index(d) for d in statistics.domains]] += sums
    return total


def _digest(tensors, about):
    digest = hashlib.sha256(sha256_json(about).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
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
        raise FileNotFoundError(f"There is no statistics file {path}; make one with: hcsmoe capture MODEL --out {path}")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("hcsmoe", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable statistics file ({error}); capture again.") from None
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is no statistics file of this version of hcsmoe ({FORMAT}); capture again.")
    about = header["about"]
    if _digest(tensors, about) != header["sha256"]:
        raise ValueError(f"{path} was changed since it was written; capture again.")
    layers = {n: LayerStatistics(**{key: tensors[f"{n}/{key}"] for key in SUMS}) for n in about["layers"]}
    return Statistics(layers, about["domains"], about["model"], about["sequences"])


class _Collector:
    """Adds up one layer's statistics from what reaches its router and its experts."""

    def __init__(self, layer, domains):
        experts = layer.num_experts
        self.layer = layer
        device = layer.experts.down_proj.device
        self.tokens = torch.zeros(domains, dtype=torch.int64)
        self.usage_count = torch.zeros(domains, experts, dtype=torch.int64, device=device)
        self.routing_mass = torch.zeros(domains, experts, dtype=torch.float64, device=device)
        self.logit_gram = torch.zeros(domains, experts, experts, dtype=torch.float64, device=device)
        self.hidden_sum = None  # [G, E, I], made when the first tokens tell the width
        self.batch_domains = None
        self.saw_logits = False

    def take_router(self, module, inputs, output):
        """Forward hook of the router."""
        logits = router_logits(output, self.layer.num_experts).double()
        for domain, rows in self._by_domain(len(logits), logits.device):
            self.logit_gram[domain] += logits[rows].T @ logits[rows]
        self.saw_logits = True

    def take_experts(self, module, inputs, keywords):
        """Forward pre-hook of the experts: tokens [T, D], index [T, k] and weight [T, k] as they are applied."""
        tokens, index, weight = [*inputs, *keywords.values()][:3]
        tokens = tokens.reshape(-1, tokens.shape[-1])
        index, weight = index.reshape(len(tokens), -1), weight.reshape(len(tokens), -1).double()
        for domain, rows in self._by_domain(len(tokens), tokens.device):
            self._add(domain, tokens[rows], index[rows], weight[rows])

    def _add(self, domain, tokens, index, weight):
        self.tokens[domain] += len(tokens)
        taken = weight != 0  # some routers send a skipped token to expert 0 with weight zero
        self.usage_count[domain] += torch.bincount(index[taken], minlength=self.usage_count.shape[1])
        self.routing_mass[domain].index_add_(0, index.flatten(), weight.flatten())
        for part in tokens.split(CHUNK["cpu" if tokens.device.type == "cpu" else "cuda"]):
            for expert in range(self.layer.num_experts):
                total = self.layer.expert_hidden(expert, part).sum(0, dtype=torch.float64)
                if self.hidden_sum is None:
                    shape = len(self.tokens), self.layer.num_experts, len(total)
                    self.hidden_sum = torch.zeros(shape, dtype=torch.float64, device=total.device)
                self.hidden_sum[domain, expert] += total

    def _by_domain(self, count, device):
        """Rows of each domain in a batch whose tokens come sequence after sequence."""
        per_sequence = count // len(self.batch_domains)
        of_token = torch.tensor(self.batch_domains, device=device).repeat_interleave(per_sequence)
        for domain in sorted(set(self.batch_domains)):
            yield domain, (of_token == domain).nonzero()[:, 0]

    @torch.no_grad()
    def finish(self):
        """Project the mean activations down: ``mean_t W_down h_t = W_down mean_t h_t``, one product an expert."""
        layer, counts = self.layer, self.tokens.clamp(min=1).to(self.hidden_sum.device)
        means = self.hidden_sum / counts[:, None, None]
        outputs = torch.stack([layer.down_project(m) for m in means]) * self.tokens.to(means.device)[:, None, None]
        if not self.saw_logits:
            self.logit_gram.fill_(torch.nan)
        sums = LayerStatistics(self.tokens, self.usage_count, self.routing_mass, outputs, self.logit_gram)
        if not torch.isfinite(outputs).all():
            raise ValueError(
                f"{layer.name}: an expert's outputs are not finite on these tokens; the checkpoint is damaged, or "
                "its dtype overflows: load it with another dtype."
            )
        return LayerStatistics(**{key: getattr(sums, key).cpu() for key in SUMS})


def capture(model, input_ids, *, batch_size=8, domains=None, progress=True):
    """Statistics of every MoE layer over the calibration tokens, in one pass.

    Each sequence goes through the model once, at the model's own routing. At each MoE layer all E experts are applied
    to all tokens up to their down projection, a chunk of tokens at a time; sums are float64.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With its weights in memory, and not merged.
    input_ids : (N, S) int64 tensor
        Calibration sequences without padding; see :func:`hcsmoe_core.calibration.calibration_tokens`.
    batch_size : int
        Sequences a forward pass.
    domains : sequence of N str, optional
        Domain of each sequence; by default all are of one, ``"all"``.
    progress : bool
        Show a bar.

    Returns
    -------
    Statistics

    Raises
    ------
    ValueError
        If the model has no MoE layers, is merged, offloaded or quantised, holds NaN, or if the tokens are not ids of
        its vocabulary.
    """
    input_ids = check_tokens(input_ids, model)
    check_count("batch_size", batch_size, 1)
    names, of_sequence = _domain_index(domains, len(input_ids))
    layers = find_moe_layers(model)
    for layer in layers:
        if layer.merged:
            raise ValueError("This model is merged; capture on the original: restore(model), or load it again.")
        check_loaded(layer)
    collectors = [_Collector(layer, len(names)) for layer in layers]
    about = {"name": model.name_or_path or type(model).__name__, "class": type(model).__name__, "hash": model_hash(model)}
    _run(model, input_ids, collectors, of_sequence, batch_size, progress)
    sums = {collector.layer.name: collector.finish() for collector in collectors}
    hashes = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for row in input_ids]
    return Statistics(sums, names, about, hashes)


def _run(model, input_ids, collectors, of_sequence, batch_size, progress):
    """The pass: all sequences once through the model, with every collector listening."""
    # The language model head's logits are not needed; where the model can, it makes one row of them.
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    handles = []
    was_training = model.training
    try:
        for collector in collectors:
            experts, router = collector.layer.experts, collector.layer.router
            handles.append(experts.register_forward_pre_hook(collector.take_experts, with_kwargs=True))
            if router is not None:
                handles.append(router.register_forward_hook(collector.take_router))
        model.eval()
        bar = tqdm(total=input_ids.numel(), desc="capture", unit="token", unit_scale=True, disable=None if progress else True)
        with torch.no_grad(), bar:
            for start in range(0, len(input_ids), batch_size):
                rows = input_ids[start : start + batch_size]
                for collector in collectors:
                    collector.batch_domains = of_sequence[start : start + batch_size]
                model(input_ids=rows.to(model.device), use_cache=False, **extra)
                bar.update(rows.numel())
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    for collector in collectors:
        if collector.hidden_sum is None:
            raise ValueError(
                f"{collector.layer.name} was never called. Kernels that replace the whole MoE block, and models compiled "
                "before the capture, hide it: load the model with use_kernels=False and do not compile it."
            )


def check_tokens(input_ids, model):
    """Calibration tokens as int64 on the CPU, or ValueError if the model cannot read them."""
    if not torch.is_tensor(input_ids) or input_ids.ndim != 2 or input_ids.is_floating_point() or not input_ids.numel():
        shape = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}" if torch.is_tensor(input_ids) else type(input_ids)
        raise ValueError(f'The "input_ids" argument must be a tensor of token ids [sequences, length]; not {shape}.')
    input_ids = input_ids.to("cpu", torch.int64).contiguous()
    size = model.get_input_embeddings().num_embeddings
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= size:
        raise ValueError(
            f'The "input_ids" argument holds ids from {low} to {high}, but the model\'s vocabulary has ids from 0 to '
            f"{size - 1}; encode the text with the model's own tokenizer."
        )
    return input_ids


def _domain_index(domains, count):
    if domains is None:
        return ["all"], [0] * count
    domains = [str(d) for d in domains]
    if len(domains) != count:
        raise ValueError(f'The "domains" argument must name the domain of each of the {count} sequences; got {len(domains)}.')
    names = list(dict.fromkeys(domains))
    return names, [names.index(d) for d in domains]
