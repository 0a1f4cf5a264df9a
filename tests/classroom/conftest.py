"""The course's tests: a learner's folder of their own, and never strict unless a test says so."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def learner_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where progress goes during a test: an empty folder."""
    home = tmp_path / "learner"
    monkeypatch.setenv("MINILORA_HOME", str(home))
    monkeypatch.delenv("MINILORA_STRICT", raising=False)
    return home
