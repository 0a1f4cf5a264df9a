"""Attention in training on a CPU: with our backward (llm/autograd) and with torch's own, for rows of growing length.

    python benchmarks/attention.py

Prints milliseconds forward + backward (the least of several) of one layer of SmolLM2-135M (9 heads over 3 key heads of
64), and the bytes that autograd keeps for the backward beside q, k and v.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.llm.autograd import causal_attention

SHAPES = [(8, 100), (4, 256), (2, 512), (1, 1024), (1, 2048)]  # rows, tokens in a row
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64


def torchs_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def main() -> None:
    print(f"{'dtype':<10}{'rows x tokens':<15}{'ours':>16}{'kept':>10}{'torch':>18}{'kept':>10}")
    for dtype in (torch.bfloat16, torch.float32):
        for rows, seq in SHAPES:
            measured = [measure(attend, rows, seq, dtype) for attend in (causal_attention, torchs_own)]
            columns = "".join(f"{ms:>13.1f} ms{kept / 2**20:>6.1f} MiB" for ms, kept in measured)
            print(f"{str(dtype)[6:]:<10}{f'{rows} x {seq}':<15}{columns}", flush=True)


def measure(attend: Callable[..., Tensor], rows: int, seq: int, dtype: torch.dtype) -> tuple[float, int]:
    """Milliseconds of a forward and its backward, and bytes kept between them beside q, k and v."""
    best, kept = math.inf, {}
    for _ in range(5):
        q, k, v = (
            torch.randn(rows, heads, seq, HEAD_DIM).to(dtype).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        inputs, kept = {t.data_ptr() for t in (q, k, v)}, {}

        def keep(t: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = attend(q, k, v)
        y.backward(y.detach())
        best = min(best, time.perf_counter() - start)
        kept = {place: size for place, size in kept.items() if place not in inputs}
    return 1e3 * best, sum(kept.values())


if __name__ == "__main__":
    main()
