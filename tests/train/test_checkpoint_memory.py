"""The memory that a checkpoint takes: what is counted for saving is what is alive then, and reading copies nothing."""

import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from test_memory import LiveBytes

from minilora.llm import Decoder, ModelConfig
from minilora.llm.architectures import ARCHITECTURES, Architecture
from minilora.llm.setup import Setup
from minilora.llm.training_memory import training_bytes
from minilora.train.checkpoint import read_checkpoint, restore, save_checkpoint
from minilora.train.finetune import Recipe
from minilora.train.fits import bytes_needed, bytes_to_save
from minilora.train.methods import METHODS, put_new
from minilora.train.settings import Settings

ARCH = Architecture("llama", 2, 256, 512, 4, 2, 64, 9000)  # 6 million numbers
SETTINGS = Settings(r=8)


def training(method):
    """A model after a step, and what took it."""
    sizes = {"vocab_size": 9000, "hidden_size": 256, "intermediate_size": 512, "n_heads": 4, "n_kv_heads": 2}
    model = Decoder(ModelConfig(**sizes, n_layers=2))
    put_new(model, method, SETTINGS)
    learning = METHODS[method].learning(SETTINGS)(model, Recipe(lr=1e-3, batch_size=1), 100)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    learning.optimizer.step()
    learning.optimizer.zero_grad()
    return model, learning


@pytest.mark.parametrize("method", ["full", "galore", "lora", "adalora"])
def test_saving_takes_what_is_counted(method, tmp_path):
    """To a page of AdamW's, which the moments may not fill. Nothing is copied on the way into the file."""
    model, learning = training(method)
    states = [*(learning.beside.state_dict().values() if learning.beside else []), *tensors_of(learning.optimizer)]
    with LiveBytes([]):
        save_checkpoint(tmp_path / "first", model, learning.optimizer, 1, {}, learning.beside)  # imports what it needs
    with LiveBytes([*model.parameters(), *model.buffers(), *states]) as live:
        tracemalloc.start()
        save_checkpoint(tmp_path / "checkpoint", model, learning.optimizer, 1, {}, learning.beside)
        _, bytes_of_python = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    counted = bytes_to_save(ARCH, Setup(method=method, r=8, dtype="fp32", seq=1))
    assert counted <= live.peak + 2**14  # the rank of each layer as a byte, and such
    assert live.peak <= counted + 2**21 + 2**16
    assert bytes_of_python < 2**20


def test_where_saving_takes_more_than_a_short_step_it_counts():
    """Of Llama-2-7B saving takes 20 bytes a number: 4 of weights, and moments of 8 twice."""
    llama, setup = ARCHITECTURES["llama-2-7b"], Setup(method="full", seq=64)
    assert 1.1 * training_bytes(llama, setup).total < bytes_needed(llama, setup) == 20 * 6_738_415_616


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_checkpoint_is_read_from_the_files_own_pages(tmp_path):
    """So that going on holds the weights and the moments once: what is read is not the process's own memory."""
    model, learning = training("full")
    save_checkpoint(tmp_path / "checkpoint", model, learning.optimizer, 1, {}, learning.beside)
    n_bytes = (tmp_path / "checkpoint").stat().st_size
    restore(read_checkpoint(tmp_path / "checkpoint"), model, learning.optimizer, {})  # imports what it needs
    before = own_bytes()
    checkpoint = read_checkpoint(tmp_path / "checkpoint")
    total = sum(tensor.sum() for tensor in checkpoint.tensors.values() if tensor.is_floating_point())

    assert total and n_bytes > 60e6
    assert own_bytes() - before < n_bytes / 4


def tensors_of(optimizer):
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def own_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
