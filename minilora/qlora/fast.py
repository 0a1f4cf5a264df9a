"""quantize and dequantize by the fastest way for a tensor's device; blockwise has their readable twins and meaning.

CPU    Numba kernels, kernels_cpu
CUDA   dequantize by Triton, kernels_gpu; quantize (once a weight) by the reference
other  the reference
"""

import torch
from torch import Tensor

from minilora.qlora import blockwise
from minilora.qlora.blockwise import Quantized
from minilora.qlora.codebooks import NF4, Codebook


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
    """Turn 4 bits back into weights: blockwise.dequantize, fast."""
    if quantized.packed.device.type == "cpu":
        from minilora.qlora import kernels_cpu

        return kernels_cpu.dequantize(quantized, dtype)
    if quantized.packed.device.type == "cuda":
        from minilora.qlora import kernels_gpu

        return kernels_gpu.dequantize(quantized, dtype)
    return blockwise.dequantize(quantized, dtype)
