"""What `minilora size` prints: the numbers of architectures and sizes, for a terminal or as JSON.

Nothing is computed here but percentages. Read before this file: architectures, sizes.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

from minilora.llm.architectures import ALL_LINEAR, ARCHITECTURES, Architecture, find_architecture, match_targets
from minilora.llm.sizes import (
    DTYPE_BYTES,
    LOSS_CHUNK_TOKENS,
    METHODS,
    OPTIMIZERS,
    Setup,
    TrainingBytes,
    activation_terms,
    adapter_bytes,
    adapter_header_bytes,
    base_params,
    logit_terms,
    lora_params,
    training_bytes,
)

CARDS_GIB = (6, 8, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # what graphics cards have
CONTEXT_BYTES = 800_000_000  # what CUDA itself takes, at most
MARGIN = 1.1  # for the estimated parts and the allocator's gaps
ROWS = {
    "weights": "weights",
    "adapter": "adapter, fp32",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "master": "fp32 copy of the weights",
    "activations": "activations (estimate)",
    "logits": "logits, loss (estimate)",
}

COMPARED = ("full", "lora", "qlora")  # side by side, where no method is named


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `minilora size`, in place."""
    usual = Setup()
    parser.add_argument("model", nargs="?", help="a name (--list shows them), a config.json, or the folder of one")
    parser.add_argument("--list", action="store_true", help="the architectures that are known by name")
    parser.add_argument("--method", choices=METHODS, help="how it is trained (default: full, lora and qlora)")
    parser.add_argument(
        "-r", "--r", type=int, default=usual.r, metavar="RANK", help="LoRA's rank (default %(default)s)"
    )
    parser.add_argument(
        "--targets", default=ALL_LINEAR, metavar="NAMES", help="such as q_proj,v_proj (default %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPE_BYTES, default=usual.dtype, help="of the weights (default %(default)s)"
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=usual.optimizer, help="(default %(default)s)")
    parser.add_argument("--batch", type=int, default=usual.batch, metavar="N", help="sequences (default %(default)s)")
    parser.add_argument("--seq", type=int, default=usual.seq, metavar="TOKENS", help="of each (default %(default)s)")
    parser.add_argument("--checkpointing", action="store_true", help="keep the input of each layer, compute it again")
    parser.add_argument(
        "--no-master-weights", action="store_true", help="full training in 16 bits without an fp32 copy"
    )
    parser.add_argument("--json", action="store_true", help="the same numbers as JSON")


def run(args: argparse.Namespace) -> int:
    """Print what the options ask for.

    Raises:
        ValueError: if there is no such model, target or setup.
    """
    if args.list:
        print(list_report())
        return 0
    if args.model is None:
        raise ValueError("which model? Give a name or a config.json; `minilora size --list` shows the names")
    arch = find_architecture(args.model)
    setup = Setup(
        method=args.method or "lora",
        r=args.r,
        targets=ALL_LINEAR if args.targets == ALL_LINEAR else tuple(name.strip() for name in args.targets.split(",")),
        dtype=args.dtype,
        optimizer=args.optimizer,
        batch=args.batch,
        seq=args.seq,
        checkpointing=args.checkpointing,
        master_weights=not args.no_master_weights,
    )
    methods = (args.method,) if args.method else COMPARED
    numbers = size_numbers(args.model, arch, setup, methods)
    print(json.dumps(numbers, indent=2) if args.json else size_report(args.model, arch, setup, methods))
    return 0


def size_numbers(name: str, arch: Architecture, setup: Setup, methods: tuple[str, ...]) -> dict[str, Any]:
    """Every number of the report under its own name, ready for JSON."""
    base, trainable = base_params(arch), _trainable(arch, setup)
    total = base if setup.is_full else base + trainable
    numbers: dict[str, Any] = {
        "model": name,
        "architecture": asdict(arch),
        "setup": {key: value for key, value in asdict(setup).items() if key != "method"},
        "base_params": base,
        "trainable": trainable,
        "total": total,
        "trainable_percent": 100 * trainable / total,
    }
    if not setup.is_full:
        numbers["adapter_bytes"] = {d: adapter_bytes(arch, setup.r, setup.targets, d) for d in ("fp32", "bf16")}
    numbers["training_bytes"] = {}
    for method in methods:
        used = training_bytes(arch, replace(setup, method=method))
        numbers["training_bytes"][method] = asdict(used) | {"total": used.total}
    return numbers


def size_report(name: str, arch: Architecture, setup: Setup, methods: tuple[str, ...] = COMPARED) -> str:
    """The report of `minilora size`. With one method, the memory is explained part by part; with more, compared.

    >>> print(size_report("gpt2", ARCHITECTURES["gpt2"], Setup(targets=("c_attn",))).splitlines()[0])
    gpt2: layers 12, hidden 768, intermediate 3,072, heads 12, vocabulary 50,257
    """
    head = _describe(name, arch)
    counts = _full_lines(arch) if setup.is_full else [*_adapter_lines(arch, setup), "", *_file_lines(arch, setup)]
    memory = _explained(arch, setup) if len(methods) == 1 else _compared(arch, setup, methods)
    return "\n".join([head, "", *counts, "", *memory])


def list_report() -> str:
    """One line for each architecture that has a name."""
    lines = [f"{'name':<14}{'parameters':>17}{'bf16':>11}{'layers':>8}{'hidden':>8}{'LoRA on all linear layers':>28}"]
    for name, arch in ARCHITECTURES.items():
        n = base_params(arch)
        per_rank = f"{lora_params(arch, r=1):,} · r"
        lines.append(f"{name:<14}{n:>17,}{2 * n / 1e9:>8.2f} GB{arch.n_layers:>8}{arch.hidden:>8,}{per_rank:>28}")
    return "\n".join([*lines, "", "or any config.json of a Llama, Mistral, Qwen2 or GPT-2: minilora size FOLDER"])


# --- parts of the report ------------------------------------------------------------------------------------------


def _describe(name: str, arch: Architecture) -> str:
    heads = f"{arch.n_heads}" if arch.n_kv_heads == arch.n_heads else f"{arch.n_heads} ({arch.n_kv_heads} of keys)"
    return (
        f"{name}: layers {arch.n_layers}, hidden {arch.hidden:,}, intermediate {arch.intermediate:,}, heads {heads}, "
        f"vocabulary {arch.vocab:,}"
    )


def _trainable(arch: Architecture, setup: Setup) -> int:
    return base_params(arch) if setup.is_full else lora_params(arch, setup.r, setup.targets)


def _full_lines(arch: Architecture) -> list[str]:
    return ["Full fine-tuning", f"  trainable   {base_params(arch):>17,}   100 %"]


def _adapter_lines(arch: Architecture, setup: Setup) -> list[str]:
    hit = match_targets(arch, setup.targets)
    kinds = Counter(hit.values())
    lines = [f"LoRA of rank {setup.r} beside {len(hit)} matrices"]
    width = max(len(linear.name) for linear in kinds)
    for linear, n in kinds.items():
        shape = f"{linear.in_features:>7,} → {linear.out_features:<7,}"
        lines.append(f"  {linear.name:<{width}}  {shape} × {n:<4} {n * linear.lora_params(setup.r):>14,}")
    base, trainable = base_params(arch), lora_params(arch, setup.r, setup.targets)
    total = base + trainable
    return [
        *lines,
        "",
        f"  trainable   {trainable:>17,}   {100 * trainable / total:.4f} %",
        f"  frozen      {base:>17,}",
        f"  in all      {total:>17,}",
    ]


def _file_lines(arch: Architecture, setup: Setup) -> list[str]:
    lines = ["Adapter file"]
    for dtype in ("fp32", "bf16"):
        n_bytes = adapter_bytes(arch, setup.r, setup.targets, dtype)
        header = adapter_header_bytes(arch, setup.r, setup.targets, dtype)
        lines.append(f"  {dtype}        {n_bytes:>17,} bytes ({n_bytes / 1e6:,.1f} MB), and a header of {header:,}")
    return lines


def _compared(arch: Architecture, setup: Setup, methods: tuple[str, ...]) -> list[str]:
    """One column a method."""
    used = [training_bytes(arch, replace(setup, method=method)) for method in methods]
    unit = _unit(used)
    lines = [_memory_title(setup, unit), " " * 28 + "".join(f"{method:>11}" for method in methods)]
    for field, label in ROWS.items():
        lines.append(f"  {label:<26}" + "".join(_cell(getattr(column, field), unit) for column in used))
    return [
        *lines,
        f"  {'in all':<26}" + "".join(_cell(column.total, unit) for column in used),
        f"  {'in GiB (2³⁰ bytes)':<26}" + "".join(f"{column.total / 2**30:>11.2f}" for column in used),
        f"  {'takes a card of':<26}" + "".join(f"{_card(column):>11}" for column in used),
        "",
        "Estimated for attention that stores no scores, no dropout, a loss over every token.",
        f"Each part explained: --method {methods[-1]}",
    ]


def _explained(arch: Architecture, setup: Setup) -> list[str]:
    """One method, every part with what it is made of."""
    used = training_bytes(arch, setup)
    unit = _unit([used])
    lines = [_memory_title(setup, unit)]
    for field, reason in _reasons(setup).items():
        if getattr(used, field):
            lines.append(f"  {ROWS[field]:<26}{_cell(getattr(used, field), unit)}   {reason}")
        if field in ("activations", "logits"):
            terms = activation_terms(arch, setup) if field == "activations" else logit_terms(arch, setup)
            lines += [f"  {'':<26}{_cell(n_bytes, unit)}     {name}" for name, n_bytes in terms.items()]
    total = f"{used.total / 2**30:.2f} GiB (2³⁰ bytes); takes a card of {_card(used)}"
    return [
        *lines,
        f"  {'in all':<26}{_cell(used.total, unit)}   {total}",
        "",
        "Estimated for attention that stores no scores, no dropout, a loss over every token.",
    ]


def _reasons(setup: Setup) -> dict[str, str]:
    """What each part of the memory is made of."""
    dora = ", magnitudes" if setup.method == "dora" else ""
    return {
        "weights": f"4.127 bits in linear layers, {setup.dtype} elsewhere" if setup.method == "qlora" else setup.dtype,
        "adapter": f"A and B{dora}{', and the lengths of the rows' * bool(dora)}",
        "gradients": f"{setup.dtype}, of all parameters" if setup.is_full else f"fp32, of A and B{dora}",
        "optimizer": "two moments in 8 bits" if setup.optimizer == "adamw-8bit" else "two moments in fp32",
        "master": "the optimizer updates this, and rounds it to the weights",
        "activations": "kept for the backward pass, or alive beside it:",
        "logits": f"{min(setup.n_tokens, LOSS_CHUNK_TOKENS):,} tokens at a time × the vocabulary:",
    }


def _memory_title(setup: Setup, unit: str) -> str:
    again = ", checkpointing" if setup.checkpointing else ""
    tokens = f"{setup.batch} × {setup.seq:,} tokens"
    return f"Memory of training in {unit}: {setup.dtype}, {setup.optimizer}, {tokens}{again}"


def _unit(columns: list[TrainingBytes]) -> str:
    return "GB" if max(used.total for used in columns) >= 1e9 else "MB"


def _cell(n_bytes: int, unit: str) -> str:
    return f"{n_bytes / {'GB': 1e9, 'MB': 1e6}[unit]:>11.3f}" if n_bytes else f"{'–':>11}"


def _card(used: TrainingBytes) -> str:
    """The smallest card with room for this, a margin, and CUDA itself."""
    fits = [gib for gib in CARDS_GIB if MARGIN * used.total + CONTEXT_BYTES <= gib * 2**30]
    return f"{fits[0]} GiB" if fits else f"> {CARDS_GIB[-1]} GiB"
