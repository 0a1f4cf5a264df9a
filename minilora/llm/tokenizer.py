"""Text to token ids and back.

    tokenizer.encode("12 cats")               → ids of plain text: nothing in it becomes a control token
    tokenizer.decode(ids)                     → text
    tokenizer.apply_chat_template(messages)   → a conversation as the model was trained to see it, as text
    tokenizer.encode_chat(messages)           → the same as ids: the template's own markers become control tokens,
                                                look-alikes inside a message stay the letters they are

The splitting itself is done by the `tokenizers` library from a `tokenizer.json`; `read_gguf.py` makes one for a GGUF
file.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from minilora.llm.chat import ChatTemplate

# A model may end an answer with any of these, whichever of them it calls its end-of-sequence token.
END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>", "<|end|>", "<end_of_turn>",
)  # fmt: skip

TEMPLATE_FILE = "chat_template.jinja"  # in a folder of a model, or of an adapter that was trained with another

Message = Mapping[str, Any]


class Tokenizer:
    """A vocabulary, its control tokens, and the chat template that goes with it.

    `bos`, `eos` and `pad` are ids, or None where the model has none; `stop_tokens` are all ids that end an answer;
    `control_tokens` maps the text of each control token to its id; `settings` are what Hugging Face keeps in
    `tokenizer_config.json`.
    """

    def __init__(self, tokenizer_json: str, settings: Mapping[str, Any]) -> None:
        self._backend = tokenizers.Tokenizer.from_str(tokenizer_json)
        added = self._backend.get_added_tokens_decoder()
        self.control_tokens = {token.content: number for number, token in added.items() if token.special}
        self._names = _special_names(settings)
        for name, text in self._names.items():
            if self._backend.token_to_id(text) is None:
                raise ValueError(f"the tokenizer's {name} is {text!r}, which is not in its vocabulary")
        self.bos = self._id("bos_token")
        self.eos = self._id("eos_token")
        self.pad = self.eos if self._id("pad_token") is None else self._id("pad_token")
        ends = {self.control_tokens[text] for text in END_TOKENS if text in self.control_tokens}
        self.stop_tokens = tuple(sorted(ends if self.eos is None else ends | {self.eos}))
        self.settings = settings

    def __len__(self) -> int:
        """Number of tokens in the vocabulary."""
        return self._backend.get_vocab_size()

    @cached_property
    def puts_bos_first(self) -> bool:
        """Whether a text is meant to begin with bos: as the settings say, else as tokenizer.json does it."""
        stated = self.settings.get("add_bos_token")
        if stated is not None:
            return bool(stated)
        return self.bos is not None and self._backend.encode("a").ids[:1] == [self.bos]

    @property
    def tokenizer_json(self) -> str:
        """What a tokenizer.json says, from which a tokenizer with the same ids can be made."""
        return self._backend.to_str()

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which takes control tokens in a text for the letters they are written with."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _template(self) -> ChatTemplate:
        """Read when first used: a template that we refuse does not keep its model from being used."""
        source = self.settings.get("chat_template")
        if not source:
            raise ValueError(
                "this model has no chat template (a base model?): write its prompt as text and use encode()"
            )
        return ChatTemplate(source)

    def with_template(self, source: str) -> "Tokenizer":
        """The same tokenizer with another chat template."""
        other = copy(self)
        for name in ("_template", "answer_end"):  # what is known of the one before
            other.__dict__.pop(name, None)
        other.settings = {**self.settings, "chat_template": source}
        return other

    @cached_property
    def answer_end(self) -> int | None:
        """The token that ends an answer: the first such that the chat template writes after one, or eos.

        In a base model these are often two: of ChatML's `<|im_end|>` its eos knows nothing.
        """
        trial = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
        prompt, whole = self.encode_chat(trial[:1]), self.encode_chat(trial, add_generation_prompt=False)
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))
        return next((token for token in whole[alike:] if token in self.stop_tokens), self.eos)

    def with_learnt_end(self) -> "Tokenizer":
        """The same tokenizer, whose eos is `answer_end`: what whoever learnt with this template ends an answer with."""
        end = self.answer_end if self.settings.get("chat_template") else None
        text = None if end is None else self._backend.id_to_token(end)
        if end is None or text is None or end == self.eos:
            return self
        other = copy(self)
        other.eos, other._names = end, self._names | {"eos_token": text}
        other.settings = {**self.settings, "eos_token": text}
        return other

    def encode(self, text: str, *, parse_special: bool = False, add_bos: bool = False) -> list[int]:
        """Ids of a text. The text `"<|im_end|>"` becomes the control token of that name only with `parse_special`."""
        backend = self._backend if parse_special else self._plain_backend
        ids = backend.encode(text, add_special_tokens=False).ids
        return [self.bos, *ids] if add_bos and self.bos is not None else ids

    def decode(self, tokens: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids, without the control tokens among them unless asked."""
        return self._backend.decode(list(tokens), skip_special_tokens=skip_special)

    def decode_stream(self, tokens: Iterable[int], *, skip_special: bool = True) -> Iterator[str]:
        """Text of ids as they come: each piece as soon as its last character is complete."""
        stream = DecodeStream(skip_special_tokens=skip_special)
        for token in tokens:
            piece = stream.step(self._backend, token)
            if piece:
                yield piece

    def apply_chat_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """A conversation as text. `add_generation_prompt` ends it where the assistant's answer begins.

        Text is for reading: `encode_chat` turns a conversation into ids that no message can forge.
        """
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, special_tokens=self._names)

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """A conversation as ids, in which only the template can write control tokens.

        Every look-alike in a message is broken by a character that occurs in no message; after rendering, the unbroken
        control tokens are the template's, and what lies between them is plain text, without that character again.
        """
        if not self.control_tokens:
            return self.encode(self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt))
        mark = _unused_character(json.dumps(messages, ensure_ascii=False, default=str))
        longest_first = sorted(self.control_tokens, key=len, reverse=True)
        control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        broken = _map_text(messages, lambda text: control.sub(lambda found: found[0][0] + mark + found[0][1:], text))
        text = self.apply_chat_template(broken, add_generation_prompt=add_generation_prompt)
        if mark not in text:
            return self.encode(text, parse_special=True)
        ids: list[int] = []
        for piece in control.split(text):
            token = self.control_tokens.get(piece)
            ids += self.encode(piece.replace(mark, "")) if token is None else [token]
        return ids

    def _id(self, name: str) -> int | None:
        return self._backend.token_to_id(self._names[name]) if name in self._names else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face model folder.

    Raises:
        ValueError: if tokenizer.json is missing or cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{folder} has no tokenizer.json: save the tokenizer there in its fast form")
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    if isinstance(settings.get("chat_template"), list):  # several, by name
        named = {entry["name"]: entry["template"] for entry in settings["chat_template"]}
        settings["chat_template"] = named.get("default")
    template = folder / TEMPLATE_FILE
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    try:
        return Tokenizer(path.read_text(encoding="utf-8"), settings)
    except ValueError:
        raise
    except Exception as error:  # the library raises a bare Exception for a file that is not a tokenizer
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; ValueError with the file's name if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, where an object should be: fetch it again")
    return value


def _special_names(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts that the settings give to bos_token, eos_token and pad_token, each written in one of two ways."""
    values = {name: settings.get(name) for name in ("bos_token", "eos_token", "pad_token")}
    texts = {name: value["content"] if isinstance(value, Mapping) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _unused_character(text: str) -> str:
    """A character for private use that does not occur in a text."""
    return next(chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in text)


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """The same nested value with every string in it changed; names (the keys of dictionaries) stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_text(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(item, change) for item in value]
    return value
