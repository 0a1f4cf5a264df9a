"""Biases and whole modules in PEFT's adapter files: which tensors a config promises, and which a model has to write.

    bias "lora_only"     base_model.model.<path>.base_layer.bias of every adapted layer that has a bias
    bias "all"           the same, and base_model.model.<path>.bias of every other module
    modules_to_save      base_model.model.<path>.<name in its state>, for modules whose names end in one of the words

PEFT compares the ends of names without regard to dots ("norm" is the end of "input_layernorm"); so does this file, when
it reads and before it writes. A base tensor that the config does not promise (PEFT puts adapted or resized embeddings
into the file) is accepted only where it equals the model's own. Read before this file: replaced, peft_config.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from minilora.torch_lora.adapter_layer import FLOATS
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.peft_config import AdapterConfig
from minilora.torch_lora.replaced import replaced_tensors

PREFIX = "base_model.model."
BASE = ".base_layer."  # stands before a tensor of the base where its layer has an A and a B
UNUSED = (".original_module.", ".modules_to_save.")  # PEFT writes these beside a saved module's bias, and reads neither


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors by the names that they have without adapters; those of the adapters are left out."""
    layers, state = adapter_layers(model), model.state_dict(keep_vars=True)
    return {_without_adapter(n, layers): tensor for n, tensor in state.items() if n.rpartition(".")[0] not in layers}


def in_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors of the base by where they are in the model: under its layer's adapter, if that has one."""
    layers = adapter_layers(model)
    split = {name: name.rpartition(".") for name in tensors}
    places = {name: f"{owner}.base.{leaf}" if owner in layers else name for name, (owner, _, leaf) in split.items()}
    return {places[name]: tensor for name, tensor in tensors.items()}


def fit_whole(
    model: nn.Module, config: AdapterConfig, tensors: Mapping[str, Tensor], adapted: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Sort out a file's tensors that are no LoRA matrices: those to replace, by the base's names, and the problems."""
    state = base_state(model)
    saved = _tensors_of(_ending_in(config.modules_to_save, state), state)
    promised = {_peft_key(name, adapted): name for name in saved | _biases(config.bias, state, adapted)}
    whole = {name: tensors[key] for key, name in promised.items() if key in tensors}
    problems = [f"{key}: missing from the file" for key in promised if key not in tensors]
    problems += [p for key, name in promised.items() if name in whole for p in _misfit(key, whole[name], state[name])]
    for key in tensors.keys() - promised.keys():
        name = key.removeprefix(PREFIX).replace(BASE, ".")
        copied = next((u for u in UNUSED if u in key and key.replace(u, ".") in promised), None)
        if key.startswith(PREFIX) and name in state:
            problems += _copy_problems(key, tensors[key], state[name])
        elif copied is None or config.bias != "all" or not key.endswith(".bias"):
            problems.append(f"{key}: not the name of an adapter's tensor, nor of one that the config says is replaced")
    both = sorted(layer for layer in adapted if any(name.startswith(f"{layer}.") for name in saved))
    problems += [f"{layer}: the file both adapts it and replaces it whole (modules_to_save)" for layer in both]
    if config.modules_to_save and not saved:
        problems.append(f"modules_to_save = {list(config.modules_to_save)}: no module's name ends so")
    here = {_without_adapter(name, adapter_layers(model)) for name in replaced_tensors(model)}
    problems += [f"{name}: replaced in the model, not in the file" for name in sorted(here - whole.keys())]
    return whole, problems


def whole_to_write(model: nn.Module) -> tuple[dict[str, Tensor], str, list[str]]:
    """What a model has replaced: tensors by PEFT's keys, and the config's words for bias and modules_to_save.

    Raises:
        ValueError: if PEFT has no words for it: a part of the biases, or modules whose names end others' names.
    """
    layers, state = adapter_layers(model), base_state(model)
    replaced = {_without_adapter(name, layers): tensor for name, tensor in replaced_tensors(model).items()}
    owners = {name.rpartition(".")[0] for name in replaced if name.rpartition(".")[2] != "bias"}
    modules = sorted(o for o in owners if not any(o.startswith(f"{other}.") for other in owners))
    saved = _tensors_of(modules, state)
    wrong = sorted(_tensors_of(_ending_in(modules, state), state) - replaced.keys())
    wrong += sorted(layer for layer in layers if any(f".{module}." in f".{layer}." for module in modules))
    if wrong:
        raise ValueError(
            f"PEFT would take {wrong[0]} for a part of modules_to_save = {modules}: it compares their ends"
        )
    biases = replaced.keys() - saved
    kinds = {kind: _biases(kind, state, layers) - saved for kind in ("none", "lora_only", "all")}
    bias = next((kind for kind, names in kinds.items() if names == biases), None)
    if bias is None:
        every, adapted = len(kinds["all"]), len(kinds["lora_only"])
        raise ValueError(
            f"{len(biases)} biases were replaced, neither all {every} nor the {adapted} of adapted layers: "
            "PEFT's config has no word for that; call train_biases when every adapter is in place"
        )
    # copies: a tied bias is written under each of its names, and safetensors takes no memory that is shared
    written = {name: tensor.clone() if name.endswith("bias") else tensor for name, tensor in replaced.items()}
    return {_peft_key(name, layers): tensor for name, tensor in written.items()}, bias, modules


def _without_adapter(name: str, layers: Iterable[str]) -> str:
    owner, _, leaf = name.rpartition(".")
    layer = owner.removesuffix(".base")
    return f"{layer}.{leaf}" if layer != owner and layer in layers else name


def _peft_key(name: str, adapted: Iterable[str]) -> str:
    owner, _, leaf = name.rpartition(".")
    return f"{PREFIX}{owner}{BASE}{leaf}" if owner in adapted else f"{PREFIX}{name}"


def _ending_in(words: Iterable[str], state: Iterable[str]) -> list[str]:
    """The modules that hold tensors and whose names end in one of the words."""
    modules = {name[:at] for name in state for at, letter in enumerate(name) if letter == "."}
    return sorted(module for module in modules if module.endswith(tuple(words)))


def _tensors_of(modules: Iterable[str], state: Iterable[str]) -> set[str]:
    starts = tuple(f"{module}." for module in modules)
    return {name for name in state if name.startswith(starts)}


def _biases(kind: str, state: Mapping[str, Tensor], adapted: Iterable[str]) -> set[str]:
    """The biases that PEFT's word means: parameters of that name, of all modules or of the adapted ones."""
    every = {n for n, t in state.items() if n.rpartition(".")[2] == "bias" and isinstance(t, nn.Parameter)}
    return {"none": set(), "all": every, "lora_only": every & {f"{layer}.bias" for layer in adapted}}[kind]


def _misfit(key: str, tensor: Tensor, there: Tensor) -> list[str]:
    if tensor.shape != there.shape:
        return [f"{key}: shape {tuple(tensor.shape)}, the model has {tuple(there.shape)}"]
    if not there.is_floating_point():
        return [] if tensor.dtype == there.dtype else [f"{key}: {tensor.dtype}, the model has {there.dtype}"]
    return [] if is_finite_in(tensor, there.dtype) else [f"{key}: not finite floats"]


def is_finite_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor is of ordinary floats that stay finite in another dtype."""
    return tensor.dtype in FLOATS and bool(torch.isfinite(tensor.to(dtype)).all())


def _copy_problems(key: str, copy: Tensor, there: Tensor) -> list[str]:
    """A copy of a base tensor tells nothing new where it equals the model's own; otherwise the base is another one."""
    same = copy.dtype in FLOATS and torch.equal(there.detach().to("cpu", copy.dtype), copy)
    return [] if same else [f"{key}: not the model's own: it was trained or resized, and the config does not say so"]
