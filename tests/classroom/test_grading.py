"""The grader is graded: right, wrong, unfinished and hostile submissions."""

import ast
import copy
import dataclasses
import json
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minilora.classroom import sandbox as sandbox_module
from minilora.classroom.exercises import Exercise, examine
from minilora.classroom.grading import (
    Grade,
    grade_notebook,
    grade_source,
    judged,
    lesson_of,
    not_by_value,
    seeds_of,
)
from minilora.classroom.lessons import lesson_module, lessons_folder
from minilora.classroom.sandbox import Limits, Refused, Sandbox, Stopped
from minilora.classroom.slices import Program
from minilora.classroom.submission import asked_name, submission
from minilora.cli import main

ROOT = Path(__file__).parents[2]
LESSONS = sorted(path.parent.name for path in lessons_folder().glob("[0-9][0-9]_*/lesson.py"))
EXERCISES = [exercise for lesson in LESSONS for exercise in lesson_module(lesson[:2]).EXERCISES]
FORWARD, BACKWARD, TRAINING = lesson_module("03").EXERCISES
SHORT = Limits(seconds=1)  # for those that never end; on a busy machine that is long on the clock
SECRET = "nobody knows"


def long_unless_numpy(lesson: str) -> Any:
    """A parameter; a lesson whose exercises import PyTorch takes seconds for each of them."""
    text = (lessons_folder() / lesson / "exercises.py").read_text(encoding="utf-8")
    return pytest.param(lesson, marks=[pytest.mark.long] if "import torch" in text else [])


def solution(name: str, lesson: str = "03_lora_in_numpy") -> str:
    """A top-level function of a full notebook."""
    cells = json.loads((ROOT / "notebooks" / f"{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]
    program = Program.of_cells("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return "\n".join(statement.text for statement in program.needed_by(name))


def notebook(folder: Path, *cells: str, **metadata: Any) -> Path:
    """A notebook's file of these code cells."""
    path = folder / "submission.ipynb"
    made = [{"cell_type": "code", "source": cell, "outputs": [], "metadata": {}} for cell in cells]
    path.write_text(json.dumps({"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


def body(text: str) -> str:
    """A lora_forward with this body, after the imports that a cheat may want."""
    return "import os, sys, time\nimport numpy as np\ndef lora_forward(x, W, A, B, alpha):\n" + textwrap.indent(
        textwrap.dedent(text).strip(), "    "
    )


# -------------------------------------------------------------------------------- every lesson: solved, and not started


@pytest.mark.parametrize("lesson", [long_unless_numpy(lesson) for lesson in LESSONS])
def test_the_full_notebook_scores_in_full_on_inputs_that_nobody_has_seen(lesson: str):
    grades = grade_notebook(ROOT / "notebooks" / f"{lesson}.ipynb", lesson[:2], secret=SECRET)

    assert [grade.status for grade in grades] == ["passed"] * len(grades), [grade.message for grade in grades]
    assert [(each.exercise, each.points) for each in grades] == [
        (exercise.id, exercise.points) for exercise in lesson_module(lesson[:2]).EXERCISES
    ]


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_student_notebook_is_not_started_and_shows_no_traceback(lesson: str):
    grades = grade_notebook(ROOT / "notebooks" / "student" / f"{lesson}.ipynb", lesson[:2])

    assert [(grade.status, grade.points) for grade in grades] == [("not started", 0)] * len(grades)
    assert not any("Traceback" in grade.message for grade in grades)


def in_a_sandbox_with_its_bugs(exercise: Exercise) -> Sandbox:
    """The exercise's process, in which all of exercises.py is handed out: only a test does that."""
    parts = submission(Program.of_cells([""]), exercise, frozenset(), not_by_value(exercise))
    lesson = lesson_module(exercise.id.split(".")[0])
    assert lesson.__file__ is not None
    observers = "\n".join(line for line in parts.course.splitlines() if line.startswith("observer_"))
    return Sandbox(
        own="",
        course=Path(lesson.__file__).read_text(encoding="utf-8") + "\n" + observers,
        handed={"EXERCISES": "EXERCISES"},
        seeds=seeds_of(exercise.id, SECRET) if observers else (),
        limits=Limits(seconds=300, clock_seconds=3000),
    )


@pytest.mark.parametrize(
    "exercise",
    [
        pytest.param(each, id=each.id, marks=[] if each.id.startswith("03") else [pytest.mark.long])
        for each in EXERCISES
    ],
)
def test_every_known_mistake_made_over_there_fails_here_under_its_own_name(exercise: Exercise):
    at = lesson_module(exercise.id.split(".")[0]).EXERCISES.index(exercise)
    named = {}
    with in_a_sandbox_with_its_bugs(exercise) as sandbox:
        for index, bug in enumerate(exercise.bugs):
            result = judged(exercise, sandbox, f"EXERCISES[{at}].bugs[{index}].function", seeds_of(exercise.id, SECRET))
            named[bug.name] = result.failure and result.failure.bug and result.failure.bug.name

    assert named == {bug.name: bug.name for bug in exercise.bugs}


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_the_answer_is_not_in_the_learner_s_process(exercise: Exercise):
    parts = submission(Program.of_cells([""]), exercise, frozenset(), not_by_value(exercise))
    names = {name for each in Program.of_cells([parts.course]).statements for name in each.binds}

    assert exercise.reference.__name__ not in names
    assert parts.empty == ((exercise.reference.__module__, exercise.reference.__qualname__),)


# -------------------------------------------------------------------------------------------------------- right answers

RIGHT = {
    "einsum": """
        down = np.einsum("...i,ri->...r", x, A)
        return np.einsum("...i,oi->...o", x, W) + alpha / A.shape[0] * np.einsum("...r,or->...o", down, B)
        """,
    "an explicit loop": """
        if x.ndim > 2:
            return np.stack([lora_forward(rows, W, A, B, alpha) for rows in x])
        h = np.zeros((len(x), len(W)))
        for n in range(len(x)):
            middle = [alpha / len(A) * sum(A[k] * x[n]) for k in range(len(A))]
            for o in range(len(W)):
                h[n, o] = sum(W[o] * x[n]) + sum(B[o, k] * middle[k] for k in range(len(A)))
        return h
        """,
    "float32": """
        x, W, A, B = (array.astype(np.float32) for array in (x, W, A, B))
        return x @ W.T + np.float32(alpha / len(A)) * ((x @ A.T) @ B.T)
        """,
}


@pytest.mark.parametrize("build", RIGHT)
def test_a_right_answer_of_another_build_scores_in_full(build: str):
    grade = grade_source(body(RIGHT[build]), FORWARD, secret=SECRET)

    assert (grade.status, grade.points) == ("passed", FORWARD.points), grade.message


def test_pytorch_may_be_used_where_the_lesson_does_not(tmp_path: Path):
    own = "x, W, A, B = (torch.tensor(np.asarray(each)) for each in (x, W, A, B))\n"
    own = "import torch\n" + body(own + "return (x @ W.T + alpha / len(A) * (x @ A.T) @ B.T).numpy()")

    assert grade_notebook(notebook(tmp_path, own), "03", secret=SECRET)[0].status == "passed"


def test_a_function_may_print_and_use_helpers_and_globals_of_other_cells(tmp_path: Path):
    cells = (
        "%matplotlib inline\nimport numpy as np",
        "def scale(alpha, A):\n    return SIGN * alpha / len(A)",
        "SIGN = 1",
        "def lora_forward(x, W, A, B, alpha):\n    print('here', x.shape)\n    return x @ W.T + bypass(x, A, B, alpha)",
        "def bypass(x, A, B, alpha):\n    return scale(alpha, A) * (x @ A.T) @ B.T",
    )

    assert grade_notebook(notebook(tmp_path, *cells), "03")[0].status == "passed"


def test_broken_slow_and_unfinished_cells_elsewhere_cost_nothing(tmp_path: Path):
    cells = (
        "this is no Python",
        "while True: pass",
        "import nothing_of_this_name",
        "figure = undefined_name",
        "def lora_backward(dy, x, W, A, B, alpha):\n    while True: pass",
        solution("lora_forward"),
        "raise SystemExit",
    )

    grades = grade_notebook(notebook(tmp_path, *cells), "03", limits=SHORT)

    assert [grade.status for grade in grades] == ["passed", "stopped", "not started"]


def test_what_a_kernel_holds_counts_for_nothing(tmp_path: Path):
    path = notebook(tmp_path, "def lora_forward(x, W, A, B, alpha):\n    ...", "check('03.1', lora_forward)")
    content = json.loads(path.read_text())
    content["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "✓  03.1: 5 checks passed"}]
    path.write_text(json.dumps(content))

    assert grade_notebook(path, "03")[0].status == "not started"


# ------------------------------------------------------------------------------------------------ going on from earlier


def test_a_later_exercise_goes_on_with_the_course_s_answer_where_the_earlier_is_a_stub(tmp_path: Path):
    student = json.loads((ROOT / "notebooks" / "student" / "03_lora_in_numpy.ipynb").read_text())["cells"]
    cells = ["".join(cell["source"]) for cell in student if cell["cell_type"] == "code"]
    training = ast.unparse(ast.parse(solution("train")).body[-1])

    grades = grade_notebook(notebook(tmp_path, *cells, training), "03", secret=SECRET)

    assert [grade.status for grade in grades] == ["not started", "not started", "passed"], grades[2].message


GOES_ON = """
def lora_forward(x, W, A, B, alpha):
    return x @ W.T
forward = check("03.1", lora_forward).function
backward = check("03.2", lora_backward).function
def train(batches, W, A, B, alpha, lr):
    for x, y in batches:
        dy = (forward(x, W, A, B, alpha) - y) / len(x)
        _, dA, dB = backward(dy, x, W, A, B, alpha)
        A, B = A - lr * dA, B - lr * dB
    return A, B
"""


def test_a_mistake_in_an_earlier_exercise_is_not_charged_twice():
    assert grade_source(GOES_ON, TRAINING).status == "passed"


def test_where_the_earlier_exercise_passed_the_learner_s_own_function_is_used():
    grade = grade_source(GOES_ON, TRAINING, passed=frozenset({"03.1"}))  # as if; it is not

    assert (grade.status, grade.points) == ("failed", 0)


def test_the_course_s_answers_that_are_handed_out_lead_to_no_other():
    reach = GOES_ON.replace(
        "for x, y in batches:", "g = getattr(forward, '__glo' + 'bals__')['lora_backward'](1)\n    if 1:"
    )
    grade = grade_source(reach, BACKWARD, secret=SECRET)
    assert grade.status == "not started"
    own = 'forward = check("03.1", None).function\ndef lora_backward(dy, x, W, A, B, alpha):\n    f = forward\n'
    own += "    return getattr(f, '__glo' + 'bals__')['lora_backward'](dy, x, W, A, B, alpha)"

    grade = grade_source(own, BACKWARD, secret=SECRET)

    assert grade.points == 0 and "the course's own answer is not there" in grade.message


def test_the_function_that_check_gives_for_the_exercise_itself_is_the_learner_s():
    given = "lora_forward = check('03.1', {}).function"

    assert grade_source(given.format("lambda *inputs: None"), FORWARD).status == "failed"
    assert grade_source(solution("lora_forward") + "\n" + given.format("lora_forward"), FORWARD).status == "passed"


# --------------------------------------------------------------------------------------------------- the ladder's words


def test_a_known_mistake_is_named_in_the_grade():
    grade = grade_source(body("return x @ W.T + (x @ A.T) @ B.T"), FORWARD, secret=SECRET)

    assert (grade.status, grade.points, grade.most) == ("failed", 0, FORWARD.points)
    assert "looks like  no scaling: You left out alpha / r" in grade.message
    assert "The lesson goes on" not in grade.message


def test_the_learner_s_own_line_is_shown_where_it_raises():
    grade = grade_source(body("h = x @ W.T\nreturn h + unknown"), FORWARD)

    assert "NameError: name 'unknown' is not defined" in grade.message
    assert "in the line: return h + unknown" in grade.message


def test_an_error_outside_the_learner_s_lines_shows_none_of_ours():
    grade = grade_source("def lora_forward(x):\n    return x", FORWARD)

    assert "takes 1 positional argument but 5 were given" in grade.message
    assert "sandbox" not in grade.message and "raise" not in grade.message


def test_changing_an_input_in_place_over_there_is_seen_here():
    grade = grade_source(body("A *= alpha / len(A)\nreturn x @ W.T + (x @ A.T) @ B.T"), FORWARD)

    assert "A changed in place: work on a copy" in grade.message


def test_a_product_as_large_as_w_is_seen_through_the_pipe():
    grade = grade_source(body("return x @ W.T + alpha / len(A) * x @ (B @ A).T"), FORWARD)

    assert "looks like  B A formed first" in grade.message


def test_a_cell_that_is_not_python_is_told_where_it_holds_the_answer(tmp_path: Path):
    grade = grade_notebook(notebook(tmp_path, "def lora_forward(x, W, A, B, alpha):\n    return (x @ W.T"), "03")[0]

    assert grade.status == "failed"
    assert "the cell with lora_forward is not Python: '(' was never closed (line 2 of the cell)" in grade.message


def test_a_cell_that_the_answer_needs_and_that_raises_is_told():
    grade = grade_source("scale = 1 / 0\ndef lora_forward(x, W, A, B, alpha):\n    return scale * x", FORWARD)

    assert grade.status == "failed"
    assert "the cells that it needs do not run: ZeroDivisionError: division by zero" in grade.message
    assert "in the line: scale = 1 / 0" in grade.message


def test_hidden_checks_are_told_of_without_a_secret_and_made_with_one():
    exercise = dataclasses.replace(FORWARD, hidden=4)
    right = solution("lora_forward")

    assert "5 visible checks passed, 4 hidden" in grade_source(right, exercise).message
    with_secret = grade_source(right, exercise, secret=SECRET).message
    assert "hidden" not in with_secret and "the values on 4 random inputs" in with_secret


def test_two_mistakes_at_once_are_never_named_as_one():
    for first, second in zip(FORWARD.bugs, FORWARD.bugs[1:], strict=False):

        def mixture(x, W, A, B, alpha, first=first.function, second=second.function):
            return (first if x.sum() > 0 else second)(x, W, A, B, alpha)

        signs = {bool(FORWARD.generate(np.random.default_rng(seed))["x"].sum() > 0) for seed in range(4)}
        failure = examine(FORWARD, mixture, seeds=range(4)).failure

        assert signs == {True, False} and failure is not None
        assert failure.bug is None, f"{first.name} and {second.name} are named {failure.bug.name}"


# --------------------------------------------------------------------------------------------------------- hostile ones

STOPPED = {
    "never ends": "while True: pass",
    "catches everything": """
        while True:
            try:
                while True: pass
            except BaseException: pass
        """,
    "sleeps": "time.sleep(1000)",
    "prints for ever": "while True: print('x' * 10**6)",
    "leaves": "os._exit(0)",
    "leaves with a success": "os._exit(0) or 1",
    "returns a gigabyte": "return np.ones(2**27 // 2)",
    "crashes": "np.lib.stride_tricks.as_strided(x, (10**12,)).sum()",
    "closes every pipe": "os.closerange(0, 100)",
    "writes answers of its own": """
        for descriptor in range(3, 20):
            try: os.write(descriptor, b'{"value": null, "changed": [], "log": [[], 0]}\\n')
            except OSError: pass
        return None
        """,
    "a thread that writes answers": """
        import threading
        def shout():
            while True:
                for descriptor in range(3, 20):
                    try: os.write(descriptor, b'{"id": 1, "value": null, "changed": [], "log": [[], 0]}\\n')
                    except OSError: pass
        try: threading.Thread(target=shout, daemon=True).start()
        except RuntimeError: shout()
        time.sleep(1000)
        """,
    "writes noise": """
        for descriptor in range(3, 20):
            try: os.write(descriptor, b'\\xff\\xfe' * 1000 + b'\\n')
            except OSError: pass
        """,
    "writes without an end": """
        while True:
            for descriptor in range(3, 20):
                try: os.write(descriptor, b'x' * 10**6)
                except OSError: pass
        """,
}


@pytest.mark.parametrize("hostile", STOPPED)
def test_what_does_not_answer_is_stopped_and_scores_0(hostile: str):
    clock = 3 if "time.sleep" in STOPPED[hostile] else SHORT.clock_seconds
    limits = dataclasses.replace(SHORT, answer_bytes=2**22, clock_seconds=clock)
    grade = grade_source(body(STOPPED[hostile]), FORWARD, limits=limits)

    assert (grade.status, grade.points) == ("stopped", 0), grade.message


def test_an_answer_without_an_end_is_not_kept():
    limits = dataclasses.replace(SHORT, answer_bytes=2**22)
    grade = grade_source(body(STOPPED["writes without an end"]), FORWARD, limits=limits)

    assert "it answered with more than 4,194,304 bytes" in grade.message


def test_what_never_ends_before_it_is_called_is_stopped_too():
    endless = "def slow():\n    while True: pass\nn = slow()\ndef lora_forward(x):\n    return n"

    assert grade_source(endless, FORWARD, limits=SHORT).status == "stopped"


REFUSED = {
    "imports the answer": (
        "from minilora.numpy_lora.forward import lora_forward as f\nreturn f(x, W, A, B, alpha)",
        "imports",
    ),
    "imports it by a made-up name": (
        "space = {}\nexec('from mini' + 'lora.numpy_lora.forward import lora_forward', space)\n"
        "return space['lora_forward'](x, W, A, B, alpha)",
        "it imports minilora",
    ),
    "imports PEFT": ("exec('import pe' + 'ft')", "it imports peft"),
    "removes the lock of imports": (
        "finders = getattr(sys, 'meta_' + 'path')\ndel finders[0]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nexec('import mini' + 'lora.numpy_lora.forward')",
        "it opens",
    ),
    "reads the answer's file": (
        f"space = {{}}\nexec(open({str(ROOT / 'minilora' / 'numpy_lora' / 'forward.py')!r}).read(), space)",
        "forward.py",
    ),
    "reads the exercises": (f"open({str(ROOT / 'lessons' / '03_lora_in_numpy' / 'exercises.py')!r})", "exercises.py"),
    "reads the solved notebook": (f"open({str(ROOT / 'notebooks' / '03_lora_in_numpy.ipynb')!r})", "ipynb"),
    "reads the grader's memory": ("open(f'/proc/{os.getppid()}/mem', 'rb')", "/mem"),
    "reads what belongs to the machine": ("open('/etc/passwd')", "/etc/passwd"),
    "writes elsewhere": ("open('/tmp/of-a-submission', 'w')", "/tmp/of-a-submission"),
    "removes a file": (f"os.remove({str(ROOT / 'no-such-file')!r})", "no-such-file"),
    "ends the grader": ("os.kill(os.getppid(), 9)", "sends a signal"),
    "a fork bomb": ("while True: os.fork()", "starts a process"),
    "runs a program": ("os.system('true')", "starts a process"),
    "catches the refusal": ("try: os.fork()\nexcept BaseException: pass\nreturn x @ W.T", "starts a process"),
    "opens a connection": (
        "exec('import so' + 'cket; so' + 'cket.create_connection((\"127.0.0.1\", 9))')",
        "connection",
    ),
    "searches the memory": ("exec('import g' + 'c; g' + 'c.get_objects()')", "searches the memory"),
    "calls into the C library": ("exec('import cty' + 'pes; cty' + 'pes.pythonapi.getppid()')", "native code"),
    "pries, statically": ("return x.__class__.__subclasses__()", "uses __subclasses__, which no exercise needs"),
    "asks the course": (
        "return find_exercise('03.1').reference(x, W, A, B, alpha)\n"
        "from minilora.classroom.exercises import find_exercise",
        "find_exercise",
    ),
}


@pytest.mark.parametrize("hostile", REFUSED)
def test_what_no_exercise_needs_is_refused_with_the_reason(hostile: str):
    text, reason = REFUSED[hostile]
    grade = grade_source(body(text), FORWARD, limits=SHORT)

    assert (grade.status, grade.points) == ("refused", 0), grade.message
    assert reason in grade.message


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("from minilora.numpy_lora.forward import lora_forward", "lora_forward is imported"),
        ("from minilora.numpy_lora import forward as layer1\nlora_forward = layer1.lora_forward", "own layer1.lora_f"),
        ("from minilora.numpy_lora.forward import lora_forward as f\nlora_forward = f", "it imports minilora"),
        ("import minilora.numpy_lora.forward as m\nlora_forward = m.lora_forward", "it imports minilora"),
        ("from minilora.classroom.exercises import find_exercise\n"
         "lora_forward = find_exercise('03.1').reference", "find_exercise, which this lesson does not give"),
        ("from minilora.classroom.lessons import lesson_module\nlesson = lesson_module('03')\n"
         "lora_forward = lesson.lora_forward", "the course's own lesson.lora_forward"),
        ("from minilora.classroom.lessons import lesson_module\nlesson = lesson_module('03')\n"
         "lora_forward = lesson.FORWARD.bug('B A formed first')", "lesson.FORWARD, which this lesson does not give"),
        ("import peft\nlora_forward = peft.lora", "imports peft"),
    ],
)  # fmt: skip
def test_the_course_s_own_answer_scores_0_and_the_reason_is_told(source: str, reason: str):
    grade = grade_source(source, FORWARD)

    assert (grade.status, grade.points) == ("refused", 0), grade.message
    assert reason in grade.message


def test_the_answer_is_refused_also_where_the_lesson_s_own_cells_import_it():
    source = "from minilora.torch_lora import LoRALinear as Ours\nclass LoRALinear(Ours): pass"
    grade = grade_source(source, lesson_module("04").MODULE)

    assert (grade.status, grade.points) == ("refused", 0)
    assert "it uses the course's own LoRALinear" in grade.message


FAILED = {
    "takes 50 GB": ("return np.ones(50 * 2**30 // 8)", "MemoryError"),
    "takes 50 GB, without NumPy": ("return bytearray(50 * 2**30)", "MemoryError"),
    "takes 50 GB of shared memory": ("import mmap\nm = mmap.mmap(-1, 50 * 2**30)\nreturn 1", "OSError"),
    "leaves politely": ("sys.exit(0)", "SystemExit"),
    "interrupts": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "patches NumPy's comparisons": (
        "np.allclose = np.array_equal = np.all = lambda *a, **k: True\nnp.abs = np.max = lambda a: 0\nreturn x @ W.T",
        "a result that differs",
    ),
    "is equal to everything": (
        "class Yes:\n    __eq__ = lambda self, other: True\n    shape = (5, 7)\nreturn Yes()",
        "returned a Yes, not numbers",
    ),
    "an array that is equal to everything": (
        "class Yes(np.ndarray):\n    __eq__ = __le__ = lambda self, other: np.True_\n"
        "    __sub__ = __rsub__ = lambda self, other: np.zeros(self.shape)\nreturn (x @ W.T).view(Yes)",
        "a result that differs",
    ),
    "an array that cannot be read": (
        "class No:\n    shape = (5, 7)\n    def __array__(self, *a, **k): raise RuntimeError('no')\nreturn No()",
        "returned a No, not numbers",
    ),
    "a number that cannot be read": (
        "class No(float):\n    def __float__(self): raise RuntimeError\n    hex = __float__\nreturn No(3)",
        "has shape (), expected (5, 7)",
    ),
    "objects in an array": ("return np.array([print] * 35).reshape(5, 7)", "not numbers"),
    "a list in itself": ("loop = []\nloop.append(loop)\nreturn loop", "RecursionError"),
    "not a number": ("return np.full((5, 7), np.nan)", "35 values that are NaN or infinite"),
    "fills the disk": ("open('big', 'wb').write(bytes(2**27))", "OSError"),
}


@pytest.mark.parametrize("hostile", FAILED)
def test_what_comes_back_is_judged_by_its_numbers_alone(hostile: str):
    text, words = FAILED[hostile]
    grade = grade_source(body(text), FORWARD)

    assert (grade.status, grade.points) == ("failed", 0), grade.message
    assert words in grade.message


def test_answers_learnt_by_heart_pass_on_the_published_inputs_alone():
    seen = [FORWARD.generate(np.random.default_rng(seed)) for seed in (0, 1, 2)]
    table = {float(case["x"][0, 0]): FORWARD.reference(*case.values()).tolist() for case in seen}
    by_heart = body(f"return np.array({table}[float(x.flat[0])])")
    values_only = dataclasses.replace(FORWARD, properties=())

    assert grade_source(by_heart, values_only).status == "passed"
    assert grade_source(by_heart, values_only, secret=SECRET).status == "failed"


def test_each_exercise_and_each_secret_has_seeds_of_its_own_and_they_repeat():
    assert seeds_of("03.1", "a") == seeds_of("03.1", "a")
    assert not set(seeds_of("03.1", "a")) & set(seeds_of("03.1", "b")) & set(seeds_of("03.2", "a"))
    assert seeds_of("03.1", "a", 5)[:3] == seeds_of("03.1", "a") and seeds_of("03.1", "", 5) == (0, 1, 2)


# ---------------------------------------------------------------------------------------------------------- the process


def arrays_in(value: Any) -> list[np.ndarray]:
    """The arrays inside what was sent."""
    if isinstance(value, np.ndarray):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [array for item in items for array in arrays_in(item)]


def test_the_right_answer_is_never_sent_to_the_learner_s_process(monkeypatch: pytest.MonkeyPatch):
    sent: list[np.ndarray] = []
    send = Sandbox._send

    def noting(self: Sandbox, message: dict[str, Any]) -> None:
        if "inputs" in message:
            sent.extend(arrays_in(sandbox_module.sandboxed.decode(message["inputs"])))
        send(self, message)

    monkeypatch.setattr(Sandbox, "_send", noting)
    for wrong in ("return x @ W.T", RIGHT["einsum"]):
        grade_source(body(wrong), FORWARD, secret=SECRET)
    cases = [FORWARD.generate(np.random.default_rng(seed)) for seed in seeds_of("03.1", SECRET)]
    answers = [FORWARD.reference(*copy.deepcopy(case).values()) for case in cases]

    assert any(np.array_equal(array, cases[0]["x"]) for array in sent)
    assert not any(array.shape == h.shape and np.allclose(array, h) for array in sent for h in answers)


def in_the_process(expression: str) -> Any:
    """What an expression is in a learner's process."""
    source = f"import os, sys, resource, threading\ndef f():\n    return {expression}"
    with Sandbox(own=source) as sandbox:
        return sandbox.function("f")()


def test_the_process_has_a_folder_of_its_own_which_is_gone_afterwards():
    home, here = in_the_process("os.environ['HOME'], os.getcwd()")

    assert Path(home).resolve() == Path(here).resolve() and not Path(home).exists()
    assert not Path(here).is_relative_to(ROOT)


def test_the_process_inherits_nothing_of_the_grader_s_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COURSE_TOKEN", "very secret")

    assert "very secret" not in str(in_the_process("dict(os.environ)"))


def test_the_process_inherits_no_open_file(tmp_path: Path):
    with (tmp_path / "secret.txt").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        links = "[os.path.realpath(f'/proc/self/fd/{each}') for each in os.listdir('/proc/self/fd')]"

        assert "secret.txt" not in str(in_the_process(links))


@pytest.mark.parametrize(
    ("kind", "most"),
    [("CPU", 40), ("AS", 40 * 2**30), ("FSIZE", 64 * 2**20), ("CORE", 0), ("NPROC", 0)],
)
def test_the_process_has_limits_that_it_cannot_raise(kind: str, most: int):
    soft, hard = in_the_process(f"resource.getrlimit(resource.RLIMIT_{kind})")

    assert 0 <= soft == hard <= most


def test_our_package_is_nowhere_in_the_process():
    modules, path, finders = in_the_process("list(sys.modules), sys.path, [str(each) for each in sys.meta_path]")

    assert not [name for name in modules if name.partition(".")[0] in ("minilora", "course", "instrumented")]
    assert str(ROOT) not in path and "editable" not in str(finders)


def test_nothing_runs_on_after_the_grader_has_gone():
    source = "import time\ndef f():\n    time.sleep(1000)"
    with pytest.raises(Stopped), Sandbox(own=source, limits=Limits(clock_seconds=3)) as sandbox:
        pid = sandbox._process.pid
        sandbox.function("f")()

    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_every_kind_of_plain_value_comes_back_as_it_went():
    torch = pytest.importorskip("torch")
    values = [
        None, True, 3, -2.5, float("inf"), 1j, "ü\n", ..., [1, (2, {"a": [3]})], {1: 2, ("k", 1): 3}, np.float32(0.1),
        np.arange(6, dtype=np.int8).reshape(2, 3), np.array([]), np.array(["a", "bc"]), np.arange(12.0).reshape(3, 4).T,
        torch.arange(3), torch.ones(2, 3).bfloat16(), torch.tensor(2.0), torch.zeros(0, 3), torch.float16,
    ]  # fmt: skip
    with Sandbox(own="def f(value):\n    return value", course="import torch") as sandbox:
        for value in values:
            back = sandbox.function("f")(value)

            assert type(back) is type(value)
            if hasattr(value, "dtype"):
                assert back.dtype == value.dtype and back.shape == value.shape and (back == value).all()
            else:
                assert back == value


def test_a_function_among_the_inputs_stays_here_and_is_asked_from_there():
    asked = []

    def measure(r, seed=0):
        asked.append((r, seed))
        if r > 2:
            raise ValueError("too much")
        return r * 10.0, "loss"

    own = "def f(measure, most):\n    return [measure(r, seed=1)[0] for r in range(most)], hasattr(measure, 'planted')"
    measure.planted = 3  # type: ignore[attr-defined]
    with Sandbox(own=own) as sandbox:
        assert sandbox.function("f")(measure, 3) == ([0.0, 10.0, 20.0], False)
        assert asked == [(0, 1), (1, 1), (2, 1)]
        with pytest.raises(RuntimeError, match="ValueError: too much"):
            sandbox.function("f")(measure, 4)


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("x"), np.linalg.LinAlgError("x"), ZeroDivisionError()])
def test_an_exception_over_there_is_one_of_the_same_name_here(error: Exception):
    kind = "np.linalg.LinAlgError" if isinstance(error, np.linalg.LinAlgError) else type(error).__name__
    own = f"import numpy as np\ndef f():\n    raise {kind}('x')"
    with Sandbox(own=own) as sandbox, pytest.raises(Exception) as caught:
        sandbox.function("f")()

    assert type(caught.value).__name__ == type(error).__name__
    assert isinstance(caught.value, next(each for each in type(error).__mro__ if each.__module__ == "builtins"))


def test_a_mistake_in_the_course_s_own_part_is_not_the_learner_s():
    with (
        pytest.raises(sandbox_module.CourseFault, match="no_such_module"),
        Sandbox(own="", course="import no_such_module"),
    ):
        pass


def test_a_refusal_cannot_be_caught_by_an_observer():
    assert not issubclass(Refused, Exception) and not issubclass(Stopped, Exception)


# ----------------------------------------------------------------------------------------------------- the command line


def test_minilora_grade_shows_points_and_ladders_and_a_grade_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = notebook(tmp_path, body("return x @ W.T + (x @ A.T) @ B.T"), minilora={"lesson": "03_lora_in_numpy"})
    secret = tmp_path / "secret"
    secret.write_text("something long\n")

    assert main(["grade", str(path), "--secret-file", str(secret), "--json", str(tmp_path / "grades.json")]) == 0

    shown = capsys.readouterr().out
    assert "03.1  The forward pass           0 of 2  failed" in shown and "looks like  no scaling" in shown
    assert "something long" not in shown
    graded = json.loads((tmp_path / "grades.json").read_text())
    assert (graded["lesson"], graded["points"], graded["most"]) == ("03", 0, 9)
    assert Grade(**graded["exercises"][0]).status == "failed"


def test_the_lesson_is_read_from_the_notebook_or_its_name(tmp_path: Path):
    assert lesson_of(notebook(tmp_path, minilora={"lesson": "09_merge"})) == "09"
    assert lesson_of(notebook(tmp_path).rename(tmp_path / "03_mine.ipynb")) == "03"
    with pytest.raises(ValueError, match="name it with --lesson"):
        lesson_of(notebook(tmp_path))


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nowhere.ipynb"], "nowhere.ipynb: No such file or directory"),
        (["noise.ipynb"], "noise.ipynb is not a notebook in Jupyter's format 4"),
        (["submission.ipynb", "--lesson", "77"], "no lesson '77' has exercises; the lessons are"),
        (["submission.ipynb"], "submission.ipynb does not say which lesson it is"),
        (["submission.ipynb", "--lesson", "03", "--secret-file", "empty"], "empty is empty: write a long random line"),
        (["submission.ipynb", "--lesson", "03", "--seconds", "0"], "--seconds is 0: it must be above 0"),
    ],
    ids=str,
)
def test_what_cannot_be_graded_is_told_in_one_line(
    words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("MINILORA_LESSONS", str(lessons_folder()))
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path)
    (tmp_path / "noise.ipynb").write_text("[1, 2]")
    (tmp_path / "empty").write_text("\n")

    assert main(["grade", *words]) == 2
    assert capsys.readouterr().err.startswith(f"minilora: {line}")


def test_the_name_that_an_exercise_asks_for_is_that_of_its_stub():
    for lesson in LESSONS:
        text = (lessons_folder() / lesson / "lesson.py").read_text(encoding="utf-8")
        for exercise in lesson_module(lesson[:2]).EXERCISES:
            assert f'check("{exercise.id}", {asked_name(exercise)})' in text
