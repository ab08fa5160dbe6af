"""Tables of a model, its statistics and a plan, and files of tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import adjusted_rand_score, mutual_info_score

from hcsmoe_core import demo
from hcsmoe_core._util import check_choice, replacing
from hcsmoe_core.clustering import cut
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.methods.similarities import allowed_linkages
from hcsmoe_core.methods.summary import summarise


def layer_table(model: Any) -> Any:
    """What is in a model: one row per MoE layer, as a pandas.DataFrame."""
    rows = []
    for layer in find_moe_layers(model):
        size = sum(t.numel() * t.element_size() for t in layer.tensors().values())
        row = {"layer": layer.name, "experts": layer.num_experts, "top-k": layer.top_k}
        row |= {"hidden": layer.hidden_size, "width": layer.width, "experts, MB": round(size / 1e6, 2)}
        rows.append(row)
    return pd.DataFrame(rows)


def usage_table(stats: Any) -> Any:
    """How evenly each layer's experts are used, and how much they tell of the text: one row per MoE layer.

    Returns
    -------
    pandas.DataFrame
        ``least used`` and ``most used``, relative to an equal share of the routed tokens; ``unused``, the
        number of experts that no token was routed to; ``information, nats``, the mutual information of expert
        and domain over routed pairs (0: routing does not depend on the domain).
    """
    rows = []
    for name, layer in stats.layers.items():
        share = layer.frequency * len(layer.frequency)
        information = mutual_info_score(None, None, contingency=layer.usage_count.numpy())
        row = {"layer": name, "least used": float(share.min()), "most used": float(share.max())}
        rows.append(row | {"unused": int((share == 0).sum()), "information, nats": information})
    return pd.DataFrame(rows)


def domain_mix(stats: Any, layer: int | str) -> dict | None:
    """Which domains each expert's tokens come from: by domain, the share ``(E,)`` of the expert's tokens.

    Returns
    -------
    dict of str to array, or None
        None where the calibration tokens have one domain only; NaN for an expert that no token was routed to.
    """
    if len(stats.domains) == 1:
        return None
    count = stats.layer(layer).usage_count.double()
    return dict(zip(stats.domains, (count / count.sum(0)).numpy(), strict=True))


def model_size(model: Any) -> dict[str, int]:
    """Weights of a model, tied ones once: ``weights`` in all, ``expert_weights`` in its routed experts.

    ``bytes`` are those of all weights in the model's dtype; ``num_experts`` is E of the unmerged model (the
    smallest, if layers differ).
    """
    layers, parameters = find_moe_layers(model), list(model.parameters())
    return {
        "weights": sum(p.numel() for p in parameters),
        "expert_weights": sum(t.numel() for layer in layers for t in layer.tensors().values()),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "num_experts": min(layer.num_experts for layer in layers),
    }


def cut_table(stats: Any, plan: Any) -> Any:
    """What a plan does to each layer, from the statistics alone, as a pandas.DataFrame.

    See :func:`hcsmoe_core.methods.summary.summarise`.
    """
    rows = [{"layer": layer.name} | summarise(stats, layer.name, layer.labels) for layer in plan.layers]
    return pd.DataFrame(rows).rename(columns=CUT_COLUMNS)


CUT_COLUMNS = {
    "saved": "weights saved",
    "moved": "routing mass moved",
    "entropy": "routing entropy",
    "entropy_after": "after",
    "function_error": "relative error of outputs",
    "output_error": "of mean outputs",
}


def cut_costs(
    stats: Any,
    model: Any,
    *,
    similarity: str = "expert-output",
    linkage: str = "average",
    cost: str = "function_error",
) -> list[np.ndarray]:
    """What cutting each layer's tree at every number of groups costs, from the statistics alone.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel
    similarity, linkage : str
    cost : str
        Of :func:`hcsmoe_core.methods.summary.summarise`.

    Returns
    -------
    list of L (E,) float64 arrays
        Cost of 1, 2, …, E groups.
    """
    costs = []
    for layer in stats.layers:
        tree = merge_tree(stats, layer, similarity=similarity, linkage=linkage, model=model)
        counts = range(1, len(tree) + 2)
        costs.append(np.array([summarise(stats, layer, cut(tree, count))[cost] for count in counts]))
    return costs


def family_agreement(stats: Any, model: Any, *, linkages: Sequence[str], similarities: Sequence[str]) -> Any:
    """Adjusted Rand index of the groups and a model's true families, by layer; 1 is agreement, 0 is chance.

    Returns
    -------
    pandas.DataFrame or None
        None where the families are not known.
    """
    families = demo.families(model.name_or_path)
    if families is None:
        return None
    rows = []
    for similarity in similarities:
        for linkage in allowed_linkages(similarity, linkages):
            options = dict(similarity=similarity, linkage=linkage, model=model)
            trees = [merge_tree(stats, layer, **options) for layer in stats.layers]
            for count, family in families.items():
                scores = [adjusted_rand_score(family, cut(tree, count)) for tree in trees]
                row = {"similarity": similarity, "linkage": linkage, "groups": count}
                rows.append(row | {f"layer {i}": round(s, 2) for i, s in enumerate(scores)})
    return pd.DataFrame(rows)


def rows(table: Any) -> list[dict]:
    """A data frame as JSON values, one object per row; what is not a number is null."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def write_table(frame: Any, path: str | Path) -> Path:
    """Write a table: ``.csv`` with all columns, or ``.tex`` with those that differ among the rows."""
    path = Path(path)
    check_choice("path", path.suffix, (".csv", ".tex"))
    with replacing(path) as part:
        if path.suffix == ".csv":
            frame.to_csv(part, index=False)
        else:
            told = [name for name in frame if frame[name].astype(str).nunique() > 1 or len(frame) == 1]
            text = frame[told].to_latex(index=False, escape=True, float_format="%.4f", na_rep="")
            part.write_text(text, encoding="utf-8")
    return path


def stacked(tables: dict, name: str) -> Any:
    """Several data frames below each other, with a column of a name for the key of each."""
    return pd.concat([table.assign(**{name: key}) for key, table in tables.items()], ignore_index=True)
