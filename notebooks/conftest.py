"""How the notebooks are run as tests: a fixed environment, and no error reported twice.

After its first failing cell the rest of a notebook is skipped: it would only fail for want of what that cell made.
The full notebooks run under `MINILORA_STRICT=1`, where an exercise that does not pass raises; the students' run without,
as a learner does who has not yet filled in anything.
"""

import os
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
}
_failed: dict[Path, str] = {}  # notebook -> its first failing cell


def pytest_configure(config: pytest.Config) -> None:
    """Fix what every kernel inherits; progress goes to a folder of its own, not to the learner's."""
    os.environ.update(ENVIRONMENT)
    home = tempfile.TemporaryDirectory()
    config.add_cleanup(home.cleanup)
    os.environ["MINILORA_HOME"] = os.environ["IPYTHONDIR"] = home.name


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Choose strict or not before the notebook's kernel starts; skip what comes after a failure."""
    os.environ["MINILORA_STRICT"] = "0" if item.path.parent.name == "student" else "1"
    if item.path in _failed:
        pytest.skip(f"{_failed[item.path]} failed before it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember the first failing cell of each notebook."""
    report = yield
    if report.failed:
        _failed.setdefault(item.path, item.name)
    return report
