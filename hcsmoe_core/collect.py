"""One pass over the calibration tokens gives the statistics that plans and merges are made from.

Hooks on each MoE layer see the hidden states [T, D] that enter its experts, the experts [T, k] that the
router chose, and their weights [T, k]. All E experts are applied to all tokens; sums are float64.
"""

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from hcsmoe_core import statistics
from hcsmoe_core._util import check_choice, check_count, require
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.moe import check_loaded, router_logits
from hcsmoe_core.statistics import NEEDS, SAMPLE, LayerSample, LayerStatistics, Statistics
from hcsmoe_core.steps import METHODS

# Tokens that an expert is applied to at once: what stays in a CPU's caches, and what fills a GPU.
CHUNK = {"cpu": 512, "cuda": 8192}
# Numbers of all experts' outputs in memory at once, where pairs of experts are compared.
DENSE = {"cpu": 1 << 25, "cuda": 1 << 28}
PAIRED = {"cpu": 1 << 20, "cuda": 1 << 26}  # of these, those in float64
# Stands for the ranks where there is one process: see capture().
ONE_PROCESS = SimpleNamespace(
    rank=lambda: 0, share=lambda items: items, total=lambda tensor, largest=False: tensor
)


def needs_of(methods, needs=None) -> tuple:
    """What to collect: ``needs`` if given, else what the methods need; names of ``statistics.NEEDS``."""
    if needs is None:
        methods = [methods] if isinstance(methods, str) else methods
        needs = [need for method in methods for need in METHODS[method].needs]
    known = {check_choice("needs", need, NEEDS) for need in needs}
    return tuple(need for need in NEEDS if need in known)


def capture(
    model: nn.Module,
    input_ids: torch.Tensor | Mapping | Iterable,
    *,
    methods: str | Sequence[str] = ("hc-smoe",),
    needs: Sequence[str] | None = None,
    sample: int = SAMPLE,
    every: int = 1,
    batch_size: int = 8,
    domains: Sequence[str] | None = None,
    ranks: Any = None,
    progress: bool = True,
) -> Statistics:
    """Statistics of every MoE layer over the calibration tokens, in one pass at the model's own routing.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With its weights in memory, and not merged; or a module of your own: :mod:`hcsmoe_core.adapters`.
    input_ids : (N, S) int64 tensor, mapping, or iterable of sequences or batches
        Calibration sequences: :func:`hcsmoe_core.calibration_tokens`, what a tokenizer gives, a dataset with
        ``input_ids``, a ``DataLoader``. What an ``attention_mask`` beside them leaves out counts nowhere, nor
        do sequences without tokens. A tensor holds no padding.
    methods, needs : sequence of str
        Methods to plan by later, of which what they need is collected, or names of
        :data:`hcsmoe_core.statistics.NEEDS` instead. The default serves all of the HC-SMoE paper.
    sample, batch_size : int
        Tokens in the sample of layer inputs, where one is collected; sequences per forward pass.
    every : int
        Apply the experts to every n-th token only, n ≤ S: outputs, norms and Gram matrices are then estimates
        of sums over all tokens. Usage and sample are of all tokens.
    domains : sequence of N str, optional
        Domain of each sequence; by default all are of one, ``"all"``.
    ranks : object, optional
        Processes that share the batches, as :mod:`hcsmoe_core.scale.ranks`; None for one process.
    """
    needs, options = needs_of(methods, needs), {"sample": sample, "every": every, "batch_size": batch_size}
    tokens = Tokens(model, input_ids, needs=needs, domains=domains, ranks=ranks, **options)
    layers = find_moe_layers(model)
    merged = "This model is merged; capture on the original: restore(model), or load it again."
    require(not any(layer.merged for layer in layers), merged)
    for layer in layers:
        check_loaded(layer)
    with contextlib.ExitStack() as after, tokens.collecting(layers) as collectors, torch.no_grad():
        after.callback(model.train, model.training)
        bar = after.enter_context(tokens.bar(progress))
        for start in tokens.starts:
            bar.update(tokens.run(model.eval(), collectors, start, device_of(model)))
    return tokens.statistics(model, tokens.finished(collectors))


class Tokens:
    """Calibration sequences in batches, some of which are this rank's; parameters as for :func:`capture`.

    ``starts`` are the first sequences of this rank's batches; ``sampled``, ``(R, 3)`` int64, the sequence,
    position and domain of each sampled token, if any; ``real``, ``(N, S)`` bool, what is no padding; and
    ``applied``, ``(N, S)`` bool, the tokens to which experts are applied, where these are not all.
    """

    def __init__(self, model, input_ids, *, needs, sample, batch_size, domains, every=1, ranks=None):
        input_ids, self.real = without_padding(input_ids)
        self.input_ids, self.ranks = check_tokens(input_ids, model), ranks or ONE_PROCESS
        require(
            self.real is None or hasattr(model, "get_input_embeddings"),
            "The sequences differ in length, which a module that is not of transformers has no mask for; "
            "capture those of one length at a time, and add the statistics up.",
        )
        count, length = self.input_ids.shape
        self.every, self.needs = check_count("every", every, 1, length), needs_of((), needs)
        self.batch_size, sample = check_count("batch_size", batch_size, 1), check_count("sample", sample, 1)
        names = ["all"] * count if domains is None else [str(name) for name in domains]
        require(
            len(names) == count,
            f'The "domains" argument must name a domain for each of the {count} sequences; got {len(names)}.',
        )
        self.domains = list(dict.fromkeys(names))
        self.of_sequence = [self.domains.index(name) for name in names]
        rows = self.input_ids if self.real is None else map(torch.masked_select, self.input_ids, self.real)
        self.hashes = statistics.sequence_hashes(rows)
        self.sampled, self.applied = None, self.real
        if "sample" in self.needs:
            chosen = statistics.sample_of(self.hashes, length, sample, self.real)
            self.sampled = torch.cat([chosen, torch.tensor(self.of_sequence)[chosen[:, :1]]], 1)
        if self.every > 1:
            shifts = torch.tensor([[int(name, 16) % self.every] for name in self.hashes])
            every = (torch.arange(length) + shifts) % self.every == 0
            self.applied = every if self.real is None else every & self.real
        self.starts = self.ranks.share(list(range(0, count, self.batch_size)))

    @contextlib.contextmanager
    def collecting(self, layers):
        """Collectors hooked to layers for the block."""
        collectors = [_Collector(layer, self) for layer in layers]
        with contextlib.ExitStack() as hooks:
            for collector in collectors:
                for hook in collector.layer.add_hooks(collector.take_router, collector.take_experts):
                    hooks.enter_context(hook)
            yield collectors

    def begin(self, collectors, start: int) -> torch.Tensor:
        """Ids of the batch that starts at a sequence, after telling the collectors whose tokens will come."""
        batch = slice(start, start + self.batch_size)
        for collector in collectors:
            collector.batch = batch
        return self.input_ids[batch]

    def run(self, model, collectors, start: int, device) -> int:
        """Send the batch that starts at a sequence through a model; returns the size of the batch."""
        rows, options = self.begin(collectors, start), forward_options(model)
        if not hasattr(model, "get_input_embeddings"):  # a module that is not of transformers
            model(rows.to(device))
            return rows.numel()
        if self.real is not None:
            options["attention_mask"] = self.real[start : start + self.batch_size].long().to(device)
        model(input_ids=rows.to(device), use_cache=False, **options)
        return rows.numel()

    def bar(self, progress: bool):
        """Progress bar over this rank's tokens."""
        total = sum(self.input_ids[start : start + self.batch_size].numel() for start in self.starts)
        shown = progress and self.ranks.rank() == 0
        return tqdm(total=total, desc="capture", unit="token", unit_scale=True, disable=not shown or None)

    def finished(self, collectors) -> dict:
        """LayerStatistics of the collectors over all ranks, by layer name."""
        return {collector.layer.name: collector.finish() for collector in collectors}

    def own_sample(self) -> torch.Tensor:
        """Indices of this rank's tokens among the sampled ones, in the order in which collectors see them."""
        batch = self.sampled[:, 0] // self.batch_size
        order = torch.argsort(batch, stable=True)
        return order[torch.isin(batch[order], torch.tensor(self.starts) // self.batch_size)]

    def statistics(self, model, by_layer: dict) -> Statistics:
        """Statistics of a model from LayerStatistics by layer name."""
        layers = find_moe_layers(model)
        record = {
            "name": getattr(model, "name_or_path", "") or type(model).__name__,
            "class": type(model).__name__,
            "hash": model_hash(model),
            "layers": {
                layer.name: {"top_k": layer.top_k, "router_groups": layer.router_groups, "width": layer.width}
                for layer in layers
            },
        }
        record |= {"every": self.every} if self.every > 1 else {}
        by_layer = {layer.name: by_layer[layer.name] for layer in layers}
        return Statistics(by_layer, self.domains, record, self.hashes, self.sampled)


class _Collector:
    """Adds up one layer's statistics from what reaches its router and experts of the source's ``batch``."""

    def __init__(self, layer, source):
        self.layer, self.source, self.needs, self.device = layer, source, set(source.needs), layer.device
        self.batch, self.logits, self.scoring, self.sampled = slice(None), None, None, []
        # In one order on every rank, as the ranks add them up one after another.
        keys = ["applied", *(key for need in NEEDS if need in {"usage", *self.needs} for key in NEEDS[need])]
        counts = ("tokens", "applied", "usage_count")
        # Where outputs are affine in activations, those are summed: their mean gives the mean output.
        size = layer.width if layer.affine else layer.hidden_size
        inner = dict.fromkeys(("logit_gram", *NEEDS["grams"]), [layer.num_experts] * 2)
        inner |= {"tokens": [], "applied": [], "output_sum": [layer.num_experts, size]}
        shapes = {key: (len(source.domains), *inner.get(key, [layer.num_experts])) for key in keys}
        self.totals = {key: self._zeros(*shape, whole=key in counts) for key, shape in shapes.items()}

    def _zeros(self, *shape, whole=False):
        return torch.zeros(*shape, dtype=torch.int64 if whole else torch.float64, device=self.device)

    def _add(self, place, **sums):
        """Add to the totals of a domain, or of a domain and an expert."""
        for key, value in sums.items():
            self.totals[key][place] += value

    def take_router(self, module, inputs, output):
        """Forward hook of the router."""
        experts = self.layer.num_experts
        self.logits = router_logits(output, experts, self.layer.extra).double()
        for domain, rows in self._by_domain(len(self.logits), self.logits.device, self.source.real):
            logits = self.logits[rows, :experts]
            self._add(domain, logit_gram=logits.T @ logits)

    def take_experts(self, module, inputs, keywords):
        """Forward pre-hook of the experts: tokens [T, D], chosen experts [T, k] and their weights [T, k]."""
        tokens, index, weight = [*inputs, *keywords.values()][:3]
        tokens, experts = tokens.reshape(-1, tokens.shape[-1]), self.layer.num_experts
        index, weight = index.reshape(len(tokens), -1), weight.reshape(len(tokens), -1).double()
        # An expert without weights counts as none: its choice becomes one of weight zero.
        weight, index = weight.masked_fill(index >= experts, 0), index.clamp(max=experts - 1)
        gates = self._zeros(len(tokens), experts).scatter_add_(1, index, weight)
        for domain, rows in self._by_domain(len(tokens), tokens.device, self.source.real):
            gate = gates[rows]
            self._add(domain, tokens=len(gate), routing_mass=gate.sum(0))
            chosen = (weight[rows] != 0).long()  # some routers send a skipped token to expert 0 with weight 0
            self.totals["usage_count"][domain].index_add_(0, index[rows].flatten(), chosen.flatten())
            if self.logits is not None:
                logits = self.logits[rows]
                self.scoring = self.scoring or scoring_of(logits, index[rows], weight[rows])
                scores = logits.softmax(1) if self.scoring == "softmax" else logits.sigmoid()
                self._add(domain, score_mass=scores.sum(0)[:experts])
        if self.needs & {"outputs", "norms", "grams"}:
            for domain, rows in self._by_domain(len(tokens), tokens.device, self.source.applied):
                self._apply(domain, tokens[rows], gates[rows])
        if "sample" in self.needs:
            self._add_sample(tokens, index, weight)

    def _apply(self, domain, tokens, gates):
        """Apply the experts to tokens ``[T, D]`` with gates ``[T, E]``, a chunk at a time."""
        self._add(domain, applied=len(tokens))
        size = CHUNK[_kind(tokens)]
        if "grams" in self.needs:
            size = max(1, min(size, DENSE[_kind(tokens)] // (self.layer.num_experts * tokens.shape[1])))
        for chunk in zip(tokens.split(size), gates.split(size), strict=True):
            self._add_outputs(domain, *chunk)

    def _add_outputs(self, domain, tokens, gates):
        """Apply every expert to all tokens if sums over all tokens are wanted, else to those routed to it."""
        layer, norms, grams = self.layer, "norms" in self.needs, "grams" in self.needs
        if layer.affine and not (norms or grams):
            self._add(domain, output_sum=layer.hidden_sums(tokens))
            return
        everywhere = bool(self.needs & {"outputs", "grams"})
        # Where the mean output follows from the mean activation, only routed tokens need the down projection.
        whole, outputs = grams or not everywhere or not layer.affine, []
        for expert, rows in enumerate(_routed(gates)):
            hidden = layer.expert_hidden(expert, tokens if everywhere else tokens[rows])
            output = layer.expert_output(expert, hidden if whole else hidden[rows])
            if "outputs" in self.needs:
                values = hidden if layer.affine else output
                self._add((domain, expert), output_sum=values.sum(0, dtype=torch.float64))
            if norms and len(rows):
                own = output[rows] if whole and everywhere else output
                self._add_norms((domain, expert), own, gates[rows, expert])
            if grams:
                outputs.append(output)
        if grams:
            self._add_grams(domain, outputs, gates)

    def _add_norms(self, place, output, gate):
        norm = output.double().norm(dim=1)
        self._add(place, norm_sum=norm.sum(), gated_norm_sum=gate @ norm)
        self.totals["output_max"][place].clamp_(min=output.abs().max().double())

    def _add_grams(self, domain, outputs, gates):
        """Inner products of all pairs of experts' outputs, ``E × [T, D]``, per token and summed."""
        size = max(1, PAIRED[_kind(gates)] // (len(outputs) * outputs[0].shape[1]))
        for *chunks, gate in zip(*(output.split(size) for output in outputs), gates.split(size), strict=True):
            flat = torch.stack(chunks, 1).double()
            gram = flat @ flat.mT  # [t, E, E]
            square = gram.diagonal(dim1=1, dim2=2)
            inverse = 1 / square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
            self._add(
                domain,
                output_gram=gram.sum(0),
                routed_gram=(gram * gate[..., None]).sum(0),
                routed_square=gate.T @ square,
                cosine_sum=gram.mul_(inverse[..., None]).mul_(inverse[:, None]).sum(0),
            )

    def _add_sample(self, tokens, index, weight):
        experts, sequences = self.layer.num_experts, len(self.source.of_sequence[self.batch])
        length = len(tokens) // sequences
        places = self.source.sampled[:, :2] - torch.tensor([self.batch.start, 0])
        places = places[(places[:, 0] >= 0) & (places[:, 0] < sequences)]
        rows = (places @ torch.tensor([length, 1])).to(tokens.device)
        complete = length * sequences == len(tokens) and bool((rows < len(tokens)).all())
        self._require(complete, "without the sample")
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        missing = torch.full((len(tokens), experts), torch.nan)
        logits = (missing if self.logits is None else self.logits[:, :experts]).to(tokens.device)
        columns = (tokens[rows], logits[rows].to(wide), index[rows], weight[rows].to(wide))
        self.sampled.append([column.detach().cpu() for column in columns])

    def _by_domain(self, count, device, wanted):
        """Domains of a batch of ``count`` tokens, each with its rows; with a mask ``[N, S]``, only those."""
        of_sequence = self.source.of_sequence[self.batch]
        domains, sequences = sorted(set(of_sequence)), len(of_sequence)
        wanted = None if wanted is None else wanted[self.batch].flatten()
        self._require(wanted is None or len(wanted) == count, "with every=1 and without padding")
        if len(domains) == 1 and wanted is None:
            return [(domains[0], slice(None))]
        self._require(count % sequences == 0, "without domains, or with batch_size=1")
        of_token = torch.tensor(of_sequence).repeat_interleave(count // sequences)
        of_token = of_token if wanted is None else of_token.where(wanted, -1)
        return [(domain, (of_token == domain).nonzero()[:, 0].to(device)) for domain in domains]

    def _require(self, complete, remedy):
        require(complete, f"{self.layer.name} does not get every token of a sequence; capture {remedy}.")

    @torch.no_grad()
    def finish(self) -> LayerStatistics:
        """The sums over all ranks."""
        ranks, layer = self.source.ranks, self.layer
        require(
            self.totals["tokens"].sum() > 0,
            f"{layer.name} was never called. Kernels that replace the whole MoE block and models "
            "compiled before the capture hide it: load with use_kernels=False and do not compile.",
        )
        totals = {key: ranks.total(value, largest=key == "output_max") for key, value in self.totals.items()}
        tokens = totals["tokens"]
        # Where experts were applied to every n-th token, sums become estimates of those over all.
        share = tokens.double() / totals.pop("applied").clamp(min=1)
        for key in totals.keys() & {"norm_sum", "gated_norm_sum", *NEEDS["grams"], "output_sum"}:
            totals[key] *= share.reshape(-1, *[1] * (totals[key].ndim - 1))
        if "outputs" in self.needs and layer.affine:
            # mean_t W_down h_t = W_down mean_t h_t
            means = totals["output_sum"] / tokens.clamp(min=1)[:, None, None]
            down = torch.stack([layer.down_project(mean) for mean in means])
            totals["output_sum"] = down * tokens[:, None, None]
        if self.logits is None:
            totals |= {key: totals[key].fill_(torch.nan) for key in ("logit_gram", "score_mass")}
        summed = totals.keys() & {"output_sum", "norm_sum", "output_gram"}
        require(
            all(totals[key].isfinite().all() for key in summed),
            f"{layer.name}: an expert's outputs are not finite on these tokens; the checkpoint is "
            "damaged, or its dtype overflows: load it with another dtype.",
        )
        sums = {key: value.cpu() for key, value in totals.items()}
        if "sample" in self.needs:
            rows, size = self.source.own_sample(), len(self.source.sampled)
            columns = zip(*self.sampled, strict=True)
            sums["sample"] = LayerSample(*(_gathered(torch.cat(c), rows, size, ranks) for c in columns))
        return LayerStatistics(**sums)


def _kind(tensor):
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def _routed(gates):
    """Tokens routed to each expert by gates ``[T, E]``; copied to the host once, not expert by expert."""
    expert, rows = gates.T.nonzero(as_tuple=True)
    return rows.split(torch.bincount(expert, minlength=gates.shape[1]).tolist())


def _gathered(values, rows, size, ranks):
    """Rows of all ranks, each at its place among ``size``; added as bytes, which preserves every bit."""
    whole = torch.zeros(size, *values.shape[1:], dtype=values.dtype)
    whole[rows] = values
    return ranks.total(whole.view(torch.uint8)).view(values.dtype)


def scoring_of(logits, index, weight) -> str:
    """How a router scores experts, "softmax" or "sigmoid" of its logits, inferred from the weights it gave.

    The ratios of a token's weights ``(T, k)`` are those of its scores, whatever is normalised or scaled
    afterwards; a router that chooses one expert shows its score itself.
    """
    log_scores = {"softmax": logits.log_softmax(1), "sigmoid": logsigmoid(logits)}

    def error(name):
        gap = log_scores[name].gather(1, index) - weight.abs().clamp(min=1e-30).log()
        if index.shape[1] > 1:
            gap = gap - gap.mean(1, keepdim=True)
        return float(gap[(weight != 0).all(1)].abs().mean().nan_to_num())

    return min(log_scores, key=error)


def forward_options(model) -> dict:
    """Arguments that spare a model the logits of all tokens but one, where its forward takes them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def device_of(model) -> torch.device:
    """Where a model takes its ids, be it of transformers or not."""
    return getattr(model, "device", None) or next(model.parameters()).device


def without_padding(input_ids) -> tuple:
    """Token ids ``[N, S]`` of whatever :func:`capture` takes, and which are no padding, or None if none is.

    What is padded is padded on the right, so that tokens are where they are without padding.
    """
    if torch.is_tensor(input_ids):
        return input_ids, None
    rows = [row for row in _sequences(input_ids) if len(row)]
    require(rows, _ALLOWED.format("something without any"))
    real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    return pad_sequence(rows, batch_first=True), None if real.all() else real


_ALLOWED = (
    'The "input_ids" argument must be a tensor of token ids [sequences, length], what a tokenizer gives, or '
    'an iterable of such, as a DataLoader or a dataset with "input_ids"; not {}. Encode text first: '
    "tokenizer(texts)."
)


def _sequences(given) -> Iterator[torch.Tensor]:
    """Sequences of token ids ``[S]`` in what was given, without what an attention mask leaves out."""
    if isinstance(given, Mapping):
        require("input_ids" in given, _ALLOWED.format(f"a mapping of {', '.join(map(str, given))}"))
        rows, mask = _rows(given["input_ids"]), given.get("attention_mask")
        masks = [torch.ones_like(row) for row in rows] if mask is None else _rows(mask)
        fits = [len(row) for row in rows] == [len(mask) for mask in masks]
        require(fits, 'The "attention_mask" must have the shape of the "input_ids".')
        yield from (row[mask.bool()] for row, mask in zip(rows, masks, strict=True))
    elif isinstance(given, torch.Tensor | np.ndarray):
        yield from _rows(given)
    else:
        iterable = isinstance(given, Iterable) and not isinstance(given, str | bytes)
        require(iterable, _ALLOWED.format(repr(given)[:80]))
        for batch in given:
            several = isinstance(batch, list | tuple) and len(batch) > 1 and torch.is_tensor(batch[0])
            require(not several, _ALLOWED.format("batches of several tensors; name them in a dict"))
            yield from _sequences(batch)


def _rows(values) -> list:
    """Rows ``[S]`` of a tensor ``[S]`` or ``[B, S]``, of a list of numbers, or of a list of any of these."""
    known = isinstance(values, list | tuple | torch.Tensor | np.ndarray)
    require(known, _ALLOWED.format(f"{repr(values)[:80]} as ids"))
    if isinstance(values, list | tuple) and not (values and isinstance(values[0], Integral)):
        return [row for value in values for row in _rows(value)]
    tensor = torch.as_tensor(values).cpu()
    require(tensor.ndim in (1, 2), _ALLOWED.format(f"a tensor of shape {tuple(tensor.shape)}"))
    return list(tensor if tensor.ndim == 2 else tensor[None])


def check_tokens(input_ids, model) -> torch.Tensor:
    """Token ids ``[N, S]`` as int64 on the CPU; InputError unless they are of the model's vocabulary."""
    tensor = torch.is_tensor(input_ids)
    shape = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}" if tensor else type(input_ids)
    require(
        tensor and input_ids.ndim == 2 and not input_ids.is_floating_point() and input_ids.numel(),
        f'The "input_ids" argument must be a tensor of token ids [sequences, length]; not {shape}.',
    )
    input_ids = input_ids.to("cpu", torch.int64).contiguous()
    if not hasattr(model, "get_input_embeddings"):
        return input_ids
    size = model.get_input_embeddings().num_embeddings
    low, high = int(input_ids.min()), int(input_ids.max())
    require(
        low >= 0 and high < size,
        f'The "input_ids" argument holds ids from {low} to {high}, but the model\'s vocabulary has ids from '
        f"0 to {size - 1}; encode the text with the model's own tokenizer.",
    )
    return input_ids
