"""Figures of notebooks 09 and 10, drawn as those of :mod:`hcsmoe_core.ui.figures` are."""

import numpy as np
from matplotlib.ticker import NullFormatter

from hcsmoe_core.ui.figures import COLOURS, MARKERS, PAGE, panel_grid, styled, title_and_legend


@styled
def tradeoff(frame, *, costs, value, hue, shade, fronts, labels, ylabel="", title="", width=PAGE):
    """Loss against cost, one panel per cost, on logarithmic axes; rings mark the Pareto front.

    Parameters
    ----------
    frame : pandas.DataFrame
    costs : sequence of str
        Columns along the panels' x axes.
    value, hue : str
        Columns of what is lost, and of what is shown as colour.
    shade : str
        Column whose values make lines of their own within a colour: the largest solid, smaller ones dashed
        and lighter.
    fronts : sequence of (N,) bool arrays
        By panel: which points are on the front.
    labels : sequence of str
        Of the x axes.
    """
    figure, panels = panel_grid(len(costs), len(costs), width, 0.55 * width, sharex=False)
    shades = sorted(frame[shade].unique(), reverse=True)
    for axes, cost, front, label in zip(panels, costs, fronts, labels, strict=True):
        for i, (name, rows) in enumerate(frame.groupby(hue)):
            levels = {level: rows[rows[shade] == level] for level in shades}
            if max(map(len, levels.values())) <= 1:  # its shades are points of one line
                levels = {shades[0]: rows}
            for level, points in levels.items():
                points, faint = points.sort_values([cost, value]), shades.index(level)
                look = dict(color=COLOURS[i], marker=MARKERS[i % 6], ms=4, lw=0.9)
                look |= dict(alpha=max(0.3, 1 - 0.3 * faint), ls=["-", "--", ":"][min(faint, 2)])
                axes.plot(points[cost], points[value], label=None if faint else name, **look)
        ring = dict(ls="none", marker="o", ms=8.5, mfc="none", mec="0.35", mew=0.8)
        axes.plot(frame[front][cost], frame[front][value], label="not beaten in both", **ring)
        axes.set(xscale="log", yscale="log", xlabel=label)
        ticks = [0.05, 0.1, 0.2, 0.5, 1]
        axes.set_xticks(ticks, [f"{100 * tick:.0f}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlim(0.85 * frame[cost].min(), 1.15 * frame[cost].max())
    panels[0].set_ylabel(ylabel or value)
    title_and_legend(figure, panels, title)
    return figure


@styled
def predictions(panels, *, value, hue, lines=None, xlabels=None, ylabel="", title="", width=PAGE):
    """Measured against predicted values, one panel per prediction, on logarithmic axes.

    Parameters
    ----------
    panels : dict of str to pandas.DataFrame
        By title: with a column ``x``.
    value, hue : str
        Columns of what was measured, and of what is shown as colour.
    lines : dict of str to (float, float), optional
        By title: slope and factor of ``value = factor · x^slope``.
    xlabels : dict of str to str, optional
    """
    height = 0.4 + 0.38 * width * -(-len(panels) // 2)
    figure, all_axes = panel_grid(len(panels), 2, width, height, sharex=False)
    kinds = sorted({kind for frame in panels.values() for kind in frame[hue]})
    for axes, (name, frame) in zip(all_axes, panels.items(), strict=True):
        for i, kind in enumerate(kinds):
            rows, look = frame[frame[hue] == kind], dict(color=f"C{i}", ms=4, label=kind)
            axes.plot(rows["x"], rows[value], MARKERS[i % 6], **look)
        slope, factor = (lines or {}).get(name, (np.nan, np.nan))
        if np.isfinite([slope, factor]).all():
            ends = np.array([frame["x"][frame["x"] > 0].min(), frame["x"].max()])
            axes.plot(ends, factor * ends**slope, color="0.4", lw=0.9)
            axes.text(0.04, 0.92, f"slope {slope:.2f}", transform=axes.transAxes, size=7, color="0.3")
        axes.set(xscale="log", yscale="log", xlabel=(xlabels or {}).get(name, ""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(name, loc="left", size=7.5)
    for axes in all_axes[::2]:
        axes.set_ylabel(ylabel or value)
    title_and_legend(figure, all_axes, title, order=kinds)
    return figure
