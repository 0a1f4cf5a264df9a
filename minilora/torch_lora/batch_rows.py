"""What a served layer computes: the base's result, and in each row what that row's adapter adds.

    x, y    (rows, seq, in), (rows, seq, out)        slot    some rows of one adapter, as many as in every other slot
    A       (slots, r, in), times scaling            B       (slots, r, out)        of the batch's adapters, stacked

        y = base(x)        y[slot] += (x[slot] Aᵀ) B        [LoRA] eq. 3, for all slots in one batched product

An adapter of a lower r than the stack's is filled with zeros, which add nothing. Stacks are made when a layer is first
called inside a `with`, and kept to its end: prompt and new tokens are read with the same ones. They take
slots · r · (in + out) numbers a layer beside the cache's limit.

A token costs 2 · r · (in + out) operations beside the base's 2 · in · out, and each forward reads all stacks once: for
16 adapters of r 16 on every linear layer of SmolLM2-135M 78 M numbers beside 270 MB of the base. On a CPU the stacks
of 16-bit adapters are float32, 313 MB here. That is twice the bytes, and still the faster way for one new token a row:
30 ms of one core's time for all layers, 36 ms multiplied by torch in bfloat16, 42 ms converted each time. A prompt is
multiplied in x's dtype. The base's products stay as they were: q, k and v in one go, as without adapters.

Read before this file: layers, adapter_cache.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minilora.cpu import each
from minilora.torch_lora.adapted_weight import AdaptedWeight
from minilora.torch_lora.adapter_cache import Adapter
from minilora.torch_lora.adapter_layer import StoresNoFloats, dense_weight
from minilora.torch_lora.layers import autocasts

FEW_TOKENS = 8  # a slot: up to here a CPU multiplies as float32, the stacks' dtype there, and beyond it in x's dtype


class Routing(threading.local):
    """What a server's layers share: the batch that this thread runs now, if it runs one."""

    batch: "BatchRows | None" = None


class RoutedLinear(nn.Module):
    """A linear layer, and for each row what its adapter adds."""

    base: Any  # an nn.Module, whose attributes depend on its kind

    def __init__(self, base: nn.Module, name: str, routing: Routing):
        super().__init__()
        self.base, self.name, self.routing = base, name, routing

    def forward(self, x: Float[Tensor, "rows *n in"]) -> Float[Tensor, "rows *n out"]:
        return self.several(x, [self])[0]

    @staticmethod
    def several(x: Float[Tensor, "rows *n in"], layers: "Sequence[RoutedLinear]") -> list[Float[Tensor, "rows *n _"]]:
        """Give what each of these layers makes of x, the base's products in one go (cpu/linear)."""
        ys = each(x, *(layer.base for layer in layers))
        batch = layers[0].routing.batch
        return ys if batch is None else batch.added(x, ys, tuple(layer.name for layer in layers))

    @property
    def weight(self) -> Tensor:
        """The base's weight, for models that read it instead of calling the layer: adapted_weight tells of them.

        Rows of several adapters have no one weight: to compute with it raises a RuntimeError while one touches it.
        """
        if not isinstance(self.base, StoresNoFloats):
            return AdaptedWeight.of(self.base.weight, self.base.weight.shape, self._one_weight)
        base: Any = self.base
        like = next(base.buffers()).new_empty((), dtype=torch.float32)
        return AdaptedWeight.of(like, torch.Size((base.out_features, base.in_features)), self._one_weight)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias, or None."""
        return self.base.bias

    def _one_weight(self) -> Tensor:
        batch = self.routing.batch
        if batch is not None and any(a is not None and self.name in a.pairs for a in batch.adapters):
            raise RuntimeError(
                f"this model computes with {self.name}.weight instead of calling the layer, and each row has another: "
                "choose targets without it (in BLOOM: slow_but_exact=False calls it), or merge one adapter"
            )
        return dense_weight(self.base, self.weight.dtype)

    def extra_repr(self) -> str:
        return self.name


@dataclass(frozen=True)
class Stack:
    """The factors of a batch's adapters for layers of one x: A one below the other, B for each layer."""

    A: Float[Tensor, "slots r_of_all in"]
    Bs: list[Float[Tensor, "slots _ _"]]  # (slots, r, out), r 0 where no adapter touches the layer


class BatchRows:
    """The adapters of a batch's rows, stacked for a layer when it is first called.

    The rows are sorted by adapter and cut into slots of equal length: the greatest that divides the numbers of rows of
    all adapters. So 16 rows of one adapter are one slot, 16 of different ones 16, and nothing is padded but r.
    """

    def __init__(self, adapters: Sequence[Adapter | None]):
        self.adapters = list(adapters)
        self._arrange()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, as generating does when others have ended. In place."""
        self.adapters = [self.adapters[row] for row in rows]
        self._arrange()

    def _arrange(self) -> None:
        rows_of: dict[Adapter, list[int]] = {}
        for row, adapter in enumerate(self.adapters):
            if adapter is not None:
                rows_of.setdefault(adapter, []).append(row)
        rows_a_slot = math.gcd(*map(len, rows_of.values()))
        self._slots = [adapter for adapter, rows in rows_of.items() for _ in range(len(rows) // rows_a_slot)]
        self._sorted = [row for rows in rows_of.values() for row in rows]
        self._is_sorted = self._sorted == list(range(len(self.adapters)))
        self._stacks: dict[tuple[str, ...], Stack | None] = {}

    def added(self, x: Tensor, ys: list[Tensor], names: tuple[str, ...]) -> list[Tensor]:
        """Add to ys, the base's results for the layers of these names, what the rows' adapters make of x; in place.

        Under autocast everything is computed in the dtype that the base's results have.

        Raises:
            ValueError: if x has another number of rows than adapters were named for, or no axis for rows alone.
        """
        if autocasts(x):
            with torch.autocast(x.device.type, enabled=False):
                return self.added(x.to(ys[0].dtype), ys, names)
        if names not in self._stacks:
            self._stacks[names] = self._stacked(names)
        stack = self._stacks[names]
        if stack is None:
            return ys
        self._refuse_other_rows(x, names)
        index = None if self._is_sorted else torch.tensor(self._sorted, device=x.device)
        mine = (x if index is None else x[index]).reshape(len(self._slots), -1, x.shape[-1])
        few = x.is_cpu and x.element_size() < 4 and mine.shape[1] <= FEW_TOKENS
        dtype = torch.float32 if few else x.dtype
        u = mine.to(dtype) @ stack.A.to(dtype).mT  # (slots, rows · seq, r_of_all)
        us = u.split([B.shape[1] for B in stack.Bs], dim=-1)
        return [_plus(y, u, B.to(dtype), index) for y, u, B in zip(ys, us, stack.Bs, strict=True)]

    def _refuse_other_rows(self, x: Tensor, names: tuple[str, ...]) -> None:
        if x.ndim < 3:
            raise ValueError(
                f"{names[0]} is called with {tuple(x.shape)}, without an axis for rows alone (as in OPT, or in "
                "experts, which see some of the tokens): whose these are cannot be told; choose targets without it"
            )
        if len(x) != len(self.adapters):
            raise ValueError(
                f"adapters were named for {len(self.adapters)} rows, and the batch has {len(x)}: "
                "name one (or None) for every row, and tell `keep` when rows leave"
            )

    @torch.inference_mode()
    def _stacked(self, names: tuple[str, ...]) -> Stack | None:
        touched = {name: [a.pairs[name] for a in self._slots if name in a.pairs] for name in names}
        ranks = {name: max((len(A) for A, _ in pairs), default=0) for name, pairs in touched.items()}
        if not any(ranks.values()):
            return None
        first, _ = next(pairs[0] for pairs in touched.values() if pairs)
        wide = torch.promote_types(first.dtype, torch.float32) if first.is_cpu else first.dtype
        stacked = first.new_zeros(len(self._slots), sum(ranks.values()), first.shape[1], dtype=wide)
        Bs, start = [], 0
        for name in names:
            out_features = touched[name][0][1].shape[0] if touched[name] else 0
            stacked_B = first.new_zeros(len(self._slots), ranks[name], out_features, dtype=wide)
            for slot, adapter in enumerate(self._slots):
                if name in adapter.pairs:
                    A, B = adapter.pairs[name]
                    stacked[slot, start : start + len(A)] = A
                    stacked_B[slot, : len(A)] = B.T
            Bs.append(stacked_B)
            start += ranks[name]
        return Stack(stacked, Bs)


def _plus(
    y: Float[Tensor, "rows *n out"],
    u: Float[Tensor, "slots m r"],
    B: Float[Tensor, "slots r _"],
    index: Tensor | None,
) -> Float[Tensor, "rows *n out"]:
    """Add u B to the rows of y that have adapters (all in order where `index` is None), rounded once to y's dtype."""
    if B.shape[1] == 0:
        return y
    chosen = y.contiguous() if index is None else y[index]
    sums = chosen.view(len(B), -1, y.shape[-1])
    if u.dtype == y.dtype:
        sums.baddbmm_(u, B)
    else:
        sums.add_(u @ B)
    return chosen if index is None else y.index_copy(0, index, chosen)
