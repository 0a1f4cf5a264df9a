"""Lesson 08's picture: the loss against the rank, where the best that any adapter can learn is known exactly.

    W       (out, in)   the layer as it was
    ΔW      (out, in)   what is to be learnt: planted, of rank k, its singular values all alike
    x, y    (n, in), (n, out)     y = x (W + ΔW)ᵀ + noise;  R = y − x Wᵀ is what ΔW has to explain

        the best ΔW of rank r = argmin ‖R − x ΔWᵀ‖²       reduced-rank regression (Izenman 1975)
          G = the least-squares solution of x G = R,  V_r = the top r right singular vectors of x G
          ΔW_r = (G V_r V_rᵀ)ᵀ

A LoRA of rank r that is trained for long ends there, at the cost of a few thousand steps: a test trains one.
"""

import functools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray

from minilora.classroom.plots import BLUE, GREEN, GREY, RED, new_figure, styled

IN, OUT, UNSEEN = 24, 16, 2000  # features, features, rows that the loss is measured on
RANKS = tuple(range(1, 13))
SEEDS = (0, 1, 2, 3, 4)

# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Task:
    """Rows to learn from and rows to judge by: what ΔW has to explain of each."""

    x: Float[ndarray, "n in"]
    R: Float[ndarray, "n out"]
    unseen_x: Float[ndarray, "m in"]
    unseen_R: Float[ndarray, "m out"]
    update: Float[ndarray, "out in"]  # that was planted


def task(k: int, n: int, noise: float, seed: int) -> Task:
    """Plant an update of rank k and ‖ΔW‖² = out; each entry of y gets noise of this standard deviation.

    Raises:
        ValueError: if k is no rank of such an update, or there is no row.
    """
    if not 1 <= k <= min(IN, OUT) or n < 1:
        raise ValueError(f"k is {k} and n is {n}: choose k from 1 to {min(IN, OUT)}, and n of 1 or more")
    rng = np.random.default_rng([seed, k])  # the update does not change with n and noise
    U, V = (np.linalg.qr(rng.normal(size=(features, k)))[0] for features in (OUT, IN))
    update = np.sqrt(OUT / k) * U @ V.T
    x, unseen = rng.normal(size=(UNSEEN, IN)), rng.normal(size=(UNSEEN, IN))
    errors = rng.normal(size=(2, UNSEEN, OUT))
    R, unseen_R = x @ update.T + noise * errors[0], unseen @ update.T + noise * errors[1]
    return Task(x[:n], R[:n], unseen, unseen_R, update)


def best_updates(x: Float[ndarray, "n in"], R: Float[ndarray, "n out"]) -> dict[int, Float[ndarray, "out in"]]:
    """The update of each rank that explains R best; of several the one of least norm."""
    G = np.linalg.lstsq(x, R, rcond=None)[0]  # (in, out)
    V = np.linalg.svd(x @ G, full_matrices=False)[2]  # (out, out), the most important row first
    return {r: (G @ V[:r].T @ V[:r]).T for r in range(1, len(V) + 1)}


def loss(x: Float[ndarray, "n in"], R: Float[ndarray, "n out"], update: Float[ndarray, "out in"]) -> float:
    """Mean square of what is left, an entry."""
    return float(np.mean((R - x @ update.T) ** 2))


@dataclass(frozen=True)
class Sweep:
    """Losses by rank, one a seed: on the rows that were learnt from and on unseen ones."""

    trained: Mapping[int, Sequence[float]]
    unseen: Mapping[int, Sequence[float]]
    planted: Sequence[float]  # singular values of the planted update, with seed 0
    learnt: Sequence[float]  # of the least-squares update, with seed 0

    @property
    def best(self) -> int:
        """The rank whose mean loss on unseen rows is least."""
        return min(self.unseen, key=lambda r: statistics.mean(self.unseen[r]))


@functools.cache
def sweep(k: int, n: int, noise: float) -> Sweep:
    """The losses of every rank in RANKS with every seed, for a planted rank k, n rows and so much noise."""
    trained: dict[int, list[float]] = {r: [] for r in RANKS}
    unseen: dict[int, list[float]] = {r: [] for r in RANKS}
    for seed in SEEDS:
        given = task(k, n, noise, seed)
        updates = best_updates(given.x, given.R)
        for r in RANKS:
            trained[r].append(loss(given.x, given.R, updates[r]))
            unseen[r].append(loss(given.unseen_x, given.unseen_R, updates[r]))
    first = task(k, n, noise, SEEDS[0])
    values = [
        np.linalg.svd(M, compute_uv=False)[: RANKS[-1]] for M in (first.update, best_updates(first.x, first.R)[OUT])
    ]
    return Sweep(trained, unseen, *(list(map(float, found)) for found in values))


# -------------------------------------------------------------------------------------------------------------- figures


@styled
def rank_sweep(found: Sweep, k: int, r: int, elbow: int, noise: float) -> Figure:
    """Left: the losses by rank, with the seeds' range; right: singular values, planted and learnt, and the cut at r."""
    figure = new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _lines(left, found.trained, BLUE, "o", "rows it learnt from")
    _lines(left, found.unseen, RED, "s", "unseen rows")
    left.axhline(noise**2, color=GREY, linestyle=":", label="noise: no update explains it")
    at = statistics.mean(found.unseen[elbow])
    left.plot([elbow], [at], "o", ms=16, mfc="none", mec=RED, label=f"elbow, r = {elbow}")
    left.set_xlabel("rank r")
    left.set_ylabel("mean square error")
    left.set_xticks(RANKS)
    left.set_ylim(bottom=0)
    left.grid(axis="y")
    left.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    places = range(1, len(found.planted) + 1)
    right.bar(places, found.learnt, color=BLUE, alpha=0.35, label="in the data, noise and all")
    right.plot(places, found.planted, color=GREEN, marker="D", linestyle="none", label=f"planted, k = {k}")
    right.axvline(r + 0.5, color=GREY, linestyle="--")
    side: Any = {"ha": "right", "xytext": (-4, -2)} if r > 6 else {"ha": "left", "xytext": (6, -2)}
    cut = (r + 0.5, 1)
    right.annotate(
        f"r = {r} keeps these", cut, xycoords=("data", "axes fraction"), textcoords="offset points", va="top", **side
    )
    right.set_xlabel("singular value, the largest first")
    right.set_ylabel("size")
    right.set_xticks(places)
    right.set_ylim(0, 1.2 * max(*found.planted, *found.learnt))
    right.legend(loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _lines(axes: Axes, losses: Mapping[int, Sequence[float]], colour: str, marker: str, label: str) -> None:
    """The means of the seeds, and a band from the least to the largest."""
    ranks = list(losses)
    axes.fill_between(ranks, [min(losses[r]) for r in ranks], [max(losses[r]) for r in ranks], color=colour, alpha=0.2)
    axes.plot(ranks, [statistics.mean(losses[r]) for r in ranks], color=colour, marker=marker, label=label)


@styled
def planted_and_real(
    planted: Mapping[int, Mapping[int, Sequence[float]]], real: Mapping[int, Sequence[float]]
) -> Figure:
    """Left: the share of the loss that each rank leaves, a line for each planted rank; right: a real task."""
    figure = new_figure(9.6, 3.6)
    left, right = figure.subplots(1, 2)
    for (k, losses), colour, marker in zip(planted.items(), (BLUE, GREEN, RED), "o^s", strict=False):
        _lines(left, {0: [1.0, 1.0], **losses}, colour, marker, f"planted k = {k}")
    left.set_xlabel("rank r of LoRA")
    left.set_ylabel("share of the loss that is left")
    left.set_title("a decoder with a planted update")
    left.legend()
    _lines(right, real, BLUE, "o", "LoRA on every linear layer")
    right.set_xscale("log", base=2)
    right.set_xticks(list(real), [str(r) for r in real])
    right.set_xlabel("rank r of LoRA")
    right.set_ylabel("loss on unseen orders, nats")
    right.set_title("SmolLM2-135M learns to write orders")
    right.set_ylim(0, 1.3 * max(max(found) for found in real.values()))
    right.legend()
    for axes in (left, right):
        axes.grid(axis="y")
    return figure


@styled
def overlap(similarities: Float[ndarray, "ranks directions"], ranks: Sequence[int]) -> Figure:
    """φ between the top i directions of a narrow adapter and the top j of a wide one, as a grid of shades."""
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    image = axes.imshow(similarities, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
    for (i, j), value in np.ndenumerate(similarities):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(similarities.shape[1]), [str(j + 1) for j in range(similarities.shape[1])])
    axes.set_yticks(range(similarities.shape[0]), [str(i + 1) for i in range(similarities.shape[0])])
    axes.set_xlabel(f"top j directions of A, r = {ranks[1]}")
    axes.set_ylabel(f"top i directions of A, r = {ranks[0]}")
    figure.colorbar(image, ax=axes, label="φ")
    return figure


@styled
def choices(planted: Sequence[int], chosen: Mapping[str, Sequence[int]]) -> Figure:
    """A panel for each way of choosing: the chosen rank against the planted one; larger dots were said more often."""
    figure = new_figure(10, 2.6)
    panels = figure.subplots(1, len(chosen), sharey=True)
    ends = (0.5, RANKS[-1] + 0.8)
    for axes, (name, ranks) in zip(panels, chosen.items(), strict=True):
        counts = Counter(zip(planted, ranks, strict=True))
        axes.plot(ends, ends, color=GREY, linestyle=":")
        sizes = [18 * count for count in counts.values()]
        axes.scatter(*zip(*counts, strict=True), s=sizes, color=BLUE if name == "healthy" else RED, zorder=3)
        axes.set_title(name)
        axes.set_xlabel("planted")
        axes.set_xlim(1, 8)
        axes.set_ylim(*ends)
        axes.grid(axis="y")
    panels[0].set_yticks(range(2, RANKS[-1] + 1, 2))
    panels[0].set_ylabel("chosen rank")
    return figure
