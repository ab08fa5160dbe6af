"""What a notebook leaves behind: its figures and its results."""

import json
import os
from pathlib import Path

from hcsmoe_core._util import signed, versions, write_json
from hcsmoe_core.studies import cache, tables
from hcsmoe_core.ui.figures import save

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


class Record:
    """Figures and ``results.json`` of a notebook; create it before the notebook reads or writes anything.

    JupyterLab starts a notebook in its own folder. Relative paths are the project's all the same: a record
    then changes the working directory to the folder above.

    Parameters
    ----------
    notebook : str
        Such as ``"01_similarity"``.
    settings : dict
        The notebook's parameters.
    figures : str or path
        Folder of the figures; they go into a folder with the model's name.
    results : str or path
        File of the results; empty for ``runs/NOTEBOOK/MODEL/results.json``.
    """

    def __init__(self, notebook, settings, *, figures, results=""):
        if Path(f"{notebook}.ipynb").exists():
            os.chdir("..")
        self.notebook, self.settings, self.files = notebook, settings, []
        model = cache.slug(settings["model"])
        self.figures = Path(figures) / model
        self.results = Path(results or f"runs/{notebook}/{model}/results.json")

    def figure(self, figure, name):
        """Save a figure as PNG and PDF under the notebook's number, and return it."""
        self.files += save(figure, self.figures / f"{self.notebook[:2]}_{name}")
        return figure

    def table(self, frame, name):
        """Save a table as CSV and LaTeX under the notebook's number, and return it."""
        path = self.figures / f"{self.notebook[:2]}_{name}"
        self.files += [tables.write_table(frame, f"{path}{suffix}") for suffix in (".csv", ".tex")]
        return frame

    def data(self, frame):
        """Save the rows behind the results as CSV, beside ``results.json``."""
        tables.write_table(frame, self.results.with_suffix(".csv"))

    def write(self, **values):
        """Write ``results.json`` as it is so far."""
        record = {
            "notebook": self.notebook,
            "parameters": self.settings,
            "figures": list(map(str, self.files)),
            "versions": versions(),
            **values,
        }
        write_json(self.results, signed(record))

    def close(self, **values):
        """Write ``results.json``, and print where everything is, how to run it again and what comes next."""
        self.write(**values)
        print(*self.files, self.results, sep="\n")
        options = [
            f"-p {name} {json.dumps(value) if isinstance(value, str) else value}"
            for name, value in self.settings.items()
            if value not in ("", None)
        ]
        print(f"\nAgain: papermill notebooks/{self.notebook}.ipynb runs/{self.notebook}.ipynb", *options)
        print(*(f"Next: {name}.ipynb" for name in NOTEBOOKS[NOTEBOOKS.index(self.notebook) + 1 :][:1]))
