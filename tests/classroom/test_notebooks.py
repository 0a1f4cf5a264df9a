"""The notebooks as they are committed: the ones that their sources make, and readable without a kernel."""

import itertools
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from minilora.classroom.build.executing import FIGURE_BYTES, output_problems
from minilora.classroom.build.lesson import find_lessons
from minilora.classroom.build.notebooks import problem_of
from minilora.classroom.build.quiz import load_quiz

ROOT = Path(__file__).parents[2]
LESSONS = find_lessons(ROOT)


@pytest.fixture(params=LESSONS, ids=lambda lesson: lesson.name)
def lesson(request: pytest.FixtureRequest):
    return request.param


@pytest.mark.parametrize("kind", ["full", "student"])
def test_a_notebook_is_the_one_that_its_source_makes(lesson, kind: str):
    problem = problem_of(lesson, getattr(lesson, kind))

    assert problem is None, f"{getattr(lesson, kind).name} {problem}: run python -m minilora.classroom.build"


def test_a_full_notebook_can_be_published(lesson):
    notebook = nbformat.read(lesson.full, as_version=4)

    assert output_problems(notebook, ROOT) == []
    assert "widgets" not in notebook.metadata
    assert "jupyter.widget" not in lesson.full.read_text(encoding="utf-8")
    assert lesson.full.stat().st_size < 2 * FIGURE_BYTES


def test_every_figure_has_a_description_and_a_finding_under_it(lesson):
    figures = 0
    for cell in nbformat.read(lesson.full, as_version=4).cells:
        outputs = cell.get("outputs", [])
        for output, under in itertools.pairwise([*outputs, None]):
            if "image/png" in output.get("data", {}):
                figures += 1
                assert len(output.metadata["image/png"]["alt"].split()) > 10
                assert under is not None and under.data["text/markdown"].startswith("**")
    assert figures >= 2, "the first frame and the filmstrip at least"


def test_a_student_notebook_holds_blanks_for_answers_and_no_output(lesson):
    source = (lesson.folder / "lesson.py").read_text(encoding="utf-8")
    cells = nbformat.read(lesson.student, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")

    assert not any(cell.get("outputs") for cell in cells)
    assert "SOLUTION" not in code and code.count("...  # your code") == source.count("# BEGIN SOLUTION")


def test_hint_can_be_called_in_the_student_notebook_because_its_setup_imports_it(lesson):
    """In a process of its own: a setup cell also changes how NumPy prints, for all that comes after it."""
    cells = nbformat.read(lesson.student, as_version=4).cells
    setup = [cell.source for cell in cells if "setup" in cell.metadata.get("tags", [])]
    code = "\n".join([*setup, "from minilora.classroom import exercises", "assert hint is exercises.hint"])

    subprocess.run([sys.executable, "-c", code], check=True, cwd=lesson.student.parent)


@pytest.mark.parametrize(
    "lesson", [each for each in LESSONS if not each.name.startswith("00")], ids=lambda lesson: lesson.name
)
def test_the_quiz_explains_every_answer(lesson):
    quiz = load_quiz(lesson.folder / "quiz.yml")

    assert all(len(question["answers"]) >= 3 for part in quiz.values() for question in part)
