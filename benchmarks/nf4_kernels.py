"""NF4 on a CPU beside bitsandbytes: quantize and dequantize, ours and theirs by turns, in one run.

    python benchmarks/nf4_kernels.py                     the table
    python benchmarks/nf4_kernels.py --json FILE         and the same numbers as JSON
    python benchmarks/nf4_kernels.py --threads 1 --cpu-time      for a machine that does other work as well

Before anything is timed, both must give the same bytes for the weights, and the same values for the same bytes. (The
units' own 8-bit codes differ in a few of a thousand: on a CPU bitsandbytes rounds them to a coarser grid first.)
A time is of one call, its result made anew and dropped, as a layer does it. A ratio is ours / theirs within one round:
the median of the rounds is given, the least and the largest. Below 1 we are faster.

Other programs on the machine stretch both times, and scatter the ratio. --cpu-time counts only while this process runs.
(Use it with one thread: OpenMP's threads wait for each other by running.)
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from machine import about

SHAPES = ["4096x4096", "1536x576", "576x1536", "576x576", "192x576"]  # a 7B model's, and all of SmolLM2-135M's
ROUND_S = 0.005  # a sample is repeated until it takes this long, so that the clock does not matter


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    shape: str
    dtype: str
    units: str
    ours_ms: float
    theirs_ms: float
    ratio: float
    ratio_min: float
    ratio_max: float
    rounds: int


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read by bitsandbytes' OpenMP when it is loaded
    import torch

    torch.set_num_threads(options.threads)
    facts = machine(options)
    print("\n".join(f"{name:<24}{value}" for name, value in facts.items()), end="\n\n")
    print(f"{'':<11}{'shape':<11}{'dtype':<10}{'units':<9}{'ours':>11}{'theirs':>12}   ratio (least to largest)")
    rows = []
    for shape in options.shapes:
        n_rows, n_columns = map(int, shape.split("x"))
        for dtype in (torch.float32, torch.bfloat16):
            w = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0)).to(dtype)
            for double in (False, True):
                for row in compare(w, shape, double, options):
                    rows.append(row)
                    print(line(row), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def compare(w: Any, shape: str, double: bool, options: argparse.Namespace) -> list[Row]:
    """Time one weight both ways, once both are seen to agree on it."""
    from bitsandbytes import functional as bnb

    from minilora.qlora import dequantize, quantize
    from minilora.qlora.blockwise import NestedAbsmax

    def theirs_quantize() -> Any:
        return bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)

    def ours_quantize() -> Any:
        return quantize(w, double=double)

    (their_bytes, state), quantized = theirs_quantize(), ours_quantize()
    same = bool((their_bytes.view(-1) == quantized.packed).all())
    if isinstance(quantized.absmax, NestedAbsmax):
        quantized = replace(quantized, absmax=NestedAbsmax(state.absmax, state.state2.absmax, state.offset))
    same &= bool((bnb.dequantize_4bit(their_bytes, state) == dequantize(quantized, w.dtype)).all())
    if not same:
        raise SystemExit(f"{shape}, {w.dtype}: the two do not agree, so nothing is timed")
    pairs: list[tuple[str, Callable[[], Any], Callable[[], Any], int]] = [
        ("quantize", ours_quantize, theirs_quantize, max(3, options.rounds // 3)),
        (
            "dequantize",
            lambda: dequantize(quantized, w.dtype),
            lambda: bnb.dequantize_4bit(their_bytes, state),
            options.rounds,
        ),
    ]
    rows = []
    for what, ours, theirs, n in pairs:
        times = by_turns(ours, theirs, n, time.process_time if options.cpu_time else time.perf_counter)
        ratios = [mine / other for mine, other in times]
        medians = [statistics.median(side) * 1000 for side in zip(*times, strict=True)]
        dtype, units = str(w.dtype).removeprefix("torch."), "8 bits" if double else "float32"
        ratio = statistics.median(ratios)
        rows.append(Row(what, shape, dtype, units, *medians, ratio, min(ratios), max(ratios), n))
    return rows


def by_turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, clock: Callable[[], float]
) -> list[tuple[float, float]]:
    """Seconds of one call, ours and theirs, round after round; who goes first changes."""
    repeats = [max(1, round(ROUND_S / seconds(f, 1, clock))) for f in (ours, theirs)]
    times = []
    for number in range(rounds):
        sides = [(ours, repeats[0]), (theirs, repeats[1])]
        turn = [seconds(f, n, clock) for f, n in (sides if number % 2 else sides[::-1])]
        mine, other = turn if number % 2 else turn[::-1]
        times.append((mine, other))
    return times


def seconds(f: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        f()
    return (clock() - start) / repeats


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures depend on."""
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return about("torch", "numba", "bitsandbytes") | {
        "threads": options.threads,
        "clock": "CPU time" if options.cpu_time else "wall clock",
        "load_before": round(os.getloadavg()[0], 2),
        "transparent_huge_pages": pages.read_text().strip() if pages.exists() else "no such setting",
    }


def line(row: Row) -> str:
    return (
        f"{row.what:<11}{row.shape:<11}{row.dtype:<10}{row.units:<9}{row.ours_ms:>8.3f} ms{row.theirs_ms:>9.3f} ms"
        f"   {row.ratio:.2f} ({row.ratio_min:.2f} to {row.ratio_max:.2f})"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=15, help="of dequantize; quantize has a third (default: 15)")
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help=f"for both sides (default: all cores, {cores})")
    parser.add_argument("--cpu-time", action="store_true", help="count the time that this process runs, not the wall's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
