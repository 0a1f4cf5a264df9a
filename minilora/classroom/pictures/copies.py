"""Copies of one matrix at every rank, by a right and by broken recipes: how far each is away.

Read before this file: numpy_lora/rank.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from minilora.classroom.plots import COLOURS, GREY, MARKERS, new_figure, styled

Recipe = Callable[[ndarray, int], tuple[ndarray, ndarray]]


def copy_errors(recipe: Recipe, M: Float[ndarray, "out in"]) -> list[float]:
    """‖M − B A‖ / ‖M‖ for every rank 1, 2, … that M can have, with B and A from the recipe."""
    size = np.linalg.norm(M)
    return [float(np.linalg.norm(M - np.matmul(*recipe(M, r))) / size) for r in range(1, min(M.shape) + 1)]


@styled
def copies(best: Sequence[float], cases: dict[str, Sequence[float]]) -> Figure:
    """One panel for each case: its error over the best one's, both against the rank."""
    figure = new_figure(9.5, 2.9)
    panels = figure.subplots(1, len(cases), sharey=True)
    for axes, (name, errors), colour, marker in zip(panels, cases.items(), COLOURS, MARKERS, strict=False):
        ranks = np.arange(1, len(best) + 1)
        axes.plot(ranks, best, color=GREY, linewidth=4, alpha=0.45, label="best")
        axes.plot(ranks, errors, color=colour, marker=marker, markersize=4, linestyle="--", label="patient")
        axes.axhline(1, color=GREY, linestyle=":", linewidth=1.5, label="no copy at all")
        axes.set_title(f"Patient {name}")
        axes.set_xlabel("r")
        axes.set(xlim=(0, len(best) + 1), ylim=(0, 3.2))
        axes.grid(axis="y")
    panels[0].set_ylabel("‖ΔW − B A‖ / ‖ΔW‖")
    panels[0].legend(loc="upper right", fontsize=8)
    return figure
