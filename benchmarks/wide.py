"""bfloat16 products with a frozen weight: by torch as they are, and in float32 on the way (cpu/wide), in turn.

    python benchmarks/wide.py
    ONEDNN_MAX_CPU_ISA=AVX512_CORE python benchmarks/wide.py                             without bfloat16's instructions
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/wide.py

Prints milliseconds, the median of several, for x Wᵀ and dy W. A star marks the way that cpu/wide chooses for this
processor, not for one without the instructions that such variables forbid.
"""

import torch
import torch.nn.functional as F
from machine import seconds_in_turn

from minilora.cpu import wide

SHAPES = [(576, 1536), (1536, 576), (576, 576), (576, 192), (2048, 2048), (576, 16), (16, 576)]
ROWS = [16, 64, 256, 1024]
ROUNDS = 7


def main() -> None:
    print(f"ms in bfloat16 and in float32, {torch.get_num_threads()} threads")
    print(f"{'in':>6}{'out':>6}{'rows':>6}" + "".join(f"{name:>10}" for name in ("x Wᵀ", "float32", "dy W", "float32")))
    for n_in, n_out in SHAPES:
        for rows in ROWS:
            W = torch.randn(n_out, n_in).bfloat16()
            x, dy = torch.randn(rows, n_in).bfloat16(), torch.randn(rows, n_out).bfloat16()
            calls = (
                lambda x=x, W=W: F.linear(x, W),
                lambda x=x, W=W: wide.product(x, W.T),
                lambda dy=dy, W=W: F.linear(dy, W.T),
                lambda dy=dy, W=W: wide.product(dy, W),
            )
            chosen = wide.compute_dtype(x, n_out, n_in) == torch.float32
            stars = " *" if chosen else "* "
            found = seconds_in_turn(calls, ROUNDS)
            cells = (f"{1e3 * seconds:>9.2f}{stars[place % 2]}" for place, seconds in enumerate(found))
            print(f"{n_in:>6}{n_out:>6}{rows:>6}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
