"""Fine-tuning as one call: batches, optimizer, schedule, progress bar and checkpoints around the loop.

Read before: train/trainer, which is the loop; train/checkpoint.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import nn
from tqdm import tqdm

from minilora.qlora import PagedAdamW
from minilora.train.checkpoint import Saving
from minilora.train.data import Batch, Sample, make_batches
from minilora.train.judging import Judges, judge
from minilora.train.listeners import MetricsLog, health_check, progress_bar
from minilora.train.packing import make_packed_batches
from minilora.train.trainer import Step, Training, in_parts, train, warmup_then_decay

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


def fine_tune(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    pad: int,
    lr: float,
    batch_size: int,
    seed: int,
    epochs: int = 1,
    state_bits: int = 32,
    n_parts: int = 1,
    pack_tokens: int | None = None,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    shape: str = "linear",
    warmup: float = 0.1,
    saving: Saving | None = None,
    judged_by: Judges | None = None,
    together: Together | None = None,
) -> Training:
    """Train what requires a gradient in the model, on every sample `epochs` times, in a new order each time.

    AdamW (its moments in `state_bits`), gradients clipped to `max_grad_norm`. The rate rises in a straight line over
    the share `warmup` of the steps to `lr`, and falls to 0 in a `shape` of trainer.SHAPES. A batch goes through the
    model in `n_parts`. It is of `batch_size` samples, or of as many rows of `pack_tokens`, which hold several each.

    With `saving` the training goes on where its checkpoint stands, and ends with the same bits as if it had never
    stopped; a log of all steps lies beside it, and what its judges find, who may end it early. Of several processes,
    which train `together`, one alone tells and saves.

    Raises:
        ValueError: if there is nothing to train, a number is impossible, or the checkpoint is of another run.
        FloatingPointError: as train; the model keeps the weights of the step before.
    """

    def batches_of(seed: int) -> list[Batch]:
        if pack_tokens is None:
            return make_batches(samples, batch_size, pad, seed)
        return make_packed_batches(samples, batch_size, pack_tokens, pad, seed)

    batches = [batch for n in range(epochs) for batch in batches_of(seed + n)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW(trained, lr=lr, weight_decay=weight_decay, state_bits=state_bits)
    done = saving.resumed(model, optimizer) if saving else 0
    if together:
        together.check_same(done)
    tells = together is None or together.rank == 0
    saving = saving if tells else None
    with progress_bar(len(batches), done, shown=tells) as bar:
        listeners: list[Callable[[Step], str | None]] = [bar, health_check(model, tqdm.write)] if tells else []
        if saving:
            log = MetricsLog(saving.path.with_name(METRICS), done)
            judging = [judge(model, judged_by, log, tqdm.write)] if judged_by else []
            listeners += [log, *judging, saving.listener(model, optimizer)]  # in this order: what is saved is judged
            if judged_by and (reason := judged_by.rules.verdict(log.measured)):
                return Training([], reason)
        training = train(
            model,
            batches,
            optimizer,
            warmup_then_decay(len(batches), int(warmup * len(batches)), shape),
            max_grad_norm,
            listeners,
            done=done,
            gradients=together.gradients if together else in_parts(n_parts),
            anywhere=together.anywhere if together else bool,
        )
    if saving and training.steps:
        saving.save(model, optimizer, training.steps[-1].number)
    return training
