"""Templates against the formats that they are known by."""

import pytest

from minilora.llm.load import model_folder
from minilora.llm.tokenizer import load_tokenizer
from minilora.train.jsonl import conversation
from minilora.train.templates import for_template, with_template

QUESTION = {"role": "user", "content": "Translate.", "input": "chat"}
ANSWER = {"role": "assistant", "content": "cat"}

# As PROMPT_DICT of stanford_alpaca's train.py fills them, to which the answer is joined.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:"
)
ALPACA_WITHOUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Response:"
)
CHATML = "<|im_start|>user\nTranslate.\n\nchat<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_folder("smollm2-135m"))


@pytest.mark.parametrize(
    ("name", "question", "text"),
    [
        ("alpaca", QUESTION, ALPACA_WITH_INPUT),
        ("alpaca", QUESTION | {"input": ""}, ALPACA_WITHOUT),
        ("chatml", QUESTION, CHATML),
        ("plain", QUESTION, "Translate.\n\nchat"),
    ],
)
def test_a_question_is_written_as_the_format_says(name, question, text, tokenizer):
    asked = for_template([question], name)

    assert with_template(tokenizer, name).apply_chat_template(asked) == text


@pytest.mark.parametrize("name", ["alpaca", "chatml", "plain", "model"])
def test_the_answer_follows_the_question_in_training_as_in_use(name, tokenizer):
    told = with_template(tokenizer, name)
    sample = conversation(for_template([QUESTION, ANSWER], name), told)
    asked = told.encode_chat(for_template([QUESTION], name))

    assert sample.tokens == [*asked, *tokenizer.encode("cat"), tokenizer.eos]


def test_chatml_is_what_smollm2_itself_writes(tokenizer):
    talk = [{"role": role, "content": f"{role}!"} for role in ("system", "user", "assistant", "user")]

    assert with_template(tokenizer, "chatml").encode_chat(talk) == tokenizer.encode_chat(talk)


def test_the_tokenizer_itself_keeps_its_template(tokenizer):
    before = tokenizer.apply_chat_template([QUESTION])
    with_template(tokenizer, "plain").apply_chat_template([QUESTION])

    assert tokenizer.apply_chat_template([QUESTION]) == before


def test_alpaca_refuses_a_conversation(tokenizer):
    with pytest.raises(ValueError, match="Alpaca knows one question and one answer"):
        with_template(tokenizer, "alpaca").apply_chat_template([QUESTION, ANSWER, QUESTION])


def test_an_unknown_template_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no template is named 'llama': choose model, chatml, alpaca, plain"):
        with_template(tokenizer, "llama")
