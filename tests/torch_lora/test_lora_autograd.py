"""lora_linear against its readable twin, base(x) + bypass(x): values, gradients, and what stays in memory."""

import math

import pytest
import torch
from torch import nn

from minilora.torch_lora import LoRALinear
from minilora.torch_lora.autograd import lora_linear
from minilora.torch_lora.layers import LoRAConv1D, bypass


class Conv1D(nn.Module):
    """GPT-2's layer, as transformers writes it."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.nf = out_features
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.randn(out_features))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


def adapted(kind, base, dtype, r=3, alpha=5):
    layer = kind(base.to(dtype), r=r, alpha=alpha).to(dtype)
    nn.init.normal_(layer.B, std=0.3)
    return layer


def results(function, layer, x):
    """Output and gradients to x, A and B of a sum that weighs every output differently."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = function(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), x.grad, layer.A.grad.clone(), layer.B.grad.clone()


def plain(layer):
    return lambda x: layer.base(x) + bypass(x, layer.A, layer.B, layer.scaling)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7)])
@pytest.mark.parametrize(("kind", "base"), [(LoRALinear, nn.Linear), (LoRAConv1D, Conv1D)])
def test_values_and_gradients_are_the_plain_ones(shape, kind, base):
    torch.manual_seed(0)
    layer = adapted(kind, base(7, 4), torch.float64)
    x = torch.randn(shape, dtype=torch.float64)

    for one, steps in zip(results(layer, layer, x), results(plain(layer), layer, x), strict=True):
        torch.testing.assert_close(one, steps, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    layer = adapted(LoRALinear, nn.Linear(6, 5), torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    torch.autograd.gradcheck(
        lambda x, A, B: lora_linear(x, A, B, 0.7, layer.base, layer.base.weight),
        (x, layer.A, layer.B),
    )


def test_bfloat16_stays_within_its_rounding():
    """Against float64 over the same bfloat16 numbers. Each of the result's few roundings (u, the sum, the result) moves
    it by at most 2⁻⁹ of the terms that are summed; products are exact in float32, where they are added up."""
    torch.manual_seed(0)
    layer = adapted(LoRALinear, nn.Linear(96, 64, bias=False), torch.bfloat16, r=8, alpha=11)
    x = torch.randn(50, 96).bfloat16()
    exact = adapted(LoRALinear, nn.Linear(96, 64, bias=False), torch.float64, r=8, alpha=11)
    exact.load_state_dict(layer.state_dict())
    y, dx, dA, dB = results(layer, layer, x)
    y64, dx64, dA64, dB64 = results(exact, exact, x.double())

    for rounded, right in ((y, y64), (dx, dx64), (dA, dA64), (dB, dB64)):
        n_roundings = 4
        assert (rounded.double() - right).norm() <= n_roundings * 2**-9 * right.norm()


def test_what_is_saved_is_x_and_r_numbers_a_row():
    rows, n_in, r = 32, 24, 2
    layer = adapted(LoRALinear, nn.Linear(n_in, 400), torch.float32, r=r)
    x = torch.randn(rows, n_in, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)

    own = {t.data_ptr() for t in (x, layer.A, layer.B, layer.base.weight)}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == rows * r
    assert {x.data_ptr(), layer.A.data_ptr()} <= {t.data_ptr() for t in saved}


class Stored(nn.Module):
    """A base that gives its weight as floats when asked, and remembers being asked."""

    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("hidden_weight", torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.randn(out_features), requires_grad=False) if bias else None
        self.asked = []

    def dense_weight(self, dtype):
        self.asked.append(dtype)
        return self.hidden_weight.to(dtype)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.hidden_weight, self.bias)


def test_a_stored_weight_is_asked_for_in_the_backward_and_only_where_x_wants_a_gradient():
    layer, x = LoRALinear(Stored(6, 5), r=2, alpha=4), torch.randn(3, 6)
    layer(x).sum().backward()
    assert layer.base.asked == []
    layer(x.requires_grad_()).sum().backward()
    assert layer.base.asked == [torch.float32]


def test_a_stored_base_with_a_result_that_is_not_contiguous():
    torch.manual_seed(0)
    layer = adapted(LoRALinear, Stored(6, 5), torch.float64)
    layer.base.forward = lambda x: (layer.base.hidden_weight @ x.mT).mT + layer.base.bias
    x = torch.randn(2, 3, 6, dtype=torch.float64)

    for one, steps in zip(results(layer, layer, x), results(plain(layer), layer, x), strict=True):
        torch.testing.assert_close(one, steps, rtol=1e-12, atol=1e-12)


def one_function(y):
    return "LoRALinear" in type(y.grad_fn).__name__


class Doubled(nn.Linear):
    """An nn.Linear in name alone, as bitsandbytes' 4-bit layer is."""

    def forward(self, x):
        return 2 * super().forward(x)


def trained_bias(base):
    base.bias.requires_grad_()


def hooked(base):
    base.register_forward_hook(lambda module, inputs, output: 2 * output)


def heard(base):
    base.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))


@pytest.mark.parametrize(
    ("base", "prepare"),
    [(Doubled, lambda base: None), (nn.Linear, trained_bias), (nn.Linear, hooked), (nn.Linear, heard)],
)
def test_a_base_that_is_not_a_frozen_product_takes_the_plain_steps(base, prepare):
    torch.manual_seed(0)
    layer = adapted(LoRALinear, base(6, 5), torch.float64)
    prepare(layer.base)
    x = torch.randn(3, 6, dtype=torch.float64)

    assert not one_function(layer(x))
    for one, steps in zip(results(layer, layer, x), results(plain(layer), layer, x), strict=True):
        assert torch.equal(one, steps)
    assert layer.base.bias.grad is not None or prepare is not trained_bias


def test_the_backward_belongs_to_the_weight_of_its_forward():
    torch.manual_seed(0)
    layer = adapted(LoRALinear, nn.Linear(6, 5), torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).sum(), x)

    y = layer(x)
    layer.merge()  # puts another weight in its place
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dx, rtol=1e-12, atol=1e-12)

    layer.unmerge()
    y = layer(x)
    with torch.no_grad():
        layer.base.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_dropout_and_autocast_take_the_plain_steps():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=4, dropout=0.5)
    nn.init.normal_(layer.B)
    x = torch.randn(3, 6, requires_grad=True)
    assert not one_function(layer(x))
    layer.eval()
    assert one_function(layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        layer(x).sum().backward()
    assert math.isfinite(layer.A.grad.norm())


def test_a_pass_over_shapes_alone():
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=4).to("meta")

    assert layer(torch.empty(3, 6, device="meta")).shape == (3, 5)


def test_gradients_of_gradients_are_refused():
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=4)
    x = torch.randn(3, 6, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_base_with_a_forward_of_its_own_is_called():
    """accelerate's offloading replaces an instance's forward, to bring the weight in."""
    layer = adapted(LoRALinear, nn.Linear(6, 5), torch.float64)
    plain_forward, calls = layer.base.forward, []
    layer.base.forward = lambda x: calls.append(1) or plain_forward(x)
    layer(torch.randn(2, 6, dtype=torch.float64))

    assert calls == [1]
