"""LoRA whose A and B begin elsewhere: PiSSA and OLoRA in the weight's own directions, LoftQ at what 4 bits lost.

    A0, B0      what A and B begin at, made of W; copies of them stay, frozen
    W           (out, in) = U diag(σ) Vᵀ, σ falling;  or = Q R, the columns of Q orthonormal
    U_r, V_r    the first r columns of U and of V, and Σ_r = diag(σ₁ … σ_r)

        PiSSA   A0 = √(Σ_r / scaling) V_rᵀ      B0 = U_r √(Σ_r / scaling)            [PiSSA] section 3
        OLoRA   A0 = R[:r]                      B0 = Q[:, :r]                        [OLoRA]
        h = x (W − scaling · B0 A0)ᵀ + scaling · (x Aᵀ) Bᵀ                           both

In the papers, and in PEFT, W − scaling · B0 A0 takes W's place. Here W stays: the same h is that of LoRA of rank 2r,

        h = x Wᵀ + scaling · x (B A − B0 A0)ᵀ
        B A − B0 A0 = B (A − A0) + (B − B0) A0 = [B, B − B0] [A − A0; A0]

so that remove gives the model back whole, and the file, a LoRA of rank 2r, is right over W as it is: in PEFT, llama.cpp
and vLLM (max_lora_rank 2r). A new layer changes no bit, as both differences are zero; and in bfloat16 it is these small
differences that are rounded, not two large products whose difference is small.

The price, until merged, is that of LoRA of rank 2r: 2r(in + out) multiplications a row beside W's in · out, at 4096 and
r 16 for 1.6 % where LoRA takes 0.8 %, and r(in + out) frozen numbers. What trains is LoRA's, r(in + out). Dropout falls
on x before it meets either half, so that the start is W's in training too; in PEFT it is not.

Read before this file: torch_lora/layers; for LoftQ qlora/linear.
"""

import math
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.qlora import NF4, Codebook, NF4Linear, Quantized, dequantize, quantize
from minilora.torch_lora.adapter_layer import dense_weight
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.layers import LoRAConv1D, LoRALayer, LoRALinear, refuse_unfit
from minilora.torch_lora.wrap import lora_of, wrap_in

TINY = torch.finfo(torch.float32).tiny  # of a weight of zeros, in the place of its norm: 0 / TINY is 0


class ShiftedLinear(LoRALinear):
    """LoRA whose A and B begin at A0 and B0, over the base as it is: what is common to PiSSA and OLoRA.

        h = base(x) + scaling · (dropout(x) [A − A0; A0]ᵀ) [B, B − B0]ᵀ

    A file of it is a plain LoRA of rank 2r, and load_adapter makes that of it, which trains 2r and begins where this
    ended. Nothing is drawn: a generator is not used.

    Raises:
        ValueError: if r is more than the smaller side of W, or W holds a NaN or an infinity; else as LoRALinear.
    """

    no_decay = ("A", "B")
    A0: Tensor
    B0: Tensor

    @staticmethod
    def start(
        W: Float[Tensor, "out in"], r: int, scaling: float
    ) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Make A0 and B0."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Let A and B begin at A0 and B0, in place; both are W's, of whatever form it is stored in."""
        W = dense_weight(self.base, self.A.dtype)
        W = W.T if self.stores_in_by_out else W
        refuse_without_directions(W, self.r)
        A0, B0 = self.start(W, self.r, self.scaling)
        self.register_buffer("A0", A0.contiguous())
        self.register_buffer("B0", B0.contiguous())
        self.A.copy_(A0)
        self.B.copy_(B0)

    def low_rank(self) -> tuple[Float[Tensor, "_ in"], Float[Tensor, "out _"]]:
        """Give [A − A0; A0] and [B, B − B0], whose product is B A − B0 A0."""
        return torch.cat([self.A - self.A0, self.A0]), torch.cat([self.B, self.B - self.B0], dim=1)

    def as_lora(self) -> LoRALayer:
        """Give the plain LoRA layer of rank 2r, over the same base, with the same scaling and the same update now."""
        alpha = self.alpha * (math.sqrt(2) if self.use_rslora else 2)  # alpha / √r stays what it is, or alpha / r
        A, B = self.low_rank()
        layer = lora_of(self.base, A, B, alpha=alpha, dropout=self.dropout, use_rslora=self.use_rslora)
        layer._kept = self._kept
        return layer.train(self.training)


class PiSSALinear(ShiftedLinear):
    """PiSSA: A and B begin as the r largest singular values of W with their vectors, and so learn along these.

        A0 = √(Σ_r / scaling) V_rᵀ,  B0 = U_r √(Σ_r / scaling)            [PiSSA] section 3

    scaling · B0 A0 is the best copy of W of rank r. Over a base in 4 bits it is that of the base's floats, and the base
    stays: QPiSSA, which quantizes W less that copy, would need a W that is gone. LoftQLinear is made from it.

    >>> layer = PiSSALinear(nn.Linear(24, 16), r=4, alpha=8)
    >>> [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    [(4, 24), (16, 4)]
    """

    @staticmethod
    def start(
        W: Float[Tensor, "out in"], r: int, scaling: float
    ) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        return principal(W, r, scaling)


class OLoRALinear(ShiftedLinear):
    """OLoRA: A and B begin as the first r rows of R and columns of Q, and these columns are orthonormal.

    W = Q R,  A0 = R[:r],  B0 = Q[:, :r]            [OLoRA]
    """

    @staticmethod
    def start(
        W: Float[Tensor, "out in"], r: int, scaling: float
    ) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        Q, R = torch.linalg.qr(W)
        return R[:r], Q[:, :r]


class PiSSAConv1D(PiSSALinear, LoRAConv1D):
    """PiSSA over GPT-2's `Conv1D`, which stores its weight as (in, out): A0 and B0 are those of its transpose."""


class OLoRAConv1D(OLoRALinear, LoRAConv1D):
    """OLoRA over GPT-2's `Conv1D`: Q and R are those of its weight's transpose, which PEFT's are not."""


pissa_layer = partial(wrap_in, (PiSSALinear, PiSSAConv1D))  # the `wrap` of inject
olora_layer = partial(wrap_in, (OLoRALinear, OLoRAConv1D))  # the `wrap` of inject


class LoftQBase(NF4Linear):
    """The base under LoftQ, in 4 bits: Q_t = quantize(W − scaling · B_{t−1} A_{t−1}) of the last step t.

        errors      ‖W − Q_1‖ / ‖W‖, which is NF4's alone, and ‖W − (Q_t + scaling · B_t A_t)‖ / ‖W‖ of every step t

    After one step it is what QLoRA's base is. After more it is not W in 4 bits, so it says of itself that it is stored
    in another form; W itself is gone, and remove gives this base.
    """

    def __init__(self, Q: Quantized, bias: Float[Tensor, "out"] | None, r: int, errors: tuple[float, ...]):
        nn.Module.__init__(self)
        self._hold(Q)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.r, self.errors = r, errors

    @property
    def stored_as(self) -> str:
        """How the weight is kept, in NF4Linear's words; and of which LoftQ it is, where that took several steps."""
        steps = len(self.errors) - 1
        return super().stored_as + (f", LoftQ's after {steps} steps with r={self.r}" if steps > 1 else "")

    def extra_repr(self) -> str:
        alone, *with_update = self.errors
        return f"{super().extra_repr()}, error {alone:.4f} alone, {with_update[-1]:.4f} with LoftQ's A and B"


@torch.no_grad()
def LoftQLinear(
    base: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    steps: int = 1,
    codebook: Codebook = NF4,
    block_size: int = 64,
    double: bool = True,
) -> LoRALayer:
    """Wrap a linear layer in LoRA over 4 bits that begins near W: A and B hold the best of what rounding took.

        Q_t = quantize(W − scaling · B_{t−1} A_{t−1})                                 [LoftQ] algorithm 1
        A_t = √(Σ_r / scaling) V_rᵀ,  B_t = U_r √(Σ_r / scaling),  of W − Q_t         where B_0 A_0 = 0

    The layer is a LoRALinear over Q of the last step, and layer.base.errors says how far from W it began. The first
    step never makes it worse than Q_1 alone. The scaling is taken out of A and B, which PEFT forgets.

    After one step the file is right over QLoRALinear's base, anybody's: that is W in the same 4 bits. After more it is
    right over this base only: load_adapter warns of another, and wrap=partial(LoftQLinear, steps=…) makes it again.

    Raises:
        TypeError: if the base is not an nn.Linear: in 4 bits already, it has lost what A and B would hold.
        ValueError: for impossible settings, a weight that is not finite or smaller than r, or an adapter layer.
    """
    scaling = LoRAConfig(r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora).scaling
    if steps < 1:
        raise ValueError(f"steps is {steps}: LoftQ takes 1 or more; none of them is QLoRALinear")
    refuse_unfit(base, LoRALinear)
    if not isinstance(base, nn.Linear):
        raise TypeError(f"LoftQ is made from an nn.Linear; a {type(base).__name__} has lost what A and B would hold")
    W = dense_weight(base, torch.float32)
    refuse_without_directions(W, r)
    Q, A, B, errors = alternated(W, r, scaling, steps, codebook, block_size, double)
    quantized = LoftQBase(Q, base.bias, r, errors)
    layer = lora_of(quantized, A, B, alpha=alpha, dropout=dropout, use_rslora=use_rslora)
    layer.no_decay = ("A", "B")  # at zero the model would be that of Q, not of W
    return layer


def alternated(
    W: Float[Tensor, "out in"], r: int, scaling: float, steps: int, codebook: Codebook, block_size: int, double: bool
) -> tuple[Quantized, Float[Tensor, "r in"], Float[Tensor, "out r"], tuple[float, ...]]:
    """Give Q, A and B of the last step, and the errors that LoftQBase tells of.            [LoftQ] algorithm 1

    Each step quantizes what the update leaves of W, and makes the update of what that loses.
    """
    update, errors, norm = torch.zeros_like(W), list[float](), W.norm().clamp_min(TINY)
    for _ in range(steps):
        Q = quantize(W - update, codebook, block_size, double=double)
        lost = W - dequantize(Q)
        A, B = principal(lost, r, scaling)
        update = scaling * B @ A
        errors = errors or [(lost.norm() / norm).item()]
        errors.append(((lost - update).norm() / norm).item())
    return Q, A, B, tuple(errors)


def principal(
    W: Float[Tensor, "out in"], r: int, scaling: float
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Give A and B with scaling · B A the best copy of W of rank r, evenly parted between them.

    A = √(Σ_r / scaling) V_rᵀ,  B = U_r √(Σ_r / scaling)            numpy_lora/rank has it, with scaling 1
    """
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    root = (sigma[:r] / scaling).sqrt()
    return root[:, None] * Vt[:r], U[:, :r] * root


def refuse_without_directions(W: Float[Tensor, "out in"], r: int) -> None:
    """
    Raises:
        ValueError: if W has fewer than r singular values, or is not finite.
    """
    if r > min(W.shape):
        raise ValueError(f"r is {r}: a weight of shape {tuple(W.shape)} has {min(W.shape)} directions to begin in")
    if not W.isfinite().all():
        raise ValueError("the weight holds NaN or infinite values: nothing can begin at its directions; load it again")
