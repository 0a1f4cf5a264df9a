"""The comparison's table and figures, from benchmarks/methods.json: methods.py makes them when its cells are done.

    | method | trained | exact | loss | forgotten | …      mean of the seeds (least to largest)
    | … step | memory | answer | merged | rate |          what each costs (methods_cost.py), and its learning rate
    methods.png         trained parameters against exact answers, and those that nothing beats in both
    methods_ranks.png   the loss of LoRA by its rank, and the elbow

Only methods whose seeds are all there are told of.
"""

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
    """The names that no other beats in both: fewer trained and at least as exact, or as few and more exact."""
    better = {
        name: [o for o, (x2, y2) in points.items() if x2 <= x and y2 >= y and (x2, y2) != (x, y)]
        for name, (x, y) in points.items()
    }
    return sorted((name for name in points if not better[name]), key=lambda name: points[name])


def draw(rows: Rows) -> bytes:
    """Trained parameters against the share of exact answers; the bars are the seeds' range."""
    from minilora.classroom import plots

    @plots.styled
    def figure() -> bytes:
        whole = plots.new_figure(8, 4.5)
        axes = whole.subplots()
        points = {}
        for n, (name, (_, found)) in enumerate(rows.items()):
            shares = [100 * cell["exact"] for cell in found]
            x, y = found[0]["trainable"], statistics.mean(shares)
            points[name] = (float(x), y)
            bars = [[y - min(shares)], [max(shares) - y]]
            colour, marker = plots.COLOURS[n % len(plots.COLOURS)], plots.MARKERS[n % len(plots.MARKERS)]
            axes.errorbar([x], [y], yerr=bars, marker=marker, color=colour, capsize=3)
        for n, name in enumerate(
            sorted(points, key=lambda name: points[name][1])
        ):  # half of them train as many numbers
            line = {"arrowstyle": "-", "color": plots.GREY, "linewidth": 0.4}
            where = (1.05, (n + 0.5) / len(points))
            axes.annotate(name, points[name], where, textcoords="axes fraction", va="center", arrowprops=line)
        best = [points[name] for name in frontier(points)]
        axes.plot(*zip(*best, strict=True), linestyle=":", color=plots.GREY, zorder=0)
        axes.set_xscale("log")
        axes.set_xlabel("parameters that train")
        axes.set_ylabel("orders answered to the letter, %")
        axes.grid(axis="y")
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
