"""The race of LoRA+: how fast A and B learn a planted change when B's rate is a multiple of A's.

    ratio   lr_B / lr_A; 1 is LoRA          goal    a tenth of the loss at the start

Two races. In the first all have the same rate for A, so that a larger ratio is a larger rate for B and nothing else. In
the second each ratio has its own best rate for A, of powers of two: the one that reaches the goal in the fewest steps.

Read before this file: update_size, methods/loraplus.
"""

from functools import cache

import numpy as np
from matplotlib.figure import Figure

from minilora.classroom.pictures.update_size import start, train
from minilora.classroom.plots import COLOURS, GREY, MARKERS, new_figure, styled

RATIOS = (1, 4, 16, 64)
R, SCALING, STEPS = 8, 2.0, 80
SAME_RATE = 2.0**-10
RATES = tuple(2.0**power for power in range(-13, -3))
GOAL = 0.05  # the loss begins at 0.5

# ------------------------------------------------------------------------------------------------------------- numbers


@cache
def race(lr: float, ratio: int) -> tuple[float, ...]:
    """The loss before every step and after the last, by Adam, with A at `lr` and B at `lr` times `ratio`."""
    run = train(start(R), SCALING, lr_A=lr, lr_B=lr * ratio, steps=STEPS, optimizer="adam")
    return tuple(run.loss.tolist())


def steps_to_goal(losses: tuple[float, ...]) -> float:
    """The first step after which the loss is at the goal; infinity if it never is.

    >>> steps_to_goal((0.5, 0.2, 0.04, 0.06)), steps_to_goal((0.5, 0.2))
    (2.0, inf)
    """
    return next((float(step) for step, loss in enumerate(losses) if loss <= GOAL), np.inf)


@cache
def best_rate_of(ratio: int) -> float:
    """The rate for A with which this ratio is soonest at the goal; of equals the smallest."""
    return min(RATES, key=lambda lr: steps_to_goal(race(lr, ratio)))


def races() -> dict[str, dict[int, tuple[float, ...]]]:
    """Both races: the losses of every ratio."""
    return {
        "the same rate for A": {ratio: race(SAME_RATE, ratio) for ratio in RATIOS},
        "each ratio at its best rate": {ratio: race(best_rate_of(ratio), ratio) for ratio in RATIOS},
    }


# -------------------------------------------------------------------------------------------------------------- figures


@styled
def two_rates(panels: dict[str, dict[int, tuple[float, ...]]]) -> Figure:
    """One panel for each race: loss against steps on a log scale, a line for each ratio; dotted, the goal."""
    figure = new_figure(9.5, 3.7)
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for (ratio, losses), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
            axes.plot(losses, color=colour, marker=marker, markevery=8, markersize=5, label=f"ratio {ratio}")
        axes.axhline(GOAL, color=GREY, linestyle=":", linewidth=1.5)
        axes.set(title=title, xlabel="steps of Adam", yscale="log", ylim=(1e-5, 3), xlim=(-1, STEPS + 1))
        axes.grid(axis="y")
    row[0].set_ylabel("loss (dotted: a tenth of the start)")
    row[0].legend(loc="lower left")
    return figure
