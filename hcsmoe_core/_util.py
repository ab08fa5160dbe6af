"""Writing files so that a reader never meets a half-written one, hashing, and errors that name the choices."""

import contextlib
import hashlib
import importlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from safetensors import SafetensorError

from hcsmoe_core._version import __version__


def root():
    """Root of the repository, or the working directory where the package is installed without one."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "notebooks").is_dir() else Path.cwd()


def place(path):
    """``path``, from the repository's root if it is relative."""
    return root() / path


class InputError(ValueError):
    """Bad input: names the argument, what was given, what is allowed and what to do. Any other error is a bug of ours."""


class Table(Mapping):
    """Things by name, filled by the modules that define them, which are imported when the table is first looked at.

    Parameters
    ----------
    argument : str
        What errors call the name that is looked up.
    """

    providers: ClassVar[list] = []  # modules, by name, that fill any of the tables

    def __init__(self, argument):
        self.argument, self._entries = argument, {}

    def add(self, name, entry):
        """Add or replace one entry."""
        self._entries[name] = entry

    def _filled(self):
        while Table.providers:  # each is asked once; those that fill one table fill the others too
            importlib.import_module(Table.providers.pop(0))
        return self._entries

    def __getitem__(self, name):
        return self._filled()[check_choice(self.argument, name, self._filled())]

    def __contains__(self, name):
        return name in self._filled()

    def __iter__(self):
        return iter(self._filled())

    def __len__(self):
        return len(self._filled())


def check_choice(argument, value, choices):
    """Raise ValueError that lists the choices unless ``value`` is one of them."""
    if value not in choices:
        listed = ", ".join(f'"{c}"' for c in choices)
        raise InputError(f'The "{argument}" argument must be one of {listed}; not {value!r}.')
    return value


def check_count(argument, value, low, high=None):
    """Raise ValueError unless ``value`` is a whole number from ``low`` to ``high``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        allowed = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise InputError(f'The "{argument}" argument must be a whole number {allowed}; not {value!r}.')
    return value


@contextlib.contextmanager
def replacing(path):
    """Path to write to, beside ``path``; renamed to it when the block ends well, removed when it does not."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the path of a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with writing(path):
            yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path):
    """Tell a disk that is full, or fails, as the OSError that it is, also where safetensors wraps it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error}); see that the disk has room.") from None


@contextlib.contextmanager
def new_folder(path):
    """Folder to fill, beside ``path``; renamed to it when the block ends well, removed when it does not.

    Raises
    ------
    FileExistsError
        If ``path`` exists: nothing that is there is ever overwritten.
    """
    path = Path(path)
    check_absent(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        yield part
        check_absent(
            path
        )  # another process may have been quicker; a rename would replace an empty folder silently
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def lock_file(file, *, wait=False):
    """Lock an open file for as long as this process has it open, however it ends; whether nobody else has it."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: work may then be done twice, at worst
        return True
    return True


@contextlib.contextmanager
def held(path):
    """Hold the lock of ``path`` during the block, after waiting for whoever holds it; it goes with the process that dies."""
    lock = _lock_of(path)
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(lock, "a")  # noqa: SIM115
        lock_file(file, wait=True)
        if lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno())):
            break
        file.close()  # whoever held it has removed it in the meantime
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        file.close()


def is_held(path):
    """Whether a living process holds the lock of ``path``; False also where one died with it."""
    try:
        with open(_lock_of(path)) as file:
            return not lock_file(file)
    except FileNotFoundError:
        return False


def _lock_of(path):
    return Path(path).with_name(f".{Path(path).name}.lock")


def check_absent(path):
    """Raise FileExistsError if ``path`` is there."""
    if Path(path).exists():
        raise FileExistsError(f"The output folder {path} exists; remove it or give another one.")


def sha256_file(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value):
    """SHA-256 of a JSON value, whatever the order of its keys and its layout."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_json(path, value, *, indent=1):
    """Write ``value`` as JSON, indented so that a person can read it or on one line, beside its place and renamed."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")


def read_json(path):
    """The JSON value of a file, or None if it is cut short or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError:
        return None


def kept(folder, about, measure):
    """What was measured under some settings, if its file is in a folder already; else measured now, and kept there.

    Parameters
    ----------
    folder : path
    about : dict
        The settings, as JSON values; the file is named by their hash.
    measure : callable
        Gives the result, a JSON value.

    Returns
    -------
    dict
        ``about`` with the ``result``.
    """
    path = Path(folder) / f"{sha256_json(about)[:12]}.json"
    if not path.exists():
        write_json(path, about | {"result": measure()})
    return read_json(path)


def shown(path):
    """``path`` as a person at the repository's root would write it."""
    path = Path(path)
    return path.relative_to(root()) if path.is_relative_to(root()) else path


WEIGHTS = Path(__file__).parent / "demo" / "weights"
# Models that are part of the package, by name.
EMBEDDED = tuple(sorted(path.name for path in WEIGHTS.iterdir())) if WEIGHTS.is_dir() else ()


def folder_of(model):
    """Folder of an embedded model; the name or path of any other as it is given."""
    return WEIGHTS / model if model in EMBEDDED else model


def versions():
    """Versions of everything that a number may depend on, by package."""
    import importlib.metadata
    import platform

    found = {"hcsmoe": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "lm_eval", "datasets", "scipy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
