"""Numba kernels: quantize and dequantize at memory speed on a CPU; blockwise has their readable twins and meaning.

    quantize     a block at a time: its absmax, then how many of the 15 thresholds each weight passes
    dequantize   a block has 16 different weights: make these, rounded to 16 bits if asked for, in a register; then
                 look 16 codes up at once

The results are the reference's, bit for bit: the same float32 operations in the same order, which Numba neither fuses
nor reorders. A short last block is left to the reference.

Torch's threads share the blocks (cpu/jobs). The kernels are compiled at first use, and kept on disk.
"""

import math
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from numba.core import cgutils, types
from torch import Tensor

from minilora import cpu, qlora
from minilora.cpu.jobs import address, compiled, digest_of, in_llvm, run, take, worker
from minilora.cpu.vectors import LANES, WORDS, by_turns, load, look_up, sixteen_times, to_bfloat16s, to_float16s
from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE, SMALLEST_UNIT
from minilora.qlora import blockwise
from minilora.qlora.blockwise import (
    BLOCK_SIZES,
    Quantized,
    block_units,
    check_complete,
    check_quantizable,
    double_quantize,
)
from minilora.qlora.codebooks import NF4, Codebook, dynamic_map
from minilora.qlora.spare_memory import empty

WEIGHTS_A_PIECE = 2**15  # some 10 µs of work
FLOAT32, BFLOAT16, FLOAT16 = range(3)
FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
SIZES = "n_blocks", "block_size", "piece"
QUANTIZE = np.dtype(
    [(name, np.int64) for name in ("taken", "weights", "packed", "absmax", "thresholds", "order", "is_unfit", *SIZES)]
)
DEQUANTIZE = np.dtype([(name, np.int64) for name in ("taken", "packed", "absmax", "values", "weights", *SIZES)])


def quantize(w: Tensor, codebook: Codebook = NF4, block_size: int = 64, *, double: bool = False) -> Quantized:
    """Round every weight to the nearest codebook value in units of its block's absmax: blockwise.quantize, fast.

    Raises:
        ValueError: as blockwise.quantize.
    """
    if block_size not in BLOCK_SIZES or w.numel() == 0:
        check_quantizable(w, block_size)
    flat = w.detach().reshape(-1).contiguous()
    if flat.dtype != torch.bfloat16:
        flat = flat.float()
    n_blocks, rest = divmod(flat.numel(), block_size)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(n_blocks + (rest > 0), dtype=torch.float32)
    thresholds, order = codebook.sorted_by_value(w.device)
    order, is_unfit = order.to(torch.uint8), torch.zeros(1, dtype=torch.uint8)
    tensors = flat, packed, absmax, thresholds, order, is_unfit
    _run(_quantize(flat.dtype), n_blocks, block_size, *tensors)
    last_weights = flat[n_blocks * block_size :]
    if is_unfit or not torch.isfinite(last_weights).all():
        check_quantizable(w, block_size)
    if rest:
        last = blockwise.quantize(last_weights, codebook, block_size)
        packed[n_blocks * block_size // 2 :] = last.packed
        absmax[n_blocks:] = block_units(last)
    return Quantized(packed, double_quantize(absmax) if double else absmax, codebook, block_size, tuple(w.shape))


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn 4 bits back into weights: blockwise.dequantize, fast.

        weight = codebook[code] · absmax[block]        [QLoRA] eq. 2

    Raises:
        ValueError: if codes or units are missing.
    """
    check_complete(quantized)
    codebook, block_size, packed = quantized.codebook, quantized.block_size, quantized.packed.contiguous()
    if block_size not in BLOCK_SIZES:
        return blockwise.dequantize(quantized, dtype)
    if dtype not in FORMATS:
        return dequantize(quantized, torch.float32).to(dtype)
    n_blocks, rest = divmod(math.prod(quantized.shape), block_size)
    units = _block_units(quantized)
    weights = empty(n_blocks * block_size + rest, dtype)
    _run(_dequantize(dtype), n_blocks, block_size, packed, units, codebook.table(packed.device), weights)
    if rest:
        last = Quantized(packed[n_blocks * block_size // 2 :], units[n_blocks:], codebook, block_size, (rest,))
        weights[-rest:] = blockwise.dequantize(last, dtype)
    return weights.reshape(quantized.shape)


def _block_units(quantized: Quantized) -> Tensor:
    nested = quantized.absmax
    if isinstance(nested, Tensor):
        return nested.contiguous()
    units = torch.empty(nested.codes.numel(), dtype=torch.float32)
    values = dynamic_map(nested.codes.device).numpy()
    _double_dequantize(nested.codes.numpy(), nested.absmax.numpy(), nested.offset.numpy()[()], values, units.numpy())
    return units


def _run(kernel: Any, n_blocks: int, block_size: int, *tensors: Tensor) -> None:
    piece = max(1, WEIGHTS_A_PIECE // block_size)
    run(kernel, n_blocks, *(tensor.data_ptr() for tensor in tensors), n_blocks, block_size, piece)


@cache
def _quantize(dtype: torch.dtype) -> Any:
    """Make the kernel for float32 or bfloat16; it says in `is_unfit` that a weight is NaN or infinite."""
    sources, number = digest_of(cpu, qlora), np.uint32 if dtype == torch.float32 else np.uint16
    shift = np.uint32(0 if dtype == torch.float32 else 16)  # a bfloat16 is the upper half of a float32

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        n, n_blocks, block_size = job.n_blocks * job.block_size, job.n_blocks, job.block_size
        bits, packed = (
            numba.carray(address(job.weights), n, number),
            numba.carray(address(job.packed), n // 2, np.uint8),
        )
        absmax = numba.carray(address(job.absmax), n_blocks, np.float32)
        thresholds = numba.carray(address(job.thresholds), 15, np.float32)
        order = numba.carray(address(job.order), 16, np.uint8)
        weights, places = np.empty(block_size, np.float32), np.empty(block_size, np.int32)
        words = weights.view(np.uint32)
        while True:
            first = take(all_jobs, job.piece)
            if first >= n_blocks:
                return
            for block in range(first, min(first + job.piece, n_blocks)):
                block_bits = bits[block * block_size : (block + 1) * block_size]
                block_packed = packed[block * block_size // 2 : (block + 1) * block_size // 2]
                largest = np.uint32(0)  # floats without their sign compare as their bits do; NaN and ∞ are the largest
                for i in range(block_size):
                    words[i] = np.uint32(block_bits[i]) << shift
                    largest = max(largest, words[i] & np.uint32(0x7FFFFFFF))
                unit = np.uint32(largest).view(np.float32)
                absmax[block] = unit
                if not unit < np.inf:
                    numba.carray(address(job.is_unfit), 1, np.uint8)[0] = 1
                inverse = np.float32(1) / max(unit, SMALLEST_UNIT)
                for i in range(block_size):
                    weights[i] = min(max(weights[i] * inverse, np.float32(-1)), np.float32(1))
                    places[i] = 0
                for threshold in thresholds:  # one over the whole block, then the next: many compares in an instruction
                    for i in range(block_size):
                        places[i] += weights[i] > threshold
                for j in range(block_size // 2):
                    block_packed[j] = order[places[2 * j]] << 4 | order[places[2 * j + 1]]

    return worker(work, QUANTIZE)


@cache
def _dequantize(dtype: torch.dtype) -> Any:
    """Make the kernel for one of FORMATS."""
    sources, form, number = digest_of(cpu, qlora), FORMATS[dtype], np.uint32 if dtype.itemsize == 4 else np.uint16

    def work(all_jobs):
        sources  # noqa: B018
        job = numba.carray(all_jobs, 1)[0]
        n, n_blocks, block_size = job.n_blocks * job.block_size, job.n_blocks, job.block_size
        packed = numba.carray(address(job.packed), n // 2, np.uint8)
        absmax = numba.carray(address(job.absmax), n_blocks, np.float32)
        values = numba.carray(address(job.values), 16, np.float32)
        bits = numba.carray(address(job.weights), n, number)
        while True:
            first = take(all_jobs, job.piece)
            if first >= n_blocks:
                return
            for block in range(first, min(first + job.piece, n_blocks)):
                _decode(form, packed, block * block_size, block_size, values, absmax[block], bits)

    return worker(work, DEQUANTIZE)


@in_llvm(prefer_literal=True)
def _decode(typing_context, form, packed, first, count, values, unit, bits):
    """Write values[code] · unit in a format into `bits` for the codes first … first + count − 1 of `packed`.

    32 divides first and count. A byte has two codes, of which the higher bits are the first.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed_at, values_at, bits_at = (
            context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (1, 4, 6)
        )
        first, count = arguments[2:4]
        table = builder.fmul(load(builder, values_at), sixteen_times(builder, arguments[5]))
        tables = [table, table]
        if form.literal_value != FLOAT32:  # two weights of 16 bits are a word: the first is its lower half
            narrowed = (to_bfloat16s if form.literal_value == BFLOAT16 else to_float16s)(builder, table)
            tables = [builder.zext(narrowed, WORDS), builder.shl(builder.zext(narrowed, WORDS), WORDS([16] * LANES))]
        with cgutils.for_range(builder, builder.udiv(count, count.type(32))) as loop:
            position = builder.add(first, builder.mul(loop.index, count.type(32)))
            pairs = builder.zext(load(builder, builder.gep(packed_at, [builder.udiv(position, first.type(2))])), WORDS)
            codes = builder.lshr(pairs, WORDS([4] * LANES)), builder.and_(pairs, WORDS([15] * LANES))
            found = [look_up(builder, *both) for both in zip(tables, codes, strict=True)]
            for vector in by_turns(builder, *found) if form.literal_value == FLOAT32 else [builder.or_(*found)]:
                at = builder.bitcast(builder.gep(bits_at, [position]), vector.type.as_pointer())
                builder.store(vector, at, align=2)
                position = builder.add(position, position.type(LANES))
        return context.get_dummy_value()

    return types.void(form, packed, types.intp, types.intp, values, types.float32, bits), generate


@compiled
def _double_dequantize(codes, absmax, offset, values, units):
    """Turn 8-bit units back into float32 ones."""
    for nested in range(len(absmax)):
        start = nested * NESTED_BLOCK_SIZE
        nested_codes, nested_units = codes[start : start + NESTED_BLOCK_SIZE], units[start : start + NESTED_BLOCK_SIZE]
        for i in range(len(nested_codes)):
            nested_units[i] = values[nested_codes[i]] * absmax[nested] + offset
