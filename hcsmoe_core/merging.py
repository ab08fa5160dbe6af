"""A plan and the weights give the r experts of a layer, on the live model."""

import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import InputError, check_count
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.moe import Neurons, all_finite
from hcsmoe_core.replace import put_experts, take_experts
from hcsmoe_core.steps import combine, compress, refine, router


def check_statistics(stats, model):
    """Raise ValueError unless the statistics were captured on this model."""
    if stats.model["hash"] != model_hash(model):
        raise InputError(
            f"These statistics were captured on another model ({stats.model['name']}, {stats.model['class']}) than the one "
            f"given ({model.name_or_path or 'unnamed'}, {type(model).__name__}); capture on this one."
        )


def check_fits(plan, model):
    """MoE layers of ``model`` in the order of the plan's.

    Raises
    ------
    ValueError
        If the plan is for other layers, other numbers of experts or other weights than the model has.
    """
    layers = {layer.name: layer for layer in find_moe_layers(model)}
    planned = [layer.name for layer in plan.layers]
    if planned != list(layers):
        missing = (
            [n for n in layers if n not in planned]
            or [n for n in planned if n not in layers]
            or ["another order"]
        )
        raise InputError(
            f"The plan does not fit the model: it has {len(planned)} MoE layers and the model {len(layers)}; they differ "
            f"in {missing[0]}. Make a plan from this model's statistics."
        )
    for layer_plan in plan.layers:
        experts = layers[layer_plan.name].num_experts
        if len(layer_plan.labels) != experts:
            raise InputError(
                f"The plan does not fit the model: {layer_plan.name} has {experts} experts, but the plan labels "
                f"{len(layer_plan.labels)}. Make a plan from this model's statistics."
            )
    return [layers[name] for name in planned]


def check_weights(plan, model):
    """Raise ValueError if the plan names the model it was made for, and that is not this one."""
    if plan.model.get("hash") and plan.model["hash"] != model_hash(model):
        raise InputError(
            f"The plan was made for another model ({plan.model.get('name')}, {plan.model.get('class')}): this one has the "
            "same shape but other weights. Make a plan from this model's statistics."
        )


BLOCK = 1 << 16  # weights that are summed at once: wide sums of so many stay in a CPU's caches


def apply_plan(model, plan, stats=None):
    """Merge or prune the experts of a live model, in place.

    Where the plan keeps the router (``"mapped"``), what it chooses among E experts is sent through the plan's labels to r
    merged ones, so that the model computes exactly what E experts would of which those of a group are equal. Where it
    drops rows, the router chooses among those left by the model's own rule. Undone by :func:`restore`; the original
    weights stay in memory until then.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    plan : Plan
    stats : Statistics, optional
        Those that the plan was made from; needed where experts are combined by what they do on the sample of layer inputs
        (least squares, selection, trimming, activations, MC-SMoE).

    Returns
    -------
    transformers.PreTrainedModel
        The same model.

    Raises
    ------
    ValueError
        If the plan does not fit the model, needs statistics that are not given, the model is merged already, or a merged
        weight is not finite. The model is then as it was.
    """
    layers = check_appliable(model, plan, stats)
    try:
        bar = tqdm(
            plan.layers, desc="merge", unit="layer", leave=False, disable=None if plan.needs_sample else True
        )
        for layer, layer_plan in zip(layers, bar, strict=True):
            apply_layer(layer, layer_plan, stats)
        if plan.compress:
            compress["low-rank"](layers, plan, stats, **plan.compress)
    except BaseException:
        restore(model)
        raise
    return model


def check_appliable(model, plan, stats=None):
    """MoE layers of a model that a plan can be applied to, in the plan's order; ValueError as of :func:`apply_plan`."""
    layers = check_fits(plan, model)
    check_unmerged(layers)
    check_weights(plan, model)
    check_sample(plan, stats)
    return layers


def apply_layer(layer, layer_plan, stats=None):
    """Merge or prune the experts of one layer, in place."""
    sample = stats.layers[layer.name].sample if stats is not None else None
    put_layer(layer, layer_plan, merge_layer(layer, layer_plan, sample), sample)


def put_layer(layer, layer_plan, tensors, sample=None):
    """Give one layer its merged experts, as :func:`merge_layer` made them, and the router that the plan says."""
    means = layer_plan.router_rows()
    rows, scales = (None if means is None else torch.from_numpy(means)), None
    if layer_plan.router in router:
        rows, scales = torch.from_numpy(router[layer_plan.router](layer_plan, sample)), rows
    put_experts(layer, tensors, layer_plan.labels, rows=rows, scales=scales)
    layer.experts._merged.plan = layer_plan


def restore(model):
    """Put the original experts back, to the bit; a model that is not merged stays as it is.

    Raises
    ------
    ValueError
        If the model was loaded merged.
    """
    for layer in find_moe_layers(model):
        if layer.merged:
            take_experts(layer)
    return model


def check_unmerged(layers):
    """Raise ValueError if a layer is merged."""
    if any(layer.merged for layer in layers):
        raise InputError("This model is merged already; restore(model) first, or load the original.")


def check_sample(plan, stats):
    """Raise ValueError unless ``stats`` hold the sample that the plan needs, and are those it was made from."""
    if not plan.needs_sample:
        return
    if stats is None:
        raise InputError(
            "This plan looks at the sample of layer inputs, by which experts are combined or routers folded; give the "
            "statistics it was made from: "
            "apply_plan(model, plan, stats), or --statistics FILE on the command line."
        )
    stats.check(("sample",), "This plan")
    if plan.statistics and plan.statistics != stats.identity():
        raise InputError(
            f"The plan was made from other statistics (hash {plan.statistics.get('hash')}) than those given "
            f"({stats.identity()['hash']}); give the ones it was made from, or make the plan again."
        )


def merge_layer(layer, layer_plan, sample=None):
    """The r experts that a plan leaves of a layer.

    Averages, ``W_g = Σ_{e in g} w_e W_e`` (HC-SMoE, arXiv 2410.08589, eq. 6), are summed in float32 (float64 for float32
    weights) and rounded once to the weights' dtype; for other rules see :func:`hcsmoe_core.merging.combine_group`. An expert
    that is alone in its group is copied, bit for bit, unless it is trimmed.

    Parameters
    ----------
    layer : MoELayer
    layer_plan : LayerPlan
    sample : LayerSample, optional
        Where the plan's rule looks at it.

    Returns
    -------
    dict of str to tensor
        For each of :meth:`MoELayer.tensors`, the same with r rows.

    Raises
    ------
    ValueError
        If a merged weight is not finite, or the rule needs a sample that is not given.
    """
    if sample is None and layer_plan.uses_sample:
        rules = sorted({layer_plan.rule_of(group)["rule"] for group in range(layer_plan.num_groups)})
        raise InputError(f'{layer.name}: rule {" and ".join(map(repr, rules))} needs the "sample" argument.')
    merged = {name: _averages(tensor.detach(), layer_plan) for name, tensor in layer.tensors().items()}
    options = layer_plan.combine
    plain = (
        options["rule"] == "average" and options.get("align", "none") == "none" and not options.get("refit")
    )
    if layer_plan.rules or not plain:
        merged |= _combined(layer, layer_plan, sample)
    for name, tensor in merged.items():
        if not all_finite(tensor):
            members = next(
                m for row, m in zip(tensor, layer_plan.groups(), strict=True) if not all_finite(row)
            )
            raise InputError(
                f"{layer.name}: {name} of experts {members} merges to values that are not finite."
            )
    return merged


def _averages(tensor, layer_plan):
    """Weighted averages of one tensor's rows, by group or by the plan's mixture."""
    flat = tensor.reshape(len(tensor), -1)
    rows = flat.new_empty(layer_plan.num_groups, flat.shape[1])
    wide = torch.float64 if tensor.dtype in (torch.float32, torch.float64) else torch.float32
    total, part = torch.empty(2, min(BLOCK, flat.shape[1]), dtype=wide, device=tensor.device)
    for group, members in enumerate(layer_plan.groups()):
        weights = layer_plan.weights
        if layer_plan.mixture is not None:
            weights = layer_plan.mixture[group]
            members = [e for e, w in enumerate(weights) if w > 0]
        if len(members) == 1:
            rows[group] = flat[members[0]]
            continue
        blocks = zip(rows[group].split(BLOCK), *(flat[e].split(BLOCK) for e in members), strict=True)
        for made, *given in blocks:
            summed, one = total[: len(made)].zero_(), part[: len(made)]
            for expert, values in zip(members, given, strict=True):
                summed.add_(one.copy_(values), alpha=weights[expert])
            made.copy_(summed)
    return rows.view(-1, *tensor.shape[1:])


@torch.no_grad()
def _combined(layer, layer_plan, sample):
    """Projections and biases by the plan's rules."""
    made = []
    for place, members in enumerate(layer_plan.groups()):
        if len(members) == 1 and layer_plan.width in (None, layer.width):
            made.append(layer.neurons(members[0]))
        else:
            made.append(combine_group(*group_and_options(layer, layer_plan, place, sample)))
    return layer.stacked(made)


def group_and_options(layer, layer_plan, place, sample):
    """One group of a plan, and how it becomes one expert: what :func:`hcsmoe_core.merging.combine_group` takes."""
    members = layer_plan.groups()[place]
    dominant = members[0] if layer_plan.dominant is None else layer_plan.dominant[place]
    width = {} if layer_plan.width is None else {"width": layer_plan.width}
    return Group(layer, members, layer_plan.weights, dominant, sample), layer_plan.rule_of(place) | width


class Group:
    """The experts that become one, and what the calibration sample says about them.

    Attributes
    ----------
    layer : MoELayer
        Not merged.
    members : list of n int
    weights : (n,) float64 tensor
        Of each member in the group; they sum to one.
    dominant : int
        Place of the dominant expert among the members.
    experts : list of n Neurons
        In float64, or float32 where the model is in 16 bits.
    """

    def __init__(self, layer, members, weights, dominant, sample):
        down = layer.tensors()["down_proj"]
        self.layer, self.members, self.sample = layer, list(members), sample
        self.dtype = torch.float64 if down.dtype in (torch.float32, torch.float64) else torch.float32
        self.device = down.device
        self.weights = torch.tensor([weights[e] for e in members], dtype=torch.float64)
        self.dominant = self.members.index(dominant)
        self.experts = [layer.neurons(e, self.dtype) for e in members]
        self._found = {}

    def once(self, key, make):
        """What ``make`` gives, worked out the first time only: options are tried one after another on the same group."""
        if key not in self._found:
            self._found[key] = make()
        return self._found[key]

    def tokens(self, members=None):
        """Sampled tokens that were routed to any of some members (all by default), and the members' gates.

        Parameters
        ----------
        members : list of int, optional
            Places among the group's members.

        Returns
        -------
        tokens : (T, D) tensor
        gates : (T, n) tensor
            Applied routing weights; zero where a member was not chosen.
        """
        chosen = self.members if members is None else [self.members[m] for m in members]
        gates = self.sample.gates[:, chosen]
        rows = (gates != 0).any(1)
        tokens = self.sample.inputs[rows].to(self.device, self.dtype)
        return tokens, gates[rows].to(self.device, self.dtype)

    def outputs(self, offset=None):
        """What the members give together on :meth:`tokens`, ``Σ_e g_e f_e(x)``, less what an offset gives, ``(T, D)``."""
        total = self.once("outputs", lambda: gated_outputs(self))
        return total if offset is None else total - self.tokens()[1].sum(1, keepdim=True) * offset

    def activations(self, neurons):
        """What some neurons would give in the group's place on :meth:`tokens`, times the summed gates, ``(T, I')``."""
        tokens, gates = self.tokens()
        return self.layer.activate(neurons, tokens) * gates.sum(1, keepdim=True)

    def average(self):
        """Weighted average of the members as they are, ``Σ_e w_e W_e``."""
        return mean_of(self.experts, self.weights)


def mean_of(experts, weights):
    """Weighted average of experts whose neurons are in the same order."""

    def add(*tensors):
        if tensors[0] is None:
            return None
        return sum(float(w) * t for w, t in zip(weights, tensors, strict=True))

    columns = ("up", "down", "bias", "offset")
    return Neurons(*(add(*(getattr(e, c) for e in experts)) for c in columns))


def combine_group(group, options):
    """One expert from a group of several.

    Parameters
    ----------
    group : Group
    options : dict
        ``rule``, a step of :data:`hcsmoe_core.steps.combine`, with its options; and ``refit``, rounds of fitting what the
        expert's neurons read as well.

    Returns
    -------
    Neurons

    Raises
    ------
    ValueError
        If the rule is unknown, or solves for a projection where that is not possible.
    """
    rule, rounds = combine[options["rule"]], check_count("refit", options.get("refit", 0), 0)
    if group.layer.unsolvable and (rounds or rule.properties.get("solves")):
        others = ", ".join(f'"{name}"' for name, step in combine.items() if not step.properties.get("solves"))
        raise InputError(
            f'{group.layer.name}: {group.layer.unsolvable}, so that combine "{rule.name}"'
            f"{' with refit' if rounds else ''} has nothing to solve; use one of {others}, without refit."
        )
    neurons = rule(group, **{k: v for k, v in options.items() if k not in ("rule", "refit")})
    if not rounds:
        return neurons
    return refine["refit"](group, neurons, rounds, **{k: v for k, v in options.items() if k == "ridge"})


def gated_outputs(group):
    tokens, gates = group.tokens()
    total = torch.zeros(len(tokens), group.experts[0].down.shape[0], dtype=group.dtype, device=group.device)
    for place, expert in enumerate(group.experts):
        rows = gates[:, place].nonzero()[:, 0]
        output = group.layer.activate(expert, tokens[rows]) @ expert.down.T
        total[rows] += gates[rows, place, None] * (
            output if expert.offset is None else output + expert.offset
        )
    return total
