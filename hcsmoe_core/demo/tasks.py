"""Multiple-choice tasks of the embedded models: which of four answers completes a held-out prompt?

The items lie in ``tasks/``, one ``.jsonl`` file per task, so that scores do not depend on the Python version.
"""

from pathlib import Path

ITEMS, CHOICES = 300, 4  # items per task, answers per item
PREFIX = "demo_"
DOMAINS = ("arithmetic", "sorting", "brackets", "dates", "units", "facts", "largest", "series")
NAMES = tuple(PREFIX + domain for domain in DOMAINS)


def path_of(name: str) -> Path:
    """File of a task's items."""
    return Path(__file__).parent / "tasks" / f"{name.removeprefix(PREFIX)}.jsonl"


def configuration(name: str) -> dict:
    """Task for lm-evaluation-harness: a local file, four choices, ``acc`` and ``acc_norm``."""
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path_of(name))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1},
    }
