"""The memory of a training step in words: methods side by side, or one of them part by part.

Read before this file: training_memory.
"""

from collections.abc import Sequence

from minilora.llm.activations import LOSS_CHUNK_TOKENS, activation_terms, logit_terms
from minilora.llm.architectures import Architecture
from minilora.llm.setup import Setup
from minilora.llm.training_memory import MARGIN, TrainingBytes, training_bytes

COLUMNS = 6  # of methods side by side: 94 characters
CARDS_GIB = (6, 8, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # what graphics cards have
CONTEXT_BYTES = 800_000_000  # what CUDA itself takes, at most
ROWS = {
    "weights": "weights",
    "adapter": "adapter, fp32",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "master": "fp32 copy of the weights",
    "activations": "activations (estimate)",
    "logits": "logits, loss (estimate)",
}
TRAINED = {
    "dora": "A and B, magnitudes",
    "adalora": "A and B, singular values",
    "ia3": "the factors",
    "houlsby": "the adapters",
    "prefix": "keys and values",
    "prompt": "the embeddings",
}  # A and B where nothing is said
BESIDE = {
    "dora": ", and the lengths of the rows",
    "adalora": ", and their importance, Ī and Ū",
    "pissa": ", and where they began",
    "olora": ", and where they began",
}


def compared(arch: Architecture, setups: Sequence[Setup]) -> list[str]:
    """One column a method, COLUMNS of them side by side."""
    used = [training_bytes(arch, setup) for setup in setups]
    unit = _unit(used)
    lines = [_memory_title(setups[0], unit)]
    for start in range(0, len(setups), COLUMNS):
        some = slice(start, start + COLUMNS)
        lines += [*([""] if start else []), *_columns(setups[some], used[some], unit)]
    return [
        *lines,
        "",
        "Estimated for attention that stores no scores, no dropout, a loss over every token.",
        f"Each part explained: --method {setups[-1].method}",
    ]


def _columns(setups: Sequence[Setup], used: Sequence[TrainingBytes], unit: str) -> list[str]:
    parts = [
        f"  {label:<26}" + "".join(_cell(getattr(column, field), unit) for column in used)
        for field, label in ROWS.items()
        if any(getattr(column, field) for column in used)
    ]
    return [
        " " * 28 + "".join(f"{setup.method:>11}" for setup in setups),
        f"  {'dtype of the weights':<26}" + "".join(f"{_dtype(setup):>11}" for setup in setups),
        *parts,
        f"  {'in all':<26}" + "".join(_cell(column.total, unit) for column in used),
        f"  {'in GiB (2³⁰ bytes)':<26}" + "".join(f"{column.total / 2**30:>11.2f}" for column in used),
        f"  {'takes a card of':<26}" + "".join(f"{_card(column):>11}" for column in used),
    ]


def _dtype(setup: Setup) -> str:
    return "4 bits" if setup.is_in_4_bits else setup.weights_dtype


def explained(arch: Architecture, setup: Setup) -> list[str]:
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
    trained, dtype = TRAINED.get(setup.method, "A and B"), setup.weights_dtype
    moments = "two moments in 8 bits" if setup.optimizer == "adamw-8bit" else "two moments in fp32"
    return {
        "weights": f"4.127 bits in linear layers, {dtype} elsewhere" if setup.is_in_4_bits else dtype,
        "adapter": trained + BESIDE.get(setup.method, ""),
        "gradients": f"{dtype}, of all parameters" if setup.trains_all else f"fp32, of {trained}",
        "optimizer": moments + (f" of rank {setup.first_r}, and projectors" if setup.method == "galore" else ""),
        "master": "the optimizer updates this, and rounds it to the weights",
        "activations": "kept for the backward pass, or alive beside it:",
        "logits": f"{min(setup.n_tokens, LOSS_CHUNK_TOKENS):,} tokens at a time × the vocabulary:",
    }


def _memory_title(setup: Setup, unit: str) -> str:
    again = ", checkpointing" if setup.checkpointing else ""
    tokens = f"{setup.batch} × {setup.seq:,} tokens"
    return f"Memory of training in {unit}: {setup.optimizer}, {tokens}{again}"


def _unit(columns: list[TrainingBytes]) -> str:
    return "GB" if max(used.total for used in columns) >= 1e9 else "MB"


def _cell(n_bytes: int, unit: str) -> str:
    return f"{n_bytes / {'GB': 1e9, 'MB': 1e6}[unit]:>11.3f}" if n_bytes else f"{'–':>11}"


def _card(used: TrainingBytes) -> str:
    """The smallest card with room for this, a margin, and CUDA itself."""
    fits = [gib for gib in CARDS_GIB if MARGIN * used.total + CONTEXT_BYTES <= gib * 2**30]
    return f"{fits[0]} GiB" if fits else f"> {CARDS_GIB[-1]} GiB"
