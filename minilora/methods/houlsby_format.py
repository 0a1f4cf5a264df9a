"""Houlsby's adapters in files: PEFT's two, with tensors and keys of our own, because PEFT has no such method.

    <path>.W_down  <path>.b_down  <path>.W_up  <path>.b_up         as methods/houlsby has them
    "nonlinearity"                                                 of all layers
    "peft_type": "HOULSBY"                                         at which PEFT stops: KeyError: 'HOULSBY'

The bottleneck is read from the shapes. Layer norms that train (train_modules) are in modules_to_save. AdapterHub's
`adapters` has other files, which are not read here. Read before this file: houlsby, torch_lora/peft_layers.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.methods.houlsby import NONLINEARITIES, HoulsbyLinear
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.inject import InjectReport
from minilora.torch_lora.layers import features_of
from minilora.torch_lora.peft_layers import Keep, as_it_is, layers_of, load_layers, read_config_of, write_layers

KEYS = {name: f".{name}" for name in ("W_down", "b_down", "W_up", "b_up")}


def save_houlsby(
    model: nn.Module, folder: str | Path, *, base_name: str | None = None, base_sha256: str | None = None
) -> None:
    """Write a model's adapters of Houlsby's, with the modules that train whole (train_modules) beside them.

    Raises:
        ValueError: if the model has none, or another method's layers, or trains biases; or its layers differ in their
            nonlinearity; or a value is NaN or infinite; nothing is written then.
    """
    layers = layers_of(model, HoulsbyLinear)
    used = {layer.nonlinearity: name for name, layer in layers.items()}
    if len(used) > 1:
        raise ValueError(f"the layers differ in their nonlinearity, {used}: the file has one for all")
    tensors = {
        f"{name}{KEYS[ours]}": tensor
        for name, layer in layers.items()
        for ours, tensor in layer.adapter_tensors().items()
    }
    config = {"nonlinearity": next(iter(used)), "peft_type": "HOULSBY"}
    write_layers(model, folder, tensors, config, base_name, base_sha256)


def load_houlsby(
    model: nn.Module, folder: str | Path, *, base_sha256: str | None = None, keep: Keep = as_it_is
) -> InjectReport:
    """Read what save_houlsby wrote into a model, strictly; the layers are made where the model has no adapter.

    `keep` gives a linear layer the form that it had under the adapter: qlora.linear.kept_as makes it.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, the config asks for what is not read here, or the tensors do not fit the model
            (all mismatches at once); the model is as before.
    """
    folder = Path(folder)
    config = read_config_of(folder, "HOULSBY", {"nonlinearity"}, _problems)

    def misfits(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
        base = module.base if isinstance(module, AdapterLayer) else module
        m, (_, d) = _bottleneck(tensors), features_of(base)
        shapes = {"W_down": (m, d), "b_down": (m,), "W_up": (d, m), "b_up": (d,)}
        problems = [
            f"{name}: {ours} has the shape {tuple(tensor.shape)}, {shapes[ours]} is needed"
            for ours, tensor in tensors.items()
            if tuple(tensor.shape) != shapes[ours] or not m
        ]
        theirs, kind = (m, config["nonlinearity"]), type(module).__name__
        its = (getattr(module, "bottleneck", None), getattr(module, "nonlinearity", None))
        if isinstance(module, AdapterLayer) and its != theirs:
            problems.append(f"{name}: a {kind} with {its} is here, the file has (bottleneck, nonlinearity) = {theirs}")
        return problems

    def wrap(name: str, base: nn.Module, tensors: dict[str, Tensor]) -> HoulsbyLinear:
        return HoulsbyLinear(keep(base), bottleneck=_bottleneck(tensors), nonlinearity=config["nonlinearity"])

    return load_layers(model, folder, KEYS, config, wrap, misfits, base_sha256)


def _bottleneck(tensors: dict[str, Tensor]) -> int:
    return tensors["b_down"].numel() if "b_down" in tensors else 0


def _problems(config: dict[str, Any]) -> list[str]:
    f = config.get("nonlinearity")
    known = isinstance(f, str) and f in NONLINEARITIES
    return [] if known else [f"nonlinearity = {str(f)[:60]!r}: one of {list(NONLINEARITIES)} is needed"]
