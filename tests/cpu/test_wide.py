"""bfloat16 products in float32 are the products, rounded once; and they are made so only where that is faster."""

import pytest
import torch
from llvmlite import binding
from torch import nn

from minilora.cpu import Linear, products, wide
from minilora.llm import autograd
from minilora.qlora import NF4Linear, QLoRALinear
from minilora.torch_lora import LoRALinear
from minilora.train.loss import chunked_cross_entropy


@pytest.fixture(params=["narrow ones too", "wide ones only"])
def slow_processor(request, monkeypatch):
    """One without instructions for bfloat16, or with slow ones."""
    monkeypatch.setattr(wide, "is_slow", lambda: True)
    monkeypatch.setattr(wide, "is_emulated", lambda: request.param == "narrow ones too")


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the weights that were multiplied in float32."""
    seen, product = [], wide.product
    monkeypatch.setattr(wide, "product", lambda x, W, *rest: seen.append(tuple(W.shape)) or product(x, W, *rest))
    return seen


@pytest.mark.parametrize("shape", [(0, 5, 6), (1, 1, 1), (7, 40, 3), (9, 3, 40), (64, 33, 33)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("r", [None, 0, 4])
@pytest.mark.parametrize("weights_at_once", [1, 64, 2**20])
def test_it_is_the_product(shape, with_bias, r, weights_at_once, monkeypatch):
    """Small whole numbers: every sum is exact in any order, and in bfloat16 too."""
    monkeypatch.setattr(wide, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(wide, "WEIGHTS_AT_ONCE", weights_at_once)
    torch.manual_seed(0)
    rows, n_in, n_out = shape
    sizes = [(rows, n_in), (n_in, n_out), (n_out,), (rows, r or 0), (r or 0, n_out)]
    x, W, bias, u, B = (torch.randint(-1, 2, size).bfloat16() for size in sizes)
    exact = x.double() @ W.double() + (bias.double() if with_bias else 0) + u.double() @ B.double()

    for lying in (W, W.T.contiguous().T, W.float()):
        y = wide.product(x, lying, bias if with_bias else None, None if r is None else (u, B))
        assert y.dtype == torch.bfloat16
        assert torch.equal(y.double(), exact)


@pytest.mark.parametrize("wide_weight", [True, False])
@pytest.mark.parametrize("weights_at_once", [2**9, 2**20])
def test_it_is_rounded_once(wide_weight, weights_at_once, monkeypatch):
    """float32's own sums are off by up to n · 2⁻²⁴ of their terms: less than a rounding to bfloat16, 2⁻⁸, by far."""
    monkeypatch.setattr(wide, "WEIGHTS_AT_ONCE", weights_at_once)
    torch.manual_seed(0)
    n_in = 300
    x, W, u, B = (torch.randn(size).bfloat16() for size in ((50, n_in), (n_in, 40), (50, 8), (8, 40)))
    W = torch.randn(n_in, 40) if wide_weight else W
    exact = x.double() @ W.double() + u.double() @ B.double()
    of_sums = (n_in + 8) * 2**-24 * (x.double().abs() @ W.double().abs() + u.double().abs() @ B.double().abs())

    assert ((wide.product(x, W, None, (u, B)).double() - exact).abs() <= 2**-8 * exact.abs() + 1.01 * of_sums).all()


class Subclass(torch.Tensor):
    """Its numbers may lie anywhere."""


@pytest.mark.parametrize("change", ["x", "bias", "u", "B"])
@pytest.mark.parametrize(("n_in", "n_out"), [(40, 60), (60, 40)])
def test_shapes_that_do_not_fit_are_refused(change, n_in, n_out):
    sizes = {"x": (70, n_in), "W": (n_in, n_out), "bias": (n_out,), "u": (70, 4), "B": (4, n_out)}
    sizes[change] = (*sizes[change][:-1], sizes[change][-1] + 5)
    x, W, bias, u, B = (torch.ones(size).bfloat16() for size in sizes.values())
    with pytest.raises(ValueError, match=r"cannot be made of shapes \[\(70"):
        wide.product(x, W, bias, (u, B))


@pytest.mark.parametrize(
    ("name", "features", "slow", "emulated"),
    [
        ("haswell", {"avx2": True}, True, True),
        ("znver3", {"avx2": True}, True, True),
        ("skylake-avx512", {"avx512f": True, "avx512bf16": False}, True, True),
        ("cooperlake", {"avx512bf16": True}, True, False),
        ("emeraldrapids", {"avx512bf16": True, "amx-bf16": False}, True, False),
        ("emeraldrapids", {"avx512bf16": True, "amx-bf16": True}, False, False),
        ("znver4", {"avx512bf16": True}, False, False),
    ],
)
def test_which_processors_are_slow(name, features, slow, emulated, monkeypatch):
    monkeypatch.setattr(wide.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(binding, "get_host_cpu_name", lambda: name)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: features)
    monkeypatch.setattr(wide, "is_slow", wide.is_slow.__wrapped__)
    assert (wide.is_slow(), wide.is_emulated.__wrapped__()) == (slow, emulated)

    monkeypatch.setattr(wide.platform, "machine", lambda: "arm64")
    assert not wide.is_slow()


@pytest.mark.parametrize(
    ("rows", "shape", "where_slow", "where_emulated"),
    [
        (64, (33, 33), torch.float32, torch.float32),
        (63, (33, 33), torch.bfloat16, torch.float32),
        (8, (33, 33), torch.bfloat16, torch.float32),
        (7, (33, 33), torch.bfloat16, torch.bfloat16),
        (64, (32, 400), torch.bfloat16, torch.float32),
        (64, (400, 32), torch.bfloat16, torch.float32),
    ],
)
def test_which_products_are_made_in_float32(rows, shape, where_slow, where_emulated, monkeypatch):
    x = torch.ones(rows, 8, dtype=torch.bfloat16)
    for slow, emulated, expected in (
        (False, False, torch.bfloat16),
        (True, False, where_slow),
        (True, True, where_emulated),
    ):
        monkeypatch.setattr(wide, "is_slow", lambda slow=slow: slow)
        monkeypatch.setattr(wide, "is_emulated", lambda emulated=emulated: emulated)
        assert wide.compute_dtype(x, *shape) == expected
        assert wide.compute_dtype(x.half(), *shape) == torch.float16
        assert wide.compute_dtype(x.double(), *shape) == torch.float64
        assert wide.compute_dtype(x.to("meta"), *shape) == torch.bfloat16
        assert wide.compute_dtype(x.as_subclass(Subclass), *shape) == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert wide.compute_dtype(x, *shape) == torch.bfloat16


def test_the_products_of_an_adapted_layer_and_of_the_loss_go_there(slow_processor, calls):
    torch.manual_seed(0)
    x = torch.randn(2, 70, 96).bfloat16()
    head, targets = torch.randn(500, 96).bfloat16(), torch.zeros(140, dtype=torch.long)
    for wrap in (LoRALinear, QLoRALinear):
        layer = wrap(nn.Linear(96, 64).bfloat16(), r=8, alpha=8)
        calls.clear()
        layer(x.clone().requires_grad_()).sum().backward()
        narrow = [(96, 8), (64, 8), (140, 64), (140, 96)]  # u, du, dB, dA: few features, or few rows
        assert [shape for shape in calls if shape not in narrow] == [(96, 64), (64, 96)]
        assert [shape for shape in calls if shape in narrow] == (narrow if wide.is_emulated() else [])

    calls.clear()
    chunked_cross_entropy(x.view(140, 96).requires_grad_(), head, targets, 70).backward()
    assert calls == 2 * [(96, 500), (500, 96)]


def test_frozen_layers_without_an_adapter_go_there_too(slow_processor, calls):
    """And what they give is what a layer of torch's gives, but for a rounding on either side."""
    torch.manual_seed(0)
    layer = Linear(96, 64).bfloat16().requires_grad_(False)
    x = torch.randn(2, 70, 96).bfloat16()
    y, dx = gradients(layer, x)
    assert calls == [(96, 64), (64, 96)]
    right = gradients(nn.functional.linear, x.double(), layer.weight.double(), layer.bias.double())
    for mine, other in zip((y, dx), right[:2], strict=True):
        assert (mine.double() - other).norm() <= 2**-8 * other.norm()

    calls.clear()
    gradients(LoRALinear(Linear(96, 64).bfloat16(), r=40, alpha=8, dropout=0.1), x)
    assert calls == [(96, 64), (64, 96)]

    calls.clear()
    layer.bias.requires_grad_()
    gradients(layer, x)
    assert calls == []


def test_a_bias_of_another_dtype_over_4_bits(slow_processor):
    layer = QLoRALinear(nn.Linear(96, 64), r=8, alpha=8)
    assert layer.base.bias.dtype == torch.float32
    assert layer(torch.randn(70, 96).bfloat16()).dtype == torch.bfloat16


def test_attention_with_one_key_head_for_few_tokens(slow_processor):
    """So few that its keys alone would not be made float32."""
    q, k = torch.randn(1, 9, 40, 64).bfloat16(), torch.randn(1, 1, 40, 64).bfloat16()
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(autograd.causal_attention, q, k, k))


def gradients(function, *inputs):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = function(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    return [y.detach(), *(t.grad for t in inputs)]


@pytest.mark.parametrize("wrap", [LoRALinear, QLoRALinear])
def test_a_layer_is_at_most_as_far_from_exact_as_its_roundings(wrap, slow_processor):
    """On the way to each result two numbers are rounded to bfloat16, by up to 2⁻⁸ each."""
    torch.manual_seed(0)
    layer = wrap(nn.Linear(96, 64).bfloat16(), r=8, alpha=11)
    nn.init.normal_(layer.B, std=0.3)
    x = torch.randn(2, 70, 96).bfloat16()
    W = layer.base.dense_weight(torch.float64) if wrap is QLoRALinear else layer.base.weight.double()

    def exact(x, A, B):
        return x @ W.T + layer.base.bias.double() + layer.scaling * x @ A.T @ B.T

    y, dx = gradients(layer, x)
    rounded = (x, layer.A.detach().bfloat16(), layer.B.detach().bfloat16())
    right = gradients(exact, *(t.double() for t in rounded))
    for mine, other in zip((y, dx, layer.A.grad, layer.B.grad), right, strict=True):
        assert (mine.double() - other).norm() <= 2 * 2**-8 * other.norm()


def test_attention_keeps_its_scores_in_float32(slow_processor):
    """With its scores in float32 the backward is as near to exact as torch's."""

    def torchs(q, k, v):
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n_heads, 100, 64).bfloat16() for n_heads in (6, 2, 2))
    exact = gradients(torchs, *(t.double() for t in (3 * q, k, v)))
    ours, theirs = gradients(autograd.causal_attention, 3 * q, k, v), gradients(torchs, 3 * q, k, v)
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine - right).norm() <= 1.1 * (other - right).norm()


def test_a_plain_layer_in_4_bits_makes_its_weight_float32_at_once(slow_processor, calls, monkeypatch):
    layer, asked = NF4Linear(nn.Linear(96, 64).bfloat16()), []
    product = products.product
    monkeypatch.setattr(
        "minilora.qlora.fast.product", lambda x, W, *rest: asked.append(W.dtype) or product(x, W, *rest)
    )
    x = torch.randn(70, 96).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    layer(x.requires_grad_()).sum().backward()

    assert asked == 3 * [torch.float32]
    assert calls == [(96, 64), (96, 64), (64, 96)]


@pytest.mark.parametrize(("total", "at_once", "lengths"), [(550, 256, [183, 183, 184]), (4, 9, [4]), (0, 9, [0])])
def test_parts_are_about_as_long(total, at_once, lengths):
    assert [part.stop - part.start for part in wide.parts(total, at_once)] == lengths
