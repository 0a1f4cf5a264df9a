"""Grades from a notebook's file: `minilora grade notebook.ipynb`.

    the notebook's cells   →  the part that an exercise needs (slices.py)
                           →  a process of its own, which gets inputs and gives outputs (sandbox.py)
                           →  compared here, with the same checks and the same words as a learner's own `check`

No kernel is asked what it holds. Whatever else the notebook does, in broken, slow or unfinished cells, costs nothing.

What an exercise uses of an earlier one is the learner's own where that passed, else the course's, as in the notebook:
one mistake is not charged twice. Each exercise has its own process, so handing out 03.1 in 03.3 gives no 03.1 away.

A check that calls a function with plain data (numbers, arrays, tensors) runs here: each call is sent over. A check
that looks into a class or a module runs over there and sends back plain values, which are compared here. So a cheat
who rewrites that check inside its own process can forge words that are the same for every input, or a property's
"nothing found"; numbers that depend on the inputs have to be right.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minilora.classroom import sandboxed
from minilora.classroom.exercises import VISIBLE_SEEDS, Case, Exercise, Property, Result, examine, find_exercise
from minilora.classroom.lessons import lesson_module
from minilora.classroom.sandbox import DEFAULT, DoesNotRun, Limits, Refused, Sandbox, Stopped, is_function
from minilora.classroom.slices import Program
from minilora.classroom.submission import asked_name, submission
from minilora.files import write_whole

Status = Literal["passed", "failed", "not started", "refused", "stopped"]


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What one exercise of a submission is worth, and why."""

    exercise: str  # its id
    points: int
    most: int
    status: Status
    message: str  # the ladder that a learner reads


def grade_notebook(path: Path, lesson: str, *, secret: str = "", limits: Limits = DEFAULT) -> list[Grade]:
    """Grade every exercise of a lesson such as "03" from a notebook's file.

    With a secret the inputs are drawn from it, so that no answer can be made for the published ones.

    Raises:
        ValueError: if the file is not a notebook.
        KeyError: if there is no such lesson.
    """
    program = Program.of_cells(code_cells(path))
    grades: list[Grade] = []
    for exercise in lesson_module(lesson).EXERCISES:
        passed = frozenset(each.exercise for each in grades if each.status == "passed")
        grades.append(_grade(program, exercise, secret, passed, limits))
    return grades


def grade_source(
    source: str,
    exercise: Exercise,
    *,
    secret: str = "",
    passed: frozenset[str] = frozenset(),
    limits: Limits = DEFAULT,
) -> Grade:
    """Grade one exercise from a program's text; `passed` are the earlier exercises whose answers in it are right."""
    return _grade(Program.of_cells([source]), exercise, secret, passed, limits)


def code_cells(path: Path) -> list[str]:
    """The code cells of a notebook's file.

    Raises:
        ValueError: if the file is not a notebook.
    """
    cells = [cell for cell in read_notebook(path)["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells]


def read_notebook(path: Path) -> dict[str, Any]:
    """A notebook's file, checked as far as it is used here.

    Raises:
        ValueError: if the file is not a notebook.
    """
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        is_notebook = isinstance(notebook.get("metadata", {}), dict) and all(
            isinstance(cell["cell_type"], str) and isinstance("".join(cell["source"]), str)
            for cell in notebook["cells"]
        )
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        is_notebook = False
    if not is_notebook:
        raise ValueError(f"{path} is not a notebook in Jupyter's format 4: save it from Jupyter again")
    return notebook


def seeds_of(exercise_id: str, secret: str, count: int = len(VISIBLE_SEEDS)) -> tuple[int, ...]:
    """The seeds of an exercise's inputs: the published ones, or as many that only who has the secret can tell.

    >>> seeds_of("03.1", ""), len(set(seeds_of("03.1", "s") + seeds_of("03.2", "s") + seeds_of("03.1", "t")))
    ((0, 1, 2), 9)
    """
    if not secret:
        return VISIBLE_SEEDS
    texts = (json.dumps([secret, exercise_id, index]) for index in range(count))
    return tuple(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest()) for text in texts)


# ---------------------------------------------------------------------------------------------------------- one grade


def _grade(program: Program, exercise: Exercise, secret: str, passed: frozenset[str], limits: Limits) -> Grade:
    name = asked_name(exercise)
    definition = program.definition(name)
    if definition is None:
        broken = [(cell, error) for cell, error in program.unreadable if re.search(rf"\b{name}\b", cell)]
        if not broken:
            return _told(exercise, "not started", f"no {name} in this notebook")
        why = f"the cell with {name} is not Python: {broken[-1][1].msg} (line {broken[-1][1].lineno} of the cell)"
        return _told(exercise, "failed", why)
    if definition.is_import:
        return _told(exercise, "refused", f"{name} is imported ({definition.text}); the exercise is to write it")
    if _is_stub(definition.node):
        return _told(exercise, "not started", "it is still the stub")
    handed_in = submission(program, exercise, passed, not_by_value(exercise))
    if handed_in.refused:
        return _told(exercise, "refused", "; ".join(handed_in.refused))
    seeds = seeds_of(exercise.id, secret, max(len(VISIBLE_SEEDS), exercise.hidden))
    try:
        with handed_in.sandbox(seeds, limits) as sandbox:
            result = judged(exercise, sandbox, name, seeds, hidden=0 if secret else exercise.hidden)
    except Refused as reason:
        return _told(exercise, "refused", str(reason))
    except Stopped as reason:
        return _told(exercise, "stopped", str(reason))
    except DoesNotRun as reason:
        return _told(exercise, "failed", f"the cells that it needs do not run: {reason}")
    message = re.sub(r"\n   The lesson goes on .*", "", result.message)
    points = exercise.points if result.passed else 0
    return Grade(exercise=exercise.id, points=points, most=exercise.points, status=result.status, message=message)


def _told(exercise: Exercise, status: Status, why: str) -> Grade:
    sign = "·" if status == "not started" else "✗"
    message = f"{sign}  {exercise.id}  {exercise.title}: {status}\n   {why}"
    return Grade(exercise=exercise.id, points=0, most=exercise.points, status=status, message=message)


def _is_stub(node: ast.AST) -> bool:
    """Whether a function, or every method of a class, is only a docstring, `...` or `pass`."""
    if isinstance(node, ast.ClassDef):
        methods = [each for each in node.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))]
        return bool(methods) and all(_is_stub(each) for each in methods)
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    return all(
        isinstance(each, ast.Pass) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        for each in node.body
    )


def judged(
    exercise: Exercise, sandbox: Sandbox, function: str, seeds: tuple[int, ...] = VISIBLE_SEEDS, hidden: int = 0
) -> Result:
    """What `examine` finds about a function in a sandbox that was made for this exercise."""
    stand_in = sandbox.function(function)
    remote = functools.partial(_tried, sandbox, function, stand_in)
    observed = not_by_value(exercise)
    changed: dict[str, Any] = {"generate": functools.partial(_seeded, exercise.generate), "hidden": hidden}
    if "observe" in observed:
        changed["observe"] = remote(exercise.observe, "observer_observe")
    changed["properties"] = tuple(
        Property(name=each.name, test=remote(each.test, f"observer_{index}")) if str(index) in observed else each
        for index, each in enumerate(exercise.properties)
    )
    return examine(dataclasses.replace(exercise, **changed), stand_in, seeds)


class _SeededCase(dict[str, Any]):
    """A case that knows its seed, so that the sandbox can make the same."""

    seed = 0


def _seeded(generate: Callable, rng: np.random.Generator) -> Case:
    seed = rng.bit_generator.seed_seq.entropy  # type: ignore[attr-defined]
    case = _SeededCase(generate(rng))
    case.seed = seed
    return case


def _tried(sandbox: Sandbox, name: str, stand_in: Callable, observe: Callable, observer: str) -> Callable:
    """An observer that looks at the learner's object over there, and at any other here."""

    def observed(function: Any, case: Any) -> Any:
        if getattr(function, "__wrapped__", function) is not stand_in:
            return observe(function, case)
        return sandbox.tried(name, observer, case, case.seed)

    return observed


# ------------------------------------------------------------------------- which checks need the learner's object


@functools.cache
def not_by_value(exercise: Exercise) -> frozenset[str]:
    """Which of "observe", "0", "1", … (the properties) do more than call the function with plain data."""
    tests = {"observe": exercise.observe, **{str(i): each.test for i, each in enumerate(exercise.properties)}}
    return frozenset(name for name, test in tests.items() if not _is_by_value(exercise, test))


def _is_by_value(exercise: Exercise, test: Callable) -> bool:
    """Seen on the reference: whether all that goes in and comes out of its calls is plain data.

    A function among the inputs is one more to call: all that goes in and comes out of it must be plain data too.
    """
    if isinstance(exercise.reference, type):
        return False
    seen: list[bool] = []

    def recorded(function: Callable, *inputs: Any, **named: Any) -> Any:
        sent = [functools.partial(recorded, each) if is_function(each) else each for each in inputs]
        seen.append(is_plain([named, *(each for each in inputs if not is_function(each))]))
        value = function(*sent, **named)
        seen.append(is_plain(value))
        return value

    try:
        with np.errstate(all="ignore"):
            test(functools.partial(recorded, exercise.reference), exercise.generate(np.random.default_rng(0)))
    except Exception:
        return False
    return all(seen)


def is_plain(value: Any) -> bool:
    """Whether a value is numbers, words, arrays, tensors without a gradient, or lists and dicts of them.

    >>> is_plain([1, ("two", np.ones(3))]), is_plain(print)
    (True, False)
    """
    if isinstance(value, dict):
        return all(is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, (list, tuple, set)):
        return all(is_plain(each) for each in value)
    if hasattr(value, "requires_grad") and value.requires_grad:
        return False
    tree = sandboxed.encode(value)
    return not (isinstance(tree, dict) and tree["kind"] == "opaque")


# ---------------------------------------------------------------------------------------------------- the command line


def lesson_of(path: Path) -> str:
    """The number of the lesson that a notebook was made from: its metadata say it, or its name begins with it.

    Raises:
        ValueError: if neither does.
    """
    notebook = read_notebook(path)
    made_from = notebook.get("metadata", {}).get("minilora", {}).get("lesson", "")
    for name in (made_from, path.name):
        if re.match(r"[0-9][0-9](_|\.|$)", name):
            return name[:2]
    raise ValueError(f"{path} does not say which lesson it is: name it with --lesson, such as --lesson 03")


def run(args: argparse.Namespace) -> int:
    """What `minilora grade` does; 0 also where an exercise did not pass: a grade is not an error.

    Raises:
        ValueError: if the file is not a notebook, or there is no such lesson, or the secret is empty.
    """
    path = Path(args.notebook)
    lesson = args.lesson or lesson_of(path)
    if not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds:g}: it must be above 0")
    secret = Path(args.secret_file).read_text(encoding="utf-8").strip() if args.secret_file else ""
    if args.secret_file and not secret:
        raise ValueError(f"{args.secret_file} is empty: write a long random line into it, and keep it to yourself")
    try:
        limits = dataclasses.replace(DEFAULT, seconds=args.seconds, clock_seconds=2 * args.seconds)
        grades = grade_notebook(path, lesson, secret=secret, limits=limits)
    except KeyError as error:
        raise ValueError(error.args[0]) from error
    print(table(grades))
    if args.json:
        write_whole({Path(args.json): (as_json(path, lesson, grades) + "\n").encode()})
    return 0


def table(grades: list[Grade]) -> str:
    """A line for each exercise and the sum, then the ladders of those that did not pass."""
    titles = {each.exercise: find_exercise(each.exercise).title for each in grades}
    width = max(map(len, titles.values()))
    lines = [
        f"{each.exercise}  {titles[each.exercise]:<{width}}  {each.points:>2} of {each.most:<2} {each.status}"
        for each in grades
    ]
    lines.append(f"{'in all':<{width + 6}}  {sum(g.points for g in grades):>2} of {sum(g.most for g in grades)}")
    return "\n".join([*lines, *(f"\n{each.message}" for each in grades if each.status != "passed")])


def as_json(path: Path, lesson: str, grades: list[Grade]) -> str:
    """The grades for a gradebook."""
    points, most = sum(each.points for each in grades), sum(each.most for each in grades)
    facts = {"notebook": path.name, "lesson": lesson, "points": points, "most": most}
    return json.dumps({**facts, "exercises": [dataclasses.asdict(each) for each in grades]}, indent=2)
