"""The Triton kernel that turns 4 bits back into weights on a GPU; blockwise has its readable twin and its meaning."""

import math

import torch
from torch import Tensor

from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE
from minilora.qlora import blockwise
from minilora.qlora.blockwise import BLOCK_SIZES, NestedAbsmax, Quantized
from minilora.qlora.codebooks import dynamic_map

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BYTES_A_TILE = 1024  # of packed codes; one program decodes a tile: a few small blocks, or a part of a large one


@triton.jit
def _dequantize_kernel(
    packed, absmax, nested_absmax, offset, nested_values, values, weights, count,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, NESTED: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr,
):
    HALF: tl.constexpr = BLOCK_SIZE // 2
    BLOCKS: tl.constexpr = TILE // HALF
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block * BLOCK_SIZE < count
    if NESTED:
        code = tl.load(absmax + block, mask=is_block, other=0)
        unit = tl.load(nested_values + code) * tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=is_block, other=0)
        unit += tl.load(offset)
    else:
        unit = tl.load(absmax + block, mask=is_block, other=0)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + byte, mask=2 * byte < count, other=0)
    even = tl.load(values + (pair >> 4)) * unit[:, None]
    odd = tl.load(values + (pair & 15)) * unit[:, None]
    both = tl.join(even, odd)
    place = 2 * byte[:, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(weights + place, both.to(weights.dtype.element_ty), mask=place < count)
