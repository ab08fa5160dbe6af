"""Every method: one registered function per step, one row per method, in the tables of ``steps``.

A file of one's own takes part with a step and a row::

    from hcsmoe_core.methods import METHODS, Method, group

    @group("alternating")
    def alternating(layer, count):
        return numpy.arange(len(layer.free)) % count

    METHODS["alternating"] = Method("mine", title="every r-th expert joined", group="alternating")

It is loaded by :func:`load_plugin`, by ``--plugin FILE`` on the command line, or as an entry point
``hcsmoe.methods``.
"""

import sys
import warnings
from importlib import metadata, util
from pathlib import Path

from hcsmoe_core._util import require
from hcsmoe_core.methods import (  # noqa: F401 (they register their steps)
    budgets,
    combining,
    factors,
    grouping,
    pruning,
    residual,
    routing,
    rows,
    similarities,
)
from hcsmoe_core.methods.planner import Layer, make_plan, make_plans, merge_tree
from hcsmoe_core.methods.recipes import (
    RECOMMENDED,
    Method,
    Recipe,
    format_settings,
    option_names,
    parse_settings,
    resolve,
    table,
)
from hcsmoe_core.steps import METHODS, budget, combine, compress, group, refine, router, saliency, similarity

__all__ = [
    "METHODS",
    "PLUGINS",
    "RECOMMENDED",
    "Layer",
    "Method",
    "Recipe",
    "budget",
    "combine",
    "compress",
    "format_settings",
    "group",
    "load_plugin",
    "make_plan",
    "make_plans",
    "merge_tree",
    "option_names",
    "parse_settings",
    "refine",
    "resolve",
    "router",
    "saliency",
    "similarity",
    "table",
]

PLUGINS = []  # paths of the files that were loaded


def load_plugin(path):
    """Run a Python file that registers steps and rows of :data:`METHODS`.

    Parameters
    ----------
    path : path

    Returns
    -------
    module

    Raises
    ------
    InputError
        If there is no such file.
    """
    path = Path(path).resolve()
    require(path.is_file(), f'The "plugin" argument must be a Python file; there is no file {path}.')
    name = f"hcsmoe_plugin_{path.stem}"
    spec = util.spec_from_file_location(name, path)
    require(spec, f'The "plugin" argument must be a Python file, which ends in .py; not {path}.')
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if path not in PLUGINS:
        PLUGINS.append(path)
    return module


for _entry in metadata.entry_points(group="hcsmoe.methods"):
    try:
        _entry.load()
    except Exception as error:  # of a stranger's package: the methods of this one must go on
        warnings.warn(f"The methods of {_entry.value} could not be loaded: {error!r}", stacklevel=2)
