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
from minilora.classroom.parameter_tree import Tree

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
    """Several figures as the frames of one, from top to bottom and as large as alone, each under its label."""
    width, height = frames[0].get_size_inches()
    row = height + 0.55  # room for its label
    figure = new_figure(width, len(frames) * row)
    for above, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        bottom = (len(frames) - 1 - above) * row
        figure.figimage(_pixels(frame), yo=round(bottom * DPI), origin="upper")  # pixel by pixel: the file stays small
        top = 1 - (above + 0.25 / row) / len(frames)
        figure.text(0.5, top, label, ha="center", va="top", fontsize=14, fontweight="bold")
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
    bars.set_title("multiplications (log scale)", loc="left")
    scratch = [cost.scratch_bytes(formed=False), cost.scratch_bytes(formed=True)]
    _log_bars(bytes_, ["x Aᵀ", "B A"], scratch, [GREEN, RED], [human_bytes(n) for n in scratch], limits=(0.5, 1e10))
    bytes_.set_title("float32 bytes between (log scale)", loc="left")
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


# ------------------------------------------------------------------------------------------------- lesson 09

FORMAT_LOOK = {"float32": (GREEN, "o"), "bfloat16": (BLUE, "s"), "NF4": (RED, "^")}
Points = Sequence[tuple[float, float]]  # (ratio, error)


@styled
def merge_error(
    ratios: Sequence[float],
    errors: dict[str, Sequence[float]],
    shown: str,
    at: float,
    sample: tuple[np.ndarray, np.ndarray],
) -> Figure:
    """The error of a merge against the adapter's size, and beside it, for one format and size, what became of weights.

    `sample` holds what was meant for some weights and what arrived, in units of the typical ΔW.
    """
    figure = new_figure(9.5, 4.1)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    _error_lines(left, ratios, errors)
    left.axvline(at, color=GREY, linewidth=1, linestyle=":")
    error = errors[shown][list(ratios).index(at)]
    left.plot(at, error, marker="o", markersize=17, fillstyle="none", color=FORMAT_LOOK[shown][0], markeredgewidth=2)
    left.text(at, 7, f"{100 * at:.3g} % of W", ha="left" if at < 0.1 else "right", fontweight="bold")
    colour, marker = FORMAT_LOOK[shown]
    _arrival(right, *sample, colour=colour, marker=marker, limit=3.5)
    right.set(xlabel="ΔW as it was meant (typical = 1)", ylabel="what arrived")
    right.text(-3.3, 3, f"single weights, {shown}", color=colour, fontweight="bold")
    return figure


def _error_lines(axes: Axes, ratios: Sequence[float], errors: dict[str, Sequence[float]]) -> None:
    """One line for each format, with its name, and the line above which nothing of the adapter is left."""
    for (name, line), height in zip(errors.items(), (1e-6, 0.03, 2), strict=True):
        colour, marker = FORMAT_LOOK[name]
        axes.plot(ratios, line, color=colour, marker=marker)
        axes.text(ratios[0], height, name, color=colour, fontweight="bold")
    axes.axhline(1, color=GREY, linestyle="--", linewidth=1)
    axes.text(ratios[-1] * 1.3, 1.3, "1: as good as not merged", ha="right", fontsize=8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlim=(7e-5, 1.5), ylim=(2e-9, 30))
    axes.set(xlabel="size of the adapter, ‖ΔW‖ / ‖W‖", ylabel="error of the merge / effect of the adapter")
    axes.grid(True)


def _arrival(
    axes: Axes, meant: np.ndarray, arrived: np.ndarray, *, colour: str, marker: str, limit: float, size: float = 9
) -> None:
    """A dot for each number: what was meant to the right, what arrived upwards; a right merge lies on the diagonal."""
    axes.plot([-limit, limit], [-limit, limit], color=GREY, linestyle="--", linewidth=1)
    axes.scatter(meant, arrived, s=size, color=colour, marker=marker, alpha=0.75, linewidths=0)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")


@styled
def arrivals(panels: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """One panel for each merge: of every output, the adapter's effect as it was meant, and as it arrived."""
    figure = new_figure(9.5, 2.6)
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, (name, (meant, arrived)), colour, marker in zip(row, panels.items(), COLOURS, MARKERS, strict=False):
        _arrival(axes, meant, arrived, colour=colour, marker=marker, limit=3, size=14)
        axes.set_title(name)
    row[0].set_ylabel("effect that arrived")
    figure.supxlabel("effect that was meant (typical = 1)", fontsize=10, color=GREY)
    return figure


@styled
def drifts(curves: dict[str, Sequence[float]]) -> Figure:
    """How far W is from where it was, against the number of merges and unmerges, both on log scales."""
    figure = new_figure(9, 3.6)
    axes = figure.subplots()
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        cycles = np.arange(1, len(curve) + 1)
        axes.loglog(cycles, curve, color=colour, marker=marker, markevery=[0, 1, 3, 9, 29, len(curve) - 1])
        axes.text(cycles[-1] * 1.12, curve[-1], name, color=colour, va="center", fontweight="bold")
    axes.set(xlim=(0.9, 900), xlabel="cycles of merge and unmerge", ylabel="‖W now − W then‖ / ‖W then‖")
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()
    axes.grid(True)
    return figure


@styled
def real_merges(
    ratios: Sequence[float], errors: dict[str, Sequence[float]], layers: dict[str, Points], logits: dict[str, Points]
) -> Figure:
    """The lines of merge_error; on them the layers of a real model, and as stars what its outputs made of it."""
    figure = new_figure(9, 4.1)
    axes = figure.subplots()
    _error_lines(axes, ratios, errors)
    for name in layers:
        colour, marker = FORMAT_LOOK[name]
        for points, shape, size in ((layers[name], marker, 30), (logits[name], "*", 260)):
            sizes, errors_of = np.transpose(points)
            axes.scatter(sizes, errors_of, size, color=colour, marker=shape, alpha=0.7, edgecolors=GREY, zorder=3)
    axes.text(2.2e-4, 3e-8, "small: layers of the real model   ★: its logits", color=GREY)
    return figure


# ------------------------------------------------------------------------------------------------- lesson 04


@styled
def parameter_tree(tree: Tree) -> Figure:
    """Every kind of parameter of a model on a line: what trains, on orange, and what the optimizer keeps for it."""
    figure = new_figure(9.5, 0.32 * len(tree.parts) + 1.4)
    names, bars = figure.subplots(1, 2, width_ratios=[2.1, 1], sharey=True)
    for line, part in enumerate(tree.parts):
        inside = part.copies > 1
        last = inside and (line + 1 == len(tree.parts) or tree.parts[line + 1].copies == 1)
        label = ("└─ " if last else "├─ ") + part.name.split(".*.")[1] if inside else part.name
        names.text(0.01, line, label, family="DejaVu Sans Mono", fontsize=9, va="center")
        size = " × ".join(f"{n:,}" for n in part.shape)
        _tensor(names, 0.69, line, size, part.trains, band=(0.0, 0.73), side="left")
        if part.adapter:
            (r, in_features), (out_features, _) = part.adapter
            factors = f"A {r} × {in_features:,}    B {out_features:,} × {r}"
            _tensor(names, 0.765, line, factors, True, band=(0.745, 1.2), side="right")
    copies = max(part.copies for part in tree.parts)
    names.text(0.01, -1.1, f"all {copies} layers on one line each", va="center", fontsize=11)
    for at, word, trains in ((0.58, "frozen", False), (0.765, "trains", True)):
        _tensor(names, at, -1.1, word, trains, band=None, side="right")
    names.set(xlim=(0, 1.2), ylim=(len(tree.parts) - 0.4, -1.6))
    names.set_axis_off()
    _state_bars(bars, tree)
    facts = [
        f"{human_count(tree.trained)} of {human_count(tree.total)} parameters train ({tree.trained / tree.total:.2%})",
        f"their gradients {human_bytes(tree.gradient_bytes)}",
        f"optimizer state {human_bytes(tree.state_bytes)}",
    ]
    figure.supxlabel("     ·     ".join(facts), fontsize=11, color=GREY, fontweight="bold")
    return figure


def _tensor(
    axes: Axes, at: float, line: float, words: str, trains: bool, band: tuple[float, float] | None, side: str
) -> None:
    """A marker with words on one side of it: orange circle and band for what trains, a grey square for the frozen."""
    shape, colour = ("o", ORANGE) if trains else ("s", GREY)
    axes.plot([at + 0.01], [line], marker=shape, color=colour, markersize=7, linestyle="none", clip_on=False)
    shift = 0.03 if side == "right" else -0.015
    axes.text(at + shift, line, words, fontsize=9, va="center", ha="left" if side == "right" else "right")
    if trains and band:
        left, right = band
        axes.add_patch(Rectangle((left, line - 0.42), right - left, 0.84, color=ORANGE, alpha=0.1, linewidth=0))
        axes.plot([left, left], [line - 0.42, line + 0.42], color=ORANGE, linewidth=2, clip_on=False)


def _state_bars(axes: Axes, tree: Tree) -> None:
    """Bytes of optimizer state beside each line, on a log axis that is the same in every frame."""
    for line, part in enumerate(tree.parts):
        if part.state_bytes:
            axes.barh(line, part.state_bytes, color=ORANGE, height=0.6)
            text = f" {human_bytes(part.state_bytes)}"
            axes.text(part.state_bytes, line, text, va="center", fontsize=9, fontweight="bold")
    axes.set_xscale("log")
    axes.set_xlim(1e3, 3e10)
    axes.text(1.3e3, -1.1, "optimizer state, in bytes (log scale)", va="center", fontsize=11)
    axes.tick_params(axis="both", which="both", length=0, labelbottom=False, labelleft=False)
    axes.spines["bottom"].set_visible(False)


@styled
def spectra(planted: Sequence[float], learned: dict[str, Sequence[float]], r: int, floor: float) -> Figure:
    """Singular values of each learned update beside the planted ones; below `floor` is float32's rounding."""
    figure = new_figure(9, 3.2)
    panels = figure.subplots(1, len(learned), sharey=True)
    for axes, (name, values), colour in zip(panels, learned.items(), COLOURS, strict=False):
        places = np.arange(1, len(values) + 1)
        shown = np.maximum(values, 1e-12)  # an exact 0 has no place on a log axis
        axes.plot(places[: len(planted)], planted, "_", color=GREY, markersize=26, markeredgewidth=3, label="planted")
        axes.plot(places[:r], shown[:r], "o", color=colour, label="learned")
        axes.plot(places[r:], shown[r:], "x", color=GREY, label="rounding")
        axes.axvline(r + 0.5, color=GREY, linestyle=":", linewidth=1.2)
        axes.text(r + 0.6, 3, f"r = {r}", va="center")
        axes.axhspan(1e-12, floor, color=GREY, alpha=0.15, linewidth=0)
        axes.set_yscale("log")
        axes.set(xlabel="number of the singular value", title=name, ylim=(floor / 300, 10))
        axes.set_xticks(places)
        axes.grid(axis="y")
    panels[0].set_ylabel("singular value")
    panels[0].legend(loc="center right")
    return figure


@styled
def starts(samples: dict[str, Sequence[float]], bounds: dict[str, float]) -> Figure:
    """Where the first numbers of A fall, an outline for each way to draw them; dotted, named bounds on both sides."""
    figure = new_figure(9, 2.7)
    axes = figure.subplots()
    limit = 1.15 * max(max(map(abs, values)) for values in samples.values())
    edges = np.linspace(-limit, limit, 121)
    for (name, values), colour, line in zip(samples.items(), COLOURS, ("-", "--", "-."), strict=False):
        heights, _ = np.histogram(values, bins=edges, density=True)
        axes.stairs(heights, edges, color=colour, linestyle=line, linewidth=1.8, label=name)
    top = axes.get_ylim()[1]
    for (name, bound), height in zip(bounds.items(), (0.93, 0.62), strict=False):
        for side in (-bound, bound):
            axes.axvline(side, color=GREY, linestyle=":", linewidth=1)
        axes.text(bound, height * top, f" ±{name}", va="center")
    axes.set(xlabel="an entry of A before the first step", ylabel="density")
    axes.legend(loc="upper left", bbox_to_anchor=(0.12, 1))  # between the bounds
    return figure


@styled
def patients(healthy: Sequence[float], cases: dict[str, Sequence[float]], floor: float) -> Figure:
    """One panel for each case: its loss at every step over the healthy one's; dotted, what the rank must leave over."""
    figure = new_figure(9, 2.9)
    panels = figure.subplots(1, len(cases), sharey=True)
    for axes, (name, curve), colour in zip(panels, cases.items(), COLOURS, strict=False):
        axes.plot(healthy, color=GREY, linewidth=4, alpha=0.45, label="healthy")
        axes.plot(curve, color=colour, linestyle="--", linewidth=1.5, label="sick")
        axes.axhline(floor, color=GREY, linestyle=":", linewidth=1.5, label="planted, cut to rank r")
        axes.set(title=f"Patient {name}", xlabel="steps", yscale="log")
        axes.grid(axis="y")
    panels[0].set_ylabel("loss")
    panels[0].legend(loc="lower left", fontsize=8)
    return figure
