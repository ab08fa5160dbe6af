"""Multiple-choice tasks of the embedded models: which of four answers completes a held-out prompt?

The items lie in ``tasks/``, one ``.jsonl`` a task, so that a score never depends on the Python that makes them;
:func:`write_items` made them.
"""

import json
import random

from hcsmoe_core._util import replacing
from hcsmoe_core.demo import corpus, models

FOLDER = models.FOLDER / "tasks"


ITEMS = 300


CHOICES = 4


PREFIX = "demo_"


DOMAINS = ("arithmetic", "sorting", "brackets", "dates", "units", "facts", "largest", "series")


NAMES = tuple(PREFIX + d for d in DOMAINS)


def make_items(domain, count=ITEMS, seed=0):
    """Held-out questions of one domain, no prompt twice.

    Returns
    -------
    list of dict
        ``prompt``, ``choices`` (each ends its line, so that a short answer is not preferred for being a prefix of a
        longer one) and ``answer``, the place of the right one.
    """
    rng = random.Random(f"{domain} {seed}")
    items, seen, repeated = [], set(), 0
    while len(items) < count:
        item = corpus.draw(domain, rng, "heldout", task=True)
        if item.prompt in seen:
            repeated += 1
            if repeated > 100 * count:
                raise ValueError(f"{domain} has fewer than {count} different held-out prompts.")
            continue
        seen.add(item.prompt)
        wrong = []
        while len(wrong) < CHOICES - 1:
            answer = corpus.PROCEDURAL[domain].distract(rng, item)
            if answer != item.answer and answer not in wrong:
                wrong.append(answer)
        choices = [item.answer, *wrong]
        rng.shuffle(choices)
        items.append(
            {
                "prompt": item.prompt,
                "choices": [c + "\n" for c in choices],
                "answer": choices.index(item.answer),
            }
        )
    return items


def path_of(name):
    """File of a task's items."""
    return FOLDER / f"{name.removeprefix(PREFIX)}.jsonl"


def load_items(name):
    """Items of a task, as :func:`make_items` made them."""
    return [json.loads(line) for line in path_of(name).read_text(encoding="utf-8").splitlines()]


def configuration(name):
    """The task as lm-evaluation-harness describes one: a local file, four choices, ``acc`` and ``acc_norm``."""
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


def write_items(folder=FOLDER):
    """Make the items of every task again."""
    for name in NAMES:
        with replacing(folder / path_of(name).name) as part:
            lines = (json.dumps(item) + "\n" for item in make_items(name.removeprefix(PREFIX)))
            part.write_text("".join(lines), encoding="utf-8")
