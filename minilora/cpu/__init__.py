"""Products with a frozen weight that a processor does faster than torch would: and what stands between them in training."""

from minilora.cpu.linear import Linear

__all__ = ["Linear"]
