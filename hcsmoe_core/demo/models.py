"""The two embedded models: where they lie, and the true families of their experts."""

import json
from pathlib import Path

from hcsmoe_core._util import EMBEDDED as NAMES
from hcsmoe_core._util import check_choice, folder_of


def folder(name: str) -> Path:
    """Model folder of an embedded model."""
    return folder_of(check_choice("model", name, NAMES))


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
    if name not in NAMES or not (path := folder_of(name) / "families.json").exists():
        return None
    return {int(k): v for k, v in json.loads(path.read_text(encoding="utf-8"))["families"].items()}
