"""The program of the process in which a learner's code runs, and the language in which it is spoken to.

`sandbox.py` starts it by its path; it imports nothing of ours. A request is a line of JSON on its standard input, an
answer a line of JSON: arrays travel as their bytes in base64, so nothing is ever unpickled. The order is:

    1  the course's part    what the exercise hands out, and observers of classes and modules; `minilora` is there
    2  the lock             limits; `minilora` and its like are gone and cannot be imported again; files, processes and
                            the network are refused
    3  the learner's part   and after it one answer for each request

The lock is a tripwire with a clear message. What holds is that expected values are never in this process, and that
the process can be killed. `sandbox.py` says what that leaves open.
"""

import base64
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import json
import linecache
import os
import resource
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

BLOCKED = ("minilora", "peft", "transformers", "bitsandbytes", "trl", "unsloth")
OWN_FILE = "your notebook"
COURSE = str(Path(__file__).resolve().parents[1]) + os.sep  # the package
REFUSED_EVENTS = {
    "it starts a process": (
        "os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen", "pty.spawn",
    ),
    "it sends a signal": ("os.kill", "os.killpg"),
    "it opens a connection": ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"),
    "it calls native code": ("ctypes.dlopen", "ctypes.dlsym"),
    "it searches the memory": ("gc.get_objects", "gc.get_referrers", "gc.get_referents"),
}  # fmt: skip
PATH_EVENTS = {
    "os.remove", "os.rename", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.link", "os.symlink", "os.mkdir",
    "shutil.rmtree", "shutil.move",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- values as plain text


def encode(value: Any) -> Any:
    """A value as JSON has it. What is not plain data becomes {"kind": "opaque"} with the name of its type."""
    torch = sys.modules.get("torch")
    if value is None or isinstance(value, (bool, str)):
        return value if type(value) in (type(None), bool) else str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float) and not isinstance(value, np.generic):
        return {"kind": "float", "hex": float.hex(value)}
    if value is ...:
        return {"kind": "ellipsis"}
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.array(value, copy=True, subok=False, order="C")
        if array.dtype.kind not in "biufcUS":
            return _opaque(value)
        kind = "number" if isinstance(value, np.generic) else "array"
        data = base64.b64encode(array.tobytes()).decode()
        return {"kind": kind, "dtype": array.dtype.str, "shape": list(array.shape), "data": data}
    if torch is not None and isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        data = base64.b64encode(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
        dtype = str(plain.dtype).removeprefix("torch.")
        return {"kind": "tensor", "dtype": dtype, "shape": list(plain.shape), "data": data}
    if torch is not None and isinstance(value, torch.dtype):
        return {"kind": "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, complex):
        return {"kind": "complex", "parts": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, dict):
        return {"kind": "dict", "items": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    if isinstance(value, (set, frozenset)):
        return {"kind": "set", "items": [encode(item) for item in value]}
    if isinstance(value, list):
        return {"kind": "list", "items": [encode(item) for item in list.__iter__(value)]}
    if isinstance(value, tuple):
        return {"kind": "tuple", "items": [encode(item) for item in tuple.__iter__(value)]}
    return _opaque(value)


def _opaque(value: Any) -> dict[str, str]:
    return {"kind": "opaque", "type": type(value).__name__[:80]}


def decode(tree: Any, convert: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> Any:
    """The value that was encoded; `convert` is applied to every array. A function comes as one that asks the grader.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: if it is not what `encode` writes.
    """
    if not isinstance(tree, dict):
        if tree is None or isinstance(tree, (bool, int, str)):
            return tree
        raise ValueError(f"not an encoded value: {tree!r:.80}")
    kind = tree["kind"]
    if kind == "float":
        return float.fromhex(tree["hex"])
    if kind == "complex":
        return complex(*map(float.fromhex, tree["parts"]))
    if kind == "ellipsis":
        return ...
    if kind == "function":
        return _asking(int(tree["number"]))
    if kind == "opaque":
        name = "".join(letter for letter in str(tree["type"]) if letter.isalnum() or letter in "_.")
        return type(name or "object", (), {"__repr__": lambda self: f"<{name}>"})()
    if kind in ("array", "number"):
        dtype = np.dtype(str(tree["dtype"]))
        if dtype.kind not in "biufcUS":
            raise ValueError(f"not a type of numbers: {dtype}")
        array = np.frombuffer(base64.b64decode(tree["data"]), dtype).reshape(tree["shape"]).copy()
        return convert(array) if kind == "array" else array[()]
    if kind in ("tensor", "dtype"):
        return _tensor(tree)
    items = [decode(item, convert) for item in tree["items"]] if kind != "dict" else []
    if kind == "dict":
        return {decode(key): decode(item, convert) for key, item in tree["items"]}
    return {"list": list, "tuple": tuple, "set": set}[kind](items)


def _asking(number: int) -> Callable:
    """A function of the grader's, from here: its inputs are sent over, and what it gave comes back."""

    def asks(*inputs: Any, **named: Any) -> Any:
        answer(id=_request["id"], asks=number, inputs=encode((inputs, named)))
        reply = json.loads(_requests.readline())
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return decode(reply["value"])

    return asks


def _tensor(tree: dict) -> Any:
    import torch

    dtype = getattr(torch, str(tree["name" if tree["kind"] == "dtype" else "dtype"]))
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"not a dtype: {dtype}")
    if tree["kind"] == "dtype":
        return dtype
    data = bytearray(base64.b64decode(tree["data"]))
    flat = torch.frombuffer(data, dtype=dtype).clone() if data else torch.empty(0, dtype=dtype)
    return flat.reshape(tree["shape"])


def changed_leaves(before: Any, after: Any, path: tuple = ()) -> list[tuple[tuple, np.ndarray]]:
    """The arrays inside `after` whose numbers are others than in `before`, with the way to each."""
    if isinstance(after, dict) and isinstance(before, dict):
        pairs = [(key, before[key], after[key]) for key in before if key in after]
    elif isinstance(after, (list, tuple)) and isinstance(before, (list, tuple)):
        pairs = [(index, *pair) for index, pair in enumerate(zip(before, after, strict=False))]
    else:
        old, new = encode(before), encode(after)
        is_array = isinstance(old, dict) and old["kind"] in ("array", "tensor")
        return [(path, after)] if is_array and old != new else []
    return [found for key, old, new in pairs for found in changed_leaves(old, new, (*path, key))]


# ------------------------------------------------------------------------------------------------------------ the lock


class _Refusing(importlib.abc.MetaPathFinder):
    """A finder for the blocked packages: the learner finds nothing, the course what it imports inside a function."""

    def __init__(self, kept: dict[str, types.ModuleType]) -> None:
        self.kept = kept

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in BLOCKED:
            return None
        if _asked_by_the_learner():
            refuse(f"it imports {name}")
        if name.startswith("minilora") and name in self.kept:
            return importlib.util.spec_from_loader(name, _Keeping(self.kept[name]))
        if name.startswith("minilora."):
            return importlib.machinery.PathFinder.find_spec(name, path)
        raise ModuleNotFoundError(f"{name} is not there while a submission is graded", name=name)


class _Keeping(importlib.abc.Loader):
    """Gives a module that was loaded before the lock."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module

    def create_module(self, spec: Any) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        """It has run already."""


def _asked_by_the_learner() -> bool:
    """Whether the learner's code is nearer than the course's among the callers of what calls this."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name == "the course" or name.startswith(COURSE):
            return False
        if name in (OWN_FILE, "<string>"):
            return True
        frame = frame.f_back
    return True


def limit(seconds: float, memory_bytes: int, file_bytes: int) -> None:
    """Set what the process may use from here on, beside what it has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    statm = Path("/proc/self/statm")  # only Linux counts address space
    pages = int(statm.read_text().split()[0]) if statm.exists() else 0
    limits = {
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + seconds) + 1,
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory_bytes if pages else resource.RLIM_INFINITY,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # not one more: no process, no thread
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def lock(own_folder: str, package: str, hidden_folders: list[str]) -> None:
    """Take the course out of the process and refuse what no exercise needs. There is no way back."""
    ours = [name for name in sys.modules if name.partition(".")[0] in (*BLOCKED, "course", "instrumented")]
    kept = {name: sys.modules.pop(name) for name in ours}
    hidden = tuple(os.path.realpath(folder) + os.sep for folder in hidden_folders)
    sys.path.remove(package)
    sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in getattr(each, "__module__", "")]
    sys.meta_path.insert(0, _Refusing(kept))
    sys.path_importer_cache.clear()
    readable = tuple(
        os.path.realpath(each) + os.sep for each in {own_folder, sys.prefix, sys.base_prefix, *sys.path} if each
    )
    own = os.path.realpath(own_folder) + os.sep
    realpath, harmless = os.path.realpath, ("/dev/null", "/dev/urandom", "/dev/random", os.path.realpath(__file__))

    def is_allowed(path: Any, is_written: bool) -> bool:
        if isinstance(path, int) or path is None:
            return True
        whole = realpath(os.fsdecode(path))
        if (whole + os.sep).startswith(own) or whole in harmless:
            return True
        return not is_written and whole.startswith(readable) and not (whole + os.sep).startswith(hidden)

    reasons = {event: f"{reason} ({event})" for reason, events in REFUSED_EVENTS.items() for event in events}

    def problem(event: str, arguments: tuple) -> str | None:
        if event == "open" and not is_allowed(arguments[0], bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))):
            return f"it opens {str(arguments[0])[:200]}"
        if event in PATH_EVENTS and not is_allowed(arguments[0], True):
            return f"it changes {str(arguments[0])[:200]}"
        return reasons.get(event)

    def watch(event: str, arguments: tuple) -> None:
        reason = problem(event, arguments)
        if reason is not None and _asked_by_the_learner():
            refuse(reason)

    sys.addaudithook(watch)


def empty(reference: Any) -> None:
    """Take the code out of the course's own answer, wherever the process still holds it."""
    if isinstance(reference, type):
        for name, value in list(vars(reference).items()):
            if callable(value) or isinstance(value, (property, staticmethod, classmethod)):
                delattr(reference, name)
    elif isinstance(reference, types.FunctionType) and not reference.__code__.co_freevars:
        reference.__code__ = _gone.__code__


def _gone(*inputs: Any, **named: Any) -> NoReturn:
    raise RuntimeError("the course's own answer is not there while a submission is graded")


# ------------------------------------------------------------------------------------------------- requests and answers

_answers: Any = None  # the descriptor that answers are written to
_requests: Any = None  # the file that requests are read from
_request: dict[str, Any] = {}  # the one that is being answered


def answer(**facts: Any) -> None:
    """Write one line of JSON."""
    line = json.dumps(facts).encode() + b"\n"
    while line:
        line = line[os.write(_answers, line) :]


def refuse(reason: str) -> NoReturn:
    """Say why the submission is refused, and end the process: no `except` catches that."""
    answer(refused=reason)
    os._exit(1)


def own_line(error: BaseException) -> str:
    """The learner's line that raised, if one did."""
    numbers = [
        number for frame, number in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == OWN_FILE
    ]
    return linecache.getline(OWN_FILE, numbers[-1]).strip() if numbers else ""


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception as plain text: its classes by name, what it says, and the learner's line."""
    try:
        text = str(error)[:2000]
    except BaseException:
        text = ""
    return {"error": [each.__name__ for each in type(error).__mro__][:-1], "text": text, "line": own_line(error)}


def respond(request: dict, course: Any, learner: dict, instrumented: Any) -> dict[str, Any]:
    """Call the learner's function, or try it with one of the course's observers."""
    function = eval(request["function"], learner)
    if request["do"] == "try":
        case = copy.deepcopy(course.cases[request["seed"]])
        kept = encode_all(case)
        with np.errstate(all="ignore"):
            value = getattr(course, request["observer"])(function, case)
        changed = [name for name, old in kept.items() if old != encode(case[name])]
        return {"value": encode(value), "changed": [[name, encode(case[name])] for name in changed]}
    log = instrumented.Log()

    def watched(array: np.ndarray) -> np.ndarray:
        view = array.view(instrumented.InstrumentedArray)
        view.log = log
        return view

    given = decode(request["inputs"], watched if request["watched"] else lambda array: array)
    before = decode(request["inputs"])
    inputs, named = given
    with np.errstate(all="ignore"):
        value = function(*inputs, **named)
    return {
        "value": encode(value),
        "changed": [[encode(path), encode(leaf)] for path, leaf in changed_leaves(before, given)],
        "log": [[[name, list(shape)] for name, shape in log.allocated], log.multiplications],
    }


def encode_all(case: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a case, encoded, to see later what was changed in place."""
    encoded = {name: encode(value) for name, value in case.items()}
    return {
        name: tree for name, tree in encoded.items() if isinstance(tree, dict) and tree["kind"] in ("array", "tensor")
    }


def load(path: str, name: str) -> Any:
    """A module from its file, registered nowhere."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def prepared(setup: dict) -> Any:
    """Run the course's part, make the inputs of its checks, and take the answer out of it."""
    course = types.ModuleType("course")
    sys.modules["course"] = course
    sys.path.insert(0, setup["package"])
    linecache.cache["the course"] = (
        len(setup["course"]),
        None,
        setup["course"].splitlines(keepends=True),
        "the course",
    )
    exec(compile(setup["course"], "the course", "exec"), vars(course))
    vars(course)["cases"] = {seed: course.observer_generate(np.random.default_rng(seed)) for seed in setup["seeds"]}
    for module, name in setup["empty"]:
        if module in sys.modules:
            empty(getattr(sys.modules[module], name, None))
    return course


def main() -> None:
    """Read the set-up, run the course's part, lock, run the learner's part, answer requests."""
    global _answers, _requests, _request
    _requests = os.fdopen(os.dup(0), "rb")
    _answers = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    setup = json.loads(_requests.readline())
    instrumented = load(setup["instrumented"], "instrumented")
    try:
        course = prepared(setup)
    except BaseException as error:
        answer(fault=traceback.format_exc(limit=-3) or str(error))
        return
    learner = types.ModuleType("__main__")  # as in a notebook
    sys.modules["__main__"] = learner
    vars(learner).update({name: getattr(course, own) for name, own in setup["handed"].items()})
    vars(learner).setdefault("display", lambda *shown, **named: None)
    limit(setup["seconds"], setup["memory_bytes"], setup["file_bytes"])
    lock(str(Path.cwd()), setup["package"], setup["hidden"])
    answer(is_locked=True)
    own = setup["own"]
    linecache.cache[OWN_FILE] = (len(own), None, own.splitlines(keepends=True), OWN_FILE)
    try:
        exec(compile(own, OWN_FILE, "exec"), vars(learner))
        answer(id=setup["id"])
    except BaseException as error:
        answer(id=setup["id"], **describe_error(error))
        return
    while line := _requests.readline():
        _request = json.loads(line)
        try:
            facts = respond(_request, course, vars(learner), instrumented)
        except BaseException as error:
            facts = describe_error(error)
        answer(id=_request["id"], **facts)


if __name__ == "__main__":
    main()
