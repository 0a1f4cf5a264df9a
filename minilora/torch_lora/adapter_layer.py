"""What every layer that stands over one of the base's has in common: it keeps the base whole, and can merge with it.

    base            the frozen module under the adapter, which may store its weight in another form (4 bits, say)
    adapt(W)        the weight that the adapter makes of the base's:  W′ = adapt(W),  ΔW = W′ − W
    adapt_bias(b)   the bias that goes with W′: b itself, unless the method changes that too
    merge, unmerge  put W′ in W's place, and W back, bit for bit; fused() makes a new layer of W′

What the layer computes, and what it trains, is each method's own: torch_lora/layers has LoRA's. Read before this file:
nothing.
"""

import copy
import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.torch_lora.replaced import KEPT

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a float8 is a code: its scale lies elsewhere


@runtime_checkable
class StoresNoFloats(Protocol):
    """A linear layer that keeps its weight in another form (4 bits, say) and can give it as floats, (out, in).

    It is told by this one method. Like an nn.Linear it has in_features, out_features and bias; a check for these as
    well would not find a bias that is a parameter (Python 3.12 and later look past nn.Module's own attributes).
    """

    def dense_weight(self, dtype: torch.dtype) -> Tensor: ...


def dense_weight(base: Any, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """Give a base layer's weight as floats, however it is stored.

    Raises:
        TypeError: as refuse_codes.
    """
    if isinstance(base, StoresNoFloats):
        return base.dense_weight(dtype)
    refuse_codes(base)
    return base.weight.detach().to(dtype)


def refuse_codes(base: Any) -> None:
    """Refuse a layer that has another quantizer's codes in its `weight`: a sum with them means nothing.

    bitsandbytes' Linear8bitLt and Linear4bit and the FP8 layers of transformers are such: all of them are nn.Linear.

    Raises:
        TypeError: if the weight is not of ordinary floats, or in another shape than (out, in).
    """
    weight = base.weight
    is_packed = isinstance(base, nn.Linear) and weight.shape != (base.out_features, base.in_features)
    if weight.dtype not in FLOATS or is_packed:
        raise TypeError(
            f"{type(base).__name__} has codes in its weight ({weight.dtype}, {tuple(weight.shape)}), not the floats "
            "that an adapter adds to: load the base in bfloat16, and take QLoRALinear for 4 bits; a folder of "
            "bitsandbytes' 4 bits is read by minilora.train.bnb_folder.load_4_bit"
        )


class AdapterLayer(nn.Module):
    """A layer over a frozen base, in whose place it stands: `inject` puts it there, and `remove` takes it away.

    What is a tensor of the adapter says `adapter_tensors`; all of it is float32.
    """

    base: Any  # an nn.Module, whose attributes depend on its kind
    wraps: str  # the kind of base, in words
    no_decay: Collection[str] = ()  # of adapter_tensors, those that no weight decay may pull to zero: torch_lora/decay
    _kept: Mapping[str, nn.Parameter] = MappingProxyType({})  # plain: it counts neither as a parameter nor as state
    stores_in_by_out = False  # nn.Linear's weight is (out, in); GPT-2's Conv1D and an embedding store (in, out)

    @staticmethod
    def accepts(base: nn.Module) -> bool:
        """Whether a base is of this layer's kind."""
        raise NotImplementedError

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Give what is trained, by our names."""
        raise NotImplementedError

    def adapt(self, W: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        """Give W′, in W's layout and in its dtype or a wider one.

        Raises:
            TypeError: if no weight computes what the method does.
        """
        raise NotImplementedError

    def adapt_bias(self, bias: Float[Tensor, "out"]) -> Float[Tensor, "out"]:
        """Give the bias that goes with W′: the very same, or a new one in its dtype or a wider one."""
        return bias

    def delta_weight(self) -> Float[Tensor, "rows columns"]:
        """Form the update in the layout of the base's weight: ΔW = W′ − W."""
        W = dense_weight(self.base, torch.float32) if self.unmerged_weight is None else self.unmerged_weight.float()
        return self.adapt(W) - W

    def describe(self) -> str:
        """The kind and its settings, for messages."""
        return type(self).__name__

    @property
    def is_merged(self) -> bool:
        """Whether the update is inside the base's weight now."""
        return bool(self._kept)

    @property
    def unmerged_weight(self) -> nn.Parameter | None:
        """The base's own weight while the layer is merged, kept to be put back."""
        return self._kept.get("weight")

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the base's weight, in place.

        W′ = adapt(W), computed in float32 (or wider) and rounded once to W's dtype

        W itself is kept beside it (as many bytes as W has), so that unmerge gives it back bit for bit; so is a bias, if
        the method changes it. Otherwise that is not touched, also where the adapter replaced it (torch_lora/replaced).

        Raises:
            RuntimeError: if the layer is merged already.
            TypeError: if the base does not store floats, or no weight has the adapter's effect.
            ValueError: if W′ or its bias would hold a NaN or an infinity.
        """
        if self.is_merged:
            raise RuntimeError("this layer is merged already: a second merge would add the update twice")
        if isinstance(self.base, StoresNoFloats):
            raise TypeError(
                f"cannot merge into {type(self.base).__name__}: it does not store floats; "
                "fused() gives a new layer of floats with the update in it"
            )
        merged = {"weight": self.merged_weight(self.base.weight.dtype)}
        bias = self.merged_bias()
        if bias is not None and bias is not self.base.bias:
            merged["bias"] = bias
        self._kept = {leaf: getattr(self.base, leaf) for leaf in merged}
        for leaf, tensor in merged.items():
            setattr(self.base, leaf, nn.Parameter(tensor, requires_grad=False))

    def unmerge(self) -> None:
        """Put back what merge kept: the same parameters with the same bits.

        Where the layer was moved to another device or dtype since, their copies there.

        Raises:
            RuntimeError: if the layer is not merged.
        """
        if not self._kept:
            raise RuntimeError("this layer is not merged: there is nothing to undo")
        for leaf, kept in self._kept.items():
            here = kept.detach().to(getattr(self.base, leaf))
            same = here.data_ptr() == kept.data_ptr()
            setattr(self.base, leaf, kept if same else nn.Parameter(here, requires_grad=False))
        self._kept = {}

    @torch.no_grad()
    def fused(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Make a new layer of the base's kind, of floats, with the update in its weight; this one is left as it was.

        The dtype is the base's own unless given. A base that stores no floats becomes an nn.Linear, of float32 unless
        a dtype is given. A bias that the adapter replaced is in the new layer.
        """
        if isinstance(self.base, StoresNoFloats):
            return self._fused_linear(dtype or torch.float32)
        weight = self.base.weight
        new_weight = weight.detach().clone() if self.is_merged else self.merged_weight(dtype or weight.dtype)
        # deepcopy takes what its memo holds for an object instead of copying it: the old weight is never duplicated
        memo = {id(weight): nn.Parameter(new_weight, requires_grad=False)}
        bias = self.merged_bias(dtype)
        if bias is not None and bias is not self.base.bias:
            memo[id(self.base.bias)] = nn.Parameter(bias, requires_grad=False)
        layer = copy.deepcopy(self.base, memo)
        vars(layer).pop(KEPT, None)  # the new layer has no adapter, so nothing to give back
        layer.requires_grad_(False)
        return layer if dtype is None else layer.to(dtype)

    def _fused_linear(self, dtype: torch.dtype) -> nn.Linear:
        bias = self.merged_bias(dtype)
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(self.merged_weight(dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
        return linear

    def merged_weight(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """Form W′, computed in float32 (or wider) and rounded once to `dtype`.

        Raises:
            ValueError: if it holds a NaN or an infinity.
        """
        wide = functools.reduce(torch.promote_types, (t.dtype for t in self.adapter_tensors().values()), dtype)
        merged = self.adapt(dense_weight(self.base, wide))
        _refuse_infinite(merged)
        return merged.to(dtype)

    def merged_bias(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out"] | None:
        """Give the bias that goes with W′: the base's own, as it is, where the method leaves it, or None.

        Where the method changes it, it is rounded once to `dtype`, or to the base's bias's own.

        Raises:
            ValueError: if it holds a NaN or an infinity.
        """
        now = getattr(self.base, "bias", None)
        if now is None:
            return None
        own = self._kept.get("bias", now).to(now.device)
        adapted = self.adapt_bias(own)
        if adapted is own:
            return own
        merged = adapted.to(dtype or own.dtype)
        _refuse_infinite(merged)
        return merged


def _refuse_infinite(merged: Tensor) -> None:
    if not torch.isfinite(merged).all():
        raise ValueError(
            "the update holds NaN or infinite values, so merging it would destroy the weight: "
            "find the training step that made them (a smaller learning rate, gradient clipping)"
        )


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Merge every adapter layer of a model (or one layer) for the length of a `with`, and unmerge them after it.

    Layers that were merged before stay merged. The weights after it are, bit for bit, those before it, also where
    the body, or one of the merges, raises.
    """
    with ExitStack() as undo:
        for layer in model.modules():
            if isinstance(layer, AdapterLayer) and not layer.is_merged:
                layer.merge()
                undo.callback(layer.unmerge)
        yield
