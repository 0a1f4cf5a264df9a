"""Products of a few rows with a frozen weight, as fast as memory gives the weight.

    x    (rows, in), up to 32 rows        W    (out, in)        y    (rows, out)        all bfloat16

    y = x Wᵀ        for one W, or for several that are multiplied by the same x

Text is generated one token a row at a time, and each reads every weight of the model: two operations a weight and row,
which a core does many times faster than memory brings it. So the floor is the bytes of W over the bandwidth, and
what a core has to do is to ask early: each weight is fetched 4 KiB before it is used. Milliseconds for all products of
SmolLM2-135M, 270 MB, on two cores with AVX-512 (benchmarks/few_rows.py):

                1 row    8 rows    16 rows    32 rows
    F.linear      24        38         50         78
    here          12        17         25         53        from 8 rows on bound by arithmetic

Sums are float32, sixteen side by side and then their sum: the same bits for any number of threads, and for a row alone
or among others.
"""

import ctypes
import itertools
import platform
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor

from minilora import cpu
from minilora.cpu.jobs import address, compiles_for, digest_of, in_llvm, part, run, take, worker
from minilora.cpu.products import FEATURES_AT_ONCE
from minilora.cpu.vectors import (
    FLOATS,
    LANES,
    WORD,
    WORDS,
    add_neighbours,
    instruction,
    load,
    prefetch,
    to_bfloat16s,
)

MOST_ROWS = 32
MOST_ROWS_AT_ONCE = 8
OUTPUTS_AT_ONCE = 2  # with 8 rows their sums take 16 of AVX-512's 32 registers
BLOCK = 32  # outputs
MOST_BLOCKS_A_PIECE = 32
Weights = Callable[[Any, Any], list[Any]]
JOB = np.dtype([(name, np.int64) for name in ("taken", "x", "parts", "n_parts", "n_rows", "in_features", "piece")])
PART = np.dtype([(name, np.int64) for name in ("W", "bias", "y", "out_features")])


def linears(
    x: Float[Tensor, "*n in"], layers: Sequence[tuple[Float[Tensor, "_ in"], Float[Tensor, "_"] | None]]
) -> list[Float[Tensor, "*n _"]]:
    """Compute x Wᵀ + bias for each (W, bias), all bfloat16, where products.are_few and x `suits`. No gradients flow.

    Raises:
        ValueError: for more than 32 rows, or a bias that does not fit.
    """
    kernel = _product(padded(x.numel() // x.shape[-1]))
    return multiplied(kernel, x, [((W.data_ptr(),), bias, W.shape[0]) for W, bias in layers])


def multiplied(kernel: Any, x: Tensor, weights: Sequence[tuple[tuple[int, ...], Tensor | None, int]]) -> list[Tensor]:
    """Let torch's threads multiply x by weights: of each what its PART begins with, its bias, and how many outputs.

    A thread's share is even, in blocks of 32 outputs; a large one is cut, for a thread may be slow.
    """
    x, in_features, n_blocks, parts = x.contiguous(), x.shape[-1], 0, list[int]()
    ys, biases = list[Tensor](), list[Tensor | None]()  # kept until all is done
    for begins_with, bias, out_features in weights:
        ys.append(x.new_empty(*x.shape[:-1], out_features))
        biases.append(bias if bias is None else bias.contiguous())
        parts += (*begins_with, bias_at(biases[-1], ys[-1]), ys[-1].data_ptr(), out_features)
        n_blocks += -(-out_features // BLOCK)
    table = (ctypes.c_int64 * len(parts))(*parts)
    share = -(-n_blocks // torch.get_num_threads())
    piece = -(-share // -(-share // MOST_BLOCKS_A_PIECE))
    run(kernel, n_blocks, x.data_ptr(), ctypes.addressof(table), len(ys), x.numel() // in_features, in_features, piece)
    return ys


def suits(x: Tensor) -> bool:
    """Whether rows that products.are_few are multiplied here faster than by torch."""
    return x.numel() <= most_rows() * x.shape[-1]


@cache
def most_rows() -> int:
    """How many rows are multiplied faster here than by torch: the fewer, the fewer sums the processor's registers hold.

    None by x86 without an instruction that multiplies and adds, for which a function would be called.
    """
    if compiles_for("avx512f"):
        return MOST_ROWS
    if compiles_for("avx2") and compiles_for("fma"):
        return 16
    return 0 if platform.machine() in ("x86_64", "AMD64") and not compiles_for("fma") else 8


def bias_at(bias: Tensor | None, y: Tensor) -> int:
    """The address of a bias for y, which lies in one piece, or 0 for none.

    Raises:
        ValueError: if it is not one number of y's dtype for each feature of y.
    """
    if bias is None:
        return 0
    if bias.shape != y.shape[-1:] or bias.dtype != y.dtype or not bias.is_cpu:
        raise ValueError(f"a bias for {y.shape[-1]} features of {y.dtype} is {tuple(bias.shape)}, {bias.dtype}")
    return bias.data_ptr()


@cache
def _product(n_sums: int) -> Any:
    sources = digest_of(cpu)

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        parts = numba.carray(address(job.parts), job.n_parts, PART)
        x = numba.carray(address(job.x), (job.n_rows, job.in_features), np.uint16)
        rows, sums = widened(x, n_sums), np.empty(LANES, np.float32)
        while True:
            first = take(all_jobs, job.piece)
            for block in range(first, first + job.piece):
                index, start = block_of(parts, block)
                if index == job.n_parts:
                    return
                it = parts[index]
                W = numba.carray(address(it.W), (it.out_features, job.in_features), np.uint16)
                y = numba.carray(address(it.y), (job.n_rows, it.out_features), np.uint16)
                bias = numba.carray(address(it.bias), it.out_features if it.bias else 0, np.uint16)
                for place in range(start, min(start + BLOCK, it.out_features), OUTPUTS_AT_ONCE):
                    output = min(place, it.out_features - OUTPUTS_AT_ONCE)
                    for row in range(0, job.n_rows, n_sums):
                        _multiply(n_sums, rows, row, W, output, sums)
                        write_sums(sums, bias, y, row, output)

    return worker(work, JOB)


@part
def block_of(parts, block):
    """Give the part to which a block belongs, and its first output there."""
    for index in range(len(parts)):
        n_blocks = -(-parts[index].out_features // BLOCK)
        if block < n_blocks:
            return index, block * BLOCK
        block -= n_blocks
    return len(parts), 0


def padded(n_rows: int) -> int:
    """How many rows the kernel for so many takes at once: 1, 2, 4 or 8. Rows that are not there are zeros.

    Raises:
        ValueError: for more than 32 rows.
    """
    if n_rows > MOST_ROWS:
        raise ValueError(f"these kernels take up to {MOST_ROWS} rows, not {n_rows}")
    return min(MOST_ROWS_AT_ONCE, 1 << (n_rows - 1).bit_length())


@part
def widened(x, n_sums):
    """Give rows as float32, and zeros up to a multiple of n_sums, in the order of the kernels.

    Of every 32 features the first of each pair stand before the second ones, as two vectors.
    """
    n_rows = -(-x.shape[0] // n_sums) * n_sums
    memory = np.zeros((n_rows + 1) * x.shape[1], np.float32)
    unaligned = memory.ctypes.data % 64 // 4  # a vector over two lines of memory takes two loads: 1.5 times as long
    rows = memory[LANES - unaligned :][: n_rows * x.shape[1]].reshape(n_rows, x.shape[1])
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], FEATURES_AT_ONCE):
            given, ordered = x[row, start : start + FEATURES_AT_ONCE], rows[row, start : start + FEATURES_AT_ONCE]
            if x.itemsize == 2:  # a bfloat16 is the upper half of a float32
                pairs, words = given.view(np.uint32), ordered.view(np.uint32)
                for place in range(LANES):
                    words[place] = pairs[place] << np.uint32(16)
                    words[place + LANES] = pairs[place] & np.uint32(0xFFFF0000)
            else:
                for place in range(FEATURES_AT_ONCE):
                    ordered[place] = given[place % LANES * 2 + place // LANES]
    return rows


@in_llvm(prefer_literal=True)
def _multiply(typing_context, n_rows, x, row, W, output, sums):
    """sums[2 i + k] = x[row + i] · W[output + k], i < n_rows, k = 0 and 1; words of 16 bits in W are bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x_array, W_array, sums_array = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (1, 3, 5)
        )
        in_features = cgutils.unpack_tuple(builder, W_array.shape)[1]

        def weights(output: Any, feature: Any) -> list[Any]:
            at = builder.gep(W_array.data, [builder.add(builder.mul(output, in_features), feature)])
            prefetch(builder, at)
            pairs = load(builder, builder.bitcast(at, WORD.as_pointer()))
            firsts, seconds = builder.shl(pairs, WORDS([16] * LANES)), builder.and_(pairs, WORDS([0xFFFF0000] * LANES))
            return [builder.bitcast(firsts, FLOATS), builder.bitcast(seconds, FLOATS)]

        products(builder, n_rows.literal_value, x_array, arguments[2], arguments[4], sums_array, weights)
        return context.get_dummy_value()

    return types.void(n_rows, x, row, W, output, sums), generate


def products(builder: Any, n_rows: int, x: Any, first_row: Any, output: Any, results: Any, weights: Weights) -> None:
    """Write the loop over the features in LLVM's words: Numba has none for a prefetch, nor for sums kept in registers.

    `weights(output, feature)` writes what gives 32 weights of one output, as two vectors of floats.
    """
    in_features = cgutils.unpack_tuple(builder, x.shape)[1]
    number = in_features.type
    outputs = [builder.add(output, number(k)) for k in range(OUTPUTS_AT_ONCE)]
    x_at = builder.gep(x.data, [builder.mul(first_row, in_features)])
    sums = [[cgutils.alloca_once_value(builder, FLOATS([0.0] * LANES)) for _ in outputs] for _ in range(n_rows)]
    multiply_add = instruction(builder, f"llvm.fma.v{LANES}f32", FLOATS, [FLOATS] * 3)
    with cgutils.for_range(builder, builder.udiv(in_features, number(FEATURES_AT_ONCE))) as loop:
        feature = builder.mul(loop.index, number(FEATURES_AT_ONCE))
        W = [weights(output, feature) for output in outputs]
        for row in range(n_rows):
            place = builder.add(builder.mul(number(row), in_features), feature)
            for half in range(2):
                values = load(builder, builder.gep(x_at, [builder.add(place, number(LANES * half))]))
                for k, total in enumerate(sums[row]):
                    builder.store(builder.call(multiply_add, [W[k][half], values, builder.load(total)]), total)
    totals = [builder.load(total) for total in itertools.chain(*sums)]
    while len(totals) > 1:
        totals = [add_neighbours(builder, *pair) for pair in zip(totals[::2], totals[1::2], strict=True)]
    for _ in range(LANES.bit_length() - (n_rows * OUTPUTS_AT_ONCE).bit_length()):
        totals = [add_neighbours(builder, totals[0], totals[0])]
    builder.store(totals[0], builder.bitcast(results.data, FLOATS.as_pointer()), align=4)


@in_llvm
def write_sums(typing_context, sums, bias, y, row, output):
    """y[row + i, output + k] = sums[2 i + k] + bias[output + k], i < 8 as far as y goes, rounded if y is bfloat16."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums_array, bias_array, y_array = (
            context.make_array(signature.args[i])(context, builder, arguments[i]) for i in range(3)
        )
        (row, output), is_rounded = arguments[3:], signature.args[2].dtype == types.uint16
        (n_rows, out_features), (n_biases,) = (
            cgutils.unpack_tuple(builder, array.shape) for array in (y_array, bias_array)
        )
        total = cgutils.alloca_once_value(builder, load(builder, sums_array.data))
        with builder.if_then(cgutils.is_not_null(builder, n_biases)):
            pair = load(builder, builder.gep(bias_array.data, [output]), OUTPUTS_AT_ONCE)
            pairs = builder.shuffle_vector(pair, pair, WORDS([0, 1] * (LANES // 2)))
            if is_rounded:
                pairs = builder.bitcast(builder.shl(builder.zext(pairs, WORDS), WORDS([16] * LANES)), FLOATS)
            builder.store(builder.fadd(builder.load(total), pairs), total)
        numbers = builder.load(total)
        if is_rounded:
            numbers = to_bfloat16s(builder, numbers)
        pair_of = ir.IntType(32 if is_rounded else 64)
        pairs = cgutils.alloca_once_value(builder, builder.bitcast(numbers, ir.VectorType(pair_of, LANES // 2)))
        first_pair = builder.bitcast(pairs, pair_of.as_pointer())
        rows_left, most = builder.sub(n_rows, row), n_rows.type(MOST_ROWS_AT_ONCE)
        count = builder.select(builder.icmp_signed("<", rows_left, most), rows_left, most)
        with cgutils.for_range(builder, count) as loop:
            place = builder.mul(builder.add(row, loop.index), out_features)
            at = builder.gep(y_array.data, [builder.add(place, output)])
            pair = builder.load(builder.gep(first_pair, [loop.index]))
            builder.store(pair, builder.bitcast(at, pair_of.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(sums, bias, y, row, output), generate
