from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import logits, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from hcsmoe_core.families import find_moe_layers
from hcsmoe_core.methods.factors import (
    Factors,
    compress,
    densified,
    low_rank,
    second_moment,
    stored_bytes,
)
from hcsmoe_core.moe import Neurons
from hcsmoe_core.replace import replace_experts


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_moment(size, seed=0):
    """Positive definite, and far from a multiple of the identity."""
    x = normal(4 * size, size, seed=seed) * torch.logspace(-1.5, 1, size, dtype=torch.float64)
    return x.T @ x / len(x)


def gated(neurons, tokens):
    """Activations of an expert of SwiGLU's kind, or of ReLU's where it has no gate."""
    parts = [tokens.to(neurons.up.dtype) @ neurons.up[:, q].T for q in range(neurons.up.shape[1])]
    return torch.nn.functional.silu(parts[0]) * parts[1] if len(parts) == 2 else parts[0].relu()


def random_layer(experts=2, hidden=8, width=5, parts=2, tokens=30, seed=0, scale=1.0, dtype=torch.float64):
    made = [
        Neurons(
            scale * normal(width, parts, hidden, seed=seed + 10 * e, dtype=dtype),
            scale * normal(hidden, width, seed=seed + 10 * e + 1, dtype=dtype),
        )
        for e in range(experts)
    ]
    spread = torch.linspace(0.3, 2, hidden, dtype=torch.float64)
    inputs = [(normal(tokens, hidden, seed=seed + 10 * e + 2) * spread).to(dtype) for e in range(experts)]
    return made, inputs, gated


# Slow and plain, in numpy, by the symmetric square root and projections instead of the Cholesky factor and
# the product's two halves.


def naive_moment(inputs, ridge=1e-3):
    total = np.zeros((inputs.shape[1],) * 2)
    for x in inputs.double().numpy():
        total += np.outer(x, x)
    if not len(inputs) or not total.any():
        return np.eye(inputs.shape[1])
    total /= len(inputs)
    return total + ridge * np.trace(total) / len(total) * np.eye(len(total))


def naive_root(moment):
    values, vectors = np.linalg.eigh(moment)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


def naive_product(w, moment, rank):
    values, vectors = np.linalg.eigh(w @ moment @ w.T)
    best = vectors[:, np.argsort(-values)[:rank]]
    return best @ best.T @ w


def naive_matrices(neurons):
    ups = {f"up.{q}": neurons.up[:, q].double().numpy() for q in range(neurons.up.shape[1])}
    return ups | {"down": neurons.down.double().numpy()}


def naive_compress(layers, budget, rank, ridge=1e-3, by_cost=True):
    """Dense ``A B + S`` and rows of every matrix, by (layer, expert, name); and the rest of the budget."""
    weights, products, scored = {}, {}, []
    for at, (experts, tokens, activate) in enumerate(layers):
        for g, (expert, x) in enumerate(zip(experts, tokens, strict=True)):
            hidden = activate(expert.map(torch.Tensor.double), x.double())
            for name, w in naive_matrices(expert).items():
                moment = naive_moment(hidden.detach() if name == "down" else x, ridge)
                product = naive_product(w, moment, rank)
                budget -= rank * sum(w.shape)
                weights[at, g, name], products[at, g, name] = w, product
                for i, row in enumerate(w - product):
                    score = row @ moment @ row / (len(row) if by_cost else 1)
                    scored.append((score, (at, g, name), i, len(row)))
    rows = {key: [] for key in weights}
    for _, key, i, cost in sorted(scored, key=lambda s: -s[0]):
        if cost <= budget:
            budget -= cost
            rows[key].append(i)
    for key, places in rows.items():
        products[key][places] = weights[key][places]
    return products, {key: sorted(places) for key, places in rows.items()}, budget


def flat(made):
    return {(at, g, m): f for at, layer in enumerate(made) for g, e in enumerate(layer) for m, f in e.items()}


# --- one matrix


def factor(weight, moment, rank, rows=0):
    """A product of that rank, and the most important rows of what it lacks."""
    a, b, importance = low_rank(weight, torch.linalg.cholesky(moment), rank)
    best = torch.argsort(importance, descending=True, stable=True)[:rows].sort().values
    return Factors(a, b, best, (weight - a @ b)[best])


@pytest.mark.parametrize("ridge", [1e-3, 0.0, 0.7])
def test_second_moment(ridge):
    x = normal(40, 6) + 1
    np.testing.assert_allclose(second_moment(x, ridge).numpy(), naive_moment(x, ridge), rtol=1e-12)
    np.testing.assert_allclose(
        second_moment(x.bfloat16(), ridge).numpy(), naive_moment(x.bfloat16(), ridge), rtol=1e-12
    )


def test_second_moment_defaults_and_nothing_to_see():
    x = normal(3, 6)  # fewer tokens than inputs: without a ridge, it would be singular
    np.testing.assert_allclose(second_moment(x).numpy(), naive_moment(x, 1e-3), rtol=1e-12)
    assert np.linalg.eigvalsh(second_moment(x).numpy()).min() > 1e-4
    for nothing in (torch.zeros(0, 4), torch.zeros(9, 4)):
        assert torch.equal(second_moment(nothing), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (6, 6)])
@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_error_is_the_tail_of_the_whitened_singular_values(shape, rank):
    w, moment = normal(*shape, seed=1), random_moment(shape[1])
    found = factor(w, moment, rank)
    assert found.A.shape == (shape[0], rank)
    assert found.B.shape == (rank, shape[1])
    assert found.S.shape == (0, shape[1])
    assert found.rows.dtype == torch.int64
    residual = (w - found.A @ found.B).numpy()
    tail = np.linalg.svd(w.numpy() @ naive_root(moment.numpy()), compute_uv=False)[rank:]
    np.testing.assert_allclose(
        np.trace(residual @ moment.numpy() @ residual.T), (tail**2).sum(), rtol=1e-9, atol=1e-18
    )
    np.testing.assert_allclose(
        found.dense().numpy(), naive_product(w.numpy(), moment.numpy(), rank), atol=1e-9
    )


def test_no_other_product_of_that_rank_is_nearer():
    w, moment, rank = normal(9, 7, seed=2).numpy(), random_moment(7).numpy(), 2
    found = factor(torch.from_numpy(w), torch.from_numpy(moment), rank)

    def error(product):
        return np.trace((w - product) @ moment @ (w - product).T)

    best = error(found.dense().numpy())
    u, s, v = np.linalg.svd(w, full_matrices=False)
    assert error(u[:, :rank] * s[:rank] @ v[:rank]) > 1.05 * best
    rng = np.random.default_rng(0)
    for _ in range(
        5
    ):  # least squares, one side at a time, from anywhere: comes down to the same error and not below
        b = rng.normal(size=(rank, 7))
        for _ in range(3000):
            a = w @ moment @ b.T @ np.linalg.inv(b @ moment @ b.T)
            b = np.linalg.lstsq(a, w, rcond=None)[0]
            assert error(a @ b) >= best * (1 - 1e-9)
        np.testing.assert_allclose(error(a @ b), best, rtol=1e-3)


def test_halves_are_balanced_and_signs_fixed():
    w, moment = normal(10, 8, seed=3), random_moment(8)
    found = factor(w, moment, 5)
    sigma = np.linalg.svd(w.numpy() @ naive_root(moment.numpy()), compute_uv=False)[:5]
    np.testing.assert_allclose((found.A.T @ found.A).numpy(), np.diag(sigma), atol=1e-9)
    np.testing.assert_allclose((found.B @ moment @ found.B.T).numpy(), np.diag(sigma), atol=1e-9)
    for column in found.A.T.tolist():
        assert max(column, key=abs) > 0
    negated = factor(-w, moment, 5)
    torch.testing.assert_close(negated.A, found.A)
    torch.testing.assert_close(negated.B, -found.B)


@pytest.mark.parametrize("count", [0, 1, 4, 10])
def test_rows_kept_are_the_most_important_ones_and_exact(count):
    w, moment = normal(10, 8, seed=4), random_moment(8)
    found, bare = factor(w, moment, 2, rows=count), factor(w, moment, 2)
    assert torch.equal(found.A, bare.A)
    assert torch.equal(found.B, bare.B)
    residual = w - bare.A @ bare.B
    worth = [float(row @ moment @ row) for row in residual]
    assert found.rows.tolist() == sorted(sorted(range(10), key=lambda i: -worth[i])[:count])
    assert torch.equal(found.S, residual[found.rows])
    others = [i for i in range(10) if i not in found.rows]
    torch.testing.assert_close(found.dense()[found.rows], w[found.rows], rtol=0, atol=1e-12)
    assert torch.equal(found.dense()[others], bare.dense()[others])
    assert found.numbers == 2 * 18 + 8 * count
    assert found.dense().shape == (10, 8)
    plain = sorted(sorted(range(10), key=lambda i: -residual[i].square().sum())[:count])
    assert count != 4 or found.rows.tolist() != plain  # M decides, not the size of the row alone


def test_equal_rows_go_to_the_first():
    w = torch.ones(6, 4, dtype=torch.float64)
    assert factor(w, torch.eye(4, dtype=torch.float64), 0, rows=3).rows.tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_full_rank_or_all_rows_give_the_matrix_back(shape):
    w, moment = normal(*shape, seed=5), random_moment(shape[1])
    torch.testing.assert_close(factor(w, moment, 7).dense(), w, rtol=0, atol=1e-10)
    assert torch.equal(factor(w, moment, 0, rows=shape[0]).dense(), w)
    torch.testing.assert_close(factor(w, moment, 3, rows=shape[0]).dense(), w, rtol=0, atol=1e-12)


# --- all layers


def uneven_layers():
    """Layers of different sizes, one without a gate, one expert without tokens; rows of 12, 9, 5 and 4."""
    first = random_layer(experts=3, hidden=12, width=5, seed=1)
    second = random_layer(experts=2, hidden=9, width=4, parts=1, seed=2, scale=0.8)
    first[1][1] = first[1][1][:0]
    return [first, second]


def count_weights(layers):
    return sum(e.up.numel() + e.down.numel() for experts, _, _ in layers for e in experts)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.83])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_layers_equal_the_naive_ones(share, rank):
    layers = uneven_layers()
    budget = int(Fraction(str(share)) * count_weights(layers))
    made = flat(compress(layers, share=share, rank=rank))
    dense, rows, left = naive_compress(layers, budget, rank)
    assert list(made) == list(dense)
    for key, factors in made.items():
        assert factors.A.dtype == factors.B.dtype == factors.S.dtype == torch.float64
        assert factors.A.shape[1] == rank
        assert factors.rows.tolist() == rows[key]
        np.testing.assert_allclose(factors.dense().numpy(), dense[key], atol=1e-9)
    assert sum(f.numbers for f in made.values()) == budget - left
    _, without_cost, _ = naive_compress(layers, budget, rank, by_cost=False)
    assert share == 0.5 or rows != without_cost  # rows of different lengths are compared by the number


def test_raw_importances_are_compared_over_layers():
    layers = [random_layer(seed=1), random_layer(seed=2, scale=100.0)]
    made = compress(layers, share=0.5, rank=0)
    assert sum(len(f.rows) for e in made[0] for f in e.values()) == 0
    assert sum(f.numbers for e in made[1] for f in e.values()) == sum(
        f.dense().numel() for e in made[1] for f in e.values()
    )


@pytest.mark.parametrize(("dtype", "ridge"), [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_low_precision_is_widened_first(dtype, ridge):
    layers = [random_layer(seed=3, hidden=11, dtype=dtype)]
    budget = int(Fraction("0.6") * count_weights(layers))
    dense, rows, _ = naive_compress(layers, budget, 1, ridge)
    for key, factors in flat(compress(layers, share=0.6, rank=1, ridge=ridge)).items():
        assert factors.rows.tolist() == rows[key]
        np.testing.assert_allclose(factors.dense().numpy(), dense[key], atol=1e-9)


@pytest.mark.parametrize("rank_share", [None, 0.25, 0.9])
def test_default_rank(rank_share):
    layers = [random_layer(experts=1, hidden=40, width=24), random_layer(experts=1, hidden=6, width=4)]
    given = {} if rank_share is None else {"rank_share": rank_share}
    made = flat(compress(layers, share=0.8, **given))
    for (at, _, _), factors in made.items():
        ideal = (rank_share or 0.5) * 0.8 * (960 / 64, 24 / 10)[at]
        assert factors.A.shape[1] == max(1, round(ideal))


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(
        st.tuples(*[st.integers(1, 9)] * 2, st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=3
    ),
    percent=st.integers(1, 100),
    rank=st.none() | st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_budget_is_kept_and_used(sizes, percent, rank, seed):
    layers = [
        random_layer(experts=e, hidden=d, width=i, parts=p, tokens=4, seed=seed + n)
        for n, (d, i, e, p) in enumerate(sizes)
    ]
    share, total = percent / 100, count_weights(layers)
    budget = percent * total // 100
    shapes = [w.shape for experts, _, _ in layers for e in experts for w in naive_matrices(e).values()]
    ranks = [max(1, round(0.5 * share * a * b / (a + b))) if rank is None else rank for a, b in shapes]
    products = sum(q * (a + b) for q, (a, b) in zip(ranks, shapes, strict=True))
    if products > budget or any(q > min(s) for q, s in zip(ranks, shapes, strict=True)):
        with pytest.raises(ValueError, match='"rank"'):
            compress(layers, share=share, rank=rank)
        return
    made = flat(compress(layers, share=share, rank=rank))
    assert [tuple(f.dense().shape) for f in made.values()] == shapes
    assert [f.A.shape[1] for f in made.values()] == ranks
    used = sum(f.A.numel() + f.B.numel() + f.S.numel() for f in made.values())
    assert used == sum(f.numbers for f in made.values())
    assert used <= budget
    left_out = [f.B.shape[1] for f in made.values() if len(f.rows) < len(f.A)]
    assert budget - used < min(left_out, default=1)


def test_a_budget_of_whole_numbers_is_not_rounded_away():
    made = flat(compress([random_layer(experts=1, hidden=1, width=50, parts=1)], share=0.29, rank=0))
    assert 0.29 * 100 < 29
    assert sum(f.numbers for f in made.values()) == 29


def test_ties_go_to_the_first():
    up = torch.ones(50, 2, 8)
    up[::3] = 2
    expert = Neurons(up, torch.ones(8, 50))
    made = flat(compress([([expert, expert], [torch.zeros(0, 8)] * 2, gated)], share=0.6, rank=0))
    # Of 1440 numbers, 68 · 8 go to the rows of twos. The others are worth 1 a number: 66 · 8 to the first
    # expert's gate and up, 7 · 50 to its down, of which no other row fits in the 18 left, and 2 · 8 to the
    # second expert's gate.
    twos, every = list(range(0, 50, 3)), list(range(50))
    assert [f.rows.tolist() for f in made.values()] == [
        every,
        every,
        list(range(7)),
        sorted([*twos, 1, 2]),
        twos,
        [],
    ]


def test_everything_is_kept_at_share_one_without_products():
    layers = uneven_layers()
    made = compress(layers, share=1, rank=0)
    for (experts, _, _), factors in zip(layers, made, strict=True):
        for expert, found in zip(experts, factors, strict=True):
            assert torch.equal(densified(expert, found).up, expert.up)
            assert torch.equal(densified(expert, found).down, expert.down)


def test_a_matrix_of_that_rank_is_given_back():
    experts = [
        Neurons((normal(20, 2, 3) @ normal(3, 24, seed=1)), normal(24, 3, seed=2) @ normal(3, 20, seed=3))
    ]
    factors = compress([(experts, [normal(50, 24, seed=4)], gated)], share=0.4, rank=3)[0][0]
    torch.testing.assert_close(densified(experts[0], factors).up, experts[0].up, rtol=0, atol=1e-10)
    torch.testing.assert_close(densified(experts[0], factors).down, experts[0].down, rtol=0, atol=1e-10)


def test_same_input_same_bytes_and_input_untouched():
    layers = uneven_layers()
    before = save(saved_layers(layers))
    first, second = (
        save(
            {
                f"{at}.{e}.{name}.{part}": getattr(factors, part)
                for at, layer in enumerate(compress(x, share=0.6))
                for e, matrices in enumerate(layer)
                for name, factors in matrices.items()
                for part in ("A", "B", "S", "rows")
            }
        )
        for x in (layers, uneven_layers())
    )
    assert first == second
    assert save(saved_layers(layers)) == before


def saved_layers(layers):
    return {
        f"{at}.{g}.{n}": t.contiguous()
        for at, (experts, tokens, _) in enumerate(layers)
        for g, (e, x) in enumerate(zip(experts, tokens, strict=True))
        for n, t in {"up": e.up, "down": e.down, "x": x}.items()
    }


# --- experts of models


def model_layers(model, tokens=40):
    """Experts of all layers neuron by neuron and as many random tokens for each, in float64."""
    layers = find_moe_layers(model)
    data = []
    for n, layer in enumerate(layers):
        neurons = [layer.neurons(e, torch.float64) for e in range(layer.num_experts)]
        data.append(
            (neurons, [normal(tokens, 32, seed=9 * n + e) for e in range(len(neurons))], layer.activate)
        )
    return layers, data


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_everything_kept_leaves_a_model_as_it_is(name):
    model, ids = tiny_model(name, torch.float64), torch.arange(60).reshape(3, 20)
    before = logits(model, ids)
    layers, data = model_layers(model)
    for layer, (neurons, tokens, _), factors in zip(
        layers, data, compress(data, share=1.0, rank=0), strict=True
    ):
        made = [densified(e, f) for e, f in zip(neurons, factors, strict=True)]
        for e, (expert, x) in enumerate(zip(made, tokens, strict=True)):
            hidden = layer.expert_hidden(e, x)
            torch.testing.assert_close(layer.activate(expert, x), hidden, rtol=0, atol=1e-10)
            outputs = hidden @ expert.down.T + (0 if expert.offset is None else expert.offset)
            torch.testing.assert_close(outputs, layer.expert_output(e, hidden), rtol=0, atol=1e-10)
        replace_experts(layer, layer.stacked(made), list(range(len(made))))
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_half_kept_of_a_model_equals_the_naive_half(name):
    model = tiny_model(name, torch.float64)
    layers, data = model_layers(model)
    made = compress(data, share=0.5, rank=2)
    # The family's own forward for the activations, with its biases and in its own layout.
    own = [
        (
            experts,
            tokens,
            lambda neurons, x, layer=layer, experts=experts: layer.expert_hidden(
                position(neurons, experts), x
            ),
        )
        for layer, (experts, tokens, _) in zip(layers, data, strict=True)
    ]
    dense, rows, _ = naive_compress(own, count_weights(data) // 2, 2)
    for key, factors in flat(made).items():
        assert factors.rows.tolist() == rows[key]
        np.testing.assert_allclose(factors.dense().numpy(), dense[key], atol=1e-9)
    expert = densified(data[0][0][1], made[0][1])
    for q in range(2):
        np.testing.assert_allclose(expert.up[:, q].numpy(), dense[0, 1, f"up.{q}"], atol=1e-9)
    np.testing.assert_allclose(expert.down.numpy(), dense[0, 1, "down"], atol=1e-9)
    original = data[0][0][1]
    assert expert.bias is original.bias
    assert expert.offset is original.offset
    assert (expert.bias is not None) == (name == "gpt_oss")
    assert not torch.allclose(expert.up, original.up, atol=1e-2)


def position(neurons, experts):
    return next(e for e, other in enumerate(experts) if torch.equal(neurons.up, other.up))


def test_densified_is_in_the_dtype_of_the_expert():
    experts, tokens, activate = random_layer(dtype=torch.bfloat16)
    factors = compress([(experts, tokens, activate)], share=0.6, rank=1)[0][0]
    made = densified(experts[0], factors)
    assert made.up.dtype == made.down.dtype == torch.bfloat16
    assert torch.equal(made.down, factors["down"].dense().bfloat16())


def made_up(rank, rows, width=5, hidden=8):
    """An expert's factors with so many rows in gate, up and down."""
    shapes = {"up.0": (width, hidden), "up.1": (width, hidden), "down": (hidden, width)}
    return {
        m: Factors(torch.zeros(a, rank), torch.zeros(rank, b), torch.arange(n), torch.zeros(n, b))
        for (m, (a, b)), n in zip(shapes.items(), rows, strict=True)
    }


def test_stored_bytes_by_hand():
    # numbers stored: 3·13 + 2·8 + 3·5 = 70 with 5 rows; 3·13 + 5 = 44 with 1; 3·2·14 + 5·8 = 124 with 5
    experts = [made_up(1, (2, 0, 3)), made_up(1, (0, 0, 1)), made_up(2, (0, 5, 0), width=6)]
    assert stored_bytes(experts, torch.float32) == 4 * (70 + 44 + 124) + 8 * 11
    assert stored_bytes(experts[:2], torch.bfloat16) == 2 * 114 + 8 * 6


def test_stored_bytes_keep_to_the_share():
    layers = uneven_layers()
    total, numbers = count_weights(layers), 0
    for experts in compress(layers, share=0.6):
        rows = sum(len(f.rows) for matrices in experts for f in matrices.values())
        numbers += (stored_bytes(experts, torch.bfloat16) - 8 * rows) / 2
    assert 0.6 * total - 4 < numbers <= 0.6 * total


# --- errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        *(({"rank": q}, '"rank" argument must be a whole number from 0 to 5') for q in (-1, 6, 1.5, True)),
        ({"rank": 4}, '"rank" and "share" .* 312 numbers, and share 0.5 of 240 weights is 120'),
        ({"share": 0.01}, '"rank" and "share"'),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        compress([random_layer()], **{"share": 0.5} | wrong)
