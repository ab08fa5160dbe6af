"""The whole road as one function: from a model to a smaller checkpoint that was measured.

:func:`shrink` takes, beside the model:

``experts`` or ``plan``
    Experts kept per layer, or a share of them below 1; or a plan (its file) that was made before.
``method``, ``plan_seed``, and any step or option by name (``linkage="ward"``)
    As for :func:`hcsmoe_core.make_plan`.
``calibration``, ``sequences``, ``length``, ``column``, ``calibration_seed``
    As for :func:`hcsmoe_core.calibration_tokens`. Without a calibration, where the usual one is unavailable,
    a model in memory writes its own text.
``statistics``
    Statistics (their file) to plan from, or which the plan needs; by default they are captured.
``sample``, ``every``, ``batch_size``
    As for :func:`hcsmoe_core.capture`.
``until_stable``, ``until_excess``
    Stop the capture early: ``agreement`` or ``excess`` of
    :func:`hcsmoe_core.studies.stability.capture_until_stable`.
``out``, ``router``
    Folder to write, as for :func:`hcsmoe_core.save_merged`; without it the merged model stays in memory.
``fidelity``
    Held-out sequences on which the result is compared with the original; 0 for none.
``dtype``, ``device``, ``load``, ``memory``, ``trust_remote_code``
    As for :func:`hcsmoe_core.open_model`. A model that does not fit into memory goes through layer by layer,
    and an interrupted run goes on when it is called again. Under ``torchrun``, ranks share the capture.
"""

import contextlib
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hcsmoe_core import checkpoint, families, merging, moe
from hcsmoe_core._util import (
    EMBEDDED,
    InputError,
    check_absent,
    check_choice,
    output_path,
    require,
    sha256_json,
)
from hcsmoe_core.checkpoint import export
from hcsmoe_core.collect import needs_of
from hcsmoe_core.methods import METHODS, RECOMMENDED, make_plan, resolve
from hcsmoe_core.methods.planner import kept_experts
from hcsmoe_core.methods.residual import held_out
from hcsmoe_core.plan import JOINED, Plan, load_plan
from hcsmoe_core.scale import ranks, streaming
from hcsmoe_core.score import fidelity as scoring
from hcsmoe_core.statistics import SAMPLE, Statistics, load_statistics, sequence_hashes
from hcsmoe_core.studies import cache, cost, stability, tables
from hcsmoe_core.text.calibration import calibration_settings, calibration_tokens, domains_of, own_sequences
from hcsmoe_core.text.own_text import GRAM, NAME, repetition

HELD_OUT = 512  # tokens per held-out sequence, at most
LOADING = {
    "plain": "load it with any loader of the original family",
    "mapped": "load it with hcsmoe_core.load_merged, or transformers with trust_remote_code=True",
}


def shrink(
    model: str,
    *,
    experts: int | float = 0,
    method: str = "hc-smoe",
    calibration: str = "",
    out: str | Path | None = None,
    plan: Plan | str | Path | None = None,
    statistics: Statistics | str | Path | None = None,
    router: str = "",
    fidelity: int = 10,
    sequences: int = 0,
    length: int = 0,
    column: str = "text",
    calibration_seed: int = 42,
    plan_seed: int = 0,
    sample: int = SAMPLE,
    every: int = 1,
    until_stable: float = 0.0,
    until_excess: float = 0.0,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
    load: str = "auto",
    memory: str = "",
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict | None:
    """Capture, plan, merge, write and measure a smaller model; the arguments are explained above.

    Returns what :func:`hcsmoe_core.save_merged` does (without a folder: ``model``, ``tokenizer`` and
    ``fidelity``), ``out``, ``plan`` and ``advice`` (text, or empty); ``out`` alone if it was complete before;
    None on every rank but the first.
    """
    settings = _checked(plan, experts, method, router, settings)
    where = dict(dtype=dtype, device=ranks.started(device), load=load, memory=memory)
    if out is not None and (streaming.tidied(out) or check_absent(out)):
        return {"out": Path(out)}
    plan, stats, text, advice = *_files(plan, statistics, method, settings), None, ""
    captures = plan is None and stats is None
    rows = sample if captures and "sample" in resolve(method, **settings).needs else 0
    where |= dict(work=_work(model, calibration, sequences, length, batch_size, rows, fidelity))
    loaded, tokenizer = streaming.open_model(model, trust_remote_code=trust_remote_code, **where)
    experts = _check_loaded(loaded, out, experts if plan is None else None)
    with streaming.work_folder(out, loaded) as work:
        if captures or (fidelity and (calibration or model in EMBEDDED)):
            source = (calibration, sequences, length, column, calibration_seed, fidelity)
            text = _text(loaded, tokenizer, *source)
        if captures:
            steps, options = resolve(method, **settings), dict(every=every, batch_size=batch_size)
            until = _until(until_stable, until_excess, [experts], steps.settings)
            stats = _captured(loaded, text, work, until, steps.needs, sample=sample, **options)
        if ranks.left():
            return None
        if plan is None:
            recipe = dict(method=method, experts=experts, seed=plan_seed) | settings
            plan = _planned(loaded, stats, work, recipe)
            advice = fidelity and _advice(loaded, stats, recipe)
        written = _written(loaded, tokenizer, plan, stats, text, out, work, router, captures)
    return written | {"out": out, "plan": plan, "advice": advice}


def capture_to_file(
    model: str,
    out: str | Path,
    *,
    methods: tuple = (),
    needs: tuple = (),
    stable_at: tuple = (),
    until_stable: float = 0.0,
    until_excess: float = 0.0,
    dtype: str = "auto",
    device: str = "auto",
    load: str = "auto",
    memory: str = "",
    trust_remote_code: bool = False,
    sample: int = SAMPLE,
    every: int = 1,
    batch_size: int = 8,
    **source: Any,
) -> str | None:
    """Capture a model's statistics to a file; the arguments are those of :func:`shrink`.

    Parameters
    ----------
    methods : sequence of str
        To collect for; ``["all"]`` for all.
    needs : sequence of str
        Names of :data:`hcsmoe_core.statistics.NEEDS` to collect instead.
    stable_at : sequence of int
        With ``until_…``: numbers of groups that have to be stable.
    **source
        ``calibration``, ``sequences``, ``length``, ``column`` and ``calibration_seed``.

    Returns
    -------
    str, or None on every rank but the first
        What was written, in a line.
    """
    output_path(out)
    names = list(METHODS) if list(methods) == ["all"] else methods or ["hc-smoe"]
    needs = needs_of((), needs) or tuple(
        dict.fromkeys(need for name in names for need in METHODS[resolve(name).method].needs)
    )
    until = _until(until_stable, until_excess, list(stable_at) or None)
    device = ranks.started(device)
    size = {"calibration": "", "sequences": 0, "length": 0}
    size = {name: source.get(name, default) for name, default in size.items()}
    work = _work(model, batch_size=batch_size, rows=sample if "sample" in needs else 0, **size)
    options = dict(load=load, memory=memory, work=work, trust_remote_code=trust_remote_code)
    loaded, tokenizer = streaming.open_model(model, dtype=dtype, device=device, **options)
    merged = any(layer.merged for layer in families.find_moe_layers(loaded))  # without any it is refused, too
    require(not merged, f"{model} is merged already; capture on the original.")
    with streaming.work_folder(out, loaded) as work:
        text = _text(loaded, tokenizer, **source)
        stats = _captured(loaded, text, work, until, needs, sample=sample, every=every, batch_size=batch_size)
        if ranks.left():
            return None
        stats.save(out)
    size = Path(out).stat().st_size / 1e6
    return f"wrote {out}: {stats.num_tokens:,} tokens, {len(stats.layers)} MoE layers, {size:.1f} MB"


def _work(model, calibration, sequences, length, batch_size, rows, fidelity=0):
    """The ``work`` of :func:`open_model`."""
    size = calibration_settings(str(model), calibration, sequences, length)
    count, length = size["sequences"], size["length"]
    heldout = min(length, HELD_OUT) if fidelity else 0
    return {"batch": min(count, batch_size) * length, "rows": min(rows, count * length), "heldout": heldout}


def _read(given, load):
    return load(given) if isinstance(given, str | Path) else given


def _checked(plan, experts, method, router, settings):
    """Settings of the method, after all that can be refused before a model is loaded."""
    check_choice("router", router, ("", *checkpoint.ROUTERS))
    require(
        (plan is None) != (experts == 0),
        "Give either a plan (--plan FILE) or the number of experts kept per layer (--experts, from 1 to the "
        "model's number), and not both.",
    )
    if plan is None:
        settings = settings | ({"router": router} if router in JOINED else {})
        resolve(method, **settings)
    return settings


def _files(plan, statistics, method, settings):
    """Plan and statistics, read if they are paths; InputError if the statistics cannot serve the method."""
    plan, stats = _read(plan, load_plan), _read(statistics, load_statistics)
    if plan is None and stats is not None:
        stats.check(resolve(method, **settings).needs, f"Method {method!r}")
    return plan, stats


def _check_loaded(model, out, experts):
    """Refuse a number of experts that no plan can have, and a streamed model that is not to be written."""
    if experts is not None:
        experts = kept_experts(experts, tables.model_size(model)["num_experts"])
    require(
        out is not None or moe.source_of(model) is None,
        'A streamed model can only be merged on disk; give the "out" argument, a new folder.',
    )
    return experts


class _Text(NamedTuple):
    """Calibration tokens, what they are, and as many of the same source with some after them."""

    input_ids: torch.Tensor
    domains: list | None
    about: str
    more: torch.Tensor


def _text(
    model, tokenizer, calibration="", sequences=0, length=0, column="text", calibration_seed=42, heldout=0
):
    """Calibration tokens; text of the model's own where none was asked for and the usual is unavailable."""
    source, count, size = calibration_settings(model.name_or_path, calibration, sequences, length).values()
    options = dict(model=model, length=size, seed=calibration_seed, column=column)
    try:
        input_ids = more = calibration_tokens(source, tokenizer, sequences=count, **options)
    except FileNotFoundError as error:
        if calibration or moe.source_of(model) is not None:  # what was asked for is never replaced
            raise
        print(f"hcsmoe: {error}\nNo calibration was given: the model writes its own text.", file=sys.stderr)
        return _text(model, tokenizer, NAME, sequences, length, column, calibration_seed, heldout)
    if heldout:
        with contextlib.suppress(InputError):  # there is not text enough for both
            more = calibration_tokens(source, tokenizer, sequences=count + heldout, **options)
    name = Path(source).name if Path(source).exists() else source
    about = f"{count} × {size} tokens of {name}, seed {calibration_seed}"
    if own_sequences(source, count):
        about += f", {repetition(input_ids):.1%} of {GRAM}-grams repeated"
        _say(f"calibrating on {about}")
    return _Text(input_ids, domains_of(source, count), about, more)


def _say(text):
    if ranks.rank() == 0:
        print(text)


def _until(stable, excess, experts, settings=None):
    """Options of :func:`hcsmoe_core.studies.stability.capture_until_stable`, if tokens may be left."""
    require(
        not (stable and excess),
        "Give one of --until-stable (groups agree) and --until-excess (groups cost as much), not both.",
    )
    settings = settings or {}
    trees = {name: settings[name] for name in ("similarity", "metric", "linkage") if name in settings}
    if settings.get("group") == "residual":
        trees["similarity"] = "functional-routed"  # of the distances it groups by, the one that tokens change
    limit = {"agreement": stable} if stable else {"excess": excess}
    return limit | trees | {"experts": experts} if stable or excess else {}


def _captured(model, text, work, until, needs, **options):
    """Statistics of a model, decoder layer by decoder layer where there is a work folder."""
    ids, domains = text.input_ids, text.domains
    size = dict(domains=len(set(domains or [""])), tokens=ids.numel(), sample=options["sample"])
    way = "" if work is None else ", decoder layer by decoder layer"
    _say(f"collecting {', '.join(needs)}{way}: {cost.expected_bytes(model, needs, **size) / 1e6:.1f} MB")
    options |= dict(needs=needs, domains=domains, ranks=ranks)
    if not until:
        return cache.captured(model, ids, work, **options)
    stats = stability.capture_until_stable(model, ids, **until, **options)
    _say(stability.stability_table(stats).round(3).to_string(index=False))
    state = "stable" if stats.stability["stable"] else "not stable yet"
    _say(f"{state} after {stats.num_tokens:,} of {ids.numel():,} tokens")
    return stats


def _planned(model, stats, work, recipe):
    """The plan; that of a streamed model is kept in the work folder, as making it may take long."""
    path = work and work / f"plan-{sha256_json([stats.identity(), recipe])[:12]}.json"
    if path and (plan := streaming.resumed(path, load_plan)):
        return plan
    plan = make_plan(stats, model, **recipe)
    if path:
        plan.save(path)
    return plan


def _written(model, tokenizer, plan, stats, text, out, work, router, captured):
    """Write the checkpoint with the fidelity that is measured, or leave the merged model in memory."""
    seen = (sequence_hashes(text.input_ids) if text else []) + (stats.sequences if stats else [])
    heldout = scoring.unseen(text.more, seen, length=HELD_OUT) if text else None
    card = {"calibration": text.about} if captured else {}
    options = dict(stats=stats, tokenizer=tokenizer, card=card)
    if work is not None:
        observer = None if heldout is None else scoring.observer(heldout)
        return streaming.stream_merged(model, plan, out, work, router=router, observer=observer, **options)
    plan, router = checkpoint.exported(plan, router)
    if out is not None:
        checkpoint.target_of(model, plan, router)  # what cannot be written is refused before it is measured
    merging.apply_plan(model, plan, stats)
    try:
        measured = None if heldout is None else scoring.fidelity(model, plan, heldout)
        if out is None:
            return {"model": model, "tokenizer": tokenizer, "fidelity": measured}
        return checkpoint.save_merged(model, plan, out, router=router, fidelity=measured, **options)
    finally:
        if out is not None:
            merging.restore(model)


def _advice(model, stats, recipe):
    """What the recommended method would lose by the statistics at hand, or what it takes to tell."""
    best = resolve(RECOMMENDED).method
    if resolve(recipe["method"]).method == best:
        return ""
    advice = f"Recommended: method {best!r} (--method {RECOMMENDED})"
    if moe.source_of(model) is not None:
        return f"{advice}."
    if not set(resolve(best).needs) <= set(stats.needs):
        return (
            f"{advice}; statistics for both tell how they compare: hcsmoe capture {model.name_or_path} "
            f"--for {recipe['method']},{RECOMMENDED} --out FILE.safetensors."
        )
    recommended = dict(experts=recipe["experts"], method=best)
    chosen, other = (residual(model, stats, **each) for each in (recipe, recommended))
    if chosen is None or other is None:
        return f"{advice}; how they compare shows only once both are measured, as the router chooses anew."
    return (
        f"{advice} would lose {other:.1%} of the layers' outputs on calibration tokens that plans are not "
        f"fitted to, {recipe['method']!r} {chosen:.1%}."
    )


def residual(model: Any, stats: Statistics, **recipe: Any) -> float | None:
    """Relative error of the layers' outputs that a plan leaves on held-out tokens of the sample.

    Three of four sequences make the plan, the others judge it: ``‖Y' − Y‖ / ‖Y‖``, the mean over layers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In memory; it is left as it was.
    stats : Statistics
        With the sample.
    **recipe
        As for :func:`hcsmoe_core.make_plan`.

    Returns
    -------
    float or None
        None where the router of the plan chooses anew; see :func:`layer_outputs`.
    """
    fitted, judges = split_sample(stats)
    layers = families.find_moe_layers(model)
    before = [layer_outputs(layer, judges) for layer in layers]
    merging.apply_plan(model, make_plan(fitted, model, progress=False, **recipe), fitted)
    try:
        after = [layer_outputs(layer, judges) for layer in layers]
    finally:
        merging.restore(model)
    if any(outputs is None for outputs in after):
        return None
    errors = [(new - old).norm() / old.norm() for old, new in zip(before, after, strict=True)]
    return float(torch.stack(errors).mean())


def split_sample(stats: Statistics) -> tuple[Statistics, Statistics]:
    """Statistics with the sample of three in four sequences, and with that of the others.

    Sequences of every domain are split, or whole domains where each has one sequence only.
    """
    domains, sequences = stats.sampled[:, 2].unique(), stats.sampled[:, [0, 2]].unique(dim=0)
    judges = held_out(stats.sampled, "sequences" if len(sequences) > len(domains) else "domains")
    return stability.with_rows(stats, ~judges), stability.with_rows(stats, judges)


@torch.no_grad()
def layer_outputs(layer: Any, stats: Statistics) -> torch.Tensor | None:
    """Output of a layer's experts for the sampled tokens, ``Σ_e g_e f_e(x)``.

    A merged layer's is that of the merged experts, with the gates as the router chose them before.

    Parameters
    ----------
    layer : MoELayer
    stats : Statistics
        With the sample.

    Returns
    -------
    (R, D) float64 tensor or None
        None where experts were dropped or the router was changed, as it then chooses anew.
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


def written_text(written: dict) -> str:
    """What :func:`shrink` wrote, what it was calibrated on, what engines ask, and how far it is from the
    original.

    The warning of the fidelity (``written["fidelity"]["warning"]``) is left to the caller.
    """
    out = written["out"]
    if "plan" not in written:
        return f"wrote {out}: complete; what an interrupted run had left beside it is removed"
    plan, measured = written["plan"], written["fidelity"]
    lines = [
        f"wrote {out}: {export.kept_of(plan)}",
        f"{written['parameters']:,} of {written['original']:,} weights, {written['bytes'] / 1e6:.1f} MB",
        f"{written['router']}; {LOADING[written['router']]}",
        f"measure it: hcsmoe evaluate {out}",
    ]
    if plan.statistics:
        lines.append(f"calibrated on {export.calibrated(plan)}; text of other kinds may lose more")
    lines += [f"- {line}" for line in written["limits"]]
    lines.append(
        "Fidelity was not measured, as no tokens were held out: see --fidelity and --calibration."
        if measured is None
        else _fidelity_lines(measured)
    )
    return "\n".join([*lines, *filter(None, [written["advice"]])])


def _fidelity_lines(measured):
    """What :func:`hcsmoe_core.score.fidelity.fidelity` measured, in lines for a terminal."""
    lines = [
        f"{'on ' + format(measured['tokens'], ',') + ' held-out tokens':<29}perplexity  KL, nats  same token"
    ]
    for name, scores in ({"original": measured["original"]} | measured["models"]).items():
        numbers = (scores["perplexity"] or math.nan, scores.get("kl", 0), scores.get("agreement", 1))
        lines += ["{:<29}{:>10.4g}{:>10.4g}{:>12.1%}".format(name, *numbers)]
    for name, scores in measured["models"].items():
        low, high = min(scores["block_error"]), max(scores["block_error"])
        lines += [
            f"relative error of the layers' outputs, {name}: {low:.3g} to {high:.3g} (see README.md there)"
        ]
    return "\n".join(lines)
