"""What is counted of each method, beside real layers: parameters, states, and what autograd keeps, to the byte."""

import pytest
import torch

from minilora.llm import Decoder, ModelConfig
from minilora.llm.activations import saved_in_layer
from minilora.llm.architectures import Architecture
from minilora.llm.setup import METHODS, Setup, trained_by_layer, trained_params
from minilora.llm.training_memory import training_bytes
from minilora.torch_lora.inject import count_parameters
from minilora.train.finetune import Recipe
from minilora.train.methods import METHODS as TRAINED
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

    setup = Setup(method=method, r=4, start_r=4, bottleneck=8, n_virtual=3, dtype=dtype, batch=ROWS, seq=SEQ)
    assert three - two == sum(saved_in_layer(ARCH, setup, trained_by_layer(ARCH, setup)[0]).values())


@pytest.mark.parametrize("method", METHODS)
def test_the_count_is_that_of_the_layers(method):
    """Over a model with more heads of queries than of keys, and targets of different shapes."""
    settings = Settings(r=4, start_r=4, bottleneck=8, n_virtual=3)
    model = tiny(3, method, settings, "fp32")

    assert (
        trained_params(ARCH, Setup(method=method, r=4, start_r=4, bottleneck=8, n_virtual=3))
        == count_parameters(model).trainable
    )


@pytest.mark.parametrize("method", sorted({*METHODS} - {"full", "galore", "qlora", "loftq"}))
def test_the_bytes_of_an_adapter_are_what_a_model_has_more(method):
    """Of a model in 4 bits the base changes as well: test_memory and the tests of nf4_bytes look at that."""
    settings = Settings(r=4, start_r=6, bottleneck=8, n_virtual=3, mlp_features=5 if method == "prefix" else None)
    model, plain = tiny(3, method, settings, "fp32"), tiny(3, "full", settings, "fp32")
    allocator = TRAINED[method].learning(settings)(model, Recipe(lr=1e-3, batch_size=1), 100).beside
    beside = [] if allocator is None else [*allocator.sensitivity.values(), *allocator.uncertainty.values()]
    more = bytes_of([*model.parameters(), *model.buffers(), *beside]) - bytes_of([*plain.parameters()])

    setup = Setup(method=method, r=4, start_r=6, bottleneck=8, n_virtual=3, mlp_features=settings.mlp_features)
    assert training_bytes(ARCH, setup).adapter == more


def test_galores_state_is_what_it_says_of_itself():
    settings = Settings(r=4)
    model = tiny(3, "galore", settings, "fp32")
    optimizer = TRAINED["galore"].learning(settings)(model, Recipe(lr=1e-3, batch_size=1), 100).optimizer

    assert training_bytes(ARCH, Setup(method="galore", r=4)).optimizer == optimizer.report().total_bytes


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)
