"""The lessons as a map: which one needs which, and how long each takes, as their own first cells say."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from minilora.classroom.plots import BLUE, GREY, new_figure, styled


@dataclass(frozen=True, kw_only=True)
class Stop:
    """One lesson on the map."""

    number: str
    title: str
    minutes: int  # to read and to do the exercises
    needs: tuple[str, ...]


def read_card(source: str) -> Stop:
    """A lesson's number, title, minutes and needs, from the first cell of its source.

    >>> read_card("# # 03 · LoRA: by hand\\n# * **You need** 01 and 02.\\n# * **Minutes**: read 20 · exercises 9")
    Stop(number='03', title='LoRA', minutes=29, needs=('01', '02'))
    """
    card = re.sub(r"\n#\s+", " ", source.partition("\n# %% [markdown] tags=")[0])
    heading = re.search(r"^# # (\d\d) · ([^:\n]+)", source, flags=re.MULTILINE)
    minutes = re.search(r"read (\d+) · exercises (\d+)", card)
    needs = re.search(r"\*\*You need\*\*(.*?)(?=\* \*\*Minutes|$)", card, flags=re.DOTALL)
    if heading is None or minutes is None or needs is None:
        raise ValueError("a card has a heading “# NN · title”, a line “You need” and “read N · exercises N”")
    return Stop(
        number=heading[1],
        title=heading[2].replace("`", "").strip(),
        minutes=int(minutes[1]) + int(minutes[2]),
        needs=tuple(dict.fromkeys(re.findall(r"\b0\d\b", needs[1]))),
    )


def read_course(folder: Path) -> list[Stop]:
    """Every lesson of a folder but the first notebook, in order."""
    sources = sorted(folder.glob("[0-9][0-9]_*/lesson.py"))
    return [read_card(path.read_text(encoding="utf-8")) for path in sources if not path.parent.name.startswith("00")]


@styled
def course_map(stops: Sequence[Stop]) -> Figure:
    """A line for each lesson; left of it an arc from each lesson that it needs."""
    figure = new_figure(9, 0.42 * len(stops) + 0.4)
    axes = figure.subplots()
    rows = {stop.number: row for row, stop in enumerate(stops)}
    for row, stop in enumerate(stops):
        axes.plot(0, row, "o", color=BLUE, markersize=7)
        axes.text(0.25, row, f"{stop.number}  {stop.title}", va="center")
        axes.text(9, row, f"{stop.minutes} min", va="center", ha="right")
        for need in stop.needs:
            arc = {"arrowstyle": "->", "color": GREY, "connectionstyle": "arc3,rad=0.6", "shrinkA": 5, "shrinkB": 5}
            axes.annotate("", xy=(0, row), xytext=(0, rows[need]), arrowprops=arc)
    axes.set_xlim(-2.2, 9.2)
    axes.set_ylim(len(stops) - 0.5, -0.5)
    axes.set_axis_off()
    return figure
