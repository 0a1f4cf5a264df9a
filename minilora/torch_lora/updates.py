"""The update of each layer by itself, taken out of a model and put into one: what sums of adapters are made of.

    A, B, scaling     of one layer; the update is scaling · B A
    Adapter           the updates of all layers, by name

    adapter = updates_of(model)
    set_updates(other, adapter)            # an adapter like any other: save_adapter writes it

The scaling is read from each layer, so that rsLoRA, or a strength for each layer, is in it already; an adapter whose
update is not scaling · B A (DoRA) is refused. Read before this file: inject, wrap.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.torch_lora.inject import InjectReport, adapter_layers, inject, lora_layers
from minilora.torch_lora.layers import kind_of
from minilora.torch_lora.replaced import replaced_tensors
from minilora.torch_lora.wrap import lora_layer, refuse_to_fill


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one layer, in factors: scaling · B A. For every kind of layer A is (r, in) and B is (out, r)."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]
    scaling: float = 1.0

    @property
    def r(self) -> int:
        """Rows of A, and columns of B."""
        return self.A.shape[0]


Adapter = Mapping[str, Update]  # layer name -> its update


def updates_of(model: nn.Module) -> dict[str, Update]:
    """Copy the updates out of a model's adapter, by layer; merged layers too.

    Raises:
        ValueError: if the model has no adapter, or one whose update is not scaling · B A.
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError("this model has no adapter to take updates from: inject(model, targets, wrap) gives it one")
    if replaced := replaced_tensors(model):
        raise ValueError(
            f"this adapter also replaces {len(replaced)} tensors of the base, such as {min(replaced)}: no sum of those "
            "is defined here; merge such an adapter into the base instead"
        )
    return {name: Update(y.A.detach().clone(), y.B.detach().clone(), y.scaling) for name, y in layers.items()}


def set_updates(
    model: nn.Module, updates: Mapping[str, Update], wrap: Callable[..., nn.Module] = lora_layer
) -> InjectReport:
    """Give a model these updates as its adapter, in place; save_adapter writes it, and it can be trained on.

    All layers get the largest rank, because one r for all is what every reader of the file knows; a smaller update is
    filled up with zeros, which change nothing (and get no gradients). alpha is r: the scaling is 1.

    Raises:
        ValueError: if the model has an adapter, the updates do not fit it (all mismatches at once), or `wrap` makes
            layers that do not begin at zero; it is as before.
    """
    if adapter_layers(model):
        raise ValueError("this model has an adapter already: take it off first with remove(model)")
    problems = _misfits(model, updates)
    if problems or not updates:
        raise ValueError("these updates do not fit the model:\n  " + "\n  ".join(problems or ["there are none"]))
    r = max(update.r for update in updates.values())

    def wrap_one(base: nn.Module) -> nn.Module:
        layer = wrap(base, r=r, alpha=r)
        refuse_to_fill(layer)
        return layer

    report = inject(model, [re.compile(re.escape(name)) for name in updates], wrap_one)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            update = updates[name]
            layer.A.zero_()[: update.r] = update.A
            layer.B.zero_()[:, : update.r] = update.scaling * update.B
    return report


def _misfits(model: nn.Module, updates: Mapping[str, Update]) -> list[str]:
    modules = dict(model.named_modules())
    problems = []
    for name, update in updates.items():
        kind = kind_of(modules[name]) if name in modules else None
        shape = (update.A.shape[1], update.B.shape[0])
        if kind is None:
            problems.append(f"{name}: the model has no layer of that name that LoRA wraps")
        elif kind.features(modules[name]) != shape:
            problems.append(f"{name}: the update is for (in, out) = {shape}, it has {kind.features(modules[name])}")
    return problems
