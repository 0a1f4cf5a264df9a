"""Layer 3: LoRA over a frozen weight in 4 bits, on a GPU; and the same results without one.

Read codebooks, blockwise, linear, fast, and then a kernel; and for the optimizer moments, paging, paged_adamw.
"""

from minilora.qlora.blockwise import Quantized
from minilora.qlora.codebooks import FP4, INT4, NF4, Codebook
from minilora.qlora.fast import dequantize, quantize
from minilora.qlora.linear import NF4Linear, QLoRALinear
from minilora.qlora.paged_adamw import PagedAdamW

__all__ = [
    "FP4",
    "INT4",
    "NF4",
    "Codebook",
    "NF4Linear",
    "PagedAdamW",
    "QLoRALinear",
    "Quantized",
    "dequantize",
    "quantize",
]
