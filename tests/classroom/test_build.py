"""From lessons to notebooks, on a small lesson."""

import json
from pathlib import Path

import nbformat
import pytest

from minilora.classroom.build.__main__ import main
from minilora.classroom.build.cells import blank, full_cells, source_cells, student_cells
from minilora.classroom.build.executing import output_problems
from minilora.classroom.build.lesson import Lesson, LessonError, find_lessons
from minilora.classroom.build.notebooks import new_notebook, outputs_sha256, problem_of, write_notebook
from minilora.classroom.build.quiz import load_quiz

LESSON = """# %% [markdown]
# # Seven
# * **Minutes**: read 1 · exercises 1.
# <!-- quiz: warm-up -->

# %%
import os
from minilora.classroom.bets import predict, settle
from minilora.classroom.exercises import check
predict("sum", "1 + 1?")

# %% [markdown] tags=["solution"]
# Only with the answers.

# %% [markdown] tags=["student"]
# Only for you.

# %%
def double(x):
    # BEGIN SOLUTION
    return 2 * x
    # END SOLUTION


twice = check("07.1", double).function
assert twice(2) == 4

# %%
settle("sum", 2)
print("strict:", os.environ["MINILORA_STRICT"])
"""
EXERCISES = """
from minilora.classroom.exercises import Exercise
EXERCISES = [Exercise(id="07.1", title="Double", asks="double(x)", points=1, minutes=1, difficulty=1, importance=1,
                      reference=lambda x: 2 * x, generate=lambda rng: {"x": rng.normal(size=3)})]
"""


def question(name: str) -> dict:
    answers = [{"text": "yes", "right": True, "why": "It is so."}, {"text": "no", "why": "It is not."}]
    return {"id": name, "question": "Is it?", "answers": answers}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "course" / "lessons" / "07_seven"
    folder.mkdir(parents=True)
    (folder / "lesson.py").write_text(LESSON, encoding="utf-8")
    (folder / "exercises.py").write_text(EXERCISES, encoding="utf-8")
    quiz = {"warm-up": [question("w1"), question("w2")], "exit": [question(f"e{i}") for i in range(4)]}
    (folder / "quiz.yml").write_text(json.dumps(quiz), encoding="utf-8")  # JSON is YAML
    return tmp_path / "course"


@pytest.fixture
def lesson(root: Path) -> Lesson:
    return find_lessons(root)[0]


def rewrite(lesson: Lesson, old: str, new: str) -> None:
    path = lesson.folder / "lesson.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def build(root: Path, *options: str) -> int:
    return main(["--root", str(root), *options])


def test_a_lesson_becomes_two_notebooks_and_is_not_run_again(
    root: Path, lesson: Lesson, capsys: pytest.CaptureFixture[str]
):
    assert build(root, "--check") == 1
    assert "notebooks/07_seven.ipynb is missing" in capsys.readouterr().out
    assert build(root) == 0
    assert "executed in" in capsys.readouterr().out
    full, student = (nbformat.read(path, as_version=4) for path in (lesson.full, lesson.student))
    written = lesson.full.read_bytes(), lesson.student.read_bytes()

    printed = "".join(output["text"] for cell in full.cells for output in cell.get("outputs", []))
    assert "The lesson goes on with your function." in printed and "strict: 1" in printed
    assert all(cell.execution_count for cell in full.cells if cell.cell_type == "code")
    assert not any(cell.get("outputs") for cell in student.cells)
    assert "return 2 * x" not in lesson.student.read_text(encoding="utf-8")
    assert str(root) not in lesson.full.read_text(encoding="utf-8")

    assert build(root, "--check") == 0
    assert build(root) == 0
    assert "unchanged" in capsys.readouterr().out
    assert build(root, "--force") == 0  # and a second execution gives the same bytes
    assert (lesson.full.read_bytes(), lesson.student.read_bytes()) == written
    assert sorted(path.name for path in lesson.notebooks.iterdir()) == ["07_seven.ipynb", "student"]


def test_a_cell_that_fails_is_reported_and_nothing_is_written(
    root: Path, lesson: Lesson, capsys: pytest.CaptureFixture[str]
):
    rewrite(lesson, "    return 2 * x", "    return 3 * x")

    assert build(root) == 1
    assert "FAILED" in (printed := capsys.readouterr().out) and "not yet" in printed
    assert not lesson.notebooks.exists() or not list(lesson.notebooks.rglob("*.ipynb"))


def fake_build(lesson: Lesson) -> None:
    """The notebooks of a lesson as building would leave them, without running anything."""
    cells = source_cells(lesson)
    full = new_notebook(lesson, full_cells(cells))
    full.metadata["minilora"]["outputs_sha256"] = outputs_sha256(full.cells)
    write_notebook(full, lesson.full)
    write_notebook(new_notebook(lesson, student_cells(cells)), lesson.student)


@pytest.mark.parametrize("name", ["lesson.py", "exercises.py", "quiz.yml", "claims.py"])
def test_a_changed_source_makes_both_notebooks_stale(
    name: str, root: Path, lesson: Lesson, capsys: pytest.CaptureFixture[str]
):
    fake_build(lesson)
    assert build(root, "--check") == 0
    with (lesson.folder / name).open("a", encoding="utf-8") as file:
        file.write("\n\n" if name == "quiz.yml" else "\n# changed\n")

    assert build(root, "--check") == 1
    assert capsys.readouterr().out.count("is older than its source") == 2


@pytest.mark.parametrize("kind", ["full", "student"])
def test_an_edited_notebook_is_reported_and_never_written_over(
    kind: str, root: Path, lesson: Lesson, capsys: pytest.CaptureFixture[str]
):
    fake_build(lesson)
    path = getattr(lesson, kind)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].source += "\nmy_work = 1"
    nbformat.write(notebook, path)
    mine = path.read_bytes()
    rewrite(lesson, "# # Seven", "# # Seven again")

    assert build(root, "--check") == 1
    assert "was edited; its source is the place for that" in capsys.readouterr().out
    assert build(root) == 1 and build(root, "--force") == 1
    assert "was edited by hand and is left alone: move it away" in capsys.readouterr().out
    assert path.read_bytes() == mine


def test_running_a_student_notebook_is_no_edit(lesson: Lesson):
    fake_build(lesson)
    notebook = nbformat.read(lesson.student, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="ran")]
    notebook.cells[1].execution_count = 1
    nbformat.write(notebook, lesson.student)

    assert problem_of(lesson, lesson.student) is None


def test_a_full_notebook_that_was_run_and_saved_is_reported(lesson: Lesson):
    fake_build(lesson)
    notebook = nbformat.read(lesson.full, as_version=4)
    notebook.cells[1].execution_count = 9
    nbformat.write(notebook, lesson.full)

    assert problem_of(lesson, lesson.full) == "was run and saved after it was built"


def test_a_notebook_of_another_builder_is_stale(lesson: Lesson, monkeypatch: pytest.MonkeyPatch):
    fake_build(lesson)
    monkeypatch.setattr("minilora.classroom.build.cells.BLANK", "...  # write here")

    assert problem_of(lesson, lesson.student) == "was made by another version of the builder"
    assert problem_of(lesson, lesson.full) is None


def test_only_chooses_by_number_and_an_unknown_one_is_answered_with_the_known(
    root: Path, capsys: pytest.CaptureFixture[str]
):
    assert build(root, "--only", "08", "--check") == 1
    assert "no lesson begins with '08'; there are ['07_seven']" in capsys.readouterr().err


def test_cells_go_where_their_tags_say(lesson: Lesson):
    cells = source_cells(lesson)
    full, student = ("\n".join(cell.source for cell in made) for made in (full_cells(cells), student_cells(cells)))

    assert "SOLUTION" not in full and "return 2 * x" in full
    assert "Only with the answers." in full and "Only for you." not in full
    assert "Only for you." in student and "Only with the answers." not in student


def test_editing_one_cell_leaves_the_ids_of_the_others(lesson: Lesson):
    before = [cell["id"] for cell in source_cells(lesson)]
    rewrite(lesson, "assert twice(2) == 4", "assert twice(3) == 6")
    after = [cell["id"] for cell in source_cells(lesson)]

    assert [a == b for a, b in zip(before, after, strict=True)].count(False) == 1
    assert len(set(after)) == len(after)


def test_two_equal_cells_have_two_ids(lesson: Lesson):
    rewrite(lesson, 'settle("sum", 2)\n', 'settle("sum", 2)\n\n# %%\nx = 1\n\n# %%\nx = 1\n\n# %%\n')
    ids = [cell["id"] for cell in source_cells(lesson)]

    assert len(set(ids)) == len(ids)


def test_questions_stand_in_the_notebook_with_their_answers_folded(lesson: Lesson):
    text = source_cells(lesson)[0].source

    assert "**1. Is it?**" in text and "<details><summary>A · yes</summary>\n\nRight. It is so." in text
    assert "<details><summary>B · no</summary>\n\nNo. It is not." in text


def test_a_blank_stands_as_deep_as_the_solution():
    source = "class A:\n    def f(self):\n        # BEGIN SOLUTION\n        return 1\n        # END SOLUTION\n\nx = 1"

    assert blank(source) == "class A:\n    def f(self):\n        ...  # your code\n\nx = 1"


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("\n".join(f"x{i} = {i}" for i in range(26)), "has 26 lines of code; 25 is the most"),
        ("print(In[1])", "reads In"),
        ("x = input()", "asks for input"),
        ("### BEGIN SOLUTION\nx = 1\n### END SOLUTION", "unbalanced markers"),
        ("# BEGIN SOLUTION\nx = 1", "unbalanced markers"),
        ('twice = 1\ndouble = check("07.1", double).function', "the name of the learner's own function"),
        ('predict("late", "When?")', "bet 'late' is never settled"),
        ('settle("early", 1)\npredict("early", "When?")', "bet 'early' is settled before it is placed"),
    ],
)
def test_a_rule_that_is_broken_is_named(bad: str, problem: str, lesson: Lesson):
    with (lesson.folder / "lesson.py").open("a", encoding="utf-8") as file:
        file.write(f"\n# %%\n{bad}\n")
    with pytest.raises(LessonError, match=problem):
        source_cells(lesson)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("exercises 1.", "exercises 2.", "the card says 2 minutes of exercises; those of exercises.py add up to 1"),
        (" · exercises 1.", ".", "the card does not say how long the exercises take: write “exercises 1”"),
        ('check("07.1", double)', 'check("07.2", double)', "exercise 07.1 is never checked"),
        (
            "    # BEGIN SOLUTION\n    return 2 * x\n    # END SOLUTION",
            "    return 2 * x",
            "exercise 07.1 leaves no blank",
        ),
    ],
)
def test_a_lesson_that_is_out_of_step_with_its_exercises_is_refused(old: str, new: str, problem: str, lesson: Lesson):
    rewrite(lesson, old, new)
    with pytest.raises(LessonError, match=problem):
        source_cells(lesson)


def test_a_dollar_in_code_is_no_formula(lesson: Lesson):
    rewrite(lesson, "# # Seven", "# # Seven\n# `$HOME`\n#\n# ```\n# $PATH\n# ```")

    assert "$PATH" in source_cells(lesson)[0].source


def test_a_cell_that_may_raise_is_refused(lesson: Lesson):
    rewrite(lesson, "# %%\nsettle", '# %% tags=["raises-exception"]\nsettle')
    with pytest.raises(LessonError, match="use expect_bug"):
        source_cells(lesson)


@pytest.mark.parametrize("image", ["![x](https://example.org/x.png)", '<img src="https://example.org/x.png">'])
def test_an_image_from_the_web_is_refused(image: str, lesson: Lesson):
    rewrite(lesson, "# # Seven", f"# # Seven\n# {image}")
    with pytest.raises(LessonError, match="image from the web"):
        source_cells(lesson)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<details><summary>a</summary>", "opens and closes <details> unequally often"),
        ("```\n# " + "x" * 91 + "\n# ```", "a fenced block wider than 90 columns"),
        ("So $a = b$ holds.", "has a formula between dollars"),
        ("as issue\n# #982 says", "begins a line with a # that is no heading"),
    ],
)
def test_a_rule_that_a_text_breaks_is_named(text: str, problem: str, lesson: Lesson):
    rewrite(lesson, "# # Seven", f"# # Seven\n#\n# {text}")
    with pytest.raises(LessonError, match=problem):
        source_cells(lesson)


def test_a_long_line_beside_a_fenced_block_is_no_problem(lesson: Lesson):
    rewrite(lesson, "# # Seven", f"# # Seven\n#\n# ```\n# short\n# ```\n# {'x' * 91}")

    assert "x" * 91 in source_cells(lesson)[0].source


def test_code_in_an_answer_is_html_because_no_markdown_is_read_in_a_summary(lesson: Lesson):
    path = lesson.folder / "quiz.yml"
    path.write_text(path.read_text(encoding="utf-8").replace('"yes"', '"`A < B` alone"'), encoding="utf-8")

    assert "<summary>A · <code>A &lt; B</code> alone</summary>" in source_cells(lesson)[0].source


def test_all_broken_rules_are_listed_at_once(lesson: Lesson):
    rewrite(lesson, "import os", "import os\nx = In[1]")
    rewrite(lesson, 'settle("sum", 2)', "y = input()")
    with pytest.raises(LessonError) as caught:
        source_cells(lesson)

    assert len(str(caught.value).splitlines()) == 4  # the heading, In, input, and the bet that is never settled


def test_a_quiz_that_does_not_explain_itself_is_refused(tmp_path: Path):
    silent = {"id": "w1", "question": "Is it?", "answers": [{"text": "yes", "right": True}, {"text": "no", "why": "x"}]}
    path = tmp_path / "quiz.yml"
    path.write_text(json.dumps({"warm-up": [silent, question("w2")], "exit": [question("e1")]}), encoding="utf-8")
    with pytest.raises(LessonError) as caught:
        load_quiz(path)

    assert "w1: the answer “yes” does not explain itself" in str(caught.value)
    assert "exit: 1 questions, expected 4" in str(caught.value)


def test_a_quiz_that_is_missing_or_damaged_is_named(tmp_path: Path):
    with pytest.raises(LessonError, match=r"quiz\.yml cannot be read"):
        load_quiz(tmp_path / "quiz.yml")
    (tmp_path / "quiz.yml").write_text("warm-up: [", encoding="utf-8")
    with pytest.raises(LessonError, match=r"quiz\.yml cannot be read"):
        load_quiz(tmp_path / "quiz.yml")


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (nbformat.v4.new_output("stream", name="stderr", text="careful"), "wrote a warning or an error: careful"),
        (nbformat.v4.new_output("stream", name="stdout", text="/srv/course/x.py"), "of this machine: /srv/course"),
        (nbformat.v4.new_output("stream", name="stdout", text="in /tmp/ipykernel_1/2.py"), "/tmp/ipykernel_1/2.py"),
        (nbformat.v4.new_output("execute_result", data={"text/plain": "<A at 0x7f0011223344>"}), "0x7f0011223344"),
        (
            nbformat.v4.new_output(
                "display_data", data={"image/png": "A" * 1_400_000}, metadata={"image/png": {"alt": "It."}}
            ),
            "1,050,000 bytes",
        ),
        (nbformat.v4.new_output("display_data", data={"image/png": "A"}), "shows a figure without a description"),
        (
            nbformat.v4.new_output("display_data", data={"image/png": "A"}, metadata={"image/png": {"alt": " "}}),
            "shows a figure without a description",
        ),
    ],
)
def test_an_output_that_cannot_be_published_is_named(output: nbformat.NotebookNode, problem: str):
    cell = nbformat.v4.new_code_cell("x", execution_count=1, outputs=[output])
    problems = output_problems(nbformat.v4.new_notebook(cells=[cell]), Path("/srv/course"))

    assert len(problems) == 1 and problem in problems[0]
