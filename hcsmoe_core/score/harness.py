"""lm-evaluation-harness on a model in memory: its tasks with their data, and answers that are kept in files.

Imported only where something is scored, because lm-evaluation-harness is an extra.
"""

import hashlib
import json
from functools import partialmethod
from pathlib import Path

import datasets
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from hcsmoe_core._util import read_json, require, sha256_json, versions, write_json
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.score.evaluation import TASKS


def load_tasks(names: list[str]) -> dict:
    """Tasks of the harness by name, with their data.

    Parameters
    ----------
    names : list of str
        Tasks of :data:`hcsmoe_core.score.evaluation.TASKS`, or tasks, groups (``mmlu``) and tags
        (``ai2_arc``) of the harness. A tag stands for its tasks.

    Returns
    -------
    dict of str to (lm_eval.api.task.Task or lm_eval.api.group.Group)

    Raises
    ------
    InputError
        If the harness knows no such task.
    FileNotFoundError
        If the data of some are neither local nor available; it names all of them.
    """
    own = {name: TASKS[name].configuration(name) for name in names if name in TASKS}
    manager = TaskManager(include_defaults=len(own) < len(names))  # indexing the harness' own takes seconds
    unknown = [name for name in names if name not in own and name not in manager.all_tasks]
    require(
        not unknown,
        f'The "tasks" argument names {", ".join(unknown)}, which the harness does not know; the embedded '
        f"tasks are {', '.join(TASKS)}, and lm-eval ls tasks lists the others.",
    )
    tasks, missing = {}, {}
    for name in names:
        try:
            local = own.get(name, {}).get("dataset_path") == "json"
            loaded = manager.load([Embedded(config=own[name]) if local else own.get(name, name)])
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            missing[name] = str(error).strip().splitlines()[0]
        else:
            tasks |= {name: loaded["groups"][name]} if name in loaded.get("groups", {}) else loaded["tasks"]
    if missing:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
        raise FileNotFoundError(
            f"The data of {', '.join(missing)} are neither in the datasets cache "
            f"({datasets.config.HF_DATASETS_CACHE}) nor available from the Hugging Face hub:{reasons}\nWhere "
            f"there is a network, run: hcsmoe evaluate demo-qwen --tasks {','.join(missing)} --limit 2 "
            "--text none; then take that folder along, or name it with HF_DATASETS_CACHE."
        )
    return tasks


class Embedded(ConfigurableTask):
    """A task with local JSON lines, which go straight into memory: the data sets' cache may be read-only."""

    def download(self, dataset_kwargs=None, **_):
        """Read the items of each split."""
        self.dataset = {
            split: datasets.Dataset.from_list([*map(json.loads, Path(file).read_bytes().splitlines())])
            for split, file in dataset_kwargs["data_files"].items()
        }


def identity(model, tokenizer) -> str:
    """Hash of all that a model's answers follow from: every weight, merged or not, and the tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    # The map from E to r experts is no tensor of the model.
    labels = [layer.experts._merged.labels if layer.merged else None for layer in find_moe_layers(model)]
    apart = ("transformers_version", "expert_merge", "auto_map")  # other in a merged folder than in memory
    config = sorted(item for item in model.config.to_diff_dict().items() if item[0] not in apart)
    fast = getattr(tokenizer, "backend_tokenizer", None)
    tokens = fast.to_str() if fast is not None else sha256_json(tokenizer.get_vocab())
    digest.update("".join(map(str, [*labels, config, tokens])).encode())
    return digest.hexdigest()


class Answering(HFLM):
    """The harness' interface to a model in memory; with a folder, answers are kept and not asked twice.

    A file has the answers to all requests of a task, in order, and what they depend on: the model, the
    requests themselves (which few-shot examples and a limit change), batch size, dtype, kind of device, seed
    and versions.

    Parameters
    ----------
    model, tokenizer
    folder : path or None
    seed : int
    **options
        Of the harness.
    """

    def __init__(self, model, tokenizer, folder, seed, **options):
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.folder = folder and Path(folder)
        self.settings = options | {
            "seed": seed,
            "dtype": str(model.dtype),
            "device": model.device.type,
            "model": folder and identity(model, tokenizer),
            "versions": versions(),
        }

    def _answers(self, kind, requests, disable_tqdm=False):
        """Answers to all requests of a kind, those of a task from its file where there is one."""
        ask = getattr(super(), kind)
        if self.folder is None:
            return ask(requests, disable_tqdm=disable_tqdm)
        answers = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            batch = {i: request for i, request in enumerate(requests) if request.task_name == task}
            asked = sha256_json([str(request.args) for request in batch.values()])
            about = self.settings | {"task": task, "requests": asked}
            path = self.folder / task / f"{sha256_json(about)[:16]}.json"
            stored = read_json(path) if path.exists() else None
            if stored is None:
                stored = {"about": about, "answers": ask(list(batch.values()), disable_tqdm=disable_tqdm)}
                write_json(path, stored, indent=None)
            answers |= zip(batch, stored["answers"], strict=True)
        return [answers[i] for i in range(len(requests))]

    loglikelihood = partialmethod(_answers, "loglikelihood")
    loglikelihood_rolling = partialmethod(_answers, "loglikelihood_rolling")
    generate_until = partialmethod(_answers, "generate_until")
