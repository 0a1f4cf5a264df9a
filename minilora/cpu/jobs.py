"""Compiled kernels, and how they share their work: on the threads that torch's own operations run on.

A second set of threads would fight torch's for the cores, which wait for the next operation by spinning. Torch's are
OpenMP's, and a compiler turns a parallel loop into a call of GOMP_parallel(function, data, threads, 0): every thread
calls function(data). `run` makes that call, which costs 3 µs. A kernel's data is a job: numbers and addresses, whose
first field counts what has been taken. Each thread takes the next piece until none is left, so that one which the
system halts leaves its share to the others.

Where there is no such function (macOS), in a forked child, or where only one thread is wanted, the caller does all.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from minilora.cpu.products import PROCESS

in_llvm: Any = intrinsic  # without types: for mypy, the typing context would be an argument of every call


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile at first use, to run without Python's lock; keep the result where a folder for it can be written."""
    try:
        return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither this file's folder nor the user's cache can be written
        return part(function)


def part(function: Callable[..., Any], fastmath: bool | set[str] = False) -> Callable[..., Any]:
    """Compile what workers call. It is kept within them alone, and made anew with them when a source changes."""
    return numba.njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)


def worker(function: Callable[..., Any], job: np.dtype) -> Any:
    """Compile, now, what works a job off: function(jobs), where numba.carray(jobs, 1)[0] is the job."""
    signature = types.void(types.CPointer(numba.from_dtype(job)))
    try:
        return numba.cfunc(signature, cache=True)(function)
    except RuntimeError:
        return numba.cfunc(signature)(function)


def compiles_for(feature: str) -> bool:
    """Whether Numba compiles for a processor with this feature: less than this one has, if its settings say so."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return f"+{feature}" in features.split(",")


def digest_of(*packages: ModuleType) -> int:
    """A number that changes with any source of these packages.

    Numba keeps what it compiled until the function's own file changes, or a number from outside that it uses: a kernel
    that takes in functions or numbers of other files uses the digest of their packages.
    """
    folders = [Path(package.__file__ or "").parent for package in packages]
    sources = b"".join(path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py")))
    return int.from_bytes(hashlib.sha256(sources).digest()[:7])


def run(worker: Any, total: int, *fields: int) -> None:
    """Let torch's threads work off a job of so much to take, with these fields behind what is taken, and wait for it.

    Raises:
        RuntimeError: if something is left: every thread failed, and said why on stderr.
    """
    job = (ctypes.c_int64 * (1 + len(fields)))(0, *fields)
    n_threads, parallel = torch.get_num_threads(), _gomp_parallel()
    if n_threads > 1 and parallel is not None and os.getpid() == PROCESS:
        parallel(worker.address, job, n_threads, 0)
    else:
        worker.ctypes(ctypes.addressof(job))
    if job[0] < total:
        raise RuntimeError(f"a compiled kernel stopped after {job[0]} of {total}: its error stands above")


@cache
def _gomp_parallel() -> Any:
    try:
        function = ctypes.CDLL(None).GOMP_parallel  # of the OpenMP that torch, or who came before it, has loaded
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@in_llvm
def take(typing_context, jobs, count):
    """Take the next `count` of a job: its first field, an int64, as it was before `count` was added to it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        taken = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", taken, arguments[1], "monotonic")

    return types.int64(jobs, types.int64), generate


@in_llvm
def address(typing_context, number):
    """Turn a number of a job into the address that it is, for numba.carray."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate
