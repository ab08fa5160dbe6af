"""Studies as data: a YAML file a study, its settings checked before anything runs, and its cells for any model.

A file of ``notebooks/grids`` has these keys, of which ``title`` and ``axes`` must be there::

    title: Linkage and similarity
    about: What it asks, in a sentence or two.
    paper: [linkage]              # what of the paper it is (tables, or contents of "absent", of published.json); none: of none
    notebook: 05_accuracy         # or a path from the file to a notebook with the same parameters
    base: {merge: average}        # parameters of all cells
    axes:                         # every combination is a cell: parameters of the notebook, and steps of methods
      experts: [3/4, 50%, 8]      # a share of the model's experts, or a number; or reduction: [25%]
      linkage: [average, ward]
      settings: [{method: reap}, {method: hc-smoe, merge: average}]  # an axis whose values set several
    exclude: [{linkage: ward, experts: 8}]
    seeds: [42, 43]               # calibration samples
    embedded: {calibration: [demo]}     # axes that have other values on the embedded models
    read: {x: experts, hue: setting}    # how 06_ablation draws it

``sequences`` may be a share of what the calibration source has by default, such as ``1/4``. The unmerged model is always among
the cells.
"""

from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path

import yaml

from hcsmoe_core._util import InputError, place, root
from hcsmoe_core.checkpoint import load_skeleton
from hcsmoe_core.demo import models as demo
from hcsmoe_core.methods.planner import METHODS, Steps, needs_of, settings_from, steps_of
from hcsmoe_core.studies import paper, sweep
from hcsmoe_core.studies.cache import calibration_of
from hcsmoe_core.studies.tables import model_size
from hcsmoe_core.text.calibration import domains_of

FOLDER = "notebooks/grids"


SHARES = ("experts", "reduction", "sequences")  # parameters that may be a share


READ = ("where", "x", "hue", "metric", "at")  # parameters of 06_ablation that a grid may set


OWN = ("model", "seed", "steps", "figures", "results")  # parameters of the notebook that a grid does not set


FILES = (".txt", ".json", ".jsonl", ".safetensors")


@dataclass(frozen=True)
class Study:
    """A grid as its file has it; see the module's text."""

    name: str
    path: Path
    title: str
    axes: dict
    about: str = ""
    paper: tuple = ()
    notebook: Path = None
    base: dict = field(default_factory=dict)
    exclude: tuple = ()
    seeds: tuple = ()
    embedded: dict = field(default_factory=dict)
    read: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One setting: its parameters as the grid has them, those that are run, and the cell's name."""

    notebook: Path
    given: dict
    parameters: dict
    id: str


KEYS = ("title", "about", "paper", "notebook", "base", "axes", "exclude", "seeds", "embedded", "read")


def names():
    """Names of the project's grids."""
    return sorted(path.stem for path in place(FOLDER).glob("*.yml"))


def load(name):
    """Read a study and check it.

    Parameters
    ----------
    name : str or path
        Of the project's, or of a ``.yml`` file.

    Returns
    -------
    Study

    Raises
    ------
    FileNotFoundError
        If there is none of that name.
    ValueError
        If its file is not as it should be; the error names the file, the key, and what is allowed.
    """
    path = Path(name) if Path(name).suffix in (".yml", ".yaml") else place(FOLDER) / f"{name}.yml"
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no grid {name}; give a .yml file, all, or one of {', '.join(names())}."
        )
    content = _read(path)
    for key in content:
        _choice(path, str(key), key, KEYS)
    for key, kind in {
        "title": str,
        "about": str,
        "base": dict,
        "axes": dict,
        "exclude": list,
        "seeds": list,
    }.items():
        if not isinstance(content.get(key, kind()), kind):
            raise _wrong(path, key, f"must be a {_KINDS[kind]}; not {content[key]!r}.")
    for key in ("title", "axes"):
        if not content.get(key):
            raise _wrong(path, key, "is missing or empty.")
    tables, read = content.get("paper") or [], content.get("read") or {}
    for name in tables:
        _choice(
            path,
            "paper",
            name,
            (*paper.published()["tables"], *(a["content"] for a in paper.published()["absent"])),
        )
    for name in read:
        _choice(path, "read", name, READ)
    made = content | {"paper": tuple(tables), "seeds": tuple(content.get("seeds", ())), "read": read}
    made |= {
        "exclude": tuple(content.get("exclude", ())),
        "notebook": _notebook(path, content.get("notebook", "05_accuracy")),
    }
    study = Study(path.stem, path, **made)
    _check(study)
    return study


_KINDS = {str: "text", dict: "mapping", list: "list"}


class _Loader(yaml.SafeLoader):
    """YAML whose mappings have no key twice, of which SafeLoader would take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read(path):
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{path.name} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name} must be a mapping with the keys {', '.join(KEYS)}.")
    return content


def _wrong(path, key, text):
    return InputError(f"{path.name}, {key}: {text}")


def _choice(path, key, value, allowed):
    if value not in allowed:
        raise _wrong(path, key, f"{value!r} is unknown; allowed are {', '.join(allowed)}.")


def _notebook(path, name):
    found = path.parent / name if str(name).endswith(".ipynb") else root() / "notebooks" / f"{name}.ipynb"
    if not found.is_file():
        raise _wrong(path, "notebook", f"there is no notebook {found}.")
    return found.resolve()


def _allowed(study):
    """Parameters that a grid may set, and the defaults of the notebook."""
    defaults = sweep.parameters_of(study.notebook)
    if not {"model", "experts", "method", "steps", "seed"} <= set(defaults):
        raise _wrong(study.path, "notebook", f"{study.notebook.name} has not the parameters of 05_accuracy.")
    steps = [f.name for f in fields(Steps)]
    return [*dict.fromkeys((*(n for n in defaults if n not in OWN), *steps, "reduction"))], defaults


def _check(study):
    """Raise ValueError unless every key, value and combination of a study is one that can be run."""
    path, (allowed, defaults) = study.path, _allowed(study)
    for name, value in study.base.items():
        _choice(path, "base", name, allowed)
        _check_value(study, f"base.{name}", name, value, defaults)
    variants = {"axes": study.axes}
    for name in study.embedded:
        _choice(path, "embedded", name, tuple(study.axes))
        variants["embedded"] = study.embedded
    for key, axes in variants.items():
        for name, values in axes.items():
            _check_axis(study, f"{key}.{name}", name, values, allowed, defaults)
    for seed in study.seeds:
        if type(seed) is not int or seed < 0:
            raise _wrong(path, "seeds", f"must be whole numbers from 0; not {seed!r}.")
    if len(set(study.seeds)) < len(study.seeds):
        raise _wrong(path, "seeds", "has a number twice.")
    _check_exclusions(study)
    for embedded in (False, True):
        combinations = _combinations(study, embedded)
        if not combinations:
            raise _wrong(path, "exclude", "excludes every cell.")
        for cell in combinations:
            _check_steps(study, cell)


def _check_axis(study, key, name, values, allowed, defaults):
    path = study.path
    if not isinstance(values, list) or not values:
        raise _wrong(path, key, f"must be a list of at least one value; not {values!r}.")
    if name != "settings":
        if name not in allowed:
            raise _wrong(
                path, key, f"{name!r} is no parameter; allowed are {', '.join((*allowed, 'settings'))}."
            )
        if name in study.base:
            raise _wrong(path, key, "is in base, too; leave one.")
    for i, value in enumerate(values):
        if value in values[:i]:
            raise _wrong(path, key, f"has {value!r} twice.")
        if name != "settings":
            _check_value(study, key, name, value, defaults)
            continue
        if not isinstance(value, dict) or not value:
            raise _wrong(
                path, key, f"must be mappings of parameters, such as {{method: reap}}; not {value!r}."
            )
        for part, of in value.items():
            _choice(path, key, part, allowed)
            if part in study.axes:
                raise _wrong(path, key, f"sets {part!r}, which is an axis.")
            _check_value(study, f"{key}.{part}", part, of, defaults)


def _check_value(study, key, name, value, defaults):
    """Raise ValueError unless a value is of its parameter's kind."""
    path = study.path
    if name in SHARES:
        whole = type(value) is int and value >= 1 and name != "reduction"
        if not whole and share(value) is None:
            kinds = "a share such as 1/4 or 25%" + (
                "" if name == "reduction" else ", or a whole number from 1"
            )
            raise _wrong(path, key, f"must be {kinds}; not {value!r}.")
        if not whole and name != "sequences" and not 0 < share(value) < 1:
            raise _wrong(path, key, f"must be more than nothing and less than all; not {value!r}.")
        return
    if name == "method":
        _choice(path, key, value, tuple(METHODS))
    usual = defaults.get(name, {f.name: f.default for f in fields(Steps)}.get(name))
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(
        type(usual), (str, int, float, list)
    )
    if name == "centres":
        kinds = (str, list)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _wrong(path, key, f"must be of the kind of {usual!r}; not {value!r}.")
    if name in ("calibration", "text"):
        _check_source(path, key, value)


def _check_source(path, key, value):
    """Raise ValueError if a source of text is a file that is not there, or a mixture that is none."""
    try:
        domains_of(value, 10**6)
    except ValueError as error:
        raise _wrong(path, key, str(error)) from None
    if Path(value).suffix in FILES and "*" not in value and not Path(value).exists():
        raise _wrong(path, key, f"there is no file {value}.")


def _check_exclusions(study):
    cells = _combinations(study, False, exclude=False)
    for excluded in study.exclude:
        if not isinstance(excluded, dict) or not excluded:
            raise _wrong(
                study.path, "exclude", f"must be mappings such as {{linkage: ward}}; not {excluded!r}."
            )
        for name in excluded:
            _choice(
                study.path, "exclude", name, tuple(dict.fromkeys(name for cell in cells for name in cell))
            )
        if not any(_matches(cell, excluded) for cell in cells):
            raise _wrong(study.path, "exclude", f"{excluded} matches no cell.")


def _check_steps(study, cell):
    """Raise ValueError unless a combination's steps go together."""
    if len({"experts", "reduction"} & set(cell)) != 1:
        raise _wrong(study.path, "axes", "needs experts or reduction, and not both.")
    try:
        steps_of(cell.get("method", "hc-smoe"), **_steps(cell))
    except ValueError as error:
        raise _wrong(study.path, "axes", f"{cell}: {error}") from None


def _steps(cell):
    return {f.name: cell[f.name] for f in fields(Steps) if cell.get(f.name, "") != ""}


def _matches(cell, excluded):
    return all(name in cell and cell[name] == value for name, value in excluded.items())


def _combinations(study, embedded, *, exclude=True):
    """Every combination of a study's axes, with its base parameters, but those that are excluded."""
    axes = study.axes | (study.embedded if embedded else {})
    cells = []
    for cell in sweep.grid(dict(study.base), **axes):
        settings = cell.pop("settings", {})
        cells.append(cell | settings)
    return [cell for cell in cells if not exclude or not any(_matches(cell, e) for e in study.exclude)]


def share(value):
    """A share written ``3/4`` or ``62.5%`` as a fraction; None if it is none."""
    if not isinstance(value, str):
        return None
    try:
        found = (
            Fraction(value[:-1]) / 100 if value.endswith("%") else Fraction(value) if "/" in value else None
        )
    except (ValueError, ZeroDivisionError):
        return None
    return found if found is not None and found > 0 else None


def cells_of(study, model, overrides=None):
    """The cells that a study has for a model: the unmerged model, then every combination, once for each calibration sample.

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
    ValueError
        If a parameter cannot be set, or a number does not suit the model.
    """
    overrides = _overrides(study, overrides or {})
    experts, defaults = model_size(load_skeleton(model))["num_experts"], sweep.parameters_of(study.notebook)
    base = {"model": model} | {
        n: v for n, v in study.base.items() if n in defaults and n not in ("experts", "method")
    }
    found = [
        {name: value for name, value in base.items() if name not in sweep.NAMED} | overrides | {"experts": 0}
    ]
    for cell in _combinations(study, model in demo.NAMES):
        cell = {"model": model} | cell | overrides
        cell["experts"] = _experts(study, cell, experts)
        if isinstance(cell.get("sequences"), str):
            usual = calibration_of(model, cell.get("calibration", ""))["sequences"]
            cell["sequences"] = _counted(study, "sequences", share(cell["sequences"]) * usual)
        cell.pop("reduction", None)
        found += [cell | ({"seed": seed} if seed is not None else {}) for seed in study.seeds or (None,)]
    return [
        _cell(study, {name: _absolute(name, value) for name, value in cell.items()}, defaults)
        for cell in found
    ]


def _cell(study, given, defaults):
    parameters = sweep.canonical(given, defaults)
    return Cell(study.notebook, given, parameters, sweep.cell_id(study.notebook, parameters))


def _overrides(study, overrides):
    allowed, defaults = _allowed(study)
    axes = {
        *study.axes,
        *(["seed"] if study.seeds else []),
        *(name for value in study.axes.get("settings", ()) for name in value),
    }
    for name, value in overrides.items():
        _choice(study.path, "parameter", name, (*allowed, "seed", "figures"))
        if name in axes:
            raise _wrong(study.path, "parameter", f"{name!r} is an axis of this grid.")
        _check_value(study, f"parameter {name}", name, value, defaults)
    return overrides


def overrides_from(items):
    """Parameters written as ``name=value``, for all cells.

    Parameters
    ----------
    items : sequence of str

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        If one is not written so.
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--parameter takes name=value; not {item!r}.")
        if name in {f.name for f in fields(Steps)}:
            found |= settings_from([item], option="--parameter")
        else:
            found[name] = int(value) if value.isdigit() else value
    return found


def _experts(study, cell, of):
    """Experts kept, of a model's number."""
    given = cell.get("experts")
    if isinstance(given, int):
        if given > of:
            raise _wrong(study.path, "experts", f"{given} are more than the {of} of {cell['model']}.")
        return given
    kept = share(given) if given else 1 - share(cell["reduction"])
    return _counted(study, "experts", kept * of)


def _counted(study, key, number):
    if round(number) < 1:
        raise _wrong(study.path, key, f"a share of {float(number):.2g} is none.")
    return round(number)


def _absolute(name, value):
    """Files by their whole path, because workers may be in another folder."""
    local = (
        name in ("calibration", "text", "model") and value not in ("", *demo.NAMES) and Path(value).exists()
    )
    return str(Path(value).resolve()) if local else value


def plans(chosen, models, overrides=None):
    """The cells of studies for models.

    Parameters
    ----------
    chosen : list of str
        Names or files; ``"all"`` for those of the project.
    models : list of str
    overrides : dict

    Returns
    -------
    list of (Study, str, list of Cell)
    """
    wanted = [name for given in chosen for name in (names() if given == "all" else [given])]
    studies = [load(name) for name in dict.fromkeys(map(str, wanted))]
    if len({study.name for study in studies}) < len(studies):
        raise InputError("Two grids have the same name; give one of them another.")
    return [(study, model, cells_of(study, model, overrides)) for model in models for study in studies]


def run(planned, folder, *, workers=1, engine=None, retries=0):
    """Measure every cell of studies that is not done; what they share is measured once.

    Parameters
    ----------
    planned : list of (Study, str, list of Cell)
        Of :func:`plans`.
    folder : path
        Of the cells of all studies.
    workers, engine, retries
        As for :func:`hcsmoe_core.studies.sweep.run_cells`.

    Returns
    -------
    list of Path
        Executed notebooks, one a cell.

    Raises
    ------
    RuntimeError
        When all others are done, if some cells failed; it names them.
    """
    folder, unique = place(folder), {}
    for study, model, cells in planned:
        listed = {
            cell.id: {"id": cell.id, "parameters": cell.given} for cell in reversed(cells)
        }  # the first of its kind
        about = dict(title=study.title, notebook=study.notebook, cells=list(reversed(listed.values())))
        sweep.write_grid(folder, study.name, model, **about)
        for cell in cells:
            unique.setdefault(cell.id, cell)
    cells = list(unique.values())
    how = dict(workers=workers, engine=engine, retries=retries, after=capturing(cells))
    return sweep.run_cells(
        [(cell.notebook, cell.parameters) for cell in cells], folder, description="accuracy", **how
    )


def capturing(cells):
    """Which cell each waits for, by their places: the one that captures the statistics of both, and most of them.

    Parameters
    ----------
    cells : list of Cell

    Returns
    -------
    dict of int to int
    """
    groups = {}
    for i, cell in enumerate(cells):
        given = cell.parameters
        if given.get("experts"):
            source = calibration_of(given["model"], *(given.get(name) for name in sweep.SOURCE))
            key = (given["model"], given.get("dtype"), given.get("seed"), *source.values())
            sample = "sample" in needs_of(given.get("method", "hc-smoe"), **sweep.chosen_steps(given))
            groups.setdefault(key, []).append((not sample, i))
    return {i: min(group)[1] for group in groups.values() for _, i in group if i != min(group)[1]}


def table(chosen):
    """Studies in lines of text: what they ask, for which tables, and how many cells they have."""
    lines = []
    for study in map(load, chosen):
        count = 1 + len(_combinations(study, False)) * len(study.seeds or (None,))
        of = f"the paper's {', '.join(study.paper)}" if study.paper else "not in the paper"
        lines += [f"{study.name}: {study.title} ({count} cells, {of})"] + (
            [f"    {study.about}"] if study.about else []
        )
    return "\n".join(lines)
