"""nbgrader's autograder, from the notebook's file: stands where nbgrader would run the notebook in a kernel.

`nbgrader autograde` restores the locked cells and then runs a list of steps, of which the first executes the notebook.
This step grades it instead (grading.py) and writes each exercise's message and points as the output of its cell, from
which nbgrader reads them. What was handed in never shares a process with what is graded.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbgrader.preprocessors import NbGraderPreprocessor
from traitlets import Float, Unicode

from minilora.classroom.build.masters import grade_id
from minilora.classroom.grading import Grade, grade_notebook
from minilora.classroom.sandbox import DEFAULT


class FromTheFile(NbGraderPreprocessor):
    """Grade a notebook from its file and write the points into its grade cells."""

    secret_file = Unicode("", help="a file with a long random line, from which the inputs are drawn").tag(config=True)
    seconds = Float(DEFAULT.seconds, help="of the processor, for each exercise").tag(config=True)

    def preprocess(self, nb: nbformat.NotebookNode, resources: dict[str, Any]) -> tuple[nbformat.NotebookNode, dict]:
        """The notebook with an output in each grade cell; which lesson it is says its name, the assignment's."""
        secret = Path(self.secret_file).read_text(encoding="utf-8").strip() if self.secret_file else ""
        limits = dataclasses.replace(DEFAULT, seconds=self.seconds)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "submission.ipynb"
            nbformat.write(nb, path)
            grades = grade_notebook(path, resources["nbgrader"]["notebook"][:2], secret=secret, limits=limits)
        outputs = {grade_id(each.exercise): _outputs(each) for each in grades}
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs = outputs.get(cell.metadata.get("nbgrader", {}).get("grade_id", ""), [])
        return nb, resources


def _outputs(grade: Grade) -> list[nbformat.NotebookNode]:
    """The message, and the points as the cell's value: nbgrader takes a plain number as the points reached."""
    told = nbformat.v4.new_output("stream", name="stdout", text=grade.message + "\n")
    return [told, nbformat.v4.new_output("execute_result", data={"text/plain": str(grade.points)}, execution_count=1)]
