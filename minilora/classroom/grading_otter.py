"""otter's autograder, from the notebook's file: a plugin that empties the notebook before it runs, and sets the points.

otter runs what was handed in and its tests in one kernel. The plugin takes all code out first, so that nothing of it
runs there, and replaces the points of each question by those of grading.py. Each question's own test fails, so a
grader without the plugin gives 0 and not full marks.
"""

from pathlib import Path
from typing import Any

import nbformat
from otter.plugins import AbstractOtterPlugin
from otter.test_files import GradingResults

from minilora.classroom.build.masters import question_name
from minilora.classroom.grading import grade_notebook, table


class FromTheFile(AbstractOtterPlugin):
    """Settings: `lesson`, such as "03", and `secret`, from which the inputs are drawn."""

    def during_assign(self, assignment: Any) -> None:
        """Nothing: the masters are complete."""

    def during_generate(self, otter_config: dict, assignment: Any) -> None:
        """Nothing: the masters are complete."""

    def before_grading(self, config: Any) -> None:
        """Nothing: the settings are the masters'."""

    def before_execution(self, submission: nbformat.NotebookNode) -> nbformat.NotebookNode:
        """A notebook without code."""
        return nbformat.v4.new_notebook(metadata=submission.metadata)

    def after_grading(self, results: GradingResults) -> None:
        """Set each question's points, and say why."""
        path = Path(self.submission_path)
        grades = grade_notebook(path, self.plugin_config["lesson"], secret=self.plugin_config.get("secret", ""))
        for grade in grades:
            result = results.results[question_name(grade.exercise)]
            result.update_score(grade.points)
            for each in result.test_case_results:
                each.passed, each.message = grade.status == "passed", grade.message
        results.set_output(table(grades))

    def generate_report(self) -> str:
        """Nothing beside the results."""
        return ""
