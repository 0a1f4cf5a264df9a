"""The command line as a user meets it."""

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest

from minilora import __version__, cli
from minilora.cli import COMMANDS, Command, main

HEAVY = ("numpy", "torch", "numba", "matplotlib", "jaxtyping", "tqdm", "minilora.llm", "minilora.classroom")


def minilora(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with nothing imported yet."""
    return subprocess.run(
        [sys.executable, "-m", "minilora.cli", *words],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        check=False,
    )


def failing_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make `minilora doctor` raise."""

    def run(args: object) -> int:
        raise error

    monkeypatch.setitem(COMMANDS, "doctor", Command("fails", "minilora doctor", lambda parser: None, run))
    monkeypatch.delenv("MINILORA_TRACEBACK", raising=False)


# --- help ---------------------------------------------------------------------------------------------------------


def imported_by(statement: str, modules: tuple[str, ...]) -> list[str]:
    code = f"import sys\n{statement}\nprint([m for m in {modules!r} if m in sys.modules], file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return eval(result.stderr.splitlines()[-1])


def test_help_waits_for_no_import():
    assert imported_by("from minilora.cli import main; main(['--help'])", HEAVY) == []


def test_size_waits_for_no_heavy_import():
    assert imported_by("from minilora.cli import main; main(['size', 'gpt2'])", ("numpy", "torch", "numba")) == []


def test_the_help_of_every_command_waits_for_no_heavy_import():
    for name in COMMANDS:
        statement = f"from minilora.cli import main\ntry: main(['{name}', '--help'])\nexcept SystemExit: pass"
        assert imported_by(statement, ("numpy", "torch", "numba")) == [], name


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_teaches_every_command_with_an_example(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in text
        assert f"$ minilora {name}" in text
        assert command.does in text
    assert max(len(line) for line in text.splitlines()) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_command_line_that_is_understood(name, monkeypatch):
    asked = []
    command = COMMANDS[name]

    def run(args: object) -> int:
        asked.append(args)
        return 0

    monkeypatch.setitem(COMMANDS, name, Command(command.does, command.example, command.add_arguments, run))
    program, *words = command.example.split()
    assert program == "minilora"
    assert main(words) == 0
    assert len(asked) == 1


def test_the_version_is_the_package_s(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"minilora {__version__}\n"


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["siz"], "no command is named 'siz'; did you mean size?"),
        (
            ["xyzzy"],
            "no command is named 'xyzzy'; the commands are demo, check, train, resume, eval, chat, merge, export,",
        ),
        (
            ["size", "gpt2", "--rank", "3"],
            "unrecognized arguments: --rank 3: did you mean --r?; `minilora size --help` tells the options",
        ),
        (
            ["size", "gpt2", "-r", "many"],
            "argument -r/--r: invalid int value: 'many'; `minilora size --help` tells the options",
        ),
        (["size", "gpt2", "-r", "0"], "r is 0: it must be 1 or more"),
        (["size", "gpt2", "--targets", "c_atn"], "no module is named ['c_atn']; this architecture's targets are"),
        (["size", "gtp2"], "no architecture is named 'gtp2', and there is no such config.json: did you mean gpt2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"minilora: {message}")
    assert err.count("\n") == 1
    assert out == ""


def test_a_mistake_in_a_process_of_its_own_shows_no_traceback():
    result = minilora("size", "gtp2", MINILORA_TRACEBACK="0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("minilora: no architecture is named 'gtp2'")
    assert "Traceback" not in result.stderr


def test_the_traceback_is_there_for_who_asks():
    assert "Traceback" in minilora("size", "gtp2", "--traceback").stderr
    assert "Traceback" in minilora("size", "gtp2", MINILORA_TRACEBACK="1").stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "adapter/x"),
            "minilora: adapter/x: No such file or directory",
        ),
        (OSError("the disk is full"), "minilora: the disk is full"),
        (RuntimeError("pip could not download it"), "minilora: pip could not download it"),
        (FloatingPointError("the loss is nan"), "minilora: the loss is nan"),
        (
            ModuleNotFoundError("No module named 'x'"),
            "minilora: No module named 'x'; `minilora doctor` tells what to install",
        ),
        (ValueError(), "minilora: ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_ours_are_told_without_a_traceback(monkeypatch, capsys, error, line):
    failing_with(monkeypatch, error)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == f"{line}\n"


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    failing_with(monkeypatch, TypeError("unsupported operand"))
    with pytest.raises(TypeError):
        main(["doctor"])


def test_ctrl_c_ends_with_130_and_a_line(monkeypatch, capsys):
    failing_with(monkeypatch, KeyboardInterrupt())
    assert main(["doctor"]) == 128 + signal.SIGINT == 130
    assert capsys.readouterr().err == "\nminilora: stopped by Ctrl-C\n"


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_nobody_reading_on_is_no_error(unbuffered):
    command = f"{sys.executable} -m minilora.cli size --list | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        check=False,
    )
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, "")


def test_a_terminal_that_knows_only_ascii_is_served():
    result = minilora("size", "gpt2", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "768 ? 768" in result.stdout


# --- what the commands are given ----------------------------------------------------------------------------------


def test_demo_hands_its_options_on(monkeypatch):
    seen = []

    def demo(args: object) -> int:
        seen.append(vars(args))
        return 0

    monkeypatch.setitem(COMMANDS, "demo", Command("listens", "minilora demo", cli._demo_arguments, demo))
    words = "--method lora --steps 3 --r 4 --lr 0.001 --seed 5 --n-eval 6 --out runs/x --json x.json"
    assert main(["demo", *words.split()]) == 0
    assert seen == [
        {
            "method": "lora",
            "steps": 3,
            "r": 4,
            "lr": 0.001,
            "seed": 5,
            "n_eval": 6,
            "out": "runs/x",
            "json": "x.json",
        }
    ]


def test_doctor_prints_its_findings(capsys, monkeypatch):
    monkeypatch.setattr("minilora.doctor.SPEED_SECONDS", 0.01)
    assert main(["doctor"]) in (0, 1)
    assert "  ok  Python " in capsys.readouterr().out


def test_the_defaults_that_demo_s_help_tells_are_the_demo_s():
    from minilora.classroom.demo import Settings

    parser = argparse.ArgumentParser()
    cli._demo_arguments(parser)
    told = {
        option.dest: option.help.rpartition("(default ")[2].rstrip(")")
        for option in parser._actions
        if option.help is not None and "(default " in option.help
    }
    own = {name: str(value) for name, value in asdict(Settings()).items()}
    assert told == {name: own[name] for name in told}
