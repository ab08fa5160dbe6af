import naive
import numpy as np
import pytest
import torch
from conftest import tiny_model, tokens
from scipy.spatial.distance import pdist
from test_capture import router_name

from hcsmoe_core import apply_plan, capture, distances, load_merged, make_plan, save_merged, similarity, steps
from hcsmoe_core._util import InputError
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods import similarities
from hcsmoe_core.methods.similarities import scale_of
from hcsmoe_core.statistics import NEEDS


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


@pytest.mark.parametrize("method", ["hc-smoe", "trimming", "reap"])
def test_original_experts_are_compared_on_a_merged_model(mixtral, input_ids, method):
    stats = capture(mixtral, input_ids, needs=tuple(NEEDS), sample=50)
    options = [dict(similarity=name, model=mixtral) for name in steps.similarity]
    before = [[distances(stats, 0, **o), scale_of(stats, 0, **o)] for o in options]
    apply_plan(mixtral, make_plan(stats, mixtral, experts=3, method=method), stats)
    merged = [{n: t.data_ptr() for n, t in layer.tensors().items()} for layer in find_moe_layers(mixtral)]
    for own, (distance, scale) in zip(options, before, strict=True):
        assert np.array_equal(distances(stats, 0, **own), distance)
        assert scale_of(stats, 0, **own) == scale
    layers = find_moe_layers(mixtral)
    assert all(layer.merged for layer in layers)
    assert [{n: t.data_ptr() for n, t in layer.tensors().items()} for layer in layers] == merged


@pytest.mark.parametrize("name", ["weight", "cka"])
def test_a_model_that_was_loaded_merged_has_no_experts_to_compare(mixtral, input_ids, name, tmp_path):
    stats = capture(mixtral, input_ids, needs=("usage", "outputs", "sample"))
    save_merged(mixtral, make_plan(stats, mixtral, experts=3), tmp_path / "m")
    loaded = load_merged(tmp_path / "m")
    with pytest.raises(InputError, match="the original experts are in the original checkpoint"):
        distances(stats, 0, similarity=name, model=loaded)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("size", [10, 50])
def test_cka_in_strips_is_cka_at_once(family, size, monkeypatch):
    model = tiny_model(family, torch.float64)
    stats = capture(model, tokens(), needs=("sample",), sample=size)
    layer = find_moe_layers(model)[1]
    with torch.no_grad():
        f = naive.outputs(layer.experts, stats.layers[layer.name].sample.inputs)
    f = f - f.mean(1, keepdim=True)
    gram = torch.einsum("itd,jte->ijde", f, f).pow(2).sum((2, 3))
    cka = gram / (gram.diagonal()[:, None] * gram.diagonal()).sqrt()
    wanted = 1 - cka.numpy()[np.triu_indices(8, 1)]
    for block in (1 << 27, 8 * size, 8 * size * 7, 1):
        monkeypatch.setattr("hcsmoe_core.methods.similarities.CKA_BLOCK", block)
        got = distances(stats, 1, similarity="cka", model=model)
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)


def test_twins_have_no_negative_distance(mixtral, input_ids):
    with torch.no_grad():
        for layer in find_moe_layers(mixtral):
            for tensor in layer.tensors().values():
                tensor[1:] = tensor[:1]
    stats = capture(mixtral, input_ids, needs=tuple(NEEDS), sample=50)
    for name, step in steps.similarity.items():
        for metric in step.properties["metrics"]:
            got = distances(stats, 1, similarity=name, metric=metric, model=mixtral)
            assert (got >= 0).all(), (name, metric)


def test_a_similarity_of_a_users_own(mixtral, input_ids):
    calls = []

    @steps.similarity("usage", needs=("usage",), metrics=("euclidean", "cosine"), feature="usage")
    def by_usage(stats, name, metric, layer):
        calls.append((name, metric, layer))
        return pdist(stats.layers[name].usage_count.T.double().numpy(), metric)

    @steps.similarity("depth", metrics=("depth",), weights=True, norms=lambda *_: np.ones(8))
    def by_depth(stats, name, metric, layer):
        calls.append((name, metric, layer))
        return np.ones(28)

    try:
        stats = capture(mixtral, input_ids, needs=("usage",), domains=list("abaabb"))
        name = next(iter(stats.layers))
        usage = stats.layers[name].usage_count.T.double().numpy()
        assert np.array_equal(distances(stats, 0, similarity="usage"), pdist(usage))
        assert distances(stats, 0, similarity="usage+router-logits").shape == (28,)
        assert np.array_equal(distances(stats, 0, similarity="depth", model=mixtral), np.ones(28))
        assert [call[:2] for call in calls] == [(name, "euclidean")] * 2 + [(name, "depth")]
        assert calls[0][2] is None
        assert calls[2][2].name == name
        assert "usage" in similarities.available(stats)
        assert similarity.metric_of("usage", "cosine") == "cosine"
        assert similarity.metric_of("usage+depth") == "mixed"
        assert similarities.allowed_linkages("usage", ["average", "ward"]) == ["average", "ward"]
        assert similarities.allowed_linkages("depth", ["average", "ward"]) == ["average"]
        assert similarities.described("usage+depth") == "distance between experts' usage and depth"
        assert scale_of(stats, 0, similarity="usage") == scale_of(stats, 0, similarity="depth", model=mixtral)
        with pytest.raises(InputError, match="must be 'depth' for similarity 'depth'"):
            distances(stats, 0, similarity="depth", metric="cosine", model=mixtral)
    finally:
        for name in ("usage", "depth"):
            del steps.similarity._entries[name]


def test_bad_choices_are_named(mixtral, input_ids):
    stats = capture(mixtral, input_ids)
    with pytest.raises(
        ValueError, match='"similarity" argument must be one of "expert-output", "router-logits", "weight",'
    ):
        distances(stats, 0, similarity="outputs")
    with pytest.raises(ValueError, match='"metric" argument must be one of "euclidean", "cosine"'):
        distances(stats, 0, metric="manhattan")
    with pytest.raises(ValueError, match='"layer" argument must be a whole number from -3 to 2; not 3'):
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
