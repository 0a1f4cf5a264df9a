"""Rows that begin alike, computed once: what they share goes through the layers as one row's.

    tokens      s s s a a         s: the first tokens, the same in every row         (rows, seq)
                s s s b b
    together    s s s a a b b     all but attention sees each token for itself       (1, shared + rows · (seq − shared))

A token looks only at those before it, so what a layer makes of the shared ones is the same in every row; attention, the
one place where tokens look at others, gets the rows apart. In the backward the gradients of the copies are summed. So
the values are those without sharing, and rows · seq tokens cost as many products as stand in the second line: in a
batch of 8, a system prompt of 19 tokens and 68 others, 563 instead of 696. With dropout the rows would share what is
dropped: then it is another computation.

Read next: model.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def together(x: Float[Tensor, "rows seq n"], shared: int) -> Float[Tensor, "1 tokens n"]:
    """Put rows one behind the other, the first `shared` tokens once."""
    return torch.cat([x[0, :shared], x[:, shared:].flatten(0, 1)])[None]


def apart(x: Float[Tensor, "1 tokens n"], rows: int, shared: int) -> Float[Tensor, "rows seq n"]:
    """Give each row its copy of the shared tokens again."""
    own = (x.shape[1] - shared) // rows
    return torch.cat([x[:, :shared].expand(rows, -1, -1), x[0, shared:].reshape(rows, own, x.shape[2])], dim=1)
