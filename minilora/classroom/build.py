"""From lessons to notebooks: `python -m minilora.classroom.build`.

    lessons/03_slug/lesson.py   →   notebooks/03_slug.ipynb            executed, with its figures
                                    notebooks/student/03_slug.ipynb    not executed, with blanks to fill

The source is the only place where a lesson is edited. A notebook carries the hash of the sources it was made from, so
`--check` can say, without running anything, which notebooks are not the ones their sources make. A notebook whose cells
somebody edited is never written over. `lessons/README.md` says how a source is written.
"""

import argparse
import copy
import hashlib
import html
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import jupytext
    import nbformat
    import yaml
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
except ImportError as error:
    raise ImportError("building notebooks needs the course's packages: pip install 'minilora[course]'") from error

from minilora.classroom.lessons import lessons_folder
from minilora.files import write_whole

Notebook = nbformat.NotebookNode

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
BLANK = "...  # your code"
LINES_A_CELL = 25
FENCED_COLUMNS = 90  # what a window 1,100 pixels wide shows of a fenced block without wrapping it
SECONDS_A_LESSON = 90
FIGURE_BYTES = 1_000_000
WIDGET = "application/vnd.jupyter.widget-view+json"
LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "MINILORA_STRICT": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
}


class LessonError(ValueError):
    """A lesson that cannot be built; the text lists everything that is wrong with it."""


@dataclass(frozen=True)
class Lesson:
    """One folder of lessons/ and the two notebooks that are made from it."""

    folder: Path
    notebooks: Path

    @property
    def name(self) -> str:
        """Such as "03_lora_in_numpy"."""
        return self.folder.name

    @property
    def full(self) -> Path:
        """The executed notebook."""
        return self.notebooks / f"{self.name}.ipynb"

    @property
    def student(self) -> Path:
        """The notebook with blanks."""
        return self.notebooks / "student" / f"{self.name}.ipynb"

    def source_sha256(self) -> str:
        """The hash of everything that the notebooks are made from."""
        digest = hashlib.sha256()
        for name in ("lesson.py", "exercises.py", "quiz.yml", "claims.py"):
            path = self.folder / name
            digest.update(name.encode() + b"\0" + (path.read_bytes() if path.exists() else b"") + b"\0")
        return digest.hexdigest()


def find_lessons(root: Path, only: str = "") -> list[Lesson]:
    """The lessons under root/lessons, all or those whose name begins with `only`.

    Raises:
        LessonError: if there is none (names those that exist).
    """
    sources = sorted((root / "lessons").glob("[0-9][0-9]_*/lesson.py"))
    lessons = [Lesson(path.parent, root / "notebooks") for path in sources]
    chosen = [lesson for lesson in lessons if lesson.name.startswith(only)]
    if not chosen:
        raise LessonError(f"no lesson begins with {only!r}; there are {[lesson.name for lesson in lessons]}")
    return chosen


# ------------------------------------------------------------------------------------------------ from source to cells


def source_cells(lesson: Lesson) -> list[Notebook]:
    """All cells of a lesson's source, with ids, quiz questions in place.

    Raises:
        LessonError: if the source breaks a rule of lessons/README.md (lists all).
    """
    source = jupytext.read(lesson.folder / "lesson.py", fmt="py:percent")
    problems = [problem for number, cell in enumerate(source.cells, start=1) for problem in _lint(number, cell)]
    problems += _lint_bets([cell.source for cell in source.cells if cell.cell_type == "code"])
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


def _lint(number: int, cell: Notebook) -> list[str]:
    """What is wrong with one cell of a source."""
    lines = cell.source.splitlines()
    where = f"cell {number} ({lines[0][:40] if lines else 'empty'}…)"
    rules = {
        f"has {len(lines)} lines of code; {LINES_A_CELL} is the most": cell.cell_type == "code"
        and len(lines) > LINES_A_CELL,
        "reads In[…] or asks for input(), which no runner offers": cell.cell_type == "code"
        and re.search(r"\bIn\[|\binput\(", cell.source) is not None,
        "is tagged raises-exception, which no runner checks: use expect_bug": "raises-exception"
        in cell.metadata.get("tags", []),
        "shows an image from the web": re.search(r"!\[[^\]]*\]\(https?:|<img[^>]+https?:", cell.source) is not None,
        f"has unbalanced markers; write {BEGIN} and {END}, with one #": not _is_balanced(lines),
        "opens and closes <details> unequally often": cell.source.count("<details") != cell.source.count("</details>"),
        f"has a fenced block wider than {FENCED_COLUMNS} columns": cell.cell_type == "markdown"
        and any(len(line) > FENCED_COLUMNS for line in _fenced(lines)),
        "gives check's answer the name of the learner's own function: bind another": cell.cell_type == "code"
        and re.search(r"^(\w+) = check\([^,]+, \1\)", cell.source, flags=re.MULTILINE) is not None,
    }
    return [f"{where} {problem}" for problem, is_broken in rules.items() if is_broken]


def _is_balanced(lines: list[str]) -> bool:
    markers = [line.strip() for line in lines if re.search(r"#\s*(BEGIN|END) SOLUTION", line)]
    return markers == [BEGIN, END] * (len(markers) // 2)


def _fenced(lines: list[str]) -> list[str]:
    """The lines between one ``` and the next."""
    blocks = "\n".join(["", *lines]).split("\n```")[1::2]
    return [line for block in blocks for line in block.splitlines()[1:]]


def _lint_bets(sources: list[str]) -> list[str]:
    """Every bet is placed before it is settled, and settled at all."""
    order = re.findall(r"^(predict|settle)\(\s*\"([^\"]+)\"", "\n".join(sources), flags=re.MULTILINE)
    placed = [name for word, name in order if word == "predict"]
    problems = [f"bet {name!r} is never settled" for name in placed if ("settle", name) not in order]
    for position, (word, name) in enumerate(order):
        if word == "settle" and ("predict", name) not in order[:position]:
            problems.append(f"bet {name!r} is settled before it is placed")
    return problems


def _expand(lesson: Lesson, source: str) -> str:
    """Put the quiz's questions in the place of `<!-- quiz: warm-up -->` and `<!-- quiz: exit -->`."""
    return re.sub(r"<!-- quiz: ([\w-]+) -->", lambda found: _questions(lesson, found[1]), source)


def load_quiz(path: Path) -> dict[str, list[dict]]:
    """The questions of a quiz.yml, checked.

    Raises:
        LessonError: if it cannot be read, or listing every question that lacks something.
    """
    try:
        quiz = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise LessonError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    problems = []
    for part, count in (("warm-up", 2), ("exit", 4)):
        questions = quiz.get(part, [])
        if len(questions) != count:
            problems.append(f"{part}: {len(questions)} questions, expected {count}")
        for number, question in enumerate(questions, start=1):
            name, answers = question.get("id", f"{part} {number}"), question.get("answers", [])
            problems += [f"{name}: has no {key}" for key in ("id", "question", "answers") if not question.get(key)]
            if [answer.get("right", False) for answer in answers].count(True) != 1:
                problems.append(f"{name}: exactly one answer must be right")
            problems += [
                f"{name}: the answer “{answer.get('text')}” does not explain itself"
                for answer in answers
                if not (answer.get("why") and answer.get("text"))
            ]
    if problems:
        raise LessonError(f"{path.parent.name}/{path.name} cannot be used:\n  " + "\n  ".join(problems))
    return quiz


def _questions(lesson: Lesson, part: str) -> str:
    """Each question with its answers folded: opening one says whether it is right and why."""
    quiz = load_quiz(lesson.folder / "quiz.yml")
    if part not in quiz:
        raise LessonError(f"{lesson.name}/quiz.yml has no part {part!r}; it has {sorted(quiz)}")
    text = ["Open an answer to see what becomes of it.\n"]
    for number, question in enumerate(quiz[part], start=1):
        text.append(f"**{number}. {question['question'].strip()}**\n")
        for letter, answer in zip("ABCDE", question["answers"], strict=False):
            verdict = "Right." if answer.get("right") else "No."
            text.append(
                f"<details><summary>{letter} · {_inline(answer['text'].strip())}</summary>\n\n"
                f"{verdict} {answer['why'].strip()}\n\n</details>\n"
            )
    return "\n".join(text).strip()


def _inline(text: str) -> str:
    """A short text as HTML: inside <summary>, which is HTML already, no Markdown is read.

    >>> _inline("`A < B` alone")
    '<code>A &lt; B</code> alone'
    """
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))


# ---------------------------------------------------------------------------------------------------- what a file says


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _cells_sha256(cells: list[Notebook]) -> str:
    return _sha256([(cell.cell_type, cell.source) for cell in cells])


def _outputs_sha256(cells: list[Notebook]) -> str:
    return _sha256([(cell.outputs, cell.execution_count) for cell in cells if cell.cell_type == "code"])


def was_edited(path: Path) -> bool:
    """Whether somebody changed the cells of a built notebook (running it is no edit)."""
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get("minilora", {}).get("cells_sha256") != _cells_sha256(notebook.cells)


def problem_of(lesson: Lesson, path: Path) -> str | None:
    """Why the file is not the notebook that the lesson's source makes; None if it is."""
    if not path.exists():
        return "is missing"
    notebook = nbformat.read(path, as_version=4)
    facts = notebook.metadata.get("minilora", {})
    cells = source_cells(lesson)
    wanted = full_cells(cells) if path == lesson.full else student_cells(cells)
    if was_edited(path):
        return "was edited; its source is the place for that"
    if facts.get("source_sha256") != lesson.source_sha256():
        return "is older than its source"
    if [(c.cell_type, c.source, c["id"]) for c in wanted] != [(c.cell_type, c.source, c["id"]) for c in notebook.cells]:
        return "was made by another version of the builder"
    if path == lesson.full and facts.get("outputs_sha256") != _outputs_sha256(notebook.cells):
        return "was run and saved after it was built"
    return None


def _write(notebook: Notebook, path: Path) -> None:
    nbformat.validate(notebook)
    write_whole({path: (nbformat.writes(notebook) + "\n").encode()})


def _notebook(lesson: Lesson, cells: list[Notebook]) -> Notebook:
    facts = {"lesson": lesson.name, "source_sha256": lesson.source_sha256(), "cells_sha256": _cells_sha256(cells)}
    metadata = {"kernelspec": KERNEL, "language_info": LANGUAGE, "minilora": facts}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


# ---------------------------------------------------------------------------------------------------- running a lesson


def execute(notebook: Notebook, folder: Path, lessons: Path) -> None:
    """Run a notebook in this Python, in `folder`, and keep its outputs, without widgets.

    Raises:
        LessonError: if a cell fails, or its output cannot be published (lists all such cells).
    """
    manager = AsyncKernelManager(kernel_name=KERNEL["name"])
    manager._kernel_spec = KernelSpec(  # this Python, whatever kernels are registered on the machine
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"],
        **{key: value for key, value in KERNEL.items() if key != "name"},
    )
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=120,
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    with tempfile.TemporaryDirectory() as home:
        own = {"MINILORA_HOME": home, "IPYTHONDIR": home, "MINILORA_LESSONS": str(lessons)}
        try:
            client.execute(cleanup_kc=True, env={**os.environ, **ENVIRONMENT, **own}, cwd=str(folder))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
            raise LessonError(f"a cell failed:\n{failure}") from failure
    notebook.metadata["language_info"] = LANGUAGE
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    problems = output_problems(notebook, folder.parent)
    if problems:
        raise LessonError("the output cannot be published:\n  " + "\n  ".join(problems))


def output_problems(notebook: Notebook, root: Path) -> list[str]:
    """What a published notebook must not hold: paths and addresses of this machine, warnings, megabytes of figures."""
    problems, figure_bytes = [], 0
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None and cell.source.strip():
            problems.append(f"cell {number} was not executed")
        for output in cell.outputs:
            data = output.get("data", {})
            figure_bytes += sum(len(value) * 3 // 4 for kind, value in data.items() if kind.startswith("image/"))
            text = str(output.get("text", "")) + "".join(
                str(value) for kind, value in data.items() if not kind.startswith("image/")
            )
            if output.output_type == "stream" and output.name == "stderr":
                problems.append(f"cell {number} wrote a warning or an error: {text.strip()[:200]}")
            for pattern in (re.escape(str(root)), re.escape(str(Path.home())) + "/", r"/tmp/\S+", r"0x[0-9a-f]{8,}"):
                if found := re.search(pattern, text):
                    problems.append(f"cell {number} shows something of this machine: {found[0]}")
    if figure_bytes > FIGURE_BYTES:
        problems.append(f"the figures take {figure_bytes:,} bytes; {FIGURE_BYTES:,} is the most")
    return problems


# -------------------------------------------------------------------------------------------------- building, checking


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
        notebook, started = _notebook(lesson, full_cells(cells)), time.monotonic()
        lesson.notebooks.mkdir(parents=True, exist_ok=True)
        execute(notebook, lesson.notebooks, lesson.folder.parent)
        notebook.metadata["minilora"]["outputs_sha256"] = _outputs_sha256(notebook.cells)
        _write(notebook, lesson.full)
        seconds = time.monotonic() - started
        over = f", over the {SECONDS_A_LESSON} s that a lesson may take" if seconds > SECONDS_A_LESSON else ""
        done.append(f"executed in {seconds:.0f} s{over}, {lesson.full.stat().st_size / 1e6:.2f} MB")
    if force or problem_of(lesson, lesson.student):
        _write(_notebook(lesson, student_cells(cells)), lesson.student)
        done.append("student notebook written")
    return "; ".join(done) or "unchanged"


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m minilora.classroom.build", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="run nothing; say which notebooks are stale, and exit 1")
    parser.add_argument("--only", default="", metavar="NN", help="the lessons whose name begins so, such as 03")
    parser.add_argument("--force", action="store_true", help="execute lessons whose source is unchanged, too")
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
