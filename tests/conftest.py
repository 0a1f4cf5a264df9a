"""One setting for all tests: shapes are checked at every call, randomness repeats, and nothing is fetched."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import torch
from jaxtyping import install_import_hook

# The modules whose signatures are checked by beartype. Not among them: those with compiled kernels (the hook breaks
# numba's @njit) and the course's plots. (pytest's own --jaxtyping-packages cannot take more than one package beside
# a type checker with settings.)
SHAPES_CHECKED = [
    "minilora.numpy_lora",
    "minilora.cpu.linear",
    "minilora.cpu.products",
    "minilora.torch_lora",
    "minilora.methods",
    "minilora.qlora.codebooks",
    "minilora.qlora.blockwise",
    "minilora.qlora.linear",
    "minilora.qlora.moments",
    "minilora.qlora.paging",
    "minilora.qlora.paged_adamw",
    "minilora.methods",
    "minilora.llm",
    "minilora.methods.prompt",
    "minilora.train",
]
collect_ignore_glob = [
    "conftest.py",
    "*/conftest.py",
]  # no doctests in them: several modules of one name cannot be imported

install_import_hook(SHAPES_CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


@pytest.fixture(autouse=True)
def _repeatable_randomness() -> None:
    torch.manual_seed(0)


@pytest.fixture
def run_program() -> Callable[..., str]:
    """Run Python in a process of its own, where it may fork, or set what is read at import; give what it printed."""

    def run(*parts: str, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", "\n".join(map(textwrap.dedent, parts))],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    return run
