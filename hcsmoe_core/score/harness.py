"""lm-evaluation-harness on a model in memory: its tasks with their data, and answers that are kept in files.

Imported only where something is scored, because lm-evaluation-harness is an extra.
"""

import contextlib
import functools
import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tqdm.auto import tqdm

from hcsmoe_core._util import closest_first, read_json, require, sha256_json, versions, write_json
from hcsmoe_core.checkpoint import tokenizer_hash
from hcsmoe_core.families import model_hash
from hcsmoe_core.score.evaluation import TASKS

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of how its own command was started
manager_of = functools.cache(TaskManager)  # indexing the harness' own tasks takes seconds


@contextlib.contextmanager
def quiet():
    """Silence a bar for each task, and git where there is no repository, for the block."""
    with (
        mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
        mock.patch("lm_eval.api.task.tqdm", lambda items, **_: items),
        mock.patch("lm_eval.api.model.tqdm", lambda items, **_: items),
    ):
        yield


def check_tasks(names: list[str]) -> TaskManager:
    """The harness' index of tasks; InputError if there is no task of some name."""
    manager = manager_of(include_defaults=any(name not in TASKS for name in names))
    unknown = [name for name in names if name not in TASKS and name not in manager.all_tasks]
    require(
        not unknown,
        f'The "tasks" argument names {", ".join(unknown)}, which the harness does not know; the embedded '
        f"tasks are {closest_first(*unknown[:1] or [''], [*TASKS])}, and lm-eval ls tasks lists the others.",
    )
    return manager


def save_output(output: dict, model: str, folder) -> None:
    """Write the harness' own results and samples, as its command writes them with ``--log_samples``."""
    tracker = EvaluationTracker(output_path=str(folder))
    told = dict.fromkeys(("system_instruction", "chat_template", "fewshot_as_multiturn"))
    tracker.general_config_tracker.log_experiment_args("hf", {"pretrained": model}, **told)
    results = {key: value for key, value in output.items() if key != "samples"}
    tracker.save_results_aggregated(results=results, samples=output["samples"])
    for task, rows in output["samples"].items():
        tracker.save_results_samples(task_name=task, samples=rows)


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
    manager, tasks, missing = check_tasks(names), {}, {}
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
    """Hash of what answers follow from: the model, merged or not, generation settings and tokenizer."""
    settings = model.generation_config.to_diff_dict() if model.can_generate() else {}
    settings.pop("transformers_version", None)
    return sha256_json([model_hash(model, merged=True), settings, tokenizer_hash(tokenizer)])


def _stored(path, about, count):
    """Answers in a file; None, with a warning, if it was damaged or changed."""
    stored = read_json(path)
    if isinstance(stored, dict) and stored.pop("sha256", None) == sha256_json(stored):
        answers = stored.get("answers")
        same = sha256_json(stored.get("about")) == sha256_json(about)
        if same and isinstance(answers, list) and len(answers) == count:
            return answers
    warnings.warn(f"{path} was cut short or changed; the model is asked again.", stacklevel=4)
    return None


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
        show = dict(
            total=len(requests), desc="answers", unit="request", disable=disable_tqdm or None, leave=False
        )
        with tqdm(**show) as bar:
            shared = SimpleNamespace(update=bar.update, close=lambda: None)
            with mock.patch(
                "lm_eval.models.huggingface.tqdm", lambda *items, **_: items[0] if items else shared
            ):
                return self._asked(getattr(super(), kind), requests, bar)

    def _asked(self, ask, requests, bar):
        if self.folder is None:
            return ask(requests)
        answers = {}
        for task in dict.fromkeys(request.task_name for request in requests):
            batch = {i: request for i, request in enumerate(requests) if request.task_name == task}
            asked = sha256_json([str(request.args) for request in batch.values()])
            about = self.settings | {"task": task, "requests": asked}
            path = self.folder / task / f"{sha256_json(about)[:16]}.json"
            answered = _stored(path, about, len(batch)) if path.exists() else None
            if answered is None:
                answered = ask(list(batch.values()))
                stored = {"about": about, "answers": answered}
                write_json(path, stored | {"sha256": sha256_json(stored)}, indent=None)
            bar.update(max(0, sum(map(len, (answers, batch))) - bar.n))
            answers |= zip(batch, answered, strict=True)
        return [answers[i] for i in range(len(requests))]

    loglikelihood = functools.partialmethod(_answers, "loglikelihood")
    loglikelihood_rolling = functools.partialmethod(_answers, "loglikelihood_rolling")
    generate_until = functools.partialmethod(_answers, "generate_until")
