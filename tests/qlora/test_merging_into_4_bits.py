"""Merging into 4 bits: refused, unless asked for; then measured."""

import warnings

import pytest
import torch
from torch import nn

from minilora.qlora import FP4, NF4Linear, QLoRALinear
from minilora.qlora.merging import merge_into_4_bits
from minilora.torch_lora import LoRAEmbedding, LoRALinear


def adapted(std: float = 1.0, **settings) -> nn.Sequential:
    base = nn.Linear(64, 32)
    model = nn.Sequential(QLoRALinear(base, r=4, alpha=8, **settings))
    nn.init.normal_(model[0].B, std=std)
    return model


def test_it_is_refused_with_a_way_out():
    model = adapted()
    with pytest.raises(ValueError, match=r"merge_model\(model, torch.bfloat16\) keeps 16 bits; allow_requantize=True"):
        merge_into_4_bits(model)

    assert isinstance(model[0], LoRALinear)


@pytest.mark.parametrize("settings", [{}, {"codebook": FP4, "block_size": 32, "double": False}])
def test_the_merged_weight_is_quantized_as_the_base_was_and_the_error_told(settings):
    model = adapted(**settings)
    base, delta = model[0].base, model[0].delta_weight().detach()
    wanted = base.dense_weight(torch.float32) + delta
    linear = nn.Linear(64, 32)
    linear.weight.data = wanted
    expected = NF4Linear(linear, base.codebook, base.block_size, double=base.absmax_codes is not None)
    report = merge_into_4_bits(model, allow_requantize=True)

    assert isinstance(model[0], NF4Linear)
    assert model[0].extra_repr() == base.extra_repr()
    assert torch.equal(model[0].dense_weight(torch.float32), expected.dense_weight(torch.float32))
    assert torch.equal(model[0].bias, base.bias)
    off = (model[0].dense_weight(torch.float32) - wanted).norm() / delta.norm()
    assert report.off.relative == pytest.approx(off.item(), rel=1e-4)  # the sum is made in float64 there


def test_a_base_of_floats_is_quantized_by_default():
    model = nn.Sequential(LoRALinear(nn.Linear(64, 32), r=4, alpha=8))
    nn.init.normal_(model[0].B)
    merge_into_4_bits(model, allow_requantize=True)

    assert model[0].extra_repr() == NF4Linear(nn.Linear(64, 32)).extra_repr()


def test_an_update_of_the_usual_size_is_erased_and_that_is_said():
    model = adapted(std=0.02)
    with pytest.warns(UserWarning, match="merging into 4 bits erases the adapter in 1 of 1 layers"):
        merge_into_4_bits(model, allow_requantize=True)

    model = adapted(std=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_into_4_bits(model, allow_requantize=True)


def test_layers_that_have_no_form_in_4_bits_are_named():
    model = nn.Sequential(LoRAEmbedding(nn.Embedding(9, 8), r=2, alpha=2))
    with pytest.raises(ValueError, match=r"0 \(Embedding\)"):
        merge_into_4_bits(model, allow_requantize=True)
