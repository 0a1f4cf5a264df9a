"""Lesson 08: the elbow of a sweep, the overlap of two adapters, and finding a rank without fooling oneself.

A rank is a small whole number, and wrong ways to choose one are often right by luck. So an exercise asks about many
sweeps at once: no two ways agree on all of them.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy import ndarray

from minilora.classroom.comparison import best_rate, by_seed, results
from minilora.classroom.exercises import Bug, Case, Exercise, Property
from minilora.classroom.pictures.rank_sweep import RANKS, best_updates, loss, sweep, task
from minilora.numpy_lora.forward import lora_backward, lora_forward, lora_init
from minilora.numpy_lora.rank import subspace_similarity
from minilora.train.planted import elbow

Losses = Mapping[int, Sequence[float]]

# --------------------------------------------------------------------------------------------------------- 08.1 elbow


def sweep_of_losses(rng: np.random.Generator) -> dict[int, list[float]]:
    """Losses that fall up to some rank and are flat from there on, with noise; the ranks in any order."""
    k, n_seeds = int(rng.integers(1, 7)), int(rng.integers(2, 5))
    drops = rng.uniform(0.05, 0.4, size=k)
    noise = rng.uniform(0.01, 0.12)
    losses = {}
    for r in rng.permutation(np.arange(1, 10)):
        level = 1 - drops[: int(r)].sum() / 2 + 0.01 * max(0, int(r) - k)
        losses[int(r)] = [float(level + noise * rng.normal()) for _ in range(n_seeds)]
    return losses


def elbow_inputs(rng: np.random.Generator) -> Case:
    """Forty sweeps."""
    return {"sweeps": [sweep_of_losses(rng) for _ in range(40)]}


def elbows(function: Callable, case: Case) -> list[Any]:
    """The elbow of each sweep."""
    return [function(losses) for losses in case["sweeps"]]


def shifts_with_nothing(function: Callable, case: Case) -> str | None:
    """Adding the same to all losses, or counting them in another unit, moves no elbow."""
    for losses in case["sweeps"]:
        moved = {r: [3 * value + 1 for value in found] for r, found in losses.items()}
        if function(moved) != function(losses):
            return "the elbow moves when all losses are multiplied by 3 and get 1 added"
    return None


def means(losses: Losses) -> dict[int, float]:
    return {r: statistics.mean(found) for r, found in losses.items()}


def mean_range(losses: Losses) -> float:
    """How far apart seeds alone put the losses of a rank, the mean of all ranks."""
    return statistics.mean(max(found) - min(found) for found in losses.values())


def _within(band: Callable[[Losses], float], choose: Callable = min) -> Callable[[Losses], int]:
    """An elbow with another band, or another choice among the ranks within it."""

    def wrong(losses: Losses) -> int:
        mean = means(losses)
        return choose(r for r, value in mean.items() if value <= min(mean.values()) + band(losses))

    return wrong


def _of_the_best(losses: Losses) -> float:
    mean = means(losses)
    best = losses[min(mean, key=lambda r: mean[r])]
    return max(best) - min(best)


def _first_small_gain(losses: Losses) -> int:
    mean, ranks = means(losses), sorted(losses)
    return next((r for r, after in pairwise(ranks) if mean[r] - mean[after] <= mean_range(losses)), ranks[-1])


ELBOW = Exercise(
    id="08.1",
    title="The elbow of a sweep",
    asks="elbow(losses) returns the smallest rank whose mean loss is at most the least mean loss + the band",
    points=2,
    minutes=10,
    difficulty=1,
    importance=3,
    reference=elbow,
    generate=elbow_inputs,
    observe=elbows,
    tolerance=0.0,
    properties=(Property(name="the unit of the loss does not matter", test=shifts_with_nothing),),
    hints=(
        "losses is {rank: [a loss for each seed]}, in any order. First the mean of each rank.",
        "The band is what seeds do: largest less least of each rank's losses, and the mean of that over all ranks.",
        "min(r for r, mean in means.items() if mean <= min(means.values()) + band).",
    ),
    bugs=(
        Bug(
            name="the least mean",
            function=_within(lambda losses: 0.0),
            why="You took the rank of the least mean loss: among ranks that are equally good it is a matter of luck.",
            link="8 · Break it",
        ),
        Bug(
            name="the least loss of all",
            function=lambda losses: min(losses, key=lambda r: min(losses[r])),
            why="You took the single least loss: the luckiest seed chooses the rank.",
        ),
        Bug(
            name="the largest within the band",
            function=_within(mean_range, max),
            why="You took the largest rank within the band; the elbow is the smallest that is as good.",
        ),
        Bug(
            name="the widest band",
            function=_within(lambda losses: max(max(found) - min(found) for found in losses.values())),
            why="You took the widest range for the band: one unlucky rank then excuses all others.",
        ),
        Bug(
            name="the band of the best alone",
            function=_within(_of_the_best),
            why="You took the range of the best rank alone: with a few seeds that is itself a matter of luck.",
        ),
        Bug(
            name="half the range",
            function=_within(lambda losses: mean_range(losses) / 2),
            why="You took half the range, as if it were ± around a mean; the band here is largest less least.",
        ),
        Bug(
            name="the first small gain",
            function=_first_small_gain,
            why="You compared each rank with the next: a small gain may come before a large one.",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------------- 08.2 overlap


def overlap_inputs(rng: np.random.Generator) -> Case:
    """Two adapters' A, (4, 11) and (7, 11), that share a direction or two, and how many directions of each."""
    shared = rng.normal(size=(2, 11)) * np.array([[4.0], [2.0]])
    A1, A2 = rng.normal(size=(4, 11)), rng.normal(size=(7, 11))
    A1[:2] += shared
    A2 += rng.normal(size=(7, 2)) @ shared
    return {"A1": A1, "A2": A2, "i": 2, "j": 4}


def full_overlap_with_itself(function: Callable, case: Case) -> str | None:
    """The top directions of a matrix lie in its own."""
    phi = function(case["A1"], case["A1"], 2, 3)
    return None if abs(phi - 1) < 1e-6 else f"φ of a matrix' top 2 in its own top 3 is {phi:.4f}; it must be 1"


def mixing_rows_changes_nothing(function: Callable, case: Case) -> str | None:
    """B can absorb any mixture of A's rows; an orthogonal one leaves all of φ as it is."""
    Q = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    phi, mixed = function(*case.values()), function(Q @ case["A1"], *list(case.values())[1:])
    return (
        None if abs(phi - mixed) < 1e-6 else f"after an orthogonal mixing of A1's rows φ is {mixed:.4f}, not {phi:.4f}"
    )


def _rows_of(A: ndarray, count: int) -> ndarray:
    return np.linalg.svd(A, full_matrices=False)[2][:count]


def _plain_rows(A1: ndarray, A2: ndarray, i: int, j: int) -> float:
    V1, V2 = (A[:n] / np.linalg.norm(A[:n], axis=1, keepdims=True) for A, n in ((A1, i), (A2, j)))
    return float(np.sum((V1 @ V2.T) ** 2) / min(i, j))


def _left(A1: ndarray, A2: ndarray, i: int, j: int) -> float:
    U1, U2 = (np.linalg.svd(A, full_matrices=False)[0] for A in (A1, A2))
    return float(np.sum((U1[:, :i].T @ U2[: len(U1), :j]) ** 2) / min(i, j))


def _scaled(change: Callable[[float, int, int], float]) -> Callable[..., float]:
    """A wrong φ made of the right Σ of squared cosines."""

    def wrong(A1: ndarray, A2: ndarray, i: int, j: int) -> float:
        return change(float(np.sum((_rows_of(A1, i) @ _rows_of(A2, j).T) ** 2)), i, j)

    return wrong


OVERLAP = Exercise(
    id="08.2",
    title="Do two adapters mean the same?",
    asks="subspace_similarity(A1, A2, i, j) returns φ = ‖V1ᵢ V2ⱼᵀ‖²_F / min(i, j), of the top right singular vectors",
    points=2,
    minutes=10,
    difficulty=2,
    importance=2,
    reference=subspace_similarity,
    generate=overlap_inputs,
    properties=(
        Property(name="φ of a matrix with itself is 1", test=full_overlap_with_itself),
        Property(name="an orthogonal mixing of the rows changes nothing", test=mixing_rows_changes_nothing),
    ),
    hints=(
        "The rows of A span what the adapter reads. np.linalg.svd(A, full_matrices=False) gives U, σ and Vᵀ.",
        "V1 = the first i rows of Vᵀ of A1, (i, in); V2 = the first j rows of that of A2, (j, in).",
        "V1 @ V2.T holds the cosines between them, (i, j). Square, sum, divide by the smaller of i and j.",
    ),
    bugs=(
        Bug(
            name="rows as they are",
            function=_plain_rows,
            why="You took A's rows, made length 1: they are neither at right angles nor those that matter most.",
        ),
        Bug(
            name="left singular vectors",
            function=_left,
            why="You took U, which says how the rows are mixed; what A reads of its input are the rows of Vᵀ.",
        ),
        Bug(
            name="not squared",
            function=_scaled(lambda total, i, j: float(np.sqrt(total)) / min(i, j)),
            why="You took the norm and not its square: φ of a space with itself would be 1 / √i.",
        ),
        Bug(
            name="divided by the larger",
            function=_scaled(lambda total, i, j: total / max(i, j)),
            why="You divided by max(i, j): a space that lies within a larger one would not get φ = 1.",
        ),
        Bug(
            name="divided by both",
            function=_scaled(lambda total, i, j: total / (i * j)),
            why="You divided by i · j, the number of cosines: their squares add up to min(i, j) at most.",
        ),
        Bug(
            name="all of both",
            function=lambda A1, A2, i, j: float(
                np.sum((_rows_of(A1, len(A1)) @ _rows_of(A2, len(A2)).T) ** 2) / min(i, j)
            ),
            why="You did not cut at i and j: all directions count, also those that training never touched.",
        ),
        Bug(
            name="the last directions",
            function=lambda A1, A2, i, j: float(
                np.sum((_rows_of(A1, len(A1))[-i:] @ _rows_of(A2, len(A2))[-j:].T) ** 2) / min(i, j)
            ),
            why="You took the last singular vectors; NumPy's come with the largest singular value first.",
        ),
    ),
)

# ----------------------------------------------------------------------------------------------------- 08.3 find a rank

MOST_CALLS = 60  # of measure, for one task


@dataclass
class Measure:
    """Trainings that were made before: measure(r, seed) gives the loss on trained rows and the loss on unseen ones."""

    k: int  # the planted rank, which a learner's function is not to read
    table: dict[tuple[int, int], tuple[float, float]] = field(repr=False)
    calls: int = 0

    def __call__(self, r: int, seed: int) -> tuple[float, float]:
        if (r, seed) not in self.table:
            raise ValueError(f"measure({r}, {seed}): the ranks are 1 to {RANKS[-1]}, the seeds 0 to 4")
        self.calls += 1
        return self.table[int(r), int(seed)]


@functools.cache
def trainings(k: int, n: int, noise: float, rows: int) -> dict[tuple[int, int], tuple[float, float]]:
    """The best of every rank with five seeds, judged on so many unseen rows."""
    table = {}
    for seed in range(5):
        given = task(k, n, noise, seed)
        updates = best_updates(given.x, given.R)
        for r in RANKS:
            unseen = loss(given.unseen_x[:rows], given.unseen_R[:rows], updates[r])
            table[r, seed] = (loss(given.x, given.R, updates[r]), unseen)
    return table


def unseen_losses(measure: Measure, n_seeds: int) -> dict[int, list[float]]:
    """The losses on unseen rows of every rank."""
    return {r: [measure(r, seed)[1] for seed in range(n_seeds)] for r in RANKS}


def find_rank(measure: Callable[[int, int], tuple[float, float]]) -> int:
    """The elbow of all ranks, on unseen rows, with three seeds."""
    return elbow({r: [measure(r, seed)[1] for seed in range(3)] for r in RANKS})


def rank_inputs(rng: np.random.Generator) -> Case:
    """Ten tasks whose elbow is the planted rank, with two seeds, three, four or five."""
    tasks: list[Measure] = []
    while len(tasks) < 10:
        k, n, noise, rows = (
            int(rng.choice(some)) for some in ((2, 3, 4, 5, 6, 7), (600, 1200, 2000), (3, 5, 7), (10, 20))
        )
        measure = Measure(k, trainings(k, n, noise / 10, rows))
        if all(elbow(unseen_losses(measure, n_seeds)) == k for n_seeds in (2, 3, 4, 5)):
            tasks.append(Measure(k, measure.table))
    return {"tasks": tasks}


def chosen(function: Callable, case: Case) -> list[Any]:
    """The rank that is chosen for each task."""
    return [function(measure) for measure in case["tasks"]]


def trains_little(function: Callable, case: Case) -> str | None:
    """No task takes more trainings than twelve ranks with five seeds."""
    for measure in case["tasks"]:
        measure.calls = 0
        function(measure)
        if measure.calls > MOST_CALLS:
            return f"measure was called {measure.calls} times for one task; {MOST_CALLS} trainings are the budget"
    return None


def _with_one_seed(choose: Callable[[dict[int, float]], int], which: int = 1) -> Callable:
    """A choice by the losses of seed 0: on unseen rows, or on trained ones (which=0)."""
    return lambda measure: choose({r: measure(r, 0)[which] for r in RANKS})


def _first_rise(losses: dict[int, float]) -> int:
    return next((r for r in RANKS[:-1] if losses[r + 1] > losses[r]), RANKS[-1])


def _largest_drop(losses: dict[int, float]) -> int:
    return max(RANKS[1:], key=lambda r: losses[r - 1] - losses[r])


RANK = Exercise(
    id="08.3",
    title="Find the rank",
    asks="find_rank(measure) returns the smallest rank, of 1 to 12, that is as good as the best on unseen rows",
    points=3,
    minutes=14,
    difficulty=2,
    importance=3,
    reference=find_rank,
    generate=rank_inputs,
    observe=chosen,
    tolerance=0.0,
    properties=(Property(name=f"at most {MOST_CALLS} trainings for a task", test=trains_little),),
    hints=(
        "measure(r, seed) gives two losses: on the rows that were learnt from, and on unseen ones. Which one decides?",
        "One seed is no measurement. Use two to five, for every rank from 1 to 12, and keep them by rank.",
        "{r: [measure(r, seed)[1] for seed in range(3)] for r in range(1, 13)}, and then your elbow of 08.1.",
    ),
    bugs=(
        Bug(
            name="judged by the trained rows",
            function=lambda measure: elbow({r: [measure(r, seed)[0] for seed in range(3)] for r in RANKS}),
            why="You judged by the rows it learnt from: there more rank is always better, down into the noise.",
            link="8 · Break it",
        ),
        Bug(
            name="the best of one seed",
            function=_with_one_seed(lambda losses: min(losses, key=lambda r: losses[r])),
            why="You took the least loss of one seed: whichever rank the noise favours.",
            link="8 · Break it",
        ),
        Bug(
            name="the least mean",
            function=lambda measure: _within(lambda losses: 0.0)(unseen_losses(measure, 3)),
            why="You took the rank of the least mean, though smaller ones are as good as far as seeds can tell.",
        ),
        Bug(
            name="stops at the first rise",
            function=_with_one_seed(_first_rise),
            why="You stopped where the loss first rose: with noise it rises early by chance.",
            link="8 · Break it",
        ),
        Bug(
            name="the largest drop",
            function=_with_one_seed(_largest_drop),
            why="You took the rank with the largest drop: it brought the most, but was not the last worth having.",
        ),
        Bug(
            name="the largest",
            function=lambda measure: RANKS[-1],
            why="You took the largest rank: it learns the noise too, and costs the most.",
            link="8 · Break it",
        ),
    ),
)

EXERCISES = [ELBOW, OVERLAP, RANK]

# ----------------------------------------------------------------------------------------------- what the lesson runs


@functools.cache
def trained_lora(k: int, n: int, noise: float, r: int, seed: int, steps: int = 3000) -> tuple[ndarray, ndarray]:
    """A and B of a LoRA that gradient descent trained on the rows of task(k, n, noise, 0); the seed is A's."""
    given = task(k, n, noise, 0)
    (out, in_), alpha, lr = given.update.shape, float(r), 0.1
    W = np.zeros((out, in_))
    A, B = lora_init(r, in_, out, np.random.default_rng(seed))
    for _ in range(steps):
        dy = (lora_forward(given.x, W, A, B, alpha) - given.R) / len(given.x)
        _, dA, dB = lora_backward(dy, given.x, W, A, B, alpha)
        A, B = A - lr * dA, B - lr * dB
    return A, B


def planted_in_a_decoder() -> dict[int, dict[int, list[float]]]:
    """By planted rank and rank of LoRA: the share of the loss that is left, a number for each seed."""
    found = results("planted_rank")["losses"]
    return {int(k): {int(r): values for r, values in losses.items()} for k, losses in found.items()}


def real_sweep() -> dict[int, list[float]]:
    """By rank: the loss on unseen orders of LoRA at the rate that was best for r = 16, a number for each seed."""
    lr = best_rate("lora")
    by_rank = {r: by_seed("lora" if r == 16 else f"lora r={r}", lr) for r in (1, 2, 4, 8, 16, 32, 64)}
    return {r: [cell["validation_loss"] for cell in its] for r, its in by_rank.items()}


def overfits(k: int, n: int, noise: float) -> bool:
    """Whether the largest rank is worse on unseen rows than the best one, by more than the seeds' band."""
    found = sweep(k, n, noise)
    mean = means(found.unseen)
    return mean[RANKS[-1]] > min(mean.values()) + mean_range(found.unseen)
