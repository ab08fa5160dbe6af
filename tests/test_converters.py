"""llama.cpp's own converter opens what is written for stock engines."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from hcsmoe_core import calibration_tokens, capture, load_model, make_plan, save_merged

# Its source package carries llama.cpp, the converter included.
PACKAGE = "llama-cpp-python==0.3.36"
# The converter knows tokenizers by a hash of what they do, and stops at others, such as the embedded models'.
# Nor is that one of SentencePiece, which it looks for first.
CONVERT = """
import sys
root = sys.argv[1]
sys.path[:0] = [root, root + "/gguf-py"]
from conversion import base
for kind in vars(base).values():
    if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
        kind.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        kind._set_vocab_sentencepiece = lambda self: open("/none")
import convert_hf_to_gguf
sys.argv = ["convert", *sys.argv[2:]]
convert_hf_to_gguf.main()
"""
READ = """
import json, sys
sys.path.insert(0, sys.argv[1] + "/gguf-py")
import numpy, gguf
file = gguf.GGUFReader(sys.argv[2])
fields = {name: field.contents() for name, field in file.fields.items() if "expert" in name}
total = lambda t: float(numpy.abs(t.data.astype("f8")).sum())
tensors = {t.name: [list(map(int, t.shape)), total(t)] for t in file.tensors}
print(json.dumps([fields, tensors]))
"""


def sources(folder):
    """Folder of llama.cpp's sources, fetched into ``folder``; what pip says where they are unavailable."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
    got = subprocess.run(words, capture_output=True, text=True)
    if got.returncode:
        raise OSError(got.stderr.strip().splitlines()[-1])
    with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as content:
        content.extractall(folder, filter="data")
    return next(Path(folder).glob("*/vendor/llama.cpp"))


def convert(llama_cpp, folder, out):
    """Convert a model folder with llama.cpp's own converter."""
    options = [llama_cpp, folder, "--outfile", out, "--outtype", "f32"]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *map(str, options)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    try:
        return sources(tmp_path_factory.mktemp("llama"))
    except OSError as error:
        pytest.skip(f"LLAMA.CPP NOT TRIED: {PACKAGE} is unavailable here ({error})")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["row-kept", "folded", "pruned"])
def test_llama_cpp_converts_it(llama_cpp, kind, tmp_path):
    model, tokenizer = load_model("demo-qwen")
    rows = calibration_tokens("demo", tokenizer, sequences=8, length=64, seed=0)
    stats = capture(model, rows, needs=("usage", "outputs", "norms", "sample"), progress=False)
    settings = dict(method="reap") if kind == "pruned" else dict(router=kind)
    plan = make_plan(stats, model, experts=16, **settings)
    save_merged(model, plan, tmp_path / "m", stats=stats, tokenizer=tokenizer, router="plain")
    convert(llama_cpp, tmp_path / "m", tmp_path / "m.gguf")
    read = subprocess.run(
        [sys.executable, "-c", READ, str(llama_cpp), str(tmp_path / "m.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    fields, tensors = json.loads(read.stdout)
    assert fields["qwen2moe.expert_count"] == 16
    assert fields["qwen2moe.expert_used_count"] == 4
    written = load_file(tmp_path / "m" / "model.safetensors")
    for layer in range(model.config.num_hidden_layers):
        for ours, theirs in (("gate", "gate_exps"), ("up", "up_exps"), ("down", "down_exps")):
            shape, total = tensors[f"blk.{layer}.ffn_{theirs}.weight"]
            named = [
                written[f"model.layers.{layer}.mlp.experts.{e}.{ours}_proj.weight"].double()
                for e in range(16)
            ]
            assert shape == [*reversed(named[0].shape), 16]
            assert total == pytest.approx(sum(float(t.abs().sum()) for t in named))
        shape, total = tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        router = written[f"model.layers.{layer}.mlp.gate.weight"].double()
        assert shape == list(reversed(router.shape))
        assert total == pytest.approx(float(router.abs().sum()))
