"""Write a model as a Hugging Face folder: what transformers, vLLM, llama.cpp's converter and load_model open.

    config.json, tokenizer …       of the model that it was made from
    model.safetensors              up to SHARD_BYTES of weights; more than that become several files and an index
    README.md                      where it came from

Weights come one after the other and are written a shard at a time: no more than a shard is ever in memory because of
this. Everything is written into a folder beside the final one, which gets its name at the end. Read before: load.
"""

import json
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minilora.llm.load import HEAD
from minilora.llm.tokenizer import TEMPLATE_FILE, read_json

GENERATION = "generation_config.json"
SHARD_BYTES = 2_000_000_000
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", TEMPLATE_FILE, GENERATION,
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip


def save_model(
    out: Path,
    source: Path,
    weights: Iterable[tuple[str, Tensor]],
    card: Callable[[], str],
    chat_template: str | None = None,
    end: tuple[str, int] | None = None,
) -> None:
    """Write weights by name as a model of the same kind as the one in the folder `source`.

    The config says the dtype of the weights, which is one, and that the head has a weight of its own where one comes.
    `card` makes the text of README.md when all weights are written. A `chat_template` takes the place of the source's,
    and so does the token that ends an answer, `end`: its text and its number. The folder is there whole or not at all.

    Raises:
        FileExistsError: if there is something at `out` already.
    """
    refuse_taken(out)
    config = read_json(source / "config.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    making = out.with_name(f".{out.name}-{secrets.token_hex(4)}")
    making.mkdir()
    try:
        shards = _write_shards(making, weights)
        _name_shards(making, shards)
        dtypes = {dtype for shard in shards for dtype, _ in shard.values()}
        names = {name for shard in shards for name in shard}
        _write_json(making / "config.json", _config_for(config, dtypes, names))
        _write_words(making, source, chat_template, end)
        (making / "README.md").write_text(card(), encoding="utf-8")
        mode = (making / "README.md").stat().st_mode  # what the umask gives
        for path in making.iterdir():
            path.chmod(mode)  # safetensors lets only the owner read
        making.rename(out)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def refuse_taken(out: Path) -> None:
    """
    Raises:
        FileExistsError: if there is something at `out` already, but for an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is there already, and nothing is overwritten: choose another name, or delete it")


Shard = dict[str, tuple[torch.dtype, int]]  # name -> dtype and bytes of a weight


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> list[Shard]:
    """Write 0.safetensors, 1.safetensors, …; give what is in each."""
    shards: list[Shard] = []
    held: dict[str, Tensor] = {}

    def write_held() -> None:
        save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append({name: (w.dtype, w.nbytes) for name, w in held.items()})
        held.clear()

    for name, w in weights:
        if held and sum(tensor.nbytes for tensor in held.values()) + w.nbytes > SHARD_BYTES:
            write_held()
        held[name] = w.detach().cpu().contiguous()
    write_held()
    return shards


def _name_shards(folder: Path, shards: list[Shard]) -> None:
    """Rename them as Hugging Face does, now that their number is known, and write the index where there are several."""
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for i, name in enumerate(names):
        (folder / f"{i}.safetensors").rename(folder / name)
    weight_map = {weight: name for name, shard in zip(names, shards, strict=True) for weight in shard}
    total = sum(n_bytes for shard in shards for _, n_bytes in shard.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _config_for(config: dict[str, object], dtypes: set[torch.dtype], names: set[str]) -> dict[str, object]:
    [dtype] = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    said = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype}
    untied = {"tie_word_embeddings": False} if config.get("tie_word_embeddings") and HEAD in names else {}
    floats = {key: value for key, value in config.items() if key != "quantization_config"}  # weights are floats now
    return floats | said | untied


def _write_words(folder: Path, source: Path, chat_template: str | None, end: tuple[str, int] | None) -> None:
    """Copy what turns text into tokens and back, and licences; with another template and end, if there are."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
    if end is not None:
        _end_answers_with(folder, *end)


def _end_answers_with(folder: Path, text: str, number: int) -> None:
    """Let a model stop at this token: what generates knows it by number, chat programs by the tokenizer's eos."""
    settings, generation = (_json_if_there(folder / name) for name in ("tokenizer_config.json", GENERATION))
    before = generation.get("eos_token_id", [])
    numbers = {number, *(before if isinstance(before, list) else [before])}
    _write_json(folder / "tokenizer_config.json", settings | {"eos_token": text})
    _write_json(folder / GENERATION, generation | {"eos_token_id": sorted(numbers)})


def _json_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
