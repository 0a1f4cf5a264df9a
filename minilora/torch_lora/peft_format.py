"""Read and write adapters as PEFT does: adapter_config.json and adapter_model.safetensors in one folder.

    peft_files       the two files, whatever method they are of
    peft_config      the keys of the config, and which of them are refused
    peft_patterns    layers with an r or an alpha of their own
    peft_tensors     A and B by PEFT's names
    peft_whole       biases and modules that the adapter replaces whole

Which layers an adapter touches is read from the names of its tensors, compared as text with the model's own names;
nothing in a file becomes a path, a regular expression that is executed, or code. Only safetensors are opened.
Read before this file: inject, wrap, and these five.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from minilora.torch_lora.adapter_layer import StoresNoFloats
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.inject import InjectReport, adapter_layers, count_parameters, inject
from minilora.torch_lora.layers import LoRAConv1D, LoRALayer
from minilora.torch_lora.peft_config import CONFIG_FILE, AdapterConfig, config_of, read_config
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
from minilora.torch_lora.peft_tensors import fit_adapter, hits_by_leaf, matrices_by_key
from minilora.torch_lora.peft_whole import in_model, whole_to_write
from minilora.torch_lora.replaced import replace_tensors, replaced_tensors, warn_of_untying
from minilora.torch_lora.train_whole import refuse_to_train_without_floats
from minilora.torch_lora.wrap import lora_layer, refuse_to_fill


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    base_name: str | None = None,
    base_sha256: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write a model's adapter as PEFT does, so that PEFT, vLLM and load_adapter open it.

    Layers may differ in r and alpha; biases and modules that train whole (train_biases, train_modules) are written, in
    their own dtype. `base_name` is what PEFT will look the base up by; `base_sha256` lets load_adapter warn on another
    base. Files are written under a temporary name and renamed: a reader never sees half of one.

    Raises:
        ValueError: if the model has no adapter, its layers or biases differ in a way that PEFT's config has no words
            for, or a value in it is NaN or infinite; nothing is written then.
    """
    layers = lora_like(adapter_layers(model))
    if not layers:
        raise ValueError("this model has no adapter to save: inject(model, targets, wrap) gives it one")
    use_dora = _trains_magnitudes(layers)
    whole, bias, modules = whole_to_write(model)
    config = config_of(layers, shortest_targets(model, layers)) | {
        "base_model_name_or_path": base_name,
        "bias": bias,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "modules_to_save": modules or None,
        "task_type": task_type,
    }
    config |= {"use_dora": True} if use_dora else {}  # older versions of PEFT know few keys
    matrices = {k: tensor for name, layer in layers.items() for k, tensor in matrices_by_key(name, layer).items()}
    tensors = {key: tensor.float() for key, tensor in matrices.items()} | whole
    write_adapter(folder, config, tensors, {"base_sha256": base_sha256, BASE_FORM: form_of_bases(layers)})


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    wrap: Callable[..., nn.Module] = lora_layer,
    *,
    base_sha256: str | None = None,
    train_replaced: bool = False,
) -> InjectReport:
    """Read a PEFT adapter into a model, strictly: every tensor is used and every slot is filled.

    Where the model has no adapters, `wrap(base, r=…, alpha=…, dropout=…, use_rslora=…)` makes them; where it has,
    they must be the file's, layer by layer. Everything is checked before the model is touched. A base other than
    the one named in the file (by its SHA-256, where both are known) is warned of; so is a pattern of the config that
    hits no layer, and a replaced module that was tied to another.

    Biases and whole modules of the file take the place of the model's own, in the model's dtype; remove(model) gives
    those back. They are frozen unless `train_replaced`, or where they stand already and train.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, the config asks for something that is not plain LoRA (with the reason), is
            not the one that the tensors were written with, or they do not fit the model (all mismatches at once).
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG_FILE)
    tensors, metadata = read_tensors(folder / TENSOR_FILE)
    refuse_another_config(folder, config.sha256, metadata)
    pairs, whole = fit_adapter(model, tensors, config)
    settings = {name: config.settings_of(name) for name in pairs}
    _refuse_another_method(adapter_layers(model), config)
    _refuse_other_settings(model, settings)
    refuse_merged(model)
    if train_replaced:
        refuse_to_train_without_floats(model, list(in_model(model, whole)))
    _warn_of_idle_patterns(config, settings)
    warn_of_another_base(metadata.get("base_sha256"), base_sha256)
    there, trained_over = replaced_tensors(model), metadata.get(BASE_FORM, "")
    warn_of_untying(model, {name: t for name, t in in_model(model, whole).items() if name not in there})
    if not adapter_layers(model):
        _inject_by_name(model, config, sorted(pairs), wrap, set(whole) if train_replaced else set())
    layers = lora_like(adapter_layers(model))
    warn_of_another_form(trained_over, form_of_bases(layers))
    with torch.no_grad():
        for name, pair in pairs.items():
            for ours, tensor in layers[name].adapter_tensors().items():
                tensor.copy_(pair[ours])
    replace_tensors(model, in_model(model, whole), trainable=train_replaced)
    return InjectReport(hits_by_leaf(sorted(pairs)), count_parameters(model))


def shortest_targets(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Name the layers by their last parts, or by their whole names where the last parts hit other modules too."""
    leaves = {name.rpartition(".")[2] for name in layers}
    inside = tuple(f"{name}." for name in layers)
    hit = {n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves and not n.startswith(inside)}
    return sorted(leaves if hit == set(layers) else layers)


def _inject_by_name(
    model: nn.Module, config: AdapterConfig, layers: list[str], wrap: Callable[..., nn.Module], trained: set[str]
) -> None:
    """Wrap each layer with its own settings; refuse a base that would give no gradient to a bias that is to train."""
    names = {id(model.get_submodule(name)): name for name in layers}

    def wrap_one(base: nn.Module) -> nn.Module:
        its, bias = config.settings_of(names[id(base)]), f"{names[id(base)]}.bias"
        layer = wrap(base, r=its.r, alpha=its.alpha, dropout=its.dropout, use_rslora=its.use_rslora)
        _refuse_another_method({names[id(base)]: layer}, config)
        if bias in trained and isinstance(layer.base, StoresNoFloats):
            kind = type(layer.base).__name__
            raise ValueError(f"{bias} cannot train: {kind} gives it no gradient; load with train_replaced=False")
        return layer

    inject(model, [re.compile(re.escape(name)) for name in layers], wrap_one)


def lora_like(layers: Mapping[str, nn.Module]) -> dict[str, LoRALayer]:
    """The same layers as LoRA's, or DoRA's with an m more.

    Raises:
        ValueError: naming the first that is of another method.
    """
    found = {name: layer.as_lora() for name, layer in layers.items() if isinstance(layer, LoRALayer)}
    odd = [name for name in layers if name not in found or found[name].adapter_tensors().keys() - {"A", "B", "m"}]
    if odd:
        raise ValueError(f"{odd[0]} is a {type(layers[odd[0]]).__name__}: an adapter file of LoRA has no words for it")
    return found


def _trains_magnitudes(layers: Mapping[str, nn.Module]) -> bool:
    """Whether these are layers of DoRA, with an m beside A and B, or of LoRA; PEFT's config has one word for all.

    Raises:
        ValueError: if some are and others are not, or they are neither.
    """
    tensors = {name: layer.adapter_tensors().keys() for name, layer in lora_like(layers).items()}
    first, others = next(iter(tensors)), [name for name in tensors if tensors[name] != next(iter(tensors.values()))]
    if others:
        raise ValueError(
            f"{first} trains {sorted(tensors[first])}, {others[0]} trains {sorted(tensors[others[0]])}: "
            "PEFT's config has one use_dora for all layers"
        )
    return "m" in tensors[first]


def _refuse_another_method(layers: Mapping[str, nn.Module], config: AdapterConfig) -> None:
    """Refuse layers whose tensors are not those of the file: LoRA's where that has DoRA's, or the reverse.

    Raises:
        ValueError: naming the first.
    """
    for layer in layers.values():
        refuse_to_fill(layer)
    if layers and _trains_magnitudes(layers) != config.use_dora:
        name, layer = next(iter(layers.items()))
        way_out = "wrap=minilora.methods.dora_layer makes" if config.use_dora else "wrap=lora_layer makes"
        raise ValueError(
            f"the file's use_dora is {config.use_dora}, but {name} is a {type(layer).__name__}: {way_out} its layers"
        )


def _refuse_other_settings(model: nn.Module, settings: dict[str, LoRAConfig]) -> None:
    layers = lora_like(adapter_layers(model))
    ours = {name: (layer.r, layer.alpha, layer.use_rslora) for name, layer in layers.items()}
    theirs = {name: (its.r, its.alpha, its.use_rslora) for name, its in settings.items()}
    other = [name for name in ours if ours[name] != theirs[name]]
    if other:
        raise ValueError(
            f"the file has (r, alpha, use_rslora) = {theirs[other[0]]}, but {len(other)} layers of the model differ, "
            f"the first is {other[0]} with {ours[other[0]]}: remove(model) first, and let load_adapter make the layers"
        )


def refuse_merged(model: nn.Module) -> None:
    """Refuse a model with merged layers, naming the first, with a ValueError."""
    merged = [name for name, layer in adapter_layers(model).items() if layer.is_merged]
    if merged:
        raise ValueError(
            f"{len(merged)} layers of the model are merged, the first is {merged[0]}: their tensors do nothing now, "
            "so loading would change nothing; unmerge() them first"
        )


def _warn_of_idle_patterns(config: AdapterConfig, settings: Mapping[str, LoRAConfig]) -> None:
    idle = config.idle_patterns(settings)
    if idle:
        warnings.warn(
            f"the config's patterns {idle} hit no layer of this adapter: they change nothing, in PEFT neither",
            stacklevel=3,
        )
