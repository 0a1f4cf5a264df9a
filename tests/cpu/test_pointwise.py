"""RMSNorm and SwiGLU's backward by kernels are the formulas, rounded once, in any number of threads.

What needs a processor that rounds to bfloat16 by itself is skipped on others: there torch's steps run.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from minilora.cpu import pointwise
from minilora.llm import autograd
from minilora.llm.model import RMSNorm

BFLOAT16 = torch.bfloat16
is_fast = pytest.mark.skipif(not pointwise.is_fast(), reason="this processor does not round to bfloat16 by itself")


def close(found, exact, size=None):
    """Rounded once to bfloat16 (2⁻⁸), after float32 steps on numbers of this size (2⁻²⁰ covers some ten of them)."""
    size = exact.abs() if size is None else size
    return ((found.double() - exact).abs() <= 2**-8 * 1.01 * exact.abs() + 2**-20 * size).all()


@is_fast
@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 576), (2, 40, 33), (700, 16)])
def test_the_norm_and_its_backward_are_the_formulas(shape):
    torch.manual_seed(0)
    x, dy, weight = (torch.randn(size).to(BFLOAT16) for size in (shape, shape, shape[-1:]))
    y_found, inverse = pointwise.rms_norm(x, weight, 1e-5)
    exact = x.double().requires_grad_()
    y = F.rms_norm(exact, shape[-1:], weight.double(), 1e-5)
    y.backward(dy.double())
    size = (dy.double() * weight.double()).abs().sum(-1, keepdim=True) * inverse

    exact_inverse = (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(inverse.double(), exact_inverse, rtol=1e-5, atol=0)
    assert close(y_found, y.detach())
    assert torch.equal(pointwise.scaled(x, weight, inverse), y_found)
    assert close(pointwise.rms_norm_backward(dy, x, weight, inverse), exact.grad, size)


@is_fast
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e4])
def test_swiglus_backward_is_the_formula(scale):
    torch.manual_seed(0)
    gate, up, dy = ((torch.randn(5, 4001) * size).to(BFLOAT16) for size in (scale, 1.0, 1.0))
    one, other = (t.double().requires_grad_() for t in (gate, up))
    (F.silu(one) * other).backward(dy.double())
    dgate, dup = pointwise.swiglu_backward(dy, gate, up)

    # 1 + x (1 − s) may cancel: its error is that of its terms. Below e⁻⁸⁷ there are no float32 numbers
    assert close(dgate, one.grad, (dy.double() * up.double()).abs() * (1 + gate.double().abs()) * one.sigmoid() + 1e-18)
    assert close(dup, other.grad, 1e-30 + other.grad.abs())


@is_fast
def test_a_nan_and_an_infinity_stay_what_they_are_and_where_they_are():
    x, weight = torch.ones(3, 16, dtype=BFLOAT16), torch.ones(16, dtype=BFLOAT16)
    x[1, 5] = torch.nan
    y = pointwise.rms_norm(x, weight, 1e-5)[0]
    gate = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0], dtype=BFLOAT16)
    dgate, dup = pointwise.swiglu_backward(torch.ones(6, dtype=BFLOAT16), gate, torch.ones(6, dtype=BFLOAT16))

    dx = pointwise.rms_norm_backward(torch.ones_like(x), x, weight, torch.ones(3, 1))

    assert y[1].isnan().all()
    assert dx[1].isnan().all()
    assert dx[[0, 2]].isfinite().all()
    assert (y[[0, 2]] == 1).all()
    torch.testing.assert_close(dup, F.silu(gate), rtol=0, atol=0, equal_nan=True)
    assert dgate[:3].isnan().all()  # 0 · ∞ is none; torch's own gives a NaN as well
    torch.testing.assert_close(dgate[3:], torch.tensor([1.0, 0.0, 0.5], dtype=BFLOAT16), rtol=0, atol=0)


@is_fast
def test_the_bits_are_the_same_in_any_number_of_threads():
    torch.manual_seed(0)
    x, dy, up, weight = (torch.randn(size).to(BFLOAT16) for size in ((333, 96), (333, 96), (333, 96), (96,)))
    before, results = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            y, inverse = pointwise.rms_norm(x, weight, 1e-5)
            results.append(
                [
                    *(y, inverse),
                    pointwise.rms_norm_backward(dy, x, weight, inverse),
                    *pointwise.swiglu_backward(dy, x, up),
                ]
            )
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))


@is_fast
@pytest.mark.parametrize(
    ("dtype", "weight_trains", "watched", "called"),
    [
        (BFLOAT16, False, False, {"rms_norm", "rms_norm_backward", "swiglu_backward"}),
        (BFLOAT16, True, False, {"rms_norm", "swiglu_backward"}),
        (torch.float32, False, False, set()),
        (BFLOAT16, False, True, set()),
    ],
)
def test_the_decoders_operations_take_them_where_they_can(dtype, weight_trains, watched, called, monkeypatch):
    seen = set()
    for name in ("rms_norm", "scaled", "rms_norm_backward", "swiglu_backward"):
        kernel = getattr(pointwise, name)
        monkeypatch.setattr(pointwise, name, lambda *given, k=kernel, n=name: (seen.add(n), k(*given))[1])
    x, up = (torch.randn(4, 64, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(64, dtype=dtype, requires_grad=weight_trains)
    with FlopCounterMode(display=False) if watched else nullcontext():
        y = autograd.swiglu(autograd.rms_norm(x, weight, 1e-5), up)
        y.backward(torch.ones_like(y))
        other = autograd.rms_norm(x, weight, 1e-5)
        other.grad_fn.again()  # as a LoRA layer makes it once more in its backward

    assert seen == called | ({"scaled"} if called else set())
    assert x.grad is not None and up.grad is not None
    assert (weight.grad is not None) == weight_trains


@is_fast
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_decoders_norm_takes_them_where_no_gradients_flow(mode, monkeypatch):
    norm, x = RMSNorm(64, 1e-5).to(BFLOAT16), torch.randn(3, 1, 64, dtype=BFLOAT16)
    seen, kernel = [], pointwise.rms_norm
    monkeypatch.setattr(pointwise, "rms_norm", lambda *given: (seen.append(1), kernel(*given))[1])
    with mode():
        y = norm(x)

    assert y.requires_grad == (mode is torch.enable_grad) == (not seen)
    torch.testing.assert_close(y, F.rms_norm(x, (64,), norm.weight, 1e-5), rtol=2**-7, atol=0)
    norm.requires_grad_(False)(x)
    assert seen


@is_fast
def test_shapes_that_are_broadcast_are_torchs(monkeypatch):
    for name in ("rms_norm", "scaled", "rms_norm_backward", "swiglu_backward"):
        monkeypatch.setattr(pointwise, name, lambda *given: pytest.fail("it would read past the end"))
    x, up, weight = torch.ones(4, 64, dtype=BFLOAT16), torch.ones(64, dtype=BFLOAT16), torch.ones(1, dtype=BFLOAT16)
    for one, other, operation in (
        (x, up, autograd._SwiGLU),
        (x, weight, autograd._RMSNorm),
    ):  # past the check of shapes
        one = one.clone().requires_grad_()
        y = operation.apply(one, other, *([1e-5] if other is weight else []))
        y.backward(torch.ones_like(y))
        assert one.grad.shape == (4, 64)
