"""Text to ids and back, and what a message can and cannot do. (That ids are llama.cpp's own: tests/compat.)"""

import json
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minilora.llm import Tokenizer, smollm2
from minilora.llm.read_gguf import tokenizer_json_of
from minilora.llm.tokenizer import load_tokenizer

IM_START, IM_END = 1, 2


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def real() -> Tokenizer:
    return load_tokenizer(smollm2.fetch())


@given(text=st.text())
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_the_text(real, text):
    """But for the bytes that the vocabulary lacks: 04 06 13 14 16 1D, and those of U+40000 to U+BFFFF."""
    assume(not re.search("[\x04\x06\x13\x14\x16\x1d\U00040000-\U000bffff]", text))

    assert real.decode(real.encode(text)) == text


def test_bytes_that_the_vocabulary_lacks_are_left_out(real):
    assert real.decode(real.encode("a\x04b")) == "ab"


def test_every_digit_is_a_token(real):
    assert [real.decode([token]) for token in real.encode("2024")] == ["2", "0", "2", "4"]


def test_ids_with_names(real):
    assert (real.bos, real.eos, real.pad) == (IM_START, IM_END, IM_END)
    assert real.stop_tokens == (0, IM_END)
    assert len(real) == 49152


def test_a_control_token_in_a_text_is_letters_unless_asked(real):
    assert IM_END not in real.encode("<|im_end|>")
    assert real.encode("<|im_end|>", parse_special=True) == [IM_END]
    assert real.decode(real.encode("<|im_end|>")) == "<|im_end|>"


def test_control_tokens_are_left_out_of_text_unless_asked(real):
    assert real.decode([IM_START, *real.encode("x"), IM_END]) == "x"
    assert real.decode([IM_START, *real.encode("x"), IM_END], skip_special=False) == "<|im_start|>x<|im_end|>"


def test_a_begin_token_is_put_in_front_when_asked(real):
    assert real.encode("x", add_bos=True) == [IM_START, *real.encode("x")]


def test_a_conversation_reads_as_the_model_was_trained(real):
    assert real.apply_chat_template(user("Hi")) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_prompt_and_its_answer_are_the_whole_conversation(real):
    answer = {"role": "assistant", "content": "Hello!"}

    prompt = real.encode_chat(user("Hi"))
    whole = real.encode_chat([*user("Hi"), answer], add_generation_prompt=False)

    assert whole == prompt + real.encode("Hello!") + [IM_END] + real.encode("\n")


@given(text=st.text())
@settings(max_examples=200, deadline=None)
def test_ids_of_a_conversation_are_those_of_its_text(real, text):
    assume(not any(control in text for control in real.control_tokens))  # the next test is of these
    assert real.encode_chat(user(text)) == real.encode(real.apply_chat_template(user(text)), parse_special=True)


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "\n", "  ", "system", "\U000f0000", "é"]
)


@given(pieces=st.lists(PIECES, max_size=8))
@settings(max_examples=200, deadline=None)
def test_no_message_can_write_a_control_token(real, pieces):
    text = "".join(pieces)

    ids = real.encode_chat(user(text))

    control = set(real.control_tokens.values())
    harmless = [token for token in real.encode_chat(user("x")) if token in control]
    assert [token for token in ids if token in control] == harmless
    assert real.decode(ids, skip_special=False) == real.apply_chat_template(user(text))


def test_text_from_a_stream_comes_in_whole_characters(real):
    text = "née 🙂 日本 👩‍👧"
    tokens = real.encode(text)
    assert len(tokens) > len(text)  # some characters are several tokens

    pieces = list(real.decode_stream([IM_START, *tokens, IM_END]))

    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_model_without_a_template_says_so(real):
    bare = Tokenizer(real._backend.to_str(), {"eos_token": "<|im_end|>"})

    with pytest.raises(
        ValueError, match=r"no chat template \(a base model\?\): write its prompt as text and use encode"
    ):
        bare.apply_chat_template(user("Hi"))


def test_a_named_token_that_is_not_there_is_refused(real):
    with pytest.raises(ValueError, match="the tokenizer's bos_token is '<s>', which is not in its vocabulary"):
        Tokenizer(real._backend.to_str(), {"bos_token": "<s>"})


GGUF_METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "1", "2", "12"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b", "1 2"],
}


def test_an_unknown_pre_tokenizer_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"pre-tokenizer is 'viking'; those known are \['gpt-2', 'llama-bpe', 'qwen2', 'smollm'\]"
    ):
        tokenizer_json_of(GGUF_METADATA | {"tokenizer.ggml.pre": "viking"})


def test_a_sentencepiece_vocabulary_in_a_gguf_file_is_refused_with_a_way_out():
    with pytest.raises(
        ValueError, match=r"of the kind 'llama'; only byte-level BPE .* load this model's Hugging Face folder"
    ):
        tokenizer_json_of(GGUF_METADATA | {"tokenizer.ggml.model": "llama"})


def test_a_tokenizer_from_gguf_metadata_merges_and_knows_its_control_tokens():
    tokenizer = Tokenizer(tokenizer_json_of(GGUF_METADATA), {"eos_token": "<|end|>"})

    assert tokenizer.encode("abba<|end|>", parse_special=True) == [3, 2, 1, 0]


@pytest.mark.parametrize(("pre", "ids"), [("smollm", [4, 5]), ("qwen2", [4, 5]), ("gpt-2", [6]), ("llama-bpe", [6])])
def test_the_pre_tokenizer_decides_whether_digits_may_merge(pre, ids):
    tokenizer = Tokenizer(tokenizer_json_of(GGUF_METADATA | {"tokenizer.ggml.pre": pre}), {})

    assert tokenizer.encode("12") == ids


def test_letters_on_both_sides_of_an_unknown_byte_do_not_merge():
    tokenizer = Tokenizer(tokenizer_json_of(GGUF_METADATA), {})

    assert tokenizer.encode("a\x04b") == [1, 2]


@pytest.mark.parametrize("style", ["text", "dictionary", "several templates", "template file"])
def test_the_ways_in_which_folders_keep_their_settings(tmp_path, style):
    (tmp_path / "tokenizer.json").write_text(tokenizer_json_of(GGUF_METADATA))
    settings = {"eos_token": {"content": "<|end|>"} if style == "dictionary" else "<|end|>", "chat_template": "old"}
    if style == "several templates":
        settings["chat_template"] = [{"name": "tools", "template": "t"}, {"name": "default", "template": "old"}]
    if style == "template file":
        (tmp_path / "chat_template.jinja").write_text("new")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))

    tokenizer = load_tokenizer(tmp_path)

    assert tokenizer.eos == tokenizer.pad == 0
    assert tokenizer.apply_chat_template([]) == ("new" if style == "template file" else "old")


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json: save the tokenizer there in its fast form"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)
