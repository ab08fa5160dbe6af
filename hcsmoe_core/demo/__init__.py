"""The embedded models, the corpus they were trained on and the tasks they are scored on."""

import json

from hcsmoe_core._util import EMBEDDED, WEIGHTS
from hcsmoe_core.demo import corpus, tasks
from hcsmoe_core.score.evaluation import TASKS, TaskSource
from hcsmoe_core.text.calibration import SOURCES, Source

SOURCES["demo"] = Source(
    corpus.blocks, corpus.domains, shape=(96, 256), heldout="heldout", uncounted=corpus.STDLIB
)
for _name in tasks.NAMES:
    TASKS[_name] = TaskSource(tasks.configuration, default=True, bos=True)


def families(name: str) -> dict[int, list[int]] | None:
    """True families of a model's experts, or None if they are unknown.

    ``demo-qwen`` was grown by splitting experts, so that the ancestors which two experts share are known: a
    ground truth for clustering that other models lack. A tree is built into that model, which favours
    hierarchical clustering.

    Returns
    -------
    dict
        By number of ancestors, the family of each expert, the same in every layer.
    """
    if name not in EMBEDDED or not (path := WEIGHTS / name / "families.json").exists():
        return None
    return {int(k): v for k, v in json.loads(path.read_text(encoding="utf-8"))["families"].items()}
