"""AdaLoRA's adapters in PEFT's files: adapter_config.json of type ADALORA, and its tensors.

    Q, Λ, P (A, E, B)   base_model.model.<path>.lora_A (k, in), .lora_E (k, 1), .lora_B (out, k)     (no ".weight")
    r at the start      init_r, one for all layers; so is lora_alpha
    rank_pattern        {"<path>.lora_E": [true, false, …]}: which of init_r triplets are in the file, k of them

A triplet that is not in the file does nothing, and PEFT leaves the factor lora_alpha / init_r as it was. The schedule
is not kept: PEFT needs some total_step to open a file, so one stands there.

Read before this file: adalora, torch_lora/peft_layers.
"""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from minilora.methods.adalora import AdaLoRAConv1D, AdaLoRALinear, RankReport, adalora_layer, rank_report
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.config import LoRAConfig, is_count
from minilora.torch_lora.layers import features_of
from minilora.torch_lora.peft_config import CONFIG_FILE, problems_in, read_json_object
from minilora.torch_lora.peft_format import shortest_targets
from minilora.torch_lora.peft_layers import Keep, Tensors, as_it_is, layers_of, load_layers, write_layers

KEYS = {"A": ".lora_A", "B": ".lora_B", "E": ".lora_E"}
SCHEDULE = {"beta1", "beta2", "deltaT", "orth_reg_weight", "target_r", "tfinal", "tinit", "total_step"}
PEFTS_R = 12  # where a config has no init_r


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
    layers = layers_of(model, AdaLoRALinear)
    r, alpha = _one_setting(layers)
    config: dict[str, object] = {
        "fan_in_fan_out": any(isinstance(layer, AdaLoRAConv1D) for layer in layers.values()),
        "init_lora_weights": True,
        "init_r": r,
        "lora_alpha": alpha,
        "lora_dropout": max(layer.dropout for layer in layers.values()),
        "peft_type": "ADALORA",
        "target_modules": shortest_targets(model, layers),
        "task_type": task_type,
        "total_step": 1,
    }
    chosen = {name: layer.in_use() for name, layer in layers.items()}
    if not all(in_use.all() for in_use in chosen.values()):
        config["rank_pattern"] = {f"{name}{KEYS['E']}": in_use.tolist() for name, in_use in chosen.items()}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        k = chosen[name]
        triplets = {"A": layer.A[k], "B": layer.B[:, k], "E": layer.E[k, None]}
        tensors |= {f"{name}{KEYS[ours]}": tensor for ours, tensor in triplets.items()}
    write_layers(model, folder, tensors, config, base_name, base_sha256, has_biases=True)


def load_adalora(
    model: nn.Module, folder: str | Path, *, base_sha256: str | None = None, keep: Keep = as_it_is
) -> RankReport:
    """Read an AdaLoRA adapter of PEFT's into a model, strictly: every tensor is used and every slot is filled.

    Where the model has no adapters they are made; where it has, they must be the file's. Triplets that were pruned are
    zero in P and Q too, and stay so. Everything is checked before the model is touched.

    `keep` gives a linear layer the form that it had under the adapter: qlora.linear.kept_as makes it.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, the config asks for something else, or tensors do not fit the model (all
            mismatches at once).
    """
    folder = Path(folder)
    config = read_adalora_config(folder / CONFIG_FILE)
    dropout = config.get("lora_dropout", 0.0)
    its = LoRAConfig(r=config["init_r"], alpha=config.get("lora_alpha", 8), dropout=dropout)
    kept = {name.removesuffix(KEYS["E"]): choice for name, choice in (config.get("rank_pattern") or {}).items()}

    def misfits(name: str, module: nn.Module, tensors: Tensors) -> list[str]:
        return _misfits(name, module, tensors, its, sum(kept[name]) if name in kept else its.r)

    def wrap(name: str, base: nn.Module, tensors: Tensors) -> AdaLoRALinear:
        return adalora_layer(keep(base), r=its.r, alpha=its.alpha, dropout=its.dropout)

    def fill(name: str, layer: AdaLoRALinear, tensors: Tensors) -> None:
        _fill(layer, tensors, torch.tensor(kept.get(name, [True] * its.r)))

    load_layers(model, folder, KEYS, config, wrap, misfits, base_sha256, fill=fill, promised=kept)
    return rank_report(model)


def read_adalora_config(path: Path) -> dict[str, Any]:
    """Read an adapter_config.json of type ADALORA.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another type, or asks for what is not read here (all of it at once, with the reasons).
    """
    config = {"init_r": PEFTS_R} | read_json_object(path)
    r, pattern = config["init_r"], config.get("rank_pattern") or {}
    like_lora = {key: value for key, value in config.items() if key not in SCHEDULE | {"init_r", "rank_pattern"}}
    problems = problems_in(like_lora | {"peft_type": "LORA"})
    if config.get("peft_type") != "ADALORA":
        problems.append(f"peft_type = {reprlib.repr(config.get('peft_type'))}: this reader knows 'ADALORA'")
    if config.get("use_dora"):
        problems.append("use_dora = True: AdaLoRA has no magnitudes, in PEFT neither")
    if not is_count(r):
        problems.append(f"init_r = {reprlib.repr(r)}: a whole number of 1 or more is needed")
    if not isinstance(pattern, dict) or not all(_is_choice_of(r, kept) for kept in pattern.values()):
        problems.append(
            f"rank_pattern = {reprlib.repr(pattern)}: names are needed, each with init_r times true or false"
        )
    if problems:
        raise ValueError(f"{path} describes an adapter that is not plain AdaLoRA:\n  " + "\n  ".join(problems))
    return config


def _is_choice_of(r: int, kept: object) -> bool:
    return isinstance(kept, list) and len(kept) == r and all(isinstance(k, bool) for k in kept)


def _one_setting(layers: Mapping[str, AdaLoRALinear]) -> tuple[int, float]:
    """The r and alpha that all layers have.

    Raises:
        ValueError: if they differ.
    """
    found = {name: (layer.r, layer.alpha) for name, layer in layers.items()}
    first = next(iter(found))
    other = next((name for name in found if found[name] != found[first]), None)
    if other is not None:
        raise ValueError(
            f"{first} has (r, alpha) = {found[first]}, {other} has {found[other]}: PEFT's AdaLoRA has one for all "
            "layers; give all layers the same, or save what to_lora makes of them"
        )
    return found[first]


def _misfits(name: str, module: Any, tensors: Tensors, its: LoRAConfig, k: int) -> list[str]:
    """Why k triplets of a file do not fit the layer, or the base, of that name."""
    in_features, out_features = features_of(module.base if isinstance(module, AdapterLayer) else module)
    needed = {"A": (k, in_features), "B": (out_features, k), "E": (k, 1)}
    problems = [
        f"{name}{KEYS[ours]}: shape {tuple(tensor.shape)}, {needed[ours]} is needed"
        for ours, tensor in tensors.items()
        if tuple(tensor.shape) != needed[ours]
    ]
    if its.r > min(in_features, out_features):
        problems.append(
            f"{name}: init_r is {its.r:,}, the layer has {min(in_features, out_features):,} singular values"
        )
    theirs = (its.r, its.alpha)
    there = (module.r, module.alpha) if isinstance(module, AdaLoRALinear) else type(module).__name__
    if isinstance(module, AdapterLayer) and there != theirs:
        problems.append(f"{name}: (r, alpha) is {theirs} in the file, {there} in the model; remove(model) first")
    return problems


def _fill(layer: AdaLoRALinear, tensors: Tensors, kept: Bool[Tensor, "r"]) -> None:
    """Put the file's triplets where they were, and zeros where there are none."""
    layer.kept.copy_(kept)
    chosen = layer.kept
    for tensor in layer.adapter_tensors().values():
        tensor.zero_()
    layer.A[chosen] = tensors["A"].to(layer.A)
    layer.B[:, chosen] = tensors["B"].to(layer.B)
    layer.E[chosen] = tensors["E"][:, 0].to(layer.E)
