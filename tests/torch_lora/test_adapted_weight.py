"""Whoever reads `layer.weight` gets W + scaling · B A; whoever only looks at its dtype pays nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRALinear, inject, lora_layer
from minilora.torch_lora.inject import adapter_layers

EXACT = {"rtol": 0, "atol": 0}


def adapted(base: nn.Module) -> LoRALinear:
    layer = LoRALinear(base, r=2, alpha=4)
    nn.init.normal_(layer.B)
    return layer


class Conv1D(nn.Module):
    """Looks like GPT-2's: the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight, self.bias = 4, nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))


def test_products_slices_and_transposes_are_those_of_the_sum():
    layer, x = adapted(nn.Linear(6, 4)), torch.randn(3, 6)
    W = layer.base.weight + layer.delta_weight()

    assert torch.equal(F.linear(x, layer.weight, layer.bias), F.linear(x, W, layer.base.bias))
    assert torch.equal(x @ layer.weight.T, x @ W.T)
    assert torch.equal(layer.weight[1:, :2], W[1:, :2])
    assert torch.equal(layer.weight.detach().clone(), W)
    assert repr(layer.weight) == repr(W)
    assert type(layer.weight + 0) is torch.Tensor


def test_gradients_reach_a_and_b_as_through_the_layer():
    layer, x = adapted(nn.Linear(6, 4)).double(), torch.randn(3, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = [layer.A.grad, layer.B.grad]
    layer.A.grad = layer.B.grad = None
    F.linear(x, layer.weight, layer.bias).square().sum().backward()

    torch.testing.assert_close([layer.A.grad, layer.B.grad], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", [nn.Linear(6, 4), Conv1D()], ids=["linear", "conv1d"])
def test_dtype_shape_and_device_are_told_without_forming_it(base, dtype, monkeypatch):
    layer = lora_layer(base.to(dtype), r=2, alpha=4)
    like = layer.base.weight
    monkeypatch.setattr(layer, "merged_weight", lambda dtype: pytest.fail("the weight was formed"))
    weight = layer.weight

    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.shape, weight.device, weight.ndim) == (like.dtype, like.shape, like.device, 2)


def test_a_conv1d_has_it_in_its_own_layout():
    layer = lora_layer(Conv1D(), r=2, alpha=4)
    nn.init.normal_(layer.B)

    torch.testing.assert_close(layer.weight + 0, layer.base.weight + layer.scaling * (layer.B @ layer.A).T)


def test_over_4_bits_it_is_float32():
    layer = adapted(NF4Linear(nn.Linear(6, 4)))

    assert (layer.weight.dtype, layer.weight.shape) == (torch.float32, (4, 6))
    torch.testing.assert_close(layer.weight + 0, layer.base.dense_weight(torch.float32) + layer.delta_weight(), **EXACT)


def test_a_merged_layers_is_the_bases_own():
    layer = adapted(nn.Linear(6, 4))
    layer.merge()

    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias


def add_in_place(weight):
    weight += 1


@pytest.mark.parametrize(
    "write",
    [
        torch.Tensor.zero_,
        nn.init.ones_,
        lambda weight: weight.__setitem__(0, 1),
        lambda weight: weight.data.zero_(),
        lambda weight: weight.detach().data[1:].T.add_(1),
        lambda weight: weight[0, :3].zero_(),
        lambda weight: weight.view(-1).__setitem__(0, 1),
        lambda weight: weight.split(2)[1].zero_(),
        lambda weight: setattr(weight, "data", torch.zeros(4, 6)),
        lambda weight: torch.add(torch.zeros(4, 6), 1, out=weight),
        lambda weight: torch.add(torch.zeros(6), 1, out=weight[0]),
        lambda weight: F.relu(weight, inplace=True),
        lambda weight: torch._foreach_add_([torch.zeros(2), weight], 1),
        add_in_place,
    ],
)
def test_writing_into_it_is_refused(write):
    layer = adapted(nn.Linear(6, 4))
    before = layer.base.weight.clone()

    with pytest.raises(RuntimeError, match=r"cannot write into an adapted weight.*write into layer\.base\.weight"):
        write(layer.weight)
    assert torch.equal(layer.base.weight, before)


def test_views_are_those_of_the_sum_with_its_gradients_and_can_be_copied_from():
    layer = adapted(nn.Linear(6, 4))
    W, weight = layer.base.weight + layer.delta_weight(), layer.weight
    elsewhere = torch.zeros(2, 6)
    elsewhere.copy_(weight.split(2)[1])
    weight[1:, :2].sum().backward()

    assert torch.equal(elsewhere, W[2:])
    assert torch.equal(weight.data[1:].T[0].clone(), W[1:, 0])
    assert (weight[1:, :2].shape, weight.data.requires_grad) == ((3, 2), False)
    torch.testing.assert_close(layer.B.grad, torch.autograd.grad(W[1:, :2].sum(), layer.B)[0])


def test_it_is_no_parameter_and_no_state():
    layer = adapted(nn.Linear(6, 4))

    assert {name for name, _ in layer.named_parameters()} == {"A", "B", "base.weight", "base.bias"}
    assert layer.state_dict().keys() == {"A", "B", "base.weight", "base.bias"}


def test_torchs_encoder_layer_applies_the_adapter_in_evaluation_too():
    """In evaluation it would hand linear1.weight to one kernel for the whole layer, and never call linear1."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    inject(model, ["linear1", "linear2"], lambda base: lora_layer(base, r=2, alpha=4))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.B)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        evaluated, expected = model.eval()(x), model.train()(x)

    torch.testing.assert_close(evaluated, expected)
