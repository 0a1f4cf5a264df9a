"""The comparison's table and figures, from benchmarks/methods.json: methods.py makes them when its cells are done.

    | method | trained | exact | loss | forgotten | …      mean of the seeds (least to largest)
    | … step | memory | answer | merged | rate |          what each costs (methods_cost.py), and its learning rate
    methods.png         what was forgotten against exact answers, and those that nothing beats in both
    methods_ranks.png   the loss of LoRA by its rank, and the elbow

Only methods whose seeds are all there are told of.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Cells = Mapping[tuple[str, float, int], Mapping[str, Any]]
Rows = Mapping[str, tuple[float, list[Mapping[str, Any]]]]  # a method's rate, and the cell of each seed


def by_seed(cells: Cells, case: str, lr: float, seeds: Sequence[int]) -> list[Mapping[str, Any]] | None:
    """The cells of a case at a rate, a seed each; None where one is missing or broke off."""
    found = [cells.get((case, lr, seed), {}) for seed in seeds]
    return found if all("exact" in cell for cell in found) else None


def table(rows: Rows, costs: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: a row for each method, the most exact one first; a cost that was not measured is a dash."""
    titles = "method", "trained", "exact", "loss", "forgotten, nats", "step", "memory", "answer", "merged", "rate"
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    exact = {name: statistics.mean(cell["exact"] for cell in found) for name, (_, found) in rows.items()}
    for name in sorted(rows, key=lambda name: -exact[name]):
        lr, found = rows[name]
        its = costs.get(name, {})
        told = [f"{its[what]:.2f}" if what in its else "–" for what in ("step", "memory", "answer", "merged")]
        cells = [
            f"{found[0]['trainable']:,}",
            spread([100 * cell["exact"] for cell in found], ".0f", " %"),
            spread([cell["validation_loss"] for cell in found], ".3f"),
            spread([cell["forgotten"] for cell in found], "+.2f"),
            *told,
            f"{lr:g}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean (least to largest)."""
    return f"{statistics.mean(values):{form}}{unit} ({min(values):{form}} to {max(values):{form}})"


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats in both, x the less the better and y the more, from left to right.

    >>> frontier({"a": (1, 3), "b": (2, 2), "c": (2, 5)})
    ['a', 'c']
    """
    best = [
        name
        for name, (x, y) in points.items()
        if not any(x2 <= x and y2 >= y and (x2, y2) != (x, y) for x2, y2 in points.values())
    ]
    return sorted(best, key=lambda name: points[name])


def draw(rows: Rows) -> bytes:
    """What was forgotten against the share of exact answers, with the seeds' ranges as bars both ways."""
    from minilora.classroom import plots

    looks = {1e6: ("o", plots.GREEN), 1e8: ("s", plots.BLUE), math.inf: ("^", plots.RED)}
    names = {"o": "under 1 M", "s": "4 to 8 M", "^": "all, 135 M"}

    @plots.styled
    def figure() -> bytes:
        whole = plots.new_figure(8.6, 4.8)
        axes = whole.subplots()
        points = {}
        for name, (_, found) in rows.items():
            xs, ys = [cell["forgotten"] for cell in found], [100 * cell["exact"] for cell in found]
            points[name] = x, y = statistics.mean(xs), statistics.mean(ys)
            marker, colour = next(look for most, look in looks.items() if found[0]["trainable"] < most)
            bars = [[[x - min(xs)], [max(xs) - x]], [[y - min(ys)], [max(ys) - y]]]
            label = names.pop(marker, None)
            axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt=marker, color=colour, elinewidth=0.9, label=label)
        for n, name in enumerate(sorted(points, key=lambda name: points[name])):  # by turns above and below its bar
            exact = [100 * cell["exact"] for cell in rows[name][1]]
            top, at = (max(exact), (0, 4)) if n % 2 == 0 else (min(exact), (0, -12))
            axes.annotate(name, (points[name][0], top), at, textcoords="offset points", ha="center", fontsize=9)
        axes.plot(*zip(*(points[name] for name in frontier(points)), strict=True), ":", color=plots.GREY, zorder=0)
        axes.set_xscale("log")
        axes.set_ylim(0, 55)
        axes.set_xlabel("forgotten: how much the loss on English text rose, nats (log scale)")
        axes.set_ylabel("orders answered to the letter, %")
        axes.grid(axis="y")
        ticks = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.legend(loc="lower left", title="parameters that train")
        return plots.png(whole)

    return figure()


def draw_ranks(losses: Mapping[int, Sequence[float]]) -> bytes:
    """LoRA's loss by its rank, with the seeds' range as bars and a ring at the elbow."""
    from minilora.classroom import plots
    from minilora.train.planted import elbow

    @plots.styled
    def figure() -> bytes:
        whole = plots.new_figure(6, 3.6)
        axes = whole.subplots()
        means = {r: statistics.mean(found) for r, found in losses.items()}
        bars = [[means[r] - min(losses[r]) for r in means], [max(losses[r]) - means[r] for r in means]]
        axes.errorbar(list(means), list(means.values()), yerr=bars, marker="o", color=plots.BLUE, capsize=3)
        best = elbow(losses)
        axes.plot([best], [means[best]], "o", ms=15, mfc="none", mec=plots.BLUE)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(means), [str(r) for r in means])
        axes.set_xlabel("rank r of LoRA; the elbow in a ring")
        axes.set_ylabel("loss on unseen orders, nats")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        return plots.png(whole)

    return figure()
