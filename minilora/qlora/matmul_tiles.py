"""Products of up to 32 rows with a weight in 4 bits on AMX: 32 outputs at a time are decoded, multiplied, forgotten.

    y = x Wᵀ + bias,   W[output, feature] = codebook[code] · absmax[block], rounded to bfloat16

So W is what blockwise.dequantize gives in bfloat16, bit for bit (numbers below 2⁻¹²⁶ are zero); but only some of it is
there at a time, in a core's first cache. The sixteen values that a block's weights can have stand in one register, and
one instruction looks 32 codes up. What is read is a quarter of the bytes; decoding them takes longer than to read them,
and so about as long as to read all of W in bfloat16 from memory: the gain is the memory.

Read before this file: cpu/few_tiles, matmul_cpu.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor

from minilora import cpu, qlora
from minilora.cpu import amx, few_tiles
from minilora.cpu.amx import BLOCK, CONFIG, LINE, NUMBER, SHORT, Code, add_products, configure, release, zero_sums
from minilora.cpu.few_rows import JOB, block_of, multiplied
from minilora.cpu.few_tiles import packed, tiles_beside, write_sums
from minilora.cpu.jobs import address, digest_of, in_llvm, part, take, worker
from minilora.cpu.tiles import lines
from minilora.cpu.vectors import BYTE, FLOAT, WORD, instruction, prefetch, sixteen_times
from minilora.qlora.blockwise import Quantized
from minilora.qlora.matmul_cpu import PART, begins_with, decode_units, may_be_decoded

AT_ONCE = 64  # weights
FEATURES_A_PIECE = 256  # of 32 rows, 16 KiB: a third of a core's first cache
WIDE = ir.VectorType(WORD, AT_ONCE // 2)(list(range(AT_ONCE // 2)))  # sixteen of something, then of anything
SHORTS = ir.VectorType(SHORT, AT_ONCE // 2)


def fits(x: Tensor, *weights: Quantized) -> bool:
    """Whether these products are for `linears`: in bfloat16, with blocks and rows of whole groups of 64 weights."""
    if not amx.is_there():  # asked first: it takes the least time
        return False
    if x.dtype != torch.bfloat16 or x.shape[-1] % AT_ONCE or any(W.block_size % AT_ONCE for W in weights):
        return False
    return few_tiles.suits(x, min(W.shape[0] for W in weights)) and may_be_decoded(x, *weights)


def linears(x: Tensor, layers: Sequence[tuple[Quantized, Tensor | None]]) -> list[Tensor]:
    """Compute x Wᵀ + bias for each (W, bias) in bfloat16, where the products fit. No gradients flow.

    Raises:
        ValueError: for sizes that few_tiles.check_sizes refuses.
        RuntimeError: where there is no AMX.
    """
    amx.demand()
    few_tiles.check_sizes(x, [(W.shape[0], W.shape[1]) for W, _ in layers])
    weights = [(begins_with(W), bias, W.shape[0]) for W, bias in layers]
    return multiplied(_product(tiles_beside(x)), x, weights)


@cache
def _product(n_halves: int) -> Any:
    sources = digest_of(cpu, qlora)

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        parts = numba.carray(address(job.parts), job.n_parts, PART)
        x = numba.carray(address(job.x), (job.n_rows, job.in_features), np.uint16)
        panel, sums = packed(_evens_first(x), n_halves), lines(2 * 2 * BLOCK).view(np.float32)
        memory = lines(FEATURES_A_PIECE).view(np.uint16)
        units = np.empty(job.in_features * BLOCK // AT_ONCE + 2, np.float32)
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
                y = numba.carray(address(it.y), (job.n_rows, it.out_features), np.uint16)
                bias = numba.carray(address(it.bias), it.out_features if it.bias else 0, np.uint16)
                codes = numba.carray(address(it.packed), it.out_features * job.in_features // 2, np.uint8)
                codebook = numba.carray(address(it.codebook), 16, np.float32)
                first_block = decode_units(it, job.in_features, output, output + BLOCK, units)
                zero_sums()
                for start in range(0, job.in_features, FEATURES_A_PIECE):
                    width = min(FEATURES_A_PIECE, job.in_features - start)
                    W = memory[: BLOCK * width].reshape(BLOCK, width)
                    for row in range(BLOCK):
                        weight = (output + row) * job.in_features + start
                        _decode(codes, weight, codebook, units, first_block, it.block_bits, W, row)
                    add_products(W, 0, panel[start // BLOCK : (start + width) // BLOCK], n_halves, 0)
                write_sums(sums, n_halves, bias, y, output)

    return worker(work, JOB)


@part
def _evens_first(x):
    """Of every 64 features those with even numbers, then the others: as weights are decoded."""
    ordered = np.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], AT_ONCE):
            for place in range(AT_ONCE // 2):
                ordered[row, start + place] = x[row, start + 2 * place]
                ordered[row, start + AT_ONCE // 2 + place] = x[row, start + 2 * place + 1]
    return ordered


@in_llvm
def _decode(typing_context, codes, weight, codebook, units, first_block, block_bits, W, row):
    """Fill a row of W with the weights from number `weight` on, of every 64 those with even numbers first.

    The codebook's sixteen values times a block's unit are rounded: a table. Two codes lie in a byte, the first one in
    its upper half; shifted and masked they are indices, of which one instruction looks up 32.
    """

    def generate(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, weight, _, _, first_block, block_bits, _, row) = code.builder, code.arguments
        codebook = code.load(code.address(2), FLOAT)
        W_at, units_at, codes_at = code.address(6, row, NUMBER(0)), code.array(3).data, code.array(0).data
        look_up = instruction(builder, "llvm.x86.avx512.permvar.hi.512", SHORTS, [SHORTS, SHORTS])
        with cgutils.for_range(builder, builder.lshr(code.shape(6)[1], NUMBER(6))) as loop:
            place = builder.add(weight, builder.mul(loop.index, NUMBER(AT_ONCE)))
            block = builder.sub(builder.lshr(place, block_bits), first_block)
            unit = sixteen_times(builder, builder.load(builder.gep(units_at, [block])))
            table = code.narrow(builder.fmul(codebook, unit))
            table = builder.shuffle_vector(table, table.type(ir.Undefined), WIDE)
            at = builder.gep(codes_at, [builder.lshr(place, NUMBER(1))])
            prefetch(builder, at)
            pairs = builder.load(builder.bitcast(at, ir.VectorType(BYTE, AT_ONCE // 2).as_pointer()), align=1)
            pairs = builder.zext(pairs, SHORTS)
            firsts, seconds = builder.lshr(pairs, SHORTS([4] * 32)), builder.and_(pairs, SHORTS([15] * 32))
            for half, indices in enumerate((firsts, seconds)):
                target = builder.add(builder.mul(loop.index, NUMBER(2 * LINE)), NUMBER(half * LINE))
                code.store(builder.call(look_up, [table, indices]), builder.gep(W_at, [target]), align=LINE)

    kinds = types.int64, codebook, units, types.int64, types.int64, W, types.int64
    return types.void(codes, *kinds), generate
