"""The Triton kernel on a card, against the reference on the same card. We have not run this file: we have no card."""

import pytest
import torch

from minilora.qlora import FP4, INT4, NF4, NF4Linear, blockwise, dequantize, kernels_gpu
from minilora.qlora.blockwise import BLOCK_SIZES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 63, 64, 320, 1024, 1088, 1099, 2**20 + 37])
def test_the_kernel_equals_the_reference_exactly(count, dtype, double):
    quantized = blockwise.quantize(torch.randn(count, device="cuda"), double=double)

    assert torch.equal(kernels_gpu.dequantize(quantized, dtype), blockwise.dequantize(quantized, dtype))


@pytest.mark.parametrize("codebook", [NF4, FP4, INT4], ids=lambda c: c.name)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_and_codebook_decodes_as_in_the_reference(block_size, codebook):
    quantized = blockwise.quantize(torch.randn(300, 257, device="cuda"), codebook, block_size, double=True)

    assert torch.equal(kernels_gpu.dequantize(quantized), blockwise.dequantize(quantized))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_card_and_a_cpu_decode_the_same_bytes_to_the_same_weights(dtype):
    layer = NF4Linear(torch.nn.Linear(512, 384))
    on_cpu = layer.dense_weight(dtype)

    assert torch.equal(layer.cuda().dense_weight(dtype).cpu(), on_cpu)


def test_the_fastest_way_on_cuda_is_the_kernel(monkeypatch):
    quantized = blockwise.quantize(torch.randn(64, device="cuda"))
    monkeypatch.setattr(kernels_gpu, "dequantize", lambda quantized, dtype: "the kernel")

    assert dequantize(quantized) == "the kernel"


def test_the_last_of_more_than_two_to_the_31_weights_is_right():
    count = 2**31 + 128
    if torch.cuda.get_device_properties(0).total_memory < 12 * 2**30:
        pytest.skip("needs a card of 12 GiB")
    packed = torch.zeros(count // 2, dtype=torch.uint8, device="cuda")
    packed[-1] = 0x7F  # the last two codes: 0 and 1
    absmax = torch.full((count // 64,), 2.0, device="cuda")
    weights = kernels_gpu.dequantize(blockwise.Quantized(packed, absmax, NF4, 64, (count,)), torch.bfloat16)

    assert weights[-3:].tolist() == [-2.0, 0.0, 2.0]
