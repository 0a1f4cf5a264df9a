"""What listens to a training: each is a function of a trainer.Step, and may return a reason to stop.

    progress_bar    loss, tokens per second and rate, on the screen
    MetricsLog      a line of JSON for every step, in a file
    health_check    says what goes wrong in silence

Read before: train/trainer, train/health.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn
from tqdm import tqdm

from minilora.files import write_whole
from minilora.train.health import idle_adapters
from minilora.train.trainer import Step

RECENT = 20  # steps that a loss is compared with
FEWEST = 3  # of them
SPIKE = 2.0  # times their median
NOISE = 0.5  # nats


@contextmanager
def progress_bar(n_steps: int, done: int = 0, shown: bool = True) -> Iterator[Callable[[Step], None]]:
    """A listener that draws loss, tokens per second and learning rate: `with progress_bar(100) as listener`."""
    with tqdm(total=n_steps, initial=done, unit="step", disable=not shown) as bar:

        def listen(step: Step) -> None:
            bar.set_postfix_str(f"loss {step.loss:.3f}, {step.n_tokens / step.seconds:,.0f} tokens/s, lr {step.lr:.1e}")
            bar.update()

        yield listen


def health_check(model: nn.Module, say: Callable[[str], None]) -> Callable[[Step], None]:
    """A listener that says what it does not like: adapters that do not move, a loss that jumps or climbs.

    A loss is high where it is SPIKE times the median of the last RECENT ones, or of the first ones there are, and
    NOISE nats more. It is told when it gets so, and not at every step after.
    """
    losses: list[float] = []
    was_high = False

    def listen(step: Step) -> None:
        nonlocal was_high
        if not losses and (idle := idle_adapters(model)):
            say(
                f"after step {step.number} B is still zero in {len(idle)} adapter layers, such as {idle[0]}: "
                "no gradient reaches them, so they learn nothing (a layer that is not called, or a cut-off graph?)"
            )
        usual = median(losses[-RECENT:]) if len(losses) >= FEWEST else math.inf
        is_high = step.loss > max(SPIKE * usual, usual + NOISE)
        if is_high and not was_high:
            say(
                f"step {step.number}: the loss is {step.loss:.3f}, where {usual:.3f} was usual: "
                "look at its batch; if it stays so, lower the learning rate"
            )
        losses.append(step.loss)
        was_high = is_high

    return listen


class MetricsLog:
    """A file with a line of JSON for each step, {"step": 1, "loss": …, "lr": …, …}, and for whatever is measured.

    A file that is there keeps its lines up to step `done`; the steps after it will be made anew.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        self.path = path
        lines = [line for line in read_metrics(path) if line["step"] <= done] if done else []
        self.measured = [line for line in lines if "target" in line]  # not of steps: train/judging
        write_whole({path: "".join(json.dumps(line) + "\n" for line in lines).encode()})

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line, at once."""
        if "target" in line:
            self.measured.append(line)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def __call__(self, step: Step) -> None:
        line = {"step": step.number, "loss": step.loss, "grad_norm": step.grad_norm, "lr": step.lr}
        line |= {"tokens": step.n_tokens, "seconds": round(step.seconds, 4)}
        self.write(line | {"grad_norms": norms_by_layer(step.grad_norms)})


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a log; a last one that is not whole, of a process that was killed, is left out."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def norms_by_layer(norms: Mapping[str, float]) -> dict[str, float]:
    """Join parameters' norms to one of each layer of a model, √(Σ norm²): of model.layers.3.… to "model.layers.3"."""
    squares: dict[str, float] = defaultdict(float)
    for name, norm in norms.items():
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        squares[".".join(parts[: number + 1])] += norm**2
    return {name: math.sqrt(total) for name, total in squares.items()}
