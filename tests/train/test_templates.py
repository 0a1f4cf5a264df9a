"""Templates against the formats that they are known by."""

import pytest

from minilora.llm.load import model_folder
from minilora.llm.tokenizer import TEMPLATE_FILE, Tokenizer, load_tokenizer
from minilora.train.data import IGNORED
from minilora.train.jsonl import conversation
from minilora.train.templates import TEMPLATES, for_template, with_template, with_trained_template

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
    told = with_template(tokenizer, name)

    assert told.apply_chat_template(for_template([question], told)) == text


@pytest.mark.parametrize("name", ["alpaca", "chatml", "plain", "model"])
def test_the_answer_follows_the_question_in_training_as_in_use(name, tokenizer):
    told = with_template(tokenizer, name)
    sample = conversation(for_template([QUESTION, ANSWER], told), told)
    asked = told.encode_chat(for_template([QUESTION], told))

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


def test_a_template_from_an_adapters_folder_is_asked_what_it_knows(tokenizer, tmp_path):
    (tmp_path / TEMPLATE_FILE).write_text(TEMPLATES["alpaca"])
    told = with_trained_template(tokenizer, tmp_path)

    assert told.apply_chat_template(for_template([QUESTION], told)) == ALPACA_WITH_INPUT


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_that_began_its_texts_with_bos_is_told_so_again(name, tokenizer):
    begins = Tokenizer(tokenizer.tokenizer_json, tokenizer.settings | {"add_bos_token": True})
    plain = with_template(tokenizer, name).encode_chat([QUESTION])

    assert with_template(begins, name).encode_chat([QUESTION]) == [tokenizer.bos, *plain]


def test_the_end_that_is_learnt_is_the_templates_own(tokenizer):
    """A base model's eos is another token than the one that ChatML puts after an answer."""
    base = with_template(
        Tokenizer(tokenizer.tokenizer_json, tokenizer.settings | {"eos_token": "<|endoftext|>"}), "chatml"
    )
    talk = [QUESTION | {"input": ""}, ANSWER, QUESTION | {"input": ""}, ANSWER]
    sample = conversation(talk, base)
    im_end = tokenizer.control_tokens["<|im_end|>"]

    assert base.eos != im_end
    assert [label for label in sample.labels if label != IGNORED] == [*tokenizer.encode("cat"), im_end] * 2
    assert conversation(talk[:2], with_template(base, "plain")).labels[-1] == base.eos
