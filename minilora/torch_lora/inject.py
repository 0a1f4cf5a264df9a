"""Put adapters into a model, by name, and take them out again.

    targets   the last parts of module names ("q_proj"), compiled regular expressions for whole names, or "all-linear"
    wrap      a function module -> module, called once for every module that a target hits

    report = inject(model, ["q_proj", "v_proj"], lambda base: LoRALinear(base, r=8, alpha=16))

Nothing is changed before everything has been checked. What else trains beside the adapters is chosen in train_whole.
Read before this file: layers, replaced.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from minilora.torch_lora.adapter_layer import AdapterLayer, StoresNoFloats
from minilora.torch_lora.layers import LoRALayer, is_linear
from minilora.torch_lora.replaced import freeze, give_back, replaced_tensors

Target = str | re.Pattern[str]
ALL_LINEAR = "all-linear"
OUTPUT_HEADS = ("lm_head", "embed_out")  # what "all-linear" leaves out in a model that cannot tell its head


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; a 4-bit weight counts by its logical shape, a tied one once."""

    trainable: int
    total: int

    @property
    def trainable_share(self) -> float:
        """Trainable of total, 0 to 1."""
        return self.trainable / self.total

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters train ({100 * self.trainable_share:.4f} %)"


@dataclass(frozen=True)
class InjectReport:
    """Which modules every target hit, and what trains now."""

    hits: dict[str, list[str]]
    count: ParameterCount

    def __str__(self) -> str:
        width = max(len(target) for target in self.hits)
        lines = [f"{target:<{width}}  {_hit_summary(names)}" for target, names in self.hits.items()]
        return "\n".join([*lines, str(self.count)])


def match_targets(model: nn.Module, targets: Target | Sequence[Target]) -> dict[str, list[str]]:
    """Find the modules that each target hits.

    A string hits every module whose name is it or ends in "." and it, as in PEFT; a compiled pattern hits every
    module whose whole name it matches; "all-linear" hits every linear layer but the output head. Modules inside
    an adapter layer are not looked at.

    Raises:
        ValueError: naming every target that hits nothing, with the names that are near and those that exist.
    """
    modules = {name: module for name, module in _outer_modules(model).items() if name}
    listed: Sequence[Target] = [targets] if isinstance(targets, str | re.Pattern) else targets
    hits = {
        target if isinstance(target, str) else target.pattern: [
            name for name, module in modules.items() if _is_hit(target, name, module, model)
        ]
        for target in listed
    }
    missed = [target for target, names in hits.items() if not names]
    if missed or not hits:
        raise ValueError(_nothing_hit(missed, modules))
    return hits


def inject(
    model: nn.Module, targets: Target | Sequence[Target], wrap: Callable[[nn.Module], nn.Module]
) -> InjectReport:
    """Replace, in place, every module that a target hits by `wrap` of it, and freeze all else but adapters.

    A module that is used in two places is wrapped once and stays one. The output of the model is unchanged
    if `wrap` makes layers that start at zero.

    Raises:
        ValueError: if a target hits nothing, or a module that is wrapped already; the model is as before.
        Exception: what `wrap` raises, with a note that names the module.
    """
    hits = match_targets(model, targets)
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {name: modules[name] for names in hits.values() for name in names}
    twice = [name for name, module in chosen.items() if isinstance(module, AdapterLayer)]
    if twice:
        raise ValueError(
            f"{len(twice)} modules are wrapped already, the first is {twice[0]!r}: "
            "choose targets without an adapter, or take the adapters off first with remove(model)"
        )
    wrapped = _wrap_or_restore(model, {id(module): (name, module) for name, module in chosen.items()}, wrap)
    for name, module in modules.items():
        if id(module) in wrapped:
            _replace(model, name, wrapped[id(module)])
    freeze_all_but_adapters(model)
    return InjectReport(hits, count_parameters(model))


def remove(model: nn.Module) -> None:
    """Take every adapter out, in place: each wrapped module gets its base back, the same object with the same bits.

    Merged layers are unmerged first, and biases and modules that the adapter replaced are given back as they were
    (torch_lora/replaced), ties between them too. Parameters stay frozen, as inject left them. A base that a wrap
    function made (QLoRA's 4-bit one) is what it made: the weight it was made from is gone.

    Raises:
        ValueError: if the model has no adapters.
    """
    layers = {name: module for name, module in _outer_modules(model).items() if isinstance(module, AdapterLayer)}
    if not layers and not replaced_tensors(model):
        raise ValueError("this model has no adapters to remove")
    for name, layer in layers.items():
        if layer.is_merged:
            layer.unmerge()
        _replace(model, name, layer.base)
    give_back(model)


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Let nothing but the adapters' tensors have gradients, in place; what they replaced whole stays as it was."""
    freeze(model)
    for layer in adapter_layers(model).values():
        for tensor in layer.adapter_tensors().values():
            tensor.requires_grad_(True)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Find the adapter layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Find a model's adapter layers as plain LoRA: A and B, and nothing beside them.

    Raises:
        ValueError: if one is of another method, whose effect A and B alone do not have.
    """
    layers = adapter_layers(model)
    others = {name: layer for name, layer in layers.items() if layer.adapter_tensors().keys() != {"A", "B"}}
    if others:
        name, layer = next(iter(others.items()))
        raise ValueError(
            f"{len(others)} layers are not plain LoRA, the first is {name}, a {layer.describe()} with "
            f"{sorted(layer.adapter_tensors())}: what they add is not scaling · B A; merge such an adapter instead"
        )
    return {name: layer.as_lora() for name, layer in layers.items() if isinstance(layer, LoRALayer)}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count what trains and what there is, as logical shapes.

    >>> count_parameters(nn.Linear(10, 5))
    ParameterCount(trainable=55, total=55)
    """
    parameters = list(model.parameters())
    stored: list[Any] = [module for module in model.modules() if isinstance(module, StoresNoFloats)]
    packed = sum(layer.in_features * layer.out_features for layer in stored)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ParameterCount(trainable, sum(p.numel() for p in parameters) + packed)


def _outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by every name they have, without those inside an adapter layer."""
    modules = dict(model.named_modules(remove_duplicate=False))
    inside = tuple(f"{name}." if name else "" for name, module in modules.items() if isinstance(module, AdapterLayer))
    return {name: module for name, module in modules.items() if not (inside and name.startswith(inside))}


def _is_hit(target: Target, name: str, module: nn.Module, model: nn.Module) -> bool:
    if isinstance(target, re.Pattern):
        return target.fullmatch(name) is not None
    if target == ALL_LINEAR:
        base = module.base if isinstance(module, AdapterLayer) else module
        return is_linear(base) and not _is_output_head(name, module, model)
    return name == target or name.endswith(f".{target}")


def _is_output_head(name: str, module: nn.Module, model: Any) -> bool:
    head_of = getattr(model, "get_output_embeddings", lambda: None)  # transformers' models can tell
    if (head := head_of()) is not None:
        return module is head
    return name.rpartition(".")[2] in OUTPUT_HEADS


def _nothing_hit(missed: list[str], modules: dict[str, nn.Module]) -> str:
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    linear = sorted({name.rpartition(".")[2] for name, module in modules.items() if is_linear(module)})
    if not missed:
        return f"no targets were given; this model's linear layers are {linear}"
    near = {name: difflib.get_close_matches(name, leaves, n=2, cutoff=0.5) for name in missed}
    hints = [f"; did you mean {' or '.join(map(repr, names))} for {name!r}?" for name, names in near.items() if names]
    return f"no module is named {missed}; this model's linear layers are {linear}{''.join(hints)}"


def _wrap_or_restore(
    model: nn.Module, modules: dict[int, tuple[str, nn.Module]], wrap: Callable[[nn.Module], nn.Module]
) -> dict[int, nn.Module]:
    """Wrap all or none: where one is refused, the flags that earlier ones froze are set back."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped: dict[int, nn.Module] = {}
    try:
        for key, (_, module) in modules.items():
            wrapped[key] = wrap(module)
    except Exception as error:
        name, _ = list(modules.values())[len(wrapped)]
        error.add_note(f"while {name} was wrapped")
        for parameter, required in flags:
            parameter.requires_grad_(required)
        raise
    return wrapped


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _hit_summary(names: list[str]) -> str:
    if len(names) == 1:
        return f"  1 module   {names[0]}"
    return f"{len(names):>3} modules  {names[0]} … {names[-1]}"
