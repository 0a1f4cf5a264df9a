"""A tokenizer as GGUF metadata: what llama.cpp has to be told to cut texts as it does.

    tokens, token_type, merges         the vocabulary by id, what each token is for, and which pairs are joined
    pre                                the name of llama.cpp's way to cut a text before pairs are joined
    bos, eos, unknown, padding ids     and whether llama.cpp puts bos in front by itself
    chat_template                      as it is

A `tokenizer.json` does not say `pre`: it holds the cutting itself. So every name that `read_gguf.py` knows is tried,
and that one is taken which gives the tokenizer's own ids for `PROBE`; llama.cpp's converter looks at ids, too.

Read before this file: read_gguf, tokenizer.
"""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from minilora.llm.read_gguf import CONTROL, PRE_TOKENIZERS, USER_DEFINED, tokenizer_json_of
from minilora.llm.tokenizer import Tokenizer

NORMAL, UNUSED = 1, 5  # values of tokenizer.ggml.token_type, beside read_gguf's
SPECIAL_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

# Whatever the known ways to cut a text differ in: digits in a row, spaces before words and digits, lines, capitals
# after an apostrophe, letters beside marks, numbers and letters of other scripts. No letter stands beside its accent:
# some tokenizers compose them first, llama.cpp does not.
PROBE = """1 12 123 1234 12345 3.14159 1,000,000 v2 0x1F a  1  12   123 \t1\n1\n\n12 ①② ½ Ⅻ १२३ ٣٤
it's IT'S we'll WE'LL they've I'm you'D he'd can't 'Tis rock'n'roll o'clock's ’s
Hello, world!! (see: #1) $5.00 -- ... ?! <a href='x'>y</a> {"k": [1, null]}
\n\n\n   indented\n\tdef f(x):\r\n\r\n    return x**2   \n \n  trailing   \n
straße naïve İstanbul Œuvre русский ελληνικά עברית العربية हिन्दी ไทย 日本語のテキスト 한국어 繁體中文 🙂👍🏽🇩🇪 é.ü!ß?"""


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The `tokenizer.…` entries of a GGUF file. Ids up to `vocab_size` that no token has become unused tokens.

    Raises:
        ValueError: if it is not a byte-level BPE, cuts texts in a way that llama.cpp has no name for here, or has more
            tokens than the model.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.tokenizer_json)
    parts = json.loads(tokenizer.tokenizer_json)
    if parts["model"]["type"] != "BPE" or (parts["decoder"] or {}).get("type") != "ByteLevel":
        raise ValueError(
            f"the tokenizer is a {parts['model']['type']} without byte-level pieces; only byte-level BPE, as GPT-2's, "
            "SmolLM2's, Llama 3's and Qwen2's, is written to GGUF: llama.cpp's own converter writes the others"
        )
    texts = backend.get_vocab(with_added_tokens=True)
    if max(texts.values()) >= vocab_size:
        raise ValueError(f"the tokenizer has ids up to {max(texts.values())}, the model {vocab_size} rows for them")
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, number in texts.items():
        tokens[number], kinds[number] = text, NORMAL
    for added in parts["added_tokens"]:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    vocabulary: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in parts["model"]["merges"]],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": tokenizer.puts_bos_first,
    }
    for name, key in SPECIAL_IDS.items():
        given = tokenizer.settings.get(name)
        marker = given["content"] if isinstance(given, Mapping) else given
        if marker in texts:
            vocabulary[f"tokenizer.ggml.{key}_token_id"] = texts[marker]
    if tokenizer.settings.get("chat_template"):
        vocabulary["tokenizer.chat_template"] = tokenizer.settings["chat_template"]
    return vocabulary | {"tokenizer.ggml.pre": _name_of_cutting(backend, vocabulary)}


def _name_of_cutting(backend: tokenizers.Tokenizer, vocabulary: Mapping[str, Any]) -> str:
    """The first of `PRE_TOKENIZERS` that gives this tokenizer's own ids."""
    ids = backend.encode(PROBE, add_special_tokens=False).ids
    for pre in PRE_TOKENIZERS:
        candidate = tokenizers.Tokenizer.from_str(tokenizer_json_of({**vocabulary, "tokenizer.ggml.pre": pre}))
        if candidate.encode(PROBE, add_special_tokens=False).ids == ids:
            return pre
    raise ValueError(
        f"the tokenizer cuts texts in none of the ways known here ({sorted(PRE_TOKENIZERS)}), so llama.cpp would make "
        "other tokens of them: use llama.cpp's own converter, which knows more"
    )
