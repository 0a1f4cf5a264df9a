"""Each layer is the oracle of the next: NumPy, PyTorch, 4 bits, kernels, and bitsandbytes beside them."""

import numpy as np
import pytest
import torch
from torch import nn

from minilora.numpy_lora import lora_backward, lora_forward, nf4
from minilora.numpy_lora import merge as numpy_merge
from minilora.qlora import FP4, INT4, NF4, NF4Linear, QLoRALinear, blockwise, kernels_cpu
from minilora.torch_lora import LoRALinear

# --- layer 1 = layer 2, in float64


@pytest.mark.parametrize(("rows", "r", "alpha"), [((7,), 3, 5.0), ((2, 3), 1, 16.0), ((), 4, 2.0)])
def test_numpy_and_torch_agree_on_the_forward_and_on_every_gradient(rows, r, alpha):
    layer = LoRALinear(nn.Linear(6, 4, bias=False), r=r, alpha=alpha).double()
    nn.init.normal_(layer.B)
    x = torch.randn(*rows, 6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(*rows, 4, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    arrays = [tensor.detach().numpy() for tensor in (x, layer.base.weight, layer.A, layer.B)]

    by_hand = [lora_forward(*arrays, alpha), *lora_backward(dy.numpy(), *arrays, alpha)]
    by_torch = [y, x.grad, layer.A.grad, layer.B.grad]
    for ours, theirs in zip(by_hand, by_torch, strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-12)


def test_numpy_and_torch_agree_on_the_merged_weight():
    layer = LoRALinear(nn.Linear(6, 4), r=3, alpha=5).double()
    nn.init.normal_(layer.B)
    merged = numpy_merge(*[t.detach().numpy() for t in (layer.base.weight, layer.A, layer.B)], 5.0)
    layer.merge()

    np.testing.assert_allclose(merged, layer.base.weight.numpy(), rtol=0, atol=1e-14)


# --- layer 1 = layer 3's reference, in bytes


@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_numpy_and_torch_agree_on_nf4_bytes_and_values(block_size):
    w = torch.randn(37, 71)
    ours = blockwise.quantize(w, NF4, block_size)
    packed, absmax = nf4.quantize(w.numpy(), block_size)

    assert np.array_equal(packed, ours.packed.numpy())
    assert np.array_equal(absmax, ours.absmax.numpy())
    assert np.array_equal(nf4.dequantize(packed, absmax, (37, 71), block_size), blockwise.dequantize(ours).numpy())


def test_numpy_and_torch_agree_on_double_quantization_given_the_offset():
    absmax = torch.rand(1000) + 0.5
    theirs = blockwise.double_quantize(absmax)
    ours = nf4.double_quantize(absmax.numpy(), offset=theirs.offset.item())

    assert np.array_equal(ours.codes, theirs.codes.numpy())
    assert np.array_equal(ours.absmax, theirs.absmax.numpy())
    assert np.array_equal(nf4.double_dequantize(ours), blockwise.double_dequantize(theirs).numpy())


# --- layer 3 = layer 2 over the dequantized weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_qlora_is_lora_over_the_dequantized_weight_exactly(dtype, bias):
    linear = nn.Linear(96, 40, bias=bias)
    four_bit = QLoRALinear(linear, r=4, alpha=8, generator=torch.Generator().manual_seed(0))
    dense = nn.Linear(96, 40, bias=bias)
    dense.weight, dense.bias = nn.Parameter(four_bit.base.dense_weight(dtype)), linear.bias
    plain = LoRALinear(dense.to(dtype), r=4, alpha=8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain.B.copy_(nn.init.normal_(four_bit.B))
    x = torch.randn(5, 96, dtype=dtype, requires_grad=True)
    results = []
    for layer in (four_bit, plain):
        x.grad = None
        y = layer(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, layer.A.grad, layer.B.grad])

    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


# --- kernels = reference


@pytest.mark.parametrize("codebook", [NF4, FP4, INT4], ids=lambda c: c.name)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64,), (17, 33), (129, 65), (5, 4097)])
def test_numba_equals_the_reference_exactly(codebook, double, shape):
    w = torch.randn(shape)
    fast, plain = (q.quantize(w, codebook, 64, double=double) for q in (kernels_cpu, blockwise))

    assert torch.equal(fast.packed, plain.packed)
    assert torch.equal(blockwise.block_units(fast), blockwise.block_units(plain))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(kernels_cpu.dequantize(fast, dtype), blockwise.dequantize(plain, dtype))


def test_a_layer_of_4_bits_uses_the_same_values_as_the_reference():
    linear = nn.Linear(96, 40)

    assert torch.equal(
        NF4Linear(linear, double=False).dense_weight(torch.float32),
        blockwise.dequantize(blockwise.quantize(linear.weight)),
    )
