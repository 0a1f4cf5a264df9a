"""Files that are there whole or not at all. Imports nothing of ours; anything may import it."""

import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files under temporary names beside their own, then rename them all: nobody ever reads half of one.

    If one cannot be written, none is renamed. Folders are made; a temporary file never outlives the call.
    """
    unfinished: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file in it")
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
                unfinished[path] = Path(file.name)
                file.write(content)
        for path, temporary in unfinished.items():
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        for temporary in unfinished.values():
            temporary.unlink(missing_ok=True)
