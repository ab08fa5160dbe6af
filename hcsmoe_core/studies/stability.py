"""How good a merge tree is, how far it depends on the linkage and the calibration sample, and when to stop
capturing.
"""

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from sklearn.metrics import adjusted_rand_score, davies_bouldin_score, silhouette_score

from hcsmoe_core._util import check_count, require
from hcsmoe_core.clustering import cut
from hcsmoe_core.clustering import linkage as tree_of
from hcsmoe_core.collect import capture
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.methods.similarities import EMBEDDED, allowed_linkages, coordinates
from hcsmoe_core.moe import source_of
from hcsmoe_core.similarity import distances, metric_of, needs_of
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE, Statistics
from hcsmoe_core.text.calibration import calibration_tokens, domains_of


def quality_table(
    stats: Statistics, model: Any, *, similarity: str, linkages: Sequence[str], groups: int
) -> Any:
    """What several linkages make of the same distances: one row per layer and linkage.

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
        ``cophenetic correlation`` of the tree's heights with the distances (Sokal and Rohlf, 1962);
        ``silhouette`` (Rousseeuw, 1987), the mean over experts, larger is better; ``Davies-Bouldin`` index
        (1979), smaller is better, NaN where the distances are not between points; ``largest`` group and
        ``alone``, the experts joined with none.
    """
    rows, metric = [], metric_of(similarity)
    for layer in stats.layers:
        condensed = distances(stats, layer, similarity=similarity, model=model)
        points, square = coordinates(condensed, metric) if metric in EMBEDDED else None, squareform(condensed)
        for method in allowed_linkages(similarity, linkages):
            tree = tree_of(condensed, method, metric=metric)
            labels = cut(tree, groups)
            sizes, defined = np.bincount(labels), 1 < groups < len(labels)
            row = {
                "layer": layer,
                "linkage": method,
                "cophenetic correlation": hierarchy.cophenet(tree, condensed)[0],
                "silhouette": silhouette_score(square, labels, metric="precomputed") if defined else np.nan,
                "Davies-Bouldin": davies_bouldin_score(points, labels)
                if defined and points is not None
                else np.nan,
                "largest": int(sizes.max()),
                "alone": int((sizes == 1).sum()),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def partitions(
    stats: Statistics, model: Any, *, similarity: str, linkage: str, groups: int
) -> list[np.ndarray]:
    """Labels ``[(E,) int64, …]`` of every layer's tree, cut into some groups."""
    options = dict(similarity=similarity, linkage=linkage, model=model)
    return [cut(merge_tree(stats, layer, **options), groups) for layer in stats.layers]


def agreement(first: Sequence, second: Sequence) -> np.ndarray:
    """Adjusted Rand index of two partitions of every layer, ``(L,)``: 1 where they are the same, 0 by
    chance.
    """
    return np.array([adjusted_rand_score(a, b) for a, b in zip(first, second, strict=True)])


def agreement_over_samples(
    samples: Sequence[Statistics], model: Any, *, similarity: str, linkages: Sequence[str], groups: int
) -> Any:
    """How far the groups of different calibration samples agree: one row per linkage, layer and pair of
    samples.

    Parameters
    ----------
    samples : list of Statistics
        Of the same model, each on a calibration sample of its own.
    model, similarity, linkages, groups
        As for :func:`quality_table`.

    Returns
    -------
    pandas.DataFrame
        ``linkage``, ``layer``, ``samples`` and ``agreement``, the adjusted Rand index.
    """
    rows = []
    for method in allowed_linkages(similarity, linkages):
        labels = [partitions(s, model, similarity=similarity, linkage=method, groups=groups) for s in samples]
        for (i, first), (j, second) in itertools.combinations(enumerate(labels), 2):
            values = enumerate(agreement(first, second))
            rows += [(method, layer, f"{i}, {j}", float(value)) for layer, value in values]
    return pd.DataFrame(rows, columns=["linkage", "layer", "samples", "agreement"])


def growing(
    model: Any,
    tokenizer: Any,
    *,
    calibration: str,
    sequences: int,
    length: int,
    seed: int,
    batch_size: int = 8,
    steps: int = 6,
) -> list[Statistics]:
    """Statistics of growing parts of one calibration sample, the last of all of it, each part captured once.

    Parameters
    ----------
    model, tokenizer
    calibration, sequences, length, seed
        As for :func:`hcsmoe_core.calibration_tokens`.
    steps : int
        Parts; each has twice the sequences of the one before, or all.
    """
    options = dict(model=model, sequences=sequences, length=length, seed=seed)
    input_ids = calibration_tokens(calibration, tokenizer, **options)
    domains = domains_of(calibration, sequences) or ["all"] * sequences
    ends = sorted({max(1, round(sequences / 2**step)) for step in range(steps)})
    captured = []
    for before, end in itertools.pairwise([0, *ends]):
        options = dict(needs=DEFAULT_NEEDS, batch_size=batch_size, domains=domains[before:end])
        captured.append(capture(model, input_ids[before:end], **options))
    return list(itertools.accumulate(captured))


def agreement_over_size(
    parts: Sequence[Statistics], model: Any, *, similarity: str, linkages: Sequence[str], groups: int
) -> Any:
    """How far the groups of part of a calibration sample are those of all of it: one row per linkage, layer
    and part.

    Parameters
    ----------
    parts : list of Statistics
        From :func:`growing`.
    model, similarity, linkages, groups
        As for :func:`quality_table`.

    Returns
    -------
    pandas.DataFrame
        ``linkage``, ``layer``, ``tokens``, ``agreement``, the adjusted Rand index with the groups of the last
        part, and ``excess``, how much more the part's groups :func:`spread` than those, by the distances of
        the last part.
    """
    rows, metric = [], metric_of(similarity)
    for layer, name in enumerate(parts[-1].layers):
        between = [distances(stats, name, similarity=similarity, model=model) for stats in parts]
        for method in allowed_linkages(similarity, linkages):
            *found, whole = [cut(tree_of(condensed, method, metric=metric), groups) for condensed in between]
            for stats, labels in zip(parts, found, strict=False):
                row = {
                    "linkage": method,
                    "layer": layer,
                    "tokens": stats.num_tokens,
                    "agreement": float(adjusted_rand_score(labels, whole)),
                    "excess": extra_spread(labels, whole, between[-1], metric),
                }
                rows.append(row)
    order = ["linkage", "tokens", "layer"]
    return pd.DataFrame(rows).sort_values(order, key=_by_appearance, ignore_index=True)


def _by_appearance(column):
    return column.map({value: i for i, value in enumerate(column.unique())})


def capture_until_stable(
    model: Any,
    input_ids: torch.Tensor,
    *,
    agreement: float = 0.95,
    excess: float | None = None,
    experts: Sequence[int] | None = None,
    similarity: str = "expert-output",
    metric: str = "",
    linkage: str = "average",
    needs: Sequence[str] | None = None,
    sample: int = SAMPLE,
    domains: Sequence[str] | None = None,
    batch_size: int = 8,
    ranks: Any = None,
    **options: Any,
) -> Statistics:
    """Capture only as many of the calibration tokens as it takes for the groups to become stable.

    Of two halves alike in domains, one sequence each is captured, then one more, then two, four and so on;
    each time, every layer's tree is made from either half alone and cut. It stops once the two partitions of
    every layer agree at every cut. The result is of both halves together.

    Parameters
    ----------
    input_ids : (N, S) int64 tensor
        The most that may be taken; at least two sequences.
    agreement, excess : float
        Adjusted Rand index at which two partitions count as the same; or, in its place, the
        :func:`excess_spread` at which one counts as no worse than the other, such as 0.05.
    experts : sequence of int, optional
        Numbers of groups that the trees are cut into; by default 3/4, 1/2 and 1/4 of each layer's experts.
    similarity, metric, linkage : str
        Of the trees.
    model, needs, sample, domains, batch_size, ranks, **options
        As for :func:`hcsmoe_core.capture`.

    The statistics have ``stability``; see :func:`stability_table`.
    """
    cuts = _checked_cuts(model, len(input_ids), agreement, excess, experts, similarity, needs)
    trees = dict(similarity=similarity, metric=metric_of(similarity, metric), linkage=linkage)
    halves, size = _halves(len(input_ids), domains), ranks.size() if ranks else 1
    options |= dict(needs=needs, sample=sample, ranks=ranks)
    parts, looks = ([], []), []
    for before, end in itertools.pairwise([0, *_ends(min(map(len, halves)), size)[:-1], None]):
        for half, captured in zip(halves, parts, strict=True):
            chosen = half[before:end]
            options["domains"] = domains and [domains[i] for i in chosen]
            options["batch_size"] = max(1, min(batch_size, len(chosen) // size))
            captured.append(capture(model, input_ids[chosen], **options))
            captured[:] = [functools.reduce(operator.add, captured)]
        stats = [captured[0] for captured in parts]
        looks.append([_compared(stats, model, layer, counts, **trees) for layer, counts in cuts.items()])
        looks[-1].insert(0, sum(half.num_tokens for half in stats))
        if all(_agrees(look, agreement, excess) for look in looks[-1][1:]):
            break
    limit = {"agreement": float(agreement)} if excess is None else {"excess": float(excess)}
    stability = limit | trees | _summary(looks, cuts, agreement, excess)
    return replace(with_rows(stats[0] + stats[1], slice(sample)), stability=stability)


def spread(labels: np.ndarray, condensed: np.ndarray, metric: str) -> float:
    """How far the experts of a partition's groups are apart, ``Σ_g Σ_{i<j in g} d_ij² / |g|``.

    Of Euclidean distances it is the within-group sum of squares (Ward, 1963); cosine and CKA distances count
    as squares.

    Parameters
    ----------
    labels : (E,) int64 array
    condensed : (E·(E−1)/2,) float64 array
    metric : str
    """
    labels = np.asarray(labels)
    square = squareform(condensed if metric in ("cosine", "cka") else condensed**2)
    return float((square * (labels == labels[:, None]) / np.bincount(labels)[labels]).sum() / 2)


def extra_spread(labels: np.ndarray, others: np.ndarray, condensed: np.ndarray, metric: str) -> float:
    """How much more the groups of one partition :func:`spread` than another's; infinite if only the other's
    do not.
    """
    return _relative(spread(labels, condensed, metric), spread(others, condensed, metric))


def _relative(value, least):
    return value / least - 1 if least else (np.inf if value else 0.0)


def excess_spread(labels: Sequence[np.ndarray], condensed: Sequence[np.ndarray], metric: str) -> float:
    """How much more the groups of one of two halves spread, measured on the other, than the other's own
    groups.

    Both ways together, ``(S(P_1; d_2) + S(P_2; d_1)) / (S(P_1; d_1) + S(P_2; d_2)) − 1``, S the
    :func:`spread`. It is below zero where a tree's cut is not the best there is, and infinite if only the own
    groups have no spread.

    Parameters
    ----------
    labels : pair of (E,) int64 array
    condensed : pair of (E·(E−1)/2,) float64 array
        Distances by either half.
    metric : str
    """
    own = sum(spread(labels[i], condensed[i], metric) for i in (0, 1))
    return _relative(sum(spread(labels[i], condensed[1 - i], metric) for i in (0, 1)), own)


def _checked_cuts(model, sequences, agreement, excess, experts, similarity, needs):
    """Numbers of groups that each layer's tree is cut into, by layer name."""
    require(
        source_of(model) is None,
        "A streamed model goes through its tokens layer by layer, so that every look would read the whole "
        "checkpoint again; load it whole (--load whole), or capture a fixed number of tokens.",
    )
    require(0 < agreement <= 1, f'The "agreement" argument must be above 0 and at most 1; not {agreement}.')
    require(excess is None or excess > 0, f'The "excess" argument must be above 0; not {excess}.')
    check_count("input_ids", sequences, 2)
    missing = " and ".join(
        sorted(set(needs_of(similarity)) - set(needs_of(similarity) if needs is None else needs))
    )
    require(not missing, f'Trees by {similarity!r} need {missing}; add it to the "needs" argument.')
    cuts = {}
    for layer in find_moe_layers(model):
        size = layer.num_experts
        counts = {size * part // 4 for part in (3, 2, 1)} - {0} if experts is None else experts
        cuts[layer.name] = sorted({check_count("experts", count, 1, size) for count in counts}, reverse=True)
    return cuts


def _halves(count, domains):
    """Indices of sequences in two halves, alike in domains, each going through the domains in turn."""
    of_domain = {}
    for i in range(count):
        of_domain.setdefault(domains[i] if domains else "all", []).append(i)
    rows = enumerate(itertools.zip_longest(*of_domain.values()))
    dealt = [((turn + number) % 2, i) for turn, row in rows for number, i in enumerate(row) if i is not None]
    return tuple([i for half, i in dealt if half == side] for side in (0, 1))


def _ends(count, first):
    """Sequences of a half after each look: twice as many each time, and never fewer new ones than at the
    first.
    """
    doubled = (first << step for step in range(count.bit_length()))
    return [*itertools.takewhile(lambda end: end < count and count - end >= first, doubled), count]


def _compared(stats, model, layer, counts, *, similarity, metric, linkage):
    """Smallest agreement and largest excess of two halves' groups of a layer, over the cuts."""
    options = dict(similarity=similarity, metric=metric, model=model)
    between = [distances(half, layer, **options) for half in stats]
    trees = [tree_of(condensed, linkage, metric=metric) for condensed in between]
    pairs = [[cut(tree, count) for tree in trees] for count in counts]
    agreements = [float(adjusted_rand_score(*pair)) for pair in pairs]
    return min(agreements), max(excess_spread(pair, between, metric) for pair in pairs)


def _agrees(look, agreement, excess):
    return look[0] >= agreement if excess is None else look[1] <= excess


def _summary(looks, cuts, agreement, excess):
    """The looks of :func:`capture_until_stable`, ``[[tokens, (agreement, excess) of each layer, …], …]``, by
    layer.
    """
    tokens, *by_layer = zip(*looks, strict=True)
    layers = {}
    for (name, counts), values in zip(cuts.items(), by_layer, strict=True):
        since = len(values)
        while since and _agrees(values[since - 1], agreement, excess):
            since -= 1
        agreements, excesses = map(list, zip(*values, strict=True))
        needed = tokens[since] if since < len(values) else None
        layers[name] = {"experts": counts, "agreement": agreements, "excess": excesses, "needed": needed}
    stable = all(layer["needed"] is not None for layer in layers.values())
    return {"tokens": list(tokens), "stable": stable, "layers": layers}


def with_rows(stats: Statistics, rows: Any) -> Statistics:
    """Statistics with some rows of their sample, if they have one, given as an index."""
    if stats.sampled is None:
        return stats

    def chosen(sample):
        return replace(sample, **{f.name: getattr(sample, f.name)[rows] for f in fields(sample)})

    layers = {n: replace(layer, sample=chosen(layer.sample)) for n, layer in stats.layers.items()}
    return replace(stats, layers=layers, sampled=stats.sampled[rows])


def stability_table(stats: Statistics) -> Any:
    """How many tokens each layer needed until its groups were stable: one row per layer.

    Parameters
    ----------
    stats : Statistics
        Of :func:`capture_until_stable`. Their ``stability`` has the limit, ``similarity``, ``metric`` and
        ``linkage``; ``tokens`` at each look; whether it is ``stable``; and of each of the ``layers`` its cuts
        (``experts``), the smallest ``agreement`` and largest ``excess`` at each look, and the tokens
        ``needed``: those of the first look from which on it agreed, or None.

    Returns
    -------
    pandas.DataFrame
        ``layer``, ``cuts``, ``tokens needed`` (missing where its groups still changed), ``agreement`` and
        ``excess`` of the halves at the end.
    """
    rows = [
        {"layer": name, "cuts": ", ".join(map(str, layer["experts"])), "tokens needed": layer["needed"]}
        | {key: layer[key][-1] for key in ("agreement", "excess")}
        for name, layer in stats.stability["layers"].items()
    ]
    return pd.DataFrame(rows).astype({"tokens needed": "Int64"})
