"""Predicted errors of layers against the loss that is really measured.

To second order in what the layers' outputs are off by, ``δ_l``, the next token's distribution p moves to p' with
``KL(p ‖ p') ≈ ½ Σ_lm E[δ_lᵀ J_lᵀ F J_m δ_m]``, J_l the derivative of the logits by the output of layer l and F the Fisher
information of the softmax: the Kullback-Leibler divergence has no first-order term. The loss gains as much where the model
predicts the text's own distribution, since its gradient is then zero in the mean. If errors of different layers are
uncorrelated, the products with ``l ≠ m`` vanish in the mean, and what is left is a sum of squares,
``ΔL ≈ Σ_l c_l ε_l²``, with ε_l the relative error of layer l and c_l how much the loss feels it. (The same expansion is behind
Optimal Brain Damage, LeCun et al., 1990, and layer-wise sensitivities of quantisation, as in HAWQ-V2, Dong et al., 2020.)
"""

import math
from dataclasses import fields, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from hcsmoe_core._util import check_choice, check_count, kept, place
from hcsmoe_core.checkpoint import load_model
from hcsmoe_core.families import find_moe_layers, model_hash
from hcsmoe_core.merging import apply_plan, restore
from hcsmoe_core.methods.planner import METHODS, kind_of, make_plan, steps_of
from hcsmoe_core.methods.residual import held_out
from hcsmoe_core.methods.summary import summarise
from hcsmoe_core.replace import lay_experts, lift_experts
from hcsmoe_core.score.evaluation import perplexity
from hcsmoe_core.score.fidelity import fidelity
from hcsmoe_core.statistics import LayerSample
from hcsmoe_core.studies.cache import calibration_of, core_hash, slug, statistics
from hcsmoe_core.studies.comparison import read_table
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import calibration_tokens, domains_of

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
    calibration="",
    sequences=0,
    length=0,
    text="demo",
    scored=10,
    dtype="float32",
    device="auto",
    folder="runs/theory",
):
    """Make many plans from one statistics file, predict each layer's error, and measure layers' errors and the loss.

    Three of four calibration sequences make the plans; the errors of ``residual`` are over the others' sampled tokens. Plans
    that are done are kept, so that it can be stopped and started again.

    Parameters
    ----------
    model : str
        As for :func:`hcsmoe_core.load_model`.
    methods : sequence of str
        Names of :data:`hcsmoe_core.methods.planner.METHODS`.
    experts : sequence of int, optional
        By default 7/8, 3/4, a half and a quarter of them.
    seed : int
        Of the calibration sample, and of methods that use chance.
    calibration, sequences, length
        As for :func:`hcsmoe_core.studies.cache.calibration_of`.
    text : str
        What is measured on; of ``"demo"``, held-out text of every domain.
    scored : int
        Sequences of that text, as long as those of the calibration.
    dtype, device : str
    folder : str or path
        Plans go to a folder of the model's name in it.

    Returns
    -------
    pandas.DataFrame
        One row a plan and layer: ``method``, ``kind``, ``experts``, ``layer``; predicted relative errors ``output_error``,
        ``function_error`` (:func:`hcsmoe_core.methods.summary.summarise`; NaN where experts get narrower), ``fitted`` and ``residual``
        (of :func:`given`; NaN where experts are dropped, as the router then chooses anew); measured ones, ``block`` of the
        layer alone and ``hidden`` of the hidden states after it, all layers before it changed too
        (:func:`hcsmoe_core.score.fidelity.fidelity`); ``alone``, what the loss gains where only this layer is changed; and of the
        whole plan ``added``, what the loss gains, and ``kl``, in nats a token.

    Raises
    ------
    ValueError
        Before anything is measured, if a method or a number of experts is not to be had.
    """
    import pandas as pd

    needs = {need for m in methods for need in steps_of(check_choice("methods", m, tuple(METHODS))).needs()}
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    size, source = model_size(loaded)["num_experts"], calibration_of(model, calibration, sequences, length)
    experts = list(experts or dict.fromkeys(max(1, size * part // 8) for part in (7, 6, 4, 2)))
    for count in experts:
        check_count("experts", count, 1, size)
    shared = {
        "model": str(model),
        "hash": model_hash(loaded),
        "core": core_hash(),
        "text": text,
        "scored": scored,
    }
    shared |= source | {"dtype": str(loaded.dtype), "seed": seed}
    made, rows = {}, []

    def measured(cell):
        if not made:
            made["stats"] = split_sample(
                statistics(loaded, tokenizer, **source, seed=seed, needs=(*needs, "sample"))
            )
            made["before"] = [
                [given(layer, part) for part in made["stats"]] for layer in find_moe_layers(loaded)
            ]
            how = dict(sequences=scored, length=source["length"], split="heldout" if text == "demo" else None)
            made["text"] = (
                calibration_tokens(text, tokenizer, model=loaded, seed=seed, **how),
                domains_of(text, scored),
            )
        options = dict(experts=cell["experts"], method=cell["method"], seed=seed)
        return _errors(loaded, **made, options=options)

    cells = [{"method": m, "experts": r} for r in experts for m in methods]
    for cell in tqdm(cells, desc=f"theory {slug(model)}", unit="plan"):
        found = kept(place(folder) / slug(model), shared | cell, lambda cell=cell: measured(cell))
        rows += [cell | {"kind": kind_of(cell["method"])} | row for row in found["result"]]
    return pd.DataFrame(rows)


def split_sample(stats):
    """Statistics with the sample of three in four sequences, and with that of the others.

    Sequences of every domain are split, or whole domains where each has one sequence only.
    """
    domains, sequences = stats.sampled[:, 2].unique(), stats.sampled[:, [0, 2]].unique(dim=0)
    decides = held_out(stats.sampled, "sequences" if len(sequences) > len(domains) else "domains")

    def part(chosen):
        def some(sample):
            return LayerSample(*(getattr(sample, f.name)[chosen] for f in fields(sample)))

        layers = {name: replace(sums, sample=some(sums.sample)) for name, sums in stats.layers.items()}
        return replace(stats, layers=layers, sampled=stats.sampled[chosen])

    return part(~decides), part(decides)


def _errors(model, stats, before, text, options):
    """One row a layer of one plan; see :func:`measure`."""
    fit = stats[0]
    plan = make_plan(fit, model, progress=False, **options)
    layers, loss, alone = find_moe_layers(model), _loss(model, text), []
    apply_plan(model, plan, fit)
    try:
        added = _loss(model, text) - loss
        after = [[given(layer, part) for part in stats] for layer in layers]
        found = fidelity(model, plan, text[0], progress=False)
        lifted = {layer.name: lift_experts(layer) for layer in layers}
        for layer in layers:
            lay_experts(layer, lifted[layer.name])
            alone.append(_loss(model, text) - loss)
            lift_experts(layer)
    finally:
        restore(model)
    whole, rows = next(iter(found["models"].values())), []
    for at, layer in enumerate(plan.layers):
        row = {"layer": at, "added": added, "kl": whole["kl"], "alone": alone[at]}
        known = {} if layer.width else summarise(fit, layer.name, layer.labels)
        row |= {key: known.get(key, math.nan) for key in ("output_error", "function_error")}
        row |= {
            key: _relative(*pair)
            for key, *pair in zip(("fitted", "residual"), before[at], after[at], strict=True)
        }
        rows.append(row | {"block": whole["block_error"][at], "hidden": whole["hidden_error"][at]})
    return rows


def _loss(model, text):
    rows, domains = text
    return perplexity(model, rows, domains=domains)["mean_loss"]


@torch.no_grad()
def given(layer, stats):
    """What a layer's experts give together for the sampled tokens, ``Σ_e g_e f_e(x)`` ``(R, D)`` float64.

    A merged layer's are those of the merged experts, with the gates as the router chose them before; None where experts were
    dropped or the router was changed, as it then chooses anew.

    Parameters
    ----------
    layer : MoELayer
    stats : Statistics
        With the sample.

    Returns
    -------
    (R, D) float64 tensor or None
    """
    sample, labels = stats.layers[layer.name].sample, list(range(layer.num_experts))
    if layer.merged:
        if layer.experts._merged.routed != layer.num_experts:
            return None
        labels = layer.experts._merged.labels
    total = torch.zeros(sample.inputs.shape, dtype=torch.float64)
    for expert in range(layer.num_stored):
        gates = sample.gates[:, [e for e, label in enumerate(labels) if label == expert]].sum(1)
        rows = gates.nonzero()[:, 0]
        hidden = layer.expert_hidden(expert, sample.inputs[rows].to(layer.device))
        total[rows] += gates[rows, None] * layer.expert_output(expert, hidden).double().cpu()
    return total


def _relative(wanted, made):
    return math.nan if made is None else float((made - wanted).norm() / wanted.norm())


def table(path, model):
    """What ``benchmarks/theory.py`` has kept; see :func:`hcsmoe_core.studies.comparison.read_table`."""
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
        ``method``, ``kind``, ``experts``; ``sum``, ``max`` and ``product`` of the layers' squared errors ε², the last
        ``Π_l (1 + ε_l²) − 1``; ``added``, ``kl``; ``alone``, the sum over layers of what the loss gains by each alone.
        Plans for which the error is not known are left out.
    """
    import pandas as pd

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
        ``error``, ``over`` (layers: sum, max or product), ``plans``; ``spearman``, the rank correlation with the target;
        ``slope`` and ``factor`` of the least-squares fit ``log target = slope · log error + log factor``, and ``spread``,
        the factor by which the target is off from it (the exponential of the residuals' standard deviation).
    """
    import pandas as pd
    from scipy.stats import spearmanr

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
    """Slope, factor and spread of ``log y = slope · log x + log factor`` by least squares, over points with y of ``least``.

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
    """How much the loss feels each layer's error: ``c_l``, what it gains by layer l alone over ε_l², of many plans.

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
        By ``layer``: ``plans``, ``median``, and the quartiles ``low`` and ``high``. They would be equal if the expansion were
        exact, whatever the plan.
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
        :func:`by_plan` with ``predicted``; ``ratio``, what it cost over that; ``compounds``, what it cost over the sum of what
        each layer costs alone: above 1 where errors add up to more than their parts, below where the loss saturates. Plans
        that cost less than ``least``, or for which no c_l are known, are left out; those furthest off come first.
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
