"""Four operations of the decoder as training on a CPU wants them, where each pass over memory counts.

torch's own backward of RMSNorm, rotation and SwiGLU takes a pass, and often a saved copy, for every arithmetic step.
Here each is one autograd function with its backward by hand; so is attention, whose fused forward is torch's. In
bfloat16 the norm, and SwiGLU's backward, are kernels of our own where the processor suits them (cpu/pointwise). Each
gives what its plain twin in model.py gives, gradients included. On CUDA, where a small operation costs little beside a
product, the plain lines run, but for SwiGLU, which keeps less. Gradients of gradients raise a RuntimeError.

Read before this file: llm/model.
"""

import math
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.cpu.products import are_bfloat16
from minilora.cpu.wide import compute_dtype

QUERIES_AT_ONCE = 128  # in attention's backward: their scores, of 9 heads and 1,024 keys, take 2.4 MB in bfloat16
WIDE_QUERIES_AT_ONCE = 32  # where scores are float32: 1.2 MB


class Again:
    """What a function's `ctx.again` is, for whoever would keep its result: a way to make that again in the backward.

    `again()` makes it from what the function keeps for its own backward; a LoRA layer over it then keeps nothing of
    that size (torch_lora/autograd). Several layers over one result share what the first of them made, until the
    function's own backward calls `drop`. When it is made, torch checks that nothing it is made from was changed in
    place.
    """

    def __init__(self, ctx: Any, make: Callable[..., Tensor]) -> None:
        self.ctx, self.make = weakref.ref(ctx), make
        self.kept: tuple[Tensor, ...] | None = None
        self.made: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.made is None:
            self.made = self.make(*self.saved_tensors())
        return self.made

    def saved_tensors(self) -> tuple[Tensor, ...]:
        if self.kept is None:  # may be asked for once, under torch's checkpoint
            ctx: Any = self.ctx()  # alive as long as anyone can ask: it is a node below the one that asks
            self.kept = tuple(ctx.saved_tensors)
        return self.kept

    def drop(self) -> None:
        self.kept = self.made = None


def rms_norm(x: Float[Tensor, "*n hidden"], weight: Float[Tensor, "hidden"], eps: float) -> Float[Tensor, "*n hidden"]:
    """Scale every vector to a root mean square of one, then each feature by its weight.

    x̂ = x / √(mean(x²) + eps)        y = x̂ · weight                                   [RMSNorm] eq. 4
    g = dy · weight                  dx = (g − x̂ · mean(g · x̂)) / √(mean(x²) + eps)
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normal(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.again = Again(ctx, _scaled)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.again.saved_tensors()
        ctx.again.drop()
        kernels = norm_kernels(x, weight, dy)
        if kernels is not None and not ctx.needs_input_grad[1]:
            return kernels.rms_norm_backward(dy, x, weight, inverse), None, None
        normal = x.to(inverse.dtype, copy=True).mul_(inverse)
        dweight = (dy * normal).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = dy.to(inverse.dtype, copy=True).mul_(weight)
        mean = (g * normal).mean(-1, keepdim=True)
        return g.addcmul_(normal, mean, value=-1).mul_(inverse).to(x.dtype), dweight, None


def _normal(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / √(mean(x²) + eps) of every vector."""
    kernels = norm_kernels(x, weight)
    if kernels is not None:
        return kernels.rms_norm(x, weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_() / x.shape[-1]
    inverse = mean.add_(eps).rsqrt_()
    return _scaled(x, weight, inverse), inverse


def _scaled(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    kernels = norm_kernels(x, weight)
    if kernels is not None:
        return kernels.scaled(x, weight, inverse)
    wide = x.to(inverse.dtype, copy=True)  # x * inverse would take twice as long where x has 16 bits
    return wide.mul_(inverse).mul_(weight).to(x.dtype)


def rotate(
    x: Float[Tensor, "batch n seq head_dim"],
    cos: Float[Tensor, "rows 1 seq head_dim"],
    sin: Float[Tensor, "rows 1 seq head_dim"],
) -> Float[Tensor, "batch n seq head_dim"]:
    """Turn each pair of features (i, i + head_dim / 2) by an angle; the gradient is turned back by the same angle.

    The tables are those of model.rotation_of: (cos, cos) and (−sin, sin).
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(dy, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    halves = (t.chunk(2, dim=-1) for t in (x, y, cos, sin))
    (first, second), (y_first, y_second), (cos_first, cos_second), (sin_first, sin_second) = halves
    torch.mul(first, cos_first, out=y_first).addcmul_(second, sin_first)
    torch.mul(second, cos_second, out=y_second).addcmul_(first, sin_second)
    return y


def swiglu(gate: Float[Tensor, "*n wide"], up: Float[Tensor, "*n wide"]) -> Float[Tensor, "*n wide"]:
    """silu(gate) · up, keeping gate and up alone: silu(gate) is made again in the backward. [SwiGLU] eq. 6"""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.again = Again(ctx, _gated)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.again.saved_tensors()
        ctx.again.drop()
        kernels = _kernels(dy, gate, up)
        if kernels is not None and gate.shape == up.shape:
            return kernels.swiglu_backward(dy, gate, up)
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def norm_kernels(x: Tensor, weight: Tensor, *others: Tensor) -> ModuleType | None:
    """cpu/pointwise, where its norm is faster than torch's and takes these tensors."""
    return _kernels(x, weight, *others) if x.shape[-1:] == weight.shape else None


def _kernels(*tensors: Tensor) -> ModuleType | None:
    """cpu/pointwise, where it is faster than torch and takes these tensors."""
    if are_bfloat16(*tensors):
        from minilora.cpu import pointwise

        if pointwise.is_fast():
            return pointwise
    return None


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def causal_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Each token looks at itself and at all before it; q, k and v alone are kept for the backward.

    p = softmax(q kᵀ / √head_dim)        y = p v                                      [Attention] eq. 1
    dv = pᵀ dy        dp = dy vᵀ        ds = p · (dp − sum(p · dp)) / √head_dim        dq = ds k        dk = dsᵀ q

    The forward is torch's fused one. Its backward in 16 bits on a CPU is the slower one (benchmarks/attention.py); this
    one makes p again for some tokens at a time, with the keys up to the last of them. Scores are rounded to q's dtype,
    as torch's are not: where they are as large as 20, dq and dk are three times as far from exact. They are float32
    where that is the faster (cpu/wide).
    """
    return _CausalAttention.apply(q, k, v)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        q, k, v = ctx.saved_tensors
        (batch, heads, seq, head_dim), kv_heads = q.shape, k.shape[1]
        scale, dtype, wide = 1 / math.sqrt(head_dim), q.dtype, torch.promote_types(q.dtype, torch.float32)
        chosen = compute_dtype(q, seq, head_dim)
        q, k, v, dy = (t.to(chosen) for t in (q, k, v, dy))
        at_once = QUERIES_AT_ONCE if chosen == dtype else WIDE_QUERIES_AT_ONCE
        group = (batch * kv_heads, heads // kv_heads, seq, head_dim)  # the query heads that share a key head
        grouped_q, grouped_dy = (q * scale).reshape(group), dy.reshape(group)
        k, v = k.flatten(0, 1), v.flatten(0, 1)  # (batch · kv_heads, seq, head_dim)
        dq, dk, dv = torch.empty_like(grouped_q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for start in range(0, seq, at_once):
            stop = min(start + at_once, seq)
            block_q, block_dy = (t[:, :, start:stop].flatten(1, 2) for t in (grouped_q, grouped_dy))
            scores = block_q @ k[:, :stop].mT  # (batch · kv_heads, heads / kv_heads · queries, stop)
            scores.unflatten(1, (-1, stop - start))[..., start:] += _future(stop - start, scores)
            p = scores.softmax(-1)
            dv[:, :stop] += p.mT @ block_dy
            ds = torch.ops.aten._softmax_backward_data(block_dy @ v[:, :stop].mT, p, -1, p.dtype)
            dk[:, :stop] += ds.mT @ block_q
            dq[:, :, start:stop] = (ds @ k[:, :stop]).mul_(scale).unflatten(1, (-1, stop - start))
        kv_shape = (batch, kv_heads, seq, head_dim)
        return dq.view(q.shape).to(dtype), dk.to(dtype).view(kv_shape), dv.to(dtype).view(kv_shape)


def _future(n: int, like: Tensor) -> Tensor:
    """−∞ where a token (row) would look behind itself, 0 elsewhere: (n, n)."""
    return torch.full((n, n), -math.inf, dtype=like.dtype, device=like.device).triu_(1)
