"""The Triton kernel without a GPU: interpreted, against the reference; compiled for two cards, and counted."""

import subprocess
import sys
from dataclasses import replace
from types import ModuleType

import ahead_of_time
import pytest
import torch
from ahead_of_time import CARDS, POINTERS, import_interpreted, resource_usage
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.qlora import FP4, INT4, NF4, blockwise, kernels_gpu
from minilora.qlora.blockwise import BLOCK_SIZES

EXACT_WHEN_INTERPRETED = [torch.float32, torch.float16, torch.float64]  # its bfloat16 is cut off, not rounded
N_THREADS = 32 * kernels_gpu.COMPILE_OPTIONS["num_warps"]


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    return import_interpreted(kernels_gpu)


# --- interpreted: the same bits as the reference


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", EXACT_WHEN_INTERPRETED)
@pytest.mark.parametrize("count", [1, 63, 64, 320, 1024, 1088, 1099])
def test_the_interpreted_kernel_equals_the_reference_exactly(interpreted, count, dtype, double):
    quantized = blockwise.quantize(torch.randn(count), double=double)

    assert torch.equal(interpreted.dequantize(quantized, dtype), blockwise.dequantize(quantized, dtype))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    count=st.integers(1, 9000),
    block_size=st.sampled_from(BLOCK_SIZES),
    codebook=st.sampled_from([NF4, FP4, INT4]),
    double=st.booleans(),
    exponent=st.integers(-38, 30),
)
def test_any_weight_comes_back_as_from_the_reference(interpreted, count, block_size, codebook, double, exponent):
    w = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 10.0**exponent
    quantized = blockwise.quantize(w, codebook, block_size, double=double)

    assert torch.equal(interpreted.dequantize(quantized), blockwise.dequantize(quantized))


def test_the_interpreted_kernel_gives_the_shape_back(interpreted):
    assert interpreted.dequantize(blockwise.quantize(torch.randn(3, 5, 7))).shape == (3, 5, 7)


def test_a_block_size_that_only_a_file_can_have_is_left_to_the_reference(interpreted):
    quantized = blockwise.Quantized(torch.arange(30, dtype=torch.uint8), torch.rand(3), NF4, 20, (60,))

    assert torch.equal(interpreted.dequantize(quantized), blockwise.dequantize(quantized))


def test_a_weight_with_codes_missing_is_refused_before_the_kernel_reads_beyond_them(interpreted):
    whole = blockwise.quantize(torch.randn(64))

    with pytest.raises(ValueError, match=r"needs {'bytes of codes': 32, 'units': 1}; this one has .* load it again"):
        interpreted.dequantize(replace(whole, packed=whole.packed[:-1]))


# --- compiled ahead of time: no GPU is needed for that


def compile_for(capability: int, dtype: torch.dtype, *, double: bool, block_size: int = 64):
    nested = dict.fromkeys(["nested_absmax", "offset", "nested_values"], "*fp32") if double else {}
    absmax = "*u8" if double else "*fp32"
    kinds = {"packed": "*u8", "absmax": absmax, "values": "*fp32", "weights": POINTERS[dtype], "n_blocks": "i32"}
    blocks = max(1, 2 * kernels_gpu.BYTES_A_PROGRAM // block_size)
    constants = {"HALF": block_size // 2, "BLOCKS": blocks, "NESTED_BLOCK_SIZE": 256}
    kernel, options = kernels_gpu._dequantize_blocks, kernels_gpu.COMPILE_OPTIONS
    return ahead_of_time.compile_for(capability, kernel, kinds | nested, constants, options)


@pytest.mark.parametrize("capability", CARDS)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("dtype", "block_size"), [(torch.float32, 64), (torch.float16, 32), (torch.bfloat16, 4096)])
def test_the_kernel_compiles_ahead_of_time_without_spills(capability, double, dtype, block_size, tmp_path):
    kernel = compile_for(capability, dtype, double=double, block_size=block_size)
    used = resource_usage(kernel, tmp_path)

    assert f".target sm_{capability}" in kernel.asm["ptx"]
    assert (used["STACK"], used["LOCAL"]) == (0, 0)  # a spilled register would lie there
    assert used["REG"] <= 64  # 65,536 registers a core: 1024 threads at once, half of all it can hold


@pytest.mark.parametrize("capability", CARDS)
def test_the_compiled_kernel_rounds_as_the_reference_does(capability):
    ptx = compile_for(capability, torch.bfloat16, double=True).asm["ptx"]

    assert "fma." not in ptx  # the product of a unit is rounded before its offset is added
    assert "cvt.rn.bf16" in ptx  # to the nearest, the even one of two


@pytest.mark.parametrize("capability", CARDS)
def test_the_counts_in_the_docstring_are_those_of_the_machine_code(capability, tmp_path):
    code = ahead_of_time.instructions(compile_for(capability, torch.bfloat16, double=True), tmp_path)
    run = [name for _, name, _ in code]
    weights_a_thread = 2 * kernels_gpu.BYTES_A_PROGRAM / N_THREADS

    assert len(run) / weights_a_thread <= 14
    assert run.count("STG.E.128") == 1  # all results of a thread at once
    assert run.count("LDG.E.U8") == 1  # a block's 8-bit unit; the codes come four bytes at once


# --- what cannot run says so


def test_a_weight_on_a_cpu_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"runs on a CUDA device and this weight is on cpu: .* minilora.qlora.dequan"):
        kernels_gpu.dequantize(blockwise.quantize(torch.ones(64)))


def test_without_triton_the_module_is_imported_and_one_line_says_what_to_install():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from minilora.qlora import blockwise, kernels_gpu\n"
        "kernels_gpu.dequantize(blockwise.quantize(torch.ones(64)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert result.stderr.splitlines()[-1].startswith("ImportError: Triton is not installed: pip install triton")
