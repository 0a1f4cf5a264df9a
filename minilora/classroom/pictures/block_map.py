"""Lesson 05's picture: the seven matrices of a decoder layer to scale, with adapters on those that are chosen.

matrix     a rectangle, as high as its inputs and as wide as its outputs
A, B       an orange strip at its left, in × r, and one below it, r × out, in the same scale
"""

from collections.abc import Collection
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minilora.classroom.costs import human_count
from minilora.classroom.plots import GREY, ORANGE, new_figure, styled
from minilora.llm.architectures import Architecture, Linear, layer_linears
from minilora.llm.sizes import base_params

LETTERS = ("q", "k", "v", "o", "gate", "up", "down")  # as people say them: q for self_attn.q_proj


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One of the seven, for all layers together."""

    letter: str
    linear: Linear
    copies: int
    r: int
    is_adapted: bool

    @property
    def adapter_params(self) -> int:
        """What A and B have, or would have: r · (in + out) in every layer."""
        return self.copies * self.linear.lora_params(self.r)


@dataclass(frozen=True)
class BlockMap:
    """A layer's matrices, and the sums over the whole model."""

    matrices: tuple[Matrix, ...]
    base: int  # parameters of the model without adapters

    @property
    def trained(self) -> int:
        """Parameters of all A and B."""
        return sum(matrix.adapter_params for matrix in self.matrices if matrix.is_adapted)

    @property
    def total(self) -> int:
        """Parameters of model and adapters, as `count_parameters` and PEFT count them."""
        return self.base + self.trained


def block_map(arch: Architecture, letters: Collection[str], r: int) -> BlockMap:
    """Say which matrices of a Llama get an adapter of rank r, and what that adds up to.

    Raises:
        ValueError: for a letter that is none of LETTERS, or another family than Llama's.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> block_map(ARCHITECTURES["llama-2-7b"], {"q", "v"}, r=16).trained
    8388608
    """
    if unknown := sorted(set(letters) - set(LETTERS)):
        raise ValueError(f"no matrix is called {unknown}; there are {list(LETTERS)}")
    if arch.family != "llama":
        raise ValueError(f"this picture is of Llama's seven matrices; {arch.family} has others")
    matrices = (
        Matrix(letter=letter, linear=linear, copies=arch.n_layers, r=r, is_adapted=letter in letters)
        for letter, linear in zip(LETTERS, layer_linears(arch), strict=True)
    )
    return BlockMap(tuple(matrices), base_params(arch))


@styled
def draw_block(name: str, block: BlockMap) -> Figure:
    """The layer to scale, beside it what each adapter has, or would have, in all layers; below it the sums."""
    figure = new_figure(9.5, 4.7)
    shapes, bars = figure.subplots(1, 2, width_ratios=[1.75, 1])
    _draw_matrices(shapes, block)
    shapes.set_title(f"{name}: one of {block.matrices[0].copies} layers, to scale", loc="left")
    _draw_bars(bars, block)
    share = f"{100 * block.trained / block.total:.2g} %"
    figure.supxlabel(
        f"{block.trained:,} of {block.total:,} parameters train ({share})", fontsize=11, color=GREY, fontweight="bold"
    )
    return figure


def _draw_matrices(axes: Axes, block: BlockMap) -> None:
    """Attention above, the feed-forward part below, on a scale on which the hidden size is 1."""
    hidden = block.matrices[0].linear.in_features
    wide = block.matrices[4].linear.out_features / hidden  # of gate and up; the height of down
    right = max(5.15, wide + 1.15)
    places: dict[str, tuple[float, float]] = {"q": (0, 0), "k": (1.45, 0), "v": (2.9, 0), "o": (right, 0)}
    places |= {"gate": (0, 2), "up": (0, 3.95), "down": (right, 2)}
    for matrix in block.matrices:
        _draw_matrix(axes, matrix, *places[matrix.letter], hidden)
    arrow = {"arrowstyle": "->", "color": GREY}
    axes.annotate("", (right - 0.33, 0.5), (4.0, 0.5), arrowprops=arrow)
    axes.annotate("", (right - 0.33, 3.6), (wide + 0.12, 3.6), arrowprops=arrow)
    axes.text((right + 3.67) / 2, 0.4, "softmax", fontsize=8, ha="center")
    axes.text((right + wide - 0.21) / 2, 3.5, "silu · up", fontsize=8, ha="center")
    axes.set(xlim=(-0.3, right + 1.3), ylim=(2 + max(wide, 2.95) + 0.3, -0.62), aspect="equal")
    axes.set_axis_off()


def _draw_matrix(axes: Axes, matrix: Matrix, left: float, top: float, hidden: int) -> None:
    height, width = matrix.linear.in_features / hidden, matrix.linear.out_features / hidden
    axes.add_patch(Rectangle((left, top), width, height, facecolor=GREY, alpha=0.35, hatch="//", edgecolor=GREY))
    size = f"{matrix.linear.in_features:,} × {matrix.linear.out_features:,}"
    weight = "bold" if matrix.is_adapted else "normal"
    axes.text(left, top - 0.33, matrix.letter, fontweight=weight, va="bottom")
    axes.text(left, top - 0.08, size, fontsize=8, va="bottom")
    if matrix.is_adapted:
        thick = max(matrix.r / hidden, 0.035)  # a hair stays visible
        axes.add_patch(Rectangle((left - 0.05 - thick, top), thick, height, color=ORANGE, linewidth=0))
        axes.add_patch(Rectangle((left, top + height + 0.05), width, thick, color=ORANGE, linewidth=0))


def _draw_bars(axes: Axes, block: BlockMap) -> None:
    """Filled: what trains. Outlined: what would, if it were chosen."""
    longest = max(matrix.adapter_params for matrix in block.matrices)
    for line, matrix in enumerate(block.matrices):
        if matrix.is_adapted:
            axes.barh(line, matrix.adapter_params, color=ORANGE, height=0.62)
        else:
            axes.barh(line, matrix.adapter_params, color="none", edgecolor=GREY, linestyle="--", height=0.62)
        text = f" {human_count(matrix.adapter_params)}"
        weight = "bold" if matrix.is_adapted else "normal"
        axes.text(matrix.adapter_params, line, text, va="center", fontweight=weight)
    axes.set_yticks(range(len(block.matrices)), [matrix.letter for matrix in block.matrices])
    axes.set(xlim=(0, 1.4 * longest), ylim=(len(block.matrices) - 0.4, -0.6))
    axes.set_title(f"A and B in all layers, r = {block.matrices[0].r}", loc="left")
    axes.tick_params(axis="both", length=0, labelbottom=False)
    axes.spines["bottom"].set_visible(False)
