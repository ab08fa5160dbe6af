"""Every method: one registered function per step, one row per method."""

from hcsmoe_core.methods import combine, factors, router  # noqa: F401 (they register their steps)
from hcsmoe_core.methods.planner import make_plan, merge_tree  # noqa: F401
