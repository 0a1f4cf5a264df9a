"""The two files of an adapter, whatever method it is of: written both or none, and read without trust.

    adapter_config.json           its keys are peft_config's
    adapter_model.safetensors     the tensors, and metadata: text by these keys

    base_sha256       which base the adapter was trained on
    base_stored_as    how that was stored, where it was not as floats
    config_sha256     which config was written beside it

The metadata is ours; files of others have none of it, and are taken as they are. No pickle is opened. Read before this
file: adapter_layer, peft_config.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from minilora.files import with_sorted_metadata, write_whole
from minilora.torch_lora.adapter_layer import AdapterLayer, StoresNoFloats
from minilora.torch_lora.layers import LoRAEmbedding
from minilora.torch_lora.peft_config import CONFIG_FILE, CONFIG_LIMIT_BYTES, config_sha256
from minilora.torch_lora.replaced import all_finite

TENSOR_FILE = "adapter_model.safetensors"
BASE_FORM = "base_stored_as"
CONFIG_SHA256 = "config_sha256"


def write_adapter(
    folder: str | Path, config: Mapping[str, object], tensors: Mapping[str, Tensor], metadata: Mapping[str, str | None]
) -> None:
    """Write the two files of an adapter, both or none, by names and keys that are PEFT's already.

    What is None or empty in the metadata is left out. The files are renamed one after the other: should the process be
    killed in between, the tensors name a config that is not there, and whatever reads them refuses them.

    Raises:
        ValueError: if a tensor holds a NaN or an infinity, or the config is longer than its readers take.
    """
    broken = [key for key, tensor in tensors.items() if not all_finite(tensor)]
    if broken:
        raise ValueError(f"{len(broken)} tensors of this adapter hold NaN or infinite values, the first is {broken[0]}")
    stored = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    folder, config_json = Path(folder), (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if len(config_json) > CONFIG_LIMIT_BYTES:
        longest = max(config, key=lambda key: len(json.dumps(config[key])))
        raise ValueError(
            f"{CONFIG_FILE} would have {len(config_json):,} bytes, most of them in its {longest}; more than "
            f"{CONFIG_LIMIT_BYTES:,} are not read again: adapt fewer layers, or give all the same settings "
            "(of AdaLoRA's, minilora.methods.to_lora makes layers of plain LoRA)"
        )
    said = {key: text for key, text in metadata.items() if text}
    about = {"format": "pt"} | said | {CONFIG_SHA256: config_sha256(config)}
    tensor_file = with_sorted_metadata(save(stored, about))
    files = {TENSOR_FILE: tensor_file, CONFIG_FILE: config_json}
    write_whole({folder / name: content for name, content in files.items()})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or cut short, or names a tensor with characters that no terminal should be sent.
    """
    with _opened(path) as file:
        keys, metadata = file.keys(), file.metadata() or {}
        if odd := [key for key in keys if not key.isprintable()]:
            raise ValueError(f"{path} names a tensor {odd[0][:200]!r}: such characters are in no module's name")
        return {key: file.get_tensor(key) for key in keys}, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Read a safetensors file's metadata alone: of its tensors none.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or cut short.
    """
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = f"; {pickled.name} is a pickle, which can run code: it is never opened" if pickled.exists() else ""
        raise FileNotFoundError(f"there is no {path}{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from None


def base_form(folder: str | Path) -> str | None:
    """How the base was stored under an adapter when it was saved, such as "nf4, block_size=64, double"; None: floats.

    Files of other programs do not say it.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it is damaged.
    """
    return read_metadata(Path(folder) / TENSOR_FILE).get(BASE_FORM)


def form_of_bases(layers: Mapping[str, AdapterLayer]) -> str:
    """How the bases of these layers are stored, in their own words, "" for floats; embeddings always are floats."""
    bases = [layer.base for layer in layers.values() if not isinstance(layer, LoRAEmbedding)]
    forms = {stored_as(base) if isinstance(base, StoresNoFloats) else "floats" for base in bases}
    return "; ".join(sorted(forms)) if forms - {"floats"} else ""


def stored_as(base: StoresNoFloats) -> str:
    """The base's own words for how it is stored, or its kind."""
    return getattr(base, "stored_as", type(base).__name__)


def refuse_another_config(folder: Path, config_hash: str, metadata: Mapping[str, str]) -> None:
    """Refuse tensors that were written with other settings than those in the config beside them.

    An error and no warning: with another alpha an adapter loads, and answers wrongly. Files of others, which name no
    config, are taken as they are.

    Raises:
        ValueError: if it is so; it says what to do where the config was changed on purpose.
    """
    if metadata.get(CONFIG_SHA256, config_hash) != config_hash:
        raise ValueError(
            f"{folder / CONFIG_FILE} is not the config that {TENSOR_FILE} was written with. If writing was cut off "
            "between the two, save the adapter again. If the config was changed by hand: what you mean is written with "
            "peft_files.write_adapter(folder, json.loads(config_text), *peft_files.read_tensors(tensor_file))"
        )


def warn_of_another_base(theirs: str | None, ours: str | None) -> None:
    """Warn where both SHA-256 are known and differ."""
    if theirs and ours and theirs != ours:
        warnings.warn(
            f"this adapter was trained on a base with SHA-256 {ascii(theirs)[1:13]}…, this base has {ours[:12]}…: "
            "it fits in shape, but what it learned is the difference to another model",
            stacklevel=3,
        )


def warn_of_another_form(theirs: str, ours: str) -> None:
    """Warn where the adapter was trained over a base that was stored in no floats, and is over another here."""
    if theirs and theirs != ours:
        warnings.warn(
            f"this adapter was trained over a base stored as {ascii(theirs)[1:-1]}, here over {ours or 'floats'}: it "
            "answers worse there than it was trained to; wrap=QLoRALinear puts a linear layer into 4 bits",
            stacklevel=3,
        )
