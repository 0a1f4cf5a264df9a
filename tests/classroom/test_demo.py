"""The demo, whole, over a tiny untrained model with the real tokenizer; and over the real one, where time is given."""

import argparse
import html.parser
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from minilora.classroom.demo import (
    Settings,
    main_from_args,
    merge_relative_error,
    peak_memory_bytes,
    replaced,
    run_demo,
    update_spectrum,
)
from minilora.classroom.report import directions_used, marked_difference, report_html
from minilora.llm import smollm2
from minilora.llm.config import ModelConfig
from minilora.llm.load import load_model
from minilora.llm.model import Decoder, Origin
from minilora.llm.tokenizer import load_tokenizer
from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRALinear, inject
from minilora.torch_lora.inject import ALL_LINEAR, adapter_layers
from minilora.train.adapted import put_adapter
from minilora.train.extraction import KEYS

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


def tiny_model(vocab_size=64, seed=0):
    config = ModelConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, n_layers=2, n_heads=2, n_kv_heads=1
    )
    torch.manual_seed(seed)
    return Decoder(config, Origin(name="tiny", license="none", attribution="nobody", published_sha256="0" * 64))


def load_tiny(name, dtype):
    tokenizer = load_tokenizer(smollm2.fetch())
    return tiny_model(len(tokenizer)).to(dtype), tokenizer


def with_adapter(model, wrap=LoRALinear, size=0.1):
    inject(model, ALL_LINEAR, lambda base: wrap(base, r=4, alpha=8))
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.B, std=size)
    return model


def small(**settings):
    return Settings(steps=4, r=2, n_eval=3, perplexity_tokens=512, **settings)


def small_run(method, out):
    """A demo of four steps, and its folder."""
    return run_demo(small(method=method, out=out), load_tiny, lambda text: None), out


@pytest.fixture(scope="module")
def qlora(tmp_path_factory):
    return small_run("qlora", tmp_path_factory.mktemp("qlora"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return small_run("lora", tmp_path_factory.mktemp("lora"))


@pytest.fixture(params=["qlora", "lora"])
def run(request):
    return request.getfixturevalue(request.param)


def test_the_numbers_are_those_that_were_promised(run):
    result, _ = run
    numbers = json.loads(json.dumps(result.numbers()))

    assert {
        "method", "steps", "n_eval", "exact_before", "exact_after", "valid_json_after", "trainable", "total", "seconds",
        "peak_gib", "merge_relative_error", "merge_relative_error_bf16", "adapter_path", "perplexity_base",
        "perplexity_nf4", "perplexity_after",
    } <= numbers.keys()  # fmt: skip
    assert numbers["steps"] == 4 and numbers["n_eval"] == 3
    assert 0 <= numbers["exact_before"] <= numbers["valid_json_before"] <= 1


def test_every_linear_layer_but_the_head_is_trained(run):
    result, _ = run
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]

    assert result.trainable == 2 * sum(2 * (n_in + n_out) for n_in, n_out in shapes)
    assert result.total - result.trainable == sum(p.numel() for p in tiny_model(49152).parameters())


def test_the_adapter_on_disk_is_the_one_that_was_trained(run):
    result, out = run
    model = tiny_model(49152)
    put_adapter(model, out / "adapter")

    reloaded = {name: update_spectrum(layer) for name, layer in adapter_layers(model).items()}
    assert reloaded == result.spectrum
    assert all(values[0] > 0 for values in reloaded.values())


def test_merging_is_exact_but_for_rounding(run):
    result, _ = run

    assert result.merge_relative_error < 1e-4 < result.merge_relative_error_bf16


def test_the_same_seed_gives_the_same_run(qlora, tmp_path):
    result, _ = qlora
    again, _ = small_run("qlora", tmp_path)

    assert [step.loss for step in again.training.steps] == [step.loss for step in result.training.steps]
    assert again.spectrum == result.spectrum


class Page(html.parser.HTMLParser):
    """What a browser would fetch, and what it would show."""

    def __init__(self, text):
        super().__init__()
        self.images, self.fetched, self.tags, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values)
        self.fetched += [url for key in ("src", "href") if (url := values.get(key)) and not url.startswith("data:")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_file(qlora):
    page = Page((qlora[1] / "report.html").read_text())

    assert page.fetched == []
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in (qlora[1] / "report.html").read_text()


def test_every_figure_says_what_it_shows(qlora):
    page = Page((qlora[1] / "report.html").read_text())

    assert len(page.images) == 2
    assert all(len(image["alt"]) > 80 for image in page.images)
    assert page.tags.count("figcaption") == 2


def test_the_report_says_that_nf4_rounds_a_second_time(run):
    result, out = run
    text = " ".join(Page((out / "report.html").read_text()).text.split())

    assert "published in Q4_1" in text and "rounds a second time" in text
    assert f"{result.perplexities.base:.2f}" in text and f"{result.perplexities.nf4:.2f}" in text


def test_what_a_model_writes_stays_text(qlora):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    answers = [evil, json.dumps(dict.fromkeys(KEYS, evil)), ""]
    page = Page(report_html(replace(qlora[0], before=answers, after=answers)))

    assert "script" not in page.tags and len(page.images) == 2
    assert evil in page.text


def test_a_letter_too_few_is_struck_through_and_one_too_many_is_marked():
    assert marked_difference("Tob & Anna", "Tobi & Ana") == "Tob<del>i</del> &amp; An<mark>n</mark>a"


def test_the_spectrum_is_that_of_the_whole_update():
    layer = LoRALinear(nn.Linear(48, 32), r=4, alpha=8)
    nn.init.normal_(layer.B)
    whole = torch.linalg.svdvals(layer.delta_weight().double())

    assert update_spectrum(layer) == pytest.approx(whole[:4].tolist(), rel=1e-5)  # delta_weight is float32


def test_an_update_of_zero_has_no_directions_and_no_crash():
    layer = LoRALinear(nn.Linear(48, 32), r=4, alpha=8)

    assert update_spectrum(layer) == [0.0] * 4
    assert directions_used([0.0] * 4) <= 4


@pytest.mark.parametrize("wrap", [LoRALinear, QLoRALinear])
def test_the_merge_error_is_rounding_in_float32_and_more_in_bfloat16(wrap):
    model = with_adapter(tiny_model().bfloat16(), wrap)
    in_bf16 = merge_relative_error(model, PROMPTS)

    assert merge_relative_error(model.float(), PROMPTS) < 1e-4 < in_bf16 < 0.5


def test_an_adapter_lost_in_merging_would_be_seen(monkeypatch):
    model = with_adapter(tiny_model())
    monkeypatch.setattr(LoRALinear, "fused", lambda layer, dtype: layer.base)

    assert merge_relative_error(model, PROMPTS) == 1.0  # all that the adapter does is gone


def test_measuring_the_merge_leaves_the_model_alone():
    model = with_adapter(tiny_model())
    before = dict(model.named_modules())
    merge_relative_error(model, PROMPTS)

    assert dict(model.named_modules()) == before


def test_replaced_modules_come_back_even_after_an_error():
    model = tiny_model()
    own = model.lm_head
    with pytest.raises(KeyError), replaced(model, {"lm_head": nn.Identity()}):
        assert isinstance(model.lm_head, nn.Identity)
        raise KeyError

    assert model.lm_head is own


def test_peak_memory_sees_a_large_tensor():
    before = peak_memory_bytes()
    torch.ones(before // 4)  # four bytes each: as much again

    assert peak_memory_bytes() > 1.5 * before


def test_impossible_settings_are_refused_all_at_once():
    with pytest.raises(ValueError) as error:
        Settings(method="dora", steps=0, r=0, lr=0.0, n_eval=0)

    assert re.findall(r"(?:^|; )(\w+) is ", str(error.value)) == ["method", "steps", "r", "lr", "n_eval"]
    assert "the methods are ['lora', 'qlora']" in str(error.value)


def test_the_command_line_prints_where_everything_is_and_writes_the_numbers(tmp_path, capsys):
    names = ("method", "r", "lr", "seed")
    args = argparse.Namespace(
        **dict.fromkeys(names), steps=2, n_eval=2, out=str(tmp_path), json=str(tmp_path / "n.json")
    )

    assert main_from_args(args, load_tiny) == 0
    assert json.loads((tmp_path / "n.json").read_text())["steps"] == 2
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "n.json", "report.html"]


@pytest.mark.long
@pytest.mark.parametrize(("method", "goal"), [("lora", 0.95), ("qlora", 0.90)])
def test_the_demo_keeps_its_word(tmp_path, method, goal):
    """Up to chance: a share of 200 answers scatters, and 16-bit rounding differs from processor to processor."""
    standard_error = (goal * (1 - goal) / 200) ** 0.5
    numbers = run_demo(Settings(method=method, out=tmp_path), load_model).numbers()

    assert numbers["exact_before"] <= 0.05
    assert numbers["exact_after"] >= goal - 3 * standard_error
    assert numbers["merge_relative_error"] < 1e-4
