"""TIES and DARE: sums in which single entries of the updates are left out, cut down to a rank again.

    Δ_i (out, in)    w_i · s_i · B_i A_i: the weight is in it before signs are looked at, also a negative one
    density          the share of entries that stays, above 0 and at most 1
    M (out, in)      what the method gives: of full rank, unlike the Δ_i
    A, B             the nearest product of rank r to M that a few looks at it find

Both papers change entries of the updates themselves. PEFT's "ties" and "dare_linear" change entries of A and of B
apart: that adds cross-terms, and an entry of A is no entry of the update. Here it is done as in the papers; M is then
no product of thin matrices any more, so an SVD cuts it to a rank. The report tells both distances: from M ("what it
means") and from the plain sum. Dropping entries makes noise of full rank, so that the cut takes away much of M. Where
the sum is what is wanted, arithmetic.svd of the same rank is nearer to it, always.

A large M is never whole in memory: its rows are made CHUNK numbers at a time, anew for each look.
Read before this file: arithmetic.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from minilora.torch_lora.arithmetic import (
    Combined,
    Distance,
    ErrorReport,
    LayerReport,
    check_rank,
    distance_from_sum,
    stacked,
)
from minilora.torch_lora.updates import Adapter, Update

CHUNK = 1 << 22  # numbers of a matrix (rows × in) that are there at once, of each adapter
OVERSAMPLING = 8  # columns more than r: [Halko] section 4.2 asks for 5 or 10
ITERATIONS = 3  # M's singular values decay slowly, so more than the 1 or 2 of [Halko] section 4.5

Terms = list[tuple[Tensor, Tensor]]  # B and A of every adapter that has the layer, weight and scaling inside B
Rows = Iterator[tuple[slice, Float32[Tensor, "rows in"]]]  # a matrix, some rows at a time
Entries = Callable[[Terms, float, int], Callable[[], Rows]]  # (terms, density, seed) -> M, as often as it is asked for


def ties(adapters: Sequence[Adapter], weights: Sequence[float], *, r: int, density: float, seed: int = 0) -> Combined:
    """Trim, elect signs, and average what agrees.                                [TIES] algorithm 1

        trimmed_i = Δ_i where |Δ_i| is among the density · out · in largest, else 0
        M = mean of those trimmed_i ≠ 0 whose sign is that of Σ_i trimmed_i          entry by entry

    A mean, not a sum: an adapter combined with itself gives itself. Where the trimmed entries cancel exactly, M is 0.
    Largest means of one layer, as in PEFT; the paper's authors trim the whole model as one vector. Entries as large as
    the last that stays all stay. `seed` is of the SVD's random start.

    Raises:
        ValueError: if r or density is impossible; else as arithmetic.cat.
    """
    return _sparse_sum("ties", _elected, adapters, weights, r, density, seed)


def dare(adapters: Sequence[Adapter], weights: Sequence[float], *, r: int, density: float, seed: int = 0) -> Combined:
    """Drop entries at random, and rescale those that stay.                       [DARE] section 3

        M = Σ_i mask_i · Δ_i / density,   each entry of mask_i is 1 with probability density, else 0

    The mean of M over all masks is the sum, and E ‖M − S‖² = (1/density − 1) · Σ_i ‖Δ_i‖². The same seed gives the same
    masks, whatever the chunk is.

    Raises:
        ValueError: if r or density is impossible; else as arithmetic.cat.
    """
    return _sparse_sum("dare", _dropped, adapters, weights, r, density, seed)


def _sparse_sum(
    method: str,
    entries: Entries,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    r: int,
    density: float,
    seed: int,
) -> Combined:
    check_rank(r)
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}: it is the share of entries that stays, above 0 and at most 1")
    stacks = stacked(adapters, weights)
    seeds = torch.Generator().manual_seed(seed)
    updates, layers = {}, {}
    for name, (B_R, A_R) in stacks.items():
        ranks = [adapter[name].r for adapter in adapters if name in adapter]
        terms = list(zip(B_R.float().split(ranks, dim=1), A_R.float().split(ranks, dim=0), strict=True))
        layer_seed, start_seed = torch.randint(2**62, (2,), generator=seeds).tolist()
        M = entries(terms, density, layer_seed)
        if B_R.shape[0] * A_R.shape[1] <= CHUNK:  # one chunk is all of it: it is made once, and kept
            M = partial(iter, list(M()))
        updates[name] = low_rank(M, (B_R.shape[0], A_R.shape[1]), r, torch.Generator().manual_seed(start_seed))
        meant = _distance_from_rows(updates[name], M)
        layers[name] = LayerReport(updates[name].r, distance_from_sum(updates[name], B_R, A_R), meant)
    return Combined(updates, ErrorReport(f"{method}, density={density}, r={r}", layers))


def _delta_rows(terms: Terms) -> Iterator[tuple[slice, Float32[Tensor, "adapters rows in"]]]:
    """The Δ_i, some rows at a time."""
    (out_features, _), in_features = terms[0][0].shape, terms[0][1].shape[1]
    step = max(1, CHUNK // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        yield rows, torch.stack([B[rows] @ A for B, A in terms])


def _elected(terms: Terms, density: float, seed: int) -> Callable[[], Rows]:
    kept = max(1, round(density * terms[0][0].shape[0] * terms[0][1].shape[1]))
    smallest = torch.tensor([kth_largest_magnitude(partial(_delta_rows, [term]), kept) for term in terms])

    def rows_of_M() -> Rows:
        for rows, deltas in _delta_rows(terms):
            trimmed = deltas.where(deltas.abs() >= smallest[:, None, None], 0.0)
            agrees = trimmed.sign() == trimmed.sum(dim=0).sign()  # a 0 agrees with a sum of 0 alone: nothing is added
            yield rows, (trimmed * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)

    return rows_of_M


def _dropped(terms: Terms, density: float, seed: int) -> Callable[[], Rows]:
    def rows_of_M() -> Rows:
        # a stream for each adapter, so that where a chunk ends changes nothing
        streams = [torch.Generator().manual_seed(seed + i) for i in range(len(terms))]
        for rows, deltas in _delta_rows(terms):
            masks = torch.stack([torch.rand(deltas.shape[1:], generator=stream) < density for stream in streams])
            yield rows, (deltas * masks).sum(dim=0) / density

    return rows_of_M


def kth_largest_magnitude(look: Callable[[], Iterator[tuple[slice, Float32[Tensor, "..."]]]], k: int) -> float:
    """Find the k-th largest |x| of numbers that are seen in pieces, exactly, in three looks.

    The bits of a positive float32, read as a whole number, sort as the float32 does: each look counts 10 or 11 bits of
    those numbers whose higher bits are known to be right, and the bucket that holds the k-th gives the next bits.
    """
    known = 0  # the bits found so far
    for shift, width in ((20, 11), (10, 10), (0, 10)):
        counts = torch.zeros(1 << width, dtype=torch.int64)
        for _, piece in look():
            bits = piece.abs().flatten().view(torch.int32)
            inside = bits[bits >> (shift + width) == known]
            counts += torch.bincount((inside >> shift) & ((1 << width) - 1), minlength=1 << width)
        at_least = counts.flip(0).cumsum(0).flip(0)  # numbers in this bucket or a higher one
        bucket = int((at_least >= k).nonzero()[-1])
        k -= int(at_least[bucket] - counts[bucket])
        known = (known << width) | bucket
    return torch.tensor(known, dtype=torch.int32).view(torch.float32).item()


def low_rank(M: Callable[[], Rows], shape: tuple[int, int], r: int, generator: torch.Generator) -> Update:
    """Find a product of rank r near the best one, from looks at M's rows.        [Halko] algorithms 4.4, 5.1

        Y = M Ω;  then, ITERATIONS times:  Y = M orth(Mᵀ orth(Y));   Q = orth(Y);   QᵀM = U Σ Vᵀ
        B = Q U_r √Σ_r,  A = √Σ_r V_rᵀ

    Ω is random and has a few columns more than r. What is left out is measured, not promised: see the report.
    """
    out_features, in_features = shape
    columns = min(r + OVERSAMPLING, out_features, in_features)
    X = torch.randn(in_features, columns, generator=generator)
    for _ in range(ITERATIONS + 1):
        Q = _orthonormal(torch.cat([piece @ X for _, piece in M()]))
        projected = sum((piece.T @ Q[rows] for rows, piece in M()), torch.zeros(in_features, columns))  # (QᵀM)ᵀ
        X = _orthonormal(projected)
    U, sigma, Vt = torch.linalg.svd(projected.T, full_matrices=False)
    root = sigma[:r].sqrt()
    return Update((root[:, None] * Vt[:r]).contiguous(), Q @ (U[:, :r] * root))


def _orthonormal(X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    return torch.linalg.qr(X).Q


def _distance_from_rows(update: Update, M: Callable[[], Rows]) -> Distance:
    error = norm = 0.0
    for rows, piece in M():
        error += (piece - update.B[rows] @ update.A).double().square().sum().item()
        norm += piece.double().square().sum().item()
    return Distance(error**0.5, norm**0.5)
