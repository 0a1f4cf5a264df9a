"""Packing: several samples in one row, so that nothing is computed for padding; none of them sees another.

    tokens      a a a b b c c c c ·        · padding
    segments    0 0 0 1 1 2 2 2 2 −
    positions   0 1 2 0 1 0 1 2 3 ·        each sample begins at 0 again
    mask        a token looks at those before it in its own segment alone: block-diagonal

Without the mask the second sample would be read as the continuation of the first, which is how packing went wrong for
years (trl #805, #1230). The first token of a sample carries no loss: what stands before it is another's end.

Read before: train/data.
"""

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

from minilora.train.data import Batch, Sample, stack


def make_packed_batches(samples: Sequence[Sample], rows: int, max_tokens: int, pad: int, seed: int) -> list[Batch]:
    """Shuffle the samples and pack them into rows of at most `max_tokens`, `rows` a batch, each sample once.

    Raises:
        ValueError: if a sample is longer than a row, or a number is below 1.
    """
    if rows < 1 or max_tokens < 1:
        raise ValueError(f"cannot pack rows={rows} of max_tokens={max_tokens}: both are at least 1")
    packed = packed_rows(random.Random(seed).sample(samples, len(samples)), max_tokens)
    return [stack(packed[start : start + rows], pad) for start in range(0, len(packed), rows)]


def packed_rows(samples: Sequence[Sample], max_tokens: int) -> list[list[Sample]]:
    """Put each sample into the row that it fills best: at most 1.7 times the fewest rows there could be.

    Rows stay in the order in which they were opened. ([Johnson et al., 1974] for the bound of best fit.)

    Raises:
        ValueError: if a sample is longer than a row.
    """
    rows: list[list[Sample]] = []
    room: list[tuple[int, int]] = []  # tokens left and the row's place, sorted
    for sample in samples:
        size = len(sample.tokens)
        if size > max_tokens:
            raise ValueError(f"{sample.name} has {size:,} tokens, and a row has {max_tokens:,}: drop it, or pack wider")
        best = bisect_left(room, (size, 0))
        left, place = room.pop(best) if best < len(room) else (max_tokens, len(rows))
        if place == len(rows):
            rows.append([])
        rows[place].append(sample)
        insort(room, (left - size, place))
    return rows
