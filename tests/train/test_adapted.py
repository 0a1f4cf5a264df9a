"""A base with its adapter is what was trained: over 4 bits where it was, ending its answers as it learnt to."""

import json

import gguf
import pytest
import torch
from tiny_run import write_base, write_data

from minilora import cli
from minilora.llm import load_model
from minilora.llm.tokenizer import load_tokenizer
from minilora.qlora import NF4Linear, QLoRALinear
from minilora.qlora.linear import DEFAULT_FORM
from minilora.torch_lora import inject, lora_layer, save_adapter
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.peft_files import base_form
from minilora.train.adapted import load_adapted, load_base
from minilora.train.bnb_folder import save_4_bit
from minilora.train.methods import METHODS, put_new
from minilora.train.settings import Settings

TOKENS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """The folder of a QLoRA training of a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    data, out = write_data(folder / "data.jsonl", 6), folder / "out"
    words = ["train", "--base", str(base), "--data", str(data), "--out", str(out), "--method", "qlora"]
    assert cli.main([*words, "--lr", "0.05", "--epochs", "2", "-r", "4", "--dtype", "fp32"]) == 0
    return out


@torch.no_grad()
def logits(model):
    return model(TOKENS)


def in_4_bits(base, adapter):
    """The model that was trained, put together by hand."""
    model, _ = load_model(base)
    shapes = load_adapted(base, adapter, torch.float32)[0]
    inject(model, "all-linear", lambda linear: QLoRALinear(linear, r=4, alpha=8))
    for name, layer in adapter_layers(model).items():
        its = adapter_layers(shapes)[name]
        layer.A.data, layer.B.data = its.A.data, its.B.data
    return model


def test_an_adapter_of_qlora_is_opened_over_4_bits_again(base, trained, capsys):
    assert base_form(trained) == DEFAULT_FORM == NF4Linear(torch.nn.Linear(8, 8)).stored_as
    model, _ = load_adapted(base, trained, torch.float32)
    assert all(isinstance(layer.base, NF4Linear) for layer in adapter_layers(model).values())
    assert torch.equal(logits(model), logits(in_4_bits(base, trained)))
    assert f"was trained over {DEFAULT_FORM}: so it stands here" in capsys.readouterr().err

    with pytest.warns(UserWarning, match="it answers worse there than it was trained to"):
        over_floats, _ = load_adapted(base, trained, torch.float32, "lora")
    assert (logits(over_floats) - logits(model)).abs().max() > 1e-3


def test_every_command_gives_the_model_that_was_trained(base, trained, tmp_path, capsys):
    wanted = logits(in_4_bits(base, trained))
    words = ["--base", str(base), "--adapter", str(trained)]
    assert cli.main(["merge", *words, "--out", str(tmp_path / "merged"), "--dtype", "fp32"]) == 0
    assert cli.main(["export", *words, "--out", str(tmp_path / "merged.gguf"), "--kind", "F32"]) == 0
    for path in ("merged", "merged.gguf"):
        torch.testing.assert_close(logits(load_model(tmp_path / path)[0]), wanted, rtol=0, atol=1e-5)

    capsys.readouterr()
    data = write_data(tmp_path / "data.jsonl", 6)
    losses = {}
    for method in ([], ["--method", "qlora"], ["--method", "lora"]):
        grades = tmp_path / "grades.json"
        assert cli.main(["eval", *words, *method, "--data", str(data), "--json", str(grades)]) == 0
        losses[" ".join(method)] = json.loads(grades.read_text())["adapter"]["loss"]
    assert losses[""] == losses["--method qlora"] != losses["--method lora"]
    assert "note: this adapter was trained over a base stored as nf4" in capsys.readouterr().err


def test_other_forms_come_back_and_unknown_ones_are_refused(base, tmp_path):
    from minilora.qlora.codebooks import FP4

    model, _ = load_model(base)
    inject(model, ["q_proj"], lambda y: QLoRALinear(y, r=2, alpha=4, codebook=FP4, block_size=32, double=False))
    save_adapter(model, tmp_path / "fp4")
    again, _ = load_adapted(base, tmp_path / "fp4", torch.float32)
    assert {layer.base.stored_as for layer in adapter_layers(again).values()} == {"fp4, block_size=32"}

    inject(model, ["k_proj"], lambda y: lora_layer(y, r=2, alpha=4))
    save_adapter(model, tmp_path / "mixed")
    with pytest.raises(ValueError, match="no base can be kept as 'floats; fp4, block_size=32': known is what looks"):
        load_adapted(base, tmp_path / "mixed", torch.float32)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("adalora", "all-linear"),
        ("ia3", ["k_proj", "v_proj", "down_proj"]),
        ("houlsby", ["o_proj", "down_proj"]),
        ("prefix", "all-linear"),
        ("prompt", "all-linear"),
    ],
)
def test_every_method_is_opened_over_what_it_was_trained_over(name, targets, base, tmp_path, capsys):
    def saved(folder, *, in_4_bits):
        model, _ = load_model(base)
        if in_4_bits:
            inject(model, targets, NF4Linear)
        put_new(model, name, Settings(r=2, bottleneck=3, n_virtual=3))
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        METHODS[name].save(model, tmp_path / folder, base_name="base", base_sha256=model.origin.sha256)
        return logits(model)

    def opened(folder, method=None):
        return logits(load_adapted(base, tmp_path / folder, torch.float32, method)[0])

    over_4_bits, over_floats = saved("bits", in_4_bits=True), saved("floats", in_4_bits=False)
    assert (over_4_bits - over_floats).abs().max() > 1e-3
    assert torch.equal(opened("bits"), over_4_bits)
    assert f"was trained over {DEFAULT_FORM}: so it stands here" in capsys.readouterr().err
    assert torch.equal(opened("floats"), opened("floats", "lora")) and torch.equal(opened("floats"), over_floats)
    assert torch.equal(opened("floats", "qlora"), over_4_bits)  # of the same numbers, as it is told
    with pytest.warns(UserWarning, match="it answers worse there than it was trained to"):
        assert torch.equal(opened("bits", "lora"), over_floats)


def test_a_folder_in_bitsandbytes_4_bits_is_trained_over_and_opened(base, tmp_path, capsys):
    model, _ = load_model(base)
    inject(model, "all-linear", lambda linear: QLoRALinear(linear, r=1, alpha=1))
    for name, layer in adapter_layers(model).items():
        model.set_submodule(name, layer.base)
    save_4_bit(model, tmp_path / "bnb", like=base)
    assert torch.equal(logits(load_base(tmp_path / "bnb", torch.float32)[0]), logits(model))

    data, out = write_data(tmp_path / "data.jsonl", 6), tmp_path / "out"
    words = ["train", "--base", str(tmp_path / "bnb"), "--data", str(data), "--out", str(out), "--dtype", "fp32"]
    assert cli.main(words) == 2
    assert "holds its weights in 4 bits: --method qlora trains over them" in capsys.readouterr().err
    assert cli.main([*words, "--method", "qlora", "--lr", "0.05"]) == 0
    assert cli.main(["chat", "Hello?", "--base", str(tmp_path / "bnb"), "--adapter", str(out)]) == 0
    merged = tmp_path / "merged"
    assert cli.main(["merge", "--base", str(tmp_path / "bnb"), "--adapter", str(out), "--out", str(merged)]) == 0
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    adapted, _ = load_adapted(tmp_path / "bnb", out, torch.float32)
    close = (logits(load_model(merged)[0]) - logits(adapted)).abs().max()  # merged into bfloat16: 2⁻⁸ of a weight
    assert close < 0.05


@pytest.fixture
def bare(base, tmp_path):
    """A base model: no chat template, and an eos that is not ChatML's end."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    settings["eos_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.5}))
    return folder


def test_a_merged_model_ends_its_answers_as_the_adapter_learnt_to(bare, tmp_path):
    data, out = write_data(tmp_path / "data.jsonl", 6), tmp_path / "out"
    words = ["--base", str(bare), "--out"]
    assert cli.main(["train", *words, str(out), "--data", str(data), "--template", "chatml"]) == 0
    words = ["--base", str(bare), "--adapter", str(out), "--out"]
    assert cli.main(["merge", *words, str(tmp_path / "merged")]) == 0
    assert cli.main(["export", *words, str(tmp_path / "merged.gguf")]) == 0

    end = load_tokenizer(bare).control_tokens["<|im_end|>"]
    assert json.loads((tmp_path / "merged/tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    generation = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert generation == {"eos_token_id": sorted([0, end]), "temperature": 0.5}
    fields = gguf.GGUFReader(tmp_path / "merged.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == end


def test_an_adapter_without_a_template_keeps_the_bases_end(bare, tmp_path):
    model, _ = load_model(bare)
    inject(model, ["q_proj"], lambda y: lora_layer(y, r=2, alpha=4))
    adapter_layers(model)["model.layers.0.self_attn.q_proj"].B.data.normal_()
    save_adapter(model, tmp_path / "adapter")
    words = ["--base", str(bare), "--adapter", str(tmp_path / "adapter"), "--out"]
    assert cli.main(["merge", *words, str(tmp_path / "merged"), "--dtype", "fp32"]) == 0

    for name in ("tokenizer_config.json", "generation_config.json"):
        assert json.loads((tmp_path / "merged" / name).read_text()) == json.loads((bare / name).read_text())


def test_a_template_is_named_where_the_file_lost_it(bare, tmp_path, capsys):
    model, _ = load_model(bare)
    inject(model, ["q_proj"], lambda y: lora_layer(y, r=2, alpha=4))
    save_adapter(model, tmp_path / "adapter")
    words = ["chat", "Hello?", "--base", str(bare), "--adapter", str(tmp_path / "adapter")]
    assert cli.main(words) == 2
    assert "has no chat template" in capsys.readouterr().err
    assert cli.main([*words, "--template", "chatml"]) == 0
