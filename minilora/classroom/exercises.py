"""Exercises that explain: `check` runs the learner's own function and says what it looks like.

An answer goes down a ladder: what was tested, what came back, what it looks like, where the hint is. "Looks like" is a
fingerprint: an answer that equals a catalogued bug's on every input carries that bug's name. For that the inputs
must be generic (in ≠ out, r ≠ alpha, B ≠ 0): with r = alpha a forgotten alpha / r cannot be seen.

The exercises of lesson 03 are the list `EXERCISES` in `lessons/03_…/exercises.py`; `lessons/README.md` says how one is
written; `lessons.py` finds them.
"""

import contextlib
import copy
import dis
import functools
import inspect
import io
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from minilora.classroom.lessons import lesson_module
from minilora.classroom.progress import is_strict, read_progress, record

Case = dict[str, Any]  # one set of inputs, by parameter name in the order of the function's parameters
VISIBLE_SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A wrong answer that learners really give, as a function, with one sentence of why it is wrong."""

    name: str
    function: Callable
    why: str
    link: str = ""  # the part of the lesson that explains it


@dataclass(frozen=True, kw_only=True)
class Property:
    """Something that must be true of any right answer: `test` returns None, or what came back instead."""

    name: str
    test: Callable[[Callable, Case], str | None]


def call(function: Callable, case: Case) -> Any:
    """What an exercise observes unless it says otherwise: the value of the function on the inputs, in order."""
    return function(*case.values())


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """What is asked and how it is checked."""

    id: str  # "03.1"
    title: str
    asks: str  # the signature and what it returns, in one line
    points: int
    minutes: int
    difficulty: Literal[1, 2, 3]
    importance: Literal[1, 2, 3]
    reference: Callable
    generate: Callable[[np.random.Generator], Case]
    observe: Callable[[Callable, Case], Any] = call
    outputs: tuple[str, ...] = ()  # names of what the function returns, where it returns several things
    tolerance: float | None = 1e-5  # of the largest entry, so that float32 passes; 0 = exact; None = only properties
    properties: tuple[Property, ...] = ()
    hints: tuple[str, ...] = ()
    bugs: tuple[Bug, ...] = ()
    hidden: int = 0  # checks that only a grader runs, on inputs from a seed that is not published

    def bug(self, name: str) -> Callable:
        """The function of a catalogued bug, for a lesson that shows what it does."""
        for bug in self.bugs:
            if bug.name == name:
                return bug.function
        raise KeyError(f"exercise {self.id} knows no bug {name!r}; it knows {[bug.name for bug in self.bugs]}")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The ladder: what was tested, what came back, what it looks like (if it equals one catalogued bug)."""

    tested: str
    returned: str
    bug: Bug | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a check found. Shown by `check` itself, so a cell that ends in it shows it once."""

    exercise: Exercise
    status: Literal["passed", "failed", "not started"]
    function: Callable  # the learner's where it passes, else the reference: what the lesson goes on with
    tested: tuple[str, ...] = ()
    failure: Failure | None = None
    message: str = field(default="", repr=False)

    @property
    def passed(self) -> bool:
        """Whether every visible check passed."""
        return self.status == "passed"

    def _ipython_display_(self) -> None:
        """Nothing: `check` has printed the message already."""


class CheckFailed(AssertionError):
    """A check that failed under `MINILORA_STRICT=1`; the text is the message a learner would read."""


def check(exercise_id: str, function: Callable) -> Result:
    """Try a function against an exercise and print what was found.

    The result's `function` is yours where it passes, else the reference: the lesson goes on with it.

    Raises:
        KeyError: if there is no such exercise (names those that exist).
        TypeError: if it is given what a function returned, instead of the function.
        ValueError: if it is given the course's own function.
        CheckFailed: under `MINILORA_STRICT=1`, if it does not pass.
    """
    exercise = find_exercise(exercise_id)
    if not callable(function):
        raise TypeError(
            f"check({exercise_id!r}, …) wants the function itself, without calling it; it got {_kind(function)}"
        )
    if function is exercise.reference:
        raise ValueError(
            f"check({exercise_id!r}, …) got the course's own function: its name hides yours. Run the cell that defines "
            "yours again, then this one"
        )
    result = examine(exercise, function)
    record("exercises", exercise.id, attempts=None, status=result.status)
    if is_strict() and not result.passed:
        raise CheckFailed(result.message)
    print(result.message)
    return result


def examine(exercise: Exercise, function: Callable, seeds: Sequence[int] = VISIBLE_SEEDS) -> Result:
    """Try a function against an exercise on the inputs of these seeds; record nothing.

    What the function prints is shown for its first call only (for a class: for the first inputs).
    """
    cases = [exercise.generate(np.random.default_rng(seed)) for seed in seeds]
    if is_stub(function) or any(_is_unfinished(_outcome(exercise, _heard_once(function), case)) for case in cases[:1]):
        result = Result(exercise=exercise, status="not started", function=exercise.reference)
    else:
        with contextlib.redirect_stdout(io.StringIO()):
            result = _judged(exercise, function, cases)
    return Result(**{**vars(result), "message": _message(result)})


def _heard_once(function: Callable) -> Callable:
    """The function, silent from its second call on; a class as it is."""
    if isinstance(function, type):
        return function
    volume: contextlib.AbstractContextManager = contextlib.nullcontext()

    @functools.wraps(function)
    def heard(*inputs: Any, **named: Any) -> Any:
        nonlocal volume
        with volume:
            volume = contextlib.redirect_stdout(io.StringIO())
            return function(*inputs, **named)

    return heard


def _judged(exercise: Exercise, function: Callable, cases: list[Case]) -> Result:
    tested, failure = _first_failure(exercise, function, cases)
    if failure is None:
        return Result(exercise=exercise, status="passed", function=function, tested=tested)
    named = Failure(tested=failure.tested, returned=failure.returned, bug=_fingerprint(exercise, function, cases))
    return Result(exercise=exercise, status="failed", function=exercise.reference, tested=tested, failure=named)


def is_stub(function: Callable) -> bool:
    """Whether a function's body is only `...`, `pass` or a docstring.

    >>> def todo(x):
    ...     "To be written."
    ...     ...
    >>> is_stub(todo), is_stub(len)
    (True, False)
    """
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    meant = [op for op in dis.get_instructions(code) if op.opname not in ("RESUME", "NOP", "CACHE")]
    trivial = {"LOAD_CONST", "RETURN_CONST", "RETURN_VALUE"}
    return all(op.opname in trivial for op in meant) and not any(
        op.opname in ("LOAD_CONST", "RETURN_CONST") and op.argval not in (None, ...) for op in meant
    )


# ----------------------------------------------------------------------------------------------- running and comparing


@dataclass(frozen=True)
class _Outcome:
    """The value that came back, or the exception that was raised; and the names of inputs that were changed."""

    value: Any = None
    error: Exception | None = None
    changed: tuple[str, ...] = ()


def _outcome(exercise: Exercise, function: Callable, case: Case) -> _Outcome:
    given = copy.deepcopy(case)
    try:
        with np.errstate(all="ignore"):  # an answer that overflows is judged by its values
            value = exercise.observe(function, given)
    except Exception as error:
        return _Outcome(error=error)
    return _Outcome(value, changed=tuple(name for name in case if _was_changed(case[name], given[name])))


def _was_changed(before: Any, after: Any) -> bool:
    return hasattr(before, "shape") and hasattr(before, "dtype") and _difference(before, after, 0.0) is not None


def _is_unfinished(outcome: _Outcome) -> bool:
    value = outcome.value
    parts = value if isinstance(value, tuple) else (value,)
    return isinstance(outcome.error, NotImplementedError) or any(part is ... for part in parts)


def _leaves(value: Any, names: Sequence[str] = (), prefix: str = "") -> dict[str, Any]:
    """The arrays, numbers and words inside a value, by name: {"dA": …} or {"[0]": …}."""
    if isinstance(value, Mapping):
        items = [(f"{prefix}{key}", item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        found = names if len(names) == len(value) else [f"[{i}]" for i in range(len(value))]
        items = [(f"{prefix}{name}", item) for name, item in zip(found, value, strict=True)]
    else:
        return {prefix: value}
    return {name: leaf for key, item in items for name, leaf in _leaves(item, prefix=key).items()}


def _as_array(value: Any) -> np.ndarray | None:
    """The numbers in an array, a tensor or a number; None where there are none."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.double().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, (np.ndarray, np.generic, int, float, complex)):
        array = np.asarray(value)
        return array if array.dtype.kind in "biufc" else None
    return None


def _difference(want: Any, got: Any, tolerance: float, tells_words: bool = False) -> str | None:
    """None where the two agree within `tolerance` · the largest wanted entry; else what is different."""
    wanted, given = _as_array(want), _as_array(got)
    if wanted is None:
        expected = f", expected {want!r}" if tells_words and isinstance(want, str) else ""
        try:
            return None if bool(want == got) else f"returned {got!r:.80}{expected}"
        except Exception:
            return f"returned {got!r:.80}{expected}"
    if given is None:
        return "returned None: is there a `return`?" if got is None else f"returned a {type(got).__name__}, not numbers"
    if given.shape != wanted.shape:
        return f"has shape {given.shape}, expected {wanted.shape}"
    if wanted.size == 0 or np.array_equal(wanted, given, equal_nan=wanted.dtype.kind in "fc"):
        return None
    distance = np.abs(given - wanted) if wanted.dtype.kind != "b" else (given != wanted).astype(float)
    if not np.isfinite(given).all():
        return f"holds {np.sum(~np.isfinite(given))} values that are NaN or infinite"
    largest = float(np.max(np.abs(wanted)))
    if float(np.max(distance)) <= tolerance * largest:
        return None
    where = np.unravel_index(int(np.argmax(distance)), distance.shape)
    at = f" at [{', '.join(str(int(i)) for i in where)}]" if where else ""
    return f"differs by up to {float(np.max(distance)):.3g}{at}, where entries reach {largest:.3g}"


def _compare(exercise: Exercise, want: Any, got: Any, tolerance: float) -> str | None:
    """One line for each output, as in a lab book: right, or how it is wrong. None where all are right."""
    wanted, given = _leaves(want, exercise.outputs), _leaves(got, exercise.outputs)
    if wanted.keys() != given.keys():
        if got is None:
            return "None: is there a `return`?"
        return f"{_kind(got)}; expected {_kind(want)}" + (
            f" ({', '.join(exercise.outputs)})" if exercise.outputs else f" with {', '.join(wanted) or 'one value'}"
        )
    tells_words = exercise.observe is not call  # words of ours; a word that is returned is the answer, not to be told
    problems = {name: _difference(wanted[name], given[name], tolerance, tells_words) for name in wanted}
    if not any(problems.values()):
        return None
    if len(problems) == 1:
        return "a result that " + str(next(iter(problems.values())))
    return "\n".join(f"{name}: {problem or 'right'}" for name, problem in problems.items())


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return f"a {type(value).__name__}" + (f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else "")


# ---------------------------------------------------------------------------------------------------------- the ladder


def _first_failure(exercise: Exercise, function: Callable, cases: list[Case]) -> tuple[tuple[str, ...], Failure | None]:
    """What passed, in order, and the first thing that did not."""
    tested: list[str] = []
    for case in cases:
        outcome = _outcome(exercise, function, case)
        if outcome.error is not None:
            return tuple(tested), Failure(
                tested=f"it runs on {describe(case)}", returned=_raised(outcome.error, function, exercise)
            )
        if outcome.changed:
            returned = f"{', '.join(outcome.changed)} changed in place: work on a copy"
            return tuple(tested), Failure(tested="the inputs are left as they were", returned=returned)
        if exercise.tolerance is not None:
            want = _outcome(exercise, exercise.reference, case)
            if want.error is not None:
                raise want.error
            problem = _compare(exercise, want.value, outcome.value, exercise.tolerance)
            if problem:
                return tuple(tested), Failure(tested=f"the values on {describe(case)}", returned=problem)
    tested.append("it runs, and leaves its inputs as they were")
    if exercise.tolerance is not None:
        tested.append(f"the values on {len(cases)} random inputs, like {describe(cases[0])}")
    for prop in exercise.properties:
        problem = _property_problem(prop, function, exercise, cases)
        if problem is not None:
            return tuple(tested), Failure(tested=prop.name, returned=problem)
        tested.append(prop.name)
    return tuple(tested), None


def _property_problem(prop: Property, function: Callable, exercise: Exercise, cases: list[Case]) -> str | None:
    for case in cases:
        try:
            with np.errstate(all="ignore"):
                problem = prop.test(function, copy.deepcopy(case))
        except Exception as error:
            return _raised(error, function, exercise)
        if problem is not None:
            return problem
    return None


def _fingerprint(exercise: Exercise, function: Callable, cases: list[Case]) -> Bug | None:
    """The one catalogued bug that answers as the function does, on every input and in every property."""
    answers = [_outcome(exercise, function, case) for case in cases]
    broken = _broken_properties(exercise, function, cases)
    alike = [
        bug
        for bug in exercise.bugs
        if all(
            _same(exercise, _outcome(exercise, bug.function, case), answer)
            for case, answer in zip(cases, answers, strict=True)
        )
        and _broken_properties(exercise, bug.function, cases) == broken
    ]
    return alike[0] if len(alike) == 1 else None


def _broken_properties(exercise: Exercise, function: Callable, cases: list[Case]) -> set[str]:
    return {prop.name for prop in exercise.properties if _property_problem(prop, function, exercise, cases) is not None}


def _same(exercise: Exercise, left: _Outcome, right: _Outcome) -> bool:
    if left.error is not None or right.error is not None:
        return type(left.error) is type(right.error) and str(left.error) == str(right.error)
    tolerance = 1e-5 if exercise.tolerance is None else exercise.tolerance
    return left.changed == right.changed and _compare(exercise, left.value, right.value, tolerance) is None


def describe(case: Case) -> str:
    """The inputs in a few words.

    >>> describe({"x": np.zeros((5, 12)), "alpha": 8})
    'x (5, 12), alpha = 8'
    """
    words = []
    for name, value in case.items():
        if hasattr(value, "shape"):
            words.append(f"{name} {tuple(value.shape)}")
        elif isinstance(value, (int, float, str)):
            words.append(f"{name} = {value:.4g}" if isinstance(value, float) else f"{name} = {value}")
        else:
            words.append(f"{name}: {type(value).__name__}")
    return ", ".join(words)


def _raised(error: Exception, function: Callable, exercise: Exercise) -> str:
    """The exception, and the learner's own line that raised it; where none did, what was asked for."""
    files = _files_of(function)
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"in the line: {frame.line}" for frame in frames if frame.filename in files and frame.line]
    own += getattr(error, "__notes__", [])  # of an error that was raised in another process
    return f"{type(error).__name__}: {error}\n" + (own[-1] if own else f"asked for: {exercise.asks}")


def _files_of(function: Callable) -> set[str]:
    """The file, or notebook cell, in which a function or the methods of a class are written."""
    written = vars(function).values() if isinstance(function, type) else [function]
    codes = [getattr(inspect.unwrap(each), "__code__", None) for each in written]
    return {code.co_filename for code in codes if code is not None}


def _message(result: Result) -> str:
    exercise = result.exercise
    head = f"{exercise.id}  {exercise.title}"
    if result.status == "not started":
        return (
            f"·  {head}: not started ({exercise.minutes} minutes)\n   asked       {exercise.asks}\n"
            f"   help        hint({exercise.id!r}) gives the first of {len(exercise.hints)} steps\n"
            "   The lesson goes on with the reference."
        )
    lines = [f"   ✓ {tested}" for tested in result.tested]
    if result.failure is None:
        unseen = f" visible checks passed, {exercise.hidden} hidden" if exercise.hidden else " checks passed"
        return "\n".join([f"✓  {head}: {len(lines)}{unseen}", *lines, "   The lesson goes on with your function."])
    failure = result.failure
    looks = f"{failure.bug.name}: {failure.bug.why}" if failure.bug else "none of the mistakes we know"
    if failure.bug and failure.bug.link:
        looks += f" (see: {failure.bug.link})"
    ladder = {"tested": failure.tested, "returned": failure.returned, "looks like": looks}
    ladder["help"] = f"hint({exercise.id!r}) gives the next of {len(exercise.hints)} steps"
    told = [f"   {name:<12}" + text.replace("\n", "\n" + " " * 15) for name, text in ladder.items()]
    return "\n".join([f"✗  {head}: not yet", *lines, *told, "   The lesson goes on with the reference."])


# --------------------------------------------------------------------------------------------------------------- hints


def hint(exercise_id: str) -> None:
    """Print the next hint of an exercise; each call goes one step further."""
    exercise = find_exercise(exercise_id)
    _hints_taken[exercise.id] = step = _hints_taken.get(exercise.id, 0) + 1
    if step > len(exercise.hints):
        print(
            f"There are only {len(exercise.hints)} hints; the worked solution is in the full notebook of this lesson."
        )
        return
    record("hints", exercise.id, taken=step)
    told = f"Hint {step} of {len(exercise.hints)} for {exercise.id}: {exercise.hints[step - 1]}"
    print(textwrap.fill(told, width=96, subsequent_indent="  "))


_hints_taken: dict[str, int] = {}


def completed() -> dict[str, str]:
    """The status of every exercise that was tried, by id, as the progress file has it."""
    return {key: entry.get("status", "") for key, entry in read_progress().get("exercises", {}).items()}


def overview(lesson: str) -> None:
    """Print the exercises of a lesson, such as "03": minutes, points, difficulty and importance."""
    exercises = lesson_module(lesson).EXERCISES
    for each in exercises:
        stars = "difficulty " + "★" * each.difficulty + "☆" * (3 - each.difficulty)
        stars += "  importance " + "★" * each.importance + "☆" * (3 - each.importance)
        points = f"{each.points} point{' ' if each.points == 1 else 's'}"
        print(f"{each.id}  {each.minutes:>3} min  {points}  {stars}  {each.title}")
    print(f"      {sum(each.minutes for each in exercises):>3} min in all")


# ------------------------------------------------------------------------------------------------- finding an exercise


def find_exercise(exercise_id: str) -> Exercise:
    """The exercise with this id, such as "03.1" (lesson 03, exercise 1).

    Raises:
        KeyError: if there is none (names those of the lesson, or the lessons).
    """
    lesson = exercise_id.split(".")[0]
    exercises = lesson_module(lesson).EXERCISES
    for exercise in exercises:
        if exercise.id == exercise_id:
            return exercise
    raise KeyError(f"lesson {lesson} has no exercise {exercise_id!r}; it has {[each.id for each in exercises]}")
