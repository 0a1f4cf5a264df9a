"""From logits to tokens: greedy or sampled, one row or many, with a KV cache.

    prompt  ──one pass over all its tokens──►  cache
    then, for every new token:  last token ──one pass──► logits of the last position ──choose──► next token

Prompts of different length are padded on the left, so that every row's next token is written in the same column:

    row 0   ·  ·  a  b | x  y          · is padding: no token looks at it, and positions are counted from the first
    row 1   c  d  e  f | z             real token, so that a row gives the same tokens in a batch as alone
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minilora.llm.model import Decoder, KVCache, causal_mask


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
    on_rows_kept: Callable[[list[int]], object] | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, without the prompt and without the stop token that ended it.

    A row shorter than `max_new_tokens` was ended by a stop token. Dropout is off meanwhile.

    Args:
        temperature: 0 takes the most probable token; otherwise logits are divided by it and a token is drawn.
        top_p: draw only from the most probable tokens that together have at least this probability.
        generator: where the randomness of drawing comes from.
        on_rows_kept: told which rows of the batch it goes on with, each time that half of them have stopped.

    Raises:
        ValueError: for an empty prompt, a token outside the vocabulary, or an argument out of range.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    for step in _steps(model, prompts, max_new_tokens, temperature, top_p, stop_tokens, generator, on_rows_kept):
        for row, token in step:
            answers[row].append(token)
    return answers


def stream(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_tokens: Iterable[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """The tokens that follow one prompt, each as soon as it is known. Arguments as in `generate`."""
    for step in _steps(model, [prompt], max_new_tokens, temperature, top_p, stop_tokens, generator):
        yield from (token for _, token in step)


def choose(
    logits: Float[Tensor, "rows vocab"], *, temperature: float, top_p: float, generator: torch.Generator | None
) -> Int[Tensor, "rows"]:
    """One token a row: the most probable, or drawn from the most probable ones."""
    if temperature == 0:
        return logits.max(dim=-1).indices  # argmax, which in bfloat16 takes four times as long on a CPU
    below_best = logits.float() - logits.amax(dim=-1, keepdim=True).float()  # so no temperature gives +inf
    probabilities = (below_best / temperature).softmax(dim=-1)
    if top_p < 1:
        descending, order = probabilities.sort(dim=-1, descending=True)
        before = descending.cumsum(dim=-1) - descending  # probability of all tokens ahead of this one
        descending = descending.masked_fill(before >= top_p, 0.0)  # the first is always kept
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, descending)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def _steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_tokens: Iterable[int],
    generator: torch.Generator | None,
    on_rows_kept: Callable[[list[int]], object] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """At every step the rows that go on, each with its new token."""
    _check(model, prompts, max_new_tokens, temperature, top_p)
    if not prompts:
        return
    stops, stopped = set(stop_tokens), set()
    tokens, is_real = _pad_left(prompts, next(model.parameters()).device)
    cache = KVCache(model.config.n_layers, max_tokens=tokens.shape[1] + max_new_tokens)
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    with evaluating(model):
        for _ in range(max_new_tokens):
            logits = _next_logits(model, tokens, is_real, cache)
            chosen = choose(logits, temperature=temperature, top_p=top_p, generator=generator)
            pairs = list(zip(rows, chosen.tolist(), strict=True))
            stopped |= {row for row, token in pairs if token in stops}
            if len(stopped) == len(prompts):
                return
            yield [(row, token) for row, token in pairs if row not in stopped]
            tokens, is_real = chosen[:, None], F.pad(is_real, (0, 1), value=True)
            keep = [place for place, row in enumerate(rows) if row not in stopped]
            if 2 * len(keep) <= len(rows):  # half of the batch has stopped: no more work for it
                rows, tokens, is_real = [rows[place] for place in keep], tokens[keep], is_real[keep]
                cache.keep_rows(keep)
                if on_rows_kept is not None:
                    on_rows_kept(keep)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and afterwards every module back to what it was."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


@torch.inference_mode()
def _next_logits(
    model: Decoder, tokens: Int[Tensor, "batch seq"], is_real: Bool[Tensor, "batch total"], cache: KVCache
) -> Float[Tensor, "batch vocab"]:
    """Read the new tokens and return the logits of the last one alone: the head is a fifth of a small model's work."""
    total = is_real.shape[1]
    past = total - tokens.shape[1]  # of the prompt and answer; before these the cache may hold what a method learnt
    positions, mask = None, None
    if not is_real.all():
        positions = (is_real.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        mask = causal_mask(total - past, past, tokens.device) & is_real[:, None, :]
    hidden = model.model(tokens, positions=positions, mask=mask, cache=cache)
    return model.lm_head(hidden[:, -1])


def _pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "batch width"], Bool[Tensor, "batch width"]]:
    """Prompts as one tensor, and which of its tokens are real."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return tokens, torch.arange(width, device=device) >= width - lengths[:, None]


def _check(
    model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, top_p: float
) -> None:
    problems = []
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature is {temperature}: use 0 for the most probable token, more for variety")
    if not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}: use a share of the probability, above 0 and up to 1")
    if max_new_tokens < 0:
        problems.append(f"max_new_tokens is {max_new_tokens}: use 0 or more")
    vocab_size, max_seq_len = model.config.vocab_size, model.model.config.max_seq_len
    for number, prompt in enumerate(prompts):
        if not prompt:
            problems.append(f"prompt {number} is empty: begin it with at least one token, such as the tokenizer's bos")
        elif not 0 <= min(prompt) <= max(prompt) < vocab_size:
            problems.append(f"prompt {number} has a token outside 0..{vocab_size - 1}: it is of another vocabulary")
        elif len(prompt) + max_new_tokens > max_seq_len:
            problems.append(
                f"prompt {number} has {len(prompt)} tokens, with {max_new_tokens} new ones more than the model's "
                f"{max_seq_len}: shorten it, or ask for fewer"
            )
    if problems:
        raise ValueError("cannot generate: " + "; ".join(problems))
