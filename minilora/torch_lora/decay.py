"""What a weight decay may pull at: it pulls to zero, and not of every tensor is zero the base's own model.

    p ← p − lr · weight_decay · p            [AdamW] algorithm 2, its last term

LoRA's A and B may go there: without them the model is the base's. A factor of IA³ is one in the base's model, a length
of DoRA's is a row's own, and what PiSSA begins at belongs to W: such tensors a layer names in `no_decay`.

Read before this file: inject.
"""

from typing import Any

from torch import Tensor, nn

from minilora.torch_lora.inject import adapter_layers


def spared_tensors(model: nn.Module) -> set[Tensor]:
    """The tensors of a model's adapters that do not decay."""
    return {layer.adapter_tensors()[name] for layer in adapter_layers(model).values() for name in layer.no_decay}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort what trains into groups for an optimizer: what decays, and what is spared. Empty groups are left out.

    Raises:
        ValueError: if there shall be a decay, and all that trains is spared.
    """
    spared = spared_tensors(model)
    groups: dict[float, list[nn.Parameter]] = {}
    for p in (p for p in model.parameters() if p.requires_grad):
        groups.setdefault(0.0 if p in spared else weight_decay, []).append(p)
    if weight_decay and groups.keys() == {0.0}:
        raise ValueError(
            f"weight_decay is {weight_decay}, and nothing that trains here may decay: at zero the model would not be "
            "the base's; leave weight_decay at 0"
        )
    return [{"params": params, "weight_decay": decay} for decay, params in groups.items()]
