"""Corpus of the embedded models: the standard library that every Python carries, and ten procedural domains.

Every text belongs to one split, decided by a hash of its content (a file's name, a sum's operands, …), so
that training, calibration and held-out text never overlap. Nothing is downloaded or stored: text is generated
when asked for, and the same seed gives the same text.

Text of ``code`` and ``prose`` is that of the running Python's standard library and differs between Python
versions; the procedural domains do not.
"""

import ast
import contextlib
import functools
import hashlib
import itertools
import json
import os
import random
import sys
import sysconfig
import warnings
from collections import namedtuple
from datetime import date, timedelta
from pathlib import Path

from hcsmoe_core._util import check_choice, require, write_json

SPLITS = ("train", "calibration", "heldout")


# One question: ``prompt + answer`` is a line of the corpus, ``key`` decides its split.
Item = namedtuple("Item", "prompt answer key")


def _hashed(key):
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def split_of(key: str) -> str:
    """Split that a text belongs to: one in ten for calibration, one in ten held out."""
    return {0: "heldout", 1: "calibration"}.get(_hashed(key) % 10, "train")


def arithmetic(rng):
    """``3+4=7``."""
    operation = rng.choice("+-*")
    a, b = (rng.choice(r) for r in ((range(2, 100), range(2, 10)) if operation == "*" else [range(100)] * 2))
    if operation == "-":
        a, b = max(a, b), min(a, b)
    value = {"+": a + b, "-": a - b, "*": a * b}[operation]
    return Item(f"{a}{operation}{b}=", str(value), f"arithmetic {a}{operation}{b}")


def sorting(rng, lengths=(4, 5, 6)):
    """``sort 3 1 2 : 1 2 3``."""
    values = rng.sample(range(100), rng.choice(lengths))
    text = " ".join(map(str, values))
    return Item(f"sort {text} :", "".join(f" {v}" for v in sorted(values)), f"sorting {text}")


CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}


def brackets(rng, lengths=range(8, 16)):
    """``close ( [ ] < : > )``."""
    text, stack = [], []
    length = rng.choice(lengths)
    while len(text) < length or len(stack) < 3:
        if stack and (len(stack) > 6 or (rng.random() < 0.45 and len(text) < length)):
            text.append(stack.pop())
        else:
            text.append(rng.choice("([{<"))
            stack.append(CLOSING[text[-1]])
    text = " ".join(text)
    return Item(f"close {text} :", "".join(f" {b}" for b in reversed(stack)), f"brackets {text}")


MONTHS = "January February March April May June July August September October November December".split()
DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # of 2023: there are no leap days


def dates(rng):
    """``1999-05-03 is 3 May 1999`` and ``7 days after 3 May is 10 May``."""
    month = rng.randrange(12)
    day = rng.randrange(1, DAYS[month] + 1)
    if rng.random() < 0.4:
        year = rng.randrange(1900, 2030)
        prompt, answer = f"{year}-{month + 1:02d}-{day:02d} is", f" {day} {MONTHS[month]} {year}"
    else:
        days, after = rng.choice([1, 2, 3, 5, 7, 10, 14, 20]), rng.random() < 0.5
        prompt = f"{days} days {'after' if after else 'before'} {day} {MONTHS[month]} is"
        other = date(2023, month + 1, day) + timedelta(days if after else -days)
        answer = f" {other.day} {MONTHS[other.month - 1]}"
    return Item(prompt, answer, f"dates {prompt}")


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


def units(rng, table=UNITS, counts=range(2, 300)):
    """``3 weeks = 21 days``."""
    large, small, factor = rng.choice(table)
    count = rng.choice(counts)
    return Item(f"{count} {large} =", f" {count * factor} {small}", f"units {count} {large}")


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


@functools.cache
def atlas():
    """An invented atlas, always the same: attributes of 200 countries, and all values of each attribute."""
    rng = random.Random(7)

    def name(ending):
        return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in "12").capitalize() + ending

    values = {
        "capital": [name("ton") for _ in range(80)],
        "language": [name("ish") for _ in range(24)],
        "river": [name("") for _ in range(40)],
        "flag": "red blue green gold pink gray black white".split(),
        "animal": "cat dog cow hen fox owl bee ant wolf bear".split(),
    }
    countries = {}
    while len(countries) < 200:
        countries[name("land")] = None
    return {c: {a: rng.choice(v) for a, v in values.items()} for c in countries}, values


def facts(rng):
    """``The capital of Dogaland is Kobiton``, of :func:`atlas`."""
    table, _ = atlas()
    country, attribute, form = rng.choice(list(table)), rng.choice(list(SENTENCES)), rng.randrange(4)
    # Of the four wordings of a fact one is held out and one is for calibration, another pair for each fact:
    # the fact itself is always learnt, in two other wordings.
    split = ("heldout", "calibration", "train", "train")[(form + _hashed(f"{country} {attribute}")) % 4]
    prompt = SENTENCES[attribute][form].format(country)
    return Item(prompt, f" {table[country][attribute]}", f"{split}: {prompt}")


_TENS = ("", "X", "XX", "XXX", "XL", "L", "LX", "LXX", "LXXX", "XC")
_HUNDREDS, _ONES = (
    [tens.translate(str.maketrans("XLC", digits)) for tens in _TENS] for digits in ("CDM", "IVX")
)
NUMERALS = ["".join(p) for p in itertools.product(("", "M", "MM", "MMM"), _HUNDREDS, _TENS, _ONES)]


def roman(rng):
    """``14 in Roman is XIV`` and ``Roman XIV is 14``."""
    number = rng.randrange(1, 4000)
    numeral = NUMERALS[number]
    to_roman, back = (f"{number} in Roman is", f" {numeral}"), (f"Roman {numeral} is", f" {number}")
    return Item(*(to_roman if rng.random() < 0.5 else back), f"roman {number}")


def series(rng, steps=range(1, 25), starts=range(200)):
    """``count 3 5 7 9 11``."""
    step = rng.choice([-1, 1]) * rng.choice(steps)
    start = rng.choice(starts) + max(0, -6 * step)  # long enough above zero
    text = " ".join(str(start + i * step) for i in range(4))
    return Item(f"count {text}", f" {start + 4 * step}", f"series {start} {step}")


def largest(rng):
    """``largest of 312 305 390 341 is 390``."""
    values = rng.sample(range(100, 1000), 4)
    if rng.random() < 0.7:  # most lists share their hundreds, so that the first digit does not tell
        hundred = rng.randrange(1, 10) * 100
        values = [hundred + v % 100 for v in values]
    text = " ".join(map(str, values))
    item = Item(f"largest of {text} is", f" {max(values)}", f"largest {text}")
    return item if len(set(values)) == 4 else largest(rng)


THINGS = (
    "red blue green gold pink gray black white apple pear plum fig nut corn rice bean cat dog cow hen fox owl"
).split()


def recall(rng):
    """``given k red b owl : k red``."""
    keys = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randrange(3, 6))
    values = rng.sample(THINGS, len(keys))
    asked = rng.randrange(len(keys))
    text = " ".join(f"{k} {v}" for k, v in zip(keys, values, strict=True))
    return Item(f"given {text} : {keys[asked]}", f" {values[asked]}", f"recall {text}")


# Generators ``(random.Random) -> Item`` by domain.
PROCEDURAL = {
    generator.__name__: generator
    for generator in (arithmetic, sorting, brackets, dates, units, facts, roman, series, largest, recall)
}
STDLIB = ("code", "prose")
DOMAINS = (*STDLIB, *PROCEDURAL)


def domains(source: str) -> tuple[str, ...]:
    """Domains that a calibration source names, such as ``"demo:code,prose"``; of ``"demo"`` all."""
    names = [name.strip() for name in source.partition(":")[2].split(",") if name.strip()]
    return tuple(check_choice("source", name, DOMAINS) for name in names) or DOMAINS


def draw(domain: str, rng: random.Random, split: str, generate=None) -> Item:
    """The next item of a procedural domain that is of a split, from its generator or another one."""
    items = map(generate or PROCEDURAL[domain], itertools.repeat(rng))
    # The key of a fact begins with its split; all else is split by the hash of the key.
    own = (lambda key: key.split(":")[0]) if domain == "facts" else split_of
    return next(item for item in items if own(item.key) == split)


def text_of(domain: str, rng: random.Random, split: str, characters: int) -> str:
    """At least ``characters`` of one domain and split: lines of items, or a stretch of the library."""
    if domain in STDLIB:
        whole = stdlib_texts()[domain][split]
        require(
            characters <= len(whole),
            f"The {split} text of {domain} has {len(whole)} characters in this Python's standard "
            f"library, but {characters} were asked for; ask for shorter sequences.",
        )
        start = rng.randrange(len(whole) - characters + 1)
        return whole[start : start + characters]
    text = ""
    while len(text) < characters:
        text += "{0.prompt}{0.answer}\n".format(draw(domain, rng, split))
    return text


def blocks(source: str, tokenizer, *, sequences: int, length: int, seed: int, split: str | None = None, **_):
    """Token ids ``(sequences, length)`` of a source such as ``"demo:code,prose"``; its domains take turns."""
    import torch

    split, names, rows = check_choice("split", split or "calibration", SPLITS), domains(source), []
    for i in range(sequences):
        rng = random.Random(f"{split} {seed} {i}")
        characters, ids = 4 * length, []
        while len(ids) < length:
            ids = tokenizer(text_of(names[i % len(names)], rng, split, characters))["input_ids"]
            characters *= 2
        rows.append(ids[:length])
    return torch.tensor(rows, dtype=torch.int64)


SKIPPED = {
    *"site-packages test tests idlelib lib2to3 turtledemo __pycache__ ensurepip encodings pydoc_data".split()
}


@functools.cache
def stdlib_texts() -> dict:
    """Standard-library source without comments and docstrings, and the docstrings and help topics, by split.

    Parsing the library costs seconds, so that the result is kept in the user's cache folder where possible.

    Returns
    -------
    dict
        ``{"code" | "prose": {split: str}}``; a file and its docstrings are in the same split. The library
        repeats itself: a paragraph that has a long line in common with an earlier split is left out of a
        later one.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    version = f"{sys.version} {root} {Path(__file__).read_text(encoding='utf-8')}".encode()
    key = hashlib.sha256(version).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hcsmoe" / f"stdlib-{key}.json"
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is damaged
        return json.loads(cache.read_text(encoding="utf-8"))
    texts = _split_library(root)
    with contextlib.suppress(OSError):  # a home that cannot be written to is no reason to fail
        write_json(cache, texts)
    return texts


def _split_library(root):
    from pydoc_data.topics import topics

    texts = {domain: {split: [] for split in SPLITS} for domain in STDLIB}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        split = split_of(name.as_posix())
        if SKIPPED.isdisjoint(name.parts) and not name.parts[0].startswith("config-"):
            with contextlib.suppress(SyntaxError, UnicodeDecodeError, OSError):
                code, docstrings = _code_and_docstrings(path.read_text(encoding="utf-8"))
                texts["code"][split] += [code] if len(code) > 2000 else []
                texts["prose"][split] += docstrings
    for topic in sorted(topics):
        texts["prose"][split_of(f"topic {topic}")].append(topics[topic])
    return {
        domain: _joined(by_split, joint)
        for (domain, by_split), joint in zip(texts.items(), ("\n", "\n\n"), strict=True)
    }


def _joined(by_split, joint):
    """Text of each split, without the paragraphs that share a long line with an earlier split."""
    seen, joined = set(), {}
    for split, texts in by_split.items():
        joined[split] = joint.join(_unseen(text, seen) for text in texts)
        seen |= _long_lines(joined[split])
    return joined


def _long_lines(text):
    return {line.strip() for line in text.splitlines() if len(line.strip()) > 50}


def _unseen(text, seen):
    """Paragraphs of a text that have no long line among those seen."""
    return "\n\n".join(p for p in text.split("\n\n") if not seen or seen.isdisjoint(_long_lines(p)))


def _code_and_docstrings(source):
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(source)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    nodes = (n for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n) is not None)
    docstrings = {(n.body[0].lineno, n.body[0].end_lineno): ast.get_docstring(n) for n in nodes}
    dropped = {line for first, last in docstrings for line in range(first, last + 1)}
    lines = (line for i, line in enumerate(source.splitlines(), 1) if i not in dropped)
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return code, [text for text in docstrings.values() if len(text) > 120]
