"""The tensors of PEFT's adapter files, sorted by the layers of a model.

    A, B of a linear layer       base_model.model.<path>.lora_A.weight, .lora_B.weight
    A, B of an embedding         base_model.model.<path>.lora_embedding_A, .lora_embedding_B   (no ".weight")
    m, DoRA's magnitude          base_model.model.<path>.lora_magnitude_vector                 (nor here)

Names are compared as text with the model's own: none becomes a path or a pattern. What is no LoRA matrix goes to
peft_whole. Read before this file: peft_config, peft_whole.
"""

import torch
from torch import Tensor, nn

from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.layers import LoRAEmbedding, LoRALayer, LoRALinear, kind_of
from minilora.torch_lora.peft_config import AdapterConfig
from minilora.torch_lora.peft_whole import PREFIX, fit_whole, is_finite_in

LINEAR_SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}
EMBEDDING_SUFFIXES = {"A": ".lora_embedding_A", "B": ".lora_embedding_B"}
DORA_SUFFIXES = LINEAR_SUFFIXES | {"m": ".lora_magnitude_vector"}


def matrices_by_key(name: str, layer: LoRALayer) -> dict[str, Tensor]:
    """A layer's tensors by PEFT's names."""
    kind = LoRAEmbedding if isinstance(layer, LoRAEmbedding) else LoRALinear
    return {key_of(name, ours, kind): tensor for ours, tensor in layer.adapter_tensors().items()}


def key_of(name: str, ours: str, kind: type[LoRALayer] = LoRALinear) -> str:
    """PEFT's name for a layer's "A", "B" or "m"."""
    return f"{PREFIX}{name}{(EMBEDDING_SUFFIXES if kind is LoRAEmbedding else DORA_SUFFIXES)[ours]}"


def fit_adapter(
    model: nn.Module, tensors: dict[str, Tensor], config: AdapterConfig
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Sort a file's tensors: A and B by layer, and those that replace the base's; refuse what does not fit, at once.

    The r of a layer is what its A and B have; the config has to say the same.

    Raises:
        ValueError: naming every tensor that is unknown, missing, of a wrong shape or not finite.
    """
    kinds = _wrappable(model)
    pairs: dict[str, dict[str, Tensor]] = {}
    rest, problems = {}, []
    for key, tensor in tensors.items():
        name, ours, kind = matrix_named(key)
        if not name:
            rest[key] = tensor
        elif name not in kinds or issubclass(kinds[name][0], LoRAEmbedding) != (kind is LoRAEmbedding):
            problems.append(f"{key}: the model has no layer of that name and kind")
        else:
            problem = _misfit(key, tensor, ours, config.settings_of(name).r, kinds[name][1], _dtype_in(model, name))
            problems += problem
            if not problem:
                pairs.setdefault(name, {})[ours] = tensor
    needed = ["A", "B", "m"] if config.use_dora else ["A", "B"]
    problems += [f"{name}: has {sorted(p)}, {needed} are needed" for name, p in pairs.items() if sorted(p) != needed]
    adapted = adapter_layers(model)
    problems += [f"{name}: missing from the file" for name in adapted if name not in pairs]
    problems += [f"{name}: has no adapter in the model" for name in pairs if adapted and name not in adapted]
    whole, more = fit_whole(model, config, rest, set(pairs))
    problems += more
    if problems or not pairs:
        raise ValueError("this adapter does not fit the model:\n  " + "\n  ".join(sorted(problems) or ["it is empty"]))
    return pairs, whole


def matrix_named(key: str) -> tuple[str, str, type[LoRALayer]]:
    """Read a key of the file: the layer's name, "A", "B" or "m", and the kind; no name where it is none."""
    for kind, suffixes in ((LoRALinear, DORA_SUFFIXES), (LoRAEmbedding, EMBEDDING_SUFFIXES)):
        for ours, suffix in suffixes.items():
            if key.startswith(PREFIX) and key.endswith(suffix):
                return key[len(PREFIX) : -len(suffix)], ours, kind
    return "", "", LoRALayer


def _misfit(key: str, tensor: Tensor, ours: str, r: int, features: tuple[int, int], dtype: torch.dtype) -> list[str]:
    in_features, out_features = features
    if ours == "m":
        fits = tuple(tensor.shape) == (out_features,)
        return [] if fits and is_finite_in(tensor, dtype) else [f"{key}: {out_features} finite floats are needed"]
    expected, axis = ((r, in_features), 0) if ours == "A" else ((out_features, r), 1)
    shape = tuple(tensor.shape)
    if len(shape) == 2 and shape != expected and shape[1 - axis] == expected[1 - axis]:
        return [f"{key}: its r is {shape[axis]}, the config gives this layer {r}"]
    if shape != expected:
        return [f"{key}: shape {shape}, the model has {expected}"]
    return [] if is_finite_in(tensor, dtype) else [f"{key}: not finite floats"]


def _wrappable(model: nn.Module) -> dict[str, tuple[type[LoRALayer], tuple[int, int]]]:
    """Every layer of a model that can have an adapter or has one: the adapter's kind, and (in, out) features."""
    bases = {n: m.base if isinstance(m, LoRALayer) else m for n, m in model.named_modules()}
    return {name: (kind, kind.features(base)) for name, base in bases.items() if (kind := kind_of(base))}


def _dtype_in(model: nn.Module, name: str) -> torch.dtype:
    layer = model.get_submodule(name)
    return layer.A.dtype if isinstance(layer, LoRALayer) else torch.float32


def hits_by_leaf(names: list[str]) -> dict[str, list[str]]:
    """Layers' names by their last parts, as an InjectReport has them."""
    hits: dict[str, list[str]] = {}
    for name in names:
        hits.setdefault(name.rpartition(".")[2], []).append(name)
    return hits
