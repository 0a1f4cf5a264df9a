"""A product with a frozen weight, where torch would leave a CPU's cores or its memory idle.

Few rows    Text is generated a token at a time, and each reads every weight: few_rows does that faster, and few_tiles
            with AMX, which also takes several weights of one x at once.

Many rows   In training, what LoRA adds to a product is a second one into the same result. On processors with AMX tiles
            makes both as one, 1.05 to 2.5 times as fast; the first alone now faster than oneDNN, now slower.

Wide        Where float32 is multiplied faster than bfloat16, as on x86 processors without AMX but for AMD's newest,
            wide makes the numbers float32 on the way.

Halves      Elsewhere oneDNN multiplies 16-bit floats. It cuts a product into pieces of a size that it chooses by the
            shape, and a core takes a piece; for some hundreds of rows and a narrow result it makes one piece. On two
            cores, 1,536 → 576 in bfloat16, 1,024 rows go at 0.31 TFLOP/s, and twice 512 at 0.54
            (benchmarks/products.py). Of the arithmetic of a training step of SmolLM2-135M nearly half has so narrow a
            result.
"""

import os
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

PROCESS = os.getpid()  # a forked child inherits none of its parent's threads
PLAIN = (Tensor, nn.Parameter)
FEW_ROWS = 32  # the most that few_tiles and few_rows take
MANY_ROWS = 256  # with fewer, what tiles packs takes longer than it saves
LARGE = 2**16  # weights: a smaller W stays in a core's cache
FEATURES_AT_ONCE = 32  # what the kernels for few rows multiply in one go
ONE_PIECE_ROWS = range(513, 1281)  # seen with oneDNN 3; at other sizes two halves are the slower way
ONE_PIECE_FEATURES = range(385, 1025)


def linear(
    x: Float[Tensor, "*n in"],
    W: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None = None,
    plus: tuple[Float[Tensor, "rows r"], Float[Tensor, "r out"]] | None = None,
) -> Float[Tensor, "*n out"]:
    """Compute x Wᵀ + bias + u B, plus being (u, B). Gradients need not flow: call it where autograd does not look."""
    kernels = kernels_for_few(x, W)
    return product(x, W.T, bias, plus) if kernels is None else _added(kernels.linears(x, [(W, bias)])[0], plus)


def linears(
    x: Float[Tensor, "*n in"], layers: Sequence[tuple[Float[Tensor, "_ in"], Float[Tensor, "_"] | None]]
) -> list[Float[Tensor, "*n _"]]:
    """Compute x Wᵀ + bias for each (W, bias), in one go where that is faster. Gradients need not flow."""
    kernels = kernels_for_few(x, *(W for W, _ in layers))
    if kernels is not None:
        return kernels.linears(x, layers)
    return [linear(x, W, bias) for W, bias in layers]


def product(
    x: Float[Tensor, "*n in"],
    W: Float[Tensor, "in out"],
    bias: Float[Tensor, "out"] | None = None,
    plus: tuple[Float[Tensor, "rows r"], Float[Tensor, "r out"]] | None = None,
) -> Float[Tensor, "*n out"]:
    """Compute x W + bias + u B, plus being (u, B), for a W that lies in memory either way. Gradients need not flow.

    W may have the dtype of x, or the one that wide.compute_dtype gives for it.
    """
    from minilora.cpu import wide

    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if are_many(rows, W):
        from minilora.cpu import tiles

        if tiles.suit(W):
            return tiles.product(rows, W, bias, plus).view(*x.shape[:-1], W.shape[1])
    if type(W) in PLAIN and wide.compute_dtype(rows, *W.shape) != x.dtype:
        return wide.product(rows, W, bias, plus).view(*x.shape[:-1], W.shape[1])
    if not is_one_piece(rows, W):
        return _added(F.linear(x, W.T, bias), plus)
    y = x.new_empty(len(rows), W.shape[1])
    for half, result in zip(rows.chunk(2), y.chunk(2), strict=True):
        torch.mm(half, W, out=result) if bias is None else torch.addmm(bias, half, W, out=result)
    return _added(y.view(*x.shape[:-1], W.shape[1]), plus)


def _added(y: Tensor, plus: tuple[Tensor, Tensor] | None) -> Tensor:
    if plus is not None:
        y.view(-1, y.shape[-1]).addmm_(*plus)
    return y


def kernels_for_few(x: Tensor, *weights: Tensor) -> ModuleType | None:
    """The file of kernels that multiplies few rows by each of these weights fastest, if it is the same one for all."""
    if x.dtype != torch.bfloat16 or not are_few(x, *weights):
        return None
    from minilora.cpu import few_rows, few_tiles

    widths = [W.shape[0] for W in weights]
    if few_tiles.suits(x, min(widths)):
        return few_tiles
    return few_rows if few_rows.suits(x) and not few_tiles.suits(x, max(widths)) else None


def are_few(x: Tensor, *weights: Tensor) -> bool:
    """Whether products of x with these weights, each (out, in) in one piece and of x's dtype, are of few rows."""
    alike = all(W.dtype == x.dtype and is_in_one_piece(W) and W.shape[1] == weights[0].shape[1] for W in weights)
    alike = alike and min(W.shape[0] for W in weights) > 1
    return alike and may_be_few(x, sum(W.shape[0] for W in weights), weights[0].shape[1])


def may_be_few(x: Tensor, out_features: int, in_features: int) -> bool:
    """Whether rows are as few as kernels of our own may take, of features that they can, and the weights large."""
    if not x.is_cpu or x.numel() > FEW_ROWS * in_features or in_features * out_features < LARGE:
        return False
    whole = x.shape[-1] == in_features and in_features % FEATURES_AT_ONCE == 0 and out_features > 1
    return whole and x.numel() > 0 and type(x) in PLAIN and not is_watched()


def are_many(rows: Tensor, W: Tensor) -> bool:
    """Whether a product may be one of tiles: bfloat16, of many rows, with a W that lies in memory either way."""
    bfloat16 = rows.dtype == W.dtype == torch.bfloat16
    if not bfloat16 or len(rows) < MANY_ROWS or rows.shape[1] != len(W) or type(rows) not in PLAIN:
        return False
    return rows.is_cpu and (is_in_one_piece(W) or is_in_one_piece(W.T)) and not is_watched()


def are_bfloat16(*tensors: Tensor) -> bool:
    """Whether these are what kernels of our own can take: bfloat16, some numbers, each tensor in one piece."""
    fit = all(t.dtype == torch.bfloat16 and is_in_one_piece(t) and t.numel() for t in tensors)
    return fit and not is_watched()


def is_in_one_piece(tensor: Tensor) -> bool:
    """Whether a tensor's numbers lie one behind the other at its address, in the CPU's memory; a subclass's may not."""
    return type(tensor) in PLAIN and tensor.is_cpu and tensor.is_contiguous()


def is_watched() -> bool:
    """Whether torch itself has to see each product, to change, record, count or differentiate it."""
    return (
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # vmap, jvp and their like
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_one_piece(rows: Tensor, W: Tensor) -> bool:
    """Whether oneDNN would leave a product to one core of several."""
    on_cores = rows.device.type == "cpu" and torch.get_num_threads() > 1
    sixteen_bits = rows.dtype in (torch.bfloat16, torch.float16)
    narrow = len(rows) in ONE_PIECE_ROWS and W.shape[1] in ONE_PIECE_FEATURES
    return on_cores and sixteen_bits and narrow and not is_watched()
