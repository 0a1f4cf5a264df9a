"""How good is it: answers compared to the letter, answers that are JSON at all, and perplexity on plain English.

Perplexity is the price of what was done to the model on text that has nothing to do with the task. The text is the
reference manual of Python that `help()` shows: it lies on every machine that has Python.
"""

import json
import math
import pydoc_data.topics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor, nn

from minilora.llm.model import generate


def generate_answers(
    model: nn.Module,
    prompts: Sequence[list[int]],
    stop_tokens: Sequence[int],
    max_new_tokens: int,
    batch_size: int = 50,
) -> list[list[int]]:
    """Greedy answers, in the order of the prompts, without the stop token."""


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share, from 0 to 1, of answers that equal their reference to the letter (spaces around it aside).

    >>> exact_match(["a", " b ", "c"], ["a", "b", "d"])
    0.6666666666666666
    """
    if len(answers) != len(references) or not answers:
        raise ValueError(f"cannot compare {len(answers)} answers with {len(references)} references: one each, at least one")
    return sum(a.strip() == b.strip() for a, b in zip(answers, references, strict=True)) / len(answers)


def valid_json(answers: Sequence[str]) -> float:
    """The share, from 0 to 1, of answers that parse as a JSON object.

    >>> valid_json(['{"a": 1}', "{'a': 1}", "1", "Sure! Here you are"])
    0.25
    """
