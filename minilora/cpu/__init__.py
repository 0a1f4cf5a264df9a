"""What a processor does faster than torch would: products with a frozen weight, and what stands between them."""

from minilora.cpu.linear import Linear, each

__all__ = ["Linear", "each"]
