"""Fine-tuning as one call: batches, optimizer, schedule and progress bar around the loop.

Read before: train/trainer, which is the loop.
"""

from collections.abc import Sequence

from torch import nn

from minilora.qlora import PagedAdamW
from minilora.train.data import Sample, make_batches
from minilora.train.trainer import Training, progress_bar, train, warmup_then_decay


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
) -> Training:
    """Train what requires a gradient in the model, on every sample `epochs` times, in a new order each time.

    AdamW without weight decay (its moments in `state_bits`); the rate rises in a straight line over a tenth of the
    steps to `lr` and falls in another to 0.

    Raises:
        ValueError: if there is nothing to train, or a number is impossible.
        FloatingPointError: as train; the model keeps the weights of the step before.
    """
    batches = [batch for n in range(epochs) for batch in make_batches(samples, batch_size, pad, seed + n)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = PagedAdamW(trained, lr=lr, weight_decay=0.0, state_bits=state_bits)
    with progress_bar(len(batches)) as listener:
        schedule = warmup_then_decay(len(batches), n_warmup=len(batches) // 10)
        return train(model, batches, optimizer, schedule, listeners=[listener])
