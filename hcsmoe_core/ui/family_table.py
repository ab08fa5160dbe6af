"""TODO."""

import textwrap
from pathlib import Path

from hcsmoe_core._util import read_json

TABLE = Path(__file__).with_name("families.json")


KINDS = {
    "mapped": "mapped",
    "joined": "folded",
    "plain": "pruned",
}  # of checkpoints, and what the table calls them


def committed():
    """The table of all families that :func:`probe` made, and the version of transformers it was made with.

    Returns
    -------
    version : str
    rows : list of dict
    """
    content = read_json(TABLE)
    return content["transformers"], content["families"]


def table(rows):
    """Rows of :func:`probe` as text."""
    lines = []
    for row in rows:
        name = row["family"] + " (whole)" * row["whole"]
        what = ", ".join(shown for kind, shown in KINDS.items() if not row[kind]) or "no"
        lines.append(f"{name:24} {what:22} {row['experts'] or '-':38} {row['router'] or '-'}")
        for why in dict.fromkeys(row[kind] for kind in KINDS if row[kind]):
            lines += textwrap.wrap(why, 110, initial_indent=" " * 25, subsequent_indent=" " * 25)
    parts = [row for row in rows if not row["whole"]]
    works = [sum(not row[kind] for row in parts) for kind in KINDS]
    lines.append(
        f"{len(parts)} of transformers' families: {works[0]} can be merged with the router as it was (mapped), {works[1]} "
        f"merged and {works[2]} pruned to checkpoints that stock engines open (folded or row-kept, pruned)"
    )
    if len(parts) < len(rows):
        lines.append('"whole" is a model that reads images too; the line above it is its text part alone')
    return "\n".join(lines)
