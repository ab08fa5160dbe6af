"""The paper's tables in one line: costs that follow from the models' shapes alone, cells that are measured
once.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import hcsmoe_core as core
from benchmarks import reproduce
from hcsmoe_core.score.evaluation import paired
from hcsmoe_core.studies import paper, sweep

TOKENS = 32 * 2048
# Of the two models: layers, experts, hidden size, expert width, experts a token; weights of one layer's
# attention, and of what else it has beside its experts and two norms; vocabulary.
SHAPES = {
    "mixtral-8x7b": dict(layers=32, experts=8, hidden=4096, width=14336, chosen=2, vocabulary=32000)
    | dict(attention=2 * 4096 * 4096 + 2 * 4096 * 1024, shared=0),
    "qwen1.5-moe": dict(layers=24, experts=60, hidden=2048, width=1408, chosen=4, vocabulary=151936)
    | dict(attention=4 * 2048 * 2048 + 3 * 2048, shared=3 * 2048 * 5632 + 2048),
}
# Items of the split that is scored and choices of each, as the data sets have them.
ITEMS = dict(
    arc_challenge=1172,
    arc_easy=2376,
    boolq=3270,
    hellaswag=10042,
    mmlu=14042,
    openbookqa=500,
    rte=277,
    winogrande=1267,
)
CHOICES = dict.fromkeys(ITEMS, 4) | dict(boolq=2, rte=2, winogrande=2)
SIZES = {"mixtral-8x7b": (6, 4), "qwen1.5-moe": (45, 30)}


def weights(s, experts):
    """Weights of a model of a shape that has so many experts a layer."""
    expert = 3 * s["hidden"] * s["width"]
    layer = s["attention"] + s["shared"] + s["experts"] * s["hidden"] + 2 * s["hidden"] + experts * expert
    return 2 * s["vocabulary"] * s["hidden"] + s["layers"] * layer + s["hidden"]


@pytest.mark.parametrize("name", SHAPES)
def test_every_step_is_told_with_its_costs(name):
    shape, sizes = SHAPES[name], SIZES[name]
    found = reproduce.estimate(name, teraflops=50, bandwidth=4)
    whole, active = weights(shape, shape["experts"]), weights(shape, shape["chosen"])
    assert found["weights"] == whole
    assert round(whole / 1e9, 1) == {"mixtral-8x7b": 46.7, "qwen1.5-moe": 14.3}[name]  # as the paper says
    assert round(weights(shape, sizes[1]) / 1e9, 1) == {"mixtral-8x7b": 24.2, "qwen1.5-moe": 8.1}[name]
    assert found["active"] == active
    steps = found["steps"]
    settings = [
        ("o-prune",),
        ("f-prune",),
        ("s-prune",),
        ("m-smoe",),
        ("hc-smoe",),
        ("hc-smoe, linkage single",),
    ]
    merged = [f"{s}, {r} of {shape['experts']} experts" for r in sizes for (s,) in settings]
    wanted = [("evaluate", f"original, {shape['experts']} of {shape['experts']} experts")]
    wanted += [(step, what) for what in merged for step in ("plan", "merge", "evaluate")]
    assert [(s["step"], s["what"]) for s in steps[2:]] == wanted
    read, capture = steps[:2]
    assert (read["step"], read["bytes"]) == ("read", 2 * whole)
    assert capture["tokens"] == TOKENS == 65536
    experts = whole - weights(shape, 0)
    pairs = 4 * shape["layers"] * shape["experts"] ** 2 * shape["hidden"]
    assert capture["operations"] == 2 * TOKENS * (active + experts + pairs)
    for step in steps:
        if step["step"] == "evaluate":
            assert step["items"] == sum(ITEMS.values()) == 32946
            assert step["requests"] == sum(count * CHOICES[task] for task, count in ITEMS.items())
            assert step["operations"] == 2 * active * step["tokens"]
            assert 4e6 < step["tokens"] < 1e7
        if step["step"] == "merge":
            kept = sizes[0] if f", {sizes[0]} of" in step["what"] else sizes[1]
            assert step["bytes"] == 2 * experts + 2 * experts * kept // shape["experts"]
            assert (step["processor"] > 0) == ("m-smoe" in step["what"])  # whose neurons are matched
    assert max(s.get("processor", 0) for s in steps if "o-prune" in s["what"]) > 0
    told = sum(
        s.get("operations", 0) / 50e12 + s.get("bytes", 0) / 4e9 + s.get("processor", 0) for s in steps
    )
    assert found["seconds"] == pytest.approx(told)
    largest = 2 * weights(shape, sizes[0])
    assert found["memory"]["whole"] >= largest + 2 * experts > found["memory"]["streamed"] >= largest
    assert found["memory"]["unmerged"] >= 2 * whole
    assert found["disk"]["whole"] == 2 * whole + capture["bytes"]
    assert found["disk"]["streamed"] >= found["disk"]["whole"] + largest


def test_other_settings_cost_what_they_should():
    how = dict(
        model="demo-qwen",
        calibration="demo",
        sequences=12,
        length=64,
        tasks=["demo_units", "demo_facts"],
        limit=7,
    )
    found = reproduce.estimate("qwen1.5-moe", **how)
    model, _ = core.load_model("demo-qwen", dtype="float32")
    assert found["weights"] == sum(p.numel() for p in model.parameters())
    assert found["steps"][1]["tokens"] == 12 * 64
    assert {(s["items"], s["requests"]) for s in found["steps"] if s["step"] == "evaluate"} == {(14, 56)}
    assert {s["what"].split(", ")[-1] for s in found["steps"][3:]} == {"24 of 32 experts", "16 of 32 experts"}
    subjects = reproduce.estimate("mixtral-8x7b", tasks=["mmlu"], limit=10)["steps"][2]
    assert subjects["items"] == 570
    more = reproduce.estimate("mixtral-8x7b", tasks=["mmlu", "gsm8k"], limit=10)
    assert more["steps"][2] == subjects
    assert "not counted: gsm8k" in reproduce.step_table(more)
    with pytest.raises(
        ValueError, match='"name" argument must be one of "mixtral-8x7b", "qwen1.5-moe"; not \'mixtral\''
    ):
        reproduce.estimate("mixtral")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("mixtral-8x7b", "46.7 G"), ("qwen1.5-moe", "14.3 G")])
def test_a_dry_run_needs_neither_network_nor_weights(name, size, tmp_path):
    """With the hub cut off, an empty cache, and a folder that nothing is written to."""
    environment = os.environ | dict(HF_HOME=str(tmp_path / "empty"), HF_HUB_OFFLINE="1", PYTHONPATH=str(ROOT))
    command = [sys.executable, str(ROOT / "benchmarks/reproduce.py"), "--dry-run", "--teraflops", "200"]
    command += ["--out", str(tmp_path / "out")]
    options = dict(env=environment, capture_output=True, text=True)
    said = subprocess.run([*command, name], **options, check=True).stdout
    lines = said.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["time", "disk", "memory"]  # totals first
    assert "at 200 · 10¹² operations a second" in lines[0]
    steps = lines[5:]
    assert steps[0].startswith(f"read      {size} weights")
    assert "32 × 2,048 tokens of c4" in steps[1]
    assert [line.split()[0] for line in steps[3:]] == ["plan", "merge", "evaluate"] * 12
    assert not (tmp_path / "out").exists()
    refused = subprocess.run([*command, "mixtral-8x22b"], **options)
    assert refused.returncode == 1
    assert "must be one of" in refused.stderr
    assert "Traceback" not in refused.stderr


SMALL = dict(
    model="demo-mixtral", tasks=["demo_units", "demo_largest"], limit=6, dtype="float32", device="cpu"
)
SMALL |= dict(calibration="demo", sequences=12, length=64)


def measured(folder):
    return {
        sweep.setting_name(p) + str(p["experts"]): c["scores"]
        for c in cells(folder)
        for p in [c["parameters"]]
    }


def cells(folder):
    return [json.loads(path.read_text()) for path in folder.glob("05_accuracy-*.json")]


@pytest.mark.slow
def test_cells_are_measured_once_whole_or_streamed(tmp_path, monkeypatch):
    asked, plan = [], reproduce.make_plan

    def planned(*args, **options):
        asked.append(options["method"])
        if options["method"] == "s-prune" and len(asked) < 13:
            raise ValueError("not today")
        return plan(*args, **options)

    monkeypatch.setattr(reproduce, "make_plan", planned)
    with pytest.raises(
        RuntimeError,
        match=r"2 of 13 cells failed; run again to retry them.\n  s-prune, 6 of 8 experts: not today\n",
    ):
        reproduce.run("mixtral-8x7b", **SMALL, folder=tmp_path / "whole")
    out = reproduce.run("mixtral-8x7b", **SMALL, folder=tmp_path / "whole")
    assert len(asked) == 12 + 2  # what was done is not planned again
    monkeypatch.setattr(reproduce, "evaluate", lambda *_, **__: pytest.fail("measured twice"))
    assert reproduce.run("mixtral-8x7b", **SMALL, folder=tmp_path / "whole") == out
    monkeypatch.undo()

    model, tokenizer = core.load_model("demo-mixtral", dtype="float32", device="cpu")
    stats = core.capture(model, core.calibration_tokens("demo", tokenizer, sequences=12, length=64, seed=42))
    core.apply_plan(model, core.make_plan(stats, model, experts=6, linkage="single"))
    direct = core.evaluate(model, tokenizer, SMALL["tasks"], limit=6, batch_size=16, text=None)
    whole = measured(out)
    assert len(whole) == 13
    assert whole["hc-smoe, linkage single6"]["items"] == direct["items"]
    frame = paper.line_up(sweep.collect(out, model="demo-mixtral"), "mixtral")
    assert frame["ours"].notna().all()
    said = reproduce.report("mixtral-8x7b", out, "demo-mixtral")
    row = paired(whole["o-prune4"], whole["original0"], metrics=("acc",)).iloc[-1]
    assert f"{100 * row['difference']:+.2f} ± {100 * row['error']:.2f}" in said
    assert "demo-mixtral is not Mixtral-8x7B-v0.1" in said

    streamed = reproduce.run("mixtral-8x7b", **SMALL, folder=tmp_path / "streamed", load="streamed")
    assert {k: v["tasks"] for k, v in measured(streamed).items()} == {k: v["tasks"] for k, v in whole.items()}
    assert {c["size"]["num_experts"] for c in cells(streamed)} == {8}
    assert not (streamed / "merged").exists()
    monkeypatch.setattr(reproduce, "free_memory", lambda _: 1000)
    with pytest.raises(
        RuntimeError, match=r"original, 8 of 8 experts: its .* do not fit into the 1 kB of memory"
    ):
        reproduce.run("mixtral-8x7b", **SMALL, folder=tmp_path / "small", load="streamed")
    assert not list((tmp_path / "small").rglob("*.safetensors"))
