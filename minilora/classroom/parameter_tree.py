"""What training makes of each parameter of a real model: frozen or trained, with an adapter or without, and the bytes
that the optimizer keeps for it. Exact, from the shapes alone.

One `Part` stands for a tensor, or for all tensors that play the same role in the decoder layers.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from minilora.llm.architectures import Architecture, Shape, linears, match_targets, parameter_shapes
from minilora.llm.sizes import optimizer_bytes

EVERYTHING = "everything"  # full fine-tuning: no adapter, every parameter trains
LAYER = re.compile(r"\.\d+\.")  # the number of a decoder layer inside a name
VALUE_BYTES = 4  # float32, as the weights, the adapters and their gradients here


@dataclass(frozen=True, kw_only=True)
class Part:
    """One line of the tree. Counts and bytes are those of all its copies."""

    name: str  # as in the checkpoint; "*" for the number of the layer
    shape: Shape
    copies: int
    trains: bool
    adapter: tuple[Shape, Shape] | None  # A (r, in) and B (out, r)
    state_bytes: int

    @property
    def params(self) -> int:
        """The model's own parameters."""
        return self.copies * math.prod(self.shape)

    @property
    def adapter_params(self) -> int:
        """Those of A and B."""
        return self.copies * sum(math.prod(shape) for shape in self.adapter or ())

    @property
    def trained(self) -> int:
        """How many of both get a gradient."""
        return self.adapter_params + (self.params if self.trains else 0)


@dataclass(frozen=True)
class Tree:
    """All parts, and their sums."""

    parts: tuple[Part, ...]

    @property
    def trained(self) -> int:
        """Parameters that get a gradient."""
        return sum(part.trained for part in self.parts)

    @property
    def total(self) -> int:
        """Parameters of model and adapters."""
        return sum(part.params + part.adapter_params for part in self.parts)

    @property
    def gradient_bytes(self) -> int:
        """Gradients in float32."""
        return VALUE_BYTES * self.trained

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps between two steps."""
        return sum(part.state_bytes for part in self.parts)


def parameter_tree(
    arch: Architecture, *, r: int, targets: str | Sequence[str], optimizer: str, freezes_rest: bool = True
) -> Tree:
    """Say of every parameter whether it trains, and what the optimizer keeps for it.

    `targets` are names of the decoder layers' matrices, "all-linear", or `EVERYTHING`. Where `freezes_rest` is false,
    a matrix is frozen when it gets an adapter, and nothing else is: a mistake of many a hand-written LoRA.

    Raises:
        ValueError: if a target hits nothing, or a matrix outside the decoder layers, or there is no such optimizer.

    >>> from minilora.llm.architectures import ARCHITECTURES
    >>> tree = parameter_tree(ARCHITECTURES["smollm2-135m"], r=8, targets=["q_proj", "v_proj"], optimizer="adamw")
    >>> tree.trained, tree.state_bytes
    (460800, 3686400)
    """
    modules = linears(arch)
    hit = {} if targets == EVERYTHING else match_targets(arch, targets)
    if outside := sorted(hit.keys() - modules.keys()):
        raise ValueError(f"{outside} stand outside the decoder layers: choose targets inside them, such as q_proj")
    groups: dict[str, list[tuple[str, Shape]]] = {}
    for name, shape in parameter_shapes(arch).items():
        groups.setdefault(LAYER.sub(".*.", name), []).append((name, shape))
    parts = []
    for name, members in groups.items():
        module, shape = members[0][0].removesuffix(".weight"), members[0][1]
        adapter = None
        if module in hit:
            adapter = ((r, hit[module].in_features), (hit[module].out_features, r))
        trains = targets == EVERYTHING or not (freezes_rest or adapter)
        trained = [*(adapter or ()), *([shape] if trains else [])] * len(members)
        parts.append(
            Part(
                name=name.removesuffix(".weight"),
                shape=shape,
                copies=len(members),
                trains=trains,
                adapter=adapter,
                state_bytes=optimizer_bytes(trained, optimizer),
            )
        )
    return Tree(tuple(parts))
