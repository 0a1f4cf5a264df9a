"""The array that logs what is made with it."""

from collections.abc import Callable

import numpy as np
import pytest

from minilora.classroom.costs import BypassCost
from minilora.classroom.instrumented import InstrumentedArray, watch
from minilora.numpy_lora.forward import lora_backward, lora_forward


def shapes() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in ((5, 12), (7, 12), (3, 12), (7, 3))]


@pytest.mark.parametrize(
    "forming",
    [
        lambda A, B: B @ A,
        lambda A, B: np.matmul(B, A),
        lambda A, B: np.dot(B, A),
        lambda A, B: B.dot(A),
        lambda A, B: np.einsum("or,ri->oi", B, A),
        lambda A, B: np.einsum("or,ri->io", B, A),
        lambda A, B: np.tensordot(B, A, axes=1),
        lambda A, B: np.linalg.multi_dot([B, A]),
        lambda A, B: A.T @ B.T,
        lambda A, B: sum(np.outer(B[:, k], A[k]) for k in range(3)),
        lambda A, B: (B[:, :, None] * A[None]).sum(axis=1),
        lambda A, B: np.concatenate([B[:1] @ A] * 7),
    ],
)
def test_a_formed_product_is_seen_however_it_is_written(forming: Callable):
    (_, _, A, B), log = watch(*shapes())
    forming(A, B)

    assert log.forms(7, 12) is not None


def test_the_way_through_the_bottleneck_forms_nothing():
    (x, W, A, B), log = watch(*shapes())
    lora_forward(x, W, A, B, 8.0)
    lora_backward(x @ W.T, x, W, A, B, 8.0)

    assert log.forms(7, 12) is None
    assert log.largest == (5, 12)  # dx


def test_views_and_transposes_allocate_nothing():
    (x, W, _, _), log = watch(*shapes())
    x.T, W[:3], x.reshape(-1)

    assert log.allocated == []


def test_results_are_the_plain_ones():
    (x, W, A, B), _ = watch(*shapes())
    plain = shapes()

    assert isinstance(lora_forward(x, W, A, B, 8.0), InstrumentedArray)
    assert np.array_equal(lora_forward(x, W, A, B, 8.0), lora_forward(*plain, 8.0))
    assert float(np.sum(x)) == float(np.sum(plain[0]))


def test_writing_into_an_array_is_passed_through():
    (x, *_), log = watch(*shapes())
    before = np.array(x)
    x += 1

    assert np.array_equal(x, before + 1) and log.allocated == []


def test_products_of_each_kind_are_counted():
    (x, W, A, _), log = watch(*shapes())
    x @ A.T
    np.dot(x, A.T)
    np.inner(x, A)
    np.outer(x[0], W[0])
    x @ W[0]

    assert log.multiplications == 3 * (5 * 12 * 3) + 12 * 12 + 5 * 12


@pytest.mark.parametrize(("rows", "d_in", "d_out", "r"), [(1, 64, 64, 8), (5, 12, 7, 3), (32, 8, 40, 40)])
def test_the_costs_of_the_two_bracketings_are_those_that_are_counted(rows: int, d_in: int, d_out: int, r: int):
    cost = BypassCost(rows=rows, in_features=d_in, out_features=d_out, r=r)
    (x, W, A, B), log = watch(*(np.ones(shape) for shape in ((rows, d_in), (d_out, d_in), (r, d_in), (d_out, r))))
    counts = []
    for product in (lambda: x @ W.T, lambda: (x @ A.T) @ B.T, lambda: x @ (B @ A).T):
        before = log.multiplications
        product()
        counts.append(log.multiplications - before)

    assert counts == [cost.highway, cost.through_bottleneck, cost.formed_first]
    assert cost.scratch_bytes(formed=True, itemsize=8) == (B @ A).nbytes
    assert cost.scratch_bytes(formed=False, itemsize=8) == (x @ A.T).nbytes
    assert cost.trainable == A.size + B.size
    assert cost.share == (A.size + B.size) / W.size


def test_forming_the_product_wins_only_where_r_is_above_half_the_width():
    many_rows = {r: BypassCost(rows=10**6, in_features=512, out_features=512, r=r).ratio for r in (255, 257)}

    assert many_rows[255] > 1 > many_rows[257]
