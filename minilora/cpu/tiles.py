"""Products of many rows with a frozen weight on AMX, as a training step makes them.

    x    (rows, in)        W    (in, out), or its transpose in memory        bias    (out,)
    u    (rows, r)         B    (r, out), likewise                           y       (rows, out)        all bfloat16

    y = x W + bias + u B

What LoRA adds costs a step of 32 features: u's stand behind those of x, and B's behind those of W, as the bias does
beside a one. So they are summed with the rest, in float32, and y is rounded once and written once.

A thread takes 96 outputs. It packs their W into tiles, once for all rows; then the sums of 32 rows × 32 outputs at a
time are made in registers, over all features. x is read from where it lies. Each sum is made by one thread, in one
order: the same bits for any number of threads.

Read before this file: cpu/amx.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
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
    expect,
    narrow_block,
    release,
    store_sums,
    tile_of_columns,
    tile_of_rows,
    zero_sums,
)
from minilora.cpu.few_rows import bias_at
from minilora.cpu.jobs import address, digest_of, part, run, take, worker
from minilora.cpu.products import PLAIN
from minilora.cpu.vectors import to_bfloat16

PANELS_AT_ONCE = 3  # of 32 outputs, that a thread takes
MOST_FEATURES = 4096  # whose packed weights, 800 KB, stay in a core's second cache
ONE = np.uint16(0x3F80)

FIELDS = "taken", "x", "W", "bias", "u", "B", "y", "n_rows", "in_features", "out_features", "r", "B_is_by_output"
JOB = np.dtype([(name, np.int64) for name in FIELDS])


def product(
    x: Float[Tensor, "rows in"],
    W: Float[Tensor, "in out"],
    bias: Float[Tensor, "out"] | None = None,
    plus: tuple[Float[Tensor, "rows r"], Float[Tensor, "r out"]] | None = None,
) -> Float[Tensor, "rows out"]:
    """Compute x W + bias + u B, plus being (u, B), all bfloat16, for a W that lies in one piece, transposed or not.

    No gradients flow.

    Raises:
        ValueError: for fewer than 32 rows, another dtype, shapes that do not fit together, or a W in pieces.
        RuntimeError: where there is no AMX.
    """
    u, B = (x[:, :0], W[:0]) if plus is None else plus
    given = {"x": x, "W": W, "u": u, "B": B}
    if x.shape[1] != len(W) or u.shape != (len(x), len(B)) or B.shape[1] != W.shape[1] or len(x) < BLOCK:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in given.items())
        raise ValueError(f"x W + u B of {BLOCK} rows or more cannot be made of {shapes}")
    if any(t.dtype != torch.bfloat16 or type(t) not in PLAIN or not t.is_cpu for t in given.values()):
        found = ", ".join(f"{name} {t.dtype} on {t.device}" for name, t in given.items())
        raise ValueError(f"tiles multiply plain tensors of torch.bfloat16 on a CPU, not {found}")
    if not (W.is_contiguous() or W.mT.is_contiguous()):
        raise ValueError(f"W lies in pieces, with strides {W.stride()}: make it contiguous")
    amx.demand()
    in_features, out_features = W.shape
    x, u, bias = x.contiguous(), u.contiguous(), None if bias is None else bias.contiguous()
    B = B if B.mT.is_contiguous() else B.contiguous()
    y = x.new_empty(len(x), out_features)
    pointers = x.data_ptr(), W.data_ptr(), bias_at(bias, y), u.data_ptr(), B.data_ptr(), y.data_ptr()
    kernel, sizes = _product(not W.is_contiguous()), (len(x), in_features, out_features)
    run(kernel, out_features, *pointers, *sizes, len(B), not B.is_contiguous())
    return y


def suit(W: Float[Tensor, "in out"]) -> bool:
    """Whether many rows are multiplied by this W faster than torch does it: with a piece, at least, for each thread."""
    in_features, out_features = W.shape
    n_pieces = -(-out_features // (PANELS_AT_ONCE * BLOCK))
    enough = n_pieces >= max(2, torch.get_num_threads())
    return enough and BLOCK <= in_features <= MOST_FEATURES and amx.is_there()


@cache
def _product(is_by_output: bool) -> Any:
    """Make the kernel for a W whose transpose lies in one piece, as a layer's weight does, or for one that does so."""
    sources = digest_of(cpu)

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        x = numba.carray(address(job.x), (job.n_rows, job.in_features), np.uint16)
        u = numba.carray(address(job.u), (job.n_rows, job.r), np.uint16)
        y = numba.carray(address(job.y), (job.n_rows, job.out_features), np.uint16)
        W_shape = (job.out_features, job.in_features) if is_by_output else (job.in_features, job.out_features)
        B_shape = (job.out_features, job.r) if job.B_is_by_output else (job.r, job.out_features)
        W, B = numba.carray(address(job.W), W_shape, np.uint16), numba.carray(address(job.B), B_shape, np.uint16)
        bias = numba.carray(address(job.bias), job.out_features if job.bias else 0, np.uint16)

        n_steps, n_left = divmod(job.in_features, BLOCK)
        n_extra = -(-(n_left + (job.bias != 0) + job.r) // BLOCK)  # steps: the features left, the bias, and u's
        tiles = lines(PANELS_AT_ONCE * (n_steps + n_extra) * BLOCK).view(np.uint16)
        tiles = tiles.reshape(PANELS_AT_ONCE, n_steps + n_extra, 2, SIDE, BLOCK)
        extra = lines(n_extra * BLOCK).view(np.uint16).reshape(BLOCK, n_extra * BLOCK)
        sums = lines(2 * BLOCK).view(np.float32).reshape(BLOCK, BLOCK)
        extra[:] = 0
        configure(CONFIG)
        while True:
            first = take(all_jobs, PANELS_AT_ONCE * BLOCK)
            if first >= job.out_features:
                break
            n_panels = min(PANELS_AT_ONCE, -(-(job.out_features - first) // BLOCK))
            pack(W, is_by_output, first, tiles[:n_panels, :n_steps])
            pack_extra(W, is_by_output, n_left, bias, B, job.B_is_by_output, first, tiles[:n_panels, n_steps:])
            for place in range(0, job.n_rows, BLOCK):
                row = min(place, job.n_rows - BLOCK)  # the last block may make some rows once more
                gather_extra(x, n_left, len(bias), u, row, extra)
                for panel in range(n_panels):
                    output = first + panel * BLOCK
                    expect(y, row, output)
                    zero_sums()
                    add_products(x, row, tiles[panel, :n_steps], 2, STEPS_AHEAD)
                    add_products(extra, 0, tiles[panel, n_steps:], 2, 0)
                    store_sums(sums)
                    narrow(sums, y, row, output)
        release()

    return worker(work, JOB)


@part
def lines(count):
    """Memory for so many lines of 16 numbers of 32 bits, each a line of the cache."""
    memory = np.empty((count + 1) * SIDE, np.uint32)
    return memory[SIDE - memory.ctypes.data % 64 // 4 :][: count * SIDE]


@part
def pack(W, is_by_output, first, tiles):
    """Lay W's whole steps, for outputs from `first` on, as tiles[panel, step, half]; for what is not there, zeros."""
    n_panels, n_steps = tiles.shape[0], tiles.shape[1]
    n_outputs = (W.shape[0] if is_by_output else W.shape[1]) - first
    n_halves = min(2 * n_panels, n_outputs // SIDE)
    if is_by_output:  # in the order in which W lies in memory
        for half in range(n_halves):
            for step in range(n_steps):
                tile_of_columns(W, first + half * SIDE, step * BLOCK, tiles[half // 2, step, half % 2])
    else:
        for step in range(n_steps):
            for half in range(n_halves):
                tile_of_rows(W, step * BLOCK, first + half * SIDE, tiles[half // 2, step, half % 2])
    for half in range(n_halves, 2 * n_panels):
        tiles[half // 2, :, half % 2] = 0
        for n in range(half * SIDE, n_outputs):
            for k in range(n_steps * BLOCK):
                put(tiles, k, n, W[first + n, k] if is_by_output else W[k, first + n])


@part
def pack_extra(W, is_by_output, n_left, bias, B, B_is_by_output, first, tiles):
    """Lay what follows on the whole steps: W's features that are left, the bias, and B."""
    out_features, in_features = W.shape if is_by_output else (W.shape[1], W.shape[0])
    r = B.shape[1] if B_is_by_output else B.shape[0]
    tiles[:] = 0
    for n in range(min(tiles.shape[0] * BLOCK, out_features - first)):
        output, place = first + n, 0
        for feature in range(in_features - n_left, in_features):
            put(tiles, place, n, W[output, feature] if is_by_output else W[feature, output])
            place += 1
        if len(bias):
            put(tiles, place, n, bias[output])
            place += 1
        for k in range(r):
            put(tiles, place + k, n, B[output, k] if B_is_by_output else B[k, output])


@part
def put(tiles, k, n, number):
    """Put feature k of output n into its place in tiles[panel, step, half, pair, output of the half]."""
    tiles[n // BLOCK, k // BLOCK, n % BLOCK // SIDE, k % BLOCK // 2, 2 * (n % SIDE) + k % 2] = number


@part
def gather_extra(x, n_left, has_bias, u, row, extra):
    """Put side by side, for 32 rows, what the tiles of pack_extra are multiplied with."""
    for i in range(BLOCK):
        place = 0
        for feature in range(x.shape[1] - n_left, x.shape[1]):
            extra[i, place] = x[row + i, feature]
            place += 1
        if has_bias:
            extra[i, place] = ONE
            place += 1
        for k in range(u.shape[1]):
            extra[i, place + k] = u[row + i, k]


@part
def narrow(sums, y, row, output):
    """Round a block's sums into their places in y, which may end within the block."""
    if output + BLOCK <= y.shape[1]:
        narrow_block(sums, y, row, output)
        return
    for i in range(BLOCK):
        for n in range(y.shape[1] - output):
            y[row + i, output + n] = to_bfloat16(sums[i, n])
