"""The loop, on one screen. Whatever else should happen at a step listens to it.

A listener is a function of a `Step`: a progress bar, a log, a checkpoint. It returns nothing and the loop knows nothing
of it. The optimizer comes from the caller, who knows which parameters it holds and at what rates.

Read before: torch_lora/layers, train/data, train/loss.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from minilora.train.data import Batch
from minilora.train.loss import loss_of


@dataclass(frozen=True)
class Step:
    """What one step did."""

    number: int  # from 1
    n_steps: int
    loss: float  # nats per token that carries loss
    grad_norm: float  # before clipping
    lr: float  # of the first parameter group
    n_tokens: int  # of the batch, padding included, and each row's copy of what all begin with
    seconds: float


@dataclass(frozen=True)
class Training:
    """All steps that were made, and whether Ctrl-C ended them early."""

    steps: list[Step]
    interrupted: bool = False

    def __str__(self) -> str:
        made = len(self.steps)
        planned = self.steps[0].n_steps if self.steps else 0
        if self.interrupted:
            return f"stopped by Ctrl-C after {made} of {planned} steps; the model keeps what it has learnt so far"
        return f"{made} steps in {sum(step.seconds for step in self.steps):.0f} s"


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] = lambda number: 1.0,
    max_grad_norm: float = 1.0,
    listeners: Sequence[Callable[[Step], None]] = (),
) -> Training:
    """Take one optimizer step per batch, at the optimizer's own rates times `schedule(number of the step)`.

    Ctrl-C lets the step under way finish and returns what was trained so far; a second Ctrl-C breaks off at once.

    Raises:
        FloatingPointError: if a loss or a gradient is NaN or infinite, before it reaches the weights.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps: list[Step] = []
    with training_mode(model), rates_of(optimizer) as set_rates, finish_step_on_ctrl_c() as stop:
        for number, batch in enumerate(batches, start=1):
            start = time.perf_counter()
            set_rates(schedule(number))
            loss = loss_of(model, batch)
            check_finite("loss", loss.item(), number)
            loss.backward()
            grad_norm = clip_grad_norm_(parameters, max_grad_norm)
            check_finite("norm of the gradients", grad_norm.item(), number)
            optimizer.step()
            optimizer.zero_grad()
            value, seconds, lr = loss.item(), time.perf_counter() - start, optimizer.param_groups[0]["lr"]
            del loss  # its graph, though empty, would lie between the tensors of the next step: a ninth more memory
            steps.append(Step(number, len(batches), value, grad_norm.item(), lr, batch.tokens.numel(), seconds))
            for listen in listeners:
                listen(steps[-1])
            if stop.is_set():
                break
    return Training(steps, interrupted=len(steps) < len(batches))


def warmup_then_decay(n_steps: int, n_warmup: int) -> Callable[[int], float]:
    """A schedule: a straight line up from 0 over `n_warmup` steps, then a straight line down to 0 after `n_steps`.

    No step has rate 0: the first is 1 / (n_warmup + 1), the last 1 / (n_steps − n_warmup).

    >>> schedule = warmup_then_decay(n_steps=5, n_warmup=1)
    >>> [schedule(number) for number in range(1, 6)]
    [0.5, 1.0, 0.75, 0.5, 0.25]

    Raises:
        ValueError: if the warm-up leaves no step to decay in.
    """
    if not 0 <= n_warmup < n_steps:
        raise ValueError(f"cannot warm up for {n_warmup} of {n_steps} steps: choose n_warmup from 0 to {n_steps - 1}")

    def factor(number: int) -> float:
        return min(number / (n_warmup + 1), (n_steps - number + 1) / (n_steps - n_warmup))

    return factor


def check_finite(what: str, value: float, number: int) -> None:
    """Stop before a bad loss or gradient reaches the weights."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {number}; the weights are those of step {number - 1}: "
            "lower the learning rate or lengthen the warm-up, and look at the data of this batch"
        )


@contextmanager
def progress_bar(n_steps: int) -> Iterator[Callable[[Step], None]]:
    """A listener that draws loss, tokens per second and learning rate: `with progress_bar(100) as listener`."""
    with tqdm(total=n_steps, unit="step") as bar:

        def listen(step: Step) -> None:
            bar.set_postfix_str(f"loss {step.loss:.3f}, {step.n_tokens / step.seconds:,.0f} tokens/s, lr {step.lr:.1e}")
            bar.update()

        yield listen


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout on, and afterwards every module back to what it was."""
    was_training = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode


@contextmanager
def rates_of(optimizer: torch.optim.Optimizer) -> Iterator[Callable[[float], None]]:
    """A function that sets every group to its own rate times a factor; afterwards each has its own rate again."""
    own = [group["lr"] for group in optimizer.param_groups]

    def set_rates(factor: float) -> None:
        for group, lr in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = lr * factor

    try:
        yield set_rates
    finally:
        set_rates(1.0)


@contextmanager
def finish_step_on_ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that the loop looks at; an exception could hit the optimizer halfway.

    Only a main thread can do that; elsewhere, and where Ctrl-C is ignored (nohup), everything stays as it is.
    """
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield stop
        return

    def on_ctrl_c(number: int, frame: object) -> None:
        stop.set()
        tqdm.write("finishing this step; Ctrl-C again breaks off at once", file=sys.stderr)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
