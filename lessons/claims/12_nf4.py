"""12 · NF4 and double quantization

The claims for this lesson: where the sixteen numbers lie, and how many bits a weight takes.
"""

import math

import torch

from minilora.classroom.claims import FAMILY, REVOLUTION, Claim, Finding
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import base_params, linear_weights, nf4_bytes, weight_bytes
from minilora.qlora.blockwise import dequantize, quantize, unpack
from minilora.qlora.codebooks import FP4, INT4, NF4


def gaussian() -> torch.Tensor:
    """2²⁰ weights from N(0, 1)."""
    return torch.randn(2**20, generator=torch.Generator().manual_seed(0))


def equal_mass() -> Finding:
    """How often each of the 16 levels is taken, in blocks of 64 that are divided by their absmax."""
    w = gaussian()
    shares = torch.bincount(unpack(quantize(w, NF4).packed, w.numel()).long(), minlength=16) / w.numel()
    bits = -(shares * shares.log2()).sum().item()
    return Finding(
        cases=bool((shares - 1 / 16).abs().max() < 0.01),
        found=f"of 2²⁰ Gaussian weights the levels take {shares.min():.1%} to {shares.max():.1%}, where equal would be "
        f"6.2 %; entropy {bits:.2f} bits of 4: a block is divided by its own largest weight, not by its deviation",
    )


def lower_error() -> Finding:
    """Mean squared error of three codebooks, blocks of 64."""
    w = gaussian()
    error = {book.name: (dequantize(quantize(w, book)) - w).square().mean().item() for book in (NF4, INT4, FP4)}
    return Finding(
        cases=error["nf4"] < min(error["int4"], error["fp4"]),
        found="mean squared error of 2²⁰ Gaussian weights in blocks of 64: "
        + ", ".join(f"{name.upper()} {value:.4f}" for name, value in error.items()),
    )


def scaling_constants() -> Finding:
    """One fp32 number for 64 weights."""
    counts = {
        "there are 7 · 10⁹ weights": 7e9 / 64,
        "they are Llama-2-7B's linear layers": linear_weights(ARCHITECTURES["llama-2-7b"]) / 64,
    }
    return Finding(
        cases={name: (round(n / 1e6, -1), round(4 * n / 1e6, -1)) == (110, 440) for name, n in counts.items()},
        found=" and ".join(f"{n / 1e6:.1f}M or {4 * n / 1e6:.0f} MB" for n in counts.values()),
    )


def double_quantization() -> Finding:
    """Bits beside the four, from nf4_bytes."""
    n = 64 * 256
    single, double = (8 * nf4_bytes(n, doubly) / n - 4 for doubly in (False, True))
    return Finding(
        cases=single == 0.5 and math.isclose(double, 0.127, abs_tol=5e-4),
        found=f"32/64 = {single} bits a weight, then 8/64 + 32/(64 · 256) = {double:.6f}",
    )


def four_times() -> Finding:
    """bf16 bytes over 4-bit bytes, of the linear layers and of whole models."""
    ratios = {"linear layers are counted": 16 * 4096**2 / (8 * nf4_bytes(4096**2))}
    for name, told in {
        "llama-2-7b": "all of Llama-2-7B is counted",
        "llama-3-8b": "all of Llama-3-8B is counted",
    }.items():
        arch = ARCHITECTURES[name]
        ratios[told] = 2 * base_params(arch) / weight_bytes(arch, "bf16", in_4_bits=True)
    return Finding(
        cases={name: round(ratio) == 4 for name, ratio in ratios.items()},
        found="16 / 4.127 bits; embeddings and head stay in 16: "
        f"{', '.join(f'{r:.2f} times' for r in ratios.values())}",
    )


INNOVATIONS = f"{REVOLUTION}, “The Three Innovations”"
CLAIMS = [
    Claim(
        id="12.equal-mass",
        fact="Each of NF4's bins captures an equal share of the weights.",
        source=INNOVATIONS,
        settle=equal_mass,
        verdict="does not hold",
    ),
    Claim(
        id="12.lower-error",
        fact="On normally distributed weights NF4 errs less than INT4 and FP4.",
        source=INNOVATIONS,
        settle=lower_error,
        verdict="holds",
    ),
    Claim(
        id="12.scaling-constants",
        fact="A 7B model with blocks of 64 needs about 110M scaling constants, 440 MB in fp32.",
        source=INNOVATIONS,
        settle=scaling_constants,
        verdict="holds when",
    ),
    Claim(
        id="12.double-quantization",
        fact="Double quantization brings the constants from 0.5 to 0.127 bits a parameter.",
        source=f"{FAMILY}, its table of QLoRA's innovations",
        settle=double_quantization,
        verdict="holds",
    ),
    Claim(
        id="12.four-times",
        fact="NF4 compresses the base model about 4 times.",
        source=f"{FAMILY}, its table of QLoRA's innovations",
        settle=four_times,
        verdict="holds when",
    ),
]
