"""Will a run fit into memory? Asked before anything is loaded, and answered with what would fit.

What a run needs is counted, not tried: llm/training_memory, within a tenth of what tensors really take. A process that
asks for more than there is does not get an error on most systems: it is killed, some minutes into its work.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from minilora.llm.architectures import Architecture
from minilora.llm.setup import LOW_RANK, Setup
from minilora.llm.sizes import base_params, weight_bytes
from minilora.llm.training_memory import MARGIN, training_bytes

MOST_WAYS = 3  # that are told
GIB = 2**30


def bytes_needed(arch: Architecture, setup: Setup) -> int:
    """Bytes to have free for a run: those of a step, or of loading where these are more (a short QLoRA run), or saving.

    To the sum of training_bytes comes a tenth for what is an estimate in it. While a model turns into 4 bits, the
    weights that it was loaded with are still there.
    """
    loading = base_params(arch) * setup.width_bytes
    if setup.is_in_4_bits:
        loading += weight_bytes(arch, setup.weights_dtype, in_4_bits=True)
    return max(int(MARGIN * training_bytes(arch, setup).total), loading, bytes_to_save(arch, setup))


def bytes_to_save(arch: Architecture, setup: Setup) -> int:
    """Bytes that are there while a checkpoint is written: no gradients any more, and a copy of AdamW's moments.

    They lie in pieces in AdamW's pages, and whole in a file. To go on from a file takes less: its tensors are pages of
    the file itself, which the system drops where memory is short.
    """
    used = training_bytes(arch, setup)
    return used.weights + used.adapter + used.master + used.optimizer * (1 if setup.method == "galore" else 2)


def check_fits(
    arch: Architecture, setup: Setup, free_bytes: int, longest: str = "a sample", rows: int | None = None
) -> None:
    """Refuse a run that needs more memory than is free; `longest` is what the error calls the longest sample.

    A step is taken on `rows` samples, of which setup.batch go through the model at a time; if not given, all do.

    Raises:
        MemoryError: with what it needs, what is free, and the changes that would make it fit, fewest changes first.
    """
    needed = bytes_needed(arch, setup)
    if needed <= free_bytes:
        return
    ways = sorted(
        ((options, bytes_needed(arch, other)) for options, other in smaller(setup, rows)), key=lambda w: len(w[0])
    )
    fitting = [(options, taken) for options, taken in ways if taken <= free_bytes][:MOST_WAYS]
    head = f"this run needs {needed / GIB:.2f} GiB and {free_bytes / GIB:.2f} are free"
    if not fitting:
        least = min([needed, *(taken for _, taken in ways)])
        raise MemoryError(
            f"{head}; with every option that saves memory it is {least / GIB:.2f}: choose a smaller model, "
            f"shorten the samples (the longest, {longest}, has {setup.seq:,} tokens), or close other programs"
        )
    lines = [f"  {' '.join(options):<50}{taken / GIB:>6.2f} GiB" for options, taken in fitting]
    raise MemoryError("\n".join([f"{head}; what would fit:", *lines]))


def smaller(setup: Setup, rows: int | None = None) -> Iterator[tuple[list[str], Setup]]:
    """Every setup that takes less by one option of `minilora train` or more, with those options.

    Fewer samples at a time are no smaller batch: it is taken in parts.
    """
    batches = [setup.batch // 2**halvings for halvings in range(setup.batch.bit_length())]
    has_4_bit_twin = setup.trains_all or (setup.method in LOW_RANK and not setup.is_in_4_bits)
    methods = [setup.method, "qlora"] if has_4_bit_twin else [setup.method]
    optimizers = [setup.optimizer] if setup.optimizer == "adamw-8bit" else [setup.optimizer, "adamw-8bit"]
    for again, batch, method, optimizer in product((False, True), batches, methods, optimizers):
        if (again and method == "prefix") or (optimizer != "adamw" and method == "galore"):
            continue  # Setup says why
        options = ["--checkpointing"] if again and not setup.checkpointing else []
        options += [f"--accumulate {-(-(rows or setup.batch) // batch)}"] if batch != setup.batch else []
        options += [f"--method {method}"] if method != setup.method else []
        options += [f"--optimizer {optimizer}"] if optimizer != setup.optimizer else []
        if options:
            other = replace(
                setup, checkpointing=again or setup.checkpointing, batch=batch, method=method, optimizer=optimizer
            )
            yield options, other
