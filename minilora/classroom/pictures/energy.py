"""How much of a matrix' energy its first k pieces hold: the curve that tells a full matrix from a nearly low-rank one.

    energy held by k pieces = Σ_{i ≤ k} σᵢ² / Σᵢ σᵢ²

Read before this file: numpy_lora/rank.
"""

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from numpy import ndarray

from minilora.classroom.plots import COLOURS, GREY, MARKERS, new_figure, styled


def energy_held(M: Float[ndarray, "out in"]) -> Float[ndarray, " n"]:
    """Give the share of the energy that the first 1, 2, … pieces hold; the last is 1.

    >>> energy_held(np.diag([3.0, 1.0]))
    array([0.9, 1. ])
    """
    squares = np.linalg.svd(M.astype(np.float64), compute_uv=False) ** 2
    return np.cumsum(squares) / squares.sum()


@styled
def energy_curves(panels: dict[str, dict[str, Float[ndarray, " n"]]]) -> Figure:
    """One panel for each group of matrices: the energy held, against the share of the pieces that is kept."""
    figure = new_figure(9.5, 3.9)
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, curves) in zip(np.atleast_1d(row), panels.items(), strict=True):
        for (name, held), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
            kept = np.arange(len(held) + 1) / len(held)
            axes.plot(kept, [0, *held], color=colour, marker=marker, markevery=0.1, markersize=5, label=name)
        axes.axhline(0.9, color=GREY, linestyle=":", linewidth=1.5)
        axes.text(1, 0.87, "90 %", ha="right", va="top")
        axes.set_title(title)
        axes.set_xlabel("pieces kept")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "all"])
        axes.grid(True)
        axes.legend(loc="lower right")
        axes.set(xlim=(-0.04, 1.06), ylim=(0, 1.03))
    np.atleast_1d(row)[0].set_ylabel("share of the energy")
    return figure
