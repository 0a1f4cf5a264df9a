"""The product with a weight in 4 bits on tiles is the product with what dequantize gives in bfloat16, bit for bit.

What runs AMX's instructions is skipped where the processor has none: there matmul_cpu is taken.
"""

from dataclasses import replace

import pytest
import torch

from minilora.cpu import amx
from minilora.qlora import FP4, INT4, NF4, blockwise, fast, matmul_cpu, matmul_tiles
from minilora.qlora.blockwise import BLOCK_SIZES

BFLOAT16 = torch.bfloat16
needs_amx = pytest.mark.skipif(not amx.is_there(), reason="this processor has no AMX for bfloat16")


@needs_amx
@pytest.mark.parametrize("block_size", [size for size in BLOCK_SIZES if size >= 64])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(1025, 64), (321, 576), (65, 1536)])
def test_every_weight_is_what_dequantize_gives(out_features, in_features, double, block_size):
    """Rows of the identity give the weights themselves, exactly: also where a block straddles rows."""
    W = torch.randn(out_features, in_features) * torch.logspace(-3, 3, out_features)[:, None]
    quantized = blockwise.quantize(W, NF4, block_size, double=double)
    right = blockwise.dequantize(quantized, BFLOAT16)
    for start in range(0, in_features, 32):
        x = torch.eye(in_features, dtype=BFLOAT16)[start : start + 32]
        (y,) = matmul_tiles.linears(x, [(quantized, None)])
        assert torch.equal(y, right.T[start : start + 32])


@needs_amx
@pytest.mark.parametrize("n_rows", [1, 3, 16, 17, 32])
def test_several_weights_of_other_codebooks_and_blocks_go_together(n_rows):
    """A sum of n float32 products is off by at most n · 2⁻²⁴ of the sum of their sizes; then y is rounded."""
    x = torch.randn(n_rows, 192).to(BFLOAT16)
    kinds = [(577, NF4, 64, True), (100, FP4, 128, False), (33, INT4, 4096, True), (1000, NF4, 64, False)]
    layers = [
        (blockwise.quantize(torch.randn(n, 192), codebook, size, double=double), torch.randn(n).to(BFLOAT16))
        for n, codebook, size, double in kinds
    ]
    for y, (quantized, bias) in zip(matmul_tiles.linears(x, layers), layers, strict=True):
        W = blockwise.dequantize(quantized, BFLOAT16).double()
        exact = x.double() @ W.T + bias.double()
        sizes = x.double().abs() @ W.T.abs() + bias.double().abs()
        assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 193 * 2**-24 * sizes).all()


@needs_amx
def test_a_row_has_the_same_bits_alone_among_others_and_in_any_number_of_threads():
    x, quantized = torch.randn(32, 576).to(BFLOAT16), blockwise.quantize(torch.randn(193, 576), double=True)
    (y,), before = matmul_tiles.linears(x, [(quantized, None)]), torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            for n_rows in (1, 2, 16, 17, 32):
                assert torch.equal(matmul_tiles.linears(x[:n_rows], [(quantized, None)])[0], y[:n_rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n_rows", "dtype", "in_features", "out_features", "block_size", "taken"),
    [
        (1, BFLOAT16, 192, 1000, 64, True),
        (32, BFLOAT16, 192, 1000, 4096, True),
        (33, BFLOAT16, 192, 1000, 64, False),
        (1, torch.float32, 192, 1000, 64, False),
        (1, BFLOAT16, 96, 1000, 64, False),  # rows of one group of 64 and a half
        (1, BFLOAT16, 192, 1000, 32, False),
        (1, BFLOAT16, 4096, 31, 64, False),
    ],
)
def test_other_products_go_other_ways(n_rows, dtype, in_features, out_features, block_size, taken, monkeypatch):
    seen = []
    monkeypatch.setattr(amx, "is_there", lambda: True)
    monkeypatch.setattr(
        matmul_tiles,
        "linears",
        lambda x, layers: seen.append(1) or [x.new_zeros(len(x), W.shape[0]) for W, _ in layers],
    )
    x = torch.ones(n_rows, in_features, dtype=dtype)
    quantized = blockwise.quantize(torch.randn(out_features, in_features), block_size=block_size)
    fast.linear(x, quantized)
    fast.linears(x, [(quantized, None), (quantized, None)])

    assert len(seen) == (2 if taken else 0)


def test_without_amx_few_rows_go_through_their_own_kernel(monkeypatch):
    monkeypatch.setattr(amx, "is_there", lambda: False)
    x, quantized = torch.randn(2, 192).to(BFLOAT16), blockwise.quantize(torch.randn(1000, 192))
    with pytest.raises(RuntimeError, match="no AMX"):
        matmul_tiles.linears(x, [(quantized, None)])

    assert torch.equal(fast.linear(x, quantized), matmul_cpu.linears(x, [(quantized, None)])[0])


@needs_amx
def test_a_weight_whose_parts_are_too_short_is_refused_before_it_is_read():
    quantized, x = blockwise.quantize(torch.randn(1000, 192)), torch.ones(1, 192, dtype=BFLOAT16)
    with pytest.raises(ValueError, match="load it again"):
        fast.linear(x, replace(quantized, packed=quantized.packed[:-1].clone()))
