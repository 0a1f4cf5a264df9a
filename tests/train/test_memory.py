"""The memory that `minilora size` predicts, beside the bytes of tensors that are alive while a real model trains."""

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.llm import load_model
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import Setup
from minilora.llm.training_memory import training_bytes
from minilora.methods import DoRALinear
from minilora.qlora import PagedAdamW, QLoRALinear
from minilora.torch_lora import LoRALinear, inject
from minilora.train.data import Batch
from minilora.train.loss import loss_of


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, the given ones and all made inside, and the most that there were."""

    def __init__(self, tensors):
        super().__init__()
        self.storages = Counter()
        self.peak = 0
        for tensor in tensors:
            self.see(tensor)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.see(value)
        return result

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.storages:
            self.storages[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.storages.pop, storage._cdata, None)
            self.peak = max(self.peak, self.storages.total())


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
def test_size_predicts_the_bytes_of_a_training_step_within_a_tenth(method, checkpointing):
    model, _ = load_model("smollm2-135m", dtype=torch.bfloat16)
    wrap = {"lora": LoRALinear, "dora": DoRALinear, "qlora": QLoRALinear}.get(method)
    if wrap:
        inject(model, "all-linear", lambda base: wrap(base, r=16, alpha=32))
    model.model.gradient_checkpointing = checkpointing
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    tokens = torch.randint(0, 49152, (4, 256))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(2):
            loss_of(model, Batch(tokens, tokens)).backward()
            optimizer.step()
            optimizer.zero_grad()

    setup = Setup(method=method, r=16, batch=4, seq=256, checkpointing=checkpointing, master_weights=False)
    predicted = training_bytes(ARCHITECTURES["smollm2-135m"], setup)
    assert abs(live.peak - predicted.total) <= 0.1 * live.peak
