"""AdaLoRA's adapters in PEFT's files: adapter_config.json of type ADALORA, and its tensors.

    Q, Λ, P (A, E, B)   base_model.model.<path>.lora_A (k, in), .lora_E (k, 1), .lora_B (out, k)     (no ".weight")
    r at the start      init_r, one for all layers; so is lora_alpha
    rank_pattern        {"<path>.lora_E": [true, false, …]}: which of init_r triplets are in the file, k of them

A triplet that is not in the file does nothing, and PEFT leaves the factor lora_alpha / init_r as it was. The schedule
is not kept: PEFT needs some total_step to open a file, so one stands there.

Read before this file: adalora, torch_lora/peft_format.
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from minilora.methods.adalora import (
    AdaLoRAConv1D,
    AdaLoRALinear,
    RankReport,
    adalora_layer,
    adalora_layers,
    rank_report,
)
from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.inject import adapter_layers, inject
from minilora.torch_lora.peft_config import CONFIG_FILE, AdapterConfig, problems_in, read_json_object
from minilora.torch_lora.peft_format import (
    BASE_FORM,
    TENSOR_FILE,
    form_of_bases,
    shortest_targets,
    warn_of_another_base,
    warn_of_another_form,
    write_adapter,
)
from minilora.torch_lora.peft_tensors import read_tensors
from minilora.torch_lora.peft_whole import PREFIX, fit_whole, in_model, is_finite_in, whole_to_write
from minilora.torch_lora.replaced import replace_tensors, replaced_tensors, warn_of_untying

SUFFIXES = {"A": ".lora_A", "B": ".lora_B", "E": ".lora_E"}
SCHEDULE = {"beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"}


def save_adalora(
    model: nn.Module,
    folder: str | Path,
    *,
    base_name: str | None = None,
    base_sha256: str | None = None,
    task_type: str | None = "CAUSAL_LM",
) -> None:
    """Write a model's AdaLoRA adapter as PEFT does: the triplets in use, and which they are.

    Raises:
        ValueError: if the model has no AdaLoRA layer or has others beside them, they differ in r or alpha, or a value
            is NaN or infinite; nothing is written then.
    """
    layers = adalora_layers(model)
    r, alpha = _one_setting(adapter_layers(model))
    whole, bias, modules = whole_to_write(model)
    config: dict[str, object] = {
        "base_model_name_or_path": base_name,
        "bias": bias,
        "fan_in_fan_out": any(isinstance(layer, AdaLoRAConv1D) for layer in layers.values()),
        "inference_mode": True,
        "init_lora_weights": True,
        "init_r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "modules_to_save": modules or None,
        "peft_type": "ADALORA",
        "target_modules": shortest_targets(model, layers),
        "task_type": task_type,
        "total_step": 1,
    }
    chosen = {name: layer.in_use() for name, layer in layers.items()}
    if not all(in_use.all() for in_use in chosen.values()):
        config["rank_pattern"] = {f"{name}{SUFFIXES['E']}": in_use.tolist() for name, in_use in chosen.items()}
    tensors = {
        f"{PREFIX}{name}{SUFFIXES[letter]}": tensor.float()
        for name, layer in layers.items()
        for letter, tensor in _triplets(layer, chosen[name]).items()
    }
    metadata = {"base_sha256": base_sha256, BASE_FORM: form_of_bases(layers)}
    write_adapter(folder, config, tensors | whole, {key: text for key, text in metadata.items() if text})


def load_adalora(model: nn.Module, folder: str | Path, *, base_sha256: str | None = None) -> RankReport:
    """Read an AdaLoRA adapter of PEFT's into a model, strictly: every tensor is used and every slot is filled.

    Where the model has no adapters they are made; where it has, they must be the file's. Triplets that were pruned are
    zero in P and Q too, and stay so. Everything is checked before the model is touched.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, the config asks for something else, or tensors do not fit the model (all
            mismatches at once).
    """
    folder = Path(folder)
    config = read_adalora_config(folder / CONFIG_FILE)
    tensors, metadata = read_tensors(folder / TENSOR_FILE)
    found, whole = _fit(model, tensors, config)
    warn_of_another_base(metadata.get("base_sha256"), base_sha256)
    there = replaced_tensors(model)
    warn_of_untying(model, {name: t for name, t in in_model(model, whole).items() if name not in there})
    if not adapter_layers(model):
        its = config.settings
        targets = [re.compile(re.escape(name)) for name in found]
        inject(model, targets, lambda base: adalora_layer(base, r=its.r, alpha=its.alpha, dropout=its.dropout))
    layers = adalora_layers(model)
    warn_of_another_form(metadata.get(BASE_FORM, ""), form_of_bases(layers))
    for name, layer in layers.items():
        _fill(layer, found[name], config.kept_of(name))
    replace_tensors(model, in_model(model, whole), trainable=False)
    return rank_report(model)


@dataclass(frozen=True, kw_only=True)
class AdaLoRAFileConfig:
    """What of a config decides the result."""

    settings: LoRAConfig
    kept: Mapping[str, list[bool]]  # of the layers whose triplets are not all in the file
    bias: str
    modules_to_save: tuple[str, ...]

    def kept_of(self, name: str) -> Bool[Tensor, "r"]:
        """Which triplets of a layer are in the file."""
        return torch.tensor(self.kept.get(name, [True] * self.settings.r))


def read_adalora_config(path: Path) -> AdaLoRAFileConfig:
    """Read an adapter_config.json of type ADALORA.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another type, or asks for what is not read here (all of it at once, with the reasons).
    """
    config = read_json_object(path)
    r, pattern = config.get("init_r", 12), config.get("rank_pattern") or {}  # 12 is PEFT's default
    like_lora = {key: value for key, value in config.items() if key not in SCHEDULE | {"init_r", "rank_pattern"}}
    problems = problems_in(like_lora | {"peft_type": "LORA"})
    if config.get("peft_type") != "ADALORA":
        problems.append(f"peft_type = {reprlib.repr(config.get('peft_type'))}: this reader knows 'ADALORA'")
    if config.get("use_dora"):
        problems.append("use_dora = True: AdaLoRA has no magnitudes, in PEFT neither")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        problems.append(f"init_r = {reprlib.repr(r)}: a whole number of 1 or more is needed")
    if not isinstance(pattern, dict) or not all(_is_choice_of(r, kept) for kept in pattern.values()):
        problems.append(
            f"rank_pattern = {reprlib.repr(pattern)}: names are needed, each with init_r times true or false"
        )
    if problems:
        raise ValueError(f"{path} describes an adapter that is not plain AdaLoRA:\n  " + "\n  ".join(problems))
    return AdaLoRAFileConfig(
        settings=LoRAConfig(r=r, alpha=config.get("lora_alpha", 8), dropout=config.get("lora_dropout", 0.0)),
        kept={name.removesuffix(SUFFIXES["E"]): kept for name, kept in pattern.items()},
        bias=config.get("bias", "none"),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
    )


def _is_choice_of(r: int, kept: object) -> bool:
    return isinstance(kept, list) and len(kept) == r and all(isinstance(k, bool) for k in kept)


def _one_setting(layers: Mapping[str, nn.Module]) -> tuple[int, float]:
    """The r and alpha that all layers have.

    Raises:
        ValueError: if they differ, or a layer is of another method.
    """
    found: dict[str, tuple[int, float]] = {}
    for name, layer in layers.items():
        if not isinstance(layer, AdaLoRALinear):
            raise ValueError(f"{name} is a {type(layer).__name__}: a file of AdaLoRA has no words for it")
        found[name] = layer.r, layer.alpha
    first = next(iter(found))
    other = next((name for name in found if found[name] != found[first]), None)
    if other is not None:
        raise ValueError(
            f"{first} has (r, alpha) = {found[first]}, {other} has {found[other]}: PEFT's AdaLoRA has one for all "
            "layers; give all layers the same, or save what to_lora makes of them"
        )
    return found[first]


def _fit(
    model: nn.Module, tensors: Mapping[str, Tensor], config: AdaLoRAFileConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort a file's tensors: A, B and E by layer, and those that replace the base's; refuse what does not fit, at once.

    Raises:
        ValueError: naming every tensor that is unknown, missing, of a wrong shape or not finite.
    """
    found, rest = _by_layer(tensors)
    adapted = adapter_layers(model)
    idle = [name for name in config.kept if name not in found]
    problems = [f"rank_pattern names {reprlib.repr(name)}: the file has no such layer" for name in idle]
    problems += [p for name, its in found.items() for p in _misfits(model, name, its, config)]
    problems += [f"{name}: missing from the file" for name in adapted if name not in found]
    problems += [f"{name}: has no adapter in the model" for name in found if adapted and name not in adapted]
    replacing = AdapterConfig(default=config.settings, bias=config.bias, modules_to_save=config.modules_to_save)
    whole, more = fit_whole(model, replacing, rest, set(found))
    problems += more
    if problems or not found:
        raise ValueError("this adapter does not fit the model:\n  " + "\n  ".join(sorted(problems) or ["it is empty"]))
    return found, whole


def _triplets(layer: AdaLoRALinear, chosen: Bool[Tensor, "r"]) -> dict[str, Tensor]:
    return {"A": layer.A[chosen], "B": layer.B[:, chosen], "E": layer.E[chosen, None]}


def _by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort a file's tensors: A, B and E by layer, and the rest."""
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, tensor in tensors.items():
        letter = next((letter for letter, suffix in SUFFIXES.items() if key.endswith(suffix)), None)
        if letter and key.startswith(PREFIX):
            found.setdefault(key.removeprefix(PREFIX).removesuffix(SUFFIXES[letter]), {})[letter] = tensor
        else:
            rest[key] = tensor
    return found, rest


def _misfits(model: nn.Module, name: str, its: Mapping[str, Tensor], config: AdaLoRAFileConfig) -> list[str]:
    """Why the tensors of a layer do not fit the module of that name."""
    module: Any = dict(model.named_modules(remove_duplicate=False)).get(name, nn.Identity())
    if isinstance(module, AdaLoRALinear):
        there, asked = (module.r, module.alpha), (config.settings.r, config.settings.alpha)
        if module.is_merged:
            return [f"{name}: it is merged, so loading would change nothing; unmerge() it first"]
        if there != asked:
            return [f"{name}: (r, alpha) is {asked} in the file, {there} in the model; remove(model) first"]
        kind, base = type(module), module.base
    else:
        kind, base = (AdaLoRAConv1D if AdaLoRAConv1D.accepts(module) else AdaLoRALinear), module
    if not kind.accepts(base):
        return [f"{name}: the model has no linear layer of that name"]
    in_features, out_features = kind.features(base)
    k = sum(config.kept[name]) if name in config.kept else config.settings.r
    needed = {"A": (k, in_features), "B": (out_features, k), "E": (k, 1)}
    problems = [f"{name}{SUFFIXES[letter]}: missing from the file" for letter in needed.keys() - its]
    for letter, tensor in its.items():
        if tuple(tensor.shape) != needed[letter]:
            problems.append(f"{name}{SUFFIXES[letter]}: shape {tuple(tensor.shape)}, {needed[letter]} is needed")
        elif not is_finite_in(tensor, torch.float32):
            problems.append(f"{name}{SUFFIXES[letter]}: not finite floats")
    return problems


@torch.no_grad()
def _fill(layer: AdaLoRALinear, its: Mapping[str, Tensor], kept: Bool[Tensor, "r"]) -> None:
    """Put the file's triplets where they were, and zeros where there are none."""
    layer.kept.copy_(kept)
    chosen = layer.kept
    for tensor in layer.adapter_tensors().values():
        tensor.zero_()
    layer.A[chosen] = its["A"].to(layer.A)
    layer.B[:, chosen] = its["B"].to(layer.B)
    layer.E[chosen] = its["E"][:, 0].to(layer.E)
