"""IA³ in PEFT's files.

    ours                                PEFT's
    l of a layer's output, (out,)       <path>.ia3_l, (out, 1)
    l of a layer's input, (in,)         <path>.ia3_l, (1, in); the layer is one of feedforward_modules

PEFT takes a layer for one of feedforward_modules if its name ends in one of the words, without regard to dots. Read
before this file: ia3, torch_lora/peft_layers.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.methods.ia3 import IA3Linear
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.inject import InjectReport
from minilora.torch_lora.layers import features_of
from minilora.torch_lora.peft_format import shortest_targets
from minilora.torch_lora.peft_layers import (
    Keep,
    are_names,
    as_it_is,
    layers_of,
    load_layers,
    read_config_of,
    write_layers,
)

KEYS = {"l": ".ia3_l"}
KNOWN = {"feedforward_modules", "init_ia3_weights"}


def save_ia3(
    model: nn.Module, folder: str | Path, *, base_name: str | None = None, base_sha256: str | None = None
) -> None:
    """Write a model's IA³ adapter as PEFT does, with the modules that train whole (train_modules) beside it.

    Raises:
        ValueError: if the model has no IA³, or another method's layers, or trains biases, of which PEFT's config has no
            words; or a value is NaN or infinite; nothing is written then.
    """
    layers = layers_of(model, IA3Linear)
    targets, feedforward = _words(model, layers)
    config = {
        "fan_in_fan_out": any(layer.stores_in_by_out for layer in layers.values()),
        "feedforward_modules": feedforward,
        "init_ia3_weights": True,
        "peft_type": "IA3",
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    tensors = {f"{name}{KEYS['l']}": layer.l.reshape(_shape(layer, layer.scales)) for name, layer in layers.items()}
    write_layers(model, folder, tensors, config, base_name, base_sha256)


def load_ia3(
    model: nn.Module, folder: str | Path, *, base_sha256: str | None = None, keep: Keep = as_it_is
) -> InjectReport:
    """Read PEFT's IA³ adapter into a model, strictly; its layers are made where the model has no adapter.

    `keep` gives a linear layer the form that it had under the adapter: qlora.linear.kept_as makes it.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, the config asks for what is not read here, or the tensors do not fit the model
            (all mismatches at once); the model is as before.
    """
    folder = Path(folder)
    config = read_config_of(folder, "IA3", KNOWN, _problems)
    words = config.get("feedforward_modules")

    def scales(name: str, module: nn.Module, l: Tensor) -> str:
        """What a vector scales: as the config's list of words says, or, where it has none, as its shape does."""
        if isinstance(words, list):
            return "input" if name.endswith(tuple(words)) else "output"
        return "output" if tuple(l.shape) == _shape(module, "output") else "input"

    def misfits(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
        l = tensors["l"]
        which = scales(name, module, l)
        expected = _shape(module, which)
        problems = []
        if tuple(l.shape) != expected:
            problems.append(f"{name}: l has the shape {tuple(l.shape)}; {expected} scales the layer's {which}")
        if isinstance(module, AdapterLayer) and getattr(module, "scales", None) != which:
            problems.append(f"{name}: the model has a {module.describe()} here, the file scales its {which}")
        return problems

    def wrap(name: str, base: nn.Module, tensors: dict[str, Tensor]) -> IA3Linear:
        return IA3Linear(keep(base), scales=scales(name, base, tensors["l"]))

    return load_layers(model, folder, KEYS, config, wrap, misfits, base_sha256)


def _shape(module: Any, scales: str) -> tuple[int, int]:
    in_features, out_features = features_of(module.base if isinstance(module, AdapterLayer) else module)
    return (out_features, 1) if scales == "output" else (1, in_features)


def _problems(config: dict[str, Any]) -> list[str]:
    words = config.get("feedforward_modules")
    fine = words is None or isinstance(words, str) or are_names(words)
    return [] if fine else ["feedforward_modules: a list of names is needed"]


def _words(model: nn.Module, layers: dict[str, IA3Linear]) -> tuple[list[str], list[str]]:
    """target_modules and feedforward_modules: the shortest that hit these layers alone.

    Raises:
        ValueError: if a layer's whole name is the end of another's, which scales something else.
    """
    inputs = [name for name, layer in layers.items() if layer.scales == "input"]
    outputs = [name for name in layers if name not in inputs]
    targets = shortest_targets(model, layers)
    words = sorted({name.rpartition(".")[2] for name in inputs})
    if not set(words) <= set(targets) or any(name.endswith(tuple(words)) for name in outputs):
        targets, words = sorted(layers), sorted(inputs)
    wrong = [name for name in outputs if name.endswith(tuple(words))]
    if wrong:
        raise ValueError(f"PEFT would take {wrong[0]} for one of feedforward_modules = {words}: it compares their ends")
    return targets, words
