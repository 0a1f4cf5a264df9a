"""Training samples out of a JSONL file: one JSON object a line, whose last answer is to be learnt.

    {"prompt": "…", "completion": "…"}
    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}

Both go through the model's own chat template; the loss is on the last answer and its end.

Read before: train/data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minilora.llm.tokenizer import Tokenizer
from minilora.train.data import Sample, mask_prompt

MOST_PROBLEMS = 5  # that are told
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROLES = ("system", "user", "assistant")


def read_samples(path: Path, tokenizer: Tokenizer) -> list[Sample]:
    """Encode every line of a file; empty lines are passed over.

    Raises:
        ValueError: if there is no sample, or a line is not what it should be: the first few are told, by number.
    """
    if tokenizer.eos is None:
        raise ValueError("this tokenizer has no token that ends an answer: give it an eos_token")
    tokenizer.encode_chat([{"role": "user", "content": "A trial: has the model a chat template?"}])
    samples, problems = [], []
    for number, line in enumerate(path.read_bytes().removeprefix(BYTE_ORDER_MARK).splitlines(), start=1):
        if line.strip():
            try:
                *before, answer = messages_of(json.loads(line))
                prompt, written = tokenizer.encode_chat(before), tokenizer.encode(answer["content"])
                samples.append(mask_prompt(prompt, written, tokenizer.eos, name=f"line {number}"))
            except UnicodeDecodeError:  # a ValueError too
                problems.append(f"line {number} is not UTF-8: save the file as UTF-8")
            except (ValueError, RecursionError) as error:
                problems.append(f"line {number}: {error}".replace(f"line {number}: line {number} ", f"line {number} "))
    if problems:
        more = len(problems) - MOST_PROBLEMS
        told = problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError("\n  ".join([f"{path} has lines that cannot be learnt from:", *told]))
    if not samples:
        raise ValueError(f"{path} holds no sample: give it a line like " + '{"prompt": "…", "completion": "…"}')
    return samples


def messages_of(row: Any) -> list[dict[str, str]]:
    """The conversation that a row stands for; its last message is the answer.

    Raises:
        ValueError: if it is none of the forms above, or does not end with an answer.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"it is a {type(row).__name__}, not an object")
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list):
            raise ValueError(f"its messages are a {type(messages).__name__}, not a list")
        for place, message in enumerate(messages, start=1):
            if not is_message(message):
                raise ValueError(
                    f"message {place} is {str(message)[:60]}: give it a role ({', '.join(ROLES)}) and a text as content"
                )
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("the last message has to be the assistant's, after at least one other")
        return messages
    if not isinstance(row.get("prompt"), str) or not isinstance(row.get("completion"), str):
        keys = ", ".join(map(str, row)) or "none"
        raise ValueError(f"it needs messages, or a prompt and a completion that are texts; its keys are {keys}")
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def is_message(message: Any) -> bool:
    """Whether this is a role that we know and what it says."""
    return isinstance(message, Mapping) and message.get("role") in ROLES and isinstance(message.get("content"), str)
