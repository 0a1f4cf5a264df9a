"""What trains beside an adapter: tensors of the base itself, biases or whole modules, by copies in their place.

    train_biases(model)                    those of the adapted layers, as PEFT's bias="lora_only"; or all
    train_modules(model, ["lm_head"])      every tensor of these modules, as PEFT's modules_to_save

    model.q_proj.bias  ←  a copy, which trains; remove(model) gives the base's own back

Read before this file: inject, replaced.
"""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from minilora.torch_lora.adapter_layer import StoresNoFloats
from minilora.torch_lora.inject import Target, adapter_layers, match_targets
from minilora.torch_lora.replaced import replace_tensors, replaced_tensors, warn_of_untying


def train_biases(model: nn.Module, which: Literal["all", "lora_only"] = "lora_only") -> list[str]:
    """Let biases train: those of the adapted layers, or all of the model's. Give their names.

    The model computes the same as before: copies stand in their place, and remove(model) gives the biases back.

    Raises:
        ValueError: if there are none, or one is of a layer that stores no floats, whose bias has no gradient.
    """
    names = bias_names(model)
    if which == "lora_only":
        layers = adapter_layers(model)
        names = [name for name in names if name.removesuffix(".base.bias") in layers]
    if not names:
        whose = "no adapted layer of this model" if which == "lora_only" else "nothing in this model"
        raise ValueError(f"{whose} has a bias: there is nothing to train")
    refuse_to_train_without_floats(model, names)
    _train_whole(model, names)
    return names


def train_modules(model: nn.Module, targets: Target | Sequence[Target]) -> dict[str, list[str]]:
    """Let whole modules train, such as an output head beside the adapters. Give what each target hit.

    The model computes the same as before: copies stand in place of the modules' tensors, and remove(model) gives these
    back. Where one is tied to another module's tensor, the two are untied, as in PEFT, with a warning.

    Raises:
        ValueError: if a target hits nothing, or a module with an adapter in it, without tensors or without floats.
    """
    hits = match_targets(model, targets)
    modules = dict(model.named_modules(remove_duplicate=False))
    adapted = adapter_layers(model)
    names: dict[str, None] = {}  # in order, each once
    for module in (name for found in hits.values() for name in found):
        inside = [name for name in adapted if f"{name}.".startswith(f"{module}.")]
        state = [f"{module}.{leaf}" for leaf in modules[module].state_dict()]
        if inside or not state:
            reason = f"it has an adapter, {inside[0]}" if inside else "it holds no tensors"
            raise ValueError(f"{module} cannot train whole: {reason}; choose another target")
        names |= dict.fromkeys(state)
    refuse_to_train_without_floats(model, list(names))
    _train_whole(model, list(names))
    return hits


def bias_names(model: nn.Module) -> list[str]:
    """The names of all parameters that are called "bias", those of the layers under adapters too."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name.rpartition(".")[2] == "bias"]


def refuse_to_train_without_floats(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse to train tensors of layers that store no floats: they compute without gradients to their own tensors.

    Raises:
        ValueError: naming the first.
    """
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    stored = [name for name, owner in owners.items() if isinstance(owner, StoresNoFloats)]
    if stored:
        raise ValueError(
            f"{stored[0]} cannot train: {type(owners[stored[0]]).__name__} stores no floats and gives its own tensors "
            "no gradient; leave it frozen, or put the adapter over a layer of floats"
        )


def _train_whole(model: nn.Module, names: list[str]) -> None:
    there, state = replaced_tensors(model), model.state_dict(keep_vars=True)
    new = {name: state[name] for name in names if name not in there}
    warn_of_untying(model, new)
    replace_tensors(model, new, trainable=True)
    for name in there.keys() & set(names):
        there[name].requires_grad_(there[name].is_floating_point())
