"""A network small enough to be fine-tuned within a lesson, every weight free: two layers in NumPy, gradients by hand.

    W1 (64, 64), W2 (16, 64)      y = tanh(x W1ᵀ) W2ᵀ,   loss = ½ ‖y − target‖², averaged over the rows
    narrow      fine-tuning adds one answer, along b, to one question, a: y + 2 tanh(x · a) b
    wide        fine-tuning replaces what the network does by what another network does

The change of a layer is measured after training: W now − W then. Read before this file: nothing.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from numpy import ndarray

HIDDEN, INPUTS, OUTPUTS = 64, 64, 16
N_WEIGHTS = HIDDEN * INPUTS + OUTPUTS * HIDDEN
ROWS, LR, MOMENTUM = 64, 0.1, 0.9
Weights = tuple[ndarray, ndarray]  # W1, W2
Target = Callable[[ndarray], ndarray]


def random_network(rng: np.random.Generator) -> Weights:
    """Weights that keep the size of what passes through them."""
    W1, W2 = rng.normal(size=(HIDDEN, INPUTS)), rng.normal(size=(OUTPUTS, HIDDEN))
    return W1 / math.sqrt(INPUTS), W2 / math.sqrt(HIDDEN)


def outputs(weights: Weights, x: Float[ndarray, "n in"]) -> Float[ndarray, "n out"]:
    """y = tanh(x W1ᵀ) W2ᵀ."""
    W1, W2 = weights
    return np.tanh(x @ W1.T) @ W2.T


def loss_of(weights: Weights, target: Target, x: Float[ndarray, "n in"]) -> float:
    """½ ‖y − target‖², averaged over the rows."""
    return 0.5 * float(np.sum((outputs(weights, x) - target(x)) ** 2)) / len(x)


def gradients(weights: Weights, x: Float[ndarray, "n in"], wanted: Float[ndarray, "n out"]) -> Weights:
    """∂loss/∂W1 and ∂loss/∂W2: each a sum of outer products, one for every row of x."""
    W1, W2 = weights
    hidden = np.tanh(x @ W1.T)
    dy = (hidden @ W2.T - wanted) / len(x)
    return (dy @ W2 * (1 - hidden**2)).T @ x, dy.T @ hidden


def train(
    weights: Weights,
    target: Target,
    steps: int,
    rng: np.random.Generator,
    directions: Float[ndarray, "all k"] | None = None,
) -> Weights:
    """Fit the network to a target by SGD with momentum and a rate that falls to 0; give the new weights.

    With `directions` all weights together move only along these columns: weights = start + directions · z, and the k
    numbers z are what is trained, as where intrinsic dimensions are measured (Li et al. 2018, arXiv 1804.08838).
    """
    start = _flat(weights)
    place = np.zeros(N_WEIGHTS if directions is None else directions.shape[1])
    speed = np.zeros_like(place)
    for step in range(steps):
        x = rng.normal(size=(ROWS, INPUTS))
        gradient = _flat(gradients(weights, x, target(x)))
        speed = MOMENTUM * speed + (gradient if directions is None else directions.T @ gradient)
        place = place - LR * (1 - step / steps) * speed
        weights = _layers(start + (place if directions is None else directions @ place))
    return weights


def _flat(weights: Weights) -> ndarray:
    return np.concatenate([W.ravel() for W in weights])


def _layers(flat: ndarray) -> Weights:
    W1, W2 = np.split(flat, [HIDDEN * INPUTS])
    return W1.reshape(HIDDEN, INPUTS), W2.reshape(OUTPUTS, HIDDEN)


# ---------------------------------------------------------------------------------- pretraining, and two kinds of task


@functools.cache
def pretrained() -> Weights:
    """A network that has learned what a random teacher does."""
    rng = np.random.default_rng(0)
    teacher, student = random_network(rng), random_network(rng)
    return train(student, functools.partial(outputs, teacher), steps=2000, rng=rng)


@functools.cache
def question() -> tuple[ndarray, ndarray]:
    """The narrow task's a and b, both of length 1."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=INPUTS), rng.normal(size=OUTPUTS)
    return a / np.linalg.norm(a), b / np.linalg.norm(b)


def narrow(x: Float[ndarray, "n in"]) -> Float[ndarray, "n out"]:
    """What the pretrained network says, and along b an answer to the question a."""
    a, b = question()
    return outputs(pretrained(), x) + np.outer(2 * np.tanh(x @ a), b)


def wide(x: Float[ndarray, "n in"]) -> Float[ndarray, "n out"]:
    """What a network says that has nothing to do with the pretrained one."""
    return outputs(random_network(np.random.default_rng(2)), x)


TASKS: dict[str, Target] = {"narrow": narrow, "wide": wide}


@functools.cache
def fine_tuned(task: str) -> Weights:
    """The pretrained network after 500 steps on a task, all weights free."""
    return train(pretrained(), TASKS[task], steps=500, rng=np.random.default_rng(3))


def change(task: str) -> Float[ndarray, "out in"]:
    """What fine-tuning did to the first layer: W1 after it less W1 before."""
    return fine_tuned(task)[0] - pretrained()[0]


# -------------------------------------------------------------------------------------------------- random directions


def unseen() -> Float[ndarray, "n in"]:
    """4096 rows that no training saw."""
    return np.random.default_rng(4).normal(size=(4096, INPUTS))


@functools.cache
def in_random_directions(k: int) -> Weights:
    """The pretrained network after 300 steps on the narrow task, along k random directions of all its weights."""
    rng = np.random.default_rng(5)
    directions = rng.normal(size=(N_WEIGHTS, k)) / math.sqrt(N_WEIGHTS)
    return train(pretrained(), narrow, steps=300, rng=rng, directions=directions)


def improvement(weights: Weights) -> float:
    """How much of what full fine-tuning takes off the narrow task's loss these weights take off it, 0 to 1."""
    before, full, now = (loss_of(each, narrow, unseen()) for each in (pretrained(), fine_tuned("narrow"), weights))
    return (before - now) / (before - full)


def right_answers(weights: Weights) -> float:
    """The share of rows for which the answer along b has the right sign; guessing gives a half."""
    (a, b), x = question(), unseen()
    answer = (outputs(weights, x) - outputs(pretrained(), x)) @ b
    return float(np.mean(np.sign(answer) == np.sign(x @ a)))
