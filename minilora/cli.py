"""The command line: `minilora COMMAND`.

Thin: a row of `COMMANDS` for each command, whose two functions import what they need when they are called. So
`minilora --help` waits for nothing, not even NumPy.

What a user can cause ends in one line that begins with "minilora: " and exit code 2; `--traceback`, or
MINILORA_TRACEBACK=1, shows where it came from. Ctrl-C ends with 130.
"""

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NoReturn, TextIO

from minilora import __version__

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 130, 141


@dataclass(frozen=True)
class Command:
    """What a command does, an example of it, its options, and the function that runs it and returns the exit code."""

    does: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    """What is not given is left to the demo; a test compares the defaults that are told here with its own."""
    parser.add_argument("--method", choices=("qlora", "lora"), help="over 4 bits or over bf16 (default qlora)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the optimizer (default 64)")
    parser.add_argument("-r", "--r", type=int, metavar="RANK", help="rank of the adapter (default 16)")
    parser.add_argument("--lr", type=float, metavar="RATE", help="learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the data and of the adapter's start (default 0)")
    parser.add_argument("--n-eval", type=int, metavar="N", help="unseen sentences to answer (default 200)")
    parser.add_argument("--out", metavar="FOLDER", help="for the adapter and the report (default runs/demo)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here too")


def _demo(args: argparse.Namespace) -> int:
    from minilora.classroom.demo import main_from_args

    return main_from_args(args)


DATA_HELP = 'JSONL; a line has "messages", "prompt" and "completion", or "instruction", "input" and "output"'


def _add_template(parser: argparse.ArgumentParser, its_own: str = "its own") -> None:
    names = ("model", "chatml", "alpaca", "plain")
    told = f"how conversations are written down (default: {its_own})"
    parser.add_argument("--template", choices=names, default="model", help=told)


def _add_adapter(parser: argparse.ArgumentParser, *, required: bool = False, without: str = "") -> None:
    """The options of a base with an adapter on it, which train/adapted opens."""
    add = parser.add_argument
    add("--adapter", metavar="FOLDER", required=required, help=f"in PEFT's layout{without}")
    add("--base", default="smollm2-135m", metavar="MODEL", help="a name, or a folder (default %(default)s)")
    told = "what the adapter was trained over: the weights, or 4 bits (default: as its file says, else lora)"
    add("--method", choices=("lora", "qlora"), help=told)
    _add_template(parser, "the adapter's, else the model's")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("data", help=DATA_HELP)
    add("--against", metavar="FILE", help="test data, whose questions should not be in it")
    add(
        "--base",
        default="smollm2-135m",
        metavar="MODEL",
        help="whose tokenizer, and whose length (default %(default)s)",
    )
    _add_template(parser)
    add("--max-tokens", type=int, metavar="N", help="longer samples are a problem (default: the model's length)")
    add(
        "--show", type=int, nargs="+", metavar="LINE", help="show these lines token by token: what is learnt stands out"
    )


def _check(args: argparse.Namespace) -> int:
    from minilora.train.check import run

    return run(args, color=sys.stdout.isatty() and "NO_COLOR" not in os.environ)


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    from minilora.train_options import add_train_arguments

    add_train_arguments(parser, DATA_HELP)
    _add_template(parser)


def _train(args: argparse.Namespace) -> int:
    from minilora.doctor import memory_bytes
    from minilora.train.command import run

    _, free = memory_bytes()
    try:
        code = run(args, free)
    except FloatingPointError:  # the picture shows where it went wrong
        _draw(args.out)
        raise
    _draw(args.out)
    return code


def _draw(folder: str) -> None:
    """Leave a picture of a training beside its metrics, where matplotlib is installed."""
    from pathlib import Path

    if os.environ.get("RANK", "0") != "0":  # of several processes one draws
        return
    try:
        from minilora.classroom.training_curve import draw
    except ImportError as error:
        print(f"no picture of it: {error}")
        return
    picture = draw(Path(folder))
    if picture is not None:
        print(f"picture  {picture}")


def _resume_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="the --out of a training that was stopped or killed")


def _resume(args: argparse.Namespace) -> int:
    from pathlib import Path

    from minilora.doctor import memory_bytes
    from minilora.train.command import run, words_of

    parser = Parser(prog="minilora train", allow_abbrev=False)
    _train_arguments(parser)
    _, free = memory_bytes()
    code = run(parser.parse_args(words_of(Path(args.folder))), free, resume=True)
    _draw(args.folder)
    return code


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help=DATA_HELP)
    _add_adapter(parser, without="; without it the base alone is measured")
    add("--json", metavar="FILE", help="write the numbers here too")


def _eval(args: argparse.Namespace) -> int:
    from minilora.train.compare import run

    return run(args)


def _chat_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("question", nargs="?", help="answer this alone; without it a conversation begins")
    _add_adapter(parser)
    add("--system", metavar="TEXT", help="what the model is told first")
    add("--input", metavar="TEXT", help="what each question is about: Alpaca's input, else below the question")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default %(default)s)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens alone (default 1)")
    add("--seed", type=int, metavar="N", help="of the drawing")


def _chat(args: argparse.Namespace) -> int:
    from minilora.train.chat import run

    return run(args)


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_adapter(parser, required=True)
    add("--out", required=True, metavar="FOLDER", help="for the model, in Hugging Face's layout")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the merged weights (default %(default)s)")


def _merge(args: argparse.Namespace) -> int:
    from minilora.train.merge import run

    return run(args)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    kinds = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "adapter")
    add("--out", required=True, metavar="FILE", help="the .gguf file to write")
    _add_adapter(parser, without="; without it the base alone is written")
    add(
        "--kind",
        choices=kinds,
        type=lambda text: next((kind for kind in kinds if kind.lower() == text.lower()), text),
        default="F16",
        help="of the merged weights; or the adapter alone (default %(default)s)",
    )


def _export(args: argparse.Namespace) -> int:
    from minilora.train.export import run

    return run(args)


def _size_arguments(parser: argparse.ArgumentParser) -> None:
    from minilora.llm.size_command import add_size_arguments

    add_size_arguments(parser)


def _size(args: argparse.Namespace) -> int:
    from minilora.llm.size_command import run

    return run(args)


def _grade_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("notebook", help="a learner's .ipynb; only its text is read, not what a kernel made of it")
    add("--lesson", metavar="NN", help="such as 03 (default: as the notebook says, else as its name begins)")
    told = "its text draws the inputs, so that no answer can be made for the published ones"
    add("--secret-file", metavar="FILE", help=told)
    add("--seconds", type=float, default=30.0, metavar="S", help="of the processor, an exercise (default %(default)g)")
    add("--json", metavar="FILE", help="write the grades here too")


def _grade(args: argparse.Namespace) -> int:
    from minilora.classroom.grading import run

    return run(args)


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def _progress(args: argparse.Namespace) -> int:
    from minilora.classroom.progress_report import run

    return run()


def _doctor(args: argparse.Namespace) -> int:
    from minilora.doctor import run

    return run()


COMMANDS = {
    "demo": Command(
        does="teach a real 135M-parameter model a task, and show what changed",
        example="minilora demo --method lora --out runs/first",
        add_arguments=_demo_arguments,
        run=_demo,
    ),
    "check": Command(
        does="look at training data: lengths, duplicates, leaks, and which tokens are learnt",
        example="minilora check samples.jsonl --against test.jsonl --show 1",
        add_arguments=_check_arguments,
        run=_check,
    ),
    "train": Command(
        does="fine-tune a model on your own samples, if the memory is there",
        example="minilora train --data samples.jsonl --out runs/mine --method qlora",
        add_arguments=_train_arguments,
        run=_train,
    ),
    "resume": Command(
        does="go on with a training that was stopped or killed, to the same bits",
        example="minilora resume runs/mine",
        add_arguments=_resume_arguments,
        run=_resume,
    ),
    "eval": Command(
        does="a base and its adapter side by side: loss, exact answers, what was forgotten",
        example="minilora eval --data test.jsonl --adapter runs/mine",
        add_arguments=_eval_arguments,
        run=_eval,
    ),
    "chat": Command(
        does="talk with a model, and with what an adapter made of it",
        example="minilora chat --adapter runs/mine",
        add_arguments=_chat_arguments,
        run=_chat,
    ),
    "merge": Command(
        does="fold an adapter into its base: a model folder, and what rounding took",
        example="minilora merge --adapter runs/mine --out runs/merged",
        add_arguments=_merge_arguments,
        run=_merge,
    ),
    "export": Command(
        does="a GGUF file for llama.cpp: the merged model, or the adapter alone",
        example="minilora export --adapter runs/mine --out mine.gguf --kind Q8_0",
        add_arguments=_export_arguments,
        run=_export,
    ),
    "size": Command(
        does="parameters, adapter file and training memory of a model, without its weights",
        example="minilora size llama-2-7b --targets all-linear -r 16",
        add_arguments=_size_arguments,
        run=_size,
    ),
    "progress": Command(
        does="which exercises of the course you have done; the file is on this machine alone",
        example="minilora progress",
        add_arguments=_no_arguments,
        run=_progress,
    ),
    "grade": Command(
        does="grade a lesson's exercises from a notebook's file, each in a process of its own",
        example="minilora grade student/03_lora_in_numpy.ipynb --secret-file course.secret",
        add_arguments=_grade_arguments,
        run=_grade,
    ),
    "doctor": Command(
        does="what this machine has, and what to do about what it has not",
        example="minilora doctor",
        add_arguments=_no_arguments,
        run=_doctor,
    ),
}


OTHERS_NAMES = {  # what other programs call these options
    "--learning-rate": "--lr", "--rank": "--r", "--lora-r": "--r", "--lora-alpha": "--alpha", "--model": "--base",
    "--batch-size": "--batch", "--num-epochs": "--epochs", "--num-train-epochs": "--epochs", "--output": "--out",
    "--output-dir": "--out", "--gradient-accumulation-steps": "--accumulate", "--lora-dropout": "--dropout",
    "--max-length": "--max-tokens", "--target-modules": "--targets", "--gradient-checkpointing": "--checkpointing",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are errors like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}{self._meant(message)}; `{self.prog} --help` tells the options")

    def _meant(self, message: str) -> str:
        """What an option that is not there was meant for, if one has a like name."""
        unknown = message.removeprefix("unrecognized arguments: ").split()[0].partition("=")[0]
        if unknown == message.split()[0].partition("=")[0] or not unknown.startswith("--"):
            return ""
        names = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        near = [OTHERS_NAMES[unknown]] if unknown in OTHERS_NAMES else get_close_matches(unknown, names, n=1)
        return f": did you mean {near[0]}?" if near and near[0] in names else ""


def help_text() -> str:
    """What `minilora --help` prints."""
    lines = [f"minilora {__version__}: LoRA built from nothing in three layers, on a real language model", ""]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10}{command.does}", f"  {'':<10}$ {command.example}", ""]
    return "\n".join(
        [
            *lines,
            "minilora COMMAND --help tells the options of a command.",
            "--traceback shows where an error came from. --version tells the version.",
        ]
    )


def run_command(words: Sequence[str]) -> int:
    """Run the command that the words of a command line ask for, and return its exit code.

    Raises:
        ValueError: if there is no such command or option; else what the command raises.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] == "--version":
        print(f"minilora {__version__}")
        return 0
    name = words[0]
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"no command is named {name!r}; {hint}")
    command = COMMANDS[name]
    parser = Parser(
        prog=f"minilora {name}",
        description=f"{command.does[0].upper()}{command.does[1:]}.",
        epilog=f"example: {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_arguments(parser)
    return command.run(parser.parse_args(words[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (the process's own by default); the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    wants_traceback = "--traceback" in words or os.environ.get("MINILORA_TRACEBACK", "0") not in ("", "0")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "→" shows "?" and nothing fails
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _note
            code = run_command([word for word in words if word != "--traceback"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("\nminilora: stopped by Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # as in `minilora size --list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError, ArithmeticError) as error:
        if wants_traceback:
            raise
        print(f"minilora: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR


def _note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as a line for whoever typed the command: where in the source it was made helps nobody there."""
    print(f"minilora: note: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"{error}; `minilora doctor` tells what to install"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
