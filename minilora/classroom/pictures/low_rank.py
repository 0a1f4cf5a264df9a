"""A change as a sum of outer products: the best copy of rank r, what is left, and the spectrum with its cut.

    M       the matrix, here a change ΔW          (out, in), with ‖M‖ = 1
    σ       its singular values, falling; the energy is Σ σ² = ‖M‖²
    copy    B A = Σ_{i ≤ r} σᵢ uᵢ vᵢᵀ, the best copy of rank r
    tail    Σ_{i > r} σᵢ² = ‖M − B A‖², the energy that is left out

Read before this file: numpy_lora/rank.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy import ndarray

from minilora.classroom.plots import BLUE, GREEN, GREY, ORANGE, RED, new_figure, styled
from minilora.numpy_lora.rank import truncated_svd

OUT, IN = 24, 36  # of the change that is drawn
FLOOR = 1e-4  # what the spectrum shows


def break_even_rank(out_features: int, in_features: int) -> float:
    """Give the r at which two factors hold as many numbers as the matrix: r (out + in) = out · in.

    >>> break_even_rank(4096, 4096), break_even_rank(2, 3)
    (2048.0, 1.2)
    """
    return out_features * in_features / (out_features + in_features)


def planted_change(decay: float, noise: float, seed: int = 2) -> Float[ndarray, "out in"]:
    """Make a change whose singular values fall by `decay` each, and lay noise over it; its norm is 1.

        M ∝ Σᵢ decayⁱ uᵢ vᵢᵀ + N,  ‖N‖ = noise · ‖Σᵢ decayⁱ uᵢ vᵢᵀ‖

    The uᵢ and vᵢ are random walks made orthonormal, so that a piece can be told from noise by eye.
    """
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(np.cumsum(rng.normal(size=(size, OUT)), axis=0))[0] for size in (OUT, IN))
    planted = U * decay ** np.arange(OUT) @ V.T
    carpet = rng.normal(size=(OUT, IN))
    M = planted + noise * np.linalg.norm(planted) / np.linalg.norm(carpet) * carpet
    return M / np.linalg.norm(M)


@dataclass(frozen=True)
class Cut:
    """A matrix, and where its spectrum is cut."""

    M: Float[ndarray, "out in"]
    r: int

    @property
    def sigma(self) -> Float[ndarray, " n"]:
        """All singular values."""
        return np.linalg.svd(self.M, compute_uv=False)

    @property
    def copy(self) -> Float[ndarray, "out in"]:
        """The best copy of rank r."""
        B, A = truncated_svd(self.M, self.r)
        return B @ A

    def piece(self, i: int) -> Float[ndarray, "out in"]:
        """The i-th outer product, σᵢ uᵢ vᵢᵀ, counted from 1."""
        B, A = truncated_svd(self.M, i)
        return np.outer(B[:, -1], A[-1])

    @property
    def tail(self) -> float:
        """The share of the energy that is left out, from the spectrum alone."""
        squares = self.sigma**2
        return float(squares[self.r :].sum() / squares.sum())

    @property
    def error(self) -> float:
        """‖M − copy‖ / ‖M‖, measured on the matrices: the root of the tail, by Eckart and Young."""
        return float(np.linalg.norm(self.M - self.copy) / np.linalg.norm(self.M))

    @property
    def numbers(self) -> int:
        """How many numbers the two factors hold."""
        return self.r * sum(self.M.shape)


@styled
def low_rank(cut: Cut) -> Figure:
    """The change, its copy and the rest; under them the first pieces; beside them the spectrum and the energy."""
    figure = new_figure(9.5, 4.3)
    above, below = ["M", "copy", "rest", "sigma"], ["p1", "p2", "p3"]
    rows: list[Any] = [above, above, [*below, "sigma"], [*below, "energy"]]
    parts = figure.subplot_mosaic(rows, width_ratios=[1, 1, 1, 1.35], height_ratios=[1, 1, 0.8, 1.2])
    limit = float(np.abs(cut.M).max())
    _heat(parts["M"], cut.M, "ΔW", limit)
    _heat(parts["copy"], cut.copy, f"= copy of rank {cut.r}", limit)
    size = f"{cut.error:.2g}" if cut.error > 1e-9 else "0"
    _heat(parts["rest"], cut.M - cut.copy, f"+ rest, norm {size}", limit)
    for i, value in enumerate(cut.sigma[:3], start=1):
        fate = "kept" if i <= cut.r else "left out"
        _heat(parts[f"p{i}"], cut.piece(i), f"piece {i}: {fate}\nσ = {value:.2g}", limit)
        if i > cut.r:
            parts[f"p{i}"].plot([0, IN - 1, np.nan, 0, IN - 1], [0, OUT - 1, np.nan, OUT - 1, 0], color=RED)
    _spectrum(parts["sigma"], cut)
    _energy(parts["energy"], cut)
    return figure


def _heat(axes: Axes, M: ndarray, title: str, limit: float) -> None:
    """A matrix, blue where it is negative, white at 0, orange where it is positive."""
    colours = LinearSegmentedColormap.from_list("sign", [BLUE, "white", ORANGE])
    axes.imshow(M, cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest")
    axes.spines[:].set_visible(True)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])


def _spectrum(axes: Axes, cut: Cut) -> None:
    """Kept values as discs, the tail as crosses, on a log axis that is the same in every frame."""
    values, places = cut.sigma, np.arange(1, len(cut.sigma) + 1)
    seen = values >= FLOOR
    kept = places <= cut.r
    axes.plot(places[seen & kept], values[seen & kept], "o", color=GREEN, markersize=5)
    axes.plot(places[seen & ~kept], values[seen & ~kept], "x", color=RED, markersize=5)
    axes.axvline(cut.r + 0.5, color=GREY, linestyle=":", linewidth=1.5)
    axes.set_yscale("log")
    axes.set(xlim=(0, len(values) + 1), ylim=(FLOOR, 1.6))
    axes.set_title("singular values (log scale)", loc="left", fontsize=10)
    axes.set_xticks([1, 8, 16, 24])
    axes.grid(axis="y")


def _energy(axes: Axes, cut: Cut) -> None:
    """One bar, cut where the spectrum is cut: what is kept, and the tail."""
    axes.barh(0, 1 - cut.tail, color=GREEN, height=0.5)
    axes.barh(0, cut.tail, left=1 - cut.tail, color=RED, height=0.5, hatch="///")
    axes.text(0, 0.38, f"● kept {1 - cut.tail:.1%}", va="bottom", color=GREEN, fontweight="bold")
    axes.text(1, -0.38, f"× tail {cut.tail:.1%} = error²", va="top", ha="right", color=RED, fontweight="bold")
    axes.set(xlim=(0, 1), ylim=(-1.1, 1.1))
    axes.set_title("energy", loc="left", fontsize=10)
    axes.set_yticks([])
    axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.spines["left"].set_visible(False)
