"""Our 4-bit bytes are bitsandbytes' bytes."""

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from minilora.numpy_lora.nf4 import dynamic_map, nearest, nf4_codebook
from minilora.qlora import FP4, INT4, NF4, Quantized, dequantize, quantize
from minilora.qlora.blockwise import BLOCK_SIZES, NestedAbsmax


def random_weights(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(len(kind) + sum(shape)))
    flat = w.view(-1)
    if kind == "outliers":
        flat[::97] *= 1000
    elif kind == "zeros":
        flat[: flat.numel() // 2] = 0
    elif kind == "denormals":
        flat[: flat.numel() // 2] *= 1e-41
    elif kind == "tiny and huge":
        flat *= torch.logspace(-30, 30, flat.numel())
    return w


KINDS = ["normal", "outliers", "zeros", "denormals", "tiny and huge"]


@pytest.mark.parametrize("shape", [(64, 64), (1, 64), (96, 200), (3, 4096), (130, 66), (7, 9), (4097,)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_nf4_bytes_and_units_are_equal(kind, shape):
    w = random_weights(kind, shape)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=64)
    ours = quantize(w, NF4)
    count = (
        w.numel() // 64 * 64
    )  # the unit of a short all-zero block is 1e-38 there and 0 here; the values are the same

    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(ours.absmax[: count // 64], state.absmax[: count // 64])
    assert torch.equal(dequantize(ours), bnb.dequantize_4bit(packed, state).view(shape))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_block_size_and_dtype_gives_the_same_bytes_and_values(block_size, dtype):
    # Rows as long as the longest block: where a block of 512 or 1024 spans rows, the CPU kernel of bitsandbytes 0.50
    # multiplies by the unit of another block (lessons/decisions.md).
    w = random_weights("outliers", (16, 4096)).to(dtype)
    packed, state = bnb.quantize_4bit(w, quant_type="nf4", blocksize=block_size)
    ours = quantize(w, NF4, block_size)

    assert torch.equal(ours.packed, packed.view(-1))
    assert torch.equal(dequantize(ours, dtype), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("kind", KINDS)
def test_fp4_values_are_equal(kind):
    """Values, not bytes: FP4 has two codes for zero."""
    w = random_weights(kind, (96, 200))
    packed, state = bnb.quantize_4bit(w, quant_type="fp4", blocksize=64)

    assert torch.equal(dequantize(quantize(w, FP4)), bnb.dequantize_4bit(packed, state))


def test_the_codebooks_are_equal():
    device = torch.device("cpu")

    assert np.array_equal(nf4_codebook(), bnb.get_4bit_type("nf4", device="cpu").numpy())
    assert torch.equal(FP4.table(device), bnb.get_4bit_type("fp4", device="cpu"))
    for signed in (True, False):
        assert np.array_equal(dynamic_map(signed=signed), bnb.create_dynamic_map(signed=signed).numpy())


@pytest.mark.parametrize("shape", [(64, 64), (512, 300), (1000, 1111)], ids=str)
def test_double_quantized_bytes_are_equal(shape):
    """bitsandbytes has two ways to round to the dynamic map on a CPU. The exact one, as on CUDA, is ours byte for byte;
    it is what its operator does with float64 input. For the other see the next test."""
    w = random_weights("outliers", shape)
    ours = double_quantized(quantize(w, NF4, double=True))
    absmax = quantize(w, NF4).absmax
    codes, units = torch.ops.bitsandbytes.quantize_blockwise.default(
        (absmax - absmax.mean()).double(), bnb.create_dynamic_map(signed=True), 256
    )

    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.absmax, units)
    assert torch.equal(ours.offset, absmax.mean())


@pytest.mark.parametrize("shape", [(512, 300), (1000, 1111)], ids=str)
def test_bitsandbytes_cpu_table_differs_only_by_its_grid_of_65536(shape):
    """On a CPU bitsandbytes rounds absmax to a grid of 65,536 points in [−1, 1] first, then looks the code up. With
    that grid put before our rounding, all bytes are equal; without it, codes differ by at most one place."""
    w = random_weights("normal", shape)
    _, state = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    ours = double_quantized(quantize(w, NF4, double=True))
    assert torch.equal(ours.absmax, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)

    centred = (quantize(w, NF4).absmax - ours.offset).numpy()
    unit = np.repeat(np.float32(1) / ours.absmax.numpy(), 256)[: centred.size]
    scaled = np.clip(centred * unit, np.float32(-1), np.float32(1))
    place = ((scaled + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(np.uint16)
    grid = np.float32(-1) + np.float32(2) * place.astype(np.float32) / np.float32(65535)

    assert np.array_equal(nearest(grid, dynamic_map()), state.absmax.numpy())
    far = np.abs(scaled) > 1e-3  # nearer to zero the map is finer than the grid
    difference = ours.codes.numpy().astype(int) - state.absmax.numpy()
    assert np.abs(difference[far]).max() <= 1


def double_quantized(quantized: Quantized) -> NestedAbsmax:
    assert isinstance(quantized.absmax, NestedAbsmax)
    return quantized.absmax


def test_the_error_of_nf4_fp4_and_int4_on_normal_weights_is_as_published():
    """Measured with bitsandbytes on 4 million N(0, 1): 0.00846, 0.01489; the symmetric grid of 15 levels: 0.01161."""
    w = torch.randn(4_000_000)
    error = {c.name: (dequantize(quantize(w, c)) - w).square().mean().item() for c in (NF4, FP4, INT4)}
    theirs = {
        name: (bnb.dequantize_4bit(*bnb.quantize_4bit(w, quant_type=name, blocksize=64)) - w).square().mean().item()
        for name in ("nf4", "fp4")
    }

    assert error["nf4"] == theirs["nf4"]
    assert error["fp4"] == theirs["fp4"]
    assert error["nf4"] < error["int4"] < error["fp4"]
