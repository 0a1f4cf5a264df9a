"""Lesson 00: one small exercise, so that `check` is met before anything is hard."""

import numpy as np

from minilora.classroom.exercises import Bug, Case, Exercise


def adapter_numbers(out_features: int, in_features: int, r: int) -> int:
    """How many numbers the pair A (r, in) and B (out, r) holds.

    >>> adapter_numbers(3, 2, r=1)
    5
    """
    return r * in_features + out_features * r


def inputs(rng: np.random.Generator) -> Case:
    """Three sizes, all different."""
    r, in_features, out_features = int(rng.integers(3, 6)), int(rng.integers(10, 20)), int(rng.integers(30, 40))
    return {"out_features": out_features, "in_features": in_features, "r": r}


EXERCISES = [
    Exercise(
        id="00.1",
        title="The numbers in an adapter",
        asks="adapter_numbers(out_features, in_features, r) returns how many numbers A and B hold together",
        points=1,
        minutes=3,
        difficulty=1,
        importance=1,
        reference=adapter_numbers,
        generate=inputs,
        tolerance=0,
        hints=(
            "A has r rows and in_features columns. How many numbers is that?",
            "B has out_features rows and r columns. The answer is the sum of the two.",
        ),
        bugs=(
            Bug(
                name="A alone",
                function=lambda out_features, in_features, r: r * in_features,
                why="You counted A and left out B.",
            ),
            Bug(
                name="B alone",
                function=lambda out_features, in_features, r: out_features * r,
                why="You counted B and left out A.",
            ),
            Bug(
                name="the whole matrix",
                function=lambda out_features, in_features, r: out_features * in_features,
                why="You counted W, which is frozen; A and B are what is trained.",
            ),
        ),
    )
]
