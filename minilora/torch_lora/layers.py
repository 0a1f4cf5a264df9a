"""The handwritten LoRA layers: the base layer stays whole, and a low-rank bypass is added to what it returns.

    base      the frozen module under the adapter: nn.Linear, nn.Embedding, GPT-2's Conv1D, or one that stores
              its weight in another form and offers dense_weight(dtype)
    A, B      trainable, float32, (r, in) and (out, r)        x    input, any leading axes
    scaling   alpha / r, or alpha / √r under [rsLoRA]

        h = base(x) + scaling · (dropout(x) Aᵀ) Bᵀ             [LoRA] eq. 3

Read before this file: numpy_lora/forward, which is its oracle.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minilora.cpu import Linear
from minilora.torch_lora.adapted_weight import AdaptedWeight
from minilora.torch_lora.autograd import lora_linear
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.replaced import KEPT, freeze


@runtime_checkable
class StoresNoFloats(Protocol):
    """A linear layer that keeps its weight in another form (4 bits, say) and can give it as floats, (out, in).

    It is told by this one method. Like an nn.Linear it has in_features, out_features and bias; a check for these as
    well would not find a bias that is a parameter (Python 3.12 and later look past nn.Module's own attributes).
    """

    def dense_weight(self, dtype: torch.dtype) -> Tensor: ...


def dense_weight(base: Any, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Give a base layer's weight as floats, however it is stored."""
    if isinstance(base, StoresNoFloats):
        return base.dense_weight(dtype)
    return base.weight.detach().to(dtype)


class LoRALayer(nn.Module):
    """What the three layers share: A and B, and folding them into the base and out again.

    A new layer changes nothing, because one of its matrices is zero. A and B are float32, where the base is, and are
    drawn from `generator` (torch's own where None).

    Raises:
        TypeError: if the base is not of this layer's kind (names the layer that is).
        ValueError: for an impossible r, alpha or dropout, or if the base is an adapter layer already.
    """

    base: Any  # an nn.Module, whose attributes depend on its kind
    wraps: str  # the kind, in words
    stores_in_by_out = False  # nn.Linear's weight is (out, in); the other two kinds store (in, out)

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
        self._kept: tuple[nn.Parameter, ...] = ()  # a tuple, so that it counts neither as a parameter nor as state
        freeze(base)  # last: whoever is refused leaves the base as it was

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        """Whether a base is of this layer's kind."""
        raise NotImplementedError

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

    @property
    def is_merged(self) -> bool:
        """Whether the update is inside the base's weight now."""
        return bool(self._kept)

    @property
    def unmerged_weight(self) -> nn.Parameter | None:
        """The base's own weight while the layer is merged, kept to be put back."""
        return self._kept[0] if self._kept else None

    def delta_weight(self) -> Float[Tensor, "rows columns"]:
        """Form the update in the layout of the base's weight.

        ΔW = scaling · B A, transposed where the base stores (in, out)
        """
        delta = self.scaling * self.B @ self.A
        return delta.T if self.stores_in_by_out else delta

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Give what is trained, by our names."""
        return {"A": self.A, "B": self.B}

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the base's weight, in place.

        W′ = W + ΔW, summed in float32 (or wider) and rounded once to W's dtype

        W itself is kept beside it (as many bytes as W has), so that unmerge gives it back bit for bit. A bias that the
        adapter replaced (torch_lora/replaced) is in place before and after: merging does not touch it.

        Raises:
            RuntimeError: if the layer is merged already.
            TypeError: if the base does not store floats.
            ValueError: if A or B holds a NaN or an infinity.
        """
        if self.is_merged:
            raise RuntimeError("this layer is merged already: a second merge would add the update twice")
        if isinstance(self.base, StoresNoFloats):
            raise TypeError(
                f"cannot merge into {type(self.base).__name__}: it does not store floats; "
                "fused() gives a new layer of floats with the update in it"
            )
        merged = self._summed_weight(self.base.weight.dtype)
        self._kept = (self.base.weight,)
        self.base.weight = nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put back the weight that merge kept: the same parameter with the same bits.

        Where the layer was moved to another device or dtype since, its copy there.

        Raises:
            RuntimeError: if the layer is not merged.
        """
        if not self._kept:
            raise RuntimeError("this layer is not merged: there is nothing to undo")
        (kept,), self._kept = self._kept, ()
        here = kept.detach().to(self.base.weight)
        same = here.data_ptr() == kept.data_ptr()
        self.base.weight = kept if same else nn.Parameter(here, requires_grad=False)

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Make a new layer of the base's kind, of floats, with the update in its weight; this one is left as it was.

        The dtype is the base's own unless given. A base that stores no floats becomes an nn.Linear, of float32 unless
        a dtype is given. A bias that the adapter replaced is in the new layer.
        """
        if isinstance(self.base, StoresNoFloats):
            return self._fused_linear(dtype or torch.float32)
        weight = self.base.weight
        new_weight = weight.detach().clone() if self.is_merged else self._summed_weight(dtype or weight.dtype)
        # deepcopy takes what its memo holds for an object instead of copying it: the old weight is never duplicated
        layer = copy.deepcopy(self.base, {id(weight): nn.Parameter(new_weight, requires_grad=False)})
        vars(layer).pop(KEPT, None)  # the new layer has no adapter, so nothing to give back
        layer.requires_grad_(False)
        return layer if dtype is None else layer.to(dtype)

    def _fused_linear(self, dtype: torch.dtype) -> nn.Linear:
        bias = self.base.bias
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(self._summed_weight(dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        return linear

    def _summed_weight(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        wide = torch.promote_types(dtype, self.A.dtype)
        delta = self.delta_weight()
        if not torch.isfinite(delta).all():
            raise ValueError(
                "the update holds NaN or infinite values, so merging it would destroy the weight: "
                "find the training step that made them (a smaller learning rate, gradient clipping)"
            )
        return (dense_weight(self.base, wide) + delta.to(wide)).to(dtype)

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
        drops = self.dropout > 0 and self.training
        if drops or not is_frozen_product(self.base) or autocasts(x):
            return self.base(x) + bypass(x, self.A, self.B, self.scaling, self.dropout, self.training)
        weight = None
        if not isinstance(self.base, StoresNoFloats):
            weight = self.base.weight.T if self.stores_in_by_out else self.base.weight
        return lora_linear(x, self.A, self.B, self.scaling, self.base, weight)

    @property
    def weight(self) -> Tensor:
        """W + ΔW, for models that read it instead of calling the layer: adapted_weight tells of them."""
        if self.is_merged:
            return self.base.weight
        if isinstance(self.base, StoresNoFloats):
            shape = torch.Size((len(self.B), self.A.shape[1]))
            return AdaptedWeight.of(self.A, shape, lambda: self._summed_weight(self.A.dtype))
        W = self.base.weight
        return AdaptedWeight.of(W, W.shape, lambda: self._summed_weight(W.dtype))

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


def refuse_unfit(base: nn.Module, layer: type[LoRALayer]) -> None:
    """Refuse a base that a layer cannot wrap, and say which layer can.

    Raises:
        ValueError: if the base is an adapter layer already.
        TypeError: if it is of another kind.
    """
    if isinstance(base, LoRALayer):
        raise ValueError(
            f"this layer is wrapped already (a {type(base).__name__} with r={base.r}): "
            "train that adapter on, or take it off first with remove(model)"
        )
    if not layer.accepts(base):
        other = kind_of(base)
        way_out = f": use {other.__name__}" if other else ", which none of the LoRA layers wraps"
        raise TypeError(f"{layer.__name__} wraps {layer.wraps}; this is a {type(base).__name__}{way_out}")


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


def is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's Conv1D, by its name and what it holds: transformers need not be installed."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge every LoRA layer of a model (or one layer) for the length of a `with`, and unmerge them after it.

    Layers that were merged before stay merged. The weights after it are, bit for bit, those before it, also where
    the body, or one of the merges, raises.
    """
    with ExitStack() as undo:
        for layer in model.modules():
            if isinstance(layer, LoRALayer) and not layer.is_merged:
                layer.merge()
                undo.callback(layer.unmerge)
        yield
