"""The embedded models, the corpus they were trained on and the tasks they are scored on."""

from hcsmoe_core.demo import corpus, tasks
from hcsmoe_core.score.evaluation import TASKS, TaskSource
from hcsmoe_core.text.calibration import SOURCES, Source

SOURCES["demo"] = Source(
    corpus.blocks, corpus.domains, shape=(96, 256), heldout="heldout", uncounted=corpus.STDLIB
)
for _name in tasks.NAMES:
    TASKS[_name] = TaskSource(tasks.configuration, default=True, bos=True)
