"""A base with its adapter, as it was when the adapter was trained: in 4 bits where it was, with the same template.

    load_base(name)                  a model of floats, or a folder of bitsandbytes' 4 bits
    load_adapted(name, adapter)      the same with an adapter on it, of any method, and the tokenizer that goes with it
    load_mergeable(name, adapter)    the same, where it is to become one with its base

An adapter is the difference to what lay under it. That of QLoRA has learnt to make up for the rounding to 4 bits as
well; over the weights as they were before it, it answers worse, and says nothing of it. So what was under an adapter
stands in its file, and is made again here. Files of other programs do not say it: `method` does then.

Read before: torch_lora/peft_format, qlora/linear, train/templates.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from minilora.llm.config import ModelConfig
from minilora.llm.load import FLOATS, load_model, model_folder
from minilora.llm.model import Decoder
from minilora.llm.tokenizer import Tokenizer, read_json
from minilora.methods import dora_layer, load_adalora, load_houlsby, load_ia3, load_prompt
from minilora.qlora.linear import DEFAULT_FORM, kept_as
from minilora.torch_lora import load_adapter, lora_layer
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.peft_config import CONFIG_FILE, read_json_object
from minilora.torch_lora.peft_files import base_form
from minilora.train.bnb_folder import load_4_bit
from minilora.train.templates import MODEL, with_template, with_trained_template

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOADERS: Mapping[str, Callable[..., object]] = {
    "ADALORA": load_adalora,
    "HOULSBY": load_houlsby,
    "IA3": load_ia3,
    "PREFIX_TUNING": load_prompt,
    "PROMPT_TUNING": load_prompt,
}  # by PEFT's name of the method; LORA is DoRA's too


def load_base(name_or_path: str | Path, dtype: torch.dtype) -> tuple[Decoder, Tokenizer]:
    """A model, in 4 bits where its folder holds it in bitsandbytes' 4 bits; what is in floats comes in `dtype`.

    Raises:
        ValueError, RuntimeError: as load_model and load_4_bit.
    """
    if is_in_4_bits(name_or_path):
        return load_4_bit(name_or_path, dtype=dtype)
    return load_model(name_or_path, dtype=dtype)


def is_in_4_bits(name_or_path: str | Path) -> bool:
    """Whether a model is a folder, or a hub's, whose config says that it is quantized."""
    if str(name_or_path).endswith(".gguf"):
        return False
    return "quantization_config" in read_json(model_folder(name_or_path, weights=False) / "config.json")


def longest_text(folder: Path) -> int:
    """How many tokens a model was made for, in floats or in 4 bits."""
    config = read_json(folder / "config.json")
    return ModelConfig.from_hf({key: config[key] for key in config if key != "quantization_config"}).max_seq_len


def load_adapted(
    base: str | Path, adapter: str | Path | None, dtype: torch.dtype, method: str | None = None, template: str = MODEL
) -> tuple[Decoder, Tokenizer]:
    """A base with an adapter on it, if one is given, and a tokenizer with the template that it was trained with.

    A `template` of templates.py takes that one's place; else it is what lies beside the adapter, or the model's own.

    Raises:
        ValueError, RuntimeError: as load_base and load_adapter.
    """
    model, tokenizer = load_base(base, dtype)
    if adapter is not None:
        put_adapter(model, adapter, method)
    return model.eval(), template_of(tokenizer, adapter, template)


def load_mergeable(
    base: str | Path, adapter: str | Path | None, dtype: torch.dtype, method: str | None = None, template: str = MODEL
) -> tuple[Decoder, Tokenizer]:
    """As load_adapted, for an adapter whose effect a weight can have.

    Raises:
        ValueError: also if it is of a method that no weight can stand for; it says so, and what to do.
    """
    model, tokenizer = load_adapted(base, adapter, dtype, method, template)
    for layer in list(adapter_layers(model).values())[:1]:  # of one method are all
        try:
            layer.delta_weight()
        except TypeError as error:
            raise ValueError(str(error)) from None
    return model, tokenizer


def stored_dtype(name_or_path: str | Path) -> torch.dtype:
    """The narrowest dtype that holds all floats of a model as they are stored; float32 for a GGUF file.

    A file that cannot be read is passed over: load_model tells what is wrong with it.
    """
    if str(name_or_path).endswith(".gguf"):
        return torch.float32
    dtypes = set()
    for path in model_folder(name_or_path).glob("*.safetensors"):
        with contextlib.suppress(SafetensorError), safe_open(path, framework="pt") as file:
            names = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
            dtypes |= {FLOATS[name] for name in names & FLOATS.keys()}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32


def put_adapter(model: Decoder, adapter: str | Path, method: str | None = None) -> None:
    """Put an adapter on a base, over what it was trained over, as layers of the method that its config names.

    With `method` "lora" that is the base as it is, with "qlora" the linear layers under it in 4 bits, whatever the
    adapter's own method is; None: as the file says.

    Raises:
        ValueError: as load_adapter; or if the file names a form of the base that is not known here, or a method.
    """
    config = read_json_object(Path(adapter) / CONFIG_FILE)
    kind = str(config.get("peft_type", "LORA"))
    if kind not in ("LORA", *LOADERS):
        raise ValueError(
            f"{Path(adapter) / CONFIG_FILE} has the peft_type {kind[:60]!r}: there are LORA, {', '.join(LOADERS)} here"
        )
    form = form_under(adapter, method)
    keep = kept_as(form or None)
    if kind == "LORA":
        layer = dora_layer if config.get("use_dora") else lora_layer
        load_adapter(model, adapter, _over(keep, layer), base_sha256=model.origin.sha256)
    else:
        LOADERS[kind](model, adapter, base_sha256=model.origin.sha256, keep=keep)
    if form and method is None:
        print(f"{adapter} was trained over {form}: so it stands here (--method lora: over floats)", file=sys.stderr)


def _over(keep: Callable[[nn.Module], nn.Module], layer: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def wrap(base: nn.Module, *, r: int, alpha: float, dropout: float, use_rslora: bool) -> nn.Module:
        return layer(keep(base), r=r, alpha=alpha, dropout=dropout, use_rslora=use_rslora)

    return wrap


def form_under(adapter: str | Path, method: str | None) -> str | None:
    """How the base is stored under an adapter, in NF4Linear's words; None for floats."""
    if method == "lora":
        return None
    form = base_form(adapter)
    return form or DEFAULT_FORM if method == "qlora" else form


def template_of(tokenizer: Tokenizer, adapter: str | Path | None, template: str) -> Tokenizer:
    """The tokenizer with the template of this name; "model" means the adapter's, or else the model's own."""
    if template != MODEL or adapter is None:
        return with_template(tokenizer, template)
    return with_trained_template(tokenizer, adapter)
