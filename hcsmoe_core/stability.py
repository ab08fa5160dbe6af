"""How good a merge tree is, and how far it depends on the linkage, the calibration sample and its size."""

import itertools

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from hcsmoe_core.calibration import calibration_tokens, domains_of
from hcsmoe_core.capture import capture
from hcsmoe_core.clustering import cut, linkage
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.similarity import EMBEDDED, allowed_linkages, coordinates, distances, metric_of


def quality_table(stats, model, *, similarity, linkages, groups):
    """What four linkages make of the same distances: one row for each layer and linkage.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel
    similarity : str
    linkages : sequence of str
        Those that need Euclidean distances are left out where the similarity has others.
    groups : int
        Groups that each tree is cut into.

    Returns
    -------
    pandas.DataFrame
        ``cophenetic correlation`` of the tree's heights with the distances (Sokal and Rohlf, 1962); ``silhouette``
        (Rousseeuw, 1987), the mean over experts, larger is better; ``Davies-Bouldin`` index (1979), smaller is better, NaN
        where the distances are not between points; ``largest`` group and ``alone``, the experts that are joined with none.
    """
    import pandas as pd
    from sklearn.metrics import davies_bouldin_score, silhouette_score

    rows, metric = [], metric_of(similarity)
    for layer in stats.layers:
        condensed = distances(stats, layer, similarity=similarity, model=model)
        points = coordinates(condensed, metric) if metric in EMBEDDED else None
        for method in allowed_linkages(similarity, linkages):
            tree = linkage(condensed, method, metric=metric)
            labels = cut(tree, groups)
            sizes = np.bincount(labels)
            row = {"layer": layer, "linkage": method, "cophenetic correlation": hierarchy.cophenet(tree, condensed)[0]}
            defined = 1 < groups < len(labels)
            row["silhouette"] = silhouette_score(squareform(condensed), labels, metric="precomputed") if defined else np.nan
            scored = defined and points is not None
            row["Davies-Bouldin"] = davies_bouldin_score(points, labels) if scored else np.nan
            rows.append(row | {"largest": int(sizes.max()), "alone": int((sizes == 1).sum())})
    return pd.DataFrame(rows)


def partitions(stats, model, *, similarity, linkage, groups):
    """Labels ``[(E,) int64, …]`` of every layer's tree, cut into some groups."""
    how = dict(similarity=similarity, linkage=linkage, model=model)
    return [cut(merge_tree(stats, layer, **how), groups) for layer in stats.layers]


def agreement(first, second):
    """Adjusted Rand index of two partitions of every layer, ``(L,)``: 1 where they are the same, 0 by chance."""
    from sklearn.metrics import adjusted_rand_score

    return np.array([adjusted_rand_score(a, b) for a, b in zip(first, second, strict=True)])


def agreement_over_samples(samples, model, *, similarity, linkages, groups):
    """How far the groups of different calibration samples agree: one row for each linkage and layer.

    Parameters
    ----------
    samples : list of Statistics
        Of the same model, each on a calibration sample of its own.
    model, similarity, linkages, groups
        As for :func:`quality_table`.

    Returns
    -------
    pandas.DataFrame
        ``linkage``, ``layer`` and ``agreement``, the adjusted Rand index for each pair of samples.
    """
    import pandas as pd

    rows = []
    for method in allowed_linkages(similarity, linkages):
        found = [partitions(s, model, similarity=similarity, linkage=method, groups=groups) for s in samples]
        for (i, first), (j, second) in itertools.combinations(enumerate(found), 2):
            for layer, value in enumerate(agreement(first, second)):
                rows.append({"linkage": method, "layer": layer, "samples": f"{i}, {j}", "agreement": float(value)})
    return pd.DataFrame(rows)


def growing(model, tokenizer, *, calibration, sequences, length, seed, batch_size=8, steps=6):
    """Statistics of growing parts of one calibration sample, the last of all of it, each part captured once.

    Parameters
    ----------
    model, tokenizer
    calibration, sequences, length, seed
        As for :func:`hcsmoe_core.calibration.calibration_tokens`.
    steps : int
        Parts; each has twice the sequences of the one before, or all.

    Returns
    -------
    list of Statistics
    """
    how = dict(model=model, sequences=sequences, length=length, seed=seed)
    input_ids = calibration_tokens(calibration, tokenizer, **how)
    domains = domains_of(calibration, sequences) or ["all"] * sequences
    ends = sorted({max(1, round(sequences / 2**step)) for step in range(steps)})
    found, before = [], 0
    for end in ends:
        part = capture(model, input_ids[before:end], batch_size=batch_size, domains=domains[before:end])
        found.append(found[-1] + part if found else part)
        before = end
    return found


def agreement_over_size(parts, model, *, similarity, linkages, groups):
    """How far the groups of part of a calibration sample are those of all of it: one row for each linkage, layer and part.

    Parameters
    ----------
    parts : list of Statistics
        From :func:`growing`.
    model, similarity, linkages, groups
        As for :func:`quality_table`.

    Returns
    -------
    pandas.DataFrame
        ``linkage``, ``layer``, ``tokens`` and ``agreement``, the adjusted Rand index with the groups of the last part.
    """
    import pandas as pd

    rows = []
    for method in allowed_linkages(similarity, linkages):
        found = [partitions(s, model, similarity=similarity, linkage=method, groups=groups) for s in parts]
        for stats, labels in zip(parts[:-1], found[:-1], strict=True):
            for layer, value in enumerate(agreement(labels, found[-1])):
                rows.append({"linkage": method, "layer": layer, "tokens": stats.num_tokens, "agreement": float(value)})
    return pd.DataFrame(rows)
