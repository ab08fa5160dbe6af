"""What a merge does inside one group, against the experts applied one by one."""

import naive
import numpy as np
import pytest
import torch
from conftest import tiny_model, tokens

from hcsmoe_core import capture, make_plan
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.ui import anatomy, figures
from hcsmoe_core.ui import widgets as explore

NEEDS = ("usage", "outputs", "sample")
DOMAINS = ["x", "y", "y", "z", "x", "z"]


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def measured(request):
    model = tiny_model(request.param, torch.float64)
    return model, capture(model, tokens(), needs=NEEDS, domains=DOMAINS)


def test_errors_are_of_what_the_group_gives_together(measured):
    model, stats = measured
    members, place = [1, 4, 6], 1
    layer, sums = find_moe_layers(model)[place], stats.layer(place)
    outputs = naive.outputs(layer.experts, sums.sample.inputs)
    gates = sums.sample.gates
    usage = sums.usage_count.sum(0).double()
    share = usage[members] / usage[members].sum()
    averaged = tiny_model("mixtral" if "Mixtral" in type(model).__name__ else "gpt_oss", torch.float64)
    experts = find_moe_layers(averaged)[place].experts
    with torch.no_grad():
        for name, tensor in find_moe_layers(model)[place].tensors().items():
            getattr(experts, name)[0] = sum(w * tensor[e] for w, e in zip(share, members, strict=True))
    mine = naive.expert(experts, 0, sums.sample.inputs)
    together = sum(gates[:, [e]] * outputs[e] for e in members)
    lost = together - gates[:, members].sum(1, keepdim=True) * mine
    routed = (gates[:, members] != 0).any(1)
    table = anatomy.output_errors(stats, model, place, members)
    assert list(dict.fromkeys(table["combination"])) == list(anatomy.COMBINATIONS)
    found = table[table["combination"] == "average"].set_index("domain")
    for domain in ("all", "x", "y", "z"):
        of = torch.tensor([domain in ("all", stats.domains[d]) for d in stats.sampled[:, 2]]) & routed
        assert found.loc[domain, "tokens"] == int(of.sum())
        assert found.loc[domain, "error"] == pytest.approx(
            float(lost[of].norm() / together[of].norm()), rel=1e-9
        )
    whole = table[table["domain"] == "all"].set_index("combination")["error"]
    assert whole["least-squares"] < whole["average"]


def test_a_permuted_twin_matches_in_full_once_aligned(measured):
    model, _ = measured
    layer = find_moe_layers(model)[0]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    kept = {name: tensor.detach().clone() for name, tensor in layer.tensors().items()}
    with torch.no_grad():
        for name, tensor in layer.stacked([layer.neurons(2).take(order)]).items():
            getattr(layer.experts, name)[5] = tensor[0]
    try:
        stats = capture(model, tokens(), needs=NEEDS)
        apart, together = (
            anatomy.neuron_matches(stats, model, 0, [2, 5], align=a) for a in ("none", "activations")
        )
        ((member, before),), ((_, after),) = apart.items(), together.items()
        assert member in (2, 5)
        moving = np.abs(before).max(1) > 0
        assert np.diag(after)[moving] == pytest.approx(1)
        assert np.diag(before).mean() < 0.9
        errors = anatomy.output_errors(stats, model, 0, [2, 5]).set_index(["combination", "domain"])["error"]
        assert errors["average, aligned", "all"] < 1e-9 < errors["average", "all"]
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                getattr(layer.experts, name).copy_(tensor)


def test_pictures_and_the_explorer(measured):
    model, stats = measured
    plan = make_plan(stats, model, experts=4)
    groups = anatomy.merged_groups(plan, 0)
    assert [len(g) for g in groups] == sorted((len(g) for g in groups), reverse=True)
    assert all(len(g) > 1 for g in groups)
    merging = explore.merge_explorer(stats, model, plan)
    assert "Smallest error on the sample" in merging.note
    merging._controls["group"].value = merging._controls["group"].max
    merging._controls["layer"].value = 2
    matches = anatomy.neuron_matches(stats, model, 0, groups[0])
    figure = figures.neuron_matches(matches, matches, dominant=0)
    assert len(figure.axes[0].lines) == 2 * len(matches) + 2
    with pytest.raises(ValueError, match="needs 'sample'"):
        anatomy.output_errors(capture(model, tokens(), needs=("usage",)), model, 0, groups[0])


class Words:
    """A tokenizer whose tokens are words."""

    def decode(self, ids, **_):
        return " ".join(f"w{i}" for i in ids)


def test_tokens_of_an_expert_are_those_that_the_router_sent_to_it():
    model, ids = tiny_model("qwen2_moe", torch.float64), tokens()
    chosen = {}
    layer = find_moe_layers(model)[1]

    def keep(module, inputs, keywords):
        _, index, weight = [*inputs, *keywords.values()][:3]
        chosen["index"], chosen["weight"] = (part.reshape(*ids.shape, -1) for part in (index, weight))

    handle = layer.experts.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    stats = capture(model, ids, needs=("usage", "sample"), sample=ids.numel(), domains=DOMAINS)
    expert = int(stats.layer(1).usage_count.sum(0).argmax())
    taken = (chosen["index"] == expert).any(-1)
    frame = anatomy.expert_tokens(stats, 1, expert, ids, Words(), context=3)
    assert len(frame) == int(taken.sum())
    weights = torch.where(chosen["index"] == expert, chosen["weight"], 0).sum(-1)
    assert frame["weight"].tolist() == pytest.approx(
        weights[taken].sort(descending=True)[0].tolist(), abs=1e-6
    )
    best = int(weights.argmax())
    sequence, position = divmod(best, ids.shape[1])
    row, around = frame.iloc[0], ids[sequence].tolist()
    assert row["domain"] == DOMAINS[sequence]
    assert row["token"] == f"w{around[position]}"
    assert row["before"] == Words().decode(around[max(0, position - 3) : position])
    assert row["after"] == Words().decode(around[position + 1 : position + 4])
    shares = anatomy.token_shares(stats, 1, expert, ids, Words(), least=2).set_index("token")
    values, counts = ids.unique(return_counts=True)
    assert set(shares.index) == {
        f"w{v}" for v, c in zip(values.tolist(), counts.tolist(), strict=True) if c >= 2
    }
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if count >= 2:
            assert shares.loc[f"w{value}", "count"] == count
            assert shares.loc[f"w{value}", "share"] == pytest.approx(
                float(taken[ids == value].double().mean())
            )
    assert shares["share"].is_monotonic_decreasing


def test_other_tokens_than_those_of_the_statistics_are_refused():
    model, ids = tiny_model("mixtral"), tokens()
    stats = capture(model, ids, needs=("usage", "sample"))
    with pytest.raises(ValueError, match="not the calibration tokens of these statistics"):
        anatomy.expert_tokens(stats, 0, 0, ids + 1)
    with pytest.raises(ValueError, match='"expert" argument must be a whole number from 0 to 7; not 8'):
        anatomy.token_shares(stats, 0, 8, ids)
    with pytest.raises(ValueError, match="Showing what an expert gets needs 'sample'"):
        anatomy.expert_tokens(capture(model, ids), 0, 0, ids)
