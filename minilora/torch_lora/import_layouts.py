"""Adapters in other projects' layouts, converted to PEFT's, with the same forward values.

    PEFT and ours         <path>.lora_A.weight (r, in)     <path>.lora_B.weight (out, r)     alpha in a config
    mlx-lm                <path>.lora_a (in, r)            <path>.lora_b (r, out)            alpha / r in a config
    loralib               <path>.lora_A (r, in)            <path>.lora_B (out, r)            alpha nowhere: it is given
    LLMs-from-scratch     <path>.lora.A (in, r)            <path>.lora.B (r, out)            alpha nowhere: it is given

    mlx-lm                y + scale · ((x a) b)                  A = aᵀ, B = bᵀ, alpha = scale · r
    loralib               y + (alpha / r) · ((x Aᵀ) Bᵀ)          the same
    LLMs-from-scratch     y + (alpha / r) · (x A B)              A ← Aᵀ, B ← Bᵀ

loralib stores the update of a convolution in two matrices as well, (r · kernel, in · kernel) and (out · kernel,
r · kernel): no shape tells it from a linear layer's. It is told by a name with "conv" at its end, and refused; under
another name load_adapter refuses it, because a convolution is no layer that LoRA wraps here.

mlx-lm's config is called adapter_config.json too and has other keys. Only safetensors are opened. Layers keep the names
that they have in the file. Read before this file: peft_format.
"""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minilora.torch_lora.config import LoRAConfig
from minilora.torch_lora.layers import LoRAEmbedding, LoRALinear
from minilora.torch_lora.peft_config import CONFIG_FILE, config_of, is_number, read_json_object
from minilora.torch_lora.peft_files import TENSOR_FILE, read_tensors, write_adapter
from minilora.torch_lora.peft_tensors import key_of
from minilora.torch_lora.peft_whole import is_finite_in

MLX_TENSOR_FILE = "adapters.safetensors"
EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "tok_emb", "pos_emb")  # told by name: the keys are alike


@dataclass(frozen=True)
class Layout:
    """How a project stores the two matrices of a layer."""

    name: str
    suffixes: tuple[str, str]  # of A and of B
    transposed: bool  # A is (in, r) and B (r, out)


MLX = Layout("mlx-lm", (".lora_a", ".lora_b"), True)
LORALIB = Layout("loralib", (".lora_A", ".lora_B"), False)
FROM_SCRATCH = Layout("LLMs-from-scratch", (".lora.A", ".lora.B"), True)
LAYOUTS = (MLX, LORALIB, FROM_SCRATCH)


def convert(
    source: str | Path, out_folder: str | Path, *, alpha: float | None = None, base_name: str | None = None
) -> Layout:
    """Write an adapter of mlx-lm (its folder), loralib or LLMs-from-scratch (a safetensors file) in PEFT's layout.

    `alpha` is what the layers were made with, for the two that do not store it. Matrices become float32. Give the
    layout that was found.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the layout is none of these, alpha is missing or given twice, or something in the file is no
            matrix of a linear layer (all of it at once); nothing is written then.
    """
    source = Path(source)
    path = source / MLX_TENSOR_FILE if source.is_dir() else source
    if (source / TENSOR_FILE).exists():
        raise ValueError(f"{source} holds {TENSOR_FILE}: that is PEFT's layout already, load_adapter reads it")
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no safetensors file, and nothing else is opened (a pickle can run code): write it again with "
            "safetensors.torch.save_file, where it was trained"
        )
    tensors, _ = read_tensors(path)
    layout = _layout_of(path, tensors)
    pairs = _pairs(path, layout, tensors)
    if layout is MLX:
        settings = _mlx_settings(path.with_name(CONFIG_FILE), pairs, alpha)
    elif alpha is None:
        raise ValueError(
            f"{layout.name} stores no alpha: give the one that the layers were made with, convert(…, alpha=…)"
        )
    else:
        settings = {name: LoRAConfig(r=len(A), alpha=alpha) for name, (A, _) in pairs.items()}
    config = config_of(settings, sorted(pairs)) | {"base_model_name_or_path": base_name, "task_type": "CAUSAL_LM"}
    kinds = {name: LoRAEmbedding if _is_embedding(name) else LoRALinear for name in pairs}
    matrices = {
        key_of(n, ours, kinds[n]): m.float() for n, pair in pairs.items() for ours, m in zip("AB", pair, strict=True)
    }
    write_adapter(out_folder, config, matrices, {})
    return layout


def _layout_of(path: Path, tensors: dict[str, Tensor]) -> Layout:
    found = [layout for layout in LAYOUTS if any(key.endswith(layout.suffixes) for key in tensors)]
    if len(found) != 1:
        known = "; ".join(f"{layout.name}: {' and '.join(layout.suffixes)}" for layout in LAYOUTS)
        some = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ValueError(
            f"{path} is of no known layout: its tensors are {some[:300]}, …; names that are known end in: {known}"
        )
    return found[0]


def _pairs(path: Path, layout: Layout, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every layer's A (r, in) and B (out, r)."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    names = {key.removesuffix(suffix): None for key in tensors for suffix in layout.suffixes if key.endswith(suffix)}
    other = sorted(key for key in tensors if not key.endswith(layout.suffixes))
    problems = [f"{key}: not a matrix of {layout.name}'s LoRA; leave it out of the file" for key in other]
    for name in names:
        A, B = (tensors.get(name + suffix) for suffix in layout.suffixes)
        problem = _pair_problem(layout, A, B) if name else "it has no name"
        if layout is LORALIB and "conv" in name.rpartition(".")[2].lower():
            problem = "a convolution by its name: what loralib has there is no update of a linear layer; leave it out"
        if layout is MLX and _is_embedding(name):
            problem = "an adapted embedding, which mlx-lm adds to a tied output head as well: PEFT's file cannot say so"
        if problem or A is None or B is None:
            problems.append(f"{name}: {problem}")
        else:
            pairs[name] = (A.T, B.T) if layout.transposed else (A, B)
    if problems:
        raise ValueError(f"{path} cannot be converted from {layout.name}:\n  " + "\n  ".join(problems))
    return pairs


def _is_embedding(name: str) -> bool:
    return name.rpartition(".")[2] in EMBEDDINGS


def _pair_problem(layout: Layout, A: Tensor | None, B: Tensor | None) -> str | None:
    if A is None or B is None:
        return f"has one of {' and '.join(layout.suffixes)} alone"
    shapes = f"{tuple(A.shape)} and {tuple(B.shape)}"
    if A.ndim != 2 or B.ndim != 2:
        return f"shapes {shapes}: not matrices, but those of a convolution or of several experts"
    inner = (A.shape[1], B.shape[0]) if layout.transposed else (A.shape[0], B.shape[1])
    if inner[0] != inner[1]:
        merged = "; loralib's MergedLinear, which has several updates in one, is not read" if layout is LORALIB else ""
        return f"shapes {shapes} have no r in common{merged}"
    if 0 in (*A.shape, *B.shape):
        return f"shapes {shapes} hold nothing"
    if not (is_finite_in(A, torch.float32) and is_finite_in(B, torch.float32)):
        return "not finite floats"
    return None


def _mlx_settings(path: Path, pairs: dict[str, tuple[Tensor, Tensor]], alpha: float | None) -> dict[str, LoRAConfig]:
    config = read_json_object(path)
    parameters: Any = config.get("lora_parameters")
    problems = [] if alpha is None else ["alpha is given, but mlx-lm stores scale = alpha / r: leave it out"]
    if config.get("fine_tune_type", "lora") != "lora":
        problems.append(f"fine_tune_type = {reprlib.repr(config['fine_tune_type'])}: 'lora' alone is converted")
    if not isinstance(parameters, dict) or not all(is_number(parameters.get(key)) for key in ("rank", "scale")):
        problems.append("lora_parameters: an object with the numbers rank and scale is needed")
        parameters = {}
    elif not is_number(parameters.get("dropout", 0.0)):
        problems.append("lora_parameters: dropout must be a number")
    rank = parameters.get("rank")
    problems += [
        f"{n}: its r is {len(A)}, the config says {reprlib.repr(rank)}"
        for n, (A, _) in pairs.items()
        if rank not in (None, len(A))
    ]
    if problems:
        raise ValueError(f"{path} and its tensors cannot be converted from mlx-lm:\n  " + "\n  ".join(problems))
    scale, dropout = parameters["scale"], parameters.get("dropout", 0.0)
    return {name: LoRAConfig(r=len(A), alpha=scale * len(A), dropout=dropout) for name, (A, _) in pairs.items()}
