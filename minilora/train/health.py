"""Is the run well? What goes wrong in fine-tuning mostly goes wrong in silence; here it is said.

    a loss or gradient of NaN or infinity     trainer stops before it reaches the weights; here is where it arose
    an adapter whose B stays zero             its gradient is cut off, or its layer is never called: it learns nothing

Read next: train/trainer, train/listeners.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.train.data import Batch
from minilora.train.loss import loss_of


def first_bad_place(model: nn.Module, batch: Batch) -> str:
    """Say where a loss that is NaN or infinite arises: a weight, or the first module that makes such numbers.

    The batch goes through the model once more, without gradients and with every module watched.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            return f"in the weight {name}"
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, given: Any, made: Any) -> None:
            if isinstance(made, Tensor) and not found and not torch.isfinite(made).all():
                found.append(f"in what {name or 'the model'} makes of finite numbers")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            loss_of(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "in the loss itself"


def idle_adapters(model: nn.Module) -> list[str]:
    """Name the adapter layers whose B is all zero. After a step there should be none."""
    return [
        name.removesuffix(".B")
        for name, parameter in model.named_parameters()
        if name.endswith(".B") and parameter.requires_grad and not parameter.any()
    ]
