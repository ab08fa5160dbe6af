"""How good a merge tree is, how far it depends on the linkage, the calibration sample and its size, and when to stop."""

import itertools
from dataclasses import replace

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from hcsmoe_core._util import InputError, check_count
from hcsmoe_core.clustering import cut
from hcsmoe_core.clustering import linkage as tree_of
from hcsmoe_core.collect import capture
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods.planner import merge_tree
from hcsmoe_core.moe import source_of
from hcsmoe_core.scale import ranks
from hcsmoe_core.similarity import (
    EMBEDDED,
    NEEDED,
    allowed_linkages,
    coordinates,
    distances,
    metric_of,
    parts_of,
)
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE
from hcsmoe_core.text.calibration import calibration_tokens, domains_of


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
            tree = tree_of(condensed, method, metric=metric)
            labels = cut(tree, groups)
            sizes = np.bincount(labels)
            row = {
                "layer": layer,
                "linkage": method,
                "cophenetic correlation": hierarchy.cophenet(tree, condensed)[0],
            }
            defined = 1 < groups < len(labels)
            row["silhouette"] = (
                silhouette_score(squareform(condensed), labels, metric="precomputed") if defined else np.nan
            )
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
                rows.append(
                    {"linkage": method, "layer": layer, "samples": f"{i}, {j}", "agreement": float(value)}
                )
    return pd.DataFrame(rows)


def growing(model, tokenizer, *, calibration, sequences, length, seed, batch_size=8, steps=6):
    """Statistics of growing parts of one calibration sample, the last of all of it, each part captured once.

    Parameters
    ----------
    model, tokenizer
    calibration, sequences, length, seed
        As for :func:`hcsmoe_core.text.calibration.calibration_tokens`.
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
        ``linkage``, ``layer``, ``tokens``, ``agreement``, the adjusted Rand index with the groups of the last part, and
        ``excess``, how much more the part's groups :func:`spread` than those, by the distances of the last part.
    """
    import pandas as pd

    rows, metric = [], metric_of(similarity)
    between = [[distances(s, layer, similarity=similarity, model=model) for layer in s.layers] for s in parts]
    for method in allowed_linkages(similarity, linkages):
        found = [
            [cut(tree_of(condensed, method, metric=metric), groups) for condensed in layers]
            for layers in between
        ]
        for stats, labels in zip(parts[:-1], found[:-1], strict=True):
            for layer, value in enumerate(agreement(labels, found[-1])):
                row = {
                    "linkage": method,
                    "layer": layer,
                    "tokens": stats.num_tokens,
                    "agreement": float(value),
                }
                rows.append(
                    row
                    | {"excess": extra_spread(labels[layer], found[-1][layer], between[-1][layer], metric)}
                )
    return pd.DataFrame(rows)


def capture_until_stable(
    model,
    input_ids,
    *,
    agreement=0.95,
    excess=None,
    experts=None,
    similarity="expert-output",
    metric="",
    linkage="average",
    needs=DEFAULT_NEEDS,
    sample=SAMPLE,
    every=1,
    batch_size=8,
    domains=None,
    progress=True,
):
    """Statistics of as many of the calibration tokens as it takes for the groups to stop moving.

    The sequences of each domain are dealt to two halves in turn. One sequence of each half is captured, then one more, then
    two, four and so on: each time, every layer's tree is made from either half alone, and both are cut. It stops once the two
    partitions of every layer agree at every cut that is looked at: by adjusted Rand index, or, with ``excess``, by what the
    groups cost, so that groups which might as well be others do not keep it from stopping. What comes back is of both halves
    together, so that its groups rest on twice the tokens of those that agreed. The error stated is that of either half:
    1 − ``agreement`` is how far the groups of so many tokens are from those of as many others, ``excess`` how much more
    they spread, measured on the others, than the others' own.

    Parameters
    ----------
    model, needs, sample, every, batch_size, domains, progress
        As for :func:`hcsmoe_core.collect.capture`.
    input_ids : (N, S) int64 tensor
        The most that may be taken; at least two sequences.
    agreement : float
        Adjusted Rand index at which two partitions count as the same, above 0 and at most 1.
    excess : float, optional
        In place of the agreement: the :func:`excess_spread` at which one partition counts as no worse than the other, as 0.05.
    experts : sequence of int, optional
        Numbers of groups that the trees are cut into; by default 3/4, 1/2 and 1/4 of each layer's experts.
    similarity, metric, linkage : str
        Of the trees: :func:`hcsmoe_core.similarity.distances` and :func:`hcsmoe_core.clustering.linkage`.

    Returns
    -------
    Statistics
        With ``stability``: ``agreement`` (or ``excess``), ``similarity``, ``metric`` and ``linkage`` as given, ``tokens`` taken
        at each look, whether it is ``stable``, and of each of the ``layers`` the cuts (``experts``), the smallest ``agreement``
        and the largest ``excess`` at each look, and the tokens ``needed``: those of the first look from which on it agreed,
        None if it did not at the last.

    Raises
    ------
    ValueError
        As :func:`hcsmoe_core.collect.capture`; also if the model is streamed, the similarity needs what is not collected, or a
        number of groups is out of range.
    """
    cuts = _checked_cuts(model, len(input_ids), agreement, excess, experts, similarity, needs)
    how, measured = dict(similarity=similarity, metric=metric, model=model), metric_of(similarity, metric)
    halves = _halves(len(input_ids), domains)
    ends = _ends(min(map(len, halves)), ranks.size())
    stats, looks = [None, None], []
    for before, end in itertools.pairwise([0, *ends[:-1], None]):
        for place, half in enumerate(halves):
            chosen = half[before:end]
            options = dict(needs=needs, sample=sample, every=every, progress=progress)
            options["batch_size"] = max(1, min(batch_size, len(chosen) // ranks.size()))
            of = None if domains is None else [domains[i] for i in chosen]
            part = capture(model, input_ids[chosen], domains=of, **options)
            stats[place] = part if stats[place] is None else stats[place] + part
        found = []
        for layer, counts in cuts.items():
            between = [distances(half, layer, **how) for half in stats]
            found.append(_compared(between, counts, linkage, measured))
        looks.append((sum(half.num_tokens for half in stats), found))
        if all(_agrees(pair, agreement, excess) for pair in found):
            break
    about = dict(agreement=float(agreement)) if excess is None else dict(excess=float(excess))
    about |= dict(similarity=similarity, metric=measured, linkage=linkage)
    about |= _looked(looks, cuts, agreement, excess)
    return replace(_of_sample(stats[0] + stats[1], sample), stability=about)


def spread(labels, condensed, metric):
    """How far the experts of a partition's groups are apart, ``Σ_g Σ_{i<j in g} d_ij² / |g|``.

    Of Euclidean distances it is the within-group sum of squares (Ward, 1963); cosine and CKA distances count as squares.

    Parameters
    ----------
    labels : (E,) int64 array
    condensed : (E·(E−1)/2,) float64 array
    metric : str

    Returns
    -------
    float
    """
    labels = np.asarray(labels)
    square = squareform(condensed if metric in ("cosine", "cka") else condensed**2)
    return float((square * (labels == labels[:, None]) / np.bincount(labels)[labels]).sum() / 2)


def extra_spread(labels, others, condensed, metric):
    """How much more the groups of one partition :func:`spread` than another's; infinite if only the other's do not.

    Parameters
    ----------
    labels, others : (E,) int64 array
    condensed : (E·(E−1)/2,) float64 array
    metric : str

    Returns
    -------
    float
    """
    return _relative(spread(labels, condensed, metric), spread(others, condensed, metric))


def excess_spread(labels, condensed, metric):
    """How much more the groups of one of two halves spread, measured on the other, than the other's own groups.

    Both ways together, ``(S(P_1; d_2) + S(P_2; d_1)) / (S(P_1; d_1) + S(P_2; d_2)) − 1``, S the :func:`spread`. It is below
    zero where a tree's cut is not the best there is.

    Parameters
    ----------
    labels : pair of (E,) int64 array
    condensed : pair of (E·(E−1)/2,) float64 array
        Distances by either half.
    metric : str

    Returns
    -------
    float
        Infinite if only groups measured on their own half have no spread.
    """
    crossed = spread(labels[0], condensed[1], metric) + spread(labels[1], condensed[0], metric)
    own = spread(labels[0], condensed[0], metric) + spread(labels[1], condensed[1], metric)
    return _relative(crossed, own)


def _relative(value, least):
    """How much more one spread is than another."""
    return value / least - 1 if least else (np.inf if value else 0.0)


def _checked_cuts(model, sequences, agreement, excess, experts, similarity, needs):
    """Numbers of groups that each layer's tree is cut into, by layer name."""
    if source_of(model) is not None:
        raise InputError(
            "A streamed model goes through its tokens layer by layer, so that every look would read the whole checkpoint "
            "again; load it whole (--load whole), or capture a fixed number of tokens."
        )
    if not 0 < agreement <= 1:
        raise InputError(f'The "agreement" argument must be above 0 and at most 1; not {agreement}.')
    if excess is not None and not excess > 0:
        raise InputError(f'The "excess" argument must be above 0; not {excess}.')
    check_count("input_ids", sequences, 2)
    missing = {need for name, _ in parts_of(similarity) for need in NEEDED[name]} - set(needs)
    if missing:
        raise InputError(
            f'Trees by {similarity!r} need {" and ".join(sorted(missing))}; add it to the "needs" argument.'
        )
    cuts = {}
    for layer in find_moe_layers(model):
        size = layer.num_experts
        given = {size * part // 4 for part in (3, 2, 1)} - {0} if experts is None else experts
        cuts[layer.name] = sorted({check_count("experts", count, 1, size) for count in given}, reverse=True)
    return cuts


def _halves(count, domains):
    """Places of sequences in two halves, alike in domains, each going through the domains in turn."""
    of_domain = {}
    for place in range(count):
        of_domain.setdefault("all" if domains is None else domains[place], []).append(place)
    halves = ([], [])
    for turn in range(max(map(len, of_domain.values()))):
        for number, places in enumerate(of_domain.values()):
            if turn < len(places):
                halves[(turn + number) % 2].append(places[turn])
    return halves


def _ends(count, first):
    """Sequences of a half after each look: twice as many each time, and never fewer new ones than at the first."""
    ends, step = [], first
    while step < count and count - step >= first:
        ends.append(step)
        step *= 2
    return [*ends, count]


def _compared(between, cuts, linkage, metric):
    """Smallest agreement and largest excess of two halves' groups of a layer, over the cuts."""
    trees = [tree_of(condensed, linkage, metric=metric) for condensed in between]
    pairs = [[cut(tree, count) for tree in trees] for count in cuts]
    agreements = [float(agreement([first], [second])[0]) for first, second in pairs]
    return min(agreements), max(excess_spread(pair, between, metric) for pair in pairs)


def _agrees(found, wanted, excess):
    return found[0] >= wanted if excess is None else found[1] <= excess


def _looked(looks, cuts, wanted, excess):
    """What :func:`capture_until_stable` tells of its looks, ``[(tokens, agreement and excess of each layer), …]``."""
    layers = {}
    for place, (name, experts) in enumerate(cuts.items()):
        values = [found[place] for _, found in looks]
        since = len(values)
        while since and _agrees(values[since - 1], wanted, excess):
            since -= 1
        needed = looks[since][0] if since < len(values) else None
        seen = {"agreement": [a for a, _ in values], "excess": [e for _, e in values]}
        layers[name] = {"experts": experts, **seen, "needed": needed}
    stable = all(layer["needed"] is not None for layer in layers.values())
    return {"tokens": [tokens for tokens, _ in looks], "stable": stable, "layers": layers}


def _of_sample(stats, size):
    """Statistics with the first ``size`` tokens of their sample: two small samples add up to more than was asked for."""
    if stats.sampled is None:
        return stats
    layers = {}
    for name, sums in stats.layers.items():
        rows = {key: value[:size] for key, value in vars(sums.sample).items()}
        layers[name] = replace(sums, sample=type(sums.sample)(**rows))
    return replace(stats, layers=layers, sampled=stats.sampled[:size])


def stability_table(stats):
    """How many tokens each layer needed until its groups stopped moving: one row for each layer.

    Parameters
    ----------
    stats : Statistics
        Of :func:`capture_until_stable`.

    Returns
    -------
    pandas.DataFrame
        ``layer``, ``cuts``, ``tokens needed`` (missing where its groups still moved), ``agreement`` and ``excess`` of the
        halves at the end.
    """
    import pandas as pd

    rows = []
    for name, layer in stats.stability["layers"].items():
        row = {"layer": name, "cuts": ", ".join(map(str, layer["experts"])), "tokens needed": layer["needed"]}
        rows.append(row | {key: layer[key][-1] for key in ("agreement", "excess")})
    return pd.DataFrame(rows).astype({"tokens needed": "Int64"})
