"""`minilora progress` tells what the file says, of every lesson."""

import json

import pytest

from minilora.classroom.exercises import check, hint
from minilora.classroom.lessons import lesson_module, lesson_titles
from minilora.classroom.progress_report import report
from minilora.cli import run_command
from minilora.numpy_lora import forward


@pytest.fixture
def learner(tmp_path, monkeypatch):
    """A learner's own folder, and no strict mode."""
    monkeypatch.setenv("MINILORA_HOME", str(tmp_path))
    monkeypatch.delenv("MINILORA_STRICT", raising=False)
    return tmp_path


def without_scaling(x, W, A, B, alpha):
    return x @ W.T + x @ A.T @ B.T


def mine(x, W, A, B, alpha):
    return forward.lora_forward(x, W, A, B, alpha)


def test_it_tells_attempts_and_hints_and_what_is_next(learner, capsys):
    check("03.1", without_scaling)
    hint("03.1")
    check("03.1", mine)
    capsys.readouterr()

    assert run_command(["progress"]) == 0
    told = capsys.readouterr().out.splitlines()

    (line,) = [line for line in told if " 03.1 " in line]
    assert " ".join(line.split()) == "✓ 03.1 The forward pass passed, 2 attempts, 1 of 3 hints"
    everything = [e for lesson in lesson_titles() for e in lesson_module(lesson).EXERCISES]
    left = sum(e.minutes for e in everything if e.id != "03.1")
    assert f"1 of {len(everything)} exercises, 2 of {sum(e.points for e in everything)} points" in "\n".join(told)
    assert f"about {left} minutes are left" in "\n".join(told)
    assert told[-1] == f"kept in {learner / 'progress.json'} and never sent anywhere"


def test_a_failed_exercise_and_one_not_started_say_so():
    told = report({"exercises": {"03.1": {"status": "failed", "attempts": 1}}})

    assert "✗ 03.1  The forward pass                   failed, 1 attempt\n" in told
    assert "· 03.2  The gradients by hand              not started, 15 min\n" in told


def test_a_file_that_cannot_be_read_is_told(learner):
    (learner / "progress.json").write_text(json.dumps([1]))

    with pytest.raises(ValueError, match="repair it or move it away"):
        run_command(["progress"])
