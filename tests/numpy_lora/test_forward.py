"""Layer 1 against itself: central differences, and what merging promises. (test_layers_agree has torch as oracle.)"""

import subprocess
import sys

import numpy as np
import pytest

from minilora.numpy_lora import delta_weight, lora_backward, lora_forward, lora_init, merge, unmerge

ALPHA = 6.0


@pytest.fixture
def generic():
    """Arrays that hide no mistake: in ≠ out, r ≠ alpha, B ≠ 0, W not symmetric."""
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(2, 3, 5)), rng.normal(size=(4, 5))
    A, B = rng.normal(size=(2, 5)), rng.normal(size=(4, 2))
    return x, W, A, B


def test_a_new_adapter_changes_nothing():
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    A, B = lora_init(2, 5, 4, rng)

    assert np.array_equal(lora_forward(x, W, A, B, ALPHA), x @ W.T)


def test_a_is_drawn_evenly_between_plus_and_minus_one_over_root_in():
    A, _ = lora_init(64, 400, 4, np.random.default_rng(0))
    bound = 1 / np.sqrt(400)

    assert np.abs(A).max() <= bound
    # the mean square of U(−b, b) is b²/3; over 25,600 draws its relative standard error is 0.56 %; five of these
    assert np.mean(A**2) == pytest.approx(bound**2 / 3, rel=0.028)


@pytest.mark.parametrize("which", ["x", "A", "B"])
def test_each_gradient_equals_central_differences(generic, which):
    x, W, A, B = generic
    arrays = {"x": x, "A": A, "B": B}
    dy = np.random.default_rng(1).normal(size=(2, 3, 4))
    by_hand = dict(zip(("x", "A", "B"), lora_backward(dy, x, W, A, B, ALPHA), strict=True))[which]

    def loss(entry: tuple[int, ...], step: float) -> float:
        moved = {name: array.copy() for name, array in arrays.items()}
        moved[which][entry] += step
        return float(np.sum(dy * lora_forward(moved["x"], W, moved["A"], moved["B"], ALPHA)))

    # The loss is linear in each array alone, so central differences have rounding error only: about 1e-16 · |loss| / h.
    h = 1e-4
    for entry in np.ndindex(arrays[which].shape):
        numeric = (loss(entry, h) - loss(entry, -h)) / (2 * h)
        assert by_hand[entry] == pytest.approx(numeric, abs=1e-9)


def test_at_the_start_only_b_has_a_gradient():
    rng = np.random.default_rng(0)
    x, W, dy = rng.normal(size=(3, 5)), rng.normal(size=(4, 5)), rng.normal(size=(3, 4))
    A, B = lora_init(2, 5, 4, rng)
    _, dA, dB = lora_backward(dy, x, W, A, B, ALPHA)

    assert not dA.any()
    assert dB.all()


def test_a_merged_weight_gives_the_same_output(generic):
    x, W, A, B = generic

    np.testing.assert_allclose(x @ merge(W, A, B, ALPHA).T, lora_forward(x, W, A, B, ALPHA), rtol=0, atol=1e-13)


def test_unmerging_restores_the_weight_up_to_two_roundings(generic):
    _, W, A, B = generic
    merged = merge(W, A, B, ALPHA)
    largest = np.maximum(np.abs(merged), np.abs(W))

    assert np.all(np.abs(unmerge(merged, A, B, ALPHA) - W) <= np.spacing(largest))


def test_the_update_has_at_most_rank_r(generic):
    _, _, A, B = generic

    assert np.linalg.matrix_rank(delta_weight(A, B, ALPHA)) == 2


@pytest.mark.parametrize("sizes", [(0, 5, 4), (-1, 5, 4), (2, 0, 4), (2, 5, -3)])
def test_an_impossible_size_is_named(sizes):
    with pytest.raises(ValueError, match=r"(r|in_features|out_features) is (0|-1|-3): .* must be 1 or more"):
        lora_init(*sizes, np.random.default_rng(0))


def test_merging_an_update_with_nan_is_refused_and_says_where(generic):
    _, W, A, B = generic
    B[3, 1] = np.nan

    with pytest.raises(ValueError, match=r"B holds 1 values that are NaN or infinite, the first at \(3, 1\)"):
        merge(W, A, B, ALPHA)


def test_layer_1_runs_where_torch_cannot_be_imported():
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import minilora.numpy_lora.nf4, minilora.numpy_lora\n"
        "print([m for m in ('numba', 'safetensors', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert (run.returncode, run.stdout.strip()) == (0, "[]"), run.stderr
