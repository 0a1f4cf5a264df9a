"""The linear layer of our decoder, and several layers over the same x in one go."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.cpu import products
from minilora.cpu.wide import compute_dtype


class Linear(nn.Linear):
    """torch's linear layer, with the same state; by `products.linear` where no gradients flow.

    y = x Wᵀ + bias
    """

    def forward(self, x: Float[Tensor, "*n in"]) -> Float[Tensor, "*n out"]:
        if self.has_gradients(x):
            if self.is_frozen() and compute_dtype(x, *self.weight.shape) != x.dtype:
                return _FrozenProduct.apply(x, self.weight, self.bias)
            return super().forward(x)
        return products.linear(x, self.weight, self.bias)

    @staticmethod
    def several(x: Float[Tensor, "*n in"], layers: "Sequence[Linear]") -> list[Float[Tensor, "*n _"]]:
        """Give what each of these layers makes of x."""
        if any(layer.has_gradients(x) for layer in layers):
            return [layer.forward(x) for layer in layers]
        return products.linears(x, [(layer.weight, layer.bias) for layer in layers])

    def has_gradients(self, x: Tensor) -> bool:
        """Whether autograd has to see the product with x."""
        return torch.is_grad_enabled() and (x.requires_grad or not self.is_frozen())

    def is_frozen(self) -> bool:
        """Whether nothing in it trains."""
        return not any(p is not None and p.requires_grad for p in (self.weight, self.bias))


class _FrozenProduct(torch.autograd.Function):
    """x Wᵀ + bias, with a gradient to x alone, where torch multiplies x more slowly than cpu/wide does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return products.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return products.product(dy, weight), None, None


def each(x: Float[Tensor, "*n in"], *layers: nn.Module) -> list[Float[Tensor, "*n _"]]:
    """Call every layer with x; by `several` of their class, if they are of one that has it and nobody hears the calls.

    Hooks, adapters, a forward of a layer's own and a compiled layer are heard; a forward put into the class is not.

    q, k and v read the same x, as gate and up do. For few rows a call takes about as long as a small product.
    """
    kind: Any = type(layers[0])
    alike = "several" in vars(kind) and all(type(layer) is kind and _is_only_called(layer) for layer in layers)
    if alike and not nn.modules.module._has_any_global_hook():
        return kind.several(x, layers)
    return [layer(x) for layer in layers]


def _is_only_called(layer: nn.Module) -> bool:
    """Whether a call of this layer is its class's forward and nothing else: no hook, no forward of its own."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return not hooks and layer._compiled_call_impl is None and "forward" not in vars(layer)
