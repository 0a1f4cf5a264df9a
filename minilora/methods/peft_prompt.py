"""Prefix and prompt tuning in PEFT's files: one tensor by a bare name, and a config of the model's sizes.

    prompt_embeddings    P, float32:  (n, layers · 2 · kv) or (n, hidden)        no "base_model.model." before it

    our P                PEFT's config says
    n, kv or hidden      num_virtual_tokens, token_dim
    key heads            num_attention_heads (with grouped heads, of a prefix: those of the keys), num_layers
    an MLP               nothing: what it computes is in the file, and of its own numbers none

Read before this file: prompt, torch_lora/peft_files.
"""

import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.llm.model import Transformer
from minilora.methods.prompt import PrefixTuning, PromptTuning, VirtualTokens
from minilora.torch_lora.adapter_layer import StoresNoFloats
from minilora.torch_lora.inject import ALL_LINEAR, InjectReport, adapter_layers, count_parameters, inject
from minilora.torch_lora.peft_config import CONFIG_FILE, config_sha256, read_json_object
from minilora.torch_lora.peft_files import (
    BASE_FORM,
    TENSOR_FILE,
    read_tensors,
    refuse_another_config,
    stored_as,
    warn_of_another_base,
    warn_of_another_form,
    write_adapter,
)
from minilora.torch_lora.peft_layers import Keep, as_it_is
from minilora.torch_lora.replaced import all_finite

KEY = "prompt_embeddings"
Kind = type[PrefixTuning] | type[PromptTuning]
KINDS: dict[str, Kind] = {"PREFIX_TUNING": PrefixTuning, "PROMPT_TUNING": PromptTuning}
# Keys that may hold anything: they say how P began or was trained, or something of PEFT itself.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "inference_mode", "init_weights", "peft_version",
    "prefix_projection", "prompt_tuning_init", "prompt_tuning_init_text", "revision", "runtime_config", "task_type",
    "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip


def save_prompt(
    model: nn.Module, folder: str | Path, *, base_name: str | None = None, base_sha256: str | None = None
) -> None:
    """Write a model's virtual tokens as PEFT does, so that PEFT and load_prompt open them. The model is left as it was.

    `base_name` is what PEFT will look the base up by; `base_sha256` lets load_prompt warn on another base.

    Raises:
        ValueError: if the model has none, has other adapters beside them, or a value is NaN or infinite; nothing is
            written then.
    """
    layer = _only_layer(model)
    if layer is None:
        raise ValueError('no virtual tokens to save: inject(model, ["model"], wrap) with PrefixTuning or PromptTuning')
    P = layer.prefix() if isinstance(layer, PrefixTuning) else layer.P
    (peft_type,) = (name for name, kind in KINDS.items() if isinstance(layer, kind))
    config: dict[str, object] = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        **_sizes(layer.base, KINDS[peft_type]),
        "num_virtual_tokens": layer.n_virtual,
    }
    if isinstance(layer, PrefixTuning):
        config |= {"encoder_hidden_size": None, "prefix_projection": False}  # the file's P needs no MLP any more
    else:
        config |= {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_name_or_path": None}
    write_adapter(folder, config, {KEY: P.float()}, {"base_sha256": base_sha256, BASE_FORM: _form_of(layer.base)})


def load_prompt(
    model: nn.Module, folder: str | Path, *, base_sha256: str | None = None, keep: Keep = as_it_is
) -> InjectReport:
    """Read prefix or prompt tuning, whichever PEFT's folder holds, into a model of minilora's own.

    A model that has virtual tokens already must have the file's kind and number of them, without an MLP. Everything is
    checked before the model is touched. A base other than the one named in the file (by its SHA-256, where both are
    known), or stored in another form, is warned of.

    `keep` gives every linear layer the form that it had under them: qlora.linear.kept_as makes it.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, they were not written together, or do not fit the model (all mismatches at
            once).
        TypeError: if the model is not a Decoder.
    """
    folder = Path(folder)
    config = read_json_object(folder / CONFIG_FILE)
    tensors, metadata = read_tensors(folder / TENSOR_FILE)
    refuse_another_config(folder, config_sha256(config), metadata)
    kind = KINDS.get(str(config.get("peft_type")))
    if kind is None:
        raise ValueError(f"peft_type is {reprlib.repr(config.get('peft_type'))}: this reader knows {sorted(KINDS)}")
    layer = _only_layer(model)
    base = getattr(model, "model", None) if layer is None else layer.base
    if not isinstance(base, Transformer):
        raise TypeError(f"{type(model).__name__} is not minilora's own Decoder: load_model(name) gives one")
    problems = _config_problems(config, _sizes(base, kind)) + _tensor_problems(tensors, config, base, kind)
    problems += _layer_problems(layer, kind, config)
    if problems:
        raise ValueError(f"{folder} does not fit this model:\n  " + "\n  ".join(problems))
    warn_of_another_base(metadata.get("base_sha256"), base_sha256)
    if layer is None:
        inject(base, ALL_LINEAR, keep)
        layer = kind(base, n_virtual=len(tensors[KEY]))
        inject(model, ["model"], lambda _: layer)
    warn_of_another_form(metadata.get(BASE_FORM, ""), _form_of(base))
    with torch.no_grad():
        layer.P.copy_(tensors[KEY])
    return InjectReport({"model": ["model"]}, count_parameters(model))


def has_mlp(layer: VirtualTokens) -> bool:
    """Whether P is computed by an MLP as yet."""
    return isinstance(layer, PrefixTuning) and layer.mlp is not None


def _only_layer(model: nn.Module) -> VirtualTokens | None:
    layers = adapter_layers(model)
    others = {name: layer for name, layer in layers.items() if not isinstance(layer, VirtualTokens)}
    if others:
        name, layer = next(iter(others.items()))
        raise ValueError(
            f"{len(others)} layers are of another method, the first is {name}, a {layer.describe()}: PEFT's file of "
            "virtual tokens has no words for them; merge that adapter into the base, or remove(model) it"
        )
    return next((layer for layer in layers.values() if isinstance(layer, VirtualTokens)), None)


def _sizes(base: Transformer, kind: Kind) -> dict[str, int]:
    """What PEFT's config says of the base: of a prefix the heads that have keys, of a prompt all."""
    config, is_prefix = base.config, kind is PrefixTuning
    return {
        "num_attention_heads": config.n_kv_heads if is_prefix else config.n_heads,
        "num_layers": config.n_layers,
        "num_transformer_submodules": 1,
        "token_dim": config.n_kv_heads * config.head_dim if is_prefix else config.hidden_size,
    }


def _config_problems(config: dict[str, Any], sizes: dict[str, int]) -> list[str]:
    def say(key: str, reason: str) -> str:
        return f"{reprlib.repr(key)[1:-1]} = {reprlib.repr(config[key])}: {reason}"

    known = HARMLESS | sizes.keys() | {"num_virtual_tokens", "peft_type", "modules_to_save"}
    problems = [
        say(key, f"the model has {size}")
        for key, size in sizes.items()
        if config.get(key) is not None and config[key] != size
    ]
    if config.get("modules_to_save"):
        problems.append(say("modules_to_save", "it replaces whole modules of the base"))
    unknown = sorted(key for key in config.keys() - known if config[key])
    return problems + [say(key, "not a key this reader knows, so it may change the result") for key in unknown]


def _tensor_problems(tensors: dict[str, Any], config: dict[str, Any], base: Transformer, kind: Kind) -> list[str]:
    problems = [f"{reprlib.repr(key)}: not a tensor of virtual tokens" for key in sorted(tensors.keys() - {KEY})]
    if KEY not in tensors:
        return [*problems, f"{KEY}: missing from the file"]
    sizes, P, n = _sizes(base, kind), tensors[KEY], config.get("num_virtual_tokens")
    row = sizes["token_dim"] * (2 * sizes["num_layers"] if kind is PrefixTuning else 1)
    if tuple(P.shape) != (n, row):
        problems.append(f"{KEY}: shape {tuple(P.shape)}, the config and the model have {(n, row)}")
    elif not 0 < len(P) < base.config.max_seq_len:
        problems.append(f"{KEY}: {len(P)} virtual tokens, the model reads {base.config.max_seq_len} with the text")
    if not P.is_floating_point():
        problems.append(f"{KEY}: {P.dtype}, not floats")
    elif not all_finite(P):
        problems.append(f"{KEY}: holds NaN or infinite values")
    return problems


def _layer_problems(layer: VirtualTokens | None, kind: Kind, config: dict[str, Any]) -> list[str]:
    n_virtual = config.get("num_virtual_tokens")
    if layer is None or (type(layer) is kind and layer.n_virtual == n_virtual and not has_mlp(layer)):
        return []
    has = layer.describe() + (" with an MLP" if has_mlp(layer) else "")
    return [f"the model has {has} already: remove(model) first, and let load_prompt make the layer"]


def _form_of(base: nn.Module) -> str:
    """How the base's layers are stored, in their own words; "" for floats."""
    return "; ".join(sorted({stored_as(m) for m in base.modules() if isinstance(m, StoresNoFloats)}))
