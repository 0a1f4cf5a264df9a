"""Fine-tuning as one call: batches, optimizer, schedule, progress bar and checkpoints around the loop.

Read before: train/trainer, which is the loop; train/checkpoint.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minilora.qlora import PagedAdamW
from minilora.torch_lora.decay import decay_groups
from minilora.train.checkpoint import Saving, Stateful
from minilora.train.data import Batch, Sample, make_batches
from minilora.train.judging import Judges, judge
from minilora.train.listeners import MetricsLog, health_check, progress_bar
from minilora.train.packing import make_packed_batches
from minilora.train.trainer import SHAPES, Step, Training, in_parts, train, warmup_then_decay

METRICS = "metrics.jsonl"


@runtime_checkable
class Together(Protocol):
    """What several processes do otherwise than one: train/distributed."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def gradients(self) -> Callable[[nn.Module, Batch], float]:
        """As train's."""

    def anywhere(self, flag: bool) -> bool:
        """Whether it is so in any of them."""

    def check_same(self, done: int) -> None:
        """Refuse where they would go on from different steps."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How it is trained: what does not depend on the model and the samples.

    Raises:
        ValueError: naming every number that is impossible.
    """

    lr: float
    batch_size: int  # samples, or rows that hold several: see pack_tokens
    seed: int = 0  # of the order of the samples
    epochs: int = 1  # times that each sample is seen, in a new order each time
    state_bits: int = 32  # of AdamW's moments: 32 or 8
    n_parts: int = 1  # that a batch goes through the model in
    pack_tokens: int | None = None  # of a row; None: a sample a row, padded
    weight_decay: float = 0.0  # of what torch_lora/decay does not spare
    max_grad_norm: float = 1.0  # gradients are clipped to it
    shape: str = "linear"  # of the rate after the warm-up: trainer.SHAPES
    warmup: float = 0.1  # share of the steps in which the rate rises

    def __post_init__(self) -> None:
        rules = {
            "lr": (0 < self.lr < math.inf, "a number above 0, such as 2e-4"),
            "batch_size": (self.batch_size >= 1, "1 or more"),
            "epochs": (self.epochs >= 1, "1 or more"),
            "n_parts": (1 <= self.n_parts <= max(1, self.batch_size), "1 to batch_size"),
            "state_bits": (self.state_bits in (8, 32), "8 or 32"),
            "shape": (self.shape in SHAPES, ", ".join(SHAPES)),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "max_grad_norm": (self.max_grad_norm > 0, "a number above 0"),
            "warmup": (0 <= self.warmup < 1, "0 or more, and below 1"),
        }
        misfits = {name: what for name, (fits, what) in rules.items() if not fits}
        problems = [f"{name} is {getattr(self, name)}: choose {what}" for name, what in misfits.items()]
        if problems:
            raise ValueError("; ".join(problems))

    def batches(self, samples: Sequence[Sample], pad: int) -> list[Batch]:
        """All batches of all epochs, in order."""
        found = []
        for seed in range(self.seed, self.seed + self.epochs):
            if self.pack_tokens is None:
                found += make_batches(samples, self.batch_size, pad, seed)
            else:
                found += make_packed_batches(samples, self.batch_size, self.pack_tokens, pad, seed)
        return found

    def schedule(self, n_steps: int) -> Callable[[int], float]:
        """The rate's factor at each step: a straight line up, and then `shape`."""
        return warmup_then_decay(n_steps, int(self.warmup * n_steps), self.shape)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """What takes the steps of a training, and what else a method asks for."""

    optimizer: torch.optim.Optimizer
    penalty: Callable[[], Tensor] | None = None  # added to the loss of every step, not to the loss that is told
    beside: Stateful | None = None  # on what, besides the weights and the optimizer, the next step depends


def by_adamw(model: nn.Module, recipe: Recipe, n_steps: int) -> Learning:
    """Train what requires a gradient by AdamW, as the recipe says.

    Raises:
        ValueError: if nothing trains, or a weight decay would act on nothing: torch_lora/decay.
    """
    groups = decay_groups(model, recipe.weight_decay)
    return Learning(optimizer=PagedAdamW(groups, lr=recipe.lr, state_bits=recipe.state_bits))


def fine_tune(
    model: nn.Module,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    pad: int,
    learning: Callable[[nn.Module, Recipe, int], Learning] = by_adamw,
    saving: Saving | None = None,
    judged_by: Judges | None = None,
    together: Together | None = None,
) -> Training:
    """Train what requires a gradient in the model, as the recipe says: by AdamW, or as a method's `learning` has it.

    With `saving` the training goes on where its checkpoint stands, and ends with the same bits as if it had never
    stopped; a log of all steps lies beside it, and what its judges find, who may end it early. Of several processes,
    which train `together`, one alone tells and saves.

    Raises:
        ValueError: if there is nothing to train, or the checkpoint is of another run.
        FloatingPointError: as train; the model keeps the weights of the step before.
    """
    batches = recipe.batches(samples, pad)
    learns = learning(model, recipe, len(batches))
    done = saving.resumed(model, learns.optimizer, learns.beside) if saving else 0
    if together:
        together.check_same(done)
    tells = together is None or together.rank == 0
    saving = saving if tells else None
    log = MetricsLog(saving.path.with_name(METRICS), done) if saving else None
    if log and judged_by and (reason := judged_by.rules.verdict(log.measured)):
        return Training([], reason)
    with progress_bar(len(batches), done, shown=tells) as bar:
        training = train(
            model,
            batches,
            learns.optimizer,
            recipe.schedule(len(batches)),
            recipe.max_grad_norm,
            [bar, health_check(model, tqdm.write), *keepers(model, learns, saving, log, judged_by)] if tells else [],
            done=done,
            gradients=with_penalty(together.gradients if together else in_parts(recipe.n_parts), learns.penalty),
            anywhere=together.anywhere if together else bool,
        )
    if saving and training.steps:
        saving.save(model, learns.optimizer, training.steps[-1].number, learns.beside)
    return training


def keepers(
    model: nn.Module, learns: Learning, saving: Saving | None, log: MetricsLog | None, judged_by: Judges | None
) -> list[Callable[[Step], str | None]]:
    """The listeners that write something down, in this order: what is saved is judged."""
    if saving is None or log is None:
        return []
    judging = [judge(model, judged_by, log, tqdm.write)] if judged_by else []
    return [log, *judging, saving.listener(model, learns.optimizer, learns.beside)]


def with_penalty(
    gradients: Callable[[nn.Module, Batch], float], penalty: Callable[[], Tensor] | None
) -> Callable[[nn.Module, Batch], float]:
    """A `gradients` that adds those of a penalty as well, and gives the loss without it."""
    if penalty is None:
        return gradients

    def both(model: nn.Module, batch: Batch) -> float:
        loss = gradients(model, batch)
        penalty().backward()
        return loss

    return both
