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
    """Put each sample into the first row that has room for it: at most 1.7 times the fewest rows there could be.

    Rows stay in the order in which they were opened. ([Johnson et al., 1974] for the bound of first fit.)

    Raises:
        ValueError: if a sample is longer than a row.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in samples:
        size = len(sample.tokens)
        if size > max_tokens:
            raise ValueError(f"{sample.name} has {size:,} tokens, and a row has {max_tokens:,}: drop it, or pack wider")
        place = next((place for place, left in enumerate(room) if left >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[place].append(sample)
        room[place] -= size
    return rows
