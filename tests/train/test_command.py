"""`minilora train` as its user meets it: an adapter that opens, and refusals before anything is loaded."""

import json

import pytest
import torch
from safetensors import safe_open

from minilora import cli
from minilora.llm import load_model
from minilora.qlora import NF4Linear
from minilora.torch_lora import load_adapter
from minilora.torch_lora.inject import adapter_layers
from minilora.train import command
from minilora.train.trainer import Training


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) for n in range(5)))
    return path


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_it_leaves_an_adapter_that_opens(method, data, tmp_path, capsys):
    out = tmp_path / "adapter"
    words = ["train", "--data", str(data), "--out", str(out), "--method", method, "-r", "2", "--batch", "2"]
    assert cli.main([*words, "--lr", "1e-3", "--optimizer", "adamw-8bit", "--checkpointing"]) == 0

    assert "5 samples of up to " in capsys.readouterr().out
    model, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    load_adapter(model, out)
    layers = adapter_layers(model)
    assert len(layers) == 210
    assert all(layer.r == 2 and layer.alpha == 4 and layer.B.any() for layer in layers.values())


def test_every_option_reaches_what_it_is_for(data, tmp_path, monkeypatch):
    seen = {}

    def fine_tune(model, samples, **settings):
        seen.update(settings, model=model, samples=samples)
        return Training([])

    monkeypatch.setattr(command, "fine_tune", fine_tune)
    out = tmp_path / "adapter"
    options = "--method qlora -r 3 --alpha 5 --lr 0.01 --epochs 2 --batch 4 --dtype fp32 --optimizer adamw-8bit"
    words = ["train", "--data", str(data), "--out", str(out), *options.split(), "--checkpointing", "--seed", "6"]
    assert cli.main(words) == 0

    model = seen["model"]
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base, NF4Linear)
    assert (layer.r, layer.alpha, model.model.embed_tokens.weight.dtype) == (3, 5, torch.float32)
    assert model.model.gradient_checkpointing
    assert {name: seen[name] for name in ("lr", "epochs", "batch_size", "state_bits", "seed")} == {
        "lr": 0.01, "epochs": 2, "batch_size": 4, "state_bits": 8, "seed": 6,
    }  # fmt: skip
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["base_sha256"] == model.origin.sha256
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == model.origin.name


def test_what_was_learnt_before_training_broke_off_is_saved(data, tmp_path, monkeypatch, capsys):
    def fine_tune(model, samples, **settings):
        raise FloatingPointError("the loss is nan at step 9")

    monkeypatch.setattr(command, "fine_tune", fine_tune)
    out = tmp_path / "adapter"

    assert cli.main(["train", "--data", str(data), "--out", str(out)]) == 2
    assert "the loss is nan at step 9" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").exists()


def test_a_place_that_cannot_be_written_is_found_before_loading(data, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", None)

    assert cli.main(["train", "--data", str(data), "--out", str(data / "adapter")]) == 2
    assert "data.jsonl" in capsys.readouterr().err


def test_a_sample_longer_than_the_model_was_made_for_is_refused(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a b " * 5000, "completion": "c"}))

    assert cli.main(["train", "--data", str(path), "--out", str(tmp_path / "adapter")]) == 2
    assert "line 1 of " in (message := capsys.readouterr().err)
    assert "and the model was made for 8,192: shorten it, or drop it with --max-tokens" in message


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(data, tmp_path, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.setattr("minilora.doctor.memory_bytes", lambda: (2**35, 400 * 2**20))
    words = ["train", "--data", str(data), "--out", str(tmp_path / "adapter")]

    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("minilora: this run needs 0.")
    assert "0.39 are free; what would fit:\n  --" in message
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "epochs are 0, and a batch of 8 is taken in 1 parts: choose 1 or more of each"),
        (["--batch", "0"], "epochs are 1, and a batch of 0 is taken in 1 parts"),
        (["--accumulate", "9"], "a batch of 8 is taken in 9 parts"),
        (["--save-every", "0"], "cannot save every 0 steps: choose 1 or more"),
        (["--patience", "2"], "judge by samples that are not trained on: give --eval-data"),
        (["--lr", "inf"], "the learning rate is inf: choose one above 0, such as 2e-4"),
        (["--base", "nothing"], "there is no model 'nothing'"),
        (["--base", "a.gguf"], "a.gguf is a GGUF file, made for answering: train on the folder"),
        (["--r", "0"], "r is 0: it must be 1 or more"),
    ],
)
def test_impossible_options_are_refused(words, message, data, tmp_path, capsys):
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path / "adapter"), *words]) == 2
    assert message in capsys.readouterr().err
