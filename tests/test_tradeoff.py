"""Loss against bytes: fronts and verdicts that follow from the numbers; cells that are measured once."""

import math

import numpy as np
import pandas as pd
import pytest

from benchmarks import equal_bytes as tradeoff
from benchmarks import figures


def cells(points):
    """Made-up cells: (method, kind, experts, bits, seed, loss, bytes, operations)."""
    names = ["method", "kind", "experts", "bits", "seed", "loss", "expert_bytes", "flops"]
    frame = pd.DataFrame(points, columns=names)
    return frame.assign(flops_once=frame["flops"], accuracy=0.5, item_error=0.1, stored=8.0, width=64.0)


FOUND = cells(
    [
        ("original", "rounds", 8, 16, 0, 1.0, 1000, 60),
        ("original", "rounds", 8, 8, 0, 1.0, 520, 60),
        ("original", "rounds", 8, 4, 0, 1.05, 280, 60),
        ("original", "rounds", 8, 2, 0, 1.5, 150, 60),
        ("trimming", "trims", 4, 16, 0, 1.1, 500, 30),
        ("trimming", "trims", 4, 16, 1, 1.3, 500, 30),
        ("trimming", "trims", 4, 8, 0, 1.21, 270, 30),
        ("trimming", "trims", 4, 4, 0, 1.25, 140, 30),
        ("hc-smoe", "averages", 4, 16, 0, 2.0, 500, 60),
        ("hc-smoe", "averages", 2, 4, 0, 3.0, 75, 60),
    ]
)


def test_rounding_is_weighed_against_what_takes_no_more_bytes():
    points = tradeoff.means(FOUND)
    trimmed = points[(points["method"] == "trimming") & (points["bits"] == 16)].iloc[0]
    assert (trimmed["samples"], trimmed["loss"]) == (2, pytest.approx(1.2))
    assert trimmed["loss_sd"] == pytest.approx(math.sqrt(0.02))
    assert (trimmed["bytes_share"], trimmed["flops_share"]) == (0.5, 0.5)
    equal = tradeoff.at_equal_bytes(points).set_index("bits")
    assert equal["better"].to_dict() == {8: "round", 4: "round", 2: "smaller"}
    assert equal["smaller"].tolist() == [
        "trimming to 4, 16 bits",
        "trimming to 4, 8 bits",
        "trimming to 4, 4 bits",
    ]
    assert equal["smaller_added"].tolist() == pytest.approx([0.2, 0.21, 0.25])
    assert equal["paper_added"].tolist() == pytest.approx([1.0, 2.0, 2.0])
    assert tradeoff.at_equal_bytes(points, even=1)["better"].tolist() == ["even"] * 3
    said = tradeoff.advice(points).splitlines()
    assert said[1].startswith("4 bits, 28% of the bytes: rounding all experts adds 0.050 nats")
    assert [line.rpartition(": ")[2] for line in said[:3]] == [
        "do not merge.",
        "do not merge.",
        "make it smaller.",
    ]
    assert said[3].endswith("trimming to 4, 4 bits, 14%, adds 0.250.")
    assert said[4] == (
        "For 50% of the experts' operations, which rounding does not save: trimming to 4, 16 bits adds 0.200."
    )


def test_the_front_is_what_no_other_point_beats():
    generator = np.random.default_rng(0)
    points = pd.DataFrame(generator.integers(0, 12, (40, 2)), columns=["cost", "loss"])
    wanted = []
    for cost, loss in points.to_numpy():
        better = [(c, v) for c, v in points.to_numpy() if c <= cost and v <= loss and (c, v) != (cost, loss)]
        wanted.append(not better)
    found = tradeoff.front(points, "cost")
    assert found.tolist() == wanted
    assert 0 < found.sum() < 40


def test_the_figure_has_a_line_for_each_kind_and_number_of_bits():
    points = tradeoff.best_of_kinds(tradeoff.means(FOUND))
    points = points.assign(added=points["added"].clip(lower=1e-4))
    costs = ["bytes_share", "flops_share"]
    figure = figures.tradeoff(
        points,
        costs=costs,
        value="added",
        hue="kind",
        shade="bits",
        fronts=[tradeoff.front(points, cost) for cost in costs],
        labels=["bytes", "operations"],
    )
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() != "None"]
    assert sum(len(line.get_xdata()) for line in lines) == len(points)
    ring = next(line for line in figure.axes[0].lines if line.get_linestyle() == "None")
    assert sorted(ring.get_xdata()) == sorted(points["bytes_share"][tradeoff.front(points, "bytes_share")])


def test_bad_settings_are_refused_before_anything_is_measured(tmp_path):
    for settings, message in (
        (dict(methods=["hcsmo"]), '"method" argument must be one of'),
        (dict(bits=[5]), '"bits" argument must be one of'),
        (dict(experts=[9]), '"experts" argument must be a whole number from 1 to 8'),
    ):
        with pytest.raises(ValueError, match=message):
            tradeoff.measure("demo-mixtral", **settings, folder=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        FileNotFoundError, match="no table .*run: python benchmarks/equal_bytes.py --models some"
    ):
        tradeoff.table(tmp_path / "{model}.csv", "some")


@pytest.mark.slow
def test_every_plan_is_scored_at_every_number_of_bits_once(tmp_path, monkeypatch):
    small = dict(
        methods=["hc-smoe", "trimming"], experts=[4], sequences=12, length=64, bits=(16, 4), folder=tmp_path
    )
    found = tradeoff.measure("demo-mixtral", **small)
    assert found.groupby("method")["bits"].agg(list).to_dict() == {
        "hc-smoe": [16, 4],
        "original": [16, 8, 4, 3, 2],
        "trimming": [16, 4],
    }
    points = tradeoff.means(found).set_index(["method", "bits"])
    assert points.loc[("original", 16), "loss"] < points.loc[("original", 2), "loss"]
    assert points.loc[("trimming", 16), "bytes_share"] == points.loc[("trimming", 4), "flops_share"] == 0.5
    assert points.loc[("hc-smoe", 4), "once_share"] < points.loc[("hc-smoe", 4), "flops_share"] == 1
    assert points.loc[("hc-smoe", 4), "bytes_share"] == pytest.approx(
        0.5 * points.loc[("original", 4), "bytes_share"]
    )
    monkeypatch.setattr(tradeoff, "_scores", lambda *_: pytest.fail("measured twice"))
    pd.testing.assert_frame_equal(tradeoff.measure("demo-mixtral", **small), found)
