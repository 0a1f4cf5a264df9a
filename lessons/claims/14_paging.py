"""14 · Paged optimizer and gradient checkpointing

The claims for this lesson: what is paged, what 8 bits save, and what checkpointing costs.
"""

import inspect
import json
import re
import statistics
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from minilora.classroom.claims import FAMILY, MATHEMATICS, REVOLUTION, Claim, Finding
from minilora.classroom.lessons import lessons_folder
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import adapter_shapes, count, optimizer_bytes
from minilora.torch_lora import LoRALinear


WAYS = {"without": "", "with it": "-checkpointing"}


def smallest_paged() -> int:
    """The fewest numbers of a tensor whose state bitsandbytes pages, as its source has it."""
    from bitsandbytes.optim.optimizer import Optimizer8bit

    (found,) = re.findall(r"is_paged or p\.numel\(\) < (\w+)", inspect.getsource(Optimizer8bit.get_state_buffer))
    return int(float(found))


def eight_bit_mb() -> float:
    """The 8-bit states of r = 16 on all linear layers of Llama-2-7B."""
    return optimizer_bytes(adapter_shapes(ARCHITECTURES["llama-2-7b"], 16).values(), "adamw-8bit") / 1e6


def paged_states() -> Finding:
    """The share of an adapter's numbers that lie in tensors large enough."""
    import bitsandbytes

    least, arch = smallest_paged(), ARCHITECTURES["llama-2-7b"]
    sets = {
        "r = 16 on q and v": (16, ("q_proj", "v_proj")),
        "r = 16 on q k v o": (16, ("q_proj", "k_proj", "v_proj", "o_proj")),
        "r = 16 on all linear layers (as in its code)": (16, "all-linear"),
        "r = 64 on all linear layers": (64, "all-linear"),
    }
    shares = {}
    for name, (r, targets) in sets.items():
        shapes = adapter_shapes(arch, r, targets).values()
        shares[name] = count(shape for shape in shapes if count([shape]) >= least) / count(shapes)
    qv, qkvo, all_linear, wide = shares.values()
    return Finding(
        cases={name: share > 0 for name, share in shares.items()},
        found=f"bitsandbytes {bitsandbytes.__version__} pages no state of a tensor below {least:,} numbers "
        "(optim/optimizer.py, get_state_buffer). Of Llama-2-7B's adapters it pages, at r = 16, "
        f"{qv:.0%} on q and v, {qkvo:.0%} on q k v o, {all_linear:.0%} on all linear layers, where all states are "
        f"{eight_bit_mb():.0f} MB in 8 bits; at r = 64 there {wide:.0%}",
    )


def eight_bit_states() -> Finding:
    """Two fp32 moments beside two of 8 bits with their absmax."""
    shapes = list(adapter_shapes(ARCHITECTURES["llama-2-7b"], 16).values())
    full, small = (optimizer_bytes(shapes, kind) for kind in ("adamw", "adamw-8bit"))
    return Finding(
        cases=round(full / small) == 4,
        found=f"r = 16 on all linear layers of Llama-2-7B: {full / 1e6:.0f} MB against {small / 1e6:.0f}, "
        f"{full / small:.2f} times",
    )


def medians(of: str) -> dict[str, float]:
    """A measure of our QLoRA step in benchmarks/results.json, without checkpointing and with it."""
    rows = json.loads((lessons_folder().parent / "benchmarks" / "results.json").read_text(encoding="utf-8"))["rows"]
    rounds = {row["case"]: [each["ours"][of] for each in row["rounds"]] for row in rows}
    return {name: statistics.median(rounds[f"qlora-bf16{case}"]) for name, case in WAYS.items()}


def checkpointed_memory() -> Finding:
    """The peaks of the benchmark's step."""
    gib = medians("peak_gib")
    saved = 1 - gib["with it"] / gib["without"]
    return Finding(
        cases=30 <= 100 * saved <= 50,
        found=f"SmolLM2-135M, 4 × 256 tokens, r = 16: {gib['without']:.2f} GiB without, {gib['with it']:.2f} with it, "
        f"{saved:.0%} less (`python benchmarks/training_step.py --steps 3`)",
    )


def products_of_a_step(trains_all: bool, again: bool) -> int:
    """Multiplications of a forward and a backward pass through 64 layers, counted by torch as they run."""
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(64))).requires_grad_(trains_all)
    x = torch.ones(8, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        (checkpoint(layers, x, use_reentrant=False) if again else layers(x)).sum().backward()
    return counter.get_total_flops() // 2


def checkpointed_time() -> Finding:
    """Products with checkpointing over products without, all weights trained or frozen; and the benchmark's seconds."""
    seconds, more = medians("step_s"), {}
    for name, trains_all in {"all weights train": True, "the weights are frozen": False}.items():
        plain, again = (products_of_a_step(trains_all, again) for again in (False, True))
        more[f"counted in multiplications where {name}"] = again / plain - 1
    more["measured in seconds of our QLoRA step"] = seconds["with it"] / seconds["without"] - 1
    return Finding(
        cases={name: abs(100 * share - 30) < 5 for name, share in more.items()},
        found=", ".join(f"{share:.0%} {name}" for name, share in more.items())
        + ". Frozen weights have no gradient to compute, so the forward pass is half of a step, not a third. Seconds: "
        "`python benchmarks/training_step.py --steps 3` on two CPU cores that other work shared",
    )


def input_gradients() -> Finding:
    """A LoRA layer under a checkpoint, its input without a gradient: which way lets A and B have theirs."""
    needed = {}
    for reentrant in (True, False):
        layer = LoRALinear(nn.Linear(8, 8), r=2, alpha=4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            h = checkpoint(layer, torch.ones(4, 8), use_reentrant=reentrant)
        if h.requires_grad:
            h.sum().backward()
        needed[f"use_reentrant={reentrant}"] = layer.B.grad is None
    return Finding(
        cases=needed,
        found=f"torch {torch.__version__.split('+')[0]}: where a checkpoint is reentrant and no input has a "
        "gradient, A and "
        "B get none, and torch only warns; otherwise nothing more is needed",
    )


CLAIMS = [
    Claim(
        id="14.paged-states",
        fact="paged_adamw_8bit moves the optimizer's states to the CPU when memory is short, and prevents OOM.",
        source=f"{REVOLUTION}, “The Three Innovations”",
        settle=paged_states,
        verdict="holds when",
    ),
    Claim(
        id="14.eight-bit-states",
        fact="8-bit states reduce Adam's memory about 4 times.",
        source=f"{REVOLUTION}, “Saving and Merging”",
        settle=eight_bit_states,
        verdict="holds",
    ),
    Claim(
        id="14.checkpointed-memory",
        fact="Gradient checkpointing takes 30 to 50 % off QLoRA's peak memory.",
        source=f"{FAMILY}, on gradient checkpointing",
        settle=checkpointed_memory,
        verdict="holds",
    ),
    Claim(
        id="14.checkpointed-time",
        fact="It costs about 30 % more time.",
        source=f"{FAMILY}, on gradient checkpointing",
        settle=checkpointed_time,
        verdict="holds when",
    ),
    Claim(
        id="14.input-gradients",
        fact="With PEFT, gradient checkpointing requires enable_input_require_grads().",
        source=f"{MATHEMATICS}, “Gradient Checkpointing”",
        settle=input_gradients,
        verdict="holds when",
    ),
]
