"""Instruction data: a prompt and its answer become tokens and labels, then batches.

    tokens   prompt         answer         eos
    labels   -100 … -100    answer         eos

A label says which token should stand at its own position (the loss shifts by one); -100 carries no loss. The end of
the answer is known by its length, never by the id of a token: where the padding token is the eos token, a mask by id
would hide the eos as well, and the model would never learn to stop.

Read next: train/trainer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100  # the label that carries no loss; torch's cross_entropy skips it too
NO_SEGMENT = -1


@dataclass(frozen=True)
class Sample:
    """One sequence: its tokens, and for every position the token that should be learnt there, or `IGNORED`.

    Raises:
        ValueError: if a label is negative and not `IGNORED`; or if no label carries loss, so that the sample would cost
            time and teach nothing. The label of the first position does not count: nothing comes before it that could
            predict it.
    """

    tokens: list[int]
    labels: list[int]
    name: str = "a sample"  # how an error calls it, such as "line 12 of data.jsonl"

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.labels):
            raise ValueError(
                f"{self.name} has {len(self.tokens)} tokens and {len(self.labels)} labels: one each, please"
            )
        odd = [label for label in self.labels if label < 0 and label != IGNORED]
        if odd:
            raise ValueError(
                f"{self.name} has the label {odd[0]}: a label is a token's number, or {IGNORED} for no loss"
            )
        if all(label == IGNORED for label in self.labels[1:]):
            raise ValueError(
                f"{self.name} has no label that carries loss: all {len(self.labels)} are masked; "
                "give it an answer, or drop it"
            )


@dataclass(frozen=True)
class Batch:
    """Samples of like length side by side, padded on the right; padding carries no loss.

    Where a row holds several samples, `segments` counts them from 0 (padding is −1): train/packing.
    """

    tokens: Int64[Tensor, "batch seq"]
    labels: Int64[Tensor, "batch seq"]
    segments: Int64[Tensor, "batch seq"] | None = None

    @cached_property
    def shared(self) -> int:
        """With how many tokens all rows begin alike, such as those of a system prompt."""
        if self.segments is not None:
            return 0
        alike = (self.tokens == self.tokens[:1]).all(dim=0)
        return int(alike.cumprod(0).sum())

    @cached_property
    def n_labels(self) -> int:
        """How many tokens carry loss; the first of a row does not, for nothing comes before it."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def parts(self, n_parts: int) -> list["Batch"]:
        """Cut a batch into at most so many of neighbouring rows, each as wide as its longest row needs."""
        rows = torch.arange(len(self.tokens)).tensor_split(n_parts)
        return [self.rows(part) for part in rows if len(part)]

    def rows(self, which: Int64[Tensor, " some"]) -> "Batch":
        """Some rows of it, as wide as the longest of them needs: what follows all last labels carries no loss."""
        labels = self.labels[which]
        width = int((labels != IGNORED).any(dim=0).nonzero().max()) + 1
        segments = None if self.segments is None else self.segments[which, :width]
        return Batch(self.tokens[which, :width], labels[:, :width], segments)

    @property
    def positions(self) -> Int64[Tensor, "batch seq"] | None:
        """The place of each token in its sample, where a row holds several."""
        if self.segments is None:
            return None
        place = torch.arange(self.segments.shape[1]).expand_as(self.segments)
        is_first = F.pad(self.segments[:, 1:] != self.segments[:, :-1], (1, 0), value=True)
        return place - torch.where(is_first, place, 0).cummax(dim=1).values

    @property
    def mask(self) -> Bool[Tensor, "batch seq seq"] | None:
        """True where a token (row) may look at another (column): in its own sample, at itself and all before it.

        Made when asked for, and not kept: of all batches together it would fill the memory.
        """
        if self.segments is None:
            return None
        return (self.segments[:, :, None] == self.segments[:, None, :]).tril()


def mask_prompt(prompt: list[int], answer: list[int], eos: int, name: str = "a sample") -> Sample:
    """Join prompt, answer and `eos`; the loss is on the answer and the eos.

    Raises:
        ValueError: if the answer is empty (says which sample).

    >>> mask_prompt([5, 6], [7], eos=2).labels
    [-100, -100, 7, 2]
    """
    if not answer:
        raise ValueError(f"{name} has an empty answer: the model would learn to say nothing; give it one, or drop it")
    return Sample([*prompt, *answer, eos], [IGNORED] * len(prompt) + [*answer, eos], name)


def collate(samples: Sequence[Sample], pad: int) -> Batch:
    """Stack samples, padded on the right with `pad`: a causal model never looks there from a token.

    Raises:
        ValueError: if there is no sample.
    """
    if not samples:
        raise ValueError("cannot make a batch of 0 samples: give at least one")
    return replace(stack([[sample] for sample in samples], pad), segments=None)


def stack(rows: Sequence[Sequence[Sample]], pad: int) -> Batch:
    """Lay each row's samples one after the other, padded on the right with `pad`."""
    tokens, labels, segments = list[Tensor](), list[Tensor](), list[Tensor]()
    for row in rows:
        tokens.append(torch.tensor([token for sample in row for token in sample.tokens]))
        labels.append(torch.tensor([label for sample in row for label in [IGNORED, *sample.labels[1:]]]))
        segments.append(torch.tensor([place for place, sample in enumerate(row) for _ in sample.tokens]))
    padded = zip((tokens, labels, segments), (pad, IGNORED, NO_SEGMENT), strict=True)
    return Batch(*(pad_sequence(parts, batch_first=True, padding_value=value) for parts, value in padded))


def make_batches(samples: Sequence[Sample], batch_size: int, pad: int, seed: int, window: int = 16) -> list[Batch]:
    """Shuffle the samples and batch them, each sample once, neighbours in length together.

    Sorting all samples would pad least, and would show the model all the short ones in a row. So they are shuffled,
    sorted only within windows of `window` batches, and the batches are shuffled again. One batch may be smaller.

    Raises:
        ValueError: if `batch_size` or `window` is below 1.
    """
    if batch_size < 1 or window < 1:
        raise ValueError(f"cannot batch with batch_size={batch_size} and window={window}: both are at least 1")
    rng = random.Random(seed)
    order = rng.sample(samples, len(samples))
    groups: list[list[Sample]] = []
    for start in range(0, len(order), batch_size * window):
        near = sorted(order[start : start + batch_size * window], key=lambda sample: len(sample.tokens))
        groups += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(groups)
    return [collate(group, pad) for group in groups]
