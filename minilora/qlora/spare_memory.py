"""Memory for large weights that come and go: one piece is kept for the next instead of being given back.

The system clears new memory at first touch, 4 KiB at a time, and for a large weight that takes three times as long as
the kernel that fills it (bfloat16, 4096 × 4096, one thread: 32 ms with new memory, 13 ms with this). malloc keeps small
pieces by itself and gives pieces of this size back at once.
"""

import mmap
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

SPARED_FROM = 2**25  # bytes; what is smaller is kept by malloc for the next tensor
HUGE_PAGE = 2**21
_spare: deque[mmap.mmap] = deque(maxlen=1)


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """Make an empty tensor; a large one where the last large one was, once that is gone.

    What is kept is in huge pages and marked as free: the system may take it when it needs memory.
    """
    n_bytes = count * dtype.itemsize
    if n_bytes < SPARED_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    try:
        memory = _spare.pop()
    except IndexError:
        memory = None
    if memory is None or len(memory) < n_bytes:
        memory = mmap.mmap(-1, -(-n_bytes // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        _advise(memory, mmap.MADV_HUGEPAGE)
    owner = memoryview(memory)  # lives as long as the tensor's storage
    weakref.finalize(owner, _keep, memory).atexit = False
    return torch.frombuffer(owner, dtype=dtype, count=count)


def _keep(memory: mmap.mmap) -> None:
    _advise(memory, mmap.MADV_FREE)
    _spare.append(memory)


def _advise(memory: mmap.mmap, advice: int) -> None:
    with suppress(OSError):  # a system that does not know the advice does without
        memory.madvise(advice)
