"""One pass over the calibration tokens gives the statistics that every similarity and every plan is made from."""

import inspect

import torch
from tqdm.auto import tqdm

from hcsmoe_core.files import check_choice, check_count
from hcsmoe_core.moe import check_loaded, find_moe_layers, model_hash, router_logits
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
CHUNK = {"cpu": 1024, "cuda": 8192}
DENSE = 1 << 25  # numbers of all experts' outputs that are held at once, where pairs of experts are compared


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
        self.batch_domains = self.batch_rows = None
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
        for domain, rows in self._by_domain(len(tokens), tokens.device):
            self._add(domain, tokens[rows], index[rows], weight[rows])
            if self.logits is not None:
                self._add_scores(domain, self.logits[rows], index[rows], weight[rows])
        if "sample" in self.needs:
            self._keep(tokens, index, weight)

    def _add(self, domain, tokens, index, weight):
        self.tokens[domain] += len(tokens)
        taken = weight != 0  # some routers send a skipped token to expert 0 with weight zero
        self.usage_count[domain] += torch.bincount(index[taken], minlength=self.usage_count.shape[1])
        self.sums["routing_mass"][domain].index_add_(0, index.flatten(), weight.flatten())
        size = CHUNK["cpu" if tokens.device.type == "cpu" else "cuda"]
        if "grams" in self.needs:
            size = max(1, min(size, DENSE // (self.layer.num_experts * tokens.shape[1])))
        parts = zip(tokens.split(size), index.split(size), weight.split(size), strict=True)
        for part in parts if self.needs & {"outputs", "norms", "grams"} else ():
            self._add_outputs(domain, *part)

    def _add_outputs(self, domain, tokens, index, weight):
        """Apply the experts: all of them to all tokens where sums over all tokens are wanted, else to those routed."""
        everywhere, whole = bool(self.needs & {"outputs", "grams"}), bool(self.needs & {"norms", "grams"})
        outputs, gates = [], None
        if whole:
            gates = self._zeros(len(tokens), self.layer.num_experts).scatter_add_(1, index, weight).T.contiguous()
        for expert in range(self.layer.num_experts):
            routed = gates[expert].nonzero()[:, 0] if "norms" in self.needs else None
            hidden = self.layer.expert_hidden(expert, tokens if everywhere else tokens[routed])
            affine = self.layer.affine
            output = self.layer.expert_output(expert, hidden) if whole or not affine else None
            if "outputs" in self.needs:
                self._add_hidden(domain, expert, hidden if affine else output)
            if not whole:
                continue
            if "norms" in self.needs and len(routed):
                self._add_norms(domain, expert, output[routed] if everywhere else output, gates[expert, routed])
            if "grams" in self.needs:
                outputs.append(output)
        if "grams" in self.needs:
            self._add_grams(domain, torch.stack(outputs).double(), gates)

    def _add_hidden(self, domain, expert, hidden):
        total = hidden.sum(0, dtype=torch.float64)
        if self.hidden_sum is None:
            self.hidden_sum = self._zeros(len(self.tokens), self.layer.num_experts, len(total))
        self.hidden_sum[domain, expert] += total

    def _add_norms(self, domain, expert, output, gate):
        norm = output.double().norm(dim=1)
        self.sums["norm_sum"][domain, expert] += norm.sum()
        self.sums["gated_norm_sum"][domain, expert] += gate @ norm
        largest = self.sums["output_max"]
        largest[domain, expert] = torch.maximum(largest[domain, expert], output.abs().max().double())

    def _add_grams(self, domain, outputs, gates):
        """Inner products of all pairs of experts' outputs [E, T, D], with gates [E, T]."""
        flat, square = outputs.flatten(1), (outputs**2).sum(2)
        self.sums["output_gram"][domain] += flat @ flat.T
        self.sums["routed_gram"][domain] += (outputs * gates[..., None]).flatten(1) @ flat.T
        self.sums["routed_square"][domain] += gates @ square.T
        unit = (outputs / square.sqrt().clamp(min=torch.finfo(torch.float64).tiny)[..., None]).flatten(1)
        self.sums["cosine_sum"][domain] += unit @ unit.T

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
            raise ValueError(f"{self.layer.name} does not get every token of a sequence; capture without the sample.")
        rows = rows.to(tokens.device)
        wide = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        experts = self.layer.num_experts
        logits = torch.full((len(tokens), experts), torch.nan) if self.logits is None else self.logits[:, :experts]
        parts = (tokens[rows], logits.to(tokens.device)[rows].to(wide), index[rows], weight[rows].to(wide))
        self.sampled.append([part.detach().cpu() for part in parts])

    def _by_domain(self, count, device):
        """Rows of each domain in a batch whose tokens come sequence after sequence."""
        domains = sorted(set(self.batch_domains))
        if len(domains) == 1:
            yield domains[0], slice(None)
            return
        per_sequence = count // len(self.batch_domains)
        of_token = torch.tensor(self.batch_domains, device=device).repeat_interleave(per_sequence)
        for domain in domains:
            yield domain, (of_token == domain).nonzero()[:, 0]

    @torch.no_grad()
    def finish(self, order):
        """The sums, with mean activations projected down: ``mean_t W_down h_t = W_down mean_t h_t``."""
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
            raise ValueError(
                f"{layer.name}: an expert's outputs are not finite on these tokens; the checkpoint is damaged, or "
                "its dtype overflows: load it with another dtype."
            )
        sums = {key: value.cpu() for key, value in sums.items()}
        if "sample" in self.needs:
            parts = [torch.cat(column)[order] for column in zip(*self.sampled, strict=True)]
            sums["sample"] = LayerSample(*parts)
        return LayerStatistics(tokens=self.tokens, usage_count=self.usage_count.cpu(), **sums)


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
    for name, scores in (("softmax", logits.log_softmax(1)), ("sigmoid", torch.nn.functional.logsigmoid(logits))):
        gap = scores.gather(1, index) - weight.abs().clamp(min=1e-30).log()
        if index.shape[1] > 1:
            gap = gap - gap.mean(1, keepdim=True)
        errors[name] = float(gap[(weight != 0).all(1)].abs().mean().nan_to_num())
    return min(errors, key=errors.get)


def capture(model, input_ids, *, needs=DEFAULT_NEEDS, sample=SAMPLE, batch_size=8, domains=None, progress=True):
    """Statistics of every MoE layer over the calibration tokens, in one pass.

    Each sequence goes through the model once, at the model's own routing. At each MoE layer all E experts are applied
    to all tokens, a chunk of tokens at a time; sums are float64. Where no need but ``"usage"`` and ``"norms"`` is asked
    for, experts are applied to the tokens routed to them alone.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With its weights in memory, and not merged.
    input_ids : (N, S) int64 tensor
        Calibration sequences without padding; see :func:`hcsmoe_core.calibration.calibration_tokens`.
    needs : sequence of str
        What to collect, of :data:`hcsmoe_core.statistics.NEEDS`: ``"usage"`` (always), ``"outputs"``, ``"norms"``,
        ``"grams"`` and ``"sample"``. The default is all but the sample; :func:`hcsmoe_core.methods.needs_of` tells what
        a method needs.
    sample : int
        Tokens of the sample, where it is asked for.
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
    check_count("sample", sample, 1)
    for need in needs:
        check_choice("needs", need, tuple(NEEDS))
    names, of_sequence = _domain_index(domains, len(input_ids))
    layers = find_moe_layers(model)
    for layer in layers:
        if layer.merged:
            raise ValueError("This model is merged; capture on the original: restore(model), or load it again.")
        check_loaded(layer)
    collectors = [_Collector(layer, len(names), needs) for layer in layers]
    about = {"name": model.name_or_path or type(model).__name__, "class": type(model).__name__, "hash": model_hash(model)}
    about["layers"] = {layer.name: _about(layer) for layer in layers}
    hashes = sequence_hashes(input_ids)
    chosen = sample_of(hashes, input_ids.shape[1], sample) if "sample" in needs else torch.empty(0, 2, dtype=torch.int64)
    _run(model, input_ids, collectors, of_sequence, batch_size, chosen, progress)
    by_batch = torch.argsort(chosen[:, 0] // batch_size, stable=True)  # the order in which the collectors met them
    order = torch.argsort(by_batch)
    sums = {collector.layer.name: collector.finish(order) for collector in collectors}
    sampled = torch.cat([chosen, torch.tensor(of_sequence)[chosen[:, :1]]], 1) if "sample" in needs else None
    return Statistics(sums, names, about, hashes, sampled)


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


def _run(model, input_ids, collectors, of_sequence, batch_size, chosen, progress):
    """The pass: all sequences once through the model, with every collector listening."""
    # The language model head's logits are not needed; where the model can, it makes one row of them.
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    handles = []
    was_training = model.training
    try:
        for collector in collectors:
            handles += collector.layer.listen(collector.take_router, collector.take_experts)
        model.eval()
        bar = tqdm(total=input_ids.numel(), desc="capture", unit="token", unit_scale=True, disable=None if progress else True)
        with torch.no_grad(), bar:
            for start in range(0, len(input_ids), batch_size):
                rows = input_ids[start : start + batch_size]
                here = chosen[(chosen[:, 0] >= start) & (chosen[:, 0] < start + batch_size)]
                for collector in collectors:
                    collector.batch_domains = of_sequence[start : start + batch_size]
                    collector.batch_rows = here - torch.tensor([start, 0])
                model(input_ids=rows.to(model.device), use_cache=False, **extra)
                bar.update(rows.numel())
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    for collector in collectors:
        if not int(collector.tokens.sum()):
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
