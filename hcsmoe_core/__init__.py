"""See which experts of a sparse mixture-of-experts model compute the same, merge them, know what it cost::

    model, tokenizer = load_model("demo-qwen")
    input_ids = calibration_tokens("demo", tokenizer, sequences=48, length=256)
    stats = capture(model, input_ids)
    plan = make_plan(stats, model, experts=16)
    apply_plan(model, plan)
    scores = evaluate(model, tokenizer)
    restore(model)
    save_merged(model, plan, "merged")

or all of it at once, measured and with a model card: ``shrink("demo-qwen", experts=16, out="merged")``.

Each verb is imported at its first use: ``import hcsmoe_core`` costs nothing. A folder is a floor and imports
only what lies below it: ``ui``, ``studies``, ``demo``, ``score``, ``text``, ``methods``, ``scale``,
``checkpoint``, and the files beside this one, the core. This file alone knows them all.

Symbols: L layers, E experts, r experts kept, T tokens, D hidden size, I expert width, k experts per token.
"""

import importlib
from typing import Any

from hcsmoe_core._util import Table
from hcsmoe_core._version import __version__

# Who fills the tables of steps, calibration sources and tasks, in which the lower floors look names up.
Table.providers += ["hcsmoe_core.methods", "hcsmoe_core.demo"]

_VERBS = {
    "METHODS": "steps",
    "Plan": "plan",
    "Statistics": "statistics",
    "apply_plan": "merging",
    "calibration_tokens": "text.calibration",
    "capture": "collect",
    "cut": "clustering",
    "distances": "similarity",
    "evaluate": "score.evaluation",
    "find_moe_layers": "families",
    "linkage": "clustering",
    "load_merged": "checkpoint",
    "load_model": "checkpoint",
    "load_plan": "plan",
    "load_statistics": "statistics",
    "make_plan": "methods",
    "restore": "merging",
    "save_merged": "checkpoint",
    "shrink": "studies.pipeline",
}
# Modules of functions that are imported as late: hcsmoe_core.plot.heatmap(stats).
_MODULES = {"adapters": "adapters", "plot": "ui.plot"}
__all__ = ["__version__", *_VERBS]


def __getattr__(name: str) -> Any:
    origin = _VERBS.get(name) or _MODULES.get(name)
    if origin is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{origin}")
    globals()[name] = found = module if name in _MODULES else getattr(module, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_VERBS, *_MODULES})
