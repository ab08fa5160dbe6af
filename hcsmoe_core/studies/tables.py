"""What the notebooks and the command share: where things go, statistics that are captured once, and the record of a run."""

from pathlib import Path

import numpy as np
import torch

from hcsmoe_core._util import check_choice, replacing
from hcsmoe_core.clustering import cut
from hcsmoe_core.demo import models as demo
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods.planner import merge_tree
from hcsmoe_core.methods.summary import summarise
from hcsmoe_core.similarity import allowed_linkages


def layer_table(model):
    """What is in a model: one row for each MoE layer.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    rows = []
    for layer in find_moe_layers(model):
        tensors = layer.tensors().values()
        size = sum(t.numel() * t.element_size() for t in tensors)
        rows.append(
            {
                "layer": layer.name,
                "experts": layer.num_experts,
                "top-k": layer.top_k,
                "hidden": layer.hidden_size,
                "width": layer.width,
                "experts, MB": round(size / 1e6, 2),
            }
        )
    return pd.DataFrame(rows)


def usage_table(stats):
    """How evenly each layer's experts are used, and how much they tell of the text: one row for each MoE layer.

    Returns
    -------
    pandas.DataFrame
        ``least used`` and ``most used``, relative to an equal share of the routed tokens; ``unused``, the number of experts
        that no token was routed to; ``information, nats``, the mutual information of expert and domain over routed pairs
        (0: routing does not depend on the domain).
    """
    import pandas as pd

    rows = []
    for name, sums in stats.layers.items():
        share = sums.frequency * len(sums.frequency)
        joint = sums.usage_count.double() / sums.usage_count.sum()
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        information = torch.xlogy(joint, joint / independent).nan_to_num().sum()
        row = {"layer": name, "least used": float(share.min()), "most used": float(share.max())}
        rows.append(row | {"unused": int((share == 0).sum()), "information, nats": float(information)})
    return pd.DataFrame(rows)


def domain_mix(stats, layer):
    """Of which domains each expert's tokens are: by domain, the share ``(E,)`` of the tokens routed to the expert.

    Returns
    -------
    dict of str to array, or None
        None where the calibration tokens have one domain only; NaN for an expert that no token was routed to.
    """
    if len(stats.domains) == 1:
        return None
    count = stats.layer(layer).usage_count.double()
    return dict(zip(stats.domains, (count / count.sum(0)).numpy(), strict=True))


def model_size(model):
    """Weights that a model holds, tied ones once: ``weights`` in all, ``expert_weights`` in its routed experts.

    ``bytes`` are those of all weights in the dtype that the model is in; ``num_experts`` is E of the unmerged model (the
    smallest, if layers differ).

    Returns
    -------
    dict of str to int
    """
    layers = find_moe_layers(model)
    experts = sum(t.numel() for layer in layers for t in layer.tensors().values())
    sizes = [(p.numel(), p.numel() * p.element_size()) for p in model.parameters()]
    weights, held = (sum(size) for size in zip(*sizes, strict=True))
    size = {"weights": weights, "expert_weights": experts, "bytes": held}
    return size | {"num_experts": min(layer.num_experts for layer in layers)}


def cut_table(stats, plan):
    """What a plan does to each layer, from the statistics alone; see :func:`hcsmoe_core.methods.summary.summarise`.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

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


def cut_costs(stats, model, *, similarity="expert-output", linkage="average", cost="function_error"):
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
    for layer, sums in stats.layers.items():
        tree = merge_tree(stats, layer, similarity=similarity, linkage=linkage, model=model)
        costs.append(
            np.array([summarise(stats, layer, cut(tree, r))[cost] for r in range(1, sums.num_experts + 1)])
        )
    return costs


def family_agreement(stats, model, *, linkages, similarities):
    """Adjusted Rand index between the groups found and a model's true families, by layer; 1 is agreement, 0 is chance.

    Returns
    -------
    pandas.DataFrame or None
        None where the families are not known.
    """
    import pandas as pd
    from sklearn.metrics import adjusted_rand_score

    families = demo.families(model.name_or_path)
    if families is None:
        return None
    rows = []
    for similarity in similarities:
        for linkage in allowed_linkages(similarity, linkages):
            trees = [
                merge_tree(stats, n, similarity=similarity, linkage=linkage, model=model)
                for n in stats.layers
            ]
            for count, family in families.items():
                scores = [adjusted_rand_score(family, cut(tree, count)) for tree in trees]
                row = {"similarity": similarity, "linkage": linkage, "groups": count}
                rows.append(row | {f"layer {i}": round(s, 2) for i, s in enumerate(scores)})
    return pd.DataFrame(rows)


def rows(table):
    """A data frame as JSON values, one object a row; what is not a number is null."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def write_table(frame, path):
    """Write a table: ``.csv`` with all columns, or ``.tex`` with those that differ among the rows.

    Returns
    -------
    Path
    """
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


def stacked(tables, name):
    """Several data frames below each other, with a column that says which each row is of.

    Parameters
    ----------
    tables : dict of str to pandas.DataFrame
    name : str
        Of that column.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    return pd.concat([table.assign(**{name: key}) for key, table in tables.items()], ignore_index=True)
