"""16-bit products with a frozen weight, whole and with the rows in two halves, as cpu/products chooses.

    python benchmarks/products.py

Prints TFLOP/s (the median of several) for shapes of SmolLM2-135M and of models up to Llama-3.2-1B's width. A star marks
the way that is taken. Where the star stands at the slower column by far, the sizes in cpu/products want another
look: they are what one version of oneDNN does on one kind of machine.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from minilora.cpu.products import is_one_piece

SHAPES = [(1536, 576), (576, 576), (576, 1536), (576, 192), (896, 896), (960, 2560), (2560, 960), (2048, 2048)]
ROWS = [256, 512, 700, 1024, 2048]


def main() -> None:
    print(f"TFLOP/s in bfloat16, {torch.get_num_threads()} threads")
    print(f"{'in':>6}{'out':>6}{'rows':>6}{'whole':>10}{'halves':>10}")
    for n_in, n_out in SHAPES:
        W = torch.randn(n_in, n_out).bfloat16()
        for rows in ROWS:
            x = torch.randn(rows, n_in).bfloat16()
            y = x.new_empty(rows, n_out)
            flop = 2 * rows * n_in * n_out
            rates = [flop / seconds(lambda n=n, x=x, W=W, y=y: in_pieces(n, x, W, y)) / 1e12 for n in (1, 2)]
            taken = is_one_piece(x, W)
            cells = "".join(f"{rate:>9.2f}{'*' if taken == halves else ' '}" for halves, rate in enumerate(rates))
            print(f"{n_in:>6}{n_out:>6}{rows:>6}{cells}", flush=True)


def in_pieces(n: int, x: Tensor, W: Tensor, y: Tensor) -> None:
    for part, result in zip(x.chunk(n), y.chunk(n), strict=True):
        torch.mm(part, W, out=result)


def seconds(work: Callable[[], None]) -> float:
    times = []
    for _ in range(17):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


if __name__ == "__main__":
    main()
