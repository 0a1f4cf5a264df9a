"""`minilora train`: fine-tune a model on one's own samples, and leave an adapter in PEFT's layout.

What the run needs is counted from the model's config and the longest samples, before a weight is read.

Read before: train/jsonl, train/fits, train/finetune.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from minilora.llm.architectures import ALL_LINEAR, read_config
from minilora.llm.config import ModelConfig
from minilora.llm.load import load_model, model_folder
from minilora.llm.sizes import Setup
from minilora.llm.tokenizer import load_tokenizer, read_json
from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRALinear, inject, save_adapter
from minilora.train.data import Sample
from minilora.train.finetune import fine_tune
from minilora.train.fits import GIB, bytes_needed, check_fits
from minilora.train.jsonl import read_samples

METHODS: Mapping[str, Callable[..., nn.Module]] = {"lora": LoRALinear, "qlora": QLoRALinear}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STATE_BITS = {"adamw": 32, "adamw-8bit": 8}


def run(args: argparse.Namespace, free_bytes: int) -> int:
    """Train as the options of cli say, if it fits into `free_bytes`. Ctrl-C saves what was learnt so far.

    Raises:
        ValueError: if an option, the data or the model is impossible.
        MemoryError: if it would not fit, before anything is loaded.
        FloatingPointError: if training breaks off; the adapter is that of the step before.
    """
    samples, pad = planned(args, free_bytes)
    Path(args.out).mkdir(parents=True, exist_ok=True)  # if this cannot be, better now than after training
    model, _ = load_model(args.base, dtype=DTYPES[args.dtype])
    start, wrap = torch.Generator().manual_seed(args.seed), METHODS[args.method]
    alpha = 2 * args.r if args.alpha is None else args.alpha
    report = inject(model, ALL_LINEAR, lambda base: wrap(base, r=args.r, alpha=alpha, generator=start))
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
        )
        print(training)
    finally:
        save_adapter(model, args.out, base_name=model.origin.name, base_sha256=model.origin.sha256)
        print(f"adapter  {args.out}   (PEFT's layout)")
    return 0


def planned(args: argparse.Namespace, free_bytes: int) -> tuple[list[Sample], int]:
    """Check the whole run, as far as can be without the weights; give its samples, and the token that pads them."""
    if args.epochs < 1 or args.batch < 1:
        raise ValueError(f"epochs are {args.epochs} and a batch is {args.batch}: choose 1 or more of each")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"the learning rate is {args.lr}: choose one above 0, such as 2e-4")
    if args.base.endswith(".gguf"):
        raise ValueError(f"{args.base} is a GGUF file, made for answering: train on the folder that it was made from")
    folder = model_folder(args.base, weights=False)
    arch, tokenizer = read_config(folder / "config.json"), load_tokenizer(folder)
    samples = read_samples(Path(args.data), tokenizer)
    longest = max(samples, key=lambda sample: len(sample.tokens))
    most = ModelConfig.from_hf(read_json(folder / "config.json")).max_seq_len
    if len(longest.tokens) > most:
        raise ValueError(
            f"{longest.name} of {args.data} has {len(longest.tokens):,} tokens, and the model was made for {most:,}: "
            "shorten it or take it out"
        )
    setup = Setup(
        method=args.method,
        r=args.r,
        dtype=args.dtype,
        optimizer=args.optimizer,
        batch=min(args.batch, len(samples)),
        seq=len(longest.tokens),
        checkpointing=args.checkpointing,
    )
    check_fits(arch, setup, free_bytes, longest.name)
    print(
        f"{len(samples):,} samples of up to {len(longest.tokens):,} tokens; "
        f"needs {bytes_needed(arch, setup) / GIB:.2f} of {free_bytes / GIB:.2f} GiB"
    )
    assert tokenizer.pad is not None  # read_samples asks for an eos, which stands in
    return samples, tokenizer.pad
