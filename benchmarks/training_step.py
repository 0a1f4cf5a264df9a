"""One training step beside PEFT (and bitsandbytes): seconds and peak memory, ours and theirs by turns, in one run.

    python benchmarks/training_step.py                          QLoRA and LoRA in bfloat16, and LoRA in float32
    python benchmarks/training_step.py --cases qlora-bf16 --rounds 5
    python benchmarks/training_step.py --batch 1 --tokens 2048  another shape (growth.py draws many)
    python benchmarks/training_step.py --json FILE              the same numbers as JSON
    python benchmarks/training_step.py --table FILE             the README's table, out of such a file

The work: SmolLM2-135M, r 16 on all linear layers (4,884,480 trainable), 4 rows of 256 tokens that all carry loss;
forward, backward, one step of AdamW (theirs torch's fused one; ours PagedAdamW, 32 bits, all of it in memory). Same
base weights, same tokens; both must count the same parameters and find the same loss, or nothing is printed. In the
case "-checkpointing" our side computes each layer twice and theirs does not: it shows what the memory costs.

Every measurement is a process of its own. A time is the median of its steps after the first. Peak memory is the
process's peak resident set after the model is loaded (VmHWM, reset through /proc/self/clear_refs); the peak of its
whole life stands beside it. A ratio is ours / theirs within one round: the median of the rounds is given, the least and
the largest.

bitsandbytes runs here as installed: without the optional package `kernels`, for whose CPU kernel it asks at import.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import about

CASES = {  # method, dtype
    "qlora-bf16": ("qlora", "bfloat16"),
    "lora-bf16": ("lora", "bfloat16"),
    "lora-fp32": ("lora", "float32"),
    "qlora-fp32": ("qlora", "float32"),
    "dora-bf16": ("dora", "bfloat16"),
    "dora-fp32": ("dora", "float32"),
    "qlora-bf16-checkpointing": ("qlora", "bfloat16"),
}
DEFAULT_CASES = ["qlora-bf16", "qlora-bf16-checkpointing", "lora-bf16", "lora-fp32"]
PACKAGES = ["torch", "peft", "bitsandbytes", "transformers"]
GIB = 2**30


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps(measure(options)))
        return
    if options.table:
        print(table(json.loads(Path(options.table).read_text())))
        return
    facts = about(*PACKAGES)
    print("\n".join(f"{name:<24}{value}" for name, value in facts.items()), end="\n\n")
    rows = [compare(case, options) for case in options.cases]
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n")


def compare(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run both sides by turns, print a line for each round and the ratios of all."""
    print(f"{case}, {options.batch} x {options.tokens} tokens, r {options.r}")
    rounds = []
    for number in range(options.rounds):
        sides = ["ours", "peft"] if number % 2 == 0 else ["peft", "ours"]
        found = {side: in_a_process(side, case, options) for side in sides}
        check_same_work(found["ours"], found["peft"])
        rounds.append(found)
        line = (f"{side} {found[side]['step_s']:.2f} s, {found[side]['peak_gib']:.2f} GiB" for side in ("ours", "peft"))
        print(f"  round {number + 1}: {'; '.join(line)}", flush=True)
    row: dict[str, Any] = {"case": case, "batch": options.batch, "tokens": options.tokens, "r": options.r}
    row |= {"rounds": rounds, "losses": {side: rounds[0][side]["loss"] for side in rounds[0]}}
    for what in ("step_s", "peak_gib", "process_peak_gib"):
        ratios = [found["ours"][what] / found["peft"][what] for found in rounds]
        row[what] = {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
        print(f"  {what:<18} ratio {row[what]['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    return row


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each case, ours / theirs as median (least to largest), and the medians of both."""
    (shape,) = {f"{row['batch']} × {row['tokens']} tokens, r {row['r']}" for row in results["rows"]}
    lines = [f"| {shape} | time of a step | peak memory | ours | PEFT |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        ratios = (row[what] for what in ("step_s", "peak_gib"))
        cells = [f"{r['ratio']:.2f} ({r['least']:.2f} to {r['largest']:.2f})" for r in ratios]
        for side in ("ours", "peft"):
            step_s, peak_gib = (
                statistics.median(r[side][what] for r in row["rounds"]) for what in ("step_s", "peak_gib")
            )
            cells.append(f"{step_s:.2f} s, {peak_gib:.2f} GiB")
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_a_process(side: str, case: str, options: argparse.Namespace) -> dict[str, Any]:
    numbers = ("batch", "tokens", "r", "layers", "steps", "threads")
    given = [text for name in numbers for text in (f"--{name}", str(getattr(options, name)))]
    command = [sys.executable, __file__, "--side", side, "--cases", case, *given]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side} failed at {case}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_same_work(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if ours["trainable"] != theirs["trainable"]:
        sys.exit(f"not the same work: ours trains {ours['trainable']:,} parameters, theirs {theirs['trainable']:,}")
    if abs(ours["loss"] - theirs["loss"]) > 0.01 * theirs["loss"]:
        sys.exit(f"not the same work: our loss is {ours['loss']:.4f}, theirs {theirs['loss']:.4f}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One side: build, reset the peak, take steps."""
    import torch

    torch.set_num_threads(options.threads)
    method, dtype = CASES[options.cases[0]]
    build = {"ours": ours, "peft": peft}[options.side]
    model, loss_of, make_optimizer = build(method, getattr(torch, dtype), options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters)
    tokens = torch.randint(0, 49152, (options.batch, options.tokens), generator=torch.Generator().manual_seed(0))
    before = peak_gib()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    times, losses = [], []
    for _ in range(options.steps):
        start = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
        del loss  # on either side: its graph would lie in the middle of the next step's memory
    return {
        "step_s": statistics.median(times[1:]),
        "fastest_s": min(times[1:]),
        "peak_gib": peak_gib(),
        "process_peak_gib": max(before, peak_gib()),
        "loss": losses[0],
        "trainable": sum(p.numel() for p in parameters),
    }


def ours(method: str, dtype: Any, options: argparse.Namespace) -> tuple[Any, Callable[[Any], Any], Any]:
    from minilora.llm import load_model
    from minilora.methods import DoRALinear
    from minilora.qlora import PagedAdamW, QLoRALinear
    from minilora.torch_lora import LoRALinear, inject
    from minilora.train.data import Batch
    from minilora.train.loss import loss_of

    model, _ = load_model("smollm2-135m", dtype=dtype)
    del model.model.layers[options.layers :]
    wrap = {"lora": LoRALinear, "qlora": QLoRALinear, "dora": DoRALinear}[method]
    inject(model, "all-linear", lambda base: wrap(base, r=options.r, alpha=2 * options.r))
    model.model.gradient_checkpointing = options.cases[0].endswith("checkpointing")
    return model.train(), lambda tokens: loss_of(model, Batch(tokens, tokens)), partial(PagedAdamW, lr=1e-4)


def peft(method: str, dtype: Any, options: argparse.Namespace) -> tuple[Any, Callable[[Any], Any], Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from minilora.llm import smollm2

    four_bits = None
    if method == "qlora":
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    base = AutoModelForCausalLM.from_pretrained(
        smollm2.fetch(), dtype=dtype, quantization_config=four_bits, device_map="cpu"
    )
    del base.model.layers[options.layers :]
    base.config.use_cache = False
    settings = {"r": options.r, "lora_alpha": 2 * options.r, "use_dora": method == "dora"}
    config = LoraConfig(**settings, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    make_optimizer = partial(torch.optim.AdamW, lr=1e-4, fused=True)
    return model.train(), lambda tokens: model(input_ids=tokens, labels=tokens).loss, make_optimizer


def peak_gib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / GIB


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=DEFAULT_CASES, choices=CASES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30, help="the first of the model's 30")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--table", metavar="FILE", help="print the README's table from this file and measure nothing")
    parser.add_argument("--side", choices=["ours", "peft"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
