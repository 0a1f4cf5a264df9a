"""Lesson 01: the bytes of a training, the largest model for a card, and which quoted tables can be true.

The inputs are generic: no two of the widths are alike, and no card is a round number of GiB.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minilora.classroom.exercises import Bug, Case, Exercise, Property
from minilora.classroom.pictures.bill import GB, largest_trainable, static_bytes

GIB = 2**30

# ---------------------------------------------------------------------------------------------------------- 01.1 bytes


def train_bytes(n: int, weight: int, gradient: int, moment: int, master: int) -> int:
    """Bytes of all that training n parameters with Adam holds."""
    return static_bytes(n, weight=weight, gradient=gradient, moment=moment, master=master)


def byte_inputs(rng: np.random.Generator) -> Case:
    """Some hundred million parameters, and four widths that all differ."""
    weight, gradient, moment, master = (int(width) for width in rng.choice([1, 2, 3, 4, 8], size=4, replace=False))
    n = int(rng.integers(1e8, 1e9))
    return {"n": n, "weight": weight, "gradient": gradient, "moment": moment, "master": master}


def is_a_whole_number_of_bytes(function: Callable, case: Case) -> str | None:
    """Bytes are whole."""
    found = function(*case.values())
    return None if float(found).is_integer() else f"returned {found!r}: bytes are a whole number"


def doubles_with_n(function: Callable, case: Case) -> str | None:
    """Twice the parameters take twice the bytes."""
    once, twice = function(*case.values()), function(*{**case, "n": 2 * case["n"]}.values())
    return None if twice == 2 * once else f"twice the parameters take {twice / once:.3g} times the bytes, not 2"


BYTES = Exercise(
    id="01.1",
    title="The bill of a training",
    asks="train_bytes(n, weight, gradient, moment, master) returns bytes; the widths are bytes of one number of each",
    points=2,
    minutes=8,
    difficulty=1,
    importance=3,
    reference=train_bytes,
    generate=byte_inputs,
    tolerance=1e-9,
    properties=(
        Property(name="a whole number of bytes", test=is_a_whole_number_of_bytes),
        Property(name="twice the parameters, twice the bytes", test=doubles_with_n),
    ),
    hints=(
        "What does Adam keep of every parameter that it trains? Write down one line for each.",
        "The weight, its gradient, the mean of the gradient, the mean of its square, and perhaps a copy in float32.",
        "n times the sum of the widths, in which the moment counts twice.",
    ),
    bugs=(
        Bug(
            name="one moment",
            function=lambda n, weight, gradient, moment, master: n * (weight + gradient + moment + master),
            why="You counted one moment; Adam keeps two: the mean of the gradient, and the mean of its square.",
            link="5 · Derivation",
        ),
        Bug(
            name="no gradients",
            function=lambda n, weight, gradient, moment, master: n * (weight + 2 * moment + master),
            why="You left out the gradients: when the optimizer makes its step, all of them are there.",
        ),
        Bug(
            name="no moments",
            function=lambda n, weight, gradient, moment, master: n * (weight + gradient + master),
            why="You left out Adam's moments: that is the bill of plain SGD.",
        ),
        Bug(
            name="the weights alone",
            function=lambda n, weight, gradient, moment, master: n * weight,
            why="You counted the weights alone: that is what answering takes, not training.",
        ),
        Bug(
            name="no master copy",
            function=lambda n, weight, gradient, moment, master: n * (weight + gradient + 2 * moment),
            why="You left out the master copy: in 16 bits a small step would be lost without it.",
        ),
        Bug(
            name="moments as wide as the weights",
            function=lambda n, weight, gradient, moment, master: n * (3 * weight + gradient + master),
            why="You counted the moments as wide as the weights; they have a width of their own, mostly float32.",
        ),
        Bug(
            name="in GiB",
            function=lambda n, weight, gradient, moment, master: (
                n * (weight + gradient + 2 * moment + master) / GIB * GB
            ),
            why="You divided by 2³⁰ and took it for 10⁹: a GiB is 7.4 % more than a GB. Give plain bytes.",
        ),
        Bug(
            name="in bits",
            function=lambda n, weight, gradient, moment, master: 8 * n * (weight + gradient + 2 * moment + master),
            why="You gave bits: the widths are bytes already.",
        ),
    ),
)

# -------------------------------------------------------------------------------------------------------- 01.2 largest


def card_inputs(rng: np.random.Generator) -> Case:
    """A card, bytes that a parameter takes, and the share that is kept for everything else."""
    return {
        "card_gb": float(np.round(rng.uniform(7, 90), 1)),
        "bytes_per_param": float(np.round(rng.uniform(0.5, 20), 2)),
        "reserve": float(np.round(rng.uniform(0.05, 0.4), 2)),
    }


def fits_and_one_more_does_not(function: Callable, case: Case) -> str | None:
    """n parameters fit, n + 1 do not."""
    n = function(*case.values())
    if int(n) != n:
        return f"returned {n!r}: parameters are a whole number"
    room = (1 - case["reserve"]) * case["card_gb"] * GB
    if n * case["bytes_per_param"] > room * (1 + 1e-12):
        return f"{int(n):,} parameters take {n * case['bytes_per_param'] / GB:.4f} GB of {room / GB:.4f}"
    return None if (n + 2) * case["bytes_per_param"] > room else f"more than {int(n):,} would fit"


def grows_with_the_card(function: Callable, case: Case) -> str | None:
    """A larger card holds no fewer, a wider parameter no more."""
    n = function(*case.values())
    larger = function(*{**case, "card_gb": 1.5 * case["card_gb"]}.values())
    wider = function(*{**case, "bytes_per_param": 1.5 * case["bytes_per_param"]}.values())
    return None if wider < n < larger else f"{n:,} become {larger:,} on a larger card, {wider:,} with wider parameters"


LARGEST = Exercise(
    id="01.2",
    title="The largest model for a card",
    asks="largest_trainable(card_gb, bytes_per_param, reserve) returns the most parameters that fit, a whole number",
    points=2,
    minutes=8,
    difficulty=1,
    importance=2,
    reference=largest_trainable,
    generate=card_inputs,
    tolerance=1e-9,
    properties=(
        Property(name="so many fit, and no more", test=fits_and_one_more_does_not),
        Property(name="larger cards hold more, wider parameters fewer", test=grows_with_the_card),
    ),
    hints=(
        "Turn the sum of 01.1 round: bytes = n · bytes_per_param. Which bytes may n fill?",
        "card_gb is in GB, 10⁹ bytes. The reserve is a share: 0.1 leaves nine tenths.",
        "math.floor((1 - reserve) * card_gb * 1e9 / bytes_per_param).",
    ),
    bugs=(
        Bug(
            name="a GB taken for a GiB",
            function=lambda card_gb, bytes_per_param, reserve: math.floor(
                (1 - reserve) * card_gb * GIB / bytes_per_param
            ),
            why="You took a GB for 2³⁰ bytes; it is 10⁹, and you promised 7.4 % that are not there.",
        ),
        Bug(
            name="no reserve",
            function=lambda card_gb, bytes_per_param, reserve: math.floor(card_gb * GB / bytes_per_param),
            why="You left no reserve: activations and what the driver takes must fit as well.",
        ),
        Bug(
            name="the reserve on the other side",
            function=lambda card_gb, bytes_per_param, reserve: math.floor(
                card_gb * GB / bytes_per_param / (1 + reserve)
            ),
            why="You divided by 1 + reserve: that keeps a share of what is used, not of the card.",
        ),
        Bug(
            name="the reserve alone",
            function=lambda card_gb, bytes_per_param, reserve: math.floor(reserve * card_gb * GB / bytes_per_param),
            why="You filled the reserve, and left the rest of the card empty.",
        ),
        Bug(
            name="in billions",
            function=lambda card_gb, bytes_per_param, reserve: (1 - reserve) * card_gb / bytes_per_param,
            why="You returned billions; asked is the number of parameters.",
        ),
        Bug(
            name="bits per parameter",
            function=lambda card_gb, bytes_per_param, reserve: math.floor(
                (1 - reserve) * card_gb * GB / (bytes_per_param / 8)
            ),
            why="You divided by 8: the width is in bytes already.",
        ),
    ),
)

# ---------------------------------------------------------------------------------------------------------- 01.3 audit

QUOTED: dict[str, dict[str, Any]] = {
    "7B in fp32 with Adam, 112 GB": {"n": 7e9, "widths": {"weights": 4, "gradients": 4, "moments": 8}, "gb": 112},
    "70B in fp32 with Adam, 560 GB": {"n": 70e9, "widths": {"weights": 4, "gradients": 4, "moments": 8}, "gb": 560},
    "70B in fp16 and both moments in fp32, 280 GB": {"n": 70e9, "widths": {"weights": 2, "moments": 8}, "gb": 280},
    "70B in fp16, all of it trained, 140 GB": {
        "n": 70e9,
        "widths": {"weights": 2, "gradients": 2, "moments": 8},
        "gb": 140,
    },
    "13B in fp32 with Adam, 208 GB": {"n": 13e9, "widths": {"weights": 4, "gradients": 4, "moments": 8}, "gb": 208},
    "70B in 4 bits, 24 GB": {"n": 70e9, "widths": {"weights": 0.5}, "gb": 24},
}  # what articles print, and the parts that they say it holds: CLAIMS.md names them


def audit(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Whether each quoted figure is at least what its own parts add up to, less a part in fifty for rounding."""
    return [row["gb"] >= 0.98 * row["n"] * sum(row["widths"].values()) / GB for row in rows]


def audit_inputs(rng: np.random.Generator) -> Case:
    """Thirty rows: some enough, some too little by any amount, some short by a rounding."""
    rows = []
    for factor in [0.3, 0.5, 0.7, 0.9, 0.95, 0.97, 0.985, 0.995, 1.0, 1.01, 1.05, 1.2, 2.0] * 3:
        names = rng.permutation(["weights", "gradients", "moments", "master"])[: int(rng.integers(1, 5))]
        widths = {str(name): float(rng.choice([0.5, 1, 2, 4, 8])) for name in names}
        n = float(np.round(rng.uniform(0.1, 80), 1)) * 1e9
        rows.append({"n": n, "widths": widths, "gb": factor * n * sum(widths.values()) / GB})
    return {"rows": [rows[int(i)] for i in rng.permutation(len(rows))]}


def _audit(enough: Callable[[Mapping[str, Any]], bool]) -> Callable:
    """An audit by another rule."""
    return lambda rows: [enough(row) for row in rows]


def _least(row: Mapping[str, Any]) -> float:
    return row["n"] * sum(row["widths"].values())


AUDIT = Exercise(
    id="01.3",
    title="Can this table be true?",
    asks="audit(rows) returns True for each row whose gb is at least 0.98 of n · the sum of its widths, in 10⁹ bytes",
    points=2,
    minutes=12,
    difficulty=2,
    importance=2,
    reference=audit,
    generate=audit_inputs,
    tolerance=0.0,
    hints=(
        'row["widths"] is a dict of bytes per parameter, by part. What do the parts of a row add up to?',
        "Compare in the same unit: n · sum(widths) is bytes, gb is 10⁹ of them.",
        "Figures are rounded: a row is possible from 98 % of the sum on. One truth value for each row, in a list.",
    ),
    bugs=(
        Bug(
            name="to the last byte",
            function=_audit(lambda row: row["gb"] * GB >= _least(row)),
            why="You allowed no rounding: 208 GB is a fair figure for 209.1.",
        ),
        Bug(
            name="in GiB",
            function=_audit(lambda row: row["gb"] * GIB >= 0.98 * _least(row)),
            why="You took a GB for a GiB and waved through what is 7 % short.",
        ),
        Bug(
            name="the first part alone",
            function=_audit(lambda row: row["gb"] * GB >= 0.98 * row["n"] * next(iter(row["widths"].values()))),
            why="You compared with one part; the figure must hold the sum of them.",
        ),
        Bug(
            name="the largest part alone",
            function=_audit(lambda row: row["gb"] * GB >= 0.98 * row["n"] * max(row["widths"].values())),
            why="You compared with the largest part; they are all there at the same time.",
        ),
        Bug(
            name="equal or not",
            function=_audit(lambda row: abs(row["gb"] * GB / _least(row) - 1) <= 0.02),
            why="You asked whether it is equal; a figure above the sum is possible: activations come on top.",
        ),
        Bug(
            name="the wrong way round",
            function=_audit(lambda row: row["gb"] * GB <= 1.02 * _least(row)),
            why="You accepted the figures that are too small: less than the parts add up to cannot hold them.",
        ),
    ),
)

EXERCISES = [BYTES, LARGEST, AUDIT]
