"""Damaged, forged and hostile files are refused in words that name them; see ``tools/trials.py``."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from conftest import EXPERTS, logits, tiny_model, tokens

from hcsmoe_core import apply_plan, calibration_tokens, capture, load_model, load_plan, make_plan, restore
from hcsmoe_core._util import InputError, read_record, signed, write_json
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods import parse_settings, resolve
from hcsmoe_core.plan import LayerPlan, check_layer
from hcsmoe_core.score.evaluation import load_scores
from hcsmoe_core.statistics import NEEDS, load_statistics
from hcsmoe_core.studies import comparison, grids, runner, sweep
from tools import trials

OTHERS = ("mapped folder", "plain folder", "model folder", "own text")  # slow: a model is opened each time


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return trials.targets(tmp_path_factory.mktemp("trials"))


def failures(targets, share):
    found = [trials.run(target, max(5, round(share * target.trials)))[1] for target in targets]
    return [f"{bad['class']}: {bad['target']}, {bad['what']}: {bad['said']}" for of in found for bad in of]


@pytest.mark.slow
def test_no_damage_is_a_bug_unnamed_silent_or_endless(targets):
    chosen = [target for target in targets if not target.name.startswith(OTHERS)]
    assert not failures(chosen, 0.25)


@pytest.mark.slow
def test_nor_is_that_of_folders_and_of_text_that_a_model_wrote(targets):
    chosen = [target for target in targets if target.name.startswith(OTHERS)]
    assert not failures(chosen, 0.1)


@pytest.mark.parametrize(
    "setting",
    [
        "ridge=-1 mergemoe",
        "ridge=1e999 mergemoe",
        "fuzzifier=1 fuzzy",
        "fuzzifier=1e999 fuzzy",
        "subsets=0 o-prune",
        "rank=0 mc-smoe",
        "rank=1.5 mc-smoe",
        "share=0 mc-smoe",
        "centres=x k-means",
        "rank=2 sub-moe",
    ],
)
def test_ranges_of_options_hold_wherever_they_are_set(setting, tmp_path):
    text, method = setting.split()
    name = text.partition("=")[0]
    with pytest.raises(InputError, match=f'"{name}" argument must be'):
        resolve(method, **parse_settings([text]))
    grid = tmp_path / "g.yml"
    value = json.dumps(parse_settings([text])[name])
    number = {"Infinity": ".inf"}.get(value, value)
    grid.write_text(f"title: t\naxes:\n  experts: [1/2]\n  method: [{method}]\n  {name}: [{number}]\n")
    with pytest.raises(InputError, match=f'g.yml, .*"{name}" argument must be'):
        grids.load(grid)


def test_numbers_that_are_none_are_refused():
    for value in (float("nan"), float("inf"), 10**400, True, "1"):
        with pytest.raises(InputError, match='"gamma" argument must be a finite number'):
            resolve("hc-smoe", budget="grape", gamma=value)


PAIRS = [0, 0, 1, 1]
HALVES = [0.5] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(combine={"rule": "ties", "density": 3}), "above 0 and at most 1"),
        (dict(combine={"rule": "least-squares", "ridge": float("nan")}), "finite number"),
        (dict(combine={"rule": "average", "unheard": 1}), "has no option 'unheard'"),
        (dict(combine={"rule": "nothing"}), '"combine" argument must be one of'),
        (dict(combine={"rule": ["average"]}), '"combine" argument must be one of'),
        (dict(combine={"rule": "average", "refit": -1}), "refit"),
        (dict(dominant=[99, 2]), "one dominant expert of each group"),
        (dict(dominant=[-4, 2]), "one dominant expert of each group"),
        (dict(mixture=[[10**400, 0, 0, 0], HALVES]), "the mixture must be"),
        (dict(mixture=[[1.5, -0.5, 0, 0], HALVES]), "the mixture must be"),
        (dict(weights=[10**400, 0.5, 0.5, 0.5]), "one finite weight"),
        (dict(weights=[True, 0.0, 0.5, 0.5]), "one finite weight"),
    ],
)
def test_layers_of_plans_by_hand_are_checked(change, message):
    with pytest.raises(InputError, match=f"(?s)layer.*{message}"):
        check_layer(LayerPlan("layer", **dict(labels=PAIRS, weights=HALVES) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": [1]}, '"settings" must be an object'),
        ({"model": "x"}, '"model" must be an object'),
        ({"statistics": {"tokens": "x", "domains": []}}, '"statistics" "tokens" must be a whole number'),
        ({"statistics": {"tokens": 1, "domains": [1]}}, '"domains"\\[0\\] must be text'),
        ({"compress": {"share": 2}}, '"share" argument must be above 0'),
        ({"compress": 1}, '"compress" must be an object'),
        ({"layers": [3]}, '"layers"\\[0\\] must be an object'),
        ({"layers": [{"name": "x", "labels": 5, "weights": []}]}, '"labels" must be a list'),
    ],
)
def test_plans_by_hand_name_file_and_field(tmp_path, change, message):
    path = tmp_path / "hand.json"
    path.write_text(json.dumps({"layers": [{"name": "x", "labels": PAIRS, "weights": HALVES}]} | change))
    with pytest.raises(InputError, match=f"hand.json is not a valid plan.*{message}"):
        load_plan(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '"\\ud800"', "[]", "null", '{"a": "\\ud800"}'])
def test_every_reader_of_json_names_the_file(tmp_path, text):
    path = tmp_path / "file.json"
    path.write_text(text)
    for read in (read_record, load_plan, load_scores, sweep.result_of):
        with pytest.raises(InputError, match="file.json"):
            read(path)


def test_statistics_of_another_kind_are_refused_by_name(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "s.safetensors"
    for header in ("[" * 100_000, "{", "[]", "{}", json.dumps({"format": "hcsmoe-statistics-2"})):
        save_file({"x": torch.zeros(1)}, path, metadata={"hcsmoe": header})
        with pytest.raises(InputError, match="s.safetensors"):
            load_statistics(path)


def test_a_damaged_cell_is_named_and_measured_again(tmp_path):
    measured = []

    def measure(cell):
        measured.append(cell["x"])
        return {"value": cell["x"]}

    def run():
        return runner.measure(measure, [{"x": 1}, {"x": 2}], tmp_path, shared={})

    assert run() == run() == [{"value": 1}, {"value": 2}]
    path = sorted(tmp_path.glob("*.json"))[0]
    for damage in ("", "[]", path.read_text()[:-9], path.read_text().replace('"value": ', '"value": 1')):
        path.write_text(damage)
        assert runner.state_of(path) == "missing"
        assert run() == [{"value": 1}, {"value": 2}]
    assert len(measured) == 6


def test_a_damaged_result_of_a_sweep_does_not_count_as_done(tmp_path):
    scores = {"mean_acc": 0.5, "tasks": {}}
    cell = {"parameters": {"model": "m", "experts": 0}, "scores": scores, "size": {"bytes": 1}}
    done, result = (tmp_path / f"05_accuracy-0{suffix}" for suffix in (".ipynb", ".json"))
    sweep.write_grid(
        tmp_path, "g", "m", title="t", notebook="05_accuracy", cells=[{"id": "0", "parameters": {}}]
    )
    done.write_text("{}")
    write_json(result, signed(cell))
    assert sweep.collect(tmp_path, grid="g")["mean_acc"].tolist() == [0.5]
    assert sweep.status(tmp_path)["done"].tolist() == [1]
    result.write_text(result.read_text()[:-30])
    assert sweep.status(tmp_path)["done"].tolist() == [0]
    with pytest.raises(InputError, match="05_accuracy-0.json is not a readable result"):
        sweep.collect(tmp_path, grid="g")
    grid = next(tmp_path.glob("*.grid.json"))
    grid.write_text(grid.read_text().replace("05_accuracy", "06_accuracy"))
    with pytest.raises(InputError, match="g-m.grid.json was changed"):
        sweep.status(tmp_path)


def test_a_damaged_cell_of_a_comparison_is_named(tmp_path):
    path = tmp_path / "m" / "0.json"
    for text in ("", "[]", '{"method": "hc-smoe", "experts": "3", "seed": 0}'):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        with pytest.raises(InputError, match="0.json is not a "):
            comparison.cells(tmp_path, "m")


@pytest.mark.parametrize(
    "content",
    [
        '{"scores": 5}',
        '{"scores": {"items": {}}}',
        '{"scores": {"items": 3, "tasks": {}}}',
        '{"scores": {"tasks": {}, "items": {"t": {"of": "0", "acc": ["x"]}}}}',
    ],
)
def test_scores_compared_against_are_checked_before_anything_is_scored(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(InputError, match="r.json.*scores"):
        load_scores(tmp_path / "r.json")


@pytest.mark.parametrize(
    "line",
    ["paper: 5", "read: 5", "embedded: 7", "base: {ridge: .nan}", "read: [where]", "\ud800", "[" * 9999],
)
def test_grids_that_are_none_name_the_file(tmp_path, line):
    path = tmp_path / "g.yml"
    text = f"title: t\naxes: {{experts: [1/2], method: [mergemoe]}}\n{line}\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match="g.yml"):
        grids.load(path)


def test_shares_end_soon():
    assert [grids.share(text) for text in ("1e-99999999%", "1/0", "5", "1/4", "62.5%")] == [
        *[None] * 3,
        grids.Fraction(1, 4),
        grids.Fraction(5, 8),
    ]


def test_calibration_files_are_named(tmp_path):
    _, tokenizer = load_model("demo-qwen")
    bad = {
        "latin.txt": "é".encode("latin-1"),
        "half.jsonl": b'{"text": "a"}\n{"text": "\\ud800"}\n',
        "deep.json": b"[" * 100_000,
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            calibration_tokens(tmp_path / name, tokenizer, sequences=1, length=4)
    with pytest.raises(InputError, match="'json', a format"):
        calibration_tokens("json", tokenizer, sequences=1, length=4)


@pytest.mark.skipif(os.name != "posix", reason="pipes have names on POSIX systems alone")
def test_pipes_are_not_waited_for(tmp_path):
    _, tokenizer = load_model("demo-qwen")
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path, tmp_path / "pipe.txt"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            calibration_tokens(path, tokenizer, sequences=1, length=4)


def test_groups_that_no_token_reached_are_averaged_and_told_once_per_layer():
    model, ids = tiny_model("gpt_oss"), tokens()
    for layer in find_moe_layers(model):
        layer.router.bias.data[2:6].fill_(-1000)
    stats = capture(model, ids, needs=tuple(NEEDS), progress=False)
    for method in ("fix-dom", "zipit", "hc-least-squares", "selection"):
        plan = make_plan(stats, model, experts=4, method=method, progress=False)
        labels = [0, 0, 1, 1, 1, 1, 2, 3]
        weights = [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1, 1]
        layers = [
            LayerPlan(layer.name, labels, weights, combine=layer.combine, dominant=[0, 3, 6, 7])
            for layer in plan.layers
        ]
        plan = type(plan)(layers, plan.settings, plan.model, plan.statistics)
        before = [layer.neurons(e).down for layer in find_moe_layers(model) for e in range(2, 6)]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            apply_plan(model, plan, stats)
        assert [str(w.message).partition(":")[0] for w in said] == [layer.name for layer in layers]
        assert all("[[2, 3, 4, 5]], which were averaged" in str(w.message) for w in said)
        for i, layer in enumerate(find_moe_layers(model)):
            mean = torch.stack(before[4 * i : 4 * i + 4]).double().mean(0)
            np.testing.assert_allclose(layer.neurons(1).down.detach(), mean.detach(), rtol=0, atol=1e-6)
        restore(model)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_a_single_expert_stays_what_it_is(family, monkeypatch):
    import conftest
    import transformers

    monkeypatch.setattr(conftest, "EXPERTS", 1)
    name = {"mixtral": "MixtralConfig", "qwen2_moe": "Qwen2MoeConfig", "gpt_oss": "GptOssConfig"}[family]
    usual = getattr(transformers, name)
    monkeypatch.setattr(transformers, name, lambda **options: usual(**options | {"num_experts_per_tok": 1}))
    model, ids = tiny_model(family), tokens()
    assert EXPERTS == 8
    assert find_moe_layers(model)[0].num_experts == 1
    stats, whole = capture(model, ids, needs=tuple(NEEDS), progress=False), logits(model, ids)
    for method in ("f-prune", "reap", "o-prune", "hc-smoe", "fix-dom", "least-residual"):
        apply_plan(model, make_plan(stats, model, experts=1, method=method, progress=False), stats)
        torch.testing.assert_close(logits(model, ids), whole)
        restore(model)
