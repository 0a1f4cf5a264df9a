"""The options of `minilora train`: what there is to say about data, method, steps and measuring.

A default of None is the method's own, which train/methods knows. These lie here, and not in train/, so that `--help`
waits for no heavy import. Read before this file: llm/method_options.
"""

import argparse

from minilora.llm.method_options import AGAIN_HELP, DTYPE_HELP, add_method_options

METHODS_HELP = """methods:
  lora      B A beside every linear layer                              --lr 2e-4
  dora      LoRA for the direction of each row, its length apart       --lr 2e-4
  qlora     LoRA over weights in 4 bits                                --lr 2e-4
  adalora   LoRA whose layers compete for rank                         --lr 1e-3
  pissa     LoRA that begins at the weights' largest directions        --lr 2e-4
  olora     LoRA that begins at orthonormal directions of the weights  --lr 2e-4
  loftq     LoRA over 4 bits that begins with what rounding took       --lr 2e-4
  ia3       a factor for each key, value and input of down_proj        --lr 1e-2
  houlsby   two small layers after attention and after the MLP         --lr 1e-3
  prefix    learned keys and values before every text                  --lr 1e-2
  prompt    learned embeddings before every text                       --lr 3e-2
  galore    all weights, with moments of projected gradients           --lr 1e-3
  full      all weights                                                --lr 2e-5"""


def add_train_arguments(parser: argparse.ArgumentParser, data_help: str) -> None:
    """Declare the options, in place; the parser's epilog tells of the methods as well."""
    parser.epilog = "\n\n".join(filter(None, [METHODS_HELP, parser.epilog]))
    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="FILE", help=data_help)
    add("--out", required=True, metavar="FOLDER", help="for the adapter, checkpoints, and metrics.jsonl")
    add("--base", default="smollm2-135m", metavar="MODEL", help="a name, or a folder (default %(default)s)")
    add("--max-tokens", type=int, metavar="N", help="drop longer samples, and say which")
    _add_method(parser)
    _add_steps(parser)
    _add_measuring(parser)


def _add_steps(parser: argparse.ArgumentParser) -> None:
    """How it is trained."""
    add = parser.add_argument_group("steps").add_argument
    add("--lr", type=float, metavar="RATE", help="learning rate (default 2e-4 for lora and its kin; see each method)")
    add(
        "--schedule",
        choices=("linear", "cosine", "constant"),
        default="linear",
        help="of the rate, after the warm-up (default %(default)s)",
    )
    add("--warmup", type=float, default=0.1, metavar="SHARE", help="of the steps (default %(default)s)")
    add(
        "--weight-decay",
        type=float,
        default=0.0,
        metavar="W",
        help="AdamW's (default %(default)s), of what trains but dora's lengths; not with ia3, pissa, olora, loftq, "
        "which begin where zero is not",
    )
    add("--max-grad-norm", type=float, default=1.0, metavar="N", help="gradients are clipped to it (default 1)")
    add("--epochs", type=int, default=1, metavar="N", help="times every sample is seen (default %(default)s)")
    add("--batch", type=int, default=8, metavar="N", help="samples a step (default %(default)s)")
    add("--pack", type=int, metavar="TOKENS", help="several samples in a row of so many tokens; --batch counts rows")
    add("--accumulate", type=int, default=1, metavar="N", help="take a batch in N parts, in their memory (default 1)")
    add("--dtype", choices=("bf16", "fp32"), help=DTYPE_HELP)
    add(
        "--optimizer",
        choices=("adamw", "adamw-8bit"),
        default="adamw",
        help="its moments in 32 bits (default), or in 8",
    )
    add("--checkpointing", action="store_true", help=AGAIN_HELP)
    add(
        "--parallel",
        choices=("ddp", "fsdp"),
        help="under torchrun: whole weights in each process (default), or sharded",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the order and the adapter's start (default %(default)s)")
    add("--save-every", type=int, default=50, metavar="N", help="steps from checkpoint to checkpoint (default 50)")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """When it is measured, and when it ends early."""
    add = parser.add_argument_group("measuring").add_argument
    add(
        "--eval-data",
        metavar="FILE",
        help="JSONL of samples to measure on, what was gained and forgotten; the best is kept in best/",
    )
    add("--eval-every", type=int, metavar="N", help="steps from measurement to measurement (default 50)")
    add("--patience", type=int, metavar="N", help="stop after N measurements without a lower loss")
    add("--max-forgetting", type=float, metavar="NATS", help="stop when the loss on plain English rose by so much")


def _add_method(parser: argparse.ArgumentParser) -> None:
    """What is trained; a default of None is the method's own."""
    add = parser.add_argument_group("method").add_argument
    names = [line.split()[0] for line in METHODS_HELP.splitlines()[1:]]
    add("--method", choices=names, default="lora", metavar="NAME", help="one of those below (default %(default)s)")
    add_method_options(add)
    add("--alpha", type=float, metavar="A", help="the update is scaled by alpha / r (default 2 r)")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r) instead: rsLoRA")
    add("--dropout", type=float, default=0.0, metavar="P", help="of LoRA's input (default %(default)s)")
    add("--loraplus-ratio", type=float, metavar="X", help="B learns X times as fast as A: LoRA+ (its paper: 16)")
    add(
        "--words",
        metavar="TEXT",
        help="prefix and prompt begin as these words, a virtual token each; else at random, prefix then far off",
    )
    add("--refresh", type=int, metavar="N", help="steps from one of galore's projections to the next (default 200)")
    add("--galore-scale", type=float, metavar="X", help="of galore's steps (default 0.25)")
