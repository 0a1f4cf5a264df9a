"""A Triton kernel without a GPU: imported so that it is interpreted, or compiled for a card, and its code counted."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    if os.environ.get("CI"):
        raise
    pytest.skip("Triton is missing: pip install triton", allow_module_level=True)

CARDS = {80: "A100", 90: "H100"}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def import_interpreted(module: ModuleType) -> ModuleType:
    """Import a module once more, as it is where TRITON_INTERPRET is set before it is imported."""
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_interpreted", module.__file__)
    assert spec and spec.loader
    twin = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(sys.modules, spec.name, twin)  # a dataclass looks its module up there
        spec.loader.exec_module(twin)
    return twin


def compile_for(
    capability: int, kernel: Any, kinds: dict[str, str], constants: dict[str, Any], options: dict[str, Any], *by16: str
) -> "triton.CompiledKernel":
    """Compile a kernel: `kinds` are the types of what is no constant; pointers, and `by16`, are multiples of 16."""
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, kind in kinds.items() if kind.startswith("*") or name in by16]
    places = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = constants | {name: None for name in signature if name not in kinds and name not in constants}
    return triton.compile(ASTSource(kernel, signature, constants, places), GPUTarget("cuda", capability, 32), options)


def resource_usage(kernel: "triton.CompiledKernel", folder: Path) -> dict[str, int]:
    """Read registers a thread, and bytes of its stack and local memory, where a spilled register would lie."""
    text = _cuobjdump("--dump-resource-usage", kernel, folder)
    return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def instructions(kernel: "triton.CompiledKernel", folder: Path) -> list[tuple[int, str, str]]:
    """List the machine code: address, instruction, what it works on; without what fills it up behind the last EXIT."""
    text = _cuobjdump("-sass", kernel, folder)
    pattern = r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9.]+)(.*?);"
    found = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, text, flags=re.MULTILINE)]
    return found[: max(place for place, (_, name, _) in enumerate(found) if name == "EXIT") + 1]


def longest_loop(code: list[tuple[int, str, str]]) -> list[str]:
    """Find the longest run of instructions that ends in a jump back to its start."""
    targets = [(at, re.search(r"0x([0-9a-f]+)", rest)) for at, name, rest in code if name.startswith("BRA")]
    spans = [(int(target[1], 16), at) for at, target in targets if target and int(target[1], 16) < at]
    return max(([name for at, name, _ in code if first <= at <= last] for first, last in spans), key=len)


def _cuobjdump(option: str, kernel: "triton.CompiledKernel", folder: Path) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        missing = "cuobjdump is missing: it comes with Triton's wheels, and with the CUDA toolkit"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    return subprocess.run([tool, option, str(path)], check=True, capture_output=True, text=True).stdout
