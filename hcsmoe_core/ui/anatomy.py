"""Inside one layer: which tokens an expert takes, which neurons of a group match, what each way of combining them does."""

import numpy as np
import torch

from hcsmoe_core._util import InputError, check_count
from hcsmoe_core.families import moe_layer
from hcsmoe_core.merging import Group
from hcsmoe_core.merging import combine_group as combine
from hcsmoe_core.methods.combine import aligned, standardised
from hcsmoe_core.methods.planner import options_of
from hcsmoe_core.plan import merge_weights
from hcsmoe_core.statistics import sequence_hashes

# Ways of combining that are shown side by side, as options of :func:`hcsmoe_core.merging.combine`.
WAYS = {
    "average": {"rule": "average"},
    "average, aligned": {"rule": "average", "align": "activations"},
    "fix-dom": {"rule": "fix-dom"},
    "zipit": {"rule": "zipit"},
    "least-squares": {"rule": "least-squares"},
    "selection": {"rule": "selection"},
}


def joined_groups(plan, layer):
    """Groups of a plan's layer that have several members, the largest first.

    Parameters
    ----------
    plan : Plan
    layer : int
        Place among its layers.

    Returns
    -------
    list of list of int
        Empty where every expert stays alone.
    """
    groups = [members for members in plan.layers[layer].groups() if len(members) > 1]
    return sorted(groups, key=len, reverse=True)


def group_of(stats, model, layer, members, *, merge="frequency"):
    """The experts of one group, ready to be combined.

    Parameters
    ----------
    stats : Statistics
        With the sample.
    model : transformers.PreTrainedModel
        Not merged.
    layer : int or str
    members : list of int
        Experts; the most used is dominant.
    merge : {"frequency", "average", "routing-mass"}

    Returns
    -------
    hcsmoe_core.combining.Group

    Raises
    ------
    ValueError
        If the statistics hold no sample.
    """
    stats.check(("sample",), "Looking into a group")
    name = stats.layer_name(layer)
    sums, usage = stats.layers[name], stats.layers[name].usage_count.sum(0)
    labels = np.where(np.isin(np.arange(sums.num_experts), members), 0, -1)
    weights = merge_weights(labels, sums, merge)
    dominant = max(sorted(members), key=lambda e: int(usage[e]))
    return Group(moe_layer(model, name), sorted(members), weights, dominant, sums.sample)


@torch.no_grad()
def output_errors(stats, model, layer, members, *, ways=None, merge="frequency"):
    """What a group's experts give together, and how far each way of combining them is from it, by domain.

    Over the sampled tokens routed to any of the members: ``‖Σ_e g_e f_e(x) − (Σ_e g_e) f(x)‖ / ‖Σ_e g_e f_e(x)‖``, norms over
    all those tokens of a domain. The sample is that of the calibration, so that ways that are fitted to it look better here
    than they are.

    Parameters
    ----------
    stats, model, layer, members, merge
        As for :func:`group_of`.
    ways : dict of str to dict, optional
        Options of :func:`hcsmoe_core.merging.combine` by name; by default :data:`WAYS`.

    Returns
    -------
    pandas.DataFrame
        ``way``, ``domain`` (``"all"`` for all together), ``tokens`` and ``error``.
    """
    import pandas as pd

    group = group_of(stats, model, layer, members, merge=merge)
    tokens, gates = group.tokens()
    routed = (group.sample.gates[:, group.members] != 0).any(1)
    domains = stats.sampled[routed, 2]
    together = sum(gates[:, [m]] * _outputs(group, expert, tokens) for m, expert in enumerate(group.experts))
    rows = []
    for way, options in (ways or WAYS).items():
        made = combine(group, {"rule": options["rule"]} | options_of(options["rule"]) | options)
        square = (together - gates.sum(1, keepdim=True) * _outputs(group, made, tokens)).pow(2).sum(1).cpu()
        whole = together.pow(2).sum(1).cpu()
        for place, domain in [(None, "all"), *(enumerate(stats.domains) if len(stats.domains) > 1 else ())]:
            here = torch.ones_like(domains, dtype=torch.bool) if place is None else domains == place
            error = float((square[here].sum() / whole[here].sum()).sqrt()) if here.any() else float("nan")
            rows.append({"way": way, "domain": domain, "tokens": int(here.sum()), "error": error})
    return pd.DataFrame(rows)


def _outputs(group, expert, tokens):
    output = group.layer.activate(expert, tokens) @ expert.down.T
    return output if expert.offset is None else output + expert.offset


@torch.no_grad()
def neuron_matches(stats, model, layer, members, *, align="activations"):
    """How the neurons of a group's dominant expert and of each other member correlate, as they stand and once matched.

    Parameters
    ----------
    stats, model, layer, members
        As for :func:`group_of`.
    align : {"none", "weights", "activations"}
        How they are matched.

    Returns
    -------
    dict of int to (I, I) float64 array
        By member: correlations of activations over the sampled tokens routed to the group, the dominant expert's neurons
        along the rows, the member's, in the order in which they are matched, along the columns; on the diagonal are the
        neurons that are averaged.
    """
    group = group_of(stats, model, layer, members)
    tokens, _ = group.tokens()
    ordered = aligned(group, align)
    centre = standardised(group.layer.activate(ordered[group.dominant], tokens).double())
    found = {}
    for place, member in enumerate(group.members):
        if place != group.dominant:
            other = standardised(group.layer.activate(ordered[place], tokens).double())
            found[member] = (centre.T @ other).cpu().numpy()
    return found


def expert_tokens(stats, layer, expert, input_ids, tokenizer=None, *, context=8, most=None):
    """Calibration tokens of the sample that the router sends to an expert, those with the largest routing weight first.

    Parameters
    ----------
    stats : Statistics
        With the sample.
    layer : int or str
    expert : int
    input_ids : (N, S) int64 tensor
        The calibration tokens that the statistics were taken from.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Without one, tokens are shown as their ids.
    context : int
        Tokens shown before and after each.
    most : int, optional
        Rows at most; by default all.

    Returns
    -------
    pandas.DataFrame
        ``domain``, ``before``, ``token``, ``after`` and ``weight``, the routing weight applied.

    Raises
    ------
    ValueError
        If there is no sample, or these are not the tokens that it was taken from.
    """
    import pandas as pd

    gates = _sampled_gates(stats, layer, expert, input_ids)
    rows = []
    for place in gates.argsort(descending=True, stable=True)[: int((gates > 0).sum())][:most].tolist():
        sequence, position, domain = stats.sampled[place].tolist()
        ids = input_ids[sequence].tolist()
        parts = (
            ids[max(0, position - context) : position],
            ids[position : position + 1],
            ids[position + 1 :][:context],
        )
        before, token, after = (_text(tokenizer, part) for part in parts)
        row = {"domain": stats.domains[domain], "before": before, "token": token, "after": after}
        rows.append(row | {"weight": float(gates[place])})
    return pd.DataFrame(rows, columns=["domain", "before", "token", "after", "weight"])


def token_shares(stats, layer, expert, input_ids, tokenizer=None, *, least=5):
    """Which tokens an expert takes more often than others: one row for each that stands in the sample often enough.

    Parameters
    ----------
    stats, layer, expert, input_ids, tokenizer
        As for :func:`expert_tokens`.
    least : int
        Times that a token must stand in the sample.

    Returns
    -------
    pandas.DataFrame
        ``token``, ``count`` in the sample and ``share`` of them that are routed to the expert, the largest first.
    """
    import pandas as pd

    taken = _sampled_gates(stats, layer, expert, input_ids) > 0
    ids = input_ids[stats.sampled[:, 0], stats.sampled[:, 1]]
    frame = (
        pd.DataFrame({"id": ids.numpy(), "taken": taken.numpy()}).groupby("id")["taken"].agg(["size", "mean"])
    )
    frame = (
        frame[frame["size"] >= least]
        .sort_values(["mean", "size"], ascending=False, kind="stable")
        .reset_index()
    )
    frame["token"] = [_text(tokenizer, [i]) for i in frame["id"]]
    return frame.rename(columns={"size": "count", "mean": "share"})[["token", "count", "share"]]


def _sampled_gates(stats, layer, expert, input_ids):
    """Routing weight ``(R,)`` that an expert's output got for each token of the sample."""
    stats.check(["sample"], "Showing what an expert takes")
    if sequence_hashes(input_ids) != stats.sequences:
        raise InputError(
            "The input_ids are not the calibration tokens of these statistics; give those that they were captured from."
        )
    check_count("expert", expert, 0, stats.layer(layer).num_experts - 1)
    return stats.layer(layer).sample.gates[:, expert]


def _text(tokenizer, ids):
    """Token ids as text on one line."""
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace("\n", "⏎")
