"""The reference of 4-bit quantization: what rounding promises, and what is refused. (tests/compat has the bytes.)"""

import math
from itertools import pairwise

import pytest
import torch

from minilora.qlora import FP4, INT4, NF4, kernels_cpu
from minilora.qlora import blockwise as reference
from minilora.qlora.blockwise import BLOCK_SIZES
from minilora.qlora.codebooks import Codebook

BOTH = pytest.mark.parametrize("way", [reference, kernels_cpu], ids=["reference", "numba"])
EVERY_CODEBOOK = pytest.mark.parametrize("codebook", [NF4, FP4, INT4], ids=lambda c: c.name)


@BOTH
@EVERY_CODEBOOK
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_rounding_error_is_bounded_by_half_the_widest_gap(way, codebook, block_size):
    w = torch.randn(50, 101)
    quantized = way.quantize(w, codebook, block_size)
    error = (way.dequantize(quantized) - w).abs().view(-1)
    values = sorted(v for v in codebook.values if abs(v) <= 1)
    half_gap = max(b - a for a, b in pairwise(values)) / 2
    unit = reference.block_units(quantized).repeat_interleave(block_size)[: w.numel()]

    # three float32 roundings beside the half gap: the inverse of the unit, the scaling, the product
    assert (error <= (half_gap + 3 * torch.finfo(torch.float32).eps) * unit).all()


@BOTH
@EVERY_CODEBOOK
def test_every_codebook_value_survives_a_round_trip_exactly(way, codebook):
    values = torch.tensor([v for v in codebook.values if abs(v) <= 1] + [1.0])
    w = torch.cat([values, torch.zeros(64 - len(values))]) * 0.75

    assert torch.equal(way.dequantize(way.quantize(w, codebook)), w)


@BOTH
def test_a_short_last_block_and_an_odd_count_are_allowed(way):
    w = torch.randn(67)
    quantized = way.quantize(w)

    assert (quantized.packed.numel(), quantized.absmax.numel()) == (34, 2)
    assert quantized.absmax[1] == w[64:].abs().max()
    assert way.dequantize(quantized).shape == (67,)


@BOTH
def test_zeros_stay_zeros_and_denormals_stay_finite(way):
    tiny = torch.full((64,), 1e-40)

    assert not way.dequantize(way.quantize(torch.zeros(70))).any()
    assert torch.isfinite(way.dequantize(way.quantize(tiny))).all()


@pytest.mark.parametrize(
    ("double", "block_size", "bits"), [(False, 64, 4.5), (False, 32, 5.0), (True, 64, 4.126953125)]
)
def test_bits_per_weight_are_those_of_the_paper(double, block_size, bits):
    quantized = reference.quantize(torch.randn(512, 1024), block_size=block_size, double=double)
    offset_bits = 32 / (512 * 1024) if double else 0

    assert quantized.bits_per_weight == bits + offset_bits


def test_double_quantization_moves_a_unit_by_little():
    w = torch.randn(512, 512)
    plain, double = (reference.block_units(reference.quantize(w, double=d)) for d in (False, True))
    relative = ((double - plain) / plain).abs()

    assert 0 < relative.mean() < 0.005  # the widest step of the map is 1.4 % of the largest deviation from the mean


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_that_is_not_finite_is_refused_and_says_where(way, bad, dtype):
    w = torch.ones(3, 70, dtype=dtype)
    w[1, 2] = bad

    with pytest.raises(ValueError, match=r"1 of 210 weights are NaN or infinite, the first at \(1, 2\): 4 bits"):
        way.quantize(w)


@BOTH
def test_finite_weights_whose_sum_overflows_are_accepted(way):
    w = torch.full((64,), 3e38)

    assert torch.equal(way.dequantize(way.quantize(w)), w)


@BOTH
@pytest.mark.parametrize("block_size", [0, 1, -64, 63, 100, 8192])
def test_an_impossible_block_size_is_refused_with_the_possible_ones(way, block_size):
    with pytest.raises(ValueError, match=rf"block_size is {block_size}: choose one of 32, 64, .* 4096 weights"):
        way.quantize(torch.ones(128), block_size=block_size)


@BOTH
def test_an_empty_weight_is_refused(way):
    with pytest.raises(ValueError, match=r"there are no weights to quantize: the tensor's shape is \(0, 4\)"):
        way.quantize(torch.ones(0, 4))


def test_a_codebook_has_sixteen_values():
    with pytest.raises(ValueError, match="'thirds' has 3 values, but four bits can mean 16"):
        Codebook("thirds", (-1.0, 0.0, 1.0))
