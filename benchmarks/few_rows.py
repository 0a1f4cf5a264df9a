"""Products of few rows with all weights of a model, as generating one token makes them: milliseconds, each way in turn.

    python benchmarks/few_rows.py

The shapes are SmolLM2-135M's: 30 layers of seven weights, and the head over the vocabulary. In bfloat16 torch's
F.linear, cpu/few_rows and cpu/few_tiles; in 4 bits (double quantization; the head has none) qlora/matmul_cpu and
qlora/matmul_tiles. "together" multiplies q, k and v in one call, and gate and up. Medians, and the least, of 15 rounds.
All weights take 270 MB in bfloat16 and the layers' 55 MB in 4 bits, so that no near cache keeps them for a round.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from minilora.cpu import amx, few_rows, few_tiles
from minilora.qlora import fast, matmul_cpu, matmul_tiles

LAYER = [[(576, 576), (192, 576), (192, 576)], [(576, 576)], [(1536, 576), (1536, 576)], [(576, 1536)]]
HEAD = (49152, 576)
ROWS = (1, 8, 9, 16, 24, 32)
ROUNDS = 15
Way = Callable[[torch.Tensor, Sequence[Any]], object]  # multiplies one x with several weights


def main() -> None:
    groups = [[torch.randn(shape, dtype=torch.bfloat16) for shape in group] for group in [*LAYER * 30, [HEAD]]]
    in_4_bits = [[fast.quantize(W, double=True) for W in group] for group in groups[:-1]]
    print(f"milliseconds: median (least), {torch.get_num_threads()} threads; AMX: {amx.is_there()}")
    for n_rows in ROWS:
        print(f"{n_rows} row{'s' * (n_rows > 1)}")
        for what, weights, ways in (
            ("bfloat16, with the head", groups, ways_in_bfloat16()),
            ("bfloat16, layers alone", groups[:-1], ways_in_bfloat16()),
            ("4 bits, layers alone", in_4_bits, ways_of(matmul_cpu, matmul_tiles)),
        ):
            found = [f"{name} {median:.1f} ({least:.1f})" for name, median, least in times(weights, ways, n_rows)]
            print(f"  {what:<25}" + "   ".join(found), flush=True)


def ways_in_bfloat16() -> dict[str, Way]:
    ways: dict[str, Way] = {"F.linear": lambda x, weights: [F.linear(x, W) for W in weights]}
    return ways | ways_of(few_rows, few_tiles)


def ways_of(in_registers: ModuleType, on_tiles: ModuleType) -> dict[str, Way]:
    """Each weight in a call of its own, and several weights of one x in one."""
    kernels = [in_registers, on_tiles] if amx.is_there() else [in_registers]
    ways: dict[str, Way] = {}
    for module in kernels:
        name = module.__name__.rpartition(".")[2]
        ways[name] = lambda x, weights, m=module: [m.linears(x, [(W, None)]) for W in weights]
        ways[f"{name} together"] = lambda x, weights, m=module: m.linears(x, [(W, None) for W in weights])
    return ways


def times(groups: list[list[Any]], ways: dict[str, Way], n_rows: int) -> list[tuple[str, float, float]]:
    inputs = {size: torch.randn(n_rows, size, dtype=torch.bfloat16) for size in (576, 1536)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, multiply in ways.items():
            start = time.perf_counter()
            for weights in groups:
                multiply(inputs[weights[0].shape[1]], weights)
            found[name].append((time.perf_counter() - start) * 1e3)
    return [(name, statistics.median(ms[1:]), min(ms[1:])) for name, ms in found.items()]


if __name__ == "__main__":
    main()
