"""Controls over a figure: live in JupyterLab, a plain picture wherever there is no kernel."""

import functools
import html

import ipywidgets as widgets
import numpy as np

from hcsmoe_core import clustering
from hcsmoe_core._util import InputError, check_choice, check_count, require
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import make_plan, merge_tree, summary
from hcsmoe_core.methods.similarities import allowed_linkages, available, described
from hcsmoe_core.score.evaluation import evaluate
from hcsmoe_core.similarity import distances, metric_of
from hcsmoe_core.studies import stability, tables
from hcsmoe_core.ui import anatomy, figures

FULL_NAME = {"description_width": "initial"}
WRAPPED = widgets.Layout(flex_flow="row wrap")


class Explorer(widgets.VBox):
    """Controls, and below them a picture and a note that follow them.

    Picture and note are outputs of the cell, replaced whenever a control changes, and not widgets: a front
    end without a kernel shows a widget as an error. So an executed notebook shows the picture wherever it
    is opened, as it was when the notebook was saved.

    Parameters
    ----------
    draw : callable
        Takes the controls' values by name; returns a picture, as PNG, and a note to show below it: a text or
        a data frame.
    controls
        ipywidgets by the names of ``draw``'s parameters.

    Attributes
    ----------
    picture : bytes
        PNG.
    note : str or pandas.DataFrame
    """

    def __init__(self, draw, **controls):
        self._draw, self._controls, self._cache, self._outputs = draw, controls, {}, ()
        self.picture, self.note = b"", ""
        super().__init__([widgets.HBox(list(controls.values()), layout=WRAPPED)])
        for control in controls.values():
            control.observe(self._refresh, names="value")
        self._refresh()

    @property
    def values(self) -> dict:
        """Value of each control."""
        return {name: control.value for name, control in self._controls.items()}

    def _key(self):
        """What the picture depends on."""
        return tuple(self.values.items())

    def _refresh(self, _=None):
        key = self._key()
        try:
            if key not in self._cache:
                self._cache[key] = self._draw(**self.values)
            self.picture, self.note = self._cache[key]
        except InputError as error:  # settings that do not go together: the picture stays, the note says why
            if not self._cache:
                raise
            self.note = str(error)
        for output, bundle in zip(self._outputs, self._bundles(), strict=False):
            output.update(bundle, raw=True)

    def _bundles(self):
        """Picture and note as outputs of a cell."""
        text, markup = self.note, html.escape(str(self.note)).replace("\n", "<br>")
        if not isinstance(text, str):
            text, markup = self.note.to_string(index=False), self.note.to_html(index=False)
        return {"image/png": self.picture, "text/plain": "picture"}, {"text/html": markup, "text/plain": text}

    def _ipython_display_(self, **_):
        from IPython.display import display

        settings = ", ".join(f"{control.description}: {control.value}" for control in self._controls.values())
        display(self._repr_mimebundle_() | {"text/plain": settings}, raw=True)
        self._outputs = [display(data, raw=True, display_id=True) for data in self._bundles()]


def usage_explorer(stats, *, layer=0):
    """Which experts the tokens of each domain go to, by layer."""

    def draw(layer):
        share = 100 * stats.layer(layer).frequency
        note = (
            f"{stats.layer_name(layer)}: the most used expert gets {share.max():.1f} % of the routed tokens, "
            f"the least used {share.min():.1f} %."
        )
        return figures.png(figures.usage_by_domain(stats, layer, title=f"MoE layer {layer}")), note

    return Explorer(draw, layer=_slider("layer", layer, 0, len(stats.layers) - 1))


def similarity_explorer(stats, model, *, layer=0, similarity="expert-output", linkage="average", groups=None):
    """Distances between one layer's experts, with the merge tree on both sides."""

    def draw(layer, similarity, linkage):
        condensed = distances(stats, layer, similarity=similarity, model=model)
        figure = figures.similarity_heatmap(
            condensed,
            clustering.linkage(condensed, linkage, metric=metric_of(similarity)),
            groups=groups,
            width=5,
            usage=stats.layer(layer).frequency.numpy(),
            mix=tables.domain_mix(stats, layer),
            title=f"MoE layer {layer}, {similarity}, {linkage} linkage",
            label=described(similarity),
        )
        return figures.png(figure), ""

    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        similarity=_choice("similarity", similarity, available(stats)),
        linkage=_choice("linkage", linkage, clustering.LINKAGES),
    )


def token_explorer(stats, input_ids, tokenizer, *, layer=0, expert=0, most=12):
    """Which tokens an expert gets: by domain, by token, and those with the largest routing weight."""

    def draw(layer, expert):
        sums = stats.layer(layer)
        figure = figures.expert_profile(
            dict(zip(stats.domains, (sums.usage_count[:, expert] / sums.tokens).tolist(), strict=True)),
            anatomy.token_shares(stats, layer, expert, input_ids, tokenizer),
            expected=float(sums.usage_count.sum() / sums.tokens.sum() / sums.num_experts),
            title=f"MoE layer {layer}, expert {expert}",
        )
        tokens = anatomy.expert_tokens(stats, layer, expert, input_ids, tokenizer, most=most)
        return figures.png(figure), tokens.round(3)

    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        expert=_slider("expert", expert, 0, min(sums.num_experts for sums in stats.layers.values()) - 1),
    )


def tangle_explorer(
    stats, model, *, layer=0, similarity="expert-output", first="average", second="ward", groups=None
):
    """Two merge trees of one layer's experts face to face."""

    def draw(layer, first, second):
        trees = [
            merge_tree(stats, layer, linkage=linkage, similarity=similarity, model=model)
            for linkage in (first, second)
        ]
        figure = figures.tanglegram(
            *trees,
            groups=groups,
            label=described(similarity),
            titles=(f"{first} linkage", f"{second} linkage"),
            title=f"MoE layer {layer}",
        )
        note = ""
        if groups:
            index = stability.agreement(*([clustering.cut(tree, groups)] for tree in trees))[0]
            note = (
                f"Adjusted Rand index of the two, cut into {groups} groups: {index:.2f} (1: the same, "
                "0: chance)."
            )
        return figures.png(figure), note

    linkages = allowed_linkages(similarity, clustering.LINKAGES)
    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(stats.layers) - 1),
        first=_choice("left", first, linkages),
        second=_choice("right", second, linkages),
    )


def merge_explorer(stats, model, plan, *, layer=0, group=0):
    """What each combination does to one group of a plan; groups are ordered by size, the largest first."""

    def draw(layer, group):
        groups = anatomy.merged_groups(plan, layer)
        count = len(groups)
        require(group < count, f"MoE layer {layer} has {count} merged groups; there is no group {group}.")
        frame = anatomy.output_errors(stats, model, layer, groups[group])
        best = frame[frame["domain"] == "all"].sort_values("error").iloc[0]
        figure = figures.domain_errors(
            frame, title=f"MoE layer {layer}, experts {', '.join(map(str, groups[group]))}"
        )
        return figures.png(figure), "Smallest error on the sample: {combination}, {error:.2f}.".format(**best)

    most = max(len(anatomy.merged_groups(plan, i)) for i in range(len(plan.layers)))
    return Explorer(
        draw,
        layer=_slider("layer", layer, 0, len(plan.layers) - 1),
        group=_slider("group, largest first", group, 0, most - 1),
    )


class CutExplorer(Explorer):
    """Choose by hand where each layer's tree is cut, see what that costs, and save it as a plan.

    The cut of a layer is set by its height or by the number of experts kept; the picture shows the layer's
    tree with its groups in colour, and below it, over all layers, where each is cut and what a cut there or
    elsewhere costs. All numbers come from the statistics; the model runs only when the plan is scored.

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
        Where the plan is saved, unless another path is typed.
    text : str
        What the plan is scored on: see :func:`hcsmoe_core.evaluate`.

    Attributes
    ----------
    counts : list of L int
        Experts kept in each layer.
    """

    def __init__(
        self, stats, model, tokenizer=None, *, layer=0, similarity="expert-output", linkage="average",
        experts, path, text="demo"
    ):  # fmt: skip
        self._stats, self._model, self._tokenizer, self._text = stats, model, tokenizer, text
        self._similarity, self._uniform, self._syncing = similarity, experts, False
        options = dict(similarity=similarity, model=model)
        self._tree = functools.cache(lambda i, name: merge_tree(stats, i, linkage=name, **options))
        self._condensed = functools.cache(lambda i: distances(stats, i, **options))
        self._costs = functools.cache(lambda name: tables.cut_costs(stats, linkage=name, **options))
        most = min(layer_stats.num_experts for layer_stats in stats.layers.values())
        self.counts = [check_count("experts kept", experts, 1, most)] * len(stats.layers)
        super().__init__(
            self._draw_cut,
            layer=_slider("layer", layer, 0, len(stats.layers) - 1),
            linkage=_choice("linkage", linkage, allowed_linkages(similarity, clustering.LINKAGES)),
            experts=_slider("experts kept here", experts, 1, most),
            height=widgets.FloatSlider(
                0,
                min=0,
                max=1,
                step=0.001,
                description="relative cut height",
                style=FULL_NAME,
                continuous_update=False,
            ),
        )
        self._path = widgets.Text(str(path), description="plan", layout=widgets.Layout(width="24em"))
        self._message = widgets.HTML()
        actions = {"same in every layer": self.spread, "save plan": self.save, "apply and score": self.score}
        as_wide_as_its_name = widgets.Layout(width="auto")
        self._buttons = {
            name: widgets.Button(description=name, layout=as_wide_as_its_name) for name in actions
        }
        for name, button in self._buttons.items():
            button.on_click(lambda _, action=actions[name]: self._report(action))
        self.children += (
            widgets.HBox([*self._buttons.values(), self._path], layout=WRAPPED),
            self._message,
        )

    @property
    def plan(self):
        """The plan as set by the controls."""
        return make_plan(
            self._stats,
            self._model,
            experts=list(self.counts),
            similarity=self._similarity,
            linkage=self.values["linkage"],
        )

    def spread(self) -> str:
        """Keep as many experts in every layer as in the one shown."""
        self.counts = [self.values["experts"]] * len(self.counts)
        self._refresh()
        return f"{self.counts[0]} experts in every layer."

    def save(self) -> str:
        """Write the plan to the path typed in."""
        self.plan.save(self._path.value)
        return f"Saved; hcsmoe merge MODEL --plan {self._path.value} --out FOLDER"

    def score(self) -> str:
        """Measure the live model's loss on text without and with the plan; the model is left unmerged."""
        options = dict(tasks=[], text=self._text)
        before = evaluate(self._model, self._tokenizer, **options)["mean_loss"]
        apply_plan(self._model, self.plan)
        try:
            after = evaluate(self._model, self._tokenizer, **options)["mean_loss"]
        finally:
            restore(self._model)
        return f"Loss {before:.4f} before, {after:.4f} with this plan ({sum(self.counts)} experts in all)."

    def _report(self, action):
        """Show what an action says, or why it cannot be done."""
        try:
            message = action()
        except (InputError, OSError) as error:
            message = str(error)
        self._message.value = html.escape(message)

    def _refresh(self, change=None):
        """Keep the layer, its number of experts and its height in step, then draw."""
        if self._syncing:
            return
        self._syncing = True
        try:
            layer, height, experts = self.values["layer"], self._controls["height"], self._controls["experts"]
            tree, changed = self._tree(layer, self.values["linkage"]), change and change["owner"]
            if changed is height:
                joined = np.maximum.accumulate(tree[:, 2]) <= height.value * _top(tree)
                self.counts[layer] = len(tree) + 1 - int(joined.sum())
            elif changed is experts:
                self.counts[layer] = experts.value
            experts.max = len(tree) + 1
            experts.value = self.counts[layer]
            if changed is not height:  # which stays where it was put: small steps by keyboard add up
                height.value = figures.cut_height(tree, self.counts[layer]) / _top(tree)
        finally:
            self._syncing = False
        super()._refresh()

    def _key(self):
        return (self.values["layer"], self.values["linkage"], *self.counts)

    def _draw_cut(self, layer, linkage, experts, height):
        tree, costs, count = self._tree(layer, linkage), self._costs(linkage), self.counts[layer]
        figure = figures.cut_view(
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
        found = summary.summarise(self._stats, layer, clustering.cut(tree, count))
        uniform = [self._uniform] * len(costs)
        note = (
            f"This layer: {100 * found['saved']:.0f} % of its expert weights saved; "
            f"{100 * found['moved']:.0f} % of the routing mass goes to experts that are merged; "
            f"routing entropy {found['entropy']:.2f} → {found['entropy_after']:.2f} nats; "
            f"predicted relative error of its output {found['function_error']:.3f}.\n"
            f"All layers: {sum(self.counts)} experts, predicted error {_mean_square(costs, self.counts):.3f} "
            f"(root mean square); with {self._uniform} in every layer ({sum(uniform)}): "
            f"{_mean_square(costs, uniform):.3f}."
        )
        return figures.png(figure, tight=False), note  # its margins are set: half the time to draw


def _mean_square(costs, counts):
    return float(np.sqrt(np.mean([cost[count - 1] ** 2 for cost, count in zip(costs, counts, strict=True)])))


def _top(tree):
    """Height at which all experts are in one group, and 5 % above."""
    return float(tree[-1, 2]) * 1.05 or 1.0


def _slider(description, value, low, high):
    """An integer slider; a value out of range is an error, where ipywidgets would change it silently."""
    check_count(description, value, low, high)
    return widgets.IntSlider(
        value, low, high, description=description, style=FULL_NAME, continuous_update=False
    )


def _choice(description, value, options):
    check_choice(description, value, options)
    return widgets.Dropdown(options=options, value=value, description=description, style=FULL_NAME)
