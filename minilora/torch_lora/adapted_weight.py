"""The weight of an adapted layer, for models that read `layer.weight` instead of calling the layer.

    W′ = W + scaling · B A                                 [LoRA] section 4.1, what a merged layer would hold

BLOOM with slow_but_exact multiplies by slices of `dense.weight`, and torch's TransformerEncoderLayer hands
`linear1.weight` to a kernel of its own: with W in that place the adapter would, silently, not be applied. T5 only looks
at `wo.weight.dtype`, at every call: for that alone, W′ would be made for nothing. Hence a tensor that knows its dtype,
shape and device, and is made when something is computed with it.

Read before this file: adapter_layer.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from minilora.torch_lora.adapter_layer import AdapterLayer, StoresNoFloats

TOLD = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta")  # attributes that no number is needed for
# What shares memory with the tensor that it is of: to write into it is to write into that.
VIEWS = (
    "H", "T", "__getitem__", "chunk", "data", "detach", "diagonal", "expand", "flatten", "mH", "mT", "movedim",
    "narrow", "permute", "reshape", "select", "split", "squeeze", "swapaxes", "t", "transpose", "unbind", "unflatten",
    "unsqueeze", "view", "view_as",
)  # fmt: skip
WRITE = (
    "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__",
)  # fmt: skip


class AdaptedWeight(Tensor):
    """A weight that is formed, with gradients to A and B, by every function that computes with it.

    It has no memory of its own, and neither have its views and its `data`: to write into one raises a RuntimeError.
    """

    form: Callable[[], Tensor]

    @staticmethod
    def of(like: Tensor, shape: torch.Size, form: Callable[[], Tensor]) -> "AdaptedWeight":
        """A weight of `shape` that says it has the dtype and device of `like`, and is what `form` returns."""
        return _formed_by(like.detach().new_empty(()).expand(shape), form)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")  # of which func is __get__ or __set__
        name = func.__name__ if func.__name__ != "__get__" else attribute
        if name in TOLD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        _refuse_to_write(name, args, kwargs)

        def formed() -> Any:
            return func(*tree_map_only(cls, lambda w: w.form(), args), **tree_map_only(cls, lambda w: w.form(), kwargs))

        if name not in VIEWS:
            return formed()
        with torch._C.DisableTorchFunctionSubclass():
            views = func(*args, **kwargs)  # of no numbers: they tell their shapes
        if isinstance(views, Tensor):
            return _formed_by(views, formed)
        return tuple(_formed_by(view, partial(lambda i: formed()[i], i)) for i, view in enumerate(views))


def _formed_by(empty: Tensor, form: Callable[[], Tensor]) -> AdaptedWeight:
    weight = empty.as_subclass(AdaptedWeight)
    weight.form = form
    return weight


def _refuse_to_write(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    in_place = name in WRITE or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
    written = tree_leaves([args[:1] if in_place else (), kwargs.get("out")])
    if any(isinstance(leaf, AdaptedWeight) for leaf in written):
        raise RuntimeError(
            f"{name} cannot write into an adapted weight, W + scaling · B A: write into layer.base.weight"
        )


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
