"""Files that are there whole or not at all. Imports nothing of ours; anything may import it."""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

UNFINISHED = re.compile(r"\..+-[0-9a-f]{8}")


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files under temporary names beside their own, then rename them all: nobody ever reads half of one.

    If one cannot be written, none is renamed. Folders are made; a temporary file outlives only a killed process.
    """
    with ExitStack() as cleanup:
        temporaries = {path: cleanup.enter_context(_temporary_file(path)) for path in contents}
        for path, temporary in temporaries.items():
            temporary.write_bytes(contents[path])
            _sync(temporary)
        for path, temporary in temporaries.items():
            temporary.replace(path)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to; afterwards rename it to `path`, unless there was an error."""
    with _temporary_file(path) as temporary:
        mode = temporary.stat().st_mode
        yield temporary
        _sync(temporary)
        temporary.chmod(mode)  # safetensors lets only the owner read
        temporary.replace(path)


@contextmanager
def _temporary_file(path: Path) -> Iterator[Path]:
    """An empty file beside a path, readable by whom the umask says; it is gone afterwards, unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.open("xb").close()
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())  # on the disk, before the name says so


def is_unfinished(path: Path) -> bool:
    """Whether this is the temporary name of a file that write_whole or whole_file had not finished."""
    return UNFINISHED.fullmatch(path.name) is not None


def remove_unfinished_in(folder: Path) -> None:
    """Remove what processes that were killed left in a folder under temporary names."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_unfinished(path):
            path.unlink(missing_ok=True)


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
