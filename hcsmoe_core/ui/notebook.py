"""TODO."""

import json

from hcsmoe_core._util import place, shown, versions, write_json
from hcsmoe_core.studies.cache import slug
from hcsmoe_core.studies.tables import write_table
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
        about = {
            "notebook": self.notebook,
            "parameters": self.settings,
            "figures": files,
            "versions": versions(),
        }
        write_json(self.results, about | values)
        print(*files, shown(self.results), sep="\n")
        parameters = " ".join(
            f"-p {k} {json.dumps(v) if isinstance(v, str) else v}"
            for k, v in self.settings.items()
            if v != ""
        )
        print(f"\nAgain: papermill notebooks/{self.notebook}.ipynb runs/{self.notebook}.ipynb {parameters}")
        following = [n for n in NOTEBOOKS if n > self.notebook]
        if following:
            print(f"Next: {following[0]}.ipynb")
