"""Products of a few rows with a weight in 4 bits: each weight is decoded in a register, and W is never written.

    y = x Wᵀ + bias,   W[output, feature] = codebook[code] · absmax[block], as float32

The loop around this, its sums and its threads, are those of cpu/few_rows; what is read is a quarter of the bytes. The
codebook's sixteen floats are one register of AVX-512, in which one instruction looks sixteen codes up: all layers of
SmolLM2-135M take 15 ms for a row, where turning their weights into bfloat16 and torch.mm takes 110. Elsewhere each
weight is loaded from the codebook.
"""

from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from llvmlite import ir
from numba.core import cgutils, types
from torch import Tensor

from minilora.cpu import few_rows, jobs
from minilora.cpu.few_rows import (
    FLOATS,
    LANES,
    OUTPUTS_A_PIECE,
    OUTPUTS_AT_ONCE,
    WORDS,
    bias_at,
    instruction,
    load,
    narrowed,
    padded,
    prefetch,
    products,
    suits,
    widened,
)
from minilora.cpu.jobs import address, compiles_for, digest_of, in_llvm, part, run, take, worker
from minilora.cpu.products import may_be_few
from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE
from minilora.qlora.blockwise import NestedAbsmax, Quantized
from minilora.qlora.codebooks import dynamic_map

POINTERS = ("x", "packed", "codebook", "absmax", "codes", "offset", "values", "bias", "y")
SIZES = ("n_rows", "out_features", "in_features", "block_bits")
NUMBERS: dict[torch.dtype, Any] = {torch.bfloat16: np.uint16, torch.float32: np.float32}  # as the kernel sees x and y
JOB = np.dtype([(name, np.int64) for name in ("taken", *POINTERS, *SIZES)])


def fits(x: Tensor, quantized: Quantized) -> bool:
    """Whether a product is one for `linear`."""
    return x.dtype in NUMBERS and suits(x) and may_be_decoded(x, quantized)


def may_be_decoded(x: Tensor, *weights: Quantized) -> bool:
    """Whether these products are of few rows, with weights of two axes that lie as kernels read them."""
    alike = all(W.lies_as_expected and W.shape[1] == weights[0].shape[1] for W in weights)
    return alike and may_be_few(x, sum(W.shape[0] for W in weights), weights[0].shape[1])


def linear(x: Float[Tensor, "*n in"], quantized: Quantized, bias: Tensor | None = None) -> Float[Tensor, "*n out"]:
    """Compute x Wᵀ + bias where it `fits`. No gradients flow."""
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], quantized.shape[0])
    bias = bias if bias is None else bias.contiguous()
    pointers = x.data_ptr(), *addresses(quantized), bias_at(bias, y), y.data_ptr()
    n_rows = x.numel() // x.shape[-1]
    sizes = n_rows, *quantized.shape, quantized.block_size.bit_length() - 1
    run(_product(padded(n_rows), x.dtype), quantized.shape[0], *pointers, *sizes)
    return y


def addresses(quantized: Quantized) -> tuple[int, ...]:
    """Where what a kernel reads of a weight lies: packed, codebook, absmax, and for a double-quantized one the rest."""
    units, device = quantized.absmax, quantized.packed.device
    common = quantized.packed.data_ptr(), quantized.codebook.table(device).data_ptr()
    if not isinstance(units, NestedAbsmax):
        return *common, units.data_ptr(), 0, 0, 0
    nested = units.absmax, units.codes, units.offset, dynamic_map(device)
    return *common, *(tensor.data_ptr() for tensor in nested)


@cache
def _product(n_sums: int, dtype: torch.dtype) -> Any:
    number, sources = NUMBERS[dtype], digest_of(jobs, few_rows)

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        x = numba.carray(address(job.x), (job.n_rows, job.in_features), number)
        y = numba.carray(address(job.y), (job.n_rows, job.out_features), number)
        bias = numba.carray(address(job.bias), job.out_features if job.bias else 0, number)
        packed = numba.carray(address(job.packed), job.out_features * job.in_features // 2, np.uint8)
        codebook = numba.carray(address(job.codebook), 16, np.float32)
        rows, sums = widened(x, n_sums), np.empty(LANES, np.float32)
        n_blocks = ((job.out_features * job.in_features - 1) >> job.block_bits) + 1
        units = np.empty((OUTPUTS_AT_ONCE * job.in_features >> job.block_bits) + 2, np.float32)
        while True:
            first = take(all_jobs, OUTPUTS_A_PIECE)
            if first >= job.out_features:
                return
            for place in range(first, min(first + OUTPUTS_A_PIECE, job.out_features), OUTPUTS_AT_ONCE):
                output = min(place, job.out_features - OUTPUTS_AT_ONCE)
                first_block = output * job.in_features >> job.block_bits
                decode_units(job.absmax, job.codes, job.offset, job.values, n_blocks, first_block, units)
                _multiply(n_sums, rows, packed, codebook, units, first_block, job.block_bits, output, sums)
                narrowed(sums, bias, y, output)

    return worker(work, JOB)


@part
def decode_units(absmax, codes, offset, values, n_blocks, first_block, units):
    """Fill `units` with those from first_block on, as far as there are any; codes at 0 means that absmax holds them."""
    count = min(len(units), n_blocks - first_block)
    if codes:
        nested_absmax = numba.carray(address(absmax), (n_blocks - 1) // NESTED_BLOCK_SIZE + 1, np.float32)
        nested_codes = numba.carray(address(codes), n_blocks, np.uint8)
        nested_values = numba.carray(address(values), 256, np.float32)
        mean = numba.carray(address(offset), 1, np.float32)[0]
        stop = 0
        while stop < count:
            start, nested = stop, (first_block + stop) // NESTED_BLOCK_SIZE
            stop = min((nested + 1) * NESTED_BLOCK_SIZE - first_block, count)
            unit = nested_absmax[nested]
            for block in range(start, stop):
                units[block] = nested_values[nested_codes[first_block + block]] * unit + mean
    else:
        all_units = numba.carray(address(absmax), n_blocks, np.float32)
        units[:count] = all_units[first_block : first_block + count]


@in_llvm(prefer_literal=True)
def _multiply(typing_context, n_rows, x, packed, codebook, units, first_block, block_bits, output, sums):
    """sums[2 row + k] = x[row] · W[output + k], k = 0 and 1; units are those from first_block on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (1, 2, 3, 4, 8)]
        rows, codes_at, codebook_at, units_at = arrays[0], arrays[1].data, arrays[2].data, arrays[3].data
        first_block, block_bits, first_output = arguments[5:8]
        in_features = cgutils.unpack_tuple(builder, rows.shape)[1]

        def weights(output: Any, feature: Any) -> list[Any]:
            place = builder.add(builder.mul(output, in_features), feature)
            block = builder.sub(builder.lshr(place, block_bits), first_block)
            unit = sixteen_times(builder, builder.load(builder.gep(units_at, [block])))
            at = builder.gep(codes_at, [builder.lshr(place, place.type(1))])
            prefetch(builder, at)
            pairs = builder.zext(load(builder, at), WORDS)
            firsts, seconds = builder.lshr(pairs, WORDS([4] * LANES)), builder.and_(pairs, WORDS([15] * LANES))
            return [builder.fmul(_look_up(builder, codebook_at, codes), unit) for codes in (firsts, seconds)]

        products(builder, n_rows.literal_value, rows, first_output, arrays[4], weights)
        return context.get_dummy_value()

    kinds = (n_rows, x, packed, codebook, units, types.int64, types.int64, types.int64, sums)
    return types.void(*kinds), generate


def sixteen_times(builder: Any, number: Any) -> Any:
    """Put a float into every lane."""
    alone = builder.insert_element(FLOATS(ir.Undefined), number, ir.IntType(32)(0))
    return builder.shuffle_vector(alone, FLOATS(ir.Undefined), WORDS([0] * LANES))


def _look_up(builder: Any, codebook_at: Any, codes: Any) -> Any:
    """Find sixteen codes in the codebook, at once where the processor can."""
    if compiles_for("avx512f"):
        permute = instruction(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, [FLOATS, WORDS])
        return builder.call(permute, [load(builder, codebook_at), codes])
    found = FLOATS(ir.Undefined)
    for lane in map(ir.IntType(32), range(LANES)):
        at = builder.gep(codebook_at, [builder.extract_element(codes, lane)])
        found = builder.insert_element(found, builder.load(at), lane)
    return found
