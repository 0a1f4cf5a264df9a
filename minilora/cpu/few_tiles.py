"""Products of up to 32 rows with frozen weights on AMX, as fast as memory gives the weights.

    x    (rows, in), up to 32 rows        W    (out, in)        y    (rows, out)        all bfloat16

    yᵀ = W xᵀ        for one W, or for several that are multiplied by the same x

What few_rows says of memory holds here; what it says of arithmetic does not: tiles take sixteen rows in the time of
one. Against cpu/tiles the two have changed places. W stands where the rows were, and is read once, from where it lies;
x, all of it, is what is packed. A thread takes one long stretch of W, for the processor runs ahead in what it reads.

Sums are float32, and each is made by one thread, in one order: the same bits for any number of threads, and for a row
alone or among others.

Read before this file: cpu/tiles.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
from jaxtyping import Float
from torch import Tensor

from minilora import cpu
from minilora.cpu import amx
from minilora.cpu.amx import (
    BLOCK,
    CONFIG,
    SIDE,
    STEPS_AHEAD,
    add_products,
    configure,
    narrow_sixteen,
    release,
    store_sums,
    tile_of_columns,
    zero_sums,
)
from minilora.cpu.few_rows import JOB, PART, block_of, multiplied
from minilora.cpu.jobs import address, digest_of, part, take, worker
from minilora.cpu.tiles import lines
from minilora.cpu.vectors import from_bfloat16

MOST_ROWS = BLOCK


def linears(
    x: Float[Tensor, "*n in"], layers: Sequence[tuple[Float[Tensor, "_ in"], Float[Tensor, "_"] | None]]
) -> list[Float[Tensor, "*n _"]]:
    """Compute x Wᵀ + bias for each (W, bias), where products.are_few and x `suits` each W. No gradients flow.

    Raises:
        ValueError: for shapes that do not fit, more than 32 rows, or features that are not whole steps of 32.
        RuntimeError: where there is no AMX.
    """
    amx.demand()
    check_sizes(x, [(W.shape[0], W.shape[1]) for W, _ in layers])
    weights = [((W.data_ptr(),), bias, W.shape[0]) for W, bias in layers]
    return multiplied(_product(tiles_beside(x)), x, weights)


def suits(x: Tensor, out_features: int) -> bool:
    """Whether rows that products.are_few can be multiplied here, with a weight of so many outputs."""
    return x.numel() <= MOST_ROWS * x.shape[-1] and out_features >= BLOCK and amx.is_there()


def tiles_beside(x: Tensor) -> int:
    """How many tiles stand side by side for x's rows: 1 or 2."""
    return 1 if x.numel() <= SIDE * x.shape[-1] else 2


def check_sizes(x: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse what a kernel would read or write beyond.

    Raises:
        ValueError: if a weight's (out, in) is none for x, or x has more rows than the kernels take.
    """
    in_features = x.shape[-1]
    fit = all(n_in == in_features and n_out >= BLOCK for n_out, n_in in sizes)
    if not fit or in_features % BLOCK or not 0 < x.numel() <= MOST_ROWS * in_features:
        found = f"x {tuple(x.shape)} and weights of {', '.join(map(str, sizes))}"
        raise ValueError(
            f"tiles take up to {MOST_ROWS} rows, features in {BLOCK}s and {BLOCK} outputs or more: {found}"
        )


@cache
def _product(n_halves: int) -> Any:
    sources = digest_of(cpu)

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        parts = numba.carray(address(job.parts), job.n_parts, PART)
        x = numba.carray(address(job.x), (job.n_rows, job.in_features), np.uint16)
        panel, sums = packed(x, n_halves), lines(2 * 2 * BLOCK).view(np.float32)
        configure(CONFIG)
        while True:
            first = take(all_jobs, job.piece)
            for block in range(first, first + job.piece):
                index, start = block_of(parts, block)
                if index == job.n_parts:
                    release()
                    return
                it = parts[index]
                output = min(start, it.out_features - BLOCK)  # the last block may overlap the one before
                W = numba.carray(address(it.W), (it.out_features, job.in_features), np.uint16)
                y = numba.carray(address(it.y), (job.n_rows, it.out_features), np.uint16)
                bias = numba.carray(address(it.bias), it.out_features if it.bias else 0, np.uint16)
                zero_sums()
                add_products(W, output, panel, n_halves, STEPS_AHEAD)
                write_sums(sums, n_halves, bias, y, output)

    return worker(work, JOB)


@part
def packed(x, n_halves):
    """Lay x's rows as panel[step, half], with zeros for rows that are not there."""
    n_rows, n_steps = x.shape[0], x.shape[1] // BLOCK
    rows = lines(n_halves * n_steps * SIDE).view(np.uint16).reshape(n_halves * SIDE, n_steps * BLOCK)
    panel = lines(n_halves * n_steps * SIDE).view(np.uint16).reshape(n_steps, n_halves, SIDE, BLOCK)
    rows[:n_rows], rows[n_rows:] = x, 0
    for step in range(n_steps):
        for half in range(n_halves):
            tile_of_columns(rows, half * SIDE, step * BLOCK, panel[step, half])
    return panel


@part
def write_sums(sums, n_halves, bias, y, output):
    """Take the sums of 32 outputs × 16 rows a half from the tiles; turn, round and write them, with a bias."""
    by_output = sums[: BLOCK * BLOCK].reshape(BLOCK, BLOCK)
    by_row = sums[BLOCK * BLOCK :].reshape(2, 2, SIDE, SIDE)
    store_sums(by_output)
    for side in range(2):
        for half in range(n_halves):
            tile_of_columns(by_output, side * SIDE, half * SIDE, by_row[half, side])
    for row in range(y.shape[0]):
        for side in range(2):
            numbers, place = by_row[row // SIDE, side, row % SIDE], output + side * SIDE
            for k in range(SIDE if len(bias) else 0):
                numbers[k] += from_bfloat16(bias[place + k])
            narrow_sixteen(numbers, y, row, place)
