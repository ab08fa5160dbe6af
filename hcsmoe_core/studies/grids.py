"""Studies as data: a YAML file per study, checked before anything runs, and its cells for any model.

A file of ``notebooks/grids`` has these keys, of which ``title`` and ``axes`` are required::

    title: Linkage and similarity
    about: What it asks, in a sentence or two.
    paper: [linkage]              # its tables in the paper, or contents of "absent" of published.json
    notebook: 05_accuracy         # or a path from the file to a notebook with the same parameters
    base: {merge: average}        # parameters of all cells
    axes:                         # every combination is a cell: of parameters and of steps of methods
      experts: [3/4, 50%, 8]      # a share of the model's experts, or a number; or reduction: [25%]
      linkage: [average, ward]
      settings: [{method: reap}, {method: hc-smoe, merge: average}]  # an axis whose values set several
    exclude: [{linkage: ward, experts: 8}]
    seeds: [42, 43]               # calibration seeds: one calibration sample each
    embedded: {calibration: [demo]}     # axes that have other values on the embedded models
    read: {x: experts, hue: setting}    # how 06_ablation draws it

``sequences`` may be a share of the calibration source's default, such as ``1/4``. The unmerged model is
always among the cells.
"""

import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from hcsmoe_core import checkpoint, methods
from hcsmoe_core._util import EMBEDDED, InputError, closest_first, require
from hcsmoe_core.studies import paper, runner, sweep, tables
from hcsmoe_core.text.calibration import calibration_settings, domains_of, is_path

SHARES = {  # parameters that may be a share, and what they take
    "experts": "a share below 1 such as 1/4 or 25%, or a whole number from 1",
    "reduction": "a share below 1 such as 1/4 or 25%",
    "sequences": "a share such as 1/4 or 25%, or a whole number from 1",
}
OWN = ("model", sweep.SEED, "steps", "figures", "results", "plugin")  # parameters that a grid does not set
PAPER = (*paper.published()["tables"], *(entry["content"] for entry in paper.published()["absent"]))


def _unique(values):
    for value in values:
        require(values.count(value) == 1, f"has {value!r} twice")
    return values


Values = Annotated[list, Field(min_length=1), AfterValidator(_unique)]
Seed = Annotated[int, Field(strict=True, ge=0)]


class Study(BaseModel):
    """A grid as its file has it; see the module's text."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: Annotated[str, Field(min_length=1)]
    about: str = ""
    paper: list[Literal[PAPER]] = []
    notebook: str = "05_accuracy"
    base: dict = {}
    axes: Annotated[dict[str, Values], Field(min_length=1)]
    exclude: list[Annotated[dict, Field(min_length=1)]] = []
    seeds: Annotated[list[Seed], AfterValidator(_unique)] = []
    embedded: dict[str, Values] = {}
    read: dict[Literal["where", "x", "hue", "metric", "at"], Any] = {}
    _path: Path = PrivateAttr()

    @property
    def name(self) -> str:
        """Name of the file."""
        return self._path.stem

    def notebook_path(self) -> Path:
        """The notebook's file."""
        local = self.notebook.endswith(".ipynb")
        folder = self._path.parent if local else sweep.notebooks_folder()
        path = folder / (self.notebook if local else f"{self.notebook}.ipynb")
        self.require(path.is_file(), "notebook", f"there is no notebook {path} in {Path.cwd()}.")
        return path.resolve()

    def parameters(self) -> dict:
        """The notebook's parameters with their defaults."""
        defaults = sweep.parameters_of(self.notebook_path())
        self.require(
            {"model", "experts", "method", "steps", sweep.SEED} <= set(defaults),
            "notebook",
            f"{self.notebook}.ipynb has not the parameters of 05_accuracy.",
        )
        return defaults

    def combinations(self, embedded: bool, *, exclude: bool = True) -> list[dict]:
        """Every combination of the axes, with the base parameters, without those that are excluded."""
        axes = self.axes | (self.embedded if embedded else {})
        cells = [cell | cell.pop("settings", {}) for cell in sweep.grid(dict(self.base), **axes)]
        left_out = self.exclude if exclude else ()
        return [cell for cell in cells if not any(some.items() <= cell.items() for some in left_out)]

    def require(self, condition: Any, key: str, text: str) -> None:
        """Raise InputError with the file, the key and a text unless a condition holds."""
        self.check(key, require, condition, text)

    def check(self, key: str, function: Any, *arguments: Any) -> None:
        """Call a function, with the file and the key before its errors on the input."""
        try:
            function(*arguments)
        except InputError as error:
            raise InputError(f"{self._path.name}, {key}: {error}") from None

    def check_choice(self, key: str, value: Any, allowed: Sequence) -> None:
        """Raise InputError unless a value is allowed."""
        self.require(value in allowed, key, f"{value!r} is unknown; allowed are {', '.join(allowed)}.")


class Cell(NamedTuple):
    """One setting: its parameters as the grid has them, those that are run, and the cell's name."""

    notebook: Path
    given: dict
    parameters: dict
    id: str


def names() -> list[str]:
    """Names of the grids beside the notebooks: :func:`hcsmoe_core.studies.sweep.notebooks_folder`."""
    return sorted(path.stem for path in (sweep.notebooks_folder() / "grids").glob("*.yml"))


def load(name: str | Path) -> Study:
    """Read a study and check it.

    Parameters
    ----------
    name : str or path
        Of a grid beside the notebooks, or a ``.yml`` file.

    Raises
    ------
    FileNotFoundError
        If there is none of that name.
    InputError
        If its file is not as it should be; the error names the file, the key, and what is allowed.
    """
    folder = sweep.notebooks_folder() / "grids"
    path = Path(name) if Path(name).suffix in (".yml", ".yaml") else folder / f"{name}.yml"
    if not path.is_file():
        listed = closest_first(name, names()) or "none"
        raise FileNotFoundError(
            f"There is no grid {name}; give a .yml file, all, or one of {listed} (those of "
            f"{folder.resolve()})."
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
        keys = ", ".join(Study.model_fields)
        require(isinstance(content, dict), f"{path.name} must be a mapping with the keys {keys}.")
        study = Study.model_validate(content)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path.name} is not readable YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise InputError(f"{path.name}, {_explained(error.errors()[0])}") from None
    study._path = path
    _check(study)
    return study


class _Loader(yaml.SafeLoader):
    """YAML whose mappings have no key twice, of which SafeLoader would take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"the key {key!r} is there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


def _explained(error):
    """Key and text of one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"] if part != "[key]")
    text = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "missing":
        return f"{key}: is missing."
    allowed = f"; allowed are {', '.join(Study.model_fields)}" if error["type"] == "extra_forbidden" else ""
    return f"{key}: {text}{allowed}; not {error['input']!r}."


def _check(study):
    """Raise InputError unless every key, value and combination of a study is one that can be run."""
    for name in study.embedded:
        study.check_choice("embedded", name, tuple(study.axes))
    places = {}
    for key, name, value in _values(study):
        _check_value(study, key, name, value)
        places.setdefault(name, set()).add(key.rpartition(".")[2])
    for name, keys in places.items():
        where = " and in ".join(sorted(keys))
        study.require(len(keys) == 1, "axes", f"{name!r} is set in {where}; leave one.")
    cells = study.combinations(False, exclude=False)
    known = tuple(dict.fromkeys(name for cell in cells for name in cell))
    for excluded in study.exclude:
        for name in excluded:
            study.check_choice("exclude", name, known)
        matching = (cell for cell in cells if excluded.items() <= cell.items())
        study.require(any(matching), "exclude", f"{excluded} matches no cell.")
    for cells in (study.combinations(False), study.combinations(True)):
        study.require(cells, "exclude", "excludes every cell.")
        for cell in cells:
            study.require(
                ("experts" in cell) != ("reduction" in cell),
                "axes",
                "needs experts or reduction, and not both.",
            )
            study.check(f"axes: {cell}", sweep.recipe_of, cell)


def _values(study):
    """All that a study sets: where, the parameter and its value."""
    yield from (("base", name, value) for name, value in study.base.items())
    for key, axes in {"axes": study.axes, "embedded": study.embedded}.items():
        for axis, value in ((axis, value) for axis, values in axes.items() for value in values):
            several = value if axis == "settings" else {axis: value}
            study.require(
                isinstance(several, dict),
                f"{key}.settings",
                f"must be mappings of parameters, such as {{method: reap}}; not {value!r}.",
            )
            yield from ((f"{key}.{axis}", name, one) for name, one in several.items())


def _check_value(study, key, name, value, more=()):
    """Raise InputError unless a parameter may be set and the value is of its kind."""
    defaults, part = study.parameters(), share(value)
    study.require(value == value, key, f"{name} must be a number; not {value!r}.")
    own = [parameter for parameter in defaults if parameter not in OWN]
    study.check_choice(key, name, tuple(dict.fromkeys([*own, *sweep.step_names(), "reduction", *more])))
    if name in SHARES:
        whole = type(value) is int and value >= 1 and name != "reduction"
        suits = whole or (part and (part < 1 or name == "sequences"))
        study.require(suits, key, f"{name} must be {SHARES[name]}; not {value!r}.")
    elif name in defaults:
        kinds = {type(defaults[name])} | ({int} if defaults[name] is None else set())
        study.require(
            type(value) in kinds, key, f"{name} must be of the kind of {defaults[name]!r}; not {value!r}."
        )
    if name in ("calibration", "text") and value:
        study.check(key, domains_of, value, 10**6)
        absent = is_path(value) and not set("+*") & set(value) and not Path(value).expanduser().exists()
        study.require(not absent, key, f"there is no file {value} in {Path.cwd()}.")


def share(value: Any) -> Fraction | None:
    """A share written ``3/4`` or ``62.5%``; None if it is none."""
    if not re.fullmatch(r"[\d.]{1,12}(/\d{1,12})?%?", str(value)):
        return None  # Fraction would take hours over 1e-99999999
    try:
        number = Fraction(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except (AttributeError, ValueError, ZeroDivisionError):
        return None
    return number if number > 0 and value.strip("0123456789.") else None


def cells_of(study: Study, model: str, overrides: dict | None = None) -> list[Cell]:
    """The cells of a study for a model: the unmerged model, then every combination, once per calibration
    sample.

    Parameters
    ----------
    study : Study
    model : str
        As for :func:`hcsmoe_core.load_model`; only its configuration is read.
    overrides : dict
        Parameters that are set for all cells, such as ``{"limit": 100}``.

    Returns
    -------
    list of Cell
        Cells that make the same plan and score it alike have the same id.

    Raises
    ------
    InputError
        If a parameter cannot be set, or a number does not suit the model.
    """
    overrides, defaults = overrides or {}, study.parameters()
    axes = [name for key, name, _ in _values(study) if key != "base"] + [sweep.SEED] * bool(study.seeds)
    for name, value in overrides.items():
        study.require(name not in axes, "parameter", f"{name!r} is an axis of this grid.")
        _check_value(study, "parameter", name, value, more=(sweep.SEED, "figures", "plugin"))
    size, notebook = tables.model_size(checkpoint.load_skeleton(model))["num_experts"], study.notebook_path()
    scored = set(defaults) - {"experts", "method", *sweep.NAMED}
    base = {name: value for name, value in study.base.items() if name in scored}
    wanted = [{"model": model} | base | overrides | {"experts": 0}]
    for cell in study.combinations(model in EMBEDDED):
        cell = {"model": model} | cell | overrides
        reduction = cell.pop("reduction", None)
        cell["experts"] = _counted(study, "experts", cell.get("experts") or str(1 - share(reduction)), size)
        study.require(
            cell["experts"] <= size, "experts", f"{cell['experts']} are more than the {size} of {model}."
        )
        if "sequences" in cell:
            usual = calibration_settings(model, cell.get("calibration", ""))["sequences"]
            cell["sequences"] = _counted(study, "sequences", cell["sequences"], usual)
        wanted += [cell | ({} if seed is None else {sweep.SEED: seed}) for seed in study.seeds or (None,)]
    given = [{name: _absolute(name, value) for name, value in cell.items()} for cell in wanted]
    pairs = [(cell, sweep.canonical(cell, defaults)) for cell in given]
    return [Cell(notebook, *pair, runner.notebook_id(notebook, pair[1])) for pair in pairs]


def _counted(study, key, value, whole):
    """A number: as it is given, or the share of a whole."""
    if isinstance(value, int):
        return value
    number = share(value) * whole
    study.require(round(number) >= 1, key, f"a share of {float(number):.2g} is none.")
    return round(number)


def _absolute(name, value):
    """Files by their whole path, because workers may be in another folder."""
    text, file = name in ("calibration", "text"), name in ("model", "plugin")
    path = is_path(value) if text else file and value not in ("", *EMBEDDED)
    return str(Path(value).resolve()) if path and Path(value).exists() else value


def overrides_from(items: Sequence[str]) -> dict:
    """Parameters written as ``name=value``, for all cells."""
    overrides = {}
    for item in items:
        name, equals, value = item.partition("=")
        require(equals, f"--parameter takes name=value; not {item!r}.")
        plain = {name: int(value) if value.isdigit() else value}
        overrides |= methods.parse_settings([item]) if name in sweep.step_names()[1:] else plain
    return overrides


def plans(chosen: Sequence, models: Sequence[str], overrides: dict | None = None) -> list[tuple]:
    """The cells of studies for models, as ``[(study, model, [cell, …]), …]``.

    Parameters
    ----------
    chosen : list of str
        Names or files; ``"all"`` for those of the project.
    models : list of str
    overrides : dict
        As for :func:`cells_of`.
    """
    if (overrides or {}).get("plugin"):
        methods.load_plugin(overrides["plugin"])
    wanted = [str(name) for entry in chosen for name in (names() if entry == "all" else [entry])]
    studies = [load(name) for name in dict.fromkeys(wanted)]
    once = len({study.name for study in studies}) == len(studies)
    require(once, "Two grids have the same name; give one of them another.")
    return [(study, model, cells_of(study, model, overrides)) for model in models for study in studies]


def run(planned: list[tuple], folder: str | Path, **options: Any) -> list[Path]:
    """Measure every cell of studies that is not done; what they share is measured once.

    Parameters
    ----------
    planned : list of (Study, str, list of Cell)
        Of :func:`plans`.
    folder : path
        Of the cells of all studies.
    **options
        ``workers``, ``engine`` and ``retries`` of :func:`hcsmoe_core.studies.sweep.run_cells`.

    Returns
    -------
    list of Path
        Executed notebooks, one per cell.

    Raises
    ------
    CellsError
        When all others are done, if some cells failed; it names them.
    """
    unique = {}
    for study, model, cells in planned:
        first = {cell.id: cell for cell in reversed(cells)}  # several settings may come to one cell
        listed = [{"id": name, "parameters": cell.given} for name, cell in reversed(first.items())]
        sweep.write_grid(
            folder, study.name, model, title=study.title, notebook=study.notebook_path(), cells=listed
        )
        unique = {cell.id: cell for cell in cells} | unique
    cells = list(unique.values())
    notebooks = [(cell.notebook, cell.parameters) for cell in cells]
    return sweep.run_cells(notebooks, folder, after=capturing(cells), description="accuracy", **options)


def capturing(cells: Sequence[Cell]) -> dict[int, int]:
    """Which cell each waits for, by index: the one that captures the statistics of both, and most of them."""
    groups = {}
    for i, cell in enumerate(cells):
        given = cell.parameters
        if given.get("experts"):
            source = calibration_settings(given["model"], *(given.get(name) for name in sweep.SOURCE))
            statistics = (given["model"], given.get("dtype"), given.get(sweep.SEED), *source.values())
            groups.setdefault(statistics, []).append(("sample" not in sweep.recipe_of(given).needs, i))
    return {i: min(group)[1] for group in groups.values() for _, i in group if i != min(group)[1]}


def table(chosen: Sequence) -> str:
    """Studies in lines of text: what they ask, for which tables, and how many cells they have."""
    lines = []
    for study in map(load, chosen):
        count = 1 + len(study.combinations(False)) * len(study.seeds or (None,))
        paper_tables = f"the paper's {', '.join(study.paper)}" if study.paper else "not in the paper"
        lines.append(f"{study.name}: {study.title} ({count} cells, {paper_tables})")
        lines += [f"    {study.about}"] * bool(study.about)
    return "\n".join(lines)
