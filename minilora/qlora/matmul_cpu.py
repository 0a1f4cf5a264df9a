"""Products of a few rows with a weight in 4 bits: each weight is decoded in a register, and W is never written.

    y = x Wᵀ + bias,   W[output, feature] = codebook[code] · absmax[block], as float32

The loop around this, its sums and its threads, are those of cpu/few_rows; what is read is a quarter of the bytes. The
sixteen values that a block's weights can have are one register of AVX-512, or two of AVX2, in which kernels_cpu looks
codes up: all layers of SmolLM2-135M take 7 ms for a row and 12 for eight, where in bfloat16 few_rows takes 10 and 13
(benchmarks/few_rows.py). From eight rows on it is arithmetic that takes the time, and the gain is the memory.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from jaxtyping import Float
from numba.core import cgutils, types
from torch import Tensor

from minilora import cpu, qlora
from minilora.cpu.few_rows import (
    BLOCK,
    JOB,
    OUTPUTS_AT_ONCE,
    block_of,
    multiplied,
    padded,
    products,
    suits,
    widened,
    write_sums,
)
from minilora.cpu.jobs import address, digest_of, in_llvm, part, take, worker
from minilora.cpu.products import may_be_few
from minilora.cpu.vectors import LANES, WORDS, load, look_up, prefetch, sixteen_times
from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE
from minilora.qlora.blockwise import BLOCK_SIZES, Quantized

WEIGHT = "packed", "codebook", "absmax", "codes", "offset", "values", "block_bits"
PART = np.dtype([(name, np.int64) for name in (*WEIGHT, "bias", "y", "out_features")])
NUMBERS: dict[torch.dtype, Any] = {torch.bfloat16: np.uint16, torch.float32: np.float32}  # as the kernel sees x and y


def fits(x: Tensor, *weights: Quantized) -> bool:
    """Whether these products are for `linears`."""
    return x.dtype in NUMBERS and suits(x) and may_be_decoded(x, *weights)


def may_be_decoded(x: Tensor, *weights: Quantized) -> bool:
    """Whether these products are of few rows, with weights of two axes that lie as kernels read them."""
    n_in = weights[0].shape[1]
    alike = all(W.lies_as_expected and W.shape[1] == n_in and W.shape[0] >= OUTPUTS_AT_ONCE for W in weights)
    return alike and may_be_few(x, sum(W.shape[0] for W in weights), n_in)


def linears(
    x: Float[Tensor, "*n in"], layers: Sequence[tuple[Quantized, Tensor | None]]
) -> list[Float[Tensor, "*n _"]]:
    """Compute x Wᵀ + bias for each (W, bias), where the products fit. No gradients flow."""
    kernel = _product(padded(x.numel() // x.shape[-1]), x.dtype)
    return multiplied(kernel, x, [(begins_with(W), bias, W.shape[0]) for W, bias in layers])


def begins_with(quantized: Quantized) -> tuple[int, ...]:
    """Give the fields of WEIGHT."""
    return *quantized.addresses, quantized.block_size.bit_length() - 1


@cache
def _product(n_sums: int, dtype: torch.dtype) -> Any:
    number, sources = NUMBERS[dtype], digest_of(cpu, qlora)

    def work(all_jobs):
        sources  # noqa: B018  (compiled anew when it changes)
        job = numba.carray(all_jobs, 1)[0]
        parts = numba.carray(address(job.parts), job.n_parts, PART)
        x = numba.carray(address(job.x), (job.n_rows, job.in_features), number)
        rows, sums = widened(x, n_sums), np.empty(LANES, np.float32)
        units = np.empty((BLOCK * job.in_features // BLOCK_SIZES[0]) + 2, np.float32)
        while True:
            first = take(all_jobs, job.piece)
            for block in range(first, first + job.piece):
                index, start = block_of(parts, block)
                if index == job.n_parts:
                    return
                it = parts[index]
                y = numba.carray(address(it.y), (job.n_rows, it.out_features), number)
                bias = numba.carray(address(it.bias), it.out_features if it.bias else 0, number)
                packed = numba.carray(address(it.packed), it.out_features * job.in_features // 2, np.uint8)
                codebook = numba.carray(address(it.codebook), 16, np.float32)
                stop = min(start + BLOCK, it.out_features)
                first_block = decode_units(it, job.in_features, min(start, stop - OUTPUTS_AT_ONCE), stop, units)
                for place in range(start, stop, OUTPUTS_AT_ONCE):
                    output = min(place, stop - OUTPUTS_AT_ONCE)
                    for row in range(0, job.n_rows, n_sums):
                        _multiply(n_sums, rows, row, packed, codebook, units, first_block, it.block_bits, output, sums)
                        write_sums(sums, bias, y, row, output)

    return worker(work, JOB)


@part
def decode_units(weight, in_features, first, stop, units):
    """Fill `units` with those of a weight's outputs from `first` on; give the number of the block of the first one."""
    first_block, last_block = first * in_features >> weight.block_bits, (stop * in_features - 1) >> weight.block_bits
    count, n_blocks = last_block + 1 - first_block, last_block + 1
    if weight.codes:
        nested_absmax = numba.carray(address(weight.absmax), (n_blocks - 1) // NESTED_BLOCK_SIZE + 1, np.float32)
        nested_codes = numba.carray(address(weight.codes), n_blocks, np.uint8)
        nested_values = numba.carray(address(weight.values), 256, np.float32)
        mean = numba.carray(address(weight.offset), 1, np.float32)[0]
        done = 0
        while done < count:
            start, nested = done, (first_block + done) // NESTED_BLOCK_SIZE
            done = min((nested + 1) * NESTED_BLOCK_SIZE - first_block, count)
            unit = nested_absmax[nested]
            for block in range(start, done):
                units[block] = nested_values[nested_codes[first_block + block]] * unit + mean
    else:
        all_units = numba.carray(address(weight.absmax), n_blocks, np.float32)
        units[:count] = all_units[first_block:n_blocks]
    return first_block


@in_llvm(prefer_literal=True)
def _multiply(typing_context, n_rows, x, row, packed, codebook, units, first_block, block_bits, output, sums):
    """sums[2 i + k] = x[row + i] · W[output + k], i < n_rows, k = 0 and 1; units are those from first_block on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]) for i in (1, 3, 4, 5, 9)]
        rows, codes_at, codebook_at, units_at = arrays[0], arrays[1].data, arrays[2].data, arrays[3].data
        first_block, block_bits, output = arguments[6:9]
        in_features = cgutils.unpack_tuple(builder, rows.shape)[1]

        def weights(output: Any, feature: Any) -> list[Any]:
            place = builder.add(builder.mul(output, in_features), feature)
            block = builder.sub(builder.lshr(place, block_bits), first_block)
            unit = sixteen_times(builder, builder.load(builder.gep(units_at, [block])))
            table = builder.fmul(load(builder, codebook_at), unit)  # the values that this block's weights can have
            at = builder.gep(codes_at, [builder.lshr(place, place.type(1))])
            prefetch(builder, at)
            pairs = builder.zext(load(builder, at), WORDS)
            firsts, seconds = builder.lshr(pairs, WORDS([4] * LANES)), builder.and_(pairs, WORDS([15] * LANES))
            return [look_up(builder, table, codes) for codes in (firsts, seconds)]

        products(builder, n_rows.literal_value, rows, arguments[2], output, arrays[4], weights)
        return context.get_dummy_value()

    kinds = (n_rows, x, row, packed, codebook, units, types.int64, types.int64, types.int64, sums)
    return types.void(*kinds), generate
