"""A product of tiles is the product and what is added to it, rounded once, with the same bits for any threads.

What runs AMX's instructions is skipped where the processor has none: there products takes another way.
"""

import pytest
import torch
from guard_page import GUARD
from jaxtyping import TypeCheckError
from torch.utils.flop_counter import FlopCounterMode

from minilora.cpu import amx, products, tiles
from minilora.torch_lora.autograd import lora_linear

BFLOAT16 = torch.bfloat16
needs_amx = pytest.mark.skipif(not amx.is_there(), reason="this processor has no AMX for bfloat16")


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small enough that every sum is exact in float32, in any order."""
    return torch.randint(-1, 2, shape).to(BFLOAT16)


@needs_amx
@pytest.mark.parametrize("n_rows", [32, 33, 63, 300])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(32, 32), (64, 96), (31, 7), (576, 193), (100, 112), (4096, 17)]
)
@pytest.mark.parametrize(("r", "with_bias"), [(0, False), (4, True), (16, False), (40, True)])
def test_it_is_the_product(n_rows, in_features, out_features, r, with_bias):
    x, W, u, B, bias = (
        whole_numbers(*shape)
        for shape in (
            (n_rows, in_features),
            (in_features, out_features),
            (n_rows, r),
            (r, out_features),
            (out_features,),
        )
    )
    exact = (x.double() @ W.double() + u.double() @ B.double() + (bias.double() if with_bias else 0)).to(BFLOAT16)
    for W_lies in (W, W.T.contiguous().T):
        for B_lies in (B, B.T.contiguous().T):
            y = tiles.product(x, W_lies, bias if with_bias else None, (u, B_lies) if r else None)
            assert torch.equal(y, exact)


@needs_amx
def test_sums_are_float32_and_rounded_once():
    """A sum of n float32 products is off by at most n · 2⁻²⁴ of the sum of their sizes; then bfloat16 rounds by 2⁻⁸.

    With the update added to a result that was rounded already, as addmm_ does, this bound does not hold.
    """
    x, W, u, B = (torch.randn(shape).to(BFLOAT16) for shape in ((256, 576), (576, 192), (256, 16), (16, 192)))
    both, all_W = torch.cat([x, u], 1).double(), torch.cat([W, B]).double()
    exact, sizes = both @ all_W, both.abs() @ all_W.abs()
    bound = exact.abs() * 2**-8 * 1.01 + 592 * 2**-24 * sizes

    assert ((tiles.product(x, W, None, (u, B)).double() - exact).abs() <= bound).all()
    assert not (((x @ W).addmm_(u, B).double() - exact).abs() <= bound).all()


@needs_amx
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_nan_and_an_infinity_stay_what_they_are_and_where_they_are(bad):
    x, W, u, B = (torch.ones(shape, dtype=BFLOAT16) for shape in ((70, 40), (40, 100), (70, 3), (3, 100)))
    for tensor, place in ((x, (31, 7)), (W, (39, 98)), (u, (69, 2)), (B, (0, 5))):
        tensor[place] = bad
        exact = x.float() @ W.float() + u.float() @ B.float()
        torch.testing.assert_close(
            tiles.product(x, W, None, (u, B)), exact.to(BFLOAT16), rtol=0, atol=0, equal_nan=True
        )
        tensor[place] = 1


@needs_amx
def test_the_bits_are_the_same_in_any_number_of_threads():
    x, W, before = torch.randn(257, 576).to(BFLOAT16), torch.randn(576, 577).to(BFLOAT16), torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            results += [tiles.product(x, W), tiles.product(x, W.T.contiguous().T)]
    finally:
        torch.set_num_threads(before)

    assert all(torch.equal(y, results[0]) for y in results)


@needs_amx
def test_tensors_that_lie_otherwise_in_memory_are_multiplied_as_they_are():
    x, W, u, B, bias = (whole_numbers(*shape) for shape in ((64, 80), (80, 50), (64, 1), (1, 50), (50,)))
    right = tiles.product(x, W, bias, (u, B))
    spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, u, B, bias)]  # every second number
    shifted = torch.cat([whole_numbers(1), W.flatten()])[1:].view(W.shape)  # two bytes behind a word's address

    assert torch.equal(tiles.product(spread[0], W, spread[3], (spread[1], spread[2])), right)
    assert torch.equal(tiles.product(x, shifted, bias, (u, B)), right)


@needs_amx
def test_a_layer_over_it_has_the_layers_values_and_gradients(monkeypatch):
    """Within bfloat16's rounding of what is exact: 2⁻⁸ for what is rounded once, and as much again for u and du."""
    taken, product = [], tiles.product
    monkeypatch.setattr(
        tiles, "product", lambda x, W, bias, plus: (taken.append(W.shape), product(x, W, bias, plus))[1]
    )
    torch.manual_seed(0)
    base = torch.nn.Linear(192, 200).to(BFLOAT16).requires_grad_(False)
    given = torch.randn(2, 150, 192), torch.randn(4, 192) / 10, torch.randn(200, 4)
    ours = [t.to(BFLOAT16).requires_grad_() for t in given]
    exact = [t.detach().double().requires_grad_() for t in ours]
    dy = torch.randn(2, 150, 200).to(BFLOAT16)
    y = lora_linear(*ours, 2.0, base, base.weight)
    y.backward(dy)
    x, A, B = exact
    right = x @ base.weight.double().T + base.bias.double() + 2.0 * (x @ A.T) @ B.T
    right.backward(dy.double())

    assert taken == [(192, 200), (200, 192)]  # forward, backward
    for found, wanted in ((y, right), *((one.grad, other.grad) for one, other in zip(ours, exact, strict=True))):
        assert (found.double() - wanted).norm() <= 2**-7 * wanted.norm()


@pytest.mark.parametrize(
    ("rows", "in_features", "out_features", "dtype", "taken"),
    [
        (256, 64, 192, BFLOAT16, True),
        (256, 4096, 192, BFLOAT16, True),
        (255, 64, 192, BFLOAT16, False),
        (256, 31, 192, BFLOAT16, False),
        (256, 4097, 192, BFLOAT16, False),
        (256, 64, 96, BFLOAT16, False),
        (256, 64, 192, torch.float32, False),
        (256, 64, 192, torch.float16, False),
    ],
)
@pytest.mark.parametrize("by_output", [True, False])
def test_it_takes_many_rows_of_bfloat16(rows, in_features, out_features, dtype, taken, by_output, monkeypatch):
    seen = []
    monkeypatch.setattr(amx, "is_there", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(tiles, "product", lambda x, W, bias, plus: seen.append(1) or x @ W)
    x, W = torch.ones(rows, in_features, dtype=dtype), torch.ones(in_features, out_features, dtype=dtype)
    products.product(x, W.T.contiguous().T if by_output else W)

    assert len(seen) == taken


def test_where_there_is_no_amx_or_torch_has_to_see_the_product_it_does(monkeypatch):
    monkeypatch.setattr(tiles, "product", lambda x, W, bias, plus: pytest.fail("torch did not see it"))
    x, W = whole_numbers(256, 64), whole_numbers(64, 192)
    plus = whole_numbers(256, 4), whole_numbers(4, 192)
    right = (x.float() @ W.float() + plus[0].float() @ plus[1].float()).to(BFLOAT16)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(products.product(x, W, None, plus), right)
    assert counter.get_total_flops() == 2 * 256 * 192 * 64  # torch counts no addmm_
    assert torch.equal(products.product(x, W.repeat_interleave(2, 1)[:, ::2], None, plus), right)  # in no one piece
    monkeypatch.setattr(amx, "is_there", lambda: False)
    assert torch.equal(products.product(x, W, None, plus), right)
    assert torch.equal(products.linear(x, W.T.contiguous(), None, plus), right)


def test_what_it_cannot_take_is_refused(monkeypatch):
    x, W, u, B = (torch.ones(shape, dtype=BFLOAT16) for shape in ((256, 64), (64, 192), (256, 4), (4, 192)))
    for wrong in (
        (x[:31], W),
        (x, W[:63]),
        (x, W, None, (u[:255], B)),
        (x, W, None, (u, B[:, 1:])),
        (x, W, None, (u, B[1:])),
    ):
        with pytest.raises((ValueError, TypeCheckError), match=r"x W \+ u B of 32 rows or more cannot be made of x \("):
            tiles.product(*wrong)
    with pytest.raises(ValueError, match=r"plain tensors of torch.bfloat16 on a CPU, not .* u torch.float32 on cpu"):
        tiles.product(x, W, None, (u.float(), B))
    with pytest.raises(ValueError, match="W lies in pieces, with strides"):
        tiles.product(x, W.repeat_interleave(2, 1)[:, ::2])
    monkeypatch.setattr(amx, "is_there", lambda: False)
    with pytest.raises(RuntimeError, match="this processor has no AMX for bfloat16"):
        tiles.product(x, W)


def test_it_leaves_to_torch_what_does_not_fit_or_would_leave_threads_idle(monkeypatch):
    monkeypatch.setattr(amx, "is_there", lambda: True)
    x, W = torch.ones(256, 64, dtype=BFLOAT16), torch.ones(64, 384, dtype=BFLOAT16)

    assert products.are_many(x, W)
    assert not products.are_many(x, W[:63])
    for threads, taken in ((1, True), (4, True), (5, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert tiles.suit(W) == taken


def test_a_processor_without_amx_has_none(run_program):
    program = "from minilora.cpu import amx; print(amx.is_there())"
    assert run_program(program, NUMBA_CPU_NAME="generic") == "False"


@needs_amx
def test_it_stands_beside_torchs_own_tiles_in_several_threads_and_in_a_forked_child(run_program):
    program = """
        import os, torch
        from concurrent.futures import ThreadPoolExecutor
        torch.set_num_threads(2)
        from minilora.cpu import amx, tiles
        print(amx.is_there())
        x, W = torch.randn(300, 576).bfloat16(), torch.randn(576, 192).bfloat16()
        ours, theirs = tiles.product(x, W), x @ W
        def again(_):
            return torch.equal(tiles.product(x, W), ours) and torch.equal(x @ W, theirs)
        with ThreadPoolExecutor(4) as pool:
            print(all(pool.map(again, range(40))))
        ours = ours.view(torch.int16).numpy()
        child = os.fork()
        if child == 0:
            os._exit(0 if (tiles.product(x, W).view(torch.int16).numpy() == ours).all() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_program(program, PYTHONWARNINGS="ignore").split() == ["True", "True", "0"]


@needs_amx
def test_not_a_byte_is_read_beyond_what_it_is_given(run_program):
    """Each tensor ends where a page that may not be read begins: a load beyond it would end the process."""
    program = """
        import os, torch
        from minilora.cpu import tiles
        for in_features, out_features, r in ((64, 40, 3), (50, 104, 16), (96, 97, 1)):
            shapes = (70, in_features), (in_features, out_features), (out_features,), (70, r), (r, out_features)
            x, W, bias, u, B = (torch.randn(shape).bfloat16() for shape in shapes)
            right = tiles.product(x, W, bias, (u, B))
            x, W, bias, u, B, W_t, B_t = map(at_the_end_of_what_may_be_read, (x, W, bias, u, B, W.T, B.T))
            for one, other in ((W, B), (W_t.T, B_t.T)):
                print(torch.equal(tiles.product(x, one, bias, (u, other)), right), flush=True)
        os._exit(0)
    """
    assert run_program("import torch", GUARD, program).split() == ["True"] * 6
