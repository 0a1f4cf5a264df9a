"""The loop, on one screen. Whatever else should happen at a step listens to it.

A listener is a function of a `Step`: a progress bar, a log, a checkpoint. The loop knows nothing of it; it may return a
reason to stop, and nothing else. The optimizer comes from the caller, who knows which parameters it holds and at what
rates. A run that was stopped goes on with `done=`, the number of steps that were made: train/checkpoint keeps the rest.

Read before: torch_lora/layers, train/data, train/loss.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_
from tqdm import tqdm

from minilora.train.data import Batch
from minilora.train.health import first_bad_place
from minilora.train.loss import loss_of

CTRL_C = "Ctrl-C"
SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(
    {"linear": lambda p: 1 - p, "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2, "constant": lambda p: 1.0}
)


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
    grad_norms: Mapping[str, float] = field(default_factory=dict)  # of each parameter, before clipping


@dataclass(frozen=True)
class Training:
    """All steps that were made, and why they ended early, if they did."""

    steps: list[Step]
    stopped_by: str = ""

    @property
    def interrupted(self) -> bool:
        """Whether it ended early."""
        return bool(self.stopped_by)

    def __str__(self) -> str:
        if self.stopped_by:
            made = f" after {self.steps[-1].number} of {self.steps[-1].n_steps} steps" if self.steps else ""
            return f"stopped by {self.stopped_by}{made}; the model keeps what it has learnt so far"
        return f"{len(self.steps)} steps in {sum(step.seconds for step in self.steps):.0f} s"


def train(
    model: nn.Module,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: Callable[[int], float] = lambda number: 1.0,
    max_grad_norm: float = 1.0,
    listeners: Sequence[Callable[[Step], str | None]] = (),
    *,
    done: int = 0,
    gradients: Callable[[nn.Module, Batch], float] | None = None,
    anywhere: Callable[[bool], bool] = bool,
) -> Training:
    """Take one optimizer step per batch, at the optimizer's own rates times `schedule(number of the step)`.

    The first `done` batches are passed over: their steps were made before. `gradients(model, batch)` adds to the
    gradients and gives the loss; if not given, it is the loss's own backward. Of several processes all stop at the same
    step: `anywhere(stops)` says whether any of them does.

    Ctrl-C lets the step under way finish and returns what was trained so far; a second Ctrl-C breaks off at once.

    Raises:
        FloatingPointError: if a loss or a gradient is NaN or infinite, before it reaches the weights; it says where
            the first such number arose.
    """
    parameters, steps, reasons = trained_parameters(model, optimizer), list[Step](), list[str]()
    with training_mode(model), rates_of(optimizer) as set_rates, finish_step_on_ctrl_c() as stop:
        for number, batch in enumerate(batches[done:], start=done + 1):
            start = time.perf_counter()
            set_rates(schedule(number))
            loss = (gradients or whole_batch)(model, batch)
            check_finite("loss", loss, number, partial(first_bad_place, model, batch))
            grad_norm, grad_norms = clip_(parameters, max_grad_norm)
            check_finite("norm of the gradients", grad_norm, number, partial(first_bad_norm, grad_norms))
            optimizer.step()
            optimizer.zero_grad()
            seconds, lr = time.perf_counter() - start, optimizer.param_groups[0]["lr"]
            step = Step(number, len(batches), loss, grad_norm, lr, batch.tokens.numel(), seconds, grad_norms)
            steps.append(replace(step, grad_norms={}))  # they are for listeners: of all steps they would be gigabytes
            reasons = [reason for listen in listeners if (reason := listen(step))]
            reasons = [CTRL_C] if stop.is_set() else reasons
            if anywhere(bool(reasons)):
                break
    ended = done + len(steps) == len(batches)
    return Training(steps, "" if ended else " and ".join(reasons) or CTRL_C)


def whole_batch(model: nn.Module, batch: Batch) -> float:
    """Add the gradients of a batch's loss; give the loss. Its graph is gone when this returns."""
    loss = loss_of(model, batch)
    loss.backward()
    return loss.item()


def in_parts(n_parts: int) -> Callable[[nn.Module, Batch], float]:
    """A `gradients` that takes a batch in parts, one after the other: gradient accumulation.

        loss = Σ over parts of loss(part) · labels(part) / labels(batch)

    Memory is that of a part; loss and gradients are those of the whole batch up to rounding, also where some parts have
    more labels than others.

    Raises:
        ValueError: if there is no part.
    """
    if n_parts < 1:
        raise ValueError(f"cannot take a batch in {n_parts} parts: choose 1 or more")

    def gradients(model: nn.Module, batch: Batch) -> float:
        total = 0.0
        for part in batch.parts(n_parts):
            loss = loss_of(model, part) * (part.n_labels / batch.n_labels)
            loss.backward()
            total += loss.item()
            del loss  # its graph, though empty, would lie between the tensors of the next part
        return total

    return gradients if n_parts > 1 else whole_batch


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by their names in the model, in the optimizer's order."""
    names = {p: name for name, p in model.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    return {names.get(p, f"parameter {place}"): p for place, p in enumerate(held)}


def clip_(parameters: Mapping[str, nn.Parameter], max_norm: float) -> tuple[float, dict[str, float]]:
    """Scale all gradients to a norm of at most `max_norm` together; give the norm before, and each one's own."""
    grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if not grads:
        return 0.0, {}
    norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads.values()])
    total = torch.linalg.vector_norm(norms)
    clip_grads_with_norm_(parameters.values(), max_norm, total)
    return total.item(), dict(zip(grads, norms.tolist(), strict=True))


def warmup_then_decay(n_steps: int, n_warmup: int, shape: str = "linear") -> Callable[[int], float]:
    """A schedule: a straight line up from 0 over `n_warmup` steps, then down to 0 after `n_steps`, in one of SHAPES.

        linear    1 − p        cosine    ½ (1 + cos π p)        constant    1        p    the share of the way down

    No step has rate 0: with "linear" the first is 1 / (n_warmup + 1), the last 1 / (n_steps − n_warmup).

    >>> schedule = warmup_then_decay(n_steps=5, n_warmup=1)
    >>> [schedule(number) for number in range(1, 6)]
    [0.5, 1.0, 0.75, 0.5, 0.25]

    Raises:
        ValueError: if the warm-up leaves no step to decay in, or there is no such shape.
    """
    if not 0 <= n_warmup < n_steps:
        raise ValueError(f"cannot warm up for {n_warmup} of {n_steps} steps: choose n_warmup from 0 to {n_steps - 1}")
    if shape not in SHAPES:
        raise ValueError(f"no schedule has the shape {shape!r}: choose {', '.join(SHAPES)}")

    def factor(number: int) -> float:
        if number <= n_warmup:
            return number / (n_warmup + 1)
        return SHAPES[shape]((number - 1 - n_warmup) / (n_steps - n_warmup))

    return factor


def check_finite(what: str, value: float, number: int, where: Callable[[], str]) -> None:
    """Stop before a bad loss or gradient reaches the weights; ask then where it arose."""
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} is {value} at step {number}, first {where()}; the weights are those of step {number - 1}: "
            "lower the learning rate or lengthen the warm-up, and look at the data of this batch"
        )


def first_bad_norm(norms: Mapping[str, float]) -> str:
    """Say which gradient is not finite: of those of the last layers, which a backward reaches first."""
    bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return f"in the gradient of {bad[-1]}" if bad else "in their sum of squares"


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
