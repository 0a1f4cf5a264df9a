"""The 4-bit layer: no full-precision weight survives the forward, gradients pass through, casts do not round units."""

import copy
import gc
import inspect
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from minilora.qlora import FP4, NF4Linear, QLoRALinear, Quantized, fast
from minilora.torch_lora import LoRALinear, merged


def dense_weights_made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Watch every float copy of a weight that is made."""
    made: list[weakref.ref] = []
    original = fast.dequantize

    def watched(quantized: Quantized, dtype: torch.dtype) -> torch.Tensor:
        weight = original(quantized, dtype)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(fast, "dequantize", watched)
    return made


def test_the_float_weight_is_gone_after_the_forward_and_after_the_backward(monkeypatch):
    layer = QLoRALinear(nn.Linear(96, 40), r=4, alpha=8)
    made = dense_weights_made(monkeypatch)
    x = torch.randn(5, 96, requires_grad=True)
    y = layer(x)
    gc.collect()
    assert [ref() for ref in made] == [None]

    y.sum().backward()
    gc.collect()
    assert [ref() for ref in made] == [None, None]


def test_autograd_saves_x_and_narrow_products_but_no_weight():
    layer, x = QLoRALinear(nn.Linear(256, 128), r=4, alpha=8), torch.randn(3, 256, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    distinct = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    a_b_and_x_and_u = 4 * (4 * 256 + 128 * 4 + 3 * 256 + 3 * 4)

    assert sum(distinct.values()) <= a_b_and_x_and_u
    assert max(distinct.values()) < 4 * 256 * 128  # W in float32


def test_gradients_reach_x_a_and_b_in_float64():
    layer = QLoRALinear(nn.Linear(8, 5), r=2, alpha=4).double()
    nn.init.normal_(layer.B)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(lambda x, A, B: layer(x), (x, layer.A, layer.B))


def test_nothing_is_dequantized_in_the_backward_of_a_first_layer(monkeypatch):
    layer = QLoRALinear(nn.Linear(96, 40), r=4, alpha=8)
    made = dense_weights_made(monkeypatch)
    layer(torch.randn(5, 96)).sum().backward()

    assert len(made) == 1
    assert layer.B.grad is not None


def test_casting_the_model_does_not_round_the_units():
    layer = QLoRALinear(nn.Linear(96, 40), r=4, alpha=8).base
    before = layer.dense_weight(torch.float32)
    nn.Sequential(layer).bfloat16()

    assert torch.equal(layer.dense_weight(torch.float32), before)
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("double", [False, True])
def test_a_state_dict_round_trip_gives_the_same_weight(double):
    first, second = (NF4Linear(nn.Linear(96, 40), double=double) for _ in range(2))
    second.load_state_dict(first.state_dict())

    assert torch.equal(second.dense_weight(torch.float32), first.dense_weight(torch.float32))


def test_making_the_layer_leaves_the_linear_it_is_made_from():
    linear = nn.Linear(96, 40)
    before = linear.weight.clone()
    NF4Linear(linear)

    assert torch.equal(linear.weight, before)
    assert linear.weight.requires_grad


def test_loading_weights_into_a_new_layer_does_not_quantize():
    layer = NF4Linear(nn.Linear(96, 40))

    with pytest.raises(RuntimeError, match=r"Missing key.*packed"):
        layer.load_state_dict(nn.Linear(96, 40).state_dict())


def test_merging_into_4_bits_is_refused_with_a_way_out():
    layer = QLoRALinear(nn.Linear(96, 40), r=4, alpha=8)

    with pytest.raises(
        TypeError, match=r"cannot merge into NF4Linear: it does not store floats; fused\(\) gives a new"
    ):
        layer.merge()
    with pytest.raises(TypeError, match="cannot merge into NF4Linear"), merged(layer):
        pass


def test_fused_gives_a_linear_of_the_dequantized_weight_and_the_update():
    layer = QLoRALinear(nn.Linear(96, 40), r=4, alpha=8)
    nn.init.normal_(layer.B)
    fused = layer.fused(torch.float32)

    assert type(fused) is nn.Linear
    assert torch.equal(fused.weight, layer.base.dense_weight(torch.float32) + layer.delta_weight())
    assert torch.equal(fused.bias, layer.base.bias)
    assert fused.bias is not layer.base.bias


def test_a_base_in_4_bits_already_is_kept():
    base = NF4Linear(nn.Linear(96, 40), FP4, 128)

    assert QLoRALinear(base, r=4, alpha=8).base is base


def test_only_a_linear_layer_is_quantized():
    with pytest.raises(
        TypeError, match=r"NF4Linear is made from an nn.Linear; this is a Embedding: only the weight of"
    ):
        NF4Linear(nn.Embedding(3, 3))
    with pytest.raises(TypeError, match="this is a LoRALinear: take its adapter off first"):
        NF4Linear(LoRALinear(nn.Linear(3, 3), r=1, alpha=1))


def test_quantizing_an_adapter_is_refused_as_wrapping_twice():
    with pytest.raises(ValueError, match="wrapped already"):
        QLoRALinear(LoRALinear(nn.Linear(3, 3), r=1, alpha=1), r=1, alpha=1)


def test_a_weight_with_nan_is_refused():
    linear = nn.Linear(96, 40)
    with torch.no_grad():
        linear.weight[2, 3] = math.nan

    with pytest.raises(ValueError, match=r"1 of 3840 weights are NaN or infinite, the first at \(2, 3\)"):
        NF4Linear(linear)


def test_an_impossible_block_size_is_refused():
    with pytest.raises(ValueError, match="block_size is 48: choose one of 32, 64"):
        NF4Linear(nn.Linear(96, 40), block_size=48)


def test_bytes_are_not_read_with_another_codebook_or_block_size():
    state = NF4Linear(nn.Linear(64, 32), FP4).state_dict()
    with pytest.raises(
        ValueError, match="are of fp4, block_size=64, 32 × 64; this layer reads nf4, block_size=64, 32 × 64"
    ):
        NF4Linear(nn.Linear(64, 32)).load_state_dict(state)
    assert all(isinstance(value, torch.Tensor) for value in state.values())  # so that safetensors can hold it
    with pytest.raises(ValueError, match="are of nf4, block_size=64, 64 × 32; this layer reads nf4, block_size=64, 32"):
        NF4Linear(nn.Linear(64, 32)).load_state_dict(NF4Linear(nn.Linear(32, 64)).state_dict(), strict=False)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match=r"which torch\.int64 does not hold"):
        inspect.unwrap(NF4Linear.forward)(NF4Linear(nn.Linear(64, 32)), torch.ones(3, 64, dtype=torch.long))


@pytest.mark.parametrize("assign", [False, True])
def test_its_weight_is_that_of_the_buffers_it_has_now(assign):
    layer, other = (NF4Linear(nn.Linear(64, 32)) for _ in range(2))
    assert not torch.equal(layer.dense_weight(torch.float32), other.dense_weight(torch.float32))
    layer.load_state_dict(other.state_dict(), assign=assign)

    assert torch.equal(layer.dense_weight(torch.float32), other.dense_weight(torch.float32))


def test_what_to_replaces_is_let_go():
    layer = NF4Linear(nn.Linear(64, 32))
    layer.dense_weight(torch.float32)
    old = weakref.ref(layer.packed)
    layer.to("meta")

    assert old() is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_reads_its_own_buffers(copied):
    layer, other = (NF4Linear(nn.Linear(64, 32), double=False) for _ in range(2))
    layer.dense_weight(torch.float32)
    copy_of_it = copied(layer)
    copy_of_it.load_state_dict(other.state_dict())

    assert torch.equal(copy_of_it.dense_weight(torch.float32), other.dense_weight(torch.float32))


def test_its_bias_is_frozen_whatever_is_asked():
    layer = NF4Linear(nn.Linear(64, 32)).requires_grad_(True)

    assert not layer(torch.randn(2, 64)).requires_grad
