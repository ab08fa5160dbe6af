"""A user's own file takes part in plans, checkpoints and the list of methods."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import logits, tiny_model, tokens

from hcsmoe_core import METHODS, apply_plan, capture, load_merged, make_plan, methods, restore, save_merged
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.steps import TABLES

GUIDE = Path(__file__).resolve().parents[1] / "docs" / "own-method.md"


@pytest.fixture
def plugin(tmp_path):
    """The guide's example as a file; what it registers is taken away again."""
    tables = (METHODS, *TABLES.values())
    before = [dict(table) for table in tables]
    path = tmp_path / "by_usage.py"
    path.write_text(re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.S)[1])
    yield path
    for table, entries in zip(tables, before, strict=True):
        table._entries.clear()
        table._entries.update(entries)
    methods.PLUGINS.clear()


def test_the_example_of_the_guide_is_twenty_lines(plugin):
    assert len([line for line in plugin.read_text().splitlines() if line.strip()]) <= 20


def test_a_file_takes_part(plugin, tmp_path):
    model = tiny_model("mixtral")
    methods.load_plugin(plugin)
    assert [plugin] == methods.PLUGINS
    lines = (
        "\nby-usage: neighbours in usage joined\n    steps  group=by-usage budget=uniform merge=routing-mass "
    )
    assert lines in methods.table()

    assert METHODS["by-usage"].needs == ("usage",)
    assert "descending" in methods.option_names()
    assert methods.parse_settings(["descending=on"]) == {"descending": True}
    stats = capture(model, tokens(), methods=("by-usage",))
    assert stats.needs == ("usage",)
    plan = make_plan(stats, model, experts=4, method="by-usage")
    usage = stats.layer(0).usage_count.sum(0)
    order = usage.argsort(stable=True).reshape(4, 2).tolist()
    assert sorted(map(sorted, plan.layers[0].groups())) == sorted(map(sorted, order))
    assert plan.settings["group"] == "by-usage"
    assert plan.settings["descending"] is False
    apply_plan(model, plan, stats)
    live = logits(model, tokens(seed=2))
    save_merged(model, plan, tmp_path / "merged")
    restore(model)
    again = load_merged(tmp_path / "merged", experts_implementation="eager")
    assert torch.equal(logits(again, tokens(seed=2)), live)
    with pytest.raises(ValueError, match='"descending" setting is taken by group "by-usage"'):
        methods.resolve("hc-smoe", descending=True)


def test_a_combination_of_ones_own_takes_part(plugin):
    plugin.write_text(
        "from hcsmoe_core.methods import METHODS, Method, combine\n"
        "@combine('heaviest')\n"
        "def heaviest(group, *, rank_by: str = 'weight'):\n"
        "    return group.experts[int(group.weights.argmax())]\n"
        "METHODS['heaviest'] = Method('-', title='the heaviest expert of each group', combine='heaviest')\n"
    )
    methods.load_plugin(plugin)
    model = tiny_model("mixtral", torch.float64)
    stats = capture(model, tokens(), progress=False)
    plan = make_plan(stats, model, experts=4, method="heaviest")
    apply_plan(model, plan)
    for layer, layer_plan in zip(find_moe_layers(model), plan.layers, strict=True):
        for row, members in zip(layer.tensors()["down_proj"], layer_plan.groups(), strict=True):
            heaviest = max(members, key=lambda e: layer_plan.weights[e])
            before = layer.experts._merged.before["down_proj"][heaviest]
            assert torch.equal(row, before)


def test_groups_that_are_no_partition_are_refused(plugin):
    plugin.write_text(plugin.read_text().replace("count // len(order)", "(count + 1) // len(order)"))
    methods.load_plugin(plugin)
    stats = capture(tiny_model("mixtral"), tokens(), progress=False)
    with pytest.raises(ValueError, match='group "by-usage" must number 4 groups of the 8 free experts'):
        make_plan(stats, experts=4, method="by-usage")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file .*absent.py"):
        methods.load_plugin(tmp_path / "absent.py")


def test_entry_points_are_loaded_with_the_table(tmp_path):
    """In a process of its own: a package that offers methods, and one that is broken."""
    (tmp_path / "offered.py").write_text(
        "from hcsmoe_core.methods import METHODS, Method\n"
        "METHODS['offered'] = Method('-', title='offered by a package')\n"
    )
    info = tmp_path / "offered-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: offered\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hcsmoe.methods]\noffered = offered\nbroken = not_there\n")
    code = "from hcsmoe_core.steps import METHODS; print('offered' in METHODS, len(METHODS) > 20)"
    environment = {"PYTHONPATH": f"{tmp_path}:{GUIDE.parents[1]}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "True True\n", done.stderr
    assert "The methods of not_there could not be loaded" in done.stderr


def test_the_recommended_method_is_looked_up_by_that_name():
    assert METHODS["recommended"] is METHODS["least-residual"]
    assert "recommended" not in list(METHODS)
