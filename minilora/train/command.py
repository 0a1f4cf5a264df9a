"""`minilora train` and `minilora resume`: fine-tune a model on one's own samples, and leave an adapter.

    out/run.json                    the options, by which `resume` goes on
    out/checkpoint.safetensors      where it stands: train/checkpoint
    out/metrics.jsonl, loss.png     every step, and a picture of them
    out/adapter_…                   the adapter, in PEFT's layout, and out/best: where it measured best

Read before: train/plan, which checks it all; train/finetune, which does it.
"""

import argparse
import hashlib
import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from minilora.files import is_unfinished, remove_unfinished_in, write_whole
from minilora.llm.model import Decoder
from minilora.llm.tokenizer import Tokenizer, read_json
from minilora.methods import dora_layer
from minilora.qlora.linear import DEFAULT_FORM, kept_as
from minilora.torch_lora import inject, lora_layer, save_adapter
from minilora.torch_lora.config import LoRAConfig
from minilora.train.adapted import load_base
from minilora.train.checkpoint import Saving
from minilora.train.data import make_batches
from minilora.train.evaluate import GENERAL_TOKENS, english_tokens
from minilora.train.finetune import Together, fine_tune
from minilora.train.judging import Judges
from minilora.train.plan import Plan, planned, targets_of
from minilora.train.templates import MODEL, TEMPLATE_FILE, with_template
from minilora.train.trainer import CTRL_C, Training

METHODS: Mapping[str, tuple[Callable[[nn.Module], nn.Module], Callable[..., nn.Module]]] = {
    "lora": (lambda base: base, lora_layer),
    "dora": (lambda base: base, dora_layer),
    "qlora": (kept_as(DEFAULT_FORM), lora_layer),
}  # what becomes of the base, and the layer over it
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
RUN, CHECKPOINT, BEST = "run.json", "checkpoint.safetensors", "best"
INTERRUPTED = 130  # exit code


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
    """Train in this process, number `rank` of `world`, if it fits into `free_bytes`; give the exit code.

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
        make_ready(out, args, resume=resume)
    model, tokenizer = load_base(args.base, DTYPES[args.dtype])
    torch.manual_seed(args.seed + rank)  # of dropout
    put_new_adapter(model, args, plan.lora)
    template = template_of(args, tokenizer)
    try:
        training = fine_tune(
            model,
            plan.samples,
            plan.recipe,
            pad=plan.pad,
            saving=Saving(out / CHECKPOINT, facts(args, model.origin.sha256) | {"processes": world}, args.save_every),
            judged_by=judges(args, plan, tokenizer, lambda step: save(model, out / BEST, template)),
            together=in_processes(model, args, rank),
        )
    except FloatingPointError:  # what was learnt before is whole
        if rank == 0:
            save(model, out, template)
            print(f"adapter  {out}   (PEFT's layout)")
        raise
    if rank == 0:
        save(model, out, template)
    return told(training, args, world)


def refuse_used(out: Path) -> None:
    """
    Raises:
        ValueError: if a folder holds a training that can go on, or things that are no training's.
    """
    if (out / CHECKPOINT).exists():
        raise ValueError(
            f"{out} holds a training: if it was stopped, go on with `minilora resume {out}`; or choose another --out"
        )
    others = out.is_dir() and any(not is_unfinished(path) for path in out.iterdir())
    if others and not (out / RUN).exists():
        raise ValueError(f"{out} holds other things, which a training would mix with its own: choose another --out")


def make_ready(out: Path, args: argparse.Namespace, *, resume: bool) -> None:
    """Write down the options, and clear away what a killed process left half written, or a run before this one."""
    for folder in (out, out / BEST):
        remove_unfinished_in(folder)
    if not resume:
        shutil.rmtree(out / BEST, ignore_errors=True)
    write_whole({out / RUN: json.dumps(findable(args), indent=2).encode()})  # if this cannot be, better now


def put_new_adapter(model: Decoder, args: argparse.Namespace, lora: LoRAConfig) -> None:
    """Wrap the targets of a model, in place, and say how many numbers train."""
    (keep, wrap), start = METHODS[args.method], torch.Generator().manual_seed(args.seed)
    report = inject(
        model,
        targets_of(args),
        lambda base: wrap(
            keep(base), r=lora.r, alpha=lora.alpha, dropout=lora.dropout, use_rslora=lora.use_rslora, generator=start
        ),
    )
    model.model.gradient_checkpointing = args.checkpointing
    print(f"{args.method}, r={args.r}: {report.count}")


def told(training: Training, args: argparse.Namespace, world: int) -> int:
    """Say how it ended, what it left and how to go on; give the exit code."""
    out = Path(args.out)
    print(training)
    print(f"adapter  {out}   (PEFT's layout)")
    if (out / BEST).exists():
        print(f"best     {out / BEST}   (where the loss on --eval-data was lowest)")
    if training.stopped_by != CTRL_C:
        return 0
    if world == 1:
        print(f"go on    minilora resume {shlex.quote(str(out))}")
        return INTERRUPTED
    if args.dropout:
        print("         with --dropout several processes cannot go on from here")
    else:
        print(f"go on    torchrun --nproc-per-node {world} -m minilora.cli resume {shlex.quote(str(out))}")
    return 0  # else torchrun would call it a failure


def in_processes(model: nn.Module, args: argparse.Namespace, rank: int) -> Together | None:
    """What several processes do otherwise, if there are; None in one."""
    if args.parallel is None:
        return None
    from minilora.train import distributed

    way = {"ddp": distributed.data_parallel, "fsdp": distributed.sharded}[args.parallel]
    return distributed.Together(rank, way(model, args.accumulate))


def template_of(args: argparse.Namespace, tokenizer: Tokenizer) -> str | None:
    """The chat template that is trained with, where it is not the model's own."""
    return None if args.template == MODEL else with_template(tokenizer, args.template).settings["chat_template"]


def findable(args: argparse.Namespace) -> dict[str, object]:
    """The options, with files and folders by names that hold in every working directory: `resume` reads them."""
    options = vars(args)
    names = [name for name in ("data", "eval_data", "base") if options[name] and Path(options[name]).exists()]
    return options | {name: str(Path(options[name]).resolve()) for name in names}


def words_of(folder: Path) -> list[str]:
    """The options of the training in a folder, as they would be typed; --out is the folder as it is named now.

    Raises:
        ValueError: if there is no training in it.
    """
    if not (folder / RUN).is_file():
        raise ValueError(f"{folder} has no {RUN}: it holds no training to go on with")
    options = read_json(folder / RUN) | {"out": str(folder)}
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    flags = {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    return [flag if value is True else f"{flag}={value}" for flag, value in flags.items()]


def save(model: Decoder, out: Path, template: str | None) -> None:
    """Write a model's adapter, with the chat template that it was trained with if that is another than the base's."""
    if template is None:  # not the one of a training that was here before
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        write_whole({out / TEMPLATE_FILE: template.encode()})
    save_adapter(model, out, base_name=model.origin.name, base_sha256=model.origin.sha256)


def facts(args: argparse.Namespace, base_sha256: str) -> dict[str, object]:
    """All that the result depends on: options, and the contents of files in place of their names."""
    options = {name: value for name, value in vars(args).items() if name not in ("base", "out", "save_every")}
    for name in ("data", "eval_data"):
        options[name] = options[name] and f"SHA-256 {hashlib.sha256(Path(options[name]).read_bytes()).hexdigest()}"
    return options | {"base_sha256": base_sha256}


def judges(
    args: argparse.Namespace, plan: Plan, tokenizer: Tokenizer, keep_best: Callable[[int], None]
) -> Judges | None:
    """Who measures the training as it goes, if there are samples to measure it on; in no more memory than a step."""
    if not plan.held_out:
        return None
    held_out = make_batches(plan.held_out, -(-args.batch // args.accumulate), plan.pad, seed=0)
    return Judges(held_out, english_tokens(tokenizer, GENERAL_TOKENS), plan.rules, keep_best)
