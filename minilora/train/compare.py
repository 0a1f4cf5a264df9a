"""`minilora eval`: a base and its adapter side by side, on samples that were not trained on.

    loss            nats per token of the answers
    exact           share of questions whose greedy answer is the reference to the letter
    plain English   perplexity on text that has nothing to do with the task: what was forgotten

Read before: train/evaluate, train/jsonl, train/adapted.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minilora.files import write_whole
from minilora.llm.model import Decoder
from minilora.llm.tokenizer import Tokenizer
from minilora.train.adapted import load_base, put_adapter, template_of
from minilora.train.data import IGNORED, Sample, make_batches
from minilora.train.evaluate import (
    GENERAL_TOKENS,
    english_loss,
    english_tokens,
    exact_match,
    generate_answers,
    mean_loss,
)
from minilora.train.jsonl import read_samples, refuse_longer

BATCH = 8
MORE_TOKENS = 8  # than the longest reference has


@dataclass(frozen=True)
class Grades:
    """How a model does on samples, and on plain English."""

    loss: float  # nats per token of the answers
    exact: float  # share
    english_perplexity: float


def grade(model: Decoder, tokenizer: Tokenizer, samples: Sequence[Sample]) -> Grades:
    """Measure a model; of a conversation with several answers, the last is compared."""
    assert tokenizer.pad is not None
    asked, references = zip(*(split_last_answer(sample) for sample in samples), strict=True)
    answers = generate_answers(model, tokenizer, asked, max(map(len, references)) + MORE_TOKENS)
    text = english_tokens(tokenizer, GENERAL_TOKENS)
    return Grades(
        loss=mean_loss(model, make_batches(samples, BATCH, tokenizer.pad, seed=0)),
        exact=exact_match(answers, [tokenizer.decode(reference) for reference in references]),
        english_perplexity=math.exp(english_loss(model, text)),
    )


def split_last_answer(sample: Sample) -> tuple[list[int], list[int]]:
    """The tokens up to a sample's last answer, and the answer with its end."""
    masked = [place for place, label in enumerate(sample.labels) if label == IGNORED]
    start = masked[-1] + 1 if masked else 1
    return sample.tokens[:start], sample.tokens[start:]


def run(args: argparse.Namespace) -> int:
    """Print the grades of the base and, if one is given, of the adapter on it.

    Raises:
        ValueError: if the data, the base or the adapter cannot be read.
    """
    model, tokenizer = load_base(args.base, torch.bfloat16)
    tokenizer = template_of(tokenizer, args.adapter, args.template)
    samples = read_samples(Path(args.data), tokenizer)
    refuse_longer(samples, model.config.max_seq_len, args.data)
    grades = {"base": grade(model, tokenizer, samples)}
    if args.adapter is not None:
        put_adapter(model, args.adapter, args.method)
        grades["adapter"] = grade(model.eval(), tokenizer, samples)
    print(table(grades, len(samples)))
    if args.json is not None:
        write_whole({Path(args.json): json.dumps({name: asdict(g) for name, g in grades.items()}, indent=2).encode()})
    return 0


def table(grades: dict[str, Grades], n_samples: int) -> str:
    """The grades as lines of text, and what the adapter gained and forgot."""
    rows = {
        f"{n_samples:,} samples": list(grades),
        "loss of the answers, nats": [f"{g.loss:.3f}" for g in grades.values()],
        "exact answers": [f"{g.exact:.1%}" for g in grades.values()],
        "perplexity, plain English": [f"{g.english_perplexity:.1f}" for g in grades.values()],
    }
    lines = [f"{name:<28}" + "".join(f"{text:>12}" for text in texts) for name, texts in rows.items()]
    if "adapter" in grades:
        before, after = grades["base"], grades["adapter"]
        forgotten = math.log(after.english_perplexity / before.english_perplexity)
        lines.append(f"gained {before.loss - after.loss:.3f} nats, forgot {forgotten:.3f}")
    return "\n".join(lines)
