"""What articles print about their LoRA layers, and what such a layer gives."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from minilora.classroom.claims import MATHEMATICS, STICKY_NOTE, Claim, Finding
from minilora.classroom.exercises import find_exercise
from minilora.classroom.lessons import lesson_module

lesson = lesson_module("04")


def four_projections() -> Finding:
    """Its block, frozen in two ways, and counted."""
    ways = {
        "all but A and B is frozen": find_exercise("04.2").reference,
        "only what is wrapped is, as in its code": find_exercise("04.2").bug("only the wrapped layers"),
    }
    counts = {}
    for name, freeze in ways.items():
        block = lesson.SimpleAttention(512)
        lesson.adapt(block, ("q_proj", "v_proj"), lambda base: lesson.RightLayer(base, r=8, alpha=16.0))
        counts[name] = freeze(block, lesson.RightLayer)
    trained, whole = list(counts.values())[-1]
    return Finding(
        cases={name: (n, total, 4 * 512**2 / n) == (16_384, 1_064_960, 64) for name, (n, total) in counts.items()},
        found=f"its code trains {trained:,} of {whole:,}, {4 * 512**2 / trained:.2f} times fewer: "
        "k_proj and o_proj train",
    )


def one_layer() -> Finding:
    """A layer without a bias, and with one."""
    sizes = {}
    for name, bias in {"without a bias": False, "with one, as its code and nn.Linear have by default": True}.items():
        with torch.device("meta"):
            layer = lesson.RightLayer(nn.Linear(4096, 4096, bias=bias), r=16, alpha=32.0)
        sizes[name] = sum(each.numel() for each in layer.parameters())
    trained = layer.A.numel() + layer.B.numel()
    return Finding(
        cases={name: (trained, size) == (131_072, 16_908_288) for name, size in sizes.items()},
        found=f"{trained:,} train, of {' or '.join(f'{size:,}' for size in sizes.values())}: the bias has 4,096",
    )


def first_loss() -> Finding:
    """By hand, for x and y from N(0, 1): 1/3 + 1 ± its standard error; and three seeds."""
    error, seen = 4 / 3 * math.sqrt(2 / (8 * 4096)), []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            layer = lesson.RightLayer(nn.Linear(4096, 4096), r=16, alpha=32.0)
            seen.append(F.mse_loss(layer(torch.randn(8, 4096)), torch.randn(8, 4096)).item())
    assert all(abs(loss - 4 / 3) < 5 * error for loss in seen)
    return Finding(
        cases=abs(1.2418 - 4 / 3) < 5 * error,
        found=f"4/3 ± {error:.3f} by hand, {', '.join(f'{loss:.2f}' for loss in seen)} from three seeds; "
        f"1.2418 lies {(4 / 3 - 1.2418) / error:.0f} standard errors below",
    )


def drawn(rows: int, columns: int) -> torch.Tensor:
    """The line in question, on a matrix of this shape."""
    torch.manual_seed(0)
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5))


def kurtosis(values: torch.Tensor) -> float:
    """Mean of v⁴ over the square of the mean of v²: 3 for a Gaussian, 9/5 for a uniform distribution."""
    return float(values.pow(4).mean() / values.pow(2).mean() ** 2)


def gaussian_ish() -> Finding:
    """The fourth moment tells a uniform distribution from a Gaussian; a = √5 only sets the width."""
    A = drawn(16, 768)
    of_gaussian = kurtosis(torch.randn(100, 768))
    return Finding(
        cases=abs(kurtosis(A) - 3) < 0.2,
        found=f"uniform, as its name says: kurtosis {kurtosis(A):.1f}; of Gaussian numbers {of_gaussian:.1f}",
    )


CLAIMS = [
    Claim(
        id="04.four-projections",
        fact="LoRA with r = 8 on q and v of a block of four 512 × 512 projections trains 16,384 of 1,064,960: "
        "64 times fewer.",
        source=f"{MATHEMATICS}, what its example is said to print",
        settle=four_projections,
        verdict="holds when",
    ),
    Claim(
        id="04.one-layer",
        fact="A LoRALinear over 4096 × 4096 with r = 16 has 131,072 trainable of 16,908,288 parameters.",
        source=f"{STICKY_NOTE}, a printed output",
        settle=one_layer,
        verdict="holds when",
    ),
    Claim(
        id="04.first-loss",
        fact="The first loss of that layer, on inputs and targets from N(0, 1), is 1.2418.",
        source=f"{STICKY_NOTE}, the same printed output",
        settle=first_loss,
        verdict="does not hold",
    ),
    Claim(
        id="04.gaussian-ish",
        fact="kaiming_uniform_(A, a=√5) makes a Gaussian-ish A.",
        source=f"{STICKY_NOTE}, a comment in its code",
        settle=gaussian_ish,
        verdict="does not hold",
    ),
]
