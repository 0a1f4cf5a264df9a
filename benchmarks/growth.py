"""How a training step grows with tokens, rank and layers: ours beside PEFT + bitsandbytes, as a figure.

    python benchmarks/growth.py                       measure, write benchmarks/growth.json and benchmarks/growth.png
    python benchmarks/growth.py --axes layers         one axis anew; the others stay as they were
    python benchmarks/growth.py --draw                the figure again, from benchmarks/growth.json

The work is training_step.py's: SmolLM2-135M, QLoRA in bfloat16. One thing grows at a time: the tokens of a single row
(attention grows with their square), the rank, or the layers (the first n of the model's 30); the others stay at 4 rows
of 256 tokens, r 16 and all layers. A point is the faster of two steps after a first one, once for each side: read the
shape of the curves here, and the ratio with its spread in training_step.py.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from machine import about
from training_step import PACKAGES, check_same_work, in_a_process

HERE = Path(__file__).parent
USUAL = {"batch": 4, "tokens": 256, "r": 16, "layers": 30}
AXES: dict[str, tuple[str, list[dict[str, int]]]] = {
    "tokens": ("tokens in one row", [{"batch": 1, "tokens": n} for n in (256, 512, 1024, 2048, 4096)]),
    "r": ("rank r", [{"r": r} for r in (4, 16, 64, 256)]),
    "layers": ("layers", [{"layers": n} for n in (5, 10, 20, 30)]),
}
SIDES = {"ours": "minilora", "peft": "PEFT + bitsandbytes"}


def main() -> None:
    options = parse()
    results = HERE / "growth.json"
    if not options.draw:
        before = json.loads(results.read_text())["axes"] if results.exists() else {}
        found = {axis: measure(axis) if axis in options.axes else before[axis] for axis in AXES}
        results.write_text(json.dumps({"machine": about(*PACKAGES), "axes": found}, indent=2) + "\n")
    (HERE / "growth.png").write_bytes(draw(json.loads(results.read_text())["axes"]))


def measure(axis: str) -> list[dict[str, Any]]:
    """Both sides at every point of an axis."""
    title, points = AXES[axis]
    print(f"{title:<20}{'ours':>22}{'theirs':>22}{'time':>8}{'memory':>8}")
    rows = []
    for point in points:
        options = argparse.Namespace(**USUAL | point, steps=3, threads=os.cpu_count())
        row: dict[str, Any] = {axis: point[axis]}
        row |= {side: in_a_process(side, "qlora-bf16", options) for side in SIDES}
        check_same_work(row["ours"], row["peft"])
        sides = "".join(f"{row[side]['fastest_s']:>10.2f} s{row[side]['peak_gib']:>6.2f} GiB" for side in SIDES)
        ratios = "".join(f"{row['ours'][what] / row['peft'][what]:>8.2f}" for what in ("fastest_s", "peak_gib"))
        print(f"{point[axis]:<20,}{sides}{ratios}", flush=True)
        rows.append(row)
    return rows


def draw(found: dict[str, list[dict[str, Any]]]) -> bytes:
    """Two rows of panels, seconds above GiB; a column for each thing that grows."""
    from minilora.classroom import plots

    @plots.styled
    def figure() -> bytes:
        whole = plots.new_figure(10, 5.4)
        panels = whole.subplots(2, len(found))
        for column, (axis, rows) in enumerate(found.items()):
            grown = [row[axis] for row in rows]
            for panel, what in zip(panels[:, column], ("fastest_s", "peak_gib"), strict=True):
                for (side, name), marker, colour in zip(SIDES.items(), plots.MARKERS, plots.COLOURS, strict=False):
                    panel.plot(grown, [row[side][what] for row in rows], marker=marker, color=colour, label=name)
                panel.set_ylim(bottom=0)
                if axis != "layers":
                    panel.set_xscale("log", base=2)
                panel.set_xticks(grown, [f"{n:,}" for n in grown])
                panel.minorticks_off()
                panel.grid(axis="y")
            panels[1, column].set_xlabel(AXES[axis][0])
        panels[0, 0].set_ylabel("a step, seconds")
        panels[1, 0].set_ylabel("peak memory, GiB")
        panels[0, 0].legend()
        return plots.png(whole)

    return figure()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
