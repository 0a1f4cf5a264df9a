"""Masters for nbgrader and for otter: a lesson's notebook with its answers, and what each tool wants to know of it.

    nbgrader   cells with an answer are solution cells; after the cell with `check` stands a locked one that carries the
               exercise's points, into which grading from the file writes what was reached
    otter      the cell with `check` is a question with one test, which fails unless our plugin has graded the file

Both tools put a blank in the place of what stands between `# BEGIN SOLUTION` and `# END SOLUTION`. Neither grade is
taken from a kernel. `lessons/INSTRUCTORS.md` has the commands.
"""

import copy
import json
import re
from pathlib import Path

import nbformat

from minilora.classroom.build.cells import BLANK, source_cells
from minilora.classroom.build.lesson import Lesson, LessonError, Notebook
from minilora.classroom.build.lint import BEGIN, stated
from minilora.classroom.build.notebooks import new_notebook, was_edited, write_notebook
from minilora.files import write_whole

NBGRADER_CONFIG = f'''"""nbgrader's settings: grades come from the notebook's file, not from a kernel."""

from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbgrader.preprocessors import AssignLatePenalties, CheckCellMetadata, IgnorePattern, LimitOutput, SaveAutoGrades

from minilora.classroom.grading_nbgrader import FromTheFile

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "minilora"
c.ClearSolutions.code_stub = {{"python": "{BLANK}"}}
c.Autograde.autograde_preprocessors = [  # nbgrader's own, with FromTheFile in the place of Execute
    FromTheFile, IgnorePattern, ClearMetadataPreprocessor, LimitOutput, SaveAutoGrades, AssignLatePenalties,
    CheckCellMetadata,
]
c.FromTheFile.secret_file = SECRET_FILE
'''


def master_cells(lesson: Lesson) -> list[Notebook]:
    """The cells of the student notebook, with the answers between their markers."""
    cells = source_cells(lesson)
    return [copy.deepcopy(cell) for cell in cells if "solution" not in cell.metadata.get("tags", [])]


def checked_in(cell: Notebook, exercises: dict[str, int]) -> list[str]:
    """The ids of the exercises that a cell checks."""
    found = re.findall(r'\bcheck\("([^"]+)"', cell.source) if cell.cell_type == "code" else []
    return [each for each in found if each in exercises]


# ------------------------------------------------------------------------------------------------------------ nbgrader


def nbgrader_master(lesson: Lesson) -> Notebook:
    """The source notebook of an nbgrader assignment."""
    points, cells = stated(lesson, "points"), []
    for number, cell in enumerate(master_cells(lesson)):
        if cell.cell_type == "code" and BEGIN in cell.source:
            cell.metadata["nbgrader"] = _nbgrader(f"answer-{number}", solution=True)
        cells.append(cell)
        for exercise in checked_in(cell, points):
            text = f"# Exercise {exercise}: the grader writes its points here. It reads this notebook's file."
            graded = nbformat.v4.new_code_cell(text, id=grade_id(exercise))
            graded.metadata["nbgrader"] = _nbgrader(grade_id(exercise), grade=True, points=points[exercise])
            cells.append(graded)
    return new_notebook(lesson, cells)


def grade_id(exercise: str) -> str:
    """The name of an exercise's cell in nbgrader, which takes no dots.

    >>> grade_id("03.1")
    'exercise-03-1'
    """
    return f"exercise-{exercise.replace('.', '-')}"


def _nbgrader(name: str, *, solution: bool = False, grade: bool = False, points: int | None = None) -> dict:
    facts = {"schema_version": 3, "grade_id": name, "grade": grade, "solution": solution, "task": False}
    return facts | {"locked": not solution} | ({} if points is None else {"points": points})


# --------------------------------------------------------------------------------------------------------------- otter


def otter_master(lesson: Lesson, secret: str = "") -> Notebook:
    """The master notebook of an otter assignment; the secret ends up in its autograder.zip, and only there."""
    points, number = stated(lesson, "points"), lesson.name[:2]
    plugin = {"minilora.classroom.grading_otter.FromTheFile": {"lesson": number, "secret": secret}}
    config = {
        "name": lesson.name,
        "init_cell": False,
        "export_cell": False,
        "strip_solutions_from_all_cells": True,
        "tests": {"ok_format": False},
        "plugins": [plugin],
    }
    cells = [_raw("# ASSIGNMENT CONFIG\n" + json.dumps(config, indent=2))]  # JSON is YAML
    for cell in master_cells(lesson):
        exercises = checked_in(cell, points)
        if not exercises:
            cells.append(cell)
        for exercise in exercises:
            question = {"name": question_name(exercise), "points": points[exercise], "check_cell": False}
            cells += [_raw("# BEGIN QUESTION\n" + json.dumps(question)), _raw("# BEGIN SOLUTION"), cell]
            cells += [_raw("# END SOLUTION"), _raw("# BEGIN TESTS"), _otter_test(), _raw("# END TESTS")]
            cells.append(_raw("# END QUESTION"))
    return new_notebook(lesson, cells)


def question_name(exercise: str) -> str:
    """The name of an exercise in otter, which makes a Python name of it.

    >>> question_name("03.1")
    'exercise_03_1'
    """
    return f"exercise_{exercise.replace('.', '_')}"


def _otter_test() -> Notebook:
    """A test that fails: the points are our plugin's, and where it did not run there are none."""
    return nbformat.v4.new_code_cell(
        '""" # BEGIN TEST CONFIG\nhidden: true\n""" # END TEST CONFIG\n'
        'def test_is_graded_from_the_file():\n    raise AssertionError("the grading plugin of minilora did not run")'
    )


def _raw(text: str) -> Notebook:
    return nbformat.v4.new_raw_cell(text)


# -------------------------------------------------------------------------------------------------------------- writing


def write_masters(lesson: Lesson, folder: Path, secret_file: Path | None = None) -> list[Path]:
    """Write both masters of a lesson under a folder, and nbgrader's settings beside; say where.

    Raises:
        LessonError: if a master was edited by hand.
    """
    secret = secret_file.read_text(encoding="utf-8").strip() if secret_file else ""
    paths = [
        folder / "nbgrader" / "source" / lesson.name / f"{lesson.name}.ipynb",
        folder / "otter" / lesson.name / f"{lesson.name}.ipynb",
    ]
    edited = [str(path) for path in paths if path.exists() and was_edited(path)]
    if edited:
        raise LessonError(
            f"{' and '.join(edited)} was edited by hand and is left alone: move it away, then build again"
        )
    for path, master in zip(paths, (nbgrader_master(lesson), otter_master(lesson, secret)), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_notebook(master, path)
    named = repr(str(secret_file.resolve())) if secret_file else '""'
    config = NBGRADER_CONFIG.replace("SECRET_FILE", named)
    write_whole({folder / "nbgrader" / "nbgrader_config.py": config.encode()})
    return paths
