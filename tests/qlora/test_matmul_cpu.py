"""The product of a few rows with a weight in 4 bits is the product with the reference's float32 weights."""

import copy
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

from minilora.cpu import few_rows
from minilora.qlora import FP4, INT4, NF4, Quantized, blockwise, fast, matmul_cpu
from minilora.qlora.blockwise import BLOCK_SIZES

DTYPES = [torch.bfloat16, torch.float32]


def rounding(dtype: torch.dtype) -> float:
    """The most by which rounding to a dtype changes a number, relative to it."""
    return torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("codebook", [NF4, FP4, INT4])
@pytest.mark.parametrize("n_rows", [1, 2, 3, 8, 13, 32])
def test_it_is_the_product_with_the_references_weight(n_rows, codebook, double, dtype):
    """A sum of n float32 products is off by at most n · 2⁻²⁴ of the sum of their sizes; then y is rounded."""
    x, quantized = torch.randn(n_rows, 96).to(dtype), blockwise.quantize(torch.randn(1025, 96), codebook, double=double)
    W = blockwise.dequantize(quantized).double()
    exact, sizes = x.double() @ W.T, x.double().abs() @ W.T.abs()
    y = matmul_cpu.linears(x, [(quantized, None)])[0]

    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= exact.abs() * rounding(dtype) * 1.01 + 98 * 2**-24 * sizes).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(2049, 32), (700, 96), (101, 1536)])
def test_every_weight_has_the_unit_of_its_block(out_features, in_features, double, block_size):
    """Rows of the identity give the weights themselves, exactly: also where a block straddles rows."""
    W = torch.randn(out_features, in_features) * torch.logspace(-3, 3, out_features)[:, None]
    quantized = blockwise.quantize(W, NF4, block_size, double=double)
    right = blockwise.dequantize(quantized)
    for start in range(0, in_features, 8):
        x = torch.eye(in_features)[start : start + 8]
        assert torch.equal(matmul_cpu.linears(x, [(quantized, None)])[0], right.T[start : start + 8])


def test_a_row_has_the_same_bits_alone_among_others_and_in_any_number_of_threads():
    x, quantized = torch.randn(20, 576), blockwise.quantize(torch.randn(193, 576), double=True)
    y, before = matmul_cpu.linears(x, [(quantized, None)])[0], torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            for n_rows in range(1, 20):
                assert torch.equal(matmul_cpu.linears(x[:n_rows], [(quantized, None)])[0], y[:n_rows])
    finally:
        torch.set_num_threads(before)


def test_several_weights_in_one_go_give_the_bits_of_each_alone():
    """Whatever is double-quantized, has another codebook, block size or bias, or fewer outputs than a block."""
    settings = [(NF4, 64, True), (FP4, 32, False), (INT4, 4096, True), (NF4, 128, False), (NF4, 64, True)]
    x, widths = torch.randn(3, 96), (1025, 2, 33, 64, 700)
    weights = [
        blockwise.quantize(torch.randn(width, 96), codebook, block_size, double=double)
        for width, (codebook, block_size, double) in zip(widths, settings, strict=True)
    ]
    layers = [(W, torch.randn(W.shape[0]) if number % 2 else None) for number, W in enumerate(weights)]

    for y, layer in zip(matmul_cpu.linears(x, layers), layers, strict=True):
        assert torch.equal(y, matmul_cpu.linears(x, [layer])[0])


def test_a_weight_of_one_output_does_not_go_along():
    """The kernels take two outputs at once; one alone would be read and written in front of where it lies."""
    x, weights = torch.randn(1, 96), [blockwise.quantize(torch.randn(width, 96), double=True) for width in (1000, 1)]
    for y, W in zip(fast.linears(x, [(W, None) for W in weights]), weights, strict=True):
        torch.testing.assert_close(y, x @ blockwise.dequantize(W).T, rtol=1e-5, atol=1e-4)
    assert not matmul_cpu.fits(x, *weights)


def test_a_weight_whose_parts_moved_is_read_where_they_lie_now():
    x, quantized = torch.randn(1, 96), blockwise.quantize(torch.randn(1000, 96), double=True)
    matmul_cpu.linears(x, [(quantized, None)])
    quantized.packed.share_memory_()
    quantized.packed.fill_(0x77)  # NF4's code 7 is 0

    assert not matmul_cpu.linears(x, [(quantized, None)])[0].any()


def test_a_copy_is_read_where_it_lies_itself():
    """What was looked up for one weight once does not go along with its copy."""
    x, quantized = torch.randn(1, 96), blockwise.quantize(torch.randn(1000, 96), double=True)
    right = matmul_cpu.linears(x, [(quantized, None)])[0]
    copied = copy.deepcopy(quantized)
    quantized.packed.zero_()

    assert copied.addresses != quantized.addresses
    assert torch.equal(matmul_cpu.linears(x, [(copied, None)])[0], right)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96)])
def test_fast_linear_goes_this_way_and_adds_the_bias(shape, monkeypatch):
    quantized, x, bias = blockwise.quantize(torch.randn(1000, 96)), torch.randn(shape), torch.randn(1000)
    monkeypatch.setattr(fast, "dequantize", lambda *_: pytest.fail("floats of the whole weight"))
    y = fast.linear(x, quantized, bias)

    assert y.shape == (*shape[:-1], 1000)
    torch.testing.assert_close(y, x @ blockwise.dequantize(quantized).T + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "block_size"),
    [
        (torch.ones(33, 96), 64),
        (torch.ones(1, 96, dtype=torch.float16), 64),
        (torch.ones(1, 96, dtype=torch.float64), 64),
        (torch.ones(1, 96), 48),  # only a file can have it
    ],
)
def test_other_products_go_through_floats(x, block_size):
    W = torch.randn(1000, 96)
    quantized = blockwise.quantize(W)
    if block_size == 48:
        quantized = Quantized(quantized.packed, torch.rand(2000), NF4, 48, (1000, 96))

    assert not matmul_cpu.fits(x, quantized)
    torch.testing.assert_close(fast.linear(x, quantized), x @ blockwise.dequantize(quantized, x.dtype).T)


def test_parts_too_short_and_features_that_do_not_fit_are_refused_before_a_kernel_reads_them():
    quantized = blockwise.quantize(torch.randn(1000, 96))
    with pytest.raises(ValueError, match=r"a weight of shape \(1000, 96\) needs .*: load it again"):
        fast.linear(torch.ones(1, 96), replace(quantized, packed=quantized.packed[:-1]))
    with pytest.raises((RuntimeError, TypeCheckError)):  # the second where the tests check shapes at every call
        fast.linear(torch.ones(1, 192), quantized)


@pytest.mark.parametrize("part", ["packed", "absmax"])
def test_a_part_that_lies_elsewhere_or_in_other_numbers_is_left_to_the_reference(part):
    quantized, x = blockwise.quantize(torch.randn(1000, 96)), torch.ones(1, 96)
    kept = getattr(quantized, part)
    strided = replace(quantized, **{part: torch.stack([kept, kept], 1)[:, 0]})

    assert not matmul_cpu.fits(x, strided)
    torch.testing.assert_close(fast.linear(x, strided), x @ blockwise.dequantize(quantized).T)
    object.__setattr__(strided, "absmax", quantized.absmax.half())  # the tests' check of shapes would refuse it earlier
    assert not matmul_cpu.fits(x, strided)


def test_the_whole_result_is_asked_for(monkeypatch):
    """What run is told to expect, in blocks of 32 outputs, is what it holds the workers to."""
    asked = []
    monkeypatch.setattr(few_rows, "run", lambda worker, total, *fields: asked.append(total))
    matmul_cpu.linears(torch.ones(1, 96), [(blockwise.quantize(torch.randn(1000, 96)), None)])

    assert asked == [32]
