"""Gradient checkpointing: keep what went into a layer, and compute the layer again when its gradients are wanted.

    forward     y = layer(x);  x and y are kept, nothing of what lies between them
    backward    y = layer(x) once more, now with all that its backward needs;  dy → dx and the gradients of the layer

Memory falls from all layers to one, for a second forward: a third more arithmetic. The same operations run on the same
numbers, dropout included, so that every gradient has the bits that it has without. [Checkpointing] section 3

torch.utils.checkpoint does it too; it imports torch's compiler, which alone takes 136 MiB.

Read before this file: model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def recomputed(layer: nn.Module, x: Tensor, *rest: Any) -> Tensor:
    """layer(x, *rest), keeping x alone for the backward. Gradients go to x and the layer's parameters, not to `rest`.

    Gradients of gradients raise a RuntimeError, and so does a backward after x or a trained parameter changed in place.
    """
    return _Recomputed.apply(layer, rest, x, *(p for p in layer.parameters() if p.requires_grad))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Module, rest: tuple[Any, ...], x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.layer, ctx.rest, ctx.random = layer, rest, random_state(x.device)
        kind = x.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(x, *parameters)
        with torch.enable_grad():  # the same operations as in the backward; what they keep is dropped at once
            return layer(x.detach().requires_grad_(ctx.needs_input_grad[2]), *rest).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad(), torch.autocast(*ctx.autocast), replayed(ctx.random, x.device):
            y = ctx.layer(x, *ctx.rest)
        if not y.requires_grad:  # nothing that trains was used
            return (None,) * len(ctx.needs_input_grad)
        wanted = [x, *parameters] if x.requires_grad else parameters
        with torch.enable_grad():
            start = _Start.apply(y, dy)
        gradients = torch.autograd.grad(start, wanted, allow_unused=True)
        return None, None, *(gradients if x.requires_grad else (None, *gradients))


class _Start(torch.autograd.Function):
    """A number whose gradient to y is dy: a backward that is handed dy itself lets torch import SymPy, 26 MiB."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dy: Tensor) -> Tensor:
        ctx.dy = dy
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.dy, None


def random_state(device: torch.device) -> list[Tensor]:
    """Where the random numbers of the CPU, and of the device, stand."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextmanager
def replayed(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those that followed `states`; after it, those that would have come anyway."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield
