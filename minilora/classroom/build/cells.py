"""From a lesson's source to the cells of its notebooks.

lesson.py  →  source_cells  →  full_cells       without the markers of solutions
                            →  student_cells    with a blank for each solution
"""

import copy
import hashlib
import re
from typing import Any

import jupytext
import nbformat

from minilora.classroom.build.lesson import Lesson, LessonError, Notebook
from minilora.classroom.build.lint import BEGIN, END, lint
from minilora.classroom.build.quiz import questions

BLANK = "...  # your code"


def source_cells(lesson: Lesson) -> list[Notebook]:
    """All cells of a lesson's source, with ids, quiz questions in place.

    Raises:
        LessonError: if the source breaks a rule of lessons/README.md (lists all).
    """
    source = jupytext.read(lesson.folder / "lesson.py", fmt="py:percent")
    problems = lint(lesson, source.cells)
    if problems:
        raise LessonError(f"{lesson.name}/lesson.py cannot be built:\n  " + "\n  ".join(problems))
    return _with_ids([_cell(cell.cell_type, _expand(lesson, cell.source), cell.metadata) for cell in source.cells])


def full_cells(cells: list[Notebook]) -> list[Notebook]:
    """The cells of the full notebook: all but those tagged `student`, without the markers of solutions."""
    kept = [copy.deepcopy(cell) for cell in cells if "student" not in cell.metadata.get("tags", [])]
    for cell in kept:
        cell.source = "\n".join(line for line in cell.source.splitlines() if line.strip() not in (BEGIN, END))
    return kept


def student_cells(cells: list[Notebook]) -> list[Notebook]:
    """The cells of the student notebook: all but those tagged `solution`, with blanks for solutions."""
    kept = [copy.deepcopy(cell) for cell in cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in kept:
        cell.source = blank(cell.source)
    return kept


def blank(source: str) -> str:
    r"""Put a blank in the place of every solution, as deep in as its marker.

    >>> print(blank("def f(x):\n    # BEGIN SOLUTION\n    return 2 * x\n    # END SOLUTION"))
    def f(x):
        ...  # your code
    """
    lines, inside = [], False
    for line in source.splitlines():
        if line.strip() == BEGIN:
            inside = True
            lines.append(line[: len(line) - len(line.lstrip())] + BLANK)
        elif line.strip() == END:
            inside = False
        elif not inside:
            lines.append(line)
    return "\n".join(lines)


def _cell(kind: str, source: str, metadata: Any) -> Notebook:
    make = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}[kind]
    return make(source, metadata={key: metadata[key] for key in ("tags", "jupyter") if key in metadata})


def _with_ids(cells: list[Notebook]) -> list[Notebook]:
    """Give each cell an id made of its text, so that editing one cell changes no other's."""
    seen: dict[str, int] = {}
    for cell in cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell["id"] = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return cells


def _expand(lesson: Lesson, source: str) -> str:
    """Put the quiz's questions in the place of `<!-- quiz: warm-up -->` and `<!-- quiz: exit -->`."""
    return re.sub(r"<!-- quiz: ([\w-]+) -->", lambda found: questions(lesson, found[1]), source)
