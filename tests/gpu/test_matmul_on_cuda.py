"""The product from 4 bits on a card, within a derived bound. We have not run this file: we have no card."""

import pytest
import torch
from torch import Tensor

from minilora.qlora import FP4, INT4, NF4, NF4Linear, QLoRALinear, Quantized, blockwise, fast, matmul_gpu
from minilora.qlora.blockwise import BLOCK_SIZES

LAST_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def assert_within_the_bound(y: Tensor, x: Tensor, W: Tensor, bias: Tensor | None = None) -> None:
    """Compare y with x Wᵀ + bias in float64, for a W of x's dtype.

    Tensor cores add up to 16 products to a sum and may cut off, of each, what lies below the last bit of the largest:
    17 · 2⁻²³ for every 16 products, so less than 2⁻²² for each.
    """
    x, W = x.double(), W.double()
    bias = torch.zeros(len(W)).to(x) if bias is None else bias.double()
    expected, terms = x @ W.T + bias, x.abs() @ W.abs().T + bias.abs()
    sum_off = (x.shape[-1] + 1) * 2.0**-22 * terms
    off, part = (y.double() - expected).abs(), LAST_ROUNDING[y.dtype]

    assert (off <= sum_off + part * (expected.abs() + sum_off) + 2.0**-25).all(), off.max()


def weight(out_features: int, in_features: int, dtype: torch.dtype, **settings) -> tuple[Quantized, Tensor]:
    quantized = blockwise.quantize(torch.randn(out_features, in_features, device="cuda"), **settings)
    return quantized, blockwise.dequantize(quantized, dtype)


@pytest.mark.parametrize("dtype", LAST_ROUNDING)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("n_rows", [1, 3, 16, 17, 70, 300])
@pytest.mark.parametrize(("out_features", "in_features"), [(40, 96), (33, 48), (576, 576), (1000, 4096), (3000, 1104)])
def test_the_product_and_its_backward_are_within_the_bound(out_features, in_features, n_rows, double, dtype):
    quantized, W = weight(out_features, in_features, dtype, double=double)
    x = torch.randn(n_rows, in_features, device="cuda").to(dtype)
    dy = torch.randn(n_rows, out_features, device="cuda").to(dtype)
    bias = torch.randn(out_features, device="cuda").to(dtype)

    assert_within_the_bound(matmul_gpu.linear(x, quantized, bias), x, W, bias)
    assert_within_the_bound(matmul_gpu.linear_backward(dy, quantized), dy, W.T)


@pytest.mark.parametrize("codebook", [NF4, FP4, INT4], ids=lambda c: c.name)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", LAST_ROUNDING)
@pytest.mark.parametrize("rows_at_once", [16, 1000])
def test_its_weights_are_those_of_dequantize_bit_for_bit(rows_at_once, dtype, block_size, codebook):
    quantized, W = weight(208, 272, dtype, codebook=codebook, block_size=block_size, double=True)
    ones_of_x, ones_of_dy = (torch.eye(size, dtype=dtype, device="cuda").split(rows_at_once) for size in (272, 208))

    assert torch.equal(torch.cat([matmul_gpu.linear(x, quantized) for x in ones_of_x]), W.T)
    assert torch.equal(torch.cat([matmul_gpu.linear_backward(dy, quantized) for dy in ones_of_dy]), W)


def test_the_same_product_has_the_same_bits_again():
    quantized, _ = weight(4096, 4096, torch.bfloat16)
    x = torch.randn(3, 4096, device="cuda", dtype=torch.bfloat16)

    assert len({matmul_gpu.linear(x, quantized).cpu().view(torch.int16).numpy().tobytes() for _ in range(20)}) == 1


@pytest.mark.parametrize("n_rows", [1, 16])
def test_the_weight_is_never_whole(n_rows):
    layer = NF4Linear(torch.nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16))
    x = torch.randn(n_rows, 4096, device="cuda", dtype=torch.bfloat16)
    layer(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x)

    assert torch.cuda.max_memory_allocated() - before < 2 * 4096 * 4096 / 8  # an eighth of W in bfloat16


def test_an_adapter_has_the_gradients_that_it_has_over_floats(monkeypatch):
    layer = QLoRALinear(torch.nn.Linear(576, 192), r=4, alpha=8).cuda()
    torch.nn.init.normal_(layer.B)
    x = torch.randn(2, 5, 576, device="cuda", dtype=torch.float16)

    def gradients() -> list[Tensor]:
        given = x.clone().requires_grad_()
        layer.zero_grad()
        layer(given).float().square().mean().backward()
        return [given.grad.float(), layer.A.grad.clone(), layer.B.grad.clone()]

    assert fast.multiplies_in_4_bits(x)
    ours = gradients()
    monkeypatch.setattr(fast, "multiplies_in_4_bits", lambda x: False)
    for a, b in zip(ours, gradients(), strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()  # two results that differ in their last bit, 2⁻¹⁰, at most


def test_the_last_row_of_more_than_two_to_the_32_weights_is_right():
    out_features, in_features = 2**21 + 64, 2048
    if torch.cuda.get_device_properties(0).total_memory < 8 * 2**30:
        pytest.skip("needs a card of 8 GiB")
    packed = torch.full((out_features * in_features // 2,), 0x77, dtype=torch.uint8, device="cuda")  # code 7 is 0
    packed[-1] = 0x7F  # the last weight is 1 · absmax
    absmax = torch.full((out_features * in_features // 64,), 2.0, device="cuda")
    quantized = Quantized(packed, absmax, NF4, 64, (out_features, in_features))
    y = matmul_gpu.linear(torch.ones(1, in_features, dtype=torch.bfloat16, device="cuda"), quantized)
    dx = matmul_gpu.linear_backward(torch.ones(1, out_features, dtype=torch.bfloat16, device="cuda"), quantized)

    assert y[0, -2:].tolist() == [0.0, 2.0]
    assert dx[0, -2:].tolist() == [0.0, 2.0]
    assert y.sum() == dx.sum() == 2.0


def test_a_card_that_is_not_the_current_one_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")
    quantized, W = weight(40, 96, torch.float16)
    x, second = torch.randn(3, 96, device="cuda", dtype=torch.float16), torch.device("cuda:1")
    there = Quantized(quantized.packed.to(second), quantized.absmax.to(second), NF4, 64, (40, 96))

    assert torch.equal(matmul_gpu.linear(x.to(second), there).to(x.device), matmul_gpu.linear(x, quantized))
    assert torch.equal(fast.dequantize(there, torch.float16).to(x.device), W)
