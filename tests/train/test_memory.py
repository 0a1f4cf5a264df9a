"""The memory that `minilora size` predicts, beside the bytes of tensors that are alive while a real model trains."""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.llm import load_model
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.setup import METHODS, Setup
from minilora.llm.training_memory import training_bytes
from minilora.train.data import Batch
from minilora.train.finetune import Recipe
from minilora.train.loss import loss_of
from minilora.train.methods import METHODS as TRAINED
from minilora.train.methods import Settings, put_new

WHOLE = ("full", "lora", "dora", "qlora")  # measured over all 30 layers of SmolLM2
N_LAYERS = 8  # of the others, where temporary tensors, which are not counted, are a larger part


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
@pytest.mark.parametrize(
    ("method", "checkpointing"),
    [(method, again) for method in METHODS for again in (False, True) if (method, again) != ("prefix", True)],
)
def test_size_predicts_the_bytes_of_a_training_step_within_a_tenth(method, checkpointing):
    settings, dtype = Settings(r=16), "fp32" if method == "galore" else "bf16"  # `minilora train` has galore in fp32
    arch = ARCHITECTURES["smollm2-135m"]
    model, _ = load_model("smollm2-135m", dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    if method not in WHOLE:
        arch = replace(arch, n_layers=N_LAYERS)
        model.model.layers = model.model.layers[:N_LAYERS]
        model.config = model.model.config = replace(model.config, n_layers=N_LAYERS)
    if method != "full":  # which is asked for in fp32 there, and measured in bf16 here
        put_new(model, method, settings)
    model.model.gradient_checkpointing = checkpointing
    recipe = Recipe(lr=1e-5, batch_size=4)
    learning = TRAINED[method].learning(settings)(model, recipe, 100)
    tokens = torch.randint(0, 49152, (4, 256))
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        for _ in range(2):  # gradients stay, as from one part of a batch to the next
            loss = loss_of(model, Batch(tokens, tokens))
            (loss + learning.penalty() if learning.penalty else loss).backward()
            learning.optimizer.step()
            del loss

    setup = Setup(
        method=method, r=settings.r, dtype=dtype, batch=4, seq=256, checkpointing=checkpointing, master_weights=False
    )
    predicted = training_bytes(arch, setup)
    assert abs(live.peak - predicted.total) <= 0.1 * live.peak
