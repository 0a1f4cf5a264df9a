"""Which layers a model would change first: its gradient, matrix by matrix, and how much of it a rank can hold.

    G             the gradient of the loss for a weight W, (out, in)
    captured      σ₁² + … + σᵣ² of G: what a step of rank r can have of ‖G‖²

To first order a step W ← W − lr · Gᵣ, with Gᵣ the best approximation of rank r, lowers the loss by lr · captured. Each
matrix has a gradient of its own, so for several matrices these numbers add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from minilora.classroom.costs import human_count
from minilora.classroom.plots import COLOURS, GREY, MARKERS, new_figure, styled


@dataclass(frozen=True)
class Gradient:
    """The largest singular values of G with their vectors, and ‖G‖²: G ≈ U diag(S) Vᵀ."""

    U: Tensor  # (out, k)
    S: Tensor  # (k,)
    V: Tensor  # (in, k)
    energy: float

    def captured(self, r: int) -> float:
        """σ₁² + … + σᵣ²."""
        return float(self.S[:r].square().sum())


def gradient_of(weight: Tensor, k: int) -> Gradient:
    """Take a weight's `.grad` apart. A randomized SVD, which is close where singular values fall fast.

    Raises:
        ValueError: if the weight has no gradient.
    """
    if weight.grad is None:
        raise ValueError("this weight has no gradient: call backward() on a loss first, with requires_grad on")
    G = weight.grad.detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(G, q=min(k + 8, *G.shape), niter=2)
    return Gradient(U[:, :k], S[:k], V[:, :k], float(G.square().sum()))


def gradients_of(model: nn.Module, names: Sequence[str], k: int) -> dict[str, Gradient]:
    """The gradients of the named linear layers."""
    found = {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        found[name] = gradient_of(weight, k)
    return found


def by_kind(gradients: Mapping[str, Gradient], r: int) -> dict[str, float]:
    """What a step of rank r captures, summed over all layers whose names have the same last part."""
    sums: dict[str, float] = {}
    for name, gradient in gradients.items():
        kind = name.rpartition(".")[2]
        sums[kind] = sums.get(kind, 0.0) + gradient.captured(r)
    return sums


@styled
def draw_first_step(
    gains: Mapping[str, float], costs: Mapping[str, int], best: Mapping[int, tuple[Sequence[str], float]], r: int
) -> Figure:
    """Left: the share of the gradient that each kind of matrix holds, against what its adapters cost at rank r. Right:
    for each rank the best set under the budget, and what it captures."""
    figure = new_figure(9.5, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    shift = {"k_proj": (6, -12), "q_proj": (8, -9), "o_proj": (6, 8)}
    for kind, colour, marker in zip(gains, (*COLOURS, GREY), MARKERS, strict=True):
        left.plot(costs[kind], gains[kind], color=colour, marker=marker, markersize=9, linestyle="none")
        left.annotate(
            kind, (costs[kind], gains[kind]), shift.get(kind, (7, 2)), textcoords="offset points", color=colour
        )
    left.set(xlim=(0, 1.35 * max(costs.values())), ylim=(0, 1.2 * max(gains.values())))
    left.set(xlabel=f"parameters of its adapters at r = {r}", ylabel="share of the squared gradient")
    left.xaxis.set_major_formatter(lambda value, _: human_count(value))
    left.yaxis.set_major_formatter(_percent)
    left.grid(True)
    for line, (rank, (kinds, share)) in enumerate(best.items()):
        right.barh(line, share, color=COLOURS[0], height=0.5)
        names = " ".join(kind.removesuffix("_proj") for kind in kinds)
        right.text(0.01, line - 0.42, f"r = {rank}: {names}", fontsize=9, va="center")
        right.text(share, line, f" {100 * share:.0f} %", va="center", fontweight="bold")
    right.set(xlim=(0, 1.15), ylim=(len(best) - 0.5, -0.8), xlabel="share captured under the budget")
    right.set_yticks([])
    right.xaxis.set_major_formatter(_percent)
    return figure


def _percent(value: float, _: object) -> str:
    return f"{100 * value:.0f} %"
