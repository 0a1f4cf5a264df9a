"""The picture of a training, from its metrics.jsonl: the loss as it fell, and how strongly each layer was pulled.

A layer that is dark from beginning to end gets no gradient: it learns nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from minilora.classroom.plots import BLUE, GREEN, GREY, RED, Figure, new_figure, png, styled
from minilora.files import write_whole
from minilora.train.listeners import read_metrics

SMOOTHED = 9  # steps whose median is drawn
MOST_NAMES = 12  # of layers beside the picture


def draw(folder: Path) -> Path | None:
    """Write loss.png beside the metrics of a training; None if it made no step."""
    lines = read_metrics(folder / "metrics.jsonl")
    if not any("loss" in line for line in lines):
        return None
    write_whole({folder / "loss.png": png(training_curve(lines))})
    return folder / "loss.png"


@styled
def training_curve(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: the loss of each step, its running median, and what was measured; right: gradient norms, layer by step."""
    steps, measured = [line for line in lines if "loss" in line], [line for line in lines if "target" in line]
    numbers, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    figure = new_figure(9, 3.4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(numbers, losses, color=GREY, linewidth=0.8, alpha=0.6, label="each step")
    half = SMOOTHED // 2
    smooth = [median(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    left.plot(numbers, smooth, color=BLUE, label=f"median of {SMOOTHED}")
    for key, colour, marker, name in (
        ("target", RED, "o", "held-out samples"),
        ("general", GREEN, "s", "plain English"),
    ):
        if measured:
            places = [line["step"] for line in measured]
            left.plot(places, [line[key] for line in measured], color=colour, marker=marker, markersize=4, label=name)
    left.set_xlabel("step")
    left.set_ylabel("loss, nats per token")
    left.set_ylim(bottom=0)
    left.grid(axis="y")
    left.legend()
    _norms(figure, right, steps)
    return figure


def _norms(figure: Figure, axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    names = list(steps[0]["grad_norms"])
    norms = np.array([[line["grad_norms"].get(name, 0.0) for line in steps] for name in names])
    floor = norms[norms > 0].min() if (norms > 0).any() else 1.0
    extent = (steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5, len(names) - 0.5, -0.5)
    image = axes.imshow(np.log10(np.maximum(norms, floor)), aspect="auto", extent=extent, interpolation="nearest")
    told = range(0, len(names), -(-len(names) // MOST_NAMES))
    axes.set_yticks(list(told), [names[place].removeprefix("model.") for place in told])
    axes.set_xlabel("step")
    axes.set_title("gradient of each layer")
    figure.colorbar(image, ax=axes, label="log₁₀ of its norm")
