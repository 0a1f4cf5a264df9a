"""A model whose linear layers are in bitsandbytes' 4 bits already: from a folder as published, and into one.

    model, tokenizer = load_4_bit("a-folder")       # QLoRA's base without the float weights ever being here
    save_4_bit(model, "another", like="a-folder")   # which transformers and bitsandbytes load to the same weights

Such a folder is a Hugging Face model whose config.json has a quantization_config and whose safetensors hold, for a
weight in 4 bits, its parts (qlora/bnb_format). Which weights those are is read from the tensors' names. This lies in
`train` because no other room may know both: llm has the decoder and nothing of 4 bits, qlora the bits and no decoder.

Read before this file: qlora/bnb_format, llm/load.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from minilora.files import write_whole
from minilora.llm.config import ModelConfig
from minilora.llm.load import Weights, fill, model_folder, weight_files
from minilora.llm.model import Decoder, Origin
from minilora.llm.tokenizer import Tokenizer, load_tokenizer, read_json
from minilora.qlora.blockwise import NestedAbsmax
from minilora.qlora.bnb_format import DTYPES, StoredWeight, names_in_4_bits, parts_of, read_weight, weight_tensors
from minilora.qlora.linear import NF4Linear
from minilora.torch_lora.inject import adapter_layers

INDEX = "model.safetensors.index.json"
BESIDE_THE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def load_4_bit(
    name_or_path: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """A model from a folder (or hub name) of bitsandbytes' 4-bit weights, and its tokenizer; nothing is requantized.

    Its linear layers are NF4Linear with the file's bytes, which stay in the file until they are read; what is in floats
    there, such as embeddings and norms, comes in `dtype`, by default that of the config. The model is in evaluation
    mode.

    Raises:
        ValueError: if the config is of another kind, or tensors are missing, extra or damaged (all of them at once).
        RuntimeError: if it has to be fetched and cannot be.
    """
    folder = model_folder(name_or_path)
    config = read_json(folder / "config.json")
    _check_is_4_bit(config.pop("quantization_config", None), folder)
    files = weight_files(folder)
    tensors = _read_all(files)
    stored, floats = _sorted_out(tensors)
    origin = Origin(
        name=folder.resolve().name if Path(name_or_path).is_dir() else str(name_or_path), files=tuple(files)
    )
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_hf(config), origin)
    _put_in(model, stored, device)
    weights = Weights({name: tuple(tensor.shape) for name, tensor in floats.items()}, floats.__getitem__)
    fill(model, weights, dtype or DTYPES.get(_dtype_text(config), torch.float32), device)
    return model, load_tokenizer(folder)


def save_4_bit(model: Decoder, folder: str | Path, *, like: str | Path, storage: torch.dtype = torch.uint8) -> None:
    """Write a model with layers in 4 bits as transformers and bitsandbytes do: one safetensors file, config, tokenizer.

    The config and the tokenizer's files are those of the folder `like`, which the model came from, in floats or in 4
    bits; only its quantization_config and dtype are written anew. bitsandbytes will give the weights in the dtype of
    the model's embedding. `storage` views the bytes as another dtype, as FSDP wants it. The file is made in memory.

    Raises:
        ValueError: if no layer is in 4 bits, adapters are in the model, or the config is another model's; nothing is
            written then.
    """
    if adapter_layers(model):
        raise ValueError("this model has adapters: save them with save_adapter, and take them off with remove(model)")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NF4Linear)}
    if not layers:
        raise ValueError("no layer of this model is in 4 bits: wrap its linear layers in NF4Linear first")
    if (Path(folder) / INDEX).exists():
        raise ValueError(f"{folder} has an {INDEX} of other weights: choose an empty folder")
    config = read_json(Path(like) / "config.json")
    config.pop("quantization_config", None)
    if ModelConfig.from_hf(config) != model.config:
        raise ValueError(f"{like} has the config of another model: name the folder that this one came from")
    dtype = model.model.embed_tokens.weight.dtype
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    for name, layer in layers.items():
        tensors |= weight_tensors(f"{name}.weight", layer.quantized, dtype, storage)
    text = str(dtype).removeprefix("torch.")
    config = config | {"dtype": text, "quantization_config": _quantization_config(model, layers, text, storage)}
    config.pop("torch_dtype", None)  # dtype's name before transformers 5
    beside = {
        path.name: path.read_bytes()
        for pattern in BESIDE_THE_WEIGHTS
        for path in Path(like).glob(pattern)
        if path.is_file()
    }
    contents = beside | {
        "model.safetensors": save(tensors, {"format": "pt"}),
        "config.json": (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    write_whole({Path(folder) / name: content for name, content in contents.items()})


def _check_is_4_bit(settings: Any, folder: Path) -> None:
    if not isinstance(settings, Mapping):
        raise ValueError(f"{folder} is not quantized, says its config.json: load_model reads it")
    method = settings.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not settings.get("load_in_4bit"):
        bits = "8 bits" if settings.get("load_in_8bit") else "no load_in_4bit"
        raise ValueError(f"{folder} is quantized by {method!r}, with {bits}: bitsandbytes' 4 bits alone are read here")


def _dtype_text(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype"))


def _read_all(files: list[Path]) -> dict[str, Tensor]:
    """Every tensor of the files, by name. They lie in the files until somebody reads their numbers."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    return tensors


def _sorted_out(tensors: dict[str, Tensor]) -> tuple[dict[str, StoredWeight], dict[str, Tensor]]:
    """The weights in 4 bits, and the tensors that are floats."""
    stored, problems = {}, []
    rest = dict(tensors)
    for name in names_in_4_bits(tensors):
        for part in parts_of(name, tensors):
            del rest[part]
        try:
            stored[name] = read_weight(name, tensors)
        except ValueError as error:
            problems.append(str(error))
    problems += [
        f"{name}: {tensor.dtype}, without the quant_state of a weight in 4 bits"
        for name, tensor in rest.items()
        if not tensor.is_floating_point()
    ]
    if problems:
        raise ValueError("these 4-bit weights cannot be read:\n  " + "\n  ".join(sorted(problems)))
    return stored, rest


def _put_in(model: Decoder, stored: Mapping[str, StoredWeight], device: torch.device | str) -> None:
    """Replace the linear layers of a decoder on "meta" whose weights are in 4 bits; their biases are filled later."""
    linear = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    problems = [f"{name}: in 4 bits, but the model has no linear layer there" for name in stored.keys() - linear.keys()]
    problems += [
        f"{name}: shape {weight.quantized.shape}, the model has {tuple(linear[name].weight.shape)}"
        for name, weight in stored.items()
        if name in linear and weight.quantized.shape != linear[name].weight.shape
    ]
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:
        problems.append("lm_head.weight: in 4 bits, but the config ties it to the embedding, which is in floats")
    if problems:
        raise ValueError("these weights do not fit the model of their config:\n  " + "\n  ".join(sorted(problems)))
    for name, weight in stored.items():
        layer = NF4Linear.holding(weight.quantized).to(device)
        layer.bias = linear[name].bias
        layer.requires_grad_(False)
        model.set_submodule(name.removesuffix(".weight"), layer)


def _quantization_config(
    model: Decoder, layers: Mapping[str, NF4Linear], dtype: str, storage: torch.dtype
) -> dict[str, object]:
    """What transformers reads to make its 4-bit layers; null for skip_modules stands for the head alone."""
    in_floats = sorted(name for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    first = next(iter(layers.values()))
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": str(storage).removeprefix("torch."),
        "bnb_4bit_quant_type": first.codebook.name,
        "bnb_4bit_use_double_quant": isinstance(first.quantized.absmax, NestedAbsmax),
        "llm_int8_skip_modules": None if in_floats == ["lm_head"] else in_floats,
    }
