"""What an adapter is made with: checked once, when it is made. Layers take its fields, never the object."""

import math
import sys
from dataclasses import dataclass
from typing import TypeGuard


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """The four choices of a LoRA layer.

    Raises:
        ValueError: if `r` is not a whole number of 1 or more, `alpha` is not a positive finite number, or
            `dropout` is not in [0, 1).

    >>> LoRAConfig(r=16, alpha=32).scaling, LoRAConfig(r=16, alpha=32, use_rslora=True).scaling
    (2.0, 8.0)
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # of the bypass's input, in training only
    use_rslora: bool = False  # scale by alpha / √r instead of alpha / r: [rsLoRA]

    def __post_init__(self) -> None:
        if not is_count(self.r):
            raise ValueError(f"r is {self.r!r}: it counts the rows of A, so it must be a whole number of 1 or more")
        if not 0 < self.alpha <= sys.float_info.max:
            raise ValueError(f"alpha is {self.alpha!r}: it multiplies the update, so it must be positive and finite")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}: it is a probability, at least 0 and below 1")

    @property
    def scaling(self) -> float:
        """Factor in front of B A."""
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether it is a whole number of `least` or more; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
