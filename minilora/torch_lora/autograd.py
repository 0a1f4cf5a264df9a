"""The LoRA layer's forward and backward as one autograd function: what layers.bypass says, in fewer passes.

    x, dx    (*n, in)        A    (r, in)        u, du    (*n, r)
    y, dy    (*n, out)       B    (out, r)       W        (out, in), frozen

    forward     u  = scaling · x Aᵀ        y  = base(x) + u Bᵀ                      [LoRA] eq. 3
    backward    du = scaling · dy B        dx = dy W + du A        dA = duᵀ x        dB = dyᵀ u

The second product is added into what the base returned, or summed together with the first (cpu/products), where
autograd's own steps write it, scale it and add it: three passes over *n × out numbers. Nothing of that size is saved:
x, which the layer's input holds anyway, and u. Not even x, where the function that gave it can make it again (its node
has `again`: llm/autograd). A base that keeps its weight in 4 bits turns it into floats once in each direction and drops
it.

Read before this file: numpy_lora/forward, where the backward is derived by hand.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from minilora.cpu.products import linear, product
from minilora.cpu.wide import compute_dtype


def lora_linear(
    x: Float[Tensor, "*n in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    scaling: float,
    base: Any,
    weight: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "*n out"]:
    """base(x) + scaling · (x Aᵀ) Bᵀ, with gradients to x, A and B, for a frozen base that computes x Wᵀ + bias.

    `weight` is its W, used with base.bias; None for a base that stores no floats: that is called, without gradients,
    and base.dense_weight(dtype) is asked for W in the backward, but only if x wants a gradient. Where the product is
    made faster in another dtype than x's (cpu/wide) it is asked in the forward too, and not called. Gradients of
    gradients raise a RuntimeError, and so does a backward after `weight` was changed in place.
    """
    return _LoRALinear.apply(x, A, B, scaling, base, weight)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scaling: float, base: Any, weight: Tensor | None) -> Tensor:
        u = scaling * product(_rows(x), A.to(x.dtype).T)
        update = u, B.to(x.dtype).T
        W = weight
        if W is None and (dtype := _compute_dtype(base, x)) != x.dtype:
            W = base.dense_weight(dtype)
        if W is None:
            y = base(x).contiguous()
            y.view(-1, y.shape[-1]).addmm_(*update)
        else:
            y = linear(x, W, base.bias, update)
        ctx.x_again = getattr(x.grad_fn, "again", None)
        ctx.save_for_backward(None if ctx.x_again else x, u, A, B, weight)
        ctx.scaling, ctx.base = scaling, base
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        x, u, A, B, weight = ctx.saved_tensors
        if ctx.x_again:
            x = ctx.x_again()
        dy = _rows(dy)
        du = ctx.scaling * product(dy, B.to(dy.dtype))
        dx = None
        if ctx.needs_input_grad[0]:
            W = ctx.base.dense_weight(_compute_dtype(ctx.base, dy)) if weight is None else weight
            dx = product(dy, W, None, (du, A.to(dy.dtype))).view(x.shape)
        dB = product(u.T, dy).T  # dy.T @ u, which torch multiplies more slowly on a CPU
        return dx, product(du.T, _rows(x)), dB, None, None, None  # autograd casts them to the dtype of A and B


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _compute_dtype(base: Any, x: Tensor) -> torch.dtype:
    return compute_dtype(x, base.out_features, base.in_features)
