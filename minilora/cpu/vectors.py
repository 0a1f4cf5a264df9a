"""Vectors of sixteen numbers, in LLVM's words: what the kernels are written with where Numba has no words.

A function here that takes a `builder` is called while a kernel is compiled, and writes instructions into it: what it
gives is the name of a value that will be. LLVM turns vectors of sixteen into what the processor has, so that the same
words serve AVX-512, AVX2 and NEON. from_bfloat16 and to_bfloat16 are the scalar words of one number, for kernels that
are Numba's own.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from minilora.cpu.jobs import compiles_for, part

AHEAD = 4096  # bytes
FLOAT, WORD, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
LANES = 16
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)


@part
def from_bfloat16(word):
    """Give the float32 of which a bfloat16's bits are the upper half."""
    return np.uint32(np.uint32(word) << np.uint32(16)).view(np.float32)


@part
def to_bfloat16(number):
    """Round a float32 to the nearest bfloat16, halfway to the even one; give its bits."""
    if number != number:
        return np.uint32(0x7FC0)
    word = np.float32(number).view(np.uint32)
    return np.uint32(word + np.uint32(0x7FFF) + (word >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)


def add_neighbours(builder: Any, one: Any, other: Any) -> Any:
    """Add the floats of two vectors in pairs: eight sums of the one, then eight of the other."""
    evens, odds = (builder.shuffle_vector(one, other, WORDS(list(range(start, 2 * LANES, 2)))) for start in (0, 1))
    return builder.fadd(evens, odds)


def load(builder: Any, at: Any, count: int = LANES) -> Any:
    """Load sixteen numbers, or so many."""
    return builder.load(builder.bitcast(at, ir.VectorType(at.type.pointee, count).as_pointer()), align=1)


def prefetch(builder: Any, at: Any) -> None:
    """Ask for the line of memory that is AHEAD bytes behind an address, to be read, into all caches."""
    bytes_at = BYTE.as_pointer()
    ask = instruction(builder, "llvm.prefetch.p0", ir.VoidType(), [bytes_at, WORD, WORD, WORD])
    ahead = builder.gep(builder.bitcast(at, bytes_at), [ir.IntType(64)(AHEAD)])
    builder.call(ask, [ahead, WORD(0), WORD(3), WORD(1)])


def instruction(builder: Any, name: str, gives: Any, takes: list[Any]) -> Any:
    """Name one of LLVM's own functions, that builder.call may call it."""
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(gives, takes), name)


def to_bfloat16s(builder: Any, floats: Any) -> Any:
    """Do to sixteen floats what to_bfloat16 does to one."""
    words = builder.bitcast(floats, WORDS)
    is_odd = builder.and_(builder.lshr(words, WORDS([16] * LANES)), WORDS([1] * LANES))
    rounded = builder.add(builder.add(words, WORDS([0x7FFF] * LANES)), is_odd)
    upper = builder.lshr(rounded, WORDS([16] * LANES))
    numbers = builder.select(builder.fcmp_ordered("ord", floats, floats), upper, WORDS([0x7FC0] * LANES))
    return builder.trunc(numbers, ir.VectorType(ir.IntType(16), LANES))


def sixteen_times(builder: Any, number: Any) -> Any:
    """Put a float into every lane."""
    alone = builder.insert_element(FLOATS(ir.Undefined), number, WORD(0))
    return builder.shuffle_vector(alone, FLOATS(ir.Undefined), WORDS([0] * LANES))


def look_up(builder: Any, table: Any, codes: Any) -> Any:
    """Find sixteen codes in a table of sixteen floats: by one instruction of AVX-512, by AVX2 eight in half of it."""
    if compiles_for("avx512f"):
        permute = instruction(builder, "llvm.x86.avx512.permvar.sf.512", FLOATS, [FLOATS, WORDS])
        return builder.call(permute, [table, codes])
    if compiles_for("avx2"):
        return _look_up_by_eights(builder, table, codes)
    found, memory = FLOATS(ir.Undefined), cgutils.alloca_once_value(builder, table)
    table_at = builder.bitcast(memory, FLOAT.as_pointer())
    for lane in map(WORD, range(LANES)):
        at = builder.gep(table_at, [builder.extract_element(codes, lane)])
        found = builder.insert_element(found, builder.load(at), lane)
    return found


def _look_up_by_eights(builder: Any, table: Any, codes: Any) -> Any:
    floats, words = ir.VectorType(FLOAT, 8), ir.VectorType(WORD, 8)
    permute = instruction(builder, "llvm.x86.avx2.permps", floats, [floats, words])

    def half(vector: Any, start: int) -> Any:
        return builder.shuffle_vector(vector, vector, words(list(range(start, start + 8))))

    found = []
    for eight in (half(codes, 0), half(codes, 8)):
        low, high = (builder.call(permute, [half(table, start), eight]) for start in (0, 8))
        is_high = builder.icmp_unsigned("!=", builder.and_(eight, words([8] * 8)), words([0] * 8))
        found.append(builder.select(is_high, high, low))
    return builder.shuffle_vector(*found, WORDS(list(range(LANES))))
