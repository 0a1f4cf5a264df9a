"""Vectors of sixteen numbers, in LLVM's words: what the kernels are written with where Numba has no words.

A function here that takes a `builder` is called while a kernel is compiled, and writes instructions into it: what it
gives is the name of a value that will be. LLVM turns vectors of sixteen into what the processor has, so that the same
words serve AVX-512, AVX2 and NEON. from_bfloat16 and to_bfloat16 are the scalar words of one number, for kernels that
are Numba's own.
"""

import platform
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from minilora.cpu.jobs import compiles_for, part

AHEAD = 4096  # bytes
FLOAT, WORD, BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(8)
LANES = 16
FLOATS, WORDS, BYTES = (ir.VectorType(number, LANES) for number in (FLOAT, WORD, BYTE))
BYTE_LOOK_UPS = {
    "x86_64": "llvm.x86.ssse3.pshuf.b.128",
    "AMD64": "llvm.x86.ssse3.pshuf.b.128",
    "arm64": "llvm.aarch64.neon.tbl1.v16i8",
    "aarch64": "llvm.aarch64.neon.tbl1.v16i8",
}


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


def to_float16s(builder: Any, floats: Any) -> Any:
    """Round sixteen floats to the nearest float16, halfway to the even one; give their bits."""

    def words(number: int) -> Any:
        return WORDS([number] * LANES)

    bits = builder.bitcast(floats, WORDS)
    sign, magnitude = (builder.and_(bits, words(mask)) for mask in (0x80000000, 0x7FFFFFFF))
    is_odd = builder.and_(builder.lshr(magnitude, words(13)), words(1))
    rebased = builder.sub(magnitude, words(0x38000000))  # float32 counts exponents from 127, float16 from 15
    found = builder.lshr(builder.add(builder.add(rebased, words(0xFFF)), is_odd), words(13))
    # Below 2⁻¹⁴ its steps are 2⁻²⁴, as a float32's are above ½.
    shifted = builder.fadd(builder.bitcast(magnitude, FLOATS), FLOATS([0.5] * LANES))
    small = builder.sub(builder.bitcast(shifted, WORDS), words(0x3F000000))
    found = builder.select(builder.icmp_unsigned("<", magnitude, words(0x38800000)), small, found)
    found = builder.select(builder.icmp_unsigned(">=", magnitude, words(0x47800000)), words(0x7C00), found)  # 65,536
    found = builder.select(builder.icmp_unsigned(">", magnitude, words(0x7F800000)), words(0x7E00), found)  # NaN
    found = builder.or_(found, builder.lshr(sign, words(16)))
    return builder.trunc(found, ir.VectorType(ir.IntType(16), LANES))


def by_turns(builder: Any, one: Any, other: Any) -> list[Any]:
    """Put the numbers of two vectors alternately into two: 0, 16, 1, 17, … and what is left."""
    orders = [[place // 2 + LANES * (place % 2) for place in range(start, start + LANES)] for start in (0, LANES)]
    return [builder.shuffle_vector(one, other, WORDS(order)) for order in orders]


def sixteen_times(builder: Any, number: Any) -> Any:
    """Put a float into every lane."""
    alone = builder.insert_element(FLOATS(ir.Undefined), number, WORD(0))
    return builder.shuffle_vector(alone, FLOATS(ir.Undefined), WORDS([0] * LANES))


def look_up(builder: Any, table: Any, codes: Any) -> Any:
    """Find sixteen codes in a table of sixteen floats, or words of 32 bits, in as few instructions as there are."""
    if compiles_for("avx512f"):
        name, kind = {FLOATS: ("sf", FLOATS), WORDS: ("si", WORDS)}[table.type]
        permute = instruction(builder, f"llvm.x86.avx512.permvar.{name}.512", kind, [kind, WORDS])
        return builder.call(permute, [table, codes])
    if compiles_for("avx2"):
        words = _look_up_by_eights(builder, builder.bitcast(table, WORDS), codes)
    else:
        words = _look_up_by_bytes(builder, builder.bitcast(table, WORDS), codes)
    return builder.bitcast(words, table.type)


def _look_up_by_eights(builder: Any, table: Any, codes: Any) -> Any:
    """By AVX2: eight codes in the table's lower half, and in its upper one."""
    words = ir.VectorType(WORD, 8)
    permute = instruction(builder, "llvm.x86.avx2.permd", words, [words, words])

    def half(vector: Any, start: int) -> Any:
        return builder.shuffle_vector(vector, vector, words(list(range(start, start + 8))))

    found = []
    for eight in (half(codes, 0), half(codes, 8)):
        low, high = (builder.call(permute, [half(table, start), eight]) for start in (0, 8))
        is_high = builder.icmp_unsigned("!=", builder.and_(eight, words([8] * 8)), words([0] * 8))
        found.append(builder.select(is_high, high, low))
    return builder.shuffle_vector(*found, WORDS(list(range(LANES))))


def _look_up_by_bytes(builder: Any, table: Any, codes: Any) -> Any:
    """Byte for byte: every processor of the last fifteen years finds sixteen bytes in a table of sixteen at once."""
    find, found = instruction_for_bytes(), WORDS([0] * LANES)
    if find is None:
        return _look_up_one_by_one(builder, table, codes)
    codes = builder.trunc(codes, BYTES)
    for shift in (WORDS([bits] * LANES) for bits in (0, 8, 16, 24)):
        byte_table = builder.trunc(builder.lshr(table, shift), BYTES)
        byte = builder.call(instruction(builder, find, BYTES, [BYTES, BYTES]), [byte_table, codes])
        found = builder.or_(found, builder.shl(builder.zext(byte, WORDS), shift))
    return found


def instruction_for_bytes() -> str | None:
    """Numba may compile for less than this machine has (NUMBA_CPU_NAME): LLVM then aborts on what is not there."""
    name = BYTE_LOOK_UPS.get(platform.machine())
    on_x86 = name is not None and ".x86." in name
    return None if on_x86 and not compiles_for("ssse3") else name


def _look_up_one_by_one(builder: Any, table: Any, codes: Any) -> Any:
    found, memory = WORDS(ir.Undefined), cgutils.alloca_once_value(builder, table)
    table_at = builder.bitcast(memory, WORD.as_pointer())
    for lane in map(WORD, range(LANES)):
        at = builder.gep(table_at, [builder.extract_element(codes, lane)])
        found = builder.insert_element(found, builder.load(at), lane)
    return found
