"""Truncation is the best one, effective rank counts what matters, and similarity is that of the LoRA paper."""

import numpy as np
import pytest

from minilora.numpy_lora import effective_rank, subspace_similarity, truncated_svd

RNG = np.random.default_rng(0)
M = RNG.normal(size=(7, 5))
SIGMA = np.linalg.svd(M, compute_uv=False)


@pytest.mark.parametrize("r", [1, 2, 3, 4, 5])
def test_the_error_of_a_truncation_is_the_tail_of_the_spectrum(r):
    B, A = truncated_svd(M, r)

    assert (B.shape, A.shape) == ((7, r), (r, 5))
    assert np.sum((M - B @ A) ** 2) == pytest.approx(np.sum(SIGMA[r:] ** 2), abs=1e-12)


def test_no_other_matrix_of_that_rank_is_nearer():
    B, A = truncated_svd(M, 2)
    best = np.linalg.norm(M - B @ A)
    near = [np.linalg.norm(M - (B + 0.01 * RNG.normal(size=B.shape)) @ A) for _ in range(50)]
    far = [np.linalg.norm(M - RNG.normal(size=(7, 2)) @ RNG.normal(size=(2, 5))) for _ in range(50)]

    assert min(near + far) > best


@pytest.mark.parametrize("r", [0, -1, 6])
def test_an_impossible_rank_is_refused_with_the_possible_ones(r):
    with pytest.raises(ValueError, match=rf"r is {r}: a matrix of shape \(7, 5\) has ranks 1 to 5"):
        truncated_svd(M, r)


def test_the_effective_rank_of_a_planted_update_is_the_planted_rank():
    planted = RNG.normal(size=(40, 3)) @ RNG.normal(size=(3, 30))

    assert effective_rank(planted, energy=1.0) == 3
    assert effective_rank(planted + 1e-4 * RNG.normal(size=(40, 30)), energy=0.999) == 3


def test_the_effective_rank_grows_with_the_energy_asked_for():
    ranks = [effective_rank(M, energy) for energy in (0.1, 0.5, 0.9, 0.99, 1.0)]

    assert ranks == sorted(ranks)
    assert ranks[-1] == 5


def test_the_zero_matrix_has_effective_rank_zero():
    assert effective_rank(np.zeros((3, 4))) == 0


@pytest.mark.parametrize("energy", [0.0, -0.5, 1.5, float("nan")])
def test_an_impossible_energy_is_refused(energy):
    with pytest.raises(ValueError, match=r"energy is .* above 0 and at most 1"):
        effective_rank(M, energy)


def test_similarity_is_one_for_the_same_span_and_zero_for_orthogonal_ones():
    A = RNG.normal(size=(3, 12))
    mixed = RNG.normal(size=(3, 3)) @ A  # another basis of the same span
    Q = np.linalg.qr(RNG.normal(size=(12, 12)))[0].T

    assert subspace_similarity(A, mixed, 3, 3) == pytest.approx(1)
    assert subspace_similarity(Q[:4], Q[4:9], 4, 5) == pytest.approx(0, abs=1e-15)


def test_a_subspace_of_the_other_is_wholly_similar_whichever_is_smaller():
    A = RNG.normal(size=(5, 12))

    assert subspace_similarity(A, A, 2, 4) == pytest.approx(1)
    assert subspace_similarity(A, A, 4, 2) == pytest.approx(1)


def test_similarity_is_symmetric_and_bounded():
    A1, A2 = RNG.normal(size=(4, 9)), RNG.normal(size=(6, 9))
    values = [subspace_similarity(A1, A2, i, j) for i in range(1, 5) for j in range(1, 7)]

    assert values == pytest.approx([subspace_similarity(A2, A1, j, i) for i in range(1, 5) for j in range(1, 7)])
    assert min(values) >= 0
    assert max(values) <= 1 + 1e-12


def test_more_directions_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"j is 4: its matrix has shape \(3, 9\), so choose 1 to 3"):
        subspace_similarity(RNG.normal(size=(4, 9)), RNG.normal(size=(3, 9)), 2, 4)
