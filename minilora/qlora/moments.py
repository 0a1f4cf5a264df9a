"""AdamW's two moments of one parameter: how they lie in pages, in 32 bits or in 8.

    m, v       running means of a gradient and of its square; zero at the start
    codes      a moment in 8 bits: places in the dynamic map (signed for m; unsigned for v, which is never negative)
    absmax     the largest |value| of a block of 256 values, float32: the block's unit
    run        a piece of a flattened parameter whose moments lie in one page; it begins where a block begins
    address    bytes from the beginning of the first page

    32 bits    m | v                                      8 bytes a value
    8 bits     m_absmax | v_absmax | m_codes | v_codes    2 bytes a value and 8 a block: 2.03 bytes a value

Read before this file: blockwise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from minilora.numpy_lora.nf4 import NESTED_BLOCK_SIZE as BLOCK_SIZE
from minilora.qlora.blockwise import decode_8bit, encode_8bit

PARTS = {
    32: {"m": torch.float32, "v": torch.float32},
    8: {"m_absmax": torch.float32, "v_absmax": torch.float32, "m_codes": torch.uint8, "v_codes": torch.uint8},
}
MIN_8BIT_VALUES = 4096  # smaller tensors keep 32 bits, as in bitsandbytes: they cost little
BLOCK_BYTES = {32: 8 * BLOCK_SIZE, 8: 2 * BLOCK_SIZE + 8}


@dataclass(frozen=True)
class Run:
    """The moments of the values `start` to `stop` of a flattened parameter, in one page."""

    address: int
    start: int
    stop: int
    bits: int

    @property
    def n_bytes(self) -> int:
        """What it takes of its page."""
        return sum(dtype.itemsize * length_of(name, self.stop - self.start) for name, dtype in PARTS[self.bits].items())


def length_of(name: str, n_values: int) -> int:
    """How many numbers a part has: one a block for units, else one a value."""
    return -(-n_values // BLOCK_SIZE) if name.endswith("absmax") else n_values


def lay_out(n_values: int, bits: int, address: int, page_bytes: int) -> tuple[list[Run], int]:
    """Cut a parameter's moments into runs from `address` on, whole blocks in each; return them and the address behind.

    >>> runs, end = lay_out(1000, bits=32, address=2048, page_bytes=4096)
    >>> [(run.address, run.start, run.stop) for run in runs], end
    ([(2048, 0, 256), (4096, 256, 768), (8192, 768, 1000)], 10048)
    """
    runs, start = [], 0
    while start < n_values:
        room = page_bytes - address % page_bytes
        n_blocks = room // BLOCK_BYTES[bits]
        if n_blocks == 0:
            address += room  # the next page
            continue
        run = Run(address, start, min(start + n_blocks * BLOCK_SIZE, n_values), bits)
        runs.append(run)
        start = run.stop
        address += -(-run.n_bytes // 8) * 8  # float32 begins at a multiple of its size
    return runs, address


def parts_of(run: Run, frame: UInt8[Tensor, "page_bytes"]) -> dict[str, Tensor]:
    """Give a run's parts by name, as views of the frame that holds its page."""
    parts, at = {}, run.address % frame.numel()
    for name, dtype in PARTS[run.bits].items():
        n_bytes = dtype.itemsize * length_of(name, run.stop - run.start)
        parts[name] = frame[at : at + n_bytes].view(dtype)
        at += n_bytes
    return parts


def cut(parts: dict[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Give views of the parts for the values `start` to `stop` alone; `start` is where a block begins."""
    blocks = slice(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
    return {name: part[blocks if name.endswith("absmax") else slice(start, stop)] for name, part in parts.items()}


def read(parts: dict[str, Tensor]) -> tuple[Float32[Tensor, "n"], Float32[Tensor, "n"]]:
    """Give m and v as float32: the stored numbers themselves in 32 bits, new ones made from 8.

    m ≈ map[m_codes] · m_absmax[block]                 [8bit] section 2.1
    """
    if "m" in parts:
        return parts["m"], parts["v"]
    m = decode_8bit(parts["m_codes"], parts["m_absmax"], signed=True)
    v = decode_8bit(parts["v_codes"], parts["v_absmax"], signed=False)
    return m, v


def write(parts: dict[str, Tensor], m: Float32[Tensor, "n"], v: Float32[Tensor, "n"]) -> None:
    """Put m and v back where read found them.

    m_codes = nearest(m / m_absmax[block])             [8bit] section 2.1
    """
    if "m" in parts:
        return  # they were changed in place
    for name, moment, signed in (("m", m, True), ("v", v, False)):
        codes, absmax = encode_8bit(moment, signed=signed)
        parts[f"{name}_codes"].copy_(codes)
        parts[f"{name}_absmax"].copy_(absmax)
