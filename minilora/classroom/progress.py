"""What a learner has done, in one local file that is never sent anywhere.

`~/.minilora/progress.json`, or the folder that `MINILORA_HOME` names. It holds exercises passed and attempted,
hints taken and bets placed. Nothing is written under `MINILORA_STRICT=1`: a test or a grader is not a learner.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minilora.files import write_whole

try:
    import fcntl
except ImportError:  # Windows without WSL: two notebooks that write in the same instant may lose one entry
    fcntl = None  # type: ignore[assignment]


def is_strict() -> bool:
    """Whether a failed check must raise: true in tests and graders, which set `MINILORA_STRICT=1`."""
    return os.environ.get("MINILORA_STRICT", "") not in ("", "0")


def progress_file() -> Path:
    """Where the progress is kept; the folder need not exist yet."""
    home = os.environ.get("MINILORA_HOME")
    return (Path(home) if home else Path.home() / ".minilora") / "progress.json"


def read_progress() -> dict[str, Any]:
    """Everything recorded so far; empty at the start.

    Raises:
        ValueError: if the file is not the JSON object it should be (names the file and the way out).
    """
    path = progress_file()
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read your progress in {path}: {error}; repair it or move it away") from error
    if not isinstance(progress, dict):
        raise ValueError(
            f"cannot read your progress in {path}: expected a JSON object, got "
            f"{type(progress).__name__}; repair it or move it away"
        )
    return progress


@contextlib.contextmanager
def _only_one_writer(folder: Path) -> Iterator[None]:
    with (folder / "progress.lock").open("w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def record(kind: str, key: str, **facts: Any) -> dict[str, Any]:
    """Add facts to one entry and return the entry; a fact that is None counts up by one.

    The file is written under a temporary name and renamed, so a reader never meets half of it.
    """
    if is_strict():
        return {}
    path = progress_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _only_one_writer(path.parent):
        progress = read_progress()
        entry = progress.setdefault(kind, {}).setdefault(key, {})
        for name, value in facts.items():
            entry[name] = entry.get(name, 0) + 1 if value is None else value
        write_whole({path: json.dumps(progress, indent=2, sort_keys=True).encode()})
    return entry
