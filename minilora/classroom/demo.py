"""`minilora demo`: teach a real 135M-parameter model a task in a few minutes, and measure everything about it.

    before     the published model answers unseen sentences
    training   LoRA on every linear layer; with QLoRA over weights rounded to 4 bits (NF4)
    after      the same sentences; the price on plain English; the merge; the update's singular values

It leaves a folder with the adapter in PEFT's layout and one HTML report. Shares (`exact_after`, …) are from 0 to 1.

Read before: train/extraction, train/trainer. The page itself is made by report.
"""

import argparse
import copy
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.classroom.report import DemoResult, Perplexities, report_html
from minilora.files import write_whole
from minilora.llm.load import load_model
from minilora.llm.model import Decoder
from minilora.llm.tokenizer import Tokenizer
from minilora.qlora import NF4Linear, QLoRALinear
from minilora.torch_lora import LoRALinear, inject, save_adapter
from minilora.torch_lora.inject import ALL_LINEAR, lora_layers
from minilora.torch_lora.layers import LoRALayer
from minilora.train.data import Sample, mask_prompt
from minilora.train.evaluate import english_tokens, exact_match, generate_answers, perplexity, valid_json
from minilora.train.extraction import Example, make_extraction
from minilora.train.finetune import Recipe, fine_tune
from minilora.train.orders import Order

METHODS: Mapping[str, Callable[..., nn.Module]] = {"qlora": QLoRALinear, "lora": LoRALinear}
BASE = "smollm2-135m"
BATCH_SIZE = 8
MERGE_PROMPTS = 8
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run of the demo is made of.

    Raises:
        ValueError: if the method does not exist or a number is impossible (all of them at once).
    """

    method: str = "qlora"
    steps: int = 64
    r: int = 16
    lr: float = 2e-3
    seed: int = 0
    n_eval: int = 200
    perplexity_tokens: int = 4096
    out: Path = Path("runs/demo")

    def __post_init__(self) -> None:
        problems = []
        if self.method not in METHODS:
            problems.append(f"method is {self.method!r}: the methods are {sorted(METHODS)}")
        if self.steps < 2:
            problems.append(f"steps is {self.steps}: one to warm up and one to train are the least")
        if self.r < 1:
            problems.append(f"r is {self.r}: a rank is at least 1")
        if not 0 < self.lr < 1:
            problems.append(f"lr is {self.lr}: a learning rate is between 0 and 1, such as 1e-3")
        if self.n_eval < 1:
            problems.append(f"n_eval is {self.n_eval}: at least one sentence has to be answered")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def alpha(self) -> float:
        """Twice the rank: the update is B A times 2, whatever r is."""
        return 2.0 * self.r


def run_demo(
    settings: Settings,
    load: Callable[..., tuple[Decoder, Tokenizer]] = load_model,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Measure, train, measure again; leave the adapter and the report in `settings.out`."""
    settings.out.mkdir(parents=True, exist_ok=True)  # if this cannot be, better now than after training
    model, tokenizer = load(BASE, dtype=torch.bfloat16)
    if settings.r > model.config.hidden_size:
        raise ValueError(
            f"r is {settings.r}, above {model.config.hidden_size}, the width of the model: B A cannot have that rank; "
            "choose a smaller one, such as 16"
        )
    data = make_extraction(settings.seed, settings.steps * BATCH_SIZE, settings.n_eval)
    prompts = [tokenizer.encode_chat(example.messages) for example in data.test]
    references = [example.answer for example in data.test]
    max_new_tokens = max(len(tokenizer.encode(answer)) for answer in references) + 8
    text = english_tokens(tokenizer, settings.perplexity_tokens)

    say(f"before training: {settings.n_eval} unseen sentences")
    before = generate_answers(model, tokenizer, prompts, max_new_tokens)
    say(f"  exact {exact_match(before, references):.1%}, valid JSON {valid_json(before):.1%}")
    perplexity_base, perplexity_nf4 = perplexity(model, text), perplexity(in_nf4(model), text)

    wrap, start = METHODS[settings.method], torch.Generator().manual_seed(settings.seed)
    report = inject(model, ALL_LINEAR, lambda base: wrap(base, r=settings.r, alpha=settings.alpha, generator=start))
    say(f"{settings.method}, r={settings.r}: {report.count}")
    assert tokenizer.pad is not None
    training = fine_tune(
        model,
        [encode(tokenizer, example) for example in data.train],
        Recipe(lr=settings.lr, batch_size=BATCH_SIZE, seed=settings.seed),
        pad=tokenizer.pad,
    )
    say(f"  {training}")
    peak_gib = peak_memory_bytes() / GIB

    say("after training: the same sentences")
    after = generate_answers(model, tokenizer, prompts, max_new_tokens)
    say(f"  exact {exact_match(after, references):.1%}, valid JSON {valid_json(after):.1%}")
    save_adapter(model, settings.out / "adapter", base_name=model.origin.name, base_sha256=model.origin.sha256)
    spectrum = {name: update_spectrum(layer) for name, layer in lora_layers(model).items()}
    perplexity_after = perplexity(model, text)
    result = DemoResult(
        method=settings.method,
        steps=len(training.steps),
        r=settings.r,
        alpha=settings.alpha,
        lr=settings.lr,
        seed=settings.seed,
        batch_size=BATCH_SIZE,
        examples=data.test,
        before=before,
        after=after,
        training=training,
        trainable=report.count.trainable,
        total=report.count.total,
        peak_gib=peak_gib,
        perplexities=Perplexities(perplexity_base, perplexity_nf4, perplexity_after, len(text)),
        merge_relative_error_bf16=merge_relative_error(model, prompts[:MERGE_PROMPTS]),
        merge_relative_error=merge_relative_error(copy.deepcopy(model).float(), prompts[:MERGE_PROMPTS]),
        spectrum=spectrum,
        adapter_path=settings.out / "adapter",
        base_name=model.origin.name,
        base_license=model.origin.license,
        base_attribution=model.origin.attribution,
    )
    write_whole({settings.out / "report.html": report_html(result).encode()})
    return result


def encode(tokenizer: Tokenizer, example: Example | Order) -> Sample:
    """One example as tokens: the chat up to the answer carries no loss, the answer and its end do."""
    assert tokenizer.eos is not None
    return mask_prompt(
        tokenizer.encode_chat(example.messages), tokenizer.encode(example.answer), tokenizer.eos, name=example.sentence
    )


def in_nf4(model: Decoder) -> Decoder:
    """A copy of the model whose linear layers are in 4 bits, the head aside."""
    copied = copy.deepcopy(model)
    inject(copied, ALL_LINEAR, NF4Linear)
    return copied


@torch.no_grad()
def update_spectrum(layer: LoRALayer) -> list[float]:
    """Singular values of the update, largest first, without ever forming it.

        B = Q₁ R₁,  Aᵀ = Q₂ R₂   ⇒   scaling · B A = Q₁ (scaling · R₁ R₂ᵀ) Q₂ᵀ

    Q₁ and Q₂ have orthonormal columns, so the r × r matrix in the middle has the singular values of the whole.
    """
    R1 = torch.linalg.qr(layer.B.double(), mode="r").R
    R2 = torch.linalg.qr(layer.A.double().T, mode="r").R
    return torch.linalg.svdvals(layer.scaling * R1 @ R2.T).tolist()


@torch.no_grad()
def merge_relative_error(model: Decoder, prompts: Sequence[Sequence[int]]) -> float:
    """How far the merged model is from the live one, in units of what the adapter does at all.

        ‖logits merged − logits live‖ / ‖logits live − logits base‖

    Relative to the logits alone every error looks small, and an adapter lost in merging would not be seen. The
    merged weights are those of `fused`, in the dtype of the model's other weights. The model is left as it was.
    """
    dtype = next(model.model.embed_tokens.parameters()).dtype
    layers = lora_layers(model)

    def logits() -> Tensor:
        return torch.cat([model(torch.tensor([prompt]))[0].float() for prompt in prompts])

    live = logits()
    with replaced(model, {name: layer.fused(dtype) for name, layer in layers.items()}):
        merged = logits()
    with replaced(model, {name: layer.base for name, layer in layers.items()}):
        base = logits()
    return ((merged - live).norm() / (live - base).norm()).item()


@contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules under these names for the length of a `with`."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def peak_memory_bytes() -> int:
    """The most memory this process has had in use so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage there counts the process that started this one too
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main_from_args(args: argparse.Namespace, load: Callable[..., tuple[Decoder, Tokenizer]] = load_model) -> int:
    """Run the demo with the options that were given (None: the default), print where everything is."""
    started = time.perf_counter()
    names = ("method", "steps", "r", "lr", "seed", "n_eval", "out")
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if "out" in given:
        given["out"] = Path(given["out"])
    settings = Settings(**given)
    if args.json and Path(args.json).is_dir():
        raise IsADirectoryError(f"cannot write {args.json}: it is a folder; name a file in it")
    result = run_demo(settings, load)
    if args.json:
        numbers = json.dumps(result.numbers(), indent=2, ensure_ascii=False) + "\n"
        write_whole({Path(args.json): numbers.encode()})
    print(result.summary())
    print(f"report   {settings.out / 'report.html'}")
    print(f"adapter  {result.adapter_path}   (PEFT's layout)")
    print(f"in all   {time.perf_counter() - started:.0f} s")
    return 0
