"""Lesson 01's picture: what a training step takes, part by part, beside the memory of a card.

    n                      parameters
    bytes per parameter    weights + gradients + moments + master copy, of those that train; weights alone of the others

The numbers of real models are those of `minilora size`: llm/training_memory.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from minilora.classroom.plots import BLUE, GREEN, GREY, ORANGE, PINK, RED, SKY, new_figure, styled
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import Setup
from minilora.llm.training_memory import training_bytes

GB = 10**9  # what makers print on a card and articles write; a GiB is 2³⁰, 7.4 % more
PARTS = ("weights", "adapter", "gradients", "optimizer", "master", "activations")
LOOK = dict(
    zip(PARTS, ((BLUE, ""), (PINK, "xx"), (RED, "//"), (ORANGE, "\\\\"), (GREEN, ".."), (SKY, "--")), strict=True)
)
METHODS = ("full", "lora", "qlora")

# ------------------------------------------------------------------------------------------------------------- numbers


def static_bytes(n: int, *, weight: int, gradient: int, moment: int, master: int) -> int:
    """Bytes that training all of n parameters with Adam holds from the first step to the last.

        n · (weight + gradient + 2 · moment + master)           bytes of one number of each; master 0: no such copy

    >>> static_bytes(7 * 10**9, weight=4, gradient=4, moment=4, master=0) / GB
    112.0
    """
    return n * (weight + gradient + 2 * moment + master)


def largest_trainable(card_gb: float, bytes_per_param: float, reserve: float = 0.1) -> int:
    """The most parameters whose bytes fit into a card of so many GB, a share of which is kept for everything else.

        the largest whole n with  n · bytes_per_param ≤ (1 − reserve) · card_gb · 10⁹

    >>> largest_trainable(80, 16)
    4500000000
    """
    return math.floor((1 - reserve) * card_gb * GB / bytes_per_param)


def bill(model: str, setup: Setup) -> dict[str, float]:
    """GB of each part of a training step of a real model; logits count as activations."""
    found = training_bytes(ARCHITECTURES[model], setup)
    parts = {part: getattr(found, part) / GB for part in PARTS}
    parts["activations"] += found.logits / GB
    return parts


def bills(model: str, setup: Setup, methods: Sequence[str] = METHODS) -> dict[str, dict[str, float]]:
    """The bill of each method, everything else alike."""
    return {method: bill(model, replace(setup, method=method)) for method in methods}


# -------------------------------------------------------------------------------------------------------------- figures


@styled
def stacked(found: Mapping[str, Mapping[str, float]], card_gb: float) -> Figure:
    """A bar for each method, its parts on each other (one part alone is not named), and the card as a line across."""
    figure = new_figure(8.6, 3.3)
    axes = figure.subplots()
    at = dict.fromkeys(found, 0.0)
    parts = [part for part in LOOK if any(bar[part] > 0 for bar in found.values())]
    for part in parts:
        (colour, hatch), values = LOOK[part], [bar[part] for bar in found.values()]
        label = part if len(parts) > 1 else None
        axes.barh(list(found), values, left=list(at.values()), color=colour, hatch=hatch, label=label, alpha=0.8)
        at = {method: at[method] + bar[part] for method, bar in found.items()}
    axes.set_yticks(range(len(at)), [f"{method}\n{total:,.1f} GB" for method, total in at.items()])
    axes.axvline(card_gb, color=GREY, linestyle="--", linewidth=2, label=f"a card of {card_gb:g} GB")
    axes.set_xlim(0, 1.05 * max(card_gb, *at.values()))
    axes.set_xlabel("GB")
    axes.invert_yaxis()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return figure


@styled
def by_length(lengths: Sequence[int], lines: Mapping[str, Sequence[float]], card_gb: float) -> Figure:
    """GB against the tokens of a batch, a line for each way, and the card as a line across."""
    figure = new_figure(7.6, 3.4)
    axes = figure.subplots()
    for (name, values), colour, marker in zip(lines.items(), (RED, BLUE, GREEN, ORANGE), "osD^", strict=False):
        axes.plot(lengths, values, color=colour, marker=marker, label=name)
    axes.axhline(card_gb, color=GREY, linestyle="--", label=f"a card of {card_gb:g} GB")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens in a batch")
    axes.set_ylabel("GB")
    axes.grid(axis="y")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure
