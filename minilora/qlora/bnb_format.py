"""bitsandbytes' 4-bit weights, as they lie in safetensors files: read into Quantized and written, byte for byte.

Beside a weight `<name>`, say model.layers.0.self_attn.q_proj.weight, lie its parts. Theirs on the left:

    <name>                                       packed, as uint8 or viewed as another dtype: their quant_storage
    <name>.absmax                                absmax, float32; or under double quantization its codes, uint8
    <name>.quant_map                             the codebook's 16 values
    <name>.nested_absmax, .nested_quant_map      double quantization: absmax of absmax, and its 256 values
    <name>.quant_state.bitsandbytes__nf4         (or fp4) the numbers, as the bytes of a JSON object: block size,
                                                 shape, the offset, and the dtype that the weight had before

Nothing is believed that can be checked: a part too short would let a kernel read beyond it. Read before this file:
blockwise.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE
from minilora.qlora.blockwise import BLOCK_SIZES, NestedAbsmax, Quantized, block_units, check_complete
from minilora.qlora.codebooks import FP4, NF4, Codebook, dynamic_map
from minilora.torch_lora.config import is_count

CODEBOOKS = {"nf4": NF4, "fp4": FP4}
STATE = ".quant_state.bitsandbytes__"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUMBERS = ("quant_type", "blocksize", "dtype", "shape")
NESTED_NUMBERS = ("nested_blocksize", "nested_dtype", "nested_offset")
PARTS, NESTED_PARTS = (".absmax", ".quant_map"), (".nested_absmax", ".nested_quant_map")
STATE_LIMIT_BYTES = 10_000
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class StoredWeight:
    """A weight in 4 bits as a file has it."""

    quantized: Quantized
    dtype: torch.dtype  # of the floats that it was made from, and that bitsandbytes turns it back into


def names_in_4_bits(tensors: Mapping[str, Tensor]) -> list[str]:
    """Find the weights of a file that have a quant_state, by name."""
    return sorted({key.partition(STATE)[0] for key in tensors if STATE in key})


def parts_of(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Collect the tensors of a file that one weight is made of, by their own names."""
    suffixes = ("", *PARTS, *NESTED_PARTS, *(f"{STATE}{kind}" for kind in CODEBOOKS))
    return {name + suffix: tensors[name + suffix] for suffix in suffixes if name + suffix in tensors}


def read_weight(name: str, tensors: Mapping[str, Tensor]) -> StoredWeight:
    """Read one weight of a file; the bytes stay where they are.

    A `quant_map` that is not bitsandbytes' own is taken as it is. Units on another map, or in nested blocks of other
    than 256, are turned into float32 ones, of the same values.

    Raises:
        ValueError: with all that is missing, of another kind, too short or not finite.
    """
    parts = parts_of(name, tensors)
    numbers, kind = _read_numbers(name, parts)
    is_nested = any(name + suffix in parts for suffix in NESTED_PARTS) or "nested_offset" in numbers
    wanted = [name, *(name + suffix for suffix in (PARTS + NESTED_PARTS if is_nested else PARTS))]
    problems = [f"{key}: missing from the file" for key in wanted if key not in parts]
    problems += _wrong_numbers(name, numbers, kind, is_nested=is_nested)
    floats = [key for key in wanted[1:] if key in parts and not (is_nested and key == name + ".absmax")]
    problems += [
        f"{key}: {parts[key].dtype}, or not finite; finite float32 are needed"
        for key in floats
        if parts[key].dtype != torch.float32 or not parts[key].isfinite().all()
    ]
    codes = parts.get(name + ".absmax")
    if is_nested and codes is not None and codes.dtype != torch.uint8:
        problems.append(f"{name}.absmax: {codes.dtype}; under double quantization it is uint8")
    for suffix, count in ((".quant_map", 16), (".nested_quant_map", 256)):
        if name + suffix in parts and parts[name + suffix].numel() != count:
            problems.append(f"{name + suffix}: {parts[name + suffix].numel()} values, there are {count}")
    if problems:
        raise ValueError("\n  ".join(problems))
    return _assembled(name, parts, numbers, is_nested=is_nested)


def weight_tensors(
    name: str, quantized: Quantized, dtype: torch.dtype, storage: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """Give the tensors that bitsandbytes writes for one weight, with its names, dtypes and bytes.

    `dtype` is what it will turn the weight into; `storage` what the packed bytes are viewed as (FSDP wants them in the
    dtype of the model's other weights).

    Raises:
        ValueError: if the codebook is none of bitsandbytes', or the bytes cannot be viewed so.
    """
    kind, packed = quantized.codebook.name, quantized.packed
    if kind not in CODEBOOKS:
        raise ValueError(f"{name}: bitsandbytes has no {kind!r} of 4 bits; it has {', '.join(CODEBOOKS)}")
    if packed.numel() % storage.itemsize:
        raise ValueError(
            f"{name}: {packed.numel()} bytes cannot be viewed as {storage}: choose storage=torch.uint8, "
            "which holds any number of them"
        )
    check_complete(quantized)
    absmax = quantized.absmax
    numbers: dict[str, Any] = {"quant_type": kind, "blocksize": quantized.block_size, "dtype": _text(dtype)}
    numbers["shape"] = list(quantized.shape)
    tensors = {name: packed.view(storage)[:, None]}
    tensors[name + ".quant_map"] = quantized.codebook.table(packed.device).clone()  # safetensors refuses shared memory
    if isinstance(absmax, NestedAbsmax):
        numbers |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32"}
        numbers["nested_offset"] = absmax.offset.item()
        tensors[name + ".absmax"], tensors[name + ".nested_absmax"] = absmax.codes, absmax.absmax
        tensors[name + ".nested_quant_map"] = dynamic_map(packed.device).clone()
    else:
        tensors[name + ".absmax"] = absmax
    tensors[name + STATE + kind] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}


def _read_numbers(name: str, parts: Mapping[str, Tensor]) -> tuple[dict[str, Any], str]:
    """What the JSON bytes say, and the kind that their key names."""
    kinds = [kind for kind in CODEBOOKS if name + STATE + kind in parts]
    if len(kinds) != 1:
        raise ValueError(f"{name}: {len(kinds)} quant_states of {' or '.join(CODEBOOKS)} in the file, one is needed")
    state = parts[name + STATE + kinds[0]]
    if state.dtype != torch.uint8 or state.ndim != 1 or state.numel() > STATE_LIMIT_BYTES:
        raise ValueError(
            f"{name}{STATE}{kinds[0]}: {state.dtype} of shape {tuple(state.shape)}, not the bytes of a JSON"
        )
    try:
        numbers = json.loads(bytes(state.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}{STATE}{kinds[0]}: not JSON ({error}): the file is damaged") from None
    if not isinstance(numbers, dict):
        raise ValueError(f"{name}{STATE}{kinds[0]}: a JSON {type(numbers).__name__}, not an object")
    return numbers, kinds[0]


def _wrong_numbers(name: str, numbers: Mapping[str, Any], kind: str, *, is_nested: bool) -> list[str]:
    expected = NUMBERS + NESTED_NUMBERS if is_nested else NUMBERS
    problems = [f"{name}: its quant_state lacks {key}" for key in expected if key not in numbers]
    problems += [
        f"{name}: its quant_state has an unknown {key!r}" for key in numbers if key not in NUMBERS + NESTED_NUMBERS
    ]
    shape = numbers.get("shape", [1, 1])
    allowed = {
        "quant_type": (numbers.get("quant_type", kind) == kind, repr(kind)),
        "blocksize": (_is_size(size := numbers.get("blocksize", 64)) and size in BLOCK_SIZES, f"one of {BLOCK_SIZES}"),
        "dtype": (numbers.get("dtype", "float32") in tuple(DTYPES), f"one of {tuple(DTYPES)}"),
        "shape": (isinstance(shape, list) and len(shape) == 2 and all(map(_is_size, shape)), "[out, in]"),
        "nested_blocksize": (_is_size(numbers.get("nested_blocksize", 256)), "a count of weights"),
        "nested_dtype": (numbers.get("nested_dtype", "float32") == "float32", "'float32'"),
        "nested_offset": (_is_float32(numbers.get("nested_offset", 0.0)), "a float32"),
    }
    return problems + [
        f"{name}: its quant_state has {key} = {numbers[key]!r}, {needed} is needed"
        for key, (is_right, needed) in allowed.items()
        if not is_right
    ]


def _assembled(name: str, parts: Mapping[str, Tensor], numbers: Mapping[str, Any], *, is_nested: bool) -> StoredWeight:
    packed = parts[name].contiguous().reshape(-1).view(torch.uint8)
    absmax = parts[name + ".absmax"].reshape(-1)
    codebook, values = CODEBOOKS[numbers["quant_type"]], parts[name + ".quant_map"].reshape(-1)
    if not torch.equal(values, codebook.table(values.device)):
        codebook = Codebook(codebook.name, tuple(values.tolist()))
    shape, block_size = tuple(numbers["shape"]), numbers["blocksize"]
    if not is_nested:
        return _checked(name, Quantized(packed, absmax, codebook, block_size, shape), numbers)
    units, values = parts[name + ".nested_absmax"].reshape(-1), parts[name + ".nested_quant_map"].reshape(-1)
    offset = torch.tensor(numbers["nested_offset"], dtype=torch.float32, device=absmax.device)
    nested = NestedAbsmax(absmax, units, offset)
    if numbers["nested_blocksize"] == NESTED_BLOCK_SIZE and torch.equal(values, dynamic_map(values.device)):
        return _checked(name, Quantized(packed, nested, codebook, block_size, shape), numbers)
    if units.numel() != -(-absmax.numel() // numbers["nested_blocksize"]):
        raise ValueError(
            f"{name}: {units.numel()} units of units for {absmax.numel()} units, in nested blocks of "
            f"{numbers['nested_blocksize']}"
        )
    nested_block = torch.arange(absmax.numel(), device=units.device) // numbers["nested_blocksize"]
    unnested = values[absmax.int()] * units[nested_block] + offset
    return _checked(name, Quantized(packed, unnested, codebook, block_size, shape), numbers)


def _checked(name: str, quantized: Quantized, numbers: Mapping[str, Any]) -> StoredWeight:
    try:
        check_complete(quantized)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if not block_units(quantized).isfinite().all():
        raise ValueError(f"{name}: its units overflow float32: the file is damaged")
    return StoredWeight(quantized, DTYPES[numbers["dtype"]])


def _text(dtype: torch.dtype) -> str:
    names = [name for name, value in DTYPES.items() if value == dtype]
    if not names:
        raise ValueError(f"bitsandbytes turns 4 bits into {', '.join(DTYPES)}, not into {dtype}")
    return names[0]


def _is_size(value: object) -> bool:
    return is_count(value) and value < 2**31


def _is_float32(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
