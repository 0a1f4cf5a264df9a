"""Figures in a notebook, without a notebook: what is displayed, and what is refused."""

import base64
from typing import Any

import pytest
from ipywidgets import Checkbox, FloatSlider, IntSlider, SelectionSlider
from matplotlib.figure import Figure

from minilora.classroom import explorer as module
from minilora.classroom.explorer import Explorer, explorer, show
from minilora.classroom.plots import new_figure, styled

ALT = "A line that rises with the value of the slider."


@styled
def draw(r: int, on: bool = True) -> Figure:
    figure = new_figure(4, 2)
    figure.subplots().plot([0, r if on else 0], marker="o")
    return figure


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Everything that is displayed or updated, in order."""
    displayed: list[dict[str, Any]] = []

    def record(data: Any, **options: Any) -> None:
        displayed.append({"data": data, **options})

    class Handle:
        def display(self, data: Any, **options: Any) -> None:
            record(data, **options)

        def update(self, data: Any, **options: Any) -> None:
            record(data, is_update=True, **options)

    monkeypatch.setattr(module, "display", record)
    monkeypatch.setattr(module, "DisplayHandle", Handle)
    return displayed


def pictures(shown: list[dict[str, Any]]) -> list[str]:
    return [
        each["data"]["image/png"] for each in shown if isinstance(each["data"], dict) and "image/png" in each["data"]
    ]


def test_a_figure_is_a_png_with_its_words_under_it(shown: list):
    show(draw(3), alt=ALT, finding="It rises.")

    image, words = shown
    assert base64.b64decode(image["data"]["image/png"]).startswith(b"\x89PNG")
    assert image["metadata"]["image/png"] == {"width": 4 * 96, "height": 2 * 96, "alt": ALT}
    assert "**It rises.**" in words["data"]["text/markdown"] and ALT in words["data"]["text/markdown"]


@pytest.mark.parametrize("alt", ["", "A figure", "plot of r"])
def test_a_figure_without_a_description_is_refused(alt: str, shown: list):
    with pytest.raises(ValueError, match="describe the figure for someone who cannot see it"):
        show(draw(3), alt=alt, finding="It rises.")


@pytest.mark.parametrize("finding", ["", "two\nlines", "x" * 201])
def test_a_finding_is_one_line(finding: str, shown: list):
    with pytest.raises(ValueError, match="finding is one line"):
        show(draw(3), alt=ALT, finding=finding)


def test_moving_a_control_updates_the_picture_and_its_words(shown: list):
    moved = explorer(draw, alt=ALT, finding=lambda r: f"r is {r}", r=[1, 4])
    moved.controls["r"].value = 4

    first, second = pictures(shown)
    assert first != second
    assert "r is 4" in shown[-1]["data"]["text/markdown"] and shown[-1]["is_update"]


def test_the_first_frame_is_drawn_at_the_start_values(shown: list):
    begun = explorer(draw, alt=ALT, finding="It rises.", start={"r": 4}, r=[1, 4], on=False)

    assert begun.values == {"r": 4, "on": False}


def test_a_broken_drawing_is_not_swallowed(shown: list):
    def fragile(r: int) -> Figure:
        if r == 4:
            raise ValueError("broken at 4")
        return draw(r)

    moved = explorer(fragile, alt=ALT, finding="It rises.", r=[1, 4])
    with pytest.raises(ValueError, match="broken at 4"):
        moved.controls["r"].value = 4


def test_a_strip_draws_one_frame_for_each_value_and_moves_nothing(shown: list):
    still = explorer(draw, alt=ALT, finding="It rises.", start={"r": 4}, r=[1, 4, 16], on=True)
    still.strip(r=[1, 4, 16])

    assert still.values == {"r": 4, "on": True}
    assert "The same picture at r = 1, r = 4, r = 16." in shown[-1]["data"]["text/markdown"]


def test_a_strip_runs_over_one_existing_control(shown: list):
    still = explorer(draw, alt=ALT, finding="It rises.", r=[1, 4], on=True)
    for wrong in ({}, {"q": [1]}, {"r": [1], "on": [True]}):
        with pytest.raises(ValueError, match=r"runs over one control.*name one of \['on', 'r'\]"):
            still.strip(**wrong)


@pytest.mark.parametrize(
    ("spec", "widget", "value"),
    [
        ([1, 4, 16], SelectionSlider, 1),
        ((2, 9), IntSlider, 2),
        ((2, 10, 4), IntSlider, 2),
        ((0.0, 1.0), FloatSlider, 0.0),
        (True, Checkbox, True),
    ],
)
def test_each_kind_of_control(spec: Any, widget: type, value: Any, shown: list):
    control = explorer(lambda r: draw(int(r)), alt=ALT, finding="It rises.", r=spec).controls["r"]

    assert isinstance(control, widget) and control.value == value


@pytest.mark.parametrize("spec", [[], (1,), "r", {1, 2}])
def test_a_control_of_no_kind_is_refused_with_the_kinds(spec: Any, shown: list):
    with pytest.raises(ValueError, match="give a list of values"):
        explorer(draw, alt=ALT, finding="It rises.", r=spec)


def test_an_explorer_needs_a_control_and_knows_their_names(shown: list):
    with pytest.raises(ValueError, match="use show"):
        explorer(draw, alt=ALT, finding="It rises.")
    with pytest.raises(ValueError, match=r"cannot start at \['q'\]: the controls are \['r'\]"):
        explorer(draw, alt=ALT, finding="It rises.", start={"q": 1}, r=[1, 4])


def test_an_explorer_as_the_last_line_of_a_cell_is_not_shown_twice(shown: list):
    made = explorer(draw, alt=ALT, finding="It rises.", r=[1, 4])
    before = len(shown)
    Explorer._ipython_display_(made)

    assert len(shown) == before
