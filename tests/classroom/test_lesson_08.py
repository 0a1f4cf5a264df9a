"""What lesson 08 says: the best update of each rank, LoRA beside it, its trainings and its searches."""

import numpy as np
import pytest

from minilora.classroom.exercises import examine
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.rank_sweep import IN, OUT, RANKS, best_updates, loss, sweep, task

lesson = lesson_module("08")


def test_the_planted_update_has_its_rank_and_its_size():
    for k in (1, 3, 8):
        values = np.linalg.svd(task(k, 10, 0.5, 0).update, compute_uv=False)

        np.testing.assert_allclose(values[:k], np.sqrt(OUT / k), rtol=1e-12)
        assert np.all(values[k:] < 1e-12)


@pytest.mark.parametrize("arguments", [(0, 10), (17, 10), (3, 0)])
def test_a_task_that_cannot_be_is_refused(arguments):
    with pytest.raises(ValueError, match="choose k from 1 to 16, and n of 1 or more"):
        task(*arguments, noise=0.5, seed=0)


@pytest.mark.parametrize("n", [20, 60, 400])  # fewer rows than features, and more
def test_no_other_update_of_that_rank_explains_the_rows_better(n):
    given, rng = task(3, n, 0.5, 0), np.random.default_rng(1)
    for r, update in best_updates(given.x, given.R).items():
        assert np.linalg.matrix_rank(update) <= r
        best = loss(given.x, given.R, update)
        for _ in range(20):
            U, s, Vt = np.linalg.svd(update + 0.05 * rng.normal(size=update.shape), full_matrices=False)
            assert loss(given.x, given.R, (U[:, :r] * s[:r]) @ Vt[:r]) >= best * (1 - 1e-9)


def test_a_lora_that_is_trained_for_long_ends_at_the_best_update():
    given = task(3, 60, 0.5, 0)
    best = best_updates(given.x, given.R)
    for r in (1, 3):
        A, B = lesson.trained_lora(3, 60, 0.5, r, 0)
        difference = np.linalg.norm(B @ A - best[r]) / np.linalg.norm(best[r])
        assert difference < 1e-3  # gradient descent of 3,000 steps stops that near


def test_on_trained_rows_every_rank_helps_and_on_unseen_ones_the_planted_rank_is_best():
    found = sweep(3, 60, 0.5)
    trained, unseen = lesson.means(found.trained), lesson.means(found.unseen)

    assert all(trained[r + 1] < trained[r] for r in RANKS[:-1])
    assert found.best == lesson.elbow(found.unseen) == 3
    assert all(unseen[r + 1] > unseen[r] for r in range(3, RANKS[-1]))


def test_without_noise_a_rank_too_many_costs_nothing():
    unseen = lesson.means(sweep(3, 60, 0.0).unseen)

    assert max(unseen[r] for r in RANKS if r >= 3) < 1e-20
    assert not lesson.overfits(3, 60, 0.0) and lesson.overfits(3, 60, 0.5)


def test_all_of_the_noise_that_the_full_rank_lets_in_is_what_least_squares_is_known_for():
    n, noise = 400, 0.5
    # of r = out all in · out numbers are free: the expected excess is σ² · in / (n − in − 1)
    excess = np.mean([
        loss(given.unseen_x, given.unseen_R, best_updates(given.x, given.R)[OUT]) - noise**2
        for given in (task(3, n, noise, seed) for seed in range(40))
    ])  # fmt: skip

    assert excess == pytest.approx(noise**2 * IN / (n - IN - 1), rel=0.15)  # 40 seeds of 2,000 rows


def test_another_search_passes_and_one_that_trains_too_much_does_not():
    def with_five_seeds(measure):
        return lesson.elbow({r: [measure(r, seed)[1] for seed in range(5)] for r in reversed(RANKS)})

    def twice(measure):
        return with_five_seeds(measure) if with_five_seeds(measure) else 0

    assert examine(lesson.RANK, with_five_seeds).passed
    failure = examine(lesson.RANK, twice).failure
    assert failure is not None and "called 120 times" in failure.returned


def test_two_mistakes_at_once_are_not_named_as_one():
    def largest_of_one_seed(measure):
        losses = {r: measure(r, 0)[0] for r in RANKS}
        return max(RANKS[1:], key=lambda r: losses[r - 1] - losses[r])

    failure = examine(lesson.RANK, largest_of_one_seed).failure

    assert failure is not None and failure.bug is None


def test_the_benchmarks_results_are_read_as_they_are():
    planted, real = lesson.planted_in_a_decoder(), lesson.real_sweep()

    assert {k: lesson.elbow(losses) for k, losses in planted.items()} == {k: k for k in planted}
    assert list(real) == [1, 2, 4, 8, 16, 32, 64] and all(len(losses) == 3 for losses in real.values())
    assert all(abs(lesson.mean_range({0: losses})) > 0 for losses in real.values())  # seeds differ
