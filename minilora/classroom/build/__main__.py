"""Build the notebooks of the lessons whose sources changed."""

import argparse
import sys
import time
from pathlib import Path

import nbformat

from minilora.classroom.build.cells import full_cells, source_cells, student_cells
from minilora.classroom.build.executing import execute
from minilora.classroom.build.lesson import Lesson, LessonError, find_lessons
from minilora.classroom.build.masters import write_masters
from minilora.classroom.build.notebooks import new_notebook, outputs_sha256, problem_of, was_edited, write_notebook
from minilora.classroom.build.pages import page
from minilora.classroom.build.slides import slides
from minilora.classroom.lessons import lessons_folder
from minilora.files import write_whole

SECONDS_A_LESSON = 90


def build(lesson: Lesson, force: bool = False) -> str:
    """Write both notebooks of a lesson where they are not what its source makes; say what was done.

    Raises:
        LessonError: if the source breaks a rule, a cell fails, or a notebook was edited by hand.
    """
    edited = [path for path in (lesson.full, lesson.student) if path.exists() and was_edited(path)]
    if edited:
        names = " and ".join(str(path.relative_to(lesson.notebooks.parent)) for path in edited)
        raise LessonError(f"{names} was edited by hand and is left alone: move it away, then build again")
    cells, done = source_cells(lesson), []
    if force or problem_of(lesson, lesson.full):
        notebook, started = new_notebook(lesson, full_cells(cells)), time.monotonic()
        lesson.notebooks.mkdir(parents=True, exist_ok=True)
        execute(notebook, lesson.notebooks, lesson.folder.parent)
        notebook.metadata["minilora"]["outputs_sha256"] = outputs_sha256(notebook.cells)
        write_notebook(notebook, lesson.full)
        seconds = time.monotonic() - started
        over = f", over the {SECONDS_A_LESSON} s that a lesson may take" if seconds > SECONDS_A_LESSON else ""
        done.append(f"executed in {seconds:.0f} s{over}, {lesson.full.stat().st_size / 1e6:.2f} MB")
    if force or problem_of(lesson, lesson.student):
        write_notebook(new_notebook(lesson, student_cells(cells)), lesson.student)
        done.append("student notebook written")
    return "; ".join(done) or "unchanged"


def write_pages(lesson: Lesson, out: Path) -> list[Path]:
    """Write the page and the slides of a lesson where its notebook is newer; say which.

    Raises:
        LessonError: if the notebook is not the one that its source makes.
    """
    if problem := problem_of(lesson, lesson.full):
        raise LessonError(f"{lesson.full.name} {problem}: make build comes first")
    made = []
    for kind, make in (("pages", page), ("slides", slides)):
        path = out / kind / f"{lesson.name}.html"
        text = make(nbformat.read(lesson.full, as_version=4), lesson.name).encode()
        if not path.exists() or path.read_bytes() != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole({path: text})
            made.append(path)
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m minilora.classroom.build", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run nothing; say which notebooks are stale, and exit 1")
    parser.add_argument("--only", default="", metavar="NN", help="the lessons whose name begins so, such as 03")
    parser.add_argument("--force", action="store_true", help="execute lessons whose source is unchanged, too")
    parser.add_argument("--pages", action="store_true", help="write build/pages and build/slides, to read and to show")
    parser.add_argument("--masters", action="store_true", help="write build/nbgrader and build/otter, with the answers")
    parser.add_argument("--secret-file", type=Path, help="for --masters: a file with a long random line, kept private")
    parser.add_argument("--root", type=Path, help="the folder that holds lessons/ and notebooks/ (default: found)")
    chosen = parser.parse_args(arguments)
    failures = 0
    try:
        lessons = find_lessons((chosen.root or lessons_folder().parent).resolve(), chosen.only)
    except (LessonError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    for lesson in lessons:
        print(f"{lesson.name:<28}", end="", flush=True)
        try:
            if chosen.check:
                found = {path: problem_of(lesson, path) for path in (lesson.full, lesson.student)}
                stale = [f"{path.relative_to(lesson.notebooks.parent)} {why}" for path, why in found.items() if why]
                failures += bool(stale)
                print("; ".join(stale) or "up to date")
            elif chosen.pages or chosen.masters:
                out = lesson.notebooks.parent / "build"
                made = write_pages(lesson, out) if chosen.pages else []
                made += write_masters(lesson, out, chosen.secret_file) if chosen.masters else []
                print(" ".join(str(path.relative_to(out.parent)) for path in made) or "unchanged")
            else:
                print(build(lesson, chosen.force))
        except LessonError as error:
            failures += 1
            print(f"FAILED\n{error}")
    if chosen.check and failures:
        print("To make them: python -m minilora.classroom.build")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
