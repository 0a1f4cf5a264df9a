"""Where the lessons are: the folder of their sources, and the exercises.py of each.

The folder is the one that `MINILORA_LESSONS` names, or `lessons` above the working directory, or beside the package.
"""

import functools
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def lessons_folder() -> Path:
    """The folder of the lessons' sources: `MINILORA_LESSONS`, or above the working directory, or beside the package.

    Raises:
        FileNotFoundError: if there is none (says how to name it).
    """
    named = os.environ.get("MINILORA_LESSONS")
    here, package = Path.cwd(), Path(__file__).resolve()
    places = [Path(named)] if named else [above / "lessons" for above in (here, *here.parents, *package.parents)]
    for place in places:
        if any(place.glob("[0-9][0-9]_*/exercises.py")):
            return place
    raise FileNotFoundError(
        f"found no folder of lessons in {[str(place) for place in places[:1]]} or above: start the notebook inside a "
        "checkout of minilora, or set MINILORA_LESSONS to its folder lessons"
    )


def lesson_module(lesson: str, kind: str = "exercises") -> ModuleType:
    """The exercises.py of a lesson such as "03", or its claims.py: their lists, and what else the lesson keeps there.

    Raises:
        KeyError: if no such lesson has one (names those that do).
    """
    files = sorted(lessons_folder().glob(f"[0-9][0-9]_*/{kind}.py"))
    for path in files:
        if path.parent.name.startswith(f"{lesson}_"):
            return load(path)
    raise KeyError(f"no lesson {lesson!r} has {kind}; the lessons are {[path.parent.name for path in files]}")


def lesson_titles() -> dict[str, str]:
    """The number and the title of every lesson that has exercises, in order: the first heading of its source."""
    titles = {}
    for path in sorted(lessons_folder().glob("[0-9][0-9]_*/exercises.py")):
        source = (path.parent / "lesson.py").read_text(encoding="utf-8").splitlines()
        heading = next(line for line in source if line.startswith("# # "))
        titles[path.parent.name[:2]] = heading.removeprefix("# # ").partition(" · ")[2]
    return titles


def claim_files() -> list[Path]:
    """Every claims.py of a lesson, and every file of lessons/claims: by the number of the lesson, its own first."""
    folder = lessons_folder()
    own, more = sorted(folder.glob("[0-9][0-9]_*/claims.py")), sorted(folder.glob("claims/[0-9][0-9]_*.py"))
    numbers = {path: path.parent.name[:2] for path in own} | {path: path.name[:2] for path in more}
    return sorted(numbers, key=lambda path: numbers[path])


@functools.cache
def load(path: Path) -> ModuleType:
    """Import a file of the lessons, once."""
    name = f"minilora_lesson_{path.parent.name[:2]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    spec.loader.exec_module(module)
    return module
