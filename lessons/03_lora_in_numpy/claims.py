"""What articles say about LoRA's forward and backward pass and its cost. NumPy settles all of it."""

import numpy as np

from minilora.classroom.claims import EXPLAINER, MATHEMATICS, STICKY_NOTE, Claim, Finding
from minilora.classroom.costs import BypassCost
from minilora.classroom.lessons import lesson_module
from minilora.numpy_lora.forward import lora_backward, lora_init


def rank_8() -> Finding:
    """A (r, in) and B (out, r), as lora_init makes them."""
    A, B = lora_init(8, in_features=4096, out_features=4096, rng=np.random.default_rng(0))
    n = A.size + B.size
    return Finding(
        cases=n == 65_536 and 4096 * 4096 / n == 256,
        found=f"A has {A.size:,}, B has {B.size:,}: together {n:,}, {4096 * 4096 / n:.0f} times fewer",
    )


def rank_64() -> Finding:
    """The bypass's share of the matrix."""
    share = BypassCost(rows=1, in_features=4096, out_features=4096, r=64).share
    return Finding(
        cases=round(share, 2) == 0.02,
        found=f"the cost of rank 64 on 4096 × 4096 is 2 · 64 / 4096 = {share:.3%} of the matrix",
    )


def rank_d() -> Finding:
    """The same share at r = d."""
    whole = BypassCost(rows=1, in_features=4096, out_features=4096, r=4096).share
    return Finding(
        cases=whole == 1.0,
        found=f"they are {whole:.0f} times as large; as large as the matrix they are at r = d / 2",
    )


def both_zero() -> Finding:
    """Backward with A = 0 and B = 0."""
    given = lesson_module("03").forward_inputs(np.random.default_rng(0))
    dy = np.ones((5, 7))
    _, dA, dB = lora_backward(dy, given["x"], given["W"], np.zeros((3, 12)), np.zeros((7, 3)), 8.0)
    return Finding(
        cases=not dA.any() and not dB.any(),
        found="dA and dB are exactly 0, so the next step starts from the same place",
    )


def kaiming() -> Finding:
    """Mean A⁴ over the square of mean A²: 3 for a Gaussian, 9/5 for a uniform distribution."""
    A, _ = lora_init(64, in_features=1024, out_features=8, rng=np.random.default_rng(0))
    spread = float(np.mean(A**4) / np.mean(A**2) ** 2)
    return Finding(
        cases=abs(spread - 3) < 0.1,
        found=f"largest entry {np.abs(A).max() * 32:.4f} · 1/√in; mean A⁴ / (mean A²)² = {spread:.2f}, not 3: uniform",
    )


CLAIMS = [
    Claim(
        id="03.rank-8",
        fact="At rank 8 a 4096 × 4096 matrix gets 65,536 trainable parameters, 256 times fewer.",
        source=f"{EXPLAINER}, “The Math of LoRA”",
        settle=rank_8,
        verdict="holds",
    ),
    Claim(
        id="03.rank-64",
        fact="Rank 64 comes close to full fine-tuning at 2 % of the cost.",
        source=STICKY_NOTE,
        settle=rank_64,
        verdict="does not hold",
    ),
    Claim(
        id="03.rank-d",
        fact="At r = d the two factors are as large as the matrix itself: no savings.",
        source=STICKY_NOTE,
        settle=rank_d,
        verdict="does not hold",
    ),
    Claim(
        id="03.both-zero",
        fact="If A and B both start at zero, no gradient passes and nothing is learned.",
        source=f"{MATHEMATICS}, “The mathematical formulation”",
        settle=both_zero,
        verdict="holds",
    ),
    Claim(
        id="03.kaiming",
        fact="kaiming_uniform_ with a = √5, which initialises A, draws Gaussian numbers.",
        source=f"{MATHEMATICS}, a comment in its code",
        settle=kaiming,
        verdict="does not hold",
    ),
]
