"""`minilora merge`, from a base and an adapter to a folder."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.llm import Decoder, ModelConfig, load_model
from minilora.llm.model import Origin
from minilora.qlora import QLoRALinear
from minilora.torch_lora import inject, lora_layer, save_adapter
from minilora.torch_lora.arithmetic import Distance
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.merging import LayerMerge, MergeReport
from minilora.train.adapted import stored_dtype
from minilora.train.merge import card, merge_to_folder, run

CONFIG = {
    "model_type": "llama", "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = torch.arange(20).reshape(2, 10)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16 base", "fp32 base"])
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A tiny model whose head is its embedding, in one of two dtypes."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    weights = Decoder(ModelConfig.from_hf(CONFIG)).to(request.param).state_dict()
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    return folder


def adapter_for(base: Path, folder: Path, targets: list[str], wrap=lora_layer, std: float = 0.1) -> Decoder:
    """Save an adapter; give the model with it, in float32."""
    model, _ = load_model(base)
    inject(model, targets, lambda linear: wrap(linear, r=2, alpha=4))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.A, std=std)
        nn.init.normal_(layer.B, std=std)
    save_adapter(model, folder, base_sha256=model.origin.sha256)
    return model


def options(
    base: Path, adapter: Path, out: Path, dtype: str = "bf16", method: str | None = None, template: str = "model"
) -> argparse.Namespace:
    return argparse.Namespace(
        base=str(base), adapter=str(adapter), out=str(out), dtype=dtype, method=method, template=template
    )


@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], ["embed_tokens"], ["lm_head"]], ids=["linear", "embedding", "head"]
)
def test_the_folder_computes_what_the_adapter_did(base, tmp_path, targets):
    adapted = adapter_for(base, tmp_path / "adapter", targets)
    report = merge_to_folder(str(base), tmp_path / "adapter", tmp_path / "out", torch.float32)
    merged, _ = load_model(tmp_path / "out")

    torch.testing.assert_close(merged(TOKENS), adapted(TOKENS), rtol=0, atol=1e-5)
    assert (load_model(base)[0](TOKENS) - adapted(TOKENS)).abs().max() > 0.01
    assert report.layers.keys() == adapter_layers(adapted).keys()
    # had W + ΔW been rounded to a base of bfloat16 on the way, this would be about 0.01
    assert report.off.relative < 1e-5


def test_the_weights_are_in_the_dtype_asked_for_and_rounded_once(base, tmp_path, capsys):
    adapted = adapter_for(base, tmp_path / "adapter", ["q_proj"])
    run(options(base, tmp_path / "adapter", tmp_path / "out", "bf16"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = adapted.model.layers[1].self_attn.q_proj
    wanted = layer.base.weight.double() + layer.delta_weight().detach().double()

    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["model.layers.1.self_attn.q_proj.weight"], wanted.bfloat16())
    assert "lm_head.weight" not in stored
    said = capsys.readouterr().out
    assert said.startswith("merged into bfloat16")
    assert "all layers" in said


def test_an_adapter_of_qlora_is_merged_into_what_it_was_trained_over(base, tmp_path):
    adapted = adapter_for(base, tmp_path / "adapter", ["q_proj"], QLoRALinear)
    run(options(base, tmp_path / "adapter", tmp_path / "out", "fp32"))
    merged, _ = load_model(tmp_path / "out")

    torch.testing.assert_close(merged(TOKENS), adapted(TOKENS), rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="trained over a base stored as nf4, block_size=64, double, here over f"):
        run(options(base, tmp_path / "adapter", tmp_path / "other", "fp32", "lora"))
    assert (load_model(tmp_path / "other")[0](TOKENS) - adapted(TOKENS)).abs().max() > 1e-3


def test_the_card_names_the_base_its_licence_and_what_was_lost(base, tmp_path):
    origin = Origin(name='a/"b', license="Apache-2.0", attribution="b by A")
    none = LayerMerge(Distance(0.0, 1.0), 0, 1)
    text = card("mine", origin, "adapter", MergeReport("bfloat16", {"q_proj": none}))
    assert text.startswith('---\nbase_model: "a/\\"b"\nlicense: "apache-2.0"\n---\n# mine\n')
    assert "Base: b by A." in text

    adapter_for(base, tmp_path / "adapter", ["q_proj"])
    merge_to_folder(str(base), tmp_path / "adapter", tmp_path / "out", torch.bfloat16)
    written = (tmp_path / "out" / "README.md").read_text()
    assert "model.layers.0.self_attn.q_proj" in written
    assert 'base_model: "base"\n---' in written


def test_it_warns_where_the_merge_erases_the_adapter(base, tmp_path):
    adapter_for(base, tmp_path / "adapter", ["q_proj"], std=0.001)
    with pytest.warns(UserWarning, match="merging into bfloat16 erases the adapter in 2 of 2 layers"):
        run(options(base, tmp_path / "adapter", tmp_path / "out"))


def test_refusals_leave_nothing_behind(base, tmp_path):
    adapter_for(base, tmp_path / "adapter", ["q_proj"])
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        run(options(base, tmp_path / "adapter", base))
    with pytest.raises(ValueError, match="GGUF file"):
        run(options(Path("model.gguf"), tmp_path / "adapter", tmp_path / "out"))
    with pytest.raises(FileNotFoundError):
        run(options(base, tmp_path / "nowhere", tmp_path / "out"))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_stored_dtype_is_the_one_that_holds_all_numbers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for dtypes, widest in [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float16), torch.float32),
    ]:
        save_file({str(i): torch.zeros(2, dtype=d) for i, d in enumerate(dtypes)}, tmp_path / "model.safetensors")
        assert stored_dtype(tmp_path) == widest


def test_a_damaged_base_is_told_of_as_when_it_is_loaded(base, tmp_path):
    adapter_for(base, tmp_path / "adapter", ["q_proj"])
    (base / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        run(options(base, tmp_path / "adapter", tmp_path / "out"))


def test_the_template_that_an_adapter_was_trained_with_comes_along(base, tmp_path):
    (base / "chat_template.jinja").write_text("the base's")
    adapter_for(base, tmp_path / "adapter", ["q_proj"])
    (tmp_path / "adapter/chat_template.jinja").write_text("the adapter's")
    run(options(base, tmp_path / "adapter", tmp_path / "out"))
    assert (tmp_path / "out/chat_template.jinja").read_text() == "the adapter's"
