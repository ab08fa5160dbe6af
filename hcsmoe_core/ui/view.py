"""The interactive view in a notebook: drawn and dragged in the browser, with the plan here in the kernel."""

from dataclasses import replace
from typing import Any

import anywidget
import traitlets

from hcsmoe_core._util import check_count, require
from hcsmoe_core.clustering import by_first_appearance
from hcsmoe_core.methods import make_plan
from hcsmoe_core.plan import Plan, merge_weights
from hcsmoe_core.ui.viewdata import SCRIPT, STYLE, view_data

__all__ = ["View", "view_data"]


class View(anywidget.AnyWidget):
    """Merge tree, distances, usage and cost of every cut, to cut by hand; no kernel is needed to drag.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel, optional
    layer : int
        The layer shown first, from 0.
    **options
        Of :func:`view_data`: similarity, linkage, metric, experts, title.

    Attributes
    ----------
    groups : list of L lists of int
        Group of each expert, as drawn; may be set.
    layer : int
        The layer shown; may be set.
    selected : list of int
        Experts that are selected in the layer shown; may be set.
    """

    _esm, _css = SCRIPT.read_text(encoding="utf-8"), STYLE.read_text(encoding="utf-8")
    data = traitlets.Dict().tag(sync=True)
    groups = traitlets.List().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    selected = traitlets.List().tag(sync=True)

    def __init__(self, stats: Any, model: Any = None, *, layer: int = 0, **options: Any):
        check_count("layer", layer, 0, len(stats.layers) - 1)
        data = view_data(stats, model, **options)
        settings = {key: data["plan"]["settings"][key] for key in ("similarity", "metric", "linkage")}
        self._stats, self._start = stats, make_plan(stats, model, experts=data["start"], **settings)
        super().__init__(data=data, groups=[one.labels for one in self._start.layers], layer=layer)

    @property
    def plan(self) -> Plan:
        """What is drawn, as a plan to apply or save."""
        layers = []
        for old, labels in zip(self._start.layers, self.groups, strict=True):
            weights = merge_weights(labels, self._stats.layers[old.name], "frequency").tolist()
            layers.append(replace(old, labels=list(labels), weights=weights))
        counts = [layer.num_groups for layer in layers]
        return replace(self._start, layers=layers, settings=self._start.settings | {"experts": counts})

    @traitlets.validate("groups")
    def _check_groups(self, proposal):
        sizes = [len(layer["order"]) for layer in self.data["layers"]]
        require(
            [len(labels) for labels in proposal["value"]] == sizes,
            f'The "groups" argument must be one list of group numbers for each layer, of {sizes} experts.',
        )
        return [by_first_appearance(labels).tolist() for labels in proposal["value"]]
