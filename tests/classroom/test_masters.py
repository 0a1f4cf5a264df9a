"""nbgrader and otter, run for real on the masters of every lesson, and on right, wrong and hostile submissions."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from minilora.classroom.build.lesson import Lesson, LessonError, find_lessons
from minilora.classroom.build.lint import BEGIN, END, stated
from minilora.classroom.build.masters import grade_id, nbgrader_master, question_name, write_masters

ROOT = Path(__file__).parents[2]
LESSONS = find_lessons(ROOT)
QUICK = "03_lora_in_numpy"
ONE_QUICK = [
    pytest.param(lesson, id=lesson.name, marks=[] if lesson.name == QUICK else [pytest.mark.long]) for lesson in LESSONS
]
RIGHT = "return x @ W.T + (alpha / len(A)) * (x @ A.T) @ B.T"
SUBMISSIONS = {  # what stands in the body of 03.1, and its points
    "right": (RIGHT, 2),
    "wrong": ("return x @ W.T + (x @ A.T) @ B.T", 0),
    "endless": ("while True: pass", 0),
    "hungry": ("return np.ones(50 * 2**30 // 8)", 0),
    "exits": ("import os; os._exit(0)", 0),
    "patches": ("np.allclose = np.array_equal = lambda *a, **k: True; return x @ W.T", 0),
    "borrows": ("from minilora.numpy_lora.forward import lora_forward as f; return f(x, W, A, B, alpha)", 0),
}


def tool(*words: str | Path, cwd: Path) -> str:
    """What a command of this Python's environment prints; a failure shows it."""
    own = str(Path(sys.executable).parent)
    environment = {
        **os.environ,
        "PATH": own + os.pathsep + os.environ["PATH"],
        "MINILORA_LESSONS": str(ROOT / "lessons"),
    }
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, "-m", *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


def answers(lesson: Lesson) -> list[str]:
    """The lines of a lesson's answers that say something: those long enough to be nobody else's."""
    source = (lesson.folder / "lesson.py").read_text(encoding="utf-8")
    bodies = re.findall(rf"{BEGIN}\n(.*?){END}", source, flags=re.DOTALL)
    bodies += [""] if not bodies else []
    outside = re.sub(rf"{BEGIN}\n.*?{END}", "", source, flags=re.DOTALL)
    lines = [line.strip() for body in bodies for line in body.splitlines()]
    return [line for line in lines if len(line) > 20 and line not in outside]


def assert_no_answer(lesson: Lesson, student: Path) -> None:
    notebook = nbformat.read(student, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells) + json.dumps(notebook.metadata)
    assert len(answers(lesson)) >= 3
    assert [line for line in answers(lesson) if line in text] == []
    assert "SOLUTION" not in text
    assert [cell.outputs for cell in notebook.cells if cell.get("outputs")] == []


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_the_student_notebook_holds_no_line_of_an_answer(lesson: Lesson):
    assert_no_answer(lesson, lesson.student)


def test_an_answer_that_was_left_in_is_found(tmp_path: Path):
    (lesson,) = find_lessons(ROOT, "03")
    with pytest.raises(AssertionError):
        assert_no_answer(lesson, lesson.full)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_an_nbgrader_master_has_a_cell_with_the_points_of_each_exercise(lesson: Lesson):
    graded = [cell.metadata["nbgrader"] for cell in nbgrader_master(lesson).cells if "nbgrader" in cell.metadata]
    points = {facts["grade_id"]: facts["points"] for facts in graded if facts["grade"]}

    assert points == {grade_id(each): value for each, value in stated(lesson, "points").items()}


@pytest.mark.parametrize("lesson", ONE_QUICK)
def test_nbgrader_generates_an_assignment_without_an_answer(lesson: Lesson, tmp_path: Path):
    write_masters(lesson, tmp_path)
    tool("nbgrader", "generate_assignment", lesson.name, cwd=tmp_path / "nbgrader")

    released = tmp_path / "nbgrader" / "release" / lesson.name / f"{lesson.name}.ipynb"
    assert_no_answer(lesson, released)


def hand_in(course: Path, lesson: Lesson, student: str, change: tuple[str, str] | None = None) -> None:
    """A submission: the released notebook with every blank filled from the master, but one."""
    folder = course / "submitted" / student / lesson.name
    folder.mkdir(parents=True)
    shutil.copy(course / "release" / lesson.name / f"{lesson.name}.ipynb", folder)
    released = nbformat.read(folder / f"{lesson.name}.ipynb", as_version=4)
    master = {each["id"]: each.source for each in nbgrader_master(lesson).cells}
    for cell in released.cells:
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = master[cell["id"]]
            if change and f"def {change[0]}(" in cell.source:
                cell.source = re.sub(f"(?s){BEGIN}.*?{END}", lambda _: change[1], cell.source)
    nbformat.write(released, folder / f"{lesson.name}.ipynb")


def scores(course: Path, lesson: Lesson) -> dict[str, dict[str, float]]:
    """Every student's points by grade cell, as nbgrader's own database has them."""
    code = (
        "import json, sys; from nbgrader.api import Gradebook\n"
        "with Gradebook('sqlite:///gradebook.db') as book:\n"
        "    found = {s.student.id: {g.cell.name: g.score for n in s.notebooks for g in n.grades}\n"
        "             for s in book.assignment_submissions(sys.argv[1])}\n"
        "    print(json.dumps(found))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, lesson.name], cwd=course, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def test_nbgrader_grades_right_wrong_endless_hungry_and_cheating_submissions(tmp_path: Path):
    (lesson,) = find_lessons(ROOT, "03")
    course = tmp_path / "nbgrader"
    write_masters(lesson, tmp_path)
    tool("nbgrader", "generate_assignment", lesson.name, cwd=course)
    for student, (body, _) in SUBMISSIONS.items():
        hand_in(course, lesson, student, ("lora_forward", body))
    tool("nbgrader", "autograde", lesson.name, "--FromTheFile.seconds=3", cwd=course)

    found = scores(course, lesson)
    assert {name: points["exercise-03-1"] for name, points in found.items()} == {
        name: points for name, (_, points) in SUBMISSIONS.items()
    }
    assert found["right"] == {"exercise-03-1": 2, "exercise-03-2": 4, "exercise-03-3": 3}
    assert found["wrong"]["exercise-03-2"] == 4, "one mistake is not charged twice"
    graded = nbformat.read(course / "autograded" / "wrong" / lesson.name / f"{lesson.name}.ipynb", as_version=4)
    told = {cell.metadata.get("nbgrader", {}).get("grade_id"): cell.get("outputs") for cell in graded.cells}
    assert "no scaling: You left out alpha / r" in told["exercise-03-1"][0].text


@pytest.mark.long
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_nbgrader_gives_the_reference_full_marks_and_the_blank_none(lesson: Lesson, tmp_path: Path):
    course = tmp_path / "nbgrader"
    write_masters(lesson, tmp_path)
    tool("nbgrader", "generate_assignment", lesson.name, cwd=course)
    hand_in(course, lesson, "reference")
    blank = course / "submitted" / "blank" / lesson.name
    shutil.copytree(course / "release" / lesson.name, blank)
    tool("nbgrader", "autograde", lesson.name, cwd=course)

    points = {grade_id(each): value for each, value in stated(lesson, "points").items()}
    assert scores(course, lesson) == {"reference": points, "blank": dict.fromkeys(points, 0)}


@pytest.mark.parametrize("lesson", ONE_QUICK)
def test_otter_assigns_a_lesson_and_its_autograder_gives_the_reference_full_marks(lesson: Lesson, tmp_path: Path):
    """`otter assign` runs the autograder on the answers itself, and fails where they do not get all points."""
    write_masters(lesson, tmp_path)
    folder = tmp_path / "otter" / lesson.name
    tool("otter", "assign", f"{lesson.name}.ipynb", "dist", cwd=folder)

    assert_no_answer(lesson, folder / "dist" / "student" / f"{lesson.name}.ipynb")
    assert list((folder / "dist" / "autograder").glob("*autograder*.zip"))


def test_otter_grades_what_was_handed_in_from_its_file(tmp_path: Path):
    (lesson,) = find_lessons(ROOT, "03")
    write_masters(lesson, tmp_path)
    folder = tmp_path / "otter" / lesson.name
    tool("otter", "assign", f"{lesson.name}.ipynb", "dist", "--no-run-tests", cwd=folder)
    (autograder,) = (folder / "dist" / "autograder").glob("*autograder*.zip")
    notebook = nbformat.read(folder / "dist" / "student" / f"{lesson.name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "def lora_forward(" in cell.source:
            cell.source = re.sub(r"\.\.\.( +# your code)?", RIGHT, cell.source, count=1)
        if "def lora_backward(" in cell.source:
            cell.source = re.sub(r"\.\.\.( +# your code)?", "import os; os._exit(0)", cell.source, count=1)
    nbformat.write(notebook, folder / "mine.ipynb")
    tool("otter", "run", "-a", autograder, "-o", folder, "mine.ipynb", cwd=folder)

    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    reached = {each["name"].split()[0]: each.get("score") for each in results["tests"]}
    assert sum(value or 0 for value in reached.values()) == 2
    assert "Boot" not in results.get("output", "") and "03.1" in results["output"]
    assert question_name("03.1") in json.dumps(results)


def test_a_master_that_was_edited_is_left_alone(tmp_path: Path):
    (lesson,) = find_lessons(ROOT, "03")
    path = write_masters(lesson, tmp_path)[0]
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source += "\nMy own words."
    nbformat.write(notebook, path)
    mine = path.read_bytes()

    with pytest.raises(LessonError, match="was edited by hand and is left alone"):
        write_masters(lesson, tmp_path)
    assert path.read_bytes() == mine


def test_a_secret_is_in_the_masters_and_not_in_the_student_notebook(tmp_path: Path):
    (lesson,) = find_lessons(ROOT, "03")
    secret = tmp_path / "secret"
    secret.write_text("a long random line\n", encoding="utf-8")
    nbgrader, otter = write_masters(lesson, tmp_path, secret)

    assert "a long random line" in otter.read_text(encoding="utf-8")
    assert "a long random line" not in nbgrader.read_text(encoding="utf-8")
    assert str(secret) in (tmp_path / "nbgrader" / "nbgrader_config.py").read_text(encoding="utf-8")
