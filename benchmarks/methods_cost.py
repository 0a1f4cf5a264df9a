"""What each method costs: a training step's seconds and memory, and an answer's seconds, live and merged.

    python benchmarks/methods_cost.py               3 rounds of 4 steps, written to methods_cost.json one by one
    python benchmarks/methods_cost.py --rounds 1    a short look

The work is methods.py's: its orders, its settings, bfloat16 (float32 where all weights train). In every round each
method takes its turn in a process of its own. A step and its memory are ratios to LoRA's of the same round, an answer
is one to the plain base's: the median of the rounds. Memory is the largest resident set after the model is loaded.

    step      the median step after the first
    memory    of the training
    answer    16 orders read, and 32 tokens written for each; `merged` the same after merging, where that can be
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import methods
from machine import about

TOKENS, PROMPTS = 32, 16


def main() -> None:
    options = parse()
    if options.case:
        print(json.dumps(measure(options.case, options.steps)))
        return
    facts = about("torch")
    rounds = []
    for _ in range(options.rounds):
        rounds.append({case: in_a_process(case, options) for case in methods.COMPARED})
        for case, found in rounds[-1].items():
            print(f"{case:<10}" + "  ".join(f"{what} {value:.2f}" for what, value in found.items()), flush=True)
        costs = {case: ratios(rounds, case) for case in methods.COMPARED}
        methods.COSTS.write_text(json.dumps({"machine": facts, "costs": costs, "rounds": rounds}, indent=1) + "\n")


def ratios(rounds: list[dict[str, dict[str, float]]], case: str) -> dict[str, float]:
    """The median ratio of every figure: a training's to LoRA's of the same round, an answer's to its own base's."""
    beside = {
        "step": [r[case]["step_s"] / r["lora"]["step_s"] for r in rounds],
        "memory": [r[case]["peak_gib"] / r["lora"]["peak_gib"] for r in rounds],
        "answer": [r[case]["answer_s"] / r[case]["base_s"] for r in rounds],
        "merged": [r[case]["merged_s"] / r[case]["base_s"] for r in rounds if "merged_s" in r[case]],
    }
    return {what: statistics.median(found) for what, found in beside.items() if found}


def in_a_process(case: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", case, "--steps", str(options.steps)]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str, steps: int) -> dict[str, float]:
    """One method: the base answers, the method is put on, steps are taken, it answers, it is merged and answers."""
    import torch
    from training_step import peak_gib

    from minilora.classroom.demo import encode
    from minilora.llm.generation import generate
    from minilora.torch_lora.inject import adapter_layers
    from minilora.torch_lora.merging import merge_model
    from minilora.train.finetune import Recipe, fine_tune
    from minilora.train.methods import METHODS, put_new
    from minilora.train.orders import make_orders

    name, _, lr = methods.CASES[case]
    model, tokenizer = methods.base_for(case)
    settings = methods.settings_of(case, tokenizer, seed=0)
    assert tokenizer.pad is not None
    data = make_orders(0, steps * methods.BATCH, 0, PROMPTS)
    prompts = [tokenizer.encode_chat(order.messages) for order in data.test]

    def answer_s() -> float:
        generate(model, prompts[:1], max_new_tokens=2)  # compiles
        start = time.perf_counter()
        generate(model, prompts, max_new_tokens=TOKENS)
        return time.perf_counter() - start

    found = {"base_s": answer_s()}
    put_new(model, name, settings)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here on
    samples = [encode(tokenizer, order) for order in data.train]
    recipe = Recipe(lr=lr, batch_size=methods.BATCH)
    training = fine_tune(model, samples, recipe, pad=tokenizer.pad, learning=METHODS[name].learning(settings))
    found |= {"step_s": statistics.median(step.seconds for step in training.steps[1:]), "peak_gib": peak_gib()}
    found["answer_s"] = answer_s()
    if adapter_layers(model) and case not in ("houlsby", "prefix", "prompt"):
        merge_model(model, torch.bfloat16)
        found["merged_s"] = answer_s()
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--case", choices=methods.COMPARED, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
