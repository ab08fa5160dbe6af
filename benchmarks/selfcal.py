"""What calibrating on the model's own text costs beside text of the domains that it is scored on: embedded
models, E/2.

Loss is measured on held-out text, and on text of the training split ("trained"), by which settings may be
chosen.

python benchmarks/selfcal.py --out benchmarks/results/selfcal.json        # goes on where it was interrupted
python benchmarks/selfcal.py --cases "in distribution;bos, 288" --seeds 0,1,2
"""

import argparse
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from hcsmoe_core import apply_plan, calibration_tokens, capture, load_model, make_plan, restore
from hcsmoe_core._util import read_json, versions, write_json
from hcsmoe_core.demo import corpus
from hcsmoe_core.methods import resolve
from hcsmoe_core.score.evaluation import perplexity
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import domains_of
from hcsmoe_core.text.own_text import repetition

METHODS = ("trimming", "hc-least-squares", "mergemoe", "hc-smoe")
TWO = ("code", "prose")  # not among the domains that the loss is the mean of
CASES = {  # source, sequences, length, tokens of the sample of layer inputs
    "in distribution": ("demo", 96, 256, 4096),
    "in distribution, sample 12k": ("demo", 96, 256, 12288),
    "in distribution, 288": ("demo", 288, 256, 4096),
    "code and prose": ("two", 96, 256, 4096),
    "random tokens": ("random", 96, 256, 4096),
    "token": ("self:start=token:temperature=1", 96, 256, 4096),
    "token, 288": ("self:start=token:temperature=1", 288, 256, 4096),
    "bos, 48": ("self:start=bos:temperature=1", 48, 256, 4096),
    "bos": ("self:start=bos:temperature=1", 96, 256, 4096),
    "bos, 288": ("self:start=bos:temperature=1", 288, 256, 4096),
    "bos, 288, sample 12k": ("self:start=bos:temperature=1", 288, 256, 12288),
    "bos, 288, sample 25k": ("self:start=bos:temperature=1", 288, 256, 24576),
    "bos, short": ("self:start=bos:temperature=1", 384, 64, 4096),
    "bos, long": ("self:start=bos:temperature=1", 24, 1024, 4096),
    "bos, temperature 0.5": ("self:start=bos:temperature=0.5", 96, 256, 4096),
    "bos, temperature 0.7": ("self:start=bos:temperature=0.7", 96, 256, 4096),
    "bos, temperature 0.85": ("self:start=bos:temperature=0.85", 96, 256, 4096),
    "bos, temperature 1.2": ("self:start=bos:temperature=1.2", 96, 256, 4096),
    "bos, 288, temperature 0.7": ("self:start=bos:temperature=0.7", 288, 256, 4096),
    "bos, 288, temperature 0.5": ("self:start=bos:temperature=0.5", 288, 256, 4096),
    "bos and two": ("two+self:start=bos:temperature=1", 192, 256, 4096),
    "token and two": ("two+self:start=token:temperature=1", 192, 256, 4096),
}


def tokens_of(source, model, tokenizer, *, sequences, length, seed):
    """Calibration tokens of a case, and the domain of each sequence."""
    if source == "random":
        ids = torch.randint(
            1, model.config.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(seed)
        )
        return ids, ["random"] * sequences
    if source == "two":
        every = len(corpus.DOMAINS) * sequences // len(TWO)
        names = domains_of("demo", every)
        ids = calibration_tokens("demo", tokenizer, sequences=every, length=length, seed=seed)
        chosen = [i for i, name in enumerate(names) if name in TWO]
        return ids[chosen], [names[i] for i in chosen]
    if "+" in source:
        parts = [
            tokens_of(part, model, tokenizer, sequences=sequences // 2, length=length, seed=seed)
            for part in source.split("+")
        ]
        return torch.cat([ids for ids, _ in parts]), [name for _, names in parts for name in names]
    ids = calibration_tokens(source, tokenizer, model=model, sequences=sequences, length=length, seed=seed)
    return ids, domains_of(source, sequences) or ["self"] * sequences


def measured(name, model, tokenizer, case, seed, loss):
    """Loss after each method of one model, case and seed."""
    source, sequences, length, sample = CASES[case]
    ids, domains = tokens_of(source, model, tokenizer, sequences=sequences, length=length, seed=seed)
    needs = tuple(dict.fromkeys(need for method in METHODS for need in resolve(method).needs))
    stats = capture(model, ids, needs=needs, sample=sample, domains=domains, progress=False)
    experts = model_size(model)["num_experts"] // 2
    about = dict(
        model=name, case=case, seed=seed, source=source, sequences=sequences, length=length, sample=sample
    )
    about |= {"repeated": repetition(ids)}
    for method in METHODS:
        apply_plan(model, make_plan(stats, model, experts=experts, method=method, progress=False), stats)
        yield about | {"method": method} | loss()
        restore(model)


def table(rows):
    """Loss that each method adds: mean over the seeds, a row for each model and case."""
    frame = pd.DataFrame(rows)
    for key in ("loss", "trained"):
        frame[key] -= frame[f"original_{key}"]
    wide = frame.pivot_table(
        index=["model", "case"], columns="method", values=["loss", "trained"], sort=False
    )
    wide["seeds"] = frame.groupby(["model", "case"], sort=False)["seed"].nunique()
    wide["repeated"] = frame.groupby(["model", "case"], sort=False)["repeated"].mean()
    return wide.round(3).to_string()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selfcal.json"))
    parser.add_argument("--models", default="demo-qwen,demo-mixtral")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--cases", default="", help="separated by semicolons; by default all")
    options = parser.parse_args()
    known = read_json(options.out) if options.out.exists() else None
    rows = known["rows"] if known else []
    cases = [case.strip() for case in options.cases.split(";")] if options.cases else list(CASES)
    done = {(row["model"], row["case"], row["seed"]) for row in rows}
    for name in options.models.split(","):
        model, tokenizer = load_model(name, dtype="float32")
        texts = {"loss": ("heldout", 96), "trained": ("train", 48)}
        texts = {
            key: calibration_tokens("demo", tokenizer, sequences=count, length=256, seed=0, split=split)
            for key, (split, count) in texts.items()
        }

        def loss(model=model, texts=texts):
            return {
                k: perplexity(model, ids, domains=domains_of("demo", len(ids)))["mean_loss"]
                for k, ids in texts.items()
            }

        whole = {f"original_{key}": value for key, value in loss().items()}
        todo = [(case, int(seed)) for seed in options.seeds.split(",") for case in cases]
        for case, seed in tqdm([pair for pair in todo if (name, *pair) not in done], desc=name, unit="case"):
            rows += [row | whole for row in measured(name, model, tokenizer, case, seed, loss)]
            write_json(options.out, {"rows": rows, "versions": versions()})
    print(table(rows))


if __name__ == "__main__":
    main()
