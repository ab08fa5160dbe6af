"""A plan and the weights give the r experts of each layer, on the live model."""

import os
import warnings

import torch
from torch import nn
from tqdm.auto import tqdm

from hcsmoe_core._util import check_count, require
from hcsmoe_core.families import IDENTITY, find_moe_layers, model_hash, same_model
from hcsmoe_core.moe import Neurons, all_finite
from hcsmoe_core.plan import Plan, check_layer, load_plan
from hcsmoe_core.replace import replace_experts, restore_experts
from hcsmoe_core.statistics import Statistics
from hcsmoe_core.steps import combine, compress, refine, router

BLOCK = 1 << 16  # weights that are summed at once: wide sums of so many stay in a CPU's caches


def apply_plan(
    model: nn.Module, plan: Plan | str | os.PathLike, stats: Statistics | None = None
) -> nn.Module:
    """Merge or prune the experts of a live model, in place; :func:`restore` undoes it.

    With router ``"mapped"`` what it chooses among E experts goes through the plan's labels to r merged ones:
    the model computes exactly what E experts would of which those of a group are equal. With others the
    router chooses among r rows by the model's own rule. The original weights stay in memory.

    Returns the model. ``plan`` may be the file of one. ``stats`` are the Statistics that the plan was made
    from, where experts are combined or router rows fitted by their sample. InputError, with the model as it
    was, if the plan does not fit it or needs statistics that are not given, if it is merged already, or if a
    merged weight is not finite.
    """
    plan = load_plan(plan) if isinstance(plan, str | os.PathLike) else plan
    kind = f'The "plan" argument must be a Plan or the file of one, as make_plan gives; not {type(plan)}.'
    require(isinstance(plan, Plan), kind)
    layers = check_applicable(model, plan, stats)
    try:
        quick = not plan.needs_sample
        bar = tqdm(plan.layers, desc="merge", unit="layer", leave=False, disable=quick or None)
        for layer, layer_plan in zip(layers, bar, strict=True):
            apply_layer(layer, layer_plan, stats)
        if plan.compress:
            compress["low-rank"](layers, plan, stats, **plan.compress)
    except BaseException:
        restore(model)
        raise
    return model


def apply_layer(layer, layer_plan, stats=None):
    """Merge or prune the experts of one layer, in place."""
    sample = stats.layers[layer.name].sample if stats is not None else None
    tensors, rows, scales = merge_layer(layer, layer_plan, sample), layer_plan.router_rows(), None
    if layer_plan.router in router:
        rows, scales = router[layer_plan.router](layer_plan, sample), torch.from_numpy(rows)
    rows = None if rows is None else torch.from_numpy(rows)
    replace_experts(layer, tensors, layer_plan.labels, rows=rows, scales=scales)
    layer.experts._merged.plan = layer_plan


def restore(model: nn.Module) -> nn.Module:
    """Put the original experts back, to the bit; InputError if the model was loaded merged."""
    for layer in find_moe_layers(model):
        if layer.merged:
            restore_experts(layer)
    return model


def check_applicable(model, plan, stats=None) -> list:
    """MoE layers of a model in the plan's order; InputError unless the plan can be applied to it."""
    layers, record = check_fits(plan, model), plan.model
    message = "This model is merged already; restore(model) first, or load the original."
    require(not any(layer.merged for layer in layers), message)
    if record.get("hash"):
        _check_known(
            record,
            model,
            "The plan was made for",
            "has the same shape but other weights or another configuration. Make a plan from this model's "
            "statistics.",
        )
    if stats is not None:
        check_statistics(stats, model)
    if plan.needs_sample:
        require(
            stats is not None,
            "This plan looks at the sample of layer inputs, by which experts are combined or routers folded; "
            "give the statistics it was made from: apply_plan(model, plan, stats), or --statistics FILE.",
        )
        stats.check(("sample",), "This plan")
        require(
            stats.matches(plan.statistics),
            f"The plan was made from other statistics ({plan.statistics}) than those given "
            f"({stats.identity()}); give the ones it was made from, or make the plan again.",
        )
    return layers


def check_statistics(stats, model):
    """Raise InputError unless the statistics were captured on this model."""
    shown = f"{getattr(model, 'name_or_path', '') or 'unnamed'}, {type(model).__name__}"
    remedy = f"({shown}) has other weights or another configuration. Capture on this one."
    if stats.model["hash"] != "":  # of a user's own activations
        _check_known(stats.model, model, "These statistics were captured on", remedy)


def _check_known(record, model, made, remedy):
    """Raise InputError unless a record is of this model, by :func:`hcsmoe_core.families.model_hash`."""
    known, named = str(record.get("hash")), f"({record.get('name')}, {record.get('class')})"
    version = f"a model {named} by an earlier version of hcsmoe, which knew it by some of its weights alone"
    require(known.startswith(f"{IDENTITY}:"), f"{made} {version}. Make the statistics and the plan again.")
    require(same_model(known, model_hash(model)), f"{made} another model {named}: this one {remedy}")


def check_fits(plan, model) -> list:
    """MoE layers of a model in the plan's order; InputError unless it is valid and fits their shapes."""
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    planned = [layer.name for layer in plan.layers]
    differing = next((n for n in (*layers, *planned) if (n in layers) != (n in planned)), "another order")
    misfit, remedy = "The plan does not fit the model:", "Make a plan from this model's statistics."
    require(
        planned == list(layers),
        f"{misfit} it has {len(planned)} MoE layers and the model {len(layers)}; they differ in {differing}. "
        f"{remedy}",
    )
    for layer_plan in plan.layers:
        layer, labels = layers[layer_plan.name], len(layer_plan.labels)
        require(
            labels == layer.num_experts,
            f"{misfit} {layer.name} has {layer.num_experts} experts, but the plan labels {labels}. {remedy}",
        )
        check_layer(layer_plan)
        require(
            layer.merged or (layer_plan.width or 0) <= layer.width,
            f"{misfit} {layer.name} has experts of width {layer.width}, but the plan one of "
            f"{layer_plan.width}.",
        )
    return list(layers.values())


@torch.no_grad()
def merge_layer(layer, layer_plan, sample=None) -> dict:
    """The r experts that a plan leaves of a layer: :meth:`MoELayer.tensors` with r rows each.

    Averages, ``W_g = Σ_{e in g} w_e W_e`` (HC-SMoE, arXiv 2410.08589, eq. 6), are summed in float32 (float64
    for float32 weights) and rounded once to the weights' dtype; for other rules see :func:`combine_group`,
    which may need the layer's sample. An expert that is alone in its group is copied, bit for bit, unless it
    is trimmed. InputError if a merged weight is not finite.
    """
    rules = [layer_plan.rule_of(group) for group in range(layer_plan.num_groups)]
    names = " and ".join(sorted({repr(rule["rule"]) for rule in rules}))
    require(
        sample is not None or not layer_plan.uses_sample,
        f'{layer.name}: rule {names} needs the "sample" argument.',
    )
    plain = {"rule": "average", "align": "none", "refit": 0}
    averaged = not layer_plan.rules and all(rules[0].get(key, value) == value for key, value in plain.items())
    combined = {} if averaged else _combined(layer, layer_plan, sample)
    merged = {
        name: combined[name] if name in combined else _averages(tensor, layer_plan)
        for name, tensor in layer.tensors().items()
    }
    for name, rows in merged.items():
        groups = zip(layer_plan.groups(), rows, strict=True)
        bad = next((members for members, row in groups if not all_finite(row)), None)
        require(bad is None, f"{layer.name}: {name} of experts {bad} merges to values that are not finite.")
    return merged


def _averages(tensor, layer_plan):
    """Weighted averages of one tensor's rows, by group or by the plan's mixture."""
    flat = tensor.reshape(len(tensor), -1)
    merged = flat.new_empty(layer_plan.num_groups, flat.shape[1])
    wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    total, term = torch.empty(2, min(BLOCK, flat.shape[1]), dtype=wide, device=tensor.device)
    mixed, alike = layer_plan.mixture, [layer_plan.weights] * layer_plan.num_groups
    for row, weights, members in zip(merged, mixed or alike, layer_plan.groups(), strict=True):
        if mixed is not None:
            members = [e for e, w in enumerate(weights) if w > 0]
        if len(members) == 1:
            row.copy_(flat[members[0]])
            continue
        for average, *blocks in zip(row.split(BLOCK), *(flat[e].split(BLOCK) for e in members), strict=True):
            block_sum, wide_block = total[: len(average)].zero_(), term[: len(average)]
            for expert, block in zip(members, blocks, strict=True):
                block_sum.add_(wide_block.copy_(block), alpha=weights[expert])
            average.copy_(block_sum)
    return merged.view(-1, *tensor.shape[1:])


def _combined(layer, layer_plan, sample):
    """Projections and biases by the plan's rules."""
    whole, merged, untold = layer_plan.width in (None, layer.width), [], []
    for number, members in enumerate(layer_plan.groups()):
        if len(members) == 1 and whole:
            merged.append(layer.neurons(members[0]))
            continue
        group, options = group_and_options(layer, layer_plan, number, sample)
        merged.append(combine_group(group, options))
        untold += [members] * group.untold(options)
    if untold:
        message = f"{layer.name}: no sampled token was routed to experts {untold}, which were averaged."
        warnings.warn(message, stacklevel=2)
    return layer.stacked(merged)


def group_and_options(layer, layer_plan, group: int, sample):
    """One group of a plan and its rule with options: the arguments of :func:`combine_group`."""
    members = layer_plan.groups()[group]
    dominant = members[0] if layer_plan.dominant is None else layer_plan.dominant[group]
    width = {} if layer_plan.width is None else {"width": layer_plan.width}
    return Group(layer, members, layer_plan.weights, dominant, sample), layer_plan.rule_of(group) | width


class Group:
    """The n experts that become one, and what the calibration sample says about them.

    ``members`` are their numbers; ``weights``, ``(n,)`` float64, their shares, which sum to one; ``dominant``
    is an index among them; ``experts``, n Neurons, are in float64, or float32 where the model is in 16 bits.
    """

    def __init__(self, layer, members, weights, dominant, sample):
        down = layer.tensors()["down_proj"]
        self.layer, self.members, self.sample = layer, list(members), sample
        self.dtype = torch.float64 if down.dtype in (torch.float32, torch.float64) else torch.float32
        self.device = down.device
        self.weights = torch.tensor([weights[e] for e in members], dtype=torch.float64)
        self.dominant = self.members.index(dominant)
        self.experts = [layer.neurons(e, self.dtype) for e in members]
        self._computed = {}

    def once(self, key, compute):
        """``compute()``, at the first call with this key only."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def tokens(self, members=None):
        """Sampled tokens routed to any member (of ``members``, indices), ``(T, D)``, and gates ``(T, n)``."""
        chosen = self.members if members is None else [self.members[m] for m in members]

        def gather():
            gates = self.sample.gates[:, chosen]
            rows = (gates != 0).any(1)
            return tuple(x[rows].to(self.device, self.dtype) for x in (self.sample.inputs, gates))

        return self.once(("tokens", *chosen), gather)

    def outputs(self, offset=None) -> torch.Tensor:
        """Sum of the members' gated outputs on :meth:`tokens`, ``Σ_e g_e (f_e(x) − offset)``, ``(T, D)``."""
        total = self.once("outputs", self._gated_outputs)
        return total if offset is None else total - self.tokens()[1].sum(1, keepdim=True) * offset

    def _gated_outputs(self):
        tokens, gates = self.tokens()
        total = torch.zeros(len(tokens), self.layer.hidden_size, dtype=self.dtype, device=self.device)
        for expert, gate in zip(self.experts, gates.T, strict=True):
            rows = gate.nonzero()[:, 0]
            output = self.layer.activate(expert, tokens[rows]) @ expert.down.T
            total[rows] += gate[rows, None] * (output if expert.offset is None else output + expert.offset)
        return total

    def activations(self, neurons) -> torch.Tensor:
        """Activations of other neurons on :meth:`tokens`, times the members' summed gates, ``(T, I')``."""
        tokens, gates = self.tokens()
        return self.layer.activate(neurons, tokens) * gates.sum(1, keepdim=True)

    def untold(self, options: dict) -> bool:
        """Whether a rule looks at tokens, of which none reached the members, so that they are averaged."""
        looks = options.get("refit") or "sample" in combine[options["rule"]].needs_for(options)
        return bool(looks) and "width" not in options and not len(self.tokens()[0])

    def average(self) -> Neurons:
        """Weighted average of the members as they are, ``Σ_e w_e W_e``."""
        return mean_of(self.experts, self.weights)


def mean_of(experts, weights) -> Neurons:
    """Weighted average of experts whose neurons are in the same order."""
    parts = zip(*((expert.up, expert.down, expert.bias, expert.offset) for expert in experts), strict=True)
    return Neurons(
        *(
            None
            if part[0] is None
            else sum(float(w) * tensor for w, tensor in zip(weights, part, strict=True))
            for part in parts
        )
    )


def combine_group(group, options) -> Neurons:
    """One expert from a group, by ``options``: ``rule``, a step of ``steps.combine``, with its own options.

    With ``refit`` rounds, what its neurons read is fitted too. InputError if nothing can be solved for.
    """
    rule, rounds = combine[options["rule"]], check_count("refit", options.get("refit", 0), 0)
    others = ", ".join(f'"{name}"' for name, step in combine.items() if not step.properties.get("solves"))
    require(
        not group.layer.why_not_solvable or not (rounds or rule.properties.get("solves")),
        f'{group.layer.name}: {group.layer.why_not_solvable}, so that combine "{rule.name}"'
        f"{' with refit' if rounds else ''} has nothing to solve; use one of {others}, without refit.",
    )
    if group.untold(options):
        by_weights = {"align": "weights"} if options.get("align", "none") != "none" else {}
        return combine["average"](group, **by_weights)
    neurons = rule(group, **{key: value for key, value in options.items() if key not in ("rule", "refit")})
    if rounds:
        ridge = {key: value for key, value in options.items() if key == "ridge"}
        neurons = refine["refit"](group, neurons, rounds, **ridge)
    return neurons
