"""Whether ``--memory`` is a bound that holds: peaks of merges (VmHWM), whole and streamed, at three sizes.

``python -m benchmarks.memory_bound`` asks for too little memory first, which is refused with the number that
is needed, and then for that number. It works on Linux only.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

LAYERS = (1, 4, 7)
MODEL = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
torch.manual_seed(0)
sizes = dict(vocab_size=32000, hidden_size=512, moe_intermediate_size=512, intermediate_size=512, head_dim=64)
sizes |= dict(num_experts=32, num_experts_per_tok=4, num_attention_heads=8, num_key_value_heads=2)
config = Qwen3MoeConfig(**sizes, num_hidden_layers=int(sys.argv[2]), tie_word_embeddings=False)
folder = Path(sys.argv[1])
Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
save_file({"input_ids": torch.randint(0, 32000, (12, 512))}, folder / "ids.safetensors")
"""
MERGE = """
import atexit, sys
from hcsmoe_core.ui.cli import main
atexit.register(lambda: print(open("/proc/self/status").read()))
main()
"""


def measured(layers: int, load: str, folder: Path) -> tuple[float, float, float]:
    """MB of the weights, of the least bound that is accepted, and of the peak with that bound.

    Parameters
    ----------
    layers : int
        Of a random Qwen3-MoE; each has 50 MB.
    load : str
        whole or streamed.
    folder : Path
    """
    subprocess.run([sys.executable, "-c", MODEL, folder, str(layers)], check=True)
    words = ["merge", folder / "model", "--experts", "16", "--fidelity", "4", "--load", load]
    words += ["--calibration", folder / "ids.safetensors", "--sequences", "8", "--length", "512"]
    words += ["--out", folder / f"merged-{load}"]

    def run(memory):
        command = [sys.executable, "-c", MERGE, *words, "--memory", memory]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    refused = run("1MB").stderr
    told = re.search(r"is 1MB, but with .* takes about ([\d.]+) GB; give more", refused)
    if not told:
        raise RuntimeError(refused)
    bound = float(told[1]) * 1.01e3  # what is resident at the start differs a little from run to run
    ended = run(f"{bound:.0f}MB")
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", ended.stdout)[1]) * 1024 / 1e6
    return sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) / 1e6, bound, peak


def main():
    """Print the table."""
    print(f"{'weights':>10}{'':>10}{'bound':>10}{'peak':>10}  MB")
    for layers in LAYERS:
        for load in ("whole", "streamed"):
            with tempfile.TemporaryDirectory() as folder:
                size, bound, peak = measured(layers, load, Path(folder))
            print(f"{size:10.0f}{load:>10}{bound:10.0f}{peak:10.0f}  {peak / bound - 1:+.0%}", flush=True)


if __name__ == "__main__":
    main()
