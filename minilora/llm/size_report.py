"""What `minilora size` tells: the numbers of other files, for a terminal or as JSON.

Nothing is computed here but percentages. Read before this file: sizes, setup, memory_report.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from minilora.llm.architectures import ARCHITECTURES, Architecture, match_targets
from minilora.llm.memory_report import compared, explained
from minilora.llm.setup import Setup, trained_params
from minilora.llm.sizes import (
    adapter_bytes,
    adapter_header_bytes,
    base_params,
    ia3_vectors,
    lora_params,
    prefix_params,
    width_bytes,
)
from minilora.llm.training_memory import training_bytes

COMPARED = ("full", "lora", "qlora")  # side by side, where no method is named
SPELLED = {
    "lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA", "adalora": "AdaLoRA", "pissa": "PiSSA", "olora": "OLoRA",
    "loftq": "LoftQ",
}  # fmt: skip


def size_numbers(name: str, arch: Architecture, setups: Sequence[Setup]) -> dict[str, Any]:
    """Every number of the report under its own name, ready for JSON. Setups differ in the method and its own defaults.

    Counts are those of the one method; of LoRA, where nothing was chosen; with several, `trainable` has one for each.
    """
    chosen = _counted(setups)
    base, trainable = base_params(arch), {setup.method: trained_params(arch, setup) for setup in setups}
    numbers: dict[str, Any] = {
        "model": name,
        "architecture": asdict(arch),
        "setups": {
            s.method: asdict(s) | {"r": s.asked_r, "start_r": s.first_r, "dtype": s.weights_dtype} for s in setups
        },
        "base_params": base,
    }
    if chosen is None:
        numbers["trainable"] = trainable
    else:
        total = _total(arch, chosen)
        numbers |= {"trainable": trainable[chosen.method], "total": total}
        numbers["trainable_percent"] = 100 * trainable[chosen.method] / total
        if not chosen.trains_all:
            numbers["adapter_bytes"] = {dtype: _file_bytes(arch, chosen, dtype)[0] for dtype in ("fp32", "bf16")}
    numbers["training_bytes"] = {}
    for setup in setups:
        used = training_bytes(arch, setup)
        numbers["training_bytes"][setup.method] = asdict(used) | {"total": used.total}
    return numbers


def size_report(name: str, arch: Architecture, setups: Sequence[Setup]) -> str:
    """The report of `minilora size`. With one method, the memory is explained part by part; with more, compared.

    >>> print(size_report("gpt2", ARCHITECTURES["gpt2"], [Setup(targets=("c_attn",))]).splitlines()[0])
    gpt2: layers 12, hidden 768, intermediate 3,072, heads 12, vocabulary 50,257
    """
    chosen = _counted(setups)
    if chosen is None:
        counts = _counts_side_by_side(arch, setups)
    elif chosen.trains_all:
        counts = [_title(arch, chosen), f"  trainable   {base_params(arch):>17,}   100 %"]
    else:
        counts = [*_adapter_lines(arch, chosen), "", *_file_lines(arch, chosen)]
    memory = explained(arch, setups[0]) if len(setups) == 1 else compared(arch, setups)
    return "\n".join([_describe(name, arch), "", *counts, "", *memory])


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


def _counted(setups: Sequence[Setup]) -> Setup | None:
    """The setup whose parameters are counted part by part: the only one, or LoRA's where none was chosen."""
    if len(setups) == 1:
        return setups[0]
    return setups[1] if tuple(setup.method for setup in setups) == COMPARED else None


def _total(arch: Architecture, setup: Setup) -> int:
    """Parameters of the model and its adapter."""
    return base_params(arch) + (0 if setup.trains_all else trained_params(arch, setup))


def _counts_side_by_side(arch: Architecture, setups: Sequence[Setup]) -> list[str]:
    lines = ["Trained parameters"]
    for setup in setups:
        n = trained_params(arch, setup)
        lines.append(f"  {setup.method:<10}{n:>17,}   {100 * n / _total(arch, setup):>8.4f} %   {_title(arch, setup)}")
    return lines


def _title(arch: Architecture, setup: Setup) -> str:
    if setup.is_low_rank:
        n_matrices = len(match_targets(arch, setup.targets))
        rank = f"{setup.first_r} → {setup.asked_r}" if setup.method == "adalora" else f"{setup.asked_r}"
        return f"{SPELLED[setup.method]} of rank {rank} beside {n_matrices} matrices"
    return {
        "full": "Full fine-tuning",
        "galore": f"GaLore: all parameters, moments of rank {setup.first_r}",
        "ia3": f"IA³ in {arch.n_layers * len(ia3_vectors(arch))} matrices",
        "houlsby": f"Houlsby's adapters, two a layer, of bottleneck {setup.bottleneck:,}",
        "prefix": f"Prefix tuning with {setup.n_virtual:,} virtual tokens",
        "prompt": f"Prompt tuning with {setup.n_virtual:,} virtual tokens",
    }[setup.method]


def _adapter_lines(arch: Architecture, setup: Setup) -> list[str]:
    rows = _rows(arch, setup)
    width = max(len(name) for name, _, _, _ in rows)
    lines = [f"  {name:<{width}}  {shape} × {copies:<4} {n:>14,}" for name, shape, copies, n in rows]
    base, trainable = base_params(arch), trained_params(arch, setup)
    return [
        _title(arch, setup),
        *lines,
        "",
        f"  trainable   {trainable:>17,}   {100 * trainable / (base + trainable):.4f} %",
        f"  frozen      {base:>17,}",
        f"  in all      {base + trainable:>17,}",
    ]


def _rows(arch: Architecture, setup: Setup) -> list[tuple[str, str, int, int]]:
    """What is trained, part by part: a name, a shape, how many of them, and the numbers in all of them."""
    layers, h, n = arch.n_layers, arch.hidden, setup.n_virtual
    if setup.is_low_rank:
        rows = []
        for linear, copies in Counter(match_targets(arch, setup.targets).values()).items():
            more = {"dora": linear.out_features, "adalora": setup.first_r}.get(setup.method, 0)
            shape = f"{linear.in_features:>7,} → {linear.out_features:<7,}"
            rows.append((linear.name, shape, copies, copies * (linear.lora_params(setup.first_r) + more)))
        return rows
    if setup.method == "ia3":
        return [(name, f"{size:>7,}", layers, layers * size) for name, size in ia3_vectors(arch).items()]
    trained = trained_params(arch, setup)
    if setup.method == "houlsby":
        return [
            (f"after {part}", f"{h:>7,} → {setup.bottleneck:,} → {h:,}", layers, trained // 2)
            for part in ("attention", "the feed-forward")
        ]
    if setup.method == "prefix" and setup.mlp_features is not None:
        return [("network", f"{setup.mlp_features:,} wide", 1, trained)]
    if setup.method == "prompt":
        return [("embeddings", f"{n:,} × {h:,}", 1, trained)]
    return [(part, f"{n:,} × {arch.n_kv_heads * arch.head_dim:,}", layers, trained // 2) for part in ("keys", "values")]


def _file_bytes(arch: Architecture, setup: Setup, dtype: str) -> tuple[int, int | None]:
    """The bytes of an adapter's tensors in a file, and of its head where we know the names in it."""
    if setup.method == "prefix":  # without the network that made it
        return prefix_params(arch, setup.n_virtual) * width_bytes(dtype), None
    if not setup.is_low_rank or setup.method == "adalora":
        return trained_params(arch, setup) * width_bytes(dtype), None
    of = arch, setup.run_r, setup.targets, dtype, setup.method == "dora"
    return adapter_bytes(*of), adapter_header_bytes(*of)


def _file_lines(arch: Architecture, setup: Setup) -> list[str]:
    lines = [
        {
            "adalora": "Adapter file, before any rank is taken away",
            "pissa": f"Adapter file: a LoRA of rank {setup.run_r}, right over the base as it is",
            "olora": f"Adapter file: a LoRA of rank {setup.run_r}, right over the base as it is",
        }.get(setup.method, "Adapter file")
    ]
    for dtype in ("fp32", "bf16"):
        n_bytes, header = _file_bytes(arch, setup, dtype)
        of = "" if header is None else f" of {header:,}"
        lines.append(f"  {dtype}        {n_bytes:>17,} bytes ({n_bytes / 1e6:,.1f} MB), and a header{of}")
    return lines
