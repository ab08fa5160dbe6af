"""The decision as data: which experts of each layer stay or join, how they combine, what the router does."""

import itertools
import math
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path

import numpy as np

from hcsmoe_core._util import (
    InputError,
    check_choice,
    check_count,
    check_kind,
    html_table,
    read_record,
    require,
    signed,
    write_json,
)
from hcsmoe_core.clustering import by_first_appearance
from hcsmoe_core.steps import combine, compress, router

FORMAT, VERSION = "hcsmoe-plan", 4
ROUTERS = (
    "mapped",  # keeps its E rows; its choice goes through the labels: exact, but no layer of the family
    "dropped",  # loses the rows of dropped experts
    "averaged",  # gets one row per group, the mean of its members'
    "row-kept",  # that of its dominant expert
    "folded",  # one fitted to the sample's routing to the group: hcsmoe_core.methods.routing
)
FORMER_ROUTERS = {"map": "mapped", "drop": "dropped", "average": "averaged"}  # in plans of version 1 to 3
JOINED = ("averaged", "row-kept", "folded")  # routers with one row per group of joined experts
DROPPED = -1  # label of an expert that is dropped


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer's E experts, of which r are left."""

    name: str  # of the experts module, such as model.layers.3.mlp.experts
    labels: list  # E int: group of each expert, numbered by first appearance; DROPPED for one that is dropped
    weights: list  # E float: weight of each expert in its group; they sum to one in each group
    # how a group becomes one expert: "rule", a step of steps.combine, and its options; "refit", rounds
    combine: dict = field(default_factory=lambda: {"rule": "average"})
    router: str = "mapped"  # of ROUTERS
    width: int | None = None  # neurons per expert, where these are fewer than before
    # r lists of E float: soft groups, the weight of every expert in each, summing to one; the router's choice
    # goes by the labels
    mixture: list | None = None
    # r int: expert of each group that others are matched to, or whose router row is kept; by default the
    # first, or for the row that with the largest weight
    dominant: list | None = None
    protected: list = field(default_factory=list)  # experts that stay as they are in any case (super experts)
    rules: list | None = None  # r dict: "combine" of each group, where groups differ

    def rule_of(self, group: int) -> dict:
        """``combine`` of one group."""
        return self.combine if self.rules is None else self.rules[group]

    @property
    def num_groups(self) -> int:
        """r: experts left in this layer."""
        return max(self.labels) + 1

    @property
    def kept(self) -> list:
        """Experts that are not dropped, in order."""
        return [e for e, label in enumerate(self.labels) if label != DROPPED]

    @property
    def joins(self) -> bool:
        """Whether any experts become one."""
        return self.num_groups < len(self.kept)

    @property
    def uses_sample(self) -> bool:
        """Whether combining looks at the sample of layer inputs."""
        return any(
            rule.get("refit") or "sample" in combine[rule["rule"]].needs_for(rule)
            for rule in self.rules or [self.combine]
        )

    def groups(self) -> list:
        """Members of each group, ``[[expert, …], …]``."""
        label = self.labels.__getitem__
        return [list(members) for _, members in itertools.groupby(sorted(self.kept, key=label), label)]

    def router_rows(self) -> np.ndarray | None:
        """Each new router row as a sum of the old ones, ``(r, E)`` float64; None where the router stays.

        For rows that are fitted, the weighted means that the fit starts from.
        """
        if self.router == "mapped":
            return None
        rows = np.zeros((self.num_groups, len(self.labels)))
        for group, members in enumerate(self.groups()):
            if self.router == "row-kept":
                largest = max(members, key=self.weights.__getitem__)
                rows[group, largest if self.dominant is None else self.dominant[group]] = 1
            else:
                alike = self.router in ("dropped", "averaged")
                rows[group, members] = 1 / len(members) if alike else [self.weights[e] for e in members]
        return rows


_USUAL = LayerPlan("", [], [])
# What a file of a plan must hold, for hcsmoe_core._util.check_kind; values are checked by check_layer.
KIND = {
    "layers": [
        {"name": str, "labels": list, "weights": list, "combine?": dict, "router?": str, "rules?": ([dict],)}
        | {"mixture?": ([list],), "dominant?": ([int],), "protected?": [int]}
    ],
    "settings?": (dict,),
    "model?": (dict,),
    "statistics?": (dict,),
    "compress?": (dict,),
}
CALIBRATION = {"tokens": int, "domains": [str]}


@dataclass(frozen=True, repr=False)
class Plan:
    """A merge, decided but not done."""

    layers: list  # LayerPlans in model order
    settings: dict = field(default_factory=dict)  # method, similarity, linkage, merge, …
    model: dict = field(default_factory=dict)  # its "name", "class", "hash"; empty if written by hand
    statistics: dict = field(default_factory=dict)  # Statistics.identity() of those it was made from
    compress: dict | None = None  # MC-SMoE's second step: options of steps.compress["low-rank"]

    def __repr__(self):
        before, after = (sum(map(f, self.layers)) for f in (lambda p: len(p.labels), lambda p: p.num_groups))
        kinds = ("similarity", "linkage", "merge", "combine")
        chosen = (f"{kind} {self.settings[kind]}" for kind in kinds if kind in self.settings)
        about = ", ".join([self.settings.get("method", "written by hand"), *chosen])
        return (
            f"<Plan for {self.model.get('name') or 'a model'}: {len(self.layers)} MoE layers, "
            f"{before} experts to {after}; {about}>"
        )

    def _repr_html_(self):
        rows = [
            {"": i, "layer": layer.name, "experts": len(layer.labels), "left": layer.num_groups}
            | {"dropped": layer.labels.count(DROPPED), "largest group": max(map(len, layer.groups()))}
            | {"combine": layer.rule_of(0)["rule"], "router": layer.router}
            | {"width": layer.width or "as before"}
            for i, layer in enumerate(self.layers)
        ]
        return html_table(repr(self)[1:-1], rows)

    @property
    def needs_sample(self) -> bool:
        """Whether applying it needs the statistics' sample of layer inputs."""
        fitted = (layer.router in router or layer.uses_sample for layer in self.layers)
        return self.compress is not None or any(fitted)

    def save(self, path):
        """Write as JSON, in full or not at all, with a checksum that tells a damaged file."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["layers"] = [
            {key: value for key, value in layer.items() if value != getattr(_USUAL, key)}
            for layer in content["layers"]
        ]
        write_json(path, signed(content))


def with_router(plan: Plan, router: str) -> Plan:
    """The same plan with another router, ``"mapped"`` or one of :data:`JOINED`, in layers where experts join.

    InputError if the plan drops experts, so that no other router is possible.
    """
    check_choice("router", router, tuple(name for name in ROUTERS if name != "dropped"))
    require(
        all(layer.router != "dropped" for layer in plan.layers),
        f'The "router" argument cannot be "{router}" for this plan: it drops experts and their rows.',
    )
    layers = [replace(layer, router=router if layer.joins else "mapped") for layer in plan.layers]
    return replace(plan, layers=layers, settings=plan.settings | {"router": router})


def load_plan(path: str | Path) -> Plan:
    """Read a plan; InputError if it is none, is cut short, was changed or is not consistent
    (:func:`check_layer`).

    One written by hand needs ``layers`` alone. A saved one carries a checksum: after a deliberate edit,
    remove its ``sha256`` line.
    """
    path, remedy = Path(path), "make one with: hcsmoe plan STATISTICS --experts R --out"
    require(path.is_file(), f"There is no plan {path}; {remedy} {path}", FileNotFoundError)
    content = read_record(path, KIND, what="plan")
    require(
        content.get("format", FORMAT) == FORMAT and content.get("version", VERSION) in range(1, VERSION + 1),
        f"{path} is no plan of this version of hcsmoe ({FORMAT} {VERSION}); make it again.",
    )
    try:
        layers = [LayerPlan(**layer) for layer in content["layers"]]
        layers = [replace(plan, router=FORMER_ROUTERS.get(plan.router, plan.router)) for plan in layers]
        for layer in layers:
            check_layer(layer)
        for name, value in (content.get("compress") or {}).items():
            compress["low-rank"].checked(name, value)
        records = {key: content.get(key) or {} for key in ("settings", "model", "statistics")}
        check_kind(records["statistics"] or {"tokens": 1, "domains": []}, CALIBRATION, '"statistics"')
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not a valid plan: {error}") from None
    return Plan(layers, **records, compress=content.get("compress"))


def check_layer(plan: LayerPlan):
    """Raise InputError unless a layer's plan is consistent in itself."""

    def check(valid, rule):
        require(valid, f"{plan.name}: {rule}")

    labels, kept = plan.labels, [label for label in plan.labels if label != DROPPED]
    check(
        all(isinstance(label, Integral) and not isinstance(label, bool) for label in labels)
        and kept
        and by_first_appearance(kept).tolist() == kept,
        "labels must be group numbers in order of first appearance (0, then 1, …), or -1 for an expert that "
        f"is dropped; not {labels}.",
    )
    check(
        _are_shares(plan.weights, len(labels)),
        f"there must be one finite weight of at least 0 for each of the {len(labels)} experts.",
    )
    sums = [math.fsum(plan.weights[e] for e in members) for members in plan.groups()]
    check(
        np.allclose(sums, 1, rtol=0, atol=1e-6),
        f"the weights of each group must sum to one; they sum to {np.round(sums, 6).tolist()}.",
    )
    check_choice(f"{plan.name}: router", plan.router, tuple(dict.fromkeys((*ROUTERS, *router))))
    check(
        len(kept) == len(labels) or plan.router == "dropped",
        f'experts are dropped, so that the router must be "dropped"; not {plan.router!r}.',
    )
    count, rules = plan.num_groups, [plan.combine] if plan.rules is None else plan.rules
    check(
        all(isinstance(rule, dict) and "rule" in rule for rule in (plan.combine, *rules)),
        f'"combine" and each of "rules" must be objects with a "rule"; not {plan.combine!r}, {plan.rules!r}.',
    )
    check(plan.rules is None or len(rules) == count, f'"rules" must be one for each of the {count} groups.')
    for rule in (plan.combine, *rules):
        _check_rule(plan.name, rule)
    check(
        plan.dominant is None
        or [labels[e] for e in plan.dominant if 0 <= e < len(labels)] == list(range(count)),
        f"there must be one dominant expert of each group, in order; not {plan.dominant}.",
    )
    check(
        plan.mixture is None
        or (
            len(plan.mixture) == count
            and all(_are_shares(row, len(labels)) and abs(math.fsum(row) - 1) < 1e-6 for row in plan.mixture)
        ),
        f"the mixture must be one row of {len(labels)} weights of at least 0 that sum to one for each group.",
    )
    check(not any("width" in rule for rule in rules), 'a "width" is the layer\'s, not that of a rule.')
    check(
        plan.width is None or (isinstance(plan.width, Integral) and plan.width >= 1),
        f"the width must be a whole number of at least 1; not {plan.width!r}.",
    )
    narrowing = [name for name, step in combine.items() if "width" in step.options]
    check(
        plan.width is None or (plan.mixture is None and all(rule["rule"] in narrowing for rule in rules)),
        f"a width goes with rules that choose neurons ({', '.join(narrowing)}), not with {rules}.",
    )


def _check_rule(name, rule):
    """Raise InputError unless there is such a rule, and its options are what they may be."""
    try:
        step = combine[check_choice("combine", rule["rule"], combine)]
        check_count("refit", rule.get("refit", 0), 0)
        for option in rule.keys() - {"rule", "refit", "width"}:
            step.checked(option, rule[option])
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _are_shares(weights, count):
    # at most 1 but for rounding
    numbers = all(isinstance(w, Real) and not isinstance(w, bool) and 0 <= w < 2 for w in weights)
    return len(weights) == count and numbers


def odd_widths(plan: Plan, dtype) -> list:
    """Widths of trimmed experts whose rows PyTorch's grouped products refuse: not a multiple of 16 bytes."""
    return sorted({layer.width for layer in plan.layers if (layer.width or 0) * dtype.itemsize % 16})
