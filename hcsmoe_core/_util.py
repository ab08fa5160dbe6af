"""Files written whole or not at all, locks, hashes, tables of named entries, and checks of arguments."""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import operator
import os
import platform
import re
import secrets
import shutil
from collections import UserDict
from functools import partial
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError

from hcsmoe_core._version import __version__

WEIGHTS = Path(__file__).parent / "demo" / "weights"
# Names of the models that are part of the package.
EMBEDDED = tuple(sorted(path.name for path in WEIGHTS.iterdir())) if WEIGHTS.is_dir() else ()


class InputError(ValueError):
    """Bad input: names the argument, its value, what is allowed and what to do. Any other error is a bug."""


class MissingPackageError(InputError, ImportError):
    """An optional package is not installed; says which extra of ours has it."""


class Table(UserDict):
    """Entries by name; ``argument`` is what errors call a name.

    Modules add or replace entries by ``table[name] = entry``; those that do are imported at the first lookup.
    """

    providers: ClassVar[list] = []  # names of modules that register entries, of this table or another

    def __init__(self, argument):
        self.argument, self.aliases, self._entries = argument, {}, {}

    @property
    def data(self):
        """The entries, once all providers have registered theirs."""
        for provider in Table.providers:
            importlib.import_module(provider)  # waits where another thread is importing it
        return self._entries

    def __getitem__(self, name):
        name = self.aliases.get(name, name)
        return self.data[check_choice(self.argument, name, self.data)]

    def __setitem__(self, name, entry):
        self._entries[name] = entry


def require(condition, message: str, error=InputError):
    """Raise an error with a message unless a condition on the input holds."""
    if not condition:
        raise error(message)


def check_choice(argument: str, value, choices):
    """``value``; InputError listing the choices if it is none of them."""
    listed = ", ".join(f'"{choice}"' for choice in choices)
    require(value in [*choices], f'The "{argument}" argument must be one of {listed}; not {value!r}.')
    return value


def check_count(argument: str, value, low: int, high: int | None = None) -> int:
    """``value`` as an int; InputError unless it is a whole number (of any integer type) in ``low … high``."""
    try:
        count = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = low - 1
    allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
    require(
        low <= count <= (count if high is None else high),
        f'The "{argument}" argument must be a whole number {allowed}; not {value!r}.',
    )
    return count


@contextlib.contextmanager
def _beside(path, remove):
    """Temporary path beside ``path``, renamed to it when the block ends, removed when the block fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        remove(part)


@contextlib.contextmanager
def replacing(path):
    """Temporary file beside ``path``, renamed to it when the block ends, removed when the block fails."""
    require(not Path(path).is_dir(), f"{path} is a folder; give the path of a file.", IsADirectoryError)
    with _beside(path, lambda part: part.unlink(missing_ok=True)) as part, writing(path):
        yield part


@contextlib.contextmanager
def writing(path):
    """Raise OSError where safetensors fails to write, as on a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}); is the disk full?") from None


@contextlib.contextmanager
def new_folder(path):
    """As :func:`replacing` for a folder; FileExistsError if ``path`` exists: nothing is ever overwritten."""
    check_absent(path)
    with _beside(path, partial(shutil.rmtree, ignore_errors=True)) as part:
        part.mkdir()
        yield part
        check_absent(path)  # another process may have been faster; a rename would replace an empty folder


def check_absent(path):
    """Raise FileExistsError if ``path`` exists."""
    message = f"The output folder {path} exists; remove it or give another one."
    require(not Path(path).exists(), message, FileExistsError)


def sha256_file(path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value) -> str:
    """SHA-256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path, value, *, indent=1):
    """Write ``value`` as JSON, in full or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def read_json(path):
    """The JSON value of a file, or None if it is cut short or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def signed(record: dict) -> dict:
    """A record with a checksum, by which :func:`read_record` tells that it was changed."""
    return record | {"sha256": sha256_json(record)}


def read_record(path, kind=dict, *, what="record", remedy="Make it again."):
    """The object in a JSON file, without its checksum.

    InputError naming the file, and the field, if it is damaged, changed or not of a kind
    (:func:`check_kind`).
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        unsigned = {key: value for key, value in record.items() if key != "sha256"}
        digest = sha256_json(unsigned)
        whole = not re.search("[\ud800-\udbff]", json.dumps(record, ensure_ascii=False))
        require(whole, "half a character, a lone surrogate, is in it")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a readable {what} ({error}); is it cut short? {remedy}") from None
    except AttributeError:
        raise InputError(f"{path} is not a {what}, but {record!r:.40}. {remedy}") from None
    changed = f'{path} was changed since it was written. {remedy} Or remove its "sha256" to mean the change.'
    require(record.get("sha256", digest) == digest, changed)
    return check_kind(unsigned, kind, f"{path} is not a valid {what}:")


def check_kind(value, kind, where: str):
    """``value``; InputError that starts with ``where`` and names the field unless a JSON value is of a kind.

    A kind is a type, of which ``float`` is any finite number; ``[kind]``, a list; ``{str: kind}``, an object;
    ``{"key": kind, "other?": kind}``, one with such keys, of which those with "?" may be absent; or
    ``(kind,)``, that or null.
    """
    if isinstance(kind, tuple):
        return value if value is None else check_kind(value, kind[0], where)
    plain = kind if isinstance(kind, type) else type(kind)
    suits = isinstance(value, int | float if plain is float else plain)
    if plain in (int, float):  # no number that overflows, and True is none
        suits = suits and not isinstance(value, bool) and abs(value) < (2**63 if plain is int else 1e308)
    require(suits, f"{where} must be {_KINDS.get(plain, 'a number')}; not {value!r:.40}.")
    if isinstance(kind, list):
        for index, item in enumerate(value):
            check_kind(item, kind[0], f"{where}[{index}]" if where[-1] != ":" else f"{where} [{index}]")
    for name, inner in kind.items() if isinstance(kind, dict) else ():
        keys = value if name is str else {name.removesuffix("?")} & value.keys()
        require(keys or name is str or name[-1] == "?", f'{where} has no "{name}".')
        for key in keys:
            check_kind(value[key], inner, f'{where} "{key}"')
    return value


_KINDS = {int: "a whole number", str: "text", list: "a list", dict: "an object", bool: "true or false"}


def folder_of(model):
    """Folder of an embedded model; any other name or path unchanged."""
    return WEIGHTS / model if model in EMBEDDED else model


def versions() -> dict:
    """Versions of the packages that numbers depend on."""
    by_package = {"hcsmoe": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "lm_eval", "datasets", "scipy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            by_package[package] = importlib.metadata.version(package)
    return by_package
