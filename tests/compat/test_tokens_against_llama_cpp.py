"""Our token ids are llama.cpp's own.

How llama.cpp comes here is told in conftest.py. The texts are made from a seed.
"""

import random
from pathlib import Path

import gguf
import pytest

from minilora.llm import smollm2
from minilora.llm.read_gguf import PRE_TOKENIZERS, GGUFModel
from minilora.llm.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.long

WORDS = "the quick Brown fox's LoRA isn't HTML straße naïve Ærø İstanbul ǅ ﬁne ª º ² ¼ Ⅻ १२३ ٣"
SCRIPTS = "日本語のテキスト 한국어 русский ελληνικά עברית العربية हिन्दी ไทย ქართული አማርኛ 繁體中文 ᚠᚢᚦ 𝔘𝔫𝔦 𐍈"
EMOJI = ["🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "☃", "⌘", "️", "‍"]
SPACES = [
    *" \t\n\u00a0\u2003\u3000\u200b\u2028\x85\x0b\x0c\x1c\u1680\u180e\ufeff",
    "  ",
    "   ",
    "\r\n",
    "\n\n\n",
    " \n ",
]
CODE = [
    "def f(x):\n    return x**2\n",
    "for(int i=0;i<10;++i){a[i]+=1;}",
    "<a href='x'>y</a>",
    '{"k": [1, 2.5e-3, null]}',
    "x != y && !z || ~w",
    "#!/bin/sh\n\techo $PATH | sed 's/a/b/g'\n",
    "λ → ∀x∈ℝ: x²≥0",
]
CONTRACTIONS = "it's IT'S we'll they've I'm you'd he're can't 'tis rock'n'roll ’s 'S 'Ll o'clock's't"
LOOK_ALIKES = "<|im_end|> <|im_start|> <|endoftext|> <|im_end |im_end|> <file_sep> <repo_name>x <<|im_end|>>"
CONTROLS = [
    *"\x00\x01\x04\x07\x1d\x7f\x9f\u0301\u202e\ue000\ufffd\ufffe\U00040000\U000f0000\U0010fffd",
    "e\u0301",
    "\x1b[0m",
]


def make_texts(n: int, seed: int) -> list[str]:
    """Texts in which everything meets everything."""
    dice = random.Random(seed)

    def number() -> str:
        return dice.choice(["{}", "{:,}", "-{}", "{}.{}", "0x{:x}", "{}%", "v{}.{}", "{}/{}", "a{}b"]).format(
            dice.randrange(10 ** dice.randrange(1, 12)), dice.randrange(1000)
        )

    def letter() -> str:
        code = dice.choice(
            [dice.randrange(0x20, 0x3000), dice.randrange(0x3000, 0xD800), dice.randrange(0xE000, 0x20000)]
        )
        return chr(code)

    pools = [EMOJI, SPACES, CODE, CONTROLS, *(words.split() for words in (WORDS, SCRIPTS, CONTRACTIONS, LOOK_ALIKES))]
    makers = [lambda pool=pool: dice.choice(pool) for pool in pools] + [
        number,
        number,
        letter,
        lambda: " ",
        lambda: " ",
    ]
    return ["".join(dice.choice(makers)() for _ in range(dice.randrange(1, 25))) for _ in range(n)]


@pytest.fixture(scope="module")
def llama_cpp(run_node):
    """A function from a GGUF file and texts to llama.cpp's ids: (control tokens as text, control tokens parsed)."""

    def ids(model: Path, texts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        answer = run_node("tokenize.mjs", {"model": str(model), "texts": texts})
        return answer["plain"], answer["special"]

    return ids


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return ["", *make_texts(300, seed=0)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(smollm2.fetch())


def test_ids_of_plain_text_are_llama_cpps(llama_cpp, texts, base_gguf, tokenizer):
    plain, _ = llama_cpp(base_gguf, texts)

    assert [tokenizer.encode(text) for text in texts] == plain


def test_ids_with_control_tokens_parsed_are_llama_cpps(llama_cpp, texts, base_gguf, tokenizer):
    _, special = llama_cpp(base_gguf, texts)

    assert [tokenizer.encode(text, parse_special=True) for text in texts] == special


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_in_the_table_splits_as_llama_cpps(pre, llama_cpp, texts, base_gguf, tmp_path):
    ours, path = GGUFModel(base_gguf), tmp_path / "vocabulary.gguf"
    write_vocabulary(path, ours, pre)
    tokenizer = Tokenizer(GGUFModel(path).tokenizer_json, ours.tokenizer_settings)

    plain, _ = llama_cpp(path, texts)

    assert [tokenizer.encode(text) for text in texts] == plain


def write_vocabulary(path: Path, model: GGUFModel, pre: str) -> None:
    """A GGUF file without weights: the vocabulary of a model under another pre-tokenizer's name.

    SmolLM2 knows no number of two digits, and so could not tell a pre-tokenizer that cuts after three digits from one
    that cuts after each: it is taught all of two and three.
    """
    pairs, triples = [f"{n:02}" for n in range(100)], [f"{n:03}" for n in range(1000)]
    tokens = [*model.metadata["tokenizer.ggml.tokens"], *pairs, *triples]
    merges = [f"{n[:-1]} {n[-1]}" for n in (*pairs, *triples)] + model.metadata["tokenizer.ggml.merges"]
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", model.metadata[f"llama.{key}"])
    writer.add_head_count(model.metadata["llama.attention.head_count"])
    writer.add_layer_norm_rms_eps(model.metadata["llama.attention.layer_norm_rms_epsilon"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([*model.metadata["tokenizer.ggml.token_type"], *[1] * (len(pairs) + len(triples))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(model.metadata["tokenizer.ggml.bos_token_id"])
    writer.add_eos_token_id(model.metadata["tokenizer.ggml.eos_token_id"])
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
