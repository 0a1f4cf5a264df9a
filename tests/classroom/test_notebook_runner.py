"""How `python -m pytest notebooks` behaves (notebooks/pytest.ini and conftest.py), tried on small notebooks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
SMALL = {
    "01_broken.ipynb": ["x = 1", "y = undefined", "x", "x + y"],
    "02_fine.ipynb": ["x = 1", "assert x == 1"],
    "03_strict.ipynb": ["import os", "assert os.environ['MINILORA_STRICT'] == '1'"],
    "student/03_strict.ipynb": ["import os", "assert os.environ['MINILORA_STRICT'] == '0'"],
    "04_environment.ipynb": [
        "import os, pathlib, sys",
        "assert (os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES']) == ('1', '')",
        "assert os.environ['PYTHONHASHSEED'] == '0'",
        f"assert sys.executable == {sys.executable!r}",
        "assert pathlib.Path('04_environment.ipynb').exists()",
        "from minilora.classroom.progress import progress_file",
        "assert pathlib.Path.home() not in progress_file().parents",
    ],
    "05_dead.ipynb": ["import os", "os._exit(1)", "x = 1"],
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What became of each cell of each notebook, in one run on one worker."""
    folder = tmp_path_factory.mktemp("course") / "notebooks"
    (folder / "student").mkdir(parents=True)
    for name in ("pytest.ini", "conftest.py"):
        shutil.copy(NOTEBOOKS / name, folder / name)
    for name, cells in SMALL.items():
        nbformat.write(
            nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), folder / name
        )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "notebooks", "-v", "-n", "0", "--nbval-cell-timeout=8"],
        cwd=folder.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "MINILORA_STRICT": "", "PYTHONPATH": str(NOTEBOOKS.parent)},
        timeout=300,
    )
    found: dict[str, list[str]] = {name: [] for name in SMALL}
    for name, outcome in re.findall(r"^(?:notebooks/)?(\S+)::Cell \d+ ([A-Z]+)", done.stdout, flags=re.MULTILINE):
        found[name.replace("::ipynb", ".ipynb")].append(outcome)
    assert all(found.values()), done.stdout + done.stderr
    return found


def test_after_its_first_failure_the_rest_of_a_notebook_is_skipped(outcomes: dict[str, list[str]]):
    assert outcomes["01_broken.ipynb"] == ["PASSED", "FAILED", "SKIPPED", "SKIPPED"]


def test_the_other_notebooks_go_on(outcomes: dict[str, list[str]]):
    assert outcomes["02_fine.ipynb"] == ["PASSED", "PASSED"]


def test_full_notebooks_are_strict_and_students_are_not(outcomes: dict[str, list[str]]):
    assert outcomes["03_strict.ipynb"] == outcomes["student/03_strict.ipynb"] == ["PASSED", "PASSED"]


def test_the_environment_is_fixed_and_the_learner_s_progress_is_left_alone(outcomes: dict[str, list[str]]):
    assert outcomes["04_environment.ipynb"] == ["PASSED"] * 7


def test_a_dead_kernel_fails_its_notebook_within_the_timeout(outcomes: dict[str, list[str]]):
    assert outcomes["05_dead.ipynb"][:2] == ["PASSED", "FAILED"]
    assert "PASSED" not in outcomes["05_dead.ipynb"][2:]
