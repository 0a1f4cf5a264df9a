"""Serving: one batch with another adapter in each row, over one base.

    x, y    (rows, seq, in), (rows, seq, out)        slot    some rows of one adapter, as many as in every other slot
    A       (slots, r, in), times scaling            B       (slots, r, out)        of the batch's adapters, stacked

        y = base(x)        y[slot] += (x[slot] Aᵀ) B        [LoRA] eq. 3, for all slots in one batched product

    server = AdapterServer(model, limit_bytes=500_000_000)
    server.cache.register("french", folder)                # reads config and header; the numbers when they are needed
    with server.rows(["french", None, "json"]) as batch:   # the adapter of each row; None is the plain base
        answers = generate(model, prompts, max_new_tokens=50, on_rows_kept=batch.keep)

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
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.cpu import each
from minilora.torch_lora.adapter_cache import Adapter, AdapterCache
from minilora.torch_lora.inject import ALL_LINEAR, Target, inject, match_targets
from minilora.torch_lora.layers import LoRAConv1D, LoRALinear, refuse_unfit
from minilora.torch_lora.peft_config import AdapterConfig, read_config
from minilora.torch_lora.peft_format import CONFIG_FILE, TENSOR_FILE, refuse_another_config
from minilora.torch_lora.peft_tensors import fit_adapter, read_tensors

FEW_TOKENS = 8  # a slot: up to here a CPU multiplies as float32, the stacks' dtype there, and beyond it in x's dtype


class AdapterServer:
    """A model whose linear layers look, in each row of a batch, for the adapter that was named for it.

    The base's layers are wrapped, in place, once; without `rows` the model computes what it did before. Adapters are
    kept in the dtype of the model's weights (float32 over 4 bits), at most `limit_bytes` of them. Threads may run
    batches at the same time: each thread sees its own rows. For inference alone: nothing in an adapter trains.

    Raises:
        ValueError: if a target hits nothing, or layers that have an adapter or are served already.
        TypeError: if it hits a layer that is not linear.
    """

    def __init__(self, model: nn.Module, *, limit_bytes: int, targets: Target | Sequence[Target] = ALL_LINEAR):
        if any(isinstance(module, RoutedLinear) for module in model.modules()):
            raise ValueError("this model is served already: close() that server first")
        self.model = model
        hits = match_targets(model, targets)
        self._layers = list(dict.fromkeys(name for names in hits.values() for name in names))
        _refuse_others(model, self._layers)
        self._skeleton = _skeleton(model, self._layers)
        self.cache = AdapterCache(limit_bytes, size_of=self._size_of, read=self._read)
        self._routing = Routing()
        # of a module with several names the first one counts, by which files call it
        names = {id(model.get_submodule(name)): name for name in reversed(self._layers)}
        inject(model, targets, lambda base: RoutedLinear(base, names[id(base)], self._routing))
        first: Any = model.get_submodule(self._layers[0])
        weight = next((p for p in first.base.parameters() if p.is_floating_point()), None)
        self._dtype = torch.float32 if weight is None else weight.dtype
        self._device = next(iter([*first.base.parameters(), *first.base.buffers()])).device
        self._is_closed = False

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> "Iterator[BatchRows]":
        """Let the rows of this thread's batches have these adapters for the length of a `with`; None is none.

        Every row's result is, up to rounding, what it is alone with its adapter in the model; that of a row without an
        adapter is the plain base's.

        Raises:
            AdapterError: if adapters cannot be had; its `failures` names them, so that the other rows can be served.
            ValueError: if the batch's adapters are larger than the cache's limit.
            RuntimeError: inside another `with` of this kind, or after close().
        """
        if self._is_closed:
            raise RuntimeError("this server is closed: its model is the plain base again; make another one")
        if self._routing.batch is not None:
            raise RuntimeError("this thread serves a batch already: end that `with` before the next")
        with self.cache.borrow({name for name in names if name is not None}) as adapters:
            batch = BatchRows([None if name is None else adapters[name] for name in names])
            self._routing.batch = batch
            try:
                yield batch
            finally:
                self._routing.batch = None

    def close(self) -> None:
        """Give the model its layers back, the same objects, in place. Parameters stay frozen."""
        self._is_closed = True
        for name in self._layers:
            parent, _, leaf = name.rpartition(".")
            layer: Any = self.model.get_submodule(name)
            setattr(self.model.get_submodule(parent), leaf, layer.base)

    def _size_of(self, folder: Path) -> int:
        """The bytes of a folder's adapter in this server's dtype, from its config and its header."""
        config = served_config(folder)
        path = folder / TENSOR_FILE
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        try:
            with safe_open(path, framework="pt") as file:
                refuse_another_config(folder, config, file.metadata() or {})
                numbers = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from None
        return numbers * self._dtype.itemsize

    @torch.inference_mode()
    def _read(self, folder: Path) -> Adapter:
        """Read an adapter with peft_tensors' own checks, against layers that hold no numbers."""
        config = served_config(folder)
        tensors, metadata = read_tensors(folder / TENSOR_FILE)
        refuse_another_config(folder, config, metadata)
        pairs, _ = fit_adapter(self._skeleton, tensors, config)
        wide = torch.promote_types(self._dtype, torch.float32)
        return Adapter(
            {
                name: (
                    (config.settings_of(name).scaling * pair["A"].to(wide)).to(self._device, self._dtype),
                    pair["B"].to(self._device, self._dtype, copy=True),  # not a view of the file
                )
                for name, pair in pairs.items()
            }
        )


def served_config(folder: Path) -> AdapterConfig:
    """Read the config of an adapter that can be served beside others.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or the adapter replaces tensors of the base, which all rows share.
    """
    path = folder / CONFIG_FILE
    config = read_config(path)
    if config.use_dora:
        raise ValueError(f"{path} says use_dora: DoRA rescales what the base returns, for each row; merge it instead")
    replaces = {"bias": config.bias if config.bias != "none" else "", "modules_to_save": config.modules_to_save}
    if any(replaces.values()):
        said = " and ".join(f"{key} = {value!r}" for key, value in replaces.items() if value)
        raise ValueError(f"{path} says {said}: it replaces tensors of the base, which other rows use; serve it alone")
    return config


class Routing(threading.local):
    """What a server's layers share: the batch that this thread runs now, if it runs one."""

    batch: "BatchRows | None" = None


class RoutedLinear(nn.Module):
    """A linear layer, and for each row what its adapter adds."""

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

        Raises:
            ValueError: if x has another number of rows than adapters were named for.
        """
        if len(x) != len(self.adapters):
            raise ValueError(
                f"adapters were named for {len(self.adapters)} rows, and the batch has {len(x)}: "
                "name one (or None) for every row, and tell `keep` when rows leave"
            )
        if names not in self._stacks:
            self._stacks[names] = self._stacked(names)
        stack = self._stacks[names]
        if stack is None:
            return ys
        index = None if self._is_sorted else torch.tensor(self._sorted, device=x.device)
        mine = (x if index is None else x[index]).reshape(len(self._slots), -1, x.shape[-1])
        few = x.is_cpu and x.element_size() < 4 and mine.shape[1] <= FEW_TOKENS
        dtype = torch.float32 if few else x.dtype
        u = mine.to(dtype) @ stack.A.to(dtype).mT  # (slots, rows · seq, r_of_all)
        us = u.split([B.shape[1] for B in stack.Bs], dim=-1)
        return [_plus(y, u, B.to(dtype), index) for y, u, B in zip(ys, us, stack.Bs, strict=True)]

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


def _refuse_others(model: nn.Module, names: Collection[str]) -> None:
    for name in names:
        base = model.get_submodule(name)
        refuse_unfit(base, LoRAConv1D if LoRAConv1D.accepts(base) else LoRALinear)


def _skeleton(model: nn.Module, names: Collection[str]) -> nn.Module:
    """The named linear layers of a model alone, under their names and without numbers: to check adapters against."""
    root = nn.Module()
    for name in names:
        base: Any = model.get_submodule(name)
        kind = LoRALinear if LoRALinear.accepts(base) else LoRAConv1D
        parent = root
        *path, leaf = name.split(".")
        for step in path:
            if step not in parent._modules:
                parent.add_module(step, nn.Module())
            parent = parent.get_submodule(step)
        parent.add_module(leaf, nn.Linear(*kind.features(base), bias=False, device="meta"))
    return root
