"""From a name, a folder or a file to a model and its tokenizer.

    "smollm2-135m"          the model that comes with minilora (smollm2.py)
    a folder                Hugging Face's layout: config.json, tokenizer.json, safetensors, in one file or several
    a file *.gguf           llama.cpp's format, dequantized (read_gguf.py)
    "owner/name"            a model on the Hugging Face hub, where the package huggingface_hub is installed

A model is built without memory (torch's "meta" device) and each weight is put in its place once: float32 weights stay
in the file and the system pages them in; for another dtype one tensor after the other is converted.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.llm import smollm2
from minilora.llm.config import ModelConfig
from minilora.llm.model import Decoder, Origin
from minilora.llm.read_gguf import GGUFModel
from minilora.llm.tokenizer import Tokenizer, load_tokenizer, read_json

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
SMALL_FILES = ["config.json", "tokenizer*.json", "chat_template.jinja"]  # of a hub's model
WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # by safetensors
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DERIVED = ".rotary_emb.inv_freq"  # in some older checkpoints; computed from the config


@dataclass(frozen=True)
class Weights:
    """Weights that are not read yet: the shape of each, and how to read one."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def load_model(
    name_or_path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Decoder, Tokenizer]:
    """A pretrained model, ready to use, and its tokenizer.

    Every tensor of the file is used and every place in the model is filled, with finite numbers. The model is in
    evaluation mode; `model.origin` says where it came from.

    Raises:
        ValueError: if the name is unknown, or a file is damaged, or of a kind that we do not compute.
        RuntimeError: if something has to be fetched and cannot be.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"cannot load weights as {dtype}: use a floating-point dtype such as torch.bfloat16")
    path = Path(name_or_path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, dtype, device)
    folder = model_folder(name_or_path)
    if str(name_or_path) == smollm2.NAME:
        return _from_folder(folder, dtype, device, Origin(**smollm2.ORIGIN))
    model, tokenizer = _from_folder(folder, dtype, device)
    if not path.is_dir():
        model.origin = replace(model.origin, name=str(name_or_path))
    return model, tokenizer


def model_folder(name_or_path: str | Path, *, weights: bool = True) -> Path:
    """Find the folder of a model's config, tokenizer and weights; fetch it, where it is named and not here yet.

    Without `weights` a hub is asked for the small files alone.

    Raises:
        ValueError: if the name is unknown, or the folder has no config.
        RuntimeError: if it has to be fetched and cannot be.
    """
    if str(name_or_path) == smollm2.NAME:
        return smollm2.fetch()
    if Path(name_or_path).is_dir():
        if not (Path(name_or_path) / "config.json").exists():
            raise ValueError(f"{name_or_path} has no config.json: it is not a Hugging Face model folder")
        return Path(name_or_path)
    if HUB_NAME.fullmatch(str(name_or_path)):
        return _from_hub(str(name_or_path), [*SMALL_FILES, *(WEIGHT_FILES if weights else [])])
    raise ValueError(
        f"there is no model {str(name_or_path)!r}: give {smollm2.NAME!r}, a folder with safetensors, a .gguf file, "
        "or a hub name such as 'HuggingFaceTB/SmolLM2-360M-Instruct'"
    )


def _from_folder(
    folder: Path, dtype: torch.dtype, device: torch.device | str, origin: Origin | None = None
) -> tuple[Decoder, Tokenizer]:
    config = read_json(folder / "config.json")
    files = weight_files(folder)
    origin = origin or Origin(name=folder.resolve().name, files=tuple(files))
    model = _filled(ModelConfig.from_hf(config), origin, _from_safetensors(files), dtype, device)
    return model, load_tokenizer(folder)


def _from_gguf(path: Path, dtype: torch.dtype, device: torch.device | str) -> tuple[Decoder, Tokenizer]:
    file = GGUFModel(path)
    origin = Origin(name=file.name, license=file.metadata.get("general.license", ""), files=(path,))
    weights = Weights(file.shapes, lambda name: torch.from_numpy(file.read(name)))
    model = _filled(ModelConfig.from_hf(file.config), origin, weights, dtype, device)
    return model, Tokenizer(file.tokenizer_json, file.tokenizer_settings)


def _from_hub(name: str, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RuntimeError(
            f"{name!r} is no folder here, and to fetch it from a hub the package huggingface_hub is needed: "
            "`pip install huggingface_hub`, or give a folder"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the library and its HTTP client have dozens of their own
        raise RuntimeError(f"{name!r} is no folder here, and the hub did not give it: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index names.

    Raises:
        ValueError: if there are none, or the index names files elsewhere.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise ValueError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json (other formats are not read)"
            )
        return [folder / "model.safetensors"]
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    odd = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if odd or not names:
        raise ValueError(f"{index} names files that are not in its folder: {odd}")
    return [folder / name for name in names]


def _from_safetensors(files: Iterable[Path]) -> Weights:
    shapes: dict[str, tuple[int, ...]] = {}
    home: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
                    entry = file.get_slice(name)
                    if entry.get_dtype() not in FLOATS:
                        raise ValueError(
                            f"{name} in {path} is stored as {entry.get_dtype()}: quantized models are not read"
                        )
                    shapes[name], home[name] = tuple(entry.get_shape()), path
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error

    @lru_cache(maxsize=1)
    def opened(path: Path, layer: str) -> safe_open:
        """The file, opened anew for each layer: the pages of one converted to another dtype are given back then."""
        return safe_open(path, framework="pt")

    def read(name: str) -> Tensor:
        layer = ".".join(name.split(".")[:3])  # such as model.layers.0
        return opened(home[name], layer).get_tensor(name)

    return Weights(shapes, read)


def _filled(
    config: ModelConfig, origin: Origin, weights: Weights, dtype: torch.dtype, device: torch.device | str
) -> Decoder:
    """A decoder with these weights in it, all of them, and nothing else."""
    with torch.device("meta"):
        model = Decoder(config, origin)
    return fill(model, weights, dtype, device)


def fill(model: Decoder, weights: Weights, dtype: torch.dtype, device: torch.device | str) -> Decoder:
    """Put weights into every place of a decoder that is on the "meta" device: all of them, and nothing else.

    Raises:
        ValueError: with all that does not fit, or the name of a weight that is not finite.
    """
    is_tied = model.config.tie_word_embeddings
    wanted = {name: tuple(slot.shape) for name, slot in model.state_dict().items() if slot.is_meta}
    _check_fit(wanted, weights, is_tied=is_tied)
    if is_tied:
        del wanted[HEAD]  # tie_head fills it
    state = {name: _checked(name, weights.read(name).to(device=device, dtype=dtype)) for name in wanted}
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_head()
    return model.eval()


def _check_fit(wanted: Mapping[str, tuple[int, ...]], weights: Weights, *, is_tied: bool) -> None:
    found = {name: shape for name, shape in weights.shapes.items() if not name.endswith(DERIVED)}
    pair = [name for name in (HEAD, EMBEDDING) if name in found]
    if is_tied and len(pair) == 2 and not torch.equal(*map(weights.read, pair)):
        raise ValueError(f"the config ties {HEAD} to {EMBEDDING}, but the file has two different tensors for them")
    optional = {HEAD} if is_tied else set()
    problems = [f"{name}: missing from the file" for name in wanted.keys() - found.keys() - optional]
    problems += [f"{name}: not in the model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name}: shape {found[name]}, the model has {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    if problems:
        raise ValueError("these weights do not fit the model of their config:\n  " + "\n  ".join(sorted(problems)))


def _checked(name: str, w: Tensor) -> Tensor:
    """The same tensor, if all its numbers are finite. One pass: 0.1 s for 135M weights, which must be read anyway."""
    low, high = w.aminmax()
    if not (low.isfinite() and high.isfinite()):  # both are NaN if any number is
        raise ValueError(f"{name} holds a NaN or an infinity as {w.dtype}: the file is damaged, or dtype is too narrow")
    return w
