"""Plots straight from statistics: ``hcsmoe_core.plot.heatmap(stats, layer=0)``.

Each function works out what it draws (distances, tree, costs) and returns the figure, one of
:mod:`hcsmoe_core.ui.figures`; ``figure.savefig("name.pdf")`` writes it. With ``ax``, axes of yours,
:func:`heatmap` and :func:`dendrogram` draw on these and return them. ``similarity``, ``metric``, ``linkage``
and ``model`` are those of :func:`hcsmoe_core.distances` and :func:`hcsmoe_core.linkage`.
"""

from typing import Any

import numpy as np
from scipy.spatial.distance import is_valid_y, squareform

from hcsmoe_core import similarity as similarities
from hcsmoe_core._util import MissingPackageError, require
from hcsmoe_core.clustering import linkage as merge_tree
from hcsmoe_core.statistics import Statistics
from hcsmoe_core.studies import tables

try:
    from hcsmoe_core.ui import figures
except ImportError as error:
    raise MissingPackageError(f'Plots need {error.name}: pip install "hcsmoe[lab]"') from None


def _compared(stats, layer, similarity, metric, linkage, model):
    """Condensed distances of a layer, and their merge tree."""
    condensed = similarities.distances(stats, layer, similarity=similarity, metric=metric, model=model)
    return condensed, merge_tree(condensed, linkage, metric=similarities.metric_of(similarity, metric))


def heatmap(
    stats: Statistics,
    layer: int | str = 0,
    *,
    groups: int | None = None,
    similarity: str = "expert-output",
    metric: str = "",
    linkage: str = "average",
    model: Any = None,
    ax: Any = None,
    **options: Any,
) -> Any:
    """Distances between the experts of one layer, in the order of their merge tree.

    Parameters
    ----------
    stats : Statistics
    layer : int or str
        Number among the MoE layers, from 0, or name.
    groups : int, optional
        Groups that the tree is cut into, which are coloured and framed.
    ax : matplotlib.axes.Axes, optional
        Gets the heatmap alone, without trees.
    **options
        Of :func:`hcsmoe_core.ui.figures.similarity_heatmap`, such as ``title``, ``usage``, ``mix``; with
        ``ax`` of ``imshow``, such as ``cmap`` and ``vmax``.

    Returns
    -------
    matplotlib.figure.Figure, or ``ax``
    """
    condensed, tree = _compared(stats, layer, similarity, metric, linkage, model)
    if ax is None:
        return figures.similarity_heatmap(condensed, tree, groups=groups, **options)
    figures.heatmap_on(ax, condensed, tree, groups, **options)
    return ax


def dendrogram(
    stats: Statistics,
    layer: int | str = 0,
    *,
    groups: int | None = None,
    similarity: str = "expert-output",
    metric: str = "",
    linkage: str = "average",
    model: Any = None,
    ax: Any = None,
    **options: Any,
) -> Any:
    """Merge tree of one layer's experts; parameters as for :func:`heatmap`.

    ``options`` are those of :func:`hcsmoe_core.ui.figures.dendrogram`; with ``ax`` only ``title``, ``label``.
    """
    tree = _compared(stats, layer, similarity, metric, linkage, model)[1]
    if ax is None:
        return figures.dendrogram(tree, groups=groups, **options)
    figures.tree_on(ax, tree, groups, **options)
    return ax


def layers(
    stats: Statistics,
    *,
    groups: int | None = None,
    similarity: str = "expert-output",
    metric: str = "",
    linkage: str = "average",
    model: Any = None,
    **options: Any,
) -> Any:
    """Heatmaps and trees of every layer; ``options`` of :func:`hcsmoe_core.ui.figures.layer_grid`."""
    pairs = [_compared(stats, layer, similarity, metric, linkage, model) for layer in stats.layers]
    return figures.layer_grid(*map(list, zip(*pairs, strict=True)), groups=groups, **options)


def usage(stats: Statistics, layer: int | str | None = None, **options: Any) -> Any:
    """Tokens that go to each expert of a layer, by domain; without a layer, of every layer."""
    if layer is None:
        return figures.expert_frequencies(stats, **options)
    return figures.usage_by_domain(stats, layer, **options)


def cuts(
    stats: Statistics,
    experts: int | None = None,
    *,
    similarity: str = "expert-output",
    linkage: str = "average",
    model: Any = None,
    cost: str = "",
    **options: Any,
) -> Any:
    """What keeping each number of experts costs in every layer, and where a plan of ``experts`` each cuts.

    Parameters
    ----------
    stats : Statistics
    experts : int, optional
        Experts kept in each layer; by default half.
    cost : {"", "function_error", "output_error"}
        As for :func:`hcsmoe_core.studies.tables.cut_costs`; by default the first if ``grams`` were collected.
    **options
        Of :func:`hcsmoe_core.ui.figures.budget_strip`.
    """
    cost = cost or ("function_error" if "grams" in stats.needs else "output_error")
    costs = tables.cut_costs(stats, model, similarity=similarity, linkage=linkage, cost=cost)
    label = "relative error of mean outputs" if cost == "output_error" else "relative error of outputs"
    counts = [experts or max(1, len(values) // 2) for values in costs]
    return figures.budget_strip(costs, counts, **{"label": label, **options})


def frame(distances: Any, names: Any = None) -> Any:
    """Condensed distances, as of :func:`hcsmoe_core.distances`, as a labelled table.

    Parameters
    ----------
    distances : (E·(E−1)/2,) array
    names : sequence of E, optional
        Of the experts; by default their numbers.

    Returns
    -------
    pandas.DataFrame
        ``E × E``; index and columns are called ``expert``.
    """
    import pandas as pd

    require(
        is_valid_y(np.asarray(distances, float)),
        'The "distances" argument must be condensed, E·(E−1)/2 numbers, as distances(stats, layer) gives.',
    )
    square = squareform(np.asarray(distances, float))
    labels = pd.Index(range(len(square)) if names is None else list(names), name="expert")
    return pd.DataFrame(square, index=labels, columns=labels)
