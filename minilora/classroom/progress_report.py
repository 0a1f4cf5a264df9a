"""`minilora progress`: which exercises are done, from the local file alone. Read before: progress, lessons."""

from collections.abc import Mapping
from typing import Any

from minilora.classroom.exercises import Exercise
from minilora.classroom.lessons import lesson_module, lesson_titles
from minilora.classroom.progress import progress_file, read_progress

MARKS = {"passed": "✓", "failed": "✗"}


def run() -> int:
    """Print every lesson with its exercises, and what is left to do."""
    print(report(read_progress()))
    return 0


def report(progress: Mapping[str, Any]) -> str:
    """Every lesson's exercises with what became of them, and minutes and points in all."""
    tried, hints = progress.get("exercises", {}), progress.get("hints", {})
    lines, everything = [], []
    for lesson, title in lesson_titles().items():
        lines.append(f"{lesson}  {title}")
        for exercise in lesson_module(lesson).EXERCISES:
            everything.append(exercise)
            lines.append(line(exercise, tried.get(exercise.id, {}), hints.get(exercise.id, {})))
    done = [each for each in everything if tried.get(each.id, {}).get("status") == "passed"]
    left = [each for each in everything if each not in done]
    points = f"{sum(e.points for e in done)} of {sum(e.points for e in everything)} points"
    lines += [
        "",
        f"{len(done)} of {len(everything)} exercises, {points}; about {sum(e.minutes for e in left)} minutes are left",
        *([f"next: {left[0].id}  {left[0].title}"] if left else []),
        f"kept in {progress_file()} and never sent anywhere",
    ]
    return "\n".join(lines)


def line(exercise: Exercise, tried: Mapping[str, Any], hints: Mapping[str, Any]) -> str:
    """One exercise: its mark, its title, and how it went."""
    status = tried.get("status", "not started")
    attempts, taken = tried.get("attempts", 0), hints.get("taken", 0)
    told = [f"{exercise.minutes} min" if status == "not started" else f"{attempts} attempt{'s' * (attempts != 1)}"]
    told += [f"{taken} of {len(exercise.hints)} hints"] * bool(taken)
    return f"    {MARKS.get(status, '·')} {exercise.id}  {exercise.title:<34} {status}, {', '.join(told)}"
