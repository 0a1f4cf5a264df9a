"""One weight in bitsandbytes' layout: there and back, and refused where anything in it is wrong."""

import json
import math
import re

import pytest
import torch
from torch import Tensor, nn

from minilora.qlora import FP4, INT4, NF4, NF4Linear, Quantized, dequantize, quantize
from minilora.qlora.blockwise import NestedAbsmax
from minilora.qlora.bnb_format import names_in_4_bits, read_weight, weight_tensors

NAME = "a.b.weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"


def tensors_of(shape: tuple[int, int] = (22, 66), *, double: bool = True, **more) -> dict[str, Tensor]:
    return weight_tensors(NAME, quantize(torch.randn(shape), double=double, **more), torch.bfloat16)


def numbers_in(tensors: dict[str, Tensor]) -> dict[str, object]:
    return json.loads(bytes(tensors[STATE].tolist()))


def with_numbers(tensors: dict[str, Tensor], **changes) -> dict[str, Tensor]:
    numbers = {key: value for key, value in (numbers_in(tensors) | changes).items() if value != "left out"}
    return tensors | {STATE: torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("shape", [(1, 1), (7, 9), (22, 66), (64, 64), (130, 300)], ids=str)
@pytest.mark.parametrize("codebook", [NF4, FP4], ids=lambda codebook: codebook.name)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_a_weight_comes_back_as_it_was(shape, codebook, double, block_size):
    quantized = quantize(torch.randn(shape), codebook, block_size, double=double)
    stored = read_weight(NAME, weight_tensors(NAME, quantized, torch.float16))

    assert stored.dtype == torch.float16
    assert stored.quantized.codebook is codebook
    assert (stored.quantized.block_size, stored.quantized.shape) == (block_size, shape)
    assert isinstance(stored.quantized.absmax, NestedAbsmax) == double
    assert torch.equal(dequantize(stored.quantized), dequantize(quantized))


def test_the_numbers_stand_in_bitsandbytes_order():
    numbers = numbers_in(tensors_of())

    assert list(numbers) == [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]
    assert list(numbers.values())[:6] == ["nf4", 64, "bfloat16", [22, 66], 256, "float32"]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_bytes_viewed_as_floats_are_the_same_bytes(storage):
    quantized = quantize(torch.randn(8, 64))
    tensors = weight_tensors(NAME, quantized, torch.bfloat16, storage)

    assert (tensors[NAME].dtype, tensors[NAME].shape) == (storage, (256 // storage.itemsize, 1))
    assert torch.equal(read_weight(NAME, tensors).quantized.packed, quantized.packed)


def test_bytes_that_do_not_fill_the_dtype_are_refused():
    with pytest.raises(ValueError, match=r"33 bytes cannot be viewed as torch\.bfloat16: choose storage=torch\.uint8"):
        weight_tensors(NAME, quantize(torch.randn(1, 66)), torch.bfloat16, torch.bfloat16)


def test_what_bitsandbytes_has_no_name_for_is_not_written():
    with pytest.raises(ValueError, match=r"bitsandbytes has no 'int4' of 4 bits; it has nf4, fp4"):
        weight_tensors(NAME, quantize(torch.randn(4, 64), INT4), torch.bfloat16)
    with pytest.raises(ValueError, match=r"into float32, float16, bfloat16, not into torch\.float64"):
        weight_tensors(NAME, quantize(torch.randn(4, 64)), torch.float64)


def test_half_a_weight_is_not_written():
    good = quantize(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"needs .* this one has .*: load it again"):
        weight_tensors(NAME, Quantized(good.packed[:-1], good.absmax, NF4, 64, (4, 64)), torch.bfloat16)


def test_another_codebook_is_taken_from_the_file():
    tensors = tensors_of()
    tensors[NAME + ".quant_map"] = tensors[NAME + ".quant_map"].flip(0)
    quantized = read_weight(NAME, tensors).quantized
    known = read_weight(NAME, tensors_of()).quantized

    assert quantized.codebook.values == tuple(reversed(NF4.values))
    assert quantized.codebook != NF4
    written = weight_tensors(NAME, quantized, torch.bfloat16)
    assert all(torch.equal(written[key], tensors[key]) for key in tensors)
    assert known.codebook is NF4


@pytest.mark.parametrize("nested_block", [64, 256])
def test_units_on_another_map_or_in_other_blocks_keep_their_values(nested_block):
    tensors = with_numbers(tensors_of((64, 300)), nested_blocksize=nested_block)  # 300 units
    if nested_block != 256:
        tensors[NAME + ".nested_absmax"] = torch.rand(-(-300 // nested_block))
    values = tensors[NAME + ".nested_quant_map"] = torch.linspace(-1, 1, 256)
    quantized = read_weight(NAME, tensors).quantized
    spread = tensors[NAME + ".nested_absmax"].repeat_interleave(nested_block)[:300]
    units = values[tensors[NAME + ".absmax"].int()] * spread + torch.tensor(numbers_in(tensors)["nested_offset"])

    assert isinstance(quantized.absmax, Tensor)
    assert torch.equal(quantized.absmax, units)


@pytest.mark.parametrize("part", ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"])
def test_a_missing_part_is_named(part):
    tensors = tensors_of()
    del tensors[NAME + part]

    with pytest.raises(ValueError, match=f"^{re.escape(NAME + part)}: missing from the file$"):
        read_weight(NAME, tensors)


WRONG_NUMBERS = [
    ("quant_type", "fp4"), ("quant_type", 4), ("blocksize", 48), ("blocksize", "64"), ("blocksize", True),
    ("blocksize", [64]), ("dtype", "int8"), ("dtype", ["bfloat16"]), ("dtype", "__class__"), ("shape", [22]),
    ("shape", [-22, -66]), ("shape", "22"), ("shape", [22.0, 66]), ("shape", None), ("nested_blocksize", 0),
    ("nested_dtype", "float16"), ("nested_offset", math.nan), ("nested_offset", math.inf), ("nested_offset", "0"),
    ("nested_offset", 1e39), ("nested_offset", 10**400), ("nested_offset", -(10**400)), ("nested_blocksize", 10**400),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG_NUMBERS, ids=str)
def test_a_wrong_number_is_told_with_what_is_needed(key, value):
    with pytest.raises(ValueError, match=rf"^a\.b\.weight: its quant_state has {key} = .* needed$"):
        read_weight(NAME, with_numbers(tensors_of(), **{key: value}))


@pytest.mark.parametrize("key", ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_offset"])
def test_a_number_that_is_left_out_is_named(key):
    with pytest.raises(ValueError, match=rf"^a\.b\.weight: its quant_state lacks {key}$"):
        read_weight(NAME, with_numbers(tensors_of(), **{key: "left out"}))


def test_an_unknown_number_is_refused():
    with pytest.raises(ValueError, match=r"its quant_state has an unknown 'rotation'"):
        read_weight(NAME, with_numbers(tensors_of(), rotation=1))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [[23, 66], [21, 66], [2**30, 2**30]], ids=str)
def test_parts_of_another_length_than_the_shape_asks_for_are_refused(shape, double):
    with pytest.raises(ValueError, match=r"^a\.b\.weight: a weight of shape .* needs .*; this one has"):
        read_weight(NAME, with_numbers(tensors_of(double=double), shape=shape))


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        (".absmax", torch.zeros(23), r"\.absmax: torch\.float32; under double quantization it is uint8"),
        (".nested_absmax", torch.tensor([math.nan]), r"\.nested_absmax: .* finite float32 are needed"),
        (".nested_absmax", torch.ones(1).half(), r"\.nested_absmax: torch\.float16.* finite float32 are needed"),
        (".nested_absmax", torch.ones(2), r"this one has .*'units of units': 2"),
        (".quant_map", torch.zeros(15), r"\.quant_map: 15 values, there are 16"),
        (".quant_map", torch.full((16,), math.inf), r"\.quant_map: .* finite float32 are needed"),
        (".nested_quant_map", torch.zeros(255), r"\.nested_quant_map: 255 values, there are 256"),
        ("", torch.zeros(725, 1, dtype=torch.uint8), r"'bytes of codes': 725"),
    ],
)  # fmt: skip
def test_a_part_of_another_kind_or_length_is_refused(part, tensor, message):
    with pytest.raises(ValueError, match=rf"^a\.b\.weight.*{message}"):
        read_weight(NAME, tensors_of() | {NAME + part: tensor})


def test_units_beyond_float32_are_refused():
    tensors = tensors_of() | {NAME + ".nested_absmax": torch.tensor([3e38])}
    with pytest.raises(ValueError, match=r"^a\.b\.weight: its units overflow float32: the file is damaged$"):
        read_weight(NAME, with_numbers(tensors, nested_offset=3e38))


def test_a_nested_block_takes_no_more_memory_than_its_units(monkeypatch):
    """2³¹ − 1 is allowed, one block for all: repeated so often, its one unit would take 8 GB."""
    monkeypatch.setattr(Tensor, "repeat_interleave", lambda *args: pytest.fail("the units were repeated"))
    tensors = with_numbers(tensors_of(), nested_blocksize=2**31 - 1)
    values, offset = tensors[NAME + ".nested_quant_map"], torch.tensor(numbers_in(tensors)["nested_offset"])

    units = values[tensors[NAME + ".absmax"].int()] * tensors[NAME + ".nested_absmax"] + offset
    assert torch.equal(read_weight(NAME, tensors).quantized.absmax, units)


def test_nested_blocks_of_another_length_need_as_many_units():
    tensors = with_numbers(tensors_of((64, 300)), nested_blocksize=64)

    with pytest.raises(ValueError, match=r"a\.b\.weight: 2 units of units for 300 units, in nested blocks of 64"):
        read_weight(NAME, tensors)


@pytest.mark.parametrize(
    "state",
    [
        b"", b"{", b"[1, 2]", b"null", b"\xff\xfe", b'{"quant_type": "nf4"', b"[" * 9_000, b"1" * 9_000,
        b'{"shape": ' + b"1" * 5_000 + b"}",
    ],
    ids=lambda state: str(state[:12]),
)  # fmt: skip
def test_bytes_that_are_no_json_object_are_refused(state):
    with pytest.raises(ValueError, match=r"^a\.b\.weight"):
        read_weight(NAME, tensors_of() | {STATE: torch.tensor(list(state), dtype=torch.uint8)})


def test_a_state_too_long_or_of_another_dtype_is_not_opened():
    for state in (torch.zeros(10_001, dtype=torch.uint8), torch.zeros(10), torch.zeros(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="not the bytes of a JSON"):
            read_weight(NAME, tensors_of() | {STATE: state})


def test_two_states_or_none_are_refused():
    tensors = tensors_of()
    with pytest.raises(ValueError, match=r"a\.b\.weight: 2 quant_states of nf4 or fp4 in the file, one is needed"):
        read_weight(NAME, tensors | {STATE.replace("nf4", "fp4"): tensors[STATE]})
    del tensors[STATE]
    with pytest.raises(ValueError, match=r"a\.b\.weight: 0 quant_states"):
        read_weight(NAME, tensors)


def test_all_problems_of_a_weight_come_at_once():
    tensors = with_numbers(tensors_of(), blocksize=1, dtype="int8")
    del tensors[NAME + ".absmax"]

    with pytest.raises(ValueError) as error:
        read_weight(NAME, tensors)
    assert len(str(error.value).splitlines()) == 3


def test_weights_in_4_bits_are_found_by_their_states():
    assert names_in_4_bits(tensors_of() | {"norm.weight": torch.ones(3)}) == [NAME]


def test_a_layer_holds_a_weight_that_is_in_4_bits_already():
    quantized = quantize(torch.randn(22, 66), FP4, double=True)
    layer = NF4Linear.holding(quantized, torch.arange(22.0))
    x = torch.randn(3, 66, requires_grad=True)

    torch.testing.assert_close(layer(x), nn.functional.linear(x, dequantize(quantized), torch.arange(22.0)))
    assert layer.packed is quantized.packed
    assert (layer.in_features, layer.out_features, layer.codebook) == (66, 22, FP4)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_layer_does_not_hold_what_is_no_matrix_or_not_whole():
    good = quantize(torch.randn(22, 66))
    with pytest.raises(ValueError, match=r"no linear layer has a weight of shape \(1452,\) and a bias of None"):
        NF4Linear.holding(quantize(torch.randn(1452)))
    with pytest.raises(ValueError, match=r"shape \(22, 66\) and a bias of 21"):
        NF4Linear.holding(good, torch.zeros(21))
    with pytest.raises(ValueError, match="load it again"):
        NF4Linear.holding(Quantized(good.packed[:-1], good.absmax, NF4, 64, (22, 66)))
