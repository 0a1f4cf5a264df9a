"""Serving: one batch with another adapter in each row, over one base.

    server = AdapterServer(model, limit_bytes=500_000_000)
    server.cache.register("french", folder)                # reads config and header; the numbers when they are needed
    with server.rows(["french", None, "json"]) as batch:   # the adapter of each row; None is the plain base
        answers = generate(model, prompts, max_new_tokens=50, on_rows_kept=batch.keep)

What a layer computes then is in batch_rows, what is in memory in adapter_cache. Here adapters are read, checked, and
brought into the form in which they are added. Read before this file: batch_rows.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora.torch_lora.adapter_cache import Adapter, AdapterCache
from minilora.torch_lora.batch_rows import BatchRows, RoutedLinear, Routing
from minilora.torch_lora.inject import ALL_LINEAR, Target, inject, match_targets
from minilora.torch_lora.layers import LoRAConv1D, LoRALinear, refuse_unfit
from minilora.torch_lora.peft_config import CONFIG_FILE, AdapterConfig, read_config
from minilora.torch_lora.peft_files import TENSOR_FILE, read_tensors, refuse_another_config
from minilora.torch_lora.peft_tensors import fit_adapter, matrix_named


class AdapterServer:
    """A model whose linear layers look, in each row of a batch, for the adapter that was named for it.

    The base's layers are wrapped, in place, once; without `rows` the model computes what it did before. Adapters are
    kept in the dtype of each layer's weight (float32 over 4 bits), at most `limit_bytes` of them. Threads may run
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
        self._plain = _without_wrapping(model)
        self.cache = AdapterCache(limit_bytes, size_of=self._size_of, read=self._read)
        self._routing = Routing()
        # of a module with several names the first one counts, by which files call it
        names = {id(model.get_submodule(name)): name for name in reversed(self._layers)}
        inject(model, targets, lambda base: RoutedLinear(base, names[id(base)], self._routing))
        self._served = {module.name: module for module in model.modules() if isinstance(module, RoutedLinear)}
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
                batch.keep([])  # whoever holds the batch holds no adapters any more, and no stacks

    def close(self) -> None:
        """Give the model its layers back, the same objects, in place. Parameters stay frozen."""
        self._is_closed = True
        for name in self._layers:
            parent, _, leaf = name.rpartition(".")
            layer: Any = self.model.get_submodule(name)
            setattr(self.model.get_submodule(parent), leaf, layer.base)

    def _size_of(self, folder: Path) -> int:
        """The bytes of a folder's adapter in the dtypes that it is served in, from its config and its header."""
        config = served_config(folder)
        path = folder / TENSOR_FILE
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}")
        try:
            with safe_open(path, framework="pt") as file:
                refuse_another_config(folder, config.sha256, file.metadata() or {})
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short ({error}): fetch it again") from None
        layers = {key: self._served.get(matrix_named(key)[0]) for key in shapes}
        return sum(math.prod(shapes[key]) * layer.weight.dtype.itemsize for key, layer in layers.items() if layer)

    @torch.inference_mode()
    def _read(self, folder: Path) -> Adapter:
        """Read an adapter with peft_tensors' own checks, against layers that hold no numbers."""
        config = served_config(folder)
        tensors, metadata = read_tensors(folder / TENSOR_FILE)
        refuse_another_config(folder, config.sha256, metadata)
        pairs, _ = fit_adapter(self._plain, tensors, config)
        if others := sorted(pairs.keys() - self._served.keys()):
            raise ValueError(
                f"{len(others)} layers of this adapter are not served, the first is {others[0]}: choose targets that "
                "hit them (a layer with two names is served under the first)"
            )
        return Adapter({name: self._as_served(name, config, pair["A"], pair["B"]) for name, pair in pairs.items()})

    def _as_served(self, name: str, config: AdapterConfig, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """scaling · A and B in the dtype and on the device of their layer, rounded once."""
        like = self._served[name].weight
        wide = torch.promote_types(like.dtype, torch.float32)
        A = (config.settings_of(name).scaling * A.to(wide)).to(like.device, like.dtype)
        B = B.to(like.device, like.dtype, copy=True)  # not a view of the file
        if not (A.isfinite().all() and B.isfinite().all()):
            raise ValueError(f"{name}: not finite as {like.dtype}, the dtype of its layer: serve the base in bfloat16")
        return A, B


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


def _refuse_others(model: nn.Module, names: Collection[str]) -> None:
    for name in names:
        base = model.get_submodule(name)
        refuse_unfit(base, LoRAConv1D if LoRAConv1D.accepts(base) else LoRALinear)


def _without_wrapping(module: nn.Module) -> Any:
    """A model's modules as they are, whatever will be wrapped in it, with the tensors themselves and not copies."""
    twin = copy.copy(module)
    twin._modules = {name: child and _without_wrapping(child) for name, child in module._modules.items()}
    return twin
