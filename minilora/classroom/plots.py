"""The lessons' figures: each one function, numbers in, Figure out. The numbers come from functions with tests.

A figure is readable on a light and on a dark page: transparent, its text in a grey with the same contrast on both
(about 4.3 : 1), its colours Okabe and Ito's, which colour-blind readers tell apart, and never alone: always with a
marker, a hatch or a label. Rendering repeats to the byte: Agg, a fixed font, no date and no version inside.
"""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np

try:
    import matplotlib as mpl
    from cycler import cycler
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError("figures need the course's packages: pip install 'minilora[course]'") from error

from minilora.classroom.costs import BypassCost, human_bytes, human_count

DPI = 144

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, RED, PINK = "#0072B2", "#D55E00", "#CC79A7"  # Okabe & Ito call RED vermillion
GREY = "#7A7A7A"  # text and frames: 4.3 : 1 on white and on #111111
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY)

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 11,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "xtick.color": GREY,
    "ytick.color": GREY,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "hatch.color": GREY,
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(plot: Callable[P, R]) -> Callable[P, R]:
    """Run a plot under the course's style and leave matplotlib's settings as they were. Every plot wears it."""

    @functools.wraps(plot)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(STYLE)
            return plot(*args, **kwargs)

    return run


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches (a page holds 9), outside pyplot: nothing else shows or closes it."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@styled
def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes each time."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


@styled
def filmstrip(frames: Sequence[Figure], labels: Sequence[str]) -> Figure:
    """Several figures as the frames of one, two to a row, each under its label."""
    rows = -(-len(frames) // 2)
    width = 10.0
    first = frames[0].get_size_inches()
    figure = new_figure(width, rows * (width / 2 * first[1] / first[0] + 0.45))
    for axes, frame, label in zip(figure.subplots(rows, 2, squeeze=False).flat, frames, labels, strict=False):
        axes.imshow(_pixels(frame), interpolation="lanczos")
        axes.set_title(label, fontweight="bold")
    for axes in figure.axes:
        axes.set_axis_off()
    figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr,call-arg]
    return figure


def _pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


# ------------------------------------------------------------------------------------------------- lesson 03


@styled
def highway(cost: BypassCost) -> Figure:
    """The frozen highway and the bypass, drawn to scale, beside what each bracketing of the bypass costs."""
    figure = new_figure(9.5, 3.9)
    parts = figure.subplot_mosaic([["road", "bars"], ["road", "bytes"]], width_ratios=[1.55, 1], height_ratios=[3, 2])
    road, bars, bytes_ = parts["road"], parts["bars"], parts["bytes"]
    _draw_road(road, cost)
    labels = ["x Wᵀ  (highway)", "(x Aᵀ) Bᵀ", "x (B A)ᵀ"]
    counts = [cost.highway, cost.through_bottleneck, cost.formed_first]
    _log_bars(bars, labels, counts, [GREY, GREEN, RED], [human_count(n) for n in counts], limits=(100, 1e13))
    bars.set_title("multiplications", loc="left")
    scratch = [cost.scratch_bytes(formed=False), cost.scratch_bytes(formed=True)]
    _log_bars(bytes_, ["x Aᵀ", "B A"], scratch, [GREEN, RED], [human_bytes(n) for n in scratch], limits=(0.5, 1e10))
    bytes_.set_title("bytes in between (float32)", loc="left")
    return figure


def _draw_road(axes: Axes, cost: BypassCost) -> None:
    """Wᵀ as a square above; below it Aᵀ, tall and thin, and Bᵀ, flat and wide, in the same scale."""
    side = max(cost.in_features, cost.out_features)
    tall, wide = cost.in_features / side, cost.out_features / side
    thin = max(cost.r / side, 0.02)  # a hair stays visible
    end = 0.8 + thin  # where Aᵀ ends
    axes.add_patch(Rectangle((1.2, 1.45), wide, tall, facecolor=GREY, alpha=0.4, hatch="//", edgecolor=GREY))
    axes.text(1.2 + wide / 2, 1.5 + tall, f"Wᵀ  {cost.in_features:,} × {cost.out_features:,}, frozen", ha="center")
    axes.add_patch(Rectangle((0.8, 0), thin, tall, facecolor=ORANGE))
    axes.text(0.8 + thin / 2, -0.06, f"Aᵀ  {cost.in_features:,} × {cost.r:,}", ha="center", va="top", color=ORANGE)
    axes.add_patch(Rectangle((end + 0.62, 0.5 - thin / 2), wide, thin, facecolor=BLUE))
    below = 0.44 - thin / 2
    middle = end + 0.62 + wide / 2
    axes.text(middle, below, f"Bᵀ  {cost.r:,} × {cost.out_features:,}", ha="center", va="top", color=BLUE)
    axes.text(end + 0.31, 0.56, f"u\n{cost.rows:,} × {cost.r:,}", ha="center", va="bottom", fontsize=8)
    h_at = end + 1.05 + wide
    for name, at, columns in (("x", 0.05, cost.in_features), ("h", h_at, cost.out_features)):
        axes.text(at, 1.2, f"{name}\n{cost.rows:,} × {columns:,}", ha="center", va="center", fontweight="bold")
    arrows = {
        (0.2, 1.4): (1.16, 1.45 + tall / 2),
        (1.24 + wide, 1.45 + tall / 2): (h_at - 0.15, 1.4),
        (0.2, 1.0): (0.77, 0.5),
        (end + 0.03, 0.5): (end + 0.59, 0.5),
        (end + 0.623 + wide, 0.5): (h_at - 0.15, 1.0),
    }
    for start, stop in arrows.items():
        axes.annotate("", stop, start, arrowprops={"arrowstyle": "-|>", "color": GREY, "lw": 1.3})
    axes.text(h_at - 0.1, 0.62, "· alpha / r", ha="left", fontsize=8)
    axes.set(xlim=(-0.3, 3.7), ylim=(-0.25, 2.7), aspect="equal")
    axes.set_axis_off()


def _log_bars(
    axes: Axes, labels: list[str], values: Sequence[float], colours: list[str], texts: list[str], limits: tuple
) -> None:
    """Horizontal bars on a log axis, each with its value written beside it."""
    places = range(len(labels))
    axes.barh(places, values, color=colours, height=0.6)
    for place, value, text in zip(places, values, texts, strict=True):
        axes.text(value, place, f" {text}", va="center", fontweight="bold")
    axes.set_xscale("log")
    axes.set_xlim(limits)  # fixed: a bar that grows between two frames has grown
    axes.set_yticks(places, labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", which="both", length=0, labelbottom=False)


@styled
def first_step(rows: dict[str, dict[str, float]]) -> Figure:
    """For each initialisation (a row) which norm is exactly 0 before the first step: a table to be seen at a glance."""
    columns = list(next(iter(rows.values())))
    figure = new_figure(9, 0.62 * len(rows) + 0.7)
    axes = figure.subplots()
    for down, (_, norms) in enumerate(rows.items()):
        for across, column in enumerate(columns):
            is_zero = norms[column] == 0
            axes.add_patch(Rectangle((across - 0.46, down - 0.4), 0.92, 0.8, facecolor=ORANGE if is_zero else SKY))
            text = "exactly 0" if is_zero else f"{norms[column]:.2g}"
            axes.text(across, down, text, ha="center", va="center", fontweight="bold", color="black")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.xaxis.tick_top()
    axes.set(xlim=(-0.55, len(columns) - 0.45), ylim=(len(rows) - 0.5, -0.5))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


@styled
def recovery(errors: dict[int, Sequence[float]], floors: dict[int, float], every: int) -> Figure:
    """The relative error of the update against the step, a line for each rank; dashed, the best that rank can reach."""
    figure = new_figure(9, 4)
    axes = figure.subplots()
    for (r, curve), colour, marker in zip(errors.items(), COLOURS, MARKERS, strict=False):
        steps = np.arange(len(curve)) * every
        axes.plot(steps, curve, color=colour, marker=marker, markevery=max(len(curve) // 8, 1), label=f"r = {r}")
        if floors[r] > 0:
            axes.axhline(floors[r], color=colour, linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylim(1e-7, 2)
    axes.set(xlabel="steps of SGD", ylabel="‖ΔW − planted‖ / ‖planted‖")
    axes.grid(axis="y")
    axes.legend(loc="center right", title="dashed: the best this rank can do")
    return figure


@styled
def symptoms(healthy: Sequence[float], cases: dict[str, Sequence[float]], every: int) -> Figure:
    """One panel for each case: its loss curve over the healthy one, both against the step."""
    figure = new_figure(9, 2.7)
    panels = figure.subplots(1, len(cases), sharey=True)
    for axes, (name, curve), colour in zip(panels, cases.items(), COLOURS, strict=False):
        steps = np.arange(len(healthy)) * every
        axes.plot(steps, healthy, color=GREY, linewidth=4, alpha=0.45, label="healthy")
        axes.plot(steps[: len(curve)], curve, color=colour, linestyle="--", linewidth=1.8, label="sick")
        axes.set_title(f"Patient {name}")
        axes.set_yscale("log")
        axes.set_ylim(1e-7, 1e5)
        axes.set_xlabel("steps")
        axes.grid(axis="y")
    panels[0].set_ylabel("loss")
    panels[0].legend(loc="lower left")
    return figure
