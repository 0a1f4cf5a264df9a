"""How much of a planted change LoRA has learned after some steps, at every rank, under both scalings.

    P       the planted change (out, in), of rank 1, ‖P‖ = 1      ΔW = s · B A, with s = alpha / r or alpha / √r
    loss    ½ ‖ΔW − P‖²: what rows of x from N(0, I) cost on average, so no rows have to be drawn
    learned ⟨ΔW, P⟩ / ‖P‖²: 0 at the start, 1 when P is found

All is done for several draws of P and A at once: the first axis of every array counts the draws.

Read before this file: numpy_lora/forward, torch_lora/config.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from minilora.classroom.plots import BLUE, GREY, RED, new_figure, styled
from minilora.torch_lora.config import LoRAConfig

Optimizer = Literal["sgd", "adam"]

DRAWS, IN, OUT = 16, 64, 16
RANKS = (1, 2, 4, 8, 16, 32, 64)
LR: dict[str, float] = {"sgd": 0.03, "adam": 0.001}
LONG = 300  # steps
AWAY = 1e4  # a loss above this has run away: at the start it is 0.5
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # Adam's own
LOOK = {False: ("alpha / r", BLUE, "o"), True: ("alpha / √r", RED, "s")}

# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Start:
    """What trainings begin with, beside B = 0: the planted changes, and the first A."""

    P: Float[ndarray, "draws out in"]
    A: Float[ndarray, "draws r in"]


def start(r: int, n_in: int = IN, draws: int = DRAWS) -> Start:
    """Plant changes of rank 1 and norm 1, the same for every r; draw A ~ U(−1/√in, 1/√in)."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(draws, OUT, 1)), rng.normal(size=(draws, 1, n_in))
    P = left * right
    P /= np.linalg.norm(P, axis=(1, 2), keepdims=True)
    return Start(P, np.random.default_rng(r).uniform(-1, 1, size=(draws, r, n_in)) / np.sqrt(n_in))


@dataclass(frozen=True)
class Run:
    """A training, before every step and after the last, as means over the draws; NaN from where one has run away."""

    learned: Float[ndarray, " steps_and_one"]
    loss: Float[ndarray, " steps_and_one"]


def train(begin: Start, s: float, *, lr_A: float, lr_B: float, steps: int, optimizer: Optimizer) -> Run:
    """Train A and B from B = 0 on ½ ‖s B A − P‖², with a rate for each.

    G = s B A − P      dA = s Bᵀ G      dB = s G Aᵀ            numpy_lora/forward, with x from N(0, I)
    """
    A, B, P = begin.A.copy(), np.zeros((*begin.P.shape[:2], begin.A.shape[1])), begin.P
    averages = [(np.zeros_like(p), np.zeros_like(p)) for p in (A, B)]
    learned, loss = np.full((2, steps + 1), np.nan)
    for step in range(steps + 1):
        G = s * B @ A - P
        learned[step] = 1 + np.mean(np.sum(G * P, axis=(1, 2)))
        loss[step] = 0.5 * np.mean(np.sum(G * G, axis=(1, 2)))
        if not loss[step] < AWAY:
            learned[step] = loss[step] = np.nan
            break
        gradients = s * B.transpose(0, 2, 1) @ G, s * G @ A.transpose(0, 2, 1)
        for p, g, (m, v), lr in zip((A, B), gradients, averages, (lr_A, lr_B), strict=True):
            p -= lr * (g if optimizer == "sgd" else adam_direction(g, m, v, step + 1))
    return Run(learned, loss)


def adam_direction(g: ndarray, m: ndarray, v: ndarray, step: int) -> ndarray:
    """What Adam makes of a gradient; its two averages change in place. (Kingma and Ba 2015, algorithm 1)

    At the first step it is g / (|g| + 10⁻⁸): the sign of g.
    """
    m += (1 - BETA1) * (g - m)
    v += (1 - BETA2) * (g * g - v)
    return m / (1 - BETA1**step) / (np.sqrt(v / (1 - BETA2**step)) + EPS)


@cache
def learned(r: int, alpha: float, use_rslora: bool, optimizer: Optimizer, steps: int = LONG) -> tuple[float, ...]:
    """What is learned before every step and after the last, at the picture's rate."""
    s, lr = LoRAConfig(r=r, alpha=alpha, use_rslora=use_rslora).scaling, LR[optimizer]
    return tuple(train(start(r), s, lr_A=lr, lr_B=lr, steps=steps, optimizer=optimizer).learned.tolist())


def by_rank(alpha: float, optimizer: Optimizer, step: int) -> dict[bool, list[float]]:
    """What is learned after so many steps at each of RANKS, without and with use_rslora."""
    steps = 1 if step == 1 else LONG
    return {rs: [learned(r, alpha, rs, optimizer, steps)[step] for r in RANKS] for rs in (False, True)}


def expected_first_step(r: int, alpha: float, use_rslora: bool, optimizer: Optimizer) -> float:
    """What one step learns on average over A: s² lr · r / (3 in) by SGD, s lr · r · c by Adam.

    c is the sum of |P aᵀ| for one row a of A, here for normal a of the same variance, which differs little:
    E|p a| = ‖p‖ √(2 / π) / √(3 in) for a row p of P.
    """
    s, lr = LoRAConfig(r=r, alpha=alpha, use_rslora=use_rslora).scaling, LR[optimizer]
    if optimizer == "sgd":
        return lr * s**2 * r / (3 * IN)
    rows = float(np.mean(np.sum(np.linalg.norm(start(r).P, axis=2), axis=1)))
    return lr * s * r * rows * float(np.sqrt(2 / np.pi / (3 * IN)))


def slope(values: list[float]) -> float:
    """The power of r that fits best: the slope of log(values) over log(RANKS)."""
    return float(np.polyfit(np.log(RANKS), np.log(values), 1)[0])


@cache
def best_rate(r: int, use_rslora: bool, optimizer: Optimizer, steps: int, alpha: float = 8.0) -> float:
    """The rate, of powers of two, with the lowest loss after so many steps."""
    s = LoRAConfig(r=r, alpha=alpha, use_rslora=use_rslora).scaling
    losses = {}
    for lr in 2.0 ** np.arange(-14, 6):
        loss = train(start(r), s, lr_A=lr, lr_B=lr, steps=steps, optimizer=optimizer).loss[-1]
        losses[float(lr)] = np.inf if np.isnan(loss) else loss
    return min(losses, key=losses.__getitem__)


# -------------------------------------------------------------------------------------------------------------- figures


@styled
def update_size(alpha: float, optimizer: Optimizer, step: int) -> Figure:
    """What is learned against the rank, log-log: after one step, with what is expected dashed, and after more."""
    figure = new_figure(9.5, 3.9)
    first, later = figure.subplots(1, 2, sharey=True)
    _lines(first, by_rank(alpha, optimizer, 1))
    for use_rslora, (_, colour, _) in LOOK.items():
        expected = [expected_first_step(r, alpha, use_rslora, optimizer) for r in RANKS]
        first.plot(RANKS, expected, color=colour, linestyle="--", linewidth=1.2)
    _lines(later, by_rank(alpha, optimizer, step))
    later.axhline(1, color=GREY, linestyle=":", linewidth=1.5)
    later.text(64, 1.2, "all of it", ha="right", va="bottom")
    first.set(title="after 1 step (dashed: as expected)", ylabel="share of the change learned")
    later.set_title(f"after {step} steps")
    first.set_ylim(1e-5, 6)
    first.legend(loc="upper left", ncols=2)
    return figure


def _lines(axes: Axes, values: dict[bool, list[float]]) -> None:
    """A line for each scaling; a cross at the top where the training ran away."""
    for use_rslora, (name, colour, marker) in LOOK.items():
        axes.loglog(RANKS, values[use_rslora], color=colour, marker=marker, label=name, clip_on=False)
        gone = [r for r, value in zip(RANKS, values[use_rslora], strict=True) if np.isnan(value)]
        axes.plot(
            gone, [2.6] * len(gone), color=colour, marker="+" if use_rslora else "x", markersize=9, linestyle="none"
        )
        if gone:
            axes.text(0.98, 0.04, "+ and ×: ran away", transform=axes.transAxes, ha="right")
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.minorticks_off()
    axes.set_xlabel("r")
    axes.grid(True)
