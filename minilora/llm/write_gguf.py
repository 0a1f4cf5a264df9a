"""Write GGUF, llama.cpp's format: a model, whole or quantized, or an adapter to lay over one.

    write_model      every weight under llama.cpp's name, read and written one at a time, in one of `KINDS`
    write_adapter    A and B of any layers, each with its own scaling

llama.cpp rotates neighbouring rows (2i, 2i + 1) of a head of q and k together, Hugging Face rows i and i + half: of a
Llama model the rows of q_proj and k_proj, and of an adapter's B there, are reordered on the way out (`permute`), as
read_gguf puts them back on the way in. A file with the rows left alone is opened, answers, and is wrong.

Quantizing the blocks is the `gguf` library's work. No torch is needed. Read before this file: read_gguf.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape
from jaxtyping import Float
from numpy import ndarray
from tqdm import tqdm

from minilora.files import whole_file
from minilora.llm.architectures import HEAD, NAMES, QKV, Architecture, Shape, end_matrices, linears, parameter_shapes
from minilora.llm.config import ModelConfig
from minilora.llm.read_gguf import LAYER_TENSORS, TENSORS

KINDS = {  # and what general.file_type says of each
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
}
FLOAT_KINDS = ("F32", "F16", "BF16")
LARGEST = {"F32": float(np.finfo(np.float32).max), "BF16": float.fromhex("0x1.fep127")}
LARGEST_F16 = 65504.0  # and of every quantized kind, whose units are float16
EMBEDDING = NAMES["llama"].embedding
# Tried: over a tied embedding llama.cpp aborts (a failed GGML_ASSERT), for a tied head it knows no tensor.
TIED = "embedding and head share one weight, and llama.cpp cannot adapt one of the two: write the merged model instead"
OUR_TENSORS = {ours: theirs for theirs, ours in TENSORS.items()}
OUR_LAYER_TENSORS = {ours: theirs for theirs, ours in LAYER_TENSORS.items()}
Pair = tuple[Float[ndarray, "_ _"], Float[ndarray, "_ _"], float]  # A (r, in), B (out, r), scaling: each its own sizes


@dataclass(frozen=True)
class Written:
    """What went into a model's file: the kind of every tensor by its GGUF name, and which are not as asked, and why."""

    path: Path
    kinds: Mapping[str, str]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(self.kinds.values()).most_common())
        return "\n".join([f"{self.path}: {self.path.stat().st_size / 1e6:,.0f} MB; tensors: {counts}", *self.notes])


def write_model(
    path: Path,
    read: Callable[[str], Float[ndarray, "..."]],
    config: ModelConfig,
    vocabulary: Mapping[str, Any],
    kind: str = "F16",
    about: Mapping[str, str] | None = None,
) -> Written:
    """Write a decoder as GGUF: under a temporary name, renamed when it is whole.

    `read` gives a weight by its Hugging Face name; it is asked once for each, so the model need not be in memory.
    `vocabulary` is what gguf_vocabulary makes of a tokenizer; `about` may have a name, organization, license and
    description.

    Vectors stay float32. In the quantized kinds the matrix that makes the logits is Q8_0, and a matrix whose rows do
    not divide into blocks F16: as llama.cpp's quantizer does it (which may make the first a Q6_K, that nothing here
    can write).

    Raises:
        ValueError: if the kind does not exist, the vocabulary is not the model's, or a weight has another shape, or a
            number that the kind cannot hold; there is no file then, or the old one.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r} to write weights in; choose one of {list(KINDS)}")
    if len(vocabulary["tokenizer.ggml.tokens"]) != config.vocab_size:
        raise ValueError(
            f"the vocabulary has {len(vocabulary['tokenizer.ggml.tokens'])} tokens, the model {config.vocab_size}"
        )
    shapes = parameter_shapes(architecture_of(config))
    kinds = {name: _kind_of(name, shape, kind, config) for name, shape in shapes.items()}
    extra = {} if config.rope_scaling is None else {"rope_freqs.weight": _rope_factors(config)}
    with whole_file(path) as unfinished, _writer(unfinished, config) as writer:
        told: dict[str, Any] = {"type": "model", **(about or {})}
        told |= {"file_type": int(KINDS[kind]), "quantization_version": gguf.GGML_QUANT_VERSION}
        general = {f"general.{key}": value for key, value in told.items()}
        _add_metadata(writer, {**general, **_hyperparameters(config), **vocabulary})
        for name, factors in extra.items():
            _announce(writer, name, factors.shape, "F32")
        for name, shape in shapes.items():
            _announce(writer, gguf_name(name), shape, kinds[name])
        _begin_tensors(writer)
        for factors in extra.values():
            writer.write_tensor_data(factors)
        for name in tqdm(shapes, desc=f"writing {kind}", unit=" tensors"):
            w = _checked(name, np.asarray(read(name), np.float32), shapes[name], kinds[name])
            packed = gguf.quantize(_permuted(name, w, config), gguf.GGMLQuantizationType[kinds[name]])
            writer.write_tensor_data(packed)
    notes = _notes(shapes, kinds, kind, config)
    return Written(path, {gguf_name(name): k for name, k in kinds.items()}, notes)


def write_adapter(
    path: Path, pairs: Mapping[str, Pair], config: ModelConfig, about: Mapping[str, str] | None = None
) -> None:
    """Write LoRA matrices as a GGUF that llama.cpp lays over the model of this config.

    A pair (A, B, scaling) stands under the Hugging Face name of its layer; ranks and scalings may differ. llama.cpp
    has one alpha for all, and multiplies B A by alpha / r, with the r of each layer:

        alpha = scaling · r          of most layers, whose B is written as it is (but for the order of its rows)
        B ← B · scaling · r / alpha  of the others

    so that alpha / r · B A is every layer's update: with alpha / √r of [rsLoRA] and with settings by layer,
    too. Everything is float32.

    Raises:
        ValueError: if there are no pairs, or one has no place in the model, another shape, or a NaN or infinity (all of
            them at once); there is no file then, or the old one.
    """
    problems = _misfits(pairs, config)
    if problems:
        raise ValueError("this adapter cannot be written for llama.cpp:\n  " + "\n  ".join(problems))
    strengths = Counter(scaling * len(A) for A, _, scaling in pairs.values() if scaling)
    alpha = strengths.most_common(1)[0][0] if strengths else 1.0  # llama.cpp takes an alpha of 0 for none
    tensors: dict[str, ndarray] = {}
    for name, (A, B, scaling) in pairs.items():
        base = gguf_name(f"{name}.weight")
        B = np.asarray(B * (scaling * len(A) / alpha), np.float32)
        tensors[f"{base}.lora_a"] = np.asarray(A.T if name == EMBEDDING else A, np.float32)
        tensors[f"{base}.lora_b"] = _permuted(f"{name}.weight", B, config)
    with whole_file(path) as unfinished, _writer(unfinished, config) as writer:
        metadata = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
        _add_metadata(writer, metadata | {f"general.{key}": value for key, value in (about or {}).items()})
        for name, tensor in tensors.items():
            _announce(writer, name, tensor.shape, "F32")
        _begin_tensors(writer)
        for tensor in tensors.values():
            writer.write_tensor_data(np.ascontiguousarray(tensor))


def permute(w: Float[ndarray, "out ..."], n_heads: int) -> Float[ndarray, "out ..."]:
    """Put row i of the two halves of each head side by side.

    >>> permute(np.arange(8.0), 2)
    array([0., 2., 1., 3., 4., 6., 5., 7.])
    """
    return w.reshape(n_heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_name(name: str) -> str:
    """
    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    if name in OUR_TENSORS:
        return OUR_TENSORS[name]
    _, _, layer, *parts, leaf = name.split(".")
    return f"blk.{layer}.{OUR_LAYER_TENSORS['.'.join(parts)]}.{leaf}"


def architecture_of(config: ModelConfig) -> Architecture:
    """The same decoder as sizes counts it: for the names and shapes of its parameters."""
    return Architecture(
        "llama",
        config.n_layers,
        config.hidden_size,
        config.intermediate_size,
        config.n_heads,
        config.n_kv_heads,
        config.head_dim,
        config.vocab_size,
        tied=config.tie_word_embeddings,
        biased=QKV if config.qkv_bias else (),
    )


def _family(config: ModelConfig) -> str:
    """llama.cpp's name for the architecture. A Qwen2 has biases on q, k and v, and keeps the order of their rows."""
    return "qwen2" if config.qkv_bias else "llama"


def _permuted(name: str, w: Float[ndarray, "..."], config: ModelConfig) -> Float[ndarray, "..."]:
    if _family(config) == "llama" and name.endswith("q_proj.weight"):
        return permute(w, config.n_heads)
    if _family(config) == "llama" and name.endswith("k_proj.weight"):
        return permute(w, config.n_kv_heads)
    return w


def _kind_of(name: str, shape: Shape, kind: str, config: ModelConfig) -> str:
    """What one tensor is stored as, where `kind` is asked for."""
    if len(shape) == 1:
        return "F32"
    if kind in FLOAT_KINDS:
        return kind
    if name == _logits_weight(config):
        kind = "Q8_0"
    block_size, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return kind if shape[-1] % block_size == 0 else "F16"


def _logits_weight(config: ModelConfig) -> str:
    return f"{EMBEDDING if config.tie_word_embeddings else HEAD}.weight"


def _notes(shapes: Mapping[str, Shape], kinds: Mapping[str, str], kind: str, config: ModelConfig) -> tuple[str, ...]:
    """One line for each group of matrices that are not of the kind asked for."""
    logits = _logits_weight(config)
    other = [name for name, shape in shapes.items() if len(shape) > 1 and kinds[name] != kind]
    undivided = [name for name in other if kinds[name] == "F16"]
    notes = []
    if logits in other and kinds[logits] == "Q8_0":
        notes.append(f"{gguf_name(logits)} is Q8_0: it makes the logits, which suffer most from coarse numbers")
    if undivided:
        widths = sorted({shapes[name][-1] for name in undivided})
        notes.append(f"{len(undivided)} matrices are F16: rows of {widths} numbers do not divide into blocks of {kind}")
    return tuple(notes)


def _hyperparameters(config: ModelConfig) -> dict[str, Any]:
    values = {
        "vocab_size": config.vocab_size,
        "block_count": config.n_layers,
        "context_length": config.max_seq_len,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
    }
    return {f"{_family(config)}.{key}": value for key, value in values.items()}


def _rope_factors(config: ModelConfig) -> Float[ndarray, "half"]:
    """What each rotary frequency is divided by: llama.cpp has this table in place of Llama 3.1's settings."""
    assert config.rope_scaling is not None
    plain = [config.rope_theta ** (-i / config.head_dim) for i in range(0, config.head_dim, 2)]
    return np.array([f / scaled for f, scaled in zip(plain, config.rope_frequencies(), strict=True)], np.float32)


def _checked(name: str, w: Float[ndarray, "..."], shape: Shape, kind: str) -> Float[ndarray, "..."]:
    if w.shape != shape:
        raise ValueError(f"{name} has shape {w.shape}, the model of this config has {shape}")
    largest = LARGEST.get(kind, LARGEST_F16)
    if not max(w.max(), -w.min()) <= largest:  # NaN is not
        raise ValueError(
            f"{name} holds a NaN, or a number beyond {largest:.6g}, the largest of {kind}: find what made it, or, "
            "if it is meant, choose F32"
        )
    return w


def _misfits(pairs: Mapping[str, Pair], config: ModelConfig) -> list[str]:
    """One line for each pair that cannot be written."""
    if not pairs:
        return ["it has no layers"]
    arch, problems = architecture_of(config), []
    layers = linears(arch) | end_matrices(arch)
    for name, (A, B, scaling) in pairs.items():
        layer = layers.get(name)
        if layer is None:
            problems.append(f"{name}: the model has no linear layer of that name")
        elif config.tie_word_embeddings and name in (EMBEDDING, HEAD):
            problems.append(f"{name}: {TIED}")
        elif A.ndim != 2 or B.ndim != 2 or (A.shape[1], *B.shape) != (layer.in_features, layer.out_features, len(A)):
            problems.append(
                f"{name}: A {A.shape} and B {B.shape}, needed ({layer.in_features} in, {layer.out_features} out)"
            )
        elif not (np.isfinite(A).all() and np.isfinite(B).all() and math.isfinite(scaling)):
            problems.append(f"{name}: A, B or the scaling is NaN or infinite")
    return problems


@contextmanager
def _writer(path: Path, config: ModelConfig) -> Iterator[gguf.GGUFWriter]:
    with closing(gguf.GGUFWriter(path, _family(config))) as writer:
        yield writer


def _add_metadata(writer: gguf.GGUFWriter, metadata: Mapping[str, Any]) -> None:
    """Each value as the type that llama.cpp's converter gives its like."""
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _announce(writer: gguf.GGUFWriter, name: str, shape: Shape, kind: str) -> None:
    """Tell the file's table of contents of a tensor whose bytes come later."""
    raw_dtype = gguf.GGMLQuantizationType[kind]
    shape_bytes = quant_shape_to_byte_shape(shape, raw_dtype)
    writer.add_tensor_info(name, shape_bytes, np.dtype(np.uint8), math.prod(shape_bytes), raw_dtype)


def _begin_tensors(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
