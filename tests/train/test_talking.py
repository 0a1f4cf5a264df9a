"""`minilora chat` and `minilora eval` as their user meets them, on a model of a few thousand weights."""

import io
import json

import pytest
from tiny_run import write_base, write_data

from minilora import cli
from minilora.train import chat
from minilora.train.chat import say
from minilora.train.compare import split_last_answer
from minilora.train.data import Sample, mask_prompt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    data, out = write_data(folder / "data.jsonl", 6), folder / "out"
    options = ["--template", "plain", "--lr", "0.05", "--epochs", "3", "-r", "4", "--dtype", "fp32"]
    assert cli.main(["train", "--base", str(base), "--data", str(data), "--out", str(out), *options]) == 0
    return out


def test_a_question_of_the_command_line_is_answered(base, capsys):
    words = ["chat", "--base", str(base), "Hello?", "--max-new-tokens", "5"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert cli.main(words) == 0

    assert first.strip() and capsys.readouterr().out == first


def test_each_line_of_a_pipe_is_a_question_and_earlier_ones_are_remembered(base, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\n\nTwo?\n"))
    heard = []

    def stream(model, prompt, **settings):
        heard.append(prompt)
        return iter([100 + len(heard)])

    monkeypatch.setattr(chat, "stream", stream)
    assert cli.main(["chat", "--base", str(base), "--system", "Be brief."]) == 0
    _, tokenizer = chat.load_adapted(str(base), None, chat.torch.float32)
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": tokenizer.decode([101])},
        {"role": "user", "content": "Two?"},
    ]

    assert heard == [tokenizer.encode_chat(talk[:2]), tokenizer.encode_chat(talk)]


def test_the_template_that_an_adapter_was_trained_with_comes_with_it(base, adapter, monkeypatch, capsys):
    heard = []
    monkeypatch.setattr(chat, "stream", lambda model, prompt, **settings: iter(heard.append(prompt) or []))
    assert cli.main(["chat", "Hello?", "--base", str(base), "--adapter", str(adapter)]) == 0
    _, tokenizer = chat.load_adapted(str(base), None, chat.torch.float32)

    assert heard == [tokenizer.encode("Hello?")]


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(capsys):
    def pieces():
        yield "It is"
        raise KeyboardInterrupt

    assert say(pieces()) == "It is"
    assert capsys.readouterr().out == "It is …\n"


def test_an_answer_does_not_command_the_terminal(capsys):
    assert say(iter(["a\x1b[2J"])) == "a\x1b[2J"
    assert capsys.readouterr().out == "a�[2J\n"


def test_base_and_adapter_are_graded_side_by_side(base, adapter, tmp_path, capsys):
    data, numbers = write_data(tmp_path / "data.jsonl", 6), tmp_path / "grades.json"
    words = ["eval", "--data", str(data), "--base", str(base), "--adapter", str(adapter), "--template", "plain"]
    assert cli.main([*words, "--json", str(numbers)]) == 0
    out = capsys.readouterr().out.splitlines()
    grades = json.loads(numbers.read_text())

    assert out[0].split() == ["6", "samples", "base", "adapter"]
    assert grades["adapter"]["loss"] < grades["base"]["loss"]
    gained = grades["base"]["loss"] - grades["adapter"]["loss"]
    assert out[-1].startswith(f"gained {gained:.3f} nats, forgot ")


def test_the_last_answer_is_what_is_compared():
    single = mask_prompt([1, 2], [3, 4], eos=0)
    double = Sample([1, 2, 0, 5, 6, 0], [-100, 2, 0, -100, 6, 0])

    assert split_last_answer(single) == ([1, 2], [3, 4, 0])
    assert split_last_answer(double) == ([1, 2, 0, 5], [6, 0])
