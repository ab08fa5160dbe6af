"""The committed table of what works on each MoE family of transformers (made by ``tools.family_table``)."""

import textwrap
from pathlib import Path

from hcsmoe_core._util import choice_of, read_json

TABLE = Path(__file__).with_name("families.json")

# Kinds of checkpoint that were tried out, as rows and the printed table name them.
KINDS = {"mapped": "mapped", "joined": "folded", "plain": "pruned"}


def committed() -> tuple[str, list[dict]]:
    """The version of transformers that families were tried out with, and one row per family, alphabetically.

    A row has ``family`` and ``whole`` (a model that reads images too), ``model``, ``layers``, ``experts``
    (the configuration's name for their number), ``router``, and for each of ``KINDS`` why it does not work
    ("" if it does).
    """
    content = read_json(TABLE)
    return content["transformers"], content["families"]


def text(names=None) -> str:
    """The committed table of some families, by default of all, and whether another transformers is installed.

    Raises
    ------
    InputError
        If there is no family of some name.
    """
    import transformers

    version, rows = committed()
    names = [choice_of("family", name, sorted({row["family"] for row in rows})) for name in names or ()]
    others = f"\ntried out with transformers {version}; {transformers.__version__} is installed"
    return table([row for row in rows if not names or row["family"] in names]) + (
        others if version != transformers.__version__ else ""
    )


def table(rows: list[dict]) -> str:
    """Rows as text."""
    lines = []
    for row in rows:
        works = ", ".join(label for kind, label in KINDS.items() if not row[kind]) or "no"
        name = row["family"] + " (whole)" * row["whole"]
        lines.append(f"{name:24} {works:22} {row['experts'] or '-':38} {row['router'] or '-'}")
        for reason in dict.fromkeys(row[kind] for kind in KINDS if row[kind]):
            lines += textwrap.wrap(reason, 80, initial_indent=" " * 25, subsequent_indent=" " * 25)
    families = [row for row in rows if not row["whole"]]
    counts = [sum(not row[kind] for row in families) for kind in KINDS]
    lines.append(
        f"{len(families)} of transformers' families: {counts[0]} can be merged with the router as it was "
        f"(mapped), {counts[1]} merged and {counts[2]} pruned to checkpoints that stock engines open "
        "(folded or row-kept, pruned)"
    )
    if len(families) < len(rows):
        lines.append('"whole" is a model that reads images too; the line above it is its text part alone')
    return "\n".join(lines)
