"""NF4 in NumPy: its sixteen published values, and what rounding to them promises. (tests/compat has the bytes.)"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minilora.numpy_lora import nf4

PUBLISHED = [  # QLoRA, appendix E; as float32 in bitsandbytes
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
weights = hnp.arrays(
    np.float32, st.integers(1, 400), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=True)
)


def test_the_derived_codebook_is_the_published_one():
    assert nf4.nf4_codebook().tolist() == PUBLISHED


@pytest.mark.parametrize(("start", "stop"), [(0.1, 1.0), (nf4.TAIL, 0.5), (-3.3, 7.1)])
def test_the_grid_is_that_of_torch(start, stop):
    for count in range(2, 130):
        ours, theirs = nf4.linspace32(start, stop, count), torch.linspace(start, stop, count, dtype=torch.float32)
        assert np.array_equal(ours, theirs.numpy()), count


def test_the_dynamic_map_has_127_negative_values_a_zero_and_128_positive_ones():
    values = nf4.dynamic_map()

    assert [int(np.sum(values < 0)), int(np.sum(values == 0)), int(np.sum(values > 0))] == [127, 1, 128]
    assert np.all(np.diff(values) > 0)


@given(hnp.arrays(np.uint8, st.integers(1, 50).map(lambda n: 2 * n), elements=st.integers(0, 15)))
def test_packing_loses_nothing(codes):
    assert np.array_equal(nf4.unpack(nf4.pack(codes), len(codes)), codes)


def test_an_odd_number_of_codes_is_not_packed():
    with pytest.raises(ValueError, match="cannot pack 3 codes two to a byte: add one"):
        nf4.pack(np.array([1, 2, 3], dtype=np.uint8))


@settings(deadline=None)
@given(weights, st.sampled_from([2, 32, 64, 4096]))
def test_rounding_error_is_bounded_by_half_the_widest_gap(w, block_size):
    packed, absmax = nf4.quantize(w, block_size)
    error = np.abs(nf4.dequantize(packed, absmax, w.shape, block_size) - w)
    half_gap = np.diff(nf4.nf4_codebook()).max() / 2
    unit = np.repeat(absmax, block_size)[: w.size]
    # three float32 roundings beside the half gap (1/absmax, scaling, product); below 1e-38 the clamp makes all codes 0
    assert np.all(error <= (half_gap + 3 * np.finfo(np.float32).eps) * unit + 1e-38)


def test_every_codebook_value_survives_a_round_trip_exactly():
    w = nf4.nf4_codebook() * np.float32(0.75)
    packed, absmax = nf4.quantize(w, 64)

    assert np.array_equal(nf4.dequantize(packed, absmax, w.shape, 64), w)


def test_halfway_between_two_values_the_lower_is_taken():
    codebook = nf4.nf4_codebook()
    middles = (codebook[:-1] + codebook[1:]) / np.float32(2)

    assert np.array_equal(nf4.nearest(middles, codebook), np.arange(15))
    assert np.array_equal(nf4.nearest(np.nextafter(middles, np.float32(2)), codebook), np.arange(1, 16))


def test_a_block_of_zeros_stays_zeros():
    packed, absmax = nf4.quantize(np.zeros(70, dtype=np.float32))

    assert not nf4.dequantize(packed, absmax, (70,)).any()


@settings(deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 600), elements=st.floats(0, 2.0**20, width=32, allow_subnormal=False)))
def test_double_quantization_is_within_half_a_step_of_the_unit(absmax):
    nested = nf4.double_quantize(absmax)
    error = np.abs(nf4.double_dequantize(nested) - absmax)
    half_step = np.diff(nf4.dynamic_map()).max() / 2
    unit = np.repeat(nested.absmax, nf4.NESTED_BLOCK_SIZE)[: absmax.size]
    rounding = 4 * np.finfo(np.float32).eps * (unit + np.abs(nested.offset))

    # The map ends at −0.993, so a unit of −1 is off by 0.007: less than half a step
    assert np.all(error <= half_step * unit + rounding + 1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_and_says_where(bad):
    w = np.ones((3, 4), dtype=np.float32)
    w[1, 2] = bad

    with pytest.raises(ValueError, match="1 of 12 weights are NaN or infinite, the first at flat index 6"):
        nf4.quantize(w)


@pytest.mark.parametrize("block_size", [0, -64])
def test_an_impossible_block_size_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}: .* such as 64"):
        nf4.quantize(np.ones(4, dtype=np.float32), block_size)


def test_an_empty_weight_is_refused():
    with pytest.raises(ValueError, match="there are no weights to quantize"):
        nf4.quantize(np.ones((0, 4), dtype=np.float32))
