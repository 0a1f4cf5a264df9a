"""The weight of an adapted layer, for models that read `layer.weight` instead of calling the layer.

    W′ = W + scaling · B A                                 [LoRA] section 4.1, what a merged layer would hold

BLOOM with slow_but_exact multiplies by slices of `dense.weight`, and torch's TransformerEncoderLayer hands
`linear1.weight` to a kernel of its own: with W in that place the adapter would, silently, not be applied. T5 only looks
at `wo.weight.dtype`, at every call: for that alone, W′ would be made for nothing. Hence a tensor that knows its dtype,
shape and device, and is made when something is computed with it.

Read before this file: adapter_layer.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from minilora.torch_lora.adapter_layer import AdapterLayer, StoresNoFloats

TOLD = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta")  # attributes that no number is needed for


class AdaptedWeight(Tensor):
    """A weight that is formed, with gradients to A and B, by every function that computes with it.

    It has no memory of its own, so it cannot be written into: that raises a RuntimeError.
    """

    form: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, shape: torch.Size, form: Callable[[], Tensor]) -> "AdaptedWeight":
        """A weight of `shape` that says it has the dtype and device of `like`, and is what `form` returns."""
        weight = like.detach().new_empty(()).expand(shape).as_subclass(AdaptedWeight)
        weight.form = form
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(getattr(func, "__self__", None), "__name__", "") in TOLD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        name = func.__name__
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            raise RuntimeError(
                f"{name} cannot write into an adapted weight, W + scaling · B A: write into layer.base.weight"
            )
        args, kwargs = tree_map_only(cls, lambda weight: weight.form(), (args, kwargs or {}))
        return func(*args, **kwargs)


def weight_to_read(layer: AdapterLayer) -> Tensor:
    """W′ of a layer over a linear one: the base's weight where that is merged, else one that is formed when needed."""
    base: Any = layer.base
    if layer.is_merged:
        return base.weight
    if isinstance(layer.base, StoresNoFloats):
        like, shape = next(iter(layer.adapter_tensors().values())), torch.Size((base.out_features, base.in_features))
    else:
        like, shape = base.weight, base.weight.shape
    return AdaptedWeight.of(like, shape, lambda: layer.merged_weight(like.dtype))
