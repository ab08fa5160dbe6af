"""How far a merged model is from the original: each layer's output, and the next token's distribution."""

import contextlib
import math
import shutil
from collections.abc import Callable
from functools import partial

import torch
from tqdm.auto import tqdm

from hcsmoe_core import _transformers, collect, families, merging, statistics
from hcsmoe_core._util import sha256_json
from hcsmoe_core.plan import JOINED, odd_widths
from hcsmoe_core.replace import replace_experts, restore_experts, resume_merge, suspend_merge
from hcsmoe_core.scale.streaming import Outputs, read_checked, resumed, write_checked

NAMES = {
    "mapped": "mapped",
    "dropped": "pruned",
    "averaged": "router averaged",
    "row-kept": "row-kept",
    "folded": "folded",
}
CLIFF = 2.0  # perplexity over the original's, above which a merged model gets a warning
POSITIONS = 256  # whose distributions are compared at once


def fidelity(model, plan, input_ids, *, stats=None, progress: bool = True) -> dict:
    """Compare a merged model with the original and, where its router is another, with the exact merge.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not merged, or merged by this plan; it is left as it was, also by an error or an interrupt.
    plan : Plan
    input_ids : (N, S) int64 tensor
        Tokens that the plan's statistics were not captured on.
    stats : Statistics, optional
        As for :func:`hcsmoe_core.apply_plan`; not needed if the plan is applied already.
    progress : bool

    Returns
    -------
    dict
        ``tokens``; ``layers``, names of the MoE layers; ``original`` with ``loss`` (nats per token) and
        ``perplexity`` (None for a model that labels tokens); ``models`` by name: that of the plan's router,
        and ``"mapped"`` beside it where router rows are joined; ``warning``, empty unless perplexity more
        than doubled. Each model has ``loss``, ``perplexity``; ``kl``, the mean over tokens of ``KL(original ‖
        merged)`` of the next token's distribution in nats, and ``kl_from_mapped`` likewise; ``agreement``,
        the share of positions with the same likeliest token; and for each layer ``‖y′ − y‖ / ‖y‖`` over all
        tokens: ``block_error``, of its MoE block's output on the original's inputs, and ``hidden_error``, of
        the hidden states after its decoder layer with all layers before it merged too.

    Raises
    ------
    InputError
        As :func:`hcsmoe_core.apply_plan`.
    """
    input_ids, layers = collect.check_tokens(input_ids, model), families.find_moe_layers(model)
    totals, bar = (
        _Totals(model, plan),
        {"unit_scale": input_ids.shape[1], "disable": None if progress else True},
    )
    with contextlib.ExitStack() as undo:
        undo.callback(model.train, model.training)
        if not all(layer.merged for layer in layers):
            merging.apply_plan(model, plan, stats)
            undo.callback(merging.restore, model)
        variants = undo.enter_context(_variants(model.eval(), layers, plan))
        for row in tqdm(input_ids.split(1), "fidelity", unit="token", **bar):
            _compare(model, layers, variants, row.to(model.device), totals)
    return totals.result(input_ids.numel())


def observer(input_ids) -> Callable:
    """Measure :func:`fidelity` while a streamed model is merged.

    Parameters
    ----------
    input_ids : (N, S) int64 tensor
        As for :func:`fidelity`.

    Returns
    -------
    callable
        For the ``observer`` argument of :func:`hcsmoe_core.stream_merged`.
    """
    start = partial(_Observer, input_ids)
    start.key = sha256_json(input_ids.tolist())
    return start


def unseen(input_ids, seen, *, length: int) -> torch.Tensor | None:
    """Sequences that were not calibrated on, to be held out; None if there are none.

    Parameters
    ----------
    input_ids : (N, S) int64 tensor
    seen : collection of str
        Hashes of the calibration sequences (:func:`hcsmoe_core.statistics.sequence_hashes`).
    length : int
        Tokens of each that are returned, at most.

    Returns
    -------
    (M, S) int64 tensor or None
    """
    fresh = [i for i, digest in enumerate(statistics.sequence_hashes(input_ids)) if digest not in set(seen)]
    return input_ids[fresh, :length] if fresh else None


def _names(plan):
    """Merged models that a plan is measured as: its own, and the exact merge if that is another."""
    router = next((layer.router for layer in plan.layers if layer.router != "mapped"), "mapped")
    trimmed = any(layer.width and not layer.joins for layer in plan.layers)
    return ["trimmed" if trimmed else NAMES[router], *(["mapped"] if router in JOINED else [])]


@contextlib.contextmanager
def _variants(model, layers, plan):
    """The merged models of :func:`_names` for :func:`_in_place`: by name, then by layer.

    During the block merged layers have their original experts, and experts run one by one if kernels of
    grouped products refuse their width; after it they are merged as before.
    """
    usual = _transformers.experts_implementation(model)
    own, *exact = _names(plan)
    variants = {name: {} for name in (own, *exact)}
    with contextlib.ExitStack() as undo:
        for layer in layers:
            tensors, labels = layer.tensors(), layer.experts._merged.labels
            variants[own][layer.name] = suspend_merge(layer)
            undo.callback(resume_merge, layer, variants[own][layer.name])
            undo.callback(lambda layer=layer: layer.merged and restore_experts(layer))  # where exact failed
            for name in exact:
                replace_experts(layer, tensors, labels)
                variants[name][layer.name] = suspend_merge(layer)
        if usual not in (None, "eager") and odd_widths(plan, model.dtype):
            undo.callback(model.set_experts_implementation, usual)
            model.set_experts_implementation("eager")
        yield variants


@contextlib.contextmanager
def _in_place(layers, variant):
    """Layers compute what one merged model does during the block."""
    with contextlib.ExitStack() as undo:
        for layer in layers:
            resume_merge(layer, variant[layer.name])
            undo.callback(restore_experts, layer)
        yield


@torch.no_grad()
def _compare(model, layers, variants, row, totals):
    """Send one sequence ``[1, S]`` through the original and every merged model."""
    with _comparing_blocks(layers, variants, totals), _hidden_states(model, layers) as original:
        logits = {"original": model(input_ids=row, use_cache=False).logits[0]}
    totals.add_loss("original", row[0], logits)
    for name, variant in reversed(variants.items()):  # the exact merge before what is measured against it
        with _in_place(layers, variant), _hidden_states(model, layers) as hidden:
            logits[name] = model(input_ids=row, use_cache=False).logits[0]
        for layer, states in original.items():
            totals.add("hidden_error", name, layer, hidden[layer], states)
        totals.add_loss(name, row[0], logits)


@contextlib.contextmanager
def _hooked(hooks):
    """Modules call a function after their forward during the block; ``hooks`` are pairs of them."""
    with contextlib.ExitStack() as undo:
        for module, hook in hooks:
            undo.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield


def _comparing_blocks(layers, variants, totals):
    """While the original runs, run each MoE block again on its inputs as every merged model."""
    running = []  # a block may hold another layer's, which must not be compared inside it

    def compare(layer, block, inputs, keywords, output):
        for name, variant in variants.items() if not running else ():
            running.append(layer)
            with _in_place([layer], variant):
                merged = block.forward(*inputs, **keywords)
            totals.add("block_error", name, layer.name, first_tensor(merged), first_tensor(output))
            running.pop()

    return _hooked([(layer.block, partial(compare, layer)) for layer in layers])


@contextlib.contextmanager
def _hidden_states(model, layers):
    """Hidden states after the decoder layer of each MoE layer, by the latter's name."""
    hidden, prefix = {}, families.decoder_layers(model)

    def store(name, decoder, inputs, keywords, output):
        hidden[name] = first_tensor(output)

    depth = prefix.count(".") + 2  # names of decoder layers are the prefix and a number
    decoders = {layer.name: ".".join(layer.name.split(".")[:depth]) for layer in layers if prefix}
    with _hooked([(model.get_submodule(path), partial(store, name)) for name, path in decoders.items()]):
        yield hidden


def first_tensor(output):
    """The hidden states among what a module returns."""
    return output if torch.is_tensor(output) else next(part for part in output if torch.is_tensor(part))


class _Observer:
    """Held-out tokens on their way through the original and its merged models, layer by layer."""

    def __init__(self, input_ids, source, plan, folder):
        self.source, self.plan, self.folder = source, plan, folder
        folder.mkdir(exist_ok=True)
        self.tokens = collect.Tokens(source.model, input_ids, needs=(), sample=1, batch_size=1, domains=None)
        self.outputs = {name: Outputs(folder / name) for name in ("original", *reversed(_names(plan)))}
        self.totals = _Totals(source.model, plan, self._resumed(sorted(folder.glob("*.json"))))

    def _resumed(self, earlier):
        """Sums up to the last layer that was measured; None, and nothing is left, if any of it is damaged."""
        if not earlier:
            return None
        sums, starts = resumed(earlier[-1], read_checked), self.tokens.starts
        every = self.outputs.values()
        if sums is None or not all(outputs.sound(int(earlier[-1].stem), starts) for outputs in every):
            shutil.rmtree(self.folder)
            self.folder.mkdir()
            return None
        return sums

    def _file(self, index):
        return self.folder / f"{index:05d}.json"

    def done(self, index):
        """Whether a decoder layer was measured."""
        return self._file(index).exists()

    def push(self, index, layers):
        """Go through one decoder layer, whose MoE layers are merged, and compare what leaves it."""
        with _variants(self.source.model, layers, self.plan) as variants, self.tokens.bar(True) as bar:
            bar.set_description(f"fidelity, layer {index}")
            bar.total *= len(self.outputs)
            with _comparing_blocks(layers, variants, self.totals):
                self.source.push(index, self.outputs["original"], self.tokens, [], bar)
            for name, variant in variants.items():
                with _in_place(layers, variant):
                    self.source.push(index, self.outputs[name], self.tokens, [], bar)
        for start in self.tokens.starts if layers else ():
            states = {name: first_tensor(output) for name, output in self._read(index, start)}
            for name in variants:
                for layer in layers:
                    self.totals.add("hidden_error", name, layer.name, states[name], states["original"])
        write_checked(self._file(index), self.totals.sums)
        for outputs in self.outputs.values():
            outputs.drop(index - 1, self.tokens.starts)

    def _read(self, index, start):
        """What left a decoder layer of each model, one after another."""
        for name, outputs in self.outputs.items():
            yield name, outputs.read(index, start, self.source.device)["output"]

    def result(self):
        """The same as :func:`fidelity` of a model in memory."""
        self.source.read_again()
        for start in self.tokens.starts:
            rows, logits = self.tokens.begin([], start), {}
            for name, output in self._read(len(self.source.layers) - 1, start):
                logits[name] = self.source.logits(output, rows)[0]
                self.totals.add_loss(name, rows[0], logits)
        return self.totals.result(self.tokens.input_ids.numel())


class _Totals:
    """Sums over tokens from which a fidelity follows; they can be stored as JSON.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    plan : Plan
    sums : dict, optional
        To go on from.
    """

    def __init__(self, model, plan, sums=None):
        self.names, self.layers = _names(plan), [layer.name for layer in plan.layers]
        self.predicts = model.can_generate()  # others label tokens
        self.sums = sums or {}

    def _add(self, key, *values):
        before = self.sums.get(key, [0.0] * len(values))
        self.sums[key] = [a + float(b) for a, b in zip(before, values, strict=True)]

    def add(self, kind, name, layer, merged, original):
        """Squared error of some outputs, and the original's squares."""
        original, merged = original.double(), merged.double()
        self._add(f"{kind} {name} {layer}", (merged - original).square().sum(), original.square().sum())

    def add_loss(self, name, ids, logits):
        """Loss of one sequence ``ids [S]``, and how its distributions differ from the models' before it.

        ``logits`` are of all models up to this one, ``[S, V]`` by name.
        """
        for start in range(0, len(ids), POSITIONS):
            block = slice(start, start + POSITIONS)
            logs = logits[name][block].float().log_softmax(1)
            if self.predicts:
                targets = ids[start + 1 : start + POSITIONS + 1].to(logs.device)
                loss = torch.nn.functional.nll_loss(logs[: len(targets)], targets, reduction="sum")
                self._add(f"loss {name}", loss.double(), len(targets))
            for other in logits.keys() - {name}:
                wanted = logits[other][block].float().log_softmax(1)
                kl = (wanted.exp() * (wanted - logs)).double().sum()
                self._add(f"kl {name} {other}", kl, (wanted.argmax(1) == logs.argmax(1)).sum(), len(logs))

    def result(self, tokens):
        """As of :func:`fidelity`."""
        result = {
            "tokens": tokens,
            "layers": self.layers,
            "original": self._loss("original"),
            "models": {name: self._loss(name) | self._differences(name) for name in self.names},
        }
        return result | {"warning": _warning(result)}

    def _loss(self, name):
        loss, count = self.sums.get(f"loss {name}", (math.nan, 1))
        mean = loss / max(count, 1)
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return (
            {"loss": mean, "perplexity": perplexity} if self.predicts else {"loss": None, "perplexity": None}
        )

    def _differences(self, name):
        kl, same, count = self.sums[f"kl {name} original"]
        exact = self.sums.get(f"kl {name} mapped")
        errors = {
            kind: [self._error(f"{kind} {name} {layer}") for layer in self.layers]
            for kind in ("block_error", "hidden_error")
        }
        more = {"kl_from_mapped": exact[0] / count} if exact else {}
        return {"kl": kl / count, "agreement": same / count} | errors | more

    def _error(self, key):
        error, square = self.sums.get(key, (math.nan, math.nan))
        return math.sqrt(error / square) if square else (math.inf if error else 0.0)


def _warning(result):
    """What to say of a merged model whose perplexity ran away, and of the layer to blame; else nothing."""
    merged = next(iter(result["models"].values()))
    before, after = result["original"]["perplexity"], merged["perplexity"]
    if before is None or after <= CLIFF * before:
        return ""
    hidden = merged["hidden_error"]
    steps = [b - a for a, b in zip([0.0, *hidden], hidden, strict=False)]
    worst = max(range(len(steps)), key=lambda i: steps[i] if math.isfinite(steps[i]) else math.inf)
    return (
        f"Off a cliff: perplexity is {after:.4g} where the original's is {before:.4g}. The hidden states' "
        f"error rises most in {result['layers'][worst]}, by {steps[worst]:.3g} to {hidden[worst]:.3g} (its "
        f"MoE block alone: {merged['block_error'][worst]:.3g}). Keep more experts, there or everywhere, or "
        "try another method."
    )
