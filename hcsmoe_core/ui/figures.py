"""Figures of a paper; each function returns a :class:`matplotlib.figure.Figure`, and :func:`save` writes it.

Texts are shown as they are: a ``$`` begins no formula, and what no font can show is a question mark.

In all of them ``width`` and ``height`` are in inches, ``title`` stands above and ``label`` at the colour
bar or at the axis of the values. Where there is an argument ``on``, a subfigure, the figure is drawn on it
and not on a new one.
"""

import functools
import io
import itertools
import math
import re
import textwrap
from pathlib import Path

import matplotlib.figure
import numpy as np
import seaborn  # which registers its colour maps, too
from matplotlib import collections, patches, patheffects, ticker, transforms
from matplotlib.text import Text
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from hcsmoe_core._util import check_choice, replacing
from hcsmoe_core.clustering import cut

STYLE = Path(__file__).with_name("hcsmoe.mplstyle")
COLUMN, PAGE = 3.25, 6.75  # inches: widths of one and of two columns of a paper
DISTANCES, SHARES = "mako", "rocket_r"  # seaborn's colour maps; of distances, dark means similar
UNMERGED = "0.55"  # grey of experts that stay alone
LEGIBLE = 4.5  # points: the smallest label worth printing
MARKERS = "osD^vP*X"
COLOURS = [
    f"#{entry['color'].removeprefix('#')}"
    for entry in matplotlib.rc_params_from_file(STYLE)["axes.prop_cycle"]
]
CUT_LINE = dict(color="black", lw=0.8, ls=(0, (4, 3)))
REFERENCE = dict(color="0.4", lw=0.8)
# Accuracy of guessing, by task of lm-evaluation-harness; of the embedded tasks see chance_level.
CHANCE = {
    **dict.fromkeys(("boolq", "rte", "winogrande", "piqa", "copa", "wic", "wsc", "mrpc", "qnli"), 1 / 2),
    **dict.fromkeys(("arc_challenge", "arc_easy", "hellaswag", "mmlu", "openbookqa", "race", "sciq"), 1 / 4),
}
# Formats that figures are saved in, without what would differ from one run to the next.
FORMATS = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


in_style = matplotlib.rc_context(fname=STYLE)  # decorator: whatever style the session has


def literal(text) -> str:
    """Text that matplotlib shows as it is: no formula between dollar signs, no lone surrogates."""
    return re.sub(r"(?<!\\)\$", r"\$", str(text).encode("utf-8", "replace").decode())


def styled(draw):
    """Decorator of a function that returns a figure: in the project's style, with all texts literal."""

    @in_style
    @functools.wraps(draw)
    def drawn(*args, **options):
        figure = draw(*args, **options)
        for axis in (axis for axes in figure.get_figure().axes for axis in (axes.xaxis, axes.yaxis)):
            # Labels of ticks that were named are written again, by their names, when the figure is drawn.
            if isinstance(axis.get_major_formatter(), ticker.FixedFormatter | ticker.FuncFormatter):
                axis.set_ticklabels([literal(label.get_text()) for label in axis.get_ticklabels()])
        for text in figure.findobj(Text):
            text.set_text(literal(text.get_text()))
        return figure

    return drawn


@in_style
def png(figure, dpi=110, *, tight=True) -> bytes:
    """A figure as PNG, the same bytes each time; not ``tight``, it keeps its margins, in half the time."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"savefig.bbox": "tight" if tight else None}):
        figure.savefig(buffer, format="png", dpi=dpi, metadata=FORMATS[".png"])
    return buffer.getvalue()


class Figure(matplotlib.figure.Figure):
    """A figure that pyplot does not know of, and that a notebook shows nevertheless."""

    def _repr_png_(self):
        return png(self)


@in_style
def save(figure, path) -> list[Path]:
    """Write a figure as ``path.png`` and ``path.pdf``, the same bytes each time."""
    return [write(figure, f"{path}{suffix}") for suffix in (".png", ".pdf")]


@in_style
def write(figure, path) -> Path:
    """Write a figure in the format that the suffix of the path names, one of :data:`FORMATS`."""
    suffix = check_choice("out", Path(path).suffix, tuple(FORMATS))
    with replacing(path) as temporary:
        figure.savefig(temporary, format=suffix[1:], metadata=FORMATS[suffix])
    return Path(path)


def leaf_order(tree) -> list[int]:
    """Experts in the order in which a dendrogram shows them."""
    return hierarchy.leaves_list(tree).tolist() if len(tree) else [0]


def group_colours(labels, order) -> dict:
    """Colour of each group that has more than one expert; the others are grey.

    Colours are assigned along ``order`` (the experts as a dendrogram shows them), so that neighbours
    differ, and repeat after nine groups.
    """
    sizes = np.bincount(labels)
    merged = dict.fromkeys(int(labels[e]) for e in order if sizes[labels[e]] > 1)
    cycle = itertools.cycle(colour for colour in COLOURS if colour != "#949494")
    return dict.fromkeys(range(len(sizes)), UNMERGED) | dict(zip(merged, cycle, strict=False))


def _draw_tree(axes, tree, groups, *, orientation="top", scale=None):
    """Dendrogram on ``axes``; a branch has its group's colour if all its experts are in one group.

    ``scale`` names the spine along which heights are shown. Returns the experts in the order of the leaves,
    and the colour of each one's group.
    """
    labels = cut(tree, groups or len(tree) + 1)
    colours = group_colours(labels, leaf_order(tree))
    members = [{int(label)} for label in labels]
    for first, second in tree[:, :2].astype(int):
        members.append(members[first] | members[second])
    branches = [colours[min(among)] if len(among) == 1 else "black" for among in members]
    leaves = hierarchy.dendrogram(
        tree, ax=axes, orientation=orientation, link_color_func=branches.__getitem__, no_labels=True
    )["leaves"]
    matplotlib.artist.setp(axes.collections, linewidth=0.9)
    for name, spine in axes.spines.items():
        spine.set_visible(name == scale)
    axes.tick_params(length=2 if scale else 0, labelbottom=scale == "bottom", labelleft=scale == "left")
    return leaves, [colours[int(labels[e])] for e in leaves]


def untangled(tree, order) -> np.ndarray:
    """The same tree with branches swapped so that its leaves come close to another order.

    At each join the branch whose experts stand further left in ``order``, on average, goes left; heights do
    not change.

    Parameters
    ----------
    tree : (E−1, 4) array
    order : sequence of E int
        Experts from left to right.

    Returns
    -------
    (E−1, 4) array
    """
    experts = len(tree) + 1
    mean, size = np.concatenate([np.argsort(order), np.zeros(experts - 1)]), np.ones(2 * experts - 1)
    swapped = np.array(tree, dtype=float)
    for t, row in enumerate(swapped, start=experts):
        a, b = int(row[0]), int(row[1])
        size[t] = size[a] + size[b]
        mean[t] = (size[a] * mean[a] + size[b] * mean[b]) / size[t]
        if mean[a] > mean[b]:
            row[:2] = b, a
    return swapped


def crossings(first, second) -> int:
    """Pairs of experts that two orders of leaves have in opposite order: lines between them cross."""
    position = np.argsort(second)[np.asarray(first)]
    return int((position[:, None] > position)[np.triu_indices(len(position), 1)].sum())


def cut_height(tree, groups) -> float:
    """Height at which a tree is cut into ``groups``, midway between the joins below and above."""
    heights = np.array([0, *tree[:, 2], tree[-1, 2] * 1.05])
    return heights[len(tree) + 1 - groups :][:2].mean()


def chance_level(*tasks) -> float | None:
    """Mean accuracy of guessing on tasks; None if it is unknown for one of them."""
    levels = [0.25 if task.startswith("demo_") else CHANCE.get(task) for task in tasks]
    return None if None in levels or not levels else sum(levels) / len(levels)


def _size(figure):
    """Width and height of a figure or subfigure in inches."""
    return figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi


def _panels(figure, rows, columns, *, left, right, bottom, top, **options):
    """Grid of panels on a figure, with margins in inches."""
    width, height = _size(figure)
    margins = dict(left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height)
    return figure.add_gridspec(rows, columns, **margins, **options)


def stacked_figures(width, upper, lower):
    """Two subfigures of a new figure, one above the other, by their heights."""
    return Figure(figsize=(width, upper + lower)).subfigures(2, 1, height_ratios=(upper, lower))


def panel_grid(count, columns, width, height, *, sharex=True):
    """New figure of a number of panels, in rows of ``columns``, with shared axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(-(-count // columns), columns, sharex=sharex, sharey=True, squeeze=False).ravel()
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def title_and_legend(figure, panels, title, *, order=None, **options):
    """Title above all panels, and below them one legend of what any of them shows, in the given order."""
    handles = {
        name: handle
        for panel in panels
        for handle, name in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in order or handles if name in handles]
    options.setdefault("ncols", len(names))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", **options)
    figure.suptitle(textwrap.fill(title, int(14 * _size(figure)[0])))


def _heatmap(axes, values, colours=DISTANCES, **options):
    return axes.imshow(values, **{"cmap": colours, "aspect": "auto", "vmin": 0} | options)


def _usage_bars(axes, positions, order, usage, colours, *, xlim, width=0.8):
    """Share of routed tokens of each expert, in per cent, with a line at an equal share."""
    half, shares = width / 2, [100 * float(usage[e]) for e in order]
    boxes = [
        ((x - half, 0), (x - half, y), (x + half, y), (x + half, 0))
        for x, y in zip(positions, shares, strict=True)
    ]
    axes.add_collection(collections.PolyCollection(boxes, facecolors=colours))  # one artist: bars are slow
    axes.axhline(100 / len(order), color="black", lw=0.6, ls=":")
    axes.set(xlim=xlim, xticks=[], ylim=(0, 1.05 * max(shares)))
    axes.set_ylabel("tokens,\n%", rotation=0, ha="right", va="center")


def _label_experts(axes, order, inches, positions=None, *, both=False):
    """Number the experts along ``inches`` of an axis: all of them, or every n-th where space is short."""
    space = 72 * inches / len(order)  # points per expert
    step = max(1, math.ceil(LEGIBLE / space))
    size, digits = min(7, 0.9 * space * step), len(str(max(order)))
    turned = space * step < 0.65 * digits * size + 2
    # Not tick labels: a tick is five artists, and 64 of them are most of the time that drawing takes.
    axes.set(xticks=[], **({"yticks": []} if both else {"xlabel": "expert"}))
    inches = axes.figure.dpi_scale_trans
    below = axes.get_xaxis_transform() + transforms.ScaledTranslation(0, -3 / 72, inches)
    beside = axes.get_yaxis_transform() + transforms.ScaledTranslation(-3 / 72, 0, inches)
    for position, expert in list(zip(positions or range(len(order)), map(str, order), strict=True))[::step]:
        axes.text(
            position,
            0,
            expert,
            fontsize=size,
            rotation=90 if turned else 0,
            ha="center",
            va="top",
            transform=below,
        )
        if both:
            axes.text(0, position, expert, fontsize=size, ha="right", va="center", transform=beside)
    axes.xaxis.labelpad = 5 + (0.65 * digits * size if turned else size)


def frame_groups(axes, labels, order) -> None:
    """Frames on a heatmap, in some order of the experts, around the groups of more than one."""
    for group, colour in group_colours(labels, order).items():
        inside = np.flatnonzero(labels[order] == group)
        if len(inside) > 1:
            corner, look = inside[0] - 0.5, dict(fill=False, ec=colour, lw=1.4, clip_on=False)
            axes.add_patch(patches.Rectangle((corner, corner), len(inside), len(inside), **look))


@in_style
def tree_on(axes, tree, groups=None, *, title="", label="distance", labelled=True):
    """Merge tree on given axes; returns the experts of its leaves, their groups' colours, and positions."""
    order, colours = _draw_tree(axes, tree, groups, scale="left")
    axes.set(ylabel=label.replace(" between ", " between\n"), title=title)
    if groups:
        axes.axhline(cut_height(tree, groups), **CUT_LINE)
    positions = [10 * i + 5 for i in range(len(order))]  # where SciPy draws the leaves
    if labelled:
        _label_experts(axes, order, axes.get_window_extent().width / axes.figure.dpi, positions)
    return order, colours, positions


@in_style
def heatmap_on(axes, condensed, tree, groups=None, **options):
    """Distances in the order of a tree on given axes, with ``options`` of ``imshow``."""
    order = leaf_order(tree)
    _heatmap(axes, squareform(condensed)[np.ix_(order, order)], **options)
    frame_groups(axes, cut(tree, groups or len(order)), np.array(order))
    _label_experts(axes, order, axes.get_window_extent().width / axes.figure.dpi, both=True)


@styled
def similarity_heatmap(
    condensed, tree, *, groups=None, usage=None, mix=None, title="", label="distance between experts",
    width=COLUMN, on=None
):  # fmt: skip
    """Pairwise distances of one layer's experts, ordered by their merge tree, which is drawn on both sides.

    Parameters
    ----------
    condensed : (E·(E−1)/2,) array
    tree : (E−1, 4) array
    groups : int, optional
        Number of groups that the tree is cut into; they are coloured in the trees and framed in the heatmap.
    usage : (E,) array, optional
        Share of routed tokens of each expert, drawn as bars below.
    mix : dict of str to (E,) array, optional
        By domain, share of each expert's tokens, drawn as a strip below: see
        :func:`hcsmoe_core.studies.tables.domain_mix`.
    """
    experts = len(tree) + 1
    labels = cut(tree, groups or experts)
    side = (_size(on)[0] if on else width) - 1.3  # of the heatmap, in inches
    heights = [0.17 * side, side] + [0.16 * side] * (usage is not None) + [0.085 * len(mix or {})] * bool(mix)
    figure = on or Figure(figsize=(width, sum(heights) + 0.06 * len(heights) + 0.72))
    sizes = dict(width_ratios=(0.55, side, 0.1), height_ratios=heights, wspace=0.03, hspace=0.06)
    grid = _panels(figure, len(heights), 3, left=0.05, right=0.62, bottom=0.42, top=0.3, **sizes)
    top, left = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 0])
    lowest = middle = figure.add_subplot(grid[1, 1])
    order, colours = _draw_tree(top, tree, groups)
    _draw_tree(left, tree, groups, orientation="left")
    left.invert_yaxis()
    image = _heatmap(middle, squareform(condensed)[np.ix_(order, order)])
    frame_groups(middle, labels, order)
    middle.set(xticks=[], yticks=[])
    figure.colorbar(image, cax=figure.add_subplot(grid[1, 2]), label=label)
    if usage is not None:
        lowest = figure.add_subplot(grid[2, 1])
        _usage_bars(lowest, range(experts), order, usage, colours, xlim=(-0.5, experts - 0.5))
    if mix:
        lowest = figure.add_subplot(grid[-1, 1])
        image = _heatmap(lowest, 100 * np.stack([np.asarray(s)[order] for s in mix.values()]), SHARES)
        lowest.set_yticks(range(len(mix)), list(mix), fontsize=5.5)
        lowest.tick_params(length=0)
        figure.colorbar(image, cax=figure.add_subplot(grid[-1, 2]), label="of the expert's\ntokens, %")
    _label_experts(lowest, order, side)
    figure.suptitle(title, y=1 - 0.08 / _size(figure)[1])
    return figure


@styled
def dendrogram(tree, *, groups=None, usage=None, title="", label="distance", width=PAGE, height=2.4, on=None):
    """Merge tree of one layer's experts, cut into a number of groups.

    Parameters
    ----------
    tree : (E−1, 4) array
    groups : int, optional
        Experts kept; a dashed line shows the cut, and the groups are coloured.
    usage : (E,) array, optional
        Share of routed tokens of each expert, drawn as bars below the tree.
    """
    figure = on or Figure(figsize=(width, height))
    heights = (1,) if usage is None else (1, 0.28)
    grid = _panels(
        figure,
        len(heights),
        1,
        left=0.72,
        right=0.05,
        bottom=0.42,
        top=0.3,
        height_ratios=heights,
        hspace=0.08,
    )
    lowest = axes = figure.add_subplot(grid[0])
    order, colours, positions = tree_on(axes, tree, groups, title=title, label=label, labelled=False)
    if usage is not None:
        lowest = figure.add_subplot(grid[1])
        _usage_bars(lowest, positions, order, usage, colours, xlim=axes.get_xlim(), width=8)
    _label_experts(lowest, order, _size(figure)[0] - 0.77, positions)
    return figure


@styled
def layer_grid(
    condensed, trees, *, groups=None, order=None, titles=None, label="distance between experts", width=PAGE
):
    """Every layer's distances as small heatmaps with their trees above, each on a colour scale of its own.

    Parameters
    ----------
    condensed, trees : list
        Of each layer, as for :func:`similarity_heatmap`.
    groups : int, optional
    order : list of int, optional
        One order of the experts for all layers; then the layers' own trees are not drawn.
    titles : list of str, optional
    """
    columns = min(4, len(trees))
    rows, side, above = -(-len(trees) // columns), width / columns, 0.3 if order is None else 0.001
    upper, lower = stacked_figures(width, rows * side * (0.95 + above), 0.5)
    outer = upper.add_gridspec(rows, columns, wspace=0.12, hspace=0.22, left=0.04, right=0.99)
    for i, (distance, tree) in enumerate(zip(condensed, trees, strict=True)):
        inner = outer[i // columns, i % columns].subgridspec(2, 1, height_ratios=(above, 1), hspace=0.03)
        top, middle = upper.add_subplot(inner[0]), upper.add_subplot(inner[1])
        leaves = order or _draw_tree(top, tree, groups)[0]
        top.set_visible(order is None)
        image = _heatmap(middle, squareform(distance)[np.ix_(leaves, leaves)])
        _label_experts(middle, leaves, 0.8 * side, both=True)
        (middle if order else top).set_title(titles[i] if titles else f"layer {i}")
    scale = lower.add_axes((0.3, 0.75, 0.4, 0.16))
    bar = lower.figure.colorbar(image, cax=scale, orientation="horizontal", label=label)
    bar.set_ticks([0, image.norm.vmax], labels=["0 (the same)", "largest of the layer"])
    return lower.figure


@styled
def usage_by_domain(stats, layer, *, title="", width=PAGE):
    """Which experts the tokens of each domain go to: share of the domain's routed tokens, in per cent.

    Parameters
    ----------
    stats : Statistics
    layer : int or str
    """
    count = stats.layer(layer).usage_count.double()
    share = 100 * (count / count.sum(1, keepdim=True)).numpy()
    axes = Figure(figsize=(width, 0.7 + 0.17 * len(stats.domains))).add_subplot()
    image = _heatmap(axes, share, SHARES)
    _label_experts(axes, range(share.shape[1]), 0.8 * width)
    axes.set(yticks=range(len(stats.domains)), yticklabels=stats.domains, title=title)
    axes.figure.colorbar(image, ax=axes, pad=0.015, aspect=12, label="tokens, %")
    return axes.figure


@styled
def expert_profile(shares, tokens, *, expected, most=18, title="", width=PAGE):
    """Which tokens one expert gets: the share of each domain's tokens, and the tokens with the largest share.

    Parameters
    ----------
    shares : dict of str to float
        By domain, the share of its tokens that are routed to the expert.
    tokens : pandas.DataFrame
        Of :func:`hcsmoe_core.ui.anatomy.token_shares`; the first ``most`` are drawn.
    expected : float
        Share of the tokens that an expert gets on average, k/E: the dotted line.
    """
    tokens = tokens.head(most)
    figure = Figure(figsize=(width, 0.62 + 0.14 * max(len(shares), len(tokens), 6)))
    panels = _panels(figure, 1, 2, left=0.85, right=0.1, bottom=0.38, top=0.24, wspace=0.55).subplots()
    names = [token.replace(" ", "␣")[:14] for token in tokens["token"]]
    for axes, values, labels, font, xlabel in (
        (panels[0], shares.values(), list(shares), "DejaVu Sans", "tokens of each domain, %"),
        (panels[1], tokens["share"], names, "DejaVu Sans Mono", "occurrences of each token, %"),
    ):
        axes.barh(range(len(labels)), [100 * v for v in values], height=0.75)
        axes.axvline(100 * expected, color="black", lw=0.7, ls=":")
        axes.set_yticks(range(len(labels)), labels, family=[font], size=6.5)
        axes.set(
            xlabel=xlabel,
            xlim=(0, 112 * max([*values, 0.01])),  # the counts need some space
            ylim=(max(len(labels), 1) - 0.4, -0.6),
        )
        axes.tick_params(axis="y", length=0)
    for y, (share, count) in enumerate(zip(tokens["share"], tokens["count"], strict=True)):
        panels[1].text(100 * share, y, f" of {count}", va="center", size=5.5)
    figure.suptitle(title, y=1 - 0.06 / figure.get_figheight())
    return figure


@styled
def curve(
    frame, *, x, y, hue=None, error=None, reference=None, log=False, xlabel="", ylabel="", title="",
    width=COLUMN
):  # fmt: skip
    """A score against a setting, one line per value of ``hue``, with error bars.

    Parameters
    ----------
    frame : pandas.DataFrame
    x, y, hue, error : str
        Columns; ``error`` is half the length of the bars, and may be missing from the frame.
    reference : (float, str), optional
        A horizontal line and its name, such as the unmerged model or chance; or a list of such pairs.
    log : bool
        Whether ``x`` is drawn on a logarithmic axis.
    """
    axes = Figure(figsize=(width, 0.78 * width)).add_subplot()
    groups = [("", frame)] if hue is None else list(frame.groupby(hue, sort=True))
    for i, (name, rows) in enumerate(groups):
        rows = rows.sort_values(x)
        offset = (i - (len(groups) - 1) / 2) * 0.006  # so that bars stand side by side
        axes.errorbar(
            rows[x] * 2 ** (4 * offset) if log else rows[x] + offset * np.ptp(frame[x].dropna()),
            rows[y],
            yerr=rows.get(error),
            label=name,
            marker=MARKERS[i % len(MARKERS)],
            capsize=2,
            elinewidth=0.8,
        )
    lines = [reference] if isinstance(reference, tuple) else reference or []
    for (value, name), dashes in zip(lines, ("--", ":", "-."), strict=False):
        axes.axhline(value, ls=dashes, label=name, **REFERENCE)
    if log:
        axes.set_xscale("log", base=2)
    ticks = sorted(frame[x].dropna().unique())
    if all(float(tick).is_integer() for tick in ticks):  # settings, not measured values
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], minor=False)
    axes.set(xlabel=xlabel or x, ylabel=ylabel or y, title=title)
    if hue or lines:
        axes.legend(
            title=hue, **(dict(loc="center left", bbox_to_anchor=(1, 0.5)) if len(groups) > 4 else {})
        )
    return axes.figure


def _accuracy(task):
    """Metric, value and standard error, in per cent, of a task's accuracy or exact matches, or NaN."""
    for name, value in task.items():
        metric, comma, rule = name.partition(",")
        if metric in ("acc", "exact_match"):
            return metric, 100 * value, 100 * task.get(f"{metric}_stderr{comma}{rule}", math.nan)
    return "acc", math.nan, math.nan


@styled
def task_bars(scores, *, before=None, label="merged", title="", width=COLUMN):
    """Accuracy on each task with one standard error, beside that of another model and that of guessing.

    Parameters
    ----------
    scores, before : dict
        ``tasks`` as :func:`hcsmoe_core.evaluate` returns them, of a model and of the one to compare it
        with. Tasks without an accuracy (or exact matches) are left out.
    label : str
        Of the model.
    """
    names = [name for name, task in scores["tasks"].items() if not math.isnan(_accuracy(task)[1])]
    rows = np.arange(len(names))
    axes = Figure(figsize=(width, 0.6 + 0.26 * len(names))).add_subplot()
    models = {label: scores} if before is None else {"original": before, label: scores}
    for i, (model, values) in enumerate(models.items()):
        lengths, errors = (
            np.array([_accuracy(values["tasks"].get(name, {}))[1:] for name in names]).reshape(-1, 2).T
        )
        offset = (i - (len(models) - 1) / 2) * 0.38
        axes.barh(rows + offset, lengths, 0.36, xerr=errors, label=model, error_kw={"elinewidth": 0.8})
    levels = [(y, chance_level(name)) for y, name in enumerate(names) if chance_level(name) is not None]
    if levels:
        ends = np.array([end for y, _ in levels for end in (y - 0.5, y + 0.5, np.nan)])
        axes.plot(
            np.repeat([100 * level for _, level in levels], 3), ends, ls=":", label="chance", **REFERENCE
        )
    matched = {"acc": "", "exact_match": " (exact match)"}
    axes.set(
        yticks=rows,
        yticklabels=[
            name.removeprefix("demo_") + matched[_accuracy(scores["tasks"][name])[0]] for name in names
        ],
        ylim=(max(len(names), 1) - 0.5, -0.5),
        xlabel="accuracy, %",
        xlim=(0, 100),
        title=title,
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes.figure


@styled
def method_dots(
    frame, *, value, error=None, kind=None, panels="experts", reference=None, log=False, xlabel="", title="",
    width=PAGE
):  # fmt: skip
    """Every method's value, one panel per number of experts; the middle panel has the best method first.

    Parameters
    ----------
    frame : pandas.DataFrame
        One row per method and panel, with a column ``method``.
    value, error : str
        Columns of the value and of half the length of its bar; on a logarithmic axis bars stop at its end.
    kind : str, optional
        Column that is shown as colour.
    panels : str
        Column that is shown as panels, the largest first.
    reference : (float, str), optional
        A vertical line and its name.
    log : bool
        Whether the axis is logarithmic; then smaller is better, otherwise larger.
    """
    frame = frame.assign(**{"": ""})
    counts = sorted(frame[panels].unique(), reverse=True)
    frame, methods = frame.dropna(subset=[value]), frame["method"].unique()
    middle = frame[frame[panels] == counts[len(counts) // 2]].sort_values(value, ascending=log)
    order = list(dict.fromkeys([*middle["method"], *methods]))
    figure, all_axes = panel_grid(len(counts), len(counts), width, 0.95 + 0.155 * len(order))
    for axes, count in zip(all_axes, counts, strict=True):
        for name, marker in zip(sorted(frame[kind or ""].unique()), MARKERS, strict=False):
            rows = frame[(frame[panels] == count) & (frame[kind or ""] == name)]
            axes.errorbar(
                rows[value],
                rows["method"].map(order.index),
                xerr=rows[error].fillna(0) if error else None,
                label=name,
                fmt=marker,
                ms=3.5,
                capsize=1.5,
                elinewidth=0.8,
            )
        if reference:
            axes.axvline(reference[0], ls="--", label=reference[1], **REFERENCE)
        axes.set(title=f"{count} {panels}", xscale="log" if log else "linear")
        axes.grid(axis="y", color="0.92", lw=0.6)
    all_axes[0].set_yticks(range(len(order)), order)
    all_axes[0].invert_yaxis()
    all_axes[len(all_axes) // 2].set_xlabel(xlabel)
    title_and_legend(figure, all_axes, title)
    return figure


@styled
def tanglegram(first, second, *, groups=None, titles=("", ""), label="distance", title="", width=PAGE):
    """Two merge trees of the same experts face to face, with one line per expert.

    The second tree's branches are swapped so that few lines cross. Lines have the colour of the expert's
    group in the first tree; where the second tree joins other experts, its own branches show it.

    Parameters
    ----------
    first, second : (E−1, 4) arrays
    groups : int, optional
        Groups that both are cut into.
    titles : (str, str)
        Of the two trees.
    """
    experts = len(first) + 1
    figure = Figure(figsize=(width, max(2.2, 0.7 + 0.085 * experts)))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 0.8, 1))
    drawn = []
    for axes, tree, orientation, name in (
        (left, first, "left", titles[0]),
        (right, untangled(second, leaf_order(first)), "right", titles[1]),
    ):
        drawn.append(_draw_tree(axes, tree, groups, orientation=orientation, scale="bottom"))
        if groups:
            axes.axvline(cut_height(tree, groups), **CUT_LINE)
        axes.set(title=name, xlabel=label.replace(" between ", " between\n"))
    (order, colours), (other, _) = drawn
    size = min(7.0, 72 * figure.get_figheight() / (1.6 * experts))
    for i, (expert, colour) in enumerate(zip(order, colours, strict=True)):
        ends = 10 * i + 5, 10 * other.index(expert) + 5  # where SciPy draws the leaves
        middle.plot((0.12, 0.88), ends, color=colour, lw=0.9)
        if size >= LEGIBLE:
            for x, y, side in zip((0.1, 0.9), ends, ("right", "left"), strict=True):
                middle.text(x, y, str(expert), ha=side, va="center", size=size)
    middle.set(xlim=(0, 1), ylim=left.get_ylim(), title=f"{crossings(order, other)} crossings")
    middle.axis("off")
    figure.suptitle(title)
    return figure


@styled
def domain_errors(frame, *, title="", label="relative error of the group's output", width=PAGE):
    """Errors of several combinations of a group, by domain, as a table in colour.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`hcsmoe_core.ui.anatomy.output_errors`.
    """
    frame = frame.assign(domain=frame["domain"].map(literal))  # seaborn draws the labels at once
    values = frame.pivot(index="combination", columns="domain", values="error").loc[
        frame["combination"].unique(), frame["domain"].unique()
    ]
    tokens = frame.drop_duplicates("domain").set_index("domain")["tokens"]
    axes = Figure(figsize=(width, 0.9 + 0.3 * len(values))).add_subplot()
    seaborn.heatmap(
        values,
        ax=axes,
        cmap=DISTANCES,
        cbar_kws=dict(label=label.replace(" of ", " of\n"), shrink=0.9, pad=0.01),
        annot=True,  # black or white, by the colour that they stand on
        fmt=".2f",
        annot_kws={"size": 6.5},
        vmin=0,
        vmax=max(1.0, np.nanmax(values)),
    )
    axes.set_xticklabels([f"{domain}\n{tokens[domain]}" for domain in values], rotation=45, ha="right")
    axes.set(title=title, xlabel="domain, with its tokens in the sample", ylabel="")
    axes.set_yticklabels(values.index, rotation=0)
    axes.tick_params(length=0)
    return axes.figure


@styled
def neuron_matches(before, after, *, dominant, title="", width=COLUMN):
    """Correlation of the neurons that are averaged, unaligned and aligned, one line per member.

    Parameters
    ----------
    before, after : dict of int to (I, I) array
        Of :func:`hcsmoe_core.ui.anatomy.neuron_matches`.
    dominant : int
        The expert that the others are matched to.
    """
    axes = Figure(figsize=(width, 0.78 * width)).add_subplot()
    for member, colour in zip(after, itertools.cycle(COLOURS), strict=False):
        for matches, dashes, name in ((before, ":", None), (after, "-", f"expert {member}")):
            values = np.sort(np.diag(matches[member]))[::-1]
            positions = 100 * (np.arange(len(values)) + 0.5) / len(values)
            axes.plot(positions, values, dashes, color=colour, label=name)
    axes.plot([], [], ":", color="0.4", label="unaligned")
    axes.axhline(0, color="0.6", lw=0.6)
    axes.set(
        xlabel="neurons, % (best match first)",
        ylabel=f"correlation with expert {dominant}'s neuron",
        title=title,
        ylim=(min(-0.3, axes.get_ylim()[0]), 1.02),
    )
    axes.legend(loc="upper right")
    return axes.figure


@styled
def budget_strip(
    costs, counts, *, uniform=None, layer=None, title="", label="relative error of outputs", width=PAGE,
    on=None
):  # fmt: skip
    """Where each layer's tree is cut, over what a cut there and elsewhere costs.

    Parameters
    ----------
    costs : list of L (E,) arrays
        Cost of keeping 1, 2, …, E experts; see :func:`hcsmoe_core.studies.tables.cut_costs`.
    counts : sequence of L int
        Experts kept in each layer: the dots.
    uniform : int, optional
        The same number in every layer, to compare with: the dashed line.
    layer : int, optional
        The layer to mark.
    """
    most, layers = max(map(len, costs)), range(len(costs))
    values = np.array([np.pad(cost, (0, most - len(cost)), constant_values=np.nan) for cost in costs])
    figure = on or Figure(figsize=(width, _strip_height(len(costs))))
    grid = _panels(
        figure,
        1,
        2,
        left=0.72,
        right=0.75,
        bottom=0.62,
        top=0.25 if title else 0.08,
        width_ratios=(1, 0.02),
        wspace=0.03,
    )
    axes = figure.add_subplot(grid[0])
    image = _heatmap(axes, values, f"{DISTANCES}_r", extent=(0.5, most + 0.5, len(costs) - 0.5, -0.5))
    axes.plot(counts, layers, "o-", color=COLOURS[1], ms=4, mec="white", mew=0.6, label="this plan")
    if uniform:
        axes.axvline(
            uniform,
            label=f"{uniform} in every layer",
            color="white",
            lw=1.2,
            ls="--",
            path_effects=[
                patheffects.withStroke(linewidth=2.4, foreground="0.25")
            ],  # visible on dark and light
        )
    if layer is not None:
        axes.plot(counts[layer], layer, "o", color=COLOURS[3], ms=6.5, mec="white")
    axes.set(
        title=title,
        xlabel="experts kept",
        ylabel="MoE layer",
        yticks=layers[:: 1 if len(costs) <= 12 else 4],
    )
    figure.colorbar(image, cax=figure.add_subplot(grid[1]), label=label.replace(" of ", " of\n"))
    figure.legend(loc="lower center", ncols=2, borderaxespad=0.2)
    return figure


def _strip_height(layers):
    return 0.95 + max(0.9, 0.14 * layers)


@styled
def cut_view(
    condensed, tree, costs, counts, *, layer, usage=None, uniform=None, title="", label="distance", width=PAGE
):
    """One layer's cut in tree and heatmap, over where all layers are cut and what that costs.

    Parameters
    ----------
    condensed, tree, usage
        Of the layer shown, as for :func:`similarity_heatmap`.
    costs, counts, uniform
        Of all layers, as for :func:`budget_strip`.
    layer : int
        The layer shown.
    """
    upper, lower = stacked_figures(width, 0.42 * width, _strip_height(len(costs)))
    left, right = upper.subfigures(1, 2, width_ratios=(0.6, 0.4))
    dendrogram(tree, groups=counts[layer], usage=usage, title=title, label=label, on=left)
    similarity_heatmap(condensed, tree, groups=counts[layer], label="the same distance", on=right)
    budget_strip(costs, counts, uniform=uniform, layer=layer, on=lower)
    return lower.figure


@styled
def expert_frequencies(stats, *, title="", width=PAGE):
    """How often each expert of every layer is chosen, in per cent of the layer's routed tokens, by domain.

    Parameters
    ----------
    stats : Statistics
    """
    counts = [layer.usage_count.double().numpy() for layer in stats.layers.values()]
    wide, experts = width > 5, max(count.shape[1] for count in counts)
    columns = ((2, 4, 4) if wide else (1, 2, 3))[(len(counts) > 4) + (len(counts) > 8)]
    rows, entries = -(-len(counts) // columns), 6 if wide else 3
    figure, panels = panel_grid(
        len(counts),
        columns,
        width,
        (0.78 if rows > 3 else 1.15) * rows + 0.17 * -(-(len(stats.domains) + 1) // entries) + 0.5,
    )
    looks = [dict(color=c, hatch=h, edgecolor="white") for h in ("", "//////", "......") for c in COLOURS]
    for i, (axes, count) in enumerate(zip(panels, counts, strict=True)):
        shares, lowest = 100 * count / count.sum(), i + columns >= len(counts)
        bottoms = np.cumsum([np.zeros(len(shares[0])), *shares], axis=0)
        for domain, share, bottom, look in zip(
            stats.domains, shares, bottoms, itertools.cycle(looks), strict=False
        ):
            axes.bar(
                range(len(share)),
                share,
                bottom=bottom,
                width=0.86 if experts <= 40 else 1,
                label=domain,
                lw=0,
                **look,
            )
        axes.axhline(100 / len(shares[0]), color="black", lw=0.7, ls=":", label="an equal share")
        axes.set_title(f"layer {i}", loc="right", size=6.5, pad=1.5)
        axes.set(xlim=(-0.7, experts - 0.3), xlabel="expert" if lowest else "")
        axes.tick_params(labelbottom=lowest)
    # As many as there is space for.
    step = next(2**n for n in range(12) if experts <= 5.2 * width / columns * 2**n)
    panels[0].set_xticks(range(0, experts, step))
    figure.supylabel("routed tokens, %", size=matplotlib.rcParams["axes.labelsize"])
    title_and_legend(
        figure,
        panels,
        title,
        order=["an equal share", *(stats.domains if len(stats.domains) > 1 else ())],
        ncols=entries,
        handlelength=1.2,
    )
    return figure


@styled
def published_beside_ours(frame, *, title="", width=PAGE):
    """Accuracy retained by each method at each share of experts kept, published (filled) and ours (open).

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`hcsmoe_core.studies.paper.line_up`. Bars are one standard deviation over calibration
        seeds; a method that was not measured has a cross at the left edge.
    """
    frame = frame[frame["kept"] < 1]
    methods, shares = list(dict.fromkeys(frame["method"])), sorted(frame["kept"].unique(), reverse=True)
    columns = len(shares) if width > 5 else 1
    height = 0.85 + len(shares) // columns * (0.3 + 0.22 * len(methods))
    figure, panels = panel_grid(len(shares), columns, width, height)
    values = 100 * frame[["published_retained", "retained"]].to_numpy()
    margin = 0.12 * (np.nanmax(values) - np.nanmin(values) + 1)
    left, right = np.nanmin(values) - margin, np.nanmax(values) + margin
    look = dict(fmt="D", color=COLOURS[3], mfc="white", mew=1.1, ms=4, capsize=2, elinewidth=0.9)
    for axes, share in zip(panels, shares, strict=True):
        rows = frame[frame["kept"] == share]
        y = rows["method"].map(methods.index).to_numpy()
        theirs, ours = 100 * rows["published_retained"].to_numpy(), 100 * rows["retained"].to_numpy()
        axes.plot([theirs, ours], [y - 0.14, y + 0.14], color="0.7", lw=1, zorder=1)
        axes.plot(theirs, y - 0.14, "o", color=COLOURS[0], ms=4.5, label="published")
        bars = 100 * rows["retained_sd"].fillna(0).to_numpy()
        axes.errorbar(ours, y + 0.14, xerr=bars, label="ours", **look)
        absent = y[np.isnan(ours)]
        if len(absent):
            cross = dict(color="0.45", ms=4, clip_on=False, label="ours not measured")
            axes.plot(np.full(len(absent), left), absent, "x", **cross)
        axes.set_title(
            "{:.0%} of experts: published {experts}, ours {our_experts}".format(share, **rows.iloc[0]),
            size=7,
            loc="left",
        )
        axes.grid(axis="y", color="0.92", lw=0.6)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set(xlim=(left, right), ylim=(len(methods) - 0.4, -0.6))
    for axes in panels[-columns:]:
        axes.set_xlabel("accuracy, % of the unmerged model's")
    title_and_legend(
        figure, panels, title, order=("published", "ours", "ours not measured"), handletextpad=0.3
    )
    return figure
