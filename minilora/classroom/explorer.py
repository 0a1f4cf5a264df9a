"""Figures in a notebook: `show` for a still one, `explorer` for one with sliders.

The first frame is an ordinary PNG with a display id, so it is there on GitHub, on paper and without a kernel; a slider
calls `handle.update` with the next one. Neither `interact` nor an `Output` widget is used: both hide errors, while here
a broken `draw` shows its traceback. Under every figure stand its finding, in one line, and a description in words.
"""

import base64
import struct
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from minilora.classroom.plots import DPI, filmstrip, png

try:
    from IPython.display import DisplayHandle, display
    from ipywidgets import Checkbox, FloatSlider, HBox, IntSlider, SelectionSlider, Widget
except ImportError as error:
    raise ImportError("figures in notebooks need the course's packages: pip install 'minilora[course]'") from error

CSS_DPI = 96  # a figure's inch on the page; rendered at DPI, so that it stays sharp on dense screens


def show(figure: Figure, *, alt: str, finding: str) -> None:
    """Show a figure with its finding under it, in one line, and its description in words.

    Raises:
        ValueError: if the description or the finding is missing, or the finding is longer than a line.
    """
    image, words = _bundles(figure, alt, finding)
    display(image[0], metadata=image[1], raw=True)
    display(words, raw=True)


def explorer(
    draw: Callable[..., Figure],
    *,
    alt: str | Callable[..., str],
    finding: str | Callable[..., str],
    start: dict[str, Any] | None = None,
    **controls: Any,
) -> "Explorer":
    """Show a figure that sliders redraw.

    Each control is named as `draw`'s parameter: a list is a slider over its values, (low, high) or (low, high, step)
    one over numbers, a truth value a checkbox. `start` holds the values of the first frame (else: the first of each).
    `alt` and `finding` may be functions of the same values.

    Raises:
        ValueError: if there is no control, or `start` names one that does not exist.
    """
    return Explorer(draw, alt, finding, start or {}, controls)


class Explorer:
    """A shown figure, its controls, and the values it stands at."""

    def __init__(self, draw: Callable[..., Figure], alt: Any, finding: Any, start: dict, controls: dict) -> None:
        if not controls:
            raise ValueError("an explorer without controls is a still figure: use show(figure, alt=…, finding=…)")
        unknown = sorted(start.keys() - controls.keys())
        if unknown:
            raise ValueError(f"cannot start at {unknown}: the controls are {sorted(controls)}")
        self.draw, self.alt, self.finding = draw, alt, finding
        self.controls = {name: _control(name, spec, start.get(name)) for name, spec in controls.items()}
        self.picture, self.words = DisplayHandle(), DisplayHandle()
        display(HBox(list(self.controls.values()), layout={"flex_flow": "row wrap"}))
        image, words = self._frame()
        self.picture.display(image[0], metadata=image[1], raw=True)
        self.words.display(words, raw=True)
        for control in self.controls.values():
            control.observe(self._redraw, names="value")

    @property
    def values(self) -> dict[str, Any]:
        """What the controls stand at."""
        return {name: control.value for name, control in self.controls.items()}

    def strip(self, **values: Sequence[Any]) -> None:
        """Show the figure at several values of one control (the others as they stand) for readers without a kernel.

        Raises:
            ValueError: if it is not exactly one control that is named.
        """
        if len(values) != 1 or not values.keys() <= self.controls.keys():
            raise ValueError(
                f"a strip runs over one control, got {sorted(values)}: name one of {sorted(self.controls)}"
            )
        ((name, steps),) = values.items()
        frames = [self.draw(**{**self.values, name: step}) for step in steps]
        labels = [f"{name} = {step:,}" if isinstance(step, int) else f"{name} = {step}" for step in steps]
        first, last = ({**self.values, name: step} for step in (steps[0], steps[-1]))
        alt = f"{labels[0]}: {_text(self.alt, first)} {labels[-1]}: {_text(self.alt, last)}"
        show(filmstrip(frames, labels), alt=alt, finding=f"The same picture at {', '.join(labels)}.")

    def _frame(self) -> tuple[tuple[dict, dict], dict]:
        values = self.values
        return _bundles(self.draw(**values), _text(self.alt, values), _text(self.finding, values))

    def _redraw(self, change: Any) -> None:
        image, words = self._frame()
        self.picture.update(image[0], metadata=image[1], raw=True)
        self.words.update(words, raw=True)

    def _ipython_display_(self) -> None:
        """Nothing: it is shown when it is made."""


def _text(text: str | Callable[..., str], values: dict[str, Any]) -> str:
    return text if isinstance(text, str) else text(**values)


def _control(name: str, spec: Any, start: Any) -> Widget:
    """The widget for one control. A value is sent when a drag ends, not for every pixel on its way."""
    common = {"description": name, "continuous_update": False}
    if isinstance(spec, bool):
        value = spec if start is None else start
        layout = {"width": "auto", "margin": "2px 16px 2px 4px"}  # several fit into a row, each box with its own name
        return Checkbox(value=value, description=name, indent=False, layout=layout)
    if isinstance(spec, list) and spec:
        labels = [(f"{value:,}" if isinstance(value, int) else str(value), value) for value in spec]
        return SelectionSlider(options=labels, value=spec[0] if start is None else start, **common)
    if isinstance(spec, tuple) and len(spec) in (2, 3):
        low, high, *step = spec
        whole = all(isinstance(number, int) for number in spec)
        slider = IntSlider if whole else FloatSlider
        default = 1 if whole else (high - low) / 20
        value = low if start is None else start
        return slider(value=value, min=low, max=high, step=step[0] if step else default, **common)
    raise ValueError(
        f"cannot make a control of {name}={spec!r}: give a list of values, (low, high), (low, high, step) or a bool"
    )


def _bundles(figure: Figure, alt: str, finding: str) -> tuple[tuple[dict, dict], dict]:
    """The PNG with its metadata, and the words under it."""
    if len(alt.split()) < 5:
        raise ValueError(f"describe the figure for someone who cannot see it, in a sentence or more; got alt={alt!r}")
    if not finding.strip() or "\n" in finding or len(finding) > 200:
        raise ValueError(f"a figure's finding is one line of at most 200 characters, got {finding!r}")
    picture = png(figure)
    width, height = (size * CSS_DPI // DPI for size in struct.unpack(">II", picture[16:24]))
    image = {"image/png": base64.b64encode(picture).decode("ascii"), "text/plain": alt}
    words = f"**{finding}**\n\n<details><summary>The figure in words</summary>\n\n{alt}\n\n</details>"
    return (image, {"image/png": {"width": width, "height": height, "alt": alt}}), {
        "text/markdown": words,
        "text/plain": finding,
    }
