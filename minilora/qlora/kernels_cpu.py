"""Numba kernels: being written."""

from minilora.qlora.blockwise import dequantize, quantize

__all__ = ["dequantize", "quantize"]
