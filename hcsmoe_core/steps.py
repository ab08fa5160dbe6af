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
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from hcsmoe_core._util import InputError, Table, check_choice, check_count, choice_of


@dataclass(frozen=True)
class Step:
    """One registered function.

    Attributes
    ----------
    kind, name : str
        Table and entry, such as ``"combine"`` and ``"least-squares"``.
    function : callable
    needs : tuple of str, or callable
        Names of :data:`hcsmoe_core.statistics.NEEDS`; a callable gives them for the step's options.
    options : dict
        The function's keyword-only arguments, with their defaults.
    choices : dict
        Allowed values of the options that have a ``Literal`` annotation.
    properties : dict
        What else is said where the step is registered: ``fractions``, names of the options that must be
        above 0 and at most 1; and see :mod:`hcsmoe_core.methods.recipes`.
    """

    kind: str
    name: str
    function: Callable
    needs: tuple | Callable = ()
    options: dict = field(default_factory=dict)
    choices: dict = field(default_factory=dict)
    properties: dict = field(default_factory=dict)

    def __call__(self, *arguments, **options):
        """Call the function, with options that are checked."""
        return self.function(*arguments, **{k: self.checked(k, v) for k, v in options.items()})

    def needs_for(self, options: dict) -> tuple:
        """Names of what the step needs of the statistics with these options."""
        return tuple(self.needs({**self.options, **options}) if callable(self.needs) else self.needs)

    def checked(self, name: str, value):
        """An option's value in the type of its default; InputError if there is no such option or value."""
        if name not in self.options:
            listed = ", ".join(self.options) or "none"
            raise InputError(f'{self.kind} "{self.name}" has no option {name!r}; its options: {listed}.')
        default = self.options[name]
        if name in self.choices:
            return choice_of(name, value, self.choices[name])
        if isinstance(default, bool):
            return bool(check_choice(name, value, (False, True)))
        if isinstance(default, int):
            return check_count(name, value, 0)
        if isinstance(default, float):
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise InputError(f'The "{name}" argument must be a number; not {value!r}.')
            if name in self.properties.get("fractions", ()) and not 0 < value <= 1:
                raise InputError(f'The "{name}" argument must be above 0 and at most 1; not {value}.')
            return float(value)
        if isinstance(default, str) and not isinstance(value, str):
            return [check_count(name, number, 0) for number in value]
        return value


class StepTable(Table):
    """Steps of one kind by name; called with a name, it is the decorator that registers a function."""

    def __call__(self, name, *, needs=(), **properties):
        """Register the decorated function under a name."""

        def register(function):
            parameters = inspect.signature(function).parameters.values()
            keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
            literal = [p for p in keywords if typing.get_origin(p.annotation) is typing.Literal]
            options = {p.name: p.default for p in keywords}
            choices = {p.name: typing.get_args(p.annotation) for p in literal}
            self.add(name, Step(self.argument, name, function, needs, options, choices, properties))
            return function

        return register


class MethodTable(Table):
    """Methods by name; a row is added, or replaced, by ``METHODS[name] = Method(…)``."""

    aliases: ClassVar[dict] = {}  # other names of methods, such as "recommended"
    __setitem__ = Table.add

    def __getitem__(self, name):
        return super().__getitem__(self.aliases.get(name, name))


similarity = StepTable("similarity")
group = StepTable("group")
budget = StepTable("budget")
saliency = StepTable("saliency")
combine = StepTable("combine")
router = StepTable("router")
compress = StepTable("compress")
refine = StepTable("refine")
TABLES = {
    table.argument: table
    for table in (similarity, group, budget, saliency, combine, router, compress, refine)
}
METHODS = MethodTable("method")
