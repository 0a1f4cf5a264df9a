"""`minilora check` as its user meets it."""

import json

import pytest

from minilora import cli
from minilora.llm.load import model_folder
from minilora.llm.tokenizer import load_tokenizer
from minilora.train.check import check_data, view, visible
from minilora.train.jsonl import read_samples


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder("smollm2-135m"))


def written(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def row(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def test_good_data_has_no_problem(tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", row("1?", "One."), row("2?", "Two of them."))

    assert cli.main(["check", str(data)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 samples\ntokens    ") and out.endswith("no problem found\n")


def test_every_kind_of_problem_is_told_with_its_lines(tmp_path, capsys):
    test = written(tmp_path / "test.jsonl", row("6?", "Six."), "{")
    data = written(
        tmp_path / "data.jsonl",
        row("1?", "One."),
        "{not json",
        row("1?", "One."),
        row("4?", ""),
        row("5? " * 40, "Five."),
        row("6?", "Another six."),
        row("7?", "Seven.<|im_end|>"),
        row("1?", "One."),
    )

    assert cli.main(["check", str(data), "--against", str(test), "--max-tokens", "60"]) == 1
    out = capsys.readouterr().out.splitlines()
    problems = [line.removeprefix("problem   ") for line in out if line.startswith("problem")]
    assert [problem.split(":")[0] for problem in problems] == [
        "line 2", "lines 3 (1), 8 (1)", "line 4", "line 5", "line 6 (1)", "line 7",
    ]  # fmt: skip
    for problem, told in zip(
        problems,
        ["it is not JSON, at character 2 of 9", "the same as an earlier line", "an empty answer", "more than 60 tokens",
         f"its question is asked in {test} too", "its answer has the letters <|im_end|>"],
        strict=True,
    ):  # fmt: skip
        assert told in problem
    assert f"note      1 lines of {test} cannot be read" in out and out[-1] == "7 problems found"


def test_what_is_asked_twice_or_not_at_all_is_told(tmp_path, capsys):
    data = written(
        tmp_path / "data.jsonl", row("1?", "One."), row("1?", "Two."), row(" ", "Three."), row("4?", "Four.")
    )

    assert cli.main(["check", str(data)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert "note      line 2 (1): asked in an earlier line too (in brackets), with another answer" in out
    assert [line for line in out if line.startswith("problem")] == [
        "problem   line 3: its question is empty: nothing but the answer would be learnt"
    ]
    assert out[-1] == "1 problem found"


def test_a_file_without_a_sample_is_a_problem(tmp_path, capsys):
    assert cli.main(["check", str(written(tmp_path / "data.jsonl"))]) == 1
    assert "the file holds no sample" in capsys.readouterr().out


def test_one_array_of_objects_is_told_from_lines(tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps([row("1?", "One.")], indent=2))
    assert cli.main(["check", str(tmp_path / "data.json")]) == 2
    assert "is one JSON array: write each of its objects on a line of its own" in capsys.readouterr().err


def test_a_leak_is_found_whatever_its_case_its_spaces_its_system_text_and_its_turn(tmp_path, capsys):
    question = "Which river runs through Basel?"
    turns = [("user", "Hello."), ("assistant", "Hi."), ("user", question), ("assistant", "The Rhine.")]
    data = written(
        tmp_path / "data.jsonl",
        row(question.upper() + " ", "Rhine"),
        row(question, "Rhine") | {"system": "Be brief."},
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        row("Which river runs through Bern?", "Aare"),
        row("Why?", "Because."),
    )
    test = written(
        tmp_path / "test.jsonl",
        row(question, "the Rhine"),
        {"messages": [{"role": r, "content": t} for r, t in [("user", "a"), ("assistant", "b")] * 2]},
    )

    assert cli.main(["check", str(data), "--against", str(test)]) == 1
    out = capsys.readouterr().out
    assert out.count("its question is asked in") == 1 and "problem   lines 1 (1), 2 (1), 3 (1): its question" in out


def test_a_length_that_95_of_100_stay_below_is_one_that_there_is(tmp_path, tokenizer):
    data = written(tmp_path / "data.jsonl", row("1?", "One."), row("so " * 200, "Two."))
    report = check_data(data, tokenizer, "model", 8192)
    most = max(len(sample.tokens) for sample in report.samples)

    assert int(str(report).split("95 of 100 below ")[1].split()[0]) <= most


def test_the_figures_are_those_of_the_samples(tmp_path, tokenizer):
    data = written(tmp_path / "data.jsonl", *(row("a" * n, "b" * n) for n in range(1, 30)))
    samples = read_samples(data, tokenizer)
    lengths = sorted(len(sample.tokens) for sample in samples)
    report = str(check_data(data, tokenizer, "model", 8192))

    assert f"tokens    {sum(lengths):,}: {lengths[0]} to {lengths[-1]} (line " in report
    assert f"median {lengths[14]}, " in report


def test_the_view_shows_what_is_learnt(tmp_path, tokenizer):
    (sample,) = read_samples(written(tmp_path / "data.jsonl", row("Hi", "Yes, I do.")), tokenizer)
    plain, coloured = (view(sample, tokenizer, color=color) for color in (False, True))

    assert plain.endswith("|ass|istant|⏎\n⟦Yes|,| I| do|.|<|im_end|>⟧")
    assert coloured.endswith("\x1b[30;42m.\x1b[0m\x1b[30;42m<|im_end|>\x1b[0m")
    assert "\x1b[2mHi\x1b[0m" in coloured


def test_a_line_is_shown_and_one_that_is_not_there_is_told(tmp_path, capsys):
    data = written(tmp_path / "data.jsonl", row("Hi", "Yes."))

    assert cli.main(["check", str(data), "--show", "1", "7"]) == 0
    out = capsys.readouterr().out
    assert "⟦Yes|.|<|im_end|>⟧" in out and "no sample is in line 7" in out


def test_text_from_a_file_does_not_command_the_terminal():
    assert visible("a\x1b[2J\x07b\tc\u202e\n") == "a\\x1b[2J\\x07b\\tc\\u202e⏎\n"
