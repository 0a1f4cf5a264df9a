"""Every slider of every notebook, at both its ends, over the Jupyter wire protocol: no browser is needed.

The notebook runs in a kernel; each `comm_open` names a control. Telling the kernel that its value changed must bring an
`update_display_data` for a figure that is on the page, with another picture in it, and no `error`.
"""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from wire import Message, Wire, kernel

STILL = ["00_start_here"]  # its figures have no controls
NOTEBOOKS = [
    path for path in sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb")) if path.stem not in STILL
]


def ends(state: dict[str, Any]) -> list[dict[str, Any]]:
    """What a page would send for the two ends of a control, the one where it stands last; [] if it is no control."""
    if "_options_labels" in state:
        both = [{"index": 0}, {"index": len(state["_options_labels"]) - 1}]
    elif {"min", "max", "value"} <= state.keys():
        both = [{"value": state["min"]}, {"value": state["max"]}]
    elif isinstance(state.get("value"), bool):
        both = [{"value": not state["value"]}, {"value": state["value"]}]
    else:
        return []
    return sorted(both, key=lambda end: all(state[name] == value for name, value in end.items()))


def controls(messages: list[Message]) -> dict[str, dict[str, Any]]:
    """The state of every widget that was opened, by comm id."""
    opened = [message["content"] for message in messages if message["msg_type"] == "comm_open"]
    return {content["comm_id"]: content["data"]["state"] for content in opened}


def pictures(messages: list[Message], kind: str) -> dict[str, str]:
    """The PNG last shown for each display id by messages of one kind."""
    return {
        message["content"]["transient"]["display_id"]: message["content"]["data"]["image/png"]
        for message in messages
        if message["msg_type"] == kind
        and "image/png" in message["content"]["data"]
        and "display_id" in message["content"].get("transient", {})
    }


def errors(messages: list[Message]) -> list[str]:
    return [f"{m['content']['ename']}: {m['content']['evalue']}" for m in messages if m["msg_type"] == "error"]


def run_notebook(wire: Wire, path: Path) -> list[Message]:
    """Run a notebook as far as its last explorer; nbval runs the rest."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    last = max((number for number, source in enumerate(cells) if "explorer(" in source), default=0)
    messages = []
    for source in cells[: last + 1]:
        answers = wire.run(source)
        assert not errors(answers), (source[:80], errors(answers))
        messages += answers
    return messages


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_control_redraws_its_figure_at_both_ends(notebook: Path):
    with kernel(notebook.parent) as wire:
        messages = run_notebook(wire, notebook)
        shown = pictures(messages, "display_data")
        sliders = {comm_id: ends(state) for comm_id, state in controls(messages).items() if ends(state)}
        assert sliders, f"{notebook.name} has its one picture without a control"
        for comm_id, both in sliders.items():
            for state in both:
                answers = wire.move(comm_id, state)
                assert not errors(answers), (state, errors(answers))
                ((display_id, picture),) = pictures(answers, "update_display_data").items()
                assert picture != shown[display_id], f"the picture is the same at {state}"
                shown[display_id] = picture


BROKEN = """
from minilora.classroom.explorer import explorer
from minilora.classroom.plots import new_figure
def draw(r):
    if r == 9:
        raise RuntimeError("broken at nine")
    figure = new_figure(4, 2)
    figure.subplots().plot([0, r])
    return figure
picture = explorer(draw, alt="A line that rises with the slider.", finding="It rises.", r=(1, 9))
"""


def test_a_broken_callback_arrives_as_an_error(tmp_path: Path):
    with kernel(tmp_path) as wire:
        messages = wire.run(BROKEN)
        (comm_id,) = (comm_id for comm_id, state in controls(messages).items() if ends(state))
        fine, broken = wire.move(comm_id, {"value": 5}), wire.move(comm_id, {"value": 9})

    assert not errors(fine) and len(pictures(fine, "update_display_data")) == 1
    assert errors(broken) == ["RuntimeError: broken at nine"]
