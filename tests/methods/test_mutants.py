"""Every broken copy of a method is caught by the method's own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS, TESTS, Mutant

import minilora

PACKAGE, HERE = Path(minilora.__file__).parent, Path(__file__).parents[1]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.says}")
def test_its_line_is_there_once(mutant: Mutant):
    assert (PACKAGE / "methods" / mutant.file).read_text(encoding="utf-8").count(mutant.line) == 1


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.says}")
def test_it_is_caught(mutant: Mutant, tmp_path: Path):
    package = shutil.copytree(PACKAGE, tmp_path / "minilora", ignore=shutil.ignore_patterns("__pycache__"))
    path = package / "methods" / mutant.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutant.line, mutant.instead), encoding="utf-8")
    settings = ["-c", str(HERE.parent / "pyproject.toml"), "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    told = ""
    for name in TESTS[mutant.file]:  # one after the other: PEFT takes seconds to import, and is seldom needed
        command = [sys.executable, "-m", "pytest", "-q", "-x", *settings, str(HERE / name)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        told += done.stdout
        if done.returncode:
            break

    assert done.returncode == 1 and " failed" in told, f"nothing noticed it:\n{told[-2000:]}"
    assert "ImportError" not in told and "SyntaxError" not in told
