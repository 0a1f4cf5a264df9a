"""`minilora size`: its options, and what it prints of them. Read before this file: method_options, size_report."""

import argparse
import json
from collections.abc import Collection, Sequence

from minilora.llm.architectures import ALL_LINEAR, find_architecture
from minilora.llm.method_options import AGAIN_HELP, DTYPE_HELP, FLAGS, add_method_options
from minilora.llm.setup import METHODS, USED_BY, Setup
from minilora.llm.size_report import COMPARED, list_report, size_numbers, size_report
from minilora.llm.sizes import DTYPE_BYTES, OPTIMIZERS


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `minilora size`, in place."""
    add = parser.add_argument
    add("model", nargs="?", help="a name (--list shows them), a config.json, or the folder of one")
    add("--list", action="store_true", help="the architectures that are known by name")
    add(
        "--method",
        metavar="NAMES",
        help=f"how it is trained: one of {', '.join(METHODS)}; or several with commas (default {','.join(COMPARED)})",
    )
    add_method_options(add)
    add("--dtype", choices=DTYPE_BYTES, help=DTYPE_HELP)
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="(default %(default)s; galore is one itself)")
    add("--batch", type=int, default=1, metavar="N", help="sequences (default %(default)s)")
    add("--seq", type=int, default=512, metavar="TOKENS", help="of each (default %(default)s)")
    add("--checkpointing", action="store_true", help=AGAIN_HELP)
    add("--no-master-weights", action="store_true", help="full: training in 16 bits without an fp32 copy")
    add("--json", action="store_true", help="the same numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what the options ask for.

    Raises:
        ValueError: if there is no such model, method or target, or no method that is asked for has a use for an option.
    """
    if args.list:
        print(list_report())
        return 0
    if args.model is None:
        raise ValueError("which model? Give a name or a config.json; `minilora size --list` shows the names")
    arch = find_architecture(args.model)
    setups = setups_of(args, COMPARED if args.method is None else _names(args.method))
    if args.json:
        print(json.dumps(size_numbers(args.model, arch, setups), indent=2))
    else:
        print(size_report(args.model, arch, setups))
    return 0


def setups_of(args: argparse.Namespace, methods: Sequence[str]) -> list[Setup]:
    """The options, for each of these methods; what was not given is the method's own.

    Raises:
        ValueError: if one is impossible, or none of the methods has a use for it.
    """
    given = {
        "r": args.r,
        "start_r": args.start_r,
        "targets": None if args.targets in (None, ALL_LINEAR) else tuple(_names(args.targets)),
        "bottleneck": args.bottleneck,
        "n_virtual": args.virtual_tokens,
        "mlp_features": args.prefix_mlp,
        "master_weights": False if args.no_master_weights else None,
        "dtype": args.dtype,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    run = {"optimizer": args.optimizer, "batch": args.batch, "seq": args.seq, "checkpointing": args.checkpointing}
    setups = [Setup(method=method, **asked, **run) for method in methods]
    _refuse_useless(setups, asked)
    return setups


def _names(text: str) -> list[str]:
    """What stands between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _refuse_useless(setups: Sequence[Setup], asked: Collection[str]) -> None:
    methods = [setup.method for setup in setups]
    for setting, users in USED_BY.items():
        if setting in asked and not set(methods) & set(users):
            option = FLAGS.get(setting, "--no-master-weights")
            raise ValueError(f"{option} does nothing for {', '.join(methods)}: it is an option of {', '.join(users)}")
    if "master_weights" in asked and all(setup.width_bytes == 4 for setup in setups if setup.method == "full"):
        raise ValueError("--no-master-weights does nothing in fp32, where there is no copy: give --dtype bf16")
