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
``weights``
    Whether it looks at the experts' weights while planning.
"""

import ast
import contextlib
import functools
from dataclasses import dataclass

from hcsmoe_core import similarity as similarities
from hcsmoe_core._util import InputError, check_choice, check_count, choice_of, closest_first, require
from hcsmoe_core.methods.summary import MERGES
from hcsmoe_core.plan import ROUTERS
from hcsmoe_core.statistics import NEEDS
from hcsmoe_core.steps import METHODS, TABLES, group, router

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
METHODS.aliases[RECOMMENDED] = POINTS_TO
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
        Steps and options that differ from the defaults, such as ``group="k-means"``.
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
        """Every option that matters."""
        return {name: value for kind in reversed(self.by_kind) for name, value in self.by_kind[kind].items()}

    @functools.cached_property
    def settings(self) -> dict:
        """Steps and options that matter, as JSON values; equal for equal plans."""
        chosen = {kind: self.steps[kind] for kind in self.by_kind if kind in DEFAULTS}
        if "similarity" in chosen:
            parts = similarities.parts_of(chosen["similarity"])
            alike = len({weight for _, weight in parts}) == 1
            chosen["similarity"] = "+".join(name if alike else f"{w:.6g}*{name}" for name, w in parts)
        return chosen | self.options

    @functools.cached_property
    def present(self) -> dict:
        """Functions of the steps that matter, by kind; of the similarities by name."""
        kinds = (kind for kind in self.by_kind if kind in TABLES and self.steps[kind] in TABLES[kind])
        return {kind: TABLES[kind][self.steps[kind]] for kind in kinds} | {
            name: TABLES["similarity"][name]
            for name, _ in similarities.parts_of(self.steps["similarity"])
            if "similarity" in self.by_kind
        }

    @property
    def metric(self) -> str:
        """The metric that distances come in."""
        return similarities.metric_of(self.steps["similarity"], self.steps["metric"])

    @property
    def needs(self) -> tuple:
        """Names of what it needs, in the order of :data:`hcsmoe_core.statistics.NEEDS`."""
        steps = self.present.items()
        needed = {need for kind, step in steps for need in step.needs_for(self.by_kind.get(kind, {}))}
        needed |= {"usage", "norms"} if self.steps["guard"] else {"usage"}
        return tuple(name for name in NEEDS if name in needed)

    @property
    def kind(self) -> str:
        """What becomes of experts: it "prunes", "trims" or "averages" them, or "refits" them to outputs."""
        solves = "combine" in self.present and self.present["combine"].properties.get("solves")
        return self.present["group"].properties.get("kind", "refits" if solves else "averages")

    @property
    def needs_model(self) -> bool:
        """Whether the experts' weights are looked at to make a plan; merging always does."""
        return any(step.properties.get("weights") for step in self.present.values())

    @property
    def random(self) -> bool:
        """Whether plans or merged weights depend on the seed."""
        said = ((kind, step.properties.get("random")) for kind, step in self.present.items())
        return any(value(self.by_kind[kind]) if callable(value) else value for kind, value in said)

    def combination(self, seed: int = 0) -> dict:
        """``combine`` of the plan's layers: the rule with its options."""
        rule = {"rule": self.steps["combine"]} | self.by_kind["combine"] | self.by_kind.get("refine", {})
        drawn = "combine" in self.present and "seed" in self.present["combine"].options
        return rule | ({"seed": seed} if drawn else {})


def resolve(method: str = "hc-smoe", **settings) -> Recipe:
    """Steps and options of a method, with some of them set otherwise.

    Parameters
    ----------
    method : str
        Of :data:`METHODS`, or ``"recommended"``: the one that was found to lose least.
    **settings
        Steps by kind (``group="k-means"``), options of steps (``linkage="ward"``), ``metric``, ``merge``,
        ``guard``, ``refit``.

    Raises
    ------
    InputError
        If the method or a setting is unknown, no step of the method takes an option, or steps do not go
        together.
    """
    method = choice_of("method", method, (*METHODS, RECOMMENDED))
    name = METHODS.aliases.get(method, method)
    return _recipe(name, METHODS[name].settings, settings)


def _recipe(method, row, settings):
    for name in settings:
        check_choice("setting", name, option_names())
    chosen = row | settings
    grouping = group[chosen.get("group", DEFAULTS["group"])].properties
    steps = DEFAULTS | {"metric": ""} | grouping.get("pair", {})
    steps |= {kind: chosen[kind] for kind in steps if kind in chosen}
    _check_names(steps)
    used = {
        *("group", "budget", "router", "guard", "compress"),
        *grouping.get("uses", ("merge", "combine")),
        *TABLES["budget"][steps["budget"]].properties.get("uses", ()),
    }
    by_kind = {kind: {} for kind in DEFAULTS if kind in used and steps[kind] != ""}
    if "similarity" in used:
        names = (name for name, _ in similarities.parts_of(steps["similarity"]))
        metrics = [similarities.part_metric(name, steps["metric"]) for name in names]
        by_kind["similarity"] = {"metric": metrics[0] if len({*metrics}) == 1 else "+".join(metrics)}
    if "combine" in used and ("refit" in grouping or chosen.get("refit")):
        rounds = check_count("refit", chosen.get("refit", grouping.get("refit")), 0)
        steps["refine"], by_kind["refine"] = "refit" if rounds else "", {"refit": rounds}
    recipe = Recipe(method, steps, by_kind)
    _choose_options(recipe, chosen)
    _check_used(recipe, settings)
    _check_together(recipe)
    return recipe


def _check_names(steps):
    similarities.metric_of(steps["similarity"], steps["metric"])
    choices = {kind: tuple(TABLES[kind]) for kind in ("group", "budget", "saliency", "combine")} | {
        "router": tuple(dict.fromkeys((*ROUTERS, *router))),
        "compress": ("", *TABLES["compress"]),
        "merge": MERGES,
        "guard": (False, True),
    }
    pairs = [step.properties.get("pair", {}) for step in group.values()]
    for kind, allowed in choices.items():
        paired = (p[kind] for p in pairs if p.get(kind) == steps[kind])
        steps[kind] = choice_of(kind, steps[kind], (*allowed, *paired))
    steps["guard"] = bool(steps["guard"])


def _choose_options(recipe, chosen):
    """Fill in the options of each step: what is chosen, else its defaults.

    Steps that have an option of one name share it if they have the same default; else it is the first's.
    """
    defaults = {}
    for kind, step in recipe.present.items():
        for name, default in step.options.items() if kind in recipe.by_kind and kind != "refine" else ():
            if name not in INTERNAL:
                own = defaults.setdefault(name, default) == default and name in chosen
                recipe.by_kind[kind][name] = step.checked(name, chosen[name]) if own else default


def _check_used(recipe, settings):
    """Raise InputError if a setting makes no difference, naming the steps for which it would."""
    used = {*recipe.by_kind, *recipe.options, "compress", *(["refit"] if "combine" in recipe.by_kind else [])}
    for name in settings.keys() - used:
        wanted = {name, "similarity" if name == "metric" else name}
        takers = [s for s in _every_step() if wanted & {*s.options, *s.properties.get("uses", ())}]
        taken = " and ".join(f'{step.kind} "{step.name}"' for step in takers)
        if name == "refit":
            taken = "groups that are joined or trimmed: it goes with no pruning, fuzzy groups or compress"
        has = (f'{kind} "{step.name}"' for kind, step in recipe.present.items() if kind in TABLES)
        raise InputError(
            f'The "{name}" setting is taken by {taken}; method {recipe.method!r} has none of these with the '
            f"settings given (it has {', '.join(has)})."
        )


def _check_together(recipe):
    """Raise InputError where steps do not go with one another."""
    every, present = recipe.options | recipe.steps, recipe.present.values()
    for step in present:
        fits = step.properties.get("pair", {}) | step.properties.get("only", {})
        because = f": {step.properties['because']}" if "because" in step.properties else ""
        for other, allowed in fits.items():
            require(
                every.get(other, allowed) == allowed,
                f'{step.kind} "{step.name}" goes with {other} {_quoted(allowed)} only, not '
                f"{_quoted(every.get(other))}{because}.",
            )
    chosen = recipe.steps["group"]
    for step in group.values():
        for kind, name in step.properties.get("pair", {}).items():
            require(
                step.name == chosen or recipe.steps[kind] != name,
                f'{kind} "{name}" goes with group "{step.name}" only, not "{chosen}".',
            )
    for check in filter(None, (step.properties.get("check") for step in present)):
        check(recipe)


def _quoted(value):
    return f'"{value}"' if isinstance(value, str) else _written(value)


def _written(value):
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def option_names() -> tuple:
    """Every kind of step and every option that can be set, in alphabetical order."""
    options = {name for step in _every_step() if step.kind != "refine" for name in step.options}
    return tuple(sorted({*DEFAULTS, "metric", "refit", *options} - {*INTERNAL}))


def _every_step():
    return (step for table in TABLES.values() for step in table.values())


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
    options = {name: default for step in _every_step() for name, default in step.options.items()}
    usual, settings = options | DEFAULTS | {"metric": "", "refit": 0}, {}
    for item in items:
        name, equals, text = item.partition("=")
        require(
            equals and name in option_names(),
            f"{option} takes name=value with a name of {closest_first(name, option_names())}; not {item!r}.",
        )
        value, default = _parsed(text), usual[name]
        require(
            isinstance(default, str) or not isinstance(value, str),
            f"{option} {name} takes "
            f"{'on or off' if isinstance(default, bool) else 'a number'}; not {text!r}.",
        )
        settings[name] = [value] if isinstance(value, int) and isinstance(default, str) else value
    return settings


def _parsed(text):
    """A number, a list of them, a truth value, or the text itself."""
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(text)
        return [*value] if isinstance(value, tuple) else value
    return {"on": True, "true": True, "off": False, "false": False}.get(text, text)


def format_settings(settings: dict) -> str:
    """Settings as :func:`parse_settings` reads them, in alphabetical order and separated by spaces."""
    return " ".join(f"{name}={_written(value)}" for name, value in sorted(settings.items()))


def table() -> str:
    """Every method in lines of text: its steps, what it needs of the statistics, its cost and its paper."""
    lines = []
    for name, method in METHODS.items():
        recipe = resolve(name)
        shown = {key: value for key, value in recipe.settings.items() if value not in (False, None)}
        lines += [
            f"{name}: {method.title}",
            *([f"    also   {RECOMMENDED}"] if name == POINTS_TO else []),
            f"    steps  {' '.join(f'{key}={_written(value)}' for key, value in shown.items())}",
            f"    needs  {', '.join(recipe.needs)}",
            f"    cost   {method.cost}",
            f"    paper  {method.paper}",
        ]
    return "\n".join(lines)
