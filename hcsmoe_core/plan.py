"""The decision as data: which experts of each layer stay or join, how they combine, and what the router does."""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from hcsmoe_core._util import InputError, check_choice, sha256_json, write_json
from hcsmoe_core.clustering import by_first_appearance
from hcsmoe_core.steps import combine

FORMAT = "hcsmoe-plan"


VERSION = 3


READABLE = (1, 2, 3)


MERGES = ("frequency", "average", "routing-mass")


ROUTERS = ("mapped", "dropped", "averaged", "row-kept", "folded")
# What earlier versions of the file called them.
FORMER_ROUTERS = {"map": "mapped", "drop": "dropped", "average": "averaged"}


# Those that give each group of joined experts one row.
JOINED = ("averaged", "row-kept", "folded")


ALIGNED = 16  # bytes, of a row in PyTorch's grouped products
DROPPED = -1


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes
    ----------
    name : str
        The experts module, such as ``model.layers.3.mlp.experts``.
    labels : list of E int
        Group of each expert, numbered by first appearance; −1 for one that is dropped.
    weights : list of E float
        Weight of each expert in its group; they sum to one in each group.
    combine : dict
        How the members of a group become one expert: ``rule`` and its options; see
        :func:`hcsmoe_core.merging.combine`.
    rules : list of r dict, or None
        The same of each group, where groups differ.
    router : {"mapped", "dropped", "averaged", "row-kept", "folded"}
        ``"mapped"`` keeps all E rows of the router and sends what it chooses through the labels: exact, but no layer of the
        original family. The others are: ``"dropped"`` takes away the rows of dropped experts; ``"averaged"`` gives each group
        one row, the mean of its members'; ``"row-kept"`` that of its dominant expert; ``"folded"`` one that is fitted to
        what the sample's tokens were routed to in the group (:mod:`hcsmoe_core.methods.router`).
    width : int or None
        Neurons of each expert that is written, where these are fewer than before.
    mixture : list of r lists of E float, or None
        Soft groups: the weight of every expert in every merged one, each row summing to one; ``labels`` then say where
        the router's choice goes.
    dominant : list of r int, or None
        The expert of each group that others are matched to or whose router row is kept; by default the first, or for the
        row that with the largest weight.
    protected : list of int
        Experts that stay as they are whatever the method says (super experts).
    """

    name: str
    labels: list
    weights: list
    combine: dict = field(default_factory=lambda: {"rule": "average"})
    router: str = "mapped"
    width: int | None = None
    mixture: list | None = None
    dominant: list | None = None
    protected: list = field(default_factory=list)
    rules: list | None = None

    def rule_of(self, group):
        """``combine`` of one group."""
        return self.combine if self.rules is None else self.rules[group]

    @property
    def joins(self):
        """Whether any experts become one."""
        return self.num_groups < len(self.kept)

    @property
    def uses_sample(self):
        """Whether its groups become experts by what the sample of layer inputs says."""
        return any(uses_sample(self.rule_of(group)) for group in range(self.num_groups))

    @property
    def num_groups(self):
        """r: experts left in this layer."""
        return max(self.labels) + 1

    @property
    def kept(self):
        """Experts that are not dropped, in order."""
        return [e for e, label in enumerate(self.labels) if label != DROPPED]

    def router_rows(self):
        """Each new row of the router as a sum of the old ones, ``(r, E)`` float64; None where it stays as it is.

        Of a folded one, the means by the plan's weights that the fit starts from.
        """
        if self.router == "mapped":
            return None
        rows = np.zeros((self.num_groups, len(self.labels)))
        for group, members in enumerate(self.groups()):
            if self.router == "row-kept":
                largest = max(members, key=lambda e: self.weights[e])
                rows[group, largest if self.dominant is None else self.dominant[group]] = 1
            else:
                rows[group, members] = (
                    [self.weights[e] for e in members] if self.router == "folded" else 1 / len(members)
                )
        return rows

    def groups(self):
        """Members of each group, ``[[expert, …], …]``."""
        groups = [[] for _ in range(self.num_groups)]
        for expert in self.kept:
            groups[self.labels[expert]].append(expert)
        return groups


@dataclass(frozen=True)
class Plan:
    """A merge, decided but not done.

    Attributes
    ----------
    layers : list of LayerPlan
        In model order.
    settings : dict
        Method, similarity, linkage, merge, … that made it.
    model : dict
        ``name``, ``class`` and ``hash`` of the model it is for; may be empty in a plan written by hand.
    statistics : dict
        Which calibration tokens it was made from.
    compress : dict or None
        MC-SMoE's second step, on the experts that are left: see :func:`hcsmoe_core.methods.factors.compress`.
    """

    layers: list
    settings: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    statistics: dict = field(default_factory=dict)
    compress: dict | None = None

    @property
    def needs_sample(self):
        """Whether applying it needs the statistics' sample of layer inputs."""
        folded = any(layer.router == "folded" for layer in self.layers)
        return folded or self.compress is not None or any(layer.uses_sample for layer in self.layers)

    def save(self, path):
        """Write as JSON, in full or not at all, with a checksum that tells a damaged file."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        content["layers"] = [_without_defaults(layer) for layer in self.layers]
        write_json(path, content | {"sha256": sha256_json(content)})


def with_router(plan, router):
    """The same plan with another rule for the router, where experts are joined: rows of others stay as they are.

    Parameters
    ----------
    plan : Plan
    router : {"mapped", "averaged", "row-kept", "folded"}

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If the plan drops experts, so that no other rule is possible.
    """
    check_choice("router", router, tuple(r for r in ROUTERS if r != "dropped"))
    if any(layer.router == "dropped" for layer in plan.layers):
        raise InputError(
            f'The "router" argument cannot be "{router}" for this plan: it drops experts, and their rows with them.'
        )
    layers = [replace(layer, router=router if layer.joins else "mapped") for layer in plan.layers]
    return replace(plan, layers=layers, settings=plan.settings | {"router": router})


def uses_sample(options):
    """Whether a way of combining looks at the sample of layer inputs."""
    return bool(options.get("refit")) or "sample" in combine[options["rule"]].needs_for(options)


def _without_defaults(layer):
    """A layer's plan as a dictionary, without what is as usual."""
    kept = {}
    for key in fields(LayerPlan):
        default = key.default if key.default_factory is MISSING else key.default_factory()
        if getattr(layer, key.name) != default:
            kept[key.name] = getattr(layer, key.name)
    return kept


def load_plan(path):
    """Read a plan.

    A plan written by hand needs ``layers`` alone. One that was saved carries a checksum: after a deliberate edit, remove
    its ``sha256`` line.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a plan, is cut short, was changed, or its layers do not partition their experts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no plan {path}; make one with: hcsmoe plan STATISTICS --experts R --out {path}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is not a readable plan ({error}); it may be cut short. Make it again."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("layers"), list):
        raise InputError(f'{path} is not a plan: it has no list "layers". Make one with: hcsmoe plan')
    digest = content.pop("sha256", None)
    if digest is not None and digest != sha256_json(content):
        raise InputError(
            f'{path} was changed since it was written. Make it again, or remove its "sha256" to mean the change.'
        )
    if content.get("format", FORMAT) != FORMAT or content.get("version", VERSION) not in READABLE:
        raise InputError(f"{path} is no plan of this version of hcsmoe ({FORMAT} {VERSION}); make it again.")
    try:
        layers = [_checked_layer(**layer) for layer in content["layers"]]
    except (TypeError, ValueError) as error:
        raise InputError(f"{path} is not a valid plan: {error}") from None
    about = {key: content.get(key) or {} for key in ("settings", "model", "statistics")}
    return Plan(layers, **about, compress=content.get("compress"))


def _checked_layer(name, labels, weights, **rest):
    """LayerPlan of checked values."""
    whole = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
    kept = [label for label in labels if label != DROPPED] if whole else []
    if not kept or by_first_appearance(kept).tolist() != kept:
        raise InputError(
            f"{name}: labels must be group numbers in order of first appearance (0, then 1, …), or -1 for an expert that is "
            f"dropped; not {labels}."
        )
    if len(weights) != len(labels) or not all(isinstance(w, int | float) and w >= 0 for w in weights):
        raise InputError(
            f"{name}: there must be one weight of at least 0 for each of the {len(labels)} experts."
        )
    sums = np.bincount(kept, [w for w, label in zip(weights, labels, strict=True) if label != DROPPED])
    if not np.allclose(sums, 1, rtol=0, atol=1e-6):
        raise InputError(
            f"{name}: the weights of each group must sum to one; they sum to {sums.round(6).tolist()}."
        )
    rest["router"] = FORMER_ROUTERS.get(rest.get("router"), rest.get("router", "mapped"))
    layer = LayerPlan(name, list(labels), [float(w) for w in weights], **rest)
    check_choice(f"{name}: router", layer.router, ROUTERS)
    if not isinstance(layer.combine, dict) or "rule" not in layer.combine:
        raise InputError(f'{name}: "combine" must be an object with a "rule"; not {layer.combine!r}.')
    if layer.rules is not None and (
        len(layer.rules) != layer.num_groups
        or not all(isinstance(rule, dict) and "rule" in rule for rule in layer.rules)
    ):
        raise InputError(
            f'{name}: "rules" must be one object with a "rule" for each of the {layer.num_groups} groups.'
        )
    if len(kept) < len(labels) and layer.router != "dropped":
        raise InputError(
            f'{name}: experts are dropped, so that the router must be "dropped"; not {layer.router!r}.'
        )
    if layer.dominant is not None and [labels[e] for e in layer.dominant] != list(range(layer.num_groups)):
        raise InputError(
            f"{name}: there must be one dominant expert of each group, in order; not {layer.dominant}."
        )
    if layer.mixture is not None:
        mixture = np.asarray(layer.mixture, dtype=np.float64)
        if mixture.shape != (layer.num_groups, len(labels)) or not np.allclose(
            mixture.sum(1), 1, rtol=0, atol=1e-6
        ):
            raise InputError(
                f"{name}: the mixture must be one row of {len(labels)} weights that sum to one for each group."
            )
    return layer


def merge_weights(labels, sums, merge):
    """Weight of each expert in its group, ``(E,)`` float64; they sum to one in each group, and are 0 where dropped.

    Parameters
    ----------
    labels : (E,) sequence of int
    sums : LayerStatistics
    merge : {"frequency", "average", "routing-mass"}
        By the number of tokens routed to each, alike, or by the weight that the router gave each in all. A group that no
        token was routed to is averaged with equal weights.

    Returns
    -------
    (E,) float64 array
    """
    labels = np.asarray(labels)
    share = {
        "frequency": lambda: sums.usage_count.sum(0).double().numpy(),
        "routing-mass": lambda: sums.routing_mass.sum(0).numpy().clip(min=0),
        "average": lambda: np.ones(len(labels)),
    }[merge]()
    kept = labels != DROPPED
    total = np.bincount(labels[kept], share[kept])
    share = np.where(total[labels] > 0, share, 1.0)
    return np.where(kept, share / np.bincount(labels[kept], share[kept])[labels], 0.0)


def odd_widths(plan, dtype):
    """Widths of trimmed experts that are not a multiple of 16 bytes."""
    return sorted(
        {layer.width for layer in plan.layers if layer.width and layer.width * dtype.itemsize % ALIGNED}
    )
