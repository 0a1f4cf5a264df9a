"""Files that are there whole or not at all. Imports nothing of ours; anything may import it."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path` to write to, and rename it at the end of the `with`, if nothing was raised.

    Folders are made; the temporary file never outlives the `with`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        temporary = Path(file.name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files under temporary names beside their own, then rename them all: nobody ever reads half of one.

    If one cannot be written, none is renamed. Folders are made; a temporary file never outlives the call.
    """
    with ExitStack() as renaming:
        for path, content in contents.items():
            renaming.enter_context(whole_file(path)).write_bytes(content)
