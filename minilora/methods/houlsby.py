"""Houlsby's adapters: two small layers with a nonlinearity between them, after each half of a transformer's block.

    d, m              features of the layer, and of the bottleneck; f is the nonlinearity
    W_down, b_down    (m, d), (m,)    trainable, float32; small numbers, and zeros, at the start
    W_up, b_up        (d, m), (d,)    the same; zeros at the start

        h ← h + f(h W_downᵀ + b_down) W_upᵀ + b_up                             [Houlsby] section 2.1, figure 2

h is what attention's output projection gives, and what the feed-forward's last layer gives, before the residual is
added: an adapter stands over each of the two. It has 2md + d + m parameters. Because of f no weight has its effect, so
it cannot be merged, and costs time when the model answers.

[Houlsby] begins near the identity, W_down and W_up both normal of standard deviation 10⁻², truncated at two of them
(the authors' code: 10⁻³); here W_up = 0 makes it the identity, bit for bit. f is the authors' own, GELU by tanh. Where
the model has dropout, the adapter stands before it, theirs after it. They train the layer norms as well: so does
torch_lora's train_modules(model, ["input_layernorm", "post_attention_layernorm"]).

Read before this file: torch_lora/layers.
"""

from collections.abc import Callable
from functools import partial
from typing import NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minilora.torch_lora.adapted_weight import weight_to_read
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.layers import features_of, is_linear, refuse_unfit
from minilora.torch_lora.replaced import freeze

STD = 1e-2  # [Houlsby] section 3.6
NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class HoulsbyLinear(AdapterLayer):
    """One of Houlsby's adapters, after the linear layer over which it stands; that may be in 4 bits, or a Conv1D.

        h ← h + f(h W_downᵀ + b_down) W_upᵀ + b_up,  h = base(x)               [Houlsby] section 2.1

    The block's two are inject(model, ["o_proj", "down_proj"], HoulsbyLinear), of GPT-2's ["c_proj"]. A new one changes
    nothing, bit for bit. All is cast to h's dtype. W_down is drawn from `generator` (torch's own where None).

    Raises:
        TypeError: if the base is no linear layer.
        ValueError: for an impossible bottleneck or an unknown nonlinearity, or if the base is an adapter layer already.

    >>> layer = HoulsbyLinear(nn.Linear(24, 16), bottleneck=4)
    >>> sum(p.numel() for p in layer.parameters() if p.requires_grad), 2 * 4 * 16 + 16 + 4
    (148, 148)
    """

    wraps = "a linear layer or GPT-2's Conv1D"

    def __init__(
        self,
        base: nn.Module,
        *,
        bottleneck: int = 64,
        nonlinearity: str = "gelu",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        refuse_unfit(base, HoulsbyLinear)
        if isinstance(bottleneck, bool) or not isinstance(bottleneck, int) or bottleneck < 1:
            raise ValueError(f"bottleneck is {bottleneck!r}: it counts numbers, so it must be a whole one of 1 or more")
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"there is no nonlinearity {nonlinearity!r} here: choose one of {list(NONLINEARITIES)}")
        self.base, self.bottleneck, self.nonlinearity = base, bottleneck, nonlinearity
        _, d = features_of(base)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.W_down = nn.Parameter(torch.empty(bottleneck, d, device=device))
        self.b_down = nn.Parameter(torch.zeros(bottleneck, device=device))
        self.W_up = nn.Parameter(torch.zeros(d, bottleneck, device=device))
        self.b_up = nn.Parameter(torch.zeros(d, device=device))
        nn.init.trunc_normal_(self.W_down, std=STD, a=-2 * STD, b=2 * STD, generator=generator)
        freeze(base)  # last: whoever is refused leaves the base as it was

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n d"]:
        h = self.base(x)
        W_down, b_down, W_up, b_up = (tensor.to(h.dtype) for tensor in self.adapter_tensors().values())
        u = NONLINEARITIES[self.nonlinearity](F.linear(h, W_down, b_down))  # (*n, m)
        return h + F.linear(u, W_up, b_up)

    def adapt(self, W: Float[Tensor, "rows columns"]) -> NoReturn:
        """No weight has its effect.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"cannot merge a HoulsbyLinear: {self.nonlinearity} stands between its matrices, so no weight has its "
            "effect; keep the layer (save_houlsby writes it), or train LoRA or IA³, which merge"
        )

    def merge(self) -> NoReturn:
        """Refuse, as adapt does, over any base."""
        self.adapt(torch.empty(0, 0))

    @property
    def weight(self) -> Tensor:
        """A tensor that tells its dtype and shape (T5 asks its wo for that), and refuses to be computed with."""
        return weight_to_read(self)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        return self.base.bias

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        return is_linear(base)

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {"W_down": self.W_down, "b_down": self.b_down, "W_up": self.W_up, "b_up": self.b_up}

    def describe(self) -> str:
        return f"{type(self).__name__} with a bottleneck of {self.bottleneck}"

    def extra_repr(self) -> str:
        return f"bottleneck={self.bottleneck}, nonlinearity={self.nonlinearity!r}"
