"""From a method's row and a user's settings to its steps and options, checked.

What a step says about itself where it is registered, beside its needs:

``uses``
    Of a group or budget: kinds of steps that it looks at, of similarity, saliency, merge and combine.
``pair``
    Of a group: a step of another kind that goes with this group alone, as this group with it.
``only``
    Steps and options of other kinds that it goes with; ``because`` is added to the error.
``check``
    Function of the :class:`Recipe` that raises InputError where the step does not go with the rest.
``random``
    Whether it depends on the seed: a truth value, or a function of the step's options.
``model``
    Whether it looks at the experts' weights while planning.
"""

import functools
from dataclasses import dataclass

import numpy as np

from hcsmoe_core import similarity as similarities
from hcsmoe_core._util import InputError, check_choice, check_count
from hcsmoe_core.plan import MERGES, ROUTERS
from hcsmoe_core.statistics import NEEDS
from hcsmoe_core.steps import METHODS, TABLES, Step, group, router

DEFAULTS = {
    "similarity": "expert-output",
    "group": "hierarchical",
    "budget": "uniform",
    "saliency": "reap",
    "merge": "frequency",
    "combine": "average",
    "router": "mapped",
    "compress": "",
    "guard": False,
}
RECOMMENDED, POINTS_TO = "recommended", "least-residual"
INTERNAL = ("width", "seed")  # options of rules that the planner sets


class Method:
    """One row of :data:`METHODS`: a method of the literature, or one of ours, as the steps it is made of.

    Parameters
    ----------
    paper : str
        Where it is described.
    title : str
        What it does, in a line.
    cost : str
        What making a plan and merging cost, beside the capture.
    **settings
        Steps and options that differ from the defaults, such as ``group="k-means"`` and ``linkage="ward"``.
    """

    def __init__(self, paper: str = "", *, title: str = "", cost: str = "milliseconds", **settings):
        self.paper, self.title, self.cost, self.settings = paper, title, cost, settings

    @property
    def needs(self) -> tuple:
        """Names of :data:`hcsmoe_core.statistics.NEEDS` that it needs."""
        return _recipe("", self.settings, {}).needs


@dataclass(frozen=True)
class Recipe:
    """A method's steps and options: :func:`resolve`.

    Attributes
    ----------
    method : str
        Its own name; ``"recommended"`` points to one.
    steps : dict of str to str
        Name of the step of each kind, also of kinds that make no difference.
    by_kind : dict of str to dict
        Options of the steps that matter, by kind.
    """

    method: str
    steps: dict
    by_kind: dict

    @property
    def options(self) -> dict:
        """Every option that matters; where two steps differ in one, the second has its kind before it."""
        flat = {}
        for kind, options in self.by_kind.items():
            for name, value in options.items():
                flat[name if flat.get(name, value) == value else f"{kind}_{name}"] = value
        return flat

    @functools.cached_property
    def settings(self) -> dict:
        """Steps and options that matter, as JSON values; equal for equal plans."""
        chosen = {kind: self.steps[kind] for kind in self.by_kind if kind in DEFAULTS}
        if "similarity" in chosen:
            parts = similarities.parts_of(chosen["similarity"])
            alike = len({weight for _, weight in parts}) == 1
            chosen["similarity"] = "+".join(
                name if alike else f"{weight:.6g}*{name}" for name, weight in parts
            )
        return chosen | self.options

    def step(self, kind: str) -> Step | None:
        """The step of a kind, or None where that kind makes no difference or is no function of its own."""
        table = TABLES.get(kind, {})
        return table[self.steps[kind]] if kind in self.by_kind and self.steps[kind] in table else None

    @property
    def metric(self) -> str:
        """The metric that distances come in."""
        return similarities.metric_of(self.steps["similarity"], self.steps["metric"])

    @property
    def parts(self) -> list:
        """Names of the similarities that are looked at."""
        if "similarity" not in self.by_kind:
            return []
        return [name for name, _ in similarities.parts_of(self.steps["similarity"])]

    @property
    def needs(self) -> tuple:
        """Names of what it needs of the statistics, in the order of :data:`hcsmoe_core.statistics.NEEDS`."""
        needed = {"usage", *(("norms",) if self.steps["guard"] else ())}
        for part in self.parts:
            needed.update(similarities.NEEDED[part])
        for kind, options in self.by_kind.items():
            if step := self.step(kind):
                needed.update(step.needs_for(options))
        return tuple(name for name in NEEDS if name in needed)

    @property
    def needs_model(self) -> bool:
        """Whether the experts' weights are looked at to make a plan; merging always does."""
        return any(part in similarities.FROM_MODEL for part in self.parts) or self._any("model")

    @property
    def random(self) -> bool:
        """Whether plans or merged weights depend on the seed."""
        return self._any("random")

    def _any(self, name):
        for kind, options in self.by_kind.items():
            value = (step := self.step(kind)) and step.properties.get(name)
            if value(options) if callable(value) else value:
                return True
        return False

    @property
    def kind(self) -> str:
        """What becomes of experts: it "prunes", "trims", "averages", or "refits" them to what they did."""
        solves = (step := self.step("combine")) and step.properties.get("solves")
        return self.step("group").properties.get("kind") or ("refits" if solves else "averages")

    def combination(self, seed: int = 0) -> dict:
        """``combine`` of the plan's layers: the rule with its options."""
        rule = (
            {"rule": self.steps["combine"]} | self.by_kind.get("combine", {}) | self.by_kind.get("refine", {})
        )
        step = self.step("combine")
        return rule | ({"seed": seed} if step and "seed" in step.options else {})


def resolve(method: str = "hc-smoe", **settings) -> Recipe:
    """Steps and options of a method, with some of them set otherwise.

    Parameters
    ----------
    method : str
        Of :data:`METHODS`, or ``"recommended"``: the one that was found to lose least.
    **settings
        Steps by kind (``group="k-means"``), options of steps (``linkage="ward"``), ``metric``, ``merge``,
        ``guard``.

    Raises
    ------
    InputError
        If the method or a setting is unknown, no step of the method takes an option, or steps do not go
        together.
    """
    check_choice("method", method, (*METHODS, RECOMMENDED))
    name = POINTS_TO if method == RECOMMENDED else method
    return _recipe(name, METHODS[name].settings, settings)


def _recipe(method, row, settings):
    for name in settings:
        check_choice("setting", name, option_names())
    chosen = row | settings
    grouping = group[chosen.get("group", DEFAULTS["group"])]
    paired = grouping.properties.get("pair", {})
    steps = DEFAULTS | paired | {kind: chosen[kind] for kind in DEFAULTS if kind in chosen}
    steps["metric"] = chosen.get("metric", "")
    _check_names(steps, paired)
    by_kind = {kind: _options(kind, steps, chosen) for kind in _used_kinds(steps)}
    if "combine" in by_kind:
        refit = check_count("refit", chosen.get("refit", grouping.properties.get("refit", 0)), 0)
        if refit or "refit" in grouping.properties:
            steps["refine"], by_kind["refine"] = "refit" if refit else "", {"refit": refit}
    recipe = Recipe(method, steps, by_kind)
    _check_used(recipe, settings)
    _check_together(recipe)
    return recipe


def _check_names(steps, paired):
    similarities.metric_of(steps["similarity"], steps["metric"])
    choices = {kind: tuple(table) for kind, table in TABLES.items() if kind in steps and kind != "similarity"}
    choices["combine"] += tuple(
        s.properties["pair"]["combine"] for s in group.values() if _pairs(s, "combine")
    )
    choices["router"] = tuple(dict.fromkeys((*ROUTERS, *router)))
    choices |= {"compress": ("", *choices["compress"]), "merge": MERGES, "guard": (False, True)}
    for kind, allowed in choices.items():
        check_choice(kind, steps[kind], allowed)
    steps["guard"] = bool(steps["guard"])


def _pairs(step, kind):
    return kind in step.properties.get("pair", {})


def _used_kinds(steps):
    """Kinds of steps that make a difference, in the order of :data:`DEFAULTS`."""
    used = {"group", "budget", "router", "guard", *(("compress",) if steps["compress"] else ())}
    for kind in ("group", "budget"):
        used.update(
            TABLES[kind][steps[kind]].properties.get("uses", ("merge", "combine") if kind == "group" else ())
        )
    return [kind for kind in DEFAULTS if kind in used]


def _options(kind, steps, chosen):
    """Options of one step: what is chosen, else its own defaults."""
    if kind == "similarity":
        metric = similarities.metric_of(steps["similarity"], steps["metric"])
        return {"metric": metric if metric != "mixed" else _metrics_of_parts(steps)}
    if kind not in TABLES or steps[kind] not in TABLES[kind]:
        return {}
    step, options = TABLES[kind][steps[kind]], {}
    for name, default in step.options.items():
        if name not in INTERNAL:
            # The rank of joint-svd is a share, that of low-rank a number, set as compress_rank beside it.
            other = (
                kind == "compress"
                and steps["combine"] in TABLES["combine"]
                and TABLES["combine"][steps["combine"]]
            )
            taken = other and other.options.get(name, default) != default
            value = chosen.get(f"{kind}_{name}", default if taken else chosen.get(name, default))
            options[name] = value if value is default else _checked(step, name, value)
    return options


def _metrics_of_parts(steps):
    def own(part):
        allowed = similarities.ALLOWED[part]
        return steps["metric"] if steps["metric"] in allowed else allowed[0]

    return "+".join(own(part) for part, _ in similarities.parts_of(steps["similarity"]))


def _checked(step, name, value):
    """An option's value in the type of its default."""
    if isinstance(value, list | tuple | np.ndarray):
        return [check_count(name, number, 0) for number in np.asarray(value).tolist()]
    step.check_option(name, value)
    default = step.options[name]
    if isinstance(default, float):
        return float(value)
    return check_count(name, value, 0) if isinstance(default, int) else value


def _check_used(recipe, settings):
    """Raise InputError if a setting makes no difference, naming the steps for which it would."""
    used = {*recipe.by_kind, *recipe.options, *(["refit"] if "combine" in recipe.by_kind else [])}
    used |= {f"{kind}_{name}" for kind, options in recipe.by_kind.items() for name in options}
    for name in settings:
        if name not in used and name != "compress":
            kinds = [kind for kind in recipe.by_kind if kind in TABLES and kind != "similarity"]
            present = ", ".join(f'{kind} "{recipe.steps[kind]}"' for kind in kinds if kind in recipe.steps)
            raise InputError(
                f'The "{name}" setting is taken by {" and ".join(_takers(name))}; method {recipe.method!r} has '
                f"none of these with the settings given (it has {present})."
            )


def _takers(name):
    """Steps for which a setting makes a difference, such as ``'group "hierarchical"'``."""
    if name == "metric":
        name = "similarity"
    if name == "refit":
        return [
            "groups whose experts are joined or trimmed: it goes with no pruning, fuzzy groups or compress"
        ]
    steps = [step for table in TABLES.values() for step in table.values()]
    takers = [step for step in steps if name in (*step.options, *step.properties.get("uses", ()))]
    takers += [step for step in steps if any(name == f"{step.kind}_{option}" for option in step.options)]
    return [f'{step.kind} "{step.name}"' for step in takers]


def _check_together(recipe):
    """Raise InputError where steps do not go with one another."""
    every = {**recipe.steps, **recipe.options}
    present = [step for kind in recipe.by_kind if (step := recipe.step(kind))]
    for step in present:
        for other, allowed in (step.properties.get("pair", {}) | step.properties.get("only", {})).items():
            if every.get(other, allowed) != allowed:
                because = step.properties.get("because", "")
                raise InputError(
                    f'{step.kind} "{step.name}" goes with {_shown(other, allowed)} only, not '
                    f"{_shown('', every[other])}{': ' if because else ''}{because}."
                )
    for step in group.values():
        for kind, name in step.properties.get("pair", {}).items():
            if recipe.steps[kind] == name and recipe.steps["group"] != step.name:
                raise InputError(
                    f'{kind} "{name}" goes with group "{step.name}" only, not "{recipe.steps["group"]}".'
                )
    for step in present:
        if check := step.properties.get("check"):
            check(recipe)


def _shown(name, value):
    if isinstance(value, bool):
        return f"{name} {'on' if value else 'off'}".strip()
    return f'{name} "{value}"'.strip()


def option_names() -> tuple:
    """Every kind of step and every option that can be set, in alphabetical order."""
    names = {*DEFAULTS, "metric", "refit"}
    for kind, table in TABLES.items():
        for step in table.values():
            names.update(name for name in step.options if kind != "refine" and name not in INTERNAL)
    return tuple(sorted(names | {"compress_rank"}))


def parse_settings(items, *, option: str = "settings") -> dict:
    """Settings written as ``name=value``, such as ``["budget=merge-cost", "guard=on", "centres=0,3"]``.

    Parameters
    ----------
    items : sequence of str
    option : str
        What errors call them.

    Raises
    ------
    InputError
        If there is no such setting, or the value is not of its kind.
    """
    settings = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in option_names():
            raise InputError(
                f"{option} takes name=value with a name of {', '.join(option_names())}; not {item!r}."
            )
        settings[name] = _parsed(option, name, text)
    return settings


def _parsed(option, name, text):
    """A setting's value, of the kind of its defaults."""
    steps = [step for table in TABLES.values() for step in table.values()]
    defaults = [step.options[name] for step in steps if name in step.options] or [DEFAULTS.get(name, "")]
    if name == "refit":
        defaults = [0]
    if any(isinstance(default, bool) for default in defaults):
        if text not in ("on", "off", "true", "false"):
            raise InputError(f"{option} {name} takes on or off; not {text!r}.")
        return text in ("on", "true")
    is_text = any(isinstance(default, str) for default in defaults)
    try:
        if is_text:
            return [int(number) for number in text.split(",")] if text[:1].isdigit() else text
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        raise InputError(f"{option} {name} takes a number; not {text!r}.") from None


def format_settings(settings: dict) -> str:
    """Settings as :func:`parse_settings` reads them, in alphabetical order and separated by spaces."""

    def text(value):
        if isinstance(value, bool):
            return "on" if value else "off"
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return " ".join(f"{name}={text(value)}" for name, value in sorted(settings.items()))


def table() -> str:
    """Every method in lines of text: its steps, what it needs of the statistics, its cost and its paper."""
    lines = []
    for name, method in METHODS.items():
        recipe = _recipe(name, method.settings, {})
        lines += [f"{name}: {method.title}", *(["    also   " + RECOMMENDED] if name == POINTS_TO else [])]
        lines += [f"    steps  {' > '.join(_described(recipe))}", f"    needs  {', '.join(recipe.needs)}"]
        lines += [f"    cost   {method.cost}", f"    paper  {method.paper}"]
    return "\n".join(lines)


def _described(recipe):
    """A recipe's steps in words, in the order in which they are taken."""
    steps, options = recipe.steps, recipe.options
    if "similarity" in recipe.by_kind:
        yield f"{steps['similarity']} ({recipe.metric})"
    grouping = {"none": "no groups", "prune": f"prune by {steps['saliency']}"}
    grouping |= {"residual": f"{options.get('shape')} shape, groups and rules by residual"}
    grouping |= {"hierarchical": f"hierarchical ({options.get('linkage')})"}
    yield grouping.get(steps["group"], steps["group"])
    if recipe.step("combine"):
        matched = f", aligned by {options['align']}" if options.get("align", "none") != "none" else ""
        weighted = steps["combine"] not in ("trimming", "selection")
        yield steps["combine"] + (f" by {steps['merge']}" if weighted else "") + matched
    yield f"router {steps['router']}"
    yield f"budget {steps['budget']}"
    if "compress" in recipe.by_kind:
        yield f"{steps['compress']} plus rows, {options['share']:.0%} kept"
