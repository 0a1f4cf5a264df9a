"""Files that are there whole or not at all. Imports nothing of ours; anything may import it."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files under temporary names beside their own, then rename them all: nobody ever reads half of one.

    If one cannot be written, none is renamed. Folders are made; a temporary file outlives only a killed process.
    """
    with ExitStack() as all_at_the_end:
        for path, content in contents.items():
            all_at_the_end.enter_context(whole_file(path)).write_bytes(content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; afterwards rename it to `path`, unless there was an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        temporary = Path(file.name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # on the disk, before the name says so
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed left of this file under temporary names."""
    for temporary in path.parent.glob(f".{path.name}-????????"):
        temporary.unlink(missing_ok=True)


def with_sorted_metadata(safetensors: bytes) -> bytes:
    """The same file with its metadata in the order of their names: the library writes them in a random one.

    So that the same tensors give the same bytes, and a file can be known by its hash.
    """
    length = int.from_bytes(safetensors[:8], "little")
    header = json.loads(safetensors[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    assert len(text) <= length, "the library writes its header in other words"
    return safetensors[:8] + text.ljust(length) + safetensors[8 + length :]
