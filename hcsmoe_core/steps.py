"""The steps that methods are made of, as tables: who defines a step registers it; who needs one looks it up by name.

A step is a function. What it needs of the statistics is said where it is registered, and its options are its keyword-only
arguments::

    @combine("least-squares", needs=("sample",))
    def least_squares(group, *, align="none", ridge=0.05): ...

    combine["least-squares"].options  # {"align": "none", "ridge": 0.05}
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from hcsmoe_core._util import Table


@dataclass(frozen=True)
class Step:
    """One registered function.

    Attributes
    ----------
    name : str
    function : callable
    needs : tuple of str, or callable
        Names of :data:`hcsmoe_core.statistics.NEEDS`; a callable gives them for the step's options.
    options : dict
        The function's keyword-only arguments, with their defaults.
    properties : dict
        What else whoever uses this kind of step must know.
    """

    name: str
    function: Callable
    needs: tuple | Callable = ()
    options: dict = field(default_factory=dict)
    properties: dict = field(default_factory=dict)

    def __call__(self, *arguments, **options):
        return self.function(*arguments, **options)

    def needs_for(self, options):
        """Names of what the step needs of the statistics with these options."""
        return tuple(self.needs({**self.options, **options}) if callable(self.needs) else self.needs)


class StepTable(Table):
    """Steps of one kind by name; called with a name, it is the decorator that registers a function."""

    def __call__(self, name, *, needs=(), **properties):
        """Register the decorated function under a name."""

        def register(function):
            parameters = inspect.signature(function).parameters.values()
            options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
            self.add(name, Step(name, function, needs, options, properties))
            return function

        return register


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
METHODS = Table("method")
