"""Crash points: a command killed at every n-th change of the file system, then given again.

``python -m tools.crash_points --points 160`` kills captures and merges, whole and streamed, and prints how
many of the second runs gave the very bytes of an undisturbed run, left nothing behind, and were not refused.
It works by forking this process, so that it needs a Unix system.
"""

import argparse
import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm

# Events of Python's audit hooks that change the file system.
CHANGES = (
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
)


def commands(folder: Path) -> dict[str, list[str]]:
    """Commands to kill, by name; each writes ``folder/out``."""
    from transformers import MixtralConfig, MixtralForCausalLM

    import hcsmoe_core as core

    torch.manual_seed(0)
    sizes = dict(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2
    )
    sizes |= dict(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128
    )
    MixtralForCausalLM(MixtralConfig(**sizes, initializer_range=0.2)).save_pretrained(folder / "model")
    ids = torch.randint(0, 96, (6, 20), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, folder / "ids.safetensors")
    model, _ = core.load_model(folder / "model")
    stats = core.capture(model, ids, progress=False)
    stats.save(folder / "stats.safetensors")
    core.make_plan(stats, model, experts=3, progress=False).save(folder / "plan.json")
    text = ["--calibration", str(folder / "ids.safetensors"), "--sequences", "6", "--length", "20"]
    merge = [
        "merge",
        str(folder / "model"),
        "--plan",
        str(folder / "plan.json"),
        "--out",
        str(folder / "out"),
    ]
    capture = ["capture", str(folder / "model"), "--out", str(folder / "out.safetensors"), *text]
    return {
        "merge, whole": merge,
        "merge, streamed": [*merge, "--load", "streamed"],
        "capture, whole": capture,
        "capture, streamed": [*capture, "--load", "streamed"],
    }


def run(command: list[str], folder: Path, kill_at: int = 0) -> tuple[int, int]:
    """Run a command in a child: its exit status (-9 if it was killed), and the changes that it made.

    Parameters
    ----------
    command : list of str
    folder : Path
        Changes below it count.
    kill_at : int
        The change at which the child kills itself, before it happens; 0 for none.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        status = 1
        try:
            status = _child(command, folder, kill_at, write)
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), len(said)


def _child(command, folder, kill_at, write):
    from hcsmoe_core.ui import cli

    seen = 0

    def count(event, arguments):
        nonlocal seen
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if (writes or event in CHANGES) and str(folder) in str(arguments[0]):
            seen += 1
            os.write(write, b".")
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.argv = ["hcsmoe", *command]
    sys.addaudithook(count)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            cli.main()
    except SystemExit as error:
        if error.code:
            (folder / "said.txt").write_text(said.getvalue())
        return int(error.code or 0)
    except Exception:
        (folder / "said.txt").write_text(traceback.format_exc())
        return 1
    return 0


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder, and the folders themselves."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
        if path.name != "said.txt"
    }


def clear(folder: Path, before: dict) -> None:
    """Remove what was not there before."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if str(path.relative_to(folder)) not in before:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def main():
    """Run the crash points and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=160, help="crash points in all")
    options = parser.parse_args()
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    failed = trials(options.points)
    for failure in failed[:10]:
        print(*failure)
    sys.exit(bool(failed))


def trials(points: int, only: str = "") -> list[tuple]:
    """Kill each command at some of its changes; what went wrong, in words."""
    folder = Path(tempfile.mkdtemp(prefix="hcsmoe-crashes-"))
    failed = []
    try:
        chosen = {name: command for name, command in commands(folder).items() if only in name}
        before, undisturbed = contents(folder), {}
        for name, command in chosen.items():
            status, changes = run(command, folder)
            undisturbed[name] = contents(folder), changes
            if status:
                raise RuntimeError(f"{name} fails undisturbed: {(folder / 'said.txt').read_text()}")
            clear(folder, before)
        total = sum(changes for _, changes in undisturbed.values())
        with tqdm(total=points, unit="crash") as bar:
            for name, command in chosen.items():
                wanted, changes = undisturbed[name]
                count = min(changes, max(1, round(points * changes / total)))
                for at in sorted({1 + i * changes // count for i in range(count)}):
                    first, _ = run(command, folder, at)
                    second, _ = run(command, folder)
                    left = contents(folder)
                    if first != -signal.SIGKILL:
                        failed.append((name, at, f"was not killed: exit {first}"))
                    if second:
                        failed.append((name, at, "refused:", (folder / "said.txt").read_text()))
                    elif left != wanted:
                        differ = sorted(set(left.items()) ^ set(wanted.items()))
                        failed.append((name, at, "differs:", differ[:6]))
                    clear(folder, before)
                    bar.update()
        print(f"{'':20}{'changes':>10}")
        for name, (_, changes) in undisturbed.items():
            print(f"{name:20}{changes:10}{sum(failure[0] == name for failure in failed):10} failed")
    finally:
        shutil.rmtree(folder)
    return failed


if __name__ == "__main__":
    main()
