"""Lesson 02: the best copy of a rank, how much rank is used, and where factors stop paying, with learners' mistakes.

The inputs are generic on purpose: out ≠ in, r well below both, energies that no two ways of counting answer alike.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy import ndarray

from minilora.classroom.exercises import Bug, Case, Exercise, Property
from minilora.classroom.pictures.low_rank import break_even_rank
from minilora.numpy_lora.rank import effective_rank, truncated_svd


def with_spectrum(rng: np.random.Generator, out_features: int, in_features: int, sigma: ndarray) -> ndarray:
    """A matrix with these singular values and random directions."""
    n = len(sigma)
    U, V = (np.linalg.qr(rng.normal(size=(size, n)))[0] for size in (out_features, in_features))
    return U * sigma @ V.T


# ----------------------------------------------------------------------------------------------------- 02.1 best copy


def copy_inputs(rng: np.random.Generator) -> Case:
    """A 9 × 6 matrix whose singular values fall gently from about 3 to about 0.5."""
    sigma = 3 * 0.7 ** np.arange(6) * rng.uniform(0.95, 1.05, size=6)
    return {"M": with_spectrum(rng, 9, 6, sigma), "r": 3}


def factors_of(answer: Any) -> tuple[ndarray, ndarray] | None:
    """B and A as plain arrays, where an answer is two matrices that can be multiplied; else None."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        return None
    B, A = (np.asarray(factor) for factor in answer)
    return (B, A) if B.ndim == A.ndim == 2 and B.shape[1] == A.shape[0] else None


def product_of(function: Callable, case: Case) -> Any:
    """The shapes of the factors and their product, which is unique; the factors themselves are not."""
    answer = function(case["M"], case["r"])
    if (factors := factors_of(answer)) is None:
        return answer
    B, A = factors
    return {"shape of B": np.array(B.shape), "shape of A": np.array(A.shape), "B A": B @ A}


def gives_factors(function: Callable, case: Case) -> str | None:
    """Two matrices, B (out, r) and A (r, in)."""
    M, r = case["M"], case["r"]
    answer = function(M, r)
    wanted = f"expected B {(M.shape[0], r)} and A {(r, M.shape[1])}"
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        shape = f" of shape {answer.shape}, with {answer.size} numbers" if isinstance(answer, ndarray) else ""
        return f"one {type(answer).__name__}{shape}; {wanted}" if shape else f"{answer!r:.60}; {wanted}"
    shapes = tuple(np.shape(factor) for factor in answer)
    return None if shapes == ((M.shape[0], r), (r, M.shape[1])) else f"shapes {shapes[0]} and {shapes[1]}; {wanted}"


def no_competitor_is_nearer(function: Callable, case: Case) -> str | None:
    """200 random factors, each with the best partner it can have; and your own two, each with its best partner."""
    M, r = case["M"], case["r"]
    B, A = factors_of(function(M, r)) or (np.zeros((len(M), r)), np.zeros((r, M.shape[1])))
    yours, rng = np.linalg.norm(M - B @ A), np.random.default_rng(0)
    rivals = {f"random competitor {i}": rng.normal(size=(r, M.shape[1])) for i in range(1, 201)}
    rivals["another B for your own A"] = A
    for name, rows in rivals.items():
        away = np.linalg.norm(M - M @ np.linalg.pinv(rows) @ rows)
        if away < yours * (1 - 1e-5):
            return f"{name} is nearer: {away:.4f} away from M, yours is {yours:.4f} away"
    return None


def error_is_the_tail(function: Callable, case: Case) -> str | None:
    """‖M − B A‖ = √(σᵣ₊₁² + σᵣ₊₂² + …), the least that any matrix of rank r can reach."""
    M, r = case["M"], case["r"]
    B, A = factors_of(function(M, r)) or (np.zeros((len(M), r)), np.zeros((r, M.shape[1])))
    error, tail = np.linalg.norm(M - B @ A), np.linalg.norm(np.linalg.svd(M, compute_uv=False)[r:])
    return None if abs(error - tail) <= 1e-5 * np.linalg.norm(M) else f"an error of {error:.4f}; the tail is {tail:.4f}"


def _svd_copy(change: Callable[..., Any]) -> Callable:
    """A wrong best_rank_r: `change` makes the answer of U, σ, Vᵀ and r."""

    def wrong(M: ndarray, r: int) -> Any:
        U, sigma, Vt = np.linalg.svd(M, full_matrices=False)
        return change(U, sigma, Vt, r)

    return wrong


COPY = Exercise(
    id="02.1",
    title="The best copy of rank r",
    asks="best_rank_r(M, r) returns the factors B (out, r) and A (r, in) whose product is the nearest of rank r to M",
    points=3,
    minutes=10,
    difficulty=2,
    importance=3,
    reference=truncated_svd,
    generate=copy_inputs,
    observe=product_of,
    tolerance=None,
    properties=(
        Property(name="it returns two factors, B (out, r) and A (r, in)", test=gives_factors),
        Property(name="no competitor of rank r is nearer to M", test=no_competitor_is_nearer),
        Property(name="its error is the tail of the spectrum (Eckart and Young)", test=error_is_the_tail),
    ),
    hints=(
        "np.linalg.svd(M, full_matrices=False) gives U (out, n), the singular values (n,), and V transposed.",
        "The first r pieces: columns of U, rows of Vt. Each piece is weighed once, by its singular value.",
        "B = U[:, :r] * sigma[:r] weighs the columns; A = Vt[:r]. Or give each the square root, as the package does.",
    ),
    bugs=(
        Bug(
            name="the full matrix",
            function=_svd_copy(lambda U, s, Vt, r: U[:, :r] * s[:r] @ Vt[:r]),
            why="The copy is right, but multiplied out it is as large as M: nothing is saved. Return the two factors.",
            link="5 · Derivation",
        ),
        Bug(
            name="the smallest pieces",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, -r:] * s[-r:], Vt[-r:])),
            why="You kept the last r pieces; NumPy sorts singular values from large to small (eigh: from small).",
            link="8 · Break it",
        ),
        Bug(
            name="no singular values",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, :r], Vt[:r])),
            why="You left the singular values out: every piece counts 1, whatever its size.",
            link="8 · Break it",
        ),
        Bug(
            name="weighed twice",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, :r] * s[:r], s[:r, None] * Vt[:r])),
            why="Both factors carry σ, so their product carries σ². Put σ into one of them, or √σ into each.",
        ),
        Bug(
            name="half the weight",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, :r] * np.sqrt(s[:r]), Vt[:r])),
            why="√σ stands in one factor only; the product must carry σ: √σ in each, or σ in one.",
        ),
        Bug(
            name="Vt taken for V",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, :r] * s[:r], Vt[:, :r].T)),
            why="NumPy returns V transposed: its rows are the directions. You took columns; a square Vt allows it.",
            link="8 · Break it",
        ),
        Bug(
            name="one piece too few",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, : r - 1] * s[: r - 1], Vt[: r - 1])),
            why="You kept r − 1 pieces: [:r] holds the first r.",
        ),
        Bug(
            name="one piece too many",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, : r + 1] * s[: r + 1], Vt[: r + 1])),
            why="You kept r + 1 pieces: [:r] holds the first r, from 0 to r − 1.",
        ),
        Bug(
            name="the first piece skipped",
            function=_svd_copy(lambda U, s, Vt, r: (U[:, 1 : r + 1] * s[1 : r + 1], Vt[1 : r + 1])),
            why="You began at index 1: the largest piece has index 0.",
        ),
        Bug(
            name="A and B swapped",
            function=_svd_copy(lambda U, s, Vt, r: (Vt[:r], U[:, :r] * s[:r])),
            why="You returned A first; asked for are B (out, r), then A (r, in).",
        ),
        Bug(
            name="columns of M",
            function=lambda M, r: (M[:, :r].copy(), np.eye(r, M.shape[1])),
            why="You kept the first r columns of M as they are. That has rank r, but the rest of M is lost whole.",
            link="8 · Break it",
        ),
    ),
)

# ------------------------------------------------------------------------------------------------ 02.2 effective rank

ENERGIES = (0.5, 0.8, 0.9, 0.99)


def rank_inputs(rng: np.random.Generator) -> Case:
    """A 12 × 20 matrix whose spectrum bends: a few large values, a slope, and a carpet of small ones."""
    sigma = 0.9 * 0.75 ** np.arange(12) * rng.uniform(0.95, 1.05, size=12) + 0.05
    return {"M": with_spectrum(rng, 12, 20, sigma), "energy": 0.99}


def at_several_energies(function: Callable, case: Case) -> dict[str, Any]:
    """The answers for several shares, and for four equal values, where half of the energy is exactly two of them."""
    answers = {f"energy {share}": function(case["M"], share) for share in ENERGIES}
    return {**answers, "four equal values, energy 0.5": function(2 * np.eye(4, 5), 0.5)}


def is_a_whole_number(function: Callable, case: Case) -> str | None:
    """A rank counts pieces."""
    rank = function(case["M"], case["energy"])
    return None if np.ndim(rank) == 0 and rank == int(rank) else f"{rank!r:.60}; a rank is one whole number"


def does_not_see_the_scale(function: Callable, case: Case) -> str | None:
    """A matrix and a hundred times that matrix have one effective rank."""
    small, large = (function(factor * case["M"], case["energy"]) for factor in (0.01, 1))
    return None if small == large else f"{large} for M, and {small} for M / 100"


def is_enough_and_not_more(function: Callable, case: Case) -> str | None:
    """The first k pieces hold the share, the first k − 1 do not."""
    M, energy = case["M"], case["energy"]
    k, size = int(function(M, energy)), np.linalg.norm(M) ** 2
    if not 1 <= k <= min(M.shape):
        return f"{k}; a {M.shape} matrix has ranks 1 to {min(M.shape)}"
    held = [1 - np.linalg.norm(M - np.matmul(*truncated_svd(M, i))) ** 2 / size if i else 0.0 for i in (k - 1, k)]
    if held[1] < energy - 1e-9:
        return f"{k}, but a copy of rank {k} holds {held[1]:.4f} of the energy, less than {energy}"
    return None if held[0] < energy else f"{k}, but a copy of rank {k - 1} holds {held[0]:.4f} of the energy already"


def _first(held: ndarray, energy: float) -> int:
    """How many are needed until `held` reaches the share."""
    return int(np.argmax(held >= energy)) + 1


def _values_of(M: ndarray) -> ndarray:
    return np.linalg.svd(M, compute_uv=False)


def _held(values: ndarray) -> ndarray:
    return np.cumsum(values) / values.sum()


EFFECTIVE = Exercise(
    id="02.2",
    title="How much rank is used",
    asks="effective_rank(M, energy) returns the smallest k whose first k pieces hold at least that share of ‖M‖²",
    points=3,
    minutes=10,
    difficulty=2,
    importance=2,
    reference=effective_rank,
    generate=rank_inputs,
    observe=at_several_energies,
    tolerance=0,
    properties=(
        Property(name="it is one whole number", test=is_a_whole_number),
        Property(name="M and M / 100 have the same effective rank", test=does_not_see_the_scale),
        Property(name="k pieces are enough, and k − 1 are not", test=is_enough_and_not_more),
    ),
    hints=(
        "np.linalg.svd(M, compute_uv=False) gives the singular values alone. The energy of a piece is its square.",
        "np.cumsum adds up; divided by the total, entry i is the share that the first i + 1 pieces hold.",
        "np.argmax of a row of truth values is the index of the first True. Ranks count from 1, indices from 0.",
    ),
    bugs=(
        Bug(
            name="values, not squares",
            function=lambda M, energy: _first(_held(_values_of(M)), energy),
            why="You added up singular values; energy is their squares. The tail then looks larger than it is.",
            link="5 · Derivation",
        ),
        Bug(
            name="above, not at least",
            function=lambda M, energy: int(np.argmax(_held(_values_of(M) ** 2) > energy)) + 1,
            why="You asked for more than the share; at least that much is >=. It shows where the share is hit exactly.",
        ),
        Bug(
            name="index for count",
            function=lambda M, energy: _first(_held(_values_of(M) ** 2), energy) - 1,
            why="You returned the index of the last piece; counted from 1, that is one piece more.",
        ),
        Bug(
            name="one too many",
            function=lambda M, energy: _first(_held(_values_of(M) ** 2), energy) + 1,
            why="You returned one more than needed: k pieces hold the share already.",
        ),
        Bug(
            name="divided by the largest",
            function=lambda M, energy: _first(np.cumsum(_values_of(M) ** 2) / _values_of(M)[0] ** 2, energy),
            why="You divided by the largest piece's energy instead of the total: the first piece then holds 100 %.",
        ),
        Bug(
            name="not divided",
            function=lambda M, energy: _first(np.cumsum(_values_of(M) ** 2), energy),
            why="You compared energies with a share: divide by the total, or a larger matrix gets a smaller rank.",
        ),
        Bug(
            name="a threshold",
            function=lambda M, energy: int(np.sum(_values_of(M) >= (1 - energy) * _values_of(M)[0])),
            why="You counted the values above a part of the largest. That is a numerical rank; it ignores the sum.",
        ),
        Bug(
            name="from the small end",
            function=lambda M, energy: _first(_held(_values_of(M)[::-1] ** 2), energy),
            why="You added up from the smallest: the largest pieces come first.",
        ),
        Bug(
            name="norms, not energies",
            function=lambda M, energy: _first(np.sqrt(_held(_values_of(M) ** 2)), energy),
            why="You compared ‖copy‖ / ‖M‖ with the share; the share is of the squares.",
        ),
        Bug(
            name="every piece",
            function=lambda M, energy: int(np.linalg.matrix_rank(M)),
            why="You counted all pieces that are not zero, and after training none is zero. The share plays no part.",
            link="8 · Break it",
        ),
    ),
)

# ------------------------------------------------------------------------------------------------ 02.3 break-even rank


def shape_inputs(rng: np.random.Generator) -> Case:
    """Two sides, neither equal nor a multiple of the other."""
    return {"d": int(rng.integers(301, 500)) * 2 + 1, "k": int(rng.integers(100, 300)) * 2 + 1}


def holds_as_many(function: Callable, case: Case) -> str | None:
    """At that r the factors hold exactly as many numbers as the matrix."""
    d, k = case["d"], case["k"]
    r = float(function(d, k))
    factors = r * d + r * k
    return (
        None if abs(factors - d * k) <= 1e-5 * d * k else f"{r:.6g}: factors of {factors:,.0f}, a matrix of {d * k:,}"
    )


def does_not_care_which_side(function: Callable, case: Case) -> str | None:
    """A matrix and its transpose break even at the same r."""
    one, other = (float(function(*sides)) for sides in ((case["d"], case["k"]), (case["k"], case["d"])))
    return None if abs(one - other) <= 1e-5 * abs(one) else f"{one:.6g} for d × k, {other:.6g} for k × d"


BREAK_EVEN = Exercise(
    id="02.3",
    title="Where factors stop paying",
    asks="break_even_rank(d, k) returns the unrounded r at which B (d, r) and A (r, k) are as large as a d × k matrix",
    points=1,
    minutes=5,
    difficulty=1,
    importance=2,
    reference=break_even_rank,
    generate=shape_inputs,
    properties=(
        Property(name="at that r the factors are as large as the matrix", test=holds_as_many),
        Property(name="a matrix and its transpose break even at the same r", test=does_not_care_which_side),
    ),
    hints=(
        "Count the numbers: B holds d · r, A holds r · k, the matrix d · k.",
        "Set the first two together equal to the third, and solve for r.",
    ),
    bugs=(
        Bug(
            name="the full width",
            function=lambda d, k: min(d, k),
            why="At r = the smaller side one of the two factors alone is a whole matrix. There are two: count both.",
        ),
        Bug(
            name="only A counted",
            function=lambda d, k: d,
            why="That is where A alone is as large as the matrix: B, with d · r numbers, is missing.",
        ),
        Bug(
            name="the larger side",
            function=lambda d, k: max(d, k),
            why="No matrix has more rank than its smaller side, and the factors are larger than it long before that.",
        ),
        Bug(
            name="half the smaller side",
            function=lambda d, k: min(d, k) / 2,
            why="Half the side is right for a square only: for d × k it is d k / (d + k).",
        ),
        Bug(
            name="half of d",
            function=lambda d, k: d / 2,
            why="d / 2 is right for a square only; here k counts as well: d k / (d + k).",
        ),
        Bug(
            name="the side of a square",
            function=lambda d, k: float(np.sqrt(d * k)),
            why="√(d k) is the side of a square with as many numbers; the factors grow with r (d + k), not with r².",
        ),
        Bug(
            name="upside down",
            function=lambda d, k: (d + k) / (d * k),
            why="From r (d + k) = d k follows r = d k / (d + k); you have its reciprocal.",
        ),
        Bug(
            name="rounded down",
            function=lambda d, k: d * k // (d + k),
            why="You rounded down. Do that last, for the largest r that saves; asked for is where both are equal.",
        ),
    ),
)

# --------------------------------------------------------------------------------------- section 8: which bug is this?

PATIENTS = {"1": "the smallest pieces", "2": "columns of M", "3": "Vt taken for V", "4": "no singular values"}


def patients() -> dict[str, Callable]:
    """The copying function of each patient: a catalogued bug."""
    return {name: COPY.bug(bug) for name, bug in PATIENTS.items()}


# --------------------------------------------------------------------------------------------- section 10: the stretch


class Looks:
    """A matrix that gives products only, and counts what it is multiplied with.

    >>> looks = Looks(np.ones((3, 2)))
    >>> looks.times(np.ones((2, 4))).shape, looks.times_transposed(np.ones((3, 1))).shape, looks.columns
    ((3, 4), (2, 1), 5)
    """

    def __init__(self, M: ndarray) -> None:
        self._M, self.columns = M, 0

    def times(self, X: ndarray) -> ndarray:
        """M X."""
        self.columns += X.shape[1]
        return self._M @ X

    def times_transposed(self, Y: ndarray) -> ndarray:
        """Mᵀ Y."""
        self.columns += Y.shape[1]
        return self._M.T @ Y


EXERCISES = [COPY, EFFECTIVE, BREAK_EVEN]
