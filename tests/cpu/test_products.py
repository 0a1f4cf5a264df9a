"""A product in two halves is the product: values, shapes and dtypes, and at which sizes it is cut."""

import pytest
import torch

from minilora.cpu.products import product
from minilora.qlora import NF4Linear


@pytest.mark.parametrize("shape", [(1024, 8), (513, 8), (3, 200, 8), (1, 1, 8), (0, 8), (8,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_plain_product(shape, dtype, with_bias, monkeypatch):
    """Small whole numbers: every sum is exact in any order, in bfloat16 too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    x, W, bias = (torch.randint(-2, 3, size).to(dtype) for size in (shape, (8, 400), (400,)))
    y = product(x, W, bias if with_bias else None)

    assert y.dtype == dtype
    assert torch.equal(y.double(), x.double() @ W.double() + (bias.double() if with_bias else 0))
    assert torch.equal(product(x, W.T.contiguous().T, bias if with_bias else None), y)


@pytest.mark.parametrize(
    ("rows", "out", "dtype", "threads", "halves"),
    [
        (1024, 576, torch.bfloat16, 2, [512, 512]),
        (513, 385, torch.float16, 8, [257, 256]),
        (1280, 1024, torch.bfloat16, 2, [640, 640]),
        (512, 576, torch.bfloat16, 2, []),
        (1281, 576, torch.bfloat16, 2, []),
        (1024, 384, torch.bfloat16, 2, []),
        (1024, 1025, torch.bfloat16, 2, []),
        (1024, 576, torch.float32, 2, []),
        (1024, 576, torch.bfloat16, 1, []),
    ],
)
def test_it_is_cut_where_onednn_leaves_cores_idle(rows, out, dtype, threads, halves, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "mm", lambda part, W, out: seen.append(len(part)))
    product(torch.ones(rows, 2, dtype=dtype), torch.ones(2, out, dtype=dtype))

    assert seen == halves


def test_autocast_chooses_the_dtype_also_where_halves_would_be_made(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, W = torch.ones(1024, 8), torch.ones(8, 576)
    with torch.autocast("cpu", torch.bfloat16):
        assert product(x, W).dtype == torch.bfloat16
        assert product(x.half(), W.half()).dtype == torch.bfloat16
        assert NF4Linear(torch.nn.Linear(64, 576))(torch.ones(1024, 64)).dtype == torch.bfloat16
