"""A weight decay pulls to the base's own model, or at nothing."""

import pytest
import torch
from torch import nn

from minilora.methods import (
    HoulsbyLinear,
    IA3Linear,
    LoftQLinear,
    adalora_layer,
    dora_layer,
    olora_layer,
    pissa_layer,
)
from minilora.qlora import QLoRALinear
from minilora.torch_lora import inject, lora_layer
from minilora.torch_lora.decay import decay_groups
from minilora.torch_lora.inject import adapter_layers

LAYERS = {
    "lora": lambda base: lora_layer(base, r=2, alpha=4),
    "dora": lambda base: dora_layer(base, r=2, alpha=4),
    "qlora": lambda base: QLoRALinear(base, r=2, alpha=4),
    "adalora": lambda base: adalora_layer(base, r=2, alpha=4),
    "houlsby": lambda base: HoulsbyLinear(base, bottleneck=2),
    "pissa": lambda base: pissa_layer(base, r=2, alpha=4),
    "olora": lambda base: olora_layer(base, r=2, alpha=4),
    "loftq": lambda base: LoftQLinear(base, r=2, alpha=4),
    "ia3": IA3Linear,
}
SPARED = {"dora": {"m"}, "pissa": {"A", "B"}, "olora": {"A", "B"}, "loftq": {"A", "B"}, "ia3": {"l"}}
ONLY_SPARED = ("pissa", "olora", "loftq", "ia3")


def model_with(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 64))
    inject(model, ["0", "1"], LAYERS[name])
    return model


def named(model, tensors):
    ours = {p: letter for layer in adapter_layers(model).values() for letter, p in layer.adapter_tensors().items()}
    return {ours[p] for p in tensors}


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - set(ONLY_SPARED)))
def test_a_decay_alone_leads_to_the_bases_model(name):
    """Steps without a gradient: the decay alone acts, 0.99 a step."""
    model, x = model_with(name), torch.randn(3, 64)
    with torch.no_grad():
        start = model(x)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer = torch.optim.AdamW(decay_groups(model, 0.1), lr=0.1)
    for _ in range(700):  # 0.99^700 is a thousandth
        optimizer.step()
    trained = [p for layer in adapter_layers(model).values() for p in layer.adapter_tensors().values()]
    assert any(p.abs().max() < 1e-3 for p in trained)  # it did act
    with torch.no_grad():
        torch.testing.assert_close(model(x), start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_spared_is_what_begins_elsewhere(name):
    model = model_with(name)
    if name in ONLY_SPARED:
        assert named(model, decay_groups(model, 0.0)[0]["params"]) == SPARED[name]
        return
    by_decay = {group["weight_decay"]: named(model, group["params"]) for group in decay_groups(model, 0.5)}
    assert by_decay.get(0.0, set()) == SPARED.get(name, set())
    assert by_decay[0.5] == named(model, [p for p in model.parameters() if p.requires_grad]) - SPARED.get(name, set())


@pytest.mark.parametrize("name", ONLY_SPARED)
def test_a_decay_that_would_act_on_nothing_is_refused(name):
    with pytest.raises(ValueError, match=r"weight_decay is 0\.5, and nothing that trains here may decay"):
        decay_groups(model_with(name), 0.5)
    assert len(decay_groups(model_with(name), 0.0)) == 1


def test_without_a_decay_there_is_one_group_in_the_models_order():
    model = model_with("dora")
    (group,) = decay_groups(model, 0.0)
    assert group["params"] == [p for p in model.parameters() if p.requires_grad]
