"""Is it getting better, and at what price? A training is measured as it goes, and may be stopped by what is found.

    target     mean loss, in nats per token, on samples of the task that are not trained on
    general    the same on plain English that has nothing to do with it (train/evaluate.english_text)

    gained = target before − target now        forgotten = general now − general before

Fine-tuning buys the one with the other. Where the second grows and the first does not any more, it is time to stop.

Read before: train/evaluate, train/listeners.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from minilora.train.data import Batch
from minilora.train.evaluate import english_loss, mean_loss
from minilora.train.listeners import MetricsLog
from minilora.train.trainer import Step

Measured = Mapping[str, float]


@dataclass(frozen=True)
class Rules:
    """When a training ends early: after `patience` measurements without a better target, or so many nats forgotten.

    Raises:
        ValueError: if a rule is not positive.
    """

    every: int = 50  # steps from one measurement to the next
    patience: int | None = None
    most_forgotten: float | None = None

    def __post_init__(self) -> None:
        rules = {"every": self.every, "patience": self.patience, "most_forgotten": self.most_forgotten}
        odd = [f"{name} is {value}" for name, value in rules.items() if value is not None and not value > 0]
        if odd:
            raise ValueError(f"{' and '.join(odd)}: choose a number above 0")

    def verdict(self, history: Sequence[Measured]) -> str | None:
        """A reason to stop, or None; the first of `history` was measured before training.

        >>> falling, rising = {"target": 1.0, "general": 2.0}, {"target": 1.5, "general": 2.5}
        >>> Rules(patience=1).verdict([falling, rising])
        'no better target for 1 measurement'
        >>> Rules(most_forgotten=0.4).verdict([falling, rising])
        'forgetting: the loss on plain English rose by 0.50 nats, more than 0.4'
        """
        if not history:
            return None
        losses = [measured["target"] for measured in history]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if self.patience is not None and since_best >= self.patience:
            return f"no better target for {since_best} measurement{'s' * (since_best > 1)}"
        forgotten = history[-1]["general"] - history[0]["general"]
        if self.most_forgotten is not None and forgotten > self.most_forgotten:
            return (
                f"forgetting: the loss on plain English rose by {forgotten:.2f} nats, more than {self.most_forgotten}"
            )
        return None


def best_of(history: Sequence[Measured], most_forgotten: float | None = None) -> Measured:
    """The measurement with the lowest target, among those that forgot no more than is allowed (as the first)."""
    limit = history[0]["general"] + (math.inf if most_forgotten is None else most_forgotten)
    return min((measured for measured in history if measured["general"] <= limit), key=lambda m: m["target"])


@dataclass(frozen=True)
class Judges:
    """What a training is measured on, and the rules."""

    held_out: Sequence[Batch]
    general: Sequence[int]  # tokens
    rules: Rules
    keep_best: Callable[[int], None] = lambda step: None  # what is done after a step that is the best so far


def judge(
    model: nn.Module, judges: Judges, log: MetricsLog, say: Callable[[str], None]
) -> Callable[[Step], str | None]:
    """A listener that measures before training, and every so many steps, and stops a training by its rules.

    What was measured stands in the log: a training that goes on is judged by all of it.
    """

    def measure(step: int) -> None:
        start = time.perf_counter()
        target, general = mean_loss(model, judges.held_out), english_loss(model, judges.general)
        seconds = time.perf_counter() - start
        log.write({"step": step, "target": target, "general": general})
        before = log.measured[0]
        gained, forgotten = before["target"] - target, general - before["general"]
        found = f"loss on held-out samples {target:.3f}; gained {gained:.3f}, forgotten {forgotten:.3f} nats"
        say(f"step {step}: {found} ({seconds:.0f} s to measure)")

    if not log.measured:
        say("measuring the model as it is before training …")
        measure(0)

    def listen(step: Step) -> str | None:
        if step.number % judges.rules.every and step.number != step.n_steps:
            return None
        measure(step.number)
        if best_of(log.measured, judges.rules.most_forgotten)["step"] == step.number:
            judges.keep_best(step.number)
        return judges.rules.verdict(log.measured)

    return listen
