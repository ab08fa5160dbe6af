"""lm-evaluation-harness on a model in memory: its tasks, or which data they lack, and what the model answered, kept by example.

Imported only where something is scored, because lm-evaluation-harness is an extra.
"""

import hashlib
from pathlib import Path

import datasets
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hcsmoe_core._util import InputError, read_json, sha256_json, write_json
from hcsmoe_core.demo import tasks as demo_tasks
from hcsmoe_core.families import find_moe_layers


def load_tasks(names):
    """Tasks of the harness by name, with their data.

    Parameters
    ----------
    names : list of str
        Embedded tasks, or tasks, groups (``mmlu``) and tags (``ai2_arc``) of the harness. A tag stands for its tasks.

    Returns
    -------
    dict of str to (lm_eval.api.task.Task or lm_eval.api.group.Group)

    Raises
    ------
    ValueError
        If the harness knows no such task.
    FileNotFoundError
        If the data of some are neither here nor to be had; it names all of them.
    """
    manager = TaskManager(
        include_defaults=not set(names) <= set(demo_tasks.NAMES)
    )  # indexing its own tasks takes seconds
    unknown = [n for n in names if n not in demo_tasks.NAMES and n not in manager.all_tasks]
    if unknown:
        raise InputError(
            f'The "tasks" argument names {", ".join(unknown)}, which the harness does not know; the embedded tasks are '
            f"{', '.join(demo_tasks.NAMES)}, and lm-eval ls tasks lists the others."
        )
    found, missing = {}, {}
    for name in names:
        try:
            loaded = manager.load([demo_tasks.configuration(name) if name in demo_tasks.NAMES else name])
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            missing[name] = str(error).strip().splitlines()[0]
            continue
        found |= {name: loaded["groups"][name]} if name in loaded.get("groups", {}) else loaded["tasks"]
    if missing:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
        raise FileNotFoundError(
            f"The data of {', '.join(missing)} are neither in the datasets cache ({datasets.config.HF_DATASETS_CACHE}) nor to "
            f"be had from the Hugging Face hub:{reasons}\nWhere there is a network, run: hcsmoe evaluate demo-qwen --tasks "
            f"{','.join(missing)} --limit 2 --text none; then take that folder along, or name it with HF_DATASETS_CACHE."
        )
    return found


def identity(model, tokenizer):
    """Hash of all that a model's answers follow from: every weight as it is now, merged or not, and the tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for layer in find_moe_layers(model):  # the map from E to r is no tensor of the model
        digest.update(str(layer.experts._merged.labels if layer.merged else None).encode())
    config = {
        k: v
        for k, v in model.config.to_diff_dict().items()
        if k not in ("transformers_version", "expert_merge", "auto_map")
    }
    digest.update(str(sorted(config.items())).encode())
    fast = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((fast.to_str() if fast is not None else sha256_json(tokenizer.get_vocab())).encode())
    return digest.hexdigest()


class Answering(HFLM):
    """The harness' interface to a model in memory; with a folder, it keeps what the model answered and never asks twice.

    A file holds the answers to all requests of a task, in their order, and what they depend on: the model, the requests
    themselves (which few-shot examples and a limit change), batch size, dtype, kind of device, seed and versions.
    """

    def __init__(self, model, tokenizer, *, folder=None, about=None, **options):
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.folder, self.about = folder and Path(folder), about

    def loglikelihood(self, requests, disable_tqdm=False):
        """Log-likelihood of each continuation, and whether it is the likeliest."""
        return self._kept(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-likelihood of each text."""
        return self._kept(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests, disable_tqdm=False):
        """What the model writes after each prompt."""
        return self._kept(super().generate_until, requests, disable_tqdm)

    def _kept(self, ask, requests, disable_tqdm):
        """Answers to all requests, those of a task from its file where there is one."""
        if self.folder is None:
            return ask(requests, disable_tqdm=disable_tqdm)
        answers, places = [None] * len(requests), {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name, []).append(place)
        for task, mine in places.items():
            batch = [requests[place] for place in mine]
            about = self.about | {"task": task, "requests": sha256_json([str(r.args) for r in batch])}
            path = self.folder / task / f"{sha256_json(about)[:16]}.json"
            kept = read_json(path) if path.exists() else None
            if kept is None:
                kept = {"about": about, "answers": ask(batch, disable_tqdm=disable_tqdm)}
                write_json(path, kept, indent=None)
            for place, answer in zip(mine, kept["answers"], strict=True):
                answers[place] = answer
        return answers
