"""What DoRA costs beside LoRA: a training step of each, ours and PEFT's, by turns, in one run.

    python benchmarks/dora_step.py                     bfloat16, 3 rounds of 5 steps
    python benchmarks/dora_step.py --dtype fp32
    python benchmarks/dora_step.py --json FILE         the same numbers as JSON

The work, and what is measured, are training_step's: SmolLM2-135M, r 16 on all linear layers, 4 rows of 256 tokens, each
measurement a process of its own. A ratio is DoRA / LoRA of one side within one round: median (least to largest).
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from machine import about
from training_step import PACKAGES, in_a_process


def main() -> None:
    options = parse()
    facts = about(*PACKAGES)
    print("\n".join(f"{name:<24}{value}" for name, value in facts.items()), end="\n\n")
    rounds = []
    for number in range(options.rounds):
        rounds.append({side: one_round(side, options, number % 2 == 1) for side in ("ours", "peft")})
        for side, found in rounds[-1].items():
            said = (f"{m} {found[m]['step_s']:.2f} s, {found[m]['peak_gib']:.2f} GiB" for m in ("lora", "dora"))
            print(f"  {side:<5} {'; '.join(said)}", flush=True)
    for side in ("ours", "peft"):
        for what in ("step_s", "peak_gib"):
            ratios = [found[side]["dora"][what] / found[side]["lora"][what] for found in rounds]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{side:<5} {what:<9} DoRA / LoRA {spread}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": facts, "rounds": rounds}, indent=2) + "\n")


def one_round(side: str, options: argparse.Namespace, dora_first: bool) -> dict[str, Any]:
    methods = ["dora", "lora"] if dora_first else ["lora", "dora"]
    return {method: in_a_process(side, f"{method}-{options.dtype}", options) for method in methods}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30, help="the first of the model's 30")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
