"""Putting adapters in by name: what is hit is reported, what cannot be is refused, and removing restores."""

import hashlib
import math
import re

import pytest
import torch
from torch import nn

from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRAEmbedding, LoRALinear, count_parameters, inject, match_targets, remove


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4)
        self.up_proj, self.norm = nn.Linear(8, 16), nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for block in self.layers:
            x = block.norm(x + block.q_proj(x))
        return self.lm_head(x)


TOKENS = torch.arange(11)


def lora(base):
    return LoRALinear(base, r=2, alpha=4)


def fingerprint(model: nn.Module) -> str:
    """Names, types, and every bit of the weights."""
    digest = hashlib.sha256(repr([(n, type(m).__name__) for n, m in model.named_modules()]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_a_name_hits_every_module_that_ends_in_it():
    assert match_targets(Model(), ["q_proj", "layers.1.v_proj"]) == {
        "q_proj": ["layers.0.q_proj", "layers.1.q_proj"],
        "layers.1.v_proj": ["layers.1.v_proj"],
    }


def test_a_name_is_a_whole_part_not_any_end():
    with pytest.raises(ValueError, match=r"no module is named \['proj'\]"):
        match_targets(Model(), "proj")


def test_a_pattern_matches_whole_names():
    hits = match_targets(Model(), re.compile(r"layers\.0\.[qv]_proj"))

    assert hits == {r"layers\.0\.[qv]_proj": ["layers.0.q_proj", "layers.0.v_proj"]}


def test_all_linear_leaves_the_output_head_out():
    [names] = match_targets(Model(), "all-linear").values()

    assert names == [f"layers.{i}.{p}" for i in (0, 1) for p in ("q_proj", "v_proj", "up_proj")]


def test_all_linear_asks_the_model_for_its_head():
    model = Model()
    model.get_output_embeddings = lambda: model.layers[1].up_proj

    [names] = match_targets(model, "all-linear").values()
    assert "layers.1.up_proj" not in names
    assert "lm_head" in names


def test_the_output_is_unchanged_after_injecting():
    model = Model()
    before = model(TOKENS)
    inject(model, "all-linear", lora)

    assert torch.equal(model(TOKENS), before)


def test_only_adapters_train_and_the_counts_are_right():
    model = Model()
    total = sum(p.numel() for p in model.parameters())
    report = inject(model, ["q_proj", "v_proj"], lora)
    trainable = 2 * (2 * (8 + 8) + 2 * (8 + 4))

    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"A", "B"}
    assert (report.count.trainable, report.count.total) == (trainable, total + trainable)
    assert report.count == count_parameters(model)


def test_a_four_bit_weight_counts_by_its_logical_shape():
    plain, four_bit = Model(), Model()
    inject(plain, "all-linear", lora)
    inject(four_bit, "all-linear", lambda base: QLoRALinear(base, r=2, alpha=4))

    assert count_parameters(four_bit) == count_parameters(plain)


def test_the_report_shows_every_target_with_what_it_hit():
    report = inject(Model(), ["q_proj", "layers.0.v_proj"], lora)
    total = count_parameters(Model()).total + 88

    assert str(report).splitlines() == [
        "q_proj             2 modules  layers.0.q_proj … layers.1.q_proj",
        "layers.0.v_proj    1 module   layers.0.v_proj",
        f"88 of {total} parameters train ({8800 / total:.4f} %)",
    ]


def test_targets_that_hit_nothing_are_all_named_with_near_names():
    model = Model()
    before = fingerprint(model)

    with pytest.raises(ValueError) as error:
        inject(model, ["qproj", "q_proj", "wv"], lora)
    assert str(error.value) == (
        "no module is named ['qproj', 'wv']; this model's linear layers are ['lm_head', 'q_proj', 'up_proj', 'v_proj']"
        "; did you mean 'q_proj' or 'v_proj' for 'qproj'?"
    )
    assert fingerprint(model) == before


def test_no_targets_at_all_is_refused():
    with pytest.raises(ValueError, match="no targets were given"):
        inject(Model(), [], lora)


def test_wrapping_twice_is_refused_and_changes_nothing():
    model = Model()
    inject(model, "q_proj", lora)
    before = fingerprint(model)

    for targets in ("q_proj", "all-linear", ["v_proj", "layers.1.q_proj"]):
        with pytest.raises(ValueError, match=r"wrapped already, the first is 'layers\.\d\.q_proj': .* remove\(model\)"):
            inject(model, targets, lora)
    assert fingerprint(model) == before


def test_a_second_adapter_on_other_layers_leaves_the_first_trainable():
    model = Model()
    inject(model, "q_proj", lora)
    inject(model, "v_proj", lora)

    assert sum(p.requires_grad for p in model.parameters()) == 8


def test_a_wrap_that_refuses_leaves_the_model_as_it_was():
    model = Model()
    before, flags = fingerprint(model), [p.requires_grad for p in model.parameters()]

    with pytest.raises(TypeError, match="LoRALinear wraps a linear layer; this is a LayerNorm"):
        inject(model, ["q_proj", "norm"], lora)
    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("merge_first", [False, True])
def test_remove_gives_back_the_identical_model(merge_first):
    model = Model()
    before, q_proj = fingerprint(model), model.layers[0].q_proj
    inject(model, "all-linear", lora)
    inject(model, "embed_tokens", lambda base: LoRAEmbedding(base, r=2, alpha=4))
    for layer in (model.layers[0].q_proj, model.embed_tokens):
        nn.init.normal_(layer.A)
        nn.init.normal_(layer.B)
        if merge_first:
            layer.merge()
    remove(model)

    assert fingerprint(model) == before
    assert model.layers[0].q_proj is q_proj
    assert model.lm_head.weight is model.embed_tokens.weight


def test_a_module_used_in_two_places_is_wrapped_once_and_stays_one():
    model = Model()
    model.layers[1].q_proj = model.layers[0].q_proj
    inject(model, "q_proj", lora)

    assert model.layers[1].q_proj is model.layers[0].q_proj
    remove(model)
    assert type(model.layers[1].q_proj) is nn.Linear
    assert model.layers[1].q_proj is model.layers[0].q_proj


def test_removing_from_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="this model has no adapters to remove"):
        remove(Model())


def test_an_error_of_wrap_names_the_module():
    model = nn.ModuleDict({"first": nn.Linear(64, 32), "second": nn.Linear(64, 32)})
    model["second"].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite") as caught:
        inject(model, ["first", "second"], lambda base: QLoRALinear(base, r=2, alpha=4))
    assert caught.value.__notes__ == ["while second was wrapped"]
