import naive
import numpy as np
import pytest
import torch
from conftest import tiny_model, tokens
from scipy.spatial.distance import pdist
from test_capture import router_name

from hcsmoe_core import apply_plan, capture, distances, make_plan
from hcsmoe_core.families import find_moe_layers


@pytest.fixture
def measured(family):
    model = tiny_model(family, torch.float64)
    ids = tokens()
    names = [layer.name for layer in find_moe_layers(model)]
    trace = naive.Trace(model, ids, names, [router_name(n, family) for n in names])
    return model, capture(model, ids), trace, names


def features(model, trace, name, similarity):
    experts = model.get_submodule(name)
    if similarity == "expert-output":
        return naive.outputs(experts, trace.inputs[name]).mean(1).numpy()
    if similarity == "router-logits":
        return trace.logits[name].double().T.numpy()
    return np.concatenate(
        [p.detach().double().flatten(1).numpy() for p in (experts.gate_up_proj, experts.down_proj)], 1
    )


@pytest.mark.parametrize("similarity", ["expert-output", "router-logits", "weight"])
def test_distances_equal_naive_ones(measured, similarity):
    model, stats, trace, names = measured
    for place, name in enumerate(names):
        wanted = features(model, trace, name, similarity)
        got = distances(stats, place, similarity=similarity, model=model)
        np.testing.assert_allclose(got, naive.pairwise(wanted), rtol=1e-7)
        assert np.array_equal(got, distances(stats, name, similarity=similarity, model=model))
        cosine = distances(stats, name, similarity=similarity, metric="cosine", model=model)
        np.testing.assert_allclose(cosine, pdist(wanted, "cosine"), rtol=1e-6, atol=1e-9)


def test_weights_are_compared_in_chunks(mixtral, input_ids, monkeypatch):
    stats = capture(mixtral, input_ids)
    whole = distances(stats, 0, similarity="weight", model=mixtral)
    monkeypatch.setattr("hcsmoe_core.similarity.WEIGHT_CHUNK", 17)
    np.testing.assert_allclose(distances(stats, 0, similarity="weight", model=mixtral), whole, rtol=1e-12)


@pytest.mark.parametrize("similarity", ["expert-output", "router-logits", "weight"])
def test_twins_have_no_distance(mixtral, input_ids, similarity):
    with torch.no_grad():
        for layer in find_moe_layers(mixtral):
            for tensor in [*layer.tensors().values(), layer.router.weight]:
                tensor[5] = tensor[2]
    stats = capture(mixtral, input_ids)
    got = distances(stats, 1, similarity=similarity, model=mixtral)
    place = [(i, j) for i in range(8) for j in range(i + 1, 8)].index((2, 5))
    assert got[place] <= 1e-7 * got.max()
    assert (np.delete(got, place) > 1e-3 * got.max()).all()


def test_original_weights_are_compared_on_a_merged_model(mixtral, input_ids):
    stats = capture(mixtral, input_ids)
    before = distances(stats, 0, similarity="weight", model=mixtral)
    apply_plan(mixtral, make_plan(stats, mixtral, experts=3))
    assert np.array_equal(distances(stats, 0, similarity="weight", model=mixtral), before)


def test_bad_choices_are_named(mixtral, input_ids):
    stats = capture(mixtral, input_ids)
    with pytest.raises(
        ValueError, match='"similarity" argument must be one of "expert-output", "router-logits", "weight",'
    ):
        distances(stats, 0, similarity="outputs")
    with pytest.raises(ValueError, match='"metric" argument must be one of "euclidean", "cosine"'):
        distances(stats, 0, metric="manhattan")
    with pytest.raises(ValueError, match='"layer" argument must be a whole number from 0 to 2; not 3'):
        distances(stats, 3)
    with pytest.raises(ValueError, match='"layer" argument must be one of model.layers.0.mlp.experts'):
        distances(stats, "model.layers.9.mlp.experts")
    with pytest.raises(ValueError, match='give the "model" argument'):
        distances(stats, 0, similarity="weight")


def test_a_silent_expert_has_no_cosine(mixtral, input_ids):
    with torch.no_grad():
        mixtral.model.layers[0].mlp.experts.down_proj[4] = 0
    stats = capture(mixtral, input_ids)
    with pytest.raises(ValueError, match='use metric "euclidean"'):
        distances(stats, 0, metric="cosine")
    assert np.isfinite(distances(stats, 0)).all()
