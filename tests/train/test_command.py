"""`minilora train` as its user meets it: an adapter that opens, and refusals before anything is loaded."""

import json

import pytest
import torch

from minilora import cli
from minilora.llm import load_model
from minilora.torch_lora import load_adapter
from minilora.torch_lora.inject import adapter_layers
from minilora.train import command


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


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(data, tmp_path, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.setattr("minilora.doctor.memory_bytes", lambda: (2**35, 400 * 2**20))
    words = ["train", "--data", str(data), "--out", str(tmp_path / "adapter")]

    assert cli.main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("minilora: this run needs 0.")
    assert "0.39 are free; what would fit:\n  --method qlora " in message
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "epochs are 0 and the learning rate is 0.0002: both are above 0"),
        (["--lr", "-1"], "the learning rate is -1.0"),
        (["--base", "nothing"], "there is no model 'nothing'"),
        (["--r", "0"], "r is 0: it must be 1 or more"),
    ],
)
def test_impossible_options_are_refused(words, message, data, tmp_path, capsys):
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path / "adapter"), *words]) == 2
    assert message in capsys.readouterr().err
