"""A product of few rows on tiles is the product, of several weights at once too, with the same bits for any neighbours.

What runs AMX's instructions is skipped where the processor has none: there products takes another way.
"""

import os
import sys

import pytest
import torch
from guard_page import GUARD
from jaxtyping import TypeCheckError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minilora.cpu import Linear, amx, few_rows, few_tiles, products
from minilora.cpu.linear import each
from minilora.qlora import NF4Linear

BFLOAT16 = torch.bfloat16
needs_amx = pytest.mark.skipif(not amx.is_there(), reason="this processor has no AMX for bfloat16")


def whole_numbers(*shape: int) -> torch.Tensor:
    """Small enough that every sum is exact, in bfloat16 and in any order."""
    return torch.randint(-1, 2, shape).to(BFLOAT16)


@needs_amx
@pytest.mark.parametrize("n_rows", [1, 2, 15, 16, 17, 32])
@pytest.mark.parametrize("in_features", [32, 96, 1536])
def test_it_is_the_product_with_each_weight(n_rows, in_features):
    x, sizes = whole_numbers(n_rows, in_features), (32, 33, 1000, 2048, 63)
    layers = [(whole_numbers(n, in_features), whole_numbers(n) if n % 2 else None) for n in sizes]
    ys = few_tiles.linears(x, layers)

    columns = torch.stack([x, x], 2)[..., 0]  # x again, in pieces, as one token of each text lies
    for y, again in zip(ys, few_tiles.linears(columns, layers), strict=True):
        assert torch.equal(y, again)
    for y, (W, bias) in zip(ys, layers, strict=True):
        exact = x.double() @ W.double().T + (0 if bias is None else bias.double())
        assert torch.equal(y, exact.to(BFLOAT16))
        assert torch.equal(few_tiles.linears(x, [(W, bias)])[0], y)


@needs_amx
@pytest.mark.parametrize("shape", [(576,), (1, 576), (2, 1, 576), (5, 4, 576)])
def test_sums_are_float32_and_rounded_once(shape):
    """A sum of n float32 products is off by at most n · 2⁻²⁴ of the sum of their sizes; then bfloat16 rounds by 2⁻⁸."""
    x, W, bias = (torch.randn(size).to(BFLOAT16) for size in (shape, (192, 576), (192,)))
    exact = x.double() @ W.double().T + bias.double()
    sizes = x.double().abs() @ W.double().T.abs() + bias.double().abs()
    (y,) = few_tiles.linears(x, [(W, bias)])

    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 * 1.01 + 577 * 2**-24 * sizes).all()


@needs_amx
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_nan_and_an_infinity_stay_what_they_are_and_where_they_are(bad):
    x, W, bias = torch.ones(20, 64, dtype=BFLOAT16), torch.ones(1024, 64, dtype=BFLOAT16), torch.ones(1024).to(BFLOAT16)
    for tensor, place in ((x, (19, 33)), (x, (0, 0)), (W, (1023, 63)), (bias, 5)):
        tensor[place] = bad
        (y,) = few_tiles.linears(x, [(W, bias)])
        exact = (x.float() @ W.float().T + bias.float()).to(BFLOAT16)
        torch.testing.assert_close(y, exact, rtol=0, atol=0, equal_nan=True)
        tensor[place] = 1


@needs_amx
def test_a_row_has_the_same_bits_alone_among_others_and_in_any_number_of_threads():
    x, W, before = torch.randn(32, 576).to(BFLOAT16), torch.randn(2577, 576).to(BFLOAT16), torch.get_num_threads()
    (y,) = few_tiles.linears(x, [(W, None)])
    try:
        for n_threads in (1, 2, 5):
            torch.set_num_threads(n_threads)
            for n_rows in (1, 2, 16, 17, 32):
                other, again = few_tiles.linears(x[-n_rows:], [(W[:100], None), (W, None)])
                assert torch.equal(again, y[-n_rows:])
                assert torch.equal(other, y[-n_rows:, :100])
    finally:
        torch.set_num_threads(before)


@needs_amx
@pytest.mark.parametrize(
    ("shape", "W_shape"), [((33, 64), (64, 64)), ((1, 64), (31, 64)), ((1, 1536), (64, 576)), ((1, 48), (64, 48))]
)
def test_what_it_would_read_or_write_beyond_is_refused(shape, W_shape):
    with pytest.raises((ValueError, TypeCheckError), match=r"tiles take up to 32 rows|parameter"):
        few_tiles.linears(torch.ones(shape, dtype=BFLOAT16), [(torch.ones(W_shape, dtype=BFLOAT16), None)])


def test_the_whole_result_is_asked_for(monkeypatch):
    """What run is told to expect, in blocks of 32 outputs, is what it holds the workers to."""
    asked = []
    monkeypatch.setattr(amx, "is_there", lambda: True)
    monkeypatch.setattr(few_tiles, "_product", lambda n_halves: None)
    monkeypatch.setattr(few_rows, "run", lambda worker, total, *fields: asked.append(total))
    few_tiles.linears(whole_numbers(1, 64), [(whole_numbers(n, 64), None) for n in (32, 33, 1000)])

    assert asked == [1 + 2 + 32]


# --- which products it takes


@pytest.mark.parametrize(
    ("n_rows", "in_features", "sizes", "calls"),
    [
        (1, 576, (576, 192, 192), [3]),
        (32, 576, (576, 64), [2]),  # the second alone is small enough for a core's cache
        (33, 576, (576, 192), []),
        (8, 576, (576, 31), [1]),  # the second has less than a block of outputs
        (8, 560, (576, 192), []),  # not a multiple of 32
    ],
)
def test_weights_of_one_x_go_together_where_all_of_them_can(n_rows, in_features, sizes, calls, monkeypatch):
    seen = []
    monkeypatch.setattr(
        few_tiles, "linears", lambda x, layers: seen.append(len(layers)) or [x @ W.T for W, _ in layers]
    )
    monkeypatch.setattr(amx, "is_there", lambda: True)
    x, weights = whole_numbers(n_rows, in_features), [whole_numbers(n, in_features) for n in sizes]
    ys = products.linears(x, [(W, None) for W in weights])

    assert seen == calls
    assert all(torch.equal(y, x @ W.T) for y, W in zip(ys, weights, strict=True))


def test_without_amx_it_refuses_and_another_way_is_taken(monkeypatch):
    monkeypatch.setattr(amx, "is_there", lambda: False)
    x, W = whole_numbers(2, 64), whole_numbers(1024, 64)
    with pytest.raises(RuntimeError, match="no AMX"):
        few_tiles.linears(x, [(W, None)])

    assert torch.equal(products.linear(x, W), x @ W.T)
    assert all(torch.equal(y, x @ W.T) for y in products.linears(x, [(W, None), (W, None)]))


# --- several layers over the same x


def three(kind: type[nn.Module] = Linear) -> list[nn.Module]:
    plain = [Linear(64, size, bias=size == 1024).to(BFLOAT16).requires_grad_(False) for size in (1024, 2048, 1088)]
    return plain if kind is Linear else [kind(layer) for layer in plain]


@pytest.fixture
def together(monkeypatch) -> list[type]:
    """The classes whose `several` was asked."""
    seen: list[type] = []
    for kind in (Linear, NF4Linear):
        whole = kind.several
        monkeypatch.setattr(
            kind, "several", staticmethod(lambda x, layers, k=kind, f=whole: seen.append(k) or f(x, layers))
        )
    return seen


@pytest.mark.parametrize("kind", [Linear, NF4Linear])
@pytest.mark.parametrize("n_rows", [1, 3, 40])
def test_each_gives_what_the_layers_give(kind, n_rows, together):
    layers, x = three(kind), torch.randn(n_rows, 1, 64).to(BFLOAT16)

    assert all(torch.equal(y, layer(x)) for y, layer in zip(each(x, *layers), layers, strict=True))
    assert together == [kind]


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "listener", ["hook", "hook before", "hook on all", "own forward", "compiled", "subclass", "another class"]
)
def test_who_listens_to_a_layers_call_or_changes_it_is_heard(listener, together):
    layers, x = three(), torch.randn(2, 64).to(BFLOAT16)
    plain, heard, handles = [layer(x) for layer in layers], [], []
    if listener == "hook":
        handles.append(layers[1].register_forward_hook(lambda *given: heard.append(1)))
    elif listener == "hook before":
        handles.append(layers[1].register_forward_pre_hook(lambda *given: heard.append(1)))
    elif listener == "hook on all":
        handles.append(nn.modules.module.register_module_forward_hook(lambda *given: heard.append(1)))
    elif listener == "own forward":
        layers[1].forward = lambda x: heard.append(1) or plain[1]
    elif listener == "compiled":
        layers[1]._compiled_call_impl = lambda x: heard.append(1) or plain[1]  # what layer.compile() puts there
    else:
        if listener == "another class":
            layers[1] = nn.Sequential(layers[1])
        else:
            layers = [
                Doubled(64, len(y[0]), bias=layer.bias is not None) for layer, y in zip(layers, plain, strict=True)
            ]
            for layer, old in zip(layers, three(), strict=True):
                layer.to(BFLOAT16).requires_grad_(False).load_state_dict(old.state_dict())
            plain = [layer(x) for layer in layers]
        heard.append(1)
    try:
        ys = each(x, *layers)
    finally:
        for handle in handles:
            handle.remove()

    assert heard and not together
    assert all(torch.equal(y, right) for y, right in zip(ys, plain, strict=True))


@pytest.mark.parametrize("kind", [Linear, NF4Linear])
def test_gradients_flow_through_each(kind):
    layers, x = three(kind), torch.randn(2, 64).to(BFLOAT16).requires_grad_()
    sum(y.float().sum() for y in each(x, *layers)).backward()
    (right,) = torch.autograd.grad(sum(layer(x).float().sum() for layer in layers), x)

    assert torch.equal(x.grad, right)


def test_a_gradient_flows_to_whichever_weight_wants_one():
    layers, x = three(), torch.randn(2, 64).to(BFLOAT16)
    layers[2].weight.requires_grad_()
    sum(y.float().sum() for y in each(x, *layers)).backward()

    assert layers[2].weight.grad is not None


@pytest.mark.parametrize("kind", [Linear, NF4Linear])
def test_torch_sees_the_products_of_each_where_it_has_to(kind):
    layers, x = three(kind), torch.randn(2, 64).to(BFLOAT16)
    with FlopCounterMode(display=False) as counter:
        each(x, *layers)
    assert counter.get_total_flops() == 2 * 2 * 64 * (1024 + 2048 + 1088)
    with torch.autocast("cpu", BFLOAT16):
        assert all(y.dtype == BFLOAT16 for y in each(x.float(), *three()))


# --- processes


BOTH = """
import os, torch
torch.set_num_threads(2)
from minilora.qlora import blockwise
generator = torch.Generator().manual_seed(0)
x, W, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((17, 576), (193, 576), (193,)))
quantized = blockwise.quantize(W, double=True)
def both():
    from minilora.cpu import few_tiles
    from minilora.qlora import matmul_tiles
    ys = few_tiles.linears(x, [(W, bias), (W, None)]) + matmul_tiles.linears(x, [(quantized, bias), (quantized, None)])
    return torch.cat(ys)
"""


def test_where_a_processor_has_no_amx_the_answer_is_an_error_and_not_the_end_of_the_process(tmp_path, run_program):
    """Numba for another processor: to compile AMX's instructions for it would abort."""
    program = """
        try:
            both()
        except RuntimeError as error:
            print("no AMX" in str(error))
    """
    settings = {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run_program(BOTH, program, **settings) == "True"


@needs_amx
def test_four_threads_may_call_at_once(run_program):
    program = """
        from concurrent.futures import ThreadPoolExecutor
        right = both()
        with ThreadPoolExecutor(4) as pool:
            print(all(torch.equal(y, right) for y in pool.map(lambda _: both(), range(40))))
    """
    assert run_program(BOTH, program) == "True"


@needs_amx
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.parametrize("parent", ["right = both()", ""])
def test_a_forked_child_can_call(parent, run_program):
    program = f"""
        {parent}
        child = os.fork()
        if child == 0:
            both()
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_program(BOTH, program, PYTHONWARNINGS="ignore") == "0"


@needs_amx
@pytest.mark.skipif(sys.platform != "linux", reason="mprotect is called as Linux has it")
def test_not_a_byte_is_read_beyond_what_is_given(run_program):
    """Each ends where a page that may not be read begins: a load beyond it would end the process."""
    program = """
        from dataclasses import replace
        right = both()
        x, W, bias = (at_the_end_of_what_may_be_read(tensor) for tensor in (x, W, bias))
        units = quantized.absmax
        parts = {name: at_the_end_of_what_may_be_read(getattr(units, name)) for name in ("codes", "absmax")}
        packed = at_the_end_of_what_may_be_read(quantized.packed)
        quantized = replace(quantized, packed=packed, absmax=replace(units, **parts))
        print(torch.equal(both(), right), flush=True)
        os._exit(0)
    """
    assert run_program(BOTH, GUARD, program) == "True"
