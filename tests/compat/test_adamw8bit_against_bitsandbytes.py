"""8-bit moments follow bitsandbytes' AdamW8bit, on the CPU.

On a CPU bitsandbytes 0.50 rounds a number in units of its absmax to a grid of 65,536 points in [−1, 1], and that point
to the map. So a moment may land on another value of the map than ours, and from there the two drift; how far is bounded
by how far 8 bits are from 32.
"""

import bitsandbytes
import pytest
import torch
from torch import nn

from minilora.qlora import PagedAdamW, moments
from minilora.qlora.blockwise import decode_8bit, scale_blocks
from minilora.qlora.codebooks import dynamic_map, dynamic_thresholds
from minilora.qlora.paged_adamw import adamw_

CPU = torch.device("cpu")
N = 256 * 64 + 37  # a short last block
HALF_A_GRID_STEP = 1 / 65_535


def gradient(number: int) -> torch.Tensor:
    """Sizes over three decades along the tensor, and a noise that is the same for all optimizers."""
    return torch.randn(N, generator=torch.Generator().manual_seed(number)) * torch.logspace(-3, 0, N)


def bitsandbytes_after(n_steps: int) -> tuple[nn.Parameter, dict]:
    p = nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(99)))
    optimizer = bitsandbytes.optim.AdamW8bit([p])
    for number in range(n_steps):
        p.grad = gradient(number)
        optimizer.step()
    return p, optimizer.state[p]


def parts_of(theirs: dict) -> dict[str, torch.Tensor]:
    return {
        f"{name}_{part}": theirs[f"{key}{i}"]
        for i, name in ((1, "m"), (2, "v"))
        for part, key in (("codes", "state"), ("absmax", "absmax"))
    }


def through_their_grid(moment: torch.Tensor, *, signed: bool) -> torch.Tensor:
    scaled, _ = scale_blocks(moment, 256)
    place = ((scaled + 1) * 0.5 * 65535 + 0.5).int()
    return torch.bucketize(-1 + 2 * place.float() / 65535, dynamic_thresholds(CPU, signed=signed)[:-1])


@pytest.mark.parametrize("n_before", [0, 1, 10, 100])
def test_a_step_from_their_state_gives_their_parameters_units_and_codes_but_for_the_grid(n_before):
    """Equal but for the last bit of m, which is one rounding here (lerp) and two there (a product, a sum). Where that
    bit lies at a boundary of their grid a code is another; without the grid values differ by a gap and its step."""
    p, before = bitsandbytes_after(n_before)
    m, v = moments.read(parts_of(before)) if n_before else torch.zeros(2, N)
    with torch.no_grad():
        hyper = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
        adamw_(p, gradient(n_before), m, v, step=n_before + 1, **hyper)
    q, after = bitsandbytes_after(n_before + 1)
    theirs = parts_of(after)
    last_bits = 4 * torch.finfo(torch.float32).eps

    torch.testing.assert_close(p, q, rtol=last_bits, atol=last_bits)
    ours = {name: torch.empty_like(part) for name, part in theirs.items()}
    moments.write(ours, m, v)
    for name, moment, signed in (("m", m, True), ("v", v, False)):
        torch.testing.assert_close(ours[f"{name}_absmax"], theirs[f"{name}_absmax"], rtol=last_bits, atol=0)
        assert (through_their_grid(moment, signed=signed) != theirs[f"{name}_codes"]).float().mean() < 1e-3

        units, values = torch.ones(65), dynamic_map(CPU, signed=signed)
        a, b = (decode_8bit(parts[f"{name}_codes"], units, signed=signed) for parts in (ours, theirs))
        gaps = torch.nn.functional.pad(values.diff(), (1, 1))
        codes = theirs[f"{name}_codes"].long()
        widest_gap = torch.maximum(gaps[codes], gaps[codes + 1])  # half of it for their rounding, half for ours
        assert ((a - b).abs() <= widest_gap + HALF_A_GRID_STEP + last_bits).all()


def test_after_200_steps_we_are_no_further_from_32_bits_than_they_are():
    params = {name: nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(99))) for name in ("8", "32")}
    ours, exact = PagedAdamW([params["8"]], state_bits=8), torch.optim.AdamW([params["32"]])
    for number in range(200):
        for p, optimizer in ((params["8"], ours), (params["32"], exact)):
            p.grad = gradient(number)
            optimizer.step()
    q, _ = bitsandbytes_after(200)
    our_error, their_error = ((p - params["32"]).abs().mean() for p in (params["8"], q))

    assert our_error <= 1.05 * their_error  # measured: 2.681e-4 and 2.683e-4
