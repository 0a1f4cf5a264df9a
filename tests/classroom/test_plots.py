"""What every figure promises: the same bytes each time, readable on white and on black, no side effects."""

import inspect
import io
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from minilora.classroom import plots
from minilora.classroom.costs import BypassCost
from minilora.classroom.parameter_tree import parameter_tree
from minilora.llm.architectures import ARCHITECTURES

FIGURES: dict[str, Callable[[], Figure]] = {
    "highway": lambda: plots.highway(BypassCost(rows=256, in_features=4096, out_features=1024, r=16)),
    "first_step": lambda: plots.first_step({"A random, B = 0": {"‖dA‖": 0.0, "‖dB‖": 1.5}}),
    "recovery": lambda: plots.recovery({2: [1, 0.3, 0.27], 3: [1, 0.1, 1e-3]}, {2: 0.267, 3: 0.0}, every=10),
    "symptoms": lambda: plots.symptoms([4, 1, 0.1], {"1": [4, 1e6], "2": [4, 1, 0.1]}, every=5),
    "parameter_tree": lambda: plots.parameter_tree(
        parameter_tree(ARCHITECTURES["smollm2-135m"], r=8, targets="all-linear", optimizer="adamw", freezes_rest=False)
    ),
    "spectra": lambda: plots.spectra([3, 2, 1], {"q": [3, 2, 1, 0.1, 1e-8], "v": [3, 1, 0, 0, 0]}, r=4, floor=1e-6),
    "starts": lambda: plots.starts({"(r, in)": [-0.1, 0.1], "(in, r)": [-1, 0, 1]}, {"1/√in": 0.1, "1/√r": 1.0}),
    "patients": lambda: plots.patients([4, 1, 0.1], {"1": [4, 4, 4], "2": [4, 1, 0.01]}, floor=0.1),
}


def luminance(colour: str) -> float:
    """WCAG's relative luminance, 0 (black) to 1 (white)."""
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_plot_wears_the_course_s_style():
    drawing = {
        name: function
        for name, function in inspect.getmembers(plots, inspect.isfunction)
        if function.__module__ == plots.__name__ and inspect.signature(function).return_annotation is Figure
    }

    assert {name for name, function in drawing.items() if not hasattr(function, "__wrapped__")} == {"new_figure"}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_the_same_bytes_each_time(draw: Callable[[], Figure]):
    assert plots.png(draw()) == plots.png(draw())


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_transparent_and_small(draw: Callable[[], Figure]):
    picture = plots.png(draw())
    image = Image.open(io.BytesIO(picture))

    assert image.mode == "RGBA" and image.getpixel((0, 0))[3] == 0
    assert len(picture) < 150_000
    assert image.width <= 10 * plots.DPI


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_drawing_leaves_matplotlib_s_settings_as_they_were(draw: Callable[[], Figure]):
    before = dict(mpl.rcParams)
    plots.png(draw())

    assert dict(mpl.rcParams) == before


def test_the_reader_s_own_settings_do_not_change_a_figure():
    usual = plots.png(FIGURES["recovery"]())
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "lines.linewidth": 9}):
        assert plots.png(FIGURES["recovery"]()) == usual


@pytest.mark.parametrize("page", ["#FFFFFF", "#111111"])
def test_text_can_be_read_on_a_light_and_on_a_dark_page(page: str):
    assert contrast(plots.GREY, page) > 4.0  # WCAG asks 3 for large text, 4.5 for small: no grey has 4.5 on both


@pytest.mark.parametrize("page", ["#FFFFFF", "#111111"])
@pytest.mark.parametrize("colour", plots.COLOURS)
def test_every_line_colour_stands_out_on_both_pages(colour: str, page: str):
    assert contrast(colour, page) > 2.0


def test_there_is_a_marker_for_every_colour():
    assert len(plots.MARKERS) >= len(plots.COLOURS)


def test_a_strip_shows_every_frame():
    first, second = (plots.filmstrip([FIGURES["first_step"]() for _ in "abc"], ["a", "b", "c"]) for _ in range(2))

    assert [text.get_text() for text in first.texts] == ["a", "b", "c"]
    alone = plots._pixels(FIGURES["first_step"]())
    assert all(np.array_equal(image.get_array(), alone) for image in first.images)
    assert len({image.oy for image in first.images}) == 3, "one below the other"
    assert plots.png(first) == plots.png(second)
