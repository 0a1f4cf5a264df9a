"""Numba kernels: quantize and dequantize at memory speed on a CPU; blockwise has their readable twins and meaning.

    quantize     a block at a time: its absmax, then how many of the 15 thresholds each weight passes
    dequantize   a block has 16 different weights: make these, rounded to 16 bits if asked for, then look 16 codes up
                 in one instruction

The results are the reference's, bit for bit: the same float32 operations in the same order, which Numba neither fuses
nor reorders. A short last block is left to the reference.

Torch's threads share the blocks (cpu/jobs). The kernels are compiled at first use, and kept on disk.
"""

import math
import platform
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor

from minilora import cpu, qlora
from minilora.cpu.jobs import address, compiled, compiles_for, digest_of, in_llvm, part, run, take, worker
from minilora.cpu.vectors import FLOATS, LANES, WORDS, load, look_up, sixteen_times, to_bfloat16
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

TABLES_AT_A_TIME = 64  # blocks whose 16 weights are rounded before any is looked up: 2 KiB, near the core
WEIGHTS_A_PIECE = 2**15  # some 10 µs of work
SIZES = "n_blocks", "block_size", "piece"
QUANTIZE = np.dtype(
    [(name, np.int64) for name in ("taken", "weights", "packed", "absmax", "thresholds", "order", "is_unfit", *SIZES)]
)
DEQUANTIZE = np.dtype([(name, np.int64) for name in ("taken", "packed", "absmax", "values", "weights", *SIZES)])

BYTES = ir.VectorType(ir.IntType(8), 16)
INSTRUCTIONS = {  # what finds sixteen bytes in a table of sixteen, where the processor has it
    "x86_64": "llvm.x86.ssse3.pshuf.b.128",
    "AMD64": "llvm.x86.ssse3.pshuf.b.128",
    "arm64": "llvm.aarch64.neon.tbl1.v16i8",
    "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
}


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
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return dequantize(quantized, torch.float32).to(dtype)
    n_blocks, rest = divmod(math.prod(quantized.shape), block_size)
    units = _block_units(quantized)
    weights = empty(n_blocks * block_size + rest, dtype)
    kernel = _dequantize_float32() if dtype == torch.float32 else _dequantize_16_bits(dtype == torch.bfloat16)
    _run(kernel, n_blocks, block_size, packed, units, codebook.table(packed.device), weights)
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
def _dequantize_float32() -> Any:
    sources = digest_of(cpu, qlora)

    def work(all_jobs):
        sources  # noqa: B018
        job = numba.carray(all_jobs, 1)[0]
        n, n_blocks, block_size = job.n_blocks * job.block_size, job.n_blocks, job.block_size
        packed = numba.carray(address(job.packed), n // 2, np.uint8)
        absmax = numba.carray(address(job.absmax), n_blocks, np.float32)
        values = numba.carray(address(job.values), 16, np.float32)
        bits = numba.carray(address(job.weights), n, np.uint32)
        while True:
            first = take(all_jobs, job.piece)
            if first >= n_blocks:
                return
            for block in range(first, min(first + job.piece, n_blocks)):
                _look_up_floats(packed, block * block_size, block_size, values, absmax[block], bits)

    return worker(work, DEQUANTIZE)


@cache
def _dequantize_16_bits(is_bfloat16: bool) -> Any:
    """Make the kernel for bfloat16, or for float16."""
    sources = digest_of(cpu, qlora)

    def work(all_jobs):
        sources  # noqa: B018
        job = numba.carray(all_jobs, 1)[0]
        n, n_blocks, block_size = job.n_blocks * job.block_size, job.n_blocks, job.block_size
        packed = numba.carray(address(job.packed), n // 2, np.uint8)
        absmax = numba.carray(address(job.absmax), n_blocks, np.float32)
        values = numba.carray(address(job.values), 16, np.float32)
        bits = numba.carray(address(job.weights), n, np.uint16)
        tables = np.empty((TABLES_AT_A_TIME, 16), np.uint16)
        while True:
            first = take(all_jobs, job.piece)
            if first >= n_blocks:
                return
            stop = min(first + job.piece, n_blocks)
            for start in range(first, stop, TABLES_AT_A_TIME):
                count = min(TABLES_AT_A_TIME, stop - start)
                for block in range(count):
                    for code in range(len(values)):  # not 16: a loop that LLVM unrolls becomes no vector instructions
                        weight = np.float32(values[code] * absmax[start + block])
                        tables[block, code] = to_bfloat16(weight) if is_bfloat16 else _float16(weight)
                for block in range(count):
                    _look_up(packed, (start + block) * block_size, block_size, tables, block, bits)

    return worker(work, DEQUANTIZE)


@part
def _float16(number):
    """Round a float32 to the nearest float16, halfway to the even one; give its bits."""
    word = np.float32(number).view(np.uint32)
    sign, magnitude = word >> np.uint32(16) & np.uint32(0x8000), np.uint32(word & np.uint32(0x7FFFFFFF))
    if number != number:
        return np.uint32(0x7E00)
    if magnitude >= np.uint32(0x47800000):  # from 65,536 on there is infinity alone
        return sign | np.uint32(0x7C00)
    if magnitude < np.uint32(0x38800000):  # below 2⁻¹⁴ its steps are 2⁻²⁴, as a float32's are above ½
        shifted = np.float32(abs(number) + np.float32(0.5)).view(np.uint32)
        return sign | np.uint32(shifted - np.uint32(0x3F000000))
    odd = word >> np.uint32(13) & np.uint32(1)
    rebased = np.uint32(magnitude - np.uint32(0x38000000))  # float32 counts exponents from 127, float16 from 15
    return sign | np.uint32(rebased + np.uint32(0xFFF) + odd) >> np.uint32(13)


@compiled
def _double_dequantize(codes, absmax, offset, values, units):
    """Turn 8-bit units back into float32 ones."""
    for nested in range(len(absmax)):
        start = nested * NESTED_BLOCK_SIZE
        nested_codes, nested_units = codes[start : start + NESTED_BLOCK_SIZE], units[start : start + NESTED_BLOCK_SIZE]
        for i in range(len(nested_codes)):
            nested_units[i] = values[nested_codes[i]] * absmax[nested] + offset


@in_llvm
def _look_up_floats(typing_context, packed, first, count, values, unit, bits):
    """Write values[code] · unit into `bits` for the codes first … first + count − 1 of `packed`; 32 divides both."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed_at, values_at, bits_at = (
            context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 3, 5)
        )
        first, count = arguments[1:3]
        table = builder.fmul(load(builder, values_at), sixteen_times(builder, arguments[4]))
        with cgutils.for_range(builder, builder.udiv(count, count.type(32))) as loop:
            position = builder.add(first, builder.mul(loop.index, count.type(32)))
            pairs = builder.zext(load(builder, builder.gep(packed_at, [builder.udiv(position, first.type(2))])), WORDS)
            codes = builder.lshr(pairs, WORDS([4] * LANES)), builder.and_(pairs, WORDS([15] * LANES))
            for sixteen in _weave(builder, *(look_up(builder, table, half) for half in codes)):
                target = builder.bitcast(builder.gep(bits_at, [position]), FLOATS.as_pointer())
                builder.store(sixteen, target, align=4)
                position = builder.add(position, position.type(LANES))
        return context.get_dummy_value()

    return types.void(packed, types.intp, types.intp, values, types.float32, bits), generate


@in_llvm
def _look_up(typing_context, packed, first, count, tables, row, bits):
    """Write tables[row, code] into `bits` for the codes first … first + count − 1 of `packed`; 32 divides both.

    Numba has no words for vector instructions, so this is said in LLVM's. Every processor of the last fifteen years
    finds sixteen bytes in a table of sixteen at once, and a 4-bit code is such an index. Sixteen bits take two
    lookups, one for each byte; then low and high bytes are woven together.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        packed_at, tables_at, bits_at = (
            context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 3, 5)
        )
        first, count, row = arguments[1], arguments[2], arguments[4]
        table = load(builder, builder.gep(tables_at, [builder.mul(row, row.type(16))]))
        low_table = builder.trunc(table, BYTES)
        high_table = builder.trunc(builder.lshr(table, table.type([8] * 16)), BYTES)
        with cgutils.for_range(builder, builder.udiv(count, count.type(32))) as loop:
            position = builder.add(first, builder.mul(loop.index, count.type(32)))
            pairs = load(builder, builder.gep(packed_at, [builder.udiv(position, first.type(2))]))
            even, odd = builder.lshr(pairs, BYTES([4] * 16)), builder.and_(pairs, BYTES([15] * 16))
            for codes in _weave(builder, even, odd):
                low, high = _look_16_up(builder, low_table, codes), _look_16_up(builder, high_table, codes)
                for eight in _weave(builder, low, high):
                    target = builder.bitcast(builder.gep(bits_at, [position]), BYTES.as_pointer())
                    builder.store(eight, target, align=1)
                    position = builder.add(position, position.type(8))
        return context.get_dummy_value()

    return types.void(packed, types.intp, types.intp, tables, types.intp, bits), generate


def _weave(builder: Any, even: Any, odd: Any) -> list[Any]:
    """Put the lanes of two vectors alternately into two."""
    orders = [[start + place // 2 + LANES * (place % 2) for place in range(LANES)] for start in (0, LANES // 2)]
    return [builder.shuffle_vector(even, odd, WORDS(order)) for order in orders]


def _look_up_instruction() -> str | None:
    """Numba may compile for less than this machine has (NUMBA_CPU_NAME): LLVM then aborts on what is not there."""
    name = INSTRUCTIONS.get(platform.machine())
    on_x86 = name is not None and ".x86." in name
    return None if on_x86 and not compiles_for("ssse3") else name


def _look_16_up(builder: Any, table: Any, codes: Any) -> Any:
    instruction = _look_up_instruction()
    if instruction:
        kind = ir.FunctionType(BYTES, [BYTES, BYTES])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, instruction), [table, codes])
    found = BYTES(ir.Undefined)
    for lane in map(ir.IntType(32), range(16)):  # one byte after the other
        found = builder.insert_element(
            found, builder.extract_element(table, builder.extract_element(codes, lane)), lane
        )
    return found
