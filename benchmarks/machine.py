"""What a benchmark's figures depend on, wherever they are measured."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def about(*packages: str) -> dict[str, Any]:
    """The processor, its vector instructions as torch names them, and the versions of Python and these packages."""
    import torch

    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": names[0] if names else platform.processor(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": " ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags) or "none known",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def seconds_in_turn(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Median seconds of each call, all taking their turns in every round; the first two rounds do not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [statistics.median(found[2:]) for found in times]
