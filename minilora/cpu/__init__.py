"""What a processor does faster than torch would: products with a frozen weight, and what stands between them.

Read products, which says which way a product goes; then wide, jobs, few_rows, one_token, pointwise, amx, tiles and
few_tiles.
"""

from minilora.cpu.linear import Linear, each

__all__ = ["Linear", "each"]
