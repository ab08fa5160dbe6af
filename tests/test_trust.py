"""What a stranger's model may not: run code unasked, have others' files read, take for ever, break texts."""

import gc
import io
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, tiny_model, tokens
from safetensors.torch import save_file
from typer.testing import CliRunner

import hcsmoe_core as core
from hcsmoe_core import _util, checkpoint
from hcsmoe_core._util import InputError
from hcsmoe_core.checkpoint import export
from hcsmoe_core.plan import Plan
from hcsmoe_core.scale import streaming
from hcsmoe_core.studies import comparison, cost, pipeline
from hcsmoe_core.text import own_text
from hcsmoe_core.ui import cli

EVIL = """
open({marker!r}, "a").write(__name__)
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast
class EvilConfig(MixtralConfig):
    pass
class EvilModel(MixtralForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
def generate(*args, **options):
    pass
"""
CLASSES = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}


def edit(path, **values):
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A model folder with code that leaves a marker, and with links to it from everywhere; the marker."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "stranger", tmp_path / "marker"
    tiny_model("mixtral").save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(EVIL.format(marker=str(marker)))
    edit(folder / "config.json", auto_map=CLASSES)
    save_file({"input_ids": tokens()}, tmp_path / "ids.safetensors")
    return folder, marker


def command(*arguments):
    """A command of ours, to whose every question the answer is yes."""
    return CliRunner().invoke(cli.app, [*map(str, arguments)], input="y\n" * 50)


def commands(folder, tmp_path):
    text = ("--calibration", tmp_path / "ids.safetensors", "--sequences", 2, "--length", 8)
    core.capture(tiny_model("mixtral"), tokens()).save(tmp_path / "known.safetensors")
    return {
        "capture": (folder, "--out", tmp_path / "s.safetensors", *text),
        "capture streamed": (folder, "--out", tmp_path / "s2.safetensors", "--load", "streamed", *text),
        "merge": (folder, "--experts", 4, "--out", tmp_path / "m", *text),
        "plan": (tmp_path / "known.safetensors", "--experts", 4, "--out", tmp_path / "p", "--model", folder),
        "evaluate": (folder, "--limit", 1, "--text", "none", "--answers", "none"),
        "compare": (folder, "--methods", "hc-smoe", "--limit", 1, "--out", tmp_path / "c", *text),
        "sweep": ("linkage", "--model", folder, "--out", tmp_path / "w"),
        "reproduce": ("mixtral-8x7b", "--model", folder, "--limit", 1, "--out", tmp_path / "r", *text),
    }


@pytest.mark.parametrize("kind", ["evil", "mixtral"])
def test_no_command_runs_code_of_a_model_unasked(kind, stranger, tmp_path, monkeypatch):
    folder, marker = stranger
    edit(folder / "config.json", model_type=kind)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("hcsmoe_core.studies.runner.run", lambda cells, **_: [])  # notebooks: below
    for name, arguments in commands(folder, tmp_path).items():
        done = command(name.split()[0], *arguments)
        assert not marker.exists(), name
        if kind == "evil" and name != "reproduce":
            assert isinstance(done.exception, InputError), (name, done.exception)
            assert "--trust-remote-code" in str(done.exception)
            assert "\n" not in str(done.exception)


def test_no_function_runs_code_of_a_model_unasked(stranger, monkeypatch):
    folder, marker = stranger
    edit(folder / "config.json", model_type="evil")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    ways = [
        core.load_model,
        streaming.open_model,
        streaming.stream_model,
        checkpoint.load_skeleton,
        checkpoint.readable_config,
        cost.forecast,
        lambda path: pipeline.shrink(path, experts=4),
        lambda path: comparison.compare(path),
    ]
    for way in ways:
        with pytest.raises(InputError, match="needs Python code that comes with it"):
            way(str(folder))
    # A family for which transformers has no tokenizer; then the folder's own would be taken.
    edit(folder / "config.json", model_type="hunyuan_v1_moe", auto_map={})
    auto_map = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=auto_map)
    with pytest.raises(InputError, match="needs Python code that comes with it"):
        checkpoint.load_tokenizer(folder)
    assert not marker.exists()


def test_code_of_a_model_runs_when_asked_for(stranger, tmp_path):
    folder, marker = stranger
    for name, arguments in commands(folder, tmp_path).items():
        if name in ("capture", "capture streamed", "merge", "plan"):
            done = command(name.split()[0], *arguments, "--trust-remote-code")
            assert done.exit_code == 0, (name, done.exception)
            assert marker.exists(), name
            marker.unlink(missing_ok=True)
            for module in [module for module in sys.modules if module.startswith("transformers_modules")]:
                del sys.modules[module]
    loaded, _ = core.load_model(folder, trust_remote_code=True)
    assert type(loaded).__name__ == "EvilModel"
    assert torch.equal(loaded(tokens()).logits, tiny_model("mixtral")(tokens()).logits)
    assert "evil." not in (tmp_path / "m/config.json").read_text()


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model", max_shard_size="60KB")
    (tmp_path / "secret").write_text("a key")
    return tmp_path / "model"


@pytest.mark.parametrize("load", ["whole", "streamed"])
@pytest.mark.parametrize(
    "name", ["LICENSE", "tokenizer.json", "generation_config.json", "chat_template.jinja"]
)
def test_links_out_of_a_model_folder_are_refused(name, load, folder, tmp_path):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../secret")
    with pytest.raises(InputError, match=f"'{name}', which leads out of it, to .*secret"):
        streaming.open_model(folder, load=load)


@pytest.mark.parametrize(
    "where", ["../outside.safetensors", "{tmp}/outside.safetensors", "sub/../../outside.safetensors"]
)
def test_shards_outside_a_model_folder_are_refused(where, folder, tmp_path):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = next(iter(index["weight_map"].values()))
    shutil.move(folder / shard, tmp_path / "outside.safetensors")
    (folder / "sub").mkdir()
    names = {shard: where.format(tmp=tmp_path)}
    index["weight_map"] = {key: names.get(file, file) for key, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for load in (core.load_model, streaming.stream_model):
        with pytest.raises(InputError, match="which leads out of it"):
            load(folder)


def test_links_inside_a_folder_and_the_hubs_cache_are_read(folder, tmp_path):
    (folder / "LICENSE.real").write_text("do as you like")
    (folder / "LICENSE").symlink_to("LICENSE.real")
    snapshot = tmp_path / "models--o--n/snapshots/abc"
    shutil.copytree(folder, snapshot.parents[1] / "blobs")
    snapshot.mkdir(parents=True)
    for file in (snapshot.parents[1] / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (tmp_path / "link").symlink_to(folder)
    wanted = tiny_model("mixtral")(tokens()).logits
    for path in (folder, tmp_path / "link", snapshot):
        loaded, _ = core.load_model(path)
        assert torch.equal(loaded(tokens()).logits, wanted)
        (tmp_path / "copy").mkdir(exist_ok=True)
        export.copy_along(loaded, tmp_path / "copy")
    assert (tmp_path / "copy/LICENSE").read_text() == "do as you like"


def test_a_link_made_after_loading_is_not_copied(folder, tmp_path):
    loaded, _ = core.load_model(folder)
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    plan = core.make_plan(core.capture(loaded, tokens()), loaded, experts=4)
    with pytest.raises(InputError, match="LICENSE"):
        core.save_merged(loaded, plan, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# --- chat templates -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.load_tokenizer(_util.folder_of("demo-mixtral"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1/0 }}", "ZeroDivisionError"),
        ("{{ 'a' * 99999999999 }}", "MemoryError"),
        ("{{ 'a' * 9999999 }}", "more than 1,048,576 characters"),
        ("{{ range(9999999999) | list }}", "OverflowError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not done within"),
        ("{{ messages[0].nothing.at_all() }}", None),  # an error of jinja2: a template without such a chat
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", None),  # the sandbox
        ("{{ raise_exception('no system message') }}", None),
    ],
)
def test_a_hostile_chat_template_ends_in_one_line(template, reason, tokenizer, monkeypatch):
    monkeypatch.setattr(own_text, "SECONDS", 20 if reason is None or "within" not in reason else 4)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    model, started = tiny_model("mixtral"), time.perf_counter()
    with pytest.raises(InputError) as caught:
        own_text.own_text(model, tokenizer, sequences=1, length=4, start="chat", folder=None)
    assert "\n" not in str(caught.value)
    assert ("has no chat template" if reason is None else reason) in str(caught.value)
    assert time.perf_counter() - started < 60


# --- names --------------------------------------------------------------------------------------------------

NAMES = [
    "a|b",
    "<script>alert(1)</script>",
    "two\nlines",
    "# head\n---\nx: y",
    "[x](javascript:y)",
    "`c`",
    "$x$",
]


def test_names_do_not_become_markdown_or_yaml(tmp_path):
    model = tiny_model("mixtral")
    domains = [*NAMES, NAMES[0] + "2"][: len(tokens())]
    stats = core.capture(model, tokens()[: len(domains)], domains=domains)
    plain = core.make_plan(stats, model, experts=4)
    plan = Plan(
        plain.layers, plain.settings | {"odd\nkey|": "<script>\n---", "method": "m|\n<b>"}, plain.statistics
    )
    for name in ("someone/x\nlicense: mit\n---\n# head", "a|b<script>"):
        model.name_or_path = name
        folder = tmp_path / str(len(name))
        core.save_merged(model, plan, folder)
        card = (folder / "README.md").read_text(encoding="utf-8")
        head, body = card.removeprefix("---\n").split("\n---\n", 1)
        assert set(yaml.safe_load(head)) <= {"library_name", "tags", "base_model"}
        outside = "\n".join(line for line in body.splitlines() if not line.startswith("    "))
        assert "<script>" not in outside
        assert "](javascript" not in outside
        assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1
        rows = [line for line in body.splitlines() if line.startswith("| ")]
        assert {row.replace("\\|", "").count("|") for row in rows} == {3}


def test_figures_show_names_as_they_are():
    from matplotlib.text import Text

    from hcsmoe_core.ui import figures

    names = ["$x^{2$ $", r"$\nothing$", "a \ud800 b", r"cost \$5 $6$"]
    shown = ["$x^{2$ $", r"$\nothing$", "a ? b", "cost $5 $6$"]
    condensed = torch.rand(6, generator=torch.Generator().manual_seed(0)).double().numpy()
    tree = core.linkage(condensed)
    mix = {name: [0.25] * 4 for name in names}
    figure = figures.similarity_heatmap(condensed, tree, mix=mix, title=names[1], label=names[0])
    figure.savefig(io.BytesIO(), format="png")
    texts = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
    assert not any(text for _, text in texts)
    assert {*shown} <= {text for text, _ in texts}
    scores = {"tasks": {name: {"acc": 0.5, "acc_stderr": 0.1} for name in names}}
    figures.task_bars(scores, label=names[2], title=names[0]).savefig(io.BytesIO(), format="pdf")
    import pandas as pd

    columns = {"token": pd.Series(names, dtype=object), "share": [0.1] * 4, "count": [3] * 4}
    figures.expert_profile(dict.fromkeys(names, 0.2), pd.DataFrame(columns), expected=0.25).savefig(
        io.BytesIO()
    )
    columns = {"combination": ["a$"] * 4, "domain": pd.Series(names, dtype=object), "error": [0.1] * 4}
    figures.domain_errors(pd.DataFrame(columns | {"tokens": [5] * 4}), title=names[3]).savefig(io.BytesIO())
    lines = pd.DataFrame({"x": [1e-3, 1e2] * 2, "y": [1, 2, 3, 4], "h": [names[0]] * 2 + [names[3]] * 2})
    logarithmic = figures.curve(lines, x="x", y="y", hue="h", reference=(2.0, names[1]), log=True)
    logarithmic.savefig(io.BytesIO())
    assert any("mathdefault" in text.get_text() for text in logarithmic.findobj(Text))  # its own powers


# --- no place to write --------------------------------------------------------------------------------------


def test_embedded_tasks_need_no_home(tmp_path):
    program = (
        "import hcsmoe_core as core; m, t = core.load_model('demo-mixtral');"
        "print(core.evaluate(m, t, ['demo_units'], limit=2, text=None)['tasks'])"
    )
    home = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"), "/proc/nobody")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | home | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "demo_units" in done.stdout


# --- clusters -----------------------------------------------------------------------------------------------


def test_strangers_cannot_talk_to_the_scheduler_of_a_slurm_cluster(tmp_path, monkeypatch):
    """By a scheduler without jobs; with jobs, and SLURM, in test_clusters."""
    pytest.importorskip("cryptography")
    import dask_jobqueue
    import psutil

    from hcsmoe_core.studies import runner

    monkeypatch.setattr(dask_jobqueue.SLURMCluster, "adapt", lambda *_, **__: None)
    before = {connection.laddr for connection in psutil.Process().net_connections()}
    with runner.slurm(1, ["interface=lo"], logs=tmp_path / "logs") as engine:
        client = engine.executor._client
        address = client.scheduler.address
        assert address.startswith("tls://")
        assert client.run_on_scheduler(os.getpid) == os.getpid()
        for other in (address, address.replace("tls", "tcp")):
            program = f"import distributed; distributed.Client({other!r}, timeout=2); print('in')"
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
            assert done.returncode, done.stdout
        script = client.cluster.job_script()
        assert "--protocol tls://" in script
        assert "--dashboard-address 127.0.0.1:0" in script
        files = [*(tmp_path / "logs").glob(".dask-jobqueue.worker.*")]
        assert len(files) == 3
        for file in files:
            assert str(file) in script
            assert file.stat().st_mode & 0o077 == 0
        listening = {c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"} - before
        assert {place.ip for place in listening} == {"127.0.0.1"}
        assert not engine.dashboard or engine.dashboard.startswith("http://127.0.0.1:")
    del engine, client
    gc.collect()
    assert not [*(tmp_path / "logs").glob(".dask-jobqueue.worker.*")]


# --- long texts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [("lorem ", "ipsum\n", "x = 12; ", "日本語 ", "größe "), ("ab", "日本", "é")]
)
def test_a_long_text_is_encoded_in_pieces_with_the_same_ids(words, tokenizer, tmp_path):
    import random

    from hcsmoe_core.text import calibration

    read = []

    def watched(text, **options):
        read.append(len(text))
        return tokenizer(text, **options)

    text = "".join(random.Random(0).choices(words, k=150_000))
    whole = tokenizer(text)["input_ids"]
    assert list(calibration._token_ids(text, watched)) == whole
    assert read[-1] == len(text)
    assert len(read) > 1
    read.clear()
    (tmp_path / "long.txt").write_text(text * 30, encoding="utf-8")
    ids = core.calibration_tokens(tmp_path / "long.txt", watched, sequences=4, length=512)
    assert ids.flatten().tolist() == whole[:2048]
    assert sum(read) <= calibration.PIECE  # of 16 million characters
    read.clear()
    short = text[: calibration.PIECE]
    assert list(calibration._token_ids(short, watched)) == tokenizer(short)["input_ids"]
    assert read == [len(short)]
