"""quantize, dequantize and multiply by the fastest way for a tensor's device; blockwise has the readable twins.

CPU    Numba kernels, kernels_cpu; products of many rows through floats, of few rows in 4 bits: with AMX matmul_tiles,
       whose weights are rounded to bfloat16 as those of many rows are, elsewhere matmul_cpu, whose weights are not
CUDA   dequantize by Triton, kernels_gpu; quantize (once a weight) by the reference; products of few rows by Triton
       in 4 bits, matmul_gpu, of many through floats
other  the reference
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minilora.cpu.products import product
from minilora.cpu.wide import compute_dtype
from minilora.qlora import blockwise
from minilora.qlora.blockwise import Quantized
from minilora.qlora.codebooks import NF4, Codebook

MOST_ROWS_IN_4_BITS = 16  # the table in matmul_gpu: counted at its worst, still faster than the other at its best


def quantize(w: Tensor, codebook: Codebook = NF4, block_size: int = 64, *, double: bool = False) -> Quantized:
    """Round every weight to the nearest codebook value in units of its block's absmax: blockwise.quantize, fast.

    Raises:
        ValueError: as blockwise.quantize.
    """
    if w.device.type == "cpu":
        from minilora.qlora import kernels_cpu

        return kernels_cpu.quantize(w, codebook, block_size, double=double)
    return blockwise.quantize(w, codebook, block_size, double=double)


def dequantize(quantized: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn 4 bits back into weights: blockwise.dequantize, fast.

    Raises:
        ValueError: for a dtype that holds no fractions.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"weights are fractions, which {dtype} does not hold: choose a floating-point dtype")
    if quantized.packed.device.type == "cpu":
        from minilora.qlora import kernels_cpu

        return kernels_cpu.dequantize(quantized, dtype)
    if quantized.packed.device.type == "cuda":
        from minilora.qlora import kernels_gpu

        return kernels_gpu.dequantize(quantized, dtype)
    return blockwise.dequantize(quantized, dtype)


def linear(x: Tensor, quantized: Quantized, bias: Tensor | None = None) -> Tensor:
    """Multiply by a weight in 4 bits: x Wᵀ + bias. No gradients: NF4Linear gives them."""
    if x.device.type == "cpu":
        from minilora.qlora import matmul_cpu, matmul_tiles

        for few in (matmul_tiles, matmul_cpu):
            if few.fits(x, quantized):
                return few.linears(x, [(quantized, bias)])[0]
    if multiplies_in_4_bits(x):
        from minilora.qlora import matmul_gpu

        return matmul_gpu.linear(x, quantized, bias)
    return product(x, dequantize(quantized, compute_dtype(x, *quantized.shape)).T, bias)


def linears(x: Tensor, layers: Sequence[tuple[Quantized, Tensor | None]]) -> list[Tensor]:
    """Give x Wᵀ + bias for each (W, bias), in one go where that is faster. No gradients."""
    if x.device.type == "cpu":
        from minilora.qlora import matmul_cpu, matmul_tiles

        weights = [W for W, _ in layers]
        if matmul_tiles.fits(x, *weights):
            return matmul_tiles.linears(x, layers)
        if matmul_cpu.fits(x, *weights) and not any(matmul_tiles.fits(x, W) for W in weights):
            return matmul_cpu.linears(x, layers)  # or a weight would be rounded alone, and not among others
    return [linear(x, W, bias) for W, bias in layers]


def linear_backward(dy: Tensor, quantized: Quantized) -> Tensor:
    """Multiply a gradient by a weight in 4 bits: dy W."""
    if multiplies_in_4_bits(dy):
        from minilora.qlora import matmul_gpu

        return matmul_gpu.linear_backward(dy, quantized)
    return product(dy, dequantize(quantized, compute_dtype(dy, *quantized.shape)))


def multiplies_in_4_bits(x: Tensor) -> bool:
    """Decide whether a product with these rows goes without floats of the whole weight on a GPU."""
    few = x.shape[:-1].numel() <= MOST_ROWS_IN_4_BITS
    return few and x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
