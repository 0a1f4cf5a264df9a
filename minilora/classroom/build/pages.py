"""The executed notebook as a page to read and to print.

One file that asks nothing of the network: figures are inside it with their descriptions, formulas are Unicode, light
and dark follow the reader's system, and what is folded on the screen is unfolded on paper.
"""

from pathlib import Path

from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

from minilora.classroom.build.lesson import Notebook

TEMPLATES = Path(__file__).parent / "templates"


def page(notebook: Notebook, title: str) -> str:
    """The page of an executed notebook."""
    exporter = HTMLExporter(template_name="page", extra_template_basedirs=[str(TEMPLATES)])
    resources = {"title": title, "style": style("page.css")}
    html, _ = exporter.from_notebook_node(notebook, resources=resources)
    return html


def style(name: str) -> str:
    """One of our style sheets, and the colours of code on light and on dark ground."""
    light, dark = (HtmlFormatter(style=each).get_style_defs(".highlight") for each in ("default", "github-dark"))
    ground = ".highlight, .highlight pre { background: var(--shade) }"
    own = (TEMPLATES / name).read_text(encoding="utf-8")
    return f"{own}\n{light}\n@media screen and (prefers-color-scheme: dark) {{\n{dark}\n}}\n{ground}"
