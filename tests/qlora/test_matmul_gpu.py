"""The product from 4 bits without a GPU: interpreted, within a derived bound; compiled for two cards, and counted."""

import re
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import ahead_of_time
import pytest
import torch
from ahead_of_time import CARDS, POINTERS, import_interpreted, instructions, longest_loop, resource_usage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minilora.qlora import FP4, INT4, NF4, NF4Linear, QLoRALinear, Quantized, blockwise, fast, matmul_gpu
from minilora.qlora.blockwise import BLOCK_SIZES
from minilora.qlora.matmul_gpu import COLUMNS, FEW_ROWS, MANY_ROWS, Tiling

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
UNIT = 2.0**-24  # float32 rounds a number by at most this part of it
# What a result is rounded by: a part of it, and an amount where numbers of the type grow no finer
LAST_ROUNDING = {
    torch.float32: (UNIT, 0.0),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-7, 0.0),  # Triton's interpreter cuts it off
}


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    return import_interpreted(matmul_gpu)


def assert_within_the_bound(y: Tensor, x: Tensor, W: Tensor, bias: Tensor | None = None) -> None:
    """Compare y with x Wᵀ + bias in float64, for a W of x's dtype.

    A sum of n products and a bias, in float32 and any order, rounds no term more often than n + 1 times: it is off by
    at most ((1 + u)ⁿ⁺¹ − 1) · Σ|terms|. Then it is rounded to the dtype.
    """
    x, W = x.double(), W.double()
    bias = torch.zeros(len(W)).double() if bias is None else bias.double()
    part, amount = LAST_ROUNDING[y.dtype]
    if y.dtype == torch.bfloat16:  # and cuts off the weights too; W is rounded
        weights_off = 2.0**-7
    else:
        weights_off = 0.0
    expected, terms = x @ W.T + bias, x.abs() @ W.abs().T + bias.abs()
    sum_off = ((1 + UNIT) ** (x.shape[-1] + 1) - 1 + weights_off) * terms
    off = (y.double() - expected).abs()

    assert y.shape == expected.shape
    assert (off <= sum_off + part * (expected.abs() + sum_off) + amount).all(), off.max()


# --- interpreted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("n_rows", "out_features", "in_features", "block_size"),
    [
        (1, 40, 96, 64),  # a block runs over the end of a row
        (1, 96, 576, 64),  # SmolLM2's width: four and a half tiles
        (3, 33, 48, 4096),  # more than two blocks; all of a row's tile, and more, is in one
        (16, 70, 272, 256),
        (17, 70, 144, 32),  # the tiles for many rows
        (70, 65, 128, 128),  # a second tile of x
        (5, 1, 16, 32),
    ],
)
def test_the_product_and_its_backward_are_within_the_bound(
    interpreted, n_rows, out_features, in_features, block_size, bias, double, dtype
):
    quantized = blockwise.quantize(torch.randn(out_features, in_features), block_size=block_size, double=double)
    W = blockwise.dequantize(quantized, dtype)
    x, dy = torch.randn(n_rows, in_features).to(dtype), torch.randn(n_rows, out_features).to(dtype)
    b = torch.randn(out_features).to(dtype) if bias else None

    assert_within_the_bound(interpreted.linear(x, quantized, b), x, W, b)
    assert_within_the_bound(interpreted.linear_backward(dy, quantized), dy, W.T)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    n_rows=st.integers(1, 40),
    out_features=st.integers(1, 150),
    sixteens=st.integers(1, 20),
    block_size=st.sampled_from(BLOCK_SIZES),
    codebook=st.sampled_from([NF4, FP4, INT4]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_shape_is_within_the_bound(
    interpreted, n_rows, out_features, sixteens, block_size, codebook, double, dtype
):
    generator = torch.Generator().manual_seed(out_features)
    w = torch.randn(out_features, 16 * sixteens, generator=generator)
    w *= 10 ** torch.rand(w.shape, generator=generator)  # so that neighbouring blocks have quite different units
    quantized = blockwise.quantize(w, codebook, block_size, double=double)
    W = blockwise.dequantize(quantized, dtype)
    x = torch.randn(n_rows, 16 * sixteens, generator=generator).to(dtype)
    dy = torch.randn(n_rows, out_features, generator=generator).to(dtype)

    assert_within_the_bound(interpreted.linear(x, quantized), x, W)
    assert_within_the_bound(interpreted.linear_backward(dy, quantized), dy, W.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double", [False, True])
def test_its_weights_are_those_of_dequantize_bit_for_bit(interpreted, double, dtype):
    quantized = blockwise.quantize(torch.randn(70, 144), block_size=32, double=double)
    W = blockwise.dequantize(quantized, dtype)

    assert torch.equal(interpreted.linear(torch.eye(144, dtype=dtype), quantized), W.T)
    assert torch.equal(interpreted.linear_backward(torch.eye(70, dtype=dtype), quantized), W)


def test_the_bits_of_a_row_do_not_depend_on_how_often_it_is_asked_for(interpreted):
    quantized, x = blockwise.quantize(torch.randn(40, 576)), torch.randn(1, 576)

    assert torch.equal(interpreted.linear(x, quantized), interpreted.linear(x, quantized))
    assert torch.equal(interpreted.linear(x.expand(9, -1), quantized), interpreted.linear(x, quantized).expand(9, -1))


@pytest.mark.parametrize("programs", [1, 6, 8, 1000])
@pytest.mark.parametrize("n_rows", [2, 20])
def test_a_program_may_take_several_tiles_of_a_sum(interpreted, monkeypatch, n_rows, programs):
    for name in ("FEW_ROWS", "MANY_ROWS"):
        monkeypatch.setattr(interpreted, name, replace(getattr(interpreted, name), programs=programs))
    quantized = blockwise.quantize(torch.randn(150, 656), double=True)
    x, dy, W = torch.randn(n_rows, 656), torch.randn(n_rows, 150), blockwise.dequantize(quantized)

    assert_within_the_bound(interpreted.linear(x, quantized), x, W)  # 6 tiles a row; 5 rows of tiles, or 3
    assert_within_the_bound(interpreted.linear_backward(dy, quantized), dy, W.T)


def test_x_may_have_three_axes_and_any_strides(interpreted):
    quantized = blockwise.quantize(torch.randn(40, 96))
    W = blockwise.dequantize(quantized)
    x = torch.randn(96, 3, 2).permute(1, 2, 0)  # (3, 2, 96)
    dy = torch.randn(2, 3, 80)[..., ::2]

    assert not x.is_contiguous()
    assert_within_the_bound(interpreted.linear(x, quantized), x, W)
    assert_within_the_bound(interpreted.linear_backward(dy, quantized), dy, W.T)
    assert interpreted.linear(x[0, 0], quantized).shape == (40,)


def test_no_rows_give_no_rows(interpreted):
    quantized = blockwise.quantize(torch.randn(40, 96))

    assert interpreted.linear(torch.empty(2, 0, 96), quantized).shape == (2, 0, 40)
    assert interpreted.linear_backward(torch.empty(0, 40), quantized).shape == (0, 96)


@pytest.mark.parametrize(("in_features", "block_size"), [(33, 64), (34, 64), (1, 32), (24, 20)])
def test_what_the_kernel_does_not_do_is_dequantized_first(interpreted, monkeypatch, in_features, block_size):
    count, made = 30 * in_features, []
    packed = torch.randint(256, (-(-count // 2),), dtype=torch.uint8)
    quantized = Quantized(packed, torch.rand(-(-count // block_size)), NF4, block_size, (30, in_features))
    W = blockwise.dequantize(quantized)
    monkeypatch.setattr(interpreted.kernels_gpu, "dequantize", lambda *given: made.append(given) or W)
    x, dy, bias = torch.randn(2, in_features), torch.randn(2, 30), torch.randn(30)

    assert torch.equal(interpreted.linear(x, quantized, bias), nn.functional.linear(x, W, bias))
    assert torch.equal(interpreted.linear_backward(dy, quantized), dy @ W)
    assert made == [(quantized, torch.float32)] * 2


# --- the layer takes it where counting says so


@pytest.fixture
def few_rows_in_4_bits(interpreted, monkeypatch) -> list[str]:
    """Let fast take the kernel as it would on a GPU, and list its calls."""
    calls: list[str] = []

    def watched(name: str):
        original = getattr(interpreted, name)
        return lambda *given: calls.append(name) or original(*given)

    monkeypatch.setattr(fast, "multiplies_in_4_bits", lambda x: x.shape[:-1].numel() <= fast.MOST_ROWS_IN_4_BITS)
    for name in ("linear", "linear_backward"):
        monkeypatch.setattr(matmul_gpu, name, watched(name))
    return calls


def test_the_layers_forward_and_backward_go_through_the_kernel(few_rows_in_4_bits):
    layer = NF4Linear(nn.Linear(96, 40))
    W, x, dy = layer.dense_weight(torch.float32), torch.randn(2, 3, 96, requires_grad=True), torch.randn(2, 3, 40)
    y = layer(x)
    y.backward(dy)

    assert few_rows_in_4_bits == ["linear", "linear_backward"]
    assert_within_the_bound(y.detach(), x.detach(), W, layer.bias)
    assert_within_the_bound(x.grad, dy, W.T)


def test_an_adapter_over_the_kernel_has_the_gradients_of_one_over_floats(few_rows_in_4_bits, monkeypatch):
    layer = QLoRALinear(nn.Linear(96, 40), r=4, alpha=8)
    nn.init.normal_(layer.B)
    x = torch.randn(6, 96)

    def gradients() -> list[Tensor]:
        given = x.clone().requires_grad_()
        layer.zero_grad()
        y = layer(given)
        y.square().sum().backward()
        return [y.detach(), given.grad, layer.A.grad.clone(), layer.B.grad.clone()]

    ours = gradients()
    assert few_rows_in_4_bits == ["linear"]  # the backward asks for floats: its W may be any base's
    monkeypatch.setattr(fast, "multiplies_in_4_bits", lambda x: False)

    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(ours, gradients(), strict=True))


def test_many_rows_go_through_floats(few_rows_in_4_bits):
    NF4Linear(nn.Linear(96, 40))(torch.randn(1, fast.MOST_ROWS_IN_4_BITS + 1, 96))

    assert few_rows_in_4_bits == []


@pytest.mark.parametrize(
    ("n_rows", "is_cuda", "dtype", "expected"),
    [
        (1, True, torch.bfloat16, True),
        (16, True, torch.float16, True),
        (17, True, torch.float16, False),
        (1, True, torch.float32, False),  # tensor cores do not multiply it in full
        (1, False, torch.bfloat16, False),
    ],
)
def test_few_rows_of_half_precision_on_cuda_are_multiplied_in_4_bits(n_rows, is_cuda, dtype, expected):
    x = SimpleNamespace(shape=torch.Size([n_rows, 64]), is_cuda=is_cuda, dtype=dtype)

    assert fast.multiplies_in_4_bits(x) is expected


def test_the_rows_that_fast_takes_are_one_tile():
    assert fast.MOST_ROWS_IN_4_BITS == FEW_ROWS.x_rows


# --- compiled ahead of time: no GPU is needed for that


def compile_for(
    capability: int,
    dtype: torch.dtype,
    tiling: Tiling,
    *,
    backward: bool,
    double: bool = True,
    block_size: int = 64,
    ones: tuple[str, ...] = (),  # sizes that are 1: Triton makes them constants
):
    nested = dict.fromkeys(["nested_absmax", "offset", "nested_values"], "*fp32") if double else {}
    kinds = {
        "x": POINTERS[dtype],
        "packed": "*u8",
        "absmax": "*u8" if double else "*fp32",
        "values": "*fp32",
        "parts": "*fp32",
        **dict.fromkeys({"n_rows", "out_features", "in_features"} - {*ones}, "i32"),
    }
    group = min(block_size, COLUMNS)
    constants = {
        "BACKWARD": backward,
        "X_ROWS": tiling.x_rows,
        "W_ROWS": tiling.w_rows,
        "COLUMNS": COLUMNS,
        "GROUP": group,
        "GROUPS_A_BLOCK": block_size // group,
        "NESTED_BLOCK_SIZE": 256,
        "UPCAST": False,
        **dict.fromkeys(ones, 1),
    }
    kernel, options = matmul_gpu._multiply_parts, matmul_gpu.compile_options(tiling)
    by16 = ["out_features", "in_features"]
    return ahead_of_time.compile_for(capability, kernel, kinds | nested, constants, options, *by16)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tiling", [FEW_ROWS, MANY_ROWS], ids=["few", "many"])
@pytest.mark.parametrize(
    ("dtype", "double", "block_size"),
    [(torch.bfloat16, True, 64), (torch.float16, False, 4096), (torch.float16, True, 32), (torch.float32, True, 64)],
)
def test_the_kernel_compiles_without_spills(capability, tiling, backward, dtype, double, block_size, tmp_path):
    kernel = compile_for(capability, dtype, tiling, backward=backward, double=double, block_size=block_size)
    used = resource_usage(kernel, tmp_path)

    assert f".target sm_{capability}" in kernel.asm["ptx"]
    assert (used["STACK"], used["LOCAL"]) == (0, 0)  # a spilled register would lie there
    assert used["REG"] <= tiling.registers


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("ones", [("n_rows",), ("out_features",), ("n_rows", "out_features")])
def test_the_kernel_compiles_where_a_size_is_one(backward, ones, tmp_path):
    kernel = compile_for(90, torch.bfloat16, FEW_ROWS, backward=backward, ones=ones)
    used = resource_usage(kernel, tmp_path)

    assert (used["STACK"], used["LOCAL"]) == (0, 0)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bias", "ones"), [(True, ()), (False, ("n_parts",)), (True, ("count", "width"))])
def test_the_kernel_that_adds_parts_compiles_without_spills(capability, dtype, bias, ones, tmp_path):
    kinds = {"parts": "*fp32", "y": POINTERS[dtype]} | dict.fromkeys({"n_parts", "count", "width"} - {*ones}, "i32")
    kinds |= {"bias": POINTERS[dtype]} if bias else {}
    constants = dict.fromkeys(ones, 1) | {"TILE": matmul_gpu.ADDED_A_PROGRAM}
    kernel = ahead_of_time.compile_for(capability, matmul_gpu._add_parts, kinds, constants, {})
    used = resource_usage(kernel, tmp_path)

    assert (used["STACK"], used["LOCAL"]) == (0, 0)


def test_all_programs_of_few_rows_are_on_a_card_at_once():
    programs_a_core = 65_536 // (32 * FEW_ROWS.num_warps * FEW_ROWS.registers)

    assert programs_a_core * min(108, 132) >= FEW_ROWS.programs  # cores of an A100, an H100


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_tensor_cores_multiply_and_add_in_float32(dtype, kind, backward):
    code = {
        (capability, tiling.x_rows): compile_for(capability, dtype, tiling, backward=backward).asm["ptx"]
        for capability in CARDS
        for tiling in (FEW_ROWS, MANY_ROWS)
    }
    by_warp, by_four_warps = rf"mma\.sync\S+\.f32\.{kind}\.{kind}\.f32", rf"wgmma\S+\.f32\.{kind}\.{kind}"

    assert all(re.search(by_warp, code[case]) for case in [(80, 16), (80, 64), (90, 16)])
    assert re.search(by_four_warps, code[90, 64])


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("backward", [False, True])
def test_the_compiled_kernel_rounds_a_weight_as_the_reference_does(capability, backward):
    ptx = compile_for(capability, torch.bfloat16, FEW_ROWS, backward=backward).asm["ptx"]

    assert "fma." not in ptx  # the product of a unit is rounded before its offset is added
    assert "cvt.rn.bf16" in ptx  # to the nearest, the even one of two


@pytest.mark.parametrize("backward", [False, True])
def test_codes_beyond_two_to_the_32_are_found_by_64_bits(backward):
    code = compile_for(90, torch.bfloat16, FEW_ROWS, backward=backward).asm["ttir"]
    offsets = re.findall(r"tt\.addptr %\S+, %\S+ : tensor<\S+!tt\.ptr<i8>>, tensor<(?:\d+x)+(i\d+)>", code)

    assert offsets == ["i64", "i64"]  # of units, of packed


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_written_but_the_result(capability, backward, tmp_path):
    code = instructions(compile_for(capability, torch.bfloat16, FEW_ROWS, backward=backward), tmp_path)
    stores = [name for _, name, _ in code if name.startswith(("STG", "ST.", "RED", "ATOM"))]
    results = FEW_ROWS.x_rows * (COLUMNS if backward else FEW_ROWS.w_rows)
    result_bytes_a_thread = 4 * results / (32 * FEW_ROWS.num_warps)

    assert stores == ["STG.E.128"] * int(result_bytes_a_thread / 16)
    assert not {"STG.E.128"} & set(longest_loop(code))  # and only once the sum is complete


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("tiling", "most"), [(FEW_ROWS, 13), (MANY_ROWS, 18)], ids=["few", "many"])
def test_the_counts_in_the_docstring_are_those_of_the_machine_code(capability, backward, tiling, most, tmp_path):
    code = instructions(compile_for(capability, torch.bfloat16, tiling, backward=backward), tmp_path)
    loop = longest_loop(code)
    weights_a_thread = tiling.w_rows * COLUMNS / (32 * tiling.num_warps)
    tiles_a_program = 4096 * 4096 / (tiling.w_rows * COLUMNS) / tiling.programs

    assert sum(name.startswith("LDG.E.U8") for name in loop) <= 2  # 8-bit units; codes come at least four bytes at once
    assert (len(loop) + (len(code) - len(loop)) / tiles_a_program) / weights_a_thread <= most


def test_the_table_in_the_docstring_is_what_counting_gives():
    weights, width = 4096 * 4096, 4096
    w_bytes = weights / 2 + weights / 64 + 4 * weights / 64 / 256
    cards = {"H100": (3.35e12, 3.0e13, 989e12), "A100": (2.04e12, 1.95e13, 312e12)}
    for n_rows, tiling, most in [(1, FEW_ROWS, 13), (16, FEW_ROWS, 13), (64, MANY_ROWS, 18)]:
        x_bytes = n_rows * width * 2 * width / tiling.w_rows
        n_parts = tiling.programs // (width // tiling.w_rows)
        parts_bytes = 2 * 4 * n_parts * n_rows * width
        counted, others = [], []
        for bytes_a_s, instructions_a_s, operations_a_s in cards.values():
            tasks = [
                (w_bytes + x_bytes + parts_bytes) / bytes_a_s,
                most * weights / instructions_a_s,
                2 * tiling.x_rows * weights / operations_a_s,
            ]
            counted.append(f"{max(tasks) * 1e6:.0f}-{sum(tasks) * 1e6:.0f}")
            floats = (w_bytes + 2 * weights) / bytes_a_s + 2 * weights / bytes_a_s
            others.append(f"{floats * 1e6:.0f}")
        mb = " + ".join(f"{part / 1e6:.1f}" for part in (w_bytes, x_bytes, parts_bytes))
        row = [str(n_rows), f"{mb} MB", f"at most {most}", ", ".join(counted), ", ".join(others)]

        assert re.search(r"\s+".join(map(re.escape, row)), matmul_gpu.__doc__), row


# --- what cannot run says so


def refused(interpreted: ModuleType, **changes):
    given = {"x": torch.ones(2, 96), "quantized": blockwise.quantize(torch.ones(40, 96)), "bias": torch.ones(40)}
    return interpreted.linear(**given | changes)


def test_x_of_another_width_is_refused(interpreted):
    with pytest.raises(ValueError, match=r"x of shape \(2, 95\) does not fit .*\(40, 96\): its last axis must be 96"):
        refused(interpreted, x=torch.ones(2, 95))
    with pytest.raises(ValueError, match=r"x of shape \(\) does not fit"):
        refused(interpreted, x=torch.ones(()))
    with pytest.raises(ValueError, match=r"x of shape \(2, 96\) does not fit .*\(40, 96\): its last axis must be 40"):
        interpreted.linear_backward(torch.ones(2, 96), blockwise.quantize(torch.ones(40, 96)))


def test_a_dtype_that_the_kernel_does_not_multiply_is_refused(interpreted):
    with pytest.raises(
        TypeError, match=r"x is torch.float64: the kernel multiplies float16, .*; cast x to one of them"
    ):
        refused(interpreted, x=torch.ones(2, 96).double())
    with pytest.raises(TypeError, match=r"x is torch.float16 and the bias torch.float32: cast one to the other's"):
        refused(interpreted, x=torch.ones(2, 96).half())


def test_a_bias_of_another_length_is_refused(interpreted):
    with pytest.raises(ValueError, match=r"the bias has shape \(1,\): this weight needs \(40,\)"):
        refused(interpreted, bias=torch.ones(1))


def test_a_weight_that_is_no_matrix_is_refused(interpreted):
    with pytest.raises(ValueError, match=r"the weight's shape is \(96,\): only one of two axes, \(out, in\), can be"):
        refused(interpreted, quantized=blockwise.quantize(torch.ones(96)))


def test_tensors_on_several_devices_are_refused(interpreted):
    with pytest.raises(ValueError, match=r"x, weight and bias lie on \['cpu', 'meta'\]: move them to one device"):
        refused(interpreted, x=torch.ones(2, 96, device="meta"))


def test_a_weight_with_codes_missing_is_refused_before_the_kernel_reads_beyond_them(interpreted):
    whole = blockwise.quantize(torch.ones(40, 96))

    with pytest.raises(ValueError, match=r"needs {'bytes of codes': 1920, 'units': 60}; this one has .* load it again"):
        refused(interpreted, quantized=replace(whole, packed=whole.packed[:-1]))


def test_a_weight_on_a_cpu_is_refused_with_the_way_out():
    with pytest.raises(
        ValueError, match=r"runs on a CUDA device and this weight is on cpu: .*minilora.qlora.NF4Linear"
    ):
        matmul_gpu.linear(torch.ones(1, 64), blockwise.quantize(torch.ones(64, 64)))


def test_without_triton_the_module_is_imported_and_one_line_says_what_to_install():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from minilora.qlora import blockwise, matmul_gpu\n"
        "matmul_gpu.linear(torch.ones(1, 64), blockwise.quantize(torch.ones(64, 64)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert result.stderr.splitlines()[-1].startswith("ImportError: Triton is not installed: pip install triton")
