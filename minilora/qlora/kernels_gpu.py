"""The Triton kernel that turns 4 bits back into weights on a GPU; blockwise has its readable twin and its meaning.

We have not run it on a GPU. In Triton's interpreter it is exact against the reference, and it compiles ahead of time
for sm_80 and sm_90, without spills; tests/gpu is ready for who has a card. What to expect there, by counting:

    bytes a weight    ½ of codes; 4/64 of float32 units, or 1/64 + 4/16384 of 8-bit ones; 2 of result in bfloat16
    4096 × 4096       42.2 MB with 8-bit units: 12.6 µs at an H100's 3.35 TB/s, 20.7 µs at an A100's 2.04 TB/s
    instructions      at most 14 a weight: 8 µs and 12 µs, if these cards start 3.0 and 1.95 · 10¹³ a second. So
                      memory is the bound

8-bit units are undone inside the kernel: one lookup, product and sum a block. Undone before it they would be written
and read again as float32, 0.125 byte a weight. A short last block is left to the reference.
"""

from __future__ import annotations  # without Triton there is no tl to look a signature's names up in

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE
from minilora.qlora import blockwise
from minilora.qlora.blockwise import BLOCK_SIZES, Quantized, block_units, check_complete
from minilora.qlora.codebooks import dynamic_map

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

BYTES_A_PROGRAM = 512  # of packed codes: 4 a thread, which then stores its 16 bytes of bfloat16 at once
COMPILE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # a unit is rounded before its offset is added


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn 4 bits back into weights: blockwise.dequantize, in one kernel.

        weight = codebook[code] · absmax[block]        [QLoRA] eq. 2

    Raises:
        ImportError: if Triton is not installed.
        ValueError: if the weight is not on a CUDA device (and Triton does not interpret: TRITON_INTERPRET=1),
            or codes or units are missing.
    """
    packed, block_size = quantized.packed.contiguous(), quantized.block_size
    check_runnable(_dequantize_blocks, packed.device, "minilora.qlora.dequantize")
    check_complete(quantized)
    if block_size not in BLOCK_SIZES:
        return blockwise.dequantize(quantized, dtype)
    n_blocks, rest = divmod(math.prod(quantized.shape), block_size)
    weights = torch.empty(n_blocks * block_size + rest, dtype=dtype, device=packed.device)
    blocks_a_program = max(1, 2 * BYTES_A_PROGRAM // block_size)
    if n_blocks:
        with launching_on(packed.device):
            _dequantize_blocks[(triton.cdiv(n_blocks, blocks_a_program),)](
                packed,
                *stored_units(quantized),
                quantized.codebook.table(packed.device),
                weights,
                n_blocks,
                HALF=block_size // 2,
                BLOCKS=blocks_a_program,
                NESTED_BLOCK_SIZE=NESTED_BLOCK_SIZE,
                **COMPILE_OPTIONS,
            )
    if rest:
        units = block_units(quantized)[n_blocks:]
        last = Quantized(packed[n_blocks * block_size // 2 :], units, quantized.codebook, block_size, (rest,))
        weights[-rest:] = blockwise.dequantize(last, dtype)
    return weights.reshape(quantized.shape)


def check_runnable(kernel: object, device: torch.device, instead: str) -> None:
    """Refuse to start a kernel where there is none, or where it cannot run.

    Raises:
        ImportError, ValueError: as dequantize.
    """
    if triton is None:
        raise ImportError("Triton is not installed: pip install triton (CUDA builds of torch bring it)")
    if device.type != "cuda" and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"Triton's kernel runs on a CUDA device and this weight is on {device}: move it there, "
            f"or use {instead}, which takes the fastest way for every device"
        )


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a card the current one for a while: Triton starts its kernels there, wherever their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stored_units(quantized: Quantized) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Give absmax as it is stored, and what is needed to read it: 8-bit units have their own units, offset and map."""
    nested = quantized.absmax
    if isinstance(nested, Tensor):
        return nested, None, None, None
    return nested.codes, nested.absmax, nested.offset, dynamic_map(nested.codes.device)


def jit(kernel):  # type: ignore[no-untyped-def]
    """Make a kernel of a function; without Triton, leave it."""
    return kernel if triton is None else triton.jit(kernel)


@jit
def _dequantize_blocks(
    packed,
    absmax,  # float32, or 8 bits with the next three
    nested_absmax,
    offset,
    nested_values,
    values,
    weights,
    n_blocks,
    HALF: tl.constexpr,  # bytes a block
    BLOCKS: tl.constexpr,  # blocks a program
    NESTED_BLOCK_SIZE: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    is_block = block < n_blocks
    unit = tl.load(absmax + block, mask=is_block, other=0)  # (BLOCKS,)
    if nested_absmax is not None:
        nested_unit = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=is_block, other=0)
        unit = tl.load(nested_values + unit) * nested_unit + tl.load(offset)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed + byte, mask=is_block[:, None], other=0)  # (BLOCKS, HALF)
    high = tl.load(values + (pair >> 4)) * unit[:, None]
    low = tl.load(values + (pair & 15)) * unit[:, None]
    both = tl.join(high, low).reshape(BLOCKS, 2 * HALF)
    place = block[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(weights + place, both.to(weights.dtype.element_ty), mask=is_block[:, None])
