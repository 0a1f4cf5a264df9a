"""Pages and slides of the lessons: whole in one file, figures with their descriptions, nothing from the web."""

import base64
import copy
import io
import re

import nbformat
import pytest
from PIL import Image

from minilora.classroom.build.lesson import find_lessons
from minilora.classroom.build.pages import page
from minilora.classroom.build.slides import LINES_A_SLIDE, pieces, slide_cells, slides
from tests.classroom.test_notebooks import ROOT

LESSONS = find_lessons(ROOT)


@pytest.fixture(params=LESSONS, ids=lambda lesson: lesson.name)
def notebook(request: pytest.FixtureRequest) -> nbformat.NotebookNode:
    return nbformat.read(request.param.full, as_version=4)


def requests(html: str) -> list[str]:
    """What a browser would fetch to show a page: all but links that a reader follows."""
    written = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    tags = re.findall(r"<(?!a\b)\w+\b[^>]*?\b(?:src|href|poster|data)=[\"']?(?!data:|#)([^\"'> ]+)", written)
    return tags + re.findall(r"@import[^;]+;|url\((?!data:)[^)]*\)", written)


def figures(notebook: nbformat.NotebookNode) -> list[str]:
    """The descriptions of a notebook's figures."""
    outputs = [each for cell in notebook.cells for each in cell.get("outputs", [])]
    return [each.metadata["image/png"]["alt"] for each in outputs if "image/png" in each.get("data", {})]


def test_a_request_is_found():
    found = requests('<a href="https://a.b/c">x</a><img src="https://a.b/c.png"><style>@import url(x.css);</style>')

    assert found[0] == "https://a.b/c.png" and len(found) >= 2


def test_a_page_asks_nothing_of_the_web_and_describes_every_figure(notebook: nbformat.NotebookNode):
    made = page(notebook, "a lesson")

    assert requests(made) == []
    assert made.count("<img ") == made.count(' alt="') == len(figures(notebook)) >= 2
    assert 'alt=""' not in made
    assert "prefers-color-scheme: dark" in made and "beforeprint" in made


def test_slides_ask_nothing_of_the_web_and_show_figures(notebook: nbformat.NotebookNode):
    made = slides(notebook, "a lesson")

    assert requests(made) == []
    assert made.count("<section") >= 5 and made.count("<img ") >= 1
    assert made.count("<img ") == made.count(' alt="')
    assert "Reveal.initialize" in made


def picture(width: int, height: int) -> nbformat.NotebookNode:
    """A figure of this size, as a notebook holds it."""
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    return nbformat.v4.new_output("display_data", data=data, metadata={"image/png": {"alt": "It."}})


def test_slides_hold_the_card_the_tagged_cells_and_the_figures_of_their_sections():
    finding = nbformat.v4.new_output("display_data", data={"text/markdown": "**Found.**"})
    drawn = nbformat.v4.new_code_cell("show()", outputs=[picture(40, 20), finding])
    strip = nbformat.v4.new_code_cell("strip()", outputs=[picture(40, 80), finding])
    text = nbformat.v4.new_markdown_cell
    tagged = text("## Shown\n\nHere.", metadata={"tags": ["slide"]})
    printed = nbformat.v4.new_code_cell("print(1)", outputs=[nbformat.v4.new_output("stream", text="1")])
    shown = [copy.deepcopy(drawn), copy.deepcopy(printed), strip]
    wanted = [nbformat.from_dict({**cell, "metadata": {"tags": ["slide"]}}) for cell in copy.deepcopy(shown[:2])]
    cells = [text("# The card"), text("## No"), drawn, tagged, *shown, *wanted, text("## No again")]
    cells = [nbformat.from_dict({**cell, "id": f"c{number}"}) for number, cell in enumerate(cells)]
    made = list(slide_cells(nbformat.v4.new_notebook(cells=cells)))

    assert [(each.source, len(each.get("outputs", []))) for each in made] == [
        ("# The card", 0),
        ("## Shown\n\nHere.", 0),
        ("", 2),
        ("", 2),  # a figure comes without its code, tagged or not; what is printed comes with it, where it is tagged
        ("print(1)", 1),
        # and no filmstrip: that is for readers
    ]


def test_a_long_text_is_cut_between_paragraphs_and_never_inside_a_fenced_block():
    fence = "```\n" + "\n\n".join("x" * 40 for _ in range(6)) + "\n```"
    paragraph = "word " * 100
    made = pieces(f"## Head\n\n{paragraph}\n\n{fence}\n\n{paragraph}\n\n{paragraph}")

    assert len(made) >= 2 and all(each.startswith("## Head\n\n") for each in made)
    assert all(each.count("```") % 2 == 0 for each in made) and sum(fence in each for each in made) == 1
    assert all(len(each) < 80 * LINES_A_SLIDE + 100 for each in made)
