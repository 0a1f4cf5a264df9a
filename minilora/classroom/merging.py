"""What merging does in three number formats: how much of an adapter arrives, and how far W drifts.

    W          the weight as it is stored, rounded to the format already          (out, in)
    meant      ΔW, what should be added to it                                     (out, in)
    arrived    the merged weight minus W, both as stored                          (out, in)
    ratio      ‖ΔW‖ / ‖W‖
    error      ‖arrived − ΔW‖ / ‖ΔW‖: 0 = nothing is lost, 1 = as if nothing had been merged

bfloat16 is made of float32 here, because NumPy has no such type.
Read before this file: numpy_lora/forward, numpy_lora/nf4.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32
from numpy import ndarray

from minilora.numpy_lora import nf4

RATIOS = (1e-4, 3e-4, 8e-4, 3e-3, 8e-3, 0.03, 0.08, 0.3, 1.0)
ANY_INPUT, OWN_INPUT = "any direction", "the adapter's own"


def to_float32(x: Float[ndarray, "..."]) -> Float32[ndarray, "..."]:
    """Round to 24 significant bits."""
    return x.astype(np.float32)


def to_bfloat16(x: Float[ndarray, "..."]) -> Float32[ndarray, "..."]:
    """Round to 8 significant bits: bfloat16 is the upper half of a float32, rounded to nearest, ties to even.

    Numbers beyond float32's largest, infinities and NaN are not looked at: no weight is one.

    >>> to_bfloat16(np.array([1 + 1 / 256, 1 + 3 / 256, 3.14159]))  # above 1 the steps are 1/128: two ties
    array([1.      , 1.015625, 3.140625], dtype=float32)
    """
    bits = x.astype(np.float32).view(np.uint32)
    odd = (bits >> 16) & 1
    return ((bits + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)


def to_nf4(x: Float[ndarray, "..."]) -> Float32[ndarray, "..."]:
    """Quantize to NF4 in blocks of 64, and back: what a 4-bit layer computes with."""
    packed, absmax = nf4.quantize(x.astype(np.float32))
    return nf4.dequantize(packed, absmax, x.shape)


FORMATS: dict[str, Callable[[ndarray], ndarray]] = {"float32": to_float32, "bfloat16": to_bfloat16, "NF4": to_nf4}


@dataclass(frozen=True)
class Merge:
    """One weight before and after an update was folded in, as stored."""

    W: Float32[ndarray, "out in"]
    meant: Float[ndarray, "out in"]
    merged: Float32[ndarray, "out in"]

    @property
    def arrived(self) -> Float[ndarray, "out in"]:
        """What the merge added."""
        return self.merged.astype(np.float64) - self.W

    @property
    def error(self) -> float:
        """What went wrong, relative to the adapter's effect, averaged over inputs from all directions."""
        return float(np.linalg.norm(self.arrived - self.meant) / np.linalg.norm(self.meant))

    def error_on(self, x: Float[ndarray, "n in"]) -> float:
        """What went wrong, relative to the adapter's effect, on these inputs."""
        return float(np.linalg.norm(x @ (self.arrived - self.meant).T) / np.linalg.norm(x @ self.meant.T))

    @property
    def changed(self) -> float:
        """The share of weights that the merge changed at all, 0 to 1."""
        return float(np.mean(self.merged != self.W))


def merge_as(stored_as: str, W: Float[ndarray, "out in"], delta: Float[ndarray, "out in"]) -> Merge:
    """Store W in a format, add ΔW, store the sum in the same format: one rounding each time.

    >>> merge_as("bfloat16", np.array([[1.0, 0.25]]), np.array([[1 / 512, 1 / 512]])).arrived * 512
    array([[0., 1.]])
    """
    rounded = FORMATS[stored_as]
    stored = rounded(W)
    return Merge(stored, delta, rounded(stored.astype(np.float64) + delta))


def random_layer(
    d: int, r: int, seed: int = 0
) -> tuple[Float[ndarray, "d d"], Float[ndarray, "r d"], Float[ndarray, "d r"]]:
    """W with entries of about 0.02, as in a language model, and an adapter with ‖B A‖ = ‖W‖, to be made smaller."""
    rng = np.random.default_rng(seed)
    W = rng.normal(scale=0.02, size=(d, d))
    A, B = rng.normal(size=(r, d)) / math.sqrt(d), rng.normal(size=(d, r))
    return W, A, B * np.linalg.norm(W) / np.linalg.norm(B @ A)


@functools.cache
def merge_errors(d: int, r: int, inputs: str = ANY_INPUT, ratios: tuple[float, ...] = RATIOS) -> dict[str, list[float]]:
    """The error of a merge for every format and ratio; `inputs` is ANY_INPUT or OWN_INPUT.

    The adapter's own inputs lie in the space of A's rows, the only directions that it reacts to: there the whole effect
    meets only r/d of a rounding noise that is spread over all directions.
    """
    W, A, B = random_layer(d, r)
    delta = B @ A
    own = np.random.default_rng(1).normal(size=(64, r)) @ A
    errors: dict[str, list[float]] = {}
    for name in FORMATS:
        merges = (merge_as(name, W, ratio * delta) for ratio in ratios)
        errors[name] = [merge.error if inputs == ANY_INPUT else merge.error_on(own) for merge in merges]
    return errors


def share_that_moves(ratio: float, bits: int = 8) -> float:
    """The share of weights that a merge changes, from the quotient of two bell curves.

        P(|δ| > ½ step) with  ½ step ≈ 2^−(bits + ½) · |w|,  so  1 − (2/π) · arctan(2^−(bits + ½) / ratio)

    δ/w is Cauchy distributed where δ and w are Gaussian. Half a step is between 2^−(bits+1) and 2^−bits of |w|,
    depending on where between two powers of two w lies; the formula takes the middle.
    """
    return 1 - 2 / math.pi * math.atan(2 ** -(bits + 0.5) / ratio)


def drift(
    W: Float[ndarray, "out in"], deltas: Iterable[Float[ndarray, "out in"]], *, round_first: bool = False
) -> list[float]:
    """Merge each ΔW into a bfloat16 weight and take it out by subtraction; how far W is from where it was, each time.

    The distance is ‖now − then‖ / ‖then‖. With `round_first` what is subtracted is ΔW rounded to bfloat16, though ΔW
    itself was added: the two halves of a cycle then no longer fit.
    """
    then = to_bfloat16(W)
    now, distances = then, []
    for delta in deltas:
        merged = to_bfloat16(now.astype(np.float64) + delta)
        now = to_bfloat16(merged.astype(np.float64) - (to_bfloat16(delta) if round_first else delta))
        distances.append(float(np.linalg.norm(now - then) / np.linalg.norm(then)))
    return distances
