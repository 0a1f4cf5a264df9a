"""How good is it: answers compared to the letter, answers that are JSON at all, and perplexity on plain English.

Perplexity is the price of what was done to a model, on text that has nothing to do with the task. The text is Python's
own manual, as `help()` shows it: it lies on every machine that has Python. It differs a little between versions of
Python, so compare perplexities of one run.
"""

import json
import math
import pydoc_data.topics
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from minilora.llm.generation import evaluating, generate
from minilora.llm.model import Decoder
from minilora.llm.tokenizer import Tokenizer
from minilora.train.data import Batch
from minilora.train.extraction import KEYS, Example
from minilora.train.loss import loss_of

GENERAL_TOKENS = 4096  # of plain English, to measure forgetting on
WINDOW = 512  # tokens that it is cut into
DATE_FORMAT = re.compile(r"\d{4}-\d{2}-\d{2}")


def generate_answers(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 50,
) -> list[str]:
    """Answer each prompt greedily, as far as the model's length goes; the answers stand in the order of the prompts.

    Prompts of like length are answered together, so that little is computed for padding; one that leaves less room
    than `max_new_tokens` is answered alone, or it would shorten the others' answers.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    room = [model.config.max_seq_len - len(prompt) for prompt in prompts]
    roomy = [i for i in order if room[i] >= max_new_tokens]
    groups = [roomy[start : start + batch_size] for start in range(0, len(roomy), batch_size)]
    answers = [""] * len(prompts)
    for rows in [*groups, *([i] for i in order if room[i] < max_new_tokens)]:
        batch = [prompts[i] for i in rows]
        most = min(max_new_tokens, *(room[i] for i in rows))
        written = generate(model, batch, max_new_tokens=most, stop_tokens=tokenizer.stop_tokens)
        for i, tokens in zip(rows, written, strict=True):
            answers[i] = tokenizer.decode(tokens)
    return answers


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share, from 0 to 1, of the answers that equal their reference to the letter, spaces around them aside.

    Raises:
        ValueError: if there is no answer, or not one for each reference.

    >>> exact_match(["a", " b ", "c", "d"], ["a", "b", "C", ""])
    0.5
    """
    if not answers or len(answers) != len(references):
        raise ValueError(f"cannot compare {len(answers)} answers with {len(references)} references: give one for each")
    return sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True)) / len(answers)


def valid_json(answers: Sequence[str]) -> float:
    """Share, from 0 to 1, of the answers that are one JSON object and nothing else.

    Raises:
        ValueError: if there is no answer.

    >>> valid_json(['{"a": 1}', "{'a': 1}", "1", 'Here you are: {"a": 1}'])
    0.25
    """
    if not answers:
        raise ValueError("cannot say how many of 0 answers are JSON: give at least one")
    return sum(parse_object(answer) is not None for answer in answers) / len(answers)


def parse_object(answer: str) -> dict[str, object] | None:
    """The JSON object that an answer is, or None."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):  # a model may well open ten thousand brackets
        return None
    return value if isinstance(value, dict) else None


def explain_miss(answer: str, example: Example) -> list[str]:
    """Say what is wrong with an answer, each fact on its own; nothing if it is exact.

    >>> example = Example("…", name="Ana Roy", city="Oslo", quantity=14, date="2021-03-05", shape="…")
    >>> explain_miss(example.answer.replace("Ana", "Anna").replace("2021-03-05", "5 March"), example)
    ['miscopied name', 'wrong date format']
    """
    if answer.strip() == example.answer:
        return []
    facts = parse_object(answer)
    if facts is None:
        return ["not JSON"]
    if set(facts) != set(KEYS):
        return ["other keys"]
    problems = [f"miscopied {key}" for key in ("name", "city") if facts[key] != getattr(example, key)]
    if facts["quantity"] != example.quantity:
        problems.append("number in quotes" if facts["quantity"] == str(example.quantity) else "wrong number")
    if facts["date"] != example.date:
        is_date = isinstance(facts["date"], str) and DATE_FORMAT.fullmatch(facts["date"])
        problems.append("wrong date" if is_date else "wrong date format")
    return problems or ["right facts, written otherwise"]


def english_text() -> str:
    """A few hundred pages of English that this machine has already: the topics of Python's `help()`."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def english_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """The first tokens of that text, so many."""
    return tokenizer.encode(english_text()[: 8 * count])[:count]  # a token is rarely eight letters


@torch.no_grad()
def perplexity(model: nn.Module, tokens: Sequence[int], seq_len: int = WINDOW) -> float:
    """exp of the mean loss over all tokens but the first of each window: how many it hesitates between.

        perplexity = exp(− mean log p(token[i] | tokens before it in its window))

    `tokens` is cut into windows of `seq_len`; a rest that fills no window is left out. Logits are summed up in
    float32, whatever dtype the model has. Dropout is off meanwhile.

    Raises:
        ValueError: if there is not one full window of at least two tokens.
    """
    n_windows = len(tokens) // max(seq_len, 1)
    if n_windows == 0 or seq_len < 2:
        raise ValueError(
            f"cannot cut {len(tokens)} tokens into windows of seq_len={seq_len}: give at least one window of 2 or more"
        )
    device = next((p.device for p in model.parameters()), None)
    windows = torch.tensor(tokens[: n_windows * seq_len], device=device).view(n_windows, seq_len)
    total = 0.0  # nats
    with evaluating(model):
        for window in windows:
            logits = model(window[None])[0, :-1].float()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return math.exp(total / (n_windows * (seq_len - 1)))


def english_loss(model: nn.Module, tokens: Sequence[int]) -> float:
    """log perplexity, nats per token, in windows that the model was made to read."""
    most = getattr(getattr(model, "config", None), "max_seq_len", WINDOW)
    return math.log(perplexity(model, tokens, min(WINDOW, most)))


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Nats per token that carries loss, over all batches; dropout is off meanwhile.

    Raises:
        ValueError: if there is no batch.
    """
    if not batches:
        raise ValueError("cannot measure a loss on no samples: give at least one")
    with evaluating(model):
        total = sum(loss_of(model, batch).item() * batch.n_labels for batch in batches)
    return total / sum(batch.n_labels for batch in batches)
