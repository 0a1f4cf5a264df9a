"""The rules of a lesson's source, each with what is said where it is broken (lessons/README.md has them)."""

import ast
import re

from minilora.classroom.build.lesson import Lesson, Notebook

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
LINES_A_CELL = 25
FENCED_COLUMNS = 90  # what a window 1,100 pixels wide shows of a fenced block without wrapping it


def lint(lesson: Lesson, cells: list[Notebook]) -> list[str]:
    """Everything that is wrong with a lesson's source: cell by cell, then with the whole."""
    problems = [problem for number, cell in enumerate(cells, start=1) for problem in _lint_cell(number, cell)]
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    problems += _lint_bets(code)
    exercises = stated(lesson, "minutes")
    problems += _lint_blanks(list(exercises), code)
    return problems + _lint_minutes(sum(exercises.values()), "\n".join(cell.source for cell in cells[:2]))


def _lint_cell(number: int, cell: Notebook) -> list[str]:
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
        "has a formula between dollars, which a page can only show with a script from the web: write it in Unicode": (
            cell.cell_type == "markdown" and "$" in _without_code(cell.source)
        ),
        "begins a line with a # that is no heading, and a page makes it one: break the line elsewhere": (
            cell.cell_type == "markdown"
            and re.search(r"^#+[^# \n]", _without_code(cell.source), flags=re.MULTILINE) is not None
        ),
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


def _without_code(text: str) -> str:
    """A text without its fenced blocks and its `code`."""
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)


def stated(lesson: Lesson, fact: str) -> dict[str, int]:
    """The minutes or the points of each exercise by id, in order, as exercises.py states them: it is not run."""
    path = lesson.folder / "exercises.py"
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "Exercise"]
    words = [{word.arg: word.value for word in call.keywords} for call in calls]
    return dict(sorted((ast.literal_eval(each["id"]), ast.literal_eval(each[fact])) for each in words))


def _lint_blanks(ids: list[str], sources: list[str]) -> list[str]:
    """Every exercise is checked in the lesson, and what is checked was written there with a blank for the learner."""
    problems = []
    for exercise_id in ids:
        at = [
            (n, found[1])
            for n, text in enumerate(sources)
            for found in re.finditer(rf'\bcheck\("{exercise_id}", (\w+)\)', text)
        ]
        if not at:
            problems.append(f'exercise {exercise_id} is never checked: write check("{exercise_id}", …)')
        for n, name in at[:1]:
            written = [
                text for text in sources[: n + 1] if re.search(rf"^(def|class) {name}\b", text, flags=re.MULTILINE)
            ]
            if not written or BEGIN not in written[-1]:
                problems.append(
                    f"exercise {exercise_id} leaves no blank: {name} has no {BEGIN} in a cell before its check"
                )
    return problems


def _lint_minutes(minutes: int, card: str) -> list[str]:
    """The card's minutes are the sum of the exercises' minutes."""
    said = re.search(r"exercises (\d+)", card)
    if said is None:
        return [
            f"the card does not say how long the exercises take: write “exercises {minutes}” in its line on minutes"
        ]
    if int(said[1]) == minutes:
        return []
    return [f"the card says {said[1]} minutes of exercises; those of exercises.py add up to {minutes}"]


def _lint_bets(sources: list[str]) -> list[str]:
    """Every bet is placed before it is settled, and settled at all."""
    order = re.findall(r"^(predict|settle)\(\s*\"([^\"]+)\"", "\n".join(sources), flags=re.MULTILINE)
    placed = [name for word, name in order if word == "predict"]
    problems = [f"bet {name!r} is never settled" for name in placed if ("settle", name) not in order]
    for position, (word, name) in enumerate(order):
        if word == "settle" and ("predict", name) not in order[:position]:
            problems.append(f"bet {name!r} is settled before it is placed")
    return problems
