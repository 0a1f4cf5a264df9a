"""The sixteen values that four bits can mean.

    values       (16,)  what each code 0..15 stands for, in units of absmax
    thresholds   (15,)  halfway between neighbours, once the values are sorted
    order        (16,)  place among the sorted values -> code; 0, 1, … 15 where the values are sorted already

NF4 comes from numpy_lora/nf4, which derives it. FP4 is bitsandbytes': a sign, two bits of exponent, one of mantissa.
INT4 is the plain grid, symmetric around zero, that the other two are compared with.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from minilora.numpy_lora.nf4 import dynamic_map as derive_dynamic_map
from minilora.numpy_lora.nf4 import nf4_codebook


@dataclass(frozen=True)
class Codebook:
    """Sixteen values with a name. Equal and hashable by both.

    Raises:
        ValueError: if there are not sixteen.
    """

    name: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != 16:
            raise ValueError(f"codebook {self.name!r} has {len(self.values)} values, but four bits can mean 16")

    @cache  # noqa: B019  (three codebooks and a few devices live as long as the process)
    def table(self, device: torch.device) -> Float32[Tensor, "16"]:
        """Give the values as a tensor on a device, made once."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    @cache  # noqa: B019
    def sorted_by_value(self, device: torch.device) -> tuple[Float32[Tensor, "15"], Int64[Tensor, "16"]]:
        """Give the thresholds between neighbours, and the code at every place of the sorted values."""
        ordered, order = self.table(device).sort(stable=True)
        return (ordered[:-1] + ordered[1:]) / 2, order


# Code 8 would be −0 in bitsandbytes' table; +0 and −0 decode to the same weight.
FP4_TIMES_12 = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)

NF4 = Codebook("nf4", tuple(nf4_codebook().tolist()))
FP4 = Codebook("fp4", tuple(value / 12 for value in FP4_TIMES_12))
INT4 = Codebook("int4", tuple(code / 7 for code in range(-8, 8)))  # −8/7 is never the nearest: 15 levels are in use


@cache
def dynamic_map(device: torch.device, *, signed: bool = True) -> Float32[Tensor, "256"]:
    """Give the 256 values of 8 bits as a tensor on a device: numpy_lora/nf4 derives them."""
    return torch.from_numpy(derive_dynamic_map(signed=signed)).to(device)


@cache
def dynamic_cells(device: torch.device, *, signed: bool = True) -> UInt8[Tensor, "65536"]:
    """Give the code of the least float32 among all that share their upper 16 bits, for any such bits.

    No two thresholds of the map share them: they are further apart than 2⁻⁷ of a number. So the code of any number is
    that of its cell, or the next. That is a look-up and one comparison; a binary search makes eight, which a CPU cannot
    predict, and takes about ten times as long.
    """
    bits = torch.arange(2**16, dtype=torch.int32, device=device) << 16
    least = torch.where(bits < 0, bits | 0xFFFF, bits).view(torch.float32)
    return torch.bucketize(least, dynamic_thresholds(device, signed=signed)).to(torch.uint8)


@cache
def dynamic_thresholds(device: torch.device, *, signed: bool = True) -> Float32[Tensor, "256"]:
    """Give the numbers halfway between neighbours of the map, and an infinity behind the last."""
    values = dynamic_map(device, signed=signed)
    return torch.nn.functional.pad((values[:-1] + values[1:]) / 2, (0, 1), value=torch.inf)
