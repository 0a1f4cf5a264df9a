"""What `minilora train` does, checked as far as can be before a weight is read: options, samples, memory.

Read before: train/jsonl, train/fits, train/finetune.
"""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from minilora.llm import method_options
from minilora.llm.architectures import ALL_LINEAR, read_config
from minilora.llm.load import model_folder
from minilora.llm.setup import Setup, default_dtype, default_r
from minilora.llm.tokenizer import Tokenizer, load_tokenizer
from minilora.train.adapted import is_in_4_bits, longest_text
from minilora.train.data import Sample
from minilora.train.finetune import Recipe
from minilora.train.fits import GIB, bytes_needed, check_fits
from minilora.train.jsonl import read_samples, refuse_longer
from minilora.train.judging import Rules
from minilora.train.methods import METHODS
from minilora.train.settings import Settings

STATE_BITS = {"adamw": 32, "adamw-8bit": 8}
FLAGS = method_options.FLAGS | {
    "alpha": "--alpha", "dropout": "--dropout", "use_rslora": "--rslora", "loraplus_ratio": "--loraplus-ratio",
    "words": "--words", "refresh": "--refresh", "galore_scale": "--galore-scale",
}  # fmt: skip
EVAL_EVERY = 50  # steps, where --eval-every does not say
MOST_DROPPED_TOLD = 20


@dataclass(frozen=True)
class Plan:
    """What a run needs besides the weights."""

    samples: Sequence[Sample]
    held_out: Sequence[Sample]  # that it is measured on
    recipe: Recipe
    settings: Settings  # of the method
    rules: Rules
    pad: int  # a token


def planned(args: argparse.Namespace, free_bytes: int, world: int = 1) -> Plan:
    """Check a run that `world` processes share, each with so much memory, and say what it needs.

    Raises:
        ValueError: if an option or the data is impossible.
        MemoryError: if it would not fit.
    """
    recipe, rules = recipe_of(args), rules_of(args)
    folder = base_folder(args)
    tokenizer, most = load_tokenizer(folder), longest_text(folder)
    settings = settings_of(args, tokenizer)
    refuse_together(args, world)
    virtual = settings.n_virtual if "n_virtual" in METHODS[args.method].uses else 0
    if virtual >= most:
        raise ValueError(f"{virtual:,} virtual tokens leave no room for text: the model was made for {most:,}")
    samples, held_out = samples_of(args, tokenizer, most - virtual)
    check_memory(args, settings, folder, samples, free_bytes, world)
    assert tokenizer.pad is not None  # read_samples asks for an eos, which stands in
    return Plan(samples, held_out, recipe, settings, rules, tokenizer.pad)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The options that say how it is trained."""
    return Recipe(
        lr=METHODS[args.method].lr if args.lr is None else args.lr,
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
    )


def settings_of(args: argparse.Namespace, tokenizer: Tokenizer) -> Settings:
    """The options that say what the method puts on the model; words become tokens, each a virtual one.

    Raises:
        ValueError: if one is impossible, or would do nothing for this method.
    """
    method = METHODS[args.method]
    words = None if args.words is None else tokenizer.encode(args.words)
    if words is not None and (not words or args.virtual_tokens not in (None, len(words))):
        raise ValueError(
            f"--words are {len(words)} tokens, each a virtual one: give some, and leave --virtual-tokens out"
        )
    given = {
        "r": args.r,
        "alpha": args.alpha,
        "dropout": args.dropout or None,
        "use_rslora": args.rslora or None,
        "targets": None if args.targets is None else targets_of(args),
        "loraplus_ratio": args.loraplus_ratio,
        "start_r": args.start_r,
        "bottleneck": args.bottleneck,
        "n_virtual": args.virtual_tokens,
        "words": words,
        "mlp_features": args.prefix_mlp,
        "refresh": args.refresh,
        "galore_scale": args.galore_scale,
    }
    asked = {name: value for name, value in given.items() if value is not None}
    refuse_unused(args.method, asked)
    if method.save is None and args.dtype == "bf16":
        raise ValueError(f"{args.method} trains all weights, in bf16 it would lose small steps: leave --dtype out")
    if args.weight_decay and not method.decays:
        raise ValueError(
            f"--weight-decay pulls to zero, where the model of --method {args.method} is not the base's: leave it out"
        )
    asked |= {"n_virtual": len(words)} if words else {}
    return Settings(**{"r": default_r(args.method)} | asked, seed=args.seed)


def refuse_unused(name: str, given: Collection[str]) -> None:
    """
    Raises:
        ValueError: if a setting was given that does nothing for this method.
    """
    unused = [setting for setting in given if setting not in METHODS[name].uses]
    if unused:
        users = [", ".join(n for n, method in METHODS.items() if setting in method.uses) for setting in unused]
        told = "; ".join(f"{FLAGS[setting]} is for {names}" for setting, names in zip(unused, users, strict=True))
        raise ValueError(f"--method {name} does nothing with {', '.join(FLAGS[setting] for setting in unused)}: {told}")


def refuse_together(args: argparse.Namespace, world: int) -> None:
    """
    Raises:
        ValueError: if several processes were asked for what only one can do.
    """
    if args.parallel is not None and not METHODS[args.method].in_processes:
        names = ", ".join(name for name, method in METHODS.items() if method.in_processes)
        raise ValueError(f"--method {args.method} trains in one process; {names} train in several too")


def rules_of(args: argparse.Namespace) -> Rules:
    """The options that say when it is measured, and when it ends early."""
    judging = {"--eval-every": args.eval_every, "--patience": args.patience, "--max-forgetting": args.max_forgetting}
    given = [name for name, value in judging.items() if value is not None]
    if args.eval_data is None and given:
        raise ValueError(
            f"{' and '.join(given)} would do nothing: give --eval-data samples to measure on, which are not trained on"
        )
    if args.save_every < 1:
        raise ValueError(f"cannot save every {args.save_every} steps: choose 1 or more")
    every = EVAL_EVERY if args.eval_every is None else args.eval_every
    return Rules(every, args.patience, args.max_forgetting)


def base_folder(args: argparse.Namespace) -> Path:
    """The folder of the base's config and tokenizer."""
    if args.base.endswith(".gguf"):
        raise ValueError(f"{args.base} is a GGUF file, made for answering: train on the folder that it was made from")
    if args.method != "qlora" and is_in_4_bits(args.base):
        raise ValueError(f"{args.base} holds its weights in 4 bits: --method qlora trains over them")
    return model_folder(args.base, weights=False)


def dtype_of(args: argparse.Namespace) -> str:
    """The dtype of the weights."""
    return args.dtype or default_dtype(args.method)


def targets_of(args: argparse.Namespace) -> str | list[str]:
    """What --targets names: several modules, or one word for all linear layers."""
    given = args.targets or ALL_LINEAR
    return given if given == ALL_LINEAR else [name.strip() for name in given.split(",")]


def samples_of(args: argparse.Namespace, tokenizer: Tokenizer, most: int) -> tuple[list[Sample], list[Sample]]:
    """The samples that are trained on, and those that it is measured on; none is longer than the model can read."""
    samples = read_samples(Path(args.data), tokenizer, args.template)
    if args.max_tokens is not None:
        samples = without_longer(samples, args.max_tokens)
    held_out = [] if args.eval_data is None else read_samples(Path(args.eval_data), tokenizer, args.template)
    refuse_longer(samples, most, args.data, " with --max-tokens")
    refuse_longer(held_out, most, args.eval_data or "")
    longest = longest_of(samples)
    if args.pack is not None and not len(longest.tokens) <= args.pack <= most:
        raise ValueError(
            f"--pack is {args.pack}: a row holds the longest sample, {longest.name} of {len(longest.tokens):,} tokens, "
            f"and the model was made for {most:,}"
        )
    return samples, held_out


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


def longest_of(samples: Sequence[Sample]) -> Sample:
    """The sample with the most tokens."""
    return max(samples, key=lambda sample: len(sample.tokens))


def check_memory(
    args: argparse.Namespace,
    settings: Settings,
    folder: Path,
    samples: Sequence[Sample],
    free_bytes: int,
    world: int,
) -> None:
    """Count what a run needs, and say it.

    Raises:
        MemoryError: if that is more than is free.
    """
    arch, longest = read_config(folder / "config.json"), longest_of(samples)
    rows = -(-min(args.batch, len(samples)) // world)
    targets = targets_of(args)
    setup = Setup(
        method=args.method,
        r=args.r,
        start_r=args.start_r,
        bottleneck=settings.bottleneck,
        n_virtual=settings.n_virtual,
        mlp_features=settings.mlp_features,
        targets=targets if isinstance(targets, str) else tuple(targets),
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
