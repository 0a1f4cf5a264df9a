"""A lesson's quiz.yml: two questions before, four after, every answer with its reason."""

import html
import re
from pathlib import Path

import yaml

from minilora.classroom.build.lesson import Lesson, LessonError


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


def questions(lesson: Lesson, part: str) -> str:
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
