"""Puts the notebooks and grids into the wheel as a folder of the package; the rest is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    """Copies ``notebooks`` beside the modules, where ``studies.sweep.notebooks_folder`` looks for them."""

    def run(self):
        """Build as usual, then copy."""
        super().run()
        if not self.editable_mode:
            for file in [*Path("notebooks").glob("*.ipynb"), *Path("notebooks").glob("grids/*.yml")]:
                copy = Path(self.build_lib) / "hcsmoe_core" / file
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)


setup(cmdclass={"build_py": BuildWithNotebooks})
