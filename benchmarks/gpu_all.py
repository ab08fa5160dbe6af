"""What the library does on a GPU, in six minutes: that it works there, that it agrees with the CPU, and how
fast it is.

    python benchmarks/gpu_all.py --out benchmarks/results/gpu.json
    python benchmarks/gpu_all.py --device cpu --small                  # that it runs

Each part is a process of its own with a limit of seconds; what fails is told in its place, and the rest goes
on. The file is written anew after every part.

imports      which packages are missing, and that the library and an embedded model work without them
correctness  tiny random models of several families in float32, on the CPU and on the GPU: relative
differences of statistics,
             of the same plan's merged logits, and whether each device's own plan has the same groups; what is
             saved and loaded
experts      benchmarks/gpu.py at the paper's two layer shapes
capture      a random model of Qwen1.5-MoE's layer shape: tokens a second, beside the forward pass alone and
the usual way throughput   benchmarks/throughput.py
plans        making and applying plans at that layer shape: HC-SMoE and the recommended method
"""

import argparse
import copy
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from measuring import interleaved, machine, timed

PARTS = {"imports": 60, "correctness": 80, "experts": 60, "capture": 80, "throughput": 100, "plans": 120}
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
METHODS = ("hc-smoe", "k-means", "m-smoe", "least-residual", "reap")
NEEDS = ("usage", "outputs", "norms", "grams", "sample")
# Of 10 experts: as much of the width stays a multiple of 16 bytes, which grouped products ask for; and of
# router groups.
KEPT = dict.fromkeys(METHODS, 6) | {"least-residual": 5}


class Found:
    """What one part found so far, in a file that is written after every step."""

    def __init__(self, path):
        self.path, self.values = path, {}

    def step(self, name, function, *arguments, **keywords):
        """Result of a call, kept under a name; where it fails, the end of its traceback is kept, and None is
        returned.
        """
        try:
            result = function(*arguments, **keywords)
            self.values[name] = result
        except Exception as error:
            result, last = (
                None,
                [
                    f"{Path(f.filename).name}:{f.lineno}"
                    for f in traceback.extract_tb(error.__traceback__)[-4:]
                ],
            )
            self.values[name] = {
                "error": f"{type(error).__name__}: {str(error)[:600]}",
                "at": " > ".join(last),
            }
        self.path.write_text(json.dumps(tidy(self.values)))
        return result


def tidy(value):
    """The same with four digits of each number."""
    if isinstance(value, dict):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def difference(found, wanted):
    """Norm of the difference over that of what is wanted; NaN where both are NaN counts as equal."""
    found, wanted = found.detach().cpu().double().nan_to_num(), wanted.detach().cpu().double().nan_to_num()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


# Imports


def imports(found, arguments):
    import hcsmoe_core as core

    def importable(name):
        try:
            importlib.import_module(name)
        except ImportError as error:
            return str(error)
        return True

    def demo():
        model, tokenizer = core.load_model("demo-qwen", dtype="float32", device=arguments.device)
        ids = core.calibration_tokens("demo", tokenizer, sequences=16, length=256)
        stats = core.capture(model, ids, progress=False)
        row = {
            "device": str(model.device),
            "loss": core.evaluate(model, tokenizer, [], sequences=16)["mean_loss"],
        }
        core.apply_plan(model, core.make_plan(stats, experts=stats.layer(0).num_experts // 2))
        return row | {
            "loss, half of the experts": core.evaluate(model, tokenizer, [], sequences=16)["mean_loss"]
        }

    def modules():
        made = {
            part.name: importable(f"hcsmoe_core.{part.name}") for part in pkgutil.iter_modules(core.__path__)
        }
        return {
            "imported": list(made.values()).count(True),
            "not": {k: v for k, v in made.items() if v is not True},
        }

    packages = "datasets papermill lm_eval seaborn matplotlib pandas sklearn accelerate psutil typer".split()
    found.step("packages that can be imported", lambda: {name: importable(name) is True for name in packages})
    found.step("modules of hcsmoe_core", modules)
    found.step("demo-qwen", demo)


# Correctness


def correctness(found, arguments):
    for family in FAMILIES:
        found.step(family, compared, family, arguments.device)
        found.step(f"{family}, bfloat16", reloaded, family, torch.bfloat16, arguments.device)


def compared(family, device):
    """A tiny model on the CPU and on the device."""
    import hcsmoe_core as core
    from tools.family_table import outputs, tiny_model, tiny_tokens

    models = {"cpu": tiny_model(family)}
    models["gpu"] = copy.deepcopy(models["cpu"]).to(device)
    ids, row = tiny_tokens(16, 64), {}
    before = {name: outputs(model, ids.to(model.device)) for name, model in models.items()}
    row["logits of the original"] = difference(before["gpu"], before["cpu"])
    stats = {
        n: core.capture(m, ids, needs=NEEDS, sample=512, batch_size=8, progress=False)
        for n, m in models.items()
    }
    pairs = list(zip(stats["gpu"].layers.values(), stats["cpu"].layers.values(), strict=True))
    moved = sum(int((ours.usage_count - theirs.usage_count).abs().sum()) // 2 for ours, theirs in pairs)
    row["choices of an expert that differ"] = f"{moved} of {sum(int(c.usage_count.sum()) for _, c in pairs)}"
    sums = [{k: difference(v, c.collected()[k]) for k, v in g.collected().items()} for g, c in pairs]
    row["statistics, largest over the layers"] = {key: max(layer[key] for layer in sums) for key in sums[0]}
    row["inputs of the sample"] = max(difference(g.sample.inputs, c.sample.inputs) for g, c in pairs)
    row["plans"] = {method: _planned(models, stats, ids, method) for method in METHODS}
    for name, model in models.items():
        core.restore(model)
        row[f"restored to the bit, {name}"] = torch.equal(outputs(model, ids.to(model.device)), before[name])
    return row | {"saved and loaded": reloaded(family, torch.float32, device)}


def _planned(models, stats, ids, method):
    import hcsmoe_core as core
    from tools.family_table import outputs

    try:
        plans = {
            n: core.make_plan(stats[n], models[n], experts=KEPT[method], method=method, progress=False)
            for n in models
        }
        labels = {n: [layer.labels for layer in plan.layers] for n, plan in plans.items()}
        logits = {}
        for name, model in models.items():  # the CPU's plan on both
            logits[name] = outputs(core.apply_plan(model, plans["cpu"], stats["cpu"]), ids.to(model.device))
            core.restore(model)
        core.apply_plan(models["gpu"], plans["gpu"], stats["gpu"])
        own = outputs(models["gpu"], ids.to(models["gpu"].device))
        return {
            "same groups": labels["gpu"] == labels["cpu"],
            "logits, the same plan": difference(logits["gpu"], logits["cpu"]),
            "logits, its own plan": difference(own, logits["cpu"]),
        }
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        for model in models.values():
            core.restore(model)


def reloaded(family, dtype, device):
    """Whether what is saved and loaded computes the same as the live merged model, on the device."""
    import hcsmoe_core as core
    from tools.family_table import outputs, tiny_model, tiny_tokens

    model, ids = tiny_model(family, dtype).to(device), tiny_tokens(16, 64).to(device)
    plan = core.make_plan(core.capture(model, ids, progress=False), model, experts=KEPT["hc-smoe"])
    with tempfile.TemporaryDirectory() as folder:
        core.save_merged(model, plan, Path(folder) / "merged", router="mapped")
        core.apply_plan(model, plan)
        live, again = outputs(model, ids), outputs(model, ids)
        loaded = outputs(core.load_merged(Path(folder) / "merged", device=device), ids)
    row = {"equal to the bit": torch.equal(loaded, live), "logits": difference(loaded, live)}
    return row | {"the live model twice, equal to the bit": torch.equal(live, again)}


# Speed


def experts(found, arguments):
    import gpu

    shapes, tokens = ((60, 2048, 1408, 4), (8, 4096, 14336, 2)), 65536
    if arguments.small:
        shapes, tokens = ((6, 64, 48, 2), (8, 64, 48, 2)), 512
    given = SimpleNamespace(tokens=tokens, dtype=arguments.dtype, device=arguments.device, repeats=3)
    found.step("tokens", lambda: tokens)
    for shape in shapes:
        found.step("x".join(map(str, shape)), gpu.measure, shape, given)


def sizes(arguments, **changed):
    """What ``pipeline.build`` takes, at Qwen1.5-MoE's layer shape."""
    small = (
        dict(hidden=64, width=48, experts=8) if arguments.small else dict(hidden=2048, width=1408, experts=60)
    )
    given = dict(layers=4, families=2, noise=0.1, dtype=arguments.dtype, device=arguments.device)
    return SimpleNamespace(**given | small | changed)


def built(given):
    """``pipeline.build``, with the weights made where they stay."""
    from pipeline import build

    with torch.device(given.device):
        return build(given)


def capture(found, arguments):
    from pipeline import usual_capture

    import hcsmoe_core as core

    given = sizes(arguments)
    count, length, batch = (8, 64, 4) if arguments.small else (128, 512, 16)
    model, ids = built(given), torch.randint(0, 1024, (count, length))
    found.step("settings", lambda: vars(given) | {"tokens": ids.numel(), "sequences a batch": batch})

    @torch.no_grad()
    def forward():
        for rows in ids.split(batch):
            model(input_ids=rows.to(model.device), use_cache=False, logits_to_keep=1)

    def captured(**how):
        return lambda: core.capture(model, ids, batch_size=batch, progress=False, **how)

    hc = core.METHODS["hc-smoe"].needs
    calls = {
        "forward pass alone": forward,
        "outputs only": captured(needs=hc),
        "usual way": lambda: usual_capture(model, ids, batch),
        "outputs only, every 8": captured(needs=hc, every=8),
        "default needs, every 8": captured(every=8),
        "default needs": captured(),
    }
    seconds = {}

    def measured(name, call):
        call()  # warm up
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds[name] = interleaved(arguments.device, {name: call}, 2)[name]
        row = {"seconds": seconds[name], "tokens a second": ids.numel() / seconds[name]}
        row["forward passes alone"] = seconds[name] / seconds["forward pass alone"]
        if model.device.type == "cuda":
            row["peak beside the weights, GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        return row

    for name, call in calls.items():
        found.step(name, measured, name, call)
    found.step(
        "usual way / ours",
        lambda: {n: seconds["usual way"] / s for n, s in seconds.items() if n != "usual way"},
    )


def throughput(found, arguments):
    import throughput as benchmark

    words = "--hidden 64 --width 48 --experts 8 --layers 2 --batch 2 --length 64 --new 4 --repeats 1"
    if not arguments.small:
        words = "--hidden 2048 --width 1408 --layers 4 --batch 16 --length 512 --new 32 --repeats 4"
    out = arguments.out.with_suffix(".throughput")
    words = [
        *words.split(),
        "--rounds",
        "1",
        "--dtype",
        arguments.dtype,
        "--device",
        arguments.device,
        "--out",
        str(out),
    ]

    def measured():
        benchmark.build, sys.argv = built, ["throughput.py", *words]
        benchmark.main()
        made = json.loads(out.read_text())
        out.unlink()
        return made

    made = found.step("settings", measured)
    if made is not None:
        made.pop("machine")
        made["settings"].pop("out")
        found.values.clear()
        for name, value in made.items():
            found.step(name, lambda value=value: value)


def plans(found, arguments):
    import hcsmoe_core as core

    count, length = (8, 64) if arguments.small else (16, 512)
    ids, needs = (
        torch.randint(0, 1024, (count, length)),
        {*core.METHODS["hc-smoe"].needs, *core.METHODS["least-residual"].needs},
    )
    found.step(
        "settings",
        lambda: vars(sizes(arguments)) | {"layers": "as told", "tokens": ids.numel(), "sample": ids.numel()},
    )

    def measured(model, stats, method, **settings):
        how = dict(experts=stats.layer(0).num_experts // 2, method=method, progress=False, **settings)
        plan, planned = timed(arguments.device, core.make_plan, stats, model, **how)
        _, applied = timed(arguments.device, core.apply_plan, model, plan, stats)
        _, restored = timed(arguments.device, core.restore, model)
        shapes = [f"{layer.num_groups} of {layer.width or 'their'} width" for layer in plan.layers]
        return {
            "make_plan, seconds": planned,
            "apply_plan, seconds": applied,
            "restore, seconds": restored,
            "experts": shapes,
        }

    for layers in (1, 2):
        model = built(sizes(arguments, layers=layers))
        stats, seconds = timed(
            arguments.device, core.capture, model, ids, needs=tuple(needs), sample=ids.numel(), progress=False
        )
        said = "1 layer" if layers == 1 else f"{layers} layers"
        found.step(f"{said}, capture, seconds", lambda seconds=seconds: seconds)
        for name, method, settings in (
            ("hc-smoe", "hc-smoe", {}),
            ("least-residual, refit=0", "least-residual", {"refit": 0}),
            ("least-residual", "least-residual", {}),
        ):
            found.step(f"{said}, {name}", measured, model, stats, method, **settings)


# All


def run_part(name, limit, arguments):
    """What one part found in its own process, with its seconds; and what stopped it, if something did."""
    with tempfile.TemporaryDirectory() as folder:
        made, said = Path(folder) / "made.json", Path(folder) / "said"
        words = [sys.executable, __file__, "--part", name, "--out", str(made), "--device", arguments.device]
        words += ["--dtype", arguments.dtype, *["--small"] * arguments.small]
        started = time.perf_counter()
        with said.open("w") as file:
            process = subprocess.Popen(words, stdout=file, stderr=file, start_new_session=True)
            try:
                ended = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # it may have processes of its own
                process.wait()
                ended = None
        found = json.loads(made.read_text()) if made.exists() else {}
        if ended is None:
            found["stopped"] = f"after {limit:.0f} seconds. {said.read_text()[-300:]}".strip()
        elif ended:
            found["stopped"] = said.read_text()[-2000:]
        return found | {"seconds of this part": round(time.perf_counter() - started, 1)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of what is timed")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit", type=float, default=350, help="seconds of all parts")
    parser.add_argument("--part", help="(what a process of its own does)")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    arguments = parser.parse_args()
    if arguments.part:
        torch.manual_seed(0)
        globals()[arguments.part](Found(arguments.out), arguments)
        return
    until = time.perf_counter() + arguments.limit
    found = {"machine": machine(arguments.device)}
    if arguments.device.startswith("cuda"):
        found["machine"] |= {
            "cuda": torch.version.cuda,
            "gpu memory, GB": round(torch.cuda.mem_get_info()[1] / 1e9, 1),
        }
    for name in arguments.parts.split(","):
        left = until - time.perf_counter()
        found[name] = (
            run_part(name, min(PARTS[name], left), arguments) if left > 5 else {"stopped": "no time left"}
        )
        arguments.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(name, json.dumps(found[name], ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
