"""Merging for good: what is stored, what is told of it, and when it warns."""

import copy
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from minilora.qlora import NF4Linear, QLoRALinear
from minilora.torch_lora import LoRALinear, inject, lora_layer
from minilora.torch_lora import merging as module
from minilora.torch_lora.adapter_layer import dense_weight
from minilora.torch_lora.arithmetic import Distance
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.merging import LayerMerge, MergeReport, measure, merge_model, merged_state
from minilora.torch_lora.replaced import replace_tensors, replaced_tensors

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


class Model(nn.Module):
    """An embedding whose weight is the head's, and two linear layers of which one is in two places."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.up, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.again = self.up
        self.head.weight = self.embed.weight
        self.register_buffer("frequencies", torch.rand(4))

    def forward(self, tokens):
        return self.head(self.norm(self.again(torch.tanh(self.up(self.embed(tokens))))))


def adapted(targets: list[str], wrap=lora_layer, std: float = 0.1, dtype: torch.dtype = torch.float32) -> Model:
    model = Model().to(dtype)
    inject(model, targets, lambda base: wrap(base, r=3, alpha=6))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.A, std=std)
        nn.init.normal_(layer.B, std=std)
    return model


def wanted_weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """W and ΔW of every adapted layer in float64."""
    return {
        name: (dense_weight(layer.base, torch.float64), layer.delta_weight().detach().double())
        for name, layer in adapter_layers(model).items()
    }


TOKENS = torch.arange(11).reshape(1, 11)


@pytest.mark.parametrize("dtype", [None, *FLOATS])
@pytest.mark.parametrize("base_dtype", FLOATS)
def test_the_weight_is_the_sum_rounded_once_and_the_report_tells_what_that_lost(base_dtype, dtype):
    model = adapted(["up"], std=1.0, dtype=base_dtype)
    W, delta = wanted_weights(model)["up"]
    report = merge_model(model, dtype)
    stored = dtype or base_dtype

    assert type(model.up) is nn.Linear
    assert model.up.weight.dtype == stored
    assert torch.equal(model.up.weight, (W + delta).to(stored))
    error = (model.up.weight.double() - W - delta).norm() / delta.norm()
    assert report.off.relative == pytest.approx(error.item(), rel=1e-9)
    assert report.layers["up"].changed == int((model.up.weight != W.to(stored)).sum())
    assert report.layers["up"].weights == 64
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_base_in_bfloat16_merged_into_float32_loses_nothing_on_the_way():
    """The sum is not rounded to the base's dtype first."""
    model = adapted(["up"], std=0.01, dtype=torch.bfloat16)

    assert merge_model(model, torch.float32).off.relative < 1e-3


def test_the_merged_model_computes_what_the_adapter_did_and_all_of_it_is_in_the_dtype():
    model = adapted(["up", "embed"])
    before, buffer = model(TOKENS), model.frequencies.clone()
    merge_model(model, torch.float32)
    torch.testing.assert_close(model(TOKENS), before)

    model = adapted(["up"])
    merge_model(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(TOKENS).dtype == torch.bfloat16
    assert model.frequencies.dtype == buffer.dtype == torch.float32  # a buffer is no weight: rounding it is a bug


def test_a_layer_in_two_places_is_merged_once_and_stays_one():
    model = adapted(["up", "again"])
    report = merge_model(model)

    assert model.up is model.again
    assert list(report.layers) == ["up"]


def test_an_embedding_with_an_adapter_leaves_its_head_alone():
    model = adapted(["embed"])
    before = model.head.weight.clone()
    merge_model(model)

    assert type(model.embed) is nn.Embedding
    assert torch.equal(model.head.weight, before)
    assert not torch.equal(model.embed.weight, before)


def test_a_head_that_shares_its_weight_stays_shared_where_neither_is_adapted():
    model = adapted(["up"])
    merge_model(model, torch.bfloat16)

    assert model.head.weight is model.embed.weight


def test_conv1d_is_merged_transposed():
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=23, n_positions=12)).eval()
    inject(model, ["c_attn", "c_proj"], lambda base: lora_layer(base, r=2, alpha=3))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.B)
    before = model(TOKENS).logits
    merge_model(model)

    assert not adapter_layers(model)
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=0, atol=1e-5)


def test_a_base_of_four_bits_becomes_floats():
    model = adapted(["up"], QLoRALinear)
    W, delta = wanted_weights(model)["up"]
    bias = model.up.base.bias.clone()
    report = merge_model(model, torch.bfloat16)

    assert type(model.up) is nn.Linear
    assert torch.equal(model.up.weight, (W + delta).to(torch.bfloat16))
    assert torch.equal(model.up.bias, bias.to(torch.bfloat16))
    assert report.off.relative == pytest.approx(((model.up.weight.double() - W - delta).norm() / delta.norm()).item())


def test_a_layer_that_is_merged_already_is_merged_from_its_own_weight():
    model = adapted(["up"])
    W, delta = wanted_weights(model)["up"]
    model.up.merge()
    merge_model(model)

    assert torch.equal(model.up.weight, (W + delta).float())


@pytest.mark.parametrize(("std", "warns"), [(0.5, False), (0.002, True)])
def test_it_warns_when_rounding_eats_the_adapter(std, warns):
    model = adapted(["up"], std=std, dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = merge_model(model)

    assert [str(w.message)[:75] for w in caught] == (
        ["merging into each base's dtype erases the adapter in 1 of 1 layers: the rou"] if warns else []
    )
    assert report.layers["up"].is_erased == warns
    assert ("erased" in str(report)) == warns


@pytest.mark.parametrize(("error", "is_erased"), [(0.499, False), (0.5, True), (0.7, True)])
def test_from_half_of_the_effect_on_a_layer_is_erased(error, is_erased):
    """Below ½ the merged weight is nearer to the adapted one than to the base's: merging's docstring has the proof."""
    assert LayerMerge(Distance(error, 1.0), 0, 1).is_erased == is_erased


def test_rounding_that_erases_all_changes_no_weight_and_has_the_error_1():
    W, delta = torch.ones(4, 4).bfloat16(), torch.full((4, 4), 2**-12)
    off = measure(W, delta, (W + delta).bfloat16())

    assert (off.off.relative, off.changed) == (1.0, 0)


def test_below_the_bound_the_weight_is_nearer_to_the_adapted_one_than_to_the_base():
    for std in (0.003, 0.01, 0.03, 0.1):
        model = adapted(["up"], std=std, dtype=torch.bfloat16)
        W, delta = wanted_weights(model)["up"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = merge_model(model)
        merged = model.up.weight.double()
        if not report.layers["up"].is_erased:
            assert (merged - W - delta).norm() < (merged - W).norm()


def test_an_update_of_zeros_warns_of_nothing():
    model = Model().float()
    inject(model, ["up"], lambda base: LoRALinear(base, r=2, alpha=3))
    report = merge_model(model, torch.bfloat16)

    assert report.layers["up"].changed == 0
    assert not report.layers["up"].is_erased


def test_the_error_of_a_few_rows_at_a_time_is_that_of_all(monkeypatch):
    model = adapted(["up", "embed"])
    whole = merge_model(copy.deepcopy(model), torch.bfloat16)
    monkeypatch.setattr(module, "CHUNK", 20)
    chunked = merge_model(model, torch.bfloat16)

    assert chunked.off.relative == pytest.approx(whole.off.relative, rel=1e-12)
    assert chunked.changed_share == whole.changed_share


def test_the_report_prints_as_a_table():
    lines = str(merge_model(adapted(["up", "embed"]), torch.bfloat16)).splitlines()

    assert lines[0].startswith("merged into bfloat16")
    assert [line.split()[0] for line in lines[1:]] == ["embed", "up", "all"]


@pytest.mark.parametrize(
    ("make", "dtype", "message"),
    [
        (lambda: Model(), None, "no adapter to merge"),
        (lambda: adapted(["up"]).up, None, "alone"),
        (lambda: adapted(["up"]), torch.int8, "cannot merge into torch.int8"),
        (lambda: adapted(["up", "embed"], std=300.0), torch.float16, "embed: weight plus .*float16\n  up: weight plus"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_the_model_is_as_before(make, dtype, message):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        merge_model(model, dtype)
    after = model.state_dict()

    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_what_no_adapter_touches_must_fit_the_dtype_too_and_all_of_it_is_named():
    """65536 is a bfloat16, and in float16 infinite: written so, the model would answer NaN."""
    model = adapted(["up"], dtype=torch.bfloat16)
    model.four_bits = NF4Linear(nn.Linear(64, 64).requires_grad_(False))
    with torch.no_grad():
        model.norm.weight[1], model.up.base.bias[2], model.head.weight[3, 3] = 1e5, -65536.0, 65536.0
        model.four_bits.absmax_bits[0] = torch.tensor(1e38).view(torch.int32)
    before = copy.deepcopy(model.state_dict())
    named = ["embed.weight", "head.weight", "up.bias", "norm.weight", "four_bits.weight"]
    message = "merged:" + "".join(f"\n  {name}: not finite as torch.float16" for name in named) + "$"
    with pytest.raises(ValueError, match=message):
        merge_model(model, torch.float16)
    with pytest.raises(ValueError, match=message):
        next(merged_state(model, torch.float16, MergeReport("float16", {})))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "extra" not in name)

    assert merge_model(model, torch.float32).layers  # wide enough


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_stay_as_they_are_where_the_rest_is_rounded(dtype):
    model = adapted(["up"])
    model.codes = nn.Parameter(torch.arange(8.0).to(dtype), requires_grad=False)
    state = dict(merged_state(model, torch.bfloat16, MergeReport("bfloat16", {})))
    merge_model(model, torch.bfloat16)

    assert state["codes"].dtype == model.codes.dtype == dtype


def test_a_nan_in_the_adapter_is_refused_by_name():
    model = adapted(["up", "embed"])
    model.up.A.data[0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"cannot be merged:\n  up: weight plus update is not finite as torch.float32$"
    ):
        merge_model(model)


@pytest.mark.parametrize("targets", [["up"], ["up", "embed"], ["head"]])
@pytest.mark.parametrize("wrap", [lora_layer, "nf4"])
def test_the_merged_state_is_that_of_the_merged_model_and_the_model_is_left_alone(targets, wrap):
    if wrap == "nf4":
        targets, wrap = ["up"], QLoRALinear
    model = adapted(targets, wrap)
    before = copy.deepcopy(model.state_dict())
    report = MergeReport("bfloat16", {})
    state = dict(merged_state(model, torch.bfloat16, report))
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if "extra" not in name)

    merge = merge_model(model, torch.bfloat16)
    assert report.layers == merge.layers
    merged = dict(model.named_parameters())
    assert state.keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in state.items())


def test_a_layer_of_four_bits_without_an_adapter_is_in_the_merged_state_as_floats():
    model = adapted(["up"])
    model.head = NF4Linear(model.head)
    state = dict(merged_state(model, torch.float32, MergeReport("float32", {})))

    assert torch.equal(state["head.weight"], model.head.dense_weight(torch.float32))


def test_only_one_merged_weight_exists_at_a_time():
    model = adapted(["up", "embed"], std=1.0)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    names, counts = [], []
    for name, w in merged_state(model, torch.bfloat16, MergeReport("bfloat16", {})):
        counts.append(len(alive))
        if name in ("up.weight", "embed.weight"):
            alive.add(w)
        names.append(name)
        del w

    assert names.index("up.weight") > names.index("embed.weight")
    assert counts == [0] * len(names)


def test_what_an_adapter_replaced_stays_and_is_the_models_own():
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    inject(model, ["0"], lambda base: LoRALinear(base, r=2, alpha=2))
    replace_tensors(model, {"0.base.bias": torch.full((3,), 5.0)}, trainable=True)
    nn.init.normal_(model[0].B)
    x = torch.randn(2, 4)
    before = model(x)
    merge_model(model)

    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)  # float32, the same sum in another order
    assert model[0].bias.tolist() == [5.0] * 3
    assert not replaced_tensors(model) and not model[0].bias.requires_grad


def test_fused_into_float32_rounds_nothing_to_the_bases_bfloat16():
    layer = LoRALinear(nn.Linear(16, 16).bfloat16(), r=2, alpha=2)
    nn.init.normal_(layer.B)
    exact = layer.base.weight.float() + layer.delta_weight()

    assert torch.equal(layer.fused(torch.float32).weight, exact)
