"""What llm/activations counts of a layer, beside the tensors that autograd really keeps of it: the same bytes."""

from dataclasses import replace

import pytest
import torch

from minilora.llm import Decoder, ModelConfig
from minilora.llm.activations import saved_in_layer
from minilora.llm.architectures import Architecture
from minilora.llm.setup import METHODS, Setup, trained_by_layer, trained_params
from minilora.torch_lora.inject import count_parameters
from minilora.train.methods import Settings, put_new

ARCH = Architecture("llama", 3, 64, 96, 4, 2, 16, 50)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS, SEQ = 2, 10


def tiny(n_layers: int, method: str, settings: Settings, dtype: str) -> Decoder:
    """A decoder of ARCH's sizes that `method` trains. All its weights train where it is of another dtype than fp32."""
    sizes = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "n_heads": 4, "n_kv_heads": 2}
    model = Decoder(ModelConfig(**sizes, n_layers=n_layers)).to(DTYPES[dtype])
    if method not in ("full", "galore"):
        put_new(model, method, settings)
    return model


def bytes_kept(model: Decoder) -> int:
    """The bytes of what autograd keeps for the backward pass, the model's own tensors left out."""
    storages = {}

    def see(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        hidden = model.model(torch.arange(ROWS * SEQ).view(ROWS, SEQ))
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    assert hidden.requires_grad
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_layer_more_keeps_the_bytes_that_are_counted_for_it(method, dtype):
    """Exactly: what the embedding, the first layer and the last norm keep is the same in both models."""
    settings = Settings(r=4, start_r=4, bottleneck=8, n_virtual=3)
    two, three = (bytes_kept(tiny(n_layers, method, settings, dtype)) for n_layers in (2, 3))

    setup = Setup(method=method, r=4, bottleneck=8, n_virtual=3, dtype=dtype, batch=ROWS, seq=SEQ)
    assert three - two == sum(saved_in_layer(ARCH, setup, trained_by_layer(ARCH, setup)[0]).values())


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_that_of_the_layers(method):
    """Over a model with more heads of queries than of keys, and targets of different shapes."""
    settings = Settings(r=4, start_r=4, bottleneck=8, n_virtual=3)
    model = tiny(3, method, settings, "fp32")

    arch = replace(ARCH, n_layers=3)
    assert (
        trained_params(arch, Setup(method=method, r=4, bottleneck=8, n_virtual=3)) == count_parameters(model).trainable
    )
