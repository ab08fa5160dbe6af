"""Text of the embedded models: what every Python carries, and ten procedural domains.

Every text belongs to one split, decided by a hash of what it is about (a file's name, a sum's operands, …), so that
training, calibration and held-out text never overlap. Nothing is downloaded and nothing is stored: text is made when
asked for, and the same seed makes the same text.

Text of ``code`` and ``prose`` is that of the running Python's standard library and differs between Python versions;
the procedural domains do not.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import random
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hcsmoe_core._util import write_json

SPLITS = ("train", "calibration", "heldout")


@dataclass(frozen=True)
class Item:
    """One question: ``prompt + answer`` is a line of the corpus, ``key`` decides its split."""

    prompt: str
    answer: str
    key: str


@dataclass(frozen=True)
class Domain:
    """A procedural domain.

    Parameters
    ----------
    make : callable ``(random.Random) -> Item``
    distract : callable ``(random.Random, Item) -> str``
        One wrong answer of the same form; may repeat itself or be right by chance, the caller looks.
    ask : callable ``(random.Random) -> Item``, optional
        Makes the items of the task where those of the text would be too easy: longer lists, larger numbers.
    """

    make: Callable[[random.Random], Item]
    distract: Callable[[random.Random, Item], str]
    ask: Callable[[random.Random], Item] | None = None


def split_of(key):
    """Split a text belongs to: one in ten for calibration, one in ten held out."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return {0: "heldout", 1: "calibration"}.get(share, "train")


def _nudged(rng, value, steps):
    return max(0, value + rng.choice([-1, 1]) * rng.choice(steps))


def _arithmetic(rng):
    operation = rng.choice("+-*")
    if operation == "*":
        a, b = rng.randrange(2, 100), rng.randrange(2, 10)
        value = a * b
    else:
        a, b = rng.randrange(100), rng.randrange(100)
        if operation == "-":
            a, b = max(a, b), min(a, b)
        value = a + b if operation == "+" else a - b
    return Item(f"{a}{operation}{b}=", str(value), f"arithmetic {a}{operation}{b}")


def _arithmetic_wrong(rng, item):
    return str(_nudged(rng, int(item.answer), [1, 2, 10]))


def _sorting(rng, lengths=(4, 5, 6)):
    values = rng.sample(range(100), rng.choice(lengths))
    text = " ".join(map(str, values))
    return Item(f"sort {text} :", "".join(f" {v}" for v in sorted(values)), f"sorting {text}")


def _swapped(rng, words):
    i = rng.randrange(len(words) - 1)
    words[i], words[i + 1] = words[i + 1], words[i]
    return "".join(f" {w}" for w in words)


def _sorting_wrong(rng, item):
    return _swapped(rng, item.answer.split())


CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def _brackets(rng, lengths=range(8, 16)):
    shown, stack = [], []
    length = rng.choice(lengths)
    while len(shown) < length or len(stack) < 3:
        if stack and (len(stack) > 6 or (rng.random() < 0.45 and len(shown) < length)):
            shown.append(stack.pop())
        else:
            opening = rng.choice("([{<")
            shown.append(opening)
            stack.append(CLOSING[opening])
    text = " ".join(shown)
    return Item(f"close {text} :", "".join(f" {b}" for b in reversed(stack)), f"brackets {text}")


def _brackets_wrong(rng, item):
    words = item.answer.split()
    if rng.random() < 0.5:
        return _swapped(rng, words)
    words[rng.randrange(len(words))] = rng.choice(list(CLOSING.values()))
    return "".join(f" {w}" for w in words)


MONTHS = (
    "January February March April May June July August September October November December".split()  # in order
)


DAYS = (
    31,
    28,
    31,
    30,
    31,
    30,
    31,
    31,
    30,
    31,
    30,
    31,
)  # leap days are left out: the rule is the point, not the calendar


def _shifted(day, month, days):
    """``day`` of ``month`` (0-based) moved by less than a month, in a year of 365 days."""
    day += days
    if day < 1:
        month = (month - 1) % 12
        day += DAYS[month]
    elif day > DAYS[month]:
        day -= DAYS[month]
        month = (month + 1) % 12
    return day, month


def _dates(rng):
    month = rng.randrange(12)
    day = rng.randrange(1, DAYS[month] + 1)
    if rng.random() < 0.4:
        year = rng.randrange(1900, 2030)
        prompt, answer = f"{year}-{month + 1:02d}-{day:02d} is", f" {day} {MONTHS[month]} {year}"
    else:
        days = rng.choice([1, 2, 3, 5, 7, 10, 14, 20])
        after = rng.random() < 0.5
        to_day, to_month = _shifted(day, month, days if after else -days)
        prompt = f"{days} days {'after' if after else 'before'} {day} {MONTHS[month]} is"
        answer = f" {to_day} {MONTHS[to_month]}"
    return Item(prompt, answer, f"dates {prompt}")


def _dates_wrong(rng, item):
    day, month, *year = item.answer.split()
    if rng.random() < 0.6:
        day = max(1, min(31, int(day) + rng.choice([-10, -2, -1, 1, 2, 10])))
    else:
        month = MONTHS[(MONTHS.index(month) + rng.choice([-1, 1])) % 12]
    return "".join(f" {part}" for part in [day, month, *year])


UNITS = (
    ("km", "m", 1000),
    ("kg", "g", 1000),
    ("m", "cm", 100),
    ("cm", "mm", 10),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("pounds", "ounces", 16),
    ("gallons", "pints", 8),
    ("score", "pieces", 20),
    ("gross", "pieces", 144),
)


UNEVEN = tuple(u for u in UNITS if u[2] not in (10, 100, 1000))


def _units(rng, units=UNITS, counts=range(2, 300)):
    large, small, factor = rng.choice(units)
    count = rng.choice(counts)
    return Item(f"{count} {large} =", f" {count * factor} {small}", f"units {count} {large}")


def _units_wrong(rng, item):
    value, unit = item.answer.split()
    value = int(value)
    if rng.random() < 0.2:
        return f" {value} {rng.choice([u for _, u, _ in UNITS])}"
    return f" {rng.choice([value * 10, value + 10, max(1, value - 10), value + 2, max(1, value - 2), value + 100])} {unit}"


def _name(rng, syllables):
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables)).capitalize()


@functools.cache
def _facts_table():
    """An invented atlas: 200 countries with five attributes each, always the same."""
    rng = random.Random(7)
    values = {
        "capital": [f"{_name(rng, 2)}ton" for _ in range(80)],
        "language": [f"{_name(rng, 2)}ish" for _ in range(24)],
        "river": [_name(rng, 2) for _ in range(40)],
        "flag": "red blue green gold pink gray black white".split(),
        "animal": "cat dog cow hen fox owl bee ant wolf bear".split(),
    }
    countries = []
    while len(countries) < 200:
        name = f"{_name(rng, 2)}land"
        if name not in countries:
            countries.append(name)
    return {c: {a: rng.choice(v) for a, v in values.items()} for c in countries}, values


SENTENCES = {
    "capital": (
        "The capital of {} is",
        "The main city of {} is",
        "{} is governed from",
        "The king of {} lives in",
    ),
    "language": (
        "People in {} speak",
        "The language of {} is",
        "Books in {} are written in",
        "They who come from {} talk",
    ),
    "river": (
        "The river of {} is the",
        "The water in {} comes from the",
        "{} lies on the",
        "The boats of {} sail on the",
    ),
    "flag": ("The flag of {} is", "The colour of {} is", "{} has a flag that is", "The banner of {} is"),
    "animal": (
        "The animal of {} is the",
        "In {} they honour the",
        "{} is proud of its",
        "The coin of {} shows a",
    ),
}


def _facts(rng):
    table, _ = _facts_table()
    country = rng.choice(list(table))
    attribute = rng.choice(list(SENTENCES))
    form = rng.randrange(4)
    # Of the four ways to say a fact one is held out and one is for calibration, another pair for each fact: the fact
    # itself is always learnt, in two other wordings.
    turn = int.from_bytes(hashlib.sha256(f"{country} {attribute}".encode()).digest()[:4], "big")
    split = ("heldout", "calibration", "train", "train")[(form + turn) % 4]
    prompt = SENTENCES[attribute][form].format(country)
    return Item(prompt, f" {table[country][attribute]}", f"{split}: {prompt}")


def _facts_wrong(rng, item):
    _, values = _facts_table()
    return " " + rng.choice(next(v for v in values.values() if item.answer.strip() in v))


ROMAN = tuple(
    zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    )
)


def _to_roman(number):
    text = ""
    for value, symbol in ROMAN:
        while number >= value:
            text, number = text + symbol, number - value
    return text


def _from_roman(text):
    number = 0
    for value, symbol in ROMAN:
        while text.startswith(symbol):
            text, number = text[len(symbol) :], number + value
    return number


def _roman(rng):
    number = rng.randrange(1, 4000)
    if rng.random() < 0.5:
        return Item(f"{number} in Roman is", f" {_to_roman(number)}", f"roman {number}")
    return Item(f"Roman {_to_roman(number)} is", f" {number}", f"roman {number}")


def _roman_wrong(rng, item):
    answer = item.answer.strip()
    number = int(answer) if answer.isdigit() else _from_roman(answer)
    number = min(3999, max(1, _nudged(rng, number, [1, 2, 5, 10, 50, 100])))
    return f" {number}" if answer.isdigit() else f" {_to_roman(number)}"


def _series(rng, steps=range(1, 25), starts=range(200)):
    step = rng.choice([-1, 1]) * rng.choice(steps)
    start = rng.choice(starts) + max(0, -6 * step)  # long enough above zero
    shown = " ".join(str(start + i * step) for i in range(4))
    return Item(f"count {shown}", f" {start + 4 * step}", f"series {start} {step}")


def _series_wrong(rng, item):
    return f" {_nudged(rng, int(item.answer), [1, 2, 3, 5, 10])}"


def _largest(rng):
    values = rng.sample(range(100, 1000), 4)
    if rng.random() < 0.7:  # most lists share their hundreds, so that the first digit does not tell
        hundred = rng.randrange(1, 10) * 100
        values = [hundred + v % 100 for v in values]
        if len(set(values)) < 4:
            return _largest(rng)
    text = " ".join(map(str, values))
    return Item(f"largest of {text} is", f" {max(values)}", f"largest {text}")


def _largest_wrong(rng, item):
    return " " + rng.choice(item.prompt.split()[2:-1])


THINGS = "red blue green gold pink gray black white apple pear plum fig nut corn rice bean cat dog cow hen fox owl".split()


def _recall(rng):
    keys = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randrange(3, 6))
    values = rng.sample(THINGS, len(keys))
    asked = rng.randrange(len(keys))
    shown = " ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
    return Item(f"given {shown} : {keys[asked]}", f" {values[asked]}", f"recall {shown}")


def _recall_wrong(rng, item):
    shown = item.prompt.removeprefix("given ").split(" :")[0].split()[1::2]
    return " " + rng.choice([*shown, rng.choice(THINGS)])


PROCEDURAL = {
    "arithmetic": Domain(_arithmetic, _arithmetic_wrong),
    "sorting": Domain(_sorting, _sorting_wrong, functools.partial(_sorting, lengths=(6, 7))),
    "brackets": Domain(_brackets, _brackets_wrong, functools.partial(_brackets, lengths=range(16, 22))),
    "dates": Domain(_dates, _dates_wrong),
    "units": Domain(_units, _units_wrong, functools.partial(_units, units=UNEVEN, counts=range(300, 900))),
    "facts": Domain(_facts, _facts_wrong),
    "roman": Domain(_roman, _roman_wrong),
    "series": Domain(
        _series, _series_wrong, functools.partial(_series, steps=range(7, 25), starts=range(150, 350))
    ),
    "largest": Domain(_largest, _largest_wrong),
    "recall": Domain(_recall, _recall_wrong),
}


STDLIB = ("code", "prose")


DOMAINS = (*STDLIB, *PROCEDURAL)


def draw(domain, rng, split, *, task=False):
    """One item of a procedural domain that belongs to ``split``; of its task where that asks for more than the text has."""
    make = (PROCEDURAL[domain].ask if task else None) or PROCEDURAL[domain].make
    while True:
        item = make(rng)
        # Facts carry their split in the key; everything else is split by the hash of what it asks.
        if (item.key.split(":")[0] if domain == "facts" else split_of(item.key)) == split:
            return item


# --- text that every Python carries -----------------------------------------------------------------------------------

SKIPPED = {
    "site-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "ensurepip",
    "encodings",
}


@functools.cache
def stdlib_texts():
    """Standard-library source without its comments and docstrings, and the docstrings and help topics, by split.

    Taking the library apart costs seconds, so that the result is kept in the user's cache folder where there can be one.

    Returns
    -------
    dict
        ``{"code" | "prose": {split: str}}``; a file and its docstrings are always in the same split. The library repeats
        itself: a paragraph that has a long line in common with an earlier split is left out of a later one.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    key = hashlib.sha256(
        f"{sys.version} {root} {Path(__file__).read_text(encoding='utf-8')}".encode()
    ).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hcsmoe" / f"stdlib-{key}.json"
    try:
        return json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        texts = _take_apart(root)
    with contextlib.suppress(OSError):  # a home that cannot be written to is no reason to fail
        write_json(cache, texts)
    return texts


def _take_apart(root):
    texts = {domain: {split: [] for split in SPLITS} for domain in STDLIB}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if (
            SKIPPED.intersection(name.parts)
            or name.parts[0].startswith("config-")
            or name.parts[0] == "pydoc_data"
        ):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        split = split_of(name.as_posix())
        code, docstrings = _code_and_docstrings(source, tree)
        if len(code) > 2000:
            texts["code"][split].append(code)
        texts["prose"][split].extend(docstrings)
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        texts["prose"][split_of(f"topic {topic}")].append(topics[topic])
    joint = {"code": "\n", "prose": "\n\n"}
    found = {domain: {} for domain in STDLIB}
    for domain in STDLIB:
        seen = set()
        for split in SPLITS:
            found[domain][split] = joint[domain].join(_unseen(text, seen) for text in texts[domain][split])
            seen.update(_long_lines(found[domain][split]))
    return found


def _long_lines(text):
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 50}


def _unseen(text, seen):
    """Paragraphs of a text that have no long line among those seen."""
    return "\n\n".join(p for p in text.split("\n\n") if not seen or seen.isdisjoint(_long_lines(p)))


def _code_and_docstrings(source, tree):
    dropped, docstrings = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text is not None:
                dropped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
                if len(text) > 120:
                    docstrings.append(text)
    lines = source.splitlines()
    kept = (line for i, line in enumerate(lines, 1) if i not in dropped and not line.lstrip().startswith("#"))
    return "\n".join(kept), docstrings


def text_of(domain, rng, split, characters):
    """At least ``characters`` characters of one domain and split: lines of items, or a stretch of the library."""
    if domain in STDLIB:
        whole = stdlib_texts()[domain][split]
        if characters > len(whole):
            raise ValueError(
                f"The {split} text of {domain} has {len(whole)} characters in this Python's standard library, but "
                f"{characters} were asked for; ask for shorter sequences."
            )
        start = rng.randrange(len(whole) - characters + 1)
        return whole[start : start + characters]
    lines, length = [], 0
    while length < characters:
        item = draw(domain, rng, split)
        lines.append(f"{item.prompt}{item.answer}\n")
        length += len(lines[-1])
    return "".join(lines)
