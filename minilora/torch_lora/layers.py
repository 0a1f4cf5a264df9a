"""The handwritten LoRA layers: the base layer stays whole, and a low-rank bypass is added to what it returns.

    base      the frozen module under the adapter: nn.Linear, nn.Embedding, GPT-2's Conv1D, or one that stores
              its weight in another form and offers dense_weight(dtype)
    A, B      trainable, float32, (r, in) and (out, r)        x    input, any leading axes
    scaling   alpha / r, or alpha / √r under [rsLoRA]

        h = base(x) + scaling · (dropout(x) Aᵀ) Bᵀ             [LoRA] eq. 3

Read before this file: numpy_lora/forward, which is its oracle; adapter_layer, which merges.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minilora.cpu import Linear
from minilora.torch_lora.adapted_weight import weight_to_read
from minilora.torch_lora.adapter_layer import AdapterLayer, StoresNoFloats, refuse_codes
from minilora.torch_lora.autograd import lora_linear
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.replaced import freeze


class LoRALayer(AdapterLayer):
    """What the three layers share: A and B, and the weight that they make of the base's.

    A new layer changes nothing, because one of its matrices is zero. A and B are float32, where the base is, and are
    drawn from `generator` (torch's own where None).

    Raises:
        TypeError: if the base is not of this layer's kind (names the layer that is).
        ValueError: for an impossible r, alpha or dropout, or if the base is an adapter layer already.
    """

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
        super().__init__()
        config = LoRAConfig(r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora)
        refuse_unfit(base, type(self))
        self.base = base
        self.r, self.alpha, self.dropout, self.use_rslora = config.r, config.alpha, config.dropout, config.use_rslora
        self.scaling = config.scaling
        in_features, out_features = self.features(base)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.A = nn.Parameter(torch.empty(r, in_features, device=device))
        self.B = nn.Parameter(torch.empty(out_features, r, device=device))
        self.initialize(generator)
        freeze(base)  # last: whoever is refused leaves the base as it was

    @staticmethod
    def features(base: Any) -> tuple[int, int]:
        """in_features and out_features of a base."""
        raise NotImplementedError

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw a new adapter, in place.

        A ~ U(−1/√in, 1/√in),  B = 0        Kaiming's uniform rule with a = √5: [Kaiming] eq. 14
        """
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        self.B.zero_()

    def delta_weight(self) -> Float[Tensor, "rows columns"]:
        """Form the update in the layout of the base's weight.

        ΔW = scaling · B A, transposed where the base stores (in, out)
        """
        A, B = self.low_rank()
        delta = self.scaling * B @ A
        return delta.T if self.stores_in_by_out else delta

    def adapt(self, W: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Give W′ = W + ΔW."""
        return W + self.delta_weight().to(W.dtype)

    def low_rank(self) -> tuple[Float[Tensor, "_ in"], Float[Tensor, "out _"]]:
        """Give A and B of the update, scaling · B A: what trains, unless a method makes them of it."""
        return self.A, self.B

    def as_lora(self) -> "LoRALayer":
        """Give the plain LoRA layer of the same update, as files and sums of adapters take it: this one itself."""
        return self

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Give what is trained, by our names."""
        return {"A": self.A, "B": self.B}

    def describe(self) -> str:
        return f"{type(self).__name__} with r={self.r}"

    def extra_repr(self) -> str:
        rslora = ", use_rslora=True" if self.use_rslora else ""
        merged = ", merged" if self.is_merged else ""
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}{rslora}{merged}"


class LoRALinear(LoRALayer):
    """LoRA over a linear layer, or over any base with in_features, out_features and dense_weight.

        h = base(x) + scaling · (dropout(x) Aᵀ) Bᵀ             [LoRA] eq. 3

    A and B are cast to x's dtype; what the base computes is never touched. Over a base that is frozen and plain the sum
    and its backward are one autograd function, autograd.lora_linear: the same numbers in fewer passes and less memory.

    >>> layer = LoRALinear(nn.Linear(24, 16), r=4, alpha=8)
    >>> [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    [(4, 24), (16, 4)]
    """

    wraps = "a linear layer"

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        if self.is_merged:
            return self.base(x)
        A, B = self.low_rank()
        drops = self.dropout > 0 and self.training
        if drops or not is_frozen_product(self.base) or autocasts(x):
            return self.base(x) + bypass(x, A, B, self.scaling, self.dropout, self.training)
        weight = None
        if not isinstance(self.base, StoresNoFloats):
            weight = self.base.weight.T if self.stores_in_by_out else self.base.weight
        return lora_linear(x, A, B, self.scaling, self.base, weight)

    @property
    def weight(self) -> Tensor:
        """W + ΔW, for models that read it instead of calling the layer: adapted_weight tells of them."""
        return weight_to_read(self)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        return self.base.bias

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        read_past_forward = isinstance(base, NonDynamicallyQuantizableLinear)  # nn.MultiheadAttention reads its weight
        return isinstance(base, nn.Linear | StoresNoFloats) and not read_past_forward

    @staticmethod
    def features(base: Any) -> tuple[int, int]:
        return base.in_features, base.out_features


class LoRAConv1D(LoRALinear):
    """LoRA over GPT-2's `Conv1D`: a linear layer that stores its weight as (in, out).

    A and B are those of a linear layer; only ΔW is transposed. On a square weight nothing but the values tells a
    forgotten transpose.
    """

    wraps = "GPT-2's Conv1D"
    stores_in_by_out = True

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        return is_conv1d(base)

    @staticmethod
    def features(base: Any) -> tuple[int, int]:
        in_features, out_features = base.weight.shape
        return in_features, out_features


class LoRAEmbedding(LoRALayer):
    """LoRA over an embedding: A has a column for every token, B turns r numbers into a vector.

        h = base(tokens) + scaling · A[:, tokens]ᵀ Bᵀ

    Here A starts at zero and B is drawn from the normal distribution, as in loralib and PEFT. There is no dropout: a
    token number has nothing to drop, so one above 0 is refused with a ValueError.
    """

    wraps = "an nn.Embedding"
    stores_in_by_out = True

    def forward(self, tokens: Int[Tensor, "*n"]) -> Float[Tensor, "*n dim"]:
        rows = self.base(tokens)
        if self.is_merged:
            return rows
        update = F.embedding(tokens, self.A.T, self.base.padding_idx) @ self.B.T
        return rows + (self.scaling * update).to(rows.dtype)

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        return isinstance(base, nn.Embedding)

    @staticmethod
    def features(base: Any) -> tuple[int, int]:
        return base.num_embeddings, base.embedding_dim

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw a new adapter, in place: A = 0, B ~ N(0, 1)."""
        if self.dropout:
            raise ValueError(f"dropout is {self.dropout}: an embedding's input is token numbers, so choose 0")
        self.A.zero_()
        self.B.normal_(generator=generator)


KINDS: tuple[type[LoRALayer], ...] = (LoRALinear, LoRAConv1D, LoRAEmbedding)


def kind_of(base: nn.Module) -> type[LoRALayer] | None:
    """The LoRA layer that wraps a base, if there is one."""
    return next((kind for kind in KINDS if kind.accepts(base)), None)


def refuse_unfit(base: nn.Module, layer: type[AdapterLayer]) -> None:
    """Refuse a base that a layer cannot wrap, and say which layer can.

    Raises:
        ValueError: if the base is an adapter layer already.
        TypeError: if it is of another kind, or has the codes of another quantizer in its weight.
    """
    if isinstance(base, AdapterLayer):
        raise ValueError(
            f"this layer is wrapped already (a {base.describe()}): "
            "train that adapter on, or take it off first with remove(model)"
        )
    if not layer.accepts(base):
        other = kind_of(base)
        way_out = f": use {other.__name__}" if other else ", which none of the LoRA layers wraps"
        raise TypeError(f"{layer.__name__} wraps {layer.wraps}; this is a {type(base).__name__}{way_out}")
    if not isinstance(base, StoresNoFloats):
        refuse_codes(base)


def bypass(
    x: Float[Tensor, "*n in"],
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    scaling: float,
    dropout: float = 0.0,
    training: bool = False,
) -> Float[Tensor, "*n out"]:
    """Compute the low-rank part alone.

    scaling · (dropout(x) Aᵀ) Bᵀ                            [LoRA] eq. 3, second term
    """
    u = F.dropout(x, dropout, training) @ A.to(x.dtype).T  # (*n, r)
    return scaling * (u @ B.to(x.dtype).T)


def is_frozen_product(base: Any) -> bool:
    """Whether a base computes x Wᵀ + bias and no more: nothing in it trains, no hook sees or changes its result.

    An instance with a `forward` of its own is not plain: accelerate puts one there, to bring the weight in.
    """
    plain = type(base) in (nn.Linear, Linear) or is_conv1d(base) or isinstance(base, StoresNoFloats)
    plain = plain and "forward" not in vars(base)
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return plain and not any(hooks) and not any(p.requires_grad for p in base.parameters())


def autocasts(x: Tensor) -> bool:
    """Whether torch would choose a dtype of its own for products with x."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, of floats or not, GPT-2's Conv1D among them."""
    return LoRALinear.accepts(module) or LoRAConv1D.accepts(module)


def features_of(linear: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a module that is_linear."""
    return (LoRAConv1D if is_conv1d(linear) else LoRALinear).features(linear)


def is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's Conv1D, by its name and what it holds: transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
