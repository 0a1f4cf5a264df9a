"""A product in two halves is the product: values, shapes and dtypes, and at which sizes it is cut."""

import pytest
import torch

from minilora.torch_lora.products import product


@pytest.mark.parametrize("shape", [(1024, 8), (513, 8), (3, 200, 8), (1, 1, 8), (0, 8), (8,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_plain_product(shape, dtype, with_bias):
    """Small whole numbers: every sum is exact in any order, in bfloat16 too."""
    torch.manual_seed(0)
    x, W, bias = (torch.randint(-2, 3, size).to(dtype) for size in (shape, (8, 400), (400,)))
    y = product(x, W, bias if with_bias else None)

    assert y.dtype == dtype
    assert torch.equal(y.double(), x.double() @ W.double() + (bias.double() if with_bias else 0))
    assert torch.equal(product(x, W.T.contiguous().T, bias if with_bias else None), y)


@pytest.mark.parametrize(
    ("rows", "out", "dtype", "n_products"),
    [
        (1024, 576, torch.bfloat16, 2),
        (513, 385, torch.float16, 2),
        (512, 576, torch.bfloat16, 1),
        (1281, 576, torch.bfloat16, 1),
        (1024, 384, torch.bfloat16, 1),
        (1024, 1025, torch.bfloat16, 1),
        (1024, 576, torch.float32, 1),
    ],
)
def test_it_is_cut_where_onednn_leaves_cores_idle(rows, out, dtype, n_products, monkeypatch):
    parts = []
    monkeypatch.setattr(torch, "mm", lambda part, W, out: parts.append(len(part)))
    product(torch.ones(rows, 2, dtype=dtype), torch.ones(2, out, dtype=dtype))

    assert len(parts) == n_products
    assert sum(parts) == rows
