"""The check engine, on a small exercise of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minilora.classroom import exercises
from minilora.classroom.bets import predict, settle
from minilora.classroom.exercises import (
    Bug,
    CheckFailed,
    Exercise,
    Property,
    check,
    completed,
    examine,
    find_exercise,
    hint,
    overview,
)
from minilora.classroom.lessons import lesson_module


def line(x: np.ndarray, slope: float) -> np.ndarray:
    return slope * x + 1


def one_at_zero(function: Callable, case: dict[str, Any]) -> str | None:
    value = function(0 * case["x"], case["slope"])
    return None if np.all(value == 1) else f"f(0) is {value[0]:.3g}"


def exercise(**changes: Any) -> Exercise:
    facts: dict[str, Any] = {
        "id": "99.1",
        "title": "A line",
        "asks": "line(x, slope) returns slope · x + 1",
        "points": 1,
        "minutes": 3,
        "difficulty": 1,
        "importance": 1,
        "reference": line,
        "generate": lambda rng: {"x": rng.normal(size=4), "slope": float(rng.uniform(2, 3))},
        "properties": (Property(name="f(0) = 1", test=one_at_zero),),
        "hints": ("Multiply.", "Then add."),
        "bugs": (
            Bug(name="through the origin", function=lambda x, slope: slope * x, why="You forgot the 1.", link="5"),
            Bug(name="added", function=lambda x, slope: slope + x + 1, why="You added the slope."),
        ),
    }
    return Exercise(**{**facts, **changes})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Exercise:
    only = exercise()
    monkeypatch.setattr(exercises, "find_exercise", lambda exercise_id: only)
    return only


@pytest.mark.parametrize(
    "answer",
    [
        line,
        lambda x, slope: np.array([slope * entry + 1 for entry in x]),
        lambda x, slope: (slope * x + 1).astype(np.float32),
        lambda x, slope: torch.from_numpy(slope * x + 1),
    ],
    ids=["itself", "loop", "float32", "torch"],
)
def test_a_right_answer_of_another_build_passes(answer: Callable):
    assert examine(exercise(properties=()), answer).passed


def test_a_passing_function_is_the_one_the_lesson_goes_on_with():
    def mine(x, slope):
        return 1 + x * slope

    assert examine(exercise(), mine).function is mine


def test_a_failing_function_is_replaced_by_the_reference():
    assert examine(exercise(), lambda x, slope: x).function is line


def test_a_stub_is_not_started_and_shows_no_traceback():
    def stub(x, slope): ...  # your code

    result = examine(exercise(), stub)

    assert (result.status, result.function) == ("not started", line)
    assert "not started (3 minutes)" in result.message and "Traceback" not in result.message


@pytest.mark.parametrize("unfinished", [..., (..., 1)])
def test_a_function_that_returns_an_ellipsis_is_not_started(unfinished: Any):
    assert examine(exercise(), lambda x, slope: unfinished).status == "not started"


def test_a_function_that_raises_not_implemented_is_not_started():
    def later(x, slope):
        raise NotImplementedError

    assert examine(exercise(), later).status == "not started"


def test_a_forgotten_return_is_told_apart_from_a_stub():
    def forgetful(x, slope):
        slope * x + 1

    result = examine(exercise(), forgetful)

    assert result.status == "failed"
    assert result.failure is not None and "is there a `return`?" in result.failure.returned


def test_the_ladder_says_what_was_tested_what_came_back_what_it_looks_like_and_where_the_hint_is():
    message = examine(exercise(), lambda x, slope: slope * x).message

    assert "tested      the values on x (4,), slope = " in message
    assert "returned    a result that differs by up to 1 at [" in message
    assert "looks like  through the origin: You forgot the 1. (see: 5)" in message
    assert "hint('99.1') gives the next of 2 steps" in message


def test_an_unknown_mistake_is_not_given_a_name():
    result = examine(exercise(), lambda x, slope: slope * x + 2)

    assert result.failure is not None and result.failure.bug is None
    assert "none of the mistakes we know" in result.message


def test_a_mixture_of_two_bugs_is_named_as_neither():
    def mixture(x, slope):
        return slope * x if x[0] > 0 else slope + x + 1

    result = examine(exercise(properties=()), mixture, seeds=range(6))

    assert result.failure is not None and result.failure.bug is None


def test_a_bug_on_some_inputs_only_is_not_named():
    def sometimes(x, slope):
        return slope * x if x[0] > 0 else line(x, slope)

    result = examine(exercise(properties=()), sometimes, seeds=range(6))

    assert result.failure is not None and result.failure.bug is None


def test_bugs_with_equal_values_are_told_apart_by_the_properties_they_break():
    def marked(word: str) -> Callable:
        def answer(x, slope):
            return line(x, slope)

        answer.mark = word
        return answer

    def not_marked(word: str) -> Property:
        def test(function: Callable, case: dict[str, Any]) -> str | None:
            return f"it is {word}" if getattr(function, "mark", "") == word else None

        return Property(name=f"not {word}", test=test)

    bugs = tuple(Bug(name=word, function=marked(word), why="It is.") for word in ("slow", "loud"))
    both = exercise(properties=(not_marked("slow"), not_marked("loud")), bugs=bugs)

    for word in ("slow", "loud"):
        result = examine(both, marked(word))
        assert result.failure is not None and result.failure.bug is not None
        assert result.failure.bug.name == word


def test_a_wrong_answer_with_right_values_is_named_by_the_property_it_breaks():
    def counts_calls(function: Callable, case: dict[str, Any]) -> str | None:
        return "it is slow" if getattr(function, "slow", False) else None

    def slow(x, slope):
        return line(x, slope)

    slow.slow = True
    bugs = (Bug(name="slow", function=slow, why="Too slow."),)
    result = examine(exercise(properties=(Property(name="fast", test=counts_calls),), bugs=bugs), slow)

    assert result.failure is not None and result.failure.bug is not None
    assert (result.failure.tested, result.failure.bug.name) == ("fast", "slow")


def test_a_mistake_that_raises_is_named_by_its_error():
    bugs = (Bug(name="wrong product", function=lambda x, slope: np.ones((2, 2)) @ x, why="Shapes."),)

    def wrong(x, slope):
        return np.ones((3, 2)) @ x

    result = examine(exercise(bugs=bugs), wrong)

    assert result.failure is not None and result.failure.bug is not None
    assert "ValueError: matmul" in result.failure.returned
    assert "in the line: return np.ones((3, 2)) @ x" in result.failure.returned


def test_the_line_that_is_shown_is_the_learner_s_and_never_ours():
    def observe(function, case):
        return np.ones((3, 2)) @ function(**case)  # a line of the observer's

    def shapeless(x, slope):
        return np.ones(5)

    def raising(x, slope):
        return np.ones(5) + x

    elsewhere = {}
    exec(compile("def shapeless(x, slope):\n    return np.ones(5)", "another cell", "exec"), {"np": np}, elsewhere)
    ours = examine(exercise(observe=observe), elsewhere["shapeless"])
    own = examine(exercise(observe=observe), raising)

    assert ours.failure is not None and "in the line" not in ours.failure.returned
    assert "asked for: line(x, slope) returns slope · x + 1" in ours.failure.returned
    assert own.failure is not None and own.failure.returned.endswith("in the line: return np.ones(5) + x")


def test_the_line_of_a_class_is_one_of_its_methods():
    class Line:
        def at(self, x, slope):
            return np.ones(5) + x

    result = examine(exercise(observe=lambda layer, case: layer().at(**case)), Line)

    assert result.failure is not None and result.failure.returned.endswith("in the line: return np.ones(5) + x")


def test_a_word_that_describes_is_shown_beside_the_expected_one():
    def observe(function, case):
        return {"dropout": function(**case)}

    in_words = exercise(reference=lambda x, slope: "on the input", observe=observe, properties=())
    question = exercise(reference=lambda x, slope: "dA", properties=())
    described, asked = (examine(one, lambda x, slope: "nowhere") for one in (in_words, question))

    assert described.failure is not None and "returned 'nowhere', expected 'on the input'" in described.failure.returned
    assert asked.failure is not None and "dA" not in asked.failure.returned  # that would be the answer


def test_what_the_function_prints_is_seen_once(capsys: pytest.CaptureFixture[str]):
    def talkative(x, slope):
        print("shape", x.shape)
        return slope * x

    twice = exercise(observe=lambda function, case: [function(*case.values()) for _ in range(2)])
    for each in (exercise(), twice):
        examine(each, talkative)

        assert capsys.readouterr().out == "shape (4,)\n"


def test_the_value_of_a_function_is_refused(found: Exercise, learner_home: Path):
    with pytest.raises(TypeError, match=r"the function itself, without calling it; it got a ndarray of shape \(4,\)"):
        check("99.1", np.zeros(4))

    assert not learner_home.exists()


def test_the_course_s_own_function_is_refused(found: Exercise):
    with pytest.raises(ValueError, match="Run the cell that defines yours again"):
        check("99.1", line)


def test_changing_an_input_in_place_is_a_failure():
    def greedy(x, slope):
        x *= slope
        return x + 1

    result = examine(exercise(), greedy)

    assert result.failure is not None and result.failure.returned == "x changed in place: work on a copy"


def test_nan_is_not_a_right_answer():
    result = examine(exercise(), lambda x, slope: np.full(4, np.nan))

    assert result.failure is not None and "4 values that are NaN or infinite" in result.failure.returned


def test_several_outputs_are_compared_one_by_one():
    both = exercise(reference=lambda x, slope: (x, 2 * x), outputs=("dA", "dB"), properties=())
    result = examine(both, lambda x, slope: (x, 3 * x))
    too_few = examine(both, lambda x, slope: x)

    assert result.failure is not None and result.failure.returned.startswith("dA: right\ndB: differs by up to")
    assert too_few.failure is not None and "expected 2 values (dA, dB)" in too_few.failure.returned


def test_a_transposed_answer_is_told_both_shapes():
    square = exercise(generate=lambda rng: {"x": rng.normal(size=(2, 3)), "slope": 2.0}, properties=())
    result = examine(square, lambda x, slope: line(x, slope).T)

    assert result.failure is not None and "has shape (3, 2), expected (2, 3)" in result.failure.returned


def test_hidden_checks_are_never_called_all():
    assert "3 visible checks passed, 5 hidden" in examine(exercise(hidden=5), line).message
    assert "3 checks passed" in examine(exercise(), line).message


def test_a_check_prints_in_a_notebook_and_raises_in_a_grader(
    found: Exercise, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert not check("99.1", lambda x, slope: x).passed
    assert "not yet" in capsys.readouterr().out
    monkeypatch.setenv("MINILORA_STRICT", "1")
    with pytest.raises(CheckFailed, match="not yet"):
        check("99.1", lambda x, slope: x)


def test_progress_counts_attempts_and_keeps_the_status(found: Exercise, learner_home: Path):
    check("99.1", lambda x, slope: x)
    check("99.1", lambda x, slope: slope * x + 1)

    entry = json.loads((learner_home / "progress.json").read_text())["exercises"]["99.1"]
    assert entry == {"attempts": 2, "status": "passed"}
    assert completed() == {"99.1": "passed"}


def test_a_grader_leaves_no_progress(found: Exercise, learner_home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINILORA_STRICT", "1")
    check("99.1", lambda x, slope: slope * x + 1)

    assert not learner_home.exists()


def test_hints_come_one_at_a_time(found: Exercise, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exercises, "_hints_taken", {})
    for _ in range(3):
        hint("99.1")

    first, second, third = capsys.readouterr().out.strip().splitlines()
    assert first == "Hint 1 of 2 for 99.1: Multiply."
    assert second == "Hint 2 of 2 for 99.1: Then add."
    assert third.startswith("There are only 2 hints")


@pytest.mark.parametrize(
    ("bet", "measured", "verdict"),
    [
        (100, 100, "you said 100, measured 100: right"),
        (60, 100, "close"),
        (4, 2304, "off by a factor of 576"),
        (-3, 4, "you said -3, measured 4: surprised?"),
        (0, 2, "you said 0, measured 2: surprised?"),
        (0, 0, "right"),
        ("dA", "dA", "right"),
        ("dB", "dA", "surprised?"),
        (None, 2304, "measured 2,304; no bet was placed"),
    ],
)
def test_a_bet_is_settled_against_what_was_measured(
    bet: Any, measured: Any, verdict: str, capsys: pytest.CaptureFixture[str]
):
    predict("x", "How many?", choices=["dA", "dB"] if isinstance(bet, str) else (), bet=bet)
    settle("x", measured)

    assert verdict in capsys.readouterr().out


def test_a_bet_outside_the_choices_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"cannot bet 'dC' on x: the choices are \['dA', 'dB'\]"):
        predict("x", "Which?", choices=["dA", "dB"], bet="dC")


@pytest.mark.parametrize("bet", ["2304", "many", [2304]])
def test_a_bet_that_is_no_number_is_refused_where_a_number_is_asked(bet: Any):
    with pytest.raises(ValueError, match="write a number, such as bet=2304, without quotes"):
        predict("x", "How many?", bet=bet)


def test_settling_an_unknown_bet_names_the_known_ones():
    predict("known", "How many?")
    with pytest.raises(KeyError, match=r"no bet is called 'unknown'; the bets of this lesson are .*'known'"):
        settle("unknown", 1)


def test_an_unknown_exercise_is_answered_with_those_that_exist():
    with pytest.raises(KeyError, match=r"lesson 03 has no exercise '03.9'; it has \['03.1', '03.2', '03.3'\]"):
        find_exercise("03.9")
    with pytest.raises(KeyError, match=r"no lesson '77' has exercises; the lessons are .*03_lora_in_numpy"):
        find_exercise("77.1")


def test_exercises_are_found_from_any_folder_inside_the_checkout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(exercises.__file__).parent)

    assert find_exercise("03.1").title == "The forward pass"


def test_the_folder_of_lessons_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINILORA_LESSONS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="set MINILORA_LESSONS"):
        lesson_module("03")


def test_an_unknown_bug_is_answered_with_those_that_exist():
    with pytest.raises(KeyError, match=r"exercise 99.1 knows no bug 'x'; it knows \['through the origin', 'added'\]"):
        exercise().bug("x")


def test_the_overview_adds_up_the_minutes(capsys: pytest.CaptureFixture[str]):
    overview("03")

    assert "35 min in all" in capsys.readouterr().out
