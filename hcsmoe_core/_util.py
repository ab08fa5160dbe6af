"""Files written whole or not at all, locks, hashes, tables of named entries, and checks of arguments."""

import contextlib
import difflib
import hashlib
import html
import importlib
import importlib.metadata
import json
import operator
import os
import platform
import re
import shutil
from collections import UserDict
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout
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
        return self.data[choice_of(self.argument, name, self.data)]

    def __setitem__(self, name, entry):
        self._entries[name] = entry


def require(condition, message: str, error=InputError):
    """Raise an error with a message unless a condition on the input holds."""
    if not condition:
        raise error(message)


def check_choice(argument: str, value, choices):
    """``value``; InputError listing the choices, the closest first, if it is none of them."""
    if value not in [*choices]:
        listed = closest_first(value, [f'"{choice}"' for choice in choices])
        raise InputError(f'The "{argument}" argument must be one of {listed}; not {value!r}.')
    return value


def choice_of(argument: str, value, choices):
    """The choice that ``value`` names, whatever its case, hyphens and underscores; InputError if none."""
    spelt = {_letters(choice): choice for choice in choices if isinstance(value, str)}
    return check_choice(argument, value if value in choices else spelt.get(_letters(value), value), choices)


def closest_first(value, choices) -> str:
    """Names separated by commas, first those close to ``value``; if there are any, at most twelve."""
    by_letters, wanted = {_letters(choice): choice for choice in choices}, _letters(value)
    close = [name for name in by_letters if len(wanted) > 2 and wanted in name][:8]
    close += difflib.get_close_matches(wanted, by_letters)
    listed = list(dict.fromkeys([*map(by_letters.get, close), *choices]))
    more = f", … ({len(listed)} in all)" if close and len(listed) > 12 else ""
    return ", ".join(map(str, listed[:12] if more else listed)) + more


def _letters(name):
    return re.sub(r"[\W_]", "", str(name)).lower()


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


def html_table(title: str, rows: list[dict]) -> str:
    """Rows with the same keys as an HTML table under a title, for notebooks; everything is escaped."""
    lines = [*rows[:1], *(row.values() for row in rows)]
    cells = ("".join(f"<td>{html.escape(str(value))}</td>" for value in line) for line in lines)
    return f"<p>{html.escape(title)}</p><table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


NAME_BYTES = 240  # of an output's name, so that "..NAME.part.lock" is a name too


def resolved(path) -> Path:
    """Path of an output, or what it links to; InputError if it names nothing, or in too many bytes."""
    path = Path(path)
    example = "give the path of a file or folder, such as runs/merged"
    require(path.name not in ("", ".."), f"The output {str(path)!r} is no name; {example}.")
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    size, name = len(os.fsencode(path.name)), f"{path.name[:30]}…"
    require(size <= NAME_BYTES, f"The output name {name} has {size} bytes; give one of {NAME_BYTES} at most.")
    return path


def output_path(path, *, folder: bool = False) -> Path:
    """Where an output is written, which is where ``path`` links to; checked before any work.

    Parameters
    ----------
    path : path
    folder : bool
        It is a folder, which must not exist, rather than a file, which is replaced.

    Raises
    ------
    InputError, OSError
        If it has no usable name, is in the way of something that is not replaced, or cannot be written.
    """
    target = resolved(path)
    if folder and os.path.lexists(target):
        raise FileExistsError(f"The output folder {path} exists; remove it or give another one.")
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the path of a file.")
    if os.path.lexists(path) and not Path(path).is_file() and (Path(path).exists() or target.is_symlink()):
        raise OSError(f"{path} is a device, pipe or socket, or a link to itself; give the path of a file.")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {parent} is a file; give another output.")
    for place in (parent, target):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(f"Permission denied: {place} is not writable; give another output.")
    return target


@contextlib.contextmanager
def replacing(path):
    """Temporary file beside ``path``, renamed to it when the block ends, removed when the block fails."""
    path = output_path(path)
    with unfinished(path) as part, writing(path):
        yield part
        publish(part, path)


@contextlib.contextmanager
def writing(path):
    """Raise OSError that names ``path`` where it fails to be written, as on a full disk."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if getattr(error, "filename", None) or (isinstance(error, OSError) and error.errno is None):
            raise  # says itself of which file it is
        denied = "permission denied" in str(error).lower()
        hint = "give another output" if denied else "is the disk full?"
        raise OSError(f"{path} cannot be written ({error}); {hint}") from None


@contextlib.contextmanager
def new_folder(path):
    """Temporary folder beside ``path``, renamed to it when the block ends, removed when the block fails.

    Raises
    ------
    FileExistsError
        If ``path`` exists: nothing is ever overwritten.
    """
    path = output_path(path, folder=True)
    with unfinished(path) as part, writing(path):
        part.mkdir()
        yield part
        check_absent(path)  # another process may have been faster; a rename would replace an empty folder
        publish(part, path)


@contextlib.contextmanager
def unfinished(path):
    """Path in a folder ``.NAME.part`` beside ``path``, to be written while no other process does so.

    What a run that was killed left there is removed first; safetensors' own temporary files are in it, too.
    """
    folder = _part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if os.path.lexists(folder):
            own = folder.is_dir() and not folder.is_symlink()
            own = own and all(file.name.startswith((path.name, ".tmp")) for file in folder.iterdir())
            require(own, f"{folder} is in the way, and not of hcsmoe; move it, or give another output.")
            shutil.rmtree(folder)
        folder.mkdir()
        try:
            yield folder / path.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _part_of(path):
    return path.with_name(f".{path.name}.part")


def was_killed(path) -> bool:
    """Whether the process that wrote ``path`` by :func:`unfinished` died before it could tidy up."""
    return _lock_of(_part_of(path)).exists() and not is_locked(_part_of(path))


def publish(part, path):
    """Rename what was written, once it is on the disk and has the modes that the umask gives."""
    mode = (part if part.is_dir() else part.parent).stat().st_mode & 0o666
    for file in (part, *part.rglob("*")):
        if file.is_file() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)  # safetensors writes for the user alone
        _sync(file)
    os.replace(part, path)
    _sync(path.parent)


def _sync(path):
    if os.name != "posix":  # others open no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # not every file system does folders
            raise
    finally:
        os.close(handle)


def check_absent(path):
    """Raise FileExistsError if ``path`` exists, and other errors if no folder can be made there."""
    output_path(path, folder=True)


def _lock_of(path):
    return Path(path).with_name(f".{Path(path).name}.lock")


@contextlib.contextmanager
def locked(path):
    """Lock ``path`` during the block, after waiting for other processes; a lock ends with its process."""
    lock = _lock_of(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # Windows removes no open file
                lock.unlink()


def is_locked(path) -> bool:
    """Whether a living process has locked ``path``."""
    lock = _lock_of(path)
    if not lock.exists():
        return False
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True


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
