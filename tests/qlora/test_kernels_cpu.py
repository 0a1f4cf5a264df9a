"""The Numba kernels equal the reference bit for bit, in any number of threads, and leave torch and forks alone."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import replace

import llvmlite.binding as llvm
import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.cpu import vectors
from minilora.qlora import FP4, INT4, NF4, Quantized, blockwise, kernels_cpu, spare_memory
from minilora.qlora.blockwise import BLOCK_SIZES, NestedAbsmax

FORMATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="it has no such instructions")


def parts(quantized: Quantized) -> list[torch.Tensor]:
    units = quantized.absmax
    nested = [units.codes, units.absmax, units.offset] if isinstance(units, NestedAbsmax) else [units]
    return [quantized.packed, *nested]


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def same_parts(ours: Quantized, theirs: Quantized) -> bool:
    return all(same(one, other) for one, other in zip(parts(ours), parts(theirs), strict=True))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Normal weights of any size and scale, denormals among them, with zeros and outliers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 300) | st.integers(1, 9000))
    w = torch.randn(count, generator=generator) * 10.0 ** draw(st.integers(-44, 4))
    zeros = draw(st.integers(0, count))
    w[draw(st.integers(0, count - 1)) :][:zeros] = 0
    w[draw(st.integers(0, count - 1))] *= draw(st.sampled_from([1, 10, -1000]))
    w = w.to(draw(st.sampled_from(FORMATS)))
    return torch.where(w.isfinite(), w, torch.ones_like(w))


# --- the same bits as the reference


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    w=weights(),
    codebook=st.sampled_from([NF4, FP4, INT4]),
    block_size=st.sampled_from(BLOCK_SIZES),
    double=st.booleans(),
    dtype=st.sampled_from(FORMATS),
)
def test_bytes_units_and_values_equal_the_references(w, codebook, block_size, double, dtype):
    ours = kernels_cpu.quantize(w, codebook, block_size, double=double)
    theirs = blockwise.quantize(w, codebook, block_size, double=double)

    assert same_parts(ours, theirs)
    assert same(kernels_cpu.dequantize(ours, dtype), blockwise.dequantize(theirs, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(dtype, n_threads):
    w = torch.randn(5 * kernels_cpu.WEIGHTS_A_PIECE + 37).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        ours = kernels_cpu.quantize(w)
        values = kernels_cpu.dequantize(ours, dtype)
        assert torch.get_num_threads() == n_threads
    finally:
        torch.set_num_threads(before)

    assert same_parts(ours, blockwise.quantize(w))
    assert same(values, blockwise.dequantize(ours, dtype))


def large(dtype: torch.dtype, times: int = 1) -> Quantized:
    n_blocks = times * spare_memory.SPARED_FROM // (64 * dtype.itemsize) + 1
    packed = torch.randint(256, (32 * n_blocks,), dtype=torch.uint8)
    return Quantized(packed, torch.rand(n_blocks), NF4, 64, (n_blocks, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_weight_decodes_to_the_same_bits_after_a_smaller_and_after_a_larger_one(dtype):
    for quantized in (large(dtype), large(dtype, times=2), large(dtype)):
        values = kernels_cpu.dequantize(quantized, dtype)
        assert same(values, blockwise.dequantize(quantized, dtype))
        del values


def test_a_large_weight_takes_the_place_of_the_one_before_it():
    quantized = large(torch.bfloat16)
    place = kernels_cpu.dequantize(quantized, torch.bfloat16).data_ptr()
    # These would get that place from the system, had it been given back.
    others = [torch.empty(spare_memory.SPARED_FROM, dtype=torch.uint8) for _ in range(8)]

    assert place not in [other.data_ptr() for other in others]
    assert kernels_cpu.dequantize(quantized, torch.bfloat16).data_ptr() == place


def test_a_place_is_not_taken_while_a_view_of_it_is_left():
    view = kernels_cpu.dequantize(large(torch.bfloat16), torch.bfloat16)[-3:]
    before = view.clone()
    kernels_cpu.dequantize(large(torch.bfloat16), torch.bfloat16)

    assert torch.equal(view, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float32_is_rounded_as_torch_rounds_it(dtype):
    patterns = torch.randint(-(2**31), 2**31, (2**15,), dtype=torch.int32)
    halfway = patterns & ~0x1FFF | 0x1000  # between two float16; below, between two bfloat16
    units = torch.cat([patterns, halfway, patterns & ~0xFFFF | 0x8000, torch.tensor([0, -(2**31)], dtype=torch.int32)])
    units = torch.cat([units.view(torch.float32), torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0])])
    codes_of_one = torch.full((16 * len(units),), 0xFF, dtype=torch.uint8)
    quantized = Quantized(codes_of_one, units, NF4, 32, (len(units), 32))

    torch.testing.assert_close(
        kernels_cpu.dequantize(quantized, dtype)[:, 0], units.to(dtype), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ("features", "instructions"),
    [({"avx512f"}, ["avx512.permvar"]), ({"avx2"}, ["avx2.permd"]), ({"ssse3"}, ["ssse3.pshuf"]), (set(), [])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sixteen_are_looked_up_by_what_the_processor_has(features, instructions, dtype, monkeypatch):
    """What this processor has not is not tried; tests in other processes do so where Numba compiles for less."""
    if missing := [feature for feature in features if not vectors.compiles_for(feature)]:
        pytest.skip(f"this processor has no {missing}")
    monkeypatch.setattr(vectors, "compiles_for", lambda feature: feature in features)
    unkept = numba.cfunc
    monkeypatch.setattr(numba, "cfunc", lambda signature, cache: unkept(signature))  # what is kept has other features
    made = kernels_cpu._dequantize.__wrapped__(dtype)
    monkeypatch.setattr(kernels_cpu, "_dequantize", lambda dtype: made)
    quantized = blockwise.quantize(torch.randn(3, 64))

    assert same(kernels_cpu.dequantize(quantized, dtype), blockwise.dequantize(quantized, dtype))
    looks_up = r"llvm\.x86\.(avx512\.permvar|avx2\.permd|ssse3\.pshuf)"
    assert sorted(set(re.findall(looks_up, made.inspect_llvm()))) == instructions


@pytest.mark.parametrize(
    ("machine", "triple", "feature", "instruction"),
    [("x86_64", "x86_64-unknown-linux-gnu", "ssse3", "pshufb"), ("arm64", "aarch64-unknown-linux-gnu", "neon", "tbl")],
)
def test_llvm_turns_a_look_up_of_bytes_into_one_instruction(machine, triple, feature, instruction):
    name, bytes16 = vectors.BYTE_LOOK_UPS[machine], "<16 x i8>"
    module = f"""
        target triple = "{triple}"
        declare {bytes16} @{name}({bytes16}, {bytes16})
        define {bytes16} @find({bytes16} %table, {bytes16} %codes) "target-features"="+{feature}" {{
            %found = call {bytes16} @{name}({bytes16} %table, {bytes16} %codes)
            ret {bytes16} %found
        }}"""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    assembly = llvm.Target.from_triple(triple).create_target_machine().emit_assembly(llvm.parse_assembly(module))

    assert re.findall(rf"\b{instruction}", assembly) == [instruction]


def test_a_transposed_weight_that_wants_a_gradient_is_read_in_its_order():
    w = torch.randn(70, 33, requires_grad=True).T

    assert same_parts(kernels_cpu.quantize(w), blockwise.quantize(w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [15, 20])
def test_a_block_size_that_only_a_file_can_have_is_left_to_the_reference(block_size, dtype):
    packed = torch.randint(256, (30,), dtype=torch.uint8)
    quantized = Quantized(packed, torch.rand(60 // block_size), NF4, block_size, (60,))

    assert same(kernels_cpu.dequantize(quantized, dtype), blockwise.dequantize(quantized, dtype))


# --- what is refused


@pytest.mark.parametrize("place", [0, 63, 64, 998])  # the last is in the short last block
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bad_weight_is_refused_in_the_references_words(place, bad, dtype):
    w = torch.zeros(999, dtype=dtype)
    w[place] = bad
    with pytest.raises(ValueError) as theirs:
        blockwise.quantize(w)
    with pytest.raises(ValueError) as ours:
        kernels_cpu.quantize(w)

    assert str(ours.value) == str(theirs.value)
    assert f"the first at ({place},)" in str(ours.value)


def test_a_bad_weight_in_another_threads_share_is_refused():
    w = torch.zeros(4 * kernels_cpu.WEIGHTS_A_PIECE)
    w[-64 * 100] = torch.nan
    with pytest.raises(ValueError, match=f"1 of {len(w)} weights are NaN or infinite, the first at .{len(w) - 6400},"):
        kernels_cpu.quantize(w)


def test_a_float64_that_no_float32_holds_is_refused():
    with pytest.raises(ValueError, match=r"1 of 64 weights are NaN or infinite, the first at \(63,\)"):
        kernels_cpu.quantize(torch.tensor([0.0] * 63 + [1e300], dtype=torch.float64))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("part", ["packed", "absmax"])
def test_a_weight_with_a_part_too_short_is_refused_before_a_kernel_reads_beyond_it(part, double):
    whole = blockwise.quantize(torch.randn(300, 64), double=double)
    kept = getattr(whole, part)
    short = replace(kept, absmax=kept.absmax[:1]) if isinstance(kept, NestedAbsmax) else kept[:-1]

    with pytest.raises(ValueError, match=r"a weight of shape \(300, 64\) needs .*; this one has .*: load it again"):
        kernels_cpu.dequantize(replace(whole, **{part: short}))


# --- threads, forks, and folders that cannot be written


IMPORTS = "import torch; from minilora.qlora import blockwise, kernels_cpu"


def test_four_threads_may_call_at_once(run_program):
    program = """
        from concurrent.futures import ThreadPoolExecutor
        torch.set_num_threads(2)
        w = torch.randn(2**20)
        right = blockwise.dequantize(blockwise.quantize(w), torch.bfloat16)
        with ThreadPoolExecutor(4) as pool:
            results = pool.map(lambda _: kernels_cpu.dequantize(kernels_cpu.quantize(w), torch.bfloat16), range(12))
            print(all(torch.equal(result, right) for result in results))
    """
    assert run_program(IMPORTS, program, NUMBA_THREADING_LAYER="workqueue") == "True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_can_call_after_its_parent_did(run_program):
    program = """
        import os
        torch.set_num_threads(2)
        quantized = kernels_cpu.quantize(torch.randn(2**20))
        before = kernels_cpu.dequantize(quantized).numpy()
        child = os.fork()
        if child == 0:
            os._exit(0 if (kernels_cpu.dequantize(quantized).numpy() == before).all() else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run_program(IMPORTS, program, PYTHONWARNINGS="ignore") == "0"


LESS = """
import torch
from minilora.qlora import blockwise, kernels_cpu
quantized = kernels_cpu.quantize(torch.randn(8, 256, generator=torch.Generator().manual_seed(0)))
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    assert torch.equal(kernels_cpu.dequantize(quantized, dtype), blockwise.dequantize(quantized, dtype))
"""


@pytest.mark.parametrize(
    "variables",
    [
        pytest.param({"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+avx,+fma,+ssse3"}, marks=needs_x86),
        {"NUMBA_CPU_NAME": "generic"},
    ],
)
def test_a_numba_that_compiles_for_less_than_this_machine_has_gives_the_same(variables, tmp_path):
    """NUMBA_CPU_NAME=generic is usual where machines share a cache; LLVM aborts on an instruction it may not use."""
    environment = os.environ | variables | {"NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", LESS], env=environment, check=True)
