"""Which adapter layer stands over which base: the `wrap` of inject and load_adapter.

    kinds       layers of one method, each for another kind of base: (LoRALinear, LoRAConv1D, LoRAEmbedding)
    wrap        a function module -> module:  lora_layer(base, r=…, alpha=…)

A method with a Conv1D of its own has its `wrap` in one line:

    dora_layer = partial(wrap_in, (DoRALinear, DoRAConv1D))

Read before this file: layers.
"""

from collections.abc import Sequence
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.torch_lora.layers import KINDS, LoRAEmbedding, LoRALayer

Kind = TypeVar("Kind", bound=LoRALayer)


def kind_for(base: nn.Module, kinds: Sequence[type[Kind]]) -> type[Kind]:
    """The first of these layers that accepts a base; where none does, the first, which refuses it and says why."""
    return next((kind for kind in kinds if kind.accepts(base)), kinds[0])


def wrap_in(
    kinds: Sequence[type[Kind]],
    base: nn.Module,
    *,
    r: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    generator: torch.Generator | None = None,
) -> Kind:
    """Wrap a base in the layer that is for its kind. An embedding has no dropout: token numbers have nothing to drop.

    Raises:
        TypeError: if none of the layers is for such a base.
        ValueError: as the layer: for impossible settings, or over a base that is an adapter layer already.
    """
    kind = kind_for(base, kinds)
    its_dropout = 0.0 if issubclass(kind, LoRAEmbedding) else dropout
    return kind(base, r=r, alpha=alpha, dropout=its_dropout, use_rslora=use_rslora, generator=generator)


lora_layer = partial(wrap_in, KINDS)  # the `wrap` of inject and load_adapter


def lora_of(
    base: nn.Module,
    A: Float[Tensor, "r in"],
    B: Float[Tensor, "out r"],
    *,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
) -> LoRALayer:
    """Make the plain LoRA layer of these A and B over a base. Nothing is drawn from torch's own generator.

    So to save an adapter, which some methods do by way of this, leaves the dropout of the next step as it was.
    """
    own = torch.Generator(A.device)
    layer = lora_layer(base, r=len(A), alpha=alpha, dropout=dropout, use_rslora=use_rslora, generator=own)
    layer.A, layer.B = (nn.Parameter(matrix.detach().contiguous()) for matrix in (A, B))
    return layer


def refuse_to_fill(layer: nn.Module) -> None:
    """Refuse a layer in which A and B of a file, or of a sum, would have another effect than there.

    Raises:
        ValueError: if its update is not that of its own A and B.
    """
    if isinstance(layer, LoRALayer) and layer.as_lora() is not layer:
        raise ValueError(
            f"a {layer.describe()} begins with A and B of its own, and what it saves is a plain LoRA of another r: "
            "remove(model) takes it off, and wrap=lora_layer makes layers for that"
        )
