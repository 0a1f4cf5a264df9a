"""`minilora chat` and `minilora eval` as their user meets them, on a model of a few thousand weights."""

import io
import json

import pytest
from tiny_run import write_base, write_data

from minilora import cli
from minilora.train import chat, evaluate
from minilora.train.chat import say, shortened
from minilora.train.compare import split_last_answer
from minilora.train.data import Sample, make_batches, mask_prompt
from minilora.train.evaluate import mean_loss
from minilora.train.jsonl import read_samples
from minilora.train.templates import with_template


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


def test_a_template_that_takes_one_question_is_asked_the_last(base, tmp_path, capsys, monkeypatch):
    (tmp_path / "adapter").mkdir()
    _, tokenizer = chat.load_adapted(str(base), None, chat.torch.float32)
    alpaca = with_template(tokenizer, "alpaca")
    talk = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2"), ("user", "3"))]

    left, prompt = shortened(talk, alpaca, most=100)
    assert left == talk[2:] and prompt == alpaca.encode_chat(talk[2:])
    assert "forgets the question before: the chat template failed: Alpaca knows one question" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Alpaca knows one question"):
        shortened([{"role": "system", "content": "Be brief."}, talk[0]], alpaca, most=100)


def test_a_talk_as_long_as_the_model_forgets_its_beginning(base, capsys):
    _, tokenizer = chat.load_adapted(str(base), None, chat.torch.float32)
    system = {"role": "system", "content": "Be brief."}
    talk = [system, *({"role": role, "content": "so " * 50} for _ in range(9) for role in ("user", "assistant"))][:-1]
    whole = tokenizer.encode_chat(talk)

    left, prompt = shortened(talk, tokenizer, most=len(whole) - 1)
    assert left == [system, *talk[3:]] and prompt == tokenizer.encode_chat(left)
    assert "as long as the model can read" in capsys.readouterr().out
    assert shortened(talk, tokenizer, most=len(whole)) == (talk, whole)


def test_a_prompt_that_leaves_less_room_than_the_longest_answer_is_answered_all_the_same(base, tmp_path):
    rows = [{"prompt": "so " * 450, "completion": "yes"}, {"prompt": "so", "completion": "no " * 150}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    assert cli.main(["eval", "--data", str(data), "--base", str(base)]) == 0


def test_a_long_prompt_does_not_shorten_the_answers_beside_it(base, monkeypatch):
    model, tokenizer = chat.load_adapted(str(base), None, chat.torch.float32)
    asked = [[7] * 508, [8] * 3, [9] * 4, [7] * 500]
    seen = []

    def generate(model, batch, max_new_tokens, stop_tokens):
        seen.append((batch, max_new_tokens))
        return [[0]] * len(batch)

    monkeypatch.setattr(evaluate, "generate", generate)
    evaluate.generate_answers(model, tokenizer, asked, 100)
    assert seen == [([asked[1], asked[2]], 100), ([asked[3]], 12), ([asked[0]], 4)]


def test_samples_that_the_model_cannot_read_are_not_graded(base, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "so " * 600, "completion": "yes"}))
    assert cli.main(["eval", "--data", str(data), "--base", str(base)]) == 2
    assert "and the model was made for 512: shorten it, or drop it" in capsys.readouterr().err


def test_the_input_of_a_question_goes_where_the_template_wants_it(base, monkeypatch):
    heard = []
    monkeypatch.setattr(chat, "stream", lambda model, prompt, **settings: iter(heard.append(prompt) or []))
    words = ["chat", "Translate.", "--input", "chat", "--base", str(base), "--template"]
    for template in ("alpaca", "plain"):
        assert cli.main([*words, template]) == 0
    _, tokenizer = chat.load_adapted(str(base), None, chat.torch.float32)
    alpaca = with_template(tokenizer, "alpaca")
    asked = [{"role": "user", "content": "Translate.", "input": "chat"}]
    assert heard == [alpaca.encode_chat(asked), tokenizer.encode("Translate.\n\nchat")]


def test_an_answer_of_no_tokens_is_refused(base, capsys):
    assert cli.main(["chat", "Hello?", "--base", str(base), "--max-new-tokens", "0"]) == 2
    assert "--max-new-tokens is 0: choose 1 or more" in capsys.readouterr().err


def test_temperature_and_seed_reach_the_drawing(base, capsys):
    def said(*options):
        assert cli.main(["chat", "Hello?", "--base", str(base), "--max-new-tokens", "8", *options]) == 0
        return capsys.readouterr().out

    greedy, warm = said(), ["--temperature", "5"]
    assert said(*warm, "--seed", "1") == said(*warm, "--seed", "1") != said(*warm, "--seed", "2")
    assert said(*warm, "--seed", "1") != greedy
    assert said(*warm, "--seed", "1", "--top-p", "1e-9") == greedy


def test_the_best_adapter_is_left_beside_the_last(base, tmp_path, capsys):
    data, held_out = write_data(tmp_path / "data.jsonl", 12), write_data(tmp_path / "held_out.jsonl", 3)
    out = tmp_path / "out"
    options = ["--lr", "0.05", "--epochs", "6", "-r", "4", "--batch", "4", "--eval-every", "2", "--template", "plain"]
    words = ["train", "--base", str(base), "--data", str(data), "--eval-data", str(held_out), "--out", str(out)]
    assert cli.main([*words, *options]) == 0

    assert f"best     {out / 'best'}" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["target"] for line in lines if "target" in line}
    model, tokenizer = chat.load_adapted(str(base), str(out / "best"), chat.torch.bfloat16)
    samples = read_samples(held_out, tokenizer)
    loss = mean_loss(model, make_batches(samples, 4, tokenizer.pad, seed=0))
    assert loss == pytest.approx(min(measured.values()), rel=1e-6)
