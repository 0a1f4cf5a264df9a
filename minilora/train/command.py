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
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from minilora.files import write_whole
from minilora.llm.architectures import ALL_LINEAR, read_config
from minilora.llm.config import ModelConfig
from minilora.llm.load import load_model, model_folder
from minilora.llm.model import Decoder
from minilora.llm.sizes import Setup
from minilora.llm.tokenizer import Tokenizer, load_tokenizer, read_json
from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRALinear, inject, save_adapter
from minilora.train.checkpoint import Saving
from minilora.train.data import Batch, Sample, make_batches
from minilora.train.evaluate import english_tokens
from minilora.train.finetune import fine_tune
from minilora.train.fits import GIB, bytes_needed, check_fits
from minilora.train.jsonl import read_samples
from minilora.train.judging import Judges, Rules
from minilora.train.templates import TEMPLATE_FILE, TEMPLATES
from minilora.train.trainer import CTRL_C

METHODS: Mapping[str, Callable[..., nn.Module]] = {"lora": LoRALinear, "qlora": QLoRALinear}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STATE_BITS = {"adamw": 32, "adamw-8bit": 8}
RUN, CHECKPOINT = "run.json", "checkpoint.safetensors"
MOST_DROPPED_TOLD = 20
GENERAL_TOKENS = 4096  # of plain English


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
    if not resume and (out / CHECKPOINT).exists():
        raise ValueError(f"{out} holds a training: go on with `minilora resume {out}`, or choose another --out")
    samples, pad = planned(args, free_bytes, world)
    if rank == 0:
        write_whole({out / RUN: json.dumps(vars(args), indent=2).encode()})  # if this cannot be, better now than later
    model, tokenizer = load_model(args.base, dtype=DTYPES[args.dtype])
    torch.manual_seed(args.seed + rank)  # of dropout
    start, wrap = torch.Generator().manual_seed(args.seed), METHODS[args.method]
    settings = {"r": args.r, "alpha": 2 * args.r if args.alpha is None else args.alpha, "dropout": args.dropout}
    report = inject(model, ALL_LINEAR, lambda base: wrap(base, **settings, generator=start))
    model.model.gradient_checkpointing = args.checkpointing
    print(f"{args.method}, r={args.r}: {report.count}")
    try:
        training = fine_tune(
            model,
            samples,
            pad=pad,
            lr=args.lr,
            batch_size=args.batch,
            seed=args.seed,
            epochs=args.epochs,
            state_bits=STATE_BITS[args.optimizer],
            n_parts=args.accumulate,
            pack_tokens=args.pack,
            saving=Saving(out / CHECKPOINT, facts(args, model.origin.sha256) | {"processes": world}, args.save_every),
            judged_by=judges(args, tokenizer, pad),
            gradients=in_processes(model, args),
            tells=rank == 0,
        )
    except FloatingPointError:  # what was learnt before is whole
        if rank == 0:
            save(model, out, args.template)
        raise
    print(training)
    if rank == 0:
        save(model, out, args.template)
    if training.stopped_by == CTRL_C:
        print(f"go on    minilora resume {shlex.quote(str(out))}")
    return 0


def in_processes(model: nn.Module, args: argparse.Namespace) -> Callable[[nn.Module, Batch], float] | None:
    """The `gradients` of several processes, if there are; None in one."""
    if args.parallel is None:
        return None
    from minilora.train.distributed import data_parallel, sharded

    return {"ddp": data_parallel, "fsdp": sharded}[args.parallel](model, args.accumulate)


def save(model: Decoder, out: Path, template: str) -> None:
    """Write a model's adapter, with the chat template that it was trained with, and say so."""
    if template in TEMPLATES:
        write_whole({out / TEMPLATE_FILE: TEMPLATES[template].encode()})
    else:  # the model's own: not the one of a training that was here before
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    save_adapter(model, out, base_name=model.origin.name, base_sha256=model.origin.sha256)
    print(f"adapter  {out}   (PEFT's layout)")


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


def judges(args: argparse.Namespace, tokenizer: Tokenizer, pad: int) -> Judges | None:
    """Who measures the training as it goes, if there are samples to measure it on."""
    if args.eval_data is None:
        return None
    samples = read_samples(Path(args.eval_data), tokenizer, args.template)
    general = english_tokens(tokenizer, GENERAL_TOKENS)
    rules = Rules(args.eval_every, args.patience, args.max_forgetting)
    return Judges(make_batches(samples, args.batch, pad, seed=0), general, rules)


def planned(args: argparse.Namespace, free_bytes: int, world: int = 1) -> tuple[list[Sample], int]:
    """Check the whole run, as far as can be without the weights; give its samples, and the token that pads them."""
    if args.epochs < 1 or args.batch < 1 or not 1 <= args.accumulate <= args.batch:
        raise ValueError(
            f"epochs are {args.epochs}, and a batch of {args.batch} is taken in {args.accumulate} parts: "
            "choose 1 or more of each, and no more parts than a batch has samples"
        )
    if args.eval_data is None and (args.patience or args.max_forgetting):
        raise ValueError("--patience and --max-forgetting judge by samples that are not trained on: give --eval-data")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"the learning rate is {args.lr}: choose one above 0, such as 2e-4")
    if args.base.endswith(".gguf"):
        raise ValueError(f"{args.base} is a GGUF file, made for answering: train on the folder that it was made from")
    folder = model_folder(args.base, weights=False)
    arch, tokenizer = read_config(folder / "config.json"), load_tokenizer(folder)
    samples = read_samples(Path(args.data), tokenizer, args.template)
    if args.max_tokens is not None:
        samples = without_longer(samples, args.max_tokens)
    longest = max(samples, key=lambda sample: len(sample.tokens))
    most = ModelConfig.from_hf(read_json(folder / "config.json")).max_seq_len
    if args.pack is not None and not len(longest.tokens) <= args.pack <= most:
        raise ValueError(
            f"--pack is {args.pack}: a row holds the longest sample, {longest.name} of {len(longest.tokens):,} tokens, "
            f"and the model was made for {most:,}"
        )
    if len(longest.tokens) > most:
        raise ValueError(
            f"{longest.name} of {args.data} has {len(longest.tokens):,} tokens, and the model was made for {most:,}: "
            "shorten it, or drop it with --max-tokens"
        )
    rows = -(-min(args.batch, len(samples)) // world)
    setup = Setup(
        method=args.method,
        r=args.r,
        dtype=args.dtype,
        optimizer=args.optimizer,
        batch=-(-rows // args.accumulate),
        seq=args.pack or len(longest.tokens),
        checkpointing=args.checkpointing,
    )
    check_fits(arch, setup, free_bytes, longest.name, rows)
    print(
        f"{len(samples):,} samples of up to {len(longest.tokens):,} tokens; "
        f"needs {bytes_needed(arch, setup) / GIB:.2f} of {free_bytes / GIB:.2f} GiB"
    )
    assert tokenizer.pad is not None  # read_samples asks for an eos, which stands in
    return samples, tokenizer.pad
