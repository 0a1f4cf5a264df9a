"""bfloat16 products with a frozen weight: whole, with the rows in two halves, and by tiles, as cpu/products chooses.

    python benchmarks/products.py

Prints TFLOP/s (the median of several, each way in turn) for shapes of SmolLM2-135M and of models up to Llama-3.2-1B's
width, in the two directions of a training step: x Wᵀ, and dy W. A star marks the way that is taken. The last two
columns add LoRA's update, r = 16, to the product, by torch's addmm_ behind the first or second and in the tiles'
own sums; its operations are not counted. Where the star stands at the slower column by far, the sizes in cpu/products
and cpu/tiles want another look: they are what one version of oneDNN does on one kind of machine.
"""

from collections.abc import Callable

import torch
from machine import seconds_in_turn
from torch import Tensor

from minilora.cpu import amx, tiles
from minilora.cpu.products import are_many, is_one_piece

SHAPES = [(1536, 576), (576, 576), (576, 1536), (576, 192), (896, 896), (960, 2560), (2560, 960), (2048, 2048)]
ROWS = [256, 512, 700, 1024, 2048]


def main() -> None:
    print(f"TFLOP/s in bfloat16, {torch.get_num_threads()} threads; AMX: {amx.is_there()}")
    columns = ("whole", "halves", "tiles", "+addmm_", "+tiles")
    print(f"{'in':>6}{'out':>6}{'rows':>6}{'':>6}" + "".join(f"{name:>10}" for name in columns))
    for n_in, n_out in SHAPES:
        for rows in ROWS:
            x, u, B = (torch.randn(shape).bfloat16() for shape in ((rows, n_in), (rows, 16), (16, n_out)))
            W = torch.randn(n_in, n_out).bfloat16()
            for direction, lying in (("x Wᵀ", W.T.contiguous().T), ("dy W", W)):
                taken = 2 if are_many(x, W) and tiles.suit(W) else int(is_one_piece(x, W))
                found = seconds_in_turn(ways(x, lying, u, B), rounds=13)
                rates = [2 * rows * n_in * n_out / seconds / 1e12 for seconds in found]
                cells = "".join(f"{rate:>9.2f}{'*' if taken == way else ' '}" for way, rate in enumerate(rates))
                print(f"{n_in:>6}{n_out:>6}{rows:>6}{direction:>6}{cells}", flush=True)


def ways(x: Tensor, W: Tensor, u: Tensor, B: Tensor) -> list[Callable[[], object]]:
    y = x.new_empty(len(x), W.shape[1])
    halves = 2 if is_one_piece(x, W) else 1
    by_torch = [lambda: in_pieces(1, x, W, y), lambda: in_pieces(2, x, W, y)]
    if not amx.is_there():
        return by_torch
    return [
        *by_torch,
        lambda: tiles.product(x, W),
        lambda: in_pieces(halves, x, W, y).addmm_(u, B),
        lambda: tiles.product(x, W, None, (u, B)),
    ]


def in_pieces(n: int, x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    for part, result in zip(x.chunk(n), y.chunk(n), strict=True):
        torch.mm(part, W, out=result)
    return y


if __name__ == "__main__":
    main()
