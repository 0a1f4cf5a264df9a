"""Lesson 07's pictures: which tokens of a sample carry loss; a model that learns; trainings with wrong labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minilora.classroom.plots import BLUE, COLOURS, GREEN, GREY, MARKERS, ORANGE, new_figure, styled
from minilora.train.data import IGNORED

Kind = Literal["prompt", "answer", "end", "padding"]

STRIP_COLUMNS = 92  # letters in a line of the strip
ANSWER_COLUMNS = 46  # letters in a line of an answer
LOOK: Mapping[Kind, str] = {"prompt": GREY, "answer": GREEN, "end": ORANGE, "padding": GREY}

# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class Piece:
    """One token of a row: how it reads, what it is, and whether its label carries loss."""

    text: str
    kind: Kind
    carries: bool


def pieces(texts: Sequence[str], labels: Sequence[int], n_prompt: int, n_answer: int) -> list[Piece]:
    """The tokens of a padded row: a prompt, an answer, its end, and padding; what carries loss is what the labels say.

    Raises:
        ValueError: if there is not one label for each token, or the row is too short for its parts.

    >>> [piece.kind for piece in pieces(["a", "b", "<end>", "<end>"], [-100, 7, 2, -100], n_prompt=1, n_answer=1)]
    ['prompt', 'answer', 'end', 'padding']
    """
    n_padding = len(texts) - n_prompt - n_answer - 1
    if len(texts) != len(labels) or n_padding < 0:
        raise ValueError(
            f"{len(texts)} tokens, {len(labels)} labels, {n_prompt} + {n_answer} + 1 tokens before the padding: "
            "give one label for each token of a whole row"
        )
    parts: list[tuple[Kind, int]] = [("prompt", n_prompt), ("answer", n_answer), ("end", 1), ("padding", n_padding)]
    kinds = [kind for kind, count in parts for _ in range(count)]
    carried = [label != IGNORED for label in labels]
    return [Piece(text, kind, does) for text, kind, does in zip(texts, kinds, carried, strict=True)]


def lines_of(row: Sequence[Piece], columns: int = STRIP_COLUMNS) -> list[list[tuple[int, Piece]]]:
    """The pieces in lines of so many letters, each with the column where it begins; a space lies between two.

    >>> [[at for at, _ in line] for line in lines_of([Piece("abc", "prompt", False)] * 3, columns=8)]
    [[0, 4], [0]]
    """
    lines: list[list[tuple[int, Piece]]] = [[]]
    column = 0
    for piece in row:
        if column + len(piece.text) > columns and lines[-1]:
            lines.append([])
            column = 0
        lines[-1].append((column, piece))
        column += len(piece.text) + 1
    return lines


@dataclass(frozen=True)
class Look:
    """How good the model was after some steps: shares from 0 to 1, and one of its answers."""

    step: int
    json: float
    keys: float
    exact: float
    answer: str


# -------------------------------------------------------------------------------------------------------------- figures


@styled
def token_strip(row: Sequence[Piece]) -> Figure:
    """The tokens of a row in boxes: filled if they carry loss, empty if not; the colour says what they are."""
    lines = lines_of(row)
    figure = new_figure(9.2, 0.62 + 0.34 * len(lines))
    axes = figure.subplots()
    for line, placed in enumerate(lines):
        for column, piece in placed:
            _box(axes, column, -line, piece)
    at = 0.0
    for kind in ("prompt", "answer", "end", "padding"):
        _box(axes, at, 1.3, Piece(kind, kind, carries=False))
        at += len(kind) + 2
    axes.text(at + 1, 1.3, "filled: carries loss     empty: carries none", va="center", fontsize=8)
    axes.set_xlim(-0.8, STRIP_COLUMNS + 0.8)
    axes.set_ylim(-len(lines) + 0.4, 1.9)
    axes.set_axis_off()
    return figure


def _box(axes: Axes, column: float, y: float, piece: Piece) -> None:
    colour = LOOK[piece.kind]
    style: dict[str, Any] = {"edgecolor": colour, "linewidth": 1.2}
    style["facecolor"] = colour if piece.carries else "none"
    if piece.kind == "padding":
        style["linestyle"] = ":"
    axes.add_patch(Rectangle((column - 0.32, y - 0.36), len(piece.text) + 0.64, 0.72, **style))
    middle = column + len(piece.text) / 2
    ink = "black" if piece.carries else GREY
    axes.text(
        middle, y, piece.text, color=ink, ha="center", va="center_baseline", family="DejaVu Sans Mono", fontsize=7.6
    )


@styled
def learning(losses: Sequence[float], looks: Sequence[Look], sentence: str, right: str) -> Figure:
    """Left: what is right, and below it the loss, by step; on the right how one sentence is answered meanwhile."""
    figure = new_figure(10, 4.4)
    left, words = figure.subplots(1, 2, width_ratios=(1, 1.25))
    left.set_axis_off()
    shares, loss = left.inset_axes((0, 0.44, 1, 0.56)), left.inset_axes((0, 0, 1, 0.34))
    steps = [look.step for look in looks]
    names = {"json": "valid JSON", "keys": "the four keys", "exact": "right to the letter"}
    for (name, label), colour, marker in zip(names.items(), COLOURS, MARKERS, strict=False):
        values = [100 * getattr(look, name) for look in looks]
        broad = {"linewidth": 6, "markersize": 11} if name == "json" else {}  # so that it is seen beneath the second
        shares.plot(steps, values, color=colour, marker=marker, label=label, clip_on=False, **broad)
    shares.set_ylabel("% of unseen sentences")
    shares.set_ylim(0, 102)
    shares.legend(loc="lower right")
    loss.plot(range(1, len(losses) + 1), losses, color=BLUE)
    loss.set_ylabel("loss, nats")
    loss.set_xlabel("step, of 8 samples each")
    loss.set_ylim(bottom=0)
    for axes in (shares, loss):
        axes.set_xlim(-0.5, len(losses) + 0.5)
        axes.grid(axis="y")
    _answers(words, looks, sentence, right)
    return figure


def _answers(axes: Axes, looks: Sequence[Look], sentence: str, right: str) -> None:
    """The sentence, and below it what was answered after so many steps."""
    axes.set_axis_off()
    told = [("asked", sentence)] + [(f"step {look.step}", look.answer) for look in looks]
    y = 1.0
    for name, text in told:
        lines = wrap(text.replace("\n", " ⏎ "), ANSWER_COLUMNS)[:4] or [""]
        verdict = "  ✓" if text.strip() == right else ""
        axes.text(0.0, y, name + verdict, transform=axes.transAxes, va="top", fontsize=8.5, weight="bold")
        for number, line in enumerate(lines):
            where = (0.2, y - 0.048 * number)
            axes.text(*where, line, transform=axes.transAxes, va="top", family="DejaVu Sans Mono", fontsize=7.8)
        y -= 0.048 * len(lines) + 0.035


@styled
def patients(healthy: Sequence[float], cases: Mapping[str, Sequence[float]], answers: Mapping[str, float]) -> Figure:
    """Left: the losses of trainings with wrong labels beside the healthy one; right: how long their answers are."""
    figure = new_figure(9.5, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.5, 1))
    left.plot(range(1, len(healthy) + 1), healthy, color=GREY, linewidth=4, alpha=0.5, label="healthy")
    for (name, losses), colour, marker in zip(cases.items(), COLOURS, MARKERS, strict=False):
        steps = range(1, len(losses) + 1)
        left.plot(steps, losses, color=colour, marker=marker, markevery=len(losses) // 6, markersize=5, label=name)
    left.set_xlabel("step")
    left.set_ylabel("loss, nats per token that carries loss")
    left.set_yscale("log")
    left.grid(axis="y")
    left.legend()
    colours = [GREY, *COLOURS]
    bars = right.barh(list(answers), list(answers.values()), color=colours[: len(answers)], alpha=0.75)
    right.bar_label(bars, labels=[f"{value:.1f}" for value in answers.values()], padding=3, color=GREY)
    right.invert_yaxis()
    right.set_xlabel("tokens in an answer, on average")
    right.set_xlim(0, 1.15 * max(answers.values()))
    return figure
