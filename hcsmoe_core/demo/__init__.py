"""The embedded models, the corpus they were trained on and the tasks they are scored on."""

from hcsmoe_core.demo import corpus
from hcsmoe_core.text.calibration import SOURCES, Source

SOURCES.add(
    "demo",
    Source(corpus.blocks, corpus.domains, shape=(96, 256), heldout="heldout", uncounted=corpus.STDLIB),
)
