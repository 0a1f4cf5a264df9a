"""A DoRA adapter at the command line: chat, eval, merge and export take it for what it is."""

import json

import pytest
import torch
from tiny_run import write_base, write_data

from minilora import cli
from minilora.llm import load_model
from minilora.methods import DoRALinear, dora_layer
from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRALinear, inject, lora_layer, save_adapter
from minilora.torch_lora.inject import adapter_layers
from minilora.train.adapted import put_adapter

TOKENS = torch.arange(20)[None]


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def adapter(base, tmp_path):
    return adapter_over(base, tmp_path / "adapter", lambda layer: layer)


def adapter_over(base, folder, stored):
    """A saved DoRA adapter, and the logits of the model with it."""
    model, _ = load_model(base)
    inject(model, "all-linear", lambda linear: dora_layer(stored(linear), r=2, alpha=4))
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.B.normal_(std=0.3)
            layer.m.mul_(torch.rand_like(layer.m) + 0.5)
        logits = model(TOKENS)
    save_adapter(model, folder, base_sha256=model.origin.sha256)
    return folder, logits


def test_the_file_says_which(adapter, base, tmp_path):
    model, _ = load_model(base)
    inject(model, "q_proj", lambda linear: lora_layer(linear, r=2, alpha=4))
    save_adapter(model, tmp_path / "lora")
    for folder, kind in ((adapter[0], DoRALinear), (tmp_path / "lora", LoRALinear)):
        model, _ = load_model(base)
        put_adapter(model, folder)
        assert {type(layer) for layer in adapter_layers(model).values()} == {kind}
    with pytest.raises(FileNotFoundError, match=r"there is no .*adapter_config\.json"):
        put_adapter(model, tmp_path)


@torch.no_grad()
def test_it_is_merged_and_exported(adapter, base, tmp_path):
    folder, logits = adapter
    words = ["--base", str(base), "--adapter", str(folder), "--out"]
    assert cli.main(["merge", *words, str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    assert cli.main(["export", *words, str(tmp_path / "merged.gguf"), "--kind", "F32"]) == 0
    for path in (tmp_path / "merged", tmp_path / "merged.gguf"):
        torch.testing.assert_close(load_model(path)[0](TOKENS), logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_that_was_trained_over_4_bits_is_merged_into_what_they_say(base, tmp_path):
    folder, logits = adapter_over(base, tmp_path / "adapter", NF4Linear)
    words = ["--base", str(base), "--adapter", str(folder), "--out", str(tmp_path / "merged"), "--dtype", "fp32"]
    assert cli.main(["merge", *words, "--method", "qlora"]) == 0
    torch.testing.assert_close(load_model(tmp_path / "merged")[0](TOKENS), logits, rtol=1e-5, atol=1e-5)


def test_it_has_no_gguf_of_its_own(adapter, base, tmp_path, capsys):
    words = ["export", "--base", str(base), "--adapter", str(adapter[0]), "--kind", "adapter"]
    assert cli.main([*words, "--out", str(tmp_path / "adapter.gguf")]) == 2
    assert "layers are not plain LoRA" in capsys.readouterr().err
    assert not (tmp_path / "adapter.gguf").exists()


def test_it_is_talked_with_and_graded(adapter, base, tmp_path, capsys):
    words = ["--base", str(base), "--adapter", str(adapter[0])]
    assert cli.main(["chat", "Hello?", "--max-new-tokens", "3", *words]) == 0
    data, grades = write_data(tmp_path / "data.jsonl", 3), tmp_path / "grades.json"
    assert cli.main(["eval", "--data", str(data), "--json", str(grades), *words]) == 0
    found = json.loads(grades.read_text())
    assert found["adapter"]["loss"] != found["base"]["loss"]
