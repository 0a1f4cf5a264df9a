"""A notebook's file: what it says about its source, and whether it still is what was built."""

import hashlib
import json
from pathlib import Path
from typing import Any

import nbformat

from minilora.classroom.build.cells import full_cells, source_cells, student_cells
from minilora.classroom.build.lesson import Lesson, Notebook
from minilora.files import write_whole

LANGUAGE = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python", "pygments_lexer": "ipython3"}
KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _cells_sha256(cells: list[Notebook]) -> str:
    return _sha256([(cell.cell_type, cell.source) for cell in cells])


def outputs_sha256(cells: list[Notebook]) -> str:
    """The hash of what the cells gave when they were executed."""
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
    if path == lesson.full and facts.get("outputs_sha256") != outputs_sha256(notebook.cells):
        return "was run and saved after it was built"
    return None


def write_notebook(notebook: Notebook, path: Path) -> None:
    """Write a whole file or none."""
    nbformat.validate(notebook)
    write_whole({path: (nbformat.writes(notebook) + "\n").encode()})


def new_notebook(lesson: Lesson, cells: list[Notebook]) -> Notebook:
    """A notebook of these cells that says which source it was made from."""
    facts = {"lesson": lesson.name, "source_sha256": lesson.source_sha256(), "cells_sha256": _cells_sha256(cells)}
    metadata = {"kernelspec": KERNEL, "language_info": LANGUAGE, "minilora": facts}
    return nbformat.v4.new_notebook(cells=cells, metadata=metadata)
