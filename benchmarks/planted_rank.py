"""How much rank? On a task where the answer is known, and where AdaLoRA puts the ranks that it has.

    python benchmarks/planted_rank.py            measure, write benchmarks/planted_rank.json and planted_rank.png
    python benchmarks/planted_rank.py --draw     the figure again, from benchmarks/planted_rank.json

An update of rank k is planted in two layers of a small decoder (train/planted); LoRA of rank r looks for it, with three
seeds. The elbow is the smallest r within the noise of the best one. AdaLoRA has 14 triplets to share out among all 14
layers, of which two were planted with rank 7.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from machine import about

HERE = Path(__file__).parent
PLANTED_RANKS, RANKS, SEEDS = (1, 2, 4, 8), (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16), (0, 1, 2)


def main() -> None:
    options = parse()
    results = HERE / "planted_rank.json"
    if not options.draw:
        results.write_text(json.dumps({"machine": about("torch"), **measure()}, indent=1) + "\n")
    (HERE / "planted_rank.png").write_bytes(draw(json.loads(results.read_text())))


def measure() -> dict[str, Any]:
    """The share of the loss that every rank leaves, by planted rank, and AdaLoRA's ranks by seed."""
    from minilora.train.planted import PLANTED, elbow, loss_of_rank, ranks_found

    losses: dict[int, dict[int, list[float]]] = {}
    for k in PLANTED_RANKS:
        losses[k] = {r: [loss_of_rank(r, k, seed) for seed in SEEDS] for r in RANKS if r <= 2 * k}
        told = "  ".join(f"{r}: {sum(found) / len(found):.4f}" for r, found in losses[k].items())
        print(f"planted {k}  elbow {elbow(losses[k])}   {told}", flush=True)
    found = [ranks_found(k=7, seed=seed) for seed in SEEDS]
    for seed, ranks in zip(SEEDS, found, strict=True):
        in_planted = {name: ranks[name] for name in PLANTED}
        print(f"AdaLoRA, seed {seed}: {sum(in_planted.values())} of {sum(ranks.values())} in {in_planted}", flush=True)
    return {"losses": losses, "adalora": found}


def draw(found: dict[str, Any]) -> bytes:
    """A line for each planted rank, with the range of its seeds; a ring at the elbow."""
    from minilora.classroom import plots
    from minilora.train.planted import elbow

    @plots.styled
    def figure() -> bytes:
        whole = plots.new_figure(7.5, 4)
        axes = whole.subplots()
        for (k, by_rank), marker, colour in zip(found["losses"].items(), plots.MARKERS, plots.COLOURS, strict=False):
            losses = {0: [1.0, 1.0]} | {int(r): values for r, values in by_rank.items()}
            means = {r: sum(values) / len(values) for r, values in losses.items()}
            spread = [[means[r] - min(losses[r]) for r in means], [max(losses[r]) - means[r] for r in means]]
            axes.errorbar(
                list(means), list(means.values()), yerr=spread, marker=marker, color=colour, capsize=3, label=f"k = {k}"
            )
            best = elbow(losses)
            axes.plot([best], [means[best]], "o", ms=15, mfc="none", mec=colour)
        axes.set_xlabel("rank r of LoRA")
        axes.set_ylabel("share of the loss that is left")
        axes.set_xticks(range(0, 17, 2))
        axes.set_ylim(-0.06, 1.04)
        axes.grid(axis="y")
        axes.legend(title="planted rank; its elbow in a ring")
        return plots.png(whole)

    return figure()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
