"""Figures of a paper: each function returns a :class:`matplotlib.figure.Figure`; :func:`save` writes it reproducibly."""

import functools
import io
import itertools
import math
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from matplotlib import patheffects
from matplotlib.collections import PolyCollection
from matplotlib.transforms import ScaledTranslation
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from hcsmoe_core._util import replacing
from hcsmoe_core.clustering import cut

STYLE = Path(__file__).with_name("hcsmoe.mplstyle")


COLUMN, PAGE = 3.25, 6.75  # inches: widths of one and of two columns of a paper


DISTANCES = "mako"  # seaborn's; dark is alike


UNMERGED = "0.55"


LEGIBLE = 4.5  # points: the smallest label worth printing


def styled(function):
    """Draw under the project's style whatever the session's own is."""

    @functools.wraps(function)
    def drawn(*args, **keywords):
        import seaborn  # noqa: F401 (registers its colour maps)

        with matplotlib.rc_context(fname=STYLE):
            return function(*args, **keywords)

    return drawn


@styled
def png(figure, dpi=110, *, tight=True):
    """A figure as PNG bytes, the same each time; not ``tight``, its own margins stay, which takes half the time to draw."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"savefig.bbox": "tight" if tight else None}):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


class Figure(matplotlib.figure.Figure):
    """A figure that pyplot knows nothing of, and that a notebook shows all the same."""

    def _repr_png_(self):
        return png(self)


@styled
def save(figure, path):
    """Write a figure as ``path.png`` and ``path.pdf``, the same bytes each time.

    Returns
    -------
    list of Path
    """
    written = []
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None})):
        target = Path(f"{path}{suffix}")
        with replacing(target) as part:
            figure.savefig(part, format=suffix[1:], metadata=metadata)
        written.append(target)
    return written


def leaf_order(tree):
    """Experts in the order in which a dendrogram shows them."""
    return hierarchy.leaves_list(tree).tolist() if len(tree) else [0]


def group_colours(labels, order):
    """Colour of each group that has more than one expert; the others are grey.

    Colours are given along ``order`` (the experts as a dendrogram shows them) and repeat after nine groups, so that
    neighbours differ.
    """
    cycle = [
        c
        for c in matplotlib.rc_params_from_file(STYLE)["axes.prop_cycle"].by_key()["color"]
        if "949494" not in c
    ]
    sizes = np.bincount(labels)
    joined = dict.fromkeys(int(labels[e]) for e in order if sizes[labels[e]] > 1)
    colours = {label: f"#{cycle[i % len(cycle)].removeprefix('#')}" for i, label in enumerate(joined)}
    return {label: colours.get(label, UNMERGED) for label in range(len(sizes))}


def _draw_tree(axes, tree, labels, *, orientation="top"):
    """Dendrogram on ``axes``; a branch has its group's colour if all its experts are in one group."""
    colours = group_colours(labels, leaf_order(tree))
    experts = len(tree) + 1
    members = {e: {int(labels[e])} for e in range(experts)}
    for t, row in enumerate(tree):
        members[experts + t] = members[int(row[0])] | members[int(row[1])]

    def colour(node):
        groups = members[node]
        return colours[next(iter(groups))] if len(groups) == 1 else "black"

    drawn = hierarchy.dendrogram(
        tree, ax=axes, orientation=orientation, link_color_func=colour, no_labels=True
    )
    for collection in axes.collections:
        collection.set_linewidth(0.9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelbottom=False, labelleft=False)
    return drawn["leaves"]


def untangled(tree, order):
    """The same tree with branches turned so that its leaves come as nearly as may be in another order.

    Each join's branch whose experts stand further left in ``order``, on average, is put left; heights do not change.

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
    place = np.argsort(order).astype(float)
    mean, size = np.concatenate([place, np.zeros(experts - 1)]), np.ones(2 * experts - 1)
    turned = np.array(tree, dtype=float)
    for t, row in enumerate(turned):
        a, b = int(row[0]), int(row[1])
        size[experts + t] = size[a] + size[b]
        mean[experts + t] = (size[a] * mean[a] + size[b] * mean[b]) / size[experts + t]
        if mean[a] > mean[b]:
            row[0], row[1] = b, a
    return turned


def crossings(first, second):
    """Pairs of experts that stand in opposite order in two orders of leaves: lines between them cross."""
    place = np.argsort(second)[np.asarray(first)]
    return int((place[:, None] > place)[np.triu_indices(len(place), 1)].sum())


def cut_height(tree, groups):
    """A height between the last join that is done and the first that is not, where a tree is cut into some groups."""
    experts = len(tree) + 1
    below = tree[experts - groups - 1, 2] if groups < experts else 0.0
    above = tree[experts - groups, 2] if groups > 1 else tree[-1, 2] * 1.05
    return (below + above) / 2


def _size(figure):
    """Width and height of a figure or subfigure in inches."""
    return figure.bbox.width / figure.dpi, figure.bbox.height / figure.dpi


def _inches(figure, *, left, right, bottom, top):
    """Margins in inches, as ``add_gridspec`` takes them."""
    width, height = _size(figure)
    return dict(left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height)


@styled
def similarity_heatmap(
    condensed,
    tree,
    *,
    groups=None,
    usage=None,
    mix=None,
    title="",
    label="distance between experts",
    width=COLUMN,
    on=None,
):
    """Pairwise distances of one layer's experts, ordered by their merge tree, which is drawn on both sides.

    Parameters
    ----------
    condensed : (E·(E−1)/2,) array
    tree : (E−1, 4) array
    groups : int, optional
        Where the tree is cut; groups are coloured in the trees and framed in the heatmap.
    usage : (E,) array, optional
        Share of routed tokens of each expert, drawn as bars below.
    mix : dict of str to (E,) array, optional
        By domain, share of each expert's tokens, drawn as a strip below: see :func:`hcsmoe_core.studies.tables.domain_mix`.
    title, label : str
        Of the figure and of the colour bar.
    width : float
        Inches.
    on : matplotlib.figure.SubFigure, optional
        Draw on it, and not on a new figure.

    Returns
    -------
    matplotlib.figure.Figure
    """
    experts = len(tree) + 1
    labels = cut(tree, groups or experts)
    side = (_size(on)[0] if on else width) - 1.3  # of the heatmap, in inches
    heights = [0.17 * side, side] + [0.16 * side] * (usage is not None) + [0.085 * len(mix or {})] * bool(mix)
    figure = on or Figure(figsize=(width, sum(heights) + 0.06 * len(heights) + 0.72))
    edges = _inches(figure, left=0.05, right=0.62, bottom=0.42, top=0.3)
    grid = figure.add_gridspec(
        len(heights),
        3,
        width_ratios=(0.55, side, 0.1),
        height_ratios=heights,
        wspace=0.03,
        hspace=0.06,
        **edges,
    )
    top, left, middle = (
        figure.add_subplot(grid[0, 1]),
        figure.add_subplot(grid[1, 0]),
        figure.add_subplot(grid[1, 1]),
    )
    order = _draw_tree(top, tree, labels)
    _draw_tree(left, tree, labels, orientation="left")
    left.invert_yaxis()
    image = middle.imshow(squareform(condensed)[np.ix_(order, order)], cmap=DISTANCES, vmin=0, aspect="auto")
    colours = group_colours(labels, order)
    for label_of_group in set(labels.tolist()):
        places = [i for i, e in enumerate(order) if labels[e] == label_of_group]
        if len(places) > 1:
            corner, length = places[0] - 0.5, len(places)
            frame = dict(fill=False, ec=colours[label_of_group], lw=1.4, clip_on=False)
            middle.add_patch(matplotlib.patches.Rectangle((corner, corner), length, length, **frame))
    middle.set(xticks=[], yticks=[])
    figure.colorbar(image, cax=figure.add_subplot(grid[1, 2])).set_label(label)
    lowest, row = middle, 2
    if usage is not None:
        lowest, row = figure.add_subplot(grid[row, 1]), row + 1
        _usage_bars(lowest, range(experts), order, usage, [colours[int(labels[e])] for e in order])
        lowest.set(xlim=(-0.5, experts - 0.5), xticks=[])
        lowest.set_ylabel("tokens,\n%", rotation=0, ha="right", va="center")
    if mix:
        lowest = figure.add_subplot(grid[row, 1])
        shares = 100 * np.stack([np.asarray(share)[order] for share in mix.values()])
        image = lowest.imshow(shares, cmap="rocket_r", vmin=0, aspect="auto")
        lowest.set_yticks(range(len(mix)), list(mix), fontsize=5.5)
        lowest.tick_params(length=0)
        figure.colorbar(image, cax=figure.add_subplot(grid[row, 2])).set_label("of the expert's\ntokens, %")
    _label_experts(lowest, order, side)
    lowest.set_xlabel("expert")
    figure.suptitle(title, fontsize=matplotlib.rcParams["axes.titlesize"], y=1 - 0.08 / _size(figure)[1])
    return figure


def _usage_bars(axes, places, order, usage, colours, width=0.8):
    """Share of routed tokens of each expert, in per cent, with a line at an equal share."""
    half = width / 2
    shares = [100 * float(usage[e]) for e in order]
    boxes = [
        ((x - half, 0), (x - half, y), (x + half, y), (x + half, 0))
        for x, y in zip(places, shares, strict=True)
    ]
    axes.add_collection(PolyCollection(boxes, facecolors=colours))  # one artist: bars are slow to draw
    axes.axhline(100 / len(order), color="black", lw=0.6, ls=":")
    axes.set_ylim(0, 1.05 * max(shares))


def _label_experts(axes, order, inches, places=None, *, both=False):
    """Number the experts along ``inches`` of an axis, as many as can be read: all of them, or every n-th."""
    room = 72 * inches / len(order)  # points for each
    step = max(1, math.ceil(LEGIBLE / room))
    places = list(range(len(order))) if places is None else places
    size = min(7, 0.9 * room * step)
    digits = len(str(max(order)))
    turned = 90 if room * step < 0.65 * digits * size + 2 else 0
    down, aside = (
        ScaledTranslation(*shift, axes.figure.dpi_scale_trans) for shift in ((0, -3 / 72), (-3 / 72, 0))
    )
    below, left = axes.get_xaxis_transform() + down, axes.get_yaxis_transform() + aside
    # Not tick labels: a tick is five artists, and sixty-four of them are most of the time that a figure takes to draw.
    axes.set_xticks([])
    for place, expert in list(zip(places, order, strict=True))[::step]:
        axes.text(
            place, 0, str(expert), fontsize=size, rotation=turned, ha="center", va="top", transform=below
        )
        if both:
            axes.text(0, place, str(expert), fontsize=size, ha="right", va="center", transform=left)
    if both:
        axes.set_yticks([])
    axes.xaxis.labelpad = 5 + (0.65 * digits * size if turned else size)


@styled
def dendrogram(tree, *, groups=None, usage=None, title="", label="distance", width=PAGE, height=2.4, on=None):
    """Merge tree of one layer's experts, cut at a number of groups.

    Parameters
    ----------
    tree : (E−1, 4) array
    groups : int, optional
        Experts kept; a dashed line shows the cut and the groups are coloured.
    usage : (E,) array, optional
        Share of routed tokens of each expert, drawn as bars below the tree.
    title, label : str
    width, height : float
        Inches.
    on : matplotlib.figure.SubFigure, optional
        Draw on it, and not on a new figure.

    Returns
    -------
    matplotlib.figure.Figure
    """
    experts = len(tree) + 1
    labels = cut(tree, groups or experts)
    figure = on or Figure(figsize=(width, height))
    edges = _inches(figure, left=0.72, right=0.05, bottom=0.42, top=0.3)
    heights = (1,) if usage is None else (1, 0.28)
    rows = figure.add_gridspec(len(heights), 1, height_ratios=heights, hspace=0.08, **edges)
    axes = figure.add_subplot(rows[0])
    order = _draw_tree(axes, tree, labels)
    axes.spines["left"].set_visible(True)
    axes.tick_params(length=2, labelleft=True)
    axes.set_ylabel(label.replace(" between ", " between\n"))
    axes.set_title(title)
    if groups:
        axes.axhline(cut_height(tree, groups), color="black", lw=0.8, ls=(0, (4, 3)))
    places = [10 * i + 5 for i in range(experts)]  # where SciPy draws the leaves
    lowest = axes
    if usage is not None:
        lowest = figure.add_subplot(rows[1])
        colours = group_colours(labels, order)
        _usage_bars(lowest, places, order, usage, [colours[int(labels[e])] for e in order], width=8)
        lowest.set(xlim=axes.get_xlim())
        lowest.set_ylabel("tokens,\n%", rotation=0, ha="right", va="center")
    _label_experts(lowest, order, _size(figure)[0] - 0.77, places)
    lowest.set_xlabel("expert")
    return figure


@styled
def layer_grid(
    condensed, trees, *, groups=None, order=None, titles=None, label="distance between experts", width=PAGE
):
    """Every layer's distances as small heatmaps with their trees above, on one colour scale a layer.

    Parameters
    ----------
    condensed, trees : list
        Of each layer, as for :func:`similarity_heatmap`.
    groups : int, optional
    order : list of int, optional
        One order of the experts for all layers, in place of each layer's own tree, which is not drawn then.
    titles : list of str, optional

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = min(4, len(trees))
    rows = -(-len(trees) // columns)
    side, above = width / columns, 0.3 if order is None else 0.001
    figure = Figure(figsize=(width, rows * side * (0.95 + above) + 0.5))
    upper, lower = figure.subfigures(2, 1, height_ratios=(rows * side * (0.95 + above), 0.5))
    outer = upper.add_gridspec(rows, columns, wspace=0.12, hspace=0.22, left=0.04, right=0.99)
    for i, (distance, tree) in enumerate(zip(condensed, trees, strict=True)):
        inner = outer[i // columns, i % columns].subgridspec(2, 1, height_ratios=(above, 1), hspace=0.03)
        top, middle = upper.add_subplot(inner[0]), upper.add_subplot(inner[1])
        own = _draw_tree(top, tree, cut(tree, groups or len(tree) + 1))
        top.set_visible(order is None)
        shown = own if order is None else order
        image = middle.imshow(
            squareform(distance)[np.ix_(shown, shown)], cmap=DISTANCES, vmin=0, aspect="auto"
        )
        _label_experts(middle, shown, 0.8 * side, both=True)
        (top if order is None else middle).set_title(titles[i] if titles else f"layer {i}")
    bar = figure.colorbar(image, cax=lower.add_axes((0.3, 0.75, 0.4, 0.16)), orientation="horizontal")
    bar.set_ticks([0, image.norm.vmax], labels=["0 (the same)", "largest of the layer"])
    bar.set_label(label)
    return figure


@styled
def usage_by_domain(stats, layer, *, order=None, title="", width=PAGE):
    """Which experts the tokens of each domain go to: share of a domain's routed tokens, in per cent.

    Parameters
    ----------
    stats : Statistics
    layer : int or str
    order : list of int, optional
        Order of the experts, such as :func:`leaf_order`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    count = stats.layer(layer).usage_count.double()
    share = 100 * (count / count.sum(1, keepdim=True)).numpy()
    order = list(range(share.shape[1])) if order is None else order
    figure = Figure(figsize=(width, 0.7 + 0.17 * len(stats.domains)))
    axes = figure.add_subplot()
    image = axes.imshow(share[:, order], cmap="rocket_r", vmin=0, aspect="auto")
    _label_experts(axes, order, 0.8 * width)
    axes.set_yticks(range(len(stats.domains)), stats.domains)
    axes.set_xlabel("expert")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, pad=0.015, aspect=12).set_label("tokens, %")
    return figure


@styled
def expert_profile(shares, tokens, *, expected, most=18, title="", width=PAGE):
    """What one expert takes: the share of each domain's tokens, and the tokens that it takes most of.

    Parameters
    ----------
    shares : dict of str to float
        By domain, the share of its tokens that are routed to the expert.
    tokens : pandas.DataFrame
        Of :func:`hcsmoe_core.ui.anatomy.token_shares`; the first ``most`` are drawn.
    expected : float
        Share that an expert takes on average, k/E: the dotted line.
    title : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    tokens = tokens.head(most)
    figure = Figure(figsize=(width, 0.62 + 0.14 * max(len(shares), len(tokens), 6)))
    grid = figure.add_gridspec(
        1, 2, wspace=0.55, **_inches(figure, left=0.85, right=0.1, bottom=0.38, top=0.24)
    )
    names = [token.replace(" ", "␣").replace("$", r"\$")[:14] for token in tokens["token"]]
    panels = (
        (shares.values(), list(shares), "tokens of each domain, %"),
        (tokens["share"], names, "occurrences of each token, %"),
    )
    for place, (values, labels, name) in enumerate(panels):
        axes = figure.add_subplot(grid[place])
        axes.barh(range(len(labels)), [100 * v for v in values], height=0.75)
        axes.axvline(100 * expected, color="black", lw=0.7, ls=":")
        axes.set_yticks(
            range(len(labels)), labels, family=["DejaVu Sans Mono" if place else "DejaVu Sans"], size=6.5
        )
        axes.set_ylim(max(len(labels), 1) - 0.4, -0.6)
        axes.set(xlabel=name, xlim=(0, 112 * max([*values, 0.01])))  # with room for the counts
        axes.tick_params(axis="y", length=0)
    for y, count in enumerate(tokens["count"]):
        axes.text(100 * tokens["share"].iloc[y], y, f" of {count}", va="center", size=5.5)
    figure.suptitle(
        title, fontsize=matplotlib.rcParams["axes.titlesize"], y=1 - 0.06 / figure.get_figheight()
    )
    return figure


@styled
def curve(
    frame,
    *,
    x,
    y,
    hue=None,
    error=None,
    reference=None,
    log=False,
    xlabel="",
    ylabel="",
    title="",
    width=COLUMN,
):
    """A score against a setting, a line for each value of ``hue``, with one standard error either side.

    Parameters
    ----------
    frame : pandas.DataFrame
    x, y, hue, error : str
        Columns; where ``error`` is missing from the frame there are no bars.
    reference : (float, str), optional
        A horizontal line and its name, such as the unmerged model or chance; a list of such pairs for several.
    log : bool
        Whether ``x`` doubles from tick to tick.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(width, 0.78 * width))
    axes = figure.add_subplot()
    groups = [("", frame)] if hue is None else list(frame.groupby(hue, sort=True))
    markers = "osD^vP*X"
    for i, (name, rows) in enumerate(groups):
        rows = rows.sort_values(x)
        bars = rows[error] if error and error in rows else None
        aside = (i - (len(groups) - 1) / 2) * 0.006  # bars side by side
        places = rows[x] * 2 ** (4 * aside) if log else rows[x] + aside * (frame[x].max() - frame[x].min())
        axes.errorbar(
            places,
            rows[y],
            yerr=bars,
            label=name,
            marker=markers[i % len(markers)],
            capsize=2,
            elinewidth=0.8,
        )
    lines = [reference] if isinstance(reference, tuple) else reference or []
    for (value, name), dashes in zip(lines, ("--", ":", "-."), strict=False):
        axes.axhline(value, color="0.4", lw=0.8, ls=dashes, label=name)
    if log:
        axes.set_xscale("log", base=2)
    ticks = sorted(frame[x].unique())
    if all(tick == int(tick) for tick in ticks):  # settings, not measured values
        axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], minor=False)
    axes.set(xlabel=xlabel or x, ylabel=ylabel or y, title=title)
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if len(groups) > 4 else {}
    if hue or lines:
        axes.legend(title=hue, **beside)
    return figure


@styled
def task_bars(scores, *, before=None, label="merged", chance=0.25, title="", width=COLUMN):
    """Accuracy on each task with one standard error, beside that of another model.

    Parameters
    ----------
    scores, before : dict
        ``tasks`` as :func:`hcsmoe_core.evaluate` gives them, of a model and of the one to compare it with.
    label : str
        Of the model.

    Returns
    -------
    matplotlib.figure.Figure
    """
    names = list(scores["tasks"])
    figure = Figure(figsize=(width, 0.6 + 0.26 * len(names)))
    axes = figure.add_subplot()
    shown = [(label, scores)] if before is None else [("original", before), (label, scores)]
    for i, (name, values) in enumerate(shown):
        tasks = [values["tasks"][n] for n in names]
        places = np.arange(len(names)) + (i - (len(shown) - 1) / 2) * 0.38
        lengths, errors = [100 * t["acc"] for t in tasks], [100 * t["acc_stderr"] for t in tasks]
        axes.barh(places, lengths, 0.36, xerr=errors, label=name, error_kw={"elinewidth": 0.8})
    axes.axvline(100 * chance, color="0.4", lw=0.8, ls=":", label="chance")
    axes.set_yticks(range(len(names)), [n.removeprefix("demo_") for n in names])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy, %", xlim=(0, 100), title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


@styled
def method_dots(
    frame,
    *,
    value,
    error=None,
    kind=None,
    panels="experts",
    reference=None,
    log=False,
    xlabel="",
    title="",
    width=PAGE,
):
    """Every method's value in one panel for each number of experts, the methods in one order: best first in the middle panel.

    Parameters
    ----------
    frame : pandas.DataFrame
        One row a method and panel, with a column ``method``.
    value, error : str
        Columns of the value and of the half width of its interval; on a logarithmic axis intervals stop at the axis' end.
    kind : str, optional
        Column that tells the colours apart.
    panels : str
        Column of the panels, the largest first.
    reference : (float, str), optional
        A vertical line and its name.
    log : bool
        Smaller is better then, and bigger otherwise.

    Returns
    -------
    matplotlib.figure.Figure
    """
    places = sorted(frame[panels].unique(), reverse=True)
    middle = frame[frame[panels] == places[len(places) // 2]].dropna(subset=[value])
    order = list(middle.sort_values(value, ascending=log)["method"])
    order += [m for m in frame["method"].unique() if m not in order]
    kinds = sorted(frame[kind].unique()) if kind else [""]
    figure = Figure(figsize=(width, 0.95 + 0.155 * len(order)), layout="constrained")
    all_axes = figure.subplots(1, len(places), sharex=True, sharey=True, squeeze=False)[0]
    for axes, place in zip(all_axes, places, strict=True):
        for name, marker in zip(kinds, "osD^vP", strict=False):
            rows = frame[(frame[panels] == place) & ((frame[kind] == name) if kind else True)].dropna(
                subset=[value]
            )
            at = [order.index(m) for m in rows["method"]]
            bars = rows[error].fillna(0) if error else None
            axes.errorbar(
                rows[value], at, xerr=bars, fmt=marker, label=name, ms=3.5, capsize=1.5, elinewidth=0.8
            )
        if reference:
            axes.axvline(reference[0], color="0.4", lw=0.8, ls="--", label=reference[1])
        if log:
            axes.set_xscale("log")
        axes.set(title=f"{place} {panels}")
        axes.grid(axis="y", color="0.92", lw=0.6)
        axes.set_axisbelow(True)
    all_axes[0].set_yticks(range(len(order)), order)
    all_axes[0].invert_yaxis()
    handles, labels = all_axes[0].get_legend_handles_labels()
    all_axes[len(all_axes) // 2].set_xlabel(xlabel)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title, size=matplotlib.rcParams["axes.titlesize"])
    return figure


@styled
def tanglegram(first, second, *, groups=None, titles=("", ""), label="distance", title="", width=PAGE):
    """Two merge trees of the same experts face to face, with a line for each expert.

    The second tree's branches are turned to cross as few lines as may be. Lines have the colour of the expert's group in the
    first tree; where the second tree joins other experts, its own branches show it.

    Parameters
    ----------
    first, second : (E−1, 4) arrays
    groups : int, optional
        Groups that both are cut into.
    titles : (str, str)
        Of the two trees.
    label, title : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    experts = len(first) + 1
    second = untangled(second, leaf_order(first))
    labels = [cut(tree, groups or experts) for tree in (first, second)]
    figure = Figure(figsize=(width, max(2.2, 0.7 + 0.085 * experts)))
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 0.8, 1))
    orders = []
    for axes, tree, of_tree, side, name in zip(
        (left, right), (first, second), labels, ("left", "right"), titles, strict=True
    ):
        orders.append(_draw_tree(axes, tree, of_tree, orientation=side))
        if groups:
            axes.axvline(cut_height(tree, groups), color="black", lw=0.8, ls=(0, (4, 3)))
        axes.tick_params(length=2, labelbottom=True)
        axes.spines["bottom"].set_visible(True)
        axes.set(title=name, xlabel=label.replace(" between ", " between\n"))
    colours = group_colours(labels[0], orders[0])
    places = [{e: 10 * i + 5 for i, e in enumerate(order)} for order in orders]
    size = min(7.0, 72 * figure.get_figheight() / (1.6 * experts))
    for e in range(experts):
        middle.plot((0.12, 0.88), (places[0][e], places[1][e]), color=colours[int(labels[0][e])], lw=0.9)
        if size >= LEGIBLE:
            middle.text(0.1, places[0][e], str(e), ha="right", va="center", size=size)
            middle.text(0.9, places[1][e], str(e), ha="left", va="center", size=size)
    middle.set(xlim=(0, 1), ylim=left.get_ylim(), title=f"{crossings(*orders)} crossings")
    middle.axis("off")
    figure.suptitle(title)
    return figure


@styled
def domain_errors(frame, *, title="", label="relative error of the group's output", width=PAGE):
    """Errors of several ways of combining a group, by domain, as a table in colour.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`hcsmoe_core.ui.anatomy.output_errors`.
    title, label : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    ways, domains = list(dict.fromkeys(frame["way"])), list(dict.fromkeys(frame["domain"]))
    values = frame.pivot(index="way", columns="domain", values="error").loc[ways, domains].to_numpy()
    tokens = frame.drop_duplicates("domain").set_index("domain")["tokens"]
    figure = Figure(figsize=(width, 0.9 + 0.3 * len(ways)))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap=DISTANCES, vmin=0, vmax=max(1.0, np.nanmax(values)), aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            axes.text(
                column,
                row,
                f"{value:.2f}",
                ha="center",
                va="center",
                size=6.5,
                color="black" if value > 0.5 else "white",
            )
    axes.set_xticks(range(len(domains)), [f"{d}\n{tokens[d]}" for d in domains], rotation=45, ha="right")
    axes.set_yticks(range(len(ways)), ways)
    axes.set(title=title, xlabel="domain, with its tokens in the sample")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, label=label.replace(" of ", " of\n"), shrink=0.9, pad=0.01)
    return figure


@styled
def neuron_matches(before, after, *, dominant, title="", width=COLUMN):
    """How well the neurons match that are averaged, as they stand and once aligned: largest first, one line a member.

    Parameters
    ----------
    before, after : dict of int to (I, I) array
        Of :func:`hcsmoe_core.ui.anatomy.neuron_matches`.
    dominant : int
        The expert that the others are matched to.
    title : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(width, 0.78 * width))
    axes = figure.add_subplot()
    for member, colour in zip(
        after, matplotlib.rcParams["axes.prop_cycle"].by_key()["color"] * len(after), strict=False
    ):
        for found, dashes in ((before, ":"), (after, "-")):
            values = np.sort(np.diag(found[member]))[::-1]
            places = 100 * (np.arange(len(values)) + 0.5) / len(values)
            axes.plot(
                places,
                values,
                dashes,
                color=f"#{colour.removeprefix('#')}",
                label=f"expert {member}" if dashes == "-" else None,
            )
    axes.plot([], [], ":", color="0.4", label="as they stand")
    axes.axhline(0, color="0.6", lw=0.6)
    axes.set(
        xlabel="neurons, % (best match first)",
        ylabel=f"correlation with expert {dominant}'s neuron",
        title=title,
    )
    axes.set(ylim=(min(-0.3, axes.get_ylim()[0]), 1.02))
    axes.legend(loc="upper right")
    return figure


@styled
def budget_strip(
    costs,
    counts,
    *,
    uniform=None,
    layer=None,
    title="",
    label="relative error of outputs",
    width=PAGE,
    on=None,
):
    """Where each layer is cut, over what cutting it there and elsewhere costs.

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
    title, label : str
    width : float
        Inches.
    on : matplotlib.figure.SubFigure, optional
        Draw on it, and not on a new figure.

    Returns
    -------
    matplotlib.figure.Figure
    """
    most = max(len(c) for c in costs)
    values = np.full((len(costs), most), np.nan)
    for row, cost in zip(values, costs, strict=True):
        row[: len(cost)] = cost
    figure = on or Figure(figsize=(width, _strip_height(len(costs))))
    edges = _inches(figure, left=0.72, right=0.75, bottom=0.62, top=0.25 if title else 0.08)
    grid = figure.add_gridspec(1, 2, width_ratios=(1, 0.02), wspace=0.03, **edges)
    axes = figure.add_subplot(grid[0])
    extent = (0.5, most + 0.5, len(costs) - 0.5, -0.5)
    image = axes.imshow(values, cmap=f"{DISTANCES}_r", aspect="auto", extent=extent, vmin=0)
    axes.plot(counts, range(len(costs)), "o-", color="#de8f05", ms=4, mec="white", mew=0.6, label="this plan")
    if uniform:
        outline = [
            patheffects.withStroke(linewidth=2.4, foreground="0.25")
        ]  # seen on dark, on light and in the legend
        axes.axvline(
            uniform, color="white", lw=1.2, ls="--", label=f"{uniform} in every layer", path_effects=outline
        )
    if layer is not None:
        axes.plot(counts[layer], layer, "o", color="#d55e00", ms=6.5, mec="white")
    axes.set(title=title, xlabel="experts kept", ylabel="MoE layer")
    axes.set_yticks(range(len(costs)) if len(costs) <= 12 else range(0, len(costs), 4))
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
    title, label : str
        Of the tree.
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    upper, lower = 0.42 * width, _strip_height(len(costs))
    figure = Figure(figsize=(width, upper + lower))
    above, below = figure.subfigures(2, 1, height_ratios=(upper, lower))
    left, right = above.subfigures(1, 2, width_ratios=(0.6, 0.4))
    dendrogram(tree, groups=counts[layer], usage=usage, title=title, label=label, on=left)
    similarity_heatmap(condensed, tree, groups=counts[layer], label="the same distance", on=right)
    budget_strip(costs, counts, uniform=uniform, layer=layer, on=below)
    return figure


@styled
def expert_frequencies(stats, *, title="", width=PAGE):
    """How often each expert of every layer is chosen, by domain: bars, in per cent of the layer's routed tokens.

    Where there are more domains than colours, colours come again hatched.

    Parameters
    ----------
    stats : Statistics
    title : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    counts = [layer.usage_count.double().numpy() for layer in stats.layers.values()]
    cycle = [f"#{c.removeprefix('#')}" for c in matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]]
    looks = [dict(color=c, hatch=h, edgecolor="white") for h in ("", "//////", "......") for c in cycle]
    wide, experts = width > 5, max(count.shape[1] for count in counts)
    few, more, many = (2, 4, 4) if wide else (1, 2, 3)
    columns = few if len(counts) <= 4 else more if len(counts) <= 8 else many
    rows, entries = -(-len(counts) // columns), 6 if wide else 3
    height = (0.78 if rows > 3 else 1.15) * rows + 0.17 * -(-(len(stats.domains) + 1) // entries)
    figure = Figure(figsize=(width, height + 0.5), layout="constrained")
    all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for i, (axes, count) in enumerate(zip(all_axes, counts, strict=False)):
        below = np.zeros(count.shape[1])
        for domain, part, look in zip(
            stats.domains, 100 * count / count.sum(), itertools.cycle(looks), strict=False
        ):
            axes.bar(
                range(len(part)),
                part,
                bottom=below,
                width=0.86 if experts <= 40 else 1,
                label=domain,
                lw=0,
                **look,
            )
            below += part
        axes.axhline(100 / len(below), color="black", lw=0.7, ls=":", label="an equal share")
        axes.set_title(f"layer {i}", loc="right", size=6.5, pad=1.5)
        axes.set_xlim(-0.7, experts - 0.3)
        if i + columns >= len(counts):
            axes.set_xlabel("expert")
            axes.tick_params(labelbottom=True)
    step = next(
        2**power for power in range(12) if experts <= 5.2 * width / columns * 2**power
    )  # as many as have room
    all_axes[0].set_xticks(range(0, experts, step))
    for axes in all_axes[len(counts) :]:
        axes.remove()
    figure.supylabel("routed tokens, %", size=matplotlib.rcParams["axes.labelsize"])
    figure.suptitle(textwrap.fill(title, int(14 * width)), size=matplotlib.rcParams["axes.titlesize"])
    handles, labels = all_axes[0].get_legend_handles_labels()
    shown = slice(None if len(stats.domains) > 1 else 1)  # the line comes first
    figure.legend(handles[shown], labels[shown], loc="outside lower center", ncols=entries, handlelength=1.2)
    return figure


@styled
def published_beside_ours(frame, *, title="", width=PAGE):
    """Accuracy retained by each method at each share of experts kept, published (filled) and ours (open).

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`hcsmoe_core.studies.paper.line_up`. Bars are one standard deviation over calibration seeds; a method that was not
        measured keeps its place, with a cross at the left edge.
    title : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    frame = frame[frame["kept"] < 1]
    methods, shares = list(dict.fromkeys(frame["method"])), sorted(frame["kept"].unique(), reverse=True)
    rows, columns = (1, len(shares)) if width > 5 else (len(shares), 1)
    figure = Figure(figsize=(width, 0.85 + rows * (0.3 + 0.22 * len(methods))), layout="constrained")
    all_axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    values = 100 * frame[["published_retained", "retained"]].to_numpy()
    margin = 0.06 * (np.nanmax(values) - np.nanmin(values) + 1)
    left, shown = np.nanmin(values) - 2 * margin, {}
    for axes, share in zip(all_axes, shares, strict=True):
        part = frame[frame["kept"] == share]
        at = np.array([methods.index(m) for m in part["method"]])
        theirs, ours = 100 * part["published_retained"].to_numpy(), 100 * part["retained"].to_numpy()
        bars = dict(xerr=100 * part["retained_sd"].fillna(0).to_numpy(), capsize=2, elinewidth=0.9)
        axes.plot([theirs, ours], [at - 0.14, at + 0.14], color="0.7", lw=1, zorder=1)
        axes.plot(theirs, at - 0.14, "o", color="#0173b2", ms=4.5, label="published")
        axes.errorbar(
            ours, at + 0.14, fmt="D", color="#d55e00", mfc="white", mew=1.1, ms=4, label="ours", **bars
        )
        absent = at[np.isnan(ours)]
        if len(absent):
            axes.plot(
                np.full(len(absent), left),
                absent,
                "x",
                color="0.45",
                ms=4,
                clip_on=False,
                label="ours not measured",
            )
        kept = part.iloc[0]
        axes.set_title(
            f"{share:.0%} of experts: published {kept['experts']}, ours {kept['our_experts']}",
            size=7,
            loc="left",
        )
        axes.grid(axis="y", color="0.92", lw=0.6)
        axes.set_axisbelow(True)
        shown |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    all_axes[0].set_yticks(range(len(methods)), methods)
    all_axes[0].set_ylim(len(methods) - 0.4, -0.6)
    all_axes[0].set_xlim(left, np.nanmax(values) + 2 * margin)
    for axes in all_axes[-columns:]:
        axes.set_xlabel("accuracy, % of the unmerged model's")
    order = sorted(shown, key=("published", "ours", "ours not measured").index)
    figure.legend(
        [shown[label] for label in order], order, loc="outside lower center", ncols=3, handletextpad=0.3
    )
    figure.suptitle(textwrap.fill(title, int(14 * width)), size=matplotlib.rcParams["axes.titlesize"])
    return figure


@styled
def tradeoff(frame, *, costs, value, hue, shade, fronts, labels, ylabel="", title="", width=PAGE):
    """What is lost against what it costs, a panel for each cost, on logarithmic axes; rings mark the Pareto front.

    Parameters
    ----------
    frame : pandas.DataFrame
    costs : sequence of str
        Columns along the panels' x axes.
    value, hue : str
        Columns of what is lost, and of what tells the colours apart.
    shade : str
        Column whose values make lines of their own within a colour: the largest solid and filled, smaller ones lighter.
    fronts : sequence of (N,) bool arrays
        By panel: which points are on the front.
    labels : sequence of str
        Of the x axes.
    ylabel, title : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    figure = Figure(figsize=(width, 0.55 * width), layout="constrained")
    all_axes = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    shades = sorted(frame[shade].unique(), reverse=True)
    for axes, cost, front, label in zip(all_axes, costs, fronts, labels, strict=True):
        for i, name in enumerate(sorted(frame[hue].unique())):
            rows = frame[frame[hue] == name]
            levels = [(value_of, rows[rows[shade] == value_of]) for value_of in shades]
            if all(len(part) <= 1 for _, part in levels):  # its shades are points of one line
                levels = [(shades[0], rows)]
            for level, part in levels:
                part, faint = part.sort_values([cost, value]), shades.index(level)
                look = dict(
                    color=f"C{i}",
                    marker="osD^vP"[i % 6],
                    alpha=max(0.3, 1 - 0.3 * faint),
                    ls=["-", "--", ":"][min(faint, 2)],
                )
                axes.plot(part[cost], part[value], ms=4, lw=0.9, label=None if faint else name, **look)
        edge = frame[front]
        ring = dict(ls="none", marker="o", ms=8.5, mfc="none", mec="0.35", mew=0.8)
        axes.plot(edge[cost], edge[value], label="not beaten in both", **ring)
        axes.set(xscale="log", yscale="log", xlabel=label)
        ticks = [0.05, 0.1, 0.2, 0.5, 1]
        axes.set_xticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.85 * frame[cost].min(), 1.15 * frame[cost].max())
    all_axes[0].set_ylabel(ylabel or value)
    handles, names = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    figure.suptitle(title, size=matplotlib.rcParams["axes.titlesize"])
    return figure


@styled
def predictions(panels, *, value, hue, lines=None, xlabels=None, ylabel="", title="", width=PAGE):
    """What was measured against what was predicted, a panel for each prediction, on logarithmic axes.

    Parameters
    ----------
    panels : dict of str to pandas.DataFrame
        By title: with a column ``x``.
    value, hue : str
        Columns of what was measured, and of what tells the colours apart.
    lines : dict of str to (float, float), optional
        By title: slope and factor of ``value = factor · x^slope``.
    xlabels : dict of str to str, optional
    ylabel, title : str
    width : float
        Inches.

    Returns
    -------
    matplotlib.figure.Figure
    """
    columns = 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(width, 0.4 + 0.38 * width * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    names = sorted({name for frame in panels.values() for name in frame[hue]})
    for axes, (name, frame) in zip(all_axes, panels.items(), strict=False):
        for i, kind in enumerate(names):
            part = frame[frame[hue] == kind]
            axes.plot(part["x"], part[value], "osD^vP"[i % 6], color=f"C{i}", ms=4, label=kind)
        if lines and name in lines and np.isfinite(lines[name]).all():
            slope, factor = lines[name]
            ends = np.array([frame["x"][frame["x"] > 0].min(), frame["x"].max()])
            axes.plot(ends, factor * ends**slope, color="0.4", lw=0.9)
            axes.text(0.04, 0.92, f"slope {slope:.2f}", transform=axes.transAxes, size=7, color="0.3")
        axes.set(xscale="log", yscale="log", xlabel=(xlabels or {}).get(name, ""))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_title(name, loc="left", size=7.5)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes in all_axes[: len(panels) : columns]:
        axes.set_ylabel(ylabel or value)
    handles, shown = all_axes[0].get_legend_handles_labels()
    keep = [place for place, label in enumerate(shown) if label in names]
    figure.legend(
        [handles[k] for k in keep], [shown[k] for k in keep], loc="outside lower center", ncols=len(keep)
    )
    figure.suptitle(title, size=matplotlib.rcParams["axes.titlesize"])
    return figure
