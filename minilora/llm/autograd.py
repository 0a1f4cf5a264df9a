"""Four operations of the decoder as training on a CPU wants them, where each pass over memory counts.

torch's own backward of RMSNorm, rotation and SwiGLU takes a pass, and often a saved copy, for every arithmetic step.
Here each is one autograd function with its backward by hand; attention is written out, because torch's fused one is
slow backwards on short rows. Each gives what its plain twin in model.py gives, gradients included; on CUDA, where a
small operation costs little beside a product, the plain lines run. Gradients of gradients raise a RuntimeError.

Read before this file: llm/model.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Float[Tensor, "*n hidden"], weight: Float[Tensor, "hidden"], eps: float) -> Float[Tensor, "*n hidden"]:
    """Scale every vector to a root mean square of one, then each feature by its weight.

    x̂ = x / √(mean(x²) + eps)        y = x̂ · weight                                   [RMSNorm] eq. 4
    g = dy · weight                  dx = (g − x̂ · mean(g · x̂)) / √(mean(x²) + eps)
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()  # (*n, 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normal = x * inverse
        dweight = (dy * normal).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = dy * weight.to(inverse.dtype)
        mean = (g * normal).mean(-1, keepdim=True)
        return g.sub_(normal.mul_(mean)).mul_(inverse).to(x.dtype), dweight, None


def rotate(
    x: Float[Tensor, "batch n seq head_dim"],
    cos: Float[Tensor, "rows 1 seq half"],
    sin: Float[Tensor, "rows 1 seq half"],
) -> Float[Tensor, "batch n seq head_dim"]:
    """Turn each pair of features (i, i + half) by an angle; the gradient is turned back by the same angle."""
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
    (first, second), (y_first, y_second) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=y_second).addcmul_(first, sin)
    return y


def swiglu(gate: Float[Tensor, "*n wide"], up: Float[Tensor, "*n wide"]) -> Float[Tensor, "*n wide"]:
    """silu(gate) · up, keeping gate and up alone: silu(gate) is made again in the backward. [SwiGLU] eq. 6"""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


def causal_attention(
    q: Float[Tensor, "batch heads seq head_dim"],
    k: Float[Tensor, "batch kv_heads seq head_dim"],
    v: Float[Tensor, "batch kv_heads seq head_dim"],
) -> Float[Tensor, "batch heads seq head_dim"]:
    """softmax(q kᵀ / √head_dim) v for every head, each token looking at itself and all before it, step by step.

    The query heads that share a key head stand under one another as one tall matrix, so keys and values are never
    repeated. Scores are kept for the backward: batch · heads · seq² numbers, so this is for short rows.
    """
    (batch, heads, seq, head_dim), kv_heads = q.shape, k.shape[1]
    tall = (batch * kv_heads, heads // kv_heads * seq, head_dim)
    k, v = (t.reshape(batch * kv_heads, seq, head_dim) for t in (k, v))
    future = torch.full((seq, seq), -math.inf, dtype=q.dtype, device=q.device).triu(1).repeat(heads // kv_heads, 1)
    scores = torch.baddbmm(future, q.reshape(tall), k.mT, alpha=1 / math.sqrt(head_dim))
    return (scores.softmax(-1) @ v).view(q.shape)
