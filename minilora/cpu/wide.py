"""Products of bfloat16 by torch in float32, on processors that multiply float32 faster.

bfloat16 halves what memory has to bring. It halves the work too only where the processor has fast instructions for it,
as with AMX (and AVX-512 in AMD's Zen 4 and later, by its tables). Intel's AVX-512 instruction for it makes half as many
products a second as float32's; and where there is none, torch converts each number as often as it is used. 1,024 rows
times a weight of 576 → 1,536 on two cores, x Wᵀ and dy W in turn, conversions included:

                    AVX-512 with bfloat16      AVX-512 without      AVX2
    in bfloat16         12 ms,  11 ms           32 ms,  30 ms       92 ms, 753 ms
    in float32           8 ms,   7 ms            9 ms,   8 ms       16 ms,  14 ms

(benchmarks/wide.py; for the last two columns torch was told not to use the instructions.) To make a bfloat16 float32
is exact, and the result is rounded once. What is float32 on the way is small and stays in the caches: some rows at a
time, and of a weight as large as a vocabulary's head some outputs, or features.
"""

import platform
from functools import cache
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from minilora.cpu.products import PLAIN, is_watched

MANY_ROWS = 64  # with fewer, the conversions take about as long as they save
SOME_ROWS = 8  # the same, where bfloat16 is emulated
ROWS_AT_ONCE = 256
WEIGHTS_AT_ONCE = 2**20  # 4 MB
NARROW = 32  # in or out features, as LoRA's factors have: then the conversions take longer than they save


def compute_dtype(x: Tensor, *weight_shape: int) -> torch.dtype:
    """The dtype in which x is multiplied fastest by a weight of this shape: its own, or float32 for one of bfloat16."""
    if x.dtype != torch.bfloat16 or not x.is_cpu or type(x) not in PLAIN or is_watched():
        return x.dtype
    many = x.numel() >= MANY_ROWS * x.shape[-1] and min(weight_shape) > NARROW
    some = x.numel() >= SOME_ROWS * x.shape[-1]
    return torch.float32 if (many and is_slow()) or (some and is_emulated()) else x.dtype


@cache
def is_slow() -> bool:
    """Whether the processor multiplies bfloat16 more slowly than float32: known of x86 alone."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    from llvmlite import binding

    has, is_zen = binding.get_host_cpu_features().get, binding.get_host_cpu_name().startswith("znver")
    return not has("amx-bf16") and not (has("avx512bf16") and is_zen)


@cache
def is_emulated() -> bool:
    """Whether the processor has no instruction at all that multiplies bfloat16."""
    from llvmlite import binding

    return is_slow() and not binding.get_host_cpu_features().get("avx512bf16")


def product(
    x: Float[Tensor, "rows in"],
    W: Float[Tensor, "in out"],
    bias: Float[Tensor, "out"] | None = None,
    plus: tuple[Float[Tensor, "rows r"], Float[Tensor, "r out"]] | None = None,
) -> Float[Tensor, "rows out"]:
    """Compute x W + bias + u B in float32, plus being (u, B), and round it to x's dtype. W may be float32 already.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    u, B = (x[:, :0], W[:0]) if plus is None else plus
    fit = x.shape[1] == len(W) and u.shape == (len(x), len(B)) and B.shape[1:] == W.shape[1:]
    if not fit or (bias is not None and bias.shape != W.shape[1:]):
        shapes = [tuple(t.shape) for t in (x, W, bias, u, B) if t is not None]
        raise ValueError(f"x W + bias + u B cannot be made of shapes {shapes}")
    in_features, out_features = W.shape
    longer_side_at_once = max(1, WEIGHTS_AT_ONCE // max(1, min(W.shape)))
    by_outputs = out_features >= in_features
    W = W.float() if W.numel() <= WEIGHTS_AT_ONCE else W
    y = x.new_empty(len(x), out_features)
    for rows in parts(len(x), ROWS_AT_ONCE):
        some_x = x[rows].float() if by_outputs else x[rows]
        for outputs in parts(out_features, longer_side_at_once if by_outputs else out_features):
            sums = u[rows].float() @ B[:, outputs].float()
            if bias is not None:
                sums += bias[outputs]
            for features in parts(in_features, in_features if by_outputs else longer_side_at_once):
                sums.addmm_(some_x[:, features].float(), W[features, outputs].float())
            y[rows, outputs] = sums
    return y


def parts(total: int, at_once: int) -> list[slice]:
    """Cut a length into slices of so many or fewer, all about as long: a short rest would be multiplied slowly."""
    count = max(1, -(-total // max(1, at_once)))
    bounds = [total * k // count for k in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]
