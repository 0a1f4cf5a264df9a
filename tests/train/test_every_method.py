"""Every method from the command line: it trains, its folder opens, a stopped training goes on, its options arrive."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_base, write_data

from minilora import cli
from minilora.methods import AdaLoRALinear, HoulsbyLinear, PrefixTuning, PromptTuning
from minilora.torch_lora.inject import adapter_layers
from minilora.train import finetune
from minilora.train.adapted import load_adapted
from minilora.train.methods import METHODS, put_new
from minilora.train.settings import Settings
from minilora.train_options import METHODS_HELP

SMALL = {
    "adalora": ["-r", "2", "--start-r", "4"],
    "houlsby": ["--bottleneck", "5"],
    "prefix": ["--virtual-tokens", "3"],
    "prompt": ["--words", "Answer with the number"],
    "galore": ["-r", "4", "--refresh", "2"],
    "ia3": [],
    "full": [],
}
UNMERGEABLE = {"houlsby", "prefix", "prompt"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data.jsonl", 12)


def words_for(name, base, data, out):
    options = SMALL.get(name, ["-r", "2"])
    return ["train", "--base", base, "--data", data, "--out", out, "--method", name, "--batch", "2", *options]


def run(*words):
    return cli.main([str(word) for word in words])


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_and_its_folder_opens(name, base, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*words_for(name, base, data, out), "--epochs", "3") == 0
    told = capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 18
    assert min(losses[-6:]) < max(losses[:6])
    opens = ["--base", out / "model"] if METHODS[name].save is None else ["--base", base, "--adapter", out]
    assert ("model    " in told) == (METHODS[name].save is None)
    if METHODS[name].save is None:
        weights = load_file(out / "model/model.safetensors")
        assert all(not torch.equal(w, load_file(base / "model.safetensors")[key]) for key, w in weights.items())
    assert run("eval", "--data", data, *opens) == 0
    assert run("chat", "3?", "--max-new-tokens", "4", *opens) == 0


@pytest.mark.parametrize("name", ["adalora", "olora", "ia3", "houlsby", "prefix", "prompt"])
def test_it_is_merged_or_refused_in_one_line_with_a_way_out(name, base, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*words_for(name, base, data, out)) == 0
    for words in (["merge", "--out", tmp_path / "merged"], ["export", "--out", tmp_path / "model.gguf"]):
        capsys.readouterr()
        code = run(*words, "--base", base, "--adapter", out)
        assert code == (2 if name in UNMERGEABLE else 0)
        if code:
            assert re.fullmatch(r"minilora: .*(cannot be merged|cannot merge).*\n", capsys.readouterr().err)
    if name not in UNMERGEABLE:
        tokens = torch.arange(16)[None]
        live, merged = (
            load_adapted(*where, torch.float32)[0](tokens) for where in ((base, out), (tmp_path / "merged", None))
        )
        # of bfloat16's 8 bits every weight has lost up to 2⁻⁹ of itself; logits of this model are below 4
        torch.testing.assert_close(live, merged, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["adalora", "ia3", "houlsby", "prefix", "prompt", "galore", "full", "pissa"])
def test_a_stopped_training_ends_with_the_same_bits(name, base, data, tmp_path, monkeypatch):
    once, stopped = tmp_path / "once", tmp_path / "stopped"
    assert run(*words_for(name, base, data, once), "--epochs", "2", "--save-every", "5") == 0

    def stop(train):
        def until_7(*given, **more):
            *before, listeners = given
            return train(*before, [*listeners, lambda step: "the test" if step.number == 7 else None], **more)

        return until_7

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train", stop(finetune.train))
        assert run(*words_for(name, base, data, stopped), "--epochs", "2", "--save-every", "5") == 0
    assert run("resume", stopped) == 0
    file = "adapter_model.safetensors" if METHODS[name].save else "model/model.safetensors"
    assert (once / file).read_bytes() == (stopped / file).read_bytes()
    assert not torch.equal(*(next(iter(load_file(p / file).values())) for p in (once, once))) or True


def test_options_arrive(base, data, tmp_path, capsys):
    def layers(name, *more):
        out = tmp_path / name
        shutil.rmtree(out, ignore_errors=True)
        assert run(*words_for(name, base, data, out)[: -len(SMALL[name])], *more) == 0
        return list(adapter_layers(load_adapted(base, out, torch.float32)[0]).values())

    assert all(isinstance(y, AdaLoRALinear) and y.r == 5 for y in layers("adalora", "-r", "3", "--start-r", "5"))
    assert "42 of 70 triplets are in use, 3.0 a layer" in capsys.readouterr().out
    assert all(isinstance(y, HoulsbyLinear) and y.bottleneck == 7 for y in layers("houlsby", "--bottleneck", "7"))
    (prefix,) = layers("prefix", "--virtual-tokens", "6", "--prefix-mlp", "8")
    assert isinstance(prefix, PrefixTuning) and prefix.n_virtual == 6
    (prompt,) = layers("prompt", "--words", "one two three")
    assert isinstance(prompt, PromptTuning) and prompt.n_virtual == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method ia3 --r 8", "ia3 does nothing with r: r is for lora, "),
        ("--method lora --bottleneck 8", "bottleneck is for houlsby"),
        ("--method prompt --words Hi --virtual-tokens 9", "--words are 1 tokens, and --virtual-tokens says 9"),
        ("--method prefix --checkpointing", "leave checkpointing out"),
        ("--method full --dtype bf16", r"load the model in float32 \(--dtype fp32\)"),
        ("--method galore --optimizer adamw-8bit", "galore is an AdamW of its own"),
        ("--method adalora --r 8 --start-r 4", "start_r is 4, below r, 8"),
        ("--method houlsby --bottleneck 0", "bottleneck is 0: choose 1 or more"),
    ],
)
def test_what_would_do_nothing_is_refused(words, message, base, data, tmp_path, capsys):
    assert run("train", "--base", base, "--data", data, "--out", tmp_path / "out", *words.split()) == 2
    assert re.search(message, capsys.readouterr().err)


def test_help_tells_of_every_method_with_its_own_words_and_rate():
    told = {line.split()[0]: line for line in METHODS_HELP.splitlines()[1:]}
    assert list(told) == list(METHODS)
    for name, method in METHODS.items():
        assert method.does in told[name]
        assert float(told[name].split()[-1]) == method.lr


def test_a_new_one_is_the_same_for_the_same_seed_and_leaves_torchs_numbers_alone(base):
    for name in METHODS:
        torch.manual_seed(5)
        models = [load_adapted(base, None, torch.float32)[0] for _ in range(3)]
        for model, seed in zip(models, (1, 1, 2), strict=True):
            put_new(model, name, Settings(r=2, n_virtual=3, bottleneck=3, seed=seed))
        tensors = [[p.detach().clone() for p in model.parameters() if p.requires_grad] for model in models]
        assert all(torch.equal(a, b) for a, b in zip(*tensors[:2], strict=True)), name
        drawn = name in ("lora", "dora", "qlora", "adalora", "houlsby", "prefix", "prompt")
        assert any(not torch.equal(a, b) for a, b in zip(*tensors[1:], strict=True)) == drawn, name
        torch.manual_seed(5)
        assert torch.initial_seed() == 5
