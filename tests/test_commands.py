"""Commands in this process: what they refuse and in which words, what they print, what they write."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

import hcsmoe_core as core
from hcsmoe_core.ui import cli

SIZE = ("--sequences", 4, "--length", 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Statistics of both embedded models, with and without the sample, and plans from them."""
    folder = tmp_path_factory.mktemp("commands")
    for name, methods in (("demo-mixtral", ("hc-smoe",)), ("demo-qwen", ("hc-smoe", "trimming"))):
        model, tokenizer = core.load_model(name)
        ids = core.calibration_tokens("demo", tokenizer, sequences=4, length=32)
        stats = core.capture(model, ids, methods=methods, progress=False)
        stats.save(folder / f"{name}.safetensors")
        for linkage in ("average", "single"):
            core.make_plan(stats, experts=4, linkage=linkage).save(folder / f"{name}-{linkage}.json")
    core.make_plan(stats, experts=16, method="trimming").save(folder / "trimming.json")
    return folder


@pytest.fixture
def run(made, tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; ``{made}`` in its words is the folder of what was made."""
    monkeypatch.chdir(tmp_path)

    def run(line, *more, code=0):
        words = [*line.format(made=made).split(), *map(str, more)]
        monkeypatch.setattr(sys, "argv", ["hcsmoe", *words])
        left = 0
        try:
            cli.main()
        except SystemExit as leaving:
            left = leaving.code or 0
        said = capsys.readouterr()
        assert left == code, said.err
        return said.err if code else said.out

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model is loaded."""
    from hcsmoe_core import checkpoint
    from hcsmoe_core.studies import pipeline

    for module, name in ((pipeline.streaming, "open_model"), (checkpoint, "load_model")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(core, "load_model", lambda *_, **__: pytest.fail("loaded"), raising=False)


def test_version_help_and_completion(run):
    assert run("--version") == f"hcsmoe {core.__version__}\n"
    for line in ("-h", "merge -h", "capture --help"):
        said = run(line)
        assert max(map(len, said.splitlines())) <= 80
    assert "Calibration text" in said
    assert "(that of the" in said
    assert "--install-completion" in run("-h")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("capture demo-qwen --sequences -2 --out s", "'--sequences'"),
        ("capture demo-qwen --every 0 --out s", "'--every'"),
        ("capture demo-qwen --until-stable 2 --out s", "'--until-stable'"),
        ("capture demo-qwen --needs smaple --out s", '--needs must be one of "sample", "usage"'),
        ("capture demo-qwen --for repa --out s", '"reap"'),
        ("capture demo-qwen --out {made}/demo-qwen.safetensors", "exists; give another --out, or --force"),
        ("evaluate demo-qwen --limit -1", "'--limit'"),
        ("evaluate demo-qwen --tasks demo_unit", "--tasks names demo_unit, which"),
        ("merge demo-qwen --experts 4 --linkage wrad --out m", '--linkage must be one of "ward", "average"'),
        ("merge demo-qwen --experts 4 --set ridge=x --out m", "--set ridge takes a number; not 'x'"),
        ("merge demo-qwen --experts 4 --method hcsmo --out m", '--method must be one of "hc-smoe"'),
        (
            "merge demo-qwen --experts 4 --router folded --statistics {made}/demo-mixtral.safetensors "
            "--out m",
            "capture again by: hcsmoe capture demo-mixtral --needs usage,outputs,sample --out",
        ),
        ("merge demo-qwen --out m", "Give either a plan (--plan FILE) or the number of experts"),
    ],
)
def test_arguments_are_checked_before_a_model_is_loaded(run, no_model, line, message):
    assert message in run(line, code=2)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "{made}/demo-mixtral.safetensors --similarity cka",
            "demo-mixtral --needs usage,outputs,sample --out",
        ),
        ("{made}/demo-mixtral.safetensors --method trimming", "Method 'trimming' needs 'sample'"),
        ("{made}/demo-mixtral.safetensors --method reap --linkage ward", "--linkage is taken by"),
        ("{made}/demo-mixtral.safetensors --set fuzzifier=9", "--set fuzzifier is taken by"),
        ("{made}/demo-mixtral.safetensors --set gruoping=x", "with a name of group, align,"),
        ("{made}/demo-mixtral.safetensors --similarity weight", "with these settings; give --model."),
        ("nothing.safetensors", "make one with: hcsmoe capture MODEL --out nothing.safetensors"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_in_the_words_of_the_command(run, line, message):
    assert message in run(f"plan {line} --experts 4 --out p.json", code=2)
    assert list(Path().iterdir()) == []


def test_a_plan_is_printed_as_it_is_and_never_overwritten(run, made):
    said = run("plan {made}/demo-qwen.safetensors --experts 16 --method Trimming --out p.json")
    first = next(line for line in said.splitlines() if "layers.0" in line)
    assert first.split() == [
        "model.layers.0.mlp.experts",
        *"32 of 32 50.0% 0.0%".split(),
        *first.split()[-4:],
    ]
    assert first.endswith("later")  # trimmed outputs are known only after the merge
    assert said.endswith("wrote p.json\n")
    assert max(map(len, said.splitlines())) <= 80
    before = (made / "trimming.json").read_bytes()
    assert "exists" in run("plan {made}/demo-qwen.safetensors --experts 4 --out {made}/trimming.json", code=2)
    assert (made / "trimming.json").read_bytes() == before
    said = run(
        "plan {made}/demo-qwen.safetensors --experts 4 --similarity Expert_Output --out p.json --force"
    )
    assert core.load_plan("p.json").settings["similarity"] == "expert-output"
    assert "later" not in said.replace("(later)", "").partition("saved:")[0]


def test_statistics_of_another_model_are_refused(run):
    line = "merge demo-qwen --plan {made}/demo-qwen-average.json --statistics {made}/demo-mixtral.safetensors"
    assert "captured on another model (demo-mixtral," in run(f"{line} --out m", code=2)
    assert not Path("m").exists()


def test_paths_are_those_of_the_working_directory(run):
    said = run("merge demo-mixtral --plan {made}/demo-mixtral-average.json --fidelity 0 --out sub/m")
    assert said.startswith("wrote sub/m: 4 experts per layer\n")
    assert max(map(len, said.splitlines())) <= 80
    run("capture demo-mixtral --out sub/s.safetensors", *SIZE)
    umask = os.umask(0)
    os.umask(umask)
    for path in ("sub/s.safetensors", "sub/m/model.safetensors", "sub/m/config.json"):
        assert Path(path).stat().st_mode & 0o777 == 0o666 & ~umask
    assert "is merged already" in run("capture sub/m --out t.safetensors", code=2)
    assert "mapped checkpoint" in run("inspect sub/m")


def test_a_device_that_is_not_here_is_one_line(run, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    said = run("capture demo-mixtral --device cuda --out s.safetensors", code=2)
    assert said.startswith("hcsmoe: --device is cuda, which PyTorch cannot use here")
    assert said.count("\n") == 1
    assert "Traceback" in run("capture demo-mixtral --device cuda --out s.safetensors --verbose", code=2)


def test_moe_layers_are_looked_for_before_text_is_fetched(run, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from hcsmoe_core.studies import pipeline

    small = dict(vocab_size=96, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    LlamaForCausalLM(LlamaConfig(**small, num_attention_heads=2)).save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(pipeline, "_text", lambda *_, **__: pytest.fail("fetched"))
    assert "No MoE layers found" in run("capture dense --out s.safetensors", code=2)


def test_an_unknown_grid_is_an_error(run):
    assert "There is no grid linkge; give a .yml file, all, or one of linkage" in run(
        "sweep linkge --status", code=2
    )
    assert "was not swept" in run("sweep linkage --status")


def test_merge_tells_what_it_would_cost(run, no_model):
    said = run("merge demo-qwen --experts 16 --dry-run --out m")
    assert "2.18 M weights, 4.36 MB on disk" in said
    assert "24,576 tokens of demo" in said
    said = run("merge demo-qwen --plan {made}/trimming.json --dry-run --out m")
    assert "2.18 M weights" in said
    assert "calibration" not in said
    assert "--experts must be a whole number from 1 to 32" in run(
        "merge demo-qwen --experts 33 --dry-run --out m", code=2
    )
    assert list(Path().iterdir()) == []


def test_evaluate_is_quiet_and_says_the_experts_kept(run, monkeypatch, caplog):
    import lm_eval.evaluator

    monkeypatch.setattr(lm_eval.evaluator, "get_git_commit_hash", lambda: pytest.fail("git was asked"))
    line = "evaluate demo-mixtral --plan {made}/demo-mixtral-average.json --tasks demo_units --limit 2"
    said = run(f"{line} --text none --answers none --out r.json --lm-eval-out lm")
    assert said.endswith("wrote r.json\nwrote lm\n")
    assert [record for record in caplog.records if record.name.startswith("lm_eval")] == []
    size = json.loads(Path("r.json").read_text())["size"]
    assert (size["num_experts"], size["experts_kept"]) == (8, [4] * 4)
    (results,) = Path("lm/demo-mixtral").glob("results_*.json")
    assert "demo_units" in json.loads(results.read_text())["results"]
    (samples,) = results.parent.glob("samples_demo_units_*.jsonl")
    assert len(samples.read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", ["heatmap", "dendrogram", "layers"])
def test_plot_writes_the_format_of_the_suffix(run, kind):
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        said = run(f"plot {{made}}/demo-mixtral.safetensors --kind {kind} --experts 4 --out f{suffix}")
        assert said == f"wrote f{suffix}\n"
        assert Path(f"f{suffix}").read_bytes().startswith(magic)
    error = run("plot {made}/demo-mixtral.safetensors --kind tree --out f.gif", code=2)
    assert '--kind must be one of "heatmap", "dendrogram", "layers"; not' in error
    assert "--out must be one of" in run("plot {made}/demo-mixtral.safetensors --out f.gif", code=2)


def test_inspect_tells_what_is_in_a_file_or_a_model(run):
    said = run("inspect {made}/demo-mixtral.safetensors")
    assert "statistics of   demo-mixtral (MixtralForCausalLM)" in said
    assert "tokens          128" in said
    said = run("inspect {made}/trimming.json")
    assert "merge needs     its statistics" in said
    assert "32 of 32" in said
    said = run("inspect demo-qwen")
    assert "Qwen2MoeForCausalLM" in said
    assert "There is no plan" in run("inspect nothing.json", code=2)
    save_file({"x": torch.zeros(1)}, "x.safetensors")
    assert "no statistics file" in run("inspect x.safetensors", code=2)


def test_diff_tells_which_layers_and_groups_differ(run):
    said = run("diff {made}/demo-qwen-average.json {made}/demo-qwen-single.json")
    assert said.startswith("linkage: average → single\n")
    assert "experts, agreement 0." in said
    said = run("diff {made}/demo-qwen-average.json {made}/demo-qwen-average.json")
    assert said == "4 of 4 layers are the same\n"
    assert "models of other shapes" in run(
        "diff {made}/demo-qwen-average.json {made}/demo-mixtral-average.json", code=2
    )


def test_notebooks_are_copied_with_their_grids(run):
    assert run("notebooks nb").startswith("wrote nb\n")
    assert len(list(Path("nb/grids").iterdir())) == len(list((ROOT / "notebooks/grids").glob("*.yml")))
    assert "exists" in run("notebooks nb", code=2)


def test_methods_explains_one(run):
    said = run("methods HC-SMoE")
    assert 'group "hierarchical"' in said
    assert "--set align=none" in said
    assert max(map(len, run("methods").splitlines())) <= 80
    assert max(map(len, run("families mixtral").splitlines())) <= 80


@pytest.mark.slow
def test_the_notebooks_are_found_outside_a_checkout(tmp_path):
    """The package as a wheel holds it, in an empty folder."""
    built = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        tmp_path,
        "--build-lib",
        tmp_path / "lib",
    ]
    subprocess.run(built, cwd=ROOT, check=True, capture_output=True)
    (tmp_path / "empty").mkdir()
    for words in (["sweep"], ["notebooks", "nb"]):
        done = subprocess.run(
            [sys.executable, "-m", "hcsmoe_core.ui.cli", *words],
            cwd=tmp_path / "empty",
            env=os.environ | {"PYTHONPATH": str(tmp_path / "lib")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "linkage: " in done.stdout or done.stdout.startswith("wrote nb")
    assert (tmp_path / "empty/nb/grids/linkage.yml").is_file()
