"""The three LoRA layers: what they promise about starting, training, merging and refusing."""

import inspect
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRAConfig, LoRAConv1D, LoRAEmbedding, LoRALinear, inject, merged
from minilora.torch_lora.adapter_layer import StoresNoFloats
from minilora.torch_lora.layers import LoRALayer, kind_of

TOKENS = torch.tensor([[1, 5, 0], [6, 6, 2]])


def make(kind: str, **settings: object) -> tuple[LoRALayer, torch.Tensor]:
    """A layer of each kind with both matrices away from zero, and an input for it."""
    settings = {"r": 3, "alpha": 5.0} | settings
    if kind == "linear":
        layer, x = LoRALinear(nn.Linear(6, 4), **settings), torch.randn(2, 3, 6)
    elif kind == "conv1d":
        layer, x = LoRAConv1D(conv1d(6, 4), **settings), torch.randn(2, 3, 6)
    elif kind == "square conv1d":
        layer, x = LoRAConv1D(conv1d(5, 5), **settings), torch.randn(2, 3, 5)
    else:
        layer, x = LoRAEmbedding(nn.Embedding(7, 4), **settings), TOKENS
    nn.init.normal_(layer.A)
    nn.init.normal_(layer.B)
    return layer, x


def conv1d(in_features: int, out_features: int) -> Conv1D:
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.bias)
    return layer


KINDS = ["linear", "conv1d", "square conv1d", "embedding"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def test_a_new_adapter_changes_nothing():
    linear, conv, embedding = nn.Linear(24, 16), conv1d(24, 16), nn.Embedding(9, 16)
    x = torch.randn(3, 24)

    assert torch.equal(linear(x), LoRALinear(linear, r=4, alpha=8)(x))
    assert torch.equal(conv(x), LoRAConv1D(conv, r=4, alpha=8)(x))
    assert torch.equal(embedding(TOKENS), LoRAEmbedding(embedding, r=4, alpha=8)(TOKENS))


def test_only_a_and_b_train_and_they_are_float32_over_a_16_bit_base():
    layer = LoRALinear(nn.Linear(6, 4).bfloat16(), r=2, alpha=4)

    assert {n: p.dtype for n, p in layer.named_parameters() if p.requires_grad} == {
        "A": torch.float32,
        "B": torch.float32,
    }
    assert layer(torch.randn(3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_init_of_a_is_even_between_plus_and_minus_one_over_root_in_and_b_is_zero():
    layer = LoRALinear(nn.Linear(400, 8), r=64, alpha=8, generator=torch.Generator().manual_seed(1))
    again = LoRALinear(nn.Linear(400, 8), r=64, alpha=8, generator=torch.Generator().manual_seed(1))

    assert layer.A.abs().max() <= 1 / math.sqrt(400)
    assert layer.A.square().mean().item() == pytest.approx(1 / 400 / 3, rel=0.028)  # five standard errors
    assert not layer.B.any()
    assert torch.equal(layer.A, again.A)


def test_an_embedding_starts_with_a_zero_and_b_normal():
    layer = LoRAEmbedding(nn.Embedding(7, 4), r=3, alpha=5)

    assert not layer.A.any()
    assert layer.B.all()


def test_rslora_divides_by_the_root_of_r():
    base = nn.Linear(6, 4)

    assert LoRALinear(base, r=16, alpha=8).scaling == 0.5
    assert LoRALinear(base, r=16, alpha=8, use_rslora=True).scaling == 2.0


@each_kind
def test_a_merged_layer_gives_the_same_output(kind):
    layer, x = make(kind)
    live = layer(x)
    layer.merge()

    # float32 sums of at most 6 + 3 products of numbers below 10 in size
    torch.testing.assert_close(layer(x), live, rtol=0, atol=9 * 10 * torch.finfo(torch.float32).eps * 10)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_merges_and_unmerges_leave_every_bit(kind, dtype):
    layer, _ = make(kind)
    layer.base.to(dtype)
    before, parameter = layer.base.weight.clone(), layer.base.weight
    for _ in range(100):
        layer.merge()
        assert not torch.equal(layer.base.weight, before)
        layer.unmerge()

    assert torch.equal(layer.base.weight, before)
    assert layer.base.weight is parameter


def test_a_layer_moved_to_another_dtype_while_merged_unmerges_to_the_moved_weight():
    layer, _ = make("linear")
    moved = layer.base.weight.detach().bfloat16()
    layer.merge()
    layer.bfloat16()
    layer.unmerge()

    assert torch.equal(layer.base.weight, moved)
    assert isinstance(layer.base.weight, nn.Parameter)


@each_kind
def test_fused_is_a_new_layer_of_the_bases_kind_and_leaves_this_one_as_it_was(kind):
    layer, x = make(kind)
    before, live = layer.base.weight.clone(), layer(x)
    fused = layer.fused()

    assert type(fused) is type(layer.base)
    torch.testing.assert_close(fused(x), live, rtol=0, atol=1e-4)
    with torch.no_grad():
        for tensor in fused.parameters():
            tensor.fill_(7.0)
    assert torch.equal(layer.base.weight, before)
    assert torch.equal(layer(x), live)


@each_kind
def test_fusing_a_merged_layer_adds_the_update_once(kind):
    layer, _ = make(kind)
    fused = layer.fused()
    layer.merge()

    assert torch.equal(layer.fused().weight, fused.weight)


def test_fused_takes_another_dtype():
    layer, _ = make("linear")

    assert layer.fused(torch.float64).weight.dtype == torch.float64


def test_merging_into_16_bits_rounds_once():
    layer, _ = make("linear")
    layer.base.bfloat16()
    exact = layer.base.weight.float() + layer.delta_weight()
    layer.merge()

    assert torch.equal(layer.base.weight, exact.bfloat16())


def test_merging_an_embedding_leaves_the_head_that_shares_its_weight():
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    layer = LoRAEmbedding(embedding, r=2, alpha=4)
    nn.init.normal_(layer.A)
    before = head.weight.clone()
    with merged(layer):
        assert torch.equal(head.weight, before)

    assert head.weight is embedding.weight


def test_a_second_merge_is_refused():
    layer, _ = make("linear")
    layer.merge()

    with pytest.raises(RuntimeError, match="merged already: a second merge would add the update twice"):
        layer.merge()


def test_unmerging_what_is_not_merged_is_refused():
    with pytest.raises(RuntimeError, match="not merged: there is nothing to undo"):
        make("linear")[0].unmerge()


def test_merging_nan_is_refused_and_changes_nothing():
    layer, _ = make("linear")
    before = layer.base.weight
    with torch.no_grad():
        layer.B[1, 1] = math.nan

    with pytest.raises(ValueError, match="the update holds NaN or infinite values"):
        layer.merge()
    assert layer.base.weight is before
    assert not layer.is_merged


def test_merged_is_undone_when_the_body_raises():
    first, second = make("linear")[0], make("linear")[0]
    model = nn.Sequential(first, second)
    before = [first.base.weight, second.base.weight]

    with pytest.raises(KeyError), merged(model):
        assert first.is_merged
        assert second.is_merged
        raise KeyError

    assert [first.base.weight, second.base.weight] == before


def test_merged_undoes_the_merges_before_the_one_that_fails():
    first, second = make("linear")[0], make("linear")[0]
    with torch.no_grad():
        second.A.fill_(math.inf)

    with pytest.raises(ValueError, match="NaN or infinite"), merged(nn.Sequential(first, second)):
        pass
    assert not first.is_merged


def test_merged_leaves_merged_what_was_merged_before():
    layer, _ = make("linear")
    layer.merge()
    with merged(layer):
        pass

    assert layer.is_merged


def test_eval_and_train_do_not_merge():
    layer, _ = make("linear")
    before = layer.base.weight
    layer.eval()
    layer.train()

    assert layer.base.weight is before


def test_dropout_is_on_the_bypass_only_and_in_training_only():
    layer, x = make("linear", dropout=0.5)
    with torch.no_grad():
        layer.B.zero_()
    plain = layer.base(x)
    assert torch.equal(layer(x), plain)  # whatever is dropped, the base sees all of x

    nn.init.normal_(layer.B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_autocast_keeps_the_adapter_working():
    layer, x = make("linear")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)

    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.2)  # bf16 keeps 8 bits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, r"r is 0: it counts the rows of A, so it must be a whole number of 1 or more"),
        ({"r": -4}, r"r is -4: it counts the rows of A"),
        ({"r": 2.5}, r"r is 2.5: it counts the rows of A"),
        ({"r": True}, r"r is True: it counts the rows of A"),
        ({"alpha": 0.0}, r"alpha is 0.0: .* positive and finite"),
        ({"alpha": math.nan}, r"alpha is nan: .* positive and finite"),
        ({"dropout": 1.0}, r"dropout is 1.0: it is a probability, at least 0 and below 1"),
        ({"dropout": -0.1}, r"dropout is -0.1: it is a probability"),
    ],
)
def test_an_impossible_setting_is_named(settings, message):
    # __init__ would be stopped by the type checker of the tests, which users do not have
    config = object.__new__(LoRAConfig)
    for name, value in ({"r": 8, "alpha": 16.0, "dropout": 0.0, "use_rslora": False} | settings).items():
        object.__setattr__(config, name, value)

    with pytest.raises(ValueError, match=message):
        config.__post_init__()


@pytest.mark.parametrize(
    ("kind", "base", "message"),
    [
        (LoRALinear, nn.Conv2d(3, 3, 1), "LoRALinear wraps a linear layer; this is a Conv2d, which none of the LoRA"),
        (LoRALinear, nn.Embedding(3, 3), "LoRALinear wraps a linear layer; this is a Embedding: use LoRAEmbedding"),
        (LoRALinear, conv1d(3, 3), "LoRALinear wraps a linear layer; this is a Conv1D: use LoRAConv1D"),
        (LoRAEmbedding, nn.Linear(3, 3), "LoRAEmbedding wraps an nn.Embedding; this is a Linear: use LoRALinear"),
        (LoRAConv1D, nn.Linear(3, 3), "LoRAConv1D wraps GPT-2's Conv1D; this is a Linear: use LoRALinear"),
    ],
)
def test_a_base_of_another_kind_is_refused_with_the_right_layer(kind, base, message):
    with pytest.raises(TypeError, match=message):
        kind(base, r=2, alpha=4)


def test_wrapping_twice_is_refused():
    layer, _ = make("linear")

    with pytest.raises(ValueError, match=r"wrapped already \(a LoRALinear with r=3\): .* remove\(model\)"):
        LoRALinear(layer, r=2, alpha=4)


def test_dropout_on_an_embedding_is_refused():
    with pytest.raises(ValueError, match=r"dropout is 0.5: an embedding's input is token numbers, so choose 0"):
        LoRAEmbedding(nn.Embedding(7, 4), r=2, alpha=4, dropout=0.5)


def test_a_wrong_shape_is_caught_by_the_types_in_the_signature():
    from jaxtyping import TypeCheckError

    from minilora.torch_lora.layers import bypass

    with pytest.raises(TypeCheckError, match="bypass"):
        bypass(torch.randn(2, 6), torch.randn(3, 6), torch.randn(3, 4), 1.0)  # B is transposed


def test_the_padding_token_of_an_embedding_is_not_trained():
    layer = LoRAEmbedding(nn.Embedding(7, 4, padding_idx=6), r=3, alpha=5)
    layer(TOKENS).sum().backward()

    assert layer.A.grad[:, 5].any()
    assert not layer.A.grad[:, 6].any()


@pytest.mark.parametrize("module", [nn.Linear(6, 5), nn.Embedding(6, 5)])
def test_a_merged_layer_has_the_state_and_the_parameters_of_an_unmerged_one(module):
    layer = kind_of(module)(module, r=2, alpha=4)
    state, names = set(layer.state_dict()), [name for name, _ in layer.named_parameters()]
    layer.merge()

    assert set(layer.state_dict()) == state
    assert [name for name, _ in layer.named_parameters()] == names


def test_a_layer_that_is_cast_while_merged_unmerges_to_that_dtype():
    layer = LoRALinear(nn.Linear(6, 5), r=2, alpha=4)
    before = layer.base.weight.detach().clone()
    layer.merge()
    layer.bfloat16()
    layer.unmerge()

    assert torch.equal(layer.base.weight, before.bfloat16())


def test_a_layer_that_is_refused_leaves_its_base_trainable():
    embedding = nn.Embedding(6, 5)
    with pytest.raises(ValueError, match="dropout"):
        LoRAEmbedding(embedding, r=2, alpha=4, dropout=0.1)

    assert embedding.weight.requires_grad


def test_a_layer_whose_weight_is_read_past_its_forward_is_not_wrapped():
    attention = nn.MultiheadAttention(8, 2)
    assert "out_proj" not in str(inject(nn.ModuleDict({"a": attention, "b": nn.Linear(8, 8)}), "all-linear", lora))
    with pytest.raises(TypeError, match="NonDynamicallyQuantizableLinear"):
        LoRALinear(attention.out_proj, r=2, alpha=4)


def lora(base):
    return LoRALinear(base, r=2, alpha=4)


def test_the_protocol_of_a_stored_weight_is_seen_where_a_bias_is_a_parameter():
    """Python 3.12 looks a protocol's members up with inspect.getattr_static, which sees no nn.Parameter."""
    layer = NF4Linear(nn.Linear(64, 32))
    members = [name for name in {**vars(StoresNoFloats), **StoresNoFloats.__annotations__} if not name.startswith("_")]
    for member in members:
        inspect.getattr_static(layer, member)

    assert members == ["dense_weight"]


class Packed(nn.Linear):
    """Another quantizer's layer, as there are many: an nn.Linear whose weight is codes."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...] = (8, 8)):
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(shape).to(dtype), requires_grad=False)


@pytest.mark.parametrize(
    "base",
    [Packed(torch.int8), Packed(torch.uint8, (32, 1)), Packed(torch.float8_e4m3fn), Packed(torch.bfloat16, (16, 1))],
)
@pytest.mark.parametrize("wrap", [lora, NF4Linear])
def test_another_quantizers_codes_are_no_weight_to_add_to(base, wrap):
    with pytest.raises(TypeError, match=r"Packed has codes in its weight .*load the base in bfloat16.*load_4_bit"):
        wrap(base)


def test_a_weight_that_became_codes_under_its_adapter_is_not_merged():
    """bitsandbytes' layers quantize when they are moved, which may be after the adapter came."""
    layer = lora(nn.Linear(8, 8))
    layer.base.weight = Packed(torch.int8).weight
    with pytest.raises(TypeError, match="has codes in its weight"):
        layer.merge()
