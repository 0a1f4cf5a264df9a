"""The family on one task: what each method learns in the same steps, what it costs, and what it forgets.

    python benchmarks/methods.py                       whatever is missing, then the table and the figures
    python benchmarks/methods.py --only lora ia3       of these methods alone
    python benchmarks/methods.py --workers 2 --threads 1    two cells at a time
    python benchmarks/methods.py --minutes 60          begin no cell after an hour
    python benchmarks/methods.py --report              the table and the figures again, from what is there
    python benchmarks/methods.py --table               the table alone

The task is orders (train/orders): nested JSON, of which parts are not said. SmolLM2-135M, the same 32 steps of 8 orders
for every method, 100 test orders, whose names and shapes no training order has. A cell is a training of its own process
and stands in benchmarks/methods.json when it is done: stop this at any time, it goes on where it was.

rates    each method has its own learning rate: a first guess is multiplied and divided by 3 until the best, by the loss
         on orders that are neither trained on nor tested, has a worse one on either side (seed 0).
seeds    at that rate seeds 0, 1 and 2: of the orders, of their order, and of what is drawn at the start.
ranks    LoRA with r from 1 to 64, alpha = 2 r, at LoRA's rate, the same three seeds.

What each costs in time and memory is measured by benchmarks/methods_cost.py.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import methods_report

if TYPE_CHECKING:
    from minilora.llm import Decoder, Tokenizer
    from minilora.train.orders import Orders
    from minilora.train.settings import Settings

HERE = Path(__file__).parent
RESULTS, COSTS = HERE / "methods.json", HERE / "methods_cost.json"
STEPS, BATCH, N_VALIDATION, N_TEST = 32, 8, 64, 100
SEEDS = (0, 1, 2)
RANKS, USUAL_R = (1, 2, 4, 8, 16, 32, 64), 16

Cell = tuple[str, float, int]  # the case, its rate and its seed

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "lora": ("lora", {}, 2e-3),
    "full": ("full", {}, 1e-4),
    "qlora": ("qlora", {}, 2e-3),
    "dora": ("dora", {}, 2e-3),
    "rslora": ("lora", {"use_rslora": True}, 7e-4),
    "lora+": ("lora", {"loraplus_ratio": 16.0}, 2e-4),
    "adalora": ("adalora", {}, 6e-3),
    "pissa": ("pissa", {}, 7e-4),
    "olora": ("olora", {}, 7e-4),
    "loftq": ("loftq", {}, 2e-3),
    "houlsby": ("houlsby", {}, 2e-3),
    "ia3": ("ia3", {}, 2e-2),
    "prefix": ("prefix", {}, 2e-2),
    "prompt": ("prompt", {}, 2e-2),
    "galore": ("galore", {"r": 128, "refresh": 8}, 2e-3),
}  # name: the method, its settings where they are not the usual, and the first guess of its rate
COMPARED = list(CASES)
CASES |= {f"lora r={r}": ("lora", {"r": r}, 2e-3) for r in RANKS if r != USUAL_R}


def main() -> None:
    options = parse()
    if options.cell:
        case, lr, seed = options.cell
        print(json.dumps(one_cell(case, float(lr), int(seed))))
        return
    if not (options.report or options.table):
        fill(options)
    cells = read_cells()
    rows = compared(cells)
    if rows:
        print(methods_report.table(rows, json.loads(COSTS.read_text())["costs"] if COSTS.exists() else {}))
    if rows and not options.table:
        draw(cells, rows)


def compared(cells: dict[Cell, dict[str, Any]]) -> methods_report.Rows:
    """The methods whose rate is found and whose seeds are all there: the rate, and the cell of each seed."""
    rates = {case: best_rate(cells, case) for case in COMPARED if not next_rates(cells, case)}
    found = {case: methods_report.by_seed(cells, case, lr, SEEDS) for case, lr in rates.items()}
    return {case: (rates[case], its) for case, its in found.items() if its}


def draw(cells: dict[Cell, dict[str, Any]], rows: methods_report.Rows) -> None:
    """The figures of what is there: the methods, and the ranks if LoRA's rate and all their seeds are."""
    (HERE / "methods.png").write_bytes(methods_report.draw(rows))
    if "lora" in rows:
        by_rank = {r: methods_report.by_seed(cells, case_of(r), rows["lora"][0], SEEDS) for r in RANKS}
        losses = {r: [cell["validation_loss"] for cell in its] for r, its in by_rank.items() if its}
        if len(losses) == len(RANKS):
            (HERE / "methods_ranks.png").write_bytes(methods_report.draw_ranks(losses))


def fill(options: argparse.Namespace) -> None:
    """Run the cells that are missing, so many at a time, and write each down when it is done."""
    cells: dict[Cell, dict[str, Any]] = read_cells()
    end = time.monotonic() + 60 * options.minutes
    running: dict[Future[dict[str, Any]], Cell] = {}
    with ThreadPoolExecutor(options.workers) as pool:
        while True:
            for cell in missing(cells, options.only):
                if len(running) < options.workers and cell not in running.values() and time.monotonic() < end:
                    running[pool.submit(in_a_process, cell, options.threads)] = cell
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                cells[cell] = future.result()
                write_cells(cells)
                print(line(cell, cells[cell]), flush=True)


def missing(cells: dict[Cell, dict[str, Any]], only: list[str]) -> Iterator[Cell]:
    """The cells to run next, the most urgent first: every method's rate, then the seeds, then the ranks."""
    methods = [case for case in COMPARED if case in only]
    found = {case: next_rates(cells, case) for case in methods}
    tried = Counter(case for case, _, seed in cells if seed == 0)
    yield from ((case, lr, 0) for case in sorted(methods, key=lambda case: tried[case]) for lr in found[case][:1])
    for seed in SEEDS[1:]:
        for case in methods:
            if not found[case] and (case, best_rate(cells, case), seed) not in cells:
                yield case, best_rate(cells, case), seed
    if "lora" in only and not found["lora"]:
        lr = best_rate(cells, "lora")
        yield from ((case_of(r), lr, seed) for seed in SEEDS for r in RANKS if (case_of(r), lr, seed) not in cells)


def case_of(r: int) -> str:
    """LoRA with this rank; with the usual one it is the method's own row."""
    return "lora" if r == USUAL_R else f"lora r={r}"


def next_rates(cells: dict[Cell, dict[str, Any]], case: str) -> list[float]:
    """The rates to try next; none where the best one has a worse one on either side."""
    tried = losses_by_power(cells, case)
    if not tried:
        return [rate(case, 0)]
    best = min(tried, key=lambda power: tried[power])
    wanted = [best + 1, best - 1] if math.isfinite(tried[best]) else [min(tried) - 1]
    return [rate(case, power) for power in wanted if power not in tried]


def best_rate(cells: dict[Cell, dict[str, Any]], case: str) -> float:
    tried = losses_by_power(cells, case)
    return rate(case, min(tried, key=lambda power: tried[power]))


def losses_by_power(cells: dict[Cell, dict[str, Any]], case: str) -> dict[int, float]:
    """What each tried rate of a case gave with seed 0, by how often it was multiplied by 3; infinity: it broke off."""
    losses = {}
    for power in range(-9, 10):
        if found := cells.get((case, rate(case, power), 0)):
            loss = found.get("validation_loss", math.inf)
            losses[power] = loss if math.isfinite(loss) else math.inf
    return losses


def rate(case: str, power: int) -> float:
    """The first guess times so many threes, to two digits."""
    return float(f"{CASES[case][2] * 3.0**power:.1e}")


def in_a_process(cell: Cell, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", *map(str, cell)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{cell} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_cell(case: str, lr: float, seed: int) -> dict[str, Any]:
    """Train once, and judge; of a training that breaks off only that is known."""
    from minilora.classroom.demo import encode
    from minilora.torch_lora.inject import count_parameters
    from minilora.train.evaluate import GENERAL_TOKENS, english_loss, english_tokens
    from minilora.train.finetune import Recipe, fine_tune
    from minilora.train.methods import METHODS, put_new
    from minilora.train.orders import make_orders

    model, tokenizer = base_for(case)
    assert tokenizer.pad is not None
    data = make_orders(seed, STEPS * BATCH, N_VALIDATION, N_TEST)
    text = english_tokens(tokenizer, GENERAL_TOKENS)
    before = english_loss(model, text)
    name, settings = CASES[case][0], settings_of(case, tokenizer, seed)
    put_new(model, name, settings)
    found: dict[str, Any] = {"trainable": count_parameters(model).trainable}
    samples, recipe = [encode(tokenizer, order) for order in data.train], Recipe(lr=lr, batch_size=BATCH, seed=seed)
    start = time.perf_counter()
    try:
        training = fine_tune(model, samples, recipe, pad=tokenizer.pad, learning=METHODS[name].learning(settings))
    except FloatingPointError as error:
        return found | {"broke_off": str(error)}
    found["train_s"] = round(time.perf_counter() - start, 1)  # beside whatever else ran: methods_cost.py measures time
    found["train_losses"] = [round(step.loss, 4) for step in training.steps]
    return found | judge(model, tokenizer, data) | {"forgotten": english_loss(model, text) - before}


def base_for(case: str) -> "tuple[Decoder, Tokenizer]":
    """SmolLM2 in bfloat16; in float32 where all weights train."""
    import torch

    from minilora.llm import load_model
    from minilora.train.methods import METHODS

    all_train = METHODS[CASES[case][0]].save is None
    return load_model("smollm2-135m", dtype=torch.float32 if all_train else torch.bfloat16)


def settings_of(case: str, tokenizer: "Tokenizer", seed: int) -> "Settings":
    """What the case says; virtual tokens begin as the task's own instruction."""
    from minilora.train.orders import INSTRUCTION
    from minilora.train.settings import Settings

    name, given, _ = CASES[case]
    words = tokenizer.encode(INSTRUCTION) if name in ("prefix", "prompt") else []
    return Settings(**given, **({"words": words, "n_virtual": len(words)} if words else {}), seed=seed)


def judge(model: "Decoder", tokenizer: "Tokenizer", data: "Orders") -> dict[str, float]:
    """The loss on what chooses the rate, and how many of the test's answers are right to the letter."""
    from minilora.classroom.demo import encode
    from minilora.train.data import make_batches
    from minilora.train.evaluate import exact_match, generate_answers, mean_loss, valid_json

    assert tokenizer.pad is not None
    held_out = make_batches([encode(tokenizer, order) for order in data.validation], BATCH, tokenizer.pad, seed=0)
    prompts = [tokenizer.encode_chat(order.messages) for order in data.test]
    longest = max(len(tokenizer.encode(order.answer)) for order in data.test) + 8
    answers = generate_answers(model, tokenizer, prompts, longest)
    return {
        "validation_loss": mean_loss(model, held_out),
        "exact": exact_match(answers, [order.answer for order in data.test]),
        "valid_json": valid_json(answers),
    }


def read_cells() -> dict[Cell, dict[str, Any]]:
    rows = json.loads(RESULTS.read_text())["cells"] if RESULTS.exists() else []
    return {(row.pop("case"), row.pop("lr"), row.pop("seed")): row for row in rows}


def write_cells(cells: dict[Cell, dict[str, Any]]) -> None:
    from minilora.files import write_whole

    task = {"steps": STEPS, "batch": BATCH, "validation": N_VALIDATION, "test": N_TEST, "base": "smollm2-135m"}
    rows = [{"case": case, "lr": lr, "seed": seed} | found for (case, lr, seed), found in sorted(cells.items())]
    lines = ",\n".join(f"    {json.dumps(row)}" for row in rows)
    write_whole({RESULTS: f'{{\n  "task": {json.dumps(task)},\n  "cells": [\n{lines}\n  ]\n}}\n'.encode()})


def line(cell: Cell, found: dict[str, Any]) -> str:
    case, lr, seed = cell
    if "exact" not in found:
        return f"{case:<10} lr {lr:<8g} seed {seed}  broke off"
    told = f"loss {found['validation_loss']:.4f}  exact {found['exact']:.0%}  forgotten {found['forgotten']:+.3f}"
    return f"{case:<10} lr {lr:<8g} seed {seed}  {told}  {found['train_s']:.0f} s"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", choices=COMPARED, default=COMPARED, help=", ".join(COMPARED)
    )
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--table", action="store_true", help="measure nothing, draw nothing")
    parser.add_argument("--cell", nargs=3, metavar=("CASE", "LR", "SEED"), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
