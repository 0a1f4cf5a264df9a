"""Masters for nbgrader and for otter: a lesson's notebook with its answers, and what each tool wants to know of it.

    nbgrader   the cell with the answer is a solution cell, the cell with `check` a locked one; after it stands a locked
               cell that carries the exercise's points, into which grading from the file writes what was reached
    otter      a question around the two, and a test; the points come from grading from the file, by a plugin

Both strip what stands between `# BEGIN SOLUTION` and `# END SOLUTION`. Neither grade is taken from a kernel.
"""

import ast
import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat

from minilora.classroom.build.cells import BLANK, source_cells, student_cells
from minilora.classroom.build.lesson import Lesson, LessonError, Notebook
from minilora.classroom.build.lint import BEGIN, END, stated_exercises
from minilora.classroom.build.notebooks import new_notebook, write_notebook
from minilora.files import write_whole

CONFIG = '''"""nbgrader's settings for this course: grades come from the notebook's file (lessons/INSTRUCTORS.md)."""

from minilora.classroom.nbgrader_file import FromTheFile

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "minilora"
c.ClearSolutions.begin_solution_delimeter = "BEGIN SOLUTION"
c.ClearSolutions.end_solution_delimeter = "END SOLUTION"
c.ClearSolutions.code_stub = {"python": "...  # your code"}
c.ClearSolutions.enforce_metadata = False
'''
