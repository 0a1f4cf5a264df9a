"""The product of a few rows is the product, with the same bits for any threads and neighbours, and reads W alone."""

import os
import platform
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from guard_page import GUARD
from jaxtyping import TypeCheckError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilora.cpu import Linear, few_rows, few_tiles, products

BFLOAT16 = torch.bfloat16
AVX2 = "+avx2,+avx,+fma,+ssse3"
needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="it has no such instructions")


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small enough that every sum is exact, in bfloat16 and in any order."""
    return torch.randint(-1, 2, shape).to(BFLOAT16)


@pytest.mark.parametrize("n_rows", [*range(1, 10), 16, 23, 32])
@pytest.mark.parametrize(("in_features", "out_features"), [(32, 2048), (64, 1025), (224, 293), (1536, 43)])
def test_it_is_the_product(n_rows, in_features, out_features):
    x, W, bias = (
        whole_numbers(n_rows, in_features),
        whole_numbers(out_features, in_features),
        whole_numbers(out_features),
    )
    y = few_rows.linears(x, [(W, bias)])[0]

    assert y.dtype == BFLOAT16
    assert torch.equal(y.float(), (x.float() @ W.float().T + bias.float()).to(BFLOAT16).float())
    assert torch.equal(few_rows.linears(x, [(W, None)])[0].double(), (x.double() @ W.double().T).to(BFLOAT16).double())


@pytest.mark.parametrize("shape", [(576,), (1, 576), (2, 1, 576), (2, 3, 576)])
def test_sums_are_float32_and_rounded_once(shape):
    """A sum of n float32 products is off by at most n · 2⁻²⁴ of the sum of their sizes; then bfloat16 rounds by 2⁻⁸."""
    x, W = torch.randn(shape).to(BFLOAT16), torch.randn(192, 576).to(BFLOAT16)
    exact, sizes = x.double() @ W.double().T, x.double().abs() @ W.double().T.abs()
    y = few_rows.linears(x, [(W, None)])[0]

    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 576 * 2**-24 * sizes).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_nan_and_an_infinity_stay_what_they_are(bad):
    x, W = torch.ones(2, 64, dtype=BFLOAT16), torch.ones(1024, 64, dtype=BFLOAT16)
    x[1, 33] = bad
    y = few_rows.linears(x, [(W, None)])[0]

    torch.testing.assert_close(y, x @ W.T, rtol=0, atol=0, equal_nan=True)


def test_a_row_has_the_same_bits_alone_among_others_and_in_any_number_of_threads():
    x, W = torch.randn(20, 576).to(BFLOAT16), torch.randn(577, 576).to(BFLOAT16)
    y, before = few_rows.linears(x, [(W, None)])[0], torch.get_num_threads()
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            for n_rows in range(1, 20):
                assert torch.equal(few_rows.linears(x[-n_rows:], [(W, None)])[0], y[-n_rows:])
    finally:
        torch.set_num_threads(before)


def test_several_weights_in_one_go_give_the_bits_of_each_alone():
    """Also with a bias, and where a weight has fewer outputs than a block, or one output more than whole blocks."""
    x, widths = torch.randn(5, 64).to(BFLOAT16), (1025, 2, 33, 64)
    layers = [
        (torch.randn(width, 64).to(BFLOAT16), torch.randn(width).to(BFLOAT16) if number % 2 else None)
        for number, width in enumerate(widths)
    ]
    for y, layer in zip(few_rows.linears(x, layers), layers, strict=True):
        assert torch.equal(y, few_rows.linears(x, [layer])[0])


def test_a_weight_of_one_output_does_not_go_along():
    """The kernel takes two outputs at once; one alone would be read and written in front of where it lies."""
    x, weights = whole_numbers(1, 64), [whole_numbers(width, 64) for width in (1025, 1)]
    for y, W in zip(products.linears(x, [(W, None) for W in weights]), weights, strict=True):
        assert torch.equal(y, x @ W.T)
    assert products.kernels_for_few(x, *weights) is None


def test_more_rows_than_a_kernel_has_sums_for_are_refused():
    with pytest.raises(ValueError, match="up to 32 rows, not 33"):
        few_rows.linears(torch.ones(33, 64, dtype=BFLOAT16), [(torch.ones(1024, 64, dtype=BFLOAT16), None)])


# --- which products it takes


@needs_x86
@pytest.mark.parametrize(("features", "most"), [("+avx512f,+avx2,+fma", "32"), (AVX2, "16"), ("+sse4.2", "0")])
def test_the_fewer_registers_hold_sums_the_fewer_rows_it_takes(features, most, run_program):
    settings = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    assert run_program("from minilora.cpu import few_rows; print(few_rows.most_rows())", **settings) == most


@pytest.mark.parametrize(
    ("shape", "out_features", "taken"),
    [
        ((1, 576), 192, True),
        ((8, 1, 576), 192, True),
        ((576,), 192, True),
        ((32, 576), 192, True),
        ((33, 576), 192, False),
        ((0, 576), 192, False),
        ((1, 592), 192, False),  # not a multiple of 32
        ((1, 576), 64, False),  # small enough for a core's cache
        ((1, 2**17), 1, False),
    ],
)
def test_it_takes_few_rows_of_a_large_weight(shape, out_features, taken, monkeypatch):
    seen = []

    def watched(x, layers):
        seen.append(1)
        return [x @ W.T for W, _ in layers]

    monkeypatch.setattr(few_rows, "linears", watched)
    monkeypatch.setattr(few_rows, "most_rows", lambda: 32)
    monkeypatch.setattr(few_tiles, "suits", lambda *_: False)
    x, W = torch.ones(shape, dtype=BFLOAT16), torch.ones(out_features, shape[-1], dtype=BFLOAT16)
    products.linear(x, W)
    products.linear(x.float(), W.float())
    if x.numel():
        products.linear(x, W.T.contiguous().T)
        with torch.autocast("cpu", BFLOAT16):
            products.linear(x, W)

    assert len(seen) == taken


def test_what_does_not_fit_together_is_refused_by_torch():
    W = torch.ones(1024, 64, dtype=BFLOAT16)
    with pytest.raises((RuntimeError, TypeCheckError)):  # the second where the tests check shapes at every call
        products.linear(torch.ones(1, 128, dtype=BFLOAT16), W)
    with pytest.raises(ValueError, match=r"a bias for 1024 features of torch.bfloat16 is \(3,\), torch.float32"):
        few_rows.linears(torch.ones(1, 64, dtype=BFLOAT16), [(W, torch.ones(3))])


def test_the_decoders_linear_layer_is_torchs_where_gradients_flow():
    ours, theirs = Linear(64, 1024).to(BFLOAT16), nn.Linear(64, 1024).to(BFLOAT16)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 64, dtype=BFLOAT16)
    results = [layer(x) for layer in (ours, theirs)]
    for y in results:
        y.sum().backward()

    assert torch.equal(*results)
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=2**-7, atol=1e-6)  # a sum on the other side of a halfway
    assert not ours.requires_grad_(False)(x).requires_grad


def test_a_weight_that_was_made_of_others_passes_its_gradient_on():
    """As FSDP and parametrizations put it there: no parameter of the layer's own."""
    layer, A = Linear(64, 1024, bias=False).to(BFLOAT16), torch.randn(4, 64, dtype=BFLOAT16, requires_grad=True)
    weight = layer.weight.detach()
    del layer.weight
    layer.weight = weight + torch.randn(1024, 4, dtype=BFLOAT16) @ A
    layer(torch.randn(2, 64, dtype=BFLOAT16)).sum().backward()

    assert A.grad is not None


class Disguised(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("watcher", ["forward mode", "vmap", "trace", "dispatch mode", "subclass"])
def test_where_torch_has_to_see_the_product_it_does(watcher, monkeypatch):
    for kernels in (few_rows, few_tiles):
        monkeypatch.setattr(kernels, "linears", lambda x, layers: pytest.fail("torch did not see it"))
    layer, x = Linear(64, 1024).to(BFLOAT16).requires_grad_(False), torch.randn(2, 64, dtype=BFLOAT16)
    if watcher == "forward mode":
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        assert tangent is not None
    elif watcher == "vmap":
        assert torch.vmap(layer)(x[:, None]).shape == (2, 1, 1024)
    elif watcher == "trace":
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)  # a trace itself upsets the tests' check of shapes
        layer(x)
    elif watcher == "dispatch mode":
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 2 * 64 * 1024
    else:
        layer(x.as_subclass(Disguised))


# --- processes and processors


BOTH = """
import os, torch
torch.set_num_threads(2)
from minilora.qlora import blockwise
generator = torch.Generator().manual_seed(0)
x, W = (torch.randn(n, 576, generator=generator).bfloat16() for n in (11, 193))
quantized = blockwise.quantize(W, double=True)
def both():
    from minilora.cpu import few_rows
    from minilora.qlora import matmul_cpu
    return torch.cat([few_rows.linears(x, [(W, None)])[0], matmul_cpu.linears(x, [(quantized, None)])[0]])
"""


def test_four_threads_may_call_at_once(run_program):
    program = """
        from concurrent.futures import ThreadPoolExecutor
        right = both()
        with ThreadPoolExecutor(4) as pool:
            print(all(torch.equal(y, right) for y in pool.map(lambda _: both(), range(40))))
    """
    assert run_program(BOTH, program) == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_can_call_after_its_parent_did(run_program):
    program = """
        right = both().view(torch.int16).numpy()
        child = os.fork()
        if child == 0:
            os._exit(0 if (both().view(torch.int16).numpy() == right).all() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_program(BOTH, program, PYTHONWARNINGS="ignore") == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_can_be_the_first_to_call(run_program):
    program = """
        torch.ones(2000, 2000) @ torch.ones(2000, 2000)  # torch's threads are there now
        child = os.fork()
        if child == 0:
            both()
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_program(BOTH, program, PYTHONWARNINGS="ignore") == "0"


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": AVX2}, marks=needs_x86),
        {"NUMBA_CPU_NAME": "generic"},
        {"NUMBA_ENABLE_AVX": "0"},
    ],
)
def test_a_processor_without_these_instructions_gives_the_same_bits(settings, tmp_path, run_program):
    """No vectors of 16 floats; haswell: a table of 16 in two registers, else in none; generic: no multiply-add."""
    program = "print(both().view(torch.int16).tolist())"

    assert run_program(BOTH, program, **settings, NUMBA_CACHE_DIR=str(tmp_path)) == run_program(BOTH, program)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as Linux has it")
def test_not_a_byte_is_read_beyond_the_weight(run_program):
    """W ends where a page that may not be read begins: a load beyond it would end the process."""
    program = """
        from dataclasses import replace
        right = both()
        W = at_the_end_of_what_may_be_read(W)
        units = quantized.absmax
        parts = {name: at_the_end_of_what_may_be_read(getattr(units, name)) for name in ("codes", "absmax")}
        packed = at_the_end_of_what_may_be_read(quantized.packed)
        quantized = replace(quantized, packed=packed, absmax=replace(units, **parts))
        print(torch.equal(both(), right), flush=True)
        os._exit(0)
    """
    assert run_program(BOTH, GUARD, program) == "True"
