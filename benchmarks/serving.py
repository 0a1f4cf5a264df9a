"""One batch with another adapter in each row: ours beside our plain base and PEFT's `adapter_names`; and many adapters.

    python benchmarks/serving.py                        both experiments
    python benchmarks/serving.py --only batch           16 rows over 16 adapters of r 16 on all linear layers, bfloat16
    python benchmarks/serving.py --only zipf            2,000 adapters of r 4 on q and v, memory for 200
    python benchmarks/serving.py --cpu-time             seconds that cores worked, not those of the clock: for a machine
                                                        that others use; with --threads 1, for threads wait by working
    python benchmarks/serving.py --json FILE            the same numbers as JSON

batch   SmolLM2-135M reads 64 tokens a row, then a token a row at a time. Sides take turns in every round; a ratio is
        one side over another within one round, and what is printed is the median of rounds (and the least and
        largest). Ours and PEFT's logits of the prompt are compared in float32 first, or nothing is measured. PEFT's
        adapters are bfloat16 as the base (autocast_adapter_dtype=False). Stacks are made before the measured rounds;
        what that takes is printed.

zipf    Batches of 16 requests: 16 prompt tokens and 16 new ones for an adapter drawn with probability 1 / rank, beside
        the same requests over 5 adapters, by turns. Loads from the disk are inside the times. A request's latency is
        that of its batch, as nothing queues.
"""

import argparse
import copy
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import about

ROWS, PROMPT_TOKENS, DECODE_STEPS = 16, 64, 8
REGISTERED, IN_MEMORY, FEW_ADAPTERS, ZIPF_PROMPT, ZIPF_NEW = 2000, 200, 5, 16, 16
PACKAGES = ["torch", "transformers", "peft"]
WARM_BATCHES = 60
Times = dict[str, list[float]]
Clock = Callable[[], float]


def main() -> None:
    options = parse()
    import torch

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    facts = about(*PACKAGES) | {
        "threads": options.threads,
        "seconds": "of cores" if options.cpu_time else "of the clock",
    }
    print("\n".join(f"{name:<24}{value}" for name, value in facts.items()), end="\n\n")
    found: dict[str, Any] = {"machine": facts}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if options.only in (None, "batch"):
            found["batch"] = measure_batch(Path(folder) / "batch", options.rounds, clock)
        if options.only in (None, "zipf"):
            found["zipf"] = measure_zipf(Path(folder) / "zipf", options.batches, clock)
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


def measure_batch(folder: Path, rounds: int, clock: Clock) -> dict[str, Any]:
    import torch

    adapters = write_adapters(folder, ROWS, "all-linear", r=16)
    tokens = torch.randint(0, 49_000, (ROWS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))
    refuse_other_logits(adapters, tokens)
    from minilora.torch_lora.serve import AdapterServer

    base, model = our_model(torch.bfloat16), our_model(torch.bfloat16)
    server = AdapterServer(model, limit_bytes=10**9)
    for name, path in adapters.items():
        server.cache.register(name, path)
    plain_peft, with_adapters = peft_sides(adapters, torch.bfloat16)
    start = clock()
    with server.rows(list(adapters)):
        loaded = clock()
        ours(model)(tokens)
        print(f"16 adapters loaded in {loaded - start:.2f} s, stacked with the first prompt in ", end="")
        print(f"{clock() - loaded:.2f} s\n")
        sides = {"ours": ours(model), "our base": ours(base), "PEFT": with_adapters, "PEFT's base": plain_peft}
        prompts, steps = by_turns(sides, tokens, rounds, clock)
    return {"prompt": report("prompt", prompts), "token": report("one token a row", steps)}


def by_turns(sides: dict[str, Any], tokens: Any, rounds: int, clock: Clock) -> tuple[Times, Times]:
    """Seconds of the prompt, and of a step with one token a row, of each side in each round but the first."""
    prompts: Times = {name: [] for name in sides}
    steps: Times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, read in sorted(sides.items(), reverse=number % 2 == 1):
            start = clock()
            step = read(tokens)
            mid = clock()
            for _ in range(DECODE_STEPS):
                step(tokens[:, :1])
            if number:
                prompts[name].append(mid - start)
                steps[name].append((clock() - mid) / DECODE_STEPS)
    return prompts, steps


def report(title: str, times: Times) -> dict[str, Any]:
    print(title)
    found: dict[str, Any] = {"seconds": times}
    for name, seconds in times.items():
        print(f"  {name:<14}{1e3 * statistics.median(seconds):8.1f} ms")
    for mine, theirs in (("ours", "our base"), ("PEFT", "PEFT's base"), ("ours", "PEFT")):
        ratios = [a / b for a, b in zip(times[mine], times[theirs], strict=True)]
        found[f"{mine} / {theirs}"] = statistics.median(ratios)
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {mine + ' / ' + theirs:<20}{statistics.median(ratios):6.2f} {spread}")
    print()
    return found


def ours(model: Any) -> Callable[[Any], Callable[[Any], Any]]:
    """Read a prompt, and give what reads a token a row behind it."""
    from minilora.llm.model import KVCache

    def read(tokens: Any) -> Callable[[Any], Any]:
        cache = KVCache(model.config.n_layers, max_tokens=PROMPT_TOKENS + DECODE_STEPS)

        def step(new: Any) -> Any:
            return model.lm_head(model.model(new, cache=cache)[:, -1])

        step(tokens)
        return step

    return read


def peft_sides(adapters: dict[str, Path], dtype: Any) -> tuple[Any, Any]:
    """transformers' base, and PEFT with all adapters loaded, as `ours` gives them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, DynamicCache

    from minilora.llm import smollm2

    base = AutoModelForCausalLM.from_pretrained(smollm2.fetch(), dtype=dtype).eval()
    plain = copy.deepcopy(base)
    model: Any = None
    for name, path in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.load_adapter(path, name, autocast_adapter_dtype=False)
    model.eval()

    def side(model: Any, **names: Any) -> Callable[[Any], Callable[[Any], Any]]:
        def read(tokens: Any) -> Callable[[Any], Any]:
            cache = DynamicCache()

            def step(new: Any) -> Any:
                return model(input_ids=new, past_key_values=cache, logits_to_keep=1, **names).logits[:, -1]

            step.first = step(tokens)  # type: ignore[attr-defined]
            return step

        return read

    return side(plain), side(model, adapter_names=list(adapters))


def refuse_other_logits(adapters: dict[str, Path], tokens: Any) -> None:
    """In float32, both sides' logits of every row must be the same but for rounding."""
    import torch

    from minilora.torch_lora.serve import AdapterServer

    model = our_model(torch.float32)
    server = AdapterServer(model, limit_bytes=10**9)
    for name, path in adapters.items():
        server.cache.register(name, path)
    plain = model.lm_head(model.model(tokens)[:, -1])
    with server.rows(list(adapters)):
        mine = model.lm_head(model.model(tokens)[:, -1])
    theirs = peft_sides(adapters, torch.float32)[1](tokens).first
    apart, moved = (mine - theirs).abs().max().item(), (mine - plain).abs().max().item()
    if not apart < 1e-3 < 1 < moved:
        raise SystemExit(f"not the same work: logits differ by {apart:.1e} from PEFT's, by {moved:.1e} from the base's")
    print(f"float32 logits: {apart:.1e} from PEFT's at most, where adapters move them by up to {moved:.1f}")


def measure_zipf(folder: Path, n_batches: int, clock: Clock) -> dict[str, Any]:
    import torch

    from minilora.torch_lora.serve import AdapterServer

    start = clock()
    adapters = write_adapters(folder, REGISTERED, ["q_proj", "v_proj"], r=4)
    print(f"{REGISTERED} adapters written in {clock() - start:.1f} s")
    sides: dict[str, Any] = {}
    for title, names in (("2,000", list(adapters)), ("5", list(adapters)[:FEW_ADAPTERS])):
        model = our_model(torch.bfloat16)
        size_bytes = next(iter(adapters.values())).joinpath("adapter_model.safetensors").stat().st_size // 2
        server = AdapterServer(model, limit_bytes=IN_MEMORY * size_bytes)
        start = clock()
        for name in names:
            server.cache.register(name, adapters[name])
        print(f"{len(names)} registered in {clock() - start:.2f} s")
        sides[title] = (model, server, requests(names, seed=len(names)))
    for _, server, batches in sides.values():  # the cache as it is after a while, without the forward passes
        for _ in range(WARM_BATCHES):
            with server.rows(next(batches)):
                pass
    before = {title: server.cache.counts for title, (_, server, _) in sides.items()}
    seconds: Times = {title: [] for title in sides}
    for number in range(n_batches + 1):
        for title, (model, server, batches) in sorted(sides.items(), reverse=number % 2 == 1):
            took = serve_one(model, server, next(batches), clock)
            if number:
                seconds[title].append(took)
    return report_zipf(sides, before, seconds)


def requests(names: list[str], seed: int) -> Iterator[list[str]]:
    """Batches of names, each drawn with probability 1 / its place."""
    draw, weights = random.Random(seed), [1 / place for place in range(1, len(names) + 1)]
    while True:
        yield draw.choices(names, weights, k=ROWS)


def serve_one(model: Any, server: Any, names: list[str], clock: Clock) -> float:
    from minilora.llm import generate

    prompts = [[(row * 31 + place * 7) % 49_000 for place in range(ZIPF_PROMPT)] for row in range(ROWS)]
    start = clock()
    with server.rows(names) as batch:
        generate(model, prompts, max_new_tokens=ZIPF_NEW, on_rows_kept=batch.keep)
    return clock() - start


def report_zipf(sides: dict[str, Any], before: dict[str, Any], seconds: Times) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": seconds}
    for title, (_, server, _) in sides.items():
        counts, first, took = server.cache.counts, before[title], seconds[title]
        hits, misses = counts.hits - first.hits, counts.misses - first.misses
        p95 = statistics.quantiles(took, n=20)[-1]
        rate = ROWS * len(took) / sum(took)
        found[title] = {"requests_per_s": rate, "hit_rate": hits / (hits + misses), "p95_s": p95} | vars(counts)
        print(
            f"  {title:>5} adapters: {rate:6.1f} requests/s, p95 {p95:.2f} s, hit rate {hits / (hits + misses):.2f}, ",
            end="",
        )
        print(
            f"{misses / len(took):.1f} loads a batch, {counts.resident} resident, {counts.resident_bytes / 1e6:.1f} MB"
        )
    ratios = [few / many for many, few in zip(*(seconds[title] for title in sides), strict=True)]
    found["throughput_ratio"] = statistics.median(ratios)
    print(f"  throughput of 2,000 / of 5: {statistics.median(ratios):.2f} (median of rounds)")
    return found


def our_model(dtype: Any) -> Any:
    from minilora.llm import load_model

    return load_model("smollm2-135m", dtype=dtype)[0].eval()


def write_adapters(folder: Path, n: int, targets: Any, *, r: int) -> dict[str, Path]:
    """n adapters of random numbers, each in a folder of its own."""
    import torch

    from minilora.torch_lora import LoRALinear, inject, save_adapter

    model, generator = our_model(torch.float32), torch.Generator().manual_seed(0)
    inject(model, targets, lambda base: LoRALinear(base, r=r, alpha=2 * r))
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    folders = {f"adapter-{number}": folder / str(number) for number in range(n)}
    for path in folders.values():
        for layer in layers:
            layer.A.normal_(std=0.02, generator=generator)
            layer.B.normal_(std=0.02, generator=generator)
        path.mkdir(parents=True)
        save_adapter(model, path)
    return folders


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["batch", "zipf"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
