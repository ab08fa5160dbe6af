"""Controls over a figure: live in JupyterLab, a plain picture wherever there is no kernel."""

import base64
import html

import ipywidgets as widgets

from hcsmoe_core.anatomy import joined_groups, output_errors
from hcsmoe_core.clustering import LINKAGES, cut
from hcsmoe_core.clustering import linkage as tree_of
from hcsmoe_core.figures import dendrogram, domain_errors, png, similarity_heatmap, tanglegram, usage_by_domain
from hcsmoe_core.files import check_choice, check_count
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.plan import summarise
from hcsmoe_core.similarity import available, described, distances, metric_of
from hcsmoe_core.stability import agreement, allowed_linkages


class Explorer(widgets.VBox):
    """Controls above a figure and a line of text.

    Its mimebundle carries the widget and the picture as it stands: JupyterLab shows the first, and a front end without
    a kernel (an executed notebook reopened, nbconvert, GitHub) the second.

    Parameters
    ----------
    draw : callable
        Takes the controls' values by name; returns a Figure, or a Figure and a text to show below it.
    controls
        ipywidgets by the names of ``draw``'s parameters.
    """

    def __init__(self, draw, **controls):
        self._draw, self._controls, self._drawn = draw, controls, {}
        self._image = widgets.Image(format="png", layout=widgets.Layout(max_width="820px"))
        self._text = widgets.HTML()
        super().__init__([widgets.HBox(list(controls.values())), self._image, self._text])
        for control in controls.values():
            if hasattr(control, "continuous_update"):
                control.continuous_update = False
            control.observe(self._refresh, names="value")
        self._refresh()

    @property
    def values(self):
        """Value of each control."""
        return {name: control.value for name, control in self._controls.items()}

    def _refresh(self, _=None):
        key = tuple(self.values.items())
        if key not in self._drawn:
            try:
                made = self._draw(**self.values)
            except ValueError as error:  # a combination that does not exist: the picture stays, and the text says why
                if not self._drawn:
                    raise
                self._text.value = html.escape(str(error))
                return
            figure, text = made if isinstance(made, tuple) else (made, "")
            self._drawn[key] = png(figure), text
        self._image.value, self._text.value = self._drawn[key]

    def _repr_mimebundle_(self, **keywords):
        bundle = super()._repr_mimebundle_(**keywords)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["image/png"] = base64.b64encode(self._image.value).decode()
        return bundle


def usage_explorer(stats, *, layer=0):
    """Which experts the tokens of each domain go to, layer by layer."""
    names = list(stats.layers)

    def draw(layer):
        share = 100 * stats.layer(layer).frequency
        note = f"{names[layer]}: the busiest expert takes {share.max():.1f} % of routed tokens, the idlest {share.min():.1f} %."
        return usage_by_domain(stats, layer, title=f"MoE layer {layer}"), note

    return Explorer(draw, layer=_slider("layer", layer, 0, len(names) - 1))


def similarity_explorer(stats, model, *, layer=0, similarity="expert-output", linkage="average", groups=None):
    """Distances between one layer's experts, with the merge tree on both sides."""

    def draw(layer, similarity, linkage):
        condensed = distances(stats, layer, similarity=similarity, model=model)
        tree = tree_of(condensed, linkage, metric=metric_of(similarity))
        title = f"MoE layer {layer}, {similarity}, {linkage} linkage"
        return similarity_heatmap(condensed, tree, groups=groups, title=title, label=described(similarity), width=4.6)

    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        similarity=_choice("similarity", similarity, available(stats)),
        linkage=_choice("linkage", linkage, LINKAGES),
    )


def tangle_explorer(stats, model, *, layer=0, similarity="expert-output", first="average", second="ward", groups=None):
    """Two merge trees of one layer's experts face to face."""

    def draw(layer, first, second):
        how = dict(similarity=similarity, model=model)
        trees = [merge_tree(stats, layer, linkage=method, **how) for method in (first, second)]
        titles = (f"{first} linkage", f"{second} linkage")
        figure = tanglegram(*trees, groups=groups, titles=titles, label=described(similarity), title=f"MoE layer {layer}")
        if not groups:
            return figure, ""
        index = agreement(*([cut(tree, groups)] for tree in trees))[0]
        return (
            figure,
            f"Cut into {groups} groups, the two agree to an adjusted Rand index of {index:.2f} (1: the same, 0: chance).",
        )

    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        first=_choice("left", first, allowed_linkages(similarity, LINKAGES)),
        second=_choice("right", second, allowed_linkages(similarity, LINKAGES)),
    )


def merge_explorer(stats, model, plan, *, layer=0, group=0):
    """What each way of combining does to the groups of a plan, one at a time, the largest first."""

    def draw(layer, group):
        found = joined_groups(plan, layer)
        if group >= len(found):
            raise ValueError(f"MoE layer {layer} has {len(found)} groups that are joined; there is no group {group}.")
        members = found[group]
        frame = output_errors(stats, model, layer, members)
        title = f"MoE layer {layer}, experts {', '.join(map(str, members))}"
        best = frame[frame["domain"] == "all"].sort_values("error").iloc[0]
        return domain_errors(frame, title=title), f"Least error on the sample: {best['way']}, {best['error']:.2f}."

    most = max(len(joined_groups(plan, i)) for i in range(len(plan.layers)))
    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(plan.layers) - 1),
        group=_slider("group, largest first", group, 0, most - 1),
    )


def cut_explorer(stats, model, *, layer=0, similarity="expert-output", linkage="average", experts):
    """The merge tree of one layer, where it is cut, and what the cut does."""
    most = stats.layer(0).usage_count.shape[1]

    def draw(layer, linkage, experts):
        tree = merge_tree(stats, layer, similarity=similarity, linkage=linkage, model=model)
        cost = summarise(stats, layer, cut(tree, experts))
        figure = dendrogram(
            tree,
            groups=experts,
            usage=stats.layer(layer).frequency.numpy(),
            title=f"MoE layer {layer}, {linkage} linkage, {experts} of {most} experts kept",
            label=described(similarity),
        )
        note = (
            f"{100 * (1 - experts / most):.0f} % of this layer's expert weights saved; {100 * cost['moved']:.0f} % of the "
            f"routing mass goes to experts that are joined; relative error of the mean outputs {cost['output_error']:.3f}."
        )
        return figure, note

    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        linkage=_choice("linkage", linkage, LINKAGES),
        experts=_slider("experts kept", experts, 1, most),
    )


def _slider(description, value, low, high):
    """An integer slider; a value out of range is an error, where ipywidgets would move it silently."""
    check_count(description, value, low, high)
    return widgets.IntSlider(value, low, high, description=description, style={"description_width": "initial"})


def _choice(description, value, options):
    check_choice(description, value, options)
    return widgets.Dropdown(options=options, value=value, description=description, style={"description_width": "initial"})
