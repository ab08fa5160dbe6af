"""One pass over the calibration tokens gives the statistics that plans and merges are made from.

Hooks on each MoE layer see the hidden states [T, D] that enter its experts, the experts [T, k] that the
router chose, and their weights [T, k]. All E experts are applied to all tokens; sums are float64.
"""

import contextlib
import inspect
from types import SimpleNamespace

import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import check_choice, check_count, require
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.moe import check_loaded, router_logits
from hcsmoe_core.statistics import (
    NEEDS,
    SAMPLE,
    LayerSample,
    LayerStatistics,
    Statistics,
    sample_of,
    sequence_hashes,
)
from hcsmoe_core.steps import METHODS

# Tokens that an expert is applied to at once: what stays in a CPU's caches, and what fills a GPU.
CHUNK = {"cpu": 512, "cuda": 8192}
# Numbers of all experts' outputs in memory at once, where pairs of experts are compared; small ones leave a
# GPU idle.
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
    for need in needs:
        check_choice("needs", need, tuple(NEEDS))
    return tuple(need for need in NEEDS if need in needs)


def capture(
    model,
    input_ids,
    *,
    methods=("hc-smoe",),
    needs=None,
    sample: int = SAMPLE,
    every: int = 1,
    batch_size: int = 8,
    domains=None,
    ranks=None,
    progress: bool = True,
) -> Statistics:
    """Statistics of every MoE layer over the calibration tokens, in one pass at the model's own routing.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With its weights in memory, and not merged.
    input_ids : (N, S) int64 tensor
        Calibration sequences without padding: :func:`hcsmoe_core.calibration_tokens`.
    methods : sequence of str
        Methods to plan by later; what they need is collected. The default serves every similarity and linkage
        of the HC-SMoE paper.
    needs : sequence of str, optional
        Names of :data:`hcsmoe_core.statistics.NEEDS` to collect instead; ``"usage"`` always is.
    sample : int
        Tokens in the sample of layer inputs, where one is collected.
    every : int
        Apply the experts to every n-th token only, n ≤ S: outputs, norms and Gram matrices are then estimates
        of sums over all tokens. Usage and sample are of all tokens.
    batch_size : int
        Sequences per forward pass.
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
    was_training = model.training
    try:
        with tokens.collecting(layers) as collectors, torch.no_grad(), tokens.bar(progress) as bar:
            for start in tokens.starts:
                rows = tokens.begin(collectors, start)
                model.eval()(input_ids=rows.to(model.device), use_cache=False, **forward_options(model))
                bar.update(rows.numel())
    finally:
        model.train(was_training)
    return tokens.statistics(model, tokens.finished(collectors))


class Tokens:
    """Calibration sequences in batches, some of which are this rank's; parameters as for :func:`capture`.

    Attributes
    ----------
    starts : list of int
        First sequence of each batch of this rank.
    """

    def __init__(self, model, input_ids, *, needs, sample, batch_size, domains, every=1, ranks=None):
        self.input_ids, self.ranks = check_tokens(input_ids, model), ranks or ONE_PROCESS
        count, length = self.input_ids.shape
        self.every = check_count("every", every, 1, length)
        self.batch_size, sample = check_count("batch_size", batch_size, 1), check_count("sample", sample, 1)
        self.needs = needs_of((), needs)
        names = ["all"] * count if domains is None else [str(name) for name in domains]
        require(
            len(names) == count,
            f'The "domains" argument must name a domain for each of the {count} sequences; got {len(names)}.',
        )
        self.domains = list(dict.fromkeys(names))
        self.of_sequence = [self.domains.index(name) for name in names]
        self.hashes = sequence_hashes(self.input_ids)
        sampled = "sample" in self.needs
        self.chosen = sample_of(self.hashes, length, sample) if sampled else torch.empty(0, 2).long()
        self.starts = self.ranks.share(list(range(0, count, self.batch_size)))

    @contextlib.contextmanager
    def collecting(self, layers):
        """Collectors hooked to layers for the block."""
        collectors = [_Collector(layer, len(self.domains), self.needs) for layer in layers]
        handles = []
        try:
            for collector in collectors:
                handles += collector.layer.add_hooks(collector.take_router, collector.restore_experts)
            yield collectors
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, collectors, start: int) -> torch.Tensor:
        """Ids of the batch that starts at a sequence, after telling the collectors whose tokens will come."""
        stop, applied = start + self.batch_size, None
        if self.every > 1:
            shifts = torch.tensor([int(name, 16) % self.every for name in self.hashes[start:stop]])
            position = torch.arange(self.input_ids.shape[1]) + shifts[:, None]
            applied = (position % self.every == 0).flatten()
        rows = self.chosen[(self.chosen[:, 0] >= start) & (self.chosen[:, 0] < stop)]
        for collector in collectors:
            collector.batch_applied = applied
            collector.batch_domains = self.of_sequence[start:stop]
            collector.batch_rows = rows - torch.tensor([start, 0])
        return self.input_ids[start:stop]

    def bar(self, progress: bool):
        """Progress bar over this rank's tokens."""
        total = sum(self.input_ids[start : start + self.batch_size].numel() for start in self.starts)
        hidden = None if progress and self.ranks.rank() == 0 else True
        return tqdm(total=total, desc="capture", unit="token", unit_scale=True, disable=hidden)

    def finished(self, collectors) -> dict:
        """LayerStatistics of the collectors over all ranks, by layer name."""
        batch = self.chosen[:, 0] // self.batch_size
        by_batch = torch.argsort(batch, stable=True)  # the order in which the collectors saw the sample
        own = torch.isin(batch[by_batch], torch.tensor(self.starts) // self.batch_size)
        return {c.layer.name: c.finish(by_batch[own], len(self.chosen), self.ranks) for c in collectors}

    def statistics(self, model, by_layer: dict) -> Statistics:
        """Statistics of a model from LayerStatistics by layer name."""
        layers = find_moe_layers(model)
        record = {
            "name": model.name_or_path or type(model).__name__,
            "class": type(model).__name__,
            "hash": model_hash(model),
            "layers": {
                layer.name: {"top_k": layer.top_k, "router_groups": layer.router_groups, "width": layer.width}
                for layer in layers
            },
        }
        if self.every > 1:
            record["every"] = self.every
        by_layer = {layer.name: by_layer[layer.name] for layer in layers}
        return Statistics(by_layer, self.domains, record, self.hashes, self.sampled)

    @property
    def sampled(self):
        """Sequence, position and domain of each sampled token, ``(R, 3)`` int64; None without a sample."""
        if "sample" not in self.needs:
            return None
        return torch.cat([self.chosen, torch.tensor(self.of_sequence)[self.chosen[:, :1]]], 1)


class _Collector:
    """Adds up one layer's statistics from what reaches its router and its experts."""

    def __init__(self, layer, domains, needs):
        self.layer, self.needs, self.device = layer, set(needs), layer.device
        experts, matrices = layer.num_experts, {"logit_gram", *NEEDS["grams"]}
        self.totals = {key: torch.zeros(domains, dtype=torch.int64) for key in ("tokens", "applied")}
        self.totals["usage_count"] = self._zeros(domains, experts, dtype=torch.int64)
        wanted = [need for need in ("norms", "grams") if need in self.needs]
        for key in (*NEEDS["usage"][2:], *(key for need in wanted for key in NEEDS[need])):
            self.totals[key] = self._zeros(domains, experts, *([experts] if key in matrices else []))
        if "outputs" in self.needs:  # of activations, where outputs are affine in them
            size = layer.width if layer.affine else layer.hidden_size
            self.totals["output_sum"] = self._zeros(domains, experts, size)
        self.batch_domains = self.batch_rows = self.batch_applied = None
        self.logits, self.scoring, self.sampled = None, None, []

    def _zeros(self, *shape, dtype=torch.float64):
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def take_router(self, module, inputs, output):
        """Forward hook of the router."""
        experts = self.layer.num_experts
        self.logits = router_logits(output, experts, self.layer.extra).double()
        for domain, rows in self._by_domain(len(self.logits), self.logits.device):
            logits = self.logits[rows, :experts]
            self.totals["logit_gram"][domain] += logits.T @ logits

    def restore_experts(self, module, inputs, keywords):
        """Forward pre-hook of the experts: tokens [T, D], chosen experts [T, k] and their weights [T, k]."""
        tokens, index, weight = [*inputs, *keywords.values()][:3]
        tokens = tokens.reshape(-1, tokens.shape[-1])
        index, weight = index.reshape(len(tokens), -1), weight.reshape(len(tokens), -1).double()
        # An expert without weights counts as none: its choice becomes one of weight zero.
        weight = weight.masked_fill(index >= self.layer.num_experts, 0)
        index = index.clamp(max=self.layer.num_experts - 1)
        gates = self._zeros(len(tokens), self.layer.num_experts).scatter_add_(1, index, weight)
        for domain, rows in self._by_domain(len(tokens), tokens.device):
            gate = gates[rows]
            self.totals["tokens"][domain] += len(gate)
            self.totals["routing_mass"][domain] += gate.sum(0)
            chosen = (weight[rows] != 0).long()  # some routers send a skipped token to expert 0 with weight 0
            self.totals["usage_count"][domain].index_add_(0, index[rows].flatten(), chosen.flatten())
            if self.logits is not None:
                self._add_scores(domain, self.logits[rows], index[rows], weight[rows])
        if self.needs & {"outputs", "norms", "grams"}:
            for domain, rows in self._by_domain(len(tokens), tokens.device, self.batch_applied):
                self._apply(domain, tokens[rows], gates[rows])
        if "sample" in self.needs:
            self._add_sample(tokens, index, weight)

    def _add_scores(self, domain, logits, index, weight):
        if self.scoring is None:
            self.scoring = scoring_of(logits, index, weight)
        scores = logits.softmax(1) if self.scoring == "softmax" else logits.sigmoid()
        self.totals["score_mass"][domain] += scores.sum(0)[: self.layer.num_experts]

    def _apply(self, domain, tokens, gates):
        """Apply the experts to tokens ``[T, D]`` with gates ``[T, E]``, a chunk at a time."""
        self.totals["applied"][domain] += len(tokens)
        size = CHUNK[_kind(tokens)]
        if "grams" in self.needs:
            size = max(1, min(size, DENSE[_kind(tokens)] // (self.layer.num_experts * tokens.shape[1])))
        for chunk in zip(tokens.split(size), gates.split(size), strict=True):
            self._add_outputs(domain, *chunk)

    def _add_outputs(self, domain, tokens, gates):
        """Apply every expert to all tokens if sums over all tokens are wanted, else to those routed to it."""
        layer, norms, grams = self.layer, "norms" in self.needs, "grams" in self.needs
        if layer.affine and not (norms or grams):
            self.totals["output_sum"][domain] += layer.hidden_sums(tokens)
            return
        everywhere = bool(self.needs & {"outputs", "grams"})
        # Where the mean output follows from the mean activation, only routed tokens need the down projection.
        whole = grams or not everywhere or not layer.affine
        routed = _routed(gates) if norms else [None] * layer.num_experts
        sums, outputs = [], []
        for expert, rows in enumerate(routed):
            hidden = layer.expert_hidden(expert, tokens if everywhere else tokens[rows])
            output = layer.expert_output(expert, hidden if whole else hidden[rows])
            if "outputs" in self.needs:
                sums.append((hidden if layer.affine else output).sum(0, dtype=torch.float64))
            if rows is not None and len(rows):
                own = output[rows] if whole and everywhere else output
                self._add_norms(domain, expert, own, gates[rows, expert])
            if grams:
                outputs.append(output)
        if "outputs" in self.needs:
            self.totals["output_sum"][domain] += torch.stack(sums)
        if grams:
            self._add_grams(domain, outputs, gates)

    def _add_norms(self, domain, expert, output, gate):
        norm = output.double().norm(dim=1)
        self.totals["norm_sum"][domain, expert] += norm.sum()
        self.totals["gated_norm_sum"][domain, expert] += gate @ norm
        largest = self.totals["output_max"][domain]
        largest[expert] = torch.maximum(largest[expert], output.abs().max().double())

    def _add_grams(self, domain, outputs, gates):
        """Inner products of all pairs of experts' outputs, ``E × [T, D]``, per token and summed."""
        size = max(1, PAIRED[_kind(gates)] // (len(outputs) * outputs[0].shape[1]))
        for *chunks, gate in zip(*(output.split(size) for output in outputs), gates.split(size), strict=True):
            flat = torch.stack(chunks, 1).double()
            gram = flat @ flat.mT  # [t, E, E]
            square = gram.diagonal(dim1=1, dim2=2)
            inverse = 1 / square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
            self.totals["output_gram"][domain] += gram.sum(0)
            self.totals["routed_gram"][domain] += (gram * gate[..., None]).sum(0)
            self.totals["routed_square"][domain] += gate.T @ square
            self.totals["cosine_sum"][domain] += gram.mul_(inverse[..., None]).mul_(inverse[:, None]).sum(0)

    def _add_sample(self, tokens, index, weight):
        sequences, experts = len(self.batch_domains), self.layer.num_experts
        length = len(tokens) // sequences
        rows = self.batch_rows[:, 0] * length + self.batch_rows[:, 1]
        complete = length * sequences == len(tokens) and (not len(rows) or int(rows.max()) < len(tokens))
        self._require(complete, "without the sample")
        rows = rows.to(tokens.device)
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        missing = self._zeros(len(tokens), experts).fill_(torch.nan)
        logits = missing if self.logits is None else self.logits[:, :experts].to(tokens.device)
        chosen = (tokens[rows], logits[rows].to(wide), index[rows], weight[rows].to(wide))
        self.sampled.append([column.detach().cpu() for column in chosen])

    def _by_domain(self, count, device, applied=None):
        """Domains of a batch of ``count`` tokens, each with its rows, of which only those ``applied``."""
        domains, sequences = sorted(set(self.batch_domains)), len(self.batch_domains)
        self._require(applied is None or len(applied) == count, "with every=1")
        if len(domains) == 1 and applied is None:
            return [(domains[0], slice(None))]
        self._require(count % sequences == 0, "without domains, or with batch_size=1")
        of_token = torch.tensor(self.batch_domains).repeat_interleave(count // sequences)
        wanted = torch.ones(count, dtype=torch.bool) if applied is None else applied
        return [(d, ((of_token == d) & wanted).nonzero()[:, 0].to(device)) for d in domains]

    def _require(self, complete, remedy):
        require(complete, f"{self.layer.name} does not get every token of a sequence; capture {remedy}.")

    @torch.no_grad()
    def finish(self, rows, size, ranks=ONE_PROCESS) -> LayerStatistics:
        """The sums over all ranks; this rank saw ``rows`` of the ``size`` tokens of the sample."""
        require(
            int(self.totals["tokens"].sum()),
            f"{self.layer.name} was never called. Kernels that replace the whole MoE block and models "
            "compiled before the capture hide it: load with use_kernels=False and do not compile.",
        )
        totals = {key: ranks.total(value, largest=key == "output_max") for key, value in self.totals.items()}
        tokens, applied = totals["tokens"], totals.pop("applied")
        if not torch.equal(applied, tokens):  # sums over every n-th token become estimates of those over all
            share = (tokens.double() / applied.clamp(min=1)).to(self.device)
            for key in totals.keys() & {"norm_sum", "gated_norm_sum", *NEEDS["grams"], "output_sum"}:
                totals[key] *= share.reshape(-1, *[1] * (totals[key].ndim - 1))
        if "outputs" in self.needs and self.layer.affine:
            # mean_t W_down h_t = W_down mean_t h_t
            count = tokens.to(self.device)[:, None, None]
            means = totals["output_sum"] / count.clamp(min=1)
            totals["output_sum"] = torch.stack([self.layer.down_project(mean) for mean in means]) * count
        if self.logits is None:
            totals["logit_gram"].fill_(torch.nan)
            totals["score_mass"].fill_(torch.nan)
        for key in totals.keys() & {"output_sum", "norm_sum", "output_gram"}:
            require(
                torch.isfinite(totals[key]).all(),
                f"{self.layer.name}: an expert's outputs are not finite on these tokens; the checkpoint is "
                "damaged, or its dtype overflows: load it with another dtype.",
            )
        sample = None
        if "sample" in self.needs:
            columns = (torch.cat(chunks) for chunks in zip(*self.sampled, strict=True))
            sample = LayerSample(*(_gathered(column, rows, size, ranks) for column in columns))
        return LayerStatistics(**{key: value.cpu() for key, value in totals.items()}, sample=sample)


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

    The ratios of a token's weights are those of its scores, whatever is normalised or scaled afterwards; a
    router that chooses one expert shows its score itself.

    Parameters
    ----------
    logits : (T, E) tensor
    index, weight : (T, k) tensor
    """
    errors = {}
    log_scores = {"softmax": logits.log_softmax(1), "sigmoid": torch.nn.functional.logsigmoid(logits)}
    for name, score in log_scores.items():
        gap = score.gather(1, index) - weight.abs().clamp(min=1e-30).log()
        if index.shape[1] > 1:
            gap = gap - gap.mean(1, keepdim=True)
        errors[name] = float(gap[(weight != 0).all(1)].abs().mean().nan_to_num())
    return min(errors, key=errors.get)


def forward_options(model) -> dict:
    """Arguments that spare a model the logits of all tokens but one, where its forward takes them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def expected_bytes(model, needs, *, domains: int, tokens: int, sample: int = SAMPLE) -> int:
    """Bytes of the statistics file that a capture on a model would give."""
    rows = min(sample, tokens) if "sample" in needs else 0
    total = rows * 24
    for layer in find_moe_layers(model):
        experts, hidden, k = layer.num_experts, layer.hidden_size, layer.top_k or layer.num_experts
        numbers = {"usage": 1 + 3 * experts + experts**2, "norms": 3 * experts, "grams": 4 * experts**2}
        numbers |= {"outputs": experts * hidden, "sample": 0}
        total += 8 * domains * sum(numbers[need] for need in needs)
        total += rows * (hidden * layer.tensors()["down_proj"].element_size() + 4 * experts + 12 * k)
    return total


def check_tokens(input_ids, model) -> torch.Tensor:
    """Token ids ``[N, S]`` as int64 on the CPU; InputError unless they are of the model's vocabulary."""
    tensor = torch.is_tensor(input_ids)
    shape = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}" if tensor else type(input_ids)
    require(
        tensor and input_ids.ndim == 2 and not input_ids.is_floating_point() and input_ids.numel(),
        f'The "input_ids" argument must be a tensor of token ids [sequences, length]; not {shape}.',
    )
    input_ids = input_ids.to("cpu", torch.int64).contiguous()
    size = model.get_input_embeddings().num_embeddings
    low, high = int(input_ids.min()), int(input_ids.max())
    require(
        low >= 0 and high < size,
        f'The "input_ids" argument holds ids from {low} to {high}, but the model\'s vocabulary has ids from '
        f"0 to {size - 1}; encode the text with the model's own tokenizer.",
    )
    return input_ids
