"""LoRA+: which parameter learns at which rate, and the same steps as PEFT's optimizer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from minilora.methods import dora_layer, loraplus_groups
from minilora.torch_lora import inject, lora_layer, train_biases, train_modules


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        return self.head(self.down(self.up(self.norm(self.embed(tokens)))))


def by_name(model, groups):
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_each_parameter_has_its_rate():
    model = Model()
    inject(model, ["embed", "up"], lambda base: lora_layer(base, r=2, alpha=4))
    train_biases(model)
    train_modules(model, ["norm", "head"])
    assert by_name(model, loraplus_groups(model, lr=0.1, ratio=4, embedding_lr=0.01, weight_decay=0.5)) == {
        "up.A": (0.1, 0.5),
        "up.B": (0.4, 0.5),
        "up.base.bias": (0.4, 0.0),
        "embed.A": (0.01, 0.5),
        "embed.B": (0.01, 0.5),
        "norm.weight": (0.4, 0.0),
        "norm.bias": (0.4, 0.0),
        "head.weight": (0.1, 0.5),
        "head.bias": (0.4, 0.0),
    }


def test_dora_magnitudes_learn_as_b_and_do_not_decay():
    model = Model()
    inject(model, ["up"], lambda base: dora_layer(base, r=2, alpha=4))
    assert by_name(model, loraplus_groups(model, lr=0.1, ratio=4, weight_decay=0.5)) == {
        "up.A": (0.1, 0.5),
        "up.B": (0.4, 0.5),
        "up.m": (0.4, 0.0),
    }


@pytest.mark.parametrize(("use_dora", "decay"), [(False, 0.1), (True, 0.0)])  # PEFT's magnitudes decay
def test_five_steps_are_those_of_pefts_optimizer(use_dora, decay):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"], use_dora=use_dora)
    theirs, ours = get_peft_model(Model(), config), Model()
    inject(ours, ["up", "down"], lambda base: (dora_layer if use_dora else lora_layer)(base, r=2, alpha=4))
    named = dict(theirs.named_parameters())
    for name in ("up", "down"):
        layer = getattr(ours, name)
        layer.A.data.copy_(named[f"base_model.model.{name}.lora_A.default.weight"])
    settings = {"lr": 0.01, "weight_decay": decay}
    optimizers = [
        create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=8.0, loraplus_weight_decay=decay
        ),
        torch.optim.AdamW(loraplus_groups(ours, ratio=8, **settings)),
    ]
    tokens = torch.arange(10).reshape(2, 5)
    for _ in range(5):
        for model in (theirs, ours):
            nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    moved = (theirs(tokens) - Model()(tokens)).abs().max()
    assert moved > 0.1
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0, embedding_lr 1e-06, ratio 16.0 and weight_decay 0.0: rates are above 0"),
        ({"lr": 0.1, "ratio": 0.5}, "ratio 0.5"),
        ({"lr": 0.1}, "nothing in this model trains"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        loraplus_groups(Model().requires_grad_(False), **settings)
