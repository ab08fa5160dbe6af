"""Every method: one registered function per step, one row per method."""

from hcsmoe_core.methods import combine, factors, planner, router  # noqa: F401 (they register their steps)
