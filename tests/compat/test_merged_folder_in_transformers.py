"""A merged folder opens in transformers, with the logits that PEFT gives for the adapter beside its base."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora.llm import load_model, smollm2
from minilora.llm import save as save_module
from minilora.torch_lora import inject, lora_layer, save_adapter
from minilora.torch_lora.inject import adapter_layers
from minilora.train.merge import merge_to_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj", "down_proj"], ["q_proj", "embed_tokens"]], ids=["linear", "embedding"]
)
def test_smollm2_merged_is_in_transformers_what_peft_makes_of_base_and_adapter(tmp_path, monkeypatch, targets):
    monkeypatch.setattr(save_module, "SHARD_BYTES", 250_000_000)  # several files
    model, tokenizer = load_model("smollm2-135m")
    inject(model, targets, lambda base: lora_layer(base, r=4, alpha=8))
    for name, layer in adapter_layers(model).items():
        nowhere = "embed" in name
        torch.nn.init.normal_(layer.A, std=0.02 if nowhere else 0.05)
        torch.nn.init.normal_(layer.B, std=0.02)
    save_adapter(model, tmp_path / "adapter")
    merge_to_folder("smollm2-135m", tmp_path / "adapter", tmp_path / "out", torch.float32)

    base = AutoModelForCausalLM.from_pretrained(smollm2.fetch(), dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer.encode("The quick brown fox jumps over 12 lazy dogs.")])
    with torch.no_grad():
        plain = base(tokens).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(tokens).logits
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        merged = opened(tokens).logits

    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert opened.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("lazy dogs").input_ids == tokenizer.encode("lazy dogs")
    assert (theirs - plain).abs().max() > 0.1
    torch.testing.assert_close(merged, theirs, rtol=0, atol=2e-3)  # logits of about 20, 30 layers, float32
