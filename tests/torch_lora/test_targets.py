"""Default targets: of a known architecture its own, else an error that names the layers there are."""

from types import SimpleNamespace

import pytest
from torch import nn

from minilora.torch_lora import inject, lora_layer
from minilora.torch_lora.targets import default_targets


def model_of(model_type: object, *names: str) -> nn.Module:
    model = nn.Module()
    for name in names:
        model.add_module(name, nn.Linear(3, 3))
    model.config = SimpleNamespace(model_type=model_type)
    return model


def test_a_known_architecture_has_its_own():
    model = model_of("llama", "q_proj", "k_proj", "v_proj")

    assert default_targets(model) == ["q_proj", "v_proj"]
    assert default_targets(model) is not default_targets(model)  # the caller may add to it


def test_they_are_the_same_over_adapters():
    model = model_of("llama", "q_proj", "v_proj")
    inject(model, default_targets(model), lambda base: lora_layer(base, r=1, alpha=1))

    assert default_targets(model) == ["q_proj", "v_proj"]


def test_an_unknown_architecture_is_answered_with_its_linear_layers_but_no_head():
    with pytest.raises(
        ValueError,
        match=r"^no default targets for a Module, model_type 'mamba': name the layers to adapt, some of "
        r"\['in_proj', 'out_proj'\], or take \"all-linear\"$",
    ):
        default_targets(model_of("mamba", "out_proj", "in_proj", "lm_head"))


@pytest.mark.parametrize("model_type", [None, 3, ["llama"]])
def test_a_model_that_does_not_say_what_it_is_gets_an_error(model_type):
    with pytest.raises(ValueError, match="no default targets"):
        default_targets(model_of(model_type, "q_proj"))
    with pytest.raises(ValueError, match=r"no default targets for a Sequential, which has no config.model_type"):
        default_targets(nn.Sequential(nn.Linear(3, 3)))


def test_a_model_whose_layers_are_not_those_of_its_type_gets_the_names_it_has():
    with pytest.raises(ValueError, match=r"no module is named \['q_proj', 'v_proj'\].*linear layers are \['Wqkv'\]"):
        default_targets(model_of("llama", "Wqkv"))
