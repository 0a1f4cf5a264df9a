"""Training samples out of a JSONL file: one JSON object a line, whose answers are to be learnt.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "input": "…", "output": "…"}                      input may be missing or empty

The last two may have a "system" text as well.

All go through a chat template, the model's own or one of templates.py. The loss is on the answers, all of a
conversation, and on the token that ends each.

Read before: train/data, train/templates.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minilora.llm.tokenizer import Tokenizer
from minilora.train.data import IGNORED, Sample
from minilora.train.templates import MODEL, for_template, with_template

MOST_PROBLEMS = 5  # that are told
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROLES = ("system", "user", "assistant")
NOTES = (
    "id",
    "_id",
    "idx",
    "index",
    "uuid",
    "source",
    "dataset",
    "category",
    "topic",
    "type",
    "task",
    "split",
    "language",
    "lang",
    "tags",
    "url",
    "license",
    "metadata",
)  # of a row: they say where it is from; what else is not read might change what is to be learnt
NEUTRAL = {"weight": 1, "train": True}  # what these mean where they are not there
FORMS = "messages, or a prompt and a completion, or an instruction and an output, all of them texts"


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line of a file."""

    line: int  # from 1
    text: str
    other: int | None = None  # a line that it has to do with

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


def read_samples(path: Path, tokenizer: Tokenizer, template: str = MODEL) -> list[Sample]:
    """Encode every line of a file; empty lines are passed over.

    Raises:
        ValueError: if there is no sample, or a line is not what it should be: the first few are told, by number.
    """
    samples, problems = read_lines(path, tokenizer, template)
    if problems:
        more = len(problems) - MOST_PROBLEMS
        told = [str(problem) for problem in problems[:MOST_PROBLEMS]] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError("\n  ".join([f"{path} has lines that cannot be learnt from:", *told]))
    if not samples:
        raise ValueError(f"{path} holds no sample: give it a line like " + '{"prompt": "…", "completion": "…"}')
    return samples


def read_lines(path: Path, tokenizer: Tokenizer, template: str = MODEL) -> tuple[list[Sample], list[Problem]]:
    """Encode what can be encoded of a file's lines, and say what is wrong with the others.

    Raises:
        ValueError: if the tokenizer cannot encode any: it has no token that ends an answer, or no chat template.
    """
    if tokenizer.eos is None:
        raise ValueError("this tokenizer has no token that ends an answer: give it an eos_token")
    tokenizer = with_template(tokenizer, template)
    tokenizer.encode_chat([{"role": "user", "content": "A trial: has the model a chat template?"}])
    samples, problems = [], []
    for number, line in enumerate(lines_of(path), start=1):
        if line.strip():
            try:
                messages = for_template(messages_of(parsed(line)), tokenizer)
                samples.append(replace(conversation(messages, tokenizer), name=f"line {number}"))
            except UnicodeDecodeError:  # a ValueError too
                problems.append(Problem(number, "it is not UTF-8: save the file as UTF-8"))
            except (ValueError, RecursionError) as error:
                problems.append(Problem(number, str(error)))
    return samples, problems


def lines_of(path: Path) -> list[bytes]:
    """The lines of a file, the empty ones too.

    Raises:
        ValueError: if it is one JSON array, over many lines or in one.
    """
    text = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    if re.match(rb"\s*\[\s*\{", text):
        raise ValueError(f"{path} is one JSON array: write each of its objects on a line of its own (jq -c '.[]')")
    return text.splitlines()


def parsed(line: bytes) -> Any:
    """What the JSON of a line says.

    Raises:
        ValueError: if it is no JSON.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        where = f"at character {error.pos + 1} of {len(error.doc):,}: {error.doc[error.pos :][:20]!r}"
        raise ValueError(f"it is not JSON, {where if error.pos < len(error.doc) else 'it is cut short'}") from None


def conversation(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, name: str = "it") -> Sample:
    """Encode a conversation; each answer and its end carry loss.

    Raises:
        ValueError: if an answer is empty, or the template writes the beginning of a conversation otherwise once it
            goes on, so that no single sequence holds all answers.
    """
    end = tokenizer.answer_end
    assert end is not None
    tokens, labels = list[int](), list[int]()
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answer = tokenizer.encode_chat(messages[:place]), tokenizer.encode(message["content"])
        if not answer:
            raise ValueError(
                f"{name} has an empty answer: the model would learn to say nothing; give it one, or drop it"
            )
        if prompt[: len(tokens)] != tokens:
            raise ValueError(
                f"message {place + 1}: the chat template writes what came before this answer in another way than "
                "alone; make each answer the last of a line of its own"
            )
        learnt = [*answer, end]
        labels += [IGNORED] * (len(prompt) - len(tokens)) + learnt
        tokens = prompt + learnt
    return Sample(tokens, labels, name)


def messages_of(row: Any) -> list[dict[str, str]]:
    """The conversation that a row stands for; its last message is an answer.

    Raises:
        ValueError: if it is none of the forms above, or does not end with an answer.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    if "messages" in row:
        refuse_others(row, ("messages",), "it")
        return checked(row["messages"])
    if "prompt" in row or "completion" in row:
        refuse_others(row, ("system", "prompt", "completion"), "it")
        question, answer = texts(row, "prompt", "completion")
    elif "instruction" in row or "output" in row:
        refuse_others(row, ("system", "instruction", "input", "output"), "it")
        question, answer = texts(row, "instruction", "output")
    else:
        raise ValueError(f"it needs {FORMS}; its keys are {', '.join(map(str, row)) or 'none'}")
    told = {key: texts(row, key)[0] for key in ("system", "input") if row.get(key) not in (None, "")}
    asked = {"role": "user", "content": question} | ({"input": told["input"]} if "input" in told else {})
    system = [{"role": "system", "content": told["system"]}] if "system" in told else []
    return [*system, asked, {"role": "assistant", "content": answer}]


def checked(messages: Any) -> list[dict[str, str]]:
    """Messages, if that is what they are.

    Raises:
        ValueError: if not.
    """
    if not isinstance(messages, list):
        raise ValueError(f"its messages are a {type(messages).__name__}, not a list")
    for place, message in enumerate(messages, start=1):
        if isinstance(message, Mapping):
            refuse_others(message, ("role", "content", "input"), f"message {place}")
        if not is_message(message):
            raise ValueError(
                f"message {place} is {str(message)[:60]}: give it a role ({', '.join(ROLES)}) and a text as content"
            )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("the last message has to be the assistant's, after at least one other")
    if messages[0]["role"] == "assistant":
        raise ValueError("the first message is the assistant's: there is nothing before it to answer")
    return messages


def texts(row: Mapping[str, Any], *keys: str) -> list[str]:
    """The texts under these keys.

    Raises:
        ValueError: if one is missing, or no text.
    """
    odd = [key for key in keys if not is_text(row.get(key))]
    if odd:
        raise ValueError(f"its {' and '.join(odd)} should be there; it needs {FORMS}")
    return [row[key] for key in keys]


def is_message(message: Any) -> bool:
    """Whether this is a role that we know and what it says."""
    if not (isinstance(message, Mapping) and message.get("role") in ROLES):
        return False
    return is_text(message.get("content")) and is_text(message.get("input", ""))


def is_text(value: Any) -> bool:
    """Whether this is a text that can be written down: half of a surrogate pair cannot."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def refuse_others(row: Mapping[str, Any], read: Sequence[str], what: str) -> None:
    """
    Raises:
        ValueError: if a key that is not read might change what is to be learnt: any that says something, but for notes.
    """
    others = [key for key, value in row.items() if key not in read and key not in NOTES and value != NEUTRAL.get(key)]
    others = [key for key in others if row[key] not in (None, "", [], {})]
    if others:
        near = get_close_matches(str(others[0]), [key for key in read if key not in row], n=1)
        hint = f"did you mean {near[0]}?" if near else f"write it into {' or '.join(read)}, or drop it"
        raise ValueError(f"{what} has {' and '.join(map(str, others))}, which is not read here: {hint}")


def refuse_longer(samples: Sequence[Sample], most: int, path: Path | str, hint: str = "") -> None:
    """
    Raises:
        ValueError: if a sample has more tokens than a model was made for: the first of them is told.
    """
    too_long = next((sample for sample in samples if len(sample.tokens) > most), None)
    if too_long:
        raise ValueError(
            f"{too_long.name} of {path} has {len(too_long.tokens):,} tokens, and the model was made for {most:,}: "
            f"shorten it, or drop it{hint}"
        )
