"""Parameters and bytes of real language models, from their shapes alone: no weights, no torch.

What is exact: every count, an adapter's file, the weights, gradients and optimizer state of a training run.
What is an estimate: activations and logits. They are sums of named terms, the tensors that autograd keeps
for the backward pass (`saved_per_token` says which). On SmolLM2-135M the sum is within a tenth of the bytes
that are alive in a step (tests/train/test_memory.py).

What is left out: the device's own context (0.3 to 0.8 GB on CUDA), the allocator's gaps, and the temporary
tensors of single operations.

    full    every parameter is trained
    lora    A and B are trained, in fp32, beside the frozen model
    dora    and a magnitude for each output, beside the squared length of each row of the frozen weight
    qlora   the same over linear layers of 4.127 bits a weight; embeddings, head and norms stay as they are

Read before this file: architectures.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from minilora.llm.architectures import (
    ALL_LINEAR,
    HEAD,
    NAMES,
    Architecture,
    Linear,
    Shape,
    end_matrices,
    layer_linears,
    linears,
    match_targets,
    parameter_shapes,
)

METHODS = ("full", "lora", "dora", "qlora")
OPTIMIZERS = ("adamw", "adamw-8bit", "sgd")
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SAFETENSORS_DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
MIN_8BIT_SIZE = 4096  # bitsandbytes keeps the state of a smaller tensor in fp32
STATE_BLOCK_SIZE = 256  # 8-bit state values that share an absmax
KEPT_ANYHOW = ("v_proj", "gate_proj", "up_proj")  # whose results the backward of attention and of SwiGLU asks for
LOSS_CHUNK_TOKENS = 256  # whose logits the loss makes at a time: 25 MB of bf16 for SmolLM2; more is no faster

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
    _check_count("r", r)
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


def ia3_params(arch: Architecture) -> int:
    """IA³: a factor for each output of k and v (of q too where they are fused) and each input of the last matrix."""
    layer = layer_linears(arch)
    outputs = sum(linear.out_features for linear in layer if linear.name.endswith(("k_proj", "v_proj", "c_attn")))
    return arch.n_layers * (outputs + layer[-1].in_features)


def houlsby_params(arch: Architecture, bottleneck: int) -> int:
    """Houlsby's adapters: two a layer, each down to the bottleneck and up again, with biases."""
    down = Linear("down", arch.hidden, bottleneck, bias=True)
    up = Linear("up", bottleneck, arch.hidden, bias=True)
    return arch.n_layers * 2 * (down.params + up.params)


def prompt_params(arch: Architecture, n_virtual_tokens: int) -> int:
    """Prompt tuning: one embedding for each virtual token."""
    return n_virtual_tokens * arch.hidden


def prefix_params(arch: Architecture, n_virtual_tokens: int, projection: int = 0) -> int:
    """Prefix tuning: a key and a value for each virtual token in every layer.

    With `projection` (the hidden units of a small network that makes them), what is trained is that network.
    """
    kv = arch.n_kv_heads * arch.head_dim
    made = arch.n_layers * 2 * kv
    if projection == 0:
        return n_virtual_tokens * made
    network = Linear("in", kv, projection, bias=True).params + Linear("out", projection, made, bias=True).params
    return n_virtual_tokens * kv + network


# --- bytes --------------------------------------------------------------------------------------------------------


def adapter_bytes(arch: Architecture, r: int, targets: Targets = ALL_LINEAR, dtype: str = "fp32") -> int:
    """The bytes of an adapter's tensors. Its file is larger by `adapter_header_bytes`.

    Raises:
        ValueError: as adapter_shapes, or for an unknown dtype.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> adapter_bytes(ARCHITECTURES["llama-2-7b"], r=16, dtype="bf16")
    79953920
    """
    return lora_params(arch, r, targets) * _width_bytes(dtype)


def adapter_header_bytes(arch: Architecture, r: int, targets: Targets = ALL_LINEAR, dtype: str = "fp32") -> int:
    """The head of an adapter's safetensors file: its length in 8 bytes, then JSON with each tensor's name and place."""
    width_bytes, end = _width_bytes(dtype), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in sorted(adapter_shapes(arch, r, targets).items()):
        start, end = end, end + math.prod(shape) * width_bytes
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
    if _known("optimizer", optimizer, OPTIMIZERS) == "sgd":
        return 0
    small = [n for n in sizes if optimizer == "adamw" or n < MIN_8BIT_SIZE]
    large = [n for n in sizes if optimizer == "adamw-8bit" and n >= MIN_8BIT_SIZE]
    return sum(8 * n for n in small) + sum(2 * n + 2 * 4 * math.ceil(n / STATE_BLOCK_SIZE) for n in large)


def weight_bytes(arch: Architecture, method: str, dtype: str) -> int:
    """The bytes of the model's own weights. QLoRA: every linear layer but the head in 4 bits.

    So it is where all of them are targets, as `minilora train` makes them; what `inject` is not told to wrap stays.
    """
    if _known("method", method, METHODS) != "qlora":
        return base_params(arch) * _width_bytes(dtype)
    rest = base_params(arch) - linear_weights(arch)
    return sum(nf4_bytes(linear.n_weights) for linear in linears(arch).values()) + rest * _width_bytes(dtype)


# --- the memory of training ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained. Checked when made."""

    method: str = "lora"
    r: int = 8
    targets: str | tuple[str, ...] = ALL_LINEAR
    dtype: str = "bf16"  # of weights and arithmetic; an adapter's A and B are fp32 always
    optimizer: str = "adamw"
    batch: int = 1
    seq: int = 512  # tokens in a row of the batch
    checkpointing: bool = False  # keep each layer's input only, and compute the layer again in the backward pass
    master_weights: bool = True  # full training in 16 bits updates an fp32 copy of the weights

    def __post_init__(self) -> None:
        _known("method", self.method, METHODS)
        _known("optimizer", self.optimizer, OPTIMIZERS)
        _width_bytes(self.dtype)
        for name in ("r", "batch", "seq"):
            _check_count(name, getattr(self, name))

    @property
    def is_full(self) -> bool:
        return self.method == "full"

    @property
    def n_tokens(self) -> int:
        return self.batch * self.seq

    @property
    def width_bytes(self) -> int:
        """Bytes of one number in the weights and activations."""
        return _width_bytes(self.dtype)


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """The memory of a training step, in bytes. Activations and logits are estimates; the rest is exact."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    master: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def training_bytes(arch: Architecture, setup: Setup) -> TrainingBytes:
    """Add up the memory of one training step.

    Gradients fill while activations empty, so the true peak of a large model lies a little below this sum.

    Raises:
        ValueError: if a target hits nothing, or the sequence is longer than the model's positions.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> training_bytes(ARCHITECTURES["llama-2-7b"], Setup(method="full", dtype="fp32")).optimizer / 6738415616
    8.0
    """
    if arch.n_positions and setup.seq > arch.n_positions:
        raise ValueError(f"a sequence of {setup.seq} tokens is too long: this model has {arch.n_positions} positions")
    is_dora = setup.method == "dora"
    trained = parameter_shapes(arch) if setup.is_full else adapter_shapes(arch, setup.r, setup.targets, is_dora)
    n_trained = count(trained.values())
    row_lengths = 4 * sum(y.out_features for y in match_targets(arch, setup.targets).values()) if is_dora else 0
    has_master = setup.is_full and setup.master_weights and setup.width_bytes < 4
    return TrainingBytes(
        weights=weight_bytes(arch, setup.method, setup.dtype),
        adapter=0 if setup.is_full else 4 * n_trained + row_lengths,
        gradients=n_trained * (setup.width_bytes if setup.is_full else 4),
        optimizer=optimizer_bytes(trained.values(), setup.optimizer),
        master=4 * n_trained if has_master else 0,
        activations=sum(activation_terms(arch, setup).values()),
        logits=sum(logit_terms(arch, setup).values()),
    )


def saved_per_token(arch: Architecture, setup: Setup, trained: Collection[Linear]) -> dict[str, int]:
    """Bytes for each token that autograd keeps of one layer, of which these matrices are trained or have an adapter.

    Assumed: attention that does not store its scores (torch's scaled_dot_product_attention, or ours), no dropout, and
    for Llama what llm/autograd keeps on a CPU (on CUDA the norms' results too, 2 · hidden numbers). A matrix keeps its
    input only if it is trained or has an adapter: to send a gradient through a frozen one takes its weight alone.
    """
    width_bytes, i = setup.width_bytes, arch.intermediate
    q, kv = arch.n_heads * arch.head_dim, arch.n_kv_heads * arch.head_dim
    inputs = {linear.reads: linear.in_features for linear in trained}
    results = [y.out_features for y in trained if y.name.rpartition(".")[2] not in KEPT_ANYHOW]
    attention = {"attention: output and log-sum": q * width_bytes + 4 * arch.n_heads}
    if arch.family == "llama":
        norms = {"norms: input, and a scale in fp32": 2 * (arch.hidden * width_bytes + 4)}
        mlp = {"mlp: gate and up": 2 * i * width_bytes}
        if not setup.is_full:  # a LoRA layer has a norm's result, or swiglu's, made again
            inputs = {name: features for name, features in inputs.items() if name == "attention output"}
        if width_bytes <= 2:  # attention by hand: from q, k and v alone
            attention = {}
    else:
        norms = {"norms: input, mean and deviation": 2 * (arch.hidden + 2) * width_bytes}
        mlp = {"mlp: four steps of gelu": 4 * i * width_bytes}
        inputs.pop("attention output", None)  # a view of what attention keeps; Llama's is a copy, head after head
    return {
        **norms,
        "attention: q, k, v": (q + 2 * kv) * width_bytes,
        **attention,
        **mlp,
        "inputs of trained matrices": sum(inputs.values()) * width_bytes,
        "adapters: x Aᵀ": 0 if setup.is_full else len(trained) * setup.r * width_bytes,
        "DoRA: results that nothing else keeps": width_bytes * sum(results) if setup.method == "dora" else 0,
    }


def activation_terms(arch: Architecture, setup: Setup) -> dict[str, int]:
    """An estimate of the bytes that wait for the backward pass, by kind of tensor, for the whole batch and all layers.

    With checkpointing: the input of every layer, and all of one layer, the one that is being computed again. Where that
    one is smaller than the loss's chunk, which has gone by then, it adds nothing.
    """
    layers = [saved_per_token(arch, setup, trained) for trained in _trained_by_layer(arch, setup)]
    if setup.checkpointing:
        layers = [max(layers, key=lambda terms: sum(terms.values()))]
    terms = {name: setup.n_tokens * sum(layer[name] for layer in layers) for name in layers[0]}
    if setup.method == "qlora":
        largest = max(linear.n_weights for linear in layer_linears(arch))
        terms["one weight at a time, out of 4 bits"] = largest * setup.width_bytes
    if setup.checkpointing:
        if sum(terms.values()) <= sum(logit_terms(arch, setup).values()):
            terms = {}
        terms["checkpoints: input of each layer"] = arch.n_layers * setup.n_tokens * arch.hidden * setup.width_bytes
    return {name: n_bytes for name, n_bytes in terms.items() if n_bytes}


def _trained_by_layer(arch: Architecture, setup: Setup) -> list[list[Linear]]:
    """For each decoder layer, those of its matrices that are trained or have an adapter."""
    hit = linears(arch) if setup.is_full else match_targets(arch, setup.targets)
    prefix, one_layer = NAMES[arch.family].layer, layer_linears(arch)
    return [[linear for linear in one_layer if f"{prefix}.{n}.{linear.name}" in hit] for n in range(arch.n_layers)]


def logit_terms(arch: Architecture, setup: Setup) -> dict[str, int]:
    """An estimate of the bytes at the loss, which makes the logits of LOSS_CHUNK_TOKENS tokens at a time."""
    n = min(setup.n_tokens, LOSS_CHUNK_TOKENS) * arch.vocab
    terms = {f"logits in {setup.dtype}": n * setup.width_bytes}
    if setup.is_full:
        terms["gradient of the head in fp32"] = arch.vocab * arch.hidden * 4
    return terms


# --- checks -------------------------------------------------------------------------------------------------------


def _known(what: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ValueError(f"no {what} is named {name!r}; there are {', '.join(names)}")
    return name


def _width_bytes(dtype: str) -> int:
    return DTYPE_BYTES[_known("dtype", dtype, DTYPE_BYTES)]


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}: it must be 1 or more")
