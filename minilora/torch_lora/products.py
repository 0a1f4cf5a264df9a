"""A product with a frozen weight, in two halves where torch would leave cores idle.

On a CPU oneDNN multiplies 16-bit floats for torch. It cuts a product into pieces of a size that it chooses by the
shape, and a core takes a piece; for some hundreds of rows and a narrow result it makes one piece. On two cores,
1,536 → 576 in bfloat16, 1,024 rows go at 0.31 TFLOP/s, and twice 512 at 0.54 (benchmarks/products.py). Three quarters
of a training step's arithmetic is such products for a model of SmolLM2-135M's width.
"""

import torch
from jaxtyping import Float
from torch import Tensor

ONE_PIECE_ROWS = range(513, 1281)  # seen with oneDNN 3; at other sizes two halves are the slower way
ONE_PIECE_FEATURES = range(385, 1025)


def product(
    x: Float[Tensor, "*n in"], W: Float[Tensor, "in out"], bias: Float[Tensor, "out"] | None = None
) -> Float[Tensor, "*n out"]:
    """Compute x W + bias. No gradients: call it where autograd does not look."""
    rows = x.reshape(-1, x.shape[-1])
    y = x.new_empty(len(rows), W.shape[1])
    pieces = 2 if is_one_piece(rows, W) else 1
    for part, result in zip(rows.chunk(pieces), y.chunk(pieces), strict=True):
        torch.mm(part, W, out=result) if bias is None else torch.addmm(bias, part, W, out=result)
    return y.view(*x.shape[:-1], W.shape[1])


def is_one_piece(rows: Tensor, W: Tensor) -> bool:
    """Whether oneDNN would leave a product to one core."""
    sixteen_bits = rows.dtype in (torch.bfloat16, torch.float16) and rows.device.type == "cpu"
    return sixteen_bits and len(rows) in ONE_PIECE_ROWS and W.shape[1] in ONE_PIECE_FEATURES
