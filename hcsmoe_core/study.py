"""What the notebooks and the command share: where things go, statistics that are captured once, and the record of a run."""

import functools
import hashlib
import json
import platform
import re
import time
from pathlib import Path

import numpy as np
import torch

import hcsmoe_core
from hcsmoe_core.calibration import calibration_tokens, domains_of, is_demo, local_files, own_sequences
from hcsmoe_core.capture import capture, expected_bytes
from hcsmoe_core.checkpoint import load_skeleton
from hcsmoe_core.clustering import cut
from hcsmoe_core.demo import models as demo
from hcsmoe_core.evaluation import versions
from hcsmoe_core.figures import save
from hcsmoe_core.files import check_choice, held, place, replacing, root, sha256_file, sha256_json, write_json
from hcsmoe_core.methods import merge_tree
from hcsmoe_core.moe import find_moe_layers, model_hash
from hcsmoe_core.plan import summarise
from hcsmoe_core.similarity import allowed_linkages
from hcsmoe_core.statistics import DEFAULT_NEEDS, SAMPLE, load_statistics
from hcsmoe_core.streaming import stream_capture, work_folder

NOTEBOOKS = (
    "00_tour",
    "01_similarity",
    "02_dendrograms",
    "03_linkage",
    "04_merge",
    "05_accuracy",
    "06_ablation",
    "07_paper",
    "08_methods",
    "09_bytes",
    "10_theory",
)


def shown(path):
    """``path`` as a person at the repository's root would write it."""
    path = Path(path)
    return path.relative_to(root()) if path.is_relative_to(root()) else path


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
    model, texts = str(parameters.get("model", "")), [parameters.get(name, "") for name in ("calibration", "text")]
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
        :func:`hcsmoe_core.capture.capture`.
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
    paths = {k: place(folder) / f"{slug(model.name_or_path)}-{sha256_json(key)[:12]}-{k}.safetensors" for k in kinds}
    wanted = "sample" if "sample" in needs else "sums"
    with held(paths[wanted]):
        for path in (paths[wanted], paths["sample"]):
            if path.exists():
                return load_statistics(path)
        return _captured(model, tokenizer, settings, paths[wanted], seed=seed, needs=kinds[wanted], batch_size=batch_size)


def _captured(model, tokenizer, settings, path, *, seed, needs, batch_size):
    """Statistics captured and written to a file."""
    size = {"sequences": settings["sequences"], "length": settings["length"]}
    input_ids = calibration_tokens(settings["calibration"], tokenizer, model=model, seed=seed, **size)
    domains = domains_of(settings["calibration"], settings["sequences"])
    how = dict(needs=needs, batch_size=batch_size, domains=domains)
    with work_folder(path, model) as work:
        stats = capture(model, input_ids, **how) if work is None else stream_capture(model, input_ids, work / "capture", **how)
        stats.save(path)
    return stats


def forecast(model, *, dtype="auto", calibration="", sequences=0, length=0, seed=42, needs=DEFAULT_NEEDS, samples=1):
    """What a notebook will cost on a model, before the model is loaded: from its configuration alone.

    Parameters
    ----------
    model : str
        As for :func:`hcsmoe_core.load_model`.
    dtype, calibration, sequences, length, seed, needs
        As for :func:`statistics`; the seed costs nothing.
    samples : int
        Calibration samples.

    Returns
    -------
    str
        A line for each of model, calibration, the model's own text if it writes some, capture and statistics file. Times are
        lower bounds: operations at the speed of a matrix product that is timed here and now.
    """
    skeleton, source = load_skeleton(model, dtype=dtype), calibration_of(model, calibration, sequences, length)
    needs = tuple(dict.fromkeys((*DEFAULT_NEEDS, *needs)))
    size, tokens = model_size(skeleton), source["sequences"] * source["length"]
    weights, held = size["weights"], size["bytes"]
    active, captured = work_of_a_token(skeleton)
    work = samples * tokens * captured
    where, speed = _speed(skeleton.dtype)
    domains = len(set(domains_of(source["calibration"], source["sequences"]) or ["all"]))
    file = expected_bytes(skeleton, needs, domains=domains, tokens=tokens)
    shape = f"{source['sequences']} × {source['length']:,} = {tokens:,} tokens of {source['calibration']}"
    own = samples * source["length"] * own_sequences(source["calibration"], source["sequences"])
    rows = {
        "model": f"{amount(weights)} weights, {amount(held)}B in memory; {active / 2 / weights:.0%} of them active for a token",
        "calibration": shape if samples == 1 else f"{samples} samples of {shape}",
        "own text": f"{amount(own)} tokens, one after another: {duration(own * active / speed)} or more on this {where}",
        "capture": f"{amount(work)} operations: {duration(work / speed)} or more on this {where}",
        "statistics": f"{amount(samples * file)}B under runs/statistics, kept for the next time",
    }
    if not own:
        del rows["own text"]
    return "\n".join(f"{name:<13}{text}" for name, text in rows.items())


def work_of_a_token(model):
    """Operations that the matrix products of one token take: in the model's forward pass, and in a capture.

    A capture also runs every expert on every token, and makes inner products of all pairs of their outputs, four ways.
    """
    size = model_size(model)
    active, pairs = size["weights"], 0
    for layer in find_moe_layers(model):
        count = layer.num_experts
        active -= sum(t.numel() for t in layer.tensors().values()) * (1 - (layer.top_k or count) / count)
        pairs += 4 * count**2 * layer.hidden_size
    return 2 * active, 2 * (active + size["expert_weights"] + pairs)


def amount(number):
    """A number with a prefix of a thousand, such as 46.7 G."""
    power = min(int(np.log10(max(number, 1)) / 3), 6)
    return f"{number / 1000**power:.3g} {' kMGTPE'[power]}".strip()


def _speed(dtype, size=1024, seconds=0.1):
    """Where matrix products are made, and operations a second of one that is timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix, count, started = torch.ones(size, size, dtype=dtype, device=device), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        (matrix @ matrix)[0, 0].item()
        count += 1
    return device.type.upper().replace("CUDA", "GPU"), 2 * size**3 * count / (time.perf_counter() - started)


def duration(seconds):
    """A time in seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def layer_table(model):
    """What is in a model: one row for each MoE layer.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    rows = []
    for layer in find_moe_layers(model):
        tensors = layer.tensors().values()
        size = sum(t.numel() * t.element_size() for t in tensors)
        rows.append(
            {
                "layer": layer.name,
                "experts": layer.num_experts,
                "top-k": layer.top_k,
                "hidden": layer.hidden_size,
                "width": layer.width,
                "experts, MB": round(size / 1e6, 2),
            }
        )
    return pd.DataFrame(rows)


def usage_table(stats):
    """How evenly each layer's experts are used, and how much they tell of the text: one row for each MoE layer.

    Returns
    -------
    pandas.DataFrame
        ``least used`` and ``most used``, relative to an equal share of the routed tokens; ``unused``, the number of experts
        that no token was routed to; ``information, nats``, the mutual information of expert and domain over routed pairs
        (0: routing does not depend on the domain).
    """
    import pandas as pd

    rows = []
    for name, sums in stats.layers.items():
        share = sums.frequency * len(sums.frequency)
        joint = sums.usage_count.double() / sums.usage_count.sum()
        independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        information = torch.xlogy(joint, joint / independent).nan_to_num().sum()
        row = {"layer": name, "least used": float(share.min()), "most used": float(share.max())}
        rows.append(row | {"unused": int((share == 0).sum()), "information, nats": float(information)})
    return pd.DataFrame(rows)


def domain_mix(stats, layer):
    """Of which domains each expert's tokens are: by domain, the share ``(E,)`` of the tokens routed to the expert.

    Returns
    -------
    dict of str to array, or None
        None where the calibration tokens have one domain only; NaN for an expert that no token was routed to.
    """
    if len(stats.domains) == 1:
        return None
    count = stats.layer(layer).usage_count.double()
    return dict(zip(stats.domains, (count / count.sum(0)).numpy(), strict=True))


def model_size(model):
    """Weights that a model holds, tied ones once: ``weights`` in all, ``expert_weights`` in its routed experts.

    ``bytes`` are those of all weights in the dtype that the model is in; ``num_experts`` is E of the unmerged model (the
    smallest, if layers differ).

    Returns
    -------
    dict of str to int
    """
    layers = find_moe_layers(model)
    experts = sum(t.numel() for layer in layers for t in layer.tensors().values())
    sizes = [(p.numel(), p.numel() * p.element_size()) for p in model.parameters()]
    weights, held = (sum(size) for size in zip(*sizes, strict=True))
    size = {"weights": weights, "expert_weights": experts, "bytes": held}
    return size | {"num_experts": min(layer.num_experts for layer in layers)}


def cut_table(stats, plan):
    """What a plan does to each layer, from the statistics alone; see :func:`hcsmoe_core.plan.summarise`.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    rows = [{"layer": layer.name} | summarise(stats, layer.name, layer.labels) for layer in plan.layers]
    return pd.DataFrame(rows).rename(columns=CUT_COLUMNS)


CUT_COLUMNS = {
    "saved": "weights saved",
    "moved": "routing mass moved",
    "entropy": "routing entropy",
    "entropy_after": "after",
    "function_error": "relative error of outputs",
    "output_error": "of mean outputs",
}


def cut_costs(stats, model, *, similarity="expert-output", linkage="average", cost="function_error"):
    """What cutting each layer's tree at every number of groups costs, from the statistics alone.

    Parameters
    ----------
    stats : Statistics
    model : transformers.PreTrainedModel
    similarity, linkage : str
    cost : str
        Of :func:`hcsmoe_core.plan.summarise`.

    Returns
    -------
    list of L (E,) float64 arrays
        Cost of 1, 2, …, E groups.
    """
    costs = []
    for layer, sums in stats.layers.items():
        tree = merge_tree(stats, layer, similarity=similarity, linkage=linkage, model=model)
        costs.append(np.array([summarise(stats, layer, cut(tree, r))[cost] for r in range(1, sums.num_experts + 1)]))
    return costs


def family_agreement(stats, model, *, linkages, similarities):
    """Adjusted Rand index between the groups found and a model's true families, by layer; 1 is agreement, 0 is chance.

    Returns
    -------
    pandas.DataFrame or None
        None where the families are not known.
    """
    import pandas as pd
    from sklearn.metrics import adjusted_rand_score

    families = demo.families(model.name_or_path)
    if families is None:
        return None
    rows = []
    for similarity in similarities:
        for linkage in allowed_linkages(similarity, linkages):
            trees = [merge_tree(stats, n, similarity=similarity, linkage=linkage, model=model) for n in stats.layers]
            for count, family in families.items():
                scores = [adjusted_rand_score(family, cut(tree, count)) for tree in trees]
                row = {"similarity": similarity, "linkage": linkage, "groups": count}
                rows.append(row | {f"layer {i}": round(s, 2) for i, s in enumerate(scores)})
    return pd.DataFrame(rows)


def rows(table):
    """A data frame as JSON values, one object a row; what is not a number is null."""
    return table.astype(object).where(table.notna(), None).to_dict("records")


def write_table(frame, path):
    """Write a table: ``.csv`` with all columns, or ``.tex`` with those that differ among the rows.

    Returns
    -------
    Path
    """
    path = Path(path)
    check_choice("path", path.suffix, (".csv", ".tex"))
    with replacing(path) as part:
        if path.suffix == ".csv":
            frame.to_csv(part, index=False)
        else:
            told = [name for name in frame if frame[name].astype(str).nunique() > 1 or len(frame) == 1]
            text = frame[told].to_latex(index=False, escape=True, float_format="%.4f", na_rep="")
            part.write_text(text, encoding="utf-8")
    return path


def stacked(tables, name):
    """Several data frames below each other, with a column that says which each row is of.

    Parameters
    ----------
    tables : dict of str to pandas.DataFrame
    name : str
        Of that column.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    return pd.concat([table.assign(**{name: key}) for key, table in tables.items()], ignore_index=True)


class Record:
    """What a notebook leaves behind: its figures and its ``results.json``.

    Parameters
    ----------
    notebook : str
        Such as ``"01_similarity"``.
    settings : dict
        The notebook's parameters.
    figures : str or path
        Folder of the figures; they go into a folder of the model's name.
    results : str or path
        File of the results; empty for ``runs/NOTEBOOK/MODEL/results.json``.
    """

    def __init__(self, notebook, settings, *, figures, results=""):
        self.notebook, self.settings = notebook, settings
        name = slug(settings["model"])
        self.figures = place(figures) / name
        self.results = place(results or f"runs/{notebook}/{name}/results.json")
        self.written = []

    def figure(self, figure, name):
        """Save a figure as PNG and PDF under the notebook's number, and return it."""
        self.written += save(figure, self.figures / f"{self.notebook[:2]}_{name}")
        return figure

    def table(self, frame, name):
        """Save a table as CSV and LaTeX under the notebook's number, and return it."""
        for kind in (".csv", ".tex"):
            self.written.append(write_table(frame, self.figures / f"{self.notebook[:2]}_{name}{kind}"))
        return frame

    def close(self, **values):
        """Write ``results.json`` and say where everything is and what comes next."""
        files = [str(shown(path)) for path in self.written]
        about = {"notebook": self.notebook, "parameters": self.settings, "figures": files, "versions": versions()}
        write_json(self.results, about | values)
        print(*files, shown(self.results), sep="\n")
        parameters = " ".join(
            f"-p {k} {json.dumps(v) if isinstance(v, str) else v}" for k, v in self.settings.items() if v != ""
        )
        print(f"\nAgain: papermill notebooks/{self.notebook}.ipynb runs/{self.notebook}.ipynb {parameters}")
        following = [n for n in NOTEBOOKS if n > self.notebook]
        if following:
            print(f"Next: {following[0]}.ipynb")
