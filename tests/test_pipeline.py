"""The whole road as one function: the same files as step by step, and what is refused before any work."""

import pytest
import torch
from conftest import logits

import hcsmoe_core as core
from hcsmoe_core._util import InputError
from hcsmoe_core.studies import pipeline
from hcsmoe_core.text.calibration import domains_of

SMALL = dict(sequences=12, length=64, dtype="float32", calibration="demo", device="cpu")


def test_the_road_is_that_of_its_steps(tmp_path):
    written = pipeline.shrink(
        "demo-mixtral", experts=4, linkage="single", out=tmp_path / "a", fidelity=2, **SMALL
    )
    model, tokenizer = core.load_model("demo-mixtral", dtype="float32")
    ids = core.calibration_tokens("demo", tokenizer, sequences=12, length=64, seed=42)
    stats = core.capture(model, ids, domains=domains_of("demo", 12), progress=False)
    plan = core.make_plan(stats, model, experts=4, linkage="single", progress=False)
    assert [layer.labels for layer in written["plan"].layers] == [layer.labels for layer in plan.layers]
    core.save_merged(model, plan, tmp_path / "b")
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert files
    for path in files:
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()
    text = pipeline.written_text(written)
    assert text.startswith(f"wrote {tmp_path / 'a'}: 4 experts")
    assert "768 tokens" in text
    assert written["fidelity"]["tokens"] == 2 * 64
    assert "hcsmoe capture demo-mixtral --for hc-smoe,recommended --out" in written["advice"]
    with pytest.raises(FileExistsError):
        pipeline.shrink("demo-mixtral", experts=4, out=tmp_path / "a", **SMALL)
    merged = pipeline.shrink("demo-mixtral", plan=written["plan"], fidelity=0, **SMALL)
    rows = ids[:2]
    assert torch.equal(logits(merged["model"], rows), logits(core.load_merged(tmp_path / "a"), rows))


def test_what_cannot_be_done_is_refused_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline.streaming, "open_model", lambda *_, **__: pytest.fail("loaded"))
    for options, message in (
        ({}, "Give either a plan"),
        (dict(experts=4, plan=tmp_path / "p.json"), "Give either a plan"),
        (dict(experts=4, router="merged"), '"router" argument must be one of'),
        (dict(experts=4, method="hcsmo"), '"method" argument must be one of'),
        (dict(experts=4, linkage="centroid"), '"linkage" argument must be one of'),
    ):
        with pytest.raises(InputError, match=message):
            pipeline.shrink("demo-mixtral", out=tmp_path / "m", **options)
    monkeypatch.undo()
    with pytest.raises(InputError, match='"experts" argument must be a whole number from 1 to 8'):
        pipeline.shrink("demo-mixtral", experts=9, out=tmp_path / "m", **SMALL)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_the_recommended_method_is_weighed_where_the_statistics_tell():
    model, tokenizer = core.load_model("demo-mixtral", dtype="float32")
    ids = core.calibration_tokens("demo", tokenizer, sequences=24, length=64, seed=42)
    needs = ("usage", "outputs", "norms", "grams", "sample")
    stats = core.capture(model, ids, needs=needs, domains=domains_of("demo", 24), progress=False)
    before = logits(model, ids[:2])
    chosen = pipeline.residual(model, stats, experts=4, method="hc-smoe")
    best = pipeline.residual(model, stats, experts=4, method="least-residual")
    assert 0 < best < chosen < 2
    assert torch.equal(logits(model, ids[:2]), before)
    assert pipeline.residual(model, stats, experts=4, method="reap") is None
    options = dict(experts=4, statistics=stats, fidelity=1, **SMALL)
    advice = pipeline.shrink("demo-mixtral", **options)["advice"]
    assert f"{best:.1%}" in advice
    assert f"'hc-smoe' {chosen:.1%}" in advice
    assert pipeline.shrink("demo-mixtral", method="recommended", **options)["advice"] == ""
