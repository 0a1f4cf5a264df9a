"""`minilora size`: its options, and what it prints of them. Read before this file: setup, size_report."""

import argparse
import json
from dataclasses import replace

from minilora.llm.architectures import ALL_LINEAR, find_architecture
from minilora.llm.setup import LOW_RANK, METHODS, VIRTUAL, Setup
from minilora.llm.size_report import COMPARED, list_report, size_numbers, size_report
from minilora.llm.sizes import DTYPE_BYTES, OPTIMIZERS

USUAL = Setup()
USED_BY = {  # options that some methods alone have a use for
    "r": (*LOW_RANK, "galore"),
    "targets": LOW_RANK,
    "bottleneck": ("houlsby",),
    "n_virtual": VIRTUAL,
    "mlp_features": ("prefix",),
    "master_weights": ("full",),
}
SPELLED = {"master_weights": "no-master-weights", "n_virtual": "virtual-tokens", "mlp_features": "prefix-mlp"}


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
    add(
        "-r", "--r", type=int, default=USUAL.r, metavar="RANK",
        help="of A and B, of adalora at the start; of galore's projection (default %(default)s)",
    )  # fmt: skip
    add(
        "--targets", default=ALL_LINEAR, metavar="NAMES",
        help="the matrices beside which A and B stand, such as q_proj,v_proj (default %(default)s); "
        "ia3 and houlsby have their own, prefix and prompt none",
    )  # fmt: skip
    add(
        "--bottleneck", type=int, default=USUAL.bottleneck, metavar="N",
        help="houlsby: numbers in the middle of an adapter (default %(default)s)",
    )  # fmt: skip
    add(
        "--virtual-tokens", dest="n_virtual", type=int, default=USUAL.n_virtual, metavar="TOKENS",
        help="prefix, prompt: learned tokens before the text (default %(default)s)",
    )  # fmt: skip
    add(
        "--prefix-mlp",
        dest="mlp_features",
        type=int,
        metavar="N",
        help="prefix: width of a network that makes it (default: none)",
    )
    add("--dtype", choices=DTYPE_BYTES, default=USUAL.dtype, help="of the weights (default %(default)s)")
    add("--optimizer", choices=OPTIMIZERS, default=USUAL.optimizer, help="(default %(default)s; galore is one itself)")
    add("--batch", type=int, default=USUAL.batch, metavar="N", help="sequences (default %(default)s)")
    add("--seq", type=int, default=USUAL.seq, metavar="TOKENS", help="of each (default %(default)s)")
    add(
        "--checkpointing",
        action="store_true",
        help="keep the input of each layer, compute it again (not with prefix)",
    )
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
    methods = COMPARED if args.method is None else tuple(_names(args.method))
    setups = [replace(setup_of(args), method=method) for method in methods]
    _refuse_useless(setups)
    if args.json:
        print(json.dumps(size_numbers(args.model, arch, setups), indent=2))
    else:
        print(size_report(args.model, arch, setups))
    return 0


def setup_of(args: argparse.Namespace) -> Setup:
    """The options, of whatever method."""
    return Setup(
        r=args.r,
        targets=ALL_LINEAR if args.targets == ALL_LINEAR else tuple(_names(args.targets)),
        bottleneck=args.bottleneck,
        n_virtual=args.n_virtual,
        mlp_features=args.mlp_features,
        dtype=args.dtype,
        optimizer=args.optimizer,
        batch=args.batch,
        seq=args.seq,
        checkpointing=args.checkpointing,
        master_weights=not args.no_master_weights,
    )


def _names(text: str) -> list[str]:
    """What stands between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _refuse_useless(setups: list[Setup]) -> None:
    asked = [setup.method for setup in setups]
    for setting, methods in USED_BY.items():
        if getattr(setups[0], setting) != getattr(USUAL, setting) and not set(asked) & set(methods):
            option = SPELLED.get(setting, setting)
            raise ValueError(f"--{option} does nothing for {', '.join(asked)}: it is an option of {', '.join(methods)}")
