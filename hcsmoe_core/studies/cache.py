"""What a measurement is known by: its settings, the data it reads and the code that computes it; statistics
kept by that.
"""

import ast
import functools
import inspect
import platform
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hcsmoe_core._util import folder_of, locked, sha256_file, sha256_json
from hcsmoe_core.checkpoint import tokenizer_hash
from hcsmoe_core.collect import capture
from hcsmoe_core.families import model_hash
from hcsmoe_core.scale.streaming import stream_capture, work_folder
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE, Statistics, load_statistics
from hcsmoe_core.text.calibration import calibration_settings, calibration_tokens, domains_of, local_files

PACKAGE = Path(__file__).parents[1]
FLOORS = (".", "checkpoint", "scale", "methods", "text", "score", "demo")  # folders whose code makes numbers
HASHED = 2**26  # bytes up to which a file goes by its content; a larger one by size and time of writing


def key(settings: dict, *, model: str | None = None, code: str = "") -> str:
    """Name of a measurement: equal only if its settings, data and code are.

    Parameters
    ----------
    settings : dict
        JSON values; files named by ``model``, ``calibration``, ``text``, ``tasks`` and ``plugin`` count by
        content.
    model : str, optional
        Hash of the loaded model (:func:`hcsmoe_core.families.model_hash`), in place of the weight files of
        its folder.
    code : str
        Hash of code beside the package's that takes part, such as a notebook's.
    """
    return sha256_json([settings, data_hash(settings, model=model), code_hash(), code])[:12]


def code_hash(folder: str | Path = PACKAGE) -> str:
    """Hash of the package's code that makes numbers, comments and docstrings aside; not of studies and
    figures.
    """
    files = sorted(path for floor in FLOORS for path in (Path(folder) / floor).glob("*.py"))
    return sha256_json([[path.relative_to(folder).as_posix(), by_stat(_plain, path)] for path in files])


def function_hash(function: Callable) -> str:
    """Hash of a function's code, comments and docstrings aside."""
    function = getattr(function, "func", function)  # of a functools.partial
    return _plain_hash(textwrap.dedent(inspect.getsource(function)))


def data_hash(parameters: dict, *, model: str | None = None) -> str:
    """Hash of what a measurement reads: the model, files of calibration text, tasks and plugins.

    The embedded corpus goes by the version of Python, whose library is part of it; the embedded models and
    tasks, and all files of a model's folder, by their content (large ones by size and time of writing); a
    model or data set on the hub by its name alone.

    Parameters
    ----------
    parameters : dict
        Of which ``model``, ``calibration``, ``text``, ``tasks`` and ``plugin`` are looked at.
    model : str, optional
        As for :func:`key`.
    """
    texts = filter(None, map(parameters.get, ("calibration", "text")))
    files = [path for text in texts for path in local_files(text)]
    plugins = parameters.get("plugin") or []
    files += map(Path, [plugins] if isinstance(plugins, str) else plugins)
    if "demo" in (parameters.get("tasks") or "demo"):
        files += sorted((PACKAGE / "demo/tasks").glob("*.jsonl"))
    folder = Path(folder_of(parameters.get("model") or ""))
    if parameters.get("model") and folder.is_dir():
        known = () if model is None else (".safetensors", ".md")
        files += sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in known)
    return sha256_json(
        [platform.python_version(), model, *([path.name, by_stat(_content, path)] for path in files)]
    )


def by_stat(function: Callable, path: Path) -> Any:
    """What a function of a path, its size and its time of writing gives, called once while both stay."""
    stat = path.stat()
    return _remembered(function, path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _remembered(function, path, size, written):
    return function(path, size, written)


def _content(path, size, written):
    return sha256_file(path) if size <= HASHED else [size, written]


def _plain(path, size, written):
    return _plain_hash(path.read_text(encoding="utf-8"))


def _plain_hash(text):
    """Hash of Python code without its comments, layout and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = node.body[ast.get_docstring(node, clean=False) is not None :]
    return sha256_json(ast.dump(tree))


def slug(model: Any) -> str:
    """Short name of a model, for folders."""
    return Path(str(model)).name


def file_name(*parts: Any) -> str:
    """Parts that are not empty, joined to a file name."""
    return "-".join(re.sub(r"[^\w.=,-]+", "_", str(part)) for part in parts if part)


def cached_statistics(
    model: Any,
    tokenizer: Any,
    *,
    calibration: str = "",
    sequences: int = 0,
    length: int = 0,
    seed: int = 42,
    batch_size: int = 8,
    needs: Sequence[str] = DEFAULT_NEEDS,
    sample: int = SAMPLE,
    folder: str | Path = "runs/statistics",
) -> Statistics:
    """Statistics of a model, captured once and read back while model, calibration and code are the same.

    Of several processes that ask for the same at the same time one captures, and the others wait for it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In memory or streamed.
    tokenizer : transformers.PreTrainedTokenizerBase or None
    calibration, sequences, length
        As for :func:`hcsmoe_core.text.calibration.calibration_settings`.
    seed : int
        Of the calibration text.
    needs : sequence of str
        What to collect at least: the sums always are, the sample where it is named.
    batch_size, sample
        As for :func:`hcsmoe_core.capture`.
    folder : str or path
    """
    settings = calibration_settings(model.name_or_path, calibration, sequences, length)
    source, size = settings["calibration"], dict(sequences=settings["sequences"], length=settings["length"])
    known = settings | {"seed": seed, "dtype": str(model.dtype), "sample": sample}
    known["tokenizer"] = tokenizer_hash(tokenizer)
    name = f"{slug(model.name_or_path)}-{key(known, model=model_hash(model))}"
    sums, sampled = (Path(folder) / f"{name}-{kind}.safetensors" for kind in ("sums", "sample"))
    wanted, needs = (sampled, (*DEFAULT_NEEDS, "sample")) if "sample" in needs else (sums, DEFAULT_NEEDS)
    with locked(wanted):
        for path in (wanted, sampled):
            if path.exists():
                return load_statistics(path)
        input_ids = calibration_tokens(source, tokenizer, model=model, seed=seed, **size)
        with work_folder(wanted, model) as work:
            stats = captured(
                model,
                input_ids,
                work,
                needs=needs,
                sample=sample,
                batch_size=batch_size,
                domains=domains_of(source, size["sequences"]),
            )
            stats.save(wanted)
    return stats


def captured(model: Any, input_ids: Any, work: Path | None, *, ranks: Any = None, **options: Any) -> Any:
    """:func:`hcsmoe_core.capture`, decoder layer by decoder layer where there is a work folder."""
    return (
        capture(model, input_ids, ranks=ranks, **options)
        if work is None
        else stream_capture(model, input_ids, work / "capture", **options)
    )
