"""The numbers behind lesson 02: cuts and their tails, where factors break even, and a change that was trained."""

import numpy as np
import pytest

from minilora.classroom import small_network as small
from minilora.classroom.exercises import examine
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.copies import copies, copy_errors
from minilora.classroom.pictures.energy import energy_curves, energy_held
from minilora.classroom.pictures.low_rank import Cut, break_even_rank, low_rank, planted_change
from minilora.classroom.plots import png
from minilora.numpy_lora import effective_rank, truncated_svd

COPY, EFFECTIVE, BREAK_EVEN = lesson_module("02").EXERCISES

# ------------------------------------------------------------------------------------------------------- the picture


def test_without_noise_the_planted_spectrum_falls_by_the_decay():
    sigma = Cut(planted_change(0.5, 0.0), 1).sigma

    np.testing.assert_allclose(sigma[1:12] / sigma[:11], 0.5, rtol=1e-9)
    assert np.sum(sigma**2) == pytest.approx(1)


@pytest.mark.parametrize("noise", [0.0, 0.2, 1.0])
def test_the_error_that_is_measured_is_the_root_of_the_tail_that_is_read_off(noise: float):
    for r in (1, 3, 24):
        cut = Cut(planted_change(0.7, noise), r)

        assert cut.error == pytest.approx(np.sqrt(cut.tail), abs=1e-12)


def test_the_copy_is_the_sum_of_the_first_pieces_and_a_piece_has_its_singular_value_for_norm():
    cut = Cut(planted_change(0.7, 0.2), 3)
    pieces = [cut.piece(i) for i in (1, 2, 3)]

    np.testing.assert_allclose(sum(pieces), cut.copy, atol=1e-12)
    assert [np.linalg.norm(piece) for piece in pieces] == pytest.approx(cut.sigma[:3])


def test_noise_of_the_change_s_own_size_holds_half_of_the_energy():
    """M is planted + carpet with equal norms in random directions, so ‖planted‖² / ‖M‖² is near a half."""
    clean, noisy = planted_change(0.3, 0.0), planted_change(0.3, 1.0)
    along = np.sum(clean * noisy)

    assert along**2 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("sides", "r"), [((24, 36), 14.4), ((4096, 4096), 2048.0), ((1024, 4096), 819.2)])
def test_at_break_even_the_factors_are_as_large_as_the_matrix(sides: tuple[int, int], r: float):
    assert break_even_rank(*sides) == pytest.approx(r)
    assert r * sum(sides) == pytest.approx(sides[0] * sides[1])


def test_the_energy_held_by_k_pieces_is_what_a_copy_of_rank_k_holds():
    M = planted_change(0.7, 0.2)
    held = energy_held(M)

    assert [1 - held[r - 1] for r in (1, 5, 20)] == pytest.approx([Cut(M, r).tail for r in (1, 5, 20)])
    assert held[-1] == pytest.approx(1)


def test_no_recipe_for_a_copy_is_nearer_than_the_best_and_each_patient_is_ill_in_its_own_way():
    M = planted_change(0.7, 0.2).T  # 36 × 24: taller than wide, so that Vt is square
    best = copy_errors(truncated_svd, M)
    sick = {name: copy_errors(recipe, M) for name, recipe in lesson_module("02").patients().items()}

    assert all(error >= floor - 1e-12 for errors in sick.values() for error, floor in zip(errors, best, strict=True))
    assert sick["1"][15] > 0.95 and sick["1"][-1] < 1e-12  # the smallest pieces: nothing until the end
    assert best[7] < 0.2 < 0.8 < sick["2"][7] and sick["2"][-1] < 1e-12  # columns: exact at full rank
    assert all(1.2 < error < 1.6 for error in sick["3"])  # wrong directions of the right size: about √2
    assert sick["4"][0] < 0.8 and sick["4"][-1] > 3  # pieces at full volume


# ------------------------------------------------------------------------------------------------- the small network


def test_the_gradients_agree_with_central_differences():
    """The loss is smooth: the difference is off by h²/6 of its third derivative, below 1e-9 for h = 1e-5."""
    rng = np.random.default_rng(0)
    weights, x, h = small.random_network(rng), rng.normal(size=(5, small.INPUTS)), 1e-5
    wanted = rng.normal(size=(5, small.OUTPUTS))
    for layer, gradient in enumerate(small.gradients(weights, x, wanted)):
        for at in [(0, 0), (3, 7), (15, 63)]:
            losses = []
            for sign in (1, -1):
                moved = [W.copy() for W in weights]
                moved[layer][at] += sign * h
                losses.append(small.loss_of((moved[0], moved[1]), lambda _: wanted, x))
            assert gradient[at] == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-6, abs=1e-9)


def test_one_row_gives_a_gradient_of_rank_one():
    rng = np.random.default_rng(0)
    weights = small.random_network(rng)
    for rows in (1, 3):
        x, wanted = rng.normal(size=(rows, small.INPUTS)), rng.normal(size=(rows, small.OUTPUTS))
        assert [np.linalg.matrix_rank(each) for each in small.gradients(weights, x, wanted)] == [rows, rows]


def test_along_directions_the_weights_move_in_their_span_only():
    rng = np.random.default_rng(0)
    start, directions = small.random_network(rng), rng.normal(size=(small.N_WEIGHTS, 3))
    moved = small.train(start, small.narrow, 5, rng, directions / np.linalg.norm(directions, axis=0))
    step = np.concatenate([(W - before).ravel() for W, before in zip(moved, start, strict=True)])
    inside = directions @ np.linalg.lstsq(directions, step, rcond=None)[0]

    assert np.linalg.norm(step) > 1e-3
    np.testing.assert_allclose(inside, step, atol=1e-10)


def test_a_narrow_change_is_a_few_pieces_and_a_wide_one_and_the_weight_are_not():
    """All of full rank; at 90 % of the energy fewer than a tenth of 64 pieces, against more than a third."""
    narrow, wide, weight = small.change("narrow"), small.change("wide"), small.pretrained()[0]

    assert [np.linalg.matrix_rank(M) for M in (narrow, wide, weight)] == [64, 64, 64]
    assert effective_rank(narrow, 0.9) <= 6
    assert effective_rank(wide, 0.9) > 21 and effective_rank(weight, 0.9) > 21


def test_208_numbers_as_factors_do_more_than_800_along_random_directions():
    pairs = [
        truncated_svd(after - W, 1) for W, after in zip(small.pretrained(), small.fine_tuned("narrow"), strict=True)
    ]
    W1, W2 = (W + B @ A for W, (B, A) in zip(small.pretrained(), pairs, strict=True))

    assert sum(B.size + A.size for B, A in pairs) == 208
    assert small.improvement((W1, W2)) > 0.85 > small.improvement(small.in_random_directions(800))


def test_what_is_measured_begins_at_nothing_and_ends_at_all():
    assert small.improvement(small.pretrained()) == 0
    assert small.improvement(small.fine_tuned("narrow")) == 1
    assert small.right_answers(small.pretrained()) == 0  # it says nothing along b, and 0 has no sign
    assert small.right_answers(small.fine_tuned("narrow")) > 0.98


# -------------------------------------------------------------------------------------------------------- the graders


def test_answers_of_another_build_pass():
    def eigenvectors(M, r):
        values, V = np.linalg.eigh(M.T @ M)
        A = V[:, np.argsort(values)[::-1][:r]].T
        return M @ A.T, A

    def in_float32(M, r):
        U, s, Vt = np.linalg.svd(M.astype(np.float32), full_matrices=False)
        return [U[:, :r], s[:r, None] * Vt[:r]]

    def alternating(M, r):
        A = np.random.default_rng(0).normal(size=(r, M.shape[1]))
        for _ in range(200):
            B = M @ np.linalg.pinv(A)
            A = np.linalg.pinv(B) @ M
        return B, A

    def by_a_loop(M, energy):
        left, k = energy * np.linalg.norm(M) ** 2, 0
        for value in np.linalg.svd(M, compute_uv=False):
            left, k = left - value**2, k + 1
            if left <= 1e-12:
                return k
        return k

    def by_eigenvalues(M, energy):
        values = np.sort(np.linalg.eigvalsh(M @ M.T))[::-1]
        return np.searchsorted(np.cumsum(values) / np.trace(M @ M.T), energy - 1e-12) + 1

    for answer in (eigenvectors, in_float32, alternating):
        assert examine(COPY, answer).passed, examine(COPY, answer).message
    for answer in (by_a_loop, by_eigenvalues):
        assert examine(EFFECTIVE, answer).passed, examine(EFFECTIVE, answer).message
    assert examine(BREAK_EVEN, lambda d, k: 1 / (1 / d + 1 / k)).passed


def test_pieces_that_no_competitor_beats_are_still_not_the_best():
    """Pieces 1, 2 and 4 are a standstill: neither factor alone can be bettered. Only the tail tells."""

    def third_for_fourth(M, r):
        U, s, Vt = np.linalg.svd(M, full_matrices=False)
        kept = [*range(r - 1), r]
        return U[:, kept] * s[kept], Vt[kept]

    failure = examine(COPY, third_for_fourth).failure

    assert failure is not None and failure.bug is None
    assert failure.tested.startswith("its error is the tail") and "the tail is" in failure.returned


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda M, r: None, "None"),
        (lambda M, r: np.zeros(M.shape), r"one ndarray of shape \(9, 6\)"),
        (lambda M, r: (np.zeros(M.shape), np.eye(6)), r"shapes \(9, 6\) and \(6, 6\)"),
        (lambda M, r: (np.zeros(9), np.zeros(6)), r"shapes \(9,\) and \(6,\)"),
    ],
)
def test_what_is_no_pair_of_factors_is_told_in_shapes(answer, told: str):
    with pytest.raises(AssertionError, match=told):
        assert examine(COPY, answer).passed, examine(COPY, answer).message


def test_two_mistakes_at_once_are_not_named_as_one():
    def smallest_and_unweighed(M, r):
        U, _, Vt = np.linalg.svd(M, full_matrices=False)
        return U[:, -r:], Vt[-r:]

    def values_and_index(M, energy):
        values = np.linalg.svd(M, compute_uv=False)
        return int(np.argmax(np.cumsum(values) / values.sum() >= energy))

    for exercise, answer in ((COPY, smallest_and_unweighed), (EFFECTIVE, values_and_index)):
        failure = examine(exercise, answer).failure
        assert failure is not None and failure.bug is None


# -------------------------------------------------------------------------------------------------------- the figures


def test_the_figures_are_the_same_bytes_each_time():
    M = planted_change(0.5, 0.05)
    errors = copy_errors(truncated_svd, M)
    draw = [
        lambda: low_rank(Cut(M, 2)),
        lambda: energy_curves({"one": {"M": energy_held(M)}, "two": {"M": energy_held(M)}}),
        lambda: copies(errors, {"1": errors, "2": [1.0] * 24}),
    ]

    assert all(png(figure()) == png(figure()) for figure in draw)
