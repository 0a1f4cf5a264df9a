"""`minilora train`: fine-tune a model on one's own samples, and leave an adapter in PEFT's layout.

What the run needs is counted from the model's config and the longest samples, before a weight is read.

Read before: train/jsonl, train/fits, train/trainer.
"""

import argparse
import math
from pathlib import Path

import torch

from minilora.llm.architectures import ALL_LINEAR, read_config
from minilora.llm.load import load_model, model_folder
from minilora.llm.sizes import Setup
from minilora.llm.tokenizer import load_tokenizer
from minilora.qlora import PagedAdamW, QLoRALinear
from minilora.torch_lora import LoRALinear, inject, save_adapter
from minilora.train.data import make_batches
from minilora.train.fits import GIB, bytes_needed, check_fits
from minilora.train.jsonl import read_samples
from minilora.train.trainer import progress_bar, train, warmup_then_decay

METHODS = {"lora": LoRALinear, "qlora": QLoRALinear}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STATE_BITS = {"adamw": 32, "adamw-8bit": 8}


def run(args: argparse.Namespace, free_bytes: int) -> int:
    """Train as the options of cli say, if it fits into `free_bytes`.

    Raises:
        ValueError: if an option, the data or the model is impossible.
        MemoryError: if it would not fit, before anything is loaded.
    """
    if args.epochs < 1 or not 0 < args.lr < math.inf:
        raise ValueError(f"epochs are {args.epochs} and the learning rate is {args.lr}: both are above 0")
    folder = model_folder(args.base)
    arch, tokenizer = read_config(folder / "config.json"), load_tokenizer(folder)
    samples = read_samples(Path(args.data), tokenizer)
    longest = max(len(sample.tokens) for sample in samples)
    setup = Setup(
        method=args.method,
        r=args.r,
        dtype=args.dtype,
        optimizer=args.optimizer,
        batch=min(args.batch, len(samples)),
        seq=longest,
        checkpointing=args.checkpointing,
    )
    check_fits(arch, setup, free_bytes)
    print(
        f"{len(samples):,} samples of up to {longest:,} tokens; "
        f"needs {bytes_needed(arch, setup) / GIB:.2f} GiB of {free_bytes / GIB:.2f}"
    )

    model, _ = load_model(args.base, dtype=DTYPES[args.dtype])
    start, wrap = torch.Generator().manual_seed(args.seed), METHODS[args.method]
    alpha = 2 * args.r if args.alpha is None else args.alpha
    report = inject(model, ALL_LINEAR, lambda base: wrap(base, r=args.r, alpha=alpha, generator=start))
    model.model.gradient_checkpointing = args.checkpointing
    print(f"{args.method}, r={args.r}: {report.count}")
    assert tokenizer.pad is not None
    epochs = [make_batches(samples, args.batch, tokenizer.pad, args.seed + n) for n in range(args.epochs)]
    batches = [batch for epoch in epochs for batch in epoch]
    optimizer = PagedAdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=args.lr,
        weight_decay=0.0,
        state_bits=STATE_BITS[args.optimizer],
    )
    with progress_bar(len(batches)) as listener:
        schedule = warmup_then_decay(len(batches), n_warmup=len(batches) // 10)
        training = train(model, batches, optimizer, schedule, listeners=[listener])
    save_adapter(model, args.out, base_name=model.origin.name, base_sha256=model.origin.sha256)
    print(f"{training}\nadapter  {args.out}   (PEFT's layout)")
    return 0
