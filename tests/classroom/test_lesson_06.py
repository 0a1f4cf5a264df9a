"""What lesson 06 says: the first steps at every rank, the race of LoRA+, and which settings are one."""

import numpy as np
import pytest
import torch

from minilora.classroom.exercises import examine
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures import two_rates as race
from minilora.classroom.pictures.update_size import (
    IN,
    LR,
    RANKS,
    adam_direction,
    best_rate,
    by_rank,
    expected_first_step,
    slope,
    start,
    train,
)

lesson = lesson_module("06")


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_first_step_is_as_large_as_derived(optimizer, use_rslora):
    found = by_rank(8.0, optimizer, 1)[use_rslora]
    for r, share in zip(RANKS, found, strict=True):
        # 16 r draws of a row: (A v)² has a standard deviation of √2 of its mean, |A v| less
        error = 4 * np.sqrt(2 / (16 * r))
        assert share == pytest.approx(expected_first_step(r, 8.0, use_rslora, optimizer), rel=error)


def test_many_draws_meet_the_derivation_closely():
    begin = start(8, draws=2000)
    for optimizer in ("sgd", "adam"):
        run = train(begin, 1.0, lr_A=LR[optimizer], lr_B=LR[optimizer], steps=1, optimizer=optimizer)
        expected = expected_first_step(8, 8.0, False, optimizer)
        # 16,000 rows, 4 standard errors for SGD; Adam's constant is over 16 draws of P
        assert run.learned[1] == pytest.approx(expected, rel=0.05)


def test_each_scaling_keeps_the_first_step_of_one_optimizer():
    powers = {name: [slope(values) for values in by_rank(8.0, name, 1).values()] for name in ("sgd", "adam")}

    np.testing.assert_allclose(powers["sgd"], [-1, 0], atol=0.15)
    np.testing.assert_allclose(powers["adam"], [0, 0.5], atol=0.15)
    assert slope([3.0 * r**2 for r in RANKS]) == pytest.approx(2)


def test_a_training_is_torchs():
    begin = start(4, n_in=12, draws=1)
    for optimizer, make in {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}.items():
        P, A = (torch.from_numpy(array[0].copy()) for array in (begin.P, begin.A))
        A.requires_grad_(True)
        B = torch.zeros(len(P), 4, dtype=torch.float64, requires_grad=True)
        steps = make([{"params": [A], "lr": 0.01}, {"params": [B], "lr": 0.04}])
        losses = []
        for _ in range(8):
            loss = 0.5 * (2 * B @ A - P).square().sum()
            losses.append(loss.item())
            steps.zero_grad()
            loss.backward()
            steps.step()

        run = train(begin, 2.0, lr_A=0.01, lr_B=0.04, steps=7, optimizer=optimizer)
        np.testing.assert_allclose(run.loss, losses, rtol=1e-10)


def test_adams_first_direction_is_the_sign():
    g = np.array([3.0, -0.01, 0.0])
    np.testing.assert_allclose(adam_direction(g, np.zeros(3), np.zeros(3), 1), [1, -1, 0], atol=1e-5)


def test_what_runs_away_ends_as_nan():
    run = train(start(1), 32.0, lr_A=1.0, lr_B=1.0, steps=20, optimizer="sgd")

    assert run.loss[0] == pytest.approx(0.5) and np.isnan(run.loss[-1]) and np.isnan(run.learned[-1])


def test_with_sgd_alpha_over_r_needs_another_rate_at_every_rank():
    rates = {rs: [best_rate(r, rs, "sgd", 30) for r in (1, 64)] for rs in (False, True)}

    assert rates[False][1] / rates[False][0] == 64 and rates[True][1] / rates[True][0] <= 8


def test_loraplus_wins_at_one_rate_and_not_at_the_best_ones():
    same, best = ({k: race.steps_to_goal(c) for k, c in curves.items()} for curves in race.races().values())

    assert same[16] < same[1] < np.inf
    assert best[1] < best[16] < best[64]
    assert min(race.RATES) < race.best_rate_of(64) and race.best_rate_of(1) < max(race.RATES)  # not at the grid's ends


def test_the_rule_for_the_first_step_is_what_torch_does():
    for seed in range(5):
        settings = lesson.six_settings(np.random.default_rng(seed))["settings"]

        assert lesson.same_first_step(settings) == lesson.by_running(settings)
        assert len(set(lesson.by_running(settings))) == 3


def test_gradient_steps_move_only_b_first():
    begin = start(8)
    run = train(begin, 1.0, lr_A=1e9, lr_B=0.01, steps=1, optimizer="sgd")  # A's rate does not matter yet

    want = np.mean([np.vdot(P, 0.01 * P @ A.T @ A) for P, A in zip(begin.P, begin.A, strict=True)])
    assert run.learned[1] == pytest.approx(want)
    assert begin.A.shape[2] == IN


def test_groups_may_come_in_any_form_that_torch_takes():
    """A parameter alone as `params`, and groups that are yielded."""

    def one_by_one(model, **rates):
        for group in lesson.GROUPS.reference(model, **rates):
            for p in group["params"]:
                yield group | {"params": p}

    assert examine(lesson.GROUPS, one_by_one).failure is None
    torch.optim.AdamW(one_by_one(lesson.adapted_model(), lr=0.01))


@pytest.mark.parametrize("row", [tuple, np.array])
def test_indices_may_come_in_any_row(row):
    assert examine(lesson.SAME, lambda settings: row(lesson.same_first_step(settings))).passed


def test_a_wrong_index_is_told_by_its_setting():
    message = examine(lesson.SAME, lambda settings: list(range(len(settings)))).message

    assert "setting 1: returned 'as setting 1', expected 'as setting 0'" in message
