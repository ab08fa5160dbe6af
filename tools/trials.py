"""Trials to break hcsmoe: damaged, forged and hostile files, given to whatever reads them.

``python -m tools.trials --out benchmarks/results/trials.json`` runs all of them (at least 8,000) in this
process and prints a table; ``tests/test_trials.py`` runs a sample. A trial damages one file of a good set
(statistics, plans, merged folders, calibration text, caches, results, grids), reads it as the command line
does, and is classed:

harmless
    The same result as from the undamaged file.
named
    Refused in words that name the file, layer, field or argument.
unnamed
    Refused in words that name none of these.
traceback
    Any exception that the command line would show as a bug.
other
    Accepted with another result, without a word.
hang
    Not ended within :data:`LIMIT` seconds.
"""

import argparse
import collections
import contextlib
import copy
import hashlib
import json
import math
import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import yaml
from tqdm.auto import tqdm

import hcsmoe_core as core
from hcsmoe_core import families, statistics
from hcsmoe_core._util import InputError, MissingPackageError, sha256_json, signed, write_json
from hcsmoe_core.score import evaluation
from hcsmoe_core.studies import comparison, grids, sweep
from hcsmoe_core.text.own_text import own_text

LIMIT = 20  # seconds after which a trial counts as hanging
CLASSES = ("harmless", "named", "unnamed", "traceback", "other", "hang")
REFUSED = (InputError, MissingPackageError, OSError)  # what the command line says in one line
# What a JSON value is replaced by: other types, the ends of ranges, and what overflows.
ODD = [
    None,
    True,
    "",
    "x",
    -1,
    0,
    3,
    99,
    1.5,
    2**63,
    10**400,
    math.nan,
    math.inf,
    -math.inf,
    [],
    [[]],
    {},
    {"x": 1},
    "\ud800",
]


class Hang(BaseException):
    """A trial took longer than :data:`LIMIT`."""


@dataclass
class Target:
    """Something that is read back.

    Attributes
    ----------
    name : str
    path : Path
        File that is damaged.
    read : callable
        Reads it; gives a value that is equal for equal results.
    damage : callable
        ``(data, random)`` to ``(what was done, damaged bytes)``.
    trials : int
        Of a full run.
    forgeable : bool
        Whether another result is by design, as of a plan written by hand.
    """

    name: str
    path: Path
    read: Callable
    damage: Callable
    trials: int
    forgeable: bool = False
    reset: Callable = field(default=lambda: None)


def flip(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One bit, a cut, a zeroed or doubled block, or nothing left."""
    kind = chance.choice(["bit"] * 6 + ["cut", "zeros", "double", "empty", "random"])
    at = chance.randrange(max(1, len(data)))
    block = slice(at, at + chance.choice([1, 16, 4096]))
    damaged = bytearray(data)
    if kind == "bit" and data:
        damaged[at] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        damaged = damaged[:at]
    elif kind == "zeros":
        damaged[block] = bytes(len(damaged[block]))
    elif kind == "double":
        damaged[at:at] = damaged[block]
    elif kind == "random":
        damaged[block] = chance.randbytes(len(damaged[block]))
    elif kind == "empty":
        damaged = bytearray()
    return f"{kind} at {at}", bytes(damaged)


def head(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One bit of a safetensors header."""
    size = 8 + int.from_bytes(data[:8], "little")
    at = chance.randrange(min(size, len(data)))
    return f"bit of header byte {at}", data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[
        at + 1 :
    ]


def edit(data: bytes, chance: random.Random, forge: Callable = lambda value: value) -> tuple[str, bytes]:
    """One value of a JSON document replaced by an odd one, left out or added, or the document itself."""
    value = json.loads(data)
    places = list(_places(value))
    if not places or chance.random() < 0.05:
        odd = chance.choice([*ODD, "{", "[" * 100_000, "\ud800"])
        raw = odd if isinstance(odd, str) and odd[:1] in "{[" else json.dumps(odd)
        return f"document is {raw[:20]}", raw.encode("utf-8", "surrogatepass")
    value = copy.deepcopy(value)
    *way, last = chance.choice(places)
    holder = value
    for key in way:
        holder = holder[key]
    done = chance.choice(["odd"] * 6 + ["remove", "add"])
    if done == "remove":
        del holder[last]
    elif done == "add" and isinstance(holder, dict):
        holder["unheard of"] = 1
    else:
        holder[last] = odd = chance.choice(ODD)
        done = f"is {odd!r:.20}"
    return f"{'.'.join(map(str, [*way, last]))} {done}", json.dumps(forge(value)).encode()


def forged(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """As :func:`edit`, with the checksum of a record made again."""

    def resign(value):
        unsigned = {key: item for key, item in value.items() if key != "sha256"}
        return signed(unsigned) if "sha256" in value else unsigned

    return edit(data, chance, resign)


def forged_head(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """As :func:`edit` for what a file of statistics says of itself, with its checksum made again."""
    tensors, size = safetensors.torch.load(data), int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["hcsmoe"])
    what, about = edit(json.dumps(header["about"]).encode(), chance)
    with contextlib.suppress(ValueError, RecursionError):
        header["about"] = json.loads(about)
        header["sha256"] = statistics._digest(tensors, header["about"])
    return what, safetensors.torch.save(tensors, {"hcsmoe": json.dumps(header)})


def hostile_grid(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """As :func:`edit` for a grid in YAML, with hostile values beside the odd ones."""
    value = yaml.safe_load(data) | {"paper": [], "base": {}, "read": {}, "embedded": {}, "seeds": [1]}
    if chance.random() < 0.2:
        value["axes"]["experts"] = [
            share := chance.choice(["1e-99999999%", "1/0", "9" * 500 + "%", ".", "%"])
        ]
        return f"experts: {share[:20]}", yaml.safe_dump(value).encode()
    what, edited = edit(json.dumps(value).encode(), chance)
    return what, edited  # JSON is YAML


def _places(value, way=()) -> Iterator[tuple]:
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield (*way, key)
        yield from _places(item, (*way, key))


@contextlib.contextmanager
def _limited():
    def stop(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read: Callable, expected: str, names: tuple[str, ...]) -> tuple[str, str]:
    """Class of one trial, and what was said."""
    try:
        with _limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _digest(read())
    except Hang:
        return "hang", ""
    except REFUSED as error:
        said = str(error)
        return ("named" if any(name in said for name in names) else "unnamed"), said
    except Exception:
        return "traceback", traceback.format_exc()
    return ("harmless" if result == expected else "other"), ""


def _digest(value) -> str:
    if isinstance(value, torch.Tensor):
        value = hashlib.sha256(value.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return sha256_json(value) if not isinstance(value, str) else value


def run(target: Target, trials: int, seed: int = 0, bar=None) -> tuple[dict, list]:
    """Damage a target again and again: counts by class, and every trial that was not as it should be."""
    chance, good = random.Random(f"{target.name} {seed}"), target.path.read_bytes()
    expected, counts, bad = _digest(target.read()), collections.Counter(), []
    names = (target.path.name, target.path.parent.name, "layer", '"', "'", "argument")
    allowed = {"harmless", "named"} | ({"other"} if target.forgeable else set())
    try:
        for _ in range(trials):
            what, damaged = target.damage(good, chance)
            target.reset()
            target.path.write_bytes(damaged)
            kind, said = outcome(target.read, expected, names)
            counts[kind] += 1
            if kind not in allowed:
                bad.append({"target": target.name, "what": what, "class": kind, "said": said[-800:]})
            if bar is not None:
                bar.update()
    finally:
        target.path.write_bytes(good)
        target.reset()
    return dict(counts), bad


def targets(folder: Path) -> list[Target]:
    """A good set of everything that is read back, in a folder, and how each is damaged and read."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    )
    sizes |= dict(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128
    )
    MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.2)).eval().save_pretrained(folder / "model")
    model, _ = core.load_model(folder / "model")
    ids = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(1))
    stats = core.capture(model, ids, methods=["hc-smoe", "trimming"], progress=False)
    plan = core.make_plan(stats, model, experts=3, progress=False)
    stats.save(folder / "stats.safetensors")
    plan.save(folder / "plan.json")
    by_hand = json.loads((folder / "plan.json").read_text())
    write_json(folder / "hand.json", {key: value for key, value in by_hand.items() if key != "sha256"})
    core.apply_plan(model, plan, stats)
    core.save_merged(model, plan, folder / "mapped", stats=stats)
    core.restore(model)
    kept = core.make_plan(stats, model, experts=3, method="f-prune", progress=False)
    core.apply_plan(model, kept, stats)
    core.save_merged(model, kept, folder / "plain", stats=stats)
    core.restore(model)

    def logits(path, load):
        with torch.no_grad():
            return load(path)(ids[:2]).logits

    def applied(path):
        loaded = core.load_plan(path)
        core.apply_plan(model, loaded, stats)
        try:
            with torch.no_grad():
                return model(ids[:1]).logits
        finally:
            core.restore(model)

    def sums():
        loaded = core.load_statistics(folder / "stats.safetensors")
        return {name: str(layer.usage_count.tolist()) for name, layer in loaded.layers.items()}

    def mapped():
        return logits(folder / "mapped", core.load_merged)

    def plain():
        return logits(folder / "plain", lambda path: core.load_model(path)[0])

    found = [
        Target("statistics, bytes", folder / "stats.safetensors", sums, flip, 300),
        Target("statistics, header", folder / "stats.safetensors", sums, head, 3000),
        Target("statistics, forged", folder / "stats.safetensors", sums, forged_head, 200, True),
        Target("plan", folder / "plan.json", lambda: applied(folder / "plan.json"), flip, 200),
        Target("plan, values", folder / "plan.json", lambda: applied(folder / "plan.json"), edit, 200),
        Target("plan by hand", folder / "hand.json", lambda: applied(folder / "hand.json"), edit, 1800, True),
    ]
    for name, read in (("mapped", mapped), ("plain", plain)):
        for file in sorted(path for path in (folder / name).iterdir() if path.is_file()):
            count = 60 if file.suffix == ".safetensors" else 700 if file.name == "config.json" else 60
            title = f"{name} folder, {file.name}"
            found.append(Target(title, file, read, flip, count))
            if file.suffix == ".json":
                found.append(Target(f"{title}, values", file, read, edit, count // 2))
    config = folder / "model/config.json"  # a folder of the user's own has no checksums

    def opened():
        return families.model_hash(core.load_model(folder / "model")[0])

    found.append(Target("model folder, config.json", config, opened, flip, 200, True))
    found.append(Target("model folder, config.json, values", config, opened, edit, 400, True))
    return found + _texts(folder, model) + _results(folder)


def _texts(folder, model):
    """Calibration text in every format, and the cache of text that the model wrote."""
    documents = [{"text": f"document {i} " * 20} for i in range(40)]
    (folder / "text.txt").write_text("\n\n".join(row["text"] for row in documents))
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    (folder / "text.json").write_text(json.dumps(documents))
    _, tokenizer = core.load_model("demo-qwen", dtype="float32")
    found = []
    for suffix in ("txt", "jsonl", "json"):
        path = folder / f"text.{suffix}"

        def read(path=path):
            return core.calibration_tokens(path, tokenizer, sequences=2, length=32)

        found.append(Target(f"calibration text .{suffix}", path, read, flip, 60, True))
        if suffix == "json":
            found.append(Target(f"calibration text .{suffix}, values", path, read, edit, 100, True))
    cache = folder / "own"
    write = dict(sequences=4, length=16, batch=4, folder=cache)
    own_text(model, None, **write)
    file = next(cache.rglob("*.safetensors"))
    found.append(Target("own text", file, lambda: own_text(model, None, **write), flip, 120))
    return found


def _results(folder):
    """A sweep's results, and a grid."""
    cells = folder / "cells"
    cells.mkdir()
    scores = {"mean_acc": 0.5, "mean_acc_stderr": 0.1, "mean_loss": 1.0, "tasks": {}, "domains": {}}
    cell = {"parameters": {"model": "m", "experts": 3, "method": "hc-smoe", "limit": None}, "scores": scores}
    cell |= {"size": {"weights": 10, "bytes": 20, "num_experts": 6}, "versions": {}}
    path = cells / "05_accuracy-0123456789ab.json"
    write_json(path, signed(cell))
    grid = folder / "grid.yml"
    grid.write_text("title: t\nabout: a\naxes:\n  experts: [1/2]\n  method: [hc-smoe, reap]\n")

    def collected():
        return sweep.collect(cells, model="m").to_json()

    def read():
        return [str(cell.parameters) for cell in grids.cells_of(grids.load(grid), "demo-qwen")]

    sweep.write_grid(
        cells, "g", "m", title="t", notebook="05_accuracy", cells=[{"id": "x", "parameters": {}}]
    )
    swept = cells / "g-m.grid.json"
    compared = folder / "compared/m/0123456789ab.json"
    of_cell = {"method": "hc-smoe", "experts": 3, "seed": 0, "result": {"scores": scores, "weights": 3}}
    write_json(compared, signed(of_cell))
    items = {"tasks": {"t": {"acc": 0.5}}, "items": {"t": {"of": "0", "acc": [0, 1]}}, "groups": {}}
    against = folder / "results.json"
    write_json(against, {"scores": items})

    def status():
        return sweep.status(cells).to_json()

    def table():
        return comparison.cells(folder / "compared", "m").to_json()

    def paired():
        return evaluation.paired(items, evaluation.load_scores(against)).to_json()

    return [
        Target("sweep result", path, collected, flip, 150),
        Target("sweep result, values", path, collected, edit, 50),
        Target("sweep result, forged", path, collected, forged, 150, True),
        Target("sweep, grid that was swept", swept, status, flip, 50),
        Target("sweep, grid that was swept, forged", swept, status, forged, 100, True),
        Target("comparison", compared, table, flip, 50),
        Target("comparison, forged", compared, table, forged, 100, True),
        Target("results compared against", against, paired, edit, 150, True),
        Target("grid", grid, read, flip, 200, True),
        Target("grid, values", grid, read, hostile_grid, 200, True),
    ]


def main():
    """Run the trials and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="file of the table and of every trial that failed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name has this in it")
    parser.add_argument("--share", type=float, default=1.0, help="of the trials of a full run")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="hcsmoe-trials-"))
    try:
        chosen = [target for target in targets(folder) if options.only in target.name]
        counts = [max(1, round(options.share * target.trials)) for target in chosen]
        table, failed = {}, []
        with tqdm(total=sum(counts), unit="trial") as bar:
            for target, count in zip(chosen, counts, strict=True):
                table[target.name], bad = run(target, count, options.seed, bar)
                failed += bad
    finally:
        shutil.rmtree(folder)
    print(f"{'':36}" + "".join(f"{kind:>10}" for kind in CLASSES))
    for name, row in table.items():
        print(f"{name:36}" + "".join(f"{row.get(kind, 0):10}" for kind in CLASSES))
    total = collections.Counter()
    for row in table.values():
        total.update(row)
    print(f"{sum(total.values()):<36,}" + "".join(f"{total[kind]:10}" for kind in CLASSES))
    for trial in failed[:20]:
        print(f"\n{trial['class']}: {trial['target']}, {trial['what']}\n{trial['said']}")
    if options.out:
        write_json(options.out, {"seed": options.seed, "table": table, "failed": failed})


if __name__ == "__main__":
    main()
