"""Where NF4's sixteen numbers come from, and what four bits do to a weight, on NumPy arrays.

    absmax      the largest |weight| of a block: the block's unit          (blocks,)
    codebook    16 sorted values in [−1, 1]                                (16,)
    codes       indices 0..15 into it, one a weight
    packed      two codes a byte, the first in the high nibble
    block_size  weights that share an absmax; blocks run over the flattened array, across its rows

    weight ≈ codebook[code] · absmax[block]            [QLoRA] eq. 2

Double quantization stores absmax itself in 8 bits: see double_quantize. All arithmetic is float32, in the order
that bitsandbytes uses, so that the bytes are the same. Read before this file: nothing.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Shaped, UInt8
from numpy import ndarray

TAIL = 0.9677083  # the outermost quantile: bitsandbytes' own constant, near ½[(1 − 1/32) + (1 − 1/30)]
SMALLEST_UNIT = np.float32(1e-38)  # below it 1 / absmax overflows; bitsandbytes clamps there too
NESTED_BLOCK_SIZE = 256  # absmax values that share a unit in double quantization


def linspace32(start: float, stop: float, count: int) -> Float32[ndarray, "count"]:
    """Space `count` numbers evenly as torch.linspace does in float32: from both ends, each rounded once.

    (NumPy's linspace counts from one end, and differs in the last bit. The float64 sum here is the exact value of
    torch's fused multiply-add before its rounding to float32.)
    """
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


def nf4_codebook() -> Float32[ndarray, "16"]:
    """Derive NF4: the quantiles of a normal distribution, halved at zero so that zero is exact.

        8 positive values   Q(p), p from TAIL down to ½ in 8 steps, the end left out
        7 negative values  −Q(p), p from TAIL down to ½ in 7 steps, the end left out
        and 0; all divided by the largest                      [QLoRA] section 3

    Q is the inverse of the normal distribution function. The sixteen values equal bitsandbytes' table, bit for bit.

    >>> codebook = nf4_codebook()
    >>> float(codebook[0]), float(codebook[7]), float(codebook[15])
    (-1.0, 0.0, 1.0)
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(float(p)) for p in linspace32(TAIL, 0.5, 9)[:-1]]
    negative = [-quantile(float(p)) for p in linspace32(TAIL, 0.5, 8)[:-1]]
    values = np.sort(np.array([*negative, 0.0, *positive], dtype=np.float32))
    return values / values.max()


def dynamic_map(*, signed: bool = True) -> Float32[ndarray, "256"]:
    """Derive the 256 values in which absmax is kept under double quantization, and an optimizer's moments in 8 bits.

    Seven decades from 10⁻⁶ to 1, each twice as finely divided as the one below it (1, 2, 4 … 64 intervals of
    [0.1, 1], their midpoints), with either sign; then 0 and 1.          [8bit] section 2.1: "dynamic tree"

    The QLoRA paper says FP8; its authors' code, and so every 4-bit checkpoint, has this map. It has 127 negative
    values, a zero and 128 positive ones. What is never negative needs no sign: without it every decade has twice as
    many intervals.
    """
    values = [np.float32(0), np.float32(1)]
    for decade in range(7):
        bounds = linspace32(0.1, 1, 2**decade * (1 if signed else 2) + 1)
        middles = np.float32(10.0 ** (decade - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*middles, *-middles] if signed else [*middles]
    return np.sort(np.array(values, dtype=np.float32))


def nearest(x: Float32[ndarray, "..."], codebook: Float32[ndarray, "size"]) -> UInt8[ndarray, "..."]:
    """Find the index of the nearest value of a sorted codebook; halfway between two, the lower."""
    middles = (codebook[:-1] + codebook[1:]) / np.float32(2)
    return np.searchsorted(middles, x, side="left").astype(np.uint8)


def pack(codes: UInt8[ndarray, "codes"]) -> UInt8[ndarray, "bytes"]:
    """Put two codes into each byte, the first in the high nibble.

    Raises:
        ValueError: if the number of codes is odd.

    >>> [hex(byte) for byte in pack(np.array([1, 2, 15, 0], dtype=np.uint8))]
    ['0x12', '0xf0']
    """
    if codes.size % 2:
        raise ValueError(f"cannot pack {codes.size} codes two to a byte: add one that is left out after unpacking")
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: UInt8[ndarray, "bytes"], count: int) -> UInt8[ndarray, "count"]:
    """Take `count` codes out of their bytes again."""
    return np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:count]


def quantize(
    w: Float32[ndarray, "..."], block_size: int = 64
) -> tuple[UInt8[ndarray, "bytes"], Float32[ndarray, "blocks"]]:
    """Round every weight to the nearest NF4 value in units of its block's absmax; return packed codes and absmax.

        code = nearest(w · (1 / absmax))

    The error of a weight is at most half the widest gap of the codebook times its absmax. A short last block is
    a block like the others.

    Raises:
        ValueError: if `block_size` is below 1, or `w` is empty or holds a NaN or an infinity (says where).

    >>> packed, absmax = quantize(np.array([0.5, -1.0, 0.0, 2.0], dtype=np.float32), block_size=2)
    >>> absmax
    array([1., 2.], dtype=float32)
    """
    flat = np.ascontiguousarray(w).reshape(-1)
    absmax = _block_absmax(flat, block_size)
    unit = np.float32(1) / np.maximum(absmax, SMALLEST_UNIT)
    scaled = np.clip(flat * np.repeat(unit, block_size)[: flat.size], np.float32(-1), np.float32(1))
    even = np.pad(scaled, (0, flat.size % 2))  # the free nibble behind an odd count holds the code of 0
    return pack(nearest(even, nf4_codebook())), absmax


def dequantize(
    packed: UInt8[ndarray, "bytes"], absmax: Float32[ndarray, "blocks"], shape: tuple[int, ...], block_size: int = 64
) -> Float32[ndarray, "..."]:
    """Turn packed codes back into weights.

    weight = codebook[code] · absmax[block]        [QLoRA] eq. 2
    """
    count = math.prod(shape)
    values = nf4_codebook()[unpack(packed, count)]
    return (values * np.repeat(absmax, block_size)[:count]).reshape(shape)


class NestedAbsmax(NamedTuple):
    """absmax in 8 bits: what double_quantize makes of it."""

    codes: UInt8[ndarray, "blocks"]  # indices into dynamic_map()
    absmax: Float32[ndarray, "nested"]  # one unit for every 256 of them
    offset: Shaped[np.float32, ""]  # the mean, taken off first so that the rest has both signs


def double_quantize(absmax: Float32[ndarray, "blocks"], offset: float | None = None) -> NestedAbsmax:
    """Quantize the units themselves: 8 bits each, in blocks of 256, around their mean.

        code = nearest((absmax − offset) · (1 / absmax₂))           [QLoRA] eq. 6

    Bits a weight for blocks of 64: 32/64 = 0.5 before, 8/64 + 32/(64·256) = 0.127 after. `offset` is the mean
    unless it is given (torch's mean and NumPy's differ in the last bit, and the offset moves every code).
    """
    middle = np.float32(absmax.mean() if offset is None else offset)
    centred = absmax - middle
    units = _block_absmax(centred, NESTED_BLOCK_SIZE)
    inverse = np.float32(1) / np.maximum(units, SMALLEST_UNIT)
    scaled = centred * np.repeat(inverse, NESTED_BLOCK_SIZE)[: centred.size]
    return NestedAbsmax(nearest(np.clip(scaled, np.float32(-1), np.float32(1)), dynamic_map()), units, middle)


def double_dequantize(nested: NestedAbsmax) -> Float32[ndarray, "blocks"]:
    """Turn 8-bit units back into float32 ones.

    absmax′ = map[code] · absmax₂ + offset
    """
    units = np.repeat(nested.absmax, NESTED_BLOCK_SIZE)[: nested.codes.size]
    return dynamic_map()[nested.codes] * units + nested.offset


def _block_absmax(flat: Float32[ndarray, "n"], block_size: int) -> Float32[ndarray, "blocks"]:
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: it counts weights, so choose a power of two such as 64")
    if flat.size == 0:
        raise ValueError("there are no weights to quantize: the array is empty")
    bad = np.flatnonzero(~np.isfinite(flat))
    if bad.size:
        raise ValueError(
            f"{bad.size} of {flat.size} weights are NaN or infinite, the first at flat index {bad[0]}: "
            "4 bits cannot hold them; repair the weight first"
        )
    padded = np.pad(np.abs(flat), (0, -flat.size % block_size))
    return padded.reshape(-1, block_size).max(axis=1)
