"""CLAIMS.md, from claims that are run: `python -m minilora.classroom.ledger`; `--check` tells whether it is in step.

Read before this file: claims.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from minilora.classroom.claims import ARTICLES, Settled, Unsettled, all_claims, all_unsettled, settled
from minilora.classroom.lessons import claim_files, lessons_folder, load
from minilora.files import write_whole

MARKS = {"holds": "✓", "holds when": "◐", "does not hold": "✗"}
HEAD = """# What the articles say, and what holds

Most people meet LoRA in articles that quote one another's numbers. Here are facts and figures of five of them, each
with what code found: a count, a run of the library that is meant, a comparison with the paper's own table. The code
stands beside each lesson in `lessons/NN_…/claims.py`, or in `lessons/claims/` where no lesson shows it. A test runs all
of it, and fails if a verdict no longer follows or this page is not what it gives.

**{summary}**

{articles}

A claim *holds when* some of its cases do; they are named. Sizes are decimal (1 GB = 10⁹ bytes) unless GiB is written.
Versions are those that the tests run with. Where a verdict rests on a paper's table, a file or a benchmark, that is
named (the LoRA paper is arXiv 2106.09685, QLoRA's 2305.14314). Figures are the articles', the words are ours.
"""
UNSETTLED_HEAD = """## Not settled: to be measured

No computation here decides these. Beside each stands what would.

| the article says | what would settle it |
|---|---|"""


def ledger() -> str:
    """CLAIMS.md: a summary, a table a lesson, and what is not settled.

    Raises:
        AssertionError: if a verdict is no longer what the code finds (names the claim).
    """
    found = [settled(claim) for claim in all_claims()]
    lessons = dict.fromkeys(one.claim.id[:2] for one in found)
    tables = [_table(lesson, [one for one in found if one.claim.id.startswith(lesson)]) for lesson in lessons]
    rest = [UNSETTLED_HEAD, *map(_unsettled_row, all_unsettled())]
    return "\n".join([HEAD.format(summary=summary(found), articles=_articles()), *tables, *rest]) + "\n"


def summary(found: list[Settled]) -> str:
    """How many there are of each verdict, in one line."""
    count = Counter(one.claim.verdict for one in found)
    quoted = sum(bool(re.match(r"by |table \d", one.found)) for one in found)
    return (
        f"{len(found)} claims are settled: {count['holds']} hold, {count['holds when']} hold in some cases, "
        f"{count['does not hold']} do not hold ({quoted} of these verdicts rest on a quotation, the others on code "
        f"that is run). {len(all_unsettled())} more are to be measured."
    )


def _articles() -> str:
    counts = Counter(title for one in all_claims() for title in ARTICLES if one.source.startswith(title))
    return "\n".join(f"* *{title}*: {counts[title]}" for title in ARTICLES)


def _table(lesson: str, found: list[Settled]) -> str:
    rows = "\n".join(map(_row, found))
    return f"## {title(lesson)}\n\n| | the article says | what was found |\n|---|---|---|\n{rows}\n"


def _row(one: Settled) -> str:
    claim = one.claim
    verdict = f"**{claim.verdict}**" + (f" {one.when}" if one.when else "")
    said = f"{_cell(claim.fact)}<br><sub>*{_cell(claim.source)}* · `{claim.id}`</sub>"
    found = re.sub(r"(\d)%", r"\1 %", f"{verdict}<br>{one.found}")  # Python's format knows no space
    return f"| {MARKS[claim.verdict]} | {said} | {_cell(found)} |"


def _unsettled_row(one: Unsettled) -> str:
    return f"| {_cell(one.fact)}<br><sub>*{_cell(one.source)}* · `{one.id}`</sub> | {_cell(one.needs)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def title(lesson: str) -> str:
    """A lesson's title: the first heading of its lesson.py, or the docstring of its file in lessons/claims."""
    for path in lessons_folder().glob(f"{lesson}_*/lesson.py"):
        heading = re.search(rf"^# # ({lesson} · .+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        if heading:
            return f"[{heading[1]}](notebooks/{path.parent.name}.ipynb)"
    (planned,) = [path for path in claim_files() if path.parent.name == "claims" and path.name.startswith(lesson)]
    return (load(planned).__doc__ or "").splitlines()[0]


def main(arguments: list[str] | None = None) -> int:
    """Write CLAIMS.md beside the lessons, or check it."""
    parser = argparse.ArgumentParser(
        prog="python -m minilora.classroom.ledger", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say whether CLAIMS.md is in step")
    options = parser.parse_args(arguments)
    path, text = lessons_folder().parent / "CLAIMS.md", ledger()
    if not options.check:
        write_whole({path: text.encode()})
        print(f"CLAIMS.md: {summary([settled(claim) for claim in all_claims()])}")
        return 0
    problem = out_of_step(path, text)
    print(problem or "CLAIMS.md is what the claims give")
    return int(bool(problem))


def out_of_step(path: Path, text: str) -> str:
    """What to do about a CLAIMS.md that is not this text, with the first line that differs; nothing if it is."""
    there = path.read_text(encoding="utf-8") if path.exists() else ""
    if there == text:
        return ""
    old, new = [*there.split("\n"), ""], [*text.split("\n"), ""]
    line = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0)
    return (
        f"CLAIMS.md is not what the claims give: python -m minilora.classroom.ledger writes it. Line {line + 1} is\n"
        f"  {old[line]}\nand should be\n  {new[line]}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
