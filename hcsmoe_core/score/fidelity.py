"""How far a merged model is from the original: each layer's output, and the next token's distribution."""

import contextlib
import math

import torch
from torch import nn
from tqdm.auto import tqdm

from hcsmoe_core.collect import check_tokens
from hcsmoe_core.families import decoder_layers, find_moe_layers
from hcsmoe_core.merging import apply_plan, check_unmerged, restore
from hcsmoe_core.plan import JOINED, odd_widths
from hcsmoe_core.replace import lay_experts, lift_experts, put_experts
from hcsmoe_core.statistics import sequence_hashes

NAMES = {
    "mapped": "mapped",
    "dropped": "pruned",
    "averaged": "router averaged",
    "row-kept": "row-kept",
    "folded": "folded",
}


CLIFF = 2.0  # times the original's perplexity


POSITIONS = 256  # whose logits are compared at once


def fidelity(model, plan, input_ids, *, stats=None, progress=True):
    """Compare what a plan makes of a model with the model itself and, where its router is another, with the exact merge.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Not merged, or merged by this plan; it is left as it was.
    plan : Plan
    input_ids : (N, S) int64 tensor
        Tokens that the plan's statistics were not captured on.
    stats : Statistics, optional
        As for :func:`hcsmoe_core.merging.apply_plan`; not looked at if the plan is applied already.
    progress : bool

    Returns
    -------
    dict
        ``tokens``; ``layers``, names of the MoE layers; ``original`` with ``loss`` (nats a token) and ``perplexity``
        (None of a model that labels tokens);
        ``models``, by name of the merged model (that of its router's rule; ``"mapped"`` beside it where it joins rows);
        ``warning``, what to say where perplexity has more than doubled, else empty. Of each model: ``loss``,
        ``perplexity``; ``kl``, the mean over tokens of ``KL(original ‖ merged)`` of the next token's distribution in nats,
        and beside the exact merge ``kl_from_mapped`` likewise; ``agreement``, the share of positions at which it and the
        original find the same token likeliest; and for each layer ``block_error`` and ``hidden_error``, ``‖y' − y‖ / ‖y‖``
        over all tokens: of its MoE block's output on the original's inputs, and of the hidden states after its decoder
        layer with all layers before it merged too.

    Raises
    ------
    ValueError
        As :func:`hcsmoe_core.merging.apply_plan`.
    """
    input_ids = check_tokens(input_ids, model)
    layers = find_moe_layers(model)
    applied = all(layer.merged for layer in layers)
    if not applied:
        check_unmerged(layers)
        apply_plan(model, plan, stats)
    found, was_training = Differences(model, plan), model.training
    lifted = lift(layers, plan)
    try:
        with (
            one_by_one(model, plan),
            tqdm(
                total=input_ids.numel(), desc="fidelity", unit="token", disable=None if progress else True
            ) as bar,
        ):
            for row in input_ids.split(1):
                _compare(model.eval(), layers, lifted, row, found)
                bar.update(row.numel())
    finally:
        model.train(was_training)
        restore(model)
        if applied:
            _lay(layers, lifted[found.names[0]])
    return found.result(input_ids.numel())


@contextlib.contextmanager
def one_by_one(model, plan):
    """Run experts one by one while the block lasts, if they are of a width that kernels of grouped products do not take."""
    implementation = getattr(model.config, "_experts_implementation", None)
    if implementation in (None, "eager") or not odd_widths(plan, model.dtype):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(implementation)


def unseen(input_ids, seen, *, length):
    """Sequences that were not calibrated on, to be held out; None if there are none.

    Parameters
    ----------
    input_ids : (N, S) int64 tensor
    seen : collection of str
        Hashes of those that were (:func:`hcsmoe_core.statistics.sequence_hashes`).
    length : int
        Tokens of each that are given back, at most.

    Returns
    -------
    (M, S) int64 tensor or None
    """
    fresh = [place for place, digest in enumerate(sequence_hashes(input_ids)) if digest not in set(seen)]
    return input_ids[fresh, :length] if fresh else None


def names_of(plan):
    """Names of the merged models that a plan is measured as: its own, and the exact merge if that is another."""
    router = next((layer.router for layer in plan.layers if layer.router != "mapped"), "mapped")
    name = "trimmed" if any(layer.width and not layer.joins for layer in plan.layers) else NAMES[router]
    return [name, "mapped"] if router in JOINED else [name]


def lift(layers, plan):
    """Take the merged experts of some layers off: what puts them back, by model's name and layer.

    Parameters
    ----------
    layers : list of MoELayer
        Merged by the plan.
    plan : Plan

    Returns
    -------
    dict of str to dict
    """
    own, *exact = names_of(plan)
    lifted = {own: {}} | {name: {} for name in exact}
    for layer in layers:
        tensors, labels = layer.tensors(), layer.experts._merged.labels
        lifted[own][layer.name] = lift_experts(layer)
        for name in exact:
            put_experts(layer, tensors, labels)
            lifted[name][layer.name] = lift_experts(layer)
    return lifted


def _lay(layers, lifted):
    for layer in layers:
        lay_experts(layer, lifted[layer.name])


@torch.no_grad()
def _compare(model, layers, lifted, row, found):
    """Send one sequence through the original and every merged model."""
    row = row.to(model.device)
    with comparing_blocks(layers, lifted, found), _hidden_states(model, layers) as wanted:
        logits = model(input_ids=row, use_cache=False).logits[0]
    found.add_loss("original", row[0], logits)
    models = {"original": logits}
    for name, states in reversed(lifted.items()):  # the exact merge before what is measured against it
        _lay(layers, states)
        try:
            with _hidden_states(model, layers) as hidden:
                other = model(input_ids=row, use_cache=False).logits[0]
        finally:
            for layer in layers:
                states[layer.name] = lift_experts(layer)
        for place, tensor in wanted.items():
            found.add("hidden_error", name, place, hidden[place], tensor)
        found.add_loss(name, row[0], other, models)
        models[name] = other


@contextlib.contextmanager
def comparing_blocks(layers, lifted, found):
    """While the original runs, run each MoE block again on what it gets, with the experts and router of every merge."""
    handles, busy = [], []

    def listen(layer):
        def again(block, inputs, keywords, output):
            if busy:
                return
            busy.append(True)
            try:
                for name, states in lifted.items():
                    lay_experts(layer, states[layer.name])
                    try:
                        other = block.forward(*inputs, **keywords)
                    finally:
                        states[layer.name] = lift_experts(layer)
                    found.add("block_error", name, layer.name, first_tensor(other), first_tensor(output))
            finally:
                busy.clear()

        return layer.block.register_forward_hook(again, with_kwargs=True)

    try:
        for layer in layers:
            handles.append(listen(layer))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hidden_states(model, layers):
    """What leaves the decoder layer of each MoE layer, by the latter's name."""
    found, handles = {}, []
    prefix = decoder_layers(model)
    try:
        for layer in layers if prefix else ():
            place = layer.name[len(prefix) + 1 :].split(".")[0]
            decoder = model.get_submodule(f"{prefix}.{place}")
            keep = lambda _, inputs, output, name=layer.name: found.update({name: first_tensor(output)})  # noqa: E731
            handles.append(decoder.register_forward_hook(keep))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output):
    """The hidden states among what a module returns."""
    return output if torch.is_tensor(output) else next(part for part in output if torch.is_tensor(part))


class Differences:
    """Sums of what a comparison measures: they add up over tokens, and can be kept as JSON.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    plan : Plan
    sums : dict, optional
        To go on from.
    """

    def __init__(self, model, plan, sums=None):
        self.names = names_of(plan)
        self.layers = [layer.name for layer in plan.layers]
        self.predicts = model.can_generate()  # others label tokens
        self.sums = sums or {}

    def _add(self, key, *values):
        held = self.sums.setdefault(key, [0.0] * len(values))
        self.sums[key] = [a + float(b) for a, b in zip(held, values, strict=True)]

    def add(self, kind, name, layer, made, wanted):
        """Squared error of some outputs, and the square of those wanted."""
        wanted = wanted.double()
        self._add(f"{kind} {name} {layer}", (made.double() - wanted).square().sum(), wanted.square().sum())

    def add_loss(self, name, ids, logits, others=None):
        """Loss of one sequence, and how its distributions differ from those of other models, given by name."""
        for start in range(0, len(ids), POSITIONS):
            part = slice(start, start + POSITIONS)
            logs = logits[part].float().log_softmax(1)
            if self.predicts:
                next_ids = ids[start + 1 : start + POSITIONS + 1].to(logs.device)
                loss = nn.functional.nll_loss(logs[: len(next_ids)], next_ids, reduction="sum")
                self._add(f"loss {name}", loss.double(), len(next_ids))
            for other, wanted in (others or {}).items():
                wanted = wanted[part].float().log_softmax(1)
                kl = (wanted.exp() * (wanted - logs)).double().sum()
                self._add(f"kl {name} {other}", kl, (wanted.argmax(1) == logs.argmax(1)).sum(), len(logs))

    def result(self, tokens):
        """As of :func:`fidelity`."""
        original = self._loss("original")
        models = {name: self._loss(name) | self._differences(name) for name in self.names}
        found = {"tokens": tokens, "layers": self.layers, "original": original, "models": models}
        return found | {"warning": _warning(found)}

    def _loss(self, name):
        if not self.predicts:
            return {"loss": None, "perplexity": None}
        loss, count = self.sums[f"loss {name}"]
        mean = loss / max(count, 1)
        return {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}

    def _differences(self, name):
        kl, same, count = self.sums[f"kl {name} original"]
        errors = {
            kind: [self._relative(f"{kind} {name} {layer}") for layer in self.layers]
            for kind in ("block_error", "hidden_error")
        }
        found = {"kl": kl / count, "agreement": same / count} | errors
        if f"kl {name} mapped" in self.sums:
            found["kl_from_mapped"] = self.sums[f"kl {name} mapped"][0] / count
        return found

    def _relative(self, key):
        error, square = self.sums.get(key, (math.nan, math.nan))
        return math.sqrt(error / square) if square else (math.inf if error else 0.0)


def _warning(found):
    """What to say of a merged model that has fallen off a cliff, and of the layer that did it; else nothing."""
    made = next(iter(found["models"].values()))
    before, after = found["original"]["perplexity"], made["perplexity"]
    if before is None or after <= CLIFF * before:
        return ""
    hidden = made["hidden_error"]
    steps = [b - a for a, b in zip([0.0, *hidden], hidden, strict=False)]
    worst = max(range(len(steps)), key=lambda i: steps[i] if math.isfinite(steps[i]) else math.inf)
    return (
        f"Off a cliff: perplexity is {after:.4g} where the original's is {before:.4g}. The hidden states' error rises most "
        f"in {found['layers'][worst]}, by {steps[worst]:.3g} to {hidden[worst]:.3g} (its MoE block alone: "
        f"{made['block_error'][worst]:.3g}). Keep more experts, there or everywhere, or try another method."
    )
