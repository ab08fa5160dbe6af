"""One pass over the calibration tokens gives the statistics that every similarity and every plan is made from."""

import contextlib
import inspect

import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import InputError, check_choice, check_count
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.moe import check_loaded, router_logits
from hcsmoe_core.scale import ranks
from hcsmoe_core.statistics import (
    DEFAULT_NEEDS,
    NEEDS,
    SAMPLE,
    LayerSample,
    LayerStatistics,
    Statistics,
    estimated_bytes,
    sample_of,
    sequence_hashes,
)

# Tokens that an expert is applied to at once: what stays in a CPU's caches, and what fills a GPU.
CHUNK = {"cpu": 512, "cuda": 8192}


# Where pairs of experts are compared: numbers of all experts' outputs that are held at once, and that are in float64.
DENSE = 1 << 25


PAIRED = {"cpu": 1 << 20, "cuda": 1 << 26}


class _Collector:
    """Adds up one layer's statistics from what reaches its router and its experts."""

    def __init__(self, layer, domains, needs):
        experts = layer.num_experts
        self.layer, self.needs = layer, set(needs)
        self.device = layer.device
        self.tokens = torch.zeros(domains, dtype=torch.int64)
        self.usage_count = self._zeros(domains, experts, dtype=torch.int64)
        self.sums = {key: self._zeros(domains, experts) for key in ("routing_mass", "score_mass")}
        self.sums["logit_gram"] = self._zeros(domains, experts, experts)
        if "norms" in self.needs:
            self.sums |= {key: self._zeros(domains, experts) for key in NEEDS["norms"]}
        if "grams" in self.needs:
            self.sums |= {key: self._zeros(domains, experts, experts) for key in NEEDS["grams"]}
        # [G, E, I], made when the first tokens tell the width; [G, E, D] of outputs where these are not affine in activations
        self.hidden_sum = None
        self.applied = torch.zeros(domains, dtype=torch.int64)  # tokens that the experts were applied to
        self.batch_domains = self.batch_rows = self.batch_applied = None
        self.logits = self.scoring = None
        self.sampled = []

    def _zeros(self, *shape, dtype=torch.float64):
        return torch.zeros(*shape, dtype=dtype, device=self.device)

    def take_router(self, module, inputs, output):
        """Forward hook of the router."""
        experts = self.layer.num_experts
        self.logits = router_logits(output, experts, self.layer.extra).double()
        for domain, rows in self._by_domain(len(self.logits), self.logits.device):
            logits = self.logits[rows, :experts]
            self.sums["logit_gram"][domain] += logits.T @ logits

    def take_experts(self, module, inputs, keywords):
        """Forward pre-hook of the experts: tokens [T, D], index [T, k] and weight [T, k] as they are applied."""
        tokens, index, weight = [*inputs, *keywords.values()][:3]
        tokens = tokens.reshape(-1, tokens.shape[-1])
        index, weight = index.reshape(len(tokens), -1), weight.reshape(len(tokens), -1).double()
        # An expert without weights counts as none: its choice becomes one of weight zero.
        weight = weight.masked_fill(index >= self.layer.num_experts, 0)
        index = index.clamp(max=self.layer.num_experts - 1)
        gates = self._zeros(len(tokens), self.layer.num_experts).scatter_add_(1, index, weight)
        for domain, rows in self._by_domain(len(tokens), tokens.device):
            self._add_usage(domain, index[rows], weight[rows], gates[rows])
            if self.logits is not None:
                self._add_scores(domain, self.logits[rows], index[rows], weight[rows])
        if self.needs & {"outputs", "norms", "grams"}:
            for domain, rows in self._by_domain(len(tokens), tokens.device, self.batch_applied):
                self._apply(domain, tokens[rows], gates[rows])
        if "sample" in self.needs:
            self._keep(tokens, index, weight)

    def _add_usage(self, domain, index, weight, gates):
        self.tokens[domain] += len(gates)
        self.sums["routing_mass"][domain] += gates.sum(0)
        taken = (weight != 0).long()  # some routers send a skipped token to expert 0 with weight zero
        self.usage_count[domain].index_add_(0, index.flatten(), taken.flatten())

    def _apply(self, domain, tokens, gates):
        """Apply the experts to tokens ``[T, D]`` with gates ``[T, E]``, a chunk at a time."""
        self.applied[domain] += len(tokens)
        size = CHUNK[_kind(tokens)]
        if "grams" in self.needs:
            size = max(1, min(size, DENSE // (self.layer.num_experts * tokens.shape[1])))
        for part in zip(tokens.split(size), gates.split(size), strict=True):
            self._add_outputs(domain, *part)

    def _add_outputs(self, domain, tokens, gates):
        """Apply the experts: all of them to all tokens where sums over all tokens are wanted, else to those routed."""
        layer = self.layer
        if layer.affine and not self.needs & {"norms", "grams"}:
            self._add_hidden(domain, layer.hidden_sums(tokens))
            return
        everywhere, grams = bool(self.needs & {"outputs", "grams"}), "grams" in self.needs
        routed = _routed(gates) if "norms" in self.needs else [None] * layer.num_experts
        sums, outputs = [], []
        for expert, rows in enumerate(routed):
            hidden = layer.expert_hidden(expert, tokens if everywhere else tokens[rows])
            # Sums over all tokens need no outputs of all of them where the mean of one is that of the other.
            whole = grams or not everywhere or not layer.affine
            output = layer.expert_output(expert, hidden if whole else hidden[rows])
            if "outputs" in self.needs:
                sums.append((hidden if layer.affine else output).sum(0, dtype=torch.float64))
            if rows is not None and len(rows):
                self._add_norms(
                    domain, expert, output[rows] if whole and everywhere else output, gates[rows, expert]
                )
            if grams:
                outputs.append(output)
        if "outputs" in self.needs:
            self._add_hidden(domain, torch.stack(sums))
        if grams:
            self._add_grams(domain, outputs, gates)

    def _add_hidden(self, domain, sums):
        if self.hidden_sum is None:
            self.hidden_sum = self._zeros(len(self.tokens), *sums.shape)
        self.hidden_sum[domain] += sums

    def _add_norms(self, domain, expert, output, gate):
        norm = output.double().norm(dim=1)
        self.sums["norm_sum"][domain, expert] += norm.sum()
        self.sums["gated_norm_sum"][domain, expert] += gate @ norm
        largest = self.sums["output_max"]
        largest[domain, expert] = torch.maximum(largest[domain, expert], output.abs().max().double())

    def _add_grams(self, domain, outputs, gates):
        """Inner products of all pairs of experts' outputs, ``E × [T, D]``, with gates ``[T, E]``: token by token, summed."""
        size = max(1, PAIRED[_kind(gates)] // (len(outputs) * outputs[0].shape[1]))
        for *parts, gate in zip(*(output.split(size) for output in outputs), gates.split(size), strict=True):
            flat = torch.stack(parts, 1).double()
            gram = flat @ flat.mT  # [t, E, E]
            square = gram.diagonal(dim1=1, dim2=2)
            inverse = 1 / square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)
            self.sums["output_gram"][domain] += gram.sum(0)
            self.sums["routed_gram"][domain] += (gram * gate[..., None]).sum(0)
            self.sums["routed_square"][domain] += gate.T @ square
            self.sums["cosine_sum"][domain] += gram.mul_(inverse[..., None]).mul_(inverse[:, None]).sum(0)

    def _add_scores(self, domain, logits, index, weight):
        if self.scoring is None:
            self.scoring = scoring_of(logits, index, weight)
        scores = logits.softmax(1) if self.scoring == "softmax" else logits.sigmoid()
        self.sums["score_mass"][domain] += scores.sum(0)[: self.layer.num_experts]

    def _keep(self, tokens, index, weight):
        """Rows of the sample in this batch."""
        sequences = len(self.batch_domains)
        length = len(tokens) // sequences
        rows = self.batch_rows[:, 0] * length + self.batch_rows[:, 1]
        if length * sequences != len(tokens) or (len(rows) and int(rows.max()) >= len(tokens)):
            raise InputError(
                f"{self.layer.name} does not get every token of a sequence; capture without the sample."
            )
        rows = rows.to(tokens.device)
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        experts = self.layer.num_experts
        logits = (
            torch.full((len(tokens), experts), torch.nan) if self.logits is None else self.logits[:, :experts]
        )
        parts = (tokens[rows], logits.to(tokens.device)[rows].to(wide), index[rows], weight[rows].to(wide))
        self.sampled.append([part.detach().cpu() for part in parts])

    def _by_domain(self, count, device, chosen=None):
        """Rows of each domain in a batch whose tokens come sequence after sequence, or those of them that are chosen."""
        if chosen is not None and len(chosen) != count:
            raise InputError(
                f"{self.layer.name} does not get every token of a sequence; capture with every=1."
            )
        domains = sorted(set(self.batch_domains))
        if len(domains) == 1 and chosen is None:
            yield domains[0], slice(None)
            return
        of_token = torch.tensor(self.batch_domains).repeat_interleave(count // len(self.batch_domains))
        for domain in domains:
            here = of_token == domain
            yield domain, (here if chosen is None else here & chosen).nonzero()[:, 0].to(device)

    @torch.no_grad()
    def finish(self, places, size):
        """The sums over all ranks, with mean activations projected down: ``mean_t W_down h_t = W_down mean_t h_t``.

        ``places`` are those of the rows that were kept here among the ``size`` tokens of the sample.
        """
        if not int(self.tokens.sum()):
            raise InputError(
                f"{self.layer.name} was never called. Kernels that replace the whole MoE block, and models compiled "
                "before the capture, hide it: load the model with use_kernels=False and do not compile it."
            )
        self._add_ranks()
        self._scale()
        layer, sums = self.layer, dict(self.sums)
        if "outputs" in self.needs:
            counts = self.tokens.clamp(min=1).to(self.device)
            if layer.affine:
                means = self.hidden_sum / counts[:, None, None]
                projected = torch.stack([layer.down_project(m) for m in means])
                sums["output_sum"] = projected * self.tokens.to(self.device)[:, None, None]
            else:
                sums["output_sum"] = self.hidden_sum
        if self.logits is None:
            sums["logit_gram"].fill_(torch.nan)
            sums["score_mass"].fill_(torch.nan)
        seen = [sums[key] for key in ("output_sum", "norm_sum", "output_gram") if key in sums]
        if not all(torch.isfinite(s).all() for s in seen):
            raise InputError(
                f"{layer.name}: an expert's outputs are not finite on these tokens; the checkpoint is damaged, or "
                "its dtype overflows: load it with another dtype."
            )
        sums = {key: value.cpu() for key, value in sums.items()}
        if "sample" in self.needs:
            sums["sample"] = LayerSample(
                *(_placed(torch.cat(c), places, size) for c in zip(*self.sampled, strict=True))
            )
        return LayerStatistics(tokens=self.tokens, usage_count=self.usage_count.cpu(), **sums)

    def _add_ranks(self):
        self.tokens, self.usage_count, self.applied = map(
            ranks.total, (self.tokens, self.usage_count, self.applied)
        )
        self.sums = {key: ranks.total(value, largest=key == "output_max") for key, value in self.sums.items()}
        if self.hidden_sum is not None:
            self.hidden_sum = ranks.total(self.hidden_sum)

    def _scale(self):
        """Sums over the tokens that the experts were applied to become estimates of those over all tokens."""
        if torch.equal(self.applied, self.tokens):
            return
        share = (self.tokens.double() / self.applied.clamp(min=1)).to(self.device)
        for key in ("norm_sum", "gated_norm_sum", *NEEDS["grams"]):
            if key in self.sums:
                self.sums[key] *= share.reshape(-1, *[1] * (self.sums[key].ndim - 1))
        if self.hidden_sum is not None:
            self.hidden_sum *= share[:, None, None]


def _kind(tensor):
    return "cpu" if tensor.device.type == "cpu" else "cuda"


def _routed(gates):
    """Rows that each expert has in gates ``[T, E]``; they come to the host once, and not expert by expert."""
    expert, rows = gates.T.nonzero(as_tuple=True)
    return rows.split(torch.bincount(expert, minlength=gates.shape[1]).tolist())


def _placed(rows, places, size):
    """Rows of all ranks, each in its place among ``size``; bytes are added, so that every bit stays."""
    made = torch.zeros(size, *rows.shape[1:], dtype=rows.dtype)
    made[places] = rows
    return ranks.total(made.view(torch.uint8)).view(rows.dtype)


def scoring_of(logits, index, weight):
    """How a router scores experts, read from the weights it gave: "softmax" or "sigmoid" of its logits.

    Ratios of the weights that one token gives are those of the scores, whatever is normalised or scaled afterwards; a
    router that chooses one expert shows its score itself.

    Parameters
    ----------
    logits : (T, E) tensor
    index, weight : (T, k) tensor

    Returns
    -------
    str
    """
    errors = {}
    for name, scores in (
        ("softmax", logits.log_softmax(1)),
        ("sigmoid", torch.nn.functional.logsigmoid(logits)),
    ):
        gap = scores.gather(1, index) - weight.abs().clamp(min=1e-30).log()
        if index.shape[1] > 1:
            gap = gap - gap.mean(1, keepdim=True)
        errors[name] = float(gap[(weight != 0).all(1)].abs().mean().nan_to_num())
    return min(errors, key=errors.get)


def capture(
    model,
    input_ids,
    *,
    needs=DEFAULT_NEEDS,
    sample=SAMPLE,
    every=1,
    batch_size=8,
    domains=None,
    progress=True,
):
    """Statistics of every MoE layer over the calibration tokens, in one pass.

    Each sequence goes through the model once, at the model's own routing. At each MoE layer all E experts are applied
    to all tokens, a chunk of tokens at a time; sums are float64. Where no need but ``"usage"`` and ``"norms"`` is asked
    for, experts are applied to the tokens routed to them alone.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With its weights in memory, and not merged.
    input_ids : (N, S) int64 tensor
        Calibration sequences without padding; see :func:`hcsmoe_core.text.calibration.calibration_tokens`.
    needs : sequence of str
        What to collect, of :data:`hcsmoe_core.statistics.NEEDS`: ``"usage"`` (always), ``"outputs"``, ``"norms"``,
        ``"grams"`` and ``"sample"``. The default is all but the sample; :func:`hcsmoe_core.methods.planner.needs_of` tells what
        a method needs.
    sample : int
        Tokens of the sample, where it is asked for.
    every : int
        Apply the experts to each ``every``-th token alone, at most the length of a sequence. Outputs, norms and Gram matrices
        are then estimates of the sums over all tokens (the largest outputs are those seen); usage, and the sample, are of all
        tokens as ever. Where a sequence starts to count is told by its hash. Neighbours being alike, so many tokens of all
        sequences tell far more than all tokens of fewer sequences.
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
    tokens = Tokens(
        model, input_ids, needs=needs, sample=sample, every=every, batch_size=batch_size, domains=domains
    )
    layers = find_moe_layers(model)
    for layer in layers:
        if layer.merged:
            raise InputError(
                "This model is merged; capture on the original: restore(model), or load it again."
            )
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
    """Calibration sequences as a capture goes through them: in batches, some of which are this rank's.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    input_ids, needs, sample, every, batch_size, domains
        As for :func:`capture`, and checked.

    Attributes
    ----------
    starts : list of int
        First sequence of each batch that is this rank's.
    """

    def __init__(self, model, input_ids, *, needs, sample, batch_size, domains, every=1):
        self.input_ids = check_tokens(input_ids, model)
        self.every = check_count("every", every, 1, self.input_ids.shape[1])
        self.batch_size, self.needs = check_count("batch_size", batch_size, 1), tuple(needs)
        check_count("sample", sample, 1)
        for need in needs:
            check_choice("needs", need, tuple(NEEDS))
        self.domains, self.of_sequence = _domain_index(domains, len(input_ids))
        self.hashes = sequence_hashes(self.input_ids)
        self.chosen = torch.empty(0, 2, dtype=torch.int64)
        if "sample" in needs:
            self.chosen = sample_of(self.hashes, self.input_ids.shape[1], sample)
        self.starts = ranks.share(list(range(0, len(self.input_ids), batch_size)))

    @contextlib.contextmanager
    def collecting(self, layers):
        """Collectors that listen to some layers while the block lasts."""
        collectors = [_Collector(layer, len(self.domains), self.needs) for layer in layers]
        handles = []
        try:
            for collector in collectors:
                handles += collector.layer.listen(collector.take_router, collector.take_experts)
            yield collectors
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, collectors, start):
        """Ids of the batch that starts at some sequence; the collectors are told which tokens will come."""
        stop = start + self.batch_size
        here = self.chosen[(self.chosen[:, 0] >= start) & (self.chosen[:, 0] < stop)]
        for collector in collectors:
            collector.batch_applied = self._applied(start, stop)
            collector.batch_domains = self.of_sequence[start:stop]
            collector.batch_rows = here - torch.tensor([start, 0])
        return self.input_ids[start:stop]

    def _applied(self, start, stop):
        """Which tokens of a batch the experts are applied to, ``(T,)`` bool; None for all."""
        if self.every == 1:
            return None
        shifts = torch.tensor([int(name, 16) % self.every for name in self.hashes[start:stop]])
        return ((torch.arange(self.input_ids.shape[1]) + shifts[:, None]) % self.every == 0).flatten()

    def bar(self, progress):
        """Progress bar of the tokens that this rank has."""
        count = self.input_ids.shape[1] * sum(
            min(self.batch_size, len(self.input_ids) - start) for start in self.starts
        )
        shown = progress and ranks.rank() == 0
        return tqdm(
            total=count, desc="capture", unit="token", unit_scale=True, disable=None if shown else True
        )

    def finished(self, collectors):
        """What the collectors found, over all ranks: LayerStatistics by layer name."""
        batch = self.chosen[:, 0] // self.batch_size
        by_batch = torch.argsort(batch, stable=True)  # the order in which the collectors met them
        mine = torch.isin(batch[by_batch], torch.tensor(self.starts) // self.batch_size)
        return {c.layer.name: c.finish(by_batch[mine], len(self.chosen)) for c in collectors}

    def statistics(self, model, sums):
        """Statistics of all of a model's layers."""
        layers = find_moe_layers(model)
        about = {
            "name": model.name_or_path or type(model).__name__,
            "class": type(model).__name__,
            "hash": model_hash(model),
        }
        about["layers"] = {layer.name: _about(layer) for layer in layers}
        if self.every > 1:
            about["every"] = self.every
        return Statistics(
            {layer.name: sums[layer.name] for layer in layers}, self.domains, about, self.hashes, self.sampled
        )

    @property
    def sampled(self):
        """Of each token of the sample: place of its sequence, position, and place of its domain; None without a sample."""
        if "sample" not in self.needs:
            return None
        return torch.cat([self.chosen, torch.tensor(self.of_sequence)[self.chosen[:, :1]]], 1)


def forward_options(model):
    """Arguments that spare a model the logits, which are not needed: where it can, it makes one row of them."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _about(layer):
    return {"top_k": layer.top_k, "router_groups": layer.router_groups, "width": layer.width}


def expected_bytes(model, needs=DEFAULT_NEEDS, *, domains, tokens, sample=SAMPLE):
    """Bytes of the statistics file that a capture on a model would make.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    needs : sequence of str
    domains, tokens, sample : int

    Returns
    -------
    int
    """
    layers = []
    for layer in find_moe_layers(model):
        size = layer.tensors()["down_proj"].element_size()
        layers.append((layer.num_experts, layer.hidden_size, layer.top_k or layer.num_experts, size))
    return estimated_bytes(layers, needs, domains=domains, tokens=tokens, sample=sample)


def check_tokens(input_ids, model):
    """Calibration tokens as int64 on the CPU, or ValueError if the model cannot read them."""
    if (
        not torch.is_tensor(input_ids)
        or input_ids.ndim != 2
        or input_ids.is_floating_point()
        or not input_ids.numel()
    ):
        shape = (
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            if torch.is_tensor(input_ids)
            else type(input_ids)
        )
        raise InputError(
            f'The "input_ids" argument must be a tensor of token ids [sequences, length]; not {shape}.'
        )
    input_ids = input_ids.to("cpu", torch.int64).contiguous()
    size = model.get_input_embeddings().num_embeddings
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= size:
        raise InputError(
            f'The "input_ids" argument holds ids from {low} to {high}, but the model\'s vocabulary has ids from 0 to '
            f"{size - 1}; encode the text with the model's own tokenizer."
        )
    return input_ids


def _domain_index(domains, count):
    if domains is None:
        return ["all"], [0] * count
    domains = [str(d) for d in domains]
    if len(domains) != count:
        raise InputError(
            f'The "domains" argument must name the domain of each of the {count} sequences; got {len(domains)}.'
        )
    names = list(dict.fromkeys(domains))
    return names, [names.index(d) for d in domains]
