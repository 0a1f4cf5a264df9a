"""Adapter files of the methods that are not LoRA's kin: the same two files, with tensors and keys of their own.

    keys       our name of a tensor → how its key in the file ends: {"l": ".ia3_l"}
    <key>      base_model.model.<path><end>, as PEFT begins them all

Nothing here knows a method: methods/peft_ia3, peft_adalora and houlsby_format use it. Only linear layers are looked at.
Whole modules can be in all of these files, biases alone where a config has a word for them.

Read before this file: peft_files, peft_format.
"""

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.inject import InjectReport, adapter_layers, count_parameters, inject
from minilora.torch_lora.layers import is_linear
from minilora.torch_lora.peft_config import CONFIG_FILE, HARMLESS, AdapterConfig, config_sha256, read_json_object
from minilora.torch_lora.peft_files import (
    BASE_FORM,
    TENSOR_FILE,
    form_of_bases,
    read_tensors,
    refuse_another_config,
    warn_of_another_base,
    warn_of_another_form,
    write_adapter,
)
from minilora.torch_lora.peft_format import refuse_merged
from minilora.torch_lora.peft_tensors import hits_by_leaf
from minilora.torch_lora.peft_whole import PREFIX, fit_whole, in_model, is_finite_in, whole_to_write
from minilora.torch_lora.replaced import replace_tensors, replaced_tensors, warn_of_untying

Tensors = dict[str, Tensor]  # of one layer, by our names
Found = dict[str, Tensors]  # by layer
Keep = Callable[[nn.Module], nn.Module]  # a linear layer → the same in the form that lay under an adapter


def write_layers(
    model: nn.Module,
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    base_name: str | None,
    base_sha256: str | None,
    *,
    has_biases: bool = False,
) -> None:
    """Write a model's adapter, its tensors by the layers' names with the keys' ends, and the modules that train whole.

    Both files are written, or none. `has_biases` says that the method's config has PEFT's word for biases that train.

    Raises:
        ValueError: if biases were replaced that it has no word for, or a tensor holds a NaN or an infinity.
    """
    whole, bias, modules = whole_to_write(model)
    if bias != "none" and not has_biases:
        raise ValueError(f"biases train beside this adapter (bias={bias!r}), and its file has no words for them")
    named = {f"{PREFIX}{name}": tensor.float() for name, tensor in tensors.items()}
    about = {"base_model_name_or_path": base_name, "inference_mode": True, "modules_to_save": modules or None}
    about |= {"bias": bias} if has_biases else {}
    metadata = {"base_sha256": base_sha256, BASE_FORM: form_of_bases(adapter_layers(model))}
    write_adapter(folder, dict(config) | about, named | whole, metadata)


def layers_of(model: nn.Module, kind: type[AdapterLayer]) -> dict[str, Any]:
    """A model's adapter layers, if there are some and all are of this kind.

    Raises:
        ValueError: naming the first that is not, or if there are none.
    """
    layers = adapter_layers(model)
    other = [f"{name} is a {type(layer).__name__}" for name, layer in layers.items() if not isinstance(layer, kind)]
    if other or not layers:
        reason = other[0] if other else "it has no adapter"
        raise ValueError(f"this model's adapter cannot be saved as one of {kind.__name__}: {reason}")
    return layers


def read_config_of(
    folder: Path, peft_type: str, known: set[str], problems_of: Callable[[dict[str, Any]], list[str]]
) -> dict[str, Any]:
    """Read the config of a method; keys that are neither `known` nor harmless are refused where they say something.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or asks for what is not read here (all of it at once).
    """
    config = read_json_object(folder / CONFIG_FILE)
    if config.get("peft_type") != peft_type:
        theirs = reprlib.repr(config.get("peft_type"))
        raise ValueError(f"{folder / CONFIG_FILE} has the peft_type {theirs}, not {peft_type!r}")
    unknown = sorted(key for key in config.keys() - HARMLESS - known - {"modules_to_save", "peft_type"} if config[key])
    problems = [f"{key[:60]!r}: not a key this reader knows, so it may change the result" for key in unknown]
    if not are_names(config.get("modules_to_save") or []):
        problems.append("modules_to_save: a list of names is needed")
    problems += problems_of(config)
    if problems:
        raise ValueError(f"{folder / CONFIG_FILE} is not read:\n  " + "\n  ".join(problems))
    return config


def as_it_is(base: nn.Module) -> nn.Module:
    """Leave a base layer in the form that it has."""
    return base


def fill_whole(name: str, layer: AdapterLayer, tensors: Tensors) -> None:
    """Put a file's tensors where the layer has them, of the same numbers in its own shape."""
    for ours, tensor in layer.adapter_tensors().items():
        tensor.copy_(tensors[ours].reshape(tensor.shape))


def load_layers(
    model: nn.Module,
    folder: Path,
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    wrap: Callable[[str, nn.Module, Tensors], AdapterLayer],
    misfits: Callable[[str, nn.Module, Tensors], list[str]],
    base_sha256: str | None,
    *,
    fill: Callable[[str, Any, Tensors], None] = fill_whole,
    promised: Collection[str] = (),
) -> InjectReport:
    """Read a file's tensors into a model, strictly: every tensor is used and every slot is filled.

    `misfits(name, layer or base, tensors)` tells what is wrong with the tensors of one layer, `wrap` of the same
    makes the layer where the model has none, and `fill(name, layer, tensors)` puts them there. `promised` are layers
    that the config names. Everything is checked before the model is touched.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it is damaged, was not written with the config beside it, or does not fit the model (all
            mismatches at once).
    """
    tensors, metadata = read_tensors(folder / TENSOR_FILE)
    refuse_another_config(folder, config_sha256(config), metadata)
    found, whole = _fit(model, tensors, keys, config, misfits, promised)
    refuse_merged(model)
    warn_of_another_base(metadata.get("base_sha256"), base_sha256)
    there = replaced_tensors(model)
    warn_of_untying(model, {name: t for name, t in in_model(model, whole).items() if name not in there})
    if not adapter_layers(model):
        names = {id(model.get_submodule(name)): name for name in found}
        patterns = [re.compile(re.escape(name)) for name in found]
        inject(model, patterns, lambda base: wrap(names[id(base)], base, found[names[id(base)]]))
    warn_of_another_form(metadata.get(BASE_FORM, ""), form_of_bases(adapter_layers(model)))
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            fill(name, layer, found[name])
    replace_tensors(model, in_model(model, whole), trainable=False)
    return InjectReport(hits_by_leaf(sorted(found)), count_parameters(model))


def _fit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    keys: Mapping[str, str],
    config: Mapping[str, Any],
    misfits: Callable[[str, nn.Module, Tensors], list[str]],
    promised: Collection[str],
) -> tuple[Found, dict[str, Tensor]]:
    """Sort a file's tensors: those of the layers, and those that replace the base's; refuse what does not fit, at once.

    Raises:
        ValueError: naming every tensor that is unknown, missing, of a wrong shape or not finite.
    """
    found, rest, problems = _by_layer(model, tensors, keys)
    idle = [name for name in promised if not any(f"{PREFIX}{name}{end}" in tensors for end in keys.values())]
    problems += [f"{reprlib.repr(name)}: the config names it, the file has no such layer" for name in idle]
    for name, its in found.items():
        problems += misfits(name, model.get_submodule(name), its)
    modules, bias = tuple(config.get("modules_to_save") or ()), config.get("bias") or "none"
    replacing = AdapterConfig(default=LoRAConfig(), modules_to_save=modules, bias=bias)
    whole, more = fit_whole(model, replacing, rest, set(found))
    problems += more
    if problems or not found:
        raise ValueError("this adapter does not fit the model:\n  " + "\n  ".join(sorted(problems) or ["it is empty"]))
    return found, whole


def _by_layer(
    model: nn.Module, tensors: Mapping[str, Tensor], keys: Mapping[str, str]
) -> tuple[Found, dict[str, Tensor], list[str]]:
    """Sort a file's tensors by linear layers; what is left; and what is wrong with names and numbers."""
    modules = dict(model.named_modules())
    bases = {name: m.base if isinstance(m, AdapterLayer) else m for name, m in modules.items()}
    adapted = adapter_layers(model)
    found: Found = {}
    rest, problems = {}, []
    for key, tensor in tensors.items():
        ours = next((ours for ours, end in keys.items() if key.startswith(PREFIX) and key.endswith(end)), None)
        name = key.removeprefix(PREFIX).removesuffix(keys[ours]) if ours else ""
        if ours is None:
            rest[key] = tensor
        elif not name or name not in bases or not is_linear(bases[name]):
            problems.append(f"{key}: the model has no linear layer of that name")
        elif not is_finite_in(tensor, torch.float32):
            problems.append(f"{key}: not finite floats")
        else:
            found.setdefault(name, {})[ours] = tensor
    problems += [
        f"{n}: has {sorted(its)}, {sorted(keys)} are needed" for n, its in found.items() if its.keys() != keys.keys()
    ]
    problems += [f"{name}: missing from the file" for name in adapted if name not in found]
    problems += [f"{name}: has no adapter in the model" for name in found if adapted and name not in adapted]
    return found, rest, problems


def are_names(value: object) -> bool:
    """Whether a value of a config is a list of names."""
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)
