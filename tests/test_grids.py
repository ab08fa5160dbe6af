"""Studies: what their files may say, which cells they have for a model, and what makes two cells one."""

import itertools
import json

import pandas as pd
import pytest
import yaml

from hcsmoe_core.studies import grids, paper, runner, sweep
from tools import showcase

DEFAULTS = sweep.parameters_of(sweep.notebook_path("05_accuracy"))


def written(tmp_path, name="some", **content):
    """A study's file with some keys set otherwise, or left out where they are None."""
    content = {"title": "Some", "axes": {"experts": ["1/2"], "linkage": ["average", "ward"]}} | content
    path = tmp_path / f"{name}.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
    return path


@pytest.mark.parametrize("name", grids.names())
@pytest.mark.parametrize("model", ["demo-qwen", "demo-mixtral"])
def test_the_projects_studies_can_be_run(name, model):
    cells = grids.cells_of(grids.load(name), model)
    assert cells[0].parameters == {"model": model}  # the unmerged model
    assert len({cell.id for cell in cells}) > 5
    of = 32 if model == "demo-qwen" else 8
    for cell in cells[1:]:
        assert 1 <= cell.parameters["experts"] < of
        assert set(cell.parameters) <= set(DEFAULTS)
        sweep.check_parameters(cell.notebook, cell.parameters)


@pytest.mark.parametrize("model", ["demo-qwen", "demo-mixtral"])
def test_together_they_have_all_that_the_papers_tables_compare(model):
    def key(cell):
        return json.dumps(
            [cell["experts"], cell["experts"] and sweep.recipe_of(cell).settings], sort_keys=True
        )

    have = {key(cell.given) for _, _, cells in grids.plans(["all"], [model]) for cell in cells}
    assert {key(cell) for cell in paper.wanted(32 if model == "demo-qwen" else 8)} <= have
    filled = {table for name in grids.names() for table in grids.load(name).paper}
    assert set(paper.published()["tables"]) <= filled
    assert set(showcase.BRIEF) <= set(grids.names())


def test_cells_are_every_combination_for_every_sample_with_the_unmerged_model_once(tmp_path):
    axes = {
        "experts": ["3/4", 4],
        "linkage": ["average", "ward"],
        "settings": [{"merge": "average"}, {"method": "zipit"}],
    }
    excluded = [{"linkage": "ward", "experts": 4}, {"method": "zipit", "linkage": "ward"}]
    study = grids.load(written(tmp_path, axes=axes, exclude=excluded, seeds=[1, 2], base={"limit": 7}))
    cells = grids.cells_of(study, "demo-mixtral", {"text": "none"})
    found = [
        tuple(c.given.get(k, "") for k in ("experts", "linkage", "method", "merge", "calibration_seed"))
        for c in cells
    ]
    wanted = itertools.product((6, 4), ("average", "ward"), (("", "average"), ("zipit", "")), (1, 2))
    wanted = [(r, linkage, *how, seed) for r, linkage, how, seed in wanted]
    kept = [w for w in wanted if not (w[1] == "ward" and (w[0] == 4 or w[2] == "zipit"))]
    assert found == [(0, "", "", "", ""), *kept]
    assert {c.given["text"] for c in cells} == {"none"}
    assert {c.given["limit"] for c in cells} == {7}


def test_shares_are_of_the_models_experts_and_of_the_sources_sequences(tmp_path):
    axes = {"reduction": ["25%", "62.5%"], "sequences": ["1/8", "2/1", 5]}
    study = grids.load(written(tmp_path, axes=axes))
    for model, kept in (("demo-mixtral", (6, 3)), ("demo-qwen", (24, 12))):
        found = [(c.given["experts"], c.given["sequences"]) for c in grids.cells_of(study, model)[1:]]
        assert found == list(itertools.product(kept, (12, 192, 5)))
    c4 = grids.load(
        written(tmp_path, axes={"experts": [2], "sequences": ["1/8"]}, base={"calibration": "c4"})
    )
    assert grids.cells_of(c4, "demo-mixtral")[1].given["sequences"] == 4
    embedded = written(
        tmp_path,
        axes={"experts": [2], "calibration": ["c4", "math"]},
        embedded={"calibration": ["demo:units"]},
    )
    assert [c.given["calibration"] for c in grids.cells_of(grids.load(embedded), "demo-qwen")[1:]] == [
        "demo:units"
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"axis": {}}, "some.yml, axis: Extra inputs are not permitted; allowed are title, about,"),
        ({"title": None}, "some.yml, title: is missing"),
        ({"axes": {}}, "some.yml, axes: Dictionary should have at least 1 item"),
        ({"axes": ["experts"]}, "some.yml, axes: must be a valid dictionary; not"),
        (
            {"axes": {"experts": ["1/2"], "linkge": ["ward"]}},
            "axes.linkge: 'linkge' is unknown; allowed are .*linkage",
        ),
        (
            {"axes": {"experts": ["1/2"], "linkage": ["wrad"]}},
            '"linkage" argument must be one of "ward", "average", .*\'wrad\'',
        ),
        (
            {"axes": {"experts": ["1/2"], "method": ["hcsmo"]}},
            'axes: .*"method" argument must be one of "hc-smoe", .*\'hcsmo\'',
        ),
        ({"axes": {"experts": ["1/2"], "linkage": []}}, "axes.linkage: List should have at least 1 item"),
        ({"axes": {"experts": ["1/2", "1/2"]}}, "axes.experts: has '1/2' twice"),
        (
            {"axes": {"experts": ["3/2"]}},
            "axes.experts: experts must be a share below 1 such as 1/4 or 25%, or a whole number from 1; not "
            "'3/2'",
        ),
        (
            {"axes": {"experts": [0.5]}},
            "axes.experts: experts must be a share below 1 such as 1/4 or 25%, or a whole number from 1; not "
            "0.5",
        ),
        (
            {"axes": {"reduction": [3]}},
            "axes.reduction: reduction must be a share below 1 such as 1/4 or 25%; not 3",
        ),
        ({"axes": {"linkage": ["ward"]}}, "axes: needs experts or reduction, and not both"),
        ({"axes": {"experts": [2], "reduction": ["1/2"]}}, "axes: needs experts or reduction, and not both"),
        (
            {"axes": {"experts": [2], "limit": ["many"]}},
            "axes.limit: limit must be of the kind of (0|None); not 'many'",
        ),
        ({"axes": {"experts": [2], "guard": ["on"]}}, 'axes: .*"guard" argument must be one of .*; not .on.'),
        (
            {"axes": {"experts": [2], "calibration": ["notes.txt"]}},
            "axes.calibration: there is no file notes.txt",
        ),
        ({"axes": {"experts": [2], "calibration": ["x*c4+math"]}}, "axes.calibration: .*mixture"),
        (
            {"axes": {"experts": [2], "calibration": ["demo:cod"]}},
            'axes.calibration: .*must be one of "code", "prose"',
        ),
        (
            {"axes": {"experts": [2], "settings": [{"linkge": 1}]}},
            "axes.settings: 'linkge' is unknown; allowed are",
        ),
        (
            {"axes": {"experts": [2], "settings": [{"experts": 4}]}},
            "axes: 'experts' is set in experts and in settings",
        ),
        (
            {"axes": {"experts": [2], "linkage": ["ward"], "similarity": ["cka"]}},
            'linkage "ward" needs Euclidean distances',
        ),
        ({"base": {"linkage": "ward"}}, "axes: 'linkage' is set in base and in linkage"),
        ({"base": {"lmit": 3}}, "base: 'lmit' is unknown"),
        ({"exclude": [{"linkage": "single"}]}, "exclude: {'linkage': 'single'} matches no cell"),
        ({"exclude": [{"linkge": "ward"}]}, "exclude: 'linkge' is unknown; allowed are experts, linkage"),
        ({"exclude": [{"experts": "1/2"}]}, "exclude: excludes every cell"),
        ({"seeds": [1, "two"]}, "seeds.1: must be a valid integer; not 'two'"),
        ({"paper": ["tabel"]}, "paper.0: must be 'qwen', 'mixtral'.*; not 'tabel'"),
        (
            {"embedded": {"calibration": ["demo"]}},
            "embedded: 'calibration' is unknown; allowed are experts, linkage",
        ),
        ({"read": {"y": "loss"}}, "read.y: must be 'where', 'x'.*; not 'y'"),
        ({"notebook": "05_acuracy"}, "notebook: there is no notebook"),
        ({"notebook": "04_merge"}, "notebook: 04_merge.ipynb has not the parameters of 05_accuracy"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        grids.plans([written(tmp_path, **content)], ["demo-mixtral"])


def test_a_key_that_is_there_twice_is_an_error(tmp_path):
    path = tmp_path / "some.yml"
    path.write_text("title: t\naxes:\n  experts: [2]\n  linkage: [ward]\n  linkage: [single]\n")
    with pytest.raises(
        ValueError, match="some.yml is not readable YAML: the key 'linkage' is there twice .*line 3"
    ):
        grids.load(path)
    with pytest.raises(
        FileNotFoundError, match="no grid linkge; give a .yml file, all, or one of linkage, budgets, .*sizes"
    ):
        grids.load("linkge")


def test_what_does_not_suit_the_model_or_is_an_axis_is_refused(tmp_path):
    study = grids.load(written(tmp_path, axes={"experts": [9]}))
    with pytest.raises(ValueError, match="some.yml, experts: 9 are more than the 8 of demo-mixtral"):
        grids.cells_of(study, "demo-mixtral")
    assert grids.cells_of(study, "demo-qwen")[1].given["experts"] == 9
    for given, message in (
        ({"experts": 3}, "'experts' is an axis of this grid"),
        ({"lmit": 3}, "'lmit' is unknown; allowed are"),
        (grids.overrides_from(["limit=many"]), "parameter: limit must be of the kind of (0|None)"),
    ):
        with pytest.raises(ValueError, match=message):
            grids.cells_of(study, "demo-qwen", given)
    assert grids.overrides_from(["limit=3", "guard=on", "text=none"]) == {
        "limit": 3,
        "guard": True,
        "text": "none",
    }


def test_all_items_can_be_asked_for_by_name(tmp_path):
    study = grids.load(written(tmp_path, axes={"experts": [4], "limit": [None, 5]}))
    assert [cell.given["limit"] for cell in grids.cells_of(study, "demo-mixtral")[1:]] == [None, 5]
    study = grids.load(written(tmp_path, base={"limit": None}))
    cells = grids.cells_of(study, "demo-mixtral")
    assert cells[0].id == grids.cells_of(grids.load(written(tmp_path)), "demo-mixtral")[0].id
    overridden = grids.cells_of(grids.load(written(tmp_path)), "demo-mixtral", {"limit": None})
    assert [cell.id for cell in overridden] == [cell.id for cell in cells]


def test_the_name_of_a_source_is_no_path_where_there_is_a_folder_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "notebooks").symlink_to(sweep.notebooks_folder().resolve())
    (tmp_path / "demo").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    axes = {"experts": [4], "calibration": ["demo", "notes.txt", "./demo"]}
    cells = grids.cells_of(grids.load(written(tmp_path, axes=axes)), "demo-mixtral")[1:]
    wanted = ["demo", str(tmp_path / "notes.txt"), str(tmp_path / "demo")]
    assert [cell.given["calibration"] for cell in cells] == wanted
    with pytest.raises(ValueError, match=r"there is no file \./dem in"):
        grids.load(written(tmp_path, base={"calibration": "./dem"}))


SAME = [  # cells of which each pair makes the same plan and scores it alike
    ({}, {"linkage": "average", "merge": "frequency", "similarity": "expert-output"}),
    ({}, {"method": "hc-smoe", "plan_seed": 5, "metric": "euclidean"}),
    ({}, {"calibration": "demo", "sequences": 96, "length": 256, "calibration_seed": 42}),
    ({"method": "k-means"}, {"group": "k-means"}),
    ({"method": "reap"}, {"method": "reap", "plan_seed": 3}),
    ({"combine": "fix-dom", "merge": "average"}, {"method": "fix-dom", "merge": "average"}),
    ({"steps": "budget=merge-cost guard=on"}, {"budget": "merge-cost", "guard": True}),
]
OTHER = [
    ({}, {"linkage": "single"}),
    ({}, {"calibration_seed": 43}),
    ({}, {"sequences": 48}),
    ({}, {"limit": 5}),
    ({}, {"dtype": "bfloat16"}),
    ({"method": "k-means"}, {"method": "k-means", "plan_seed": 1}),
    ({"method": "k-means", "centres": "first"}, {"method": "k-means"}),
    ({"budget": "merge-cost"}, {"budget": "merge-cost", "linkage": "single"}),
    (
        {"method": "k-means", "budget": "merge-cost"},
        {"method": "k-means", "budget": "merge-cost", "linkage": "single"},
    ),
]


@pytest.mark.parametrize(("pairs", "same"), [(SAME, True), (OTHER, False)])
def test_cells_are_one_if_they_make_the_same_plan(pairs, same):
    for pair in pairs:
        first, second = (sweep.canonical({"model": "demo-mixtral", "experts": 4} | p, DEFAULTS) for p in pair)
        assert (first == second) == same, pair
        path = sweep.notebook_path("05_accuracy")
        assert (runner.notebook_id(path, first) == runner.notebook_id(path, second)) == same
    unmerged = [{"experts": 0}, {"experts": 0, "method": "reap", "calibration_seed": 7, "sequences": 3}]
    assert len({json.dumps(sweep.canonical({"model": "m"} | p, DEFAULTS)) for p in unmerged}) == 1


def test_a_canonical_cell_makes_the_plan_of_the_cell_as_it_was_given():
    for pair in SAME + OTHER:
        for given in pair:
            made = DEFAULTS | sweep.canonical({"model": "demo-mixtral", "experts": 4} | given, DEFAULTS)
            settings = [sweep.recipe_of(parameters).settings for parameters in (made, given)]
            assert settings[0] == settings[1], given


def test_one_cell_captures_and_the_others_wait_for_it(tmp_path):
    axes = {"experts": ["1/2", "1/4"], "method": ["hc-smoe", "selection"]}
    cells = grids.cells_of(grids.load(written(tmp_path, axes=axes, seeds=[1, 2])), "demo-mixtral")
    after = grids.capturing(cells)
    free = [cells[i].given for i in range(len(cells)) if i not in after]
    assert [(c["experts"], c.get("method"), c.get("calibration_seed")) for c in free] == [
        (0, None, None),
        (4, "selection", 1),
        (4, "selection", 2),
    ]
    for i, first in after.items():
        assert cells[i].given["calibration_seed"] == cells[first].given["calibration_seed"]


def measured(folder, cells, name="some", model="demo-mixtral"):
    """A folder as a sweep of some cells leaves it: done, but for those without a score."""
    declared = [{"id": i, "parameters": {"model": model} | given} for i, (given, _) in cells.items()]
    sweep.write_grid(folder, name, model, title="t", notebook="05_accuracy.ipynb", cells=declared)
    for i, (given, score) in cells.items():
        done = folder / f"05_accuracy-{i}.ipynb"
        if score is not None:
            parameters = DEFAULTS | sweep.canonical({"model": model} | given, DEFAULTS)
            content = {"parameters": parameters, "size": {"num_experts": 8, "bytes": 10}}
            scores = {"tasks": {"t": {"acc": score}}, "mean_acc": score, "mean_acc_stderr": 0.1}
            done.with_suffix(".json").write_text(json.dumps(content | {"scores": scores}))
            done.touch()


CELLS = {
    "a": ({"experts": 0}, 0.9),
    "b": ({"experts": 4, "method": "hc-smoe", "linkage": "average"}, 0.5),
    "c": ({"experts": 4, "method": "hc-smoe", "group": "k-means", "plan_seed": 1}, 0.6),
    "d": ({"experts": 4, "method": "hc-smoe", "sequences": 24}, 0.4),
    "e": ({"experts": 4, "method": "reap"}, None),
    "f": ({"experts": 2, "method": "reap"}, None),
}


def test_the_table_has_every_setting_and_what_is_missing_is_told_against_the_grid(tmp_path):
    measured(tmp_path, CELLS)
    runner.write_failure(tmp_path / "05_accuracy-e.ipynb", "Traceback\nValueError: no\x1b[31m good")
    frame = sweep.collect(tmp_path, grid="some", model="demo-mixtral")
    assert frame["setting"].tolist() == [
        "original", "hc-smoe, 96 sequences", "hc-smoe, group k-means, 96 sequences", "hc-smoe, 24 sequences"
    ]  # fmt: skip
    assert frame["linkage"].fillna("").tolist() == ["", "average", "", "average"]  # k-means has no linkage
    assert frame["group"].fillna("").tolist() == ["", "hierarchical", "k-means", "hierarchical"]
    assert frame["calibration"].tolist() == ["", "demo", "demo", "demo"]
    assert frame["sequences"].tolist() == [0, 96, 96, 24]
    missing = sweep.missing_of(tmp_path, "some", "demo-mixtral")
    assert missing[["state", "experts", "method"]].values.tolist() == [
        ["failed", 4, "reap"],
        ["missing", 2, "reap"],
    ]
    row = sweep.status(tmp_path).iloc[0]
    assert row[["cells", *runner.STATES]].tolist() == [6, 4, 1, 0, 0, 1]
    assert sweep.failures(tmp_path)[0].endswith("ValueError: no good")
    with pytest.raises(FileNotFoundError, match="other was not swept into .*, which has some"):
        sweep.collect(tmp_path, grid="other")


def test_a_process_that_died_is_told_from_one_that_runs(tmp_path):
    from hcsmoe_core.studies.cache import locked

    done = tmp_path / "05_accuracy-a.ipynb"
    part = tmp_path / ".05_accuracy-a.part.ipynb"
    part.touch()
    (tmp_path / ".05_accuracy-a.ipynb.lock").touch()  # as SIGKILL leaves it
    assert runner.state_of(done) == "interrupted"
    with locked(done):
        assert runner.state_of(done) == "running"
    assert not (tmp_path / ".05_accuracy-a.ipynb.lock").exists()
    part.unlink()
    assert runner.state_of(done) == "missing"
    runner.write_failure(done, "why")
    assert runner.state_of(done) == "failed"
    done.touch()
    assert runner.state_of(done) == "done"


def test_grids_share_cells_and_tables_are_csv_and_latex(tmp_path):
    from hcsmoe_core.studies.tables import write_table

    measured(tmp_path, {k: CELLS[k] for k in "abc"})
    measured(tmp_path, {k: CELLS[k] for k in "bd"}, name="other")
    assert len(sweep.cells_of(tmp_path, "some,other")) == 4
    frame = sweep.table_of(tmp_path)
    assert sorted(zip(frame["grid"], frame["mean_acc"], strict=True)) == [
        ("other", 0.4), ("other", 0.5), ("some", 0.5), ("some", 0.6), ("some", 0.9)
    ]  # fmt: skip
    again = pd.read_csv(write_table(frame, tmp_path / "t.csv"))
    assert list(again) == list(frame)
    text = write_table(frame, tmp_path / "t.tex").read_text()
    assert text.count("\\\\") == 1 + len(frame)
    assert "mean\\_acc" in text
    assert "bytes" not in text  # the same in all rows
    with pytest.raises(ValueError, match='"path" argument must be one of ".csv", ".tex"'):
        write_table(frame, tmp_path / "t.xls")


def test_options_of_slurm_jobs(tmp_path):
    from hcsmoe_core.studies.runner import job_options

    made = job_options(
        ["walltime=1-02:00:00", "cores=4", "gpus=1", "queue=fast", "directives=--constraint=a;--exclusive"]
    )
    assert made["queue"] == "fast"
    assert (made["cores"], made["processes"], made["job_cpu"]) == (1, 1, 4)  # one cell at a time on all cores
    assert made["job_extra_directives"] == ["--constraint=a", "--exclusive", "--gpus=1"]
    assert made["worker_extra_args"][-2:] == ["--resources", "GPU=1"]
    assert f"{26 * 3600 - 120}s" in made["worker_extra_args"]
    assert "export OMP_NUM_THREADS=4" in made["job_script_prologue"]
    for option, message in (
        ("cpus=3", "--slurm-options takes name=value with a name of queue, account"),
        ("walltime=soon", "walltime takes a time such as 04:00:00"),
        ("gpus=two", "gpus takes a whole number"),
        ("gpus=2", "gpus of 0 or 1; not cores=1 and gpus=2"),
    ):
        with pytest.raises(ValueError, match=message):
            job_options([option])


@pytest.mark.parametrize("resources", [{}, {"GPU": 1}])
def test_cells_ask_for_a_gpu_where_workers_offer_one(resources):
    from distributed import Client, LocalCluster

    from hcsmoe_core.studies.runner import scheduler

    how = dict(
        n_workers=1, processes=False, threads_per_worker=1, dashboard_address=":0", resources=resources
    )
    with (
        LocalCluster(**how) as cluster,
        Client(cluster) as client,
        scheduler(client.scheduler.address) as engine,
    ):
        assert engine.dashboard.startswith("http")
        assert engine.executor.submit(resources_of_this_task).result(timeout=60) == resources


def resources_of_this_task():
    from distributed import get_worker

    worker = get_worker()
    return dict(worker.state.tasks[worker.get_current_task()].resource_restrictions or {})
