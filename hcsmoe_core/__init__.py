"""hcsmoe: see which experts of a sparse mixture-of-experts model compute the same, merge them, know what it cost.

The verbs of the library, in the order of the work::

    model, tokenizer = load_model("demo-qwen")
    input_ids = calibration_tokens("demo", tokenizer, sequences=48, length=256)
    stats = capture(model, input_ids)
    plan = make_plan(stats, model, experts=16)
    apply_plan(model, plan)
    scores = evaluate(model, tokenizer)
    restore(model)
    save_merged(model, plan, "merged")

Symbols: L layers, E experts, r experts kept, T tokens, D hidden size, I expert width, k experts per token.
"""

from hcsmoe_core.calibration import calibration_tokens, domains_of
from hcsmoe_core.capture import capture
from hcsmoe_core.checkpoint import load_merged, load_model, save_merged
from hcsmoe_core.clustering import cut, linkage
from hcsmoe_core.evaluation import evaluate, paired
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import METHODS, make_plan, make_plans, merge_tree, needs_of
from hcsmoe_core.moe import MoELayer, find_moe_layers
from hcsmoe_core.plan import LayerPlan, Plan, load_plan
from hcsmoe_core.similarity import distances
from hcsmoe_core.stability import capture_until_stable
from hcsmoe_core.statistics import LayerStatistics, Statistics, load_statistics
from hcsmoe_core.streaming import open_model, stream_capture, stream_merged, stream_model
from hcsmoe_core.version import __version__

__all__ = [
    "METHODS",
    "LayerPlan",
    "LayerStatistics",
    "MoELayer",
    "Plan",
    "Statistics",
    "__version__",
    "apply_plan",
    "calibration_tokens",
    "capture",
    "capture_until_stable",
    "cut",
    "distances",
    "domains_of",
    "evaluate",
    "find_moe_layers",
    "linkage",
    "load_merged",
    "load_model",
    "load_plan",
    "load_statistics",
    "make_plan",
    "make_plans",
    "merge_tree",
    "needs_of",
    "open_model",
    "paired",
    "restore",
    "save_merged",
    "stream_capture",
    "stream_merged",
    "stream_model",
]
