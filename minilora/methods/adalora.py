"""AdaLoRA's layer: an update in the form of an SVD, whose singular values say what rank a layer needs.

    Q   right singular vectors, rows nearly orthonormal     (r, in)    the layer's A
    Λ   singular values, zero at the start                  (r,)       the layer's E
    P   left singular vectors, columns nearly orthonormal   (out, r)   the layer's B
    triplet   a column of P, its value in Λ and its row of Q: one of r; where the value is zero it does nothing

        W′ = W + scaling · P Λ Q                                      [AdaLoRA] eq. 3
        R  = ‖PᵀP − I‖² + ‖QQᵀ − I‖²                                  [AdaLoRA] eq. 4, added to the loss, times γ

The authors' code and PEFT add the mean of the distances instead of the sum of their squares: orthogonality() has both.
Every layer begins with more triplets than there shall be in the end; methods/adalora_budget decides while training
which of them lose their value. What is left is a plain LoRA of another rank in every layer (to_lora). The scaling is
LoRA's ([AdaLoRA] section 4), alpha / r with the r of the start; the authors' code and PEFT have alpha / (r + 0.00001).

Read before this file: torch_lora/layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.layers import LoRAConv1D, LoRALayer, LoRALinear
from minilora.torch_lora.wrap import kind_for, lora_of

INIT_STD = 0.02  # of P and Q, in the authors' code


class AdaLoRALinear(LoRALinear):
    """AdaLoRA over a linear layer, or over one in 4 bits.

        h = base(x) + scaling · ((dropout(x) Aᵀ) ⊙ E) Bᵀ             [AdaLoRA] eq. 3

    A new layer changes nothing, bit for bit: E is zero; A and B are drawn from N(0, 0.02²).

    Raises:
        ValueError: if r is more than the smaller side of W; else as LoRALinear.

    >>> layer = AdaLoRALinear(nn.Linear(24, 16), r=4, alpha=8)
    >>> [tuple(p.shape) for p in layer.parameters() if p.requires_grad]
    [(4, 24), (16, 4), (4,)]
    """

    kept: Tensor  # which triplets the last allocation left, (r,)

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(base, r=r, alpha=alpha, dropout=dropout, generator=generator)
        self.E = nn.Parameter(torch.zeros_like(self.A[:, 0]))
        self.register_buffer("kept", torch.ones_like(self.E, dtype=torch.bool), persistent=False)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None) -> None:
        """Draw a new adapter, in place: A and B from N(0, 0.02²)."""
        if self.r > (most := min(self.features(self.base))):
            raise ValueError(
                f"r is {self.r}: the weight has {most} singular values, choose as many or fewer at the start"
            )
        self.A.normal_(std=INIT_STD, generator=generator)
        self.B.normal_(std=INIT_STD, generator=generator)

    def low_rank(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """Give Q and P Λ."""
        return self.A, self.B * self.E

    def adapter_tensors(self) -> dict[str, Tensor]:
        return super().adapter_tensors() | {"E": self.E}

    @torch.no_grad()
    def prune(self, kept: Bool[Tensor, "r"]) -> None:
        """Set the singular values of all other triplets to zero, in place."""
        self.kept.copy_(kept)
        self.E.masked_fill_(~self.kept, 0)

    def in_use(self) -> Bool[Tensor, "r"]:
        """Which triplets the output depends on, or could: those kept, and those that the optimizer brought back."""
        return self.kept | (self.E != 0)

    @torch.no_grad()
    def shrunk(self) -> LoRALayer | None:
        """Make a plain LoRA layer over the same base, of the triplets in use alone; None where there are none.

            B ← P Λ        A ← Q        alpha ← scaling · their number, so that the scaling stays

        Its output is the same up to the order in which r products are summed.
        """
        chosen = self.in_use()
        r = int(chosen.sum())
        if r == 0:
            return None
        A, B = self.low_rank()
        layer = lora_of(self.base, A[chosen], B[:, chosen], alpha=self.scaling * r, dropout=self.dropout)
        return layer.train(self.training)


class AdaLoRAConv1D(AdaLoRALinear, LoRAConv1D):
    """AdaLoRA over GPT-2's `Conv1D`, which stores its weight as (in, out)."""


def adalora_layer(base: nn.Module, *, r: int, alpha: float, dropout: float = 0.0) -> AdaLoRALinear:
    """Wrap a base layer in the AdaLoRA layer of its kind: the `wrap` of inject. It has no rsLoRA, in PEFT neither.

    Raises:
        TypeError: if the base is neither linear nor a Conv1D.
    """
    return kind_for(base, (AdaLoRALinear, AdaLoRAConv1D))(base, r=r, alpha=alpha, dropout=dropout)


def adalora_layers(model: nn.Module) -> dict[str, AdaLoRALinear]:
    """Find the AdaLoRA layers of a model, by name.

    Raises:
        ValueError: if there are none.
    """
    layers = {name: layer for name, layer in adapter_layers(model).items() if isinstance(layer, AdaLoRALinear)}
    if not layers:
        raise ValueError("this model has no AdaLoRA layer: inject(model, targets, wrap) with adalora_layer makes them")
    return layers


def orthogonality(model: nn.Module, *, squared: bool = False) -> Float[Tensor, ""]:
    """How far the singular vectors of all layers are from orthonormal: a caller adds it to the loss, times γ.

        mean over all P and Q of ‖PᵀP − I‖, ‖QQᵀ − I‖        as in the authors' code and PEFT, with γ = 0.5 there
        Σ ‖PᵀP − I‖² + ‖QQᵀ − I‖²                            squared=True: [AdaLoRA] eq. 4

    Raises:
        ValueError: if the model has no AdaLoRA layer.
    """
    layers = adalora_layers(model).values()
    grams = [gram for layer in layers for gram in (layer.B.T @ layer.B, layer.A @ layer.A.T)]
    distances = torch.stack([torch.linalg.norm(gram - torch.eye(len(gram), device=gram.device)) for gram in grams])
    return distances.square().sum() if squared else distances.mean()


@dataclass(frozen=True)
class RankReport:
    """How many triplets of each layer are in use, of how many at the start."""

    ranks: Mapping[str, tuple[int, int]]

    def __str__(self) -> str:
        rows: dict[str, list[str]] = {}
        for name, (rank, r) in self.ranks.items():
            parent, _, leaf = name.rpartition(".")
            rows.setdefault(parent, []).append(f"{leaf} {rank:>2}/{r}")
        width = max(map(len, rows))
        lines = [f"{parent:<{width}}  {'  '.join(cells)}".strip() for parent, cells in rows.items()]
        rank, r = (sum(column) for column in zip(*self.ranks.values(), strict=True))
        return "\n".join([*lines, f"{rank} of {r} triplets are in use, {rank / len(self.ranks):.1f} a layer"])


def rank_report(model: nn.Module) -> RankReport:
    """Say what rank each layer has now.

    Raises:
        ValueError: if the model has no AdaLoRA layer.
    """
    return RankReport({name: (int(y.in_use().sum()), y.r) for name, y in adalora_layers(model).items()})


def to_lora(model: nn.Module) -> RankReport:
    """Replace every AdaLoRA layer by a plain LoRA layer of its own rank, in place; one without rank by its base.

    The model computes the same. save_adapter writes it with the ranks that were found and one scaling for all layers,
    which PEFT and vLLM read alike; for llama.cpp, train/export writes it.

    Raises:
        ValueError: if the model has no AdaLoRA layer, one is merged, or none has any rank left; nothing is
            changed then.
    """
    layers, report = adalora_layers(model), rank_report(model)
    merged = [name for name, layer in layers.items() if layer.is_merged]
    if merged:
        raise ValueError(f"{len(merged)} layers are merged, the first is {merged[0]}: unmerge() them first")
    if not any(rank for rank, _ in report.ranks.values()):
        raise ValueError("no layer has any rank left, so there is no LoRA to make: remove(model) takes the layers off")
    new = {layer: layer.shrunk() or layer.base for layer in layers.values()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, AdaLoRALinear):
                setattr(parent, name, new[child])
    return report
