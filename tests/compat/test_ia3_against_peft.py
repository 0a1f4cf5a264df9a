"""IA³ in PEFT and here, on the same models: outputs, gradients, three steps, merging, and files in both directions."""

import json
from functools import partial

import pytest
import torch
from beside_peft import (
    CLOSE,
    QUIET,
    assert_files_go_both_ways,
    assert_same_training,
    backward,
    copy_from_peft,
    logits_of,
    pairs,
    tiny,
)
from peft import IA3Config, PeftModel, get_peft_model
from torch import nn

from minilora.methods import inject_ia3, load_ia3, save_ia3
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.merging import MergeReport, merged_state
from minilora.torch_lora.train_whole import train_modules

pytestmark = QUIET
OUTPUTS = {"llama": ["k_proj", "v_proj"], "gpt2": ["c_attn"], "qwen2": ["k_proj", "v_proj"], "t5": ["k", "v"]}
PEFT_NAMES = {"l": "ia3_l.default"}
INPUTS = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "qwen2": ["down_proj"], "t5": ["wo"]}


def in_peft(kind: str, **more) -> PeftModel:
    """The model under PEFT, its vectors away from one."""
    targets = {"target_modules": OUTPUTS[kind] + INPUTS[kind], "feedforward_modules": INPUTS[kind]}
    model = get_peft_model(tiny(kind), IA3Config(fan_in_fan_out=kind == "gpt2", **targets, **more))
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


@pytest.fixture(params=OUTPUTS)
def kind(request):
    return request.param


@pytest.fixture
def both(kind):
    theirs, ours = in_peft(kind), tiny(kind)
    inject_ia3(ours, outputs=OUTPUTS[kind], inputs=INPUTS[kind])
    copy_from_peft(pairs(ours, theirs, PEFT_NAMES))
    return ours, theirs


def test_outputs_and_gradients_before_and_after_three_steps(both, kind):
    ours, theirs = both
    named = pairs(ours, theirs, PEFT_NAMES)
    assert_same_training(named, lambda: (backward(ours, kind), backward(theirs, kind)))


def test_files_go_both_ways(both, kind, tmp_path):
    logits, bases = partial(logits_of, kind=kind), (tiny(kind), tiny(kind))
    here = assert_files_go_both_ways(*both, tmp_path, save_ia3, load_ia3, logits, bases)
    assert {n: layer.scales for n, layer in adapter_layers(here).items()} == {
        n: layer.scales for n, layer in adapter_layers(both[0]).items()
    }


@torch.no_grad()
def test_merging_gives_what_pefts_merging_does_biases_too(both):
    ours, theirs = both
    weights = theirs.merge_and_unload().state_dict()
    merged = dict(merged_state(ours, torch.float32, MergeReport("float32", {})))
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-6, atol=1e-7)  # one product, rounded once by each
    assert any(name.removesuffix(".weight") in adapter_layers(ours) for name in merged)


@torch.no_grad()
def test_a_head_that_trains_whole_goes_both_ways(tmp_path):
    theirs = in_peft("llama", modules_to_save=["lm_head"])
    nn.init.normal_(theirs.base_model.model.lm_head.modules_to_save["default"].weight, std=0.15)
    expected = logits_of(theirs, "llama")
    theirs.save_pretrained(tmp_path / "theirs")
    here = tiny("llama")
    load_ia3(here, tmp_path / "theirs")
    torch.testing.assert_close(logits_of(here, "llama"), expected, **CLOSE)

    ours = tiny("llama")
    inject_ia3(ours, outputs=["k_proj"], inputs=["down_proj"])
    train_modules(ours, ["lm_head"])
    nn.init.normal_(ours.lm_head.weight, std=0.15)
    save_ia3(ours, tmp_path / "ours")
    there = PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(there, "llama"), logits_of(ours, "llama"), **CLOSE)


@torch.no_grad()
def test_no_feed_forward_at_all_is_said_in_a_word_that_stops_pefts_defaults(tmp_path):
    ours = tiny("llama")
    inject_ia3(ours, outputs=["k_proj", "down_proj"])
    for layer in adapter_layers(ours).values():
        nn.init.uniform_(layer.l, 0.5, 1.5)
    save_ia3(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["feedforward_modules"] == []
    there = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    torch.testing.assert_close(logits_of(there, "llama"), logits_of(ours, "llama"), **CLOSE)
