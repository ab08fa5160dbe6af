"""Train the embedded models: ``python -m tools.train demo-qwen --out runs/train/demo-qwen``.

Both predict the next token of :mod:`hcsmoe_core.demo.corpus` (AdamW, warm-up, constant rate, cosine decay).
They differ in the origin of their experts:

``demo-mixtral``
    Eight experts from random weights: they have nothing in common.
``demo-qwen``
    One expert is trained, copied eightfold with noise, trained, and every expert is split in two twice more.
    Experts of one ancestor are a family; ``families.json`` beside the weights keeps them.

Batches depend on the seed and the step alone, so that a run which was stopped and resumed gives the weights
of one that was not.
"""

import argparse
import json
import math
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from hcsmoe_core._util import EMBEDDED
from hcsmoe_core.demo import corpus
from tools import models

SHARES = {
    "code": 0.14,
    "prose": 0.12,
    "arithmetic": 0.12,
    "sorting": 0.08,
    "brackets": 0.07,
    "dates": 0.08,
    "units": 0.08,
    "facts": 0.08,
    "roman": 0.07,
    "series": 0.06,
    "largest": 0.04,
    "recall": 0.06,
}


@dataclass(frozen=True)
class Recipe:
    """How one model is trained; a stage is a number of experts and a number of steps."""

    stages: tuple
    sequences: int = 16
    length: int = 256
    rate: float = 3e-3
    weight_decay: float = 0.1
    balance: float = 0.01  # weight of the load-balancing loss; without it experts starve
    warmup: int = 100
    decay: float = 0.4  # last share of all steps, in which the rate falls to 5 %
    noise: float = 0.3  # of a tensor's standard deviation, when experts are split
    seed: int = 0


RECIPES = {
    "demo-mixtral": Recipe(stages=((8, 6000),)),
    "demo-qwen": Recipe(stages=((1, 500), (8, 1500), (16, 1500), (32, 2500))),
}


def batch(tokenizer, recipe, step, device="cpu"):
    """Token ids ``(sequences, length + 1)`` of one step; each sequence has one domain."""
    rng = random.Random(f"{recipe.seed} {step}")
    domains = rng.choices(list(SHARES), weights=list(SHARES.values()), k=recipe.sequences)
    rows = []
    for domain in domains:
        ids = []
        characters = 4 * recipe.length
        while len(ids) <= recipe.length:
            ids = tokenizer(corpus.text_of(domain, rng, "train", characters))["input_ids"]
            characters *= 2
        rows.append(ids[: recipe.length + 1])
    return torch.tensor(rows, device=device)


def build(name, experts, seed):
    """An embedded model with random weights and a number of experts."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        models.configuration(name, experts), dtype=torch.float32, experts_implementation="eager"
    )


def split_experts(parent, child, noise, seed):
    """Fill ``child`` with ``parent``'s weights; expert ``e`` of E becomes the experts ``e·n … e·n + n − 1``.

    Every copy gets Gaussian noise of ``noise`` standard deviations of its tensor, so that the copies can
    part.
    """
    generator = torch.Generator().manual_seed(seed)
    source = parent.state_dict()
    with torch.no_grad():
        for key, target in child.state_dict().items():
            value = source[key]
            if value.shape == target.shape:
                target.copy_(value)
                continue
            copies = value.repeat_interleave(target.shape[0] // value.shape[0], 0)
            spread = noise * value.std() * torch.randn(target.shape, generator=generator)
            # One expert's router has learnt nothing: the first split starts from the random rows.
            target.copy_(target if value.shape[0] == 1 and ".gate." in key else copies + spread)


class RouterTap:
    """Records the router probabilities of the last forward pass, for the load-balancing loss."""

    def __init__(self, model):
        self.probabilities, self.chosen = [], []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._record)

    def _record(self, router, inputs, output):
        logits, _, chosen = output
        self.probabilities.append(logits.float().softmax(-1))
        self.chosen.append(chosen)

    def balance_loss(self):
        """``E · Σ_e (token share of e) · (mean probability of e)``, mean over layers (Switch, eq. 4)."""
        loss = 0.0
        for p, chosen in zip(self.probabilities, self.chosen, strict=True):
            experts = p.shape[-1]
            share = torch.bincount(chosen.flatten(), minlength=experts) / chosen.shape[0]
            loss = loss + experts * (share * p.mean(0)).sum()
        loss = loss / len(self.probabilities)
        self.probabilities, self.chosen = [], []
        return loss


def rate_at(recipe, step, since_split):
    """Learning rate: warm-up after start and splits, constant, cosine to 5 % over the last ``decay``."""
    total = sum(steps for _, steps in recipe.stages)
    left = (total - step) / (recipe.decay * total)
    factor = 1.0 if left >= 1 else 0.05 + 0.95 * 0.5 * (1 - math.cos(math.pi * left))
    return recipe.rate * factor * min(1.0, (since_split + 1) / recipe.warmup)


def optimizer_of(model, recipe):
    """AdamW; embeddings, norms and other vectors are not decayed."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim >= 2 and "embed" not in n)]
    groups = [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=True)


def save_checkpoint(folder, model, optimizer, progress):
    """Write weights and optimizer moments to one file, atomically."""
    tensors = {f"weight/{n}": p.detach() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    part = folder / "checkpoint.part"
    save_file(tensors, part, metadata={"progress": json.dumps(progress)})
    os.replace(part, folder / "checkpoint.safetensors")


def load_checkpoint(path, name, recipe, device):
    """Model, optimizer and progress of :func:`save_checkpoint`; the recipe must be the same."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
    if progress["recipe"] != json.loads(json.dumps(asdict(recipe))):
        raise ValueError(
            f"{path} was written by another recipe; give another --out, or remove it to start again."
        )
    tensors = load_file(path)
    model = build(name, progress["experts"], recipe.seed).to(device)
    optimizer = optimizer_of(model, recipe)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weight/{key}"])
            state = {
                k: tensors[f"{k}/{key}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{key}" in tensors
            }
            if state:
                optimizer.state[parameter] = {k: v if k == "step" else v.to(device) for k, v in state.items()}
    return model, optimizer, progress


def train(name, folder, recipe=None, device="cpu", every=250):
    """Train one embedded model and write it to ``folder/model``.

    Parameters
    ----------
    name : {"demo-mixtral", "demo-qwen"}
    folder : path
        Folder of checkpoints and the model; a run continues from its own checkpoint there.
    recipe : Recipe, optional
        By default that of the committed weights.
    every : int
        Steps between checkpoints.

    Returns
    -------
    dict
        Recipe, tokens, seconds, versions and the loss over the last hundred steps.
    """
    recipe = recipe or RECIPES[name]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = models.train_tokenizer()
    total = sum(steps for _, steps in recipe.stages)
    checkpoint = folder / "checkpoint.safetensors"
    model, progress = None, {"step": 0, "experts": 0, "seconds": 0.0, "losses": [], "recipe": asdict(recipe)}
    if checkpoint.exists():
        model, optimizer, progress = load_checkpoint(checkpoint, name, recipe, device)
        tap = RouterTap(model)
    bar = tqdm(total=total, initial=progress["step"], desc=name, unit="step")
    ends = [sum(s for _, s in recipe.stages[: i + 1]) for i in range(len(recipe.stages))]
    while progress["step"] < total:
        step = progress["step"]
        stage = next(i for i, end in enumerate(ends) if step < end)
        experts = recipe.stages[stage][0]
        if model is None or experts != progress["experts"]:
            grown = build(name, experts, recipe.seed).to(device)
            if model is not None:
                split_experts(model, grown, recipe.noise, recipe.seed + stage)
            model, optimizer, tap = grown, optimizer_of(grown, recipe), RouterTap(grown)
            progress["experts"] = experts
        started = time.perf_counter()
        model.train()
        since_split = step - (ends[stage] - recipe.stages[stage][1])
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, step, since_split)
        loss = take_step(
            model,
            optimizer,
            tap,
            batch(tokenizer, recipe, step, device),
            recipe.balance if experts > 1 else 0.0,
        )
        progress["losses"].append(round(loss, 4))
        progress["step"] += 1
        progress["seconds"] += time.perf_counter() - started
        bar.update()
        bar.set_postfix(
            experts=experts, loss=f"{sum(progress['losses'][-50:]) / len(progress['losses'][-50:]):.3f}"
        )
        if progress["step"] % every == 0 or progress["step"] == total:
            save_checkpoint(folder, model, optimizer, progress)
    bar.close()
    return finish(name, folder, model, tokenizer, recipe, progress)


def take_step(model, optimizer, tap, rows, balance):
    """Update once on a batch; returns the loss in nats per token, without the balancing term."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    balance_loss = tap.balance_loss()
    (loss + balance * balance_loss if balance else loss).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def finish(name, folder, model, tokenizer, recipe, progress):
    """Write the model folder: bfloat16 weights, tokenizer, families and a record of the training."""
    target = folder / "model"
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    counts = [experts for experts, _ in recipe.stages if experts > 1]
    last = recipe.stages[-1][0]
    if len(counts) > 1:
        families = {str(c): [e * c // last for e in range(last)] for c in counts[:-1]}
        note = (
            "Family of each expert, the same in every layer, by the number of ancestors that are told apart."
        )
        (target / "families.json").write_text(json.dumps({"note": note, "families": families}) + "\n")
    record = {
        "recipe": asdict(recipe),
        "shares": SHARES,
        "tokens": progress["step"] * recipe.sequences * recipe.length,
        "seconds": round(progress["seconds"]),
        "final_training_loss": round(sum(progress["losses"][-100:]) / len(progress["losses"][-100:]), 4),
        "losses_every_100_steps": progress["losses"][99::100],
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (target / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def main():
    """Command line."""
    parser = argparse.ArgumentParser(description="Train an embedded model.")
    parser.add_argument("name", choices=EMBEDDED)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoints and of the finished model"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's choice)")
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    record = train(arguments.name, arguments.out, device=arguments.device, every=arguments.every)
    print(json.dumps({k: record[k] for k in ("tokens", "seconds", "final_training_loss")}))


if __name__ == "__main__":
    main()
