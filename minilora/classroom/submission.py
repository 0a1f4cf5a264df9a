"""What goes into an exercise's process: the learner's part of the notebook, and what the course adds to it.

    own       the definition that is asked for, and what it uses, without our imports
    course    what the lesson's own cells give (`from minilora… import lora_init`), answers to earlier exercises that
              the notebook goes on with, and the checks that look into a class or a module
    refused   why it is not run at all: it imports what the lesson does not give, or asks the course for an answer

The refusals are a courtesy: they name the line before anything runs. What holds is the process (sandbox.py).
"""

import ast
import functools
import importlib
import importlib.util
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.classroom.exercises import Exercise
from minilora.classroom.lessons import lesson_module, lessons_folder
from minilora.classroom.sandbox import Limits, Sandbox
from minilora.classroom.sandboxed import BLOCKED
from minilora.classroom.slices import Program, Statement

ASKING = {"find_exercise", "examine", "EXERCISES", "lesson_module", "hint", "overview"}  # the course about itself
PRYING = {
    "__subclasses__", "__globals__", "__closure__", "__code__", "__builtins__", "__loader__", "__import__", "importlib",
    "_getframe", "gc", "inspect", "ctypes", "f_back", "f_globals", "tb_frame", "sys.modules", "meta_path", "runpy",
    "subprocess", "socket", "multiprocessing", "pkgutil", "site-packages",
}  # fmt: skip


@dataclass(kw_only=True)
class Submission:
    """The two parts and the refusals."""

    own: str = ""
    course: str = ""
    handed: dict[str, str] = field(default_factory=dict)  # the learner's name: the course's
    empty: tuple[tuple[str, str], ...] = ()
    refused: list[str] = field(default_factory=list)

    def sandbox(self, seeds: tuple[int, ...], limits: Limits) -> Sandbox:
        """The process, not yet started; `seeds` draw the inputs of the checks that are made in it."""
        try:
            lessons = lessons_folder()
            hidden: tuple[Path, ...] = (lessons, lessons.parent / "notebooks")
        except FileNotFoundError:
            hidden = ()
        return Sandbox(
            own=self.own,
            course=self.course,
            handed=self.handed,
            empty=self.empty,
            hidden=hidden,
            seeds=seeds if "observer_generate" in self.course else (),
            limits=limits,
        )


def asked_name(exercise: Exercise) -> str:
    """The name that the exercise asks for: the first of its line `asks`."""
    found = re.match(r"(?:class |with |def )?([A-Za-z_]\w*)", exercise.asks)
    if found is None:
        raise ValueError(f"exercise {exercise.id} asks for no name: {exercise.asks!r}")
    return found[1]


def submission(
    program: Program, exercise: Exercise, passed: frozenset[str], not_by_value: frozenset[str]
) -> Submission:
    """Cut the learner's part out of a notebook's program and gather the course's."""
    lesson = _Lesson.of(exercise.id.split(".")[0])
    going_on = _GoingOn(exercise, lesson, passed)
    needed = program.rewritten(going_on).needed_by(asked_name(exercise))
    course = _Course(exercise, lesson)
    refused, own = list(_prying(needed, lesson)), []
    for statement in needed:
        problem = course.give(statement, needed)
        if problem is None:
            own.append(statement.text)
        elif problem:
            refused.append(problem)
    names = {name for each in needed for name in each.reads | each.reads_later}
    for name in names & going_on.earlier.keys():
        course.answer(name, going_on.earlier[name])
    course.observe(not_by_value)
    course.load_libraries(needed)
    return Submission(
        own="\n".join(own) + "\n", course=course.text(), handed=course.handed, empty=course.empty(), refused=refused
    )


# ------------------------------------------------------------------------------------------------ what the lesson has


@dataclass(frozen=True)
class _Lesson:
    """A lesson's sources: what its own cells import of ours, and the program of its exercises.py."""

    number: str
    source: str = ""
    exercises: str = ""

    @classmethod
    @functools.cache
    def of(cls, number: str) -> "_Lesson":
        """The lesson's sources, empty where there is no such lesson."""
        try:
            folder = Path(lesson_module(number).__file__ or "").parent
        except (KeyError, FileNotFoundError):
            return cls(number)
        source = (folder / "lesson.py").read_text(encoding="utf-8") if (folder / "lesson.py").exists() else ""
        return cls(number, source, (folder / "exercises.py").read_text(encoding="utf-8"))

    @functools.cached_property
    def gives(self) -> frozenset[tuple[str, str]]:
        """The (module, name) of everything of ours that its cells import."""
        nodes = ast.walk(ast.parse(self.source))
        return frozenset(pair for node in nodes for pair in _imported(node))

    @functools.cached_property
    def attributes(self) -> frozenset[tuple[str, str]]:
        """What its cells take from a name: ("lesson", "adapt") for `lesson.adapt`."""
        return frozenset(_attributes(ast.parse(self.source)))

    @property
    def ids(self) -> list[str]:
        """The ids of its exercises, in order."""
        return [each.id for each in lesson_module(self.number).EXERCISES] if self.exercises else []


def _imported(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The (module, name) that an import of ours names; the name is empty for `import module`."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names if alias.name.partition(".")[0] in BLOCKED)
    elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in BLOCKED:
        yield from ((node.module or "", alias.name) for alias in node.names)


def _libraries(tree: ast.AST) -> Iterator[str]:
    """The packages, not ours, that are imported anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (root for name in names if (root := name.partition(".")[0]) not in BLOCKED)


def _attributes(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield node.value.id, node.attr


# ------------------------------------------------------------------------------------- `check(…).function` when graded


class _GoingOn(ast.NodeTransformer):
    """`check("03.1", f).function` when a later exercise is graded: f itself where 03.1 passed, else the course's."""

    def __init__(self, exercise: Exercise, lesson: _Lesson, passed: frozenset[str]) -> None:
        self.passed = passed
        before = lesson.ids[: lesson.ids.index(exercise.id)] if exercise.id in lesson.ids else []
        self.earlier = {f"course_answer_{each.replace('.', '_')}": each for each in before}

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`check("03.1", f).function`."""
        call = node.value
        if not (
            node.attr == "function"
            and isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "check"
            and len(call.args) == 2
            and isinstance(call.args[0], ast.Constant)
        ):
            return self.generic_visit(node)
        answer = f"course_answer_{str(call.args[0].value).replace('.', '_')}"
        if answer in self.earlier and call.args[0].value not in self.passed:
            return ast.Name(answer, ast.Load())
        return self.visit(call.args[1])


# ---------------------------------------------------------------------------------------------------- what is refused


def _prying(needed: list[Statement], lesson: _Lesson) -> Iterator[str]:
    """Names that look behind the grader, unless the lesson's own cells use them too; and imports inside functions."""
    for statement in needed:
        for node in ast.walk(statement.node):
            for name in _names(node):
                if name in PRYING and not re.search(rf"\b{re.escape(name)}\b", lesson.source):
                    yield f"it uses {name}, which no exercise needs"
            if not statement.is_import:
                yield from (f"it imports {module} {name}".rstrip() for module, name in _imported(node))


def _names(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute):
        yield node.attr
        if isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        module = getattr(node, "module", None)
        yield from ([module.partition(".")[0]] if module else [each.name.partition(".")[0] for each in node.names])
        yield from (f"{module}.{each.name}" for each in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


# ---------------------------------------------------------------------------------------------------- the course's part


class _Course:
    """The program of the course's part, while it is put together."""

    def __init__(self, exercise: Exercise, lesson: _Lesson) -> None:
        self.exercise, self.lesson = exercise, lesson
        self.handed: dict[str, str] = {}
        self.lines = ["from types import SimpleNamespace as course_namespace"]
        self.wanted: list[str] = []

    def give(self, statement: Statement, needed: list[Statement]) -> str | None:
        """Hand out what an import of ours, or `lesson_module`, gives; "" or why not. None: it is the learner's own."""
        pairs = list(_imported(statement.node)) if statement.is_import else []
        taken = {attribute for each in needed for name, attribute in _attributes(each.node) if name in statement.binds}
        alias = next(iter(statement.binds), "")
        if pairs:
            return self._import(*pairs[0], alias, taken)
        call = getattr(statement.node, "value", None)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "lesson_module":
            return self._lesson(alias, taken)
        return None

    def _import(self, module: str, name: str, alias: str, taken: set[str]) -> str:
        whole = f"{module} {name}".rstrip()
        if name == "lesson_module":
            return ""  # what is taken from the lesson is handed out by name
        if (module, name) not in self.lesson.gives or name in ASKING:
            return f"it imports {whole}, which this lesson does not give"
        value: Any = importlib.import_module(module)
        is_inside = name and not hasattr(value, name)
        value = importlib.import_module(f"{module}.{name}") if is_inside else getattr(value, name) if name else value
        if value is self.exercise.reference:
            return f"it uses the course's own {name}"
        if not isinstance(value, types.ModuleType):
            self._add(alias, f"from {module} import {name} as course_{alias}")
            return ""
        for attribute in sorted(taken):
            if getattr(value, attribute, None) is self.exercise.reference:
                return f"it uses the course's own {alias}.{attribute}"
            if (alias, attribute) not in self.lesson.attributes:
                return f"it uses {alias}.{attribute}, which this lesson does not give"
        self.lines.append(f"import {value.__name__} as course_module_{alias}")
        parts = ", ".join(f"{each}=course_module_{alias}.{each}" for each in sorted(taken))
        self._add(alias, f"course_{alias} = course_namespace({parts})")
        return ""

    def _lesson(self, alias: str, taken: set[str]) -> str:
        for attribute in sorted(taken):
            if getattr(lesson_module(self.lesson.number), attribute, None) is self.exercise.reference:
                return f"it uses the course's own {alias}.{attribute}"
            if (alias, attribute) not in self.lesson.attributes:
                return f"it uses {alias}.{attribute}, which this lesson does not give"
        parts = ", ".join(f"{each}={each}" for each in sorted(taken))
        self._add(alias, f"course_{alias} = course_namespace({parts})")
        return ""

    def _add(self, name: str, line: str) -> None:
        self.lines.append(line)
        self.handed[name] = f"course_{name}"
        self.wanted.append(f"course_{name}")

    def answer(self, name: str, exercise_id: str) -> None:
        """Hand out the course's answer to an earlier exercise."""
        reference = next(e.reference for e in lesson_module(self.lesson.number).EXERCISES if e.id == exercise_id)
        if reference.__module__.partition(".")[0] == "minilora":
            self.lines.append(f"from {reference.__module__} import {reference.__qualname__} as {name}")
        else:
            self.lines.append(f"{name} = {reference.__qualname__}")
        self.handed[name] = name
        self.wanted.append(name)

    def observe(self, not_by_value: frozenset[str]) -> None:
        """Add the checks that look at the learner's object, with what makes their inputs."""
        if not not_by_value:
            return
        written = _written(self.lesson.exercises, self.exercise.id)
        whole = f"next(each for each in EXERCISES if each.id == {self.exercise.id!r})"
        for name in sorted({"generate", *not_by_value}):
            found = f"{whole}.properties[{name}].test" if name.isdigit() else f"{whole}.{name}"
            self.lines.append(f"observer_{name} = {written.get(name, found)}")
            self.wanted.append(f"observer_{name}")

    def load_libraries(self, needed: list[Statement]) -> None:
        """Import what the learner's part and the lesson both import, before the lock: PyTorch loads native code."""
        own = {name for each in needed for name in _libraries(each.node)}
        there = {"torch"} if importlib.util.find_spec("torch") else set()
        for name in sorted(own & (there | set(_libraries(ast.parse(self.lesson.source))))):
            self.lines.append(f"import {name} as course_library_{name}")
            self.wanted.append(f"course_library_{name}")

    def program(self) -> list[Statement]:
        """The statements of exercises.py that are needed, and the lines that were added."""
        return Program.of_cells([self.lesson.exercises, "\n".join(self.lines)]).needed_by(*self.wanted)

    def text(self) -> str:
        """The program as text."""
        return "\n".join(each.text for each in self.program()) + "\n"

    def empty(self) -> tuple[tuple[str, str], ...]:
        """The answer itself, to be taken out of the process, unless the course's part needs it."""
        reference = self.exercise.reference
        name = (reference.__module__, reference.__qualname__)
        is_needed = any(
            pair[1] == name[1] and pair[0].startswith("minilora")
            for each in self.program()
            for pair in _imported(each.node)
        )
        return () if is_needed else (name,)


def _written(exercises: str, exercise_id: str) -> dict[str, str]:
    """The expressions for generate, observe and each property's test ("0", "1", …) as exercises.py has them."""
    for node in ast.walk(ast.parse(exercises)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != "Exercise":
            continue
        given = {each.arg: each.value for each in node.keywords if each.arg}
        if "id" in given and ast.unparse(given["id"]) == repr(exercise_id):
            parts = {name: ast.unparse(given[name]) for name in ("generate", "observe") if name in given}
            tests = [f"({ast.unparse(each)}).test" for each in getattr(given.get("properties"), "elts", ())]
            return parts | {str(index): test for index, test in enumerate(tests)}
    return {}
