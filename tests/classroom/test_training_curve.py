"""The picture of a training shows the numbers of its log."""

import json

import pytest

from minilora.classroom.training_curve import draw, training_curve


def line(step, loss):
    return {"step": step, "loss": loss, "grad_norms": {"model.layers.0": 0.1 * step, "model.layers.1": 0.0}}


LINES = [
    {"step": 0, "target": 3.0, "general": 2.0},
    *(line(step, 4.0 / step) for step in range(1, 12)),
    {"step": 11, "target": 1.0, "general": 2.5},
]


def test_the_lines_are_the_logs():
    left, right, *_ = training_curve(LINES).axes
    each, smooth, target, general = (curve.get_xydata().tolist() for curve in left.get_lines())

    assert each == [[step, 4.0 / step] for step in range(1, 12)]
    assert smooth[5] == [6, pytest.approx(4 / 6)]  # the median of steps 2 to 10
    assert target == [[0, 3.0], [11, 1.0]] and general == [[0, 2.0], [11, 2.5]]
    norms = 10 ** right.get_images()[0].get_array()
    assert norms[0].tolist() == pytest.approx([0.1 * step for step in range(1, 12)])
    assert norms[1].tolist() == pytest.approx([0.1] * 11)  # none: as dark as the least there is


def test_a_picture_lies_beside_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in LINES))

    assert draw(tmp_path) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_without_a_step_has_no_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")

    assert draw(tmp_path) is None
