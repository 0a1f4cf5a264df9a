"""The options that say how large it is what a method trains: the same in `minilora train` and in `minilora size`.

A default of None is the method's own: setup has it. No torch here, so that `--help` waits for none.

Read before this file: setup.
"""

from collections.abc import Callable

FLAGS = {
    "r": "--r", "start_r": "--start-r", "targets": "--targets", "bottleneck": "--bottleneck",
    "n_virtual": "--virtual-tokens", "mlp_features": "--prefix-mlp",
}  # fmt: skip
DTYPE_HELP = "of the weights (default bf16; fp32 where all of them train)"
AGAIN_HELP = "keep the input of each layer, compute the layer again (not with prefix)"


def add_method_options(add: Callable[..., object]) -> None:
    """Declare the options, in place, by a parser's add_argument."""
    add("-r", "--r", type=int, metavar="RANK", help="of LoRA and its kin (default 16), of galore's projection (128)")
    add("--start-r", type=int, metavar="RANK", help="adalora's at the start; -r is the mean at the end (default 1.5 r)")
    add("--targets", metavar="NAMES", help="modules under LoRA, such as q_proj,v_proj (default all-linear)")
    add("--bottleneck", type=int, metavar="N", help="features of houlsby's small layers (default 64)")
    add("--virtual-tokens", type=int, metavar="N", help="of prefix and prompt (default 20)")
    add("--prefix-mlp", type=int, metavar="N", help="make prefix's keys and values by an MLP of N features")
