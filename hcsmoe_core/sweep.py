"""Many settings of one notebook: each cell of a grid is one papermill run, done once and resumed by its name."""

import hashlib
import itertools
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from multiprocessing import get_context
from pathlib import Path

from tqdm.auto import tqdm

from hcsmoe_core.files import sha256_json
from hcsmoe_core.methods import Steps, steps_of
from hcsmoe_core.study import core_hash, root

STEPS = ("method", *(f.name for f in fields(Steps)))


def grid(base, **axes):
    """Every combination of the axes' values, each with the base parameters.

    Returns
    -------
    list of dict
    """
    return [base | dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def cell_id(notebook, parameters):
    """Name of a cell: a hash of the notebook, its parameters and the core."""
    content = hashlib.sha256(Path(notebook).read_bytes()).hexdigest()
    return sha256_json([content, parameters, core_hash()])[:12]


def check_parameters(notebook, parameters):
    """Raise ValueError if a notebook has no parameter of some name; papermill would only warn, and measure the default."""
    import papermill

    known = papermill.inspect_notebook(str(notebook))
    unknown = [name for name in parameters if name not in known]
    if unknown:
        raise ValueError(
            f"{Path(notebook).name} has no parameter {', '.join(map(repr, unknown))}; its parameters are {', '.join(known)}."
        )


def run_cell(notebook, parameters, folder, *, again=False, threads=None):
    """Run one cell, unless it is done.

    Parameters
    ----------
    notebook : path
    parameters : dict
        ``results`` is filled in: the cell's results lie beside its executed notebook.
    folder : path
        The executed notebook is there as ``NOTEBOOK-ID.ipynb`` if and only if it ran to its end.
    again : bool
        Run it even if it is done.
    threads : int, optional
        CPU threads of the kernel.

    Returns
    -------
    Path
        Of the executed notebook.

    Raises
    ------
    ValueError
        If the notebook has no such parameter.
    papermill.PapermillExecutionError
        If a cell fails; what ran is kept as ``NOTEBOOK-ID.failed.ipynb``.
    """
    import papermill
    from traitlets.config import Config

    notebook, folder = Path(notebook), Path(folder)
    check_parameters(notebook, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{notebook.stem}-{cell_id(notebook, parameters)}"
    done = folder / f"{stem}.ipynb"
    if done.exists() and not again:
        return done
    part = folder / f".{stem}.{os.getpid()}.part.ipynb"
    if threads:
        os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        # Kernels that start at the same time race for TCP ports; sockets in a folder of their own cannot collide.
        with tempfile.TemporaryDirectory(prefix="hcsmoe-") as sockets:
            papermill.execute_notebook(
                str(notebook),
                str(part),
                parameters=parameters | {"results": str(folder / f"{stem}.json")},
                progress_bar=False,
                store_widget_state=False,
                config=Config(KernelManager={"transport": "ipc", "ip": str(Path(sockets) / "kernel")}),
                extra_arguments=["--log-level=50"],  # a kernel that is shut down calls the interrupt an error
            )
        part.replace(done)
    except papermill.PapermillExecutionError:
        part.replace(folder / f"{stem}.failed.ipynb")
        raise
    finally:
        part.unlink(missing_ok=True)
    return done


def run_cells(cells, folder, *, workers=1, again=False, description="cells"):
    """Run cells side by side, each in a process of its own, and go on past those that fail.

    Parameters
    ----------
    cells : list of (path, dict)
        Notebooks and parameters.
    folder : path
    workers : int
    again : bool
        Run cells even if they are done.
    description : str
        Of the progress bar.

    Returns
    -------
    list of Path
        Executed notebooks, in the order of the cells.

    Raises
    ------
    ValueError
        Before anything runs, if a notebook has no parameter of some name.
    RuntimeError
        When all others are done, if some failed; it names them.
    """
    for notebook, parameters in cells:
        check_parameters(notebook, parameters)
    threads = max(1, (os.cpu_count() or 1) // workers)
    done, failed = {}, []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        futures = {
            executor.submit(run_cell, notebook, parameters, folder, again=again, threads=threads): i
            for i, (notebook, parameters) in enumerate(cells)
        }
        for future in tqdm(as_completed(futures), total=len(cells), desc=description, unit="cell"):
            place = futures[future]
            if future.exception() is None:
                done[place] = future.result()
            else:
                reason = str(future.exception()).strip().splitlines()[-1]
                failed.append(f"{Path(cells[place][0]).name} {cells[place][1]}: {reason}")
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cells)} cells failed; run again to retry them.\n  " + "\n  ".join(failed))
    return [done[i] for i in range(len(cells))]


def collect(folder, notebook="05_accuracy", *, model=None):
    """Scores of every cell of a sweep that is done, one row each; the newest of those with the same parameters.

    Returns
    -------
    pandas.DataFrame
        Parameters, ``setting`` (the method, and its steps that are not its own), mean accuracy and loss, accuracy by task
        (``acc_TASK``) and loss by domain (``loss_DOMAIN``), and sizes: see :func:`hcsmoe_core.study.model_size`.

    Raises
    ------
    FileNotFoundError
        If there are none.
    """
    import pandas as pd

    rows = []
    newest = {}
    for path in sorted(Path(folder).glob(f"{notebook}-*.json"), key=lambda p: p.stat().st_mtime):
        content = json.loads(path.read_text(encoding="utf-8"))
        newest[sha256_json(content["parameters"])] = content
    for content in newest.values():
        scores = content["scores"]
        row = dict(content["parameters"])
        row["setting"] = setting_name(row)
        row |= {k: scores[k] for k in ("mean_acc", "mean_acc_stderr", "mean_acc_norm", "mean_loss") if k in scores}
        row |= content["size"]
        row |= {f"acc_{t}": v["acc"] for t, v in scores["tasks"].items() if "acc" in v}
        row |= {f"loss_{d}": v for d, v in scores.get("loss", {}).items()}
        rows.append(row)
    frame = pd.DataFrame(rows)
    if model is not None and rows:
        frame = frame[frame["model"] == model].reset_index(drop=True)
    if frame.empty:
        what = f"{notebook} cells of {model}" if model else f"{notebook} cells"
        raise FileNotFoundError(f"There are no {what} in {folder}; run some first: ./run does on the embedded models.")
    return frame


def setting_name(parameters):
    """Name of a cell's setting: its method, and those of its steps that are not the method's own; "original" unmerged."""
    if not parameters.get("experts"):
        return "original"
    method = parameters.get("method", "hc-smoe")
    own = steps_of(method)
    changed = [f"{s} {parameters[s]}" for s in STEPS[1:] if parameters.get(s) not in (None, "", getattr(own, s))]
    return ", ".join([method, *changed])


def over_samples(cells):
    """One row for each setting and number of experts: means over its calibration samples.

    Parameters
    ----------
    cells : pandas.DataFrame
        Of :func:`collect`, for one model.

    Returns
    -------
    pandas.DataFrame
        ``setting``, ``experts``, the steps, ``samples``, ``bytes``, ``mean_acc``, its mean ``mean_acc_stderr`` over the
        items, and ``mean_loss``; ``retained``, the accuracy relative to the unmerged model (NaN without one); and standard
        deviations over the calibration samples, ``_sd``, NaN for one sample.
    """
    measured = [key for key in ("mean_acc", "mean_acc_stderr", "mean_loss", "bytes") if key in cells]
    once = cells.drop_duplicates(["setting", "experts", "seed"], keep="last")  # a step spelt out that is the method's own
    grouped = once.groupby(["setting", "experts"], sort=False)
    frame = grouped[[c for c in STEPS if c in once]].first().join(grouped[measured].mean())
    frame = frame.join(grouped[["mean_acc", "mean_loss"]].std(ddof=1).add_suffix("_sd")).assign(samples=grouped.size())
    original = cells.loc[cells["experts"] == 0, "mean_acc"]
    whole = original.iloc[0] if len(original) else float("nan")
    return frame.assign(retained=frame["mean_acc"] / whole, retained_sd=frame["mean_acc_sd"] / whole).reset_index()


def missing_cells(frame, *axes):
    """Combinations of the axes' values that no cell has.

    Returns
    -------
    pandas.DataFrame
    """
    import pandas as pd

    wanted = itertools.product(*(sorted(frame[a].unique()) for a in axes))
    measured = set(frame[list(axes)].itertuples(index=False, name=None))
    return pd.DataFrame([w for w in wanted if w not in measured], columns=list(axes))


def notebook_path(name):
    """Path of one of the project's notebooks."""
    path = root() / "notebooks" / f"{name}.ipynb"
    if not path.exists():
        raise FileNotFoundError(f"There is no notebook {path}; the notebooks come with the repository, not with the package.")
    return path
