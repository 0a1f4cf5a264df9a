"""What benchmarks left in their files, as lessons and claims read it: above all the comparison of methods.

A cell of benchmarks/methods.json is one training of SmolLM2-135M on orders: a case, its rate, its seed, and what came
of it. The rate of a case is the one with the least loss, of seed 0, on orders that are neither trained on nor tested.
"""

import json
from typing import Any

from minilora.classroom.lessons import lessons_folder


def results(name: str) -> dict[str, Any]:
    """What a benchmark measured, such as results("planted_rank").

    Raises:
        FileNotFoundError: if it has left nothing, or the lessons are not on this machine.
    """
    return json.loads((lessons_folder().parent / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def best_rate(case: str) -> float:
    """The tuned rate of a case such as "lora" or "full".

    Raises:
        ValueError: if no training of that name is there.
    """
    tried = [cell for cell in results("methods")["cells"] if (cell["case"], cell["seed"]) == (case, 0)]
    if not tried:
        raise ValueError(f"benchmarks/methods.json has no training of {case!r}")
    return min(tried, key=lambda cell: cell.get("validation_loss", float("inf")))["lr"]


def by_seed(case: str, lr: float) -> list[dict[str, Any]]:
    """The trainings of a case at a rate, by seed."""
    found = [cell for cell in results("methods")["cells"] if (cell["case"], cell["lr"]) == (case, lr)]
    return sorted(found, key=lambda cell: cell["seed"])
