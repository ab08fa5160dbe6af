"""What statistics record of their tokens, and captures that several processes share."""

import threading

import numpy as np
import pytest
import torch
from conftest import tiny_model, tokens

from hcsmoe_core import apply_plan, capture, load_plan, make_plan
from hcsmoe_core._util import InputError, check_count, is_locked, locked, sha256_json
from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.plan import Plan
from hcsmoe_core.statistics import NEEDS

SAMPLED = ("usage", "sample")


def test_a_capture_collects_what_the_methods_need(mixtral, input_ids):
    assert capture(mixtral, input_ids).needs == ("usage", "outputs")
    assert capture(mixtral, input_ids, methods=("hc-smoe", "reap")).needs == ("usage", "outputs", "norms")
    assert capture(mixtral, input_ids, methods="f-prune").needs == ("usage",)
    assert capture(mixtral, input_ids, methods=("reap",), needs=("sample",), sample=5).needs == SAMPLED
    with pytest.raises(InputError, match="\"method\" argument must be one of .*; not 'x'"):
        capture(mixtral, input_ids, methods=("x",))
    with pytest.raises(InputError, match='"needs" argument must be one of "usage"'):
        capture(mixtral, input_ids, needs=("x",))


def test_identity_does_not_depend_on_the_order_of_the_tokens(mixtral):
    first = capture(mixtral, tokens(4, seed=2), domains=["a", "b", "a", "b"], needs=SAMPLED)
    second = capture(mixtral, tokens(3, seed=3), domains=["c", "a", "c"], needs=SAMPLED)
    assert (first + second).identity() == (second + first).identity() != first.identity()
    with pytest.warns(UserWarning, match="count twice"):
        assert (first + first).identity() != first.identity()


def test_identity_tells_samples_dtypes_and_partial_captures_apart(mixtral, input_ids):
    stats = capture(mixtral, input_ids, needs=SAMPLED, sample=50)
    half = capture(tiny_model("mixtral", torch.bfloat16), input_ids, needs=SAMPLED, sample=50)
    others = [half] + [
        capture(mixtral, input_ids, needs=SAMPLED, sample=sample, every=every)
        for sample, every in ((20, 1), (50, 2))
    ]
    plan = make_plan(stats, mixtral, experts=3, method="hc-least-squares", similarity="router-logits")
    for other in others:
        assert other.identity() != stats.identity()
        with pytest.raises(InputError, match="made from other statistics"):
            apply_plan(mixtral, plan, other)
    apply_plan(mixtral, plan, capture(mixtral, input_ids, needs=(*SAMPLED, "norms"), sample=50))


def test_a_sum_records_the_coarsest_capture(mixtral):
    every = [capture(mixtral, tokens(3, seed=n), needs=SAMPLED, every=n) for n in (1, 4)]
    assert (every[0] + every[1]).identity() == (every[1] + every[0]).identity()
    assert (every[0] + every[1]).model["every"] == 4


def test_plans_of_earlier_versions_are_compared_by_what_they_recorded(mixtral, input_ids, tmp_path):
    stats = capture(mixtral, input_ids, needs=SAMPLED, sample=50)
    plan = make_plan(stats, mixtral, experts=3, method="hc-least-squares", similarity="router-logits")
    former = {"tokens": 120, "domains": ["all"], "hash": sha256_json(stats.sequences)}
    Plan(plan.layers, plan.settings, plan.model, former).save(tmp_path / "p.json")
    read = load_plan(tmp_path / "p.json")
    with pytest.raises(InputError, match="made from other statistics"):
        apply_plan(mixtral, read, capture(mixtral, tokens(seed=7), needs=SAMPLED, sample=50))
    apply_plan(mixtral, read, stats)


class Rank:
    """One of two processes, played by a thread."""

    board, barrier = [None, None], threading.Barrier(2)

    def __init__(self, number):
        self.rank = lambda: number

    def share(self, items):
        return items[: len(items) // 2] if self.rank() == 0 else items[len(items) // 2 :]

    def total(self, tensor, *, largest=False):
        self.board[self.rank()] = tensor
        self.barrier.wait(60)
        first, second = self.board
        self.barrier.wait(60)
        return torch.maximum(first, second) if largest else first + second


def test_ranks_share_a_capture(input_ids):
    options = dict(needs=tuple(NEEDS), sample=50, batch_size=2, domains=list("abaabb"), progress=False)
    alone = capture(tiny_model("mixtral", torch.float64), input_ids, **options)
    shared = [None, None]

    def work(number):
        model = tiny_model_of[number]
        shared[number] = capture(model, input_ids, ranks=Rank(number), **options)

    tiny_model_of = [tiny_model("mixtral", torch.float64) for _ in range(2)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for stats in shared:
        assert stats.identity() == alone.identity()
        for name, layer in alone.layers.items():
            for key, value in layer.collected().items():
                torch.testing.assert_close(getattr(stats.layers[name], key), value, rtol=1e-12, atol=1e-12)
            assert torch.equal(stats.layers[name].sample.index, layer.sample.index)
            torch.testing.assert_close(stats.layers[name].sample.inputs, layer.sample.inputs)


def test_a_layer_that_does_not_get_every_token_is_named(mixtral, input_ids):
    layer = find_moe_layers(mixtral)[1]

    def without_the_last(module, inputs, keywords):
        tokens, index, weight = [*inputs, *keywords.values()][:3]
        return (tokens[:-1], index[:-1], weight[:-1]), {}

    def padded(module, inputs, output):
        return torch.cat([output, output.new_zeros(1, output.shape[1])])

    layer.experts.register_forward_pre_hook(without_the_last, with_kwargs=True)
    layer.experts.register_forward_hook(padded)
    with pytest.raises(InputError, match=f"{layer.name} does not get every token of a sequence"):
        capture(mixtral, input_ids, domains=list("abaabb"))


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_every_type_are_counts(value):
    count = check_count("groups", value, 1, 3)
    assert (type(count), count) == (int, 3)


@pytest.mark.parametrize("value", [True, np.True_, 3.0, "3", None, 0, 4, np.int64(4), [3]])
def test_other_values_are_no_counts(value):
    with pytest.raises(InputError, match='"groups" argument must be a whole number from 1 to 3'):
        check_count("groups", value, 1, 3)


def test_a_lock_keeps_others_out_while_its_process_lives(tmp_path):
    path, order = tmp_path / "folder" / "x.json", []
    assert not is_locked(path)

    def other():
        with locked(path):
            order.append("second")

    with locked(path):
        assert is_locked(path)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert not is_locked(path)
    assert list(path.parent.iterdir()) == []
