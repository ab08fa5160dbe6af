"""The steps that methods are made of, and the methods: tables, filled by the modules that define the entries.

A step is a function registered under a name. Its options are its keyword-only arguments, whose ``Literal``
annotations list what they may be; what it needs of the statistics, and what it goes with, is said where it is
registered::

    @combine("least-squares", needs=("sample",), solves=True)
    def least_squares(group, *, align: Literal["none", "weights"] = "none", ridge: float = 0.05): ...

    METHODS["mergemoe"] = Method("arXiv 2510.14436", similarity="weight", combine="least-squares")
"""

import inspect
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

from hcsmoe_core._util import Table, check_choice, check_count, choice_of, require

# Annotations of options: what a value must be, and whether it is.
Fraction = Annotated[float, ("above 0 and at most 1", lambda value: 0 < value <= 1)]
NotNegative = Annotated[float, ("at least 0", lambda value: value >= 0)]
AboveOne = Annotated[float, ("above 1", lambda value: value > 1)]
Positive = Annotated[int, ("at least 1", lambda value: value >= 1)]


@dataclass(frozen=True)
class Step:
    """One registered function: an entry of the table ``kind``, such as ``"combine"``."""

    kind: str
    name: str
    function: Callable
    needs: tuple | Callable  # names of hcsmoe_core.statistics.NEEDS; a callable gives them for the options
    options: dict  # the function's keyword-only arguments, with their defaults
    hints: dict  # annotations of the options; a Literal lists values, an Annotated limits them
    properties: dict  # what else is said where the step is registered: see hcsmoe_core.methods.recipes

    def __call__(self, *arguments, **options):
        """Call the function, with options that are checked."""
        return self.function(*arguments, **{k: self.checked(k, v) for k, v in options.items()})

    def needs_for(self, options: dict) -> tuple:
        """Names of what the step needs of the statistics with these options."""
        return tuple(self.needs({**self.options, **options}) if callable(self.needs) else self.needs)

    def checked(self, name: str, value):
        """An option's value in the type of its default; InputError if there is no such option or value."""
        listed = ", ".join(self.options) or "none"
        known = f'{self.kind} "{self.name}" has no option {name!r}; its options: {listed}.'
        require(name in self.options, known)
        hint, must = self.hints.get(name), f'The "{name}" argument must be'
        match self.options[name]:
            case _ if get_origin(hint) is Literal:
                value = choice_of(name, value, get_args(hint))
            case bool():
                value = bool(check_choice(name, value, (False, True)))
            case int():
                value = check_count(name, value, 0)
            case float():
                number = isinstance(value, numbers.Real) and not isinstance(value, bool)
                require(number and abs(value) <= 1e300, f"{must} a finite number; not {value!r:.40}.")
                value = float(value)
            case str() if not isinstance(value, str):
                require(isinstance(value, Iterable), f"{must} text or whole numbers; not {value!r:.40}.")
                value = [check_count(name, number, 0) for number in value]
        if get_origin(hint) is Annotated:
            limits, within = get_args(hint)[1]
            require(within(value), f"{must} {limits}; not {value!r:.40}.")
        return value


class StepTable(Table):
    """Steps of one kind by name; called with a name, it is the decorator that registers a function."""

    def __call__(self, name, *, needs=(), **properties):
        """Register the decorated function under a name."""

        def register(function):
            parameters = inspect.signature(function).parameters
            options = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
            hints = {name: parameters[name].annotation for name in options}
            self[name] = Step(self.argument, name, function, needs, options, hints, properties)
            return function

        return register


KINDS = ("similarity", "group", "budget", "saliency", "combine", "router", "compress", "refine")
TABLES = {kind: StepTable(kind) for kind in KINDS}
similarity, group, budget, saliency, combine, router, compress, refine = TABLES.values()
METHODS = Table("method")  # rows: METHODS[name] = Method(…); aliases are other names, such as "recommended"
