"""The command as a person uses it: another process, its output, its exit code."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, logits, tiny_model
from safetensors.torch import save_file

import hcsmoe_core as core


def hcsmoe(*arguments, fails=False, module="hcsmoe_core.ui.cli", **environment):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TQDM_DISABLE": "1"} | environment,
    )
    assert done.returncode == (2 if fails else 0), done.stderr
    if fails:
        assert "Traceback" not in done.stderr
        return done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a small model, a file of token ids and their statistics."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("mixtral").save_pretrained(folder / "model")
    ids = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    size = ("--sequences", 6, "--length", 20)
    hcsmoe(
        "capture",
        folder / "model",
        "--calibration",
        folder / "ids.safetensors",
        *size,
        "--out",
        folder / "s.safetensors",
    )
    return folder


@pytest.mark.slow
def test_capture_plan_merge_step_by_step_and_in_one_go(work):
    model, _ = core.load_model(work / "model")
    ids = core.calibration_tokens(work / "ids.safetensors", sequences=6, length=20)
    stats = core.load_statistics(work / "s.safetensors")
    direct = core.capture(model, ids)
    assert all(torch.equal(direct.layers[n].usage_count, s.usage_count) for n, s in stats.layers.items())
    table = hcsmoe(
        "plan", work / "s.safetensors", "--experts", 4, "--linkage", "single", "--out", work / "p.json"
    )
    assert "model.layers.2.mlp.experts" in table
    plan = core.load_plan(work / "p.json")
    assert plan.layers == core.make_plan(stats, experts=4, linkage="single").layers
    said = hcsmoe("merge", work / "model", "--plan", work / "p.json", "--out", work / "m")
    assert "4 experts per layer" in said
    wanted = logits(core.apply_plan(model, plan), ids)
    assert torch.equal(logits(core.load_merged(work / "m"), ids), wanted)
    options = (
        "--calibration",
        work / "ids.safetensors",
        "--sequences",
        6,
        "--length",
        20,
        "--linkage",
        "single",
    )
    hcsmoe("merge", work / "model", "--experts", 4, *options, "--out", work / "m2")
    assert (work / "m2/model.safetensors").read_bytes() == (work / "m/model.safetensors").read_bytes()
    by_weight = ("--similarity", "weight", "--model", work / "model")
    hcsmoe("plan", work / "s.safetensors", "--experts", 2, *by_weight, "--out", work / "w.json")
    assert core.load_plan(work / "w.json").settings["similarity"] == "weight"


@pytest.mark.slow
def test_capture_until_stable_says_what_each_layer_needed(work):
    options = ("--calibration", work / "ids.safetensors", "--sequences", 6, "--length", 20)
    options += ("--until-stable", 0.01, "--stable-at", "7,2", "--every", 2)
    said = hcsmoe("capture", work / "model", *options, "--out", work / "until.safetensors")
    stats = core.load_statistics(work / "until.safetensors")
    assert stats.stability["agreement"] == 0.01
    assert stats.model["every"] == 2
    for layer, found in stats.stability["layers"].items():
        assert found["experts"] == [7, 2]
        assert any(layer in line and "7, 2" in line for line in said.splitlines())
    assert f"after {stats.num_tokens} of 120 tokens" in said


@pytest.mark.slow
def test_capture_stops_by_what_groups_cost(work):
    options = (
        "--calibration",
        work / "ids.safetensors",
        "--sequences",
        6,
        "--length",
        20,
        "--until-excess",
        50,
    )
    said = hcsmoe("capture", work / "model", *options, "--out", work / "excess.safetensors")
    stats = core.load_statistics(work / "excess.safetensors")
    assert stats.stability["excess"] == 50
    assert f"stable after {stats.num_tokens} of 120 tokens" in said
    refused = hcsmoe(
        "capture",
        work / "model",
        *options,
        "--until-stable",
        0.5,
        "--out",
        work / "no.safetensors",
        fails=True,
    )
    assert "--until-stable" in refused
    assert not (work / "no.safetensors").exists()


@pytest.mark.slow
def test_evaluate_an_embedded_model_with_a_plan(tmp_path):
    size = ("--sequences", 12, "--length", 64, "--dtype", "float32")
    hcsmoe("capture", "demo-mixtral", *size, "--out", tmp_path / "s.safetensors")
    hcsmoe("plan", tmp_path / "s.safetensors", "--experts", 4, "--out", tmp_path / "p.json")
    options = (
        "--tasks",
        "demo_units,demo_largest",
        "--limit",
        12,
        "--sequences",
        12,
        "--length",
        64,
        "--dtype",
        "float32",
    )
    options += ("--answers", "none")
    said = [
        hcsmoe(
            "evaluate", "demo-mixtral", "--plan", tmp_path / "p.json", *options, "--out", tmp_path / "r.json"
        )
        for _ in "ab"
    ]
    assert said[0] == said[1]  # the same digits on every run
    results = json.loads((tmp_path / "r.json").read_text())
    assert set(results["scores"]["tasks"]) == {"demo_units", "demo_largest"}
    assert results["plan"]["experts"] == 4
    assert results["scores"]["settings"]["limit"] == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("plan", "{s}", "--experts", 0, "--out", "{new}"),
            "--experts must be a whole number from 1 to 8; not 0",
        ),
        (
            ("plan", "{s}", "--experts", 9, "--out", "{new}"),
            "--experts must be a whole number from 1 to 8; not 9",
        ),
        (
            ("plan", "{s}", "--experts", 4, "--linkage", "centroid", "--out", "{new}"),
            'one of "average", "complete", "single"',
        ),
        (
            ("plan", "{s}", "--experts", 4, "--similarity", "x", "--out", "{new}"),
            'one of "expert-output", "router-logits"',
        ),
        (("plan", "{s}", "--experts", 4, "--merge", "x", "--out", "{new}"), 'one of "frequency", "average"'),
        (
            ("plan", "{s}", "--experts", 4, "--similarity", "weight", "--out", "{new}"),
            "give --model",
        ),
        (("plan", "{cut}", "--experts", 4, "--out", "{new}"), "not a readable statistics file"),
        (
            ("plan", "{s}", "--experts", 4, "--model", "{other}", "--out", "{new}"),
            "captured on another model",
        ),
        (("merge", "{model}", "--plan", "{cut}", "--out", "{new}"), "not a readable plan"),
        (("merge", "{model}", "--experts", 4, "--out", "{model}"), "exists; remove it"),
        (("merge", "{model}", "--out", "{new}"), "Give either a plan (--plan FILE) or the number of experts"),
        (
            (
                "merge",
                "{model}",
                "--experts",
                4,
                "--method",
                "recommended",
                "--linkage",
                "ward",
                "--out",
                "{new}",
            ),
            "linkage",
        ),
        (("merge", "{model}", "--experts", 99, "--out", "{new}"), "from 1 to 8; not 99"),
        (("merge", "{dense}", "--experts", 4, "--out", "{new}"), "No MoE layers found in"),
        (
            ("capture", "{model}", "--calibration", "{ids}", "--sequences", 60, "--out", "{new}"),
            "holds 6 sequences of 20 tokens",
        ),
        (
            (
                "capture",
                "{nan}",
                "--calibration",
                "{ids}",
                "--sequences",
                6,
                "--length",
                20,
                "--out",
                "{new}",
            ),
            "holds NaN",
        ),
        (("capture", "nobody/nothing", "--out", "{new}"), "no such folder here"),
        (("evaluate", "{model}"), "needs the model's tokenizer"),
        (("evaluate", "{broken}"), "cut short or damaged. Copy the checkpoint again"),
        (
            ("sweep", "linkge", "--model", "demo-qwen", "--out", "{new}"),
            "no grid linkge; give a .yml file, all, or one of",
        ),
        (
            ("sweep", "linkage", "--model", "demo-qwen", "-p", "lmit=3", "--out", "{new}"),
            "'lmit' is unknown; allowed are",
        ),
        (
            ("sweep", "linkage", "--model", "demo-qwen", "--slurm", "--workers", 2),
            "Give only one of --workers, --scheduler and",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(work, arguments, message, tmp_path):
    paths = {
        k: work / v
        for k, v in dict(s="s.safetensors", model="model", ids="ids.safetensors", cut="cut").items()
    }
    paths |= {k: work / k for k in ("other", "dense", "nan", "broken")} | {"new": tmp_path / "new"}
    prepare(work)
    before = sorted(work.rglob("*"))
    shown = [str(a).format(**paths) for a in arguments]
    said = hcsmoe(*shown, fails=True, HF_HUB_OFFLINE="1")
    assert message in said
    assert said.startswith("hcsmoe: ")
    assert not list(tmp_path.iterdir())
    assert sorted(work.rglob("*")) == before


def prepare(work):
    """Models and files that are wrong in one way each."""
    if (work / "broken").exists():
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    (work / "cut").write_bytes((work / "s.safetensors").read_bytes()[:100])
    tiny_model("mixtral", seed=4).save_pretrained(work / "other")
    damaged = tiny_model("mixtral")
    with torch.no_grad():
        damaged.model.layers[0].mlp.experts.gate_up_proj[0, 0, 0] = torch.nan
    damaged.save_pretrained(work / "nan")
    small = dict(
        vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(work / "dense")
    (work / "broken").mkdir()
    (work / "broken/config.json").write_text('{"model_type": "mixtral", ')


def test_help_names_every_verb():
    said = hcsmoe("--help")
    assert all(verb in said for verb in ("capture", "plan", "merge", "evaluate"))
    assert "--full" in hcsmoe("--help", module="tools.showcase")


def test_the_study_of_the_embedded_models_refuses_others():
    said = hcsmoe("--models", "demo-gpt", fails=True, module="tools.showcase")
    assert said.startswith('hcsmoe: The "models" argument must be one of')


def test_families_are_listed():
    table = hcsmoe("families", "mixtral", "doge")
    assert "mapped, folded, pruned" in table
    assert "single neurons" in table
    assert "one of" in hcsmoe("families", "gpt2", fails=True)


SCRIPT = """
import sys
import hcsmoe_core.methods
from hcsmoe_core.ui.cli import main

def fails():
    raise {error}

hcsmoe_core.methods.table = fails
sys.argv = ["hcsmoe", "methods"]
main()
"""


@pytest.mark.parametrize(
    ("error", "code", "traceback", "message"),
    [
        ("ValueError('a bug of ours')", 1, True, "a bug of ours"),
        ("KeyError('a bug of ours')", 1, True, "a bug of ours"),
        ("hcsmoe_core._util.InputError('what to do')", 2, False, "hcsmoe: what to do"),
        ("FileNotFoundError('no file')", 2, False, "hcsmoe: no file"),
        ("MemoryError()", 2, False, "Lower --batch-size"),
        ("__import__('torch').OutOfMemoryError('CUDA out of memory')", 2, False, "Lower --batch-size"),
    ],
)
def test_a_bug_shows_its_traceback_and_bad_input_does_not(error, code, traceback, message):
    script = SCRIPT.format(error=error)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == traceback
    assert message in done.stderr


@pytest.mark.slow
def test_a_method_of_ones_own_on_the_command_line(work, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy\n"
        "from hcsmoe_core.methods import METHODS, Method, group\n\n"
        "@group('alternating')\n"
        "def alternating(layer, count):\n"
        "    return numpy.arange(len(layer.free)) % count\n\n"
        "METHODS['alternating'] = Method('mine', title='every r-th expert joined', group='alternating')\n"
    )
    plugin = ("--plugin", tmp_path / "mine.py")
    assert "every r-th expert joined" in hcsmoe("methods", *plugin)
    options = ("--experts", 4, "--method", "alternating")
    assert (
        '"alternating"'
        not in hcsmoe("plan", work / "s.safetensors", *options, "--out", tmp_path / "p", fails=True)[60:]
    )
    hcsmoe("plan", work / "s.safetensors", *options, *plugin, "--out", tmp_path / "p.json")
    assert core.load_plan(tmp_path / "p.json").layers[0].labels == [0, 1, 2, 3, 0, 1, 2, 3]
    source = ("--calibration", work / "ids.safetensors", "--sequences", 6, "--length", 20)
    said = hcsmoe("merge", work / "model", *options, *source, *plugin, "--out", tmp_path / "merged")
    assert "4 experts" in said
    assert core.load_merged(tmp_path / "merged") is not None
