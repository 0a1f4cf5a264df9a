"""Samples out of JSONL: what is learnt, and bad lines named by number."""

import json

import pytest

from minilora.llm.load import model_folder
from minilora.llm.tokenizer import load_tokenizer
from minilora.train.data import IGNORED
from minilora.train.jsonl import conversation, messages_of, read_samples


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder("smollm2-135m"))


def written(tmp_path, *rows):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_the_loss_is_on_the_last_answer_and_its_end(tmp_path, tokenizer):
    path = written(tmp_path, {"prompt": "Say yes.", "completion": "Yes, I do."}, "")
    (sample,) = read_samples(path, tokenizer)
    learnt = [label for label in sample.labels if label != IGNORED]

    assert learnt == [*tokenizer.encode("Yes, I do."), tokenizer.eos]
    assert sample.tokens == tokenizer.encode_chat([{"role": "user", "content": "Say yes."}]) + learnt


def test_a_prompt_is_a_conversation_of_one_message(tmp_path, tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [{"prompt": "Hi", "completion": "Hello"}, {"messages": messages}]
    short, long = read_samples(written(tmp_path, *rows), tokenizer)

    assert (short.tokens, short.labels) == (long.tokens, long.labels)


def test_all_answers_of_a_conversation_are_learnt_and_nothing_between_them(tmp_path, tokenizer):
    talk = [("system", "Be brief."), ("user", "1?"), ("assistant", "One."), ("user", "2?"), ("assistant", "Two.")]
    row = {"messages": [{"role": role, "content": content} for role, content in talk]}
    (sample,) = read_samples(written(tmp_path, row), tokenizer)

    learnt = [label for label in sample.labels if label != IGNORED]
    assert learnt == [token for answer in ("One.", "Two.") for token in (*tokenizer.encode(answer), tokenizer.eos)]
    messages = row["messages"]
    whole = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert sample.tokens == whole[: len(sample.tokens)]
    assert tokenizer.decode(whole[len(sample.tokens) :]) == "\n"


def test_an_answer_that_the_template_writes_otherwise_later_is_refused(tmp_path, tokenizer):
    forgetful = "{% for m in messages[-1:] %}{{ m.content }}{% endfor %}"
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ValueError, match="message 4: the chat template writes what came before this answer in another"):
        conversation(talk, tokenizer.with_template(forgetful))


def test_an_instruction_and_its_input_are_one_question(tmp_path, tokenizer):
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"prompt": "Add.\n\n1 2", "completion": "3"},
        {"instruction": "Add.", "input": "", "output": "3"},
        {"instruction": "Add.", "output": "3"},
    ]
    one, two, three, four = read_samples(written(tmp_path, *rows), tokenizer)

    assert one.tokens == two.tokens and three.tokens == four.tokens != one.tokens


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "it is a list, not an object"),
        ({"text": "a"}, "it needs messages, or a prompt and a completion, or an .* texts; its keys are text"),
        ({"prompt": "a", "completion": 3}, "its completion should be there; it needs .*, all of them texts"),
        ({"completion": "a"}, "its prompt should be there"),
        ({"instruction": "a", "output": None}, "its output should be there"),
        ({"instruction": "a", "output": "b", "input": 3}, "its input should be there"),
        (
            {"messages": [{"role": r, "content": "a"} for r in ("assistant", "user", "assistant")]},
            "the first message is",
        ),
        ({"messages": "a"}, "its messages are a str, not a list"),
        (
            {"messages": [{"role": "tool", "content": "a"}] * 2},
            "message 1 is .*'tool'.*give it a role .system, user, ass",
        ),
        (
            {"prompt": "a", "completion": "b", "tools": [{}]},
            "it has tools, which is not read here: write it",
        ),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "it has history, which is not read here"),
        ({"prompt": "a", "completion": "b", "system": 3}, "its system should be there"),
        ({"prompt": "\ud800", "completion": "b"}, "its prompt should be there; it needs .*, all of them texts"),
        ({"instruction": "a", "output": "b", "input": 0}, "its input should be there"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            "message 2 has weight, which is not read here",
        ),
        ({"prompt": "a", "completion": "b", "input": "c"}, "it has input, which is not read here: write it into"),
        ({"instruction": "a", "output": "b", "inptu": "c"}, "it has inptu, .*: did you mean input"),
        ({"instruction": "a", "output": "b", "prompt": "c"}, "it has instruction and output, which is"),
        ({"messages": [], "system": "c"}, "it has system, which is not read here: write it into messages, or drop it"),
        ({"instruction": "a", "output": "b", "context": "c"}, "it has context, which is not read here"),
        ({"prompt": "a", "completion": "b", "train": False}, "it has train, which is not read here"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "message 1 has name, which is not read here"),
        ({"messages": [{"role": "user", "content": "a", "input": 5}] * 2}, "message 1 is .*: give it a role"),
        ({"messages": [{"role": "user", "content": "a"}, 3]}, "message 2 is 3: give it a role"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "the last message has to be the assistant's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "after at least one other"),
    ],
)
def test_a_row_of_another_form_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        messages_of(row)


@pytest.mark.parametrize("form", [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}])
def test_a_system_text_is_read_and_an_id_passed_over(form):
    assert messages_of(form | {"system": "Be brief.", "id": 7, "input": None}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_bad_lines_are_told_by_number(tmp_path, tokenizer):
    good = {"prompt": "a", "completion": "b"}
    path = written(tmp_path, good, "{not json", good, {"prompt": "a", "completion": ""}, *["[]"] * 9)

    with pytest.raises(ValueError, match="lines that cannot be learnt from") as error:
        read_samples(path, tokenizer)
    lines = str(error.value).splitlines()
    assert [" ".join(line.split()[:2]).strip(":") for line in lines[1:-1]] == [f"line {n}" for n in (2, 4, 5, 6, 7)]
    assert lines[2].startswith("  line 4: it has an empty answer")
    assert lines[-1] == "  and 6 more"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "é", "completion": "b"}'.encode("latin-1"), "line 1: it is not UTF-8: save the file as UTF-8"),
        (b"[" * 100_000, "line 1: maximum recursion depth"),
    ],
)
def test_bytes_that_are_no_text_and_depths_without_end_are_told_by_line(line, message, tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line)

    with pytest.raises(ValueError, match=message):
        read_samples(path, tokenizer)


def test_a_byte_order_mark_is_passed_over(tmp_path, tokenizer):
    path = written(tmp_path, {"prompt": "a", "completion": "b"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())

    assert len(read_samples(path, tokenizer)) == 1


def test_a_file_without_samples_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no sample: give it a line like"):
        read_samples(written(tmp_path, "", ""), tokenizer)


def test_notes_and_empty_fields_change_nothing():
    plain = {"prompt": "a", "completion": "b"}
    noted = plain | {"id": 7, "source": "x", "system": "", "tools": [], "history": None, "weight": 1, "train": True}

    assert messages_of(noted) == messages_of(plain)


def test_the_end_is_learnt_whatever_an_answer_begins_with(tokenizer):
    for answer in ("Hello", "\n\nHello", " Hello", "."):
        talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
        assert conversation(talk, tokenizer).labels[-1] == tokenizer.control_tokens["<|im_end|>"]
