"""The demo's fine-tuning, ours beside PEFT with transformers' Trainer: the seconds it takes and what was learnt.

    python benchmarks/demo_task.py                          the demo with LoRA: 64 steps of 8, 200 sentences
    python benchmarks/demo_task.py --steps 8 --n-eval 20    a short look
    python benchmarks/demo_task.py --state-bits 8           ours with the optimizer's moments in 8 bits
    python benchmarks/demo_task.py --json FILE              the same numbers as JSON

The work, on either side: SmolLM2-135M in bfloat16, LoRA of the same r and alpha on all linear layers, the same encoded
samples once each, loss on the answers alone, AdamW without decay, whose rate rises and falls along the same straight
lines (theirs begins at 0, ours one step further), gradients clipped at 1. Theirs pads each batch to its longest sample
with transformers' DataCollatorForSeq2Seq and shuffles as Trainer does; ours pads likewise, with samples of like length
together (train/data).

A time is that of the whole training call, batches and optimizer included; loading and judging are not in it. Both
adapters are judged by our decoder, which reads theirs from PEFT's own file. Every run is a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import about

PACKAGES = ["torch", "peft", "transformers", "accelerate"]


def main() -> None:
    options = parse()
    if options.side:
        print(json.dumps({"ours": ours, "trainer": trainer}[options.side](options)))
        return
    facts = about(*PACKAGES)
    print("\n".join(f"{name:<24}{value}" for name, value in facts.items()), end="\n\n")
    rounds = []
    for number in range(options.rounds):
        sides = ["ours", "trainer"] if number % 2 == 0 else ["trainer", "ours"]
        rounds.append({side: in_a_process(side) for side in sides})
        for side in ("ours", "trainer"):
            found = rounds[-1][side]
            print(f"  {side:<8} {found['train_s']:6.1f} s, exact match {found['exact']:.1%}", flush=True)
    ratios = [found["ours"]["train_s"] / found["trainer"]["train_s"] for found in rounds]
    print(f"  ratio    {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if options.json:
        Path(options.json).write_text(
            json.dumps({"machine": facts, "rounds": rounds, "ratios": ratios}, indent=2) + "\n"
        )


def in_a_process(side: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *sys.argv, "--side", side], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from minilora.torch_lora import LoRALinear, inject
    from minilora.train.finetune import Recipe, fine_tune

    model, tokenizer, data, samples = the_task(options)
    generator = torch.Generator().manual_seed(options.seed)
    inject(model, "all-linear", lambda base: LoRALinear(base, r=options.r, alpha=2 * options.r, generator=generator))
    recipe = Recipe(lr=options.lr, batch_size=options.batch, seed=options.seed, state_bits=options.state_bits)
    start = time.perf_counter()
    fine_tune(model, samples, recipe, pad=tokenizer.pad)
    seconds = time.perf_counter() - start
    return {"train_s": seconds, "exact": exact(model, tokenizer, data.test)}


def trainer(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from minilora.llm import smollm2
    from minilora.torch_lora import load_adapter

    model, tokenizer, data, samples = the_task(options)
    set_seed(options.seed)
    base = AutoModelForCausalLM.from_pretrained(smollm2.fetch(), dtype=torch.bfloat16)
    base.config.use_cache = False
    config = LoraConfig(r=options.r, lora_alpha=2 * options.r, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    rows = [{"input_ids": s.tokens, "attention_mask": [1] * len(s.tokens), "labels": s.labels} for s in samples]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=options.batch,
            learning_rate=options.lr,
            lr_scheduler_type="linear",
            warmup_steps=options.steps // 10,
            weight_decay=0.0,
            max_grad_norm=1.0,
            seed=options.seed,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(smollm2.fetch()), padding=True)
        their_trainer = Trainer(model=peft_model, args=arguments, train_dataset=rows, data_collator=collator)
        start = time.perf_counter()
        their_trainer.train()
        seconds = time.perf_counter() - start
        if their_trainer.state.global_step != options.steps:
            sys.exit(f"not the same work: theirs took {their_trainer.state.global_step} steps, not {options.steps}")
        peft_model.save_pretrained(folder)
        load_adapter(model, folder)
    return {"train_s": seconds, "exact": exact(model, tokenizer, data.test)}


def the_task(options: argparse.Namespace) -> tuple[Any, Any, Any, list[Any]]:
    """The base model, its tokenizer, the sentences, and the training ones encoded."""
    import torch

    from minilora.classroom.demo import encode
    from minilora.llm import load_model
    from minilora.train.extraction import make_extraction

    model, tokenizer = load_model("smollm2-135m", dtype=torch.bfloat16)
    data = make_extraction(options.seed, options.steps * options.batch, options.n_eval)
    return model, tokenizer, data, [encode(tokenizer, example) for example in data.train]


def exact(model: Any, tokenizer: Any, examples: Sequence[Any]) -> float:
    """Share of unseen sentences that are answered to the letter."""
    from minilora.train.evaluate import exact_match, generate_answers

    prompts = [tokenizer.encode_chat(example.messages) for example in examples]
    references = [example.answer for example in examples]
    longest = max(len(tokenizer.encode(answer)) for answer in references) + 8
    return exact_match(generate_answers(model, tokenizer, prompts, longest), references)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n-eval", type=int, default=200)
    parser.add_argument("--state-bits", type=int, default=32, choices=[8, 32], help="of our optimizer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--side", choices=["ours", "trainer"], help="run this side alone; print its numbers as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
