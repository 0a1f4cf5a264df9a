"""Save a training, and go on with it as if it had never stopped: the same bits at the end.

    what the next step depends on         where it is kept
    the weights that are trained          model/…
    the optimizer's moments               optimizer/…
    what a method keeps beside them       method/…
    the random numbers of dropout         random/…
    the place in the data                 the step: batches are made anew, from the same samples and seed

All of it is one safetensors file, written under another name and renamed: a process that is killed at any moment leaves
the last whole one. The file also says of which run it is, so that another run does not go on from it.

Read before: train/trainer.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora.files import remove_unfinished_in, whole_file
from minilora.train.trainer import Step


@runtime_checkable
class Stateful(Protocol):
    """What can be saved and go on: AdaLoRA's RankAllocator, for one."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """All that its next step depends on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds: the steps that were made, what run it is of, and the tensors."""

    step: int
    run: Mapping[str, Any]
    numbers: Mapping[str, Mapping[str, Any]]  # of the optimizer's state, those that are no tensors
    tensors: Mapping[str, Tensor]


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    run: Mapping[str, Any],
    beside: Stateful | None = None,
) -> None:
    """Write the state of a training after a step; `run` says, in JSON's terms, what is trained on what."""
    state = optimizer.state_dict()
    tensors = {f"model/{name}": p.detach() for name, p in _trained(model).items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, moments in state["state"].items():
        for name, value in moments.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    tensors |= {f"method/{name}": tensor for name, tensor in (beside.state_dict() if beside else {}).items()}
    tensors |= {f"random/{device}": bits for device, bits in _random_states(model).items()}
    metadata = {"step": str(step), "run": json.dumps(run), "numbers": json.dumps(numbers)}
    with whole_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: nothing to go on from")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        step, run, numbers = (json.loads(metadata[name]) for name in ("step", "run", "numbers"))
        if not (isinstance(step, int) and isinstance(run, dict) and isinstance(numbers, dict)):
            raise ValueError("its step, run and numbers are others")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no whole checkpoint ({error}): begin the training anew") from None
    return Checkpoint(step, run, numbers, tensors)


def restore(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
    beside: Stateful | None = None,
) -> int:
    """Put a checkpoint's state into a model and an optimizer; give how many steps were made.

    The optimizer keeps its own settings: its rate at that moment was the schedule's, and the run tells the others.

    Raises:
        ValueError: if it is of another run, or of a model with other trained weights; nothing is changed then.
    """
    check_same_run(checkpoint.run, run)
    trained, found = _trained(model), _below(checkpoint.tensors, "model")
    shapes, expected = ({name: tuple(t.shape) for name, t in both.items()} for both in (found, trained))
    if shapes != expected:
        odd = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        raise ValueError(f"this checkpoint is of a model with other trained weights: {', '.join(odd[:5])} differ")
    if beside:
        beside.load_state_dict(_below(checkpoint.tensors, "method"))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": _optimizer_state(checkpoint)})
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(found[name])
    for device, state in _below(checkpoint.tensors, "random").items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)
    return checkpoint.step


def check_same_run(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: if they differ, with every difference.
    """
    ours = json.loads(json.dumps(ours))
    differences = [
        f"the contents of --{key.replace('_', '-')} have changed since"
        if all(str(run.get(key)).startswith("SHA-256 ") for run in (theirs, ours))
        else f"{key} is {theirs.get(key)!r} there and {ours.get(key)!r} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise ValueError("the checkpoint is of another run:\n  " + "\n  ".join(differences))


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _below(tensors: Mapping[str, Tensor], room: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{room}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{room}/")}


def _optimizer_state(checkpoint: Checkpoint) -> dict[int, dict[str, Any]]:
    state: dict[int, dict[str, Any]] = {int(index): dict(numbers) for index, numbers in checkpoint.numbers.items()}
    for place, tensor in _below(checkpoint.tensors, "optimizer").items():
        index, name = place.split("/")
        state.setdefault(int(index), {})[name] = tensor
    return state


def _random_states(model: nn.Module) -> dict[str, Tensor]:
    """Where the random numbers stand: of the CPU, and of every CUDA device that the model is on."""
    devices = sorted({str(p.device) for p in model.parameters() if p.is_cuda})
    return {"cpu": torch.get_rng_state()} | {device: torch.cuda.get_rng_state(device) for device in devices}


@dataclass(frozen=True)
class Saving:
    """Where a training is saved, of which run it is, and after how many steps each time.

    Raises:
        ValueError: if it would be saved less often than once a step.
    """

    path: Path
    run: Mapping[str, Any]
    every: int = 50

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"cannot save every {self.every} steps: choose 1 or more")

    def resumed(self, model: nn.Module, optimizer: torch.optim.Optimizer, beside: Stateful | None = None) -> int:
        """Go on from the file, if there is one; give how many steps were made."""
        remove_unfinished_in(self.path.parent)
        return restore(read_checkpoint(self.path), model, optimizer, self.run, beside) if self.path.exists() else 0

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, beside: Stateful | None = None
    ) -> None:
        """Write the state after a step."""
        save_checkpoint(self.path, model, optimizer, step, self.run, beside)

    def listener(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, beside: Stateful | None = None
    ) -> Callable[[Step], None]:
        """A listener that saves every so many steps."""

        def listen(step: Step) -> None:
            if step.number % self.every == 0:
                self.save(model, optimizer, step.number, beside)

        return listen
