"""Every method from the command line: it trains, its folder opens, a stopped training goes on, its options arrive."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import write_base, write_data

from minilora import cli
from minilora.llm import size_command
from minilora.llm.setup import USED_BY
from minilora.llm.tokenizer import load_tokenizer
from minilora.methods import AdaLoRALinear, HoulsbyLinear, PrefixTuning, PromptTuning, RankSchedule, orthogonality
from minilora.torch_lora.inject import adapter_layers
from minilora.train import command, finetune, fits, plan
from minilora.train.adapted import load_adapted
from minilora.train.finetune import Recipe
from minilora.train.methods import GAMMA, METHODS, put_new
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
    assert sum(losses[-6:]) < sum(losses[:6]) - 1e-4  # the same 12 samples, after two epochs between
    opens = ["--base", out / "model"] if METHODS[name].save is None else ["--base", base, "--adapter", out]
    assert ("model    " in told) == (METHODS[name].save is None)
    if METHODS[name].save is None:
        weights = load_file(out / "model/model.safetensors")
        assert all(not torch.equal(w, load_file(base / "model.safetensors")[key]) for key, w in weights.items())
    assert run("eval", "--data", data, *opens) == 0
    assert run("chat", "3?", "--max-new-tokens", "4", *opens) == 0


@pytest.mark.parametrize("name", ["lora", "full"])
def test_what_is_said_of_the_last_and_of_the_best_opens(name, base, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*words_for(name, base, data, out), "--eval-data", data, "--eval-every", "3") == 0
    places = dict(re.findall(r"^(adapter|model|best) +(\S+)   \(", capsys.readouterr().out, re.MULTILINE))
    assert list(places) == ["adapter" if METHODS[name].save else "model", "best"]
    for place in places.values():
        opens = ["--base", base, "--adapter", place] if METHODS[name].save else ["--base", place]
        assert run("chat", "3?", "--max-new-tokens", "1", *opens) == 0


@pytest.mark.parametrize("name", ["adalora", "olora", "ia3", "houlsby", "prefix", "prompt"])
def test_it_is_merged_or_refused_in_one_line_with_a_way_out(name, base, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(*words_for(name, base, data, out), "--lr", "0.1", "--epochs", "3") == 0
    for words in (
        ["merge", "--out", tmp_path / "merged", "--dtype", "fp32"],
        ["export", "--out", tmp_path / "model.gguf"],
    ):
        capsys.readouterr()
        code = run(*words, "--base", base, "--adapter", out)
        assert code == (2 if name in UNMERGEABLE else 0)
        if code:
            assert re.fullmatch(r"minilora: .*(cannot be merged|cannot merge).*\n", capsys.readouterr().err)
    if name not in UNMERGEABLE:
        tokens = torch.arange(16)[None]
        live, merged, plain = (
            load_adapted(*where, torch.float32)[0](tokens)
            for where in ((base, out), (tmp_path / "merged", None), (base, None))
        )
        torch.testing.assert_close(live, merged, rtol=1e-4, atol=1e-4)  # float32, summed in another order
        assert (live - plain).abs().max() > 0.01  # nor is that so because nothing was learnt


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
        ("--method ia3 --r 8", "--method ia3 does nothing with --r: --r is for lora, "),
        ("--method lora --virtual-tokens 8", "--virtual-tokens is for prefix, prompt"),
        ("--method lora --words=", "--words are 0 tokens"),
        ("--method lora --words Hi", "--method lora does nothing with --words: --words is for prefix, prompt$"),
        ("--method prompt --words Hi --virtual-tokens 9", "--words are 1 tokens, .* leave --virtual-tokens out"),
        ("--method prefix --words Hi --prefix-mlp 8", "words and mlp_features exclude each other"),
        ("--method prefix --virtual-tokens 512", "512 virtual tokens leave no room for text"),
        ("--method prefix --virtual-tokens 509", "the model was made for 3"),
        ("--method lora --loraplus-ratio 0.5", "loraplus_ratio is 0.5: choose 1 or more"),
        ("--method galore --galore-scale nan", "galore_scale is nan: choose a number above 0"),
        ("--method prefix --checkpointing", "leave checkpointing out"),
        ("--method full --dtype bf16", "full trains all weights, in bf16 it would lose small steps"),
        ("--method galore --optimizer adamw-8bit", "galore is an AdamW of its own"),
        ("--method adalora --r 8 --start-r 4", "start_r is 4: choose a whole number from r, 8, on"),
        ("--method houlsby --bottleneck 0", "bottleneck is 0: choose a whole number of 1 or more"),
    ],
)
def test_what_would_do_nothing_is_refused(words, message, base, data, tmp_path, capsys):
    assert run("train", "--base", base, "--data", data, "--out", tmp_path / "out", *words.split()) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def learning_of(name, model, **settings):
    asked = Settings(**{"r": 2} | settings)
    put_new(model, name, asked)
    return METHODS[name].learning(asked)(model, Recipe(lr=0.01, batch_size=2, weight_decay=0.5), 20)


def test_what_takes_the_steps_is_what_was_asked_for(base):
    def model():
        return load_adapted(base, None, torch.float32)[0]

    galore = learning_of("galore", model(), r=4, refresh=7, galore_scale=0.5).optimizer
    of_matrices, of_others = galore.param_groups
    assert (of_matrices["r"], of_others["r"]) == (4, None)
    assert all(
        (g["refresh"], g["scale"], g["weight_decay"], g["lr"]) == (7, 0.5, 0.5, 0.01) for g in galore.param_groups
    )
    assert len(of_matrices["params"]) == 14 and all(p.ndim == 2 for p in of_matrices["params"])
    assert any(p.shape == (49152, 16) for p in of_others["params"])  # embeddings and head
    with pytest.raises(ValueError, match="r is 24, and no matrix has both sides above it"):
        learning_of("galore", model(), r=24)

    adapted = model()
    adalora = learning_of("adalora", adapted, r=2, start_r=6, alpha=3.0)
    layer = next(iter(adapter_layers(adapted).values()))
    assert (layer.r, layer.scaling) == (6, 1.5)  # alpha / r, of the r that was asked for
    assert adalora.beside.schedule == RankSchedule(target_r=2, n_steps=20, t_init=2, t_final=6)
    torch.testing.assert_close(adalora.penalty(), GAMMA * orthogonality(adapted))
    for p in adapted.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    adalora.optimizer.step()
    assert adalora.beside.done == 1

    with pytest.raises(ValueError, match="galore is an AdamW of its own, with moments in 32 bits, not 8"):
        METHODS["galore"].learning(Settings(r=4))(model(), Recipe(lr=0.01, batch_size=2, state_bits=8), 20)

    plus = model()
    put_new(plus, "lora", Settings(r=2))
    recipe = Recipe(lr=0.01, batch_size=2, weight_decay=0.5, state_bits=8)
    optimizer = METHODS["lora"].learning(Settings(r=2, loraplus_ratio=4))(plus, recipe, 20).optimizer
    assert optimizer.state_bits == 8
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.5), (0.04, 0.5)]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "alpha" in method.uses])
def test_every_setting_of_a_low_rank_layer_reaches_it(name, base):
    adapted = load_adapted(base, None, torch.float32)[0]
    use_rslora = "use_rslora" in METHODS[name].uses
    put_new(
        adapted, name, Settings(r=2, alpha=6.0, dropout=0.25, use_rslora=use_rslora, targets=["q_proj", "down_proj"])
    )
    layers = adapter_layers(adapted)
    assert len(layers) == 4  # of two decoder layers
    for layer in layers.values():
        assert (layer.dropout, layer.use_rslora) == (0.25, use_rslora)
        assert layer.scaling == pytest.approx(6 / 2**0.5 if use_rslora else 3)


@pytest.mark.parametrize("r", [2, 3, 5])
def test_alpha_is_divided_by_the_r_that_was_asked_for(r, base):
    """Of AdaLoRA's layers, which begin with more, too; 2 r where it is not given."""
    for name in ("lora", "adalora"):
        for alpha, scaling in ((None, 2.0), (7.0, 7.0 / r)):
            adapted = load_adapted(base, None, torch.float32)[0]
            put_new(adapted, name, Settings(r=r, alpha=alpha))
            assert {round(layer.scaling, 12) for layer in adapter_layers(adapted).values()} == {round(scaling, 12)}


def test_virtual_tokens_begin_as_was_asked_for(base):
    def layer(name, **settings):
        model = load_adapted(base, None, torch.float32)[0]
        put_new(model, name, Settings(n_virtual=3, **settings))
        return next(iter(adapter_layers(model).values()))

    plain, words = load_adapted(base, None, torch.float32)[0], [7, 11, 13]
    assert torch.equal(layer("prompt", words=words).P, plain.model.embed_tokens.weight[words])
    assert torch.equal(layer("prefix", words=words).P, PrefixTuning(plain.model, n_virtual=3, words=words).P)
    assert layer("prefix", mlp_features=5).mlp[0].out_features == 5


@pytest.mark.parametrize("options", [[], ["-r", "6", "--dtype", "fp32"]], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_size_takes_for_granted_what_train_does(name, options, base):
    trains, sizes = cli.Parser(), cli.Parser()
    cli._train_arguments(trains)
    cli._size_arguments(sizes)
    words = [*(options if "r" in METHODS[name].uses else options[2:]), "--method", name]
    args = trains.parse_args(["--data", "data", "--out", "out", *words])
    (setup,) = size_command.setups_of(sizes.parse_args(["gpt2", *words]), [name])
    settings = plan.settings_of(args, load_tokenizer(base))
    assert setup.weights_dtype == plan.dtype_of(args)
    if "r" in METHODS[name].uses:
        assert setup.asked_r == settings.r
        assert setup.first_r == (settings.first_r if name == "adalora" else settings.r)
    assert (setup.bottleneck, setup.n_virtual, setup.mlp_features) == (
        settings.bottleneck,
        settings.n_virtual,
        settings.mlp_features,
    )
    assert setup.targets == settings.targets
    for setting, users in USED_BY.items():
        assert setting == "master_weights" or (name in users) == (setting in METHODS[name].uses)


@pytest.mark.parametrize("name", ["full", "galore"])
def test_4_bits_are_proposed_as_they_would_be_trained(name, base, data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "check_fits", lambda arch, setup, *rest: asked.append(setup))
    monkeypatch.setattr(command, "load_base", None)  # it ends there
    with pytest.raises(TypeError):
        run(*words_for(name, base, data, tmp_path / "out")[: -4 if name == "galore" else None])
    ways = {" ".join(options): setup for options, setup in fits.smaller(asked[0])}
    assert (ways["--method qlora"].weights_dtype, ways["--method qlora"].first_r) == ("bf16", 16)
    assert (asked[0].weights_dtype, asked[0].first_r) == ("fp32", 128 if name == "galore" else 16)


def test_help_tells_of_every_method_with_its_own_words_and_rate():
    told = {line.split()[0]: line for line in METHODS_HELP.splitlines()[1:]}
    assert list(told) == list(METHODS)
    for name, method in METHODS.items():
        assert method.does in told[name]
        assert float(told[name].split()[-1]) == method.lr


@pytest.mark.parametrize("name", METHODS)
def test_a_weight_decay_pulls_at_something_or_is_refused(name, base, data, tmp_path, capsys):
    words = [*words_for(name, base, data, tmp_path / "out"), "--weight-decay", "0.1"]
    if METHODS[name].decays:
        groups = learning_of(name, load_adapted(base, None, torch.float32)[0]).optimizer.param_groups
        assert any(group["weight_decay"] == 0.5 for group in groups)
        return
    assert run(*words) == 2
    told = f"--weight-decay pulls to zero, where the model of --method {name} is not the base's: leave it out"
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="nothing that trains here may decay"):
        learning_of(name, load_adapted(base, None, torch.float32)[0])


def test_a_new_one_is_the_same_for_the_same_seed_and_leaves_torchs_numbers_alone(base):
    for name in METHODS:
        models = [load_adapted(base, None, torch.float32)[0] for _ in range(3)]
        torch.manual_seed(5)
        before = torch.get_rng_state()
        for model, seed in zip(models, (1, 1, 2), strict=True):
            put_new(model, name, Settings(r=2, n_virtual=3, bottleneck=3, seed=seed))
        assert torch.equal(torch.get_rng_state(), before), name
        tensors = [[p.detach().clone() for p in model.parameters() if p.requires_grad] for model in models]
        assert all(torch.equal(a, b) for a, b in zip(*tensors[:2], strict=True)), name
        drawn = name in ("lora", "dora", "qlora", "adalora", "houlsby", "prefix", "prompt")
        assert any(not torch.equal(a, b) for a, b in zip(*tensors[1:], strict=True)) == drawn, name
