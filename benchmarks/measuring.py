"""What the benchmarks share: timing, and what a number depends on."""

import json
import os
import platform
import time
from pathlib import Path

import torch

from hcsmoe_core._util import versions


def timed(device, function, *arguments, **keywords):
    """Result of a call and its seconds: of the processor on a CPU, where other work counts less so; else
    until it is done.
    """
    on_gpu = str(device).startswith("cuda")
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    result = function(*arguments, **keywords)
    if on_gpu:
        torch.cuda.synchronize()
    return result, clock() - started


def interleaved(device, functions, repeats):
    """Least seconds of each of several calls, by name; taken in turns, so that what else runs meets all of
    them alike.
    """
    best = {}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds = timed(device, function)[1]
            best[name] = min(seconds, best.get(name, seconds))
    return best


def machine(device="cpu"):
    """Processor, threads, load and versions."""
    found = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found["load, 1 and 5 minutes"] = [round(load, 1) for load in os.getloadavg()[:2]]
    if str(device).startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
    return found | versions()


def _processor():
    """Name of the processor, with what of its instructions matters to matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    found = {key.strip(): value.strip() for key, value in found.items()}
    wide = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in found.get("flags", "").split()]
    family = f"family {found.get('cpu family')} model {found.get('model')}"
    return f"{found.get('model name', platform.machine())} ({family}; {' '.join(wide)})"


def tell(result, out, *, append=False):
    """Print a result as JSON, and write it, or append it as a line."""
    if out and append:
        with open(out, "a") as file:
            file.write(json.dumps(result) + "\n")
    elif out:
        Path(out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
