"""TODO."""

import functools
import hashlib
import platform
import re
from pathlib import Path

import hcsmoe_core
from hcsmoe_core._util import held, place, sha256_file, sha256_json
from hcsmoe_core.collect import capture
from hcsmoe_core.demo import models as demo
from hcsmoe_core.families import model_hash
from hcsmoe_core.scale.streaming import stream_capture, work_folder
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE, load_statistics
from hcsmoe_core.text.calibration import calibration_tokens, domains_of, is_demo, local_files, own_sequences


def core_hash():
    """Hash of the core's source, so that a cell is measured anew when what measures it has changed."""
    digest = hashlib.sha256()
    folder = Path(hcsmoe_core.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def data_hash(parameters):
    """Hash of what the cells of a notebook read beside their parameters: files of calibration text, tasks, weights.

    The embedded corpus goes by the version of Python, whose library is part of it, and the core's source; the embedded
    models and tasks, and all files of a model's folder up to 64 MiB, by their content; larger files by size and time of
    writing; a model or data set on the hub by its name alone.

    Parameters
    ----------
    parameters : dict
        Of which ``model``, ``calibration``, ``text`` and ``tasks`` are looked at.

    Returns
    -------
    str
    """
    model, texts = (
        str(parameters.get("model", "")),
        [parameters.get(name, "") for name in ("calibration", "text")],
    )
    folder = Path(demo.folder(model) if model in demo.NAMES else model)
    files = [path for text in texts if text for path in local_files(text)]
    files += sorted(path for path in folder.iterdir() if path.is_file()) if model and folder.is_dir() else []
    if not parameters.get("tasks"):
        files += sorted((Path(hcsmoe_core.__file__).parent / "demo/tasks").glob("*.jsonl"))
    return sha256_json([platform.python_version(), *([path.name, _content(path)] for path in files)])


def _content(path):
    about = path.stat()
    return _content_of(path, about.st_size, about.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _content_of(path, size, written):
    """What tells a file from one that it was before."""
    return sha256_file(path) if size <= 2**26 else [size, written]


def slug(model):
    """Short name of a model, for folders."""
    return Path(str(model)).name


def file_name(*parts):
    """Parts that are not empty, joined to what a file may be called."""
    return "-".join(re.sub(r"[^\w.=,-]+", "_", str(part)) for part in parts if part)


def calibration_of(model, calibration="", sequences=0, length=0):
    """Calibration settings with those that were left out filled in.

    Embedded models are calibrated on the embedded corpus, 96 × 256 tokens; others as in the paper, on 32 × 2,048 of C4. Where
    an embedded model writes text itself there are 288 × 256, as it was trained on 256 at a time.

    Returns
    -------
    dict
        ``calibration``, ``sequences`` and ``length``.
    """
    calibration = str(calibration or ("demo" if str(model) in demo.NAMES else "c4"))
    default = (96, 256) if is_demo(calibration) else (32, 2048)
    if str(model) in demo.NAMES and own_sequences(calibration, 288):
        default = (288, 256)
    return {"calibration": calibration, "sequences": sequences or default[0], "length": length or default[1]}


def statistics(
    model,
    tokenizer,
    *,
    calibration="",
    sequences=0,
    length=0,
    seed=42,
    batch_size=8,
    needs=DEFAULT_NEEDS,
    folder="runs/statistics",
):
    """Statistics of a model, captured once and read back whenever model and calibration are the same.

    Of several processes that ask for the same at the same time one captures, and the others wait for it.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        In memory or streamed.
    tokenizer : transformers.PreTrainedTokenizerBase or None
    calibration, sequences, length
        As for :func:`calibration_of`.
    seed, batch_size : int
    needs : sequence of str
        What to collect at least: the sums always are, the sample where it is named; see
        :func:`hcsmoe_core.collect.capture`.
    folder : str or path
        Where the statistics are kept.

    Returns
    -------
    Statistics
    """
    settings = calibration_of(model.name_or_path, calibration, sequences, length)
    needs = tuple(dict.fromkeys((*DEFAULT_NEEDS, *needs)))
    key = settings | {"seed": seed, "model": model_hash(model), "dtype": str(model.dtype)}
    key |= {"core": hcsmoe_core.__version__, "sample": SAMPLE}
    if "demo" in settings["calibration"]:
        key["python"] = platform.python_version()  # whose library is part of the text
    files = [sha256_file(path) for path in local_files(settings["calibration"])]
    if files:
        key["files"] = files
    kinds = {"sums": DEFAULT_NEEDS, "sample": (*DEFAULT_NEEDS, "sample")}
    paths = {
        k: place(folder) / f"{slug(model.name_or_path)}-{sha256_json(key)[:12]}-{k}.safetensors"
        for k in kinds
    }
    wanted = "sample" if "sample" in needs else "sums"
    with held(paths[wanted]):
        for path in (paths[wanted], paths["sample"]):
            if path.exists():
                return load_statistics(path)
        return _captured(
            model, tokenizer, settings, paths[wanted], seed=seed, needs=kinds[wanted], batch_size=batch_size
        )


def _captured(model, tokenizer, settings, path, *, seed, needs, batch_size):
    """Statistics captured and written to a file."""
    size = {"sequences": settings["sequences"], "length": settings["length"]}
    input_ids = calibration_tokens(settings["calibration"], tokenizer, model=model, seed=seed, **size)
    domains = domains_of(settings["calibration"], settings["sequences"])
    how = dict(needs=needs, batch_size=batch_size, domains=domains)
    with work_folder(path, model) as work:
        stats = (
            capture(model, input_ids, **how)
            if work is None
            else stream_capture(model, input_ids, work / "capture", **how)
        )
        stats.save(path)
    return stats
