"""`minilora train` and `minilora resume`: fine-tune a model on one's own samples, and leave an adapter.

    out/run.json                    the options, by which `resume` goes on
    out/checkpoint.safetensors      where it stands: train/checkpoint
    out/metrics.jsonl, loss.png     every step, and a picture of them
    out/adapter_…                   the adapter, in PEFT's layout, and out/best: where it measured best
    out/model, out/best/model       the whole model instead, of the methods that train all weights

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
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import nn

from minilora.files import is_unfinished, remove_unfinished_in, write_whole
from minilora.llm.load import model_folder
from minilora.llm.model import Decoder
from minilora.llm.save import save_model
from minilora.llm.tokenizer import Tokenizer, read_json
from minilora.torch_lora.inject import count_parameters
from minilora.train.adapted import DTYPES, load_base
from minilora.train.checkpoint import Saving
from minilora.train.data import make_batches
from minilora.train.evaluate import GENERAL_TOKENS, english_tokens
from minilora.train.finetune import Together, fine_tune
from minilora.train.judging import Judges
from minilora.train.methods import METHODS, put_new
from minilora.train.plan import Plan, dtype_of, planned
from minilora.train.settings import Settings
from minilora.train.templates import MODEL, TEMPLATE_FILE, with_template
from minilora.train.trainer import CTRL_C, Training

RUN, CHECKPOINT, BEST, MODEL_FOLDER = "run.json", "checkpoint.safetensors", "best", "model"
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
    model, tokenizer = load_base(args.base, DTYPES[dtype_of(args)])
    torch.manual_seed(args.seed + rank)  # of dropout
    put_method(model, args, plan.settings)
    training = trained(model, tokenizer, plan, args, rank, world)
    if rank == 0:
        save(model, out, args, tokenizer)
        print(METHODS[args.method].report(model), end="")
    return told(training, args, world)


def trained(
    model: Decoder, tokenizer: Tokenizer, plan: Plan, args: argparse.Namespace, rank: int, world: int
) -> Training:
    """Train the model, in place, as planned; if it breaks off, what was learnt before is saved.

    Raises:
        FloatingPointError: if it breaks off.
    """
    out = Path(args.out)
    try:
        return fine_tune(
            model,
            plan.samples,
            plan.recipe,
            pad=plan.pad,
            learning=METHODS[args.method].learning(plan.settings),
            saving=Saving(out / CHECKPOINT, facts(args, model.origin.sha256) | {"processes": world}, args.save_every),
            judged_by=judges(args, plan, tokenizer, lambda step: save(model, out / BEST, args, tokenizer)),
            together=in_processes(model, args, rank),
        )
    except FloatingPointError:
        if rank == 0:
            save(model, out, args, tokenizer)
            print(where(args))
        raise


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
        for left in (out / BEST, out / MODEL_FOLDER):
            shutil.rmtree(left, ignore_errors=True)
    write_whole({out / RUN: json.dumps(findable(args), indent=2).encode()})  # if this cannot be, better now


def put_method(model: Decoder, args: argparse.Namespace, settings: Settings) -> None:
    """Put the method on the model, in place, and say how many numbers train."""
    put_new(model, args.method, settings)
    model.model.gradient_checkpointing = args.checkpointing
    rank = f", r={settings.r}" if "r" in METHODS[args.method].uses else ""
    print(f"{args.method}{rank}: {count_parameters(model)}")


def told(training: Training, args: argparse.Namespace, world: int) -> int:
    """Say how it ended, what it left and how to go on; give the exit code."""
    out = Path(args.out)
    print(training)
    print(where(args))
    if (out / BEST).exists():
        print(f"best     {written_to(out / BEST, args)}   (where the loss on --eval-data was lowest)")
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


def where(args: argparse.Namespace) -> str:
    """A line that says what was left where."""
    folder = written_to(Path(args.out), args)
    if METHODS[args.method].save is None:
        return f"model    {folder}   (Hugging Face's layout: --base opens it)"
    return f"adapter  {folder}   (PEFT's layout)"


def written_to(out: Path, args: argparse.Namespace) -> Path:
    """The folder that save writes below `out`: `out` itself for an adapter, one in it for a whole model."""
    return out / MODEL_FOLDER if METHODS[args.method].save is None else out


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


def save(model: Decoder, out: Path, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Write an adapter, with the chat template that it was trained with if that is another than the base's; or all."""
    write = METHODS[args.method].save
    if write is None:
        save_whole(model, written_to(out, args), args, tokenizer)
        return
    template = template_of(args, tokenizer)
    if template is None:  # not the one of a training that was here before
        (out / TEMPLATE_FILE).unlink(missing_ok=True)
    else:
        write_whole({out / TEMPLATE_FILE: template.encode()})
    write(model, out, base_name=model.origin.name, base_sha256=model.origin.sha256)


def save_whole(model: Decoder, folder: Path, args: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Write all weights as a model's folder, in the place of one that is there; it ends answers as it has learnt."""
    said = with_template(tokenizer, args.template)
    learnt = said.with_learnt_end()
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    save_model(
        new,
        model_folder(args.base),
        ((name, parameter.detach()) for name, parameter in model.named_parameters()),
        lambda: card(model),
        template_of(args, tokenizer),
        None if learnt is said else (learnt.settings["eos_token"], cast(int, learnt.eos)),
    )
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def card(model: Decoder) -> str:
    """The text of README.md: what was trained, and under which licence."""
    origin = model.origin
    licence = f"license: {json.dumps(origin.license.lower())}\n" if origin.license else ""
    said = f"{origin.name}, all of whose weights were trained on, by minilora. {origin.attribution or ''}".strip()
    return f"---\nbase_model: {json.dumps(origin.name)}\n{licence}---\n{said}\n"


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
