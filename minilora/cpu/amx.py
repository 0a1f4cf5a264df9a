"""AMX's instructions, and what else a product of tiles needs, as functions that compiled code can call.

Newer Intel processors have eight more registers a core, the tiles: 16 rows of 64 bytes. One instruction takes a tile of
x (16 rows × 32 features, bfloat16) and one of W (32 features × 16 outputs) and adds their product, 16,384 operations,
to a tile of sums (16 × 16, float32). In a tile of W two features of an output stand side by side:

    tile[p, n] = W[2p, n], W[2p + 1, n]                 p < 16, n < 16

Numba has no words for them, so they are written in LLVM's. Here tiles 0 to 3 are sums, of a block of 32 rows × 32
outputs; 4 and 5 are x; 6 and 7 are W. Each thread has its own, as it has other registers; no other code of this thread
may use them between `configure` and `release`. Numbers smaller than 2⁻¹²⁶ count as zero.

Read before this file: cpu/few_rows. Read next: cpu/tiles, which makes a product of these.
"""

import ctypes
import platform
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba.core import cgutils, types

from minilora.cpu.jobs import compiles_for, in_llvm
from minilora.cpu.vectors import BYTE, FLOAT, LANES, WORD, WORDS, instruction, load

SIDE = 16  # rows and outputs of a tile of sums
BLOCK = 2 * SIDE  # rows and outputs whose sums are made together; and the features of a step
LINE = 64  # bytes
TILE = SIDE * LINE
CONFIG = np.zeros(LINE, np.uint8)
CONFIG[0] = 1  # the only palette there is
CONFIG[16:32:2] = LINE  # bytes a row, of each tile
CONFIG[48:56] = SIDE  # rows
STEPS_AHEAD = 2  # how early x is prefetched
OLDEST_LLVM = (22, 0, 0)  # of those that this was tried with

NUMBER, SHORT, VOID, BYTES_AT = ir.IntType(64), ir.IntType(16), ir.VoidType(), BYTE.as_pointer()


class BFloat16(ir.HalfType):  # type: ignore[misc]
    """LLVM's bfloat, made as llvmlite makes its own types: it does not list this one."""

    null, intrinsic_name = "0.0", "bf16"

    def __str__(self) -> str:
        return "bfloat"


BFloat16._create_instance()


@cache
def is_there() -> bool:
    """Whether the processor has AMX for bfloat16, and the system lets this process use it."""
    if platform.system() != "Linux" or not (compiles_for("amx-bf16") and rounds_to_bfloat16()):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # Linux: Documentation/arch/x86/xstate.rst
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def demand() -> None:
    """
    Raises:
        RuntimeError: if AMX is not there: its first instruction would end the process.
    """
    if not is_there():
        raise RuntimeError("this processor has no AMX for bfloat16, or the system or Numba's settings forbid it")


@cache
def rounds_to_bfloat16() -> bool:
    """Whether a float32 becomes a bfloat16 in one instruction; older LLVMs call a function for it that is not there."""
    return compiles_for("avx512bf16") and llvm_version_info >= OLDEST_LLVM


@in_llvm
def configure(typing_context, config):
    """Give the tiles the shapes that CONFIG says, and zeros."""

    def generate(*given: Any) -> Any:
        code = Code(*given)
        code.call("llvm.x86.ldtilecfg", code.address(0))

    return types.void(config), generate


@in_llvm
def release(typing_context):
    """Give the tiles back: to switch away from a thread that holds some costs the system more."""

    def generate(*given: Any) -> Any:
        Code(*given).call("llvm.x86.tilerelease")

    return types.void(), generate


@in_llvm
def zero_sums(typing_context):
    """Begin a block's sums."""

    def generate(*given: Any) -> Any:
        for tile in range(4):
            Code(*given).call("llvm.x86.tilezero", BYTE(tile))

    return types.void(), generate


@in_llvm
def store_sums(typing_context, sums):
    """Write a block's sums to sums[32, 32]."""

    def generate(*given: Any) -> Any:
        code = Code(*given)
        for tile in range(4):
            at = code.address(0, NUMBER(tile // 2 * SIDE), NUMBER(tile % 2 * SIDE))
            code.call("llvm.x86.tilestored64", BYTE(tile), at, NUMBER(4 * BLOCK))

    return types.void(sums), generate


@in_llvm(prefer_literal=True)
def add_products(typing_context, x, row, panel, n_halves, steps_ahead):
    """Add to the sums 32 rows of x, from `row` on, times W's tiles panel[step, half], of one half or two.

    With two, each step loads four tiles for four products. Loading takes the time: a tile of x is 16 lines of memory in
    as many places, so they are asked for `steps_ahead`; 0 asks for none, where x is in a near cache. In few_tiles x and
    W change places. `n_halves` and `steps_ahead` have to be numbers that are known when this is compiled.
    """

    def generate(*given: Any) -> Any:
        code = Code(*given)
        builder, halves = code.builder, range(n_halves.literal_value)
        x_row, W_row = builder.mul(code.shape(0)[1], NUMBER(2)), NUMBER(LINE)  # bytes
        x_start, W_start = code.address(0, code.arguments[1], NUMBER(0)), code.address(2)
        with cgutils.for_range(builder, code.shape(2)[0]) as loop:
            x_at = builder.gep(x_start, [builder.mul(loop.index, NUMBER(LINE))])
            W_at = builder.gep(W_start, [builder.mul(loop.index, NUMBER(len(halves) * TILE))])
            x_below = builder.gep(x_at, [builder.mul(x_row, NUMBER(SIDE))])
            for i in range(BLOCK if steps_ahead.literal_value else 0):
                later = builder.add(builder.mul(x_row, NUMBER(i)), NUMBER(steps_ahead.literal_value * LINE))
                code.prefetch(builder.gep(x_at, [later]))
            W_tiles = [(6 + half, builder.gep(W_at, [NUMBER(half * TILE)]), W_row) for half in halves]
            for tile, at, stride in [(4, x_at, x_row), *W_tiles, (5, x_below, x_row)]:
                code.call("llvm.x86.tileloadd64", BYTE(tile), at, stride)
            for above in range(2):
                for half in halves:
                    code.call("llvm.x86.tdpbf16ps", BYTE(2 * above + half), BYTE(4 + above), BYTE(6 + half))

    return types.void(x, row, panel, n_halves, steps_ahead), generate


@in_llvm
def expect(typing_context, y, row, output):
    """Ask for the lines of y that a block's 32 rows will be written to."""

    def generate(*given: Any) -> Any:
        code = Code(*given)
        for i in range(BLOCK):
            code.prefetch(
                code.address(0, code.builder.add(code.arguments[1], NUMBER(i)), code.arguments[2]), to_write=1
            )

    return types.void(y, row, output), generate


@in_llvm
def narrow_block(typing_context, sums, y, row, output):
    """Round a block's sums into y, halfway to the even one."""

    def generate(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, _, row, output) = code.builder, code.arguments
        for i in range(BLOCK):
            floats = [code.load(code.address(0, NUMBER(i), NUMBER(half * SIDE)), FLOAT) for half in range(2)]
            halves = [code.narrow(half) for half in floats]
            both = builder.shuffle_vector(*halves, ir.VectorType(WORD, BLOCK)(list(range(BLOCK))))
            code.store(both, code.address(1, builder.add(row, NUMBER(i)), output), align=2)

    return types.void(sums, y, row, output), generate


@in_llvm
def narrow_sixteen(typing_context, sums, y, row, output):
    """Round sixteen sums into y[row, output] and those behind it."""

    def generate(*given: Any) -> Any:
        code = Code(*given)
        code.store(code.narrow(code.load(code.address(0), FLOAT)), code.address(1, *code.arguments[2:]), align=2)

    return types.void(sums, y, row, output), generate


@in_llvm
def tile_of_columns(typing_context, W, output, feature, tile):
    """Fill a tile where W[output, feature] is how W lies: its pairs of features as words, 16 × 16, transposed.

    Rows are transposed by shuffling them as one shuffles two halves of a pack of cards, in turn, four times.
    """

    def generate(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, output, feature, _) = code.builder, code.arguments
        rows = [code.load(code.address(0, builder.add(output, NUMBER(n)), feature), WORD) for n in range(SIDE)]
        in_turn = [place for n in range(SIDE) for place in (n, n + SIDE)]
        for _ in range(4):
            pairs = zip(rows[: SIDE // 2], rows[SIDE // 2 :], strict=True)
            rows = [
                builder.shuffle_vector(one, other, WORDS(half))
                for one, other in pairs
                for half in (in_turn[:SIDE], in_turn[SIDE:])
            ]
        for p, row in enumerate(rows):
            code.store(row, code.address(3, NUMBER(p), NUMBER(0)), align=LINE)

    return types.void(W, output, feature, tile), generate


@in_llvm
def tile_of_rows(typing_context, W, feature, output, tile):
    """Fill a tile where W[feature, output] is how W lies: two rows after each other, number by number in turn."""

    def generate(*given: Any) -> Any:
        code = Code(*given)
        builder, (_, feature, output, _) = code.builder, code.arguments
        in_turn = [place for n in range(SIDE) for place in (n, n + SIDE)]
        for p in range(SIDE):
            pair = [
                code.load(code.address(0, builder.add(feature, NUMBER(k)), output), SHORT) for k in (2 * p, 2 * p + 1)
            ]
            both = builder.shuffle_vector(*pair, ir.VectorType(WORD, BLOCK)(in_turn))
            code.store(both, code.address(3, NUMBER(p), NUMBER(0)), align=LINE)

    return types.void(W, feature, output, tile), generate


class Code:
    """What a function is written with, in LLVM's words: Numba's context and builder, and its arguments."""

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Any) -> None:
        self.context, self.builder, self.types, self.arguments = context, builder, signature.args, arguments

    def array(self, argument: int) -> Any:
        """An argument that is an array."""
        return self.context.make_array(self.types[argument])(self.context, self.builder, self.arguments[argument])

    def shape(self, argument: int) -> list[Any]:
        return cgutils.unpack_tuple(self.builder, self.array(argument).shape)

    def address(self, argument: int, row: Any = None, column: Any = None) -> Any:
        """The address of an array's first number, or of that in a row and column."""
        at = self.array(argument).data
        if row is not None:
            place = self.builder.add(self.builder.mul(row, self.shape(argument)[1]), column)
            at = self.builder.gep(at, [place])
        return self.builder.bitcast(at, BYTES_AT)

    def load(self, at: Any, kind: Any) -> Any:
        """Load sixteen numbers."""
        return load(self.builder, self.builder.bitcast(at, kind.as_pointer()))

    def narrow(self, floats: Any) -> Any:
        """Round sixteen floats to bfloat16, halfway to the even one; give their bits."""
        narrow = self.builder.fptrunc(floats, ir.VectorType(BFloat16(), LANES))
        return self.builder.bitcast(narrow, ir.VectorType(SHORT, LANES))

    def store(self, vector: Any, at: Any, align: int) -> None:
        self.builder.store(vector, self.builder.bitcast(at, vector.type.as_pointer()), align=align)

    def prefetch(self, at: Any, to_write: int = 0) -> None:
        """Ask for a line of memory, into all caches."""
        self.call("llvm.prefetch.p0", at, WORD(to_write), WORD(3), WORD(1))

    def call(self, name: str, *arguments: Any) -> None:
        """Call one of LLVM's own functions."""
        kinds = [argument.type for argument in arguments]
        self.builder.call(instruction(self.builder, name, VOID, kinds), arguments)
