"""Inside one layer: tokens that an expert gets, neurons of a group that match, errors of each combination."""

import numpy as np
import pandas as pd
import torch

from hcsmoe_core._util import check_count, require
from hcsmoe_core.families import moe_layer
from hcsmoe_core.merging import Group, combine_group
from hcsmoe_core.methods.combining import aligned, standardised
from hcsmoe_core.methods.summary import merge_weights
from hcsmoe_core.statistics import sequence_hashes

# Combinations that are shown side by side, as options of combine_group.
COMBINATIONS = {
    "average": {"rule": "average"},
    "average, aligned": {"rule": "average", "align": "activations"},
    "fix-dom": {"rule": "fix-dom"},
    "zipit": {"rule": "zipit"},
    "least-squares": {"rule": "least-squares"},
    "selection": {"rule": "selection"},
}


def merged_groups(plan, layer: int) -> list[list[int]]:
    """Groups of several experts in a plan's layer (by its index in the plan), the largest first."""
    return sorted((group for group in plan.layers[layer].groups() if len(group) > 1), key=len, reverse=True)


def group_of(stats, model, layer, members, *, merge="frequency") -> Group:
    """The experts of one group, ready to be combined.

    Parameters
    ----------
    stats : Statistics
        With the sample.
    model : transformers.PreTrainedModel
        Not merged.
    layer : int or str
    members : list of int
        Experts; the most used one is dominant.
    merge : {"frequency", "average", "routing-mass"}

    Raises
    ------
    InputError
        If the statistics have no sample.
    """
    stats.check(("sample",), "Looking into a group")
    sums = stats.layer(layer)
    labels = np.where(np.isin(np.arange(sums.num_experts), members), 0, -1)
    dominant = max(sorted(members), key=sums.usage_count.sum(0).tolist().__getitem__)
    weights = merge_weights(labels, sums, merge)
    return Group(moe_layer(model, stats.layer_name(layer)), sorted(members), weights, dominant, sums.sample)


@torch.no_grad()
def output_errors(stats, model, layer, members, *, combinations=None, merge="frequency") -> pd.DataFrame:
    """How far the output of each combination is from that of the group's experts together, by domain.

    Over the sampled tokens routed to any of the members: ``‖Σ_e g_e f_e(x) − (Σ_e g_e) f(x)‖ / ‖Σ_e g_e
    f_e(x)‖``, norms over all those tokens of a domain. The sample is that of the calibration, so that
    combinations that are fitted to it look better here than they are.

    Parameters
    ----------
    stats, model, layer, members, merge
        As for :func:`group_of`.
    combinations : dict of str to dict, optional
        Options of :func:`hcsmoe_core.merging.combine_group` by name; by default :data:`COMBINATIONS`.

    Returns
    -------
    pandas.DataFrame
        ``combination``, ``domain`` (``"all"`` for all together), ``tokens`` and ``error``.
    """
    group = group_of(stats, model, layer, members, merge=merge)
    domains = stats.sampled[(group.sample.gates[:, group.members] != 0).any(1), 2]
    masks = {"all": torch.ones_like(domains, dtype=torch.bool)} | (
        {domain: domains == i for i, domain in enumerate(stats.domains)} if len(stats.domains) > 1 else {}
    )
    rows = []
    for name, options in (combinations or COMBINATIONS).items():
        merged = combine_group(group, options)
        lost = (group.outputs(merged.offset) - group.activations(merged) @ merged.down.T).cpu()
        for domain, mask in masks.items():
            error = float(lost[mask].norm() / group.outputs().cpu()[mask].norm())  # NaN without tokens
            rows.append({"combination": name, "domain": domain, "tokens": int(mask.sum()), "error": error})
    return pd.DataFrame(rows)


@torch.no_grad()
def neuron_matches(stats, model, layer, members, *, align="activations") -> dict[int, np.ndarray]:
    """Correlation of the neurons of a group's dominant expert with those of each other member.

    Parameters
    ----------
    stats, model, layer, members
        As for :func:`group_of`.
    align : {"none", "weights", "activations"}
        How they are matched.

    Returns
    -------
    dict of int to (I, I) float64 array
        By member: correlations of activations over the sampled tokens routed to the group. Rows are the
        dominant expert's neurons, columns the member's in the order in which they are matched; on the
        diagonal are the neurons that are averaged.
    """
    group = group_of(stats, model, layer, members)
    tokens = group.tokens()[0]
    neurons = [standardised(group.layer.activate(e, tokens).double()) for e in aligned(group, align)]
    return {
        member: (neurons[group.dominant].T @ theirs).cpu().numpy()
        for i, (member, theirs) in enumerate(zip(group.members, neurons, strict=True))
        if i != group.dominant
    }


def expert_tokens(stats, layer, expert, input_ids, tokenizer=None, *, context=8, most=None) -> pd.DataFrame:
    """Sampled calibration tokens that are routed to an expert, those with the largest routing weight first.

    Parameters
    ----------
    stats : Statistics
        With the sample.
    layer : int or str
    expert : int
    input_ids : (N, S) int64 tensor
        The calibration tokens that the statistics were captured from.
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
    InputError
        If there is no sample, or these are not the tokens that it was taken from.
    """
    gates = _sampled_gates(stats, layer, expert, input_ids)
    rows = []
    for index in gates.argsort(descending=True, stable=True)[: int((gates > 0).sum())][:most].tolist():
        sequence, position, domain = stats.sampled[index].tolist()
        ids, start = input_ids[sequence].tolist(), max(0, position - context)
        pieces = ids[start:position], [ids[position]], ids[position + 1 :][:context]
        rows.append(
            (stats.domains[domain], *(_text(tokenizer, piece) for piece in pieces), float(gates[index]))
        )
    return pd.DataFrame(rows, columns=["domain", "before", "token", "after", "weight"])


def token_shares(stats, layer, expert, input_ids, tokenizer=None, *, least=5) -> pd.DataFrame:
    """Which tokens an expert gets more often than others.

    Parameters
    ----------
    stats, layer, expert, input_ids, tokenizer
        As for :func:`expert_tokens`.
    least : int
        How often a token must be in the sample.

    Returns
    -------
    pandas.DataFrame
        ``token``, its ``count`` in the sample and the ``share`` of them routed to the expert, the largest
        first.
    """
    routed = _sampled_gates(stats, layer, expert, input_ids) > 0
    ids = input_ids[stats.sampled[:, 0], stats.sampled[:, 1]]
    frame = (
        pd.DataFrame({"id": ids.numpy(), "routed": routed.numpy()})
        .groupby("id", as_index=False)["routed"]
        .agg(count="size", share="mean")
        .query("count >= @least")
        .sort_values(["share", "count"], ascending=False, kind="stable", ignore_index=True)
    )
    return frame.assign(token=[_text(tokenizer, [i]) for i in frame["id"]])[["token", "count", "share"]]


def _sampled_gates(stats, layer, expert, input_ids):
    """Routing weight of an expert for each token of the sample, ``(R,)``."""
    stats.check(["sample"], "Showing what an expert gets")
    require(
        sequence_hashes(input_ids) == stats.sequences,
        "The input_ids are not the calibration tokens of these statistics; "
        "pass those that they were captured from.",
    )
    check_count("expert", expert, 0, stats.layer(layer).num_experts - 1)
    return stats.layer(layer).sample.gates[:, expert]


def _text(tokenizer, ids):
    """Token ids as text on one line."""
    return (
        " ".join(map(str, ids))
        if tokenizer is None
        else tokenizer.decode(ids, clean_up_tokenization_spaces=False).replace("\n", "⏎")
    )
