"""DoRA in PEFT and here, on the same models: outputs, gradients, three steps, and files in both directions.

Tolerances are those of float32, for sums of at most 99 products of size 1 or so: 99 · 6e-8 < 1e-5.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_any_model_against_peft import backward, logits_of, tiny
from torch import nn

from minilora.methods import dora_layer
from minilora.torch_lora import inject, load_adapter, save_adapter
from minilora.torch_lora.inject import adapter_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "qwen2": ["q_proj", "up_proj"]}
PEFT_NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}


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


def pairs(ours: nn.Module, theirs: PeftModel) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Every trained tensor of ours with PEFT's own."""
    named = dict(theirs.named_parameters())
    return {
        f"{name}.{letter}": (tensor, named[f"base_model.model.{name}.{PEFT_NAMES[letter]}"])
        for name, layer in adapter_layers(ours).items()
        for letter, tensor in layer.adapter_tensors().items()
    }


@pytest.fixture(params=TARGETS)
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["alpha / r", "rsLoRA"])
def both(request, kind):
    theirs, ours = in_peft(kind, request.param), tiny(kind)
    inject(ours, TARGETS[kind], lambda base: dora_layer(base, r=4, alpha=6, use_rslora=request.param))
    with torch.no_grad():
        for mine, its in pairs(ours, theirs).values():
            mine.copy_(its)
    return ours, theirs


def test_outputs_and_gradients_before_and_after_three_steps(both, kind):
    ours, theirs = both
    named = pairs(ours, theirs)
    optimizers = [torch.optim.AdamW(side, lr=1e-2) for side in zip(*named.values(), strict=True)]
    for _ in range(4):
        torch.testing.assert_close(backward(ours, kind), backward(theirs, kind), rtol=1e-5, atol=1e-5)
        for name, (mine, its) in named.items():
            assert its.grad.abs().max() > 1e-4, name  # or equality would say little
            torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-5, msg=lambda m, k=name: f"{k}: {m}")
        for optimizer in optimizers:
            optimizer.step()


@torch.no_grad()
def test_files_go_both_ways(both, kind, tmp_path):
    ours, theirs = both
    expected = logits_of(theirs, kind)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    there = PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(there, kind), expected, rtol=1e-5, atol=1e-5)
    here = tiny(kind)
    load_adapter(here, tmp_path / "theirs", dora_layer)
    torch.testing.assert_close(logits_of(here, kind), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_merging_gives_what_pefts_merging_does(both, kind):
    ours, theirs = both
    weights = dict(theirs.merge_and_unload().named_parameters())
    for name, layer in adapter_layers(ours).items():
        torch.testing.assert_close(layer.merged_weight(torch.float32), weights[f"{name}.weight"], rtol=1e-5, atol=1e-5)
