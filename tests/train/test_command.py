"""`minilora train` as its user meets it: an adapter that opens, and refusals before anything is loaded."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_run import write_base

from minilora import cli
from minilora.llm import load_model
from minilora.llm.load import model_folder
from minilora.llm.tokenizer import load_tokenizer
from minilora.qlora import NF4Linear
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.layers import LoRAEmbedding
from minilora.train import command
from minilora.train.adapted import put_adapter
from minilora.train.jsonl import read_samples
from minilora.train.trainer import Training


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) for n in range(5)))
    return path


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_it_leaves_an_adapter_that_opens(method, data, tmp_path, capsys):
    out = tmp_path / "adapter"
    words = ["train", "--data", str(data), "--out", str(out), "--method", method, "-r", "2", "--batch", "2"]
    assert cli.main([*words, "--lr", "1e-3", "--optimizer", "adamw-8bit", "--checkpointing"]) == 0

    assert "5 samples of up to " in capsys.readouterr().out
    model, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    put_adapter(model, out)
    layers = adapter_layers(model)
    assert {type(layer.base) is NF4Linear for layer in layers.values()} == {method == "qlora"}
    assert {"m" in layer.adapter_tensors() for layer in layers.values()} == {method == "dora"}
    assert len(layers) == 210
    assert all(layer.r == 2 and layer.alpha == 4 and layer.B.any() for layer in layers.values())


# Every option, with another value than its default, and where it is to be found; `seen` is what fine_tune was given.
OPTIONS = {
    "--method qlora": lambda seen, layer: isinstance(layer.base, NF4Linear),
    "--r 3": lambda seen, layer: layer.r == 3,
    "--alpha 5": lambda seen, layer: layer.alpha == 5,
    "--loraplus-ratio 4": lambda seen, layer: len(rates_of(seen)) == 2,
    "--rslora": lambda seen, layer: layer.use_rslora,
    "--targets q_proj,down_proj": lambda seen, layer: len(adapter_layers(seen["model"])) == 60,
    "--dropout 0.25": lambda seen, layer: layer.dropout == 0.25,
    "--dtype fp32": lambda seen, layer: seen["model"].model.embed_tokens.weight.dtype == torch.float32,
    "--checkpointing": lambda seen, layer: seen["model"].model.gradient_checkpointing,
    "--seed 6": lambda seen, layer: seen["recipe"].seed == 6 and torch.initial_seed() == 6,
    "--lr 0.01": lambda seen, layer: seen["recipe"].lr == 0.01,
    "--schedule cosine": lambda seen, layer: seen["recipe"].shape == "cosine",
    "--warmup 0.25": lambda seen, layer: seen["recipe"].warmup == 0.25,
    "--weight-decay 0.5": lambda seen, layer: seen["recipe"].weight_decay == 0.5,
    "--max-grad-norm 0.5": lambda seen, layer: seen["recipe"].max_grad_norm == 0.5,
    "--epochs 2": lambda seen, layer: seen["recipe"].epochs == 2,
    "--batch 4": lambda seen, layer: seen["recipe"].batch_size == 4,
    "--accumulate 2": lambda seen, layer: seen["recipe"].n_parts == 2,
    "--pack 600": lambda seen, layer: seen["recipe"].pack_tokens == 600,
    "--optimizer adamw-8bit": lambda seen, layer: seen["recipe"].state_bits == 8,
    "--save-every 7": lambda seen, layer: seen["saving"].every == 7,
    "--max-tokens 40": lambda seen, layer: max(len(s.tokens) for s in seen["samples"]) <= 40 < seen["longest"],
    "--template plain": lambda seen, layer: seen["samples"][0].tokens[:1] != seen["own"].tokens[:1],
    "--eval-every 3": lambda seen, layer: seen["judged_by"].rules.every == 3,
    "--patience 4": lambda seen, layer: seen["judged_by"].rules.patience == 4,
    "--max-forgetting 0.5": lambda seen, layer: seen["judged_by"].rules.most_forgotten == 0.5,
}
OF_METHODS = {
    "start_r", "bottleneck", "virtual_tokens", "words", "prefix_mlp", "refresh", "galore_scale"
}  # test_every_method  # fmt: skip
ELSEWHERE = {"help", "data", "out", "base", "eval_data", "parallel"} | OF_METHODS  # the tests beside this one


def rates_of(seen):
    learns = seen["learning"](seen["model"], seen["recipe"], 10)
    return {group["lr"] for group in learns.optimizer.param_groups}


def test_every_option_reaches_what_it_is_for(tmp_path, monkeypatch):
    seen = {}

    def fine_tune(model, samples, recipe, **settings):
        seen.update(settings, model=model, samples=samples, recipe=recipe)
        return Training([])

    monkeypatch.setattr(command, "fine_tune", fine_tune)
    out, data = tmp_path / "adapter", tmp_path / "data.jsonl"
    rows = [{"prompt": "word " * n, "completion": "yes"} for n in (3, 4, 5, 60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = read_samples(data, load_tokenizer(model_folder("smollm2-135m")))
    seen |= {"own": samples[0], "longest": max(len(sample.tokens) for sample in samples)}
    options = [word for option in OPTIONS for word in option.split()]
    assert cli.main(["train", "--data", str(data), "--eval-data", str(data), "--out", str(out), *options]) == 0

    layer = seen["model"].model.layers[0].self_attn.q_proj
    assert [option for option, arrived in OPTIONS.items() if not arrived(seen, layer)] == []
    parser = cli.Parser()
    cli._train_arguments(parser)
    names = {option.split()[0].removeprefix("--").replace("-", "_") for option in OPTIONS}
    assert {action.dest for action in parser._actions} == names | ELSEWHERE, "an option that is not looked at here"
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata()["base_sha256"] == seen["model"].origin.sha256
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == seen["model"].origin.name


def test_a_folder_with_other_things_in_it_is_not_trained_into(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("{}")

    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "holds other things, which a training would mix with its own" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]


def test_samples_to_measure_on_are_checked_before_anything_is_loaded(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_base", None)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "a b " * 5000, "completion": "c"}))
    words = ["train", "--data", str(data), "--out", str(tmp_path / "out"), "--eval-data", str(held_out)]

    assert cli.main(words) == 2
    assert "line 1 of " in (message := capsys.readouterr().err)
    assert "held_out.jsonl" in message
    assert not (tmp_path / "out").exists()
    assert cli.main([*words[:-1], str(data), "--patience", "-1"]) == 2
    assert "patience is -1" in capsys.readouterr().err


def test_what_was_learnt_before_training_broke_off_is_saved(data, tmp_path, monkeypatch, capsys):
    def fine_tune(model, samples, recipe, **settings):
        raise FloatingPointError("the loss is nan at step 9")

    monkeypatch.setattr(command, "fine_tune", fine_tune)
    out = tmp_path / "adapter"

    assert cli.main(["train", "--data", str(data), "--out", str(out)]) == 2
    assert "the loss is nan at step 9" in capsys.readouterr().err
    assert (out / "adapter_model.safetensors").exists()


def test_a_place_that_cannot_be_written_is_found_before_loading(data, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_base", None)

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

    monkeypatch.setattr(command, "load_base", load)
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
        (["--epochs", "0"], "epochs is 0: choose 1 or more"),
        (["--batch", "0"], "batch_size is 0: choose 1 or more"),
        (["--accumulate", "9"], "n_parts is 9: choose 1 to batch_size"),
        (["--save-every", "0"], "cannot save every 0 steps: choose 1 or more"),
        (["--patience", "2"], "--patience would do nothing: give --eval-data samples to measure on"),
        (["--lr", "inf"], "lr is inf: choose a number above 0, such as 2e-4"),
        (["--base", "nothing"], "there is no model 'nothing'"),
        (["--base", "a.gguf"], "a.gguf is a GGUF file, made for answering: train on the folder"),
        (["--warmup", "1"], "warmup is 1.0: choose 0 or more, and below 1"),
        (["--targets", "q_proj,q_porj"], "q_porj"),
        (["--eval-every", "5"], "--eval-every would do nothing: give --eval-data samples to measure on"),
        (["--dropout", "1.5"], "dropout is 1.5"),
        (["--rank", "4"], "unrecognized arguments: --rank 4: did you mean --r?"),
        (["--shedule", "cosine"], "unrecognized arguments: --shedule cosine: did you mean --schedule?"),
        (["--r", "0"], "r is 0: it counts the rows of A"),
    ],
)
def test_impossible_options_are_refused(words, message, data, tmp_path, capsys):
    assert cli.main(["train", "--data", str(data), "--out", str(tmp_path / "adapter"), *words]) == 2
    assert message in capsys.readouterr().err


def test_an_embedding_can_be_a_target(data, tmp_path):
    words = ["train", "--data", str(data), "--out", str(tmp_path / "out"), "--targets", "embed_tokens,q_proj"]
    base = write_base(tmp_path / "base")
    assert cli.main([*words, "--base", str(base), "--dropout", "0.1", "--lr", "0.01"]) == 0
    model, _ = load_model(base)
    put_adapter(model, tmp_path / "out")
    layers = adapter_layers(model)
    assert isinstance(layers["model.embed_tokens"], LoRAEmbedding) and layers["model.embed_tokens"].A.any()
