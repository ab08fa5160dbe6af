"""Controls over a figure: live in JupyterLab, a plain picture wherever there is no kernel."""

import html

import ipywidgets as widgets
import numpy as np

from hcsmoe_core._util import InputError, check_choice, check_count
from hcsmoe_core.clustering import LINKAGES, cut
from hcsmoe_core.clustering import linkage as tree_of
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods.planner import make_plan, merge_tree
from hcsmoe_core.methods.summary import summarise
from hcsmoe_core.score.evaluation import evaluate
from hcsmoe_core.similarity import allowed_linkages, available, described, distances, metric_of
from hcsmoe_core.studies.stability import agreement
from hcsmoe_core.studies.tables import cut_costs, domain_mix
from hcsmoe_core.ui.anatomy import expert_tokens, joined_groups, output_errors, token_shares
from hcsmoe_core.ui.figures import (
    cut_height,
    cut_view,
    domain_errors,
    expert_profile,
    png,
    similarity_heatmap,
    tanglegram,
    usage_by_domain,
)


class Explorer(widgets.VBox):
    """Controls, and below them a picture and a note that follow them.

    Picture and note are outputs of the cell in their own right, replaced whenever a control moves, and not widgets: a
    front end shows a widget that it has no kernel for as an error, even where there is a picture to fall back to. So an
    executed notebook shows the picture wherever it is opened, as it was when the notebook was saved.

    Parameters
    ----------
    draw : callable
        Takes the controls' values by name; returns a Figure or PNG bytes, or one of them and a note to show below it: a
        text or a data frame.
    controls
        ipywidgets by the names of ``draw``'s parameters.

    Attributes
    ----------
    picture : bytes
        PNG.
    note : str or pandas.DataFrame
    """

    def __init__(self, draw, **controls):
        self._draw, self._controls, self._drawn, self._outputs = draw, controls, {}, ()
        self.picture, self.note = b"", ""
        super().__init__([widgets.HBox(list(controls.values()), layout=widgets.Layout(flex_flow="row wrap"))])
        for control in controls.values():
            if hasattr(control, "continuous_update"):
                control.continuous_update = False
            control.observe(self._refresh, names="value")
        self._refresh()

    @property
    def values(self):
        """Value of each control."""
        return {name: control.value for name, control in self._controls.items()}

    def _key(self):
        """What the picture depends on."""
        return tuple(self.values.items())

    def _refresh(self, _=None):
        key = self._key()
        if key not in self._drawn:
            try:
                made = self._draw(**self.values)
            except (
                ValueError
            ) as error:  # a combination that does not exist: the picture stays, and the note says why
                if not self._drawn:
                    raise
                self.note = str(error)
                self._publish()
                return
            figure, note = made if isinstance(made, tuple) else (made, "")
            self._drawn[key] = figure if isinstance(figure, bytes) else png(figure), note
        self.picture, self.note = self._drawn[key]
        self._publish()

    def _publish(self):
        for output, bundle in zip(self._outputs, self._bundles(), strict=False):
            output.update(bundle, raw=True)

    def _bundles(self):
        """Picture and note as outputs of a cell."""
        if isinstance(self.note, str):
            text, markup = self.note, html.escape(self.note).replace("\n", "<br>")
        else:
            text, markup = self.note.to_string(index=False), self.note.to_html(index=False)
        return {"image/png": self.picture, "text/plain": "picture"}, {"text/html": markup, "text/plain": text}

    def _ipython_display_(self, **_):
        from IPython.display import display

        bundle = self._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        settings = ", ".join(f"{control.description}: {control.value}" for control in self._controls.values())
        display(data | {"text/plain": settings}, raw=True)
        self._outputs = [display(data, raw=True, display_id=True) for data in self._bundles()]


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
        about = dict(usage=stats.layer(layer).frequency.numpy(), mix=domain_mix(stats, layer), groups=groups)
        title = f"MoE layer {layer}, {similarity}, {linkage} linkage"
        return similarity_heatmap(condensed, tree, title=title, label=described(similarity), width=5, **about)

    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        similarity=_choice("similarity", similarity, available(stats)),
        linkage=_choice("linkage", linkage, LINKAGES),
    )


def token_explorer(stats, input_ids, tokenizer, *, layer=0, expert=0, most=12):
    """Which tokens an expert takes: by domain, by token, and those that it takes with the largest routing weight."""
    experts = min(sums.num_experts for sums in stats.layers.values())

    def draw(layer, expert):
        sums = stats.layer(layer)
        shares = (sums.usage_count[:, expert] / sums.tokens).tolist()
        how = dict(expected=float(sums.usage_count.sum() / sums.tokens.sum() / sums.num_experts))
        found = token_shares(stats, layer, expert, input_ids, tokenizer)
        figure = expert_profile(
            dict(zip(stats.domains, shares, strict=True)), found, title=_expert(layer, expert), **how
        )
        return figure, expert_tokens(stats, layer, expert, input_ids, tokenizer, most=most).round(3)

    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        expert=_slider("expert", expert, 0, experts - 1),
    )


def _expert(layer, expert):
    return f"MoE layer {layer}, expert {expert}"


def tangle_explorer(
    stats, model, *, layer=0, similarity="expert-output", first="average", second="ward", groups=None
):
    """Two merge trees of one layer's experts face to face."""

    def draw(layer, first, second):
        how = dict(similarity=similarity, model=model)
        trees = [merge_tree(stats, layer, linkage=method, **how) for method in (first, second)]
        titles = (f"{first} linkage", f"{second} linkage")
        figure = tanglegram(
            *trees, groups=groups, titles=titles, label=described(similarity), title=f"MoE layer {layer}"
        )
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
            raise InputError(
                f"MoE layer {layer} has {len(found)} groups that are joined; there is no group {group}."
            )
        members = found[group]
        frame = output_errors(stats, model, layer, members)
        title = f"MoE layer {layer}, experts {', '.join(map(str, members))}"
        best = frame[frame["domain"] == "all"].sort_values("error").iloc[0]
        return domain_errors(
            frame, title=title
        ), f"Least error on the sample: {best['way']}, {best['error']:.2f}."

    most = max(len(joined_groups(plan, i)) for i in range(len(plan.layers)))
    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(plan.layers) - 1),
        group=_slider("group, largest first", group, 0, most - 1),
    )


class CutExplorer(Explorer):
    """Where each layer's tree is cut, and what that costs: drawn by hand, layer by layer, and saved as a plan.

    The cut of a layer is set by its height or by the number of experts that it leaves; the picture shows the layer's tree
    with its groups in colour, and below it, over all layers, where each is cut and what cutting it there or elsewhere
    costs. All numbers come from the statistics; the model runs only when the plan is scored.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Without one the plan cannot be scored.
    layer : int
        The layer shown first, from 0.
    similarity, linkage : str
    experts : int
        Experts kept in every layer at first.
    path : str or path
        Where the plan is saved, unless another is typed.
    text : str
        What the plan is scored on: see :func:`hcsmoe_core.evaluate`.

    Attributes
    ----------
    counts : list of L int
        Experts kept in each layer as drawn.
    """

    def __init__(
        self,
        stats,
        model,
        tokenizer=None,
        *,
        layer=0,
        similarity="expert-output",
        linkage="average",
        experts,
        path,
        text="demo",
    ):
        self._stats, self._model, self._tokenizer, self._similarity = stats, model, tokenizer, similarity
        self._text, self._uniform, self._known, self._moving = text, experts, {}, False
        most = min(sums.num_experts for sums in stats.layers.values())
        check_count("experts kept", experts, 1, most)
        self.counts = [experts] * len(stats.layers)
        wide = {"description_width": "initial"}
        super().__init__(
            self._drawing,
            layer=_slider("layer", layer, 0, len(stats.layers) - 1),
            linkage=_choice("linkage", linkage, allowed_linkages(similarity, LINKAGES)),
            experts=_slider("experts kept here", experts, 1, most),
            height=widgets.FloatSlider(
                0, min=0, max=1, step=0.001, description="cut height, of the tree's", style=wide
            ),
        )
        self._path = widgets.Text(str(path), description="plan", layout=widgets.Layout(width="24em"))
        self._said = widgets.HTML()
        buttons = (
            ("same in every layer", self.spread),
            ("save plan", self.save),
            ("apply and score", self.score),
        )
        self._buttons = {
            name: widgets.Button(description=name, layout=widgets.Layout(width="auto")) for name, _ in buttons
        }
        for name, action in buttons:
            self._buttons[name].on_click(lambda _, action=action: self._tell(action))
        actions = widgets.HBox(
            [*self._buttons.values(), self._path], layout=widgets.Layout(flex_flow="row wrap")
        )
        self.children = (*self.children, actions, self._said)

    @property
    def plan(self):
        """The plan as drawn."""
        how = dict(similarity=self._similarity, linkage=self.values["linkage"])
        return make_plan(self._stats, self._model, experts=list(self.counts), **how)

    def spread(self):
        """Keep as many experts in every layer as in the one shown."""
        self.counts = [self.values["experts"]] * len(self.counts)
        self._refresh()
        return f"{self.counts[0]} experts in every layer."

    def save(self):
        """Write the plan to the path typed in."""
        self.plan.save(self._path.value)
        return f"Saved; hcsmoe merge MODEL --plan {self._path.value} --out FOLDER"

    def score(self):
        """Apply the plan to the live model, measure the loss on text before and after, and undo it."""
        before = evaluate(self._model, self._tokenizer, tasks=[], text=self._text)["mean_loss"]
        apply_plan(self._model, self.plan)
        try:
            after = evaluate(self._model, self._tokenizer, tasks=[], text=self._text)["mean_loss"]
        finally:
            restore(self._model)
        return f"Loss {before:.4f} before, {after:.4f} with this plan ({sum(self.counts)} experts in all)."

    def _tell(self, action):
        try:
            self._said.value = html.escape(action())
        except (ValueError, OSError) as error:
            self._said.value = html.escape(str(error))

    def _refresh(self, change=None):
        """Keep the layer, its number of experts and its height in step, then draw."""
        if self._moving:
            return
        self._moving = True
        try:
            layer, height, experts = self.values["layer"], self._controls["height"], self._controls["experts"]
            moved, tree = (
                None if change is None else change["owner"],
                self._tree(layer, self.values["linkage"]),
            )
            if moved is height:
                self.counts[layer] = _groups_at(tree, height.value * _top(tree))
            elif moved is experts:
                self.counts[layer] = experts.value
            experts.max = len(tree) + 1
            experts.value = self.counts[layer]
            if moved is not height:  # which stays where it was put: small steps by keyboard add up
                height.value = cut_height(tree, self.counts[layer]) / _top(tree)
        finally:
            self._moving = False
        super()._refresh()

    def _key(self):
        return (self.values["layer"], self.values["linkage"], *self.counts)

    def _tree(self, layer, linkage):
        if (layer, linkage) not in self._known:
            how = dict(similarity=self._similarity, linkage=linkage, model=self._model)
            self._known[layer, linkage] = merge_tree(self._stats, layer, **how)
        return self._known[layer, linkage]

    def _condensed(self, layer):
        if layer not in self._known:
            self._known[layer] = distances(self._stats, layer, similarity=self._similarity, model=self._model)
        return self._known[layer]

    def _costs(self, linkage):
        if linkage not in self._known:
            self._known[linkage] = cut_costs(
                self._stats, self._model, similarity=self._similarity, linkage=linkage
            )
        return self._known[linkage]

    def _drawing(self, layer, linkage, experts, height):
        tree, costs, count = self._tree(layer, linkage), self._costs(linkage), self.counts[layer]
        figure = cut_view(
            self._condensed(layer),
            tree,
            costs,
            self.counts,
            layer=layer,
            usage=self._stats.layer(layer).frequency.numpy(),
            uniform=self._uniform,
            title=f"MoE layer {layer}, {linkage} linkage, {count} of {len(tree) + 1} experts kept",
            label=described(self._similarity),
            width=8.4,
        )
        found = summarise(self._stats, layer, cut(tree, count))
        drawn, even = (_mean_square(costs, counts) for counts in (self.counts, [self._uniform] * len(costs)))
        note = (
            f"This layer: {100 * found['saved']:.0f} % of its expert weights saved; {100 * found['moved']:.0f} % of the "
            f"routing mass goes to experts that are joined; routing entropy {found['entropy']:.2f} → "
            f"{found['entropy_after']:.2f} nats; "
            f"predicted relative error of its output {found['function_error']:.3f}.\nAll layers: {sum(self.counts)} experts, "
            f"predicted error {drawn:.3f} (root mean square); {self._uniform * len(costs)} spread evenly: {even:.3f}."
        )
        return png(figure, tight=False), note  # its margins are set: half the time to draw


def _mean_square(costs, counts):
    return float(np.sqrt(np.mean([cost[count - 1] ** 2 for cost, count in zip(costs, counts, strict=True)])))


def _top(tree):
    """Height at which a tree is whole, with some room above."""
    return (float(tree[-1, 2]) * 1.05 if len(tree) else 1.0) or 1.0


def _groups_at(tree, height):
    """Groups that are left where a tree is cut at some height."""
    return len(tree) + 1 - int((np.maximum.accumulate(tree[:, 2]) <= height).sum()) if len(tree) else 1


def _slider(description, value, low, high):
    """An integer slider; a value out of range is an error, where ipywidgets would move it silently."""
    check_count(description, value, low, high)
    return widgets.IntSlider(
        value, low, high, description=description, style={"description_width": "initial"}
    )


def _choice(description, value, options):
    check_choice(description, value, options)
    return widgets.Dropdown(
        options=options, value=value, description=description, style={"description_width": "initial"}
    )
