"""Greedy text generation, ours beside transformers': tokens a second, and whether the tokens are the same.

    python benchmarks/generation.py                     bfloat16, 1 and 8 rows
    python benchmarks/generation.py --json FILE         the same numbers as JSON

SmolLM2-135M continues pieces of Python's own documentation, of 32 tokens each, by 64 tokens, without a stop. Both read
the prompt, keep keys and values, and read one new token a row and step. In float32 both must write the same tokens, and
ours over 4 bits those that it writes with these weights turned into floats, or nothing is measured. A rate is rows ·
tokens / seconds of the whole call, prompt included; a ratio is ours / theirs within one round.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import about

PROMPT_TOKENS, NEW_TOKENS = 32, 64
PACKAGES = ["torch", "transformers"]
Side = Callable[[list[list[int]]], list[list[int]]]


def main() -> None:
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    facts = about(*PACKAGES)
    print("\n".join(f"{name:<24}{value}" for name, value in facts.items()), end="\n\n")
    prompts = make_prompts(max(options.rows))
    for side, oracle in ((ours, transformers), (ours_in_4_bits, ours_in_floats_of_4_bits)):
        if side(torch.float32)(prompts) != oracle(torch.float32)(prompts):
            raise SystemExit(f"not the same work: in float32 {side.__name__} and {oracle.__name__} write other tokens")
    sides = {name: make(torch.bfloat16) for name, make in SIDES.items()}
    found = [measure(sides, prompts[:rows], options.rounds) for rows in options.rows]
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": facts, "rows": found}, indent=2) + "\n")


def measure(sides: dict[str, Side], prompts: list[list[int]], rounds: int) -> dict[str, Any]:
    """Tokens a second of every side, by turns, and the ratios to transformers'."""
    for generate in sides.values():
        generate(prompts)  # the first call of all loads and compiles
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, generate in sorted(sides.items(), reverse=number % 2 == 1):
            start = time.perf_counter()
            generate(prompts)
            rates[name].append(len(prompts) * NEW_TOKENS / (time.perf_counter() - start))
    print(f"{len(prompts)} row{'s' * (len(prompts) > 1)}")
    row: dict[str, Any] = {"rows": len(prompts), "tokens_per_second": rates}
    for name in rates:
        ratios = [mine / theirs for mine, theirs in zip(rates[name], rates["transformers"], strict=True)]
        row[name] = {"ratio": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
        rate = statistics.median(rates[name])
        print(f"  {name:<14}{rate:7.1f} tokens/s   {row[name]['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return row


def ours(dtype: Any) -> Side:
    from minilora.llm import generate, load_model

    model, _ = load_model("smollm2-135m", dtype=dtype)
    return lambda prompts: generate(model, prompts, max_new_tokens=NEW_TOKENS)


def ours_in_4_bits(dtype: Any) -> Side:
    from minilora.llm import generate, load_model
    from minilora.qlora import NF4Linear
    from minilora.torch_lora import inject

    model, _ = load_model("smollm2-135m", dtype=dtype)
    inject(model, "all-linear", NF4Linear)
    return lambda prompts: generate(model, prompts, max_new_tokens=NEW_TOKENS)


def ours_in_floats_of_4_bits(dtype: Any) -> Side:
    """The same weights as ours_in_4_bits, multiplied by torch."""
    import torch

    from minilora.llm import generate, load_model
    from minilora.qlora import dequantize, quantize

    model, _ = load_model("smollm2-135m", dtype=dtype)
    for name, weight in model.named_parameters():
        if "_proj." in name:
            weight.data = dequantize(quantize(weight.data, double=True), torch.float32)
    return lambda prompts: generate(model, prompts, max_new_tokens=NEW_TOKENS)


def transformers(dtype: Any) -> Side:
    import torch
    from transformers import AutoModelForCausalLM

    from minilora.llm import smollm2

    model = AutoModelForCausalLM.from_pretrained(smollm2.fetch(), dtype=dtype).eval()

    def generate(prompts: list[list[int]]) -> list[list[int]]:
        tokens = torch.tensor(prompts)
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
        )
        return whole[:, len(prompts[0]) :].tolist()

    return generate


SIDES = {"transformers": transformers, "ours": ours, "ours-4-bits": ours_in_4_bits}


def make_prompts(n: int) -> list[list[int]]:
    """n pieces of Python's own documentation, as tokens: all of one length."""
    from minilora.llm import load_model
    from minilora.train.evaluate import english_text

    _, tokenizer = load_model("smollm2-135m")
    tokens = tokenizer.encode(english_text()[:20_000])
    return [tokens[start : start + PROMPT_TOKENS] for start in range(0, n * 2 * PROMPT_TOKENS, 2 * PROMPT_TOKENS)]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
