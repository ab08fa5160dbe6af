"""What is in a file or folder of ours, how two plans differ, what a method is made of: as lines of text."""

import inspect
import textwrap
import typing
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import adjusted_rand_score

from hcsmoe_core._util import check_choice, folder_of, require
from hcsmoe_core.checkpoint import load_skeleton, merge_record
from hcsmoe_core.clustering import linkage
from hcsmoe_core.methods import METHODS, RECOMMENDED, resolve
from hcsmoe_core.methods.summary import summarise
from hcsmoe_core.plan import load_plan
from hcsmoe_core.similarity import distances, metric_of
from hcsmoe_core.statistics import load_statistics
from hcsmoe_core.studies.cost import amount
from hcsmoe_core.studies.tables import layer_table, model_size, usage_table

WIDTH = 80  # columns of a terminal
LEGEND = """saved: share of the expert weights. moved: share of the routing mass that goes to experts that are
joined or dropped. entropy: of the routing, in nats, before and after. error: predicted relative error of the
experts' outputs, where the statistics tell it; of other plans it is known after the merge."""


def wrapped(text: str, *, hang: int = 2) -> str:
    """Lines of text of at most 80 columns; what continues a line stands ``hang`` further right.

    A line that says what was written stays whole, so that its path can be copied.
    """
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        options = dict(subsequent_indent=indent + " " * hang, break_long_words=False, break_on_hyphens=False)
        lines += (
            [line]
            if len(line) <= WIDTH or line.startswith("wrote")
            else textwrap.wrap(line, WIDTH, **options)
        )
    return "\n".join(lines)


def _short(layer):
    return layer if len(layer) <= 30 else f"…{layer[-29:]}"


def plan_table(stats: Any, plan: Any) -> str:
    """What a plan does to each layer, from the statistics alone: see :data:`LEGEND`."""
    lines = [f"{'layer':<30}{'experts':>10}{'saved':>8}{'moved':>8}{'entropy':>14}{'error':>9}"]
    for layer in plan.layers:
        cut, width = summarise(stats, layer.name, layer.labels), stats.model["layers"][layer.name]["width"]
        saved = 1 - layer.num_groups * (layer.width or width) / width / len(layer.labels)
        error = cut["output_error"] if np.isnan(cut["function_error"]) else cut["function_error"]
        rule = {"align": "none"} | layer.combine
        averaged = layer.router == "mapped" and rule == {"rule": "average", "align": "none"}
        known = averaged and not (layer.rules or layer.width or np.isnan(error))
        cells = (
            f"{layer.num_groups} of {len(layer.labels)}",
            "later" if plan.compress else f"{saved:.1%}",
            f"{cut['moved']:.1%}",
            f"{cut['entropy']:.2f} to {cut['entropy_after']:.2f}",
            f"{error:.3f}" if known else "later",
        )
        lines.append(f"{_short(layer.name):<30}" + "{:>10}{:>8}{:>8}{:>14}{:>9}".format(*cells))
    widths = sorted({layer.width for layer in plan.layers if layer.width})
    lines += [f"width of each expert: {' or '.join(map(str, widths))}"] if widths else []
    return "\n".join([*lines, *textwrap.wrap(LEGEND, WIDTH)])


def describe(path: str) -> str:
    """What a model folder, a merged one, a statistics file or a plan holds.

    Parameters
    ----------
    path : str
        A file, a folder, or a model as for :func:`hcsmoe_core.load_model`, of which no weight is read.
    """
    kinds = {".json": _plan_text, ".safetensors": _statistics_text}
    file = Path(path).suffix in kinds and not Path(path).is_dir()
    return kinds[Path(path).suffix](path) if file else _model_text(path)


def _facts(**facts):
    return [
        f"{name.replace('_', ' '):<16}{value}" for name, value in facts.items() if value not in ("", None)
    ]


def _plan_text(path):
    plan = load_plan(path)
    lines = _facts(
        plan_for=plan.model.get("name", "any model (written by hand)"),
        settings=" ".join(f"{name}={value}" for name, value in plan.settings.items()),
        tokens=plan.statistics.get("tokens"),
        merge_needs="its statistics (--statistics FILE)" if plan.needs_sample else "nothing but the model",
    )
    lines.append(f"{'layer':<30}{'experts':>10}{'largest group':>15}{'alone':>7}  router")
    for layer in plan.layers:
        sizes = [len(members) for members in layer.groups()]
        cells = (f"{len(sizes)} of {len(layer.labels)}", max(sizes), sizes.count(1), layer.router)
        lines.append(f"{_short(layer.name):<30}" + "{:>10}{:>15}{:>7}  {}".format(*cells))
    return "\n".join(lines)


def _statistics_text(path):
    stats = load_statistics(path)
    serves = [name for name in METHODS if set(resolve(name).needs) <= set(stats.needs)]
    facts = _facts(
        statistics_of=f"{stats.model['name']} ({stats.model['class']})",
        tokens=f"{stats.num_tokens:,} in {len(stats.sequences)} sequences",
        domains=", ".join(stats.domains),
        hold=", ".join(stats.needs),
        serve=", ".join(serves),
    )
    table = usage_table(stats).round(3).assign(layer=[*map(_short, stats.layers)])
    return "\n".join([*facts, table.to_string(index=False)])


def _model_text(path):
    skeleton, plan = load_skeleton(path), Path(path) / "plan.json"
    size, table, mapped = model_size(skeleton), layer_table(skeleton), merge_record(folder_of(path))
    shown = "mapped checkpoint; sizes of the original" if mapped else "plain checkpoint; sizes as merged"
    facts = _facts(
        model=f"{path} ({type(skeleton).__name__})",
        merged=f"by {plan} ({shown})" if plan.is_file() else "",
        dtype=str(skeleton.dtype).removeprefix("torch."),
        weights=f"{amount(size['weights'])}, {amount(size['bytes'])}B",
        expert_weights=f"{size['expert_weights'] / size['weights']:.0%} of them",
    )
    rows = table.assign(layer=[*map(_short, table["layer"])]).to_string(index=False)
    return "\n".join([*facts, rows, *([_plan_text(plan)] if plan.is_file() else [])])


def difference(first: Any, second: Any) -> str:
    """Settings, layers and groups in which two plans differ; agreement is the adjusted Rand index."""
    pairs = {
        name: [plan.settings.get(name, "–") for plan in (first, second)]
        for name in first.settings | second.settings
    }
    lines = [f"{name}: {old} → {new}" for name, (old, new) in pairs.items() if old != new]
    shapes = [[(layer.name, len(layer.labels)) for layer in plan.layers] for plan in (first, second)]
    require(shapes[0] == shapes[1], "These plans are of models of other shapes.")
    differing = [pair for pair in zip(first.layers, second.layers, strict=True) if pair[0] != pair[1]]
    for old, new in differing:
        agreement = adjusted_rand_score(old.labels, new.labels)
        lines.append(f"{old.name}: {old.num_groups} → {new.num_groups} experts, agreement {agreement:.3f}")
        for mark, one, other in (("-", old, new), ("+", new, old)):
            lines += [f"  {mark} {' '.join(map(str, g))}" for g in one.groups() if g not in other.groups()]
    same = len(first.layers) - len(differing)
    return "\n".join([*lines, f"{same} of {len(first.layers)} layers are the same"])


def explain(name: str) -> str:
    """One method: its row of the table, then each of its steps with its options and what it does."""
    recipe = resolve(name)
    method = METHODS[recipe.method]
    lines = [f"{recipe.method}: {method.title}", *(["also: " + RECOMMENDED] if name == RECOMMENDED else [])]
    lines += _facts(paper=method.paper, cost=method.cost, needs=", ".join(recipe.needs))
    for step in {step.name: step for step in recipe.present.values()}.values():
        lines += ["", f'{step.kind} "{step.name}"']
        told = (inspect.getdoc(step.function) or "").partition("\n\nParameters")[0]
        lines += ["  " + " ".join(part.split()) for part in told.split("\n\n")]
        for option, default in step.options.items():
            chosen = recipe.options.get(option, default)
            literal = typing.get_origin(hint := step.hints.get(option)) is typing.Literal
            choices = f", one of {', '.join(map(str, typing.get_args(hint)))}" if literal else ""
            lines.append(f"  --set {option}={chosen}{choices}")
    return "\n".join(lines)


def draw(stats: Any, kind: str, *, layer: int = 0, experts: int | None = None, model: Any = None, **how: str):
    """A figure of statistics.

    Parameters
    ----------
    stats : Statistics
    kind : {"heatmap", "dendrogram", "layers"}
    layer : int
        Number of the MoE layer, from 0; of ``"layers"`` all are drawn.
    experts : int, optional
        Groups that are coloured.
    model : transformers.PreTrainedModel, optional
        Where the similarity looks at weights.
    **how
        ``similarity``, ``metric`` and ``linkage``, as for :func:`hcsmoe_core.methods.merge_tree`.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from hcsmoe_core.ui import figures

    check_choice("kind", kind, ("heatmap", "dendrogram", "layers"))
    link, options = how.pop("linkage"), how | {"model": model}
    names = list(stats.layers) if kind == "layers" else [stats.layer_name(layer)]
    apart = [distances(stats, name, **options) for name in names]
    trees = [linkage(d, link, metric=metric_of(how["similarity"], how["metric"])) for d in apart]
    look = dict(groups=experts, label=f"{how['similarity']} distance between experts")
    if kind == "layers":
        return figures.layer_grid(apart, trees, **look)
    look |= dict(usage=stats.layer(layer).frequency.numpy(), title=_short(names[0]))
    if kind == "dendrogram":
        return figures.dendrogram(trees[0], **look)
    return figures.similarity_heatmap(apart[0], trees[0], width=figures.PAGE * 0.7, **look)
