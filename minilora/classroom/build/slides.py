"""Slides of a lesson: the cells tagged `slide`, and every figure of their sections (a figure without its code).

One file with reveal.js inside it, so that a projector in a room without a network shows it. Arrows and the space bar
turn the page, `o` shows all slides, `?print-pdf` behind the address makes a page of each.
"""

import base64
import copy
import io
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter
from PIL import Image

from minilora.classroom.build.lesson import Notebook
from minilora.classroom.build.pages import TEMPLATES, style

REVEAL = Path(__file__).parent / "reveal"
LINES_A_SLIDE = 14
CHARACTERS_A_LINE = 80


def slides(notebook: Notebook, title: str) -> str:
    """The slides of an executed notebook."""
    exporter = SlidesExporter(template_name="deck", extra_template_basedirs=[str(TEMPLATES)])
    shown = nbformat.v4.new_notebook(cells=list(slide_cells(notebook)), metadata=notebook.metadata)
    resources = {
        "title": title,
        "style": style("deck.css"),
        "reveal_css": (REVEAL / "reveal.css").read_text(encoding="utf-8"),
        "reveal_js": (REVEAL / "reveal.js").read_text(encoding="utf-8"),
    }
    html, _ = exporter.from_notebook_node(shown, resources=resources)
    return html


def slide_cells(notebook: Notebook) -> Iterator[Notebook]:
    """A cell for each slide: the card, the tagged cells in pieces that fit, and the figures of their sections."""
    is_shown = False
    for number, cell in enumerate(notebook.cells):
        is_tagged = number == 0 or "slide" in cell.metadata.get("tags", [])
        if cell.cell_type == "markdown" and (is_tagged or re.match(r"##? ", cell.source)):
            is_shown = is_tagged
        if cell.cell_type == "markdown" and is_tagged:
            kinds = iter(["slide"])
            for text in pieces(cell.source):
                yield _slide(nbformat.v4.new_markdown_cell(text), next(kinds, "subslide"))
        elif cell.cell_type == "code" and (is_tagged or is_shown):
            found = list(figures(cell))
            for each in found or [copy.deepcopy(cell)] * is_tagged:
                yield _slide(each, "subslide")


def figures(cell: Notebook) -> Iterator[Notebook]:
    """A cell without code for each figure of a cell: the figure and the finding under it.

    Filmstrips are left out: too tall for a slide, and who speaks can drag the explorer.
    """
    for at, output in enumerate(cell.outputs):
        if "image/png" in output.get("data", {}) and _is_wide(output["data"]["image/png"]):
            finding = [each for each in cell.outputs[at + 1 : at + 2] if "text/markdown" in each.get("data", {})]
            yield nbformat.v4.new_code_cell("", outputs=[output, *finding], execution_count=cell.execution_count)


def _is_wide(png: str) -> bool:
    """Whether an image, in base64 as notebooks hold it, is as wide as a slide or wider for its height."""
    width, height = Image.open(io.BytesIO(base64.b64decode(png))).size
    return width * 720 >= height * 1000


def pieces(text: str) -> list[str]:
    """A text in pieces that fit on a slide, each under its heading; a paragraph or a list's point stays whole."""
    heading, _, body = text.partition("\n") if text.startswith("#") else ("", "", text)
    made, piece = [], ""
    for block in re.split(r"\n\n(?![ \t])|\n(?=\* )", _unfenced_blanks(body.strip())):
        longer = f"{piece}\n\n{block}".strip()
        if piece and _lines(longer) > LINES_A_SLIDE:
            made.append(piece)
            longer = block
        piece = longer
    return [f"{heading}\n\n{each}".strip().replace("\0", "\n") for each in [*made, piece]]


def _lines(text: str) -> float:
    """How many lines of a slide a text takes: a paragraph is wrapped, a table's or a fenced line is smaller."""
    lines = 0.0
    for block in text.split("\n\n"):
        rows = block.replace("\0", "\n").splitlines()
        is_wrapped = not block.startswith(("```", "|"))
        lines += 0.5 + (-(-len(block) // CHARACTERS_A_LINE) if is_wrapped else 0.8 * len(rows))
    return lines


def _unfenced_blanks(text: str) -> str:
    """A text whose fenced blocks are one block each: their line ends are hidden from a splitter."""
    return re.sub(r"```.*?```", lambda found: found[0].replace("\n", "\0"), text, flags=re.DOTALL)


def _slide(cell: Notebook, kind: str) -> Notebook:
    cell.metadata["slideshow"] = {"slide_type": kind}
    return cell
