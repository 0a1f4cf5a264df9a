"""A process for a learner's code, from the grader's side: started, spoken to over pipes, stopped.

    with Sandbox(own=source) as sandbox:
        function = sandbox.function("lora_forward")     a function here; each call of it happens over there
        function(x, W, A, B, 8.0)

The process has a folder of its own, a bare environment, no descriptors of ours, and limits on memory, processor
seconds, file sizes and processes; after `clock_seconds` its whole group is killed. It gets inputs and gives
outputs, as plain text (`sandboxed.py`). What the right answer is, is never in it.

What this does not stop. The process is one of the same user on the same machine. Its lock refuses Python's own ways
to files, processes and the network, with a clear message, but native code inside NumPy or PyTorch can be talked into
reading a file or writing where it should not. Who grades strangers' code runs the grader as a user who may do
nothing else, in a container without a network. For root the system does not count processes: do not grade as root.
"""

import contextlib
import functools
import json
import os
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from minilora.classroom import instrumented, sandboxed
from minilora.classroom.instrumented import InstrumentedArray

PACKAGE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a learner's process may use."""

    seconds: float = 30.0  # of the processor
    clock_seconds: float = 60.0
    memory_bytes: int = 2 * 2**30  # beside what the libraries take
    file_bytes: int = 64 * 2**20
    answer_bytes: int = 16 * 2**20
    start_seconds: float = 180.0  # for the course's own part, such as importing PyTorch on a busy machine


DEFAULT = Limits()


class Stopped(BaseException):
    """The process was ended, or ended itself, before it answered. No `except Exception` of an observer catches it."""


class Refused(BaseException):
    """The process did what no exercise needs, and was ended."""


class DoesNotRun(RuntimeError):
    """The learner's part raised while it was executed, before anything was asked of it."""


class CourseFault(RuntimeError):
    """The course's own part failed in the process: a mistake in an exercises.py, not in a submission."""


class Sandbox:
    """One process: `course` runs in it with our package there, then the lock closes, then `own` runs.

    handed    what the learner's part finds ready, by its name there: the name it has in the course's part
    empty     our own answers (module, name), whose code is taken out if the course's part has imported them
    hidden    folders that the learner's part may not open a file of, beside the package itself
    seeds     of the inputs that `observer_generate` of the course's part makes, for `tried`
    """

    def __init__(
        self,
        *,
        own: str,
        course: str = "",
        handed: Mapping[str, str] = MappingProxyType({}),
        empty: tuple[tuple[str, str], ...] = (),
        hidden: tuple[Path, ...] = (),
        seeds: tuple[int, ...] = (),
        limits: Limits = DEFAULT,
    ) -> None:
        self._limits, self._buffer = limits, b""
        self._setup = {
            "own": own,
            "course": course,
            "handed": dict(handed),
            "empty": [list(each) for each in empty],
            "hidden": [str(PACKAGE / "minilora"), *map(str, hidden)],
            "package": str(PACKAGE),
            "instrumented": instrumented.__file__,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": limits.file_bytes,
            "seeds": list(seeds),
        }

    def __enter__(self) -> "Sandbox":
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        environment = {"HOME": self._folder.name, "TMPDIR": self._folder.name, "LANG": "C.UTF-8", "PATH": os.defpath}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", sandboxed.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env={**environment, **threads, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        try:
            self._begin()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait(timeout=30)  # it is dead by now
        self._folder.cleanup()

    def _begin(self) -> None:
        """Send the set-up, wait for the lock, and for the learner's part to have run."""
        self._until = time.monotonic() + self._limits.start_seconds
        number = secrets.token_hex(8)
        self._send({**self._setup, "id": number})
        first = self._receive()
        if "fault" in first:
            raise CourseFault(f"the course's own part of this exercise fails in the grader:\n{first['fault']}")
        self._until = time.monotonic() + self._limits.clock_seconds
        if first.get("is_locked") is not True:
            raise Stopped("it did not start as it should")
        try:
            self._checked(self._receive(), number)
        except Exception as error:
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            raise DoesNotRun(f"{type(error).__name__}: {error}{notes}") from None

    def ask(self, functions: Sequence[Callable] = (), **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; an exception over there is raised here.

        On the way it may ask for what these functions of ours give.

        Raises:
            Stopped: if no answer comes, or none that can be read.
            Refused: if the process did what no exercise needs.
        """
        number = secrets.token_hex(8)
        self._send({**request, "id": number})
        while "asks" in (message := self._checked(self._receive(), number)):
            self._send(_answered(functions, message))
        return message

    def function(self, name: str) -> Callable:
        """A stand-in for a function of the learner's: it sends its inputs over and gives what came back.

        An input that is a function stays here; over there is one that asks for what it gives.
        """

        def stand_in(*inputs: Any, **named: Any) -> Any:
            watched = [each for each in inputs if isinstance(each, InstrumentedArray)]
            functions = [each for each in inputs if is_function(each)]
            tree = sandboxed.encode((inputs, named))
            for at, each in enumerate(inputs):
                if is_function(each):
                    tree["items"][0]["items"][at] = {"kind": "function", "number": functions.index(each)}
            reply = self.ask(functions, do="call", function=name, inputs=tree, watched=bool(watched))
            try:
                if watched and watched[0].log is not None:
                    allocated, multiplications = reply["log"]
                    watched[0].log.allocated += [(str(op), tuple(map(int, shape))) for op, shape in allocated]
                    watched[0].log.multiplications += int(multiplications)
                for path, leaf in reply["changed"]:
                    restore((inputs, named), sandboxed.decode(path), sandboxed.decode(leaf))
                return sandboxed.decode(reply["value"])
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                raise Stopped(f"its answer cannot be read: {error}") from None

        stand_in.__name__ = stand_in.__qualname__ = name
        return stand_in

    def tried(self, name: str, observer: str, case: dict[str, Any], seed: int) -> Any:
        """What an observer over there makes of the learner's object, on the inputs of this seed.

        Inputs that were changed over there are changed in `case` too.
        """
        reply = self.ask(do="try", function=name, observer=observer, seed=seed)
        try:
            for key, leaf in reply["changed"]:
                restore(case, (key,), sandboxed.decode(leaf))
            return sandboxed.decode(reply["value"])
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise Stopped(f"its answer cannot be read: {error}") from None

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        descriptor, line = self._process.stdin.fileno(), json.dumps(message).encode() + b"\n"
        os.set_blocking(descriptor, False)
        with selectors.DefaultSelector() as ready:
            ready.register(descriptor, selectors.EVENT_WRITE)
            while line:
                if not ready.select(self._left()):
                    raise Stopped(self._late())
                try:
                    line = line[os.write(descriptor, line) :]
                except BrokenPipeError:
                    return  # what the process said last is read next

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor, parts, size = self._process.stdout.fileno(), [self._buffer], len(self._buffer)
        with selectors.DefaultSelector() as ready:
            ready.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in parts[-1]:
                if not ready.select(self._left()):
                    raise Stopped(self._late())
                chunk = os.read(descriptor, 2**20)
                parts.append(chunk)
                size += len(chunk)
                if not chunk:
                    raise Stopped(self._ended())
                if size > self._limits.answer_bytes:
                    raise Stopped(f"it answered with more than {self._limits.answer_bytes:,} bytes")
        line, _, self._buffer = b"".join(parts).partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise Stopped("it wrote something else than an answer") from None
        if not isinstance(message, dict):
            raise Stopped("it wrote something else than an answer")
        if "refused" in message:
            raise Refused(f"{message['refused']:.300}")
        return message

    def _checked(self, message: dict[str, Any], number: str) -> dict[str, Any]:
        if message.get("id") != number:
            raise Stopped("it wrote something else than an answer")
        if "error" in message:
            raise raised_there(message)
        return message

    def _left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _late(self) -> str:
        return f"no answer after {self._limits.clock_seconds:g} s: is there a loop that does not end?"

    def _ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGXCPU or (code == -signal.SIGKILL and self._left() > 0):
            return f"it used up its {self._limits.seconds:g} s of processor time, or its memory"
        return f"its process ended (code {code}) before it answered"


def is_function(value: Any) -> bool:
    """Whether a value is called and no more: a function, or an object with `__call__`, but no class and no module."""
    return callable(value) and not isinstance(value, type) and not hasattr(value, "parameters")


def _answered(functions: Sequence[Callable], message: dict[str, Any]) -> dict[str, Any]:
    """What a function of ours gives for the inputs that the process sent."""
    try:
        inputs, named = sandboxed.decode(message["inputs"])
        return {"value": sandboxed.encode(functions[message["asks"]](*inputs, **named))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def restore(whole: Any, path: Any, leaf: Any) -> None:
    """Write a leaf's numbers into the array at this path: what was changed in place there is changed in place here."""
    here = functools.reduce(lambda inner, key: inner[key], path, whole)
    if isinstance(here, np.ndarray):
        here.view(np.ndarray)[...] = leaf
    else:
        here.detach().copy_(leaf)


def raised_there(message: dict[str, Any]) -> Exception:
    """The exception that was raised over there, as one of ours of the same name, with the learner's line as a note."""
    names = [str(name)[:80] for name in message["error"]] or ["Exception"]
    known: Any = next(
        (each for name in names if is_exception(each := vars(__import__("builtins")).get(name))), Exception
    )
    kind = known if known.__name__ == names[0] else type(names[0], (known,), {})
    try:
        error = kind(str(message.get("text", ""))[:2000])
    except TypeError:  # UnicodeDecodeError and its like want more than a text
        error = type(names[0], (Exception,), {})(str(message.get("text", ""))[:2000])
    error.add_note(f"in the line: {message['line']!s:.200}" if message.get("line") else "outside your own lines")
    return error


def is_exception(kind: Any) -> bool:
    """Whether this is one of Python's own exceptions that `except Exception` catches."""
    return isinstance(kind, type) and issubclass(kind, Exception)
