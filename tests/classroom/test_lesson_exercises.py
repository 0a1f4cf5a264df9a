"""The grader is graded: every exercise of every lesson, with every mistake that it knows."""

import doctest
from pathlib import Path

import numpy as np
import pytest

from minilora.classroom.exercises import Exercise, examine
from minilora.classroom.lessons import lesson_module, lessons_folder

LESSONS = sorted(path.parent.name for path in lessons_folder().glob("[0-9][0-9]_*/exercises.py"))
FULL_LESSONS = [
    lesson for lesson in LESSONS if not lesson.startswith("00")
]  # notebook 00 is a welcome: no parts, no quiz
EXERCISES = [exercise for lesson in LESSONS for exercise in lesson_module(lesson[:2]).EXERCISES]
BUGS = [(exercise, bug.name) for exercise in EXERCISES for bug in exercise.bugs]
GRADER_SEEDS = (101, 202)  # a grader's inputs are others than the learner's


def stub(*inputs): ...  # your code


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_the_reference_passes(exercise: Exercise):
    assert examine(exercise, exercise.reference).passed, examine(exercise, exercise.reference).message
    assert examine(exercise, exercise.reference, seeds=GRADER_SEEDS).passed


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_the_stub_is_not_started(exercise: Exercise):
    assert examine(exercise, stub).status == "not started"


@pytest.mark.parametrize(("exercise", "name"), BUGS, ids=[f"{exercise.id}-{name}" for exercise, name in BUGS])
def test_every_known_mistake_fails_under_its_own_name(exercise: Exercise, name: str):
    for seeds in ((0, 1, 2), GRADER_SEEDS):
        result = examine(exercise, exercise.bug(name), seeds=seeds)

        assert result.status == "failed"
        assert result.failure is not None and result.failure.bug is not None, result.message
        assert result.failure.bug.name == name


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_an_exercise_says_what_a_learner_needs_to_know(exercise: Exercise):
    assert len(exercise.hints) >= 2 and len(exercise.bugs) >= 3
    assert exercise.minutes > 0 and exercise.points > 0
    assert all(bug.why.endswith((".", "?")) for bug in exercise.bugs)
    assert len({bug.name for bug in exercise.bugs}) == len(exercise.bugs)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_inputs_repeat_from_a_seed_and_differ_between_seeds(exercise: Exercise):
    first, again, other = (exercise.generate(np.random.default_rng(seed)) for seed in (0, 0, 1))
    arrays = [name for name, value in first.items() if isinstance(value, np.ndarray) and value.any()]

    assert all(np.array_equal(first[name], again[name]) for name in arrays)
    assert not arrays or any(not np.array_equal(first[name], other[name]) for name in arrays)


def test_ids_begin_with_the_number_of_their_lesson_and_are_unique():
    for lesson in LESSONS:
        assert all(exercise.id.startswith(f"{lesson[:2]}.") for exercise in lesson_module(lesson[:2]).EXERCISES)
    assert len({exercise.id for exercise in EXERCISES}) == len(EXERCISES)


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_examples_in_the_docstrings_are_true(lesson: str):
    assert doctest.testmod(lesson_module(lesson[:2])).failed == 0


def test_answers_of_another_build_score_in_full_in_lesson_03():
    forward, backward, training = lesson_module("03").EXERCISES

    def einsum(x, W, A, B, alpha):
        down = np.einsum("...i,ri->...r", x, A)
        return np.einsum("...i,oi->...o", x, W) + alpha / A.shape[0] * np.einsum("...r,or->...o", down, B)

    def in_float32(x, W, A, B, alpha):
        x, W, A, B = (array.astype(np.float32) for array in (x, W, A, B))
        return x @ W.T + np.float32(alpha / len(A)) * ((x @ A.T) @ B.T)

    def row_by_row(dy, x, W, A, B, alpha):
        s, dA, dB = alpha / len(A), np.zeros_like(A), np.zeros_like(B)
        dx = np.zeros_like(x)
        for i in range(len(x)):
            du = s * (dy[i] @ B)
            dA += np.outer(du, x[i])
            dB += s * np.outer(dy[i], A @ x[i])
            dx[i] = dy[i] @ W + du @ A
        return [dx, dA, dB]

    def with_sums(batches, W, A, B, alpha, lr):
        A, B, s = A.copy(), B.copy(), alpha / len(A)
        for x, y in batches:
            error = x @ (W + s * B @ A).T - y
            for_A, for_B = s * B.T @ error.T @ x, s * error.T @ x @ A.T
            A -= lr / len(x) * for_A
            B -= lr / len(x) * for_B
        return [A, B]

    assert all(examine(forward, answer).passed for answer in (einsum, in_float32))
    assert examine(backward, row_by_row).passed
    assert examine(training, with_sums).passed


def test_steps_that_are_not_sgd_s_fail_although_they_find_the_update():
    training = lesson_module("03").TRAINING

    def alternating(batches, W, A, B, alpha, lr):
        s = alpha / len(A)
        for x, y in batches:
            for moves_B in (True, False):
                dy = (x @ W.T + s * (x @ A.T) @ B.T - y) / len(x)
                if moves_B:
                    B = B - lr * s * dy.T @ (x @ A.T)
                else:
                    A = A - lr * s * (dy @ B).T @ x
        return A, B

    failure = examine(training, alternating).failure

    assert failure is not None and failure.tested.startswith("each step is one of SGD")
    assert failure.returned.startswith("after five batches A is off by")


def test_two_mistakes_at_once_are_not_named_as_one_in_lesson_03():
    forward = lesson_module("03").FORWARD

    def no_highway_and_no_scaling(x, W, A, B, alpha):
        return (x @ A.T) @ B.T

    result = examine(forward, no_highway_and_no_scaling)

    assert result.failure is not None and result.failure.bug is None


@pytest.mark.parametrize("lesson", FULL_LESSONS)
def test_every_lesson_has_its_five_files_and_parts(lesson: str):
    folder = lessons_folder() / lesson
    instructor = (folder / "instructor.md").read_text(encoding="utf-8")

    assert {path.name for path in folder.iterdir() if path.is_file()} >= {
        "lesson.py",
        "exercises.py",
        "quiz.yml",
        "instructor.md",
    }
    for part in ("50 minutes", "80 minutes", "Misconceptions", "Live demo", "Discussion", "Rubric"):
        assert part in instructor, f"{lesson}/instructor.md has no part “{part}”"


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_minutes_on_the_card_are_the_sum_of_the_exercises(lesson: str):
    text = (lessons_folder() / lesson / "lesson.py").read_text(encoding="utf-8")
    minutes = sum(exercise.minutes for exercise in lesson_module(lesson[:2]).EXERCISES)

    assert f"exercises {minutes}" in text, f"{lesson}: the card must say “exercises {minutes}” among its minutes"


@pytest.mark.parametrize("lesson", FULL_LESSONS)
def test_every_lesson_has_its_parts_in_order(lesson: str):
    text = (lessons_folder() / lesson / "lesson.py").read_text(encoding="utf-8")
    parts = [
        "Warm-up", "The problem", "Predict", "The one picture", "Derivation", "Build it", "Run it", "Break it",
        "Check the claims", "Exercises", "The same in", "Interview questions", "Recap",
    ]  # fmt: skip
    positions = [text.find(f"# ## {number} · {part}") for number, part in enumerate(parts, start=1)]

    assert -1 not in positions, f"{lesson} lacks: {[p for p, at in zip(parts, positions, strict=True) if at < 0]}"
    assert positions == sorted(positions)


def test_the_lesson_folder_is_the_checkout_s():
    assert (Path(__file__).parents[2] / "lessons").samefile(lessons_folder())
