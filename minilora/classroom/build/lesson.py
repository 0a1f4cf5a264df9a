"""A lesson's folder, and what is made from it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import nbformat

Notebook = nbformat.NotebookNode


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
