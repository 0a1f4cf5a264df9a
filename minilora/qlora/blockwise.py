"""Blockwise 4-bit quantization in plain PyTorch, on any device: the reference that the kernels are tested against.

    absmax       the largest |weight| of a block, float32: the block's unit
    codes        indices 0..15 into the codebook; packed two to a byte, the first in the high nibble
    block_size   weights that share an absmax; blocks run over the flattened weight, across its rows

    weight ≈ codebook[code] · absmax[block]            [QLoRA] eq. 2

Bytes are those of bitsandbytes. Read before this file: numpy_lora/nf4, its oracle.
"""

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from minilora.cpu.products import is_in_one_piece
from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE, SMALLEST_UNIT
from minilora.qlora.codebooks import NF4, Codebook, dynamic_cells, dynamic_map, dynamic_thresholds

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class NestedAbsmax:
    """absmax itself in 8 bits: double quantization, [QLoRA] eq. 6."""

    codes: UInt8[Tensor, "blocks"]  # indices into dynamic_map
    absmax: Float32[Tensor, "nested"]  # one unit for every 256 of them
    offset: Float32[Tensor, ""]  # the mean, taken off first


@dataclass(frozen=True)
class Quantized:
    """A weight in 4 bits, with what is needed to read it."""

    packed: UInt8[Tensor, "bytes"]
    absmax: Float32[Tensor, "blocks"] | NestedAbsmax
    codebook: Codebook
    block_size: int
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """What it takes in memory, in bytes; the codebook's 64 are not counted."""
        nested = self.absmax
        units = [nested] if isinstance(nested, Tensor) else [nested.codes, nested.absmax, nested.offset]
        return sum(tensor.nbytes for tensor in [self.packed, *units])

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight takes, units included."""
        return 8 * self.n_bytes / math.prod(self.shape)

    @cached_property
    def lies_as_expected(self) -> bool:
        """Whether a CPU's kernel can read it: two axes, blocks of a usual size, every part whole and in one piece.

        Looked at once: the check takes longer than a small product, and nobody moves the parts of a weight.

        Raises:
            ValueError: if codes or units are missing.
        """
        check_complete(self)
        units, packed = self.absmax, self.packed
        bytes_ = (packed, units.codes) if isinstance(units, NestedAbsmax) else (packed,)
        floats = (units.absmax, units.offset) if isinstance(units, NestedAbsmax) else (units,)
        in_place = all(part.dtype == torch.uint8 and is_in_one_piece(part) for part in bytes_)
        in_place = in_place and all(part.dtype == torch.float32 and is_in_one_piece(part) for part in floats)
        return in_place and len(self.shape) == 2 and self.block_size in BLOCK_SIZES

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where a CPU's kernel finds what it reads, now.

        In this order: packed, codebook, absmax; codes, offset and dynamic map, or 0 each without double quantization.
        """
        units, (codebook, values) = self.absmax, self._tables
        packed = self.packed.data_ptr()
        if isinstance(units, NestedAbsmax):
            nested = units.absmax.data_ptr(), units.codes.data_ptr(), units.offset.data_ptr()
            return packed, codebook, *nested, values
        return packed, codebook, units.data_ptr(), 0, 0, 0

    @cached_property
    def _tables(self) -> tuple[int, int]:
        """Addresses of the codebook and the dynamic map: tensors that live as long as the process."""
        return self.codebook.table(self.packed.device).data_ptr(), dynamic_map(self.packed.device).data_ptr()

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # another process has its own tables


def quantize(
    w: Float[Tensor, "..."], codebook: Codebook = NF4, block_size: int = 64, *, double: bool = False
) -> Quantized:
    """Round every weight to the nearest codebook value in units of its block's absmax.

        weight ≈ codebook[code] · absmax[block]        [QLoRA] eq. 2

    The error of a weight is at most half the widest gap in the codebook times its absmax. A short last block is
    a block like the others. `double` keeps absmax in 8 bits: 4.127 bits a weight instead of 4.5 at a block size of 64.

    Raises:
        ValueError: if `block_size` is not one of BLOCK_SIZES, or `w` is empty or holds a NaN or an infinity.

    >>> quantize(torch.zeros(64)).packed.numel()  # bytes
    32
    """
    check_quantizable(w, block_size)
    flat = w.detach().float().reshape(-1)
    scaled, absmax = scale_blocks(flat, block_size)
    thresholds, order = codebook.sorted_by_value(w.device)
    even = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))  # the free nibble behind an odd count codes a 0
    places = torch.bucketize(even, thresholds)  # halfway between two, the lower
    packed = pack(order[places].to(torch.uint8))
    return Quantized(packed, double_quantize(absmax) if double else absmax, codebook, block_size, tuple(w.shape))


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Float[Tensor, "..."]:
    """Turn 4 bits back into weights: one product in float32, then one rounding to `dtype`.

    weight = codebook[code] · absmax[block]            [QLoRA] eq. 2
    """
    count = math.prod(quantized.shape)
    codes = unpack(quantized.packed, count).int()
    values = quantized.codebook.table(codes.device)[codes]
    units = block_units(quantized).repeat_interleave(quantized.block_size)[:count]
    return (values * units).to(dtype).reshape(quantized.shape)


def double_quantize(absmax: Float32[Tensor, "blocks"]) -> NestedAbsmax:
    """Quantize the units themselves: 8 bits each, in blocks of 256, around their mean.

    code = nearest((absmax − offset) / absmax₂)        [QLoRA] eq. 6
    """
    offset = absmax.mean()
    codes, units = encode_8bit(absmax - offset)
    return NestedAbsmax(codes, units, offset)


def double_dequantize(nested: NestedAbsmax) -> Float32[Tensor, "blocks"]:
    """Turn 8-bit units back into float32 ones.

    absmax′ = map[code] · absmax₂ + offset
    """
    return decode_8bit(nested.codes, nested.absmax) + nested.offset


def encode_8bit(
    flat: Float32[Tensor, "n"], *, signed: bool = True
) -> tuple[UInt8[Tensor, "n"], Float32[Tensor, "blocks"]]:
    """Round numbers to the nearest value of the dynamic map in units of their block's absmax, in blocks of 256.

    code = nearest(number / absmax[block])             [8bit] section 2.1
    """
    scaled, absmax = scale_blocks(flat, NESTED_BLOCK_SIZE)
    cells = scaled.view(torch.int32) >> 16 & 0xFFFF
    codes = dynamic_cells(flat.device, signed=signed).index_select(0, cells)  # right, or one too low
    thresholds = dynamic_thresholds(flat.device, signed=signed).index_select(0, codes.int())
    return codes + (scaled > thresholds), absmax


def decode_8bit(
    codes: UInt8[Tensor, "n"], absmax: Float32[Tensor, "blocks"], *, signed: bool = True
) -> Float32[Tensor, "n"]:
    """Turn 8-bit codes back into numbers.

    number ≈ map[code] · absmax[block]                 [8bit] section 2.1
    """
    values = dynamic_map(codes.device, signed=signed).index_select(0, codes.int())
    return values.mul_(absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: codes.numel()])


def block_units(quantized: Quantized) -> Float32[Tensor, "blocks"]:
    """Give every block's absmax as float32, whether it is stored so or in 8 bits."""
    return quantized.absmax if isinstance(quantized.absmax, Tensor) else double_dequantize(quantized.absmax)


def pack(codes: UInt8[Tensor, "codes"]) -> UInt8[Tensor, "bytes"]:
    """Put two codes into each byte, the first in the high nibble."""
    return codes[0::2] << 4 | codes[1::2]


def unpack(packed: UInt8[Tensor, "bytes"], count: int) -> UInt8[Tensor, "n"]:
    """Take `count` codes out of their bytes again."""
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:count]


def scale_blocks(flat: Float32[Tensor, "n"], block_size: int) -> tuple[Float32[Tensor, "n"], Float32[Tensor, "blocks"]]:
    """Measure every number in units of its block's absmax; return these, in [−1, 1], and the units."""
    count = flat.numel()
    blocks = torch.nn.functional.pad(flat, (0, -count % block_size)).reshape(-1, block_size)
    absmax = blocks.abs().amax(dim=1)  # (blocks,)
    inverse = 1 / absmax.clamp(min=float(SMALLEST_UNIT))  # an all-zero block has no unit of its own
    return (blocks * inverse[:, None]).clamp(-1, 1).reshape(-1)[:count], absmax


def check_quantizable(w: Float[Tensor, "..."] | Int[Tensor, "..."], block_size: int) -> None:
    """Refuse what 4 bits cannot hold, before anything is made.

    Raises:
        ValueError: as quantize.
    """
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size is {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))} weights")
    if w.numel() == 0:
        raise ValueError(f"there are no weights to quantize: the tensor's shape is {tuple(w.shape)}")
    # The sum is finite only if all are (or it overflows: then look again); it is the cheapest pass over the weight.
    if torch.isfinite(w.sum(dtype=torch.float32)):
        return
    bad = (~torch.isfinite(w.float())).nonzero()
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {w.numel()} weights are NaN or infinite, the first at {tuple(bad[0].tolist())}: "
            "4 bits cannot hold them; repair the weight first"
        )


def check_complete(quantized: Quantized) -> None:
    """Refuse a weight whose parts are too short for its shape, as a damaged file's: a kernel would read beyond them.

    Raises:
        ValueError: if codes or units are missing, or too many.
    """
    count, nested = math.prod(quantized.shape), quantized.absmax
    n_blocks = -(-count // quantized.block_size)
    if isinstance(nested, Tensor):
        expected: tuple[int, ...] = (-(-count // 2), n_blocks)
        found: tuple[int, ...] = (quantized.packed.numel(), nested.numel())
    else:
        expected = (-(-count // 2), n_blocks, -(-n_blocks // NESTED_BLOCK_SIZE), 1)
        parts = (quantized.packed, nested.codes, nested.absmax, nested.offset)
        found = tuple(part.numel() for part in parts)
    if found != expected:
        names = ("bytes of codes", "units", "units of units", "offsets")
        needs, has = (dict(zip(names, numbers, strict=False)) for numbers in (expected, found))
        raise ValueError(f"a weight of shape {quantized.shape} needs {needs}; this one has {has}: load it again")
