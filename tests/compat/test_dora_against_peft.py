"""DoRA in PEFT and here, on the same models: outputs, gradients, three steps, and files in both directions."""

from functools import partial

import pytest
import torch
from beside_peft import (
    CLOSE,
    LORA_NAMES,
    QUIET,
    TARGETS,
    assert_files_go_both_ways,
    assert_same_training,
    backward,
    copy_from_peft,
    logits_of,
    pairs,
    tiny,
)
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from minilora.methods import dora_layer
from minilora.torch_lora import inject, load_adapter, save_adapter
from minilora.torch_lora.inject import adapter_layers

pytestmark = QUIET
PEFT_NAMES = LORA_NAMES | {"m": "lora_magnitude_vector.default.weight"}


def in_peft(kind: str, use_rslora: bool) -> PeftModel:
    """The model under PEFT, its A and B away from zero, its magnitudes away from the lengths."""
    settings = {"fan_in_fan_out": kind == "gpt2", "use_dora": True, "use_rslora": use_rslora}
    model = get_peft_model(tiny(kind), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[kind], **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" in name:
            parameter.data *= torch.rand_like(parameter) + 0.5
        elif parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture(params=TARGETS)
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["alpha / r", "rsLoRA"])
def both(request, kind):
    theirs, ours = in_peft(kind, request.param), tiny(kind)
    inject(ours, TARGETS[kind], lambda base: dora_layer(base, r=4, alpha=6, use_rslora=request.param))
    copy_from_peft(pairs(ours, theirs, PEFT_NAMES))
    return ours, theirs


def test_outputs_and_gradients_before_and_after_three_steps(both, kind):
    ours, theirs = both
    named = pairs(ours, theirs, PEFT_NAMES)
    assert_same_training(named, lambda: (backward(ours, kind), backward(theirs, kind)))


def test_files_go_both_ways(both, kind, tmp_path):
    load, logits = partial(load_adapter, wrap=dora_layer), partial(logits_of, kind=kind)
    assert_files_go_both_ways(*both, tmp_path, save_adapter, load, logits, (tiny(kind), tiny(kind)))


@torch.no_grad()
def test_merging_gives_what_pefts_merging_does(both, kind):
    ours, theirs = both
    weights = dict(theirs.merge_and_unload().named_parameters())
    for name, layer in adapter_layers(ours).items():
        torch.testing.assert_close(layer.merged_weight(torch.float32), weights[f"{name}.weight"], **CLOSE)
