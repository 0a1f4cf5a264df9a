"""Numba kernels: quantize and dequantize at memory speed on a CPU; blockwise has their readable twins and meaning.

    quantize     a block at a time: its absmax, then how many of the 15 thresholds every weight passes
    dequantize   a block has only 16 different weights: work these out, round them, then look every code up

All results are the reference's, bit for bit: the same float32 operations in the same order (Numba neither fuses nor
reorders them unless asked to), and halfway between two, the even one. A short last block is left to the reference.
The kernels give up Python's lock and run in plain threads, as many as torch would use: no second OpenMP, which would
fight torch's for the cores and die in a forked child. They compile at first use and are kept on disk.
"""

import math
import mmap
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from minilora.numpy_lora.nf4 import SMALLEST_UNIT
from minilora.qlora import blockwise
from minilora.qlora.blockwise import BLOCK_SIZES, Quantized, block_units, check_quantizable, double_quantize
from minilora.qlora.codebooks import NF4, Codebook

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
FORMATS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
TABLES_AT_A_TIME = 64  # blocks whose 16 weights are worked out before they are looked up: 4 KiB, near the core
CODES_AT_A_TIME = 32
WEIGHTS_A_THREAD = 2**18  # about 0.1 ms of work; to start a thread on it takes 0.02 ms
HUGE_PAGES_FROM = 2**25  # bytes; smaller memory is reused by malloc, larger comes fresh from the kernel every time

BYTES = ir.VectorType(ir.IntType(8), 16)
LOOK_UP_INSTRUCTIONS = {  # sixteen bytes in a table of sixteen; where there is none, one byte after the other
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
    flat = w.detach().reshape(-1)
    flat = flat if flat.dtype in FORMATS else flat.float()
    n_blocks, rest = divmod(flat.numel(), block_size)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = torch.empty(n_blocks + (rest > 0), dtype=torch.float32)
    thresholds, order = codebook.sorted_by_value(w.device)
    constants = (thresholds.numpy(), order.to(torch.uint8).numpy(), block_size, FORMATS[flat.dtype])
    good = _in_threads(_quantize_blocks, n_blocks, block_size, (_bits(flat), packed.numpy(), absmax.numpy(), *constants))
    if not all(good):
        check_quantizable(w, block_size)
    if rest:
        last = blockwise.quantize(flat[-rest:], codebook, block_size)
        packed[-last.packed.numel() :], absmax[-1:] = last.packed, last.absmax
    return Quantized(packed, double_quantize(absmax) if double else absmax, codebook, block_size, tuple(w.shape))


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn 4 bits back into weights: blockwise.dequantize, fast.

    weight = codebook[code] · absmax[block]            [QLoRA] eq. 2
    """
    block_size, packed, codebook = quantized.block_size, quantized.packed, quantized.codebook
    if dtype not in FORMATS or block_size % CODES_AT_A_TIME:
        return blockwise.dequantize(quantized, dtype)
    count = math.prod(quantized.shape)
    n_blocks, rest = divmod(count, block_size)
    units = block_units(quantized)
    weights = _fresh(count, dtype)
    constants = (codebook.table(packed.device).numpy(), block_size, FORMATS[dtype])
    _in_threads(_dequantize_blocks, n_blocks, block_size, (packed.numpy(), units.numpy(), _bits(weights), *constants))
    if rest:
        last = Quantized(packed[n_blocks * block_size // 2 :], units[-1:], codebook, block_size, (rest,))
        weights[-rest:] = blockwise.dequantize(last, dtype)
    return weights.reshape(quantized.shape)


def _in_threads(
    kernel: Callable[..., Any], n_blocks: int, block_size: int, arguments: tuple[np.ndarray | int, ...]
) -> list[Any]:
    """Run a kernel on all blocks, in torch's number of threads or fewer; return what each thread returned."""
    n_threads = max(1, min(torch.get_num_threads(), n_blocks * block_size // WEIGHTS_A_THREAD))
    bounds = [n_blocks * thread // n_threads for thread in range(n_threads + 1)]
    others = [
        _threads(os.getpid()).submit(kernel, *arguments, first, last)
        for first, last in zip(bounds[1:-1], bounds[2:], strict=True)
    ]
    return [kernel(*arguments, 0, bounds[1]), *(other.result() for other in others)]


@cache
def _threads(process: int) -> ThreadPoolExecutor:
    """Make a process its threads once; a forked child inherits none of its parent's."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix=f"minilora-{process}")


def _bits(flat: Tensor) -> np.ndarray:
    """Look at floats as the unsigned integers that hold them; no copy. (NumPy has no bfloat16.)"""
    return flat.view(torch.uint32 if flat.element_size() == 4 else torch.uint16).numpy()


def _fresh(count: int, dtype: torch.dtype) -> Tensor:
    """Make an empty tensor; a large one in huge pages, where the system has them.

    Memory fresh from the system is zeroed page by page when first touched. In pages of 4 KiB that takes three times
    as long as the kernel that then fills it; in pages of 2 MiB, less than the kernel.
    """
    n_bytes = count * dtype.itemsize
    if n_bytes >= HUGE_PAGES_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype)
    return torch.empty(count, dtype=dtype)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at first use, to run without Python's lock; keep the result on disk where a folder for it is writable."""
    compile_ = numba.njit(nogil=True, error_model="numpy", cache=True)
    try:
        return compile_(function)
    except RuntimeError:  # "no locator available": neither this file's folder nor the user's cache can be written
        return numba.njit(nogil=True, error_model="numpy")(function)


@_compiled
def _quantize_blocks(bits, packed, absmax, thresholds, order, block_size, kind, first, last):
    """Quantize the blocks first … last − 1; return whether all their weights are finite, and stop where one is not."""
    weights = np.empty(block_size, np.float32)
    places = np.empty(block_size, np.int32)
    for block in range(first, last):
        start = block * block_size
        largest = np.uint32(0)  # of floats without their sign, the larger is the larger as an integer; NaN the largest
        for i in range(block_size):
            weights[i] = _float32_from(bits[start + i], kind)
            largest = max(largest, np.float32(weights[i]).view(np.uint32) & np.uint32(0x7FFFFFFF))
        absmax[block] = np.uint32(largest).view(np.float32)
        if not absmax[block] < np.inf:
            return False
        inverse = np.float32(1) / max(absmax[block], SMALLEST_UNIT)
        for i in range(block_size):
            weights[i] = min(max(weights[i] * inverse, np.float32(-1)), np.float32(1))
        places[:] = 0
        for threshold in thresholds:  # one at a time over the whole block: many compares in one instruction
            for i in range(block_size):
                places[i] += weights[i] > threshold
        for j in range(block_size // 2):
            packed[start // 2 + j] = order[places[2 * j]] << 4 | order[places[2 * j + 1]]
    return True


@_compiled
def _dequantize_blocks(packed, absmax, bits, values, block_size, kind, first, last):
    """Dequantize the blocks first … last − 1."""
    words = np.empty(len(values), np.uint32)
    tables = np.empty((TABLES_AT_A_TIME, bits.itemsize, len(values)), np.uint8)
    for start in range(first, last, TABLES_AT_A_TIME):
        count = min(TABLES_AT_A_TIME, last - start)
        for block in range(count):
            for code in range(len(values)):  # len, not 16: unrolled it would not become vector instructions
                words[code] = _bits_from(values[code] * absmax[start + block], kind)
            for byte in range(bits.itemsize):
                for code in range(len(values)):
                    tables[block, byte, code] = words[code] >> np.uint32(8 * byte)
        for block in range(count):
            _look_up(packed, (start + block) * block_size, block_size, tables, block, bits)


@_compiled
def _float32_from(bits, kind):
    """Read a float out of the bits that hold it; exact."""
    if kind == FLOAT32:
        return np.uint32(bits).view(np.float32)
    if kind == BFLOAT16:  # the upper half of a float32
        return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)
    sign = np.uint32(np.uint32(bits & 0x8000) << np.uint32(16))
    magnitude = np.uint32(np.uint32(bits & 0x7FFF) << np.uint32(13))  # its exponent counts from 15, float32's from 127
    if magnitude >= np.uint32(0x0F800000):  # infinite or NaN
        return np.uint32(sign | magnitude | np.uint32(0x7F800000)).view(np.float32)
    scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112))
    return np.uint32(scaled.view(np.uint32) | sign).view(np.float32)


@_compiled
def _bits_from(number, kind):
    """Round a float32 to a format and give its bits; halfway between two, the even one."""
    bits = np.float32(number).view(np.uint32)
    if kind == FLOAT32:
        return bits
    if number != number:  # NaN, from a damaged absmax
        return np.uint32(0x7FC0) if kind == BFLOAT16 else np.uint32(0x7E00)
    if kind == BFLOAT16:
        return np.uint32(bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    sign = bits >> np.uint32(16) & np.uint32(0x8000)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude >= np.uint32(0x47800000):  # from 65,536 on float16 has infinity alone
        return sign | np.uint32(0x7C00)
    if magnitude < np.uint32(0x38800000):  # below 2⁻¹⁴ its steps are 2⁻²⁴, those of a float32 near ½
        shifted = np.float32(magnitude.view(np.float32) + np.float32(0.5))
        return sign | np.uint32(shifted.view(np.uint32) - np.uint32(0x3F000000))
    magnitude = np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + (magnitude >> np.uint32(13) & np.uint32(1)))
    return sign | magnitude >> np.uint32(13)


@intrinsic
def _look_up(typing_context, packed, first, count, tables, row, weights):
    """Write tables[row, code] into `weights` for the codes first … first + count − 1 of `packed`.

    Numba cannot say this in instructions for whole vectors, so it is said in LLVM's language. Every processor of the
    last fifteen years looks sixteen bytes up in a table of sixteen bytes in one instruction, and a 4-bit code is such
    an index. A weight of 2 or 4 bytes takes one lookup for each of its bytes; then the bytes are woven together.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes_at, tables_at, weights_at = (
            context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 3, 5)
        )
        first, count, row = arguments[1], arguments[2], arguments[4]
        n_bytes = weights.dtype.bitwidth // 8
        planes = [
            _load_16(builder, tables_at, builder.mul(builder.add(builder.mul(row, row.type(n_bytes)), row.type(byte)), row.type(16)))
            for byte in range(n_bytes)
        ]
        with cgutils.for_range(builder, builder.udiv(count, count.type(CODES_AT_A_TIME))) as loop:
            position = builder.add(first, builder.mul(loop.index, first.type(CODES_AT_A_TIME)))
            pairs = _load_16(builder, codes_at, builder.udiv(position, first.type(2)))
            high, low = builder.lshr(pairs, BYTES([4] * 16)), builder.and_(pairs, BYTES([15] * 16))
            for codes in _weave(builder, [high], [low]):
                for vector in _join(builder, [[_look_16_up(builder, plane, codes)] for plane in planes]):
                    target = builder.bitcast(builder.gep(weights_at, [position]), vector.type.as_pointer())
                    builder.store(vector, target, align=1)
                    position = builder.add(position, position.type(vector.type.count))
        return context.get_dummy_value()

    return types.void(packed, types.intp, types.intp, tables, types.intp, weights), generate


def _look_16_up(builder: Any, table: Any, codes: Any) -> Any:
    name = LOOK_UP_INSTRUCTIONS.get(platform.machine())
    if name:
        kind = ir.FunctionType(BYTES, [BYTES, BYTES])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [table, codes])
    found = BYTES(ir.Undefined)
    for lane in map(ir.IntType(32), range(16)):
        found = builder.insert_element(found, builder.extract_element(table, builder.extract_element(codes, lane)), lane)
    return found


def _load_16(builder: Any, base: Any, position: Any) -> Any:
    vector = ir.VectorType(base.type.pointee, 16)
    return builder.load(builder.bitcast(builder.gep(base, [position]), vector.as_pointer()), align=1)


def _weave(builder: Any, evens: list[Any], odds: list[Any]) -> list[Any]:
    """Put the elements of two lists of vectors alternately into one list, of twice as many."""
    count = evens[0].type.count
    halves = [[start + place // 2 + count * (place % 2) for place in range(count)] for start in (0, count // 2)]
    orders = [ir.VectorType(ir.IntType(32), count)(half) for half in halves]
    return [builder.shuffle_vector(even, odd, order) for even, odd in zip(evens, odds, strict=True) for order in orders]


def _join(builder: Any, planes: list[list[Any]]) -> list[Any]:
    """Make whole numbers of their bytes: all lowest bytes are one plane, all second bytes the next, …"""
    if len(planes) == 1:
        return planes[0]
    vector = planes[0][0].type
    wider = ir.VectorType(ir.IntType(2 * vector.element.width), vector.count // 2)
    woven = [_weave(builder, low, high) for low, high in zip(planes[::2], planes[1::2], strict=True)]
    return _join(builder, [[builder.bitcast(half, wider) for half in plane] for plane in woven])
