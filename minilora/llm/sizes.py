"""Parameters and bytes of real language models, from their shapes alone: no weights, no torch. All of it is exact.

    counts    what a model has, and what each method of the family trains: from the papers' formulas
    files     an adapter's tensors, and the head of their safetensors file
    bytes     weights in 16 bits or in 4, and what an optimizer keeps for the parameters that it trains

Read before this file: architectures. Read after it: setup, activations, training_memory.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from minilora.llm.architectures import (
    ALL_LINEAR,
    HEAD,
    Architecture,
    Linear,
    Shape,
    end_matrices,
    layer_linears,
    linears,
    match_targets,
    parameter_shapes,
)

OPTIMIZERS = ("adamw", "adamw-8bit", "sgd")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SAFETENSORS_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the state of a smaller tensor in fp32
STATE_BLOCK_SIZE = 256  # 8-bit state values that share an absmax

Targets = str | Sequence[str]

# --- counts -------------------------------------------------------------------------------------------------------


def count(shapes: Iterable[Shape]) -> int:
    """Add up the elements of tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def base_params(arch: Architecture) -> int:
    """Count every parameter of the model, once.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> base_params(ARCHITECTURES["llama-2-7b"])
    6738415616
    """
    return count(parameter_shapes(arch).values())


def linear_weights(arch: Architecture) -> int:
    """Count the weights of the linear layers, without head and biases: what QLoRA stores in 4 bits."""
    return sum(linear.n_weights for linear in linears(arch).values())


def adapter_shapes(
    arch: Architecture, r: int, targets: Targets = ALL_LINEAR, use_dora: bool = False
) -> dict[str, Shape]:
    """The name and shape of every tensor in a LoRA adapter's file, in PEFT's layout.

    Raises:
        ValueError: if `r` is below 1, or a target hits nothing.
    """
    check_count("r", r)
    embeddings = end_matrices(arch).keys() - {HEAD}
    shapes: dict[str, Shape] = {}
    for name, linear in match_targets(arch, targets).items():
        a, b = ("embedding_A", "embedding_B") if name in embeddings else ("A.weight", "B.weight")
        shapes[f"base_model.model.{name}.lora_{a}"] = (r, linear.in_features)
        shapes[f"base_model.model.{name}.lora_{b}"] = (linear.out_features, r)
        if use_dora:
            shapes[f"base_model.model.{name}.lora_magnitude_vector"] = (linear.out_features,)
    return shapes


def lora_params(arch: Architecture, r: int, targets: Targets = ALL_LINEAR, use_dora: bool = False) -> int:
    """Count what LoRA trains: r · (in + out) for each matrix; DoRA adds a magnitude for each output.

    Raises:
        ValueError: as adapter_shapes.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> lora_params(ARCHITECTURES["llama-2-7b"], r=16)
    39976960
    """
    return count(adapter_shapes(arch, r, targets, use_dora).values())


def adalora_shapes(arch: Architecture, r: int, targets: Targets = ALL_LINEAR) -> list[Shape]:
    """AdaLoRA at its start: A, B and r singular values for each matrix. While it trains, zeros take their place.

    Raises:
        ValueError: as adapter_shapes.
    """
    return [*adapter_shapes(arch, r, targets).values(), *[(r,) for _ in match_targets(arch, targets)]]


def ia3_vectors(arch: Architecture) -> dict[str, int]:
    """IA³ in one layer: a factor for each output of k and v (of q too where they are fused), by the matrix's name, and
    for each input of the last matrix."""
    layer = layer_linears(arch)
    outputs = {y.name: y.out_features for y in layer if y.name.endswith(("k_proj", "v_proj", "c_attn"))}
    return outputs | {layer[-1].name: layer[-1].in_features}


def ia3_params(arch: Architecture) -> int:
    """Count IA³'s factors in all layers."""
    return arch.n_layers * sum(ia3_vectors(arch).values())


def houlsby_shapes(arch: Architecture, bottleneck: int) -> list[Shape]:
    """Houlsby's adapters: two a layer, each down to the bottleneck and up again, with biases."""
    h, m = arch.hidden, bottleneck
    return arch.n_layers * 2 * [(m, h), (m,), (h, m), (h,)]


def houlsby_params(arch: Architecture, bottleneck: int) -> int:
    """Count what Houlsby's adapters train."""
    return count(houlsby_shapes(arch, bottleneck))


def prompt_params(arch: Architecture, n_virtual_tokens: int) -> int:
    """Prompt tuning: one embedding for each virtual token."""
    return n_virtual_tokens * arch.hidden


def prefix_shapes(arch: Architecture, n_virtual_tokens: int, projection: int = 0) -> list[Shape]:
    """Prefix tuning: a key and a value for each virtual token in every layer.

    With `projection` (the hidden units of a small network that makes them), what is trained is that network.
    """
    kv = arch.n_kv_heads * arch.head_dim
    made = arch.n_layers * 2 * kv
    if projection == 0:
        return [(n_virtual_tokens, made)]
    return [(n_virtual_tokens, kv), (projection, kv), (projection,), (made, projection), (made,)]


def prefix_params(arch: Architecture, n_virtual_tokens: int, projection: int = 0) -> int:
    """Count what prefix tuning trains."""
    return count(prefix_shapes(arch, n_virtual_tokens, projection))


# --- bytes --------------------------------------------------------------------------------------------------------


def adapter_bytes(
    arch: Architecture, r: int, targets: Targets = ALL_LINEAR, dtype: str = "fp32", use_dora: bool = False
) -> int:
    """The bytes of an adapter's tensors. Its file is larger by `adapter_header_bytes`.

    Raises:
        ValueError: as adapter_shapes, or for an unknown dtype.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> adapter_bytes(ARCHITECTURES["llama-2-7b"], r=16, dtype="bf16")
    79953920
    """
    return lora_params(arch, r, targets, use_dora) * width_bytes(dtype)


def adapter_header_bytes(
    arch: Architecture, r: int, targets: Targets = ALL_LINEAR, dtype: str = "fp32", use_dora: bool = False
) -> int:
    """The head of an adapter's safetensors file: its length in 8 bytes, then JSON with each tensor's name and place."""
    n_bytes, end = width_bytes(dtype), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in sorted(adapter_shapes(arch, r, targets, use_dora).items()):
        start, end = end, end + math.prod(shape) * n_bytes
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    json_bytes = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(json_bytes / 8) * 8  # padded, so that the tensors start at a multiple of 8


def nf4_bytes(n_weights: int, use_double_quantization: bool = True) -> int:
    """The bytes of a 4-bit matrix: two weights a byte, and the absmax of each block of 64.

        bits a weight = 4 + 32/64 = 4.5;   doubly quantized: 4 + 8/64 + 32/(64·256) = 4.127        [QLoRA] section 3

    Left out: the tables of 16 and of 256 values, 1,088 bytes a matrix or fewer.

    >>> nf4_bytes(4096 * 4096) * 8 / 4096**2  # bits per weight
    4.126953125
    """
    packed_bytes, blocks = math.ceil(n_weights / 2), math.ceil(n_weights / 64)
    if not use_double_quantization:
        return packed_bytes + 4 * blocks
    return packed_bytes + blocks + 4 * math.ceil(blocks / 256)


def optimizer_bytes(shapes: Iterable[Shape], optimizer: str) -> int:
    """The bytes of state that an optimizer keeps for tensors of these shapes.

    adamw       two fp32 moments: 8 bytes a parameter
    adamw-8bit  two bytes a parameter and two fp32 absmax a block of 256, [8bit]; small tensors as adamw
    sgd         none: it is meant without momentum

    >>> optimizer_bytes([(16, 4096)], "adamw-8bit")
    133120
    """
    sizes = [math.prod(shape) for shape in shapes]
    if known("optimizer", optimizer, OPTIMIZERS) == "sgd":
        return 0
    small = [n for n in sizes if optimizer == "adamw" or n < MIN_8BIT_SIZE]
    large = [n for n in sizes if optimizer == "adamw-8bit" and n >= MIN_8BIT_SIZE]
    return sum(8 * n for n in small) + sum(2 * n + 2 * 4 * math.ceil(n / STATE_BLOCK_SIZE) for n in large)


def galore_bytes(matrices: Iterable[Linear], others: Iterable[Shape], r: int) -> int:
    """The bytes of GaLore's state: of each matrix, a projector of its smaller side and moments of its larger one.

        4 · (r · smaller + 2 · r · larger)  where r is below the smaller side;  adamw's 8 bytes elsewhere

    >>> galore_bytes([Linear("q_proj", 4096, 1024)], [], r=128) == 4 * 128 * (1024 + 2 * 4096)
    True
    """
    n_bytes = optimizer_bytes(others, "adamw")
    for matrix in matrices:
        smaller, larger = sorted((matrix.in_features, matrix.out_features))
        n_bytes += 4 * r * (smaller + 2 * larger) if r < smaller else 8 * matrix.n_weights
    return n_bytes


def weight_bytes(arch: Architecture, dtype: str, in_4_bits: bool = False) -> int:
    """The bytes of the model's own weights. In 4 bits: every linear layer but the head.

    So it is where all of them are targets, as `minilora train` makes them; what `inject` is not told to wrap stays.
    """
    if not in_4_bits:
        return base_params(arch) * width_bytes(dtype)
    rest = base_params(arch) - linear_weights(arch)
    return sum(nf4_bytes(linear.n_weights) for linear in linears(arch).values()) + rest * width_bytes(dtype)


# --- checks -------------------------------------------------------------------------------------------------------


def known(what: str, name: str, names: Iterable[str]) -> str:
    """The name.

    Raises:
        ValueError: if it is none of the names.
    """
    if name not in names:
        raise ValueError(f"no {what} is named {name!r}; there are {', '.join(names)}")
    return name


def width_bytes(dtype: str) -> int:
    """Bytes of one number.

    Raises:
        ValueError: for an unknown dtype.
    """
    return DTYPE_BYTES[known("dtype", dtype, DTYPE_BYTES)]


def check_count(name: str, value: int) -> None:
    """
    Raises:
        ValueError: if it is below 1.
    """
    if value < 1:
        raise ValueError(f"{name} is {value}: it must be 1 or more")
