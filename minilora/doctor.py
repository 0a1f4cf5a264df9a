"""`minilora doctor`: what this machine has, and what to do about what it has not.

A check is a small function that looks at one thing and returns one `Check`, or None where there is nothing to say.
Only the standard library is imported before a check runs: a machine without torch has a doctor too.
"""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import TextWrapper

from minilora import __version__

OK, OPTIONAL, NEEDED = "ok", "–", "!"  # is there; is not there and need not be; is not there and must be
CORE = ("numpy", "torch", "numba", "safetensors", "tokenizers", "gguf", "jinja2", "tqdm", "jaxtyping")
COURSE = (
    "matplotlib",
    "ipywidgets",
    "jupyterlab",
    "jupytext",
    "nbclient",
    "nbconvert",
    "nbformat",
    "nbval",
    "pillow",
    "pyyaml",
)
PEERS = ("transformers", "accelerate", "peft", "bitsandbytes")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "beartype", "ruff", "mypy", "selenium")
CPU_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "amx_bf16": "AMX bf16",
    "bf16": "bf16",
}
WIDTH, FACT_COLUMN = 100, 19  # of the printed lines
MODEL_BYTES = 1_000_000_000  # on disk while the base model is fetched and converted
MEMORY_BYTES = 4 * 2**30
CONTAINER = Path("/sys/fs/cgroup")  # where a container's limits are told
SPEED_SECONDS = 0.4  # of measuring, for each dtype


@dataclass(frozen=True)
class Check:
    """One fact about this machine, and what to do if it is not as it should be."""

    name: str
    mark: str
    fact: str
    remedy: str = ""

    def __str__(self) -> str:
        """The fact, and below it what to do, in lines as wide as a terminal."""
        lines = _wrap(f"  {self.mark:<3} {self.name:<{FACT_COLUMN - 7}} {self.fact}", hanging=0)
        return "\n".join([*lines, *_wrap(f"{'':<{FACT_COLUMN}}→ {self.remedy}", hanging=2)] if self.remedy else lines)


def run() -> int:
    """Print a line for each fact as it is found; the exit code is 1 if something needed is missing."""
    print(f"minilora {__version__} on {platform.system()} {platform.machine()}\n")
    checks = []
    for examine in CHECKS:
        check = examine_safely(examine)
        if check is not None:
            print(check, flush=True)
            checks.append(check)
    print(f"\n{verdict(checks)}")
    return 1 if any(check.mark == NEEDED for check in checks) else 0


def examine_safely(examine: Callable[[], Check | None]) -> Check | None:
    """Run one check. What breaks in it is a finding: a doctor does not fall ill of a broken machine."""
    try:
        return examine()
    except Exception as error:
        name = examine.__name__.removesuffix("_check").replace("_", " ")
        return Check(name, NEEDED, f"could not be examined: {type(error).__name__}: {error}")


def verdict(checks: Sequence[Check]) -> str:
    """One closing line."""
    missing = [check.name for check in checks if check.mark == NEEDED]
    if missing:
        return f"Not ready: see {', '.join(missing)} (marked {NEEDED})."
    return f"Ready. What is marked {OPTIONAL} is optional."


def _wrap(line: str, hanging: int) -> list[str]:
    """Break a line that is wider than a terminal; it goes on under its fact."""
    indent = " " * (FACT_COLUMN + hanging)
    return TextWrapper(WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False).wrap(line)


# --- software -----------------------------------------------------------------------------------------------------


def python_check() -> Check:
    return Check("Python", OK, f"{platform.python_version()} in {sys.prefix}")


def packages_check(name: str, packages: Sequence[str], mark_if_missing: str, remedy: str) -> Check:
    """Whether all packages of a group are installed, with their versions."""
    versions = {package: package_version(package) for package in packages}
    missing = [package for package, version in versions.items() if version is None]
    if missing:
        return Check(name, mark_if_missing, f"without {', '.join(missing)}", remedy)
    shown = [f"{package} {version}" for package, version in versions.items()]
    while len(", ".join(shown)) > WIDTH - FACT_COLUMN - len(" and 9 more"):
        shown.pop()
    rest = len(packages) - len(shown)
    return Check(name, OK, ", ".join(shown) + (f" and {rest} more" if rest else ""))


def core_check() -> Check:
    return packages_check("packages", CORE, NEEDED, "in the project's folder: pip install -e .")


def course_check() -> Check:
    return packages_check(
        "course", COURSE, OPTIONAL, 'for the notebooks: make lab, or pip install -e ".[course]" in the project'
    )


def peers_check() -> Check:
    return packages_check(
        "peers", PEERS, OPTIONAL, 'for the tests against them: make test, or pip install -e ".[dev]" in the project'
    )


def tools_check() -> Check:
    return packages_check(
        "test tools", TOOLS, OPTIONAL, 'for the tests: make test, or pip install -e ".[dev]" in the project'
    )


def browser_check() -> Check:
    browser = first_program("chromium", "chromium-browser", "google-chrome")
    driver = first_program("chromedriver")
    if browser and driver:
        return Check("browser", OK, program_version(browser))
    missing = " and ".join(name for name, path in {"Chromium": browser, "chromedriver": driver}.items() if not path)
    how = (
        "brew install --cask chromium chromedriver"
        if sys.platform == "darwin"
        else "apt install chromium chromium-driver"
    )
    return Check("browser", OPTIONAL, f"no {missing}", f"for the test that opens a notebook: {how}")


def node_check() -> Check:
    node = first_program("node")
    if node:
        return Check("Node.js", OK, program_version(node))
    return Check("Node.js", OPTIONAL, "none", "only for the long tests against llama.cpp: make test-all installs it")


def package_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_program(*names: str) -> str | None:
    return next((path for name in names if (path := shutil.which(name))), None)


def program_version(path: str) -> str:
    """What a program says of itself."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    return said.strip() or f"{path}, which does not tell its version"


# --- hardware -----------------------------------------------------------------------------------------------------


def cpu_check() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    features = cpu_features()
    named = f", {', '.join(features)}" if features else ""
    return Check("CPU", OK, f"{cores} cores{named}")


def cpu_features() -> list[str]:
    """Those instructions that make matrices fast, as Linux lists them; elsewhere nothing is known."""
    listing = Path("/proc/cpuinfo")
    if not listing.is_file():
        return []
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next(
        (line.split(":", 1)[1].split() for line in lines if line.lower().startswith(("flags", "features"))), []
    )
    return [label for flag, label in CPU_FEATURES.items() if flag in flags]


def torch_check() -> Check | None:
    if package_version("torch") is None:
        return None
    import torch

    return Check("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")


def speed_check() -> Check | None:
    """How fast two matrices are multiplied, which is nearly all that training does."""
    if package_version("torch") is None:
        return None
    fp32, bf16 = matmul_tflops("float32"), matmul_tflops("bfloat16")
    fact = f"bf16 {bf16:.2f} TFLOP/s, fp32 {fp32:.2f} TFLOP/s (matrices of 1024 × 1024)"
    if bf16 < fp32:
        return Check("speed", OPTIONAL, fact, "bf16 is slower here: minilora stores it, and multiplies in fp32")
    return Check("speed", OK, fact)


def matmul_tflops(dtype: str, n: int = 1024) -> float:
    """Speed of an n × n matrix product on the CPU, the best of as many as fit in the time."""
    import torch

    a = torch.ones(n, n, dtype=getattr(torch, dtype))
    best_s, end = float("inf"), time.perf_counter() + SPEED_SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, a)
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * n**3 / best_s / 1e12


def memory_check() -> Check:
    total, free = memory_bytes()
    fact = f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free"
    if free < MEMORY_BYTES:
        return Check("memory", OPTIONAL, fact, "close other programs: training the base model takes a few GiB")
    return Check("memory", OK, fact)


def memory_bytes() -> tuple[int, int]:
    """All memory and what of it can still be used; where a system does not tell the second, all counts as free."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, listing = total, Path("/proc/meminfo")
    if listing.is_file():
        line = next(line for line in listing.read_text().splitlines() if line.startswith("MemAvailable"))
        free = 1024 * int(line.split()[1])
    if CONTAINER.joinpath("memory.max").is_file():
        limit, used, kinds = (
            (CONTAINER / name).read_text() for name in ("memory.max", "memory.current", "memory.stat")
        )
        if limit.strip().isdigit():
            cached = next(int(line.split()[1]) for line in kinds.splitlines() if line.startswith("inactive_file "))
            total, free = min(total, int(limit)), min(free, int(limit) - int(used) + cached)
    return total, max(0, min(total, free))


def gpu_check() -> Check | None:
    if package_version("torch") is None:
        return None
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        fact = f"{card.name}, capability {card.major}.{card.minor}, {card.total_memory / 2**30:.0f} GiB"
        return Check("GPU", OK, fact if torch.cuda.device_count() == 1 else f"{fact}, and more")
    if torch.backends.mps.is_available():
        return Check("GPU", OPTIONAL, "Apple MPS: layers 1 and 2 only, and untested by us")
    if shutil.which("nvidia-smi"):
        return Check("GPU", OPTIONAL, "an NVIDIA driver, but this torch has no CUDA", "install a CUDA build of torch")
    return Check("GPU", OPTIONAL, "none: everything runs on the CPU, with the same results")


def triton_check() -> Check:
    version = package_version("triton")
    if version is None:
        how = "pip install triton" if sys.platform == "linux" else "there is none for this system, and none is needed"
        return Check("Triton", OPTIONAL, "none", f"for the GPU kernels and their tests: {how}")
    gpu = gpu_check()
    if gpu is not None and gpu.mark == OK:
        return Check("Triton", OK, version)
    return Check("Triton", OK, f"{version}, without CUDA: its CPU interpreter only")


# --- the base model -----------------------------------------------------------------------------------------------


def disk_check() -> Check:
    from minilora.llm.smollm2 import cache_folder, model_folder

    folder = cache_folder()
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free_bytes = shutil.disk_usage(there).free
    fact = f"{free_bytes / 1e9:.1f} GB free for the cache, {folder}"
    if model_folder().exists():
        return Check("disk", OK, fact)
    if not os.access(there, os.W_OK):
        return Check("disk", NEEDED, f"{there} cannot be written to", "let MINILORA_CACHE name a folder that can")
    if free_bytes < MODEL_BYTES:
        return Check(
            "disk", NEEDED, fact, "the base model takes 1 GB: make room, or let MINILORA_CACHE name another disk"
        )
    return Check("disk", OK, fact)


def base_model_check() -> Check:
    from minilora.llm.smollm2 import NAME, model_folder, verify

    folder = model_folder()
    if not folder.exists():
        how = "python -m minilora.llm.smollm2 fetches it now (93 MB), or its first use does"
        return Check("base model", OPTIONAL, f"{NAME} is not here yet", how)
    try:
        verify(folder)
    except ValueError as error:
        return Check("base model", NEEDED, f"{NAME} is damaged", str(error))
    return Check("base model", OK, f"{NAME}, verified, in {folder}")


CHECKS: tuple[Callable[[], Check | None], ...] = (
    python_check,
    core_check,
    torch_check,
    cpu_check,
    speed_check,
    memory_check,
    disk_check,
    gpu_check,
    triton_check,
    base_model_check,
    course_check,
    tools_check,
    peers_check,
    browser_check,
    node_check,
)
