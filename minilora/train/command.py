"""`minilora train`: fine-tune a model on one's own samples, and leave an adapter in PEFT's layout.

What the run needs is counted from the model's config and the longest samples, before a weight is read.

Read before: train/jsonl, train/fits, train/finetune.
"""

import argparse
import hashlib
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from minilora.files import write_whole
from minilora.llm.architectures import ALL_LINEAR, read_config
from minilora.llm.load import model_folder
from minilora.llm.model import Decoder
from minilora.llm.sizes import Setup
from minilora.llm.tokenizer import Tokenizer, load_tokenizer, read_json
from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRALinear, inject, save_adapter
from minilora.train.adapted import is_in_4_bits, load_base, longest_text
from minilora.train.checkpoint import Saving
from minilora.train.data import Sample, make_batches
from minilora.train.evaluate import GENERAL_TOKENS, english_tokens
from minilora.train.finetune import Together, fine_tune
from minilora.train.fits import GIB, bytes_needed, check_fits
from minilora.train.jsonl import read_samples, refuse_longer
from minilora.train.judging import Judges, Rules
from minilora.train.templates import MODEL, TEMPLATE_FILE, with_template
from minilora.train.trainer import CTRL_C

METHODS: Mapping[str, Callable[..., nn.Module]] = {"lora": LoRALinear, "qlora": QLoRALinear}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STATE_BITS = {"adamw": 32, "adamw-8bit": 8}
RUN, CHECKPOINT, BEST = "run.json", "checkpoint.safetensors", "best"
MOST_DROPPED_TOLD = 20


def run(args: argparse.Namespace, free_bytes: int, *, resume: bool = False) -> int:
    """Train as the options of cli say, in this process, or in all that torchrun started, of which the first one tells.

    Raises:
        ValueError: also if several processes were asked for what only one can do.
        ValueError, MemoryError, FloatingPointError: as train_here.
    """
    if args.parallel is None and not dist.is_torchelastic_launched():
        return train_here(args, free_bytes, resume=resume)
    from minilora.train.distributed import process_group  # brings torch's compiler

    args.parallel = args.parallel or "ddp"
    if args.eval_data is not None:
        raise ValueError("--eval-data is measured by one process: leave it out, or train without torchrun")
    if resume and args.dropout:
        raise ValueError("several processes do not save all random numbers that --dropout needs: begin anew elsewhere")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes that share this machine's memory
    with process_group() as (rank, world), redirect_stdout(sys.stdout if rank == 0 else io.StringIO()):
        return train_here(args, free_bytes // local, resume=resume, rank=rank, world=world)


def train_here(
    args: argparse.Namespace, free_bytes: int, *, resume: bool = False, rank: int = 0, world: int = 1
) -> int:
    """Train in this process, number `rank` of `world`, if it fits into `free_bytes`.

    Ctrl-C saves, and says how to go on. What a killed process leaves is a folder to `resume` from: with the same bits
    at the end as if it had never been killed.

    Raises:
        ValueError: if an option, the data or the model is impossible, or the folder holds another run.
        MemoryError: if it would not fit, before anything is loaded.
        FloatingPointError: if training breaks off; the adapter is that of the step before.
    """
    out = Path(args.out)
    if rank == 0 and not resume:  # the others might see what the first has begun to write
        refuse_used(out)
    plan = planned(args, free_bytes, world)
    if rank == 0:
        write_whole({out / RUN: json.dumps(findable(args), indent=2).encode()})  # if this cannot be, better now
    model, tokenizer = load_base(args.base, DTYPES[args.dtype])
    torch.manual_seed(args.seed + rank)  # of dropout
    start, wrap = torch.Generator().manual_seed(args.seed), METHODS[args.method]
    settings = {"r": args.r, "alpha": 2 * args.r if args.alpha is None else args.alpha, "dropout": args.dropout}
    settings |= {"use_rslora": args.rslora, "generator": start}
    report = inject(model, targets_of(args), lambda base: wrap(base, **settings))
    model.model.gradient_checkpointing = args.checkpointing
    print(f"{args.method}, r={args.r}: {report.count}")
    template = template_of(args, tokenizer)

    def keep_best(step: int) -> None:
        save(model, out / BEST, template)

    together = in_processes(model, args, rank)
    try:
        training = fine_tune(
            model,
            plan.samples,
            pad=plan.pad,
            lr=args.lr,
            batch_size=args.batch,
            seed=args.seed,
            epochs=args.epochs,
            state_bits=STATE_BITS[args.optimizer],
            n_parts=args.accumulate,
            pack_tokens=args.pack,
            weight_decay=args.weight_decay,
            max_grad_norm=args.max_grad_norm,
            shape=args.schedule,
            warmup=args.warmup,
            saving=Saving(out / CHECKPOINT, facts(args, model.origin.sha256) | {"processes": world}, args.save_every),
            judged_by=judges(args, plan, tokenizer, keep_best),
            together=together,
        )
    except FloatingPointError:  # what was learnt before is whole
        if rank == 0:
            save(model, out, template)
            print(f"adapter  {out}   (PEFT's layout)")
        raise
    print(training)
    if rank == 0:
        save(model, out, template)
    print(f"adapter  {out}   (PEFT's layout)")
    if (out / BEST).exists() and rank == 0:
        print(f"best     {out / BEST}   (where the loss on --eval-data was lowest)")
    if training.stopped_by == CTRL_C:
        print(f"go on    minilora resume {shlex.quote(str(out))}")
    return 0


def refuse_used(out: Path) -> None:
    """
    Raises:
        ValueError: if a folder holds a training that can go on, or things that are no training's.
    """
    if (out / CHECKPOINT).exists():
        raise ValueError(f"{out} holds a training: go on with `minilora resume {out}`, or choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / RUN).exists():
        raise ValueError(f"{out} holds other things, which a training would mix with its own: choose another --out")


def in_processes(model: nn.Module, args: argparse.Namespace, rank: int) -> Together | None:
    """What several processes do otherwise, if there are; None in one."""
    if args.parallel is None:
        return None
    from minilora.train import distributed

    way = {"ddp": distributed.data_parallel, "fsdp": distributed.sharded}[args.parallel]
    return distributed.Together(rank, way(model, args.accumulate))


def targets_of(args: argparse.Namespace) -> str | list[str]:
    """What --targets names: several modules, or one word for all linear layers."""
    return args.targets if args.targets == ALL_LINEAR else [name.strip() for name in args.targets.split(",")]


def template_of(args: argparse.Namespace, tokenizer: Tokenizer) -> str | None:
    """The chat template that is trained with, where it is not the model's own."""
    return None if args.template == MODEL else with_template(tokenizer, args.template).settings["chat_template"]


def findable(args: argparse.Namespace) -> dict[str, object]:
    """The options, with files and folders by names that hold in every working directory: `resume` reads them."""
    options = vars(args)
    names = [name for name in ("data", "eval_data", "base") if options[name] and Path(options[name]).exists()]
    return options | {name: str(Path(options[name]).resolve()) for name in names}


def save(model: Decoder, out: Path, template: str | None) -> None:
    """Write a model's adapter, with the chat template that it was trained with if that is another than the base's."""
    if template is None:  # not the one of a training that was here before
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        write_whole({out / TEMPLATE_FILE: template.encode()})
    save_adapter(model, out, base_name=model.origin.name, base_sha256=model.origin.sha256)


def without_longer(samples: Sequence[Sample], max_tokens: int) -> list[Sample]:
    """Drop samples with more tokens, and say which.

    Raises:
        ValueError: if none is left.
    """
    kept = [sample for sample in samples if len(sample.tokens) <= max_tokens]
    dropped = [sample.name.removeprefix("line ") for sample in samples if len(sample.tokens) > max_tokens]
    if not kept:
        raise ValueError(f"all {len(samples):,} samples have more than {max_tokens:,} tokens: raise --max-tokens")
    if dropped:
        told = ", ".join(dropped[:MOST_DROPPED_TOLD]) + (", …" if len(dropped) > MOST_DROPPED_TOLD else "")
        print(f"{len(dropped):,} samples have more than {max_tokens:,} tokens and are dropped: lines {told}")
    return kept


def words_of(folder: Path) -> list[str]:
    """The options of the training in a folder, as they would be typed; --out is the folder as it is named now.

    Raises:
        ValueError: if there is no training in it.
    """
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} has no {RUN}: it holds no training to go on with")
    options = read_json(folder / RUN) | {"out": str(folder)}
    given = {f"--{name.replace('_', '-')}": value for name, value in options.items() if value not in (None, False)}
    return [word for name, value in given.items() for word in ([name] if value is True else [f"{name}={value}"])]


def facts(args: argparse.Namespace, base_sha256: str) -> dict[str, object]:
    """All that the result depends on: options, and the contents of files in place of their names."""
    options = {name: value for name, value in vars(args).items() if name not in ("base", "out", "save_every")}
    for name in ("data", "eval_data"):
        options[name] = options[name] and hashlib.sha256(Path(options[name]).read_bytes()).hexdigest()
    return options | {"base_sha256": base_sha256}


def judges(
    args: argparse.Namespace, plan: "Plan", tokenizer: Tokenizer, keep_best: Callable[[int], None]
) -> Judges | None:
    """Who measures the training as it goes, if there are samples to measure it on."""
    if not plan.held_out:
        return None
    held_out = make_batches(plan.held_out, args.batch, plan.pad, seed=0)
    return Judges(held_out, english_tokens(tokenizer, GENERAL_TOKENS), plan.rules, keep_best)


@dataclass(frozen=True)
class Plan:
    """What a run needs besides the weights."""

    samples: Sequence[Sample]
    held_out: Sequence[Sample]  # that it is measured on
    rules: Rules
    pad: int  # a token


def planned(args: argparse.Namespace, free_bytes: int, world: int = 1) -> Plan:
    """Check the whole run, as far as can be without the weights."""
    if args.epochs < 1 or args.batch < 1 or not 1 <= args.accumulate <= args.batch:
        raise ValueError(
            f"epochs are {args.epochs}, and a batch of {args.batch} is taken in {args.accumulate} parts: "
            "choose 1 or more of each, and no more parts than a batch has samples"
        )
    if args.eval_data is None and (args.patience or args.max_forgetting):
        raise ValueError("--patience and --max-forgetting judge by samples that are not trained on: give --eval-data")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"the learning rate is {args.lr}: choose one above 0, such as 2e-4")
    if not (0 <= args.warmup < 1 and args.weight_decay >= 0 and args.max_grad_norm > 0):
        raise ValueError(
            f"warm-up is {args.warmup}, weight decay {args.weight_decay}, and gradients are clipped to a norm of "
            f"{args.max_grad_norm}: choose a share from 0 to 1, a number from 0 on, and one above 0"
        )
    rules = Rules(args.eval_every, args.patience, args.max_forgetting)
    if args.base.endswith(".gguf"):
        raise ValueError(f"{args.base} is a GGUF file, made for answering: train on the folder that it was made from")
    if args.method != "qlora" and is_in_4_bits(args.base):
        raise ValueError(f"{args.base} holds its weights in 4 bits: --method qlora trains over them")
    folder = model_folder(args.base, weights=False)
    arch, tokenizer = read_config(folder / "config.json"), load_tokenizer(folder)
    samples = read_samples(Path(args.data), tokenizer, args.template)
    if args.max_tokens is not None:
        samples = without_longer(samples, args.max_tokens)
    held_out = [] if args.eval_data is None else read_samples(Path(args.eval_data), tokenizer, args.template)
    longest = max(samples, key=lambda sample: len(sample.tokens))
    most = longest_text(folder)
    if args.pack is not None and not len(longest.tokens) <= args.pack <= most:
        raise ValueError(
            f"--pack is {args.pack}: a row holds the longest sample, {longest.name} of {len(longest.tokens):,} tokens, "
            f"and the model was made for {most:,}"
        )
    refuse_longer(samples, most, args.data, " with --max-tokens")
    refuse_longer(held_out, most, args.eval_data or "")
    rows = -(-min(args.batch, len(samples)) // world)
    setup = Setup(
        method=args.method,
        r=args.r,
        targets=ALL_LINEAR if args.targets == ALL_LINEAR else tuple(targets_of(args)),
        dtype=args.dtype,
        optimizer=args.optimizer,
        batch=-(-rows // args.accumulate),
        seq=args.pack or len(longest.tokens),
        checkpointing=args.checkpointing,
    )
    masks = 0 if args.pack is None else setup.batch * args.pack**2  # one byte for each two tokens of a row
    check_fits(arch, setup, free_bytes - masks, longest.name, rows)
    print(
        f"{len(samples):,} samples of up to {len(longest.tokens):,} tokens; "
        f"needs {bytes_needed(arch, setup) / GIB:.2f} of {free_bytes / GIB:.2f} GiB"
    )
    assert tokenizer.pad is not None  # read_samples asks for an eos, which stands in
    return Plan(samples, held_out, rules, tokenizer.pad)
