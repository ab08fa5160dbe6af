"""Make the items of the embedded models' tasks: ``python -m tools.tasks hcsmoe_core/demo/tasks``."""

import argparse
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hcsmoe_core._util import replacing
from hcsmoe_core.demo import corpus
from hcsmoe_core.demo.tasks import CHOICES, DOMAINS, ITEMS, NAMES, path_of

UNEVEN = tuple(unit for unit in corpus.UNITS if unit[2] not in (10, 100, 1000))
# Generators of items where those of the text would be too easy: longer lists, larger numbers.
HARDER = {
    "sorting": partial(corpus.sorting, lengths=(6, 7)),
    "brackets": partial(corpus.brackets, lengths=range(16, 22)),
    "units": partial(corpus.units, table=UNEVEN, counts=range(300, 900)),
    "series": partial(corpus.series, steps=range(7, 25), starts=range(150, 350)),
}


def _spaced(words):
    return "".join(f" {word}" for word in words)


def _nudged(rng, value, steps):
    return max(0, value + rng.choice([-1, 1]) * rng.choice(steps))


def _swapped(rng, words):
    i = rng.randrange(len(words) - 1)
    words[i], words[i + 1] = words[i + 1], words[i]
    return _spaced(words)


def _arithmetic(rng, item):
    return str(_nudged(rng, int(item.answer), [1, 2, 10]))


def _sorting(rng, item):
    return _swapped(rng, item.answer.split())


def _brackets(rng, item):
    words = item.answer.split()
    if rng.random() < 0.5:
        return _swapped(rng, words)
    words[rng.randrange(len(words))] = rng.choice(list(corpus.CLOSING.values()))
    return _spaced(words)


def _dates(rng, item):
    day, month, *year = item.answer.split()
    if rng.random() < 0.6:
        day = max(1, min(31, int(day) + rng.choice([-10, -2, -1, 1, 2, 10])))
    else:
        month = corpus.MONTHS[(corpus.MONTHS.index(month) + rng.choice([-1, 1])) % 12]
    return _spaced([day, month, *year])


def _units(rng, item):
    value, unit = item.answer.split()
    value = int(value)
    if rng.random() < 0.2:
        return f" {value} {rng.choice([small for _, small, _ in corpus.UNITS])}"
    near = [value * 10, value + 10, max(1, value - 10), value + 2, max(1, value - 2), value + 100]
    return f" {rng.choice(near)} {unit}"


def _facts(rng, item):
    _, values = corpus.atlas()
    return " " + rng.choice(next(v for v in values.values() if item.answer.strip() in v))


def _largest(rng, item):
    return " " + rng.choice(item.prompt.split()[2:-1])


def _series(rng, item):
    return f" {_nudged(rng, int(item.answer), [1, 2, 3, 5, 10])}"


# One wrong answer of the same form per call; it may repeat, or be right by chance.
WRONG: dict[str, Callable] = dict(
    zip(DOMAINS, (_arithmetic, _sorting, _brackets, _dates, _units, _facts, _largest, _series), strict=True)
)


def make_items(domain: str, count: int = ITEMS, seed: int = 0) -> list[dict]:
    """Held-out questions of one domain, no prompt twice.

    Returns
    -------
    list of dict
        ``prompt``, ``choices`` (each ends its line, so that a short answer is not preferred for being a
        prefix of a longer one) and ``answer``, the index of the right one.
    """
    rng = random.Random(f"{domain} {seed}")
    items, seen, repeated = [], set(), 0
    while len(items) < count:
        item = corpus.draw(domain, rng, "heldout", HARDER.get(domain))
        if item.prompt in seen:
            repeated += 1
            if repeated > 100 * count:
                raise ValueError(f"{domain} has fewer than {count} different held-out prompts.")
            continue
        seen.add(item.prompt)
        choices = [item.answer]
        while len(choices) < CHOICES:
            wrong = WRONG[domain](rng, item)
            choices += [wrong] if wrong not in choices else []
        rng.shuffle(choices)
        lines = [choice + "\n" for choice in choices]
        items.append({"prompt": item.prompt, "choices": lines, "answer": choices.index(item.answer)})
    return items


def load_items(name: str) -> list[dict]:
    """Items of a task: ``prompt``, four ``choices`` and ``answer``, the index of the right one."""
    return [json.loads(line) for line in path_of(name).read_text(encoding="utf-8").splitlines()]


def write_items(folder: str | Path) -> None:
    """Make the items of every task, one file per task."""
    for name, domain in zip(NAMES, DOMAINS, strict=True):
        with replacing(Path(folder) / path_of(name).name) as part:
            lines = (json.dumps(item) + "\n" for item in make_items(domain))
            part.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder to write the items to")
    write_items(parser.parse_args().folder)
