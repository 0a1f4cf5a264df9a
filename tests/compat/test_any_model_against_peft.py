"""Eleven architectures of transformers, with the layers that PEFT adapts: the same outputs, gradients and files."""

from pathlib import Path

import pytest
import torch
import transformers as tf
from beside_peft import (
    CLOSE,
    LORA_NAMES,
    MODELS,
    QUIET,
    assert_same_training,
    backward,
    copy_from_peft,
    logits_of,
    pairs,
    tiny,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from minilora.qlora import QLoRALinear
from minilora.torch_lora import inject, load_adapter, lora_layer, save_adapter
from minilora.torch_lora.inject import adapter_layers, match_targets
from minilora.torch_lora.serve import AdapterServer
from minilora.torch_lora.targets import DEFAULT_TARGETS, default_targets

pytestmark = QUIET
DEFAULT, ALL_LINEAR = "default", "all-linear"


def in_peft(kind: str, targets: str, **changes) -> PeftModel:
    """The model under PEFT, every matrix of its adapter away from zero."""
    config = LoraConfig(
        r=4, lora_alpha=6, fan_in_fan_out=kind == "gpt2", target_modules=None if targets == DEFAULT else targets
    )
    model = get_peft_model(tiny(kind, **changes), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def in_ours(kind: str, targets: str, theirs: PeftModel, **changes) -> nn.Module:
    """The model with our layers, A and B as PEFT's."""
    model = tiny(kind, **changes)
    chosen = default_targets(model) if targets == DEFAULT else targets
    inject(model, chosen, lambda base: lora_layer(base, r=4, alpha=6))
    copy_from_peft(pairs(model, theirs))
    return model


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[DEFAULT, ALL_LINEAR])
def targets(request: pytest.FixtureRequest) -> str:
    return request.param


def test_our_default_targets_are_those_of_peft():
    theirs = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    assert {name: list(targets) for name, targets in DEFAULT_TARGETS.items()} == {n: theirs[n] for n in DEFAULT_TARGETS}
    assert DEFAULT_TARGETS.keys() == {kind for kind in MODELS if " " not in kind}


def test_the_same_layers_are_adapted(kind, targets):
    model = tiny(kind)
    hits = match_targets(model, default_targets(model) if targets == DEFAULT else targets)
    ours = {name for names in hits.values() for name in names}
    head = model.get_output_embeddings()

    theirs = in_peft(kind, targets)

    assert {f"base_model.model.{name}.{matrix}" for name in ours for matrix in LORA_NAMES.values()} == {
        name for name, parameter in theirs.named_parameters() if parameter.requires_grad
    }
    if targets == ALL_LINEAR:
        linear = (nn.Linear, tf.pytorch_utils.Conv1D)
        assert ours == {n for n, m in model.named_modules() if isinstance(m, linear) and m is not head}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda kind: kind.__name__)
def test_outputs_and_gradients_are_the_same_before_and_after_three_steps(kind, targets, optimizer):
    theirs = in_peft(kind, targets)
    ours = in_ours(kind, targets, theirs)
    before = logits_of(ours, kind).detach()
    assert (before - logits_of(tiny(kind), kind)).abs().max() > 0.1
    named = pairs(ours, theirs)
    assert_same_training(named, lambda: (backward(ours, kind), backward(theirs, kind)), optimizer)

    assert (before - logits_of(ours, kind)).abs().max() > 1e-3


def test_our_adapter_opens_in_peft(tmp_path, kind, targets):
    ours = in_ours(kind, targets, in_peft(kind, targets))
    save_adapter(ours, tmp_path, base_name=f"tiny/{kind}", task_type=None)
    theirs = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()

    torch.testing.assert_close(logits_of(theirs, kind), logits_of(ours, kind), **CLOSE)


def test_pefts_adapter_opens_in_ours(tmp_path, kind, targets):
    theirs = in_peft(kind, targets)
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind)
    load_adapter(ours, tmp_path)

    torch.testing.assert_close(logits_of(ours, kind), logits_of(theirs, kind), **CLOSE)


def test_merging_is_the_same_in_each(kind):
    theirs = in_peft(kind, ALL_LINEAR)
    ours = in_ours(kind, ALL_LINEAR, theirs)
    for layer in adapter_layers(ours).values():
        layer.merge()

    torch.testing.assert_close(logits_of(ours, kind), logits_of(theirs.merge_and_unload(), kind), **CLOSE)


@torch.inference_mode()
def test_a_served_row_is_what_the_adapter_alone_makes_of_it(tmp_path, kind, targets):
    ours = in_ours(kind, targets, in_peft(kind, targets))
    save_adapter(ours, tmp_path, task_type=None)
    served = tiny(kind)
    server = serving(served, tmp_path, ours)
    plain = logits_of(served, kind)
    with server.rows(["one", None]):
        if (kind, targets) == ("opt", ALL_LINEAR):  # which makes (rows · tokens, hidden) of x before fc1
            with pytest.raises(ValueError, match=r"layers.0.fc1 is called with \(24, 32\), without an axis for rows"):
                logits_of(served, kind)
            return
        together = logits_of(served, kind)

    torch.testing.assert_close(together[0], logits_of(ours, kind)[0], **CLOSE)
    torch.testing.assert_close(together[1], plain[1], **CLOSE)


def serving(model: nn.Module, folder: Path, adapted: nn.Module) -> AdapterServer:
    """A server of the layers that another model has adapted."""
    server = AdapterServer(model, limit_bytes=10**6, targets=list(adapter_layers(adapted)))
    server.cache.register("one", folder)
    return server


@torch.inference_mode()
def test_blooms_product_by_slices_of_a_weight_cannot_be_served_and_says_so(tmp_path):
    slow = {"slow_but_exact": True, "pretraining_tp": 2}
    ours = in_ours("bloom", ALL_LINEAR, in_peft("bloom", ALL_LINEAR, **slow), **slow)
    save_adapter(ours, tmp_path, task_type=None)
    served = tiny("bloom", **slow)
    before = logits_of(served, "bloom")
    server = serving(served, tmp_path, ours)

    assert torch.equal(logits_of(served, "bloom"), before)
    with server.rows([None, None]):
        assert torch.equal(logits_of(served, "bloom"), before)
    with server.rows(["one", None]), pytest.raises(RuntimeError, match=r"dense.weight .*slow_but_exact=False calls it"):
        logits_of(served, "bloom")


def test_blooms_product_by_slices_of_a_weight_has_the_adapter_in_it():
    """It reads dense.weight and dense_4h_to_h.weight, and never calls these layers (nor adds their biases)."""
    theirs = in_peft("bloom", ALL_LINEAR)
    whole = in_ours("bloom", ALL_LINEAR, theirs)
    sliced = in_ours("bloom", ALL_LINEAR, theirs, slow_but_exact=True, pretraining_tp=2)
    for model in (whole, sliced):
        read = [y for n, y in adapter_layers(model).items() if n.endswith(("self_attention.dense", "4h_to_h"))]
        assert len(read) == 4
        for layer in read:
            nn.init.zeros_(layer.base.bias)

    torch.testing.assert_close(backward(sliced, "bloom"), backward(whole, "bloom"), **CLOSE)
    expected = adapter_layers(whole)
    for name, layer in adapter_layers(sliced).items():
        for letter, matrix in layer.adapter_tensors().items():
            torch.testing.assert_close(matrix.grad, getattr(expected[name], letter).grad, **CLOSE)


def test_t5_reads_the_dtype_of_a_weight_in_4_bits():
    """transformers keeps wo in float32 in any case; over 4 bits it is told float32, which A and B are in."""
    model = tiny("t5")
    inject(model, ALL_LINEAR, lambda base: QLoRALinear(base, r=4, alpha=6))
    backward(model, "t5")

    assert all(layer.B.grad.abs().max() > 0 for layer in adapter_layers(model).values())
