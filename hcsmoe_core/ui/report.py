"""A report of all layers in one HTML file that opens offline, and the verdict: is this worth merging?"""

import html
import json
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.distance import pdist, squareform
from scipy.stats import spearmanr
from sklearn.isotonic import isotonic_regression

from hcsmoe_core._util import check_choice, replacing, require
from hcsmoe_core.clustering import LINKAGES, cut
from hcsmoe_core.clustering import linkage as tree_of
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.methods.budgets import by_merge_cost
from hcsmoe_core.methods.similarities import coordinates
from hcsmoe_core.similarity import distances
from hcsmoe_core.statistics import load_statistics
from hcsmoe_core.studies.cache import cached_statistics
from hcsmoe_core.studies.stability import agreement, quality_table
from hcsmoe_core.studies.tables import usage_table
from hcsmoe_core.ui.viewdata import SCRIPT, STYLE, cut_values, output_distances, view_data

PAGE = Path(__file__).with_name("report.html")
DRAWS = 20  # sets of unrelated experts that each layer is compared with
BEARABLE = 0.3  # relative error of outputs up to which a cut is counted as bearable: between 3 and 2 bits
SHARES = np.arange(1, 32) / 32  # of the experts that go
# Relative error of normally distributed weights rounded to so many bits, in groups of 128: simulated.
ROUNDED = {8: 0.006, 4: 0.100, 3: 0.214}
ANSWERS = {
    "yes": "Yes. The experts of this model come in families, and merging within them is cheap.",
    "in part": "In part. Some experts are alike, but only a small share can go before the error grows.",
    "no": "No. These experts are unrelated: averaging them loses what they compute.",
}
ADVICE = {
    "yes": 'Merge with the plan drawn above, or "hcsmoe merge", and measure the result. Rounding to 8 bits '
    "afterwards halves the file again at almost no cost.",
    "in part": "Round the experts to 8 or 4 bits first, which costs less for the bytes that it saves. Then "
    'merge only what is cheap (budget "By cost"), lock the layers that resist, and measure the result.',
    "no": "Round the experts instead: 4 bits save three quarters of the bytes, whatever experts share. Where "
    "operations must fall too, trim every expert's neurons "
    '("--method trimming") instead of joining experts.',
}


def kinship(sums: Any, *, linkage: str = "average", seed: int = 0) -> dict:
    """Whether one layer's experts come in families: their spread in groups, against unrelated experts.

    Half as many groups as experts are made of them by their outputs, and of random sets of experts that are
    as far from their common mean, each in a random direction of the same principal components (the reference
    of the gap statistic: Tibshirani, Walther and Hastie, 2001).

    Parameters
    ----------
    sums : LayerStatistics
    linkage : str
        Of the trees of both.
    seed : int
        Of the random experts.

    Returns
    -------
    dict
        ``left``, the share of the outputs' usage-weighted spread within the groups; ``unrelated``, the same
        of random experts on average; ``families``, whether the first is smaller by more than two standard
        deviations.
    """
    square, _ = output_distances(sums)
    share, groups = sums.frequency.numpy(), max(1, sums.num_experts // 2)
    points = coordinates(np.sqrt(squareform(square, checks=False)), "euclidean")
    norms = np.linalg.norm(points, axis=1, keepdims=True)
    directions = points / np.where(norms > 0, norms, 1)
    values, vectors = np.linalg.eigh(directions.T @ directions)
    random, draws = np.random.default_rng(seed), []
    for _ in range(DRAWS if points.size else 0):
        drawn = random.normal(size=points.shape) * np.sqrt(np.maximum(values, 0)) @ vectors.T
        drawn *= norms / np.linalg.norm(drawn, axis=1, keepdims=True)
        draws.append(_spread_left(squareform(pdist(drawn, "sqeuclidean")), share, linkage, groups))
    left = _spread_left(square, share, linkage, groups)
    mean, deviation = (float(f(draws)) if draws else 0.0 for f in (np.mean, np.std))
    return {"left": left, "unrelated": mean, "families": not draws or left < mean - 2 * deviation}


def _spread_left(square, share, linkage, groups):
    """Share of the usage-weighted spread that is within the groups of a tree."""
    labels = cut(tree_of(np.sqrt(squareform(square, checks=False)), linkage), groups)
    within = [_spread(square, share, labels == group) for group in range(groups)]
    return float(sum(within) / (_spread(square, share, labels >= 0) or 1))


def _spread(square, share, members):
    weight, part = share[members], square[np.ix_(members, members)]
    return weight @ part @ weight / (2 * weight.sum() or 1)


def verdict(stats: Any, *, linkage: str = "average", seed: int = 0) -> dict:
    """Whether a model is worth merging, from its statistics alone.

    Parameters
    ----------
    stats : Statistics
        With Grams of the outputs where the answer should go by each token; else it goes by mean outputs.
    linkage : str
    seed : int
        Of the unrelated experts that its own are compared with.

    Returns
    -------
    dict
        ``answer`` ("yes", "in part", "no"); ``experts``, "families", "unrelated" or "mixed"; ``share``, that
        of the experts that could go at a predicted error of at most 0.3; ``forecast``, a data frame of
        predicted errors by share; ``layers``, a data frame with :func:`kinship` and errors of each layer;
        ``resisting``, numbers of the layers without families or with an error over 1.3 times the median;
        ``basis``, what the errors are of.
    """
    check_choice("linkage", linkage, LINKAGES)
    stats.check(("outputs",), "The verdict")
    errors, rows = [], []
    for sums in stats.layers.values():
        square, size = output_distances(sums)
        share = sums.frequency.numpy()
        tree = tree_of(np.sqrt(squareform(square, checks=False)), linkage)
        lost = cut_values(tree, square, share, sums.routing_mass.sum(0).numpy())["lost"]
        errors.append(np.sqrt(np.maximum(lost, 0) / (share @ size or 1)))
        kept = {f"error, {q} % kept": errors[-1][max(1, len(size) * q // 100) - 1] for q in (75, 50, 25)}
        rows.append(kinship(sums, linkage=linkage, seed=seed) | kept)
    layers, forecast = pd.DataFrame(rows), _forecast(errors)
    fraction, half = layers["families"].mean(), layers["error, 50 % kept"]
    experts = "families" if fraction >= 0.75 else "unrelated" if fraction <= 0.25 else "mixed"
    share = forecast["share gone"][forecast["by cost"] <= BEARABLE].max()
    share = 0.0 if np.isnan(share) else float(share)
    low = experts == "unrelated" or share < 0.1
    resisting = ~layers["families"] | (half > 1.3 * half.median())
    return {
        "answer": "no" if low else "yes" if experts == "families" and share >= 0.5 else "in part",
        "experts": experts,
        "share": share,
        "forecast": forecast,
        "layers": layers,
        "resisting": np.flatnonzero(resisting).tolist(),
        "basis": "mean outputs" if sums.output_gram is None else "outputs, token by token",
    }


def _forecast(errors):
    """Predicted error (root mean square over layers) of even and of cheapest joins, by share gone."""
    # Each join costs the squared error that it adds, on the lower convex hull over the numbers of experts; a
    # tree of such heights is what the budget takes.
    slopes = [isotonic_regression(np.diff(e[::-1] ** 2)) if len(e) > 1 else np.empty(0) for e in errors]
    trees = [np.pad(slope[:, None], ((0, 0), (2, 1))) for slope in slopes]
    sizes, rows = [len(e) for e in errors], []
    for gone in SHARES:
        evenly = [max(1, round(size * (1 - gone))) for size in sizes]
        cheapest = by_merge_cost(trees, [1] * len(trees), sum(evenly), [1] * len(trees))
        means = [
            float(np.sqrt(np.mean([e[n - 1] ** 2 for e, n in zip(errors, counts, strict=True)])))
            for counts in (evenly, cheapest)
        ]
        rows.append({"share gone": gone, "evenly": means[0], "by cost": min(means)})
    return pd.DataFrame(rows)


def compared(stats: Any, other: Any, *, similarity: str, linkage: str, model: Any = None) -> pd.DataFrame:
    """How two captures of one model differ: one row per layer.

    Returns
    -------
    pandas.DataFrame
        ``usage moved``, the share of routed tokens that go to other experts; ``distances``, the rank
        correlation of the pairs' distances; ``groups``, the adjusted Rand index of the trees cut in half.
    """
    sizes = [[one.num_experts for one in each.layers.values()] for each in (stats, other)]
    require(
        list(stats.layers) == list(other.layers) and sizes[0] == sizes[1],
        'The "against" argument must be statistics of a model with the same layers and experts; these have '
        f"{len(other.layers)} layers of {sorted({*sizes[1]})} experts, not {len(sizes[0])} of "
        f"{sorted({*sizes[0]})}. Capture both on one model.",
    )
    rows, options = [], dict(similarity=similarity, model=model)
    for i, name in enumerate(stats.layers):
        usage = [each.layers[name].frequency.numpy() for each in (stats, other)]
        pairs = [distances(each, name, **options) for each in (stats, other)]
        trees = [merge_tree(each, name, linkage=linkage, **options) for each in (stats, other)]
        rand = agreement(*([cut(tree, max(1, len(usage[0]) // 2))] for tree in trees))[0]
        correlation = spearmanr(*pairs)[0] if len(pairs[0]) > 1 else np.nan
        row = {"layer": i, "usage moved": abs(usage[0] - usage[1]).sum() / 2}
        rows.append(row | {"distances": correlation, "groups": rand})
    return pd.DataFrame(rows)


def write_report(
    stats: Any,
    path: str | Path,
    *,
    model: Any = None,
    against: Any = None,
    title: str = "",
    similarity: str = "expert-output",
    linkage: str = "average",
) -> dict:
    """Write the view of all layers, forecasts, quality and the verdict as one HTML file.

    Parameters
    ----------
    stats : Statistics
    path : str or path
        File to write; it needs neither a server nor the network.
    model : transformers.PreTrainedModel, optional
        For similarities that look at weights, and for exact sizes.
    against : Statistics, optional
        Another capture of the same model, to compare with.
    title : str
        By default the model's name.
    similarity, linkage : str
        As for :func:`hcsmoe_core.make_plan`.

    Returns
    -------
    dict
        Of :func:`verdict`.
    """
    result, options = verdict(stats, linkage=linkage), dict(similarity=similarity, linkage=linkage)
    data = view_data(stats, model, title=title, **options)
    parts = _tables(stats, model, result, options)
    if against is not None:
        parts["Against the other capture"] = compared(stats, against, model=model, **options)
        usage = [{"usage": one.frequency.tolist()} for one in against.layers.values()]
        data["against"] = {"layers": usage}
    sections = [f"<section><h2>{name}</h2>{_html(table)}</section>" for name, table in parts.items()]
    values = {
        "title": html.escape(data["title"]),
        "tokens": f"{stats.num_tokens:,}",
        "answer": html.escape(ANSWERS[result["answer"]]),
        "reasons": "".join(f"<p>{html.escape(line)}</p>" for line in reasons(result)),
        "sections": "".join(sections),
        "style": STYLE.read_text(encoding="utf-8"),
        "script": SCRIPT.read_text(encoding="utf-8"),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    with replacing(path) as part:
        part.write_text(Template(PAGE.read_text(encoding="utf-8")).substitute(values), encoding="utf-8")
    return result


def reasons(result: dict) -> list[str]:
    """Why the verdict is what it is, and what to do, in sentences."""
    layers, families = result["layers"], int(result["layers"]["families"].sum())
    table = result["forecast"].set_index("share gone")
    left, unrelated = layers["left"].mean(), layers["unrelated"].mean()
    resisting = ", ".join(map(str, result["resisting"])) or "none"
    bits = ", ".join(f"{bit} bits {error:.3f}" for bit, error in ROUNDED.items())
    return [
        f"Families: in {families} of {len(layers)} layers the experts are more alike than unrelated experts "
        f"would be. Groups of half as many leave {left:.0%} of the outputs' spread within them; of unrelated "
        f"experts {unrelated:.0%}.",
        f"Cost: {result['share']:.0%} of the experts could go at a predicted relative error of at most "
        f"{BEARABLE}; a quarter at {table['by cost'][0.25]:.2f}, half at {table['by cost'][0.5]:.2f}. For "
        f"comparison, rounding leaves in the weights: {bits}. Predictions are lower bounds: averaged weights "
        "do not give the average output.",
        f"Layers that resist: {resisting}.",
        f"What to do: {ADVICE[result['answer']]}",
        f"By {result['basis']}."
        + ("" if "token" in result["basis"] else ' Capture with "--for all" to judge token by token.'),
    ]


def _tables(stats, model, result, options):
    """Tables of the report by heading."""
    linkage, similarity = options["linkage"], options["similarity"]
    half = max(1, min(sums.num_experts for sums in stats.layers.values()) // 2)
    quality = quality_table(stats, model, similarity=similarity, linkages=[linkage], groups=half)
    layers = result["layers"].assign(families=result["layers"]["families"].map({True: "yes", False: "no"}))
    columns = ["cophenetic correlation", "silhouette", "largest", "alone"]
    together = [layers, quality[columns], usage_table(stats).drop(columns="layer")]
    names = {"left": "spread left at half", "unrelated": "of unrelated experts"}
    names |= {"largest": "largest group at half", "alone": "alone at half"}
    every = pd.concat(together, axis=1).rename(columns=names).rename_axis("layer").reset_index()
    shown = result["forecast"].iloc[3::4]
    shown = shown.assign(**{"share gone": shown["share gone"].map("{:.1%}".format)})
    return {"What it costs to let experts go": shown, "Every layer": every}


def _html(table):
    text = table.to_html(index=False, border=0, float_format="{:.3f}".format, na_rep="")
    return f'<div class="scroll">{text}</div>'


def report(source: str, out: str | Path, *, against: str = "", options: dict, **calibration: Any) -> str:
    """Write a report of a statistics file or of a model, which is captured; returns the verdict in words."""
    (stats, model), other = _statistics(source, calibration), None
    if against:
        other = _statistics(against, calibration)[0]
    result = write_report(stats, out, model=model, against=other, **options)
    return "\n".join([ANSWERS[result["answer"]], *reasons(result), f"wrote {out}"])


def _statistics(source, calibration):
    """Statistics of a file or a model, and the model."""
    if str(source).endswith(".safetensors"):
        return load_statistics(source), None
    from hcsmoe_core.checkpoint import load_model

    places = {key: calibration.pop(key) for key in ("dtype", "device")}
    model, tokenizer = load_model(source, **places)
    return cached_statistics(model, tokenizer, **calibration), model
