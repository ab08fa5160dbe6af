"""Predicted errors of layers against the loss that is really measured.

``python benchmarks/theory.py`` writes ``benchmarks/results/theory-MODEL.csv`` and ``theory.json`` for the
embedded models; plans that are done are kept under ``runs/theory``, so that it can be stopped and started
again. Notebook 10 reads them.

To second order in what the layers' outputs are off by, ``δ_l``, the next token's distribution p moves to p'
with ``KL(p ‖ p') ≈ ½ Σ_lm E[δ_lᵀ J_lᵀ F J_m δ_m]``, J_l the derivative of the logits by the output of layer l
and F the Fisher information of the softmax: the Kullback-Leibler divergence has no first-order term. The loss
gains as much where the model predicts the text's own distribution, since its gradient is then zero in the
mean. If errors of different layers are uncorrelated, the products with ``l ≠ m`` vanish in the mean, and what
is left is a sum of squares, ``ΔL ≈ Σ_l c_l ε_l²``, with ε_l the relative error of layer l and c_l how much
the loss feels it. (The same expansion is behind Optimal Brain Damage, LeCun et al., 1990, and layer-wise
sensitivities of quantisation, as in HAWQ-V2, Dong et al., 2020.)
"""

import argparse
import functools
import math
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from hcsmoe_core._util import EMBEDDED, check_choice, check_count, replacing, versions, write_json
from hcsmoe_core.checkpoint import load_model
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods import make_plan, resolve
from hcsmoe_core.methods.summary import summarise
from hcsmoe_core.replace import suspended
from hcsmoe_core.score.evaluation import perplexity
from hcsmoe_core.score.fidelity import fidelity
from hcsmoe_core.studies import runner
from hcsmoe_core.studies.cache import cached_statistics, slug
from hcsmoe_core.studies.comparison import fractions_of, read_table
from hcsmoe_core.studies.pipeline import layer_outputs, split_sample
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import calibration_settings, calibration_tokens, domains_of

PLANNED = ("hc-smoe", "hc-least-squares", "random", "selection", "trimming", "least-residual", "reap")
# What is known of a layer's error, from the least to the most that it takes to know it.
ERRORS = {
    "output_error": "mean outputs, from sums",
    "function_error": "outputs token by token, from sums",
    "fitted": "residual on the sample that rules are fitted to",
    "residual": "residual on a sample that is held out",
    "block": "measured on other text",
}


COMBINED = {
    "sum": lambda errors: (errors**2).sum(),
    "max": lambda errors: (errors**2).max(),
    "product": lambda errors: np.prod(1 + errors**2) - 1,
}


def measure(
    model,
    *,
    methods=PLANNED,
    experts=None,
    seed=0,
    text="demo",
    scored=10,
    dtype="float32",
    device="auto",
    folder="runs/theory",
    **source,
):
    """Make many plans from one statistics file, predict each layer's error, and measure layers' errors and
    the loss.

    Three of four calibration sequences make the plans; the errors of ``residual`` are over the others'
    sampled tokens. Plans that are done are kept, so that it can be stopped and started again.

    Parameters
    ----------
    model, dtype, device
        As for :func:`hcsmoe_core.load_model`.
    methods : sequence of str
    experts : sequence of int, optional
        By default 7/8, 3/4, a half and a quarter of them.
    seed : int
        Of the calibration sample, and of methods that use chance.
    text : str
        What is measured on; of ``"demo"``, held-out text of every domain.
    scored : int
        Sequences of that text, as long as those of the calibration.
    folder : str or path
        Plans go to a folder of the model's name in it.
    **source
        As for :func:`hcsmoe_core.text.calibration.calibration_settings`.

    Returns
    -------
    pandas.DataFrame
        One row per plan and layer: ``method``, ``kind``, ``experts``, ``layer``; predicted relative errors
        ``output_error``, ``function_error`` (:func:`hcsmoe_core.methods.summary.summarise`; NaN where experts
        get narrower), ``fitted`` and ``residual`` (NaN where experts are dropped, as the router then chooses
        anew); measured ones, ``block`` of the layer alone and ``hidden`` of the hidden states after it, all
        layers before it changed too (:func:`hcsmoe_core.score.fidelity.fidelity`); ``alone``, what the loss
        gains where only this layer is changed; and of the whole plan ``added``, what the loss gains, and
        ``kl``, in nats per token.

    Raises
    ------
    InputError
        Before anything is measured, if a method or a number of experts is unavailable.
    """
    recipes = {method: resolve(method) for method in methods}
    needs = tuple({need for recipe in recipes.values() for need in (*recipe.needs, "sample")})
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    size, source = model_size(loaded)["num_experts"], calibration_settings(model, **source)
    experts = list(experts or fractions_of(size, (7, 6, 4, 2), 8))
    for count in experts:
        check_count("experts", count, 1, size)

    @functools.cache
    def prepared():
        stats = split_sample(cached_statistics(loaded, tokenizer, **source, seed=seed, needs=needs))
        before = [[layer_outputs(layer, part) for part in stats] for layer in find_moe_layers(loaded)]
        options = dict(sequences=scored, length=source["length"], split="heldout" if text == "demo" else None)
        rows = calibration_tokens(text, tokenizer, model=loaded, seed=seed, **options)
        return stats, before, (rows, domains_of(text, scored))

    results = runner.measure(
        functools.partial(_errors, model=loaded, prepared=prepared),
        [{"method": method, "experts": count} for count in experts for method in methods],
        Path(folder) / slug(model),
        shared=source | dict(model=str(model), text=text, scored=scored, dtype=str(loaded.dtype), seed=seed),
        model=model_hash(loaded),
        description=f"theory {slug(model)}",
    )
    cell = ("method", "experts")
    return pd.DataFrame(
        {name: content[name] for name in cell} | {"kind": recipes[content["method"]].kind} | row
        for content in results
        for row in content["result"]
    )


def _errors(settings, *, model, prepared):
    """One row per layer of one plan; see :func:`measure`."""
    stats, before, text = prepared()
    fit, layers, loss, alone = stats[0], find_moe_layers(model), _loss(model, text), []
    plan = make_plan(fit, model, progress=False, **{n: settings[n] for n in ("experts", "method", "seed")})
    apply_plan(model, plan, fit)
    try:
        added = _loss(model, text) - loss
        after = [[layer_outputs(layer, part) for part in stats] for layer in layers]
        found = fidelity(model, plan, text[0], progress=False)
        for layer in layers:
            with suspended([other for other in layers if other is not layer]):
                alone.append(_loss(model, text) - loss)
    finally:
        restore(model)
    whole, rows = next(iter(found["models"].values())), []
    for i, layer in enumerate(plan.layers):
        row = {"layer": i, "added": added, "kl": whole["kl"], "alone": alone[i]}
        known = {} if layer.width else summarise(fit, layer.name, layer.labels)
        row |= {name: known.get(name, math.nan) for name in ("output_error", "function_error")}
        pairs = zip(("fitted", "residual"), before[i], after[i], strict=True)
        row |= {name: _relative(*pair) for name, *pair in pairs}
        rows.append(row | {"block": whole["block_error"][i], "hidden": whole["hidden_error"][i]})
    return settings | {"result": rows}


def _loss(model, text):
    return perplexity(model, text[0], domains=text[1])["mean_loss"]


def _relative(wanted, outputs):
    return math.nan if outputs is None else float((outputs - wanted).norm() / wanted.norm())


def table(path, model):
    """What this benchmark has kept; see :func:`hcsmoe_core.studies.comparison.read_table`."""
    return read_table(path, model, f"python benchmarks/theory.py --models {model}, or measure here")


def by_plan(frame, error="block"):
    """One row a plan: its layers' errors put together, beside what they cost.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`measure`.
    error : str
        Column of the layers' relative errors, such as those of :data:`ERRORS`.

    Returns
    -------
    pandas.DataFrame
        ``method``, ``kind``, ``experts``; ``sum``, ``max`` and ``product`` of the layers' squared errors ε²,
        the last ``Π_l (1 + ε_l²) − 1``; ``added``, ``kl``; ``alone``, the sum over layers of what the loss
        gains by each alone. Plans for which the error is not known are left out.
    """
    rows = []
    for (method, experts), part in frame.groupby(["method", "experts"], sort=False):
        errors = part[error].to_numpy(float)
        if not np.isnan(errors).any():
            row = {"method": method, "kind": part["kind"].iloc[0], "experts": experts}
            row |= {name: float(put(errors)) for name, put in COMBINED.items()}
            rows.append(
                row | {key: part[key].iloc[0] for key in ("added", "kl")} | {"alone": part["alone"].sum()}
            )
    return pd.DataFrame(rows)


def agreement(frame, *, target="added", least=1e-3):
    """How well each error, put together in each way, foretells what plans cost: one row for each.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`measure`.
    target : {"added", "kl"}
    least : float
        Plans that cost less, in nats a token, are left out of the fit, as they are in the noise.

    Returns
    -------
    pandas.DataFrame
        ``error``, ``over`` (layers: sum, max or product), ``plans``; ``spearman``, the rank correlation with
        the target; ``slope`` and ``factor`` of the least-squares fit ``log target = slope · log error + log
        factor``, and ``spread``, the factor by which the target is off from it (the exponential of the
        residuals' standard deviation).
    """
    check_choice("target", target, ("added", "kl"))
    rows = []
    for error in ERRORS:
        plans = by_plan(frame, error)
        for over in COMBINED if len(plans) > 2 else ():
            row = {"error": error, "over": over, "plans": len(plans)}
            row["spearman"] = float(spearmanr(plans[over], plans[target])[0])
            rows.append(row | fitted_line(plans[over], plans[target], least=least))
    return pd.DataFrame(rows)


def fitted_line(x, y, *, least=1e-3):
    """Slope, factor and spread of ``log y = slope · log x + log factor`` by least squares, over points with y
    of ``least``.

    Returns
    -------
    dict
        NaN with fewer than three points.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    good = (x > 0) & (y >= least)
    if good.sum() < 3 or np.ptp(x[good]) == 0:
        return dict.fromkeys(("slope", "factor", "spread"), math.nan)
    x, y = np.log(x[good]), np.log(y[good])
    slope, start = np.polyfit(x, y, 1)
    return {
        "slope": float(slope),
        "factor": math.exp(start),
        "spread": math.exp(np.std(y - slope * x - start, ddof=2)),
    }


def sensitivities(frame, error="block", *, least=1e-3):
    """How much the loss feels each layer's error: ``c_l``, what it gains by layer l alone over ε_l², of many
    plans.

    Parameters
    ----------
    frame : pandas.DataFrame
        Of :func:`measure`.
    error : str
    least : float
        Gains below it are left out.

    Returns
    -------
    pandas.DataFrame
        By ``layer``: ``plans``, ``median``, and the quartiles ``low`` and ``high``. They would be equal if
        the expansion were exact, whatever the plan.
    """
    good = frame[(frame["alone"] >= least) & (frame[error] > 0)]
    ratio = (good["alone"] / good[error] ** 2).groupby(good["layer"])
    table = (
        ratio.quantile([0.25, 0.5, 0.75]).unstack().rename(columns={0.25: "low", 0.5: "median", 0.75: "high"})
    )
    return table.assign(plans=ratio.size())[["plans", "low", "median", "high"]].reset_index()


def predicted(frame, error="block", *, least=1e-3):
    """What each plan is predicted to cost, ``Σ_l c_l ε_l²``, the c_l taken from plans of other methods alone.

    Parameters
    ----------
    frame, error, least
        As for :func:`sensitivities`.

    Returns
    -------
    pandas.DataFrame
        :func:`by_plan` with ``predicted``; ``ratio``, what it cost over that; ``compounds``, what it cost
        over the sum of what each layer costs alone: above 1 where errors add up to more than their parts,
        below where the loss saturates. Plans that cost less than ``least``, or for which no c_l are known,
        are left out; those furthest off come first.
    """
    plans, costs = by_plan(frame, error), []
    for row in plans.to_dict("records"):
        others = sensitivities(frame[frame["method"] != row["method"]], error, least=least).set_index(
            "layer"
        )["median"]
        part = frame[(frame["method"] == row["method"]) & (frame["experts"] == row["experts"])].set_index(
            "layer"
        )
        costs.append(float((others * part[error] ** 2).sum(skipna=False)) if len(others) else math.nan)
    plans = plans.assign(predicted=costs)
    plans = plans[(plans["added"] >= least) & (plans["predicted"] > 0)]
    plans = plans.assign(ratio=plans["added"] / plans["predicted"], compounds=plans["added"] / plans["alone"])
    return plans.loc[np.log(plans["ratio"]).abs().sort_values(ascending=False).index]


def main():
    """Measure, write the tables and print how well each error foretells."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(EMBEDDED))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    for name in options.models:
        frame = measure(name, seed=options.seed)
        with replacing(options.out / f"theory-{name}.csv") as part:
            frame.round(6).to_csv(part, index=False)
        print(agreement(frame).round(2).to_string(index=False))
    write_json(
        options.out / "theory.json", {"seed": options.seed, "methods": PLANNED, "versions": versions()}
    )


if __name__ == "__main__":
    main()
