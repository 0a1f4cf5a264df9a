"""The Triton kernel that multiplies by a weight in 4 bits: a tile of W is decoded in registers, and W is never written.

    group    neighbours in a row that are sure to share a unit: gcd(in, block_size, 128). Blocks run over the flattened
             weight and can straddle rows; a group cannot
    parts    the terms of a sum are shared out among programs; a second kernel adds what they found, always in one order

We have not run it on a GPU. What to expect for a 4096 × 4096 bfloat16 product, by counting, in µs on an H100 and an
A100: from the longest of bytes, instructions and operations to their sum, with no help from a cache (3.35 and 2.04
TB/s; 3.0 and 1.95 · 10¹³ instructions a second; 989 and 312 · 10¹² operations a second).

    rows of x    bytes: W + x, once a tile + parts    instructions a weight    H100, A100     dequantize, then cuBLAS
    1            8.7 + 1.0 + 0.1 MB                   at most 13               7-11, 11-18    23, 37
    16           8.7 + 16.8 + 2.1 MB                  at most 13               8-16, 13-26    23, 37
    64           8.7 + 33.6 + 8.4 MB                  at most 18               15-27, 25-47   23, 37
    2048         32 times as much                     32 · 18                  322-, 496-     82, 241

Up to 16 rows its worst count is below the other's best, so fast.linear takes it there. Decoding is its bound (memory
would be at 5 instructions a weight), once for every tile of x. The other's is memory: dequantize 42 MB, cuBLAS 34.
"""

from __future__ import annotations  # without Triton there is no tl to look a signature's names up in

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE
from minilora.qlora import kernels_gpu
from minilora.qlora.blockwise import BLOCK_SIZES, Quantized, check_complete
from minilora.qlora.kernels_gpu import check_runnable, jit, launching_on, stored_units

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

COLUMNS = 128  # of W in a tile: 64 bytes a row, two of memory's sectors
LEAST_GROUP = 16  # weights: in_features is a multiple of it in all models we know
ADDED_A_PROGRAM = 1024  # numbers of the result, where parts are added


@dataclass(frozen=True)
class Tiling:
    """How the work is cut up."""

    x_rows: int
    w_rows: int
    programs: int  # where y has fewer tiles, its sums are shared out among so many
    num_warps: int
    registers: int  # at most, a thread; left alone, the compiler took fewer and spilled some


FEW_ROWS = Tiling(x_rows=16, w_rows=32, programs=512, num_warps=4, registers=96)  # tensor cores take 16 rows at once
MANY_ROWS = Tiling(x_rows=64, w_rows=64, programs=256, num_warps=8, registers=192)


def linear(
    x: Float[Tensor, "*n in"], quantized: Quantized, bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*n out"]:
    """Multiply by a weight in 4 bits: F.linear(x, dequantize(quantized, x.dtype), bias), but W is never whole.

        y = x Wᵀ + bias,  W = codebook[code] · absmax[block]          [QLoRA] eq. 5, its first term

    The weights are those of dequantize, bit for bit; sums are float32. Where in_features is no multiple of 16 (an odd
    one would put weights of two rows into a byte), or the block size one that only a file can have, it is dequantize
    and a product. No gradients flow: NF4Linear gives them.

    Raises:
        ImportError: if Triton is not installed.
        TypeError: if x is not float16, bfloat16 or float32, or the bias has another dtype.
        ValueError: if shapes or devices do not fit, the weight is not on a CUDA device (and Triton does not
            interpret: TRITON_INTERPRET=1), or codes or units are missing.
    """
    _check(x, quantized, bias, axis=1)
    if not _has_kernel(quantized):
        return F.linear(x, kernels_gpu.dequantize(quantized, x.dtype), bias)
    return _product(x, quantized, bias, backward=False)


def linear_backward(dy: Float[Tensor, "*n out"], quantized: Quantized) -> Float[Tensor, "*n in"]:
    """Multiply a gradient by the same bytes: dy @ dequantize(quantized, dy.dtype), but W is never whole.

        dx = dy W

    Raises:
        ImportError, TypeError, ValueError: as linear.
    """
    _check(dy, quantized, None, axis=0)
    if not _has_kernel(quantized):
        return dy @ kernels_gpu.dequantize(quantized, dy.dtype)
    return _product(dy, quantized, None, backward=True)


def tiling_for(n_rows: int) -> Tiling:
    """Choose the tiles for so many rows of x."""
    return FEW_ROWS if n_rows <= FEW_ROWS.x_rows else MANY_ROWS


def _has_kernel(quantized: Quantized) -> bool:
    return quantized.shape[1] % LEAST_GROUP == 0 and quantized.block_size in BLOCK_SIZES


def _check(x: Tensor, quantized: Quantized, bias: Tensor | None, axis: int) -> None:
    check_runnable(_multiply_parts, quantized.packed.device, "minilora.qlora.NF4Linear")
    check_complete(quantized)
    if len(quantized.shape) != 2:
        raise ValueError(f"the weight's shape is {quantized.shape}: only one of two axes, (out, in), can be multiplied")
    width, out_features = quantized.shape[axis], quantized.shape[0]
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"x of shape {tuple(x.shape)} does not fit a weight of shape {quantized.shape}: "
            f"its last axis must be {width}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"the bias has shape {tuple(bias.shape)}: this weight needs ({out_features},)")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"x is {x.dtype}: the kernel multiplies float16, bfloat16 and float32; cast x to one of them")
    if bias is not None and bias.dtype != x.dtype:
        raise TypeError(f"x is {x.dtype} and the bias {bias.dtype}: cast one to the other's")
    devices = {tensor.device for tensor in (x, quantized.packed, bias) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(f"x, weight and bias lie on {sorted(map(str, devices))}: move them to one device")


def _product(x: Tensor, quantized: Quantized, bias: Tensor | None, *, backward: bool) -> Tensor:
    out_features, in_features = quantized.shape
    width = in_features if backward else out_features  # of the result
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(len(rows), width, dtype=x.dtype, device=x.device)
    if not len(rows):
        return y.reshape(*x.shape[:-1], width)
    tiling, group = tiling_for(len(rows)), math.gcd(in_features, quantized.block_size, COLUMNS)
    y_tile, step = (COLUMNS, tiling.w_rows) if backward else (tiling.w_rows, COLUMNS)
    tiles = triton.cdiv(width, y_tile), triton.cdiv(len(rows), tiling.x_rows)
    n_parts = max(1, min(triton.cdiv(rows.shape[1], step), tiling.programs // math.prod(tiles)))
    parts = torch.empty(n_parts, *y.shape, device=x.device)  # float32
    with launching_on(x.device):
        _multiply_parts[(*tiles, n_parts)](
            rows,
            quantized.packed.contiguous(),
            *stored_units(quantized),
            quantized.codebook.table(x.device),
            parts,
            len(rows),
            out_features,
            in_features,
            BACKWARD=backward,
            X_ROWS=tiling.x_rows,
            W_ROWS=tiling.w_rows,
            COLUMNS=COLUMNS,
            GROUP=group,
            GROUPS_A_BLOCK=quantized.block_size // group,
            NESTED_BLOCK_SIZE=NESTED_BLOCK_SIZE,
            UPCAST=not isinstance(_multiply_parts, triton.JITFunction),
            **compile_options(tiling),
        )
        _add_parts[(triton.cdiv(y.numel(), ADDED_A_PROGRAM),)](
            parts, bias, y, n_parts, y.numel(), width, TILE=ADDED_A_PROGRAM
        )
    return y.reshape(*x.shape[:-1], width)


def compile_options(tiling: Tiling) -> dict[str, int | bool]:
    """Say how Triton compiles: a unit is rounded before its offset is added; other programs hide a load's delay."""
    return {"num_warps": tiling.num_warps, "maxnreg": tiling.registers, "num_stages": 1, "enable_fp_fusion": False}


@jit
def _multiply_parts(
    x,  # (n_rows, in), or its gradient's (n_rows, out)
    packed,
    absmax,  # float32, or 8 bits with the next three
    nested_absmax,
    offset,
    nested_values,
    values,
    parts,
    n_rows,
    out_features,
    in_features,
    BACKWARD: tl.constexpr,
    X_ROWS: tl.constexpr,
    W_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS_A_BLOCK: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    UPCAST: tl.constexpr,  # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
):
    Y_TILE: tl.constexpr = COLUMNS if BACKWARD else W_ROWS
    STEP: tl.constexpr = W_ROWS if BACKWARD else COLUMNS
    x_width, y_width = (out_features, in_features) if BACKWARD else (in_features, out_features)
    m = tl.program_id(1).to(tl.int64) * X_ROWS + tl.arange(0, X_ROWS)
    n_start, part = tl.program_id(0) * Y_TILE, tl.program_id(2)
    n = n_start + tl.arange(0, Y_TILE)
    total = tl.full((X_ROWS, Y_TILE), 0, tl.float32)
    for k_start in range(part * STEP, x_width, tl.num_programs(2) * STEP):
        k = k_start + tl.arange(0, STEP)
        x_mask = (m < n_rows)[:, None] & (k < x_width)[None, :]
        x_tile = tl.load(x + m[:, None] * x_width + k[None, :], mask=x_mask, other=0)
        row, column = (k, n_start) if BACKWARD else (n, k_start)
        group = column // GROUP + tl.arange(0, COLUMNS // GROUP)
        groups_a_row = in_features // GROUP
        in_weight = (row < out_features)[:, None] & (group < groups_a_row)[None, :]
        place = row.to(tl.int64)[:, None] * groups_a_row + group[None, :]  # (W_ROWS, groups), in the flattened weight
        block = place // GROUPS_A_BLOCK
        unit = tl.load(absmax + block, mask=in_weight, other=0)
        if nested_absmax is not None:
            nested_unit = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=in_weight, other=0)
            unit = tl.load(nested_values + unit) * nested_unit + tl.load(offset)
        byte = place[:, :, None] * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, None, :]
        pair = tl.load(packed + byte, mask=in_weight[:, :, None], other=0)
        high = tl.load(values + (pair >> 4)) * unit[:, :, None]
        low = tl.load(values + (pair & 15)) * unit[:, :, None]
        w_tile = tl.join(high, low).to(x.dtype.element_ty).reshape(W_ROWS, COLUMNS)
        if UPCAST:
            x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
        total = tl.dot(x_tile, w_tile if BACKWARD else w_tile.trans(), total, input_precision="ieee")
    y_place = (part * n_rows + m)[:, None] * y_width + n[None, :]
    tl.store(parts + y_place, total, mask=(m < n_rows)[:, None] & (n < y_width)[None, :])


@jit
def _add_parts(parts, bias, y, n_parts, count, width, TILE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.full((TILE,), 0, tl.float32)
    for part in range(n_parts):
        total += tl.load(parts + part * count + place, mask=place < count, other=0)  # in one order: the bits repeat
    if bias is not None:
        total += tl.load(bias + place % width, mask=place < count, other=0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=place < count)
