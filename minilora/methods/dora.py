"""DoRA: the length of each row of the weight, and its direction, learn apart from each other.

    V       = W + scaling · B A                            the direction, not yet of length 1; W stays frozen
    ‖V‖     (out,)   the length of each of its rows; a row is what makes one output
    m       (out,)   the magnitude, trainable; at the start ‖W‖

        W′ = m ⊙ V / ‖V‖                                   [DoRA] eq. 5
        h  = g ⊙ (x Wᵀ + scaling · (x Aᵀ) Bᵀ) + bias       with  g = m / ‖V‖

‖V‖ is detached: A and B get no gradient through it ([DoRA] section 4.3), so that the backward is LoRA's with g ⊙ dy in
the place of dy. B A is never formed for it: row o of V has the squared length

        ‖V_o‖² = ‖W_o‖² + 2 scaling · B_o · (A W_oᵀ) + scaling² · B_o (A Aᵀ) B_oᵀ

in which A Wᵀ is what the base makes of A's r rows. As in PEFT the bias is not scaled, and dropout acts on everything
but the base's own output. What are rows here are columns in [DoRA], whose W is (in, out).

Read before this file: torch_lora/layers.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.torch_lora.adapter_layer import AdapterLayer, dense_weight
from minilora.torch_lora.layers import LoRAConv1D, LoRALinear, bypass
from minilora.torch_lora.wrap import wrap_in

TINY = torch.finfo(torch.float32).tiny  # of a row of zeros, in the place of its length: 0 / TINY is 0


class DoRALinear(LoRALinear):
    """DoRA over a linear layer, or over one in 4 bits (QDoRA).

        h = g ⊙ (x Wᵀ + scaling · (x Aᵀ) Bᵀ) + bias,  g = m / ‖W + scaling · B A‖        [DoRA] eq. 5
        h = base(x) + (g − 1) ⊙ (d Wᵀ) + g ⊙ (scaling · (d Aᵀ) Bᵀ),  d = dropout(x)      in training, with dropout

    A new layer changes nothing, bit for bit: B is zero, so ‖V‖ is the very number that m begins with. A row of zeros
    stays one.

    >>> layer = DoRALinear(nn.Linear(24, 16), r=4, alpha=8)
    >>> [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    [(4, 24), (16, 4), (16,)]
    """

    no_decay = ("m",)
    squares: Tensor  # ‖W_o‖² of every row, (out,)

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(base, r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora, generator=generator)
        W = self._rows(dense_weight(base, self.A.dtype))
        self.register_buffer("squares", W.square().sum(1), persistent=False)
        self.m = nn.Parameter(self.squares.sqrt())

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        if self.is_merged:
            return self.base(x)
        g, bias = self.m / self.lengths(x.dtype), self.base.bias
        if self.dropout == 0 or not self.training:
            return rescaled(super().forward(x), g, bias)
        dropped = F.dropout(x, self.dropout)
        h = self.base(dropped)
        h = h if bias is None else h - bias
        y = self.base(x) + (g - 1) * h + g * bypass(dropped, self.A, self.B, self.scaling)
        return y.to(x.dtype)

    @torch.no_grad()
    def lengths(self, dtype: torch.dtype) -> Float[Tensor, "out"]:
        """‖V‖, the length of every row of W + scaling · B A, without a gradient; A Wᵀ is computed in `dtype`."""
        A, B = self.A, self.scaling * self.B
        if self.base.bias is None:
            AW = self.base(A.to(dtype)).to(A.dtype)  # (r, out)
        else:  # a bias that came off again would have taken digits along
            AW = F.linear(A.to(dtype), self._rows(dense_weight(self.base, dtype))).to(A.dtype)
        squares = self.squares + 2 * (B * AW.T).sum(1) + (B @ (A @ A.T) * B).sum(1)
        return squares.clamp_min(0).sqrt().clamp_min(TINY)

    def adapt(self, W: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Give W′ = m ⊙ V / ‖V‖."""
        V = self._rows(W + super().delta_weight().to(W.dtype))
        return self._rows((self.m / V.norm(dim=1).clamp_min(TINY))[:, None] * V)

    def delta_weight(self) -> Float[Tensor, "rows columns"]:
        """Form W′ − W, in the layout of the base's weight: no longer of rank r."""
        return AdapterLayer.delta_weight(self)

    def adapter_tensors(self) -> dict[str, Tensor]:
        return super().adapter_tensors() | {"m": self.m}

    def _rows(self, W: Float[Tensor, "rows columns"]) -> Float[Tensor, "_ _"]:
        return W.T if self.stores_in_by_out else W


class DoRAConv1D(DoRALinear, LoRAConv1D):
    """DoRA over GPT-2's `Conv1D`, which stores its weight as (in, out): one magnitude per output all the same."""


dora_layer = partial(wrap_in, (DoRALinear, DoRAConv1D))  # the `wrap` of inject and load_adapter


def rescaled(
    h: Float[Tensor, "*n out"], g: Float[Tensor, "out"], bias: Float[Tensor, "out"] | None
) -> Float[Tensor, "*n out"]:
    """g ⊙ (h − bias) + bias, with gradients to h and g.

    What is kept for the backward is the result, which whoever takes it may keep as well, and not h:

        dh = g ⊙ dy        dg = Σ over *n of dy ⊙ (h − bias) = Σ dy ⊙ (y − bias) / g

    Where g is 0 its gradient is taken for 0.
    """
    return _Rescaled.apply(h, g, bias)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, g: Tensor, bias: Tensor | None) -> Tensor:
        y = _scaled(h, g, None if bias is None else (1 - g) * bias)
        ctx.save_for_backward(y, g, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        y, g, bias = ctx.saved_tensors
        tokens = tuple(range(dy.ndim - 1))
        dg = (dy * y).sum(tokens, dtype=g.dtype)
        if bias is not None:
            dg -= bias * dy.sum(tokens, dtype=g.dtype)
        return _scaled(dy, g), torch.where(g == 0, 0, dg / g), None


def _scaled(h: Tensor, g: Tensor, shift: Tensor | None = None) -> Tensor:
    """g ⊙ h + shift in g's float32, where bfloat16 would take g for 1 until it is a part in 256 away.

    On a CPU some rows at a time: a product of all in float32 leaves a hole in the memory, where nothing else fits.
    """
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    at_a_time = 64 if h.device.type == "cpu" else max(1, h.numel())
    for rows, scaled in zip(*(t.reshape(-1, t.shape[-1]).split(at_a_time) for t in (h, y)), strict=True):
        scaled.copy_(rows * g if shift is None else torch.addcmul(shift, rows.to(g.dtype), g))
    return y
