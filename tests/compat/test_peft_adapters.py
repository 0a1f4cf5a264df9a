"""Adapters travel both ways between PEFT and us, with the same logits and the same gradients."""

import copy
import json

import pytest
import torch
from beside_peft import QUIET
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from minilora.torch_lora import inject, load_adapter, lora_layer, save_adapter
from minilora.torch_lora.inject import adapter_layers

pytestmark = QUIET
TOKENS = torch.arange(24).reshape(2, 12)

# target modules that reach a Linear, an Embedding, GPT-2's Conv1D (c_proj among them: square, so shapes hide a
# forgotten transpose), and the tied embedding of GPT-2
CASES = {
    "linear": ("llama", ["q_proj", "v_proj", "down_proj"]),
    "linear and embedding": ("llama", ["o_proj", "embed_tokens"]),
    "conv1d": ("gpt2", ["c_attn", "c_proj", "c_fc"]),
    "conv1d and embedding": ("gpt2", ["c_attn", "wte"]),
}


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(1)
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=99, max_position_embeddings=64,
            )
        ).eval()  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)).eval()


def randomize(model: nn.Module, marker: str) -> None:
    """Move every matrix of an adapter away from zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert marker in name
            nn.init.normal_(parameter, std=0.3)


def in_peft(kind: str, targets: list[str], use_rslora: bool) -> PeftModel:
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, use_rslora=use_rslora,
        fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(tiny(kind), config)
    randomize(model, "lora_")
    return model.eval()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> tuple[str, list[str]]:
    return request.param


@pytest.mark.parametrize("use_rslora", [False, True])
def test_our_adapter_opens_in_peft_with_the_same_logits(tmp_path, case, use_rslora):
    kind, targets = case
    ours = tiny(kind)
    inject(ours, targets, lambda base: lora_layer(base, r=4, alpha=6, use_rslora=use_rslora))
    for layer in adapter_layers(ours).values():
        nn.init.normal_(layer.A, std=0.3)
        nn.init.normal_(layer.B, std=0.3)
    save_adapter(ours, tmp_path, base_name=f"tiny/{kind}")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is (kind == "gpt2")
    theirs = PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    logits, plain = ours(TOKENS).logits, tiny(kind)(TOKENS).logits

    assert (logits - plain).abs().max() > 0.1
    torch.testing.assert_close(theirs(TOKENS).logits, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pefts_adapter_opens_in_ours_with_the_same_logits_and_gradients(tmp_path, case, use_rslora):
    kind, targets = case
    theirs = in_peft(kind, targets, use_rslora)
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind)
    load_adapter(ours, tmp_path)
    logits = ours(TOKENS).logits
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    logits.square().mean().backward()
    expected.square().mean().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    for name, layer in adapter_layers(ours).items():
        for letter, matrix in layer.adapter_tensors().items():
            [match] = [g for n, g in gradients.items() if f".{name}." in n and f"_{letter}." in n]
            torch.testing.assert_close(matrix.grad, match, rtol=1e-4, atol=1e-6)


def test_a_file_written_back_is_the_file_read(tmp_path, case):
    kind, targets = case
    in_peft(kind, targets, use_rslora=False).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours = tiny(kind)
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")

    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])


def test_the_copy_of_an_embedding_that_peft_adds_is_accepted_only_if_it_is_the_models_own(tmp_path):
    in_peft("llama", ["embed_tokens"], use_rslora=False).save_pretrained(tmp_path)
    other = tiny("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1

    load_adapter(tiny("llama"), tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens.base_layer.weight: not the model's own: it was trained or"):
        load_adapter(other, tmp_path)


def test_merged_weights_are_those_of_peft(tmp_path, case):
    kind, targets = case
    theirs = in_peft(kind, targets, use_rslora=False)
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind)
    load_adapter(ours, tmp_path)
    merged_theirs = dict(copy.deepcopy(theirs).merge_and_unload().named_parameters())
    for name, layer in adapter_layers(ours).items():
        layer.merge()
        torch.testing.assert_close(layer.base.weight, merged_theirs[f"{name}.weight"], rtol=0, atol=1e-6)
