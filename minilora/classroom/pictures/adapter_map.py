"""Where a model's adapters are: a cell for each linear layer, by the number of its decoder layer and its name.

depth    0: no adapter; 1: one; 2: an adapter inside an adapter
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from minilora.classroom.plots import GREY, ORANGE, RED, new_figure, styled
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.layers import is_linear

LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One linear layer of the model as it was before."""

    row: str  # "self_attn.q_proj", or "lm_head" where it stands outside the decoder layers
    column: int
    depth: int


def linear_names(model: nn.Module) -> list[str]:
    """The names of a model's linear layers, its head among them."""
    return [name for name, module in model.named_modules() if is_linear(module)]


def adapter_map(model: nn.Module, names: Iterable[str]) -> list[Cell]:
    """How many adapters the forward pass meets at each of these names.

    The names are those of the model before: an adapter that hangs elsewhere is on none of them.

    >>> from minilora.torch_lora import LoRALinear
    >>> model = nn.ModuleDict({"head": LoRALinear(nn.Linear(3, 2), r=1, alpha=1)})
    >>> adapter_map(model, ["head"])
    [Cell(row='head', column=0, depth=1)]
    """
    cells = []
    for name in names:
        module: Any = model
        for part in name.split("."):
            module = getattr(module, part)
        depth = 0
        while isinstance(module, AdapterLayer):
            depth, module = depth + 1, module.base
        found = LAYER.search(name)
        row, column = (name[found.end() :], int(found[1])) if found else (name, 0)
        cells.append(Cell(row=row, column=column, depth=depth))
    return cells


@styled
def draw_maps(maps: Mapping[str, list[Cell]]) -> Figure:
    """One panel for each map, two to a row, under its title."""
    figure = new_figure(9.5, 2.55 * -(-len(maps) // 2) + 0.4)
    panels = figure.subplots(-(-len(maps) // 2), 2, squeeze=False, sharex=True, sharey=True)
    for axes, (title, cells) in zip(panels.flat, maps.items(), strict=False):
        _draw_map(axes, cells)
        axes.set_title(title, loc="left", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("decoder layer")
    figure.supxlabel(
        "small grey dot: no adapter     orange circle: one     red ring: one inside another", fontsize=9, color=GREY
    )
    return figure


def _draw_map(axes: Axes, cells: list[Cell]) -> None:
    rows = list(dict.fromkeys(cell.row for cell in cells))
    for cell in cells:
        place = ([cell.column], [rows.index(cell.row)])
        if cell.depth == 0:
            axes.plot(*place, marker=".", color=GREY, markersize=3)
        else:
            axes.plot(*place, marker="o", color=ORANGE, markersize=6 if cell.depth == 1 else 4)
        if cell.depth > 1:
            axes.plot(*place, marker="o", color=RED, markersize=9, fillstyle="none", markeredgewidth=1.4)
    axes.set_yticks(range(len(rows)), [row.rpartition(".")[2] for row in rows], fontsize=8)
    columns = sorted({cell.column for cell in cells})
    axes.set_xticks(columns, [str(column) for column in columns], fontsize=8)
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(-0.6, columns[-1] + 0.6))
    axes.tick_params(length=0)
