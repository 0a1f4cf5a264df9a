"""A model for llama.cpp: base and adapter become one GGUF file, or the adapter alone becomes one.

    export(base, adapter, "model.gguf", "Q8_0")       the merged model, in any of write_gguf.KINDS
    export(base, adapter, "lora.gguf", "adapter")     A and B, for `llama-cli --lora` over a GGUF of the base
    export(base, None, "base.gguf", "F16")            the base as it is

Read before this file: train/adapted, llm/write_gguf.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from numpy import ndarray

from minilora.llm.gguf_vocabulary import vocabulary_of
from minilora.llm.model import Decoder
from minilora.llm.read_gguf import GGUFModel
from minilora.llm.save import refuse_taken
from minilora.llm.write_gguf import KINDS, Pair, Written, write_adapter, write_model
from minilora.methods import AdaLoRALinear, to_lora
from minilora.torch_lora.adapter_layer import AdapterLayer, dense_weight
from minilora.torch_lora.arithmetic import Distance, overall
from minilora.torch_lora.inject import adapter_layers, lora_layers
from minilora.torch_lora.merging import ERASED, measure, own_weight
from minilora.torch_lora.replaced import replaced_tensors
from minilora.train.adapted import load_mergeable, stored_dtype
from minilora.train.templates import MODEL

ADAPTER = "adapter"  # the kind that is no model


def run(args: argparse.Namespace) -> int:
    """Export as the options of cli say: `base`, `adapter`, `out`, `kind`, `method` and `template`.

    Raises:
        FileExistsError: if there is something at `out` already.
        ValueError: as export.
    """
    refuse_taken(Path(args.out))
    written = export(args.base, args.adapter, args.out, args.kind, args.method, args.template)
    if written is not None:
        print(written)
    print(f"{args.kind}  {args.out}")
    return 0


def export(
    base: str | Path,
    adapter: str | Path | None,
    out: str | Path,
    kind: str = "F16",
    method: str | None = None,
    template: str = MODEL,
) -> Written | None:
    """Write a model, with an adapter (a folder in PEFT's layout) merged into it, or the adapter alone, as GGUF.

    Each weight is summed with its update in float32 and rounded once, to `kind`; what that took of the adapter is in
    the report's notes. The model ends its answers as the adapter has learnt to. `method` and `template` are those of
    load_mergeable.

    Raises:
        ValueError: if the kind does not exist or cannot be had, the base or the adapter cannot be loaded, or one of
            them cannot be told to llama.cpp; there is no file then, or the old one.
    """
    out = Path(out)
    if kind != ADAPTER and kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}; choose {ADAPTER!r}, or for a model one of {list(KINDS)}")
    if kind == ADAPTER and adapter is None:
        raise ValueError("no adapter was given, and an adapter alone was asked for: name its folder")
    if out.suffix != ".gguf":
        raise ValueError(f"{out} does not end in .gguf, by which llama.cpp and load_model know the format")
    model, tokenizer = load_mergeable(base, adapter, stored_dtype(base), method, template)
    tokenizer = tokenizer if adapter is None else tokenizer.with_learnt_end()
    if kind == ADAPTER:
        if replaced := replaced_tensors(model):
            raise ValueError(
                f"{adapter} also replaces {len(replaced)} tensors of the base, such as {min(replaced)}: a GGUF adapter "
                "holds A and B alone; write the merged model, of the kind F16 for example"
            )
        write_adapter(out, adapter_pairs(model), model.config, about(model))
        return None
    config = model.config if _is_tied(model) else replace(model.config, tie_word_embeddings=False)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size)
    written = write_model(out, lambda name: merged_weight(model, name), config, vocabulary, kind, about(model))
    return replace(written, notes=(*written.notes, *rounding(model, out, kind)))


def adapter_pairs(model: Decoder) -> dict[str, Pair]:
    """A, B and the scaling of every adapter layer, by name, as plain arrays; AdaLoRA's become plain ones first."""
    if any(isinstance(layer, AdaLoRALinear) for layer in adapter_layers(model).values()):
        to_lora(model)
    return {
        name: (layer.A.detach().float().cpu().numpy(), layer.B.detach().float().cpu().numpy(), float(layer.scaling))
        for name, layer in lora_layers(model).items()
    }


@torch.no_grad()
def merged_weight(model: Decoder, name: str) -> Float[ndarray, "..."]:
    """One weight, or bias, by its name in the base, in float32 and with its layer's update in it.

        W′ = W + scaling · B A

    The model is left as it is.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    plain: Any = module.fused(torch.float32) if isinstance(module, AdapterLayer) else module
    w = plain.bias.float() if leaf == "bias" else dense_weight(plain, torch.float32)
    return w.detach().cpu().numpy()


@torch.no_grad()
def rounding(model: Decoder, path: Path, kind: str) -> list[str]:
    """Say what rounding took of an adapter, if there is one, as read back from the file.

    error = ‖W′ − (W + ΔW)‖ / ‖ΔW‖          as torch_lora/merging has it
    """
    file, off = GGUFModel(path), dict[str, Distance]()
    for name, layer in adapter_layers(model).items():
        W, delta = own_weight(layer).float(), layer.delta_weight().detach()
        off[name] = measure(W, delta, torch.from_numpy(file.read(f"{name}.weight"))).off
    if not off:
        return []
    worst = max(off, key=lambda name: off[name].relative)
    way_out = "; with --kind adapter, beside a GGUF of the base, nothing is lost"
    return [
        f"rounding to {kind} took {overall(list(off.values())).relative:.2f} of the adapter's effect, "
        f"{off[worst].relative:.2f} in {worst}{way_out if off[worst].relative >= ERASED else ''}"
    ]


def about(model: Decoder) -> dict[str, str]:
    """Name, licence and attribution of the base, which a file made from it keeps."""
    organization, _, name = model.origin.name.rpartition("/")
    origin = model.origin
    told = {"name": name, "organization": organization, "license": origin.license, "description": origin.attribution}
    return {key: value for key, value in told.items() if value}


def _is_tied(model: Decoder) -> bool:
    """Whether embedding and head are still one weight: an adapter on either makes them two."""
    adapted = adapter_layers(model)
    return model.config.tie_word_embeddings and not adapted.keys() & {"model.embed_tokens", "lm_head"}
