"""PiSSA, OLoRA and LoftQ in PEFT and here, on the same models: starts, outputs, gradients, three steps, files.

PEFT puts what A0 and B0 leave of W in its place, we leave W: the numbers are the same up to rounding.

PEFT's OLoRA is not compared on GPT-2: it takes Q and R of Conv1D's weight, (in, out), as if it were (out, in), and so
fails where that is not square and changes the model where it is.
"""

import pytest
import torch
from beside_peft import CLOSE, QUIET, TARGETS, assert_same_training, backward, logits_of, pairs, tiny
from bitsandbytes import functional as bnb
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from torch import Tensor, nn

from minilora.methods import LoftQLinear, olora_layer, pissa_layer
from minilora.torch_lora import inject, load_adapter, save_adapter
from minilora.torch_lora.inject import adapter_layers

pytestmark = QUIET
CASES = [("pissa", kind) for kind in TARGETS] + [("olora", "llama"), ("olora", "qwen2")]
WRAPS = {"pissa": pissa_layer, "olora": olora_layer}


def in_peft(method: str, kind: str, use_rslora: bool) -> PeftModel:
    settings = {"fan_in_fan_out": kind == "gpt2", "use_rslora": use_rslora, "init_lora_weights": method}
    return get_peft_model(tiny(kind), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[kind], **settings)).eval()


@pytest.fixture(params=CASES, ids=lambda case: " ".join(case))
def case(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["alpha / r", "rsLoRA"])
def both(request, case):
    method, kind = case
    ours = tiny(kind)
    inject(ours, TARGETS[kind], lambda base: WRAPS[method](base, r=4, alpha=6, use_rslora=request.param))
    return ours, in_peft(method, kind, request.param)


@torch.no_grad()
def test_they_begin_at_the_same_product_and_leave_the_same_of_the_weight(both, case):
    ours, theirs = both
    named = pairs(ours, theirs)
    for name, layer in adapter_layers(ours).items():
        (A, its_A), (B, its_B) = named[f"{name}.A"], named[f"{name}.B"]
        torch.testing.assert_close(B @ A, its_B @ its_A, **CLOSE)
        left = theirs.get_submodule(f"base_model.model.{name}.base_layer").weight
        taken = layer.scaling * B @ A
        W = layer.base.weight
        torch.testing.assert_close(W - (taken.T if case[1] == "gpt2" else taken), left, **CLOSE)
    torch.testing.assert_close(logits_of(ours, case[1]), logits_of(tiny(case[1]), case[1]), rtol=0, atol=0)


def test_outputs_and_gradients_before_and_after_three_steps(both, case):
    ours, theirs = both
    kind, named = case[1], pairs(ours, theirs)
    with torch.no_grad():
        for name, (mine, its) in named.items():  # where the sign of a singular vector is free, take theirs
            mine.copy_(its)
            layer = ours.get_submodule(name[:-2])
            getattr(layer, f"{name[-1]}0").copy_(its)
    assert_same_training(named, lambda: (backward(ours, kind), backward(theirs, kind)))


@torch.no_grad()
def test_files_are_right_over_the_model_as_it_is(both, case, tmp_path):
    ours, theirs = both
    kind = case[1]
    for mine, its in pairs(ours, theirs).values():
        mine.add_(0.1 * torch.randn_like(mine))
        its.copy_(mine)
    expected = logits_of(ours, kind)
    torch.testing.assert_close(logits_of(theirs, kind), expected, **CLOSE)
    save_adapter(ours, tmp_path)
    there = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    torch.testing.assert_close(logits_of(there, kind), expected, **CLOSE)
    here = tiny(kind)
    load_adapter(here, tmp_path)
    torch.testing.assert_close(logits_of(here, kind), expected, **CLOSE)


@torch.no_grad()
def test_files_that_peft_converts_to_the_model_as_it_was_are_loaded(case, tmp_path):
    method, kind = case
    theirs = in_peft(method, kind, False)
    theirs.peft_config["default"].init_lora_weights = True  # PEFT's own recipe: save the start, train, convert
    theirs.save_pretrained(tmp_path / "start")
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits_of(theirs, kind)
    theirs.peft_config["default"].init_lora_weights = method
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    here = tiny(kind)
    load_adapter(here, tmp_path / "end")
    torch.testing.assert_close(logits_of(here, kind), expected, **CLOSE)


def loftq_of_bitsandbytes(W: Tensor, r: int, steps: int) -> tuple[Tensor, Tensor]:
    """[LoftQ] algorithm 1 of bitsandbytes' NF4 and PEFT's SVD: Q of the last step and B A, with a scaling of 1.

    It is PEFT's loftq_init, which runs on a GPU only.
    """
    update = torch.zeros_like(W)
    for _ in range(steps):
        packed, state = bnb.quantize_4bit(W - update, blocksize=64, compress_statistics=False, quant_type="nf4")
        Q = bnb.dequantize_4bit(packed, state)
        parts = _low_rank_decomposition(W - Q, reduced_rank=r)
        update = parts["L"] @ parts["R"]
    return Q, update


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_loftq_is_that_of_bitsandbytes_and_peft(steps):
    linear = nn.Linear(128, 96)
    Q, update = loftq_of_bitsandbytes(linear.weight.detach(), 8, steps)
    layer = LoftQLinear(linear, r=8, alpha=4, steps=steps, double=False)
    ours, gap = layer.base.dense_weight(torch.float32), linear.weight.abs().max().item() * 0.31  # NF4's widest gap
    other = (ours - Q).abs() > 1e-6  # a weight halfway between two codes may go either way in a later step
    assert other.float().mean() < 1e-3 and (ours - Q).abs().max() < gap
    if steps == 1:
        assert not other.any()
    torch.testing.assert_close(layer.delta_weight(), update, rtol=1e-4, atol=1e-6 if not other.any() else 0.1 * gap)
