"""The learner's file."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minilora.classroom.progress import progress_file, read_progress, record


def test_a_new_learner_has_no_progress():
    assert read_progress() == {}


def test_without_a_named_folder_it_lies_in_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MINILORA_HOME")

    assert progress_file() == Path.home() / ".minilora" / "progress.json"


def test_facts_are_added_to_what_is_there():
    record("exercises", "03.1", status="failed", attempts=None)
    record("exercises", "03.1", status="passed", attempts=None)
    record("bets", "03.zero", bet="dA")

    assert read_progress() == {
        "exercises": {"03.1": {"status": "passed", "attempts": 2}},
        "bets": {"03.zero": {"bet": "dA"}},
    }


def test_two_notebooks_that_write_at_once_lose_nothing():
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: record("exercises", f"{number:02}", attempts=None), range(40)))

    assert len(read_progress()["exercises"]) == 40


def test_no_unfinished_file_is_left_behind(learner_home: Path):
    record("exercises", "03.1", status="passed")

    assert sorted(path.name for path in learner_home.iterdir()) == ["progress.json", "progress.lock"]


@pytest.mark.parametrize("content", ["{", "[]", "\xff\xfe"])
def test_a_damaged_file_is_named_and_not_written_over(content: str, learner_home: Path):
    learner_home.mkdir()
    (learner_home / "progress.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"progress\.json.*repair it or move it away"):
        record("exercises", "03.1", status="passed")

    assert (learner_home / "progress.json").read_text(encoding="latin-1") == content
