"""llama.cpp runs what is written for stock engines: logits and loss beside those of transformers on the same
checkpoint.

python -m venv /tmp/llama && /tmp/llama/bin/pip install llama-cpp-python==0.3.36    (builds llama.cpp; needs
cmake and g++) python benchmarks/llama_cpp.py --python /tmp/llama/bin/python --out
benchmarks/results/llama_cpp.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from hcsmoe_core import calibration_tokens, capture, find_moe_layers, load_model, make_plan, save_merged
from hcsmoe_core._util import versions, write_json

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from test_converters import PACKAGE, convert, sources  # noqa: E402

NEW = 32  # tokens written one by one
# In the interpreter that has llama.cpp: logits of each sequence, and what it writes greedily after the first
# half.
RUN = """
import json, sys
import llama_cpp, numpy
gguf, ids, out, new = sys.argv[1:]
rows = numpy.load(ids).tolist()
options = dict(n_ctx=512, n_batch=512, n_threads=1, logits_all=True, type_k=0, type_v=0)
model = llama_cpp.Llama(gguf, **options, verbose=False)
logits, written = [], []
for row in rows:
    model.reset()
    model.eval(row)
    logits.append(model.scores[: len(row)].copy())
    model.reset()
    model.eval(row[: len(row) // 2])
    made = []
    for _ in range(int(new)):
        made.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(made[-1:])
    written.append(made)
numpy.savez(out, logits=numpy.stack(logits), written=numpy.array(written))
"""


def loss_of(logits, ids):
    """Mean loss of the next token, in nats."""
    logs = torch.from_numpy(logits[:, :-1]).double().log_softmax(-1)
    return float(-logs.gather(2, ids[:, 1:, None]).mean())


def compared(folder, ids, llama_cpp, python, work):
    """Both engines on one checkpoint, in float32."""
    convert(llama_cpp, folder, work / "m.gguf")
    np.save(work / "ids.npy", ids.numpy())
    subprocess.run(
        [python, "-c", RUN, work / "m.gguf", work / "ids.npy", work / "out.npz", str(NEW)], check=True
    )
    theirs = np.load(work / "out.npz")
    model, _ = load_model(folder, dtype="float32")
    half = ids[:, : ids.shape[1] // 2]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        ours = model(input_ids=ids).logits.numpy()
        written = model.generate(
            half, attention_mask=torch.ones_like(half), max_new_tokens=NEW, do_sample=False
        )
    return {
        "largest_difference": float(abs(ours - theirs["logits"]).max()),
        "largest_logit": float(abs(ours).max()),
        "same_likeliest": float((ours.argmax(-1) == theirs["logits"].argmax(-1)).mean()),
        "loss": {"transformers": loss_of(ours, ids), "llama.cpp": loss_of(theirs["logits"], ids)},
        "same_written": float((written[:, half.shape[1] :].numpy() == theirs["written"]).mean()),
    }


def fitted(name, folder):
    """An embedded model as llama.cpp takes it: Qwen2-MoE with an output matrix of its own, and weights not
    normalised.
    """
    model, tokenizer = load_model(name)
    model.config.tie_word_embeddings = False
    if hasattr(model.config, "norm_topk_prob"):
        model.config.norm_topk_prob = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", required=True, help="An interpreter that can import llama_cpp.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/llama_cpp.json"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        llama_cpp = sources(work)
        for name, experts in (("demo-qwen", 16), ("demo-mixtral", 4)):
            model, tokenizer = fitted(name, work / name)
            tokens = calibration_tokens("demo", tokenizer, sequences=48, length=256, seed=0)
            ids = calibration_tokens("demo", tokenizer, sequences=4, length=256, seed=0, split="heldout")
            stats = capture(model, tokens, needs=("usage", "outputs", "norms", "sample"), progress=False)
            for kind in ("original", "row-kept", "folded", "pruned"):
                kept = find_moe_layers(model)[0].num_experts if kind == "original" else experts
                how = {"original": dict(method="reap"), "pruned": dict(method="reap")}.get(
                    kind, dict(router=kind)
                )
                plan = make_plan(stats, model, experts=kept, **how)
                saved = work / f"{name}-{kind}"
                save_merged(model, plan, saved, stats=stats, tokenizer=tokenizer, router="plain")
                row = dict(model=name, experts=kept, kind=kind) | compared(
                    saved, ids, llama_cpp, options.python, work
                )
                rows.append(row)
                print(json.dumps(row), flush=True)
    write_json(options.out, {"rows": rows, "llama.cpp": PACKAGE, "versions": versions()})


if __name__ == "__main__":
    main()
